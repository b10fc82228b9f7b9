"""Vector forecasts of exchange rates, influenza-like illness and a transformer's temperature.

exchange_rate is split as in the published tables: learned from the first 6,071 days, forecast in
five windows of 30 days after them. Of the other two the windows are the test part of the usual
split, from its beginning. Models are fitted once, before the first window.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from _accuracy import SEED, Entry, Plan, arguments, write

import seqdgm as sq
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
COLUMNS = ("data", "by", "CRPS", "CRPS_sum", "coverage-95", "fit", "forecast of a window")
DRAWS = 200


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


def task(
    name: str, learned: slice, horizon: int, n_windows: int, dim: int, season: int, epochs: int
) -> Task:
    deep: dict[str, Any] = {
        "season": season if season > 1 else None,
        "max_epochs": epochs,
        "emission": "gaussian-full",
    }
    options = {"valid_fraction": 0.0, "schedule": "cosine"}
    entries = {
        "LinearGaussianSSM, random walks": Entry(walk(dim), {"method": "em", "max_iter": 50}),
        "LinearGaussianSSM, learned": Entry(
            sq.LinearGaussianSSM(latent_dim=2 * dim, scale="standard"),
            {"method": "em", "max_iter": 50},
        ),
        "LinearGaussianSSM as VAR(1)": Entry(
            sq.LinearGaussianSSM(H=np.eye(dim), R=1e-6 * np.eye(dim), scale="standard"),
            {"method": "em", "max_iter": 50},
        ),
        "RNN": Entry(sq.RNN(cell="gru", hidden_dim=40, **deep), options | {"truncate": 48}),
        "DMM": Entry(sq.DMM(latent_dim=8, kl_warmup=epochs // 5, **deep), options),
    }
    return Task(Plan(name, entries, {}), learned, horizon, n_windows)


TASKS = (
    task("exchange_rate", slice(0, 6071), 30, 5, 8, 1, 40),
    task("national_illness", slice(0, 773), 24, 8, 7, 52, 100),
    task("etth1", slice(8640, 11520), 24, 20, 7, 24, 40),
)


def measure(one: Task, name: str, options: Any) -> tuple[list[str], float]:
    """A line of the table, one model on one data set, and its seconds."""
    found = sq.datasets.load(one.plan.data)
    ahead = one.horizon * one.n_windows
    begin, end = one.learned.start, one.learned.stop
    stop = end if options.validate else end + ahead
    y = found.y.to_numpy()[begin:stop]
    if options.tiny:
        y = y[-(200 + ahead) :]
    entry = one.plan.entries[name]
    cache = None
    if options.cache is not None:
        part = "validation" if options.validate else "test"
        stem = "".join(c for c in name if c.isalnum())
        cache = options.cache / f"{one.plan.data}-{part}-{len(y)}" / stem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = sq.compare(
            {name: entry.model},
            y,
            horizon=one.horizon,
            season=found.season,
            n_windows=one.n_windows,
            refit=False,
            level=(95,),
            n_samples=DRAWS,
            seed=SEED,
            fit_options={name: dict(entry.fit)},
            errors="raise",
            cache=cache,
        )
    row = result.table.loc[name]
    total = np.abs(y[-ahead:].sum(1)).mean()
    line = [
        one.plan.data,
        name,
        f"{row['wQL']:.4f}",
        f"{row['CRPS_sum'] / total:.4f}",
        f"{row['coverage-95']:.1f} %",
        f"{row['fit_seconds']:.1f} s",
        f"{row['forecast_seconds'] / one.n_windows:.2f} s",
    ]
    return line, float(row["fit_seconds"] + row["forecast_seconds"])


def main() -> None:
    options = arguments(__doc__, [one.plan.data for one in TASKS])
    rows, seconds = [], 0.0
    for one in TASKS:
        if options.data and one.plan.data not in options.data:
            continue
        for name in one.plan.entries:
            if options.model and name not in options.model:
                continue
            line, spent = measure(one, name, options)
            rows.append(line)
            seconds += spent
            print(", ".join(rows[-1]), flush=True)
        for name, (crps, total) in PUBLISHED.get(one.plan.data, {}).items():
            rows.append([one.plan.data, f"{name}, published", crps, total, "", "", ""])
    about = (
        "Vector forecasts. CRPS is the weighted quantile loss at 0.1, ..., 0.9 over all columns, "
        "CRPS_sum the CRPS of the sum of the columns over the mean of its absolute value "
        "(published ones are of more quantiles). exchange_rate: learned from 6,071 days, five "
        "windows of 30; national_illness: 773 weeks, eight windows of 24; etth1: the 2,880 hours "
        "before the test part, twenty windows of 24. Fitted once, before the first window. "
        "Wall-clock seconds, one thread, beside other work."
    )
    plans = [one.plan for one in TASKS]
    write("multivariate", about, COLUMNS, rows, plans, options, seconds)


if __name__ == "__main__":
    main()
