"""Time indexes: the step between stamps, complete grids, the place of every row, continuation.

Inside a :class:`seqdgm.panel.Panel` every time index is *regular*: a ``DatetimeIndex`` or
``TimedeltaIndex`` with its ``freq`` set, a ``PeriodIndex`` without holes, or a ``RangeIndex``.
One start, one step and one length therefore describe it completely. Only an index of a single
time stamp may have no step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import BaseOffset, BMonthBegin, BMonthEnd, BusinessDay, DateOffset

# A step that would need more than this many grid points per time stamp is an accident (one
# stamp a second off in a monthly series), not the step of the series.
_MAX_POINTS_PER_STAMP = 100

# The last day that every month of every year has: a monthly stamp up to it never moves.
_LAST_COMMON_DAY = 28


def stamp_text(stamp: Any) -> str:
    """Write a time stamp as briefly as it can be read: dates without a midnight clock time."""
    if isinstance(stamp, pd.Timestamp) and stamp.tz is None and stamp == stamp.normalize():
        return str(stamp.date())
    return str(stamp)


def checked_index(index: pd.Index, name: str) -> pd.Index:
    """Return ``index`` as a Datetime-, Period-, Timedelta-, Range- or int64 index.

    Raises
    ------
    ValueError
        For any other kind of label, and for missing time stamps.
    """
    if isinstance(index, pd.MultiIndex):
        raise ValueError(
            f"{name}: the index has {index.nlevels} levels; call reset_index() and pass one row "
            "per time stamp with the columns unique_id, ds and the values"
        )
    if index.dtype == object:
        index = index.infer_objects()
    if index.hasnans:
        row = int(np.flatnonzero(index.isna())[0])
        raise ValueError(
            f"{name}: row {row} has no time stamp; drop it, or give it the stamp it belongs to"
        )
    if isinstance(index, (pd.DatetimeIndex, pd.PeriodIndex, pd.TimedeltaIndex, pd.RangeIndex)):
        return index
    if pd.api.types.is_integer_dtype(index.dtype):
        return index.astype("int64")
    raise ValueError(
        f"{name}: the time stamps have dtype {index.dtype} (the first is {index[0]!r}); convert "
        "them with pd.to_datetime(...), to periods, or to integers with astype(int)"
    )


def has_freq(index: pd.Index) -> bool:
    """Whether a date-like index carries its step; true for all other kinds."""
    return not isinstance(index, (pd.DatetimeIndex, pd.TimedeltaIndex)) or index.freq is not None


def without_freq(index: pd.Index) -> pd.Index:
    """Return a Datetime- or TimedeltaIndex with ``freq=None``, any other index as it is."""
    if isinstance(index, (pd.DatetimeIndex, pd.TimedeltaIndex)):
        return _with_freq(index, None)
    return index


def _with_freq(index: pd.Index, freq: Any) -> Any:
    """Build the index anew around another freq; pandas checks that the stamps agree with it."""
    make: Any = type(index)
    return make(index, freq=freq, name=index.name)


# ---------------------------------------------------------------------------------------------
# Finding the step
# ---------------------------------------------------------------------------------------------


def _common_step(ticks: np.ndarray) -> int:
    """Return the greatest common divisor of the steps, or 0 where it would need a huge grid."""
    step = int(np.gcd.reduce(np.diff(ticks)))
    points = (int(ticks[-1]) - int(ticks[0])) // step
    return step if points <= _MAX_POINTS_PER_STAMP * len(ticks) else 0


def _monthly_offset(wall: pd.DatetimeIndex) -> BaseOffset | None:
    """Return the step of stamps that fall on one day of the month, for instance each last day."""
    months = np.asarray(wall.year) * 12 + np.asarray(wall.month)
    if np.diff(months).min() < 1:
        return None
    step = int(np.gcd.reduce(np.diff(months)))
    if wall[0].day <= _LAST_COMMON_DAY and (wall.day == wall[0].day).all():
        return to_offset(f"{step}MS") if wall[0].day == 1 else DateOffset(months=step)
    if wall.is_month_end.all():
        return to_offset(f"{step}ME")
    if all(BMonthEnd().is_on_offset(stamp) for stamp in wall):
        return to_offset(f"{step}BME")
    if all(BMonthBegin().is_on_offset(stamp) for stamp in wall):
        return to_offset(f"{step}BMS")
    return None


def _daily_offset(wall: pd.DatetimeIndex) -> BaseOffset | None:
    """Return the step of stamps at one time of day: some days, or business days."""
    days = wall.normalize().as_unit("s").asi8 // 86_400
    step = _common_step(days)
    if step == 0:
        return None
    weekday = np.asarray(wall.dayofweek)
    # Business days show by going from a Friday straight to the Monday; without that, days that
    # happen to be weekdays are just days.
    if step == 1 and (weekday < 5).all() and ((weekday[1:] == 0) & (np.diff(days) == 3)).any():
        return to_offset("B")
    return to_offset(f"{step}D")


def _datetime_offset(index: pd.DatetimeIndex) -> BaseOffset | None:
    """Return the coarsest step whose grid holds every stamp; calendar steps come first."""
    wall = index.tz_localize(None)
    if len(set(wall - wall.normalize())) == 1:
        return _monthly_offset(wall) or _daily_offset(wall)
    step = _common_step(index.asi8)
    return to_offset(pd.Timedelta(step, unit=index.unit)) if step else None


def _named(index: pd.DatetimeIndex | pd.TimedeltaIndex) -> Any:
    """Set the freq that pandas infers ('W-MON' where a count of days says '7D'), if any."""
    if len(index) < 3:
        return index
    name = pd.infer_freq(index)
    if name is None:
        return index
    try:
        return _with_freq(index, name)
    except ValueError:
        # Inference looks at wall-clock differences and can propose a step that does not
        # reproduce the stamps.
        return index


def grid_between(first: Any, last: Any, step: Any, like: pd.Index) -> pd.Index:
    """Return the regular index from ``first`` to at most ``last``, of the kind of ``like``."""
    if isinstance(like, pd.DatetimeIndex):
        return pd.date_range(first, last, freq=step, unit=like.unit, name=like.name)
    if isinstance(like, pd.TimedeltaIndex):
        return pd.timedelta_range(first, last, freq=step, unit=like.unit, name=like.name)
    if isinstance(like, pd.PeriodIndex):
        return pd.period_range(first, last, freq=like.freq, name=like.name)
    return pd.RangeIndex(int(first), int(last) + 1, int(step), name=like.name)


def complete_grid(stamps: pd.Index) -> pd.Index | None:
    """Return the coarsest regular index that holds every stamp, or None where there is none.

    Parameters
    ----------
    stamps : pd.Index
        Increasing and unique. Its own ``freq`` is used where it has one.

    Returns
    -------
    pd.Index or None
        Equal to ``stamps`` where these are regular, longer where some are missing.
    """
    if isinstance(stamps, pd.RangeIndex):
        return stamps
    if isinstance(stamps, (pd.DatetimeIndex, pd.TimedeltaIndex)):
        if stamps.freq is not None or len(stamps) == 1:
            return stamps
        named = _named(stamps)
        if named.freq is not None:
            return named
    step: Any = 1
    if isinstance(stamps, pd.DatetimeIndex):
        step = _datetime_offset(stamps)
    elif isinstance(stamps, pd.TimedeltaIndex):
        ticks = _common_step(stamps.asi8)
        step = to_offset(pd.Timedelta(ticks, unit=stamps.unit)) if ticks else None
    elif isinstance(stamps, pd.PeriodIndex):
        offset: Any = stamps.freq
        step = offset.n
    elif len(stamps) > 1:
        step = _common_step(stamps.to_numpy())
    if not step:
        return None
    try:
        grid = grid_between(stamps[0], stamps[-1], step, stamps)
    except ValueError:  # a clock time that does not exist on the day summer time begins
        return None
    if (grid.get_indexer(stamps) < 0).any():
        return None
    return _named(grid) if isinstance(grid, (pd.DatetimeIndex, pd.TimedeltaIndex)) else grid


# ---------------------------------------------------------------------------------------------
# Placing the rows of many series
# ---------------------------------------------------------------------------------------------


def _steps_on_grid(steps: np.ndarray, regular: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Steps of the short series settled by the others; 0 where the panel cannot tell.

    Three or more stamps tell a series' own step. Two stamps could as well be a step with a hole
    in it, and one stamp tells nothing: these follow the step that is most common in the panel.
    """
    telling = regular & (lengths >= 3)
    if not telling.any():
        telling = lengths == 2
    if not telling.any():
        return np.zeros_like(steps)
    values, counts = np.unique(steps[telling], return_counts=True)
    common = values[np.argmax(counts)]
    return np.where(lengths < 3, np.gcd(steps, common), steps)


def _skips_weekends(stamps: pd.DatetimeIndex, codes: np.ndarray, inner: np.ndarray) -> bool:
    """Whether some series goes from a Friday straight to the Monday (`inner`: not a first row)."""
    day = np.asarray(stamps.dayofweek)[codes]
    days = stamps.tz_localize(None).normalize().as_unit("s").asi8[codes] // 86_400
    return bool((inner[1:] & (day[1:] == 0) & (np.diff(days) == 3)).any())


def place_rows(
    stamps: pd.Index, codes: np.ndarray, lengths: np.ndarray
) -> tuple[list[pd.Index | None], np.ndarray]:
    """Find the regular index of every series and the place of every row in it.

    Parameters
    ----------
    stamps : pd.Index
        The time stamps of all series together, increasing and unique.
    codes : np.ndarray
        Row -> position in ``stamps``; rows of one series adjacent and increasing. Shape (R,).
    lengths : np.ndarray
        Rows of each series, each at least 1. Shape (N,).

    Returns
    -------
    index : list of pd.Index or None
        The complete index of each series; longer than ``lengths[n]`` where time stamps are
        missing, None where no regular step fits.
    slots : np.ndarray
        Row -> position in its series' index. Shape (R,).

    Notes
    -----
    Panels mostly live on one grid (all monthly, say), so the step is sought once, on the union
    of the stamps, and each series is a slice of that grid. Series that are not regular on it
    (monthly among daily ones) are looked at on their own.
    """
    grid = complete_grid(stamps)
    if len(lengths) == 1:
        if grid is None or grid is stamps:
            return [grid], np.zeros(len(codes), int) if grid is None else codes
        return [grid], grid.get_indexer(stamps)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    index: list[pd.Index | None] = [None] * len(lengths)
    slots = np.zeros(len(codes), dtype=np.int64)
    inner = np.ones(len(codes), dtype=bool)
    inner[starts] = False
    if isinstance(grid, pd.DatetimeIndex) and isinstance(grid.freq, BusinessDay):
        grid = grid if _skips_weekends(pd.DatetimeIndex(stamps), codes, inner) else None
    steps = np.zeros_like(lengths)
    if grid is not None:
        where = codes if len(grid) == len(stamps) else grid.get_indexer(stamps)[codes]
        first, last = where[starts], where[ends - 1]
        steps = np.gcd.reduceat(np.where(inner, np.diff(where, prepend=0), 0), starts)
        regular = last - first == steps * (lengths - 1)
        if isinstance(stamps, pd.PeriodIndex):
            steps = np.ones_like(lengths)
        else:
            steps = np.where(regular, _steps_on_grid(steps, regular, lengths), 0)
        shared: dict[tuple[int, int, int], pd.Index] = {}
        for n, key in enumerate(zip(first.tolist(), last.tolist(), steps.tolist(), strict=True)):
            if key[2] and key not in shared:
                shared[key] = grid[key[0] : key[1] + 1 : key[2]]
            index[n] = shared.get(key)
        slots = (where - np.repeat(first, lengths)) // np.repeat(np.maximum(steps, 1), lengths)
    for n in np.flatnonzero(steps == 0).tolist():
        rows = slice(starts[n], ends[n])
        own = complete_grid(stamps[codes[rows]])
        if own is not None:
            index[n], slots[rows] = own, own.get_indexer(stamps[codes[rows]])
    return index, slots


def place_rows_by(
    stamps: pd.Index, codes: np.ndarray, lengths: np.ndarray, freq: Any
) -> tuple[list[pd.Index | None], np.ndarray]:
    """As :func:`place_rows`, with the step given; a row that is off the grid gets the slot -1."""
    step = freq
    if isinstance(stamps, (pd.DatetimeIndex, pd.TimedeltaIndex)):
        step = to_offset(freq)
    ends = np.cumsum(lengths)
    slots = np.zeros(len(codes), dtype=np.int64)
    index: list[pd.Index | None] = []
    shared: dict[tuple[int, int], pd.Index] = {}
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        rows = slice(end - length, end)
        key = (int(codes[rows][0]), int(codes[rows][-1]))
        if key not in shared:
            shared[key] = grid_between(stamps[key[0]], stamps[key[1]], step, stamps)
        index.append(shared[key])
        slots[rows] = shared[key].get_indexer(stamps[codes[rows]])
    return index, slots


# ---------------------------------------------------------------------------------------------
# Continuation
# ---------------------------------------------------------------------------------------------


def future_of(index: pd.Index, horizon: int) -> pd.Index | None:
    """Return the ``horizon`` stamps after the end of ``index``; None where none can be told."""
    if isinstance(index, pd.RangeIndex):
        first = index.start + len(index) * index.step
        return pd.RangeIndex(first, first + horizon * index.step, index.step, name=index.name)
    if isinstance(index, pd.PeriodIndex):
        return pd.period_range(index[-1], periods=horizon + 1, freq=index.freq, name=index.name)[1:]
    grid: Any = complete_grid(index)
    if grid is None or len(grid) != len(index):
        return None
    if isinstance(grid, pd.RangeIndex):
        return future_of(grid, horizon)
    if grid.freq is None:
        return None
    make = pd.date_range if isinstance(grid, pd.DatetimeIndex) else pd.timedelta_range
    periods = horizon + 1
    try:
        future = make(grid[-1], periods=periods, freq=grid.freq, unit=grid.unit, name=grid.name)
    except ValueError:  # a clock time that does not exist on the day summer time begins
        return None
    return future[1:]


def joined(index: pd.Index, other: pd.Index) -> pd.Index | None:
    """Return ``other`` put after ``index``, None where it does not follow one step behind it."""
    unit = getattr(index, "unit", None)
    if isinstance(other, (pd.DatetimeIndex, pd.TimedeltaIndex)) and unit is not None:
        other = other.as_unit(unit)
    expected: Any = future_of(index, len(other))
    if expected is None:
        # One stamp alone has no step: together with what follows it may have one.
        both = without_freq(index).append(without_freq(other))
        if both.dtype != index.dtype or not (both.is_monotonic_increasing and both.is_unique):
            return None
        grid = complete_grid(both)
        return grid if grid is not None and len(grid) == len(both) else None
    if not expected.equals(other):
        return None
    if isinstance(index, pd.RangeIndex):
        return pd.RangeIndex(index.start, expected.stop, index.step, name=index.name)
    if isinstance(index, pd.PeriodIndex):
        return index.append(expected).rename(index.name)
    whole = without_freq(index).append(expected).rename(index.name)
    return _with_freq(whole, expected.freq)


def concatenated(indexes: Sequence[pd.Index]) -> pd.Index:
    """Put time indexes of one kind behind each other, without a freq."""
    if len(indexes) == 1:
        return indexes[0]
    # With a freq, pandas tries whether one piece continues the other, and fails where summer
    # time skips the clock time that it tries.
    bare = [without_freq(index) for index in indexes]
    return bare[0].append(bare[1:])
