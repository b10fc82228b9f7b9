"""AutoARIMA on the M3 competition: accuracy, coverage and time, beside statsforecast's.

The data are those of the R package Mcomp, downloaded once, or read from the folder that the
environment variable SEQDGM_DATA names.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _harness import RESULTS, duration, environment, tabulate, write_table

import seqdgm as sq
from seqdgm.evaluation.metrics import coverage, mase, smape

SEASONS = {"yearly": 1, "quarterly": 4, "monthly": 12, "other": 1}
# Mean MASE of R's auto.arima.
PUBLISHED = {"yearly": 2.890, "quarterly": 1.192, "monthly": 0.876}
LEVEL = 95
COLUMNS = (
    "series",
    "by",
    "MASE",
    "published",
    "sMAPE",
    f"coverage-{LEVEL}",
    "time a series",
    "ratio to peer (min to max)",
)

Series = Sequence[np.ndarray]
# Training parts, season and horizon -> mean and interval of shape (series, horizon).
Forecaster = Callable[[Series, int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass
class Contender:
    """A forecaster with what it predicted, block by block of series, and how long that took."""

    name: str
    run: Forecaster
    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def by_seqdgm(y: Series, season: int, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    future = sq.AutoARIMA(season=season).fit(list(y)).forecast(horizon)
    lo, hi = future.interval(LEVEL)
    return future.mean[..., 0], lo[..., 0], hi[..., 0]


def by_statsforecast(
    y: Series, season: int, horizon: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from statsforecast.models import AutoARIMA

    out = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in y:
            found = AutoARIMA(season_length=season).fit(x).predict(horizon, level=[LEVEL])
            out.append([found["mean"], found[f"lo-{LEVEL}"], found[f"hi-{LEVEL}"]])
    mean, lo, hi = np.moveaxis(np.array(out, float), 1, 0)
    return mean, lo, hi


def contenders(peers: bool) -> list[Contender]:
    """Ourselves and, if it is installed and asked for, statsforecast."""
    found = [Contender("seqdgm", by_seqdgm)]
    if peers:
        try:
            import statsforecast  # noqa: F401
        except ModuleNotFoundError:
            print("statsforecast is not installed")
        else:
            found.append(Contender("statsforecast", by_statsforecast))
    return found


def load(frequency: str, limit: int | None) -> tuple[Series, np.ndarray]:
    """Training parts and held-out values; `limit` series are spread evenly over all."""
    found = sq.datasets.load(f"m3-{frequency}")
    x, held = (
        [part.to_numpy() for _, part in frame.groupby("unique_id", sort=False)["y"]]
        for frame in (found.train, found.test)
    )
    chosen = range(len(x))
    if limit is not None and limit < len(x):
        chosen = np.linspace(0, len(x) - 1, limit).round().astype(int).tolist()
    return [x[k] for k in chosen], np.array([held[k] for k in chosen])


def measure(players: Sequence[Contender], y: Series, season: int, horizon: int, block: int) -> None:
    """Let the contenders take turns, one block of series after another."""
    for player in players:  # imports and compilation
        player.run([x[-60:] for x in y[:2]], season, horizon)
    for turn, first in enumerate(range(0, len(y), block)):
        part = y[first : first + block]
        for player in players if turn % 2 == 0 else reversed(players):
            begin = time.perf_counter()
            player.parts.append(player.run(part, season, horizon))
            player.seconds.append(time.perf_counter() - begin)


def report(
    players: Sequence[Contender], y: Series, held_out: np.ndarray, frequency: str
) -> list[list[str]]:
    """A line of the table for every contender."""
    train = np.full((len(y), max(map(len, y))), np.nan)
    for row, x in zip(train, y, strict=True):
        row[: len(x)] = x
    lines = []
    for player in players:
        mean, lo, hi = (np.concatenate(parts) for parts in zip(*player.parts, strict=True))
        ratio = ""
        if player is players[0] and len(players) > 1:
            ratios = np.divide(player.seconds, players[1].seconds)
            whole = sum(player.seconds) / sum(players[1].seconds)
            ratio = f"**{whole:.3g}** ({ratios.min():.3g} to {ratios.max():.3g})"
        lines.append(
            [
                f"{len(y):,} {frequency}",
                player.name,
                f"{np.nanmean(mase(held_out, mean, train, SEASONS[frequency])):.3f}",
                f"{PUBLISHED[frequency]:.3f}" if frequency in PUBLISHED else "",
                f"{smape(held_out, mean).mean():.2f}",
                f"{coverage(held_out, lo, hi).mean():.1f} %",
                duration(sum(player.seconds) / len(y)),
                ratio,
            ]
        )
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frequency", action="append", choices=SEASONS, help="default all")
    parser.add_argument("--limit", type=int, help="series of each frequency at most")
    parser.add_argument("--block", type=int, default=100, help="series fitted in one call")
    parser.add_argument("--no-peers", action="store_true", help="leave statsforecast out")
    parser.add_argument("--tiny", action="store_true", help="four series of each frequency")
    parser.add_argument("--output", type=Path, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    limit = 4 if options.tiny else options.limit
    lines = []
    for frequency in options.frequency or SEASONS:
        try:
            y, held_out = load(frequency, limit)
        except OSError as error:
            print(f"nothing is measured: {error}")
            return
        players = contenders(not options.no_peers)
        measure(players, y, SEASONS[frequency], held_out.shape[1], options.block)
        lines += report(players, y, held_out, frequency)
        print(tabulate(COLUMNS, lines[-len(players) :]), flush=True)
    complete = limit is None and options.frequency is None and not options.no_peers
    target = options.output or (RESULTS if complete else None)
    if target is not None:
        about = (
            "AutoARIMA on the M3 competition: orders, fit and forecast of every series. MASE is "
            "the mean over series, published that of R's auto.arima. Wall-clock times, in "
            f"blocks of {options.block} series that the contenders take in turn."
        )
        where: dict[str, Any] = environment()
        write_table("m3", about, COLUMNS, lines, where, target)


if __name__ == "__main__":
    main()
