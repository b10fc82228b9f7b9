"""`Panel`: the one form in which every model sees data, and the way back to the caller's own.

.. code-block:: text

    Series, DataFrame, array, tensor, list --Panel.of--> Panel --restore--> the same container

A panel holds N series of D dimensions as float64 values of shape (series, time, dim), NaN where
nothing was observed, with each series' own length and regular time index.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from seqdgm._align import (
    align_rows,
    checked_horizon,
    has_labels,
    is_counted,
    match_columns,
    match_series,
    refuse_join,
    refuse_missing,
)
from seqdgm._forms import Form, Parts, complete, read, read_table, restore, row_places
from seqdgm._index import concatenated, future_of, joined, stamp_text
from seqdgm._panel_config import parts_from_config, parts_to_config

_Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Panel:
    """N series of D dimensions with their lengths and time indexes; immutable.

    Make one with `Panel.of`, which validates; the constructor checks shapes only.

    Attributes
    ----------
    values : ndarray of shape (series, time, dim)
        float64, read-only; NaN where not observed and beyond a series' end.
    lengths : ndarray of shape (series,)
        Steps of each series, int64.
    ids : tuple
        Name of each series.
    columns : tuple of str
        Name of each dimension.
    index : tuple of pd.Index
        Time index of each series, of its length: a `DatetimeIndex` or `TimedeltaIndex` with its
        `freq`, a `PeriodIndex`, or a `RangeIndex` (integers, or no time stamps given).
    container : str
        What `restore` builds: "series", "wide", "long", "array", "tensor", "list" or "panel".

    Examples
    --------
    >>> import pandas as pd
    >>> y = pd.Series([1.0, None, 3.0], pd.period_range("2020-01", periods=3, freq="M"), name="x")
    >>> panel = Panel.of(y)
    >>> panel
    Panel(1 series x 3 steps x 1 dim, 33.3% missing, 2020-01 to 2020-03, from series)
    >>> panel.mask[0, :, 0].tolist()
    [True, False, True]
    >>> panel.restore().equals(y)
    True
    """

    values: Float[_Array, "series time dim"]
    lengths: Int[_Array, "series"]
    ids: tuple[Hashable, ...]
    columns: tuple[str, ...]
    index: tuple[pd.Index, ...]
    container: str
    _form: Form = dataclasses.field(default=Form(), repr=False)

    def __post_init__(self) -> None:
        """Freeze the arrays, put NaN beyond the end of each series and check the shapes."""
        values = np.asarray(self.values, dtype=np.float64)
        lengths = np.array(self.lengths, dtype=np.int64)
        shape = (len(self.ids), values.shape[1] if values.ndim == 3 else 0, len(self.columns))
        if values.shape != shape or lengths.shape != shape[:1] or len(self.index) != shape[0]:
            raise ValueError(
                f"values of shape {values.shape} do not fit {len(self.ids)} ids, "
                f"{len(self.columns)} columns, {len(self.index)} indexes and lengths of shape "
                f"{lengths.shape}; the axes of values are (series, time, dim)"
            )
        if len(set(self.ids)) < len(self.ids):
            raise ValueError("two series have the same id; give each its own")
        for series, length, index in zip(self.ids, lengths.tolist(), self.index, strict=True):
            if len(index) != length or length > shape[1]:
                raise ValueError(
                    f"series {series!r} has length {length}, but {len(index)} time stamps and "
                    f"{shape[1]} values; all three must agree"
                )
        if values.flags.writeable:
            values = values.copy()
        beyond = np.arange(shape[1]) >= lengths[:, None]
        if beyond.any() and not np.isnan(values[beyond]).all():
            values = np.where(beyond[:, :, None], np.nan, values)
        values.setflags(write=False)
        lengths.setflags(write=False)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "lengths", lengths)
        for field in ("ids", "columns", "index"):
            object.__setattr__(self, field, tuple(getattr(self, field)))

    # -- reading ----------------------------------------------------------------------------

    @classmethod
    def of(cls, y: Any, *, name: str = "y") -> Panel:
        """Read and check data in any accepted form.

        Parameters
        ----------
        y : Series, DataFrame, array, tensor, list or Panel
            A Series is one univariate series. A DataFrame with the columns `unique_id` and `ds`
            is long: each further column is a dimension, the rows of different series may be
            mixed, the rows of one series are in the order of time. Any other DataFrame is wide:
            one series, a column a dimension, its index the time. Arrays and tensors have the
            shape (T,), (T, D) or (N, T, D); the items of a list (T_i,) or (T_i, D). NaN, `pd.NA`
            and masked elements mean not observed. A Panel is returned as it is.
        name : str
            What error texts call the data.

        Returns
        -------
        Panel

        Raises
        ------
        ValueError
            For data that are empty, infinite, not real numbers or of another shape, for a series
            without any observation, and for time stamps that are missing, repeated, unsorted or
            irregular. The text names the series, the place and the remedy.

        Examples
        --------
        >>> Panel.of([[1.0, 2.0, 3.0], [4.0, 5.0]]).lengths.tolist()
        [3, 2]
        """
        if isinstance(y, Panel):
            return y
        panel = _from_parts(read(y, name))
        unseen = np.flatnonzero(~panel.mask.any(axis=(1, 2)))
        if len(unseen):
            raise ValueError(
                f"{name}: series {panel.ids[unseen[0]]!r} has no observation at all, only missing "
                "values; leave it out"
            )
        return panel

    @classmethod
    def fill_gaps(cls, y: Any, freq: Any = None) -> Any:
        """Insert the missing time stamps of each series, as NaN.

        Parameters
        ----------
        y : Series or DataFrame
            A Series, a wide or a long frame.
        freq : str, offset or int, optional
            The step: a frequency of pandas, an integer for integer time stamps. By default the
            coarsest step on which all stamps of the series lie.

        Returns
        -------
        same container as `y`
            Its values are float64. A long frame in which rows were inserted comes back sorted by
            series and time, with a new row index.

        Raises
        ------
        ValueError
            Where time stamps do not lie on the grid of the step, and for bad data as in
            `Panel.of`.

        Examples
        --------
        >>> import pandas as pd
        >>> months = pd.PeriodIndex(["2020-01", "2020-02", "2020-04"], freq="M")
        >>> y = pd.Series([1.0, 2.0, 4.0], months)
        >>> Panel.fill_gaps(y).tolist()
        [1.0, 2.0, nan, 4.0]
        """
        if not isinstance(y, (pd.Series, pd.DataFrame)):
            raise ValueError(
                f"y is of type {type(y).__name__} and has no time stamps to complete; pass a "
                "Series or DataFrame, or put NaN where nothing was observed"
            )
        return restore(complete(read_table(y, "y"), "y", fill=True, freq=freq))

    # -- what is in it ----------------------------------------------------------------------

    @property
    def n_series(self) -> int:
        """Number of series, N."""
        return self.values.shape[0]

    @property
    def n_steps(self) -> int:
        """Steps of the longest series, T."""
        return self.values.shape[1]

    @property
    def n_dims(self) -> int:
        """Number of dimensions, D."""
        return self.values.shape[2]

    @cached_property
    def mask(self) -> Bool[_Array, "series time dim"]:
        """True where a value was observed; read-only."""
        mask = ~np.isnan(self.values)
        mask.setflags(write=False)
        return mask

    def __repr__(self) -> str:
        """Sizes, share of missing values, time span and origin."""
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        steps = f"{longest}" if shortest == longest else f"{shortest}..{longest}"
        inside = int(self.lengths.sum()) * self.n_dims
        missing = 1 - np.count_nonzero(self.mask) / max(inside, 1)
        dims = "dim" if self.n_dims == 1 else "dims"
        parts = [f"{self.n_series} series x {steps} steps x {self.n_dims} {dims}"]
        parts += [f"{missing:.1%} missing"] if missing else []
        if self.n_series == 1 and longest and not isinstance(self.index[0], pd.RangeIndex):
            first, last = self.index[0][0], self.index[0][-1]
            parts += [f"{stamp_text(first)} to {stamp_text(last)}"]
        return f"Panel({', '.join(parts)}, from {self.container})"

    def __copy__(self) -> Panel:
        """Return the panel itself: it cannot change."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Panel:
        """Return the panel itself: it cannot change."""
        return self

    # -- giving back ------------------------------------------------------------------------

    def restore(self, values: Any = None) -> Any:
        """Put values into the caller's container, with its index, names and order of rows.

        Parameters
        ----------
        values : array of shape (series, time, dim), optional
            Default: the panel's own.

        Returns
        -------
        Series, DataFrame, ndarray, Tensor, list or Panel
            What `container` says, float64 and free to change.
        """
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().numpy()
        data = self.values if values is None else np.asarray(values, dtype=np.float64)
        if data.shape != self.values.shape:
            raise ValueError(
                f"values have shape {data.shape}, the panel {self.values.shape} "
                "(series, time, dim); give one value for each of its own"
            )
        if self.container == "panel":
            return self if values is None else dataclasses.replace(self, values=data)
        return restore(dataclasses.replace(self._parts(), values=data))

    def to_frame(self) -> pd.DataFrame:
        """Long table `unique_id, ds` and a column for each dimension, sorted by series."""
        series, step = row_places(self.lengths)
        ids = pd.Index(list(self.ids), tupleize_cols=False)
        frame = pd.DataFrame(self.values[series, step], columns=list(self.columns))
        frame.insert(0, "ds", concatenated(self.index))
        frame.insert(0, "unique_id", ids.take(series))
        return frame

    # -- time -------------------------------------------------------------------------------

    def future_index(self, horizon: int) -> tuple[pd.Index, ...]:
        """Continue each time index by `horizon` steps.

        Raises
        ------
        ValueError
            Where a series has a single time stamp, which does not tell the step.
        """
        horizon = checked_horizon(horizon, least=0)
        shared: dict[tuple[Any, ...], pd.Index] = {}
        future = []
        for series, index in zip(self.ids, self.index, strict=True):
            key: tuple[Any, ...] = (id(index),)
            freq = getattr(index, "freq", None)
            if freq is not None and len(index):
                key = (index[-1], freq, index.name)
            if key not in shared:
                shared[key] = self._ahead(index, horizon, series)
            future.append(shared[key])
        return tuple(future)

    def _ahead(self, index: pd.Index, horizon: int, series: Hashable) -> pd.Index:
        ahead = future_of(index, horizon)
        if ahead is None:
            raise ValueError(
                f"series {series!r}: the time stamps up to {stamp_text(index[-1])} do not tell the "
                "next ones; set the frequency of the index (y.asfreq('MS'), say, or periods), pass "
                "more rows, or tz_convert('UTC') where summer time skips a clock time"
            )
        return ahead

    def append(self, other: Any) -> Panel:
        """Return the panel with later data behind its own.

        Parameters
        ----------
        other : any form of `Panel.of`
            The same series (in any order; a single one may have another name) and the same
            columns. Time stamps must follow each series' last one; data without time stamps just
            follow.

        Raises
        ------
        ValueError
            Where a series or column is missing or not known, or where the time stamps leave a
            gap or overlap.

        Examples
        --------
        >>> Panel.of(np.array([1.0, 2.0])).append(np.array([3.0])).restore().tolist()
        [1.0, 2.0, 3.0]
        """
        new = other if isinstance(other, Panel) else _from_parts(read(other, "y_new"))
        if new.n_series != self.n_series:
            refuse_missing(self, new)
        order = match_series(self, new, "y_new")
        new = new if order == list(range(self.n_series)) else new.select(order)
        dims = match_columns(self, new)
        labelled = has_labels(self) and has_labels(new) and not is_counted(new)
        shared: dict[tuple[int, ...], pd.Index] = {}
        index = []
        for n, pair in enumerate(zip(self.index, new.index, strict=True)):
            key = (id(pair[0]), id(pair[1]))
            if key not in shared:
                behind = pair[1] if labelled else self._ahead(pair[0], len(pair[1]), self.ids[n])
                whole = joined(pair[0], behind)
                if whole is None:
                    refuse_join(self.ids[n], *pair)
                shared[key] = whole
            index.append(shared[key])
        lengths = self.lengths + new.lengths
        values = np.full((self.n_series, int(lengths.max()), self.n_dims), np.nan)
        values[:, : self.n_steps] = self.values
        series, step = row_places(new.lengths)
        values[series, step + self.lengths[series]] = new.values[series, step][:, dims]
        return self.span(_frozen(values), lengths, tuple(index))

    def split(self, horizon: int) -> tuple[Panel, Panel]:
        """Cut the last `horizon` steps of each series off: (head, tail)."""
        horizon = checked_horizon(horizon, least=1)
        short = np.flatnonzero(self.lengths <= horizon)
        if len(short):
            raise ValueError(
                f"series {self.ids[short[0]]!r} has {self.lengths[short[0]]} steps; nothing "
                f"is left before the last {horizon}: use a shorter horizon, or leave the series out"
            )
        keep = self.lengths - horizon
        head = self.values[:, : int(keep.max())]
        steps = keep[:, None] + np.arange(horizon)
        tail = np.take_along_axis(self.values, steps[:, :, None], axis=1)
        cuts = {}
        for index, cut in zip(self.index, keep.tolist(), strict=True):
            cuts[id(index), cut] = (index[:cut], index[cut:])
        pairs = [cuts[id(i), cut] for i, cut in zip(self.index, keep.tolist(), strict=True)]
        return (
            self.span(head, keep, tuple(pair[0] for pair in pairs)),
            self.span(_frozen(tail), np.full_like(keep, horizon), tuple(pair[1] for pair in pairs)),
        )

    def select(self, rows: Sequence[int]) -> Panel:
        """Return the panel of the series at these positions."""
        places = [operator.index(row) for row in rows]
        outside = [row for row in places if not -self.n_series <= row < self.n_series]
        if outside or not places:
            raise ValueError(
                f"rows={places} must name at least one of the {self.n_series} series, by position"
            )
        lengths = self.lengths[places]
        form = dataclasses.replace(self._form, rows=None, row_labels=None)
        if form.id_labels is not None:
            form = dataclasses.replace(form, id_labels=form.id_labels.take(places))
        return Panel(
            values=_frozen(self.values[places, : int(lengths.max())]),
            lengths=lengths,
            ids=tuple(self.ids[row] for row in places),
            columns=self.columns,
            index=tuple(self.index[row] for row in places),
            container=self.container,
            _form=form,
        )

    def span(self, values: _Array, lengths: _Array, index: tuple[pd.Index, ...]) -> Panel:
        """Return the same series over another span of time."""
        form = dataclasses.replace(self._form, rows=None, row_labels=None)
        return dataclasses.replace(self, values=values, lengths=lengths, index=index, _form=form)

    # -- storage ----------------------------------------------------------------------------

    def to_config(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return everything as (numpy arrays, JSON-able dict), for a model file.

        Raises
        ------
        ValueError
            For a frequency, time zone or id that has no name to be found again by.
        """
        return parts_to_config(self._parts())

    @classmethod
    def from_config(cls, arrays: dict[str, np.ndarray], config: dict[str, Any]) -> Panel:
        """Build the panel that `to_config` described."""
        return _from_parts(parts_from_config(arrays, config))

    def _parts(self) -> Parts:
        return Parts(
            self.values,
            self.lengths,
            self.ids,
            self.columns,
            self.index,
            self.container,
            self._form,
        )


def _from_parts(parts: Parts) -> Panel:
    held = vars(parts)
    return Panel(
        **{**{key: held[key] for key in held if key != "form"}, "values": _frozen(parts.values)},
        _form=parts.form,
    )


def _frozen(values: _Array) -> _Array:
    """Mark an array that nobody else holds as read-only, so that it need not be copied."""
    values.setflags(write=False)
    return values


def align_inputs(
    panel: Panel, inputs: Any, horizon: int = 0
) -> Float[_Array, "series steps inputs"]:
    """Bring known covariates to the time steps of a panel and the `horizon` steps after them.

    Parameters
    ----------
    panel : Panel
        The data.
    inputs : any form of `Panel.of`, or None
        The covariates. A single series of them is shared by all series; several are matched by
        id, or by position where one side has no ids. Rows are matched by time stamp where both
        have time stamps, else by position. Rows before or after those needed are cut off.
    horizon : int
        Steps after each series' end that the inputs must cover as well.

    Returns
    -------
    ndarray of shape (series, steps, inputs)
        float64; `steps` is `panel.n_steps + horizon`. Row n holds the steps
        0 .. lengths[n] + horizon - 1 of series n, its future directly behind its own end, and
        zeros behind that. No columns where `inputs` is None.

    Raises
    ------
    ValueError
        Where a series, row or value of the inputs is missing: covariates must be known at every
        step.

    Examples
    --------
    >>> panel = Panel.of(np.array([5.0, 6.0]))
    >>> align_inputs(panel, np.array([0.0, 1.0, 0.0, 1.0]), horizon=1)[0, :, 0].tolist()
    [0.0, 1.0, 0.0]
    """
    horizon = checked_horizon(horizon, least=0)
    if inputs is None:
        return np.zeros((panel.n_series, panel.n_steps + horizon, 0))
    known = inputs if isinstance(inputs, Panel) else _from_parts(read(inputs, "inputs"))
    return align_rows(panel, known, horizon)
