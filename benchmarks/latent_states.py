"""Latent states whose truth is known: errors and honesty of classical and deep filters.

    python benchmarks/latent_states.py

The classical filters are given the true model, and the learned ones only series of observations.
Their states are mapped to the truth by the affine map that is best on the training series, and all
are scored on the same new series. `--work` keeps what is finished, and an interrupted run goes on
from there. Nothing is tuned: sizes and settings are the same for all systems.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import environment, write_table
from torch.distributions import Distribution, MultivariateNormal, Normal

import seqdgm as sq
from seqdgm.evaluation.latent import learn_alignment, state_coverage, state_nees, state_rmse

SYSTEMS = (
    "linear-gaussian",
    "stochastic-volatility",
    "lorenz-63",
    "lorenz-96",
    "growth",
    "pendulum",
    "bouncing-ball",
    "switching",
    "poisson-counts",
)
ROBOT = "landmark robot"
STEPS = 100
SKIPPED = 10  # first steps, in which the start is forgotten
PARTICLES, DEEP_PARTICLES = 1000, 100
EPOCHS = 100
DRIVE = 1000  # steps of the robot
SEED, TRAIN_SEED, TEST_SEED = 0, 1, 2  # of models and filters, and of the simulated series
TIMED = 2.0  # seconds after which a filter is not timed for a third time
WORK = Path(__file__).parent / "work" / "latent_states"
COLUMNS = (
    "system (sd of the states)",
    "filter",
    "RMSE (se)",
    "NEES / d (se)",
    "coverage 80 %",
    "coverage 95 %",
    "fit, 1,000 series",
    "filter, 1,000 series",
)

# Engines of the filters that are given the true model.
CLASSICAL = {"KF": "kalman", "EKF": "ekf", "UKF": "ukf", "particle filter": "particle"}
LEARNED = ("KF, learned", "DMM", "SRNN")
WHY_NOT = {
    ("linear-gaussian", "EKF"): "is the KF here",
    ("linear-gaussian", "UKF"): "is the KF here",
    ("stochastic-volatility", "EKF"): "the mean of the data tells nothing of the state",
    ("stochastic-volatility", "UKF"): "the mean of the data tells nothing of the state",
    ("switching", "KF"): "the regimes are not known",
    ("switching", "EKF"): "the regimes are discrete",
    ("switching", "UKF"): "the regimes are discrete",
    **{(ROBOT, name): "one drive is nothing to learn a map from" for name in LEARNED},
}


@dataclass(frozen=True)
class Task:
    """Series to learn from and to score, with their states; `keep`: elements that are scored."""

    name: str
    model: sq.StateSpaceModel
    train: sq.Panel | None
    train_states: np.ndarray | None
    test: sq.Panel
    states: np.ndarray
    keep: int
    inputs: Any = None


class Robot(sq.StateSpaceModel):
    """Pose (x, y, heading) driven by odometry; a laser `ahead` of its centre sees landmarks."""

    latent_dim = 3

    def __init__(self, found: sq.datasets.Dataset, pose: np.ndarray) -> None:
        super().__init__()
        held = found.constants
        self.places = torch.as_tensor(np.asarray(held["landmarks"], float))
        self.pose, self.ahead, self.dt = torch.as_tensor(pose), float(held["d"]), float(held["dt"])
        count = len(self.places)
        variance = [float(held["r_var"])] * count + [float(held["b_var"])] * count
        self.spread = torch.tensor(variance, dtype=torch.float64).sqrt()
        # Of the speed, of a little slip sideways, and of the turning rate.
        self.noise = torch.tensor(
            [float(held["v_var"]), 0.02**2, float(held["om_var"])], dtype=torch.float64
        )

    def initial(self, u: Any) -> Distribution:
        return Normal(self.pose, 0.05)

    def transition(self, z: torch.Tensor, u: Any) -> Distribution:
        heading, (speed, turn) = z[..., 2], u.values.unbind(-1)
        c, s = heading.cos(), heading.sin()
        mean = z + self.dt * torch.stack([speed * c, speed * s, turn + 0 * c], -1)
        zero, one = torch.zeros_like(c), torch.ones_like(c)
        rows = [[c, -s, zero], [s, c, zero], [zero, zero, one]]
        turned = torch.stack([torch.stack(row, -1) for row in rows], -2)
        cov = self.dt**2 * turned @ (self.noise[:, None] * turned.mT)
        return MultivariateNormal(mean, cov)

    def emission(self, s: torch.Tensor, u: Any) -> Distribution:
        x, y, heading = s.unbind(-1)
        laser = torch.stack([x + self.ahead * heading.cos(), y + self.ahead * heading.sin()], -1)
        away = self.places - laser[..., None, :]
        # The laser looks ahead, so that no bearing it gives is near the seam at pi.
        bearing = wrap(torch.atan2(away[..., 1], away[..., 0]) - heading[..., None])
        return Normal(torch.cat([away.norm(dim=-1), bearing], -1), self.spread)


def wrap(angle: Any) -> Any:
    return (angle + np.pi) % (2 * np.pi) - np.pi


def simulated(name: str, series: int) -> Task:
    train = sq.datasets.simulate(name, series, STEPS, seed=TRAIN_SEED)
    test = sq.datasets.simulate(name, series, STEPS, seed=TEST_SEED)
    # Regimes come as indicators after the continuous state, which alone is scored.
    keep = 1 if name == "switching" else test.states.shape[2]
    return Task(
        name,
        test.model,
        train.y,
        train.states[..., :keep],
        test.y,
        test.states[..., :keep],
        keep,
    )


def robot(steps: int) -> Task:
    found = sq.datasets.load("localisation-2")
    states = found.states.to_numpy(float)[:steps]
    odometry = found.inputs.to_numpy(float)[:steps].copy()
    odometry[0] = 0.0  # the move into the first step, which there is none of
    model = Robot(found, states[0].copy())
    y = sq.Panel.of(found.y.to_numpy(float)[:steps])
    return Task(ROBOT, model, None, None, y, states[None], 3, odometry)


def learn(name: str, task: Task) -> sq.SequenceModel:
    dim = task.states.shape[2]
    if name == "KF, learned":
        return sq.LinearGaussianSSM(latent_dim=dim).fit(task.train, pooled=True, seed=SEED)
    kind = {"DMM": sq.DMM, "SRNN": sq.SRNN}[name]
    emission = "poisson" if task.name == "poisson-counts" else "gaussian"
    sizes = {"latent_dim": max(4, dim), "hidden_dim": 32, "encoder_dim": 32}
    model = kind(**sizes, emission=emission, max_epochs=EPOCHS, kl_warmup=EPOCHS // 4)
    return model.fit(task.train, seed=SEED)


def measure(task: Task, name: str) -> dict[str, Any]:
    """Fit where something is to be learned, filter and score."""
    record: dict[str, Any] = {"system": task.name, "filter": name}
    truth = task.states.copy()
    truth[:, :SKIPPED] = np.nan
    record["spread"] = float(np.sqrt(np.nanvar(truth, axis=(0, 1)).mean()))
    engine = CLASSICAL.get(name)
    if (task.name, name) in WHY_NOT:
        return {**record, "why_not": WHY_NOT[task.name, name]}
    model, method = task.model, engine
    if name in LEARNED:
        begin = time.process_time()
        model, method = learn(name, task), "auto"
        record["fit_seconds"] = time.process_time() - begin
    elif engine == "particle" and "rao-blackwell" in model.engines:
        method = "rao-blackwell"
    elif engine not in model.engines:
        return {**record, "why_not": "not linear and Gaussian"}
    particles = DEEP_PARTICLES if name in LEARNED else PARTICLES
    known = {"method": method, "n_particles": particles, "seed": SEED}
    few = None if task.inputs is None else task.inputs[:5]
    model.filter(sq.Panel.of(task.test.values[:, :5]), few, **known)  # imports and compiles
    found, record["filter_seconds"] = timed(lambda: model.filter(task.test, task.inputs, **known))
    record["series"] = task.test.n_series
    if name in LEARNED:
        seen = model.filter(task.train, **known)
        early = task.train_states.copy()
        early[:, :SKIPPED] = np.nan
        found = learn_alignment(seen, early).apply(found)
    else:
        truth = np.concatenate(
            [truth, np.full((*truth.shape[:2], found.mean.shape[2] - task.keep), np.nan)], 2
        )
    if task.name == ROBOT:
        truth[..., 2] = found.mean[..., 2] + wrap(truth[..., 2] - found.mean[..., 2])
    record["mse"] = (state_rmse(found, truth) ** 2).tolist()
    for level in (80, 95):
        record[f"coverage-{level}"] = float(state_coverage(found, truth, level).mean())
    try:
        record["nees"] = state_nees(found, truth).value.tolist()
    except ValueError as error:
        record["no_nees"] = str(error)
    return record


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the fewest seconds of three calls (two if they take long).

    The first may compile what a shorter panel did not need.
    """
    spent: list[float] = []
    while len(spent) < 2 or (len(spent) < 3 and sum(spent) < TIMED):
        begin = time.process_time()
        found = call()
        spent.append(time.process_time() - begin)
    return found, min(spent)


def lines(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table; NEES is a mean, which few collapsed particle clouds can ruin."""
    out = []
    for r in records:
        head = [f"{r['system']} ({r['spread']:.3g})", r["filter"]]
        if "why_not" in r:
            out.append([*head, f"– {r['why_not']}", *["–"] * 5])
            continue
        mse = np.array(r["mse"])
        rmse = mse.mean() ** 0.5
        fit = f"{1000 * r['fit_seconds'] / r['series']:.0f} s" if "fit_seconds" in r else "–"
        out.append(
            [
                *head,
                with_error(rmse, standard_error(mse) / (2 * rmse)),
                nees(r),
                f"{r['coverage-80']:.1f}",
                f"{r['coverage-95']:.1f}",
                fit,
                filter_time(r),
            ]
        )
    return out


def filter_time(record: Mapping[str, Any]) -> str:
    """For 1,000 series; what was measured on one alone is not scaled up."""
    seconds, series = record["filter_seconds"], record["series"]
    return f"{seconds:.1f} s for the one" if series == 1 else f"{1000 * seconds / series:.2f} s"


def nees(record: Mapping[str, Any]) -> str:
    if "no_nees" in record:
        return "– covariance singular"
    values = np.array(record["nees"])
    mean = values.mean()
    return "> 1000" if mean > 1000 else with_error(mean, standard_error(values))


def with_error(value: float, error: float) -> str:
    return f"{value:.3f}" if np.isnan(error) else f"{value:.3f} ({error:.3f})"


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=WORK, help="folder of finished parts")
    parser.add_argument("--system", action="append", choices=(*SYSTEMS, ROBOT), help="default all")
    parser.add_argument("--filter", action="append", choices=(*CLASSICAL, *LEARNED))
    parser.add_argument("--series", type=int, default=100, help="series to learn from and to score")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for system in options.system or (*SYSTEMS, ROBOT):
        task = robot(DRIVE) if system == ROBOT else simulated(system, options.series)
        for name in options.filter or (*CLASSICAL, *LEARNED):
            path = options.work / f"{system}-{name}-{options.series}.json".replace(" ", "-")
            if not path.exists():
                begin = time.perf_counter()
                record = measure(task, name)
                record["hours"] = (time.perf_counter() - begin) / 3600
                path.write_text(json.dumps(record), "utf-8")
            records.append(json.loads(path.read_text("utf-8")))
            print(*lines(records)[-1], sep=" | ", flush=True)
    if options.series == 100 and not options.system and not options.filter:
        about = (
            f"Filtered states of 100 new series of {STEPS} steps beside the true ones, from step "
            f"{SKIPPED} on; the classical filters know the true model, the learned ones saw 100 "
            f"other series ({EPOCHS} epochs) and are aligned by an affine map. {PARTICLES:,} "
            f"particles, {DEEP_PARTICLES} of the learned deep models. The robot drives once, "
            f"{DRIVE:,} steps. Seconds of processor time, measured on 100 series and multiplied "
            f"by ten. Simulated with seeds {TRAIN_SEED} (to learn from) and {TEST_SEED} (to score)."
        )
        spent = {"seed": SEED, "hours": sum(record["hours"] for record in records)}
        write_table("latent_states", about, COLUMNS, lines(records), {**environment(), **spent})


if __name__ == "__main__":
    main()
