"""What the plots of a report draw: plain numbers, with few digits, in a form that JSON holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from seqdgm._index import stamp_text
from seqdgm.evaluation.traces import evenly
from seqdgm.evaluation.windows import series_name

if TYPE_CHECKING:
    from seqdgm.evaluation.compare import Comparison

MAX_WINDOWS = 8  # evenly chosen, the newest among them
# Numbers of the forecast fans in one page, about 7 bytes each.
_MAX_NUMBERS = 500_000
_BINS = 10
_Z = 1.959963984540054  # normal quantile at 0.975


def payload(comparison: Comparison, max_series: int) -> dict[str, Any]:
    """Everything that the page draws, by figure."""
    return {
        "models": [str(name) for name in comparison.table.index],
        "levels": sorted(comparison.level, reverse=True),
        "baseline": comparison.baseline,
        "forecasts": forecasts(comparison, max_series),
        "pit": pit(comparison),
        "coverage": coverage(comparison),
        "states": states(comparison),
        "training": training(comparison),
        "ranks": ranks(comparison),
    }


def forecasts(comparison: Comparison, max_series: int) -> dict[str, Any]:
    """Histories, held-out values and fans of some series and windows."""
    panel, horizon = comparison.panel, comparison.horizon
    frame = comparison.forecasts
    names = list(comparison.table.index)
    cells = [(n, d) for n in range(panel.n_series) for d in range(panel.n_dims)]
    n_windows = len(frame) // (len(cells) * horizon)
    windows = evenly(n_windows, MAX_WINDOWS)
    tail = max(5 * horizon, 60)
    columns = {name: _fan_columns(name, comparison.level) for name in names}
    size = len(windows) * horizon * sum(map(len, columns.values())) + 2 * tail
    most = min(max_series, max(_MAX_NUMBERS // size, 1))
    kept = evenly(len(cells), most)
    shape = (n_windows, len(cells), horizon)
    stamps = frame["ds"].to_numpy().reshape(shape)
    arrays = {
        name: [frame[column].to_numpy(dtype=float).reshape(shape) for column in columns[name]]
        for name in names
    }
    series = []
    for c in kept:
        n, d = cells[c]
        starts = panel.index[n].get_indexer(pd.Index(stamps[windows, c, 0]))
        first = max(int(starts[0]) - tail, 0)
        length = int(panel.lengths[n])
        series.append(
            {
                "id": str(series_name(panel, n, d)),
                "unit": panel.columns[d],
                "x": positions(panel.index[n][first:]),
                "y": rounded(panel.values[n, first:length, d]),
                "starts": [int(start) - first for start in starts],
                "fans": [
                    [[rounded(array[w, c]) for array in arrays[name]] for name in names]
                    for w in windows
                ],
            }
        )
    cutoffs = [stamp_text(frame["cutoff"].iloc[w * len(cells) * horizon]) for w in windows]
    return {
        "series": series,
        "horizon": horizon,
        "tail": tail,
        "windows": [
            {"number": w + 1, "cutoff": cutoff} for w, cutoff in zip(windows, cutoffs, strict=True)
        ],
        "n_series": len(cells),
        "n_windows": n_windows,
        "x_title": axis_title(panel.index[0]),
    }


def _fan_columns(name: str, level: Sequence[float]) -> list[str]:
    """Mean, then lower and upper ends of the intervals, widest first."""
    widest = sorted(level, reverse=True)
    return [name, *(f"{name}-{end}-{lv:g}" for lv in widest for end in ("lo", "hi"))]


def pit(comparison: Comparison) -> list[dict[str, Any]]:
    """Histogram of the transforms of each model, as densities, with a pointwise 95 % band."""
    out = []
    for name in comparison.table.index:
        if name not in comparison.pit:
            continue
        values = comparison.pit[name].dropna().to_numpy(dtype=float)
        n = len(values)
        if n == 0:
            continue
        counts, _ = np.histogram(values, bins=_BINS, range=(0.0, 1.0))
        half = _Z * np.sqrt((_BINS - 1) / n)
        out.append(
            {
                "model": str(name),
                "n": n,
                "density": rounded(counts * _BINS / n),
                "band": rounded([max(1 - half, 0.0), 1 + half]),
            }
        )
    return out


def coverage(comparison: Comparison) -> list[dict[str, Any]]:
    """Per cent of held-out values inside the intervals at each step, and the 95 % band of it."""
    frame, horizon = comparison.forecasts, comparison.horizon
    y = frame["y"].to_numpy(dtype=float).reshape(-1, horizon)
    out = []
    for level in sorted(comparison.level):
        models = []
        known = ~np.isnan(y)
        for name in comparison.table.index:
            lo, hi = (
                frame[f"{name}-{end}-{level:g}"].to_numpy(dtype=float).reshape(-1, horizon)
                for end in ("lo", "hi")
            )
            scored = known & ~np.isnan(lo)
            inside = (scored & (lo <= y) & (y <= hi)).sum(axis=0)
            count = scored.sum(axis=0)
            share = np.divide(100.0 * inside, count, out=np.full(horizon, np.nan), where=count > 0)
            models.append({"model": str(name), "values": rounded(share)})
        count = known.sum(axis=0)
        half = _Z * np.sqrt(level * (100 - level) / np.maximum(count, 1))
        out.append(
            {
                "level": level,
                "models": models,
                "count": count.tolist(),
                "low": rounded(np.maximum(level - half, 0.0)),
                "high": rounded(np.minimum(level + half, 100.0)),
            }
        )
    return out


def states(comparison: Comparison) -> list[dict[str, Any]]:
    """Smoothed and predicted states, by model and series."""
    frame = comparison.states
    if frame.empty:
        return []
    out = []
    for name in comparison.table.index:
        own = frame[frame["model"] == name]
        series = []
        for unit, block in own.groupby("unique_id", sort=False):
            curves = []
            for state, curve in block.groupby("state", sort=False):
                parts = {}
                for kind, part in curve.groupby("kind", sort=False):
                    parts[str(kind)] = {
                        "x": positions(pd.Index(part["ds"])),
                        "mean": rounded(part["mean"]),
                        "half": rounded(_Z * part["std"]),
                    }
                curves.append({"name": str(state), **parts})
            series.append({"id": str(unit), "states": curves})
        if series:
            out.append({"model": str(name), "series": series})
    return out


def training(comparison: Comparison) -> list[dict[str, Any]]:
    """Curves of each model's newest fit."""
    frame = comparison.training
    if frame.empty:
        return []
    out = []
    for name in comparison.table.index:
        own = frame[frame["model"] == name]
        if own.empty:
            continue
        own = own[own["window"] == own["window"].max()]
        curves: dict[str, Any] = {"model": str(name), "unit": own["unit"].iloc[0]}
        for curve, part in own.groupby("curve", sort=False):
            iterations = part["iteration"].tolist()
            curves[str(curve)] = {"x": iterations, "y": rounded(part["value"])}
        curves["step"] = "epoch" if "kept" in curves else "iteration"
        out.append(curves)
    return out


def ranks(comparison: Comparison) -> dict[str, Any] | None:
    """Mean ranks by CRPS and the critical difference; None where there is nothing to rank.

    Of the models that failed nowhere: one that failed would take its units from all others.
    """
    units = comparison.table["units"]
    complete = units.index[units == units.max()]
    if len(complete) < 2 or units.max() < 2:
        return None
    found = comparison.rank("CRPS", models=list(complete))
    return {
        "left_out": [str(name) for name in units.index.difference(complete, sort=False)],
        "models": list(found.ranks.index),
        "ranks": rounded(found.ranks),
        "groups": [list(group) for group in found.groups()],
        "difference": rounded([found.critical_difference])[0],
        "alpha": found.alpha,
        "p": found.p_value,
        "units": found.n_units,
    }


def positions(index: pd.Index) -> list[Any]:
    """What the plotting library can place on an axis: dates without zone as text, or numbers."""
    if isinstance(index, pd.PeriodIndex):
        index = index.to_timestamp()
    if isinstance(index, pd.DatetimeIndex):
        return [stamp.removesuffix("T00:00:00") for stamp in _iso(index)]
    if isinstance(index, pd.TimedeltaIndex):
        return rounded(index.total_seconds(), 12)
    return index.tolist()


def _iso(index: pd.DatetimeIndex) -> list[str]:
    return [stamp.isoformat() for stamp in index.tz_localize(None)]


def axis_title(index: pd.Index) -> str:
    """Title of the time axis, with its unit."""
    name = None if index.name in (None, "ds") else str(index.name)
    if isinstance(index, pd.DatetimeIndex | pd.PeriodIndex):
        zone = getattr(index, "tz", None)
        return (name or "time") + (f" ({zone})" if zone is not None else "")
    if isinstance(index, pd.TimedeltaIndex):
        return f"{name or 'time'} (seconds)"
    return name or "step"


def rounded(values: Iterable[float], significant: int = 6) -> list[float | None]:
    """Numbers with few significant digits, None for what is not finite.

    Examples
    --------
    >>> rounded([1234.56789, float("nan"), 2.0])
    [1234.57, None, 2]
    """
    out: list[float | None] = []
    for value in np.asarray(list(values), dtype=float):
        if not np.isfinite(value):
            out.append(None)
            continue
        short = float(f"{value:.{significant}g}")
        out.append(int(short) if short.is_integer() and abs(short) < 1e15 else short)
    return out
