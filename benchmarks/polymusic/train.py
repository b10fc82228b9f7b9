"""Train a deep model on polyphonic music and score it on the test part.

    python benchmarks/polymusic/train.py dmm jsb --seed 0

reads `configs/dmm.toml`, trains on the training part, stops by the validation part and writes
settings, curves and likelihoods to `results/dmm-jsb-0.json`. Nothing is chosen by the test part.
Weights and checkpoints stay in the folder given by --work; a run that was interrupted goes on from
there. "baselines" in place of a model computes the two simple ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pianorolls import FILES, Sequences, independent_keys, load, markov_chain, transposed

import seqdgm as sq
from seqdgm.evaluation.provenance import versions
from seqdgm.models import lstm_ssm, noisin, srnn, storn, vrnn, zforcing

HERE = Path(__file__).parent
CLASSES = {
    "RNN": sq.RNN,
    "DMM": sq.DMM,
    "STORN": storn.STORN,
    "VRNN": vrnn.VRNN,
    "SRNN": srnn.SRNN,
    "LSTMSSM": lstm_ssm.LSTMSSM,
    "ZForcing": zforcing.ZForcing,
    "Noisin": noisin.Noisin,
}
CHUNK = 4  # series scored at a time, which bounds the memory that particles take


@dataclass(frozen=True)
class Effort:
    """Particles of the scores."""

    elbo: int
    iwae: int
    particle: int


def settings(name: str, data: str, epochs: int | None) -> dict[str, dict[str, Any]]:
    """Tables "model", "fit" and "data" of a configuration, with what it changes for a data set."""
    raw = tomllib.loads((HERE / "configs" / f"{name}.toml").read_text("utf-8"))
    changes, tables = raw.get(data, {}), ("model", "fit", "data")
    out = {table: {**raw.get(table, {}), **changes.get(table, {})} for table in tables}
    if epochs is not None:
        out["fit"]["max_epochs"] = epochs
    return out


def score(model: sq.SequenceModel, rolls: Sequences, how: Mapping[str, Any]) -> dict[str, Any]:
    """Negative log-likelihood in nats per step, with its standard error.

    The latter is None where all particles of a series descend from one, which tells nothing of it.
    """
    order = np.argsort([len(roll) for roll in rolls], kind="stable")
    total, variance, kinds = 0.0, 0.0, set()
    for k in range(0, len(order), CHUNK):
        found = model.log_prob([rolls[i] for i in order[k : k + CHUNK]], seed=k, **how)
        total += float(found.value.sum())
        variance += float(np.square(found.stderr).sum())
        kinds.add(found.kind)
    steps = sum(map(len, rolls))
    stderr = variance**0.5 / steps
    return {
        "nats_per_step": -total / steps,
        "stderr": stderr if math.isfinite(stderr) else None,  # JSON has no infinity
        "kind": " or ".join(sorted(kinds)),
    }


def scores(model: sq.SequenceModel, rolls: Sequences, effort: Effort) -> dict[str, Any]:
    """The likelihood itself, or the bounds and the estimate, each by its name."""
    if model.latent_dim == 0:
        return {"exact": score(model, rolls, {})}
    elbo = {"method": "variational", "n_particles": effort.elbo}
    iwae = {"method": "variational", "objective": "iwae", "n_particles": effort.iwae}
    particle = {"method": "particle", "n_particles": effort.particle}
    return {
        "elbo": score(model, rolls, elbo) | {"paths": effort.elbo},
        "iwae": score(model, rolls, iwae) | {"particles": effort.iwae},
        "particle": score(model, rolls, particle) | {"particles": effort.particle},
    }


def reporter() -> Callable[[Any], None]:
    """Says after each epoch where training is."""

    def say(report: Any) -> None:
        line = (
            f"epoch {report.n_iter}: train {-report.objective[-1]:.3f}, "
            f"valid {-report.valid_objective[-1]:.3f}, best epoch {report.best_epoch}, "
            f"{report.seconds / 60:.1f} min"
        )
        print(line, file=sys.stderr, flush=True)

    return say


def train(name: str, data: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, score and describe one run."""
    rolls, chosen = load(data), settings(name, data, options.epochs)
    options.work.mkdir(parents=True, exist_ok=True)
    stem = options.work / f"{name}-{data}-{options.seed}"
    checkpoint = stem.with_suffix(".checkpoint")
    how: dict[str, Any] = chosen["fit"] | {"checkpoint": checkpoint, "on_epoch": reporter()}
    if checkpoint.exists():
        how["resume"] = checkpoint
    model = CLASSES[chosen["model"]["class"]](
        **{key: value for key, value in chosen["model"].items() if key != "class"}
    )
    given = transposed(rolls["train"], chosen["data"].get("transpose", 0))
    model.fit(given, valid=rolls["valid"], seed=options.seed, **how)
    model.save(stem.with_suffix(".safetensors"))
    begin, report = time.perf_counter(), model.fit_report_
    effort = Effort(options.paths, options.particles, options.particles)
    found = {part: scores(model, rolls[part], effort) for part in ("valid", "test")}
    return {
        "name": name,
        "data": data,
        "seed": options.seed,
        "settings": chosen,
        "epochs": report.n_iter,
        "best_epoch": report.best_epoch,
        "messages": report.messages,
        "versions": versions(),
        "train_hours": report.seconds / 3600,
        "score_hours": (time.perf_counter() - begin) / 3600,
        "negative_log_likelihood": found,
        "curves": {
            "train": report.objective,
            "reconstruction": report.reconstruction,
            "divergence": report.divergence,
            "gradient_norm": report.gradient_norm,
            "valid": report.valid_objective,
        },
    }


def baselines(data: str) -> dict[str, Any]:
    """Scores of the simple models, in nats per step."""
    rolls = load(data)
    given = (rolls["train"], rolls["test"])
    return {
        "name": "baselines",
        "data": data,
        "negative_log_likelihood": {
            "independent keys": independent_keys(*given),
            "per-key Markov chain": markov_chain(*given),
        },
    }


def main() -> None:
    """Run the command line."""
    known = sorted(path.stem for path in (HERE / "configs").glob("*.toml"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=["baselines", *known])
    parser.add_argument("data", choices=list(FILES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="fewer or more than the configuration has")
    parser.add_argument("--paths", type=int, default=100, help="paths of the ELBO's average")
    parser.add_argument("--particles", type=int, default=100, help="particles of IWAE and filter")
    parser.add_argument("--work", type=Path, default=HERE / "runs", help="weights, checkpoints")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.name == "baselines":
        record, stem = baselines(options.data), f"baselines-{options.data}"
    else:
        record = train(options.name, options.data, options)
        stem = f"{options.name}-{options.data}-{options.seed}"
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (options.output / f"{stem}.json").write_text(text, "utf-8")
    print(json.dumps(record["negative_log_likelihood"], indent=1))


if __name__ == "__main__":
    main()
