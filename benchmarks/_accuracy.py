"""Forecasts of whole data sets by several models and by their averages, and their scores."""

from __future__ import annotations

import argparse
import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _harness import RESULTS, environment, tabulate, write_table

import seqdgm as sq
from seqdgm.evaluation import metrics
from seqdgm.model import SequenceModel

SEED = 0
LEVEL = 95
ABOUT_TIMES = "Wall-clock times of one thread."
# The centre of the innermost interval is the median, which is what sMAPE and MASE reward.
_CENTRE = 1


@dataclass(frozen=True)
class Entry:
    """A model of a table.

    `pooled` says that one set of parameters serves all series, so that they are fitted together;
    other models are fitted in blocks of series, each of which is kept once it is finished. `lags`
    are past values, in standardised logarithms, that enter as known inputs: none may be shorter
    than the horizon. Models see the newest `history` steps (default: those of the plan), with
    `shift` added, so that logarithms have no zeros to meet. `centred` series are moved by the mean
    of their last season and scaled by their mean seasonal step; of vectors with `difference` the
    steps are modelled, and their forecasts summed.
    """

    model: SequenceModel
    fit: Mapping[str, Any] = field(default_factory=dict)
    pooled: bool = False
    draws: int = 100
    lags: Sequence[int] = ()
    history: int | None = None
    shift: float = 0.0
    centred: bool = False
    difference: bool = False


@dataclass(frozen=True)
class Plan:
    """What is done with one data set.

    `averages` are plain means of the forecasts of the models that they name. Models see the newest
    `history` steps of a series (default: all), scores are scaled by all of them.
    """

    data: str
    entries: Mapping[str, Entry]
    averages: Mapping[str, Sequence[str]]
    history: int | None = None
    block: int = 200


class Series(NamedTuple):
    """Training parts and held-out values of a panel."""

    train: list[np.ndarray]
    held: np.ndarray
    season: int

    @property
    def padded(self) -> np.ndarray:
        out = np.full((len(self.train), max(map(len, self.train))), np.nan)
        for row, x in zip(out, self.train, strict=True):
            row[: len(x)] = x
        return out


class Forecasts(NamedTuple):
    """Medians and intervals, each of shape (series, horizon), and what they took."""

    point: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    fit_seconds: float
    forecast_seconds: float


def read(plan: Plan, *, validate: bool, limit: int | None) -> Series:
    """The panel; to validate, its test part is left out and the end of training held out.

    Series too short to be cut once more are left out of a validation.
    """
    found = sq.datasets.load(plan.data)
    assert found.horizon is not None
    train, held = (
        [part.to_numpy() for _, part in frame.groupby("unique_id", sort=False)["y"]]
        for frame in (found.train, found.test)
    )
    if validate:
        long = [x for x in train if len(x) >= 2 * found.horizon + 6]
        train, held = [x[: -found.horizon] for x in long], [x[-found.horizon :] for x in long]
    if limit is not None and limit < len(train):
        chosen = np.linspace(0, len(train) - 1, limit).round().astype(int)
        train, held = [train[k] for k in chosen], [held[k] for k in chosen]
    return Series(train, np.array(held), found.season)


def forecast(plan: Plan, name: str, series: Series, cache: Path | None) -> Forecasts:
    """Forecasts of one model, block by block; a series on which it fails raises."""
    entry = plan.entries[name]
    size = len(series.train) if entry.pooled else plan.block
    done = []
    for first in range(0, len(series.train), size):
        rows = slice(first, first + size)
        pairs = zip(series.train[rows], series.held[rows], strict=True)
        whole = [np.concatenate(pair) for pair in pairs]
        kept = entry.history or plan.history
        size_of = [kept + len(series.held[0]) if kept else len(x) for x in whole]
        loc, scale = units(entry, series, rows)
        moved = [(x - m) / s for x, m, s in zip(whole, loc, scale, strict=True)]
        y = [x[-count:] for x, count in zip(moved, size_of, strict=True)]
        known = None
        if entry.lags:
            ends = zip(whole, map(len, y), strict=True)
            known = [lagged(x, entry.lags, series.held.shape[1])[-count:] for x, count in ends]
        folder = None if cache is None else cache / str(first)
        found = _compare(entry, name, y, known, series, folder)
        arrays = (one * scale[:, None] + loc[:, None] for one in found[:3])
        done.append(Forecasts(*arrays, *found[3:]))
    point, lo, hi = (np.concatenate(parts) for parts in zip(*(d[:3] for d in done), strict=True))
    fit, predict = (sum(one[k] for one in done) for k in (3, 4))
    return Forecasts(point, lo, hi, fit, predict)


def units(entry: Entry, series: Series, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """What the model's data are moved and divided by, from the training part of each series."""
    train, season = series.train[rows], series.season
    if not entry.centred:
        return np.full(len(train), -entry.shift), np.ones(len(train))
    loc = np.array([x[-season:].mean() for x in train])
    steps = np.array([metrics.naive_scale(x[None], season)[0] for x in train])
    return loc, np.where(steps > 0, steps, 1.0)


def lagged(x: np.ndarray, lags: Sequence[int], horizon: int) -> np.ndarray:
    """Standardised logarithms of earlier values, a column a lag; none of the last `horizon`."""
    if min(lags) < horizon:
        raise ValueError(f"a lag of {min(lags)} steps is not known {horizon} steps ahead")
    past = np.log(x[:-horizon])
    past = np.append((past - past.mean()) / max(past.std(), 1e-9), np.full(horizon, np.nan))
    return np.stack([np.append(np.full(lag, np.nan), past[:-lag]) for lag in lags], 1)


def _compare(
    entry: Entry,
    name: str,
    y: list[np.ndarray],
    known: list[np.ndarray] | None,
    series: Series,
    cache: Path | None,
) -> Forecasts:
    result = sq.compare(
        {name: entry.model},
        y,
        horizon=series.held.shape[1],
        season=series.season,
        inputs=known,
        level=(_CENTRE, LEVEL),
        n_samples=entry.draws,
        seed=SEED,
        fit_options={name: dict(entry.fit)},
        cache=cache,
        errors="raise" if entry.pooled else "record",
    )
    if result.failures:
        raise RuntimeError(f"{name} failed on {len(result.failures)} series: {result.failures[0]}")
    frame, row = result.forecasts, result.table.loc[name]
    shape = len(y), series.held.shape[1]
    ends = [frame[f"{name}-{end}-{_CENTRE}"].to_numpy().reshape(shape) for end in ("lo", "hi")]
    lo, hi = (frame[f"{name}-{end}-{LEVEL}"].to_numpy().reshape(shape) for end in ("lo", "hi"))
    return Forecasts(
        (ends[0] + ends[1]) / 2, lo, hi, float(row["fit_seconds"]), float(row["forecast_seconds"])
    )


def cost(plan: Plan, found: Mapping[str, Forecasts]) -> float:
    """Seconds of all models, whether they ran now or were read from the cache."""
    own = [one for name, one in found.items() if name in plan.entries]
    return sum(one.fit_seconds + one.forecast_seconds for one in own)


def average(parts: Sequence[Forecasts]) -> Forecasts:
    """The plain mean of medians and of the ends of intervals; times add up."""
    return Forecasts(
        *(np.mean([part[k] for part in parts], axis=0) for k in range(3)),
        *(sum(part[k] for part in parts) for k in (3, 4)),
    )


def scores(series: Series, found: Forecasts, *, relative: bool = False) -> dict[str, float]:
    """Scores of M3, M4 and Tourism, OWA if `relative`; seconds are of 1,000 series."""
    y, train, season = series.held, series.padded, series.season
    smape, mase = (
        float(np.nanmean(one))
        for one in (metrics.smape(y, found.point), metrics.mase(y, found.point, train, season))
    )
    out = {"sMAPE": smape, "MASE": mase}
    if relative:
        lengths = np.array([len(x) for x in series.train])
        naive = metrics.naive2(train, season, y.shape[1], lengths)
        theirs = metrics.smape(y, naive), metrics.mase(y, naive, train, season)
        out["OWA"] = (smape / np.nanmean(theirs[0]) + mase / np.nanmean(theirs[1])) / 2
    spread = metrics.msis(y, found.lo, found.hi, train, season, LEVEL)
    covered = float(metrics.coverage(y, found.lo, found.hi).mean())
    per_thousand = 1000 / len(y)
    return out | {
        "MSIS": float(np.nanmean(spread)),
        "coverage": covered,
        "ACD": abs(covered - LEVEL) / 100,
        "fit": found.fit_seconds * per_thousand,
        "forecast": found.forecast_seconds * per_thousand,
    }


def measure(plan: Plan, options: argparse.Namespace) -> tuple[Series, dict[str, Forecasts]]:
    """Forecasts of all models and averages of a plan, or of those asked for."""
    series = read(plan, validate=options.validate, limit=options.limit)
    part = "validation" if options.validate else "test"
    found: dict[str, Forecasts] = {}
    for name in plan.entries:
        if options.model and name not in options.model:
            continue
        cache = None
        if options.cache is not None:
            stem = hashlib.sha256(name.encode()).hexdigest()[:8]
            cache = options.cache / f"{plan.data}-{part}-{len(series.train)}" / stem
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of series that are hard to fit
            begin = time.perf_counter()
            found[name] = forecast(plan, name, series, cache)
        said = ", ".join(f"{key} {value:.4g}" for key, value in scores(series, found[name]).items())
        print(f"{plan.data} {name} ({time.perf_counter() - begin:.0f} s): {said}", flush=True)
    for name, parts in plan.averages.items():
        if all(one in found for one in parts):
            found[name] = average([found[one] for one in parts])
            said = ", ".join(f"{k} {v:.4g}" for k, v in scores(series, found[name]).items())
            print(f"{plan.data} {name}: {said}", flush=True)
    return series, found


def arguments(
    about: str | None, names: Sequence[str], tables: Sequence[str] = ()
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    if tables:
        parser.add_argument("--table", action="append", choices=tables, help="default all")
    parser.add_argument("--data", action="append", choices=names, help="data sets; default all")
    parser.add_argument("--model", action="append", help="only this model (repeatable)")
    parser.add_argument("--limit", type=int, help="series of each data set at most")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="leave the test part alone and score the end of the training part",
    )
    parser.add_argument("--tiny", action="store_true", help="six series of each data set")
    parser.add_argument("--cache", type=Path, help="folder from which an interrupted run goes on")
    parser.add_argument("--output", type=Path, help="folder of the results")
    options = parser.parse_args()
    if options.tiny:
        options.limit = 6
    return options


def is_complete(options: argparse.Namespace) -> bool:
    """Whether a run may be recorded."""
    return not (options.validate or options.limit or options.data or options.model)


def write(
    name: str,
    about: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    plans: Sequence[Plan],
    options: argparse.Namespace,
    seconds: float,
) -> None:
    """Print the table and, of a complete run, keep it with all settings."""
    print(tabulate(columns, rows), flush=True)
    folder = options.output or (RESULTS if is_complete(options) else None)
    if folder is None:
        return
    settings = {
        plan.data: {
            "history": plan.history,
            "averages": {key: list(parts) for key, parts in plan.averages.items()},
            "models": {
                key: {
                    "class": type(entry.model).__name__,
                    "parameters": {k: repr(v) for k, v in entry.model.get_params().items()},
                    "fit": {k: repr(v) for k, v in entry.fit.items()},
                    "draws": entry.draws,
                    "lags": list(entry.lags),
                    "history": entry.history,
                    "shift": entry.shift,
                    "centred": entry.centred,
                    "difference": entry.difference,
                }
                for key, entry in plan.entries.items()
            },
        }
        for plan in plans
    }
    where = {**environment(), "seed": SEED, "hours": round(seconds / 3600, 3), "settings": settings}
    write_table(name, about, columns, rows, where, folder)
