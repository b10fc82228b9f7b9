"""Vector forecasts of exchange rates, influenza-like illness and a transformer's temperature.

exchange_rate is split as in the published tables: learned from the first 6,071 days, forecast in
five windows of 30 days after them. Of the other two the windows are the test part of the usual
split, from its beginning. Models are fitted once, before the first window.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from _accuracy import ABOUT_TIMES, SEED, Entry, Plan, arguments, write
from _harness import duration

import seqdgm as sq
from seqdgm.evaluation import metrics
from seqdgm.model import SequenceModel

# CRPS_sum of Rasul et al. (2021), ICML, table 2; CRPS of Salinas et al. (2019), NeurIPS.
PUBLISHED = {
    "exchange_rate": {
        "VAR, Rasul et al. 2021": ("", "0.005"),
        "VAR with lasso, Rasul et al. 2021": ("", "0.012"),
        "vector LSTM (DeepAR of all columns), Rasul et al. 2021": ("", "0.008"),
        "LSTM with Gaussian copula, Salinas et al. 2019": ("0.008", "0.007"),
        "TimeGrad, Rasul et al. 2021": ("", "0.006"),
    }
}
TIMES = ("fit of 1,000 series", "forecast of 1,000 windows")
COLUMNS = ("data", "by", "CRPS", "CRPS_sum", "coverage-95", *TIMES)
EPOCHS = 40
DRAWS = 200
LEVELS = tuple((np.arange(1, 20) / 20).tolist())


class Task(NamedTuple):
    """Rows of a data set: from where models learn, and the windows after that."""

    plan: Plan
    learned: slice
    horizon: int
    n_windows: int


def walk(dim: int) -> SequenceModel:
    """Correlated random walks, seen with noise."""
    eye = np.eye(dim)
    return sq.LinearGaussianSSM(
        F=eye, H=eye, d=np.zeros(dim), b=np.zeros(dim), diffuse=True, scale="standard"
    )


def statistical(dim: int) -> Mapping[str, Entry]:
    """Linear-Gaussian state spaces."""
    learning = {"method": "em", "max_iter": 50}
    eye = np.eye(dim)
    return {
        "LinearGaussianSSM, random walks": Entry(walk(dim), learning, draws=DRAWS),
        "LinearGaussianSSM, learned": Entry(
            sq.LinearGaussianSSM(latent_dim=2 * dim, scale="standard"), learning, draws=DRAWS
        ),
        "LinearGaussianSSM as VAR(1)": Entry(
            sq.LinearGaussianSSM(H=eye, R=1e-6 * eye, scale="standard"), learning, draws=DRAWS
        ),
    }


def deep(season: int, epochs: int) -> Mapping[str, Entry]:
    """Networks."""
    common: dict[str, Any] = {
        "season": season if season > 1 else None,
        "max_epochs": epochs,
        "emission": "gaussian-full",
    }
    # One long series: an update for each window of 48 steps.
    training = {"valid_fraction": 0.0, "schedule": "cosine", "truncate": 48}
    rnn = sq.RNN(cell="gru", hidden_dim=40, **common)
    dmm = sq.DMM(latent_dim=8, kl_warmup=epochs // 5, **common)
    return {
        "RNN": Entry(rnn, training, draws=DRAWS),
        "RNN of the steps": Entry(rnn, training, draws=DRAWS, difference=True),
        "DMM": Entry(dmm, training, draws=DRAWS),
        "DMM of the steps": Entry(dmm, training, draws=DRAWS, difference=True),
    }


def tasks(family: Callable[[int, int], Mapping[str, Entry]]) -> tuple[Task, ...]:
    """The data sets: their columns and season, what is learned from, horizon and windows."""
    return (
        Task(Plan("exchange_rate", family(8, 1), {}), slice(0, 6071), 30, 5),
        Task(Plan("national_illness", family(7, 52), {}), slice(0, 773), 24, 8),
        Task(Plan("etth1", family(7, 24), {}), slice(8640, 11520), 24, 20),
    )


TABLES = {
    "multivariate": tasks(lambda dim, season: statistical(dim)),
    "multivariate_deep": tasks(lambda dim, season: deep(season, EPOCHS)),
}


def measure(one: Task, name: str, options: argparse.Namespace) -> tuple[list[str], float]:
    """A line of the table, one model on one data set, and its seconds."""
    found = sq.datasets.load(one.plan.data)
    ahead = one.horizon * one.n_windows
    stop = one.learned.stop if options.validate else one.learned.stop + ahead
    y = found.y.to_numpy()[one.learned.start : stop]
    if options.tiny:
        y = y[-(200 + ahead) :]
    entry = one.plan.entries[name]
    kept = None
    if options.cache is not None:
        part = "validation" if options.validate else "test"
        stem = "".join(c for c in name if c.isalnum())
        kept = options.cache / f"{one.plan.data}-{part}-{len(y)}-{stem}.json"
        if kept.exists():
            line, seconds = json.loads(kept.read_text("utf-8"))
            return line, seconds
    cuts = [len(y) - ahead + k * one.horizon for k in range(one.n_windows)]
    samples, fitting, forecasting = draw(entry, y, cuts, one.horizon)
    held = np.stack([y[cut : cut + one.horizon] for cut in cuts])
    flat, draws = (np.concatenate(np.moveaxis(a, -1, 0)) for a in (held, samples))
    quantiles = metrics.sample_quantiles(draws, LEVELS)
    lo, hi = metrics.sample_quantiles(draws, (0.025, 0.975))
    line = [
        one.plan.data,
        name,
        f"{metrics.weighted_quantile_loss(flat, quantiles, LEVELS):.4f}",
        f"{metrics.crps_sum(held, samples, normalised=True):.4f}",
        f"{metrics.coverage(flat, lo, hi, aggregate='pooled'):.1f} %",
        duration(fitting * 1000),
        duration(forecasting / one.n_windows * 1000),
    ]
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps([line, fitting + forecasting]), "utf-8")
    return line, fitting + forecasting


def draw(
    entry: Entry, y: np.ndarray, cuts: Sequence[int], horizon: int
) -> tuple[np.ndarray, float, float]:
    """Draws after each cut, (cuts, draws, horizon, dim), and seconds of fit and forecasts."""

    def shown(rows: np.ndarray) -> np.ndarray:
        return np.diff(rows, axis=0) if entry.difference else rows

    begin = time.perf_counter()
    model = entry.model.clone().fit(shown(y[: cuts[0]]), seed=SEED, **entry.fit)
    fitting = time.perf_counter() - begin
    samples = []
    for k, cut in enumerate(cuts):
        future = model.forecast(horizon, shown(y[:cut]), n_samples=entry.draws, seed=SEED + k)
        path = future.sample(entry.draws, seed=SEED + k)[0]
        samples.append(y[cut - 1] + path.cumsum(axis=1) if entry.difference else path)
    return np.stack(samples), fitting, time.perf_counter() - begin - fitting


def tabulate_one(table: str, options: argparse.Namespace) -> None:
    """Measure and write one table."""
    rows, seconds = [], 0.0
    for one in TABLES[table]:
        if options.data and one.plan.data not in options.data:
            continue
        for name in one.plan.entries:
            if options.model and name not in options.model:
                continue
            line, spent = measure(one, name, options)
            rows.append(line)
            seconds += spent
            print(", ".join(line), flush=True)
        for name, (crps, total) in PUBLISHED.get(one.plan.data, {}).items():
            rows.append([one.plan.data, f"{name}, published", crps, total, "", "", ""])
    own = f" RNN and DMM were trained for {EPOCHS} epochs." if table.endswith("deep") else ""
    about = (
        "Vector forecasts. CRPS is the weighted quantile loss at 0.05, ..., 0.95 over all columns, "
        "CRPS_sum that of the sum of the columns, from 200 draws. exchange_rate: learned from "
        "6,071 days, five windows of 30; national_illness: 773 weeks, eight windows of 24; etth1: "
        "the 2,880 hours before the test part, twenty windows of 24. Fitted once, before the first "
        'window. Models "of the steps" see differences and forecast their sums. '
        f"{ABOUT_TIMES[:-1]}, given for 1,000 such series, each fitted by itself.{own}"
    )
    plans = [one.plan for one in TABLES[table]]
    write(table, about, COLUMNS, rows, plans, options, seconds)


def main() -> None:
    names = [one.plan.data for one in TABLES["multivariate"]]
    options = arguments(__doc__, names, list(TABLES))
    for table in TABLES:
        if not options.table or table in options.table:
            tabulate_one(table, options)


if __name__ == "__main__":
    main()
