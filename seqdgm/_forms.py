"""The forms that data may have when they come in, and how to give the same form back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from seqdgm._index import (
    checked_index,
    concatenated,
    has_freq,
    place_rows,
    place_rows_by,
    stamp_text,
    without_freq,
)

_ACCEPTED = (
    "pass a pandas Series, a wide DataFrame, a long DataFrame with unique_id, ds and y, a numpy "
    "or torch array of shape (T,), (T, D) or (N, T, D), a list of (T,) or (T, D) arrays, or a Panel"
)
_KINDS = {
    "O": "Python objects",
    "c": "complex numbers",
    "M": "dates",
    "m": "time differences",
    "U": "text",
    "S": "text",
    "T": "text",
}


@dataclass(frozen=True, eq=False)
class Form:
    """What the caller's container held beyond values, ids, columns and time index.

    Attributes
    ----------
    ndim : int
        Axes of the array, or of each item of a list.
    item : str
        "array" or "tensor": what a list held.
    name : Hashable
        Name of a Series.
    layout : pd.Index, optional
        All column labels of a DataFrame, in order.
    id_labels : pd.Index, optional
        The distinct `unique_id` of a long frame, in the dtype of that column.
    rows, row_labels : np.ndarray and pd.Index, optional
        Row of the long frame that each value came from (None: already sorted by series), and its
        row index.
    integer_dtype : str, optional
        dtype of an integer time index that was not a RangeIndex.
    freq : bool
        Whether the time index carried its `freq`.
    """

    ndim: int = 3
    item: str = "array"
    name: Hashable = None
    layout: pd.Index | None = None
    id_labels: pd.Index | None = None
    rows: np.ndarray | None = None
    row_labels: pd.Index | None = None
    integer_dtype: str | None = None
    freq: bool = True


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of a pandas container, sorted by series; `codes` places each row in `stamps`."""

    values: np.ndarray
    lengths: np.ndarray
    ids: tuple[Hashable, ...]
    columns: tuple[str, ...]
    stamps: pd.Index
    codes: np.ndarray
    container: str
    form: Form


@dataclass(frozen=True, eq=False)
class Parts:
    """What a panel is made of: values padded to (series, time, dim), regular time indexes."""

    values: np.ndarray
    lengths: np.ndarray
    ids: tuple[Hashable, ...]
    columns: tuple[str, ...]
    index: tuple[pd.Index, ...]
    container: str
    form: Form


def row_places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Series and step of every row of series put behind each other."""
    series = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    return series, np.arange(len(series)) - np.repeat(starts, lengths)


def read(y: Any, name: str) -> Parts:
    """Read data in any form but a Panel; series without observations are let through."""
    if isinstance(y, (pd.Series, pd.DataFrame)):
        return complete(read_table(y, name), name)
    parts = _read_list(y, name) if isinstance(y, (list, tuple)) else _read_array(y, name)
    _refuse_infinite(parts, name)
    return parts


def complete(table: Table, name: str, *, fill: bool = False, freq: Any = None) -> Parts:
    """Give every series its regular time index.

    Missing time stamps become rows of NaN where `fill` is set, and an error elsewhere.
    """
    if freq is None:
        found, slots = place_rows(table.stamps, table.codes, table.lengths)
    else:
        _check_step(table.stamps, freq, name)
        found, slots = place_rows_by(table.stamps, table.codes, table.lengths, freq)
    series, step = row_places(table.lengths)
    for n, own in enumerate(found):
        if own is None:
            _refuse_irregular(table, n, name)
    index = tuple(own for own in found if own is not None)
    off = np.flatnonzero(slots < 0)
    if len(off):
        raise ValueError(
            f"{name}: series {table.ids[series[off[0]]]!r} has a row at "
            f"{stamp_text(table.stamps[table.codes[off[0]]])}, which is not on the grid of "
            f"freq={freq!r}; give the step of the data, or resample them first"
        )
    late = np.flatnonzero(slots != step)
    if len(late) and not fill:
        own = index[series[late[0]]]
        raise ValueError(
            f"{name}: series {table.ids[series[late[0]]]!r} has no row at "
            f"{stamp_text(own[step[late[0]]])}, between {stamp_text(own[slots[late[0] - 1]])} and "
            f"{stamp_text(own[slots[late[0]]])}; sq.Panel.fill_gaps inserts the missing time "
            "stamps as NaN"
        )
    form = replace(table.form, rows=None, row_labels=None) if len(late) else table.form
    form = replace(form, freq=True) if fill else form
    lengths = np.array([len(own) for own in index], dtype=np.int64)
    values = np.full((len(index), int(lengths.max()), len(table.columns)), np.nan)
    values[series, slots] = table.values
    parts = Parts(values, lengths, table.ids, table.columns, index, table.container, form)
    _refuse_infinite(parts, name)
    return parts


def _check_step(stamps: pd.Index, freq: Any, name: str) -> None:
    if isinstance(stamps, pd.PeriodIndex):
        if pd.PeriodIndex([], freq=freq).dtype != stamps.dtype:
            raise ValueError(
                f"{name} has periods of {stamps.freqstr!r}, which do not lie on a grid of "
                f"freq={freq!r}; change the periods first, with index.asfreq"
            )
    elif not isinstance(stamps, (pd.DatetimeIndex, pd.TimedeltaIndex)) and (
        not isinstance(freq, (int, np.integer)) or freq < 1
    ):
        raise ValueError(
            f"{name} has integer time stamps and freq={freq!r}; give a whole number, at least 1"
        )


def _refuse_irregular(table: Table, n: int, name: str) -> None:
    end = int(table.lengths[: n + 1].sum())
    stamps = table.stamps[table.codes[end - table.lengths[n] : end]]
    steps = pd.Series(stamps[1:]) - pd.Series(stamps[:-1])
    odd = int(np.argmax(steps.to_numpy() != steps.mode()[0]))
    raise ValueError(
        f"{name}: series {table.ids[n]!r} has no regular step: {stamp_text(stamps[odd + 1])} "
        f"follows {stamp_text(stamps[odd])}, where most steps are {steps.mode()[0]}; give "
        "sq.Panel.fill_gaps the step as freq=, or resample the data first"
    )


def _refuse_infinite(parts: Parts, name: str) -> None:
    infinite = np.isinf(parts.values)
    if infinite.any():
        n, t, d = np.argwhere(infinite)[0]
        raise ValueError(
            f"{name}: series {parts.ids[n]!r} at {stamp_text(parts.index[n][t])}, column "
            f"{parts.columns[d]!r}, is {parts.values[n, t, d]}; replace it by NaN (not observed) "
            "or by a finite value"
        )


# ---------------------------------------------------------------------------------------------
# Arrays, tensors and lists
# ---------------------------------------------------------------------------------------------


def _read_array(y: Any, name: str) -> Parts:
    if not isinstance(y, (np.ndarray, torch.Tensor)):
        raise ValueError(f"{name} is of type {type(y).__name__}; {_ACCEPTED}")
    values = _numeric(y, name)
    if values.ndim not in (1, 2, 3):
        raise ValueError(f"{name} has {values.ndim} axes, shape {values.shape}; {_ACCEPTED}")
    form = Form(ndim=values.ndim)
    if values.size == 0:
        raise ValueError(f"{name} is empty, shape {values.shape}; {_ACCEPTED}")
    if values.ndim == 1:
        values = values[None, :, None]
    elif values.ndim == 2:
        values = values[None]
    lengths = np.full(len(values), values.shape[1], dtype=np.int64)
    return _untimed(values, lengths, "tensor" if isinstance(y, torch.Tensor) else "array", form)


def _read_list(y: Sequence[Any], name: str) -> Parts:
    if not y:
        raise ValueError(f"{name} is an empty list; {_ACCEPTED}")
    items: list[np.ndarray] = []
    for n, item in enumerate(y):
        where = f"{name}: series {n} of the list"
        if isinstance(item, (pd.Series, pd.DataFrame)):
            raise ValueError(
                f"{where} is a pandas {type(item).__name__}, whose index would be lost; put the "
                "series below each other in one DataFrame with the columns unique_id, ds and y"
            )
        values = _numeric(item, where)
        if values.ndim not in (1, 2):
            raise ValueError(
                f"{where} has {values.ndim} axes; each item of a list is one series of shape (T,) "
                "or (T, D), and a single series is passed as an array: np.asarray(...)"
            )
        if values.size == 0:
            raise ValueError(f"{where} has no rows, shape {values.shape}; remove it")
        if items and values.shape[1:] != items[0].shape[1:]:
            raise ValueError(
                f"{where} has shape {values.shape}, series 0 has {items[0].shape}; give all "
                "series the same columns (NaN where one was not observed)"
            )
        items.append(values)
    ndim = items[0].ndim
    lengths = np.array([len(item) for item in items], dtype=np.int64)
    flat = np.concatenate(items).reshape(int(lengths.sum()), -1)
    padded = np.full((len(items), int(lengths.max()), flat.shape[1]), np.nan)
    padded[row_places(lengths)] = flat
    kind = "tensor" if all(isinstance(item, torch.Tensor) for item in y) else "array"
    return _untimed(padded, lengths, "list", Form(ndim=ndim, item=kind))


def _untimed(values: np.ndarray, lengths: np.ndarray, container: str, form: Form) -> Parts:
    """Number series and steps, and name the columns."""
    dim = values.shape[2]
    columns = ("y",) if dim == 1 else tuple(f"y{d}" for d in range(dim))
    shared = {length: pd.RangeIndex(length) for length in set(lengths.tolist())}
    index = tuple(shared[length] for length in lengths.tolist())
    return Parts(values, lengths, tuple(range(len(values))), columns, index, container, form)


def _numeric(data: Any, where: str) -> np.ndarray:
    """Copy to float64; masked elements become NaN."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().to_dense()
        data = (data if data.is_complex() else data.double()).numpy()
    try:
        array = data if isinstance(data, np.ma.MaskedArray) else np.asarray(data)
    except ValueError as error:
        raise ValueError(f"{where} is not rectangular ({error}); {_ACCEPTED}") from error
    if array.dtype.kind not in "biuf":
        kind = _KINDS.get(array.dtype.kind, str(array.dtype))
        raise ValueError(
            f"{where} holds {kind} (dtype {array.dtype}), not real numbers; convert it with "
            "astype(float), with NaN where nothing was observed"
        )
    values = np.array(np.ma.getdata(array), dtype=np.float64, order="C")
    if isinstance(array, np.ma.MaskedArray):
        values[np.ma.getmaskarray(array)] = np.nan
    return values


# ---------------------------------------------------------------------------------------------
# pandas
# ---------------------------------------------------------------------------------------------


def read_table(y: pd.Series | pd.DataFrame, name: str) -> Table:
    """Read a Series, a wide or a long DataFrame."""
    if len(y) == 0:
        raise ValueError(f"{name} is empty: it has no rows; pass at least one observation")
    if isinstance(y, pd.Series):
        label, series = ("y", 0) if y.name is None else (str(y.name), y.name)
        _refuse_text(y.dtype, label, y.iloc[0], name)
        values = y.to_numpy(dtype=np.float64, na_value=np.nan, copy=True)[:, None]
        form, rows = Form(name=y.name), np.zeros(len(y), dtype=int)
        return _sorted_table(values, (series,), (label,), y.index, rows, "series", form, name)
    missing = {"unique_id", "ds"} - set(y.columns)
    if not missing:
        return _read_long(y, name)
    if len(missing) == 1:
        raise ValueError(
            f"{name} has no column {missing.pop()!r}: a long DataFrame has both unique_id and ds "
            "(reset_index() brings them back from the index); a wide one has the time stamps as "
            "its index: set_index('ds')"
        )
    if y.shape[1] == 0:
        raise ValueError(f"{name} is empty: it has no columns; pass at least one")
    columns = _column_names(y.columns, name)
    values = _numeric_columns(y, name)
    form, rows = Form(layout=y.columns), np.zeros(len(y), dtype=int)
    return _sorted_table(values, (0,), columns, y.index, rows, "wide", form, name)


def _read_long(y: pd.DataFrame, name: str) -> Table:
    columns = _column_names(y.columns, name)
    data = y.drop(columns=["unique_id", "ds"])
    if data.shape[1] == 0:
        raise ValueError(f"{name} has unique_id and ds but no column of values; add the column y")
    codes, ids = pd.factorize(y["unique_id"])
    if (codes < 0).any():
        row = int(np.argmax(codes < 0))
        raise ValueError(
            f"{name}: row {row} (ds {y['ds'].iloc[row]}) has no unique_id; name its series, or "
            "drop it"
        )
    columns = tuple(column for column in columns if column not in ("unique_id", "ds"))
    form = Form(layout=y.columns, id_labels=pd.Index(ids), row_labels=y.index)
    values = _numeric_columns(data, name)
    times = pd.Index(y["ds"]).rename(None)
    return _sorted_table(values, tuple(ids.tolist()), columns, times, codes, "long", form, name)


def _column_names(labels: pd.Index, name: str) -> tuple[str, ...]:
    names = tuple(str(label) for label in labels)
    if len(set(names)) < len(names):
        twice = next(label for label in names if names.count(label) > 1)
        raise ValueError(f"{name} has two columns named {twice!r}; rename or drop one of them")
    return names


def _numeric_columns(frame: pd.DataFrame, name: str) -> np.ndarray:
    for place, (label, dtype) in enumerate(frame.dtypes.items()):
        _refuse_text(dtype, str(label), frame.iloc[0, place], name)
    return frame.to_numpy(dtype=np.float64, na_value=np.nan)


def _refuse_text(dtype: Any, label: str, first: Any, name: str) -> None:
    numeric = pd.api.types.is_numeric_dtype(dtype)
    if not numeric or pd.api.types.is_complex_dtype(dtype):
        raise ValueError(
            f"{name}: column {label!r} is not made of real numbers (dtype {dtype}, first value "
            f"{first!r}); convert it with pd.to_numeric, or drop it"
        )


def _sorted_table(
    values: np.ndarray,
    ids: tuple[Hashable, ...],
    columns: tuple[str, ...],
    times: pd.Index,
    series: np.ndarray,
    container: str,
    form: Form,
    name: str,
) -> Table:
    """Sort the rows by series (never by time: disorder within a series is an error)."""
    dtype = times.dtype
    times = checked_index(times, name)
    if times.is_monotonic_increasing and times.is_unique:
        stamps, codes = times, np.arange(len(times))
    else:
        codes, stamps = pd.factorize(times, sort=True)
        stamps = without_freq(stamps)
    rows = None
    if (np.diff(series) < 0).any():
        rows = np.argsort(series, kind="stable")
        values, codes, series = values[rows], codes[rows], series[rows]
    late = np.flatnonzero((np.diff(codes) <= 0) & (np.diff(series) == 0))
    if len(late):
        _refuse_order(
            stamps[codes[late[0]]], stamps[codes[late[0] + 1]], ids[series[late[0]]], name
        )
    plain = pd.api.types.is_integer_dtype(dtype) and not isinstance(times, pd.RangeIndex)
    integer_dtype = str(dtype) if plain else None
    form = replace(form, rows=rows, integer_dtype=integer_dtype, freq=has_freq(times))
    lengths = np.bincount(series, minlength=len(ids)).astype(np.int64)
    return Table(values, lengths, ids, columns, stamps, codes, container, form)


def _refuse_order(before: Any, after: Any, series: Hashable, name: str) -> None:
    if before == after:
        raise ValueError(
            f"{name}: series {series!r} has more than one row at {stamp_text(after)}; drop the "
            "duplicates (drop_duplicates) or aggregate them"
        )
    raise ValueError(
        f"{name}: series {series!r} is not sorted by time: {stamp_text(after)} comes after "
        f"{stamp_text(before)}; sort it with sort_index() or sort_values(['unique_id', 'ds'])"
    )


# ---------------------------------------------------------------------------------------------
# Giving the form back
# ---------------------------------------------------------------------------------------------


def _caller_index(index: pd.Index, form: Form) -> pd.Index:
    if form.integer_dtype is not None:
        return pd.Index(index.to_numpy(), dtype=form.integer_dtype, name=index.name)
    return index if form.freq else without_freq(index)


def restore(parts: Parts) -> Any:
    """Build the caller's container around the values; nothing is shared with them."""
    if parts.container in ("series", "wide", "long"):
        return _restore_pandas(parts)
    return _restore_array(parts.values, parts.lengths, parts.container, parts.form)


def _restore_pandas(parts: Parts) -> pd.Series | pd.DataFrame:
    values, lengths, index, form = parts.values, parts.lengths, parts.index, parts.form
    if parts.container == "series":
        data = values[0, : lengths[0], 0].copy()
        return pd.Series(data, index=_caller_index(index[0], form), name=form.name)
    if parts.container == "wide":
        labels = pd.Index(parts.columns) if form.layout is None else form.layout
        data = values[0, : lengths[0]].copy()
        return pd.DataFrame(data, index=_caller_index(index[0], form), columns=labels)
    return _restore_long(parts)


def _restore_long(parts: Parts) -> pd.DataFrame:
    form = parts.form
    series, step = row_places(parts.lengths)
    flat = parts.values[series, step]
    ids = (
        pd.Index(list(parts.ids), tupleize_cols=False) if form.id_labels is None else form.id_labels
    )
    times = _caller_index(concatenated(parts.index), form)
    if form.rows is not None:
        back = np.empty_like(form.rows)
        back[form.rows] = np.arange(len(back))
        series, flat, times = series[back], flat[back], times[back]
    layout = form.layout
    if layout is None:
        layout = pd.Index(["unique_id", "ds", *parts.columns])
    columns: dict[int, Any] = {}
    for place, label in enumerate(layout):
        if label == "unique_id":
            columns[place] = ids.take(series)
        elif label == "ds":
            columns[place] = times
        else:
            columns[place] = flat[:, parts.columns.index(str(label))]
    frame = pd.DataFrame(columns)
    frame.columns = layout
    if form.row_labels is not None:
        frame.index = form.row_labels
    return frame


def _restore_array(values: np.ndarray, lengths: np.ndarray, container: str, form: Form) -> Any:
    if container == "list":
        cut = [
            values[n, :length, 0] if form.ndim == 1 else values[n, :length]
            for n, length in enumerate(lengths)
        ]
        copies = [item.copy() for item in cut]
        return [torch.from_numpy(item) for item in copies] if form.item == "tensor" else copies
    if len(values) == 1 and form.ndim < 3:
        values = values[0, :, 0] if form.ndim == 1 else values[0]
    return torch.from_numpy(values.copy()) if container == "tensor" else values.copy()
