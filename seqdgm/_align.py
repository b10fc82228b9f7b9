"""Matching one panel with another: series by id, columns by name, rows by time stamp."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pandas as pd

from seqdgm._index import concatenated, stamp_text

if TYPE_CHECKING:
    from seqdgm.panel import Panel


def checked_horizon(horizon: int, least: int) -> int:
    """Return a number of steps as a plain int, at least `least`."""
    if not isinstance(horizon, (int, np.integer)) or horizon < least:
        raise ValueError(f"horizon={horizon!r} must be a whole number of steps, at least {least}")
    return int(horizon)


def has_labels(panel: Panel) -> bool:
    """Whether the time index means something: it came from pandas."""
    return panel.container in ("series", "wide", "long") or not isinstance(
        panel.index[0], pd.RangeIndex
    )


def is_counted(panel: Panel) -> bool:
    """Whether the index only counts rows from 0, as pandas does where none was given."""
    index = panel.index[0]
    return (
        isinstance(index, pd.RangeIndex)
        and (index.start, index.step) == (0, 1)
        and panel._form.integer_dtype is None
    )


def match_series(panel: Panel, other: Panel, name: str) -> list[int]:
    """Return the position in `other` of each series of `panel`.

    A single series serves all, unless it has the id of one among several. Several are matched by
    id where all are found, by position where one side only numbers its series.
    """
    place = {series: n for n, series in enumerate(other.ids)}
    missing = [series for series in panel.ids if series not in place]
    if not missing:
        return [place[series] for series in panel.ids]
    named = other.container == "long"
    if other.n_series == 1 and not (named and len(missing) < panel.n_series):
        return [0] * panel.n_series
    numbered = any(one.ids == tuple(range(one.n_series)) for one in (panel, other))
    if numbered and other.n_series == panel.n_series:
        return list(range(panel.n_series))
    raise ValueError(
        f"{name}: series {missing[0]!r} is missing (there are {other.n_series}, the first is "
        f"{other.ids[0]!r}); give all {panel.n_series} series under the ids of y"
    )


def refuse_missing(panel: Panel, new: Panel) -> NoReturn:
    """Raise for new data that are not of the same series."""
    one, rest = ("y_new", panel.ids) if new.n_series < panel.n_series else ("the panel", new.ids)
    held = set(new.ids if one == "y_new" else panel.ids)
    lacking = next((series for series in rest if series not in held), rest[-1])
    raise ValueError(
        f"y_new has {new.n_series} series and the panel {panel.n_series}: series {lacking!r} is "
        f"missing from {one}; give the same series in both (select picks some of a panel)"
    )


def match_columns(panel: Panel, new: Panel) -> list[int]:
    """Return the position in `new` of each column of `panel`; a single column needs no name."""
    if new.n_dims != panel.n_dims:
        raise ValueError(
            f"y_new has {new.n_dims} columns, {new.columns}, and the panel {panel.n_dims}, "
            f"{panel.columns}; give the same columns"
        )
    named = all(one.container in ("wide", "long") for one in (panel, new))
    if panel.n_dims == 1 or not named:
        return list(range(panel.n_dims))
    for column in panel.columns:
        if column not in new.columns:
            raise ValueError(
                f"y_new has no column {column!r}, only {new.columns}; give the same columns"
            )
    return [new.columns.index(column) for column in panel.columns]


def refuse_join(series: Hashable, index: pd.Index, other: pd.Index) -> NoReturn:
    """Raise for new time stamps that do not follow the old ones."""
    raise ValueError(
        f"y_new: series {series!r} begins at {stamp_text(other[0])}, which is not the step after "
        f"{stamp_text(index[-1])}, where the data end; begin right behind them, with NaN (or "
        "sq.Panel.fill_gaps) where nothing was observed"
    )


def align_rows(panel: Panel, known: Panel, horizon: int) -> np.ndarray:
    """Take from `known` the rows of each series of `panel` and of `horizon` steps more."""
    rows = match_series(panel, known, "inputs")
    future = panel.future_index(horizon) if _by_label(panel, known) else None
    aligned = np.zeros((panel.n_series, panel.n_steps + horizon, known.n_dims))
    shared: dict[tuple[int, int], np.ndarray] = {}
    for n, row in enumerate(rows):
        length = int(panel.lengths[n]) + horizon
        key = (id(panel.index[n]), id(known.index[row]))
        if future is None:
            _check_rows(panel, known, n, row, horizon)
            taken = known.values[row, :length]
        else:
            if key not in shared:
                shared[key] = _places(panel, known, n, row, future[n])
            taken = known.values[row, shared[key]]
        if np.isnan(taken).any():
            t, d = np.argwhere(np.isnan(taken))[0]
            _refuse_unknown(panel, known, n, int(t), int(d))
        aligned[n, :length] = taken
    return aligned


def _by_label(panel: Panel, known: Panel) -> bool:
    """Whether rows are matched by time stamp.

    Where only one side is dated, the other merely counts its rows, and position is all there is.
    """
    dated = {isinstance(one.index[0], pd.RangeIndex) for one in (panel, known)}
    return has_labels(panel) and has_labels(known) and len(dated) == 1


def _check_rows(panel: Panel, known: Panel, n: int, row: int, horizon: int) -> None:
    need = int(panel.lengths[n]) + horizon
    if known.lengths[row] < need:
        raise ValueError(
            f"inputs: series {panel.ids[n]!r} has {known.lengths[row]} rows, {need} are needed: "
            f"{panel.lengths[n]} steps of y and {horizon} after its end; add the missing rows"
        )


def _places(panel: Panel, known: Panel, n: int, row: int, future: pd.Index) -> np.ndarray:
    """Position of each needed time stamp among the rows of the inputs."""
    needed, given = concatenated([panel.index[n], future]), known.index[row]
    if not _comparable(needed, given):
        raise ValueError(
            f"inputs: series {panel.ids[n]!r} has time stamps of type {given.dtype}, those of y "
            f"are {needed.dtype}; convert one side (to_timestamp, to_period, tz_localize)"
        )
    places = given.get_indexer(needed)
    if (places < 0).any():
        stamp = needed[int(np.argmax(places < 0))]
        raise ValueError(
            f"inputs: series {panel.ids[n]!r} has no row at {stamp_text(stamp)}; inputs must cover "
            f"{stamp_text(needed[0])} to {stamp_text(needed[-1])}, every step of y"
            + (f" and the {len(future)} after its end" if len(future) else "")
        )
    return places


def _comparable(one: pd.Index, other: pd.Index) -> bool:
    if isinstance(one, pd.DatetimeIndex) and isinstance(other, pd.DatetimeIndex):
        return (one.tz is None) == (other.tz is None)
    if isinstance(one, pd.PeriodIndex) or isinstance(other, pd.PeriodIndex):
        return one.dtype == other.dtype
    return one.dtype.kind == other.dtype.kind


def _refuse_unknown(panel: Panel, known: Panel, n: int, t: int, d: int) -> NoReturn:
    ahead = t + 1 - int(panel.lengths[n])
    place = f"{ahead} steps after the end" if ahead > 0 else stamp_text(panel.index[n][t])
    raise ValueError(
        f"inputs: series {panel.ids[n]!r} at {place}, column {known.columns[d]!r}, "
        "is missing (NaN); covariates must be known at every step: fill it in, or leave the column "
        "out"
    )
