"""Panel: every form in and out, every refusal, time indexes, inputs and storage."""

from __future__ import annotations

import copy
import json
import time
import warnings

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings

from seqdgm.panel import Panel, align_inputs

MONTHS = pd.date_range("2020-01-01", periods=4, freq="MS")


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def long_frame() -> pd.DataFrame:
    """Two ragged series, their rows mixed."""
    return pd.DataFrame(
        {
            "ds": pd.to_datetime(
                ["2020-01-01", "2020-02-01", "2020-02-01", "2020-03-01", "2020-03-01"]
            ),
            "unique_id": ["b", "a", "b", "b", "a"],
            "y": [1.0, 10.0, np.nan, 3.0, 20.0],
        },
        index=[7, 3, 5, 1, 0],
    )


def assert_same_panel(one: Panel, other: Panel) -> None:
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    assert (one.ids, one.columns, one.container) == (other.ids, other.columns, other.container)
    for left, right in zip(one.index, other.index, strict=True):
        pd.testing.assert_index_equal(left, right, exact=True)
        assert getattr(left, "freq", None) == getattr(right, "freq", None)


# -- forms in and out ---------------------------------------------------------------------------

INDEXES = {
    "range": pd.RangeIndex(5),
    "range-step": pd.RangeIndex(10, 20, 2, name="t"),
    "int64": pd.Index([1990, 1991, 1992, 1993, 1994], name="year"),
    "int32": pd.Index([4, 6, 8, 10, 12], dtype="int32"),
    "nullable-int": pd.Index([1, 2, 3, 4, 5], dtype="Int64"),
    "month": pd.date_range("2020-01", periods=5, freq="MS", name="when"),
    "month-no-freq": pd.DatetimeIndex(pd.date_range("2020-01", periods=5, freq="MS"), freq=None),
    "month-end": pd.DatetimeIndex(pd.date_range("2020-01", periods=5, freq="ME"), freq=None),
    "mid-month": pd.to_datetime([f"2020-0{k}-15" for k in range(1, 6)]),
    "quarter": pd.date_range("2019-12-31", periods=5, freq="QE"),
    "year": pd.to_datetime([f"20{k}-07-01" for k in range(15, 20)]),
    "week": pd.DatetimeIndex(pd.date_range("2020-01-06", periods=5, freq="7D"), freq=None),
    "business": pd.DatetimeIndex(pd.date_range("2020-01-02", periods=5, freq="B"), freq=None),
    "third-friday": pd.date_range("2020-01-01", periods=5, freq="WOM-3FRI"),
    "ten-minutes": pd.date_range("2020-01-01", periods=5, freq="10min", unit="ns"),
    "seconds": pd.date_range("2020-01-01", periods=5, freq="s", unit="s"),
    "daily-dst": pd.DatetimeIndex(
        pd.date_range("2020-10-23", periods=5, freq="D", tz="Europe/Berlin"), freq=None
    ),
    "hourly-dst": pd.DatetimeIndex(
        pd.date_range("2020-10-25 00:00", periods=5, freq="h", tz="Europe/Berlin"), freq=None
    ),
    "fixed-offset": pd.date_range("2020-01-01", periods=5, freq="D", tz="+05:30"),
    "period-month": pd.period_range("2020-01", periods=5, freq="M", name="p"),
    "period-quarter": pd.period_range("2020Q3", periods=5, freq="Q-NOV"),
    "period-two-months": pd.period_range("2020-01", periods=5, freq="2M"),
    "timedelta": pd.to_timedelta([0, 6, 12, 18, 24], unit="h"),
    "timedelta-days": pd.timedelta_range("1D", periods=5, freq="D"),
    "one-stamp": pd.to_datetime(["2020-01-17"]),
    "two-stamps": pd.to_datetime(["2020-01-17", "2020-01-20"]),
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
@pytest.mark.parametrize("name", ["passengers", None, 3, ("a", "b")])
def test_series_round_trip(index, name):
    y = pd.Series(np.arange(len(index)) + 0.5, index, name=name)
    if len(y) > 2:
        y.iloc[2] = np.nan
    panel = Panel.of(y)
    assert panel.container == "series"
    assert panel.values.shape == (1, len(y), 1)
    assert panel.columns == ("y" if name is None else str(name),)
    pd.testing.assert_series_equal(panel.restore(), y, check_index_type="exact")


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
def test_wide_round_trip(index):
    data = np.arange(2.0 * len(index)).reshape(-1, 2)
    y = pd.DataFrame(data, index, columns=pd.Index(["x", 7], name="series"))
    panel = Panel.of(y)
    assert (panel.container, panel.columns, panel.n_dims) == ("wide", ("x", "7"), 2)
    pd.testing.assert_frame_equal(panel.restore(), y, check_index_type="exact")


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
def test_long_round_trip_in_the_callers_order_of_rows(index):
    both = pd.DataFrame(
        {
            "unique_id": ["B"] * len(index) + ["A"] * len(index),
            "ds": index.append(index),
            "y": np.arange(2.0 * len(index)),
        }
    )
    mixed = both.sample(frac=1, random_state=0).sort_values("ds", kind="stable")
    for y in (both, mixed):
        panel = Panel.of(y)
        assert panel.ids == tuple(y["unique_id"].unique())
        pd.testing.assert_frame_equal(panel.restore(), y)


def test_long_frame_values_land_where_they_belong():
    panel = Panel.of(long_frame())
    assert panel.ids == ("b", "a")
    assert panel.lengths.tolist() == [3, 2]
    expected = [[1.0, np.nan, 3.0], [10.0, 20.0, np.nan]]
    np.testing.assert_array_equal(panel.values[:, :, 0], expected)
    np.testing.assert_array_equal(panel.mask[:, :, 0], [[1, 0, 1], [1, 1, 0]])
    pd.testing.assert_index_equal(panel.index[1], pd.DatetimeIndex(["2020-02-01", "2020-03-01"]))
    pd.testing.assert_frame_equal(panel.restore(), long_frame())


@pytest.mark.parametrize("dtype", ["category", "object", "int64", "string"])
def test_long_frame_keeps_the_dtype_of_its_ids(dtype):
    y = pd.DataFrame(
        {"unique_id": pd.Series([2, 2, 1, 1], dtype="int64"), "ds": [0, 1, 0, 1], "y": np.ones(4)}
    )
    y["unique_id"] = y["unique_id"].astype(str if dtype == "string" else "int64").astype(dtype)
    pd.testing.assert_frame_equal(Panel.of(y).restore(), y)


def test_long_frame_of_several_columns():
    y = long_frame().assign(z=[1, 2, 3, 4, 5])
    panel = Panel.of(y)
    assert panel.columns == ("y", "z")
    assert panel.values[1, :2].tolist() == [[10.0, 2.0], [20.0, 5.0]]
    pd.testing.assert_frame_equal(panel.restore(), y.astype({"z": float}))


@pytest.mark.parametrize(
    ("shape", "inside"),
    [((4,), (1, 4, 1)), ((4, 3), (1, 4, 3)), ((2, 4, 3), (2, 4, 3)), ((1, 4, 1), (1, 4, 1))],
)
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_array_and_tensor_round_trip(shape, inside, kind):
    data = np.arange(float(np.prod(shape))).reshape(shape)
    y = torch.from_numpy(data).float() if kind == "tensor" else data
    panel = Panel.of(y)
    assert panel.container == kind
    assert panel.values.shape == inside
    back = panel.restore()
    assert type(back) is type(y)
    np.testing.assert_array_equal(np.asarray(back), data)
    assert np.asarray(back).dtype == np.float64


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("dim", [None, 1, 2])
def test_list_round_trip(tensor, dim):
    tail = () if dim is None else (dim,)
    items = [np.arange(float(n * (dim or 1))).reshape(n, *tail) for n in (3, 5, 1)]
    panel = Panel.of([torch.from_numpy(item) for item in items] if tensor else items)
    assert panel.lengths.tolist() == [3, 5, 1]
    assert np.isnan(panel.values[2, 1:]).all()
    back = panel.restore()
    assert all(isinstance(item, torch.Tensor if tensor else np.ndarray) for item in back)
    for item, given_item in zip(back, items, strict=True):
        np.testing.assert_array_equal(item, given_item)


def test_panel_passes_through():
    panel = Panel.of(np.ones(3))
    assert Panel.of(panel) is panel
    assert copy.deepcopy(panel) is panel
    assert copy.copy(panel) is panel


@pytest.mark.parametrize(
    "y",
    [
        np.ma.masked_array([1, 5, 3], mask=[False, True, False]),
        pd.Series([1, None, 3], dtype="Int64"),
        pd.Series([1.0, pd.NA, 3.0], dtype="Float64"),
        pd.Series([1.0, None, 3.0]),
        [[1.0, np.nan, 3.0]],
        [np.ma.masked_equal([1.0, 0.0, 3.0], 0.0)],
        torch.tensor([1.0, float("nan"), 3.0], requires_grad=True),
        torch.tensor([1.0, float("nan"), 3.0], dtype=torch.bfloat16),
    ],
    ids=["masked", "Int64", "Float64", "None", "list", "list-masked", "grad", "bfloat16"],
)
def test_every_kind_of_missing_value(y):
    panel = Panel.of(y)
    assert panel.values.dtype == np.float64
    np.testing.assert_array_equal(panel.values[0, :, 0], [1.0, np.nan, 3.0])


@pytest.mark.parametrize(
    "y",
    [
        np.array([True, False]),
        np.array([1, 0], dtype=np.uint8),
        np.array([1, 0], dtype=">f4"),
        pd.Series([True, False]),
        pd.Series([True, False], dtype="boolean"),
        pd.DataFrame({"a": [1, 0]}),
        torch.tensor([1, 0]),
    ],
)
def test_integers_and_booleans_become_float64(y):
    assert Panel.of(y).values.dtype == np.float64
    assert Panel.of(y).values.ravel().tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "make",
    [lambda a: a, torch.from_numpy, lambda a: [a], lambda a: pd.Series(a, copy=False)],
    ids=["array", "tensor", "list", "series"],
)
def test_later_changes_of_the_callers_data_do_not_reach_the_panel(make):
    data = np.array([1.0, 2.0, 3.0])
    panel = Panel.of(make(data))
    data[:] = 99.0
    assert panel.values.ravel().tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="read-only"):
        panel.values[0, 0, 0] = 5.0
    restored = np.asarray(panel.restore()).ravel()
    assert restored.tolist() == [1.0, 2.0, 3.0]


def test_the_constructor_copies_and_clears_what_lies_beyond_the_end():
    values = np.ones((2, 3, 1))
    index = (pd.RangeIndex(3), pd.RangeIndex(2))
    panel = Panel(values, np.array([3, 2]), ("a", "b"), ("y",), index, "panel")
    values[:] = 7.0
    np.testing.assert_array_equal(panel.values[:, :, 0], [[1, 1, 1], [1, 1, np.nan]])
    assert panel.restore() is panel
    assert panel.restore(values).values[0, 0, 0] == 7.0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"values": np.ones((2, 3))}, "axes of values"),
        ({"columns": ("y", "z")}, "do not fit"),
        ({"ids": ("a", "a")}, "same id"),
        ({"index": (pd.RangeIndex(3), pd.RangeIndex(3))}, "series 'b' has length 2, but 3 time"),
    ],
)
def test_the_constructor_checks_shapes(change, match):
    parts = {
        "values": np.ones((2, 3, 1)),
        "lengths": np.array([3, 2]),
        "ids": ("a", "b"),
        "columns": ("y",),
        "index": (pd.RangeIndex(3), pd.RangeIndex(2)),
        "container": "panel",
    }
    with pytest.raises(ValueError, match=match):
        Panel(**{**parts, **change})


def test_restore_of_other_values():
    panel = Panel.of(long_frame())
    doubled = panel.restore(torch.from_numpy(2 * panel.values))
    expected = long_frame().assign(y=2 * long_frame()["y"])
    pd.testing.assert_frame_equal(doubled, expected)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 2\), the panel \(2, 3, 1\)"):
        panel.restore(np.zeros((2, 3, 2)))


def test_to_frame_is_long_and_read_again():
    frame = Panel.of(long_frame()).to_frame()
    expected = long_frame().loc[[7, 5, 1, 3, 0], ["unique_id", "ds", "y"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(frame, expected)
    pd.testing.assert_frame_equal(Panel.of(frame).restore(), frame)


def test_repr_is_short():
    assert repr(Panel.of(long_frame())) == (
        "Panel(2 series x 2..3 steps x 1 dim, 20.0% missing, from long)"
    )
    months = Panel.of(pd.Series(np.ones(4), MONTHS))
    assert (
        repr(months) == "Panel(1 series x 4 steps x 1 dim, 2020-01-01 to 2020-04-01, from series)"
    )


# -- refusals: series, place and remedy are named -------------------------------------------------


def series_at(dates, **options) -> pd.Series:
    return pd.Series(np.ones(len(dates)), pd.DatetimeIndex(dates), **options)


def with_value(value) -> pd.DataFrame:
    y = long_frame()
    y.loc[3, "y"] = value
    return y


REFUSED = {
    "infinite-long": (with_value(np.inf), "series 'a' at 2020-02-01, column 'y', is inf; replace"),
    "infinite-array": (
        np.array([[1.0, 2.0], [3.0, -np.inf]]),
        "series 0 at 1, column 'y1', is -inf",
    ),
    "text-column": (
        pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}),
        "column 'b' is not made of real numbers .*'x'.*to_numeric",
    ),
    "date-column": (pd.DataFrame({"a": MONTHS}), "column 'a' is not made of real numbers"),
    "complex-column": (pd.Series([1j, 2j], name="c"), "column 'c' is not made of real numbers"),
    "category-column": (pd.Series(["1", "2"], dtype="category"), "column 'y' is not made"),
    "object-array": (np.array([1.0, None], dtype=object), "Python objects.*astype"),
    "complex-array": (np.array([1j]), "complex numbers.*astype"),
    "complex-tensor": (torch.tensor([1j]), "complex numbers.*astype"),
    "text-array": (np.array(["1"]), "text.*astype"),
    "text-in-list": ([np.ones(2), np.array(["a"])], "series 1 of the list holds text"),
    "duplicate": (
        series_at(["2020-01-01", "2020-01-02", "2020-01-02"], name="sales"),
        "series 'sales' has more than one row at 2020-01-02; drop",
    ),
    "duplicate-long": (
        pd.concat([long_frame(), long_frame().loc[[0]]]),
        "series 'a' has more than one row at 2020-03-01; drop",
    ),
    "unsorted": (
        series_at(["2020-01-01", "2020-01-03", "2020-01-02"], name="sales"),
        "series 'sales' is not sorted by time: 2020-01-02 comes after 2020-01-03; sort",
    ),
    "decreasing-range": (pd.Series([1.0, 2.0], pd.RangeIndex(1, -1, -1)), "0 comes after 1; sort"),
    "decreasing-dates": (pd.Series([1.0, 2.0], MONTHS[1::-1]), "2020-01-01 comes after 2020-02-01"),
    "unsorted-long": (
        long_frame().iloc[[4, 0, 1, 2, 3]],
        "series 'a' is not sorted by time: 2020-02-01 comes after 2020-03-01; sort",
    ),
    "gap": (
        series_at(["2020-01-01", "2020-02-01", "2020-04-01", "2020-05-01"], name="sales"),
        "series 'sales' has no row at 2020-03-01, between 2020-02-01 and 2020-04-01; "
        "sq.Panel.fill_gaps",
    ),
    "gap-long": (
        long_frame().drop(index=5),
        "series 'b' has no row at 2020-02-01, between 2020-01-01 and 2020-03-01; sq.Panel.fill",
    ),
    "gap-daily": (
        series_at(["2020-01-01", "2020-01-02", "2020-01-04", "2020-01-05"]),
        "series 0 has no row at 2020-01-03.*sq.Panel.fill_gaps",
    ),
    "gap-business": (
        series_at(["2020-01-02", "2020-01-03", "2020-01-06", "2020-01-08"]),
        "series 0 has no row at 2020-01-07.*sq.Panel.fill_gaps",
    ),
    "gap-period": (
        pd.Series(np.ones(3), pd.PeriodIndex(["2020-01", "2020-03", "2020-05"], freq="M")),
        "series 0 has no row at 2020-02.*sq.Panel.fill_gaps",
    ),
    "gap-integer": (
        pd.Series(np.ones(4), [1990, 1991, 1993, 1994]),
        "series 0 has no row at 1992.*sq.Panel.fill_gaps",
    ),
    "gap-timedelta": (
        pd.Series(np.ones(4), pd.to_timedelta([0, 1, 3, 4], unit="h")),
        "series 0 has no row at 0 days 02:00:00.*sq.Panel.fill_gaps",
    ),
    "irregular": (
        series_at(
            [
                *map(
                    pd.Timestamp,
                    ["20200101", "20200102", "20200103 00:00:01", "20200104", "20200105"],
                )
            ]
        ),
        "series 0 has no regular step: 2020-01-03 00:00:01 follows 2020-01-02.*fill_gaps.*resample",
    ),
    "text-index": (
        pd.Series([1.0, 2.0], ["2020-01", "2020-02"]),
        "dtype str.*'2020-01'.*to_datetime",
    ),
    "text-ds": (long_frame().assign(ds="2020"), "dtype str.*to_datetime"),
    "float-index": (pd.Series([1.0, 2.0], [0.5, 1.5]), r"dtype float64.*astype\(int\)"),
    "bool-index": (pd.Series([1.0, 2.0], [False, True]), "dtype bool"),
    "no-stamp": (pd.Series([1.0, 2.0], [pd.Timestamp("2020"), pd.NaT]), "row 1 has no time stamp"),
    "multi-index": (
        long_frame().set_index(["unique_id", "ds"]),
        r"index has 2 levels; call reset_index\(\)",
    ),
    "no-ds": (long_frame().set_index("ds"), r"no column 'ds'.*reset_index\(\)"),
    "no-unique-id": (long_frame().drop(columns="unique_id"), r"no column 'unique_id'.*set_index"),
    "no-values": (long_frame()[["unique_id", "ds"]], "no column of values; add the column y"),
    "unnamed-series": (
        long_frame().assign(unique_id=["b", None, "b", "b", "a"]),
        r"row 1 \(ds 2020-02-01 00:00:00\) has no unique_id",
    ),
    "column-twice": (
        pd.DataFrame(np.ones((2, 2)), columns=["a", "a"]),
        "two columns named 'a'; rename",
    ),
    "column-twice-as-text": (
        pd.DataFrame(np.ones((2, 2)), columns=[1, "1"]),
        "two columns named '1'",
    ),
    "empty-series": (pd.Series([], dtype=float), "y is empty"),
    "empty-frame": (pd.DataFrame(index=MONTHS), "no columns"),
    "empty-long": (long_frame().iloc[:0], "y is empty"),
    "empty-array": (np.empty((0,)), "y is empty"),
    "empty-columns": (np.empty((3, 0)), "y is empty"),
    "empty-list": ([], "y is an empty list"),
    "empty-item": ([np.ones(2), np.ones(0)], "series 1 of the list has no rows"),
    "all-nan": (with_value(np.nan).assign(y=np.nan), "series 'b' has no observation at all"),
    "all-nan-array": (
        np.full((2, 3, 1), [[[1.0]], [[np.nan]]]),
        "series 1 has no observation at all",
    ),
    "scalar": (3.0, "type float; pass a pandas Series"),
    "scalar-array": (np.array(3.0), "y has 0 axes"),
    "four-axes": (np.ones((1, 2, 3, 4)), "y has 4 axes"),
    "none": (None, "type NoneType"),
    "text": ("airline", "type str"),
    "dict": ({"y": [1.0]}, "type dict"),
    "list-of-scalars": ([1.0, 2.0], r"series 0 of the list has 0 axes.*np.asarray"),
    "list-of-cubes": ([np.ones((1, 2, 3))], "series 0 of the list has 3 axes"),
    "list-of-pandas": ([pd.Series([1.0])], "series 0 of the list is a pandas Series.*unique_id"),
    "list-columns": (
        [np.ones((3, 2)), np.ones((3, 1))],
        r"series 1 of the list has shape \(3, 1\), series 0 has \(3, 2\); give all",
    ),
    "list-axes": ([np.ones(3), np.ones((3, 1))], "series 1 of the list has shape"),
    "list-ragged-item": ([[[1.0, 2.0], [3.0]]], "series 0 of the list is not rectangular"),
}


@pytest.mark.parametrize(("y", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_data_are_refused(y, match):
    with pytest.raises(ValueError, match=match) as caught:
        Panel.of(y)
    assert str(caught.value).startswith("y")
    with pytest.raises(ValueError, match=r"^covariates"):
        Panel.of(y, name="covariates")


# -- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in INDEXES if key not in ("one-stamp", "two-stamps")])
def test_future_index_continues_the_index(key):
    """The future of the first three stamps are the other two: pandas' own range is the judge."""
    index = INDEXES[key]
    panel = Panel.of(pd.Series(np.ones(3), index[:3]))
    future = panel.future_index(2)[0]
    assert future.tolist() == index[3:].tolist()
    assert type(future) is type(index) or isinstance(future, pd.RangeIndex)
    assert future.name == index.name
    assert getattr(future, "tz", None) == getattr(index, "tz", None)
    assert getattr(future, "unit", None) == getattr(index, "unit", None)
    assert len(panel.future_index(0)[0]) == 0


def test_future_of_few_stamps():
    one, two = INDEXES["one-stamp"], INDEXES["two-stamps"]
    assert Panel.of(pd.Series([1.0, 2.0], two)).future_index(1)[0][0] == pd.Timestamp("2020-01-23")
    calendar = Panel.of(pd.Series([1.0, 2.0], MONTHS[:2]._with_freq(None)))
    assert calendar.future_index(1)[0][0] == pd.Timestamp("2020-03-01")
    known = Panel.of(pd.Series([1.0], MONTHS[:1]))
    assert known.future_index(1)[0][0] == pd.Timestamp("2020-02-01")
    unknown = Panel.of(pd.Series([1.0], one, name="sales"))
    with pytest.raises(ValueError, match=r"series 'sales'.*2020-01-17.*asfreq"):
        unknown.future_index(1)
    for horizon in (-1, 1.5):
        with pytest.raises(ValueError, match=f"horizon={horizon} must be a whole number"):
            known.future_index(horizon)
        with pytest.raises(ValueError, match=f"horizon={horizon} must be a whole number"):
            align_inputs(known, None, horizon)


def test_a_clock_time_that_summer_time_skips():
    index = pd.date_range("2020-03-26 02:30", periods=3, freq="D", tz="Europe/Berlin")
    panel = Panel.of(pd.Series(np.ones(3), index, name="s"))
    with pytest.raises(ValueError, match=r"series 's'.*2020-03-28.*tz_convert\('UTC'\)"):
        panel.future_index(1)
    long = pd.concat([pd.DataFrame({"unique_id": k, "ds": index, "y": 1.0}) for k in "ab"])
    pd.testing.assert_frame_equal(Panel.of(long).to_frame(), long.reset_index(drop=True))
    after = pd.DatetimeIndex([*index, *pd.date_range("2020-03-30 02:30", periods=2, tz=index.tz)])
    with pytest.raises(ValueError, match=r"series 's' has no regular step.*fill_gaps.*resample"):
        Panel.of(pd.Series(np.ones(5), after, name="s"))


def test_a_short_series_follows_the_step_of_its_panel():
    y = pd.concat(
        [
            pd.DataFrame({"unique_id": "long", "ds": MONTHS, "y": 1.0}),
            pd.DataFrame({"unique_id": "short", "ds": MONTHS[2:3], "y": 2.0}),
        ]
    )
    future = Panel.of(y).future_index(2)
    assert future[1].tolist() == [pd.Timestamp("2020-04-01"), pd.Timestamp("2020-05-01")]
    hole = pd.DataFrame({"unique_id": "short", "ds": MONTHS[[0, 2]], "y": 2.0})
    with pytest.raises(ValueError, match="series 'short' has no row at 2020-02-01"):
        Panel.of(pd.concat([y[y["unique_id"] == "long"], hole]))


def test_single_stamps_do_not_tell_a_step_to_each_other():
    y = pd.DataFrame({"unique_id": ["a", "b"], "ds": MONTHS[:2], "y": [1.0, 2.0]})
    panel = Panel.of(y)
    pd.testing.assert_frame_equal(panel.restore(), y)
    with pytest.raises(ValueError, match=r"series 'a'.*2020-01-01.*asfreq"):
        panel.future_index(1)


def test_days_of_two_series_around_a_weekend_are_not_business_days():
    days = pd.date_range("2020-01-01", periods=3), pd.date_range("2020-01-06", periods=3)
    y = pd.concat([pd.DataFrame({"unique_id": d[0], "ds": d, "y": 1.0}) for d in days])
    assert Panel.of(y).future_index(1)[0][0] == pd.Timestamp("2020-01-04")


def test_a_monthly_series_among_odd_days_keeps_its_step():
    y = pd.concat(
        [
            pd.DataFrame({"unique_id": "months", "ds": MONTHS, "y": 1.0}),
            pd.DataFrame({"unique_id": "day", "ds": [pd.Timestamp("2020-04-17")], "y": 1.0}),
        ]
    )
    panel = Panel.of(y)
    assert panel.select([0]).future_index(1)[0][0] == pd.Timestamp("2020-05-01")
    with pytest.raises(ValueError, match="series 'day'"):
        panel.future_index(1)


def test_series_of_different_steps_and_disjoint_spans():
    parts = {
        "daily": pd.date_range("2020-01-01", periods=70, freq="D"),
        "monthly": pd.date_range("2020-01-01", periods=4, freq="MS"),
        "weekly": pd.date_range("2020-01-08", periods=5, freq="W-WED"),
        "hourly": pd.date_range("2001-01-01", periods=5, freq="h"),
    }
    y = pd.concat([pd.DataFrame({"unique_id": k, "ds": v, "y": 1.0}) for k, v in parts.items()])
    future = Panel.of(y).future_index(3)
    for index, ahead in zip(parts.values(), future, strict=True):
        assert ahead.tolist() == pd.date_range(index[-1], periods=4, freq=index.freq)[1:].tolist()


@pytest.mark.parametrize("key", [key for key in INDEXES if len(INDEXES[key]) == 5])
def test_fill_gaps_puts_the_missing_stamps_back(key):
    index = INDEXES[key][:5]
    whole = pd.Series(np.arange(5.0), index, name="x")
    kept = whole.iloc[[0, 1, 2, 4]]
    if key in ("range", "range-step"):
        kept.index = pd.Index(kept.index.to_numpy(), name=kept.index.name)
    if key == "third-friday":  # no step finds the third Fridays once one is gone
        filled = Panel.fill_gaps(kept, freq="WOM-3FRI")
    else:
        filled = Panel.fill_gaps(kept)
    expected = whole.copy()
    expected.iloc[3] = np.nan
    pd.testing.assert_series_equal(filled, expected, check_freq=False, check_index_type="equiv")
    pd.testing.assert_frame_equal(
        Panel.fill_gaps(kept.to_frame()) if key != "third-friday" else filled.to_frame(),
        expected.to_frame(),
        check_freq=False,
        check_index_type="equiv",
    )
    assert Panel.of(filled).n_steps == 5


def test_fill_gaps_of_a_long_frame():
    filled = Panel.fill_gaps(long_frame().drop(index=5))
    expected = pd.DataFrame(
        {
            "ds": MONTHS[[0, 1, 2, 1, 2]]._with_freq(None),
            "unique_id": ["b", "b", "b", "a", "a"],
            "y": [1.0, np.nan, 3.0, 10.0, 20.0],
        }
    )
    pd.testing.assert_frame_equal(filled, expected)
    pd.testing.assert_frame_equal(Panel.fill_gaps(long_frame()), long_frame())


def test_fill_gaps_with_a_given_step():
    y = series_at(["2020-01-01", "2020-03-01", "2020-05-01"], name="sales")
    assert Panel.fill_gaps(y).equals(y)
    assert Panel.fill_gaps(y, freq="MS").isna().tolist() == [False, True, False, True, False]
    assert Panel.fill_gaps(pd.Series([1, 2], [0, 4]), freq=2).index.tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match=r"series 'sales' has a row at 2020-01-01.*freq='ME'"):
        Panel.fill_gaps(y, freq="ME")
    months = pd.Series([1.0, 2.0], pd.PeriodIndex(["2020-01", "2020-03"], freq="M"))
    assert len(Panel.fill_gaps(months, freq="M")) == 3
    with pytest.raises(ValueError, match=r"periods of 'M'.*freq='D'.*asfreq"):
        Panel.fill_gaps(months, freq="D")
    with pytest.raises(ValueError, match=r"freq='1h'.*whole number"):
        Panel.fill_gaps(pd.Series([1.0, 2.0], [0, 4]), freq="1h")
    with pytest.raises(ValueError, match="ndarray and has no time stamps"):
        Panel.fill_gaps(np.ones(3))


def test_append_and_split_are_inverse():
    for y in (
        long_frame(),
        pd.Series(np.arange(4.0), MONTHS),
        pd.DataFrame(np.ones((4, 2)), INDEXES["hourly-dst"][:4]),
        pd.Series(np.arange(4.0), pd.period_range("2020", periods=4, freq="Q")),
        pd.Series(np.arange(4.0), [10, 20, 30, 40]),
        np.arange(24.0).reshape(2, 4, 3),
        [np.arange(5.0), np.arange(2.0)],
    ):
        panel = Panel.of(y)
        head, tail = panel.split(1)
        assert (head.lengths + 1).tolist() == panel.lengths.tolist()
        for n, length in enumerate(panel.lengths):
            np.testing.assert_array_equal(tail.values[n, 0], panel.values[n, length - 1])
            assert tail.index[n][0] == panel.index[n][-1]
            assert np.isnan(head.values[n, length - 1 :]).all()
        whole = head.append(tail)
        assert_same_panel(whole, panel)
        assert_same_panel(head.append(tail.restore()), panel)


def test_append_in_the_callers_terms():
    panel = Panel.of(long_frame())
    april = {"b": 4.0, "a": 30.0}
    new = pd.DataFrame(
        {"unique_id": ["a", "b"], "ds": pd.Timestamp("2020-04-01"), "y": [30.0, 4.0]}
    )
    whole = panel.append(new)
    assert {
        name: whole.values[n, length - 1, 0]
        for n, (name, length) in enumerate(zip(whole.ids, whole.lengths, strict=True))
    } == april
    assert whole.restore()["ds"].max() == pd.Timestamp("2020-04-01")
    grown = Panel.of(pd.Series([1.0], MONTHS[:1]._with_freq(None)))
    grown = grown.append(pd.Series([2.0, np.nan], MONTHS[1:3])).append(np.array([4.0]))
    pd.testing.assert_index_equal(grown.index[0], MONTHS)
    assert grown.values[0, :, 0].tolist()[3] == 4.0
    missing = grown.append(np.array([np.nan]))
    assert missing.lengths.tolist() == [5]
    wide = Panel.of(pd.DataFrame({"a": [1.0], "b": [2.0]}, MONTHS[:1]))
    swapped = wide.append(pd.DataFrame({"b": [4.0], "a": [3.0]}, MONTHS[1:2]))
    assert swapped.values[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    counted = Panel.of(pd.Series([1.0, 2.0])).append(pd.Series([3.0]))
    assert counted.restore().index.tolist() == [0, 1, 2]


def test_append_accepts_another_unit_of_time():
    panel = Panel.of(pd.Series([1.0, 2.0, 3.0], MONTHS[:3].as_unit("ns")))
    whole = panel.append(pd.Series([4.0], MONTHS[3:].as_unit("s")))
    pd.testing.assert_index_equal(whole.index[0], MONTHS.as_unit("ns"))


@pytest.mark.parametrize(
    ("y", "new", "match"),
    [
        (
            pd.Series(np.ones(2), MONTHS[:2], name="s"),
            pd.Series([1.0], MONTHS[3:]),
            "series 's' begins at 2020-04-01.*2020-02-01, where the data end.*fill_gaps",
        ),
        (
            pd.Series(np.ones(2), MONTHS[:2], name="s"),
            pd.Series([1.0], MONTHS[1:2]),
            "series 's' begins at 2020-02-01",
        ),
        (
            pd.Series(np.ones(2), MONTHS[:2]),
            pd.Series([1.0], MONTHS[2:3].tz_localize("UTC")),
            "series 0 begins at 2020-03-01",
        ),
        (long_frame(), long_frame().query("unique_id == 'a'"), "series 'b' is missing from y_new"),
        (np.ones((2, 3, 1)), np.ones((3, 3, 1)), "series 2 is missing from the panel"),
        (
            long_frame(),
            long_frame().replace({"unique_id": {"a": "c"}}),
            "y_new: series 'a' is missing.*ids of y",
        ),
        (np.ones((3, 2)), np.ones((3, 1)), "y_new has 1 columns"),
        (
            pd.DataFrame({"a": [1.0], "b": [2.0]}),
            pd.DataFrame({"a": [1.0], "c": [2.0]}),
            "y_new has no column 'b'",
        ),
        (np.ones(3), np.array([np.inf]), "y_new: series 0 at 0, column 'y', is inf"),
    ],
)
def test_append_refuses(y, new, match):
    with pytest.raises(ValueError, match=match):
        Panel.of(y).append(new)


def test_split_refuses_to_leave_nothing():
    panel = Panel.of(long_frame())
    with pytest.raises(ValueError, match=r"series 'a' has 2 steps; nothing is left.*last 2"):
        panel.split(2)
    with pytest.raises(ValueError, match="horizon=0"):
        panel.split(0)


def test_select():
    panel = Panel.of(long_frame())
    one = panel.select([1])
    assert (one.ids, one.n_steps, one.lengths.tolist()) == (("a",), 2, [2])
    expected = long_frame().query("unique_id == 'a'").reset_index(drop=True)
    pd.testing.assert_frame_equal(one.restore(), expected)
    assert_same_panel(panel.select([1, 0]).select(np.array([1, 0])), panel)
    arrays = Panel.of(np.arange(6.0).reshape(3, 2, 1)).select([2, 0])
    assert arrays.restore()[:, :, 0].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    for rows in ([], [2], [-3]):
        with pytest.raises(ValueError, match="by position"):
            panel.select(rows)


# -- inputs ---------------------------------------------------------------------------------------


def test_no_inputs():
    assert align_inputs(Panel.of(long_frame()), None, horizon=2).shape == (2, 5, 0)


def test_inputs_are_matched_by_time_stamp():
    panel = Panel.of(long_frame())
    known = pd.DataFrame(
        {"u": np.arange(8.0), "v": 1}, pd.date_range("2019-12-01", periods=8, freq="MS")
    )
    aligned = align_inputs(panel, known, horizon=2)
    assert aligned.shape == (2, 5, 2)
    assert aligned[0, :, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert aligned[1, :, 0].tolist() == [2.0, 3.0, 4.0, 5.0, 0.0]  # its future follows its own end
    assert aligned[1, :, 1].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert align_inputs(panel, known)[0, :, 0].tolist() == [1.0, 2.0, 3.0]
    ns = known.set_axis(known.index.as_unit("ns"))
    np.testing.assert_array_equal(align_inputs(panel, ns, 2), aligned)


def test_inputs_of_each_series_are_matched_by_id():
    ds = pd.date_range("2020-01-01", periods=4, freq="MS")
    known = pd.concat(
        [
            pd.DataFrame({"unique_id": k, "ds": ds, "u": v + np.arange(4.0)})
            for k, v in {"a": 10.0, "c": 50.0, "b": 20.0}.items()
        ]
    )
    aligned = align_inputs(Panel.of(long_frame()), known, horizon=1)
    assert aligned[:, :, 0].tolist() == [[20.0, 21.0, 22.0, 23.0], [11.0, 12.0, 13.0, 0.0]]
    shared = known.query("unique_id == 'c'")
    aligned = align_inputs(Panel.of(long_frame()), shared)
    assert aligned[:, :, 0].tolist() == [[50.0, 51.0, 52.0], [51.0, 52.0, 0.0]]
    with pytest.raises(ValueError, match="inputs: series 'b' is missing"):
        align_inputs(Panel.of(long_frame()), known.query("unique_id == 'a'"))


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, pd.DataFrame, lambda u: [u]])
def test_inputs_without_time_stamps_are_matched_by_position(convert):
    u = np.arange(10.0).reshape(5, 2)
    dated = Panel.of(pd.Series(np.ones(3), MONTHS[:3]))
    np.testing.assert_array_equal(align_inputs(dated, convert(u), 1), u[None, :4])
    ragged = Panel.of([np.ones(3), np.ones(1)])
    aligned = align_inputs(ragged, convert(u), 1)
    np.testing.assert_array_equal(aligned[0], u[:4])
    np.testing.assert_array_equal(aligned[1], np.vstack([u[:2], np.zeros((2, 2))]))
    several = np.arange(10.0).reshape(2, 5, 1)
    np.testing.assert_array_equal(align_inputs(ragged, several)[:, :, 0], [[0, 1, 2], [5, 0, 0]])


def test_inputs_of_a_pandas_counter_are_matched_by_label():
    tail = Panel.of(pd.Series(np.arange(6.0))).split(2)[1]
    known = pd.DataFrame({"u": np.arange(10.0)})
    assert align_inputs(tail, known, 1)[0, :, 0].tolist() == [4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("y", "known", "horizon", "match"),
    [
        (
            pd.Series(np.ones(3), MONTHS[:3], name="s"),
            pd.Series(np.ones(4), MONTHS),
            2,
            "inputs: series 's' has no row at 2020-05-01; .*2020-01-01 to 2020-05-01.*the 2 after",
        ),
        (
            pd.Series(np.ones(4), MONTHS, name="s"),
            pd.Series(np.ones(3), MONTHS[1:]),
            0,
            "inputs: series 's' has no row at 2020-01-01",
        ),
        (np.ones(3), np.ones(4), 2, "inputs: series 0 has 4 rows, 5 are needed: 3 steps.*add"),
        (
            pd.Series(np.ones(3), MONTHS[:3], name="s"),
            pd.DataFrame({"u": [1.0, 2.0, np.nan, 1.0]}, MONTHS),
            0,
            "inputs: series 's' at 2020-03-01, column 'u', is missing .*fill it in",
        ),
        (np.ones(2), np.array([1.0, 1.0, np.nan]), 1, "series 0 at 1 steps after the end, column"),
        (np.ones(2), np.array([1.0, np.inf]), 0, "inputs: series 0 at 1, column 'y', is inf"),
        (
            pd.Series(np.ones(3), MONTHS[:3]),
            pd.Series(np.ones(4), MONTHS.to_period()),
            0,
            r"inputs: series 0 has time stamps of type period\[M\].*to_timestamp",
        ),
        (
            pd.Series(np.ones(3), MONTHS[:3]),
            pd.Series(np.ones(4), MONTHS.tz_localize("UTC")),
            0,
            "inputs: series 0 has time stamps of type .*UTC.*tz_localize",
        ),
        (np.ones((2, 3, 1)), np.ones((3, 3, 1)), 0, None),
        (np.ones((3, 3, 1)), np.ones((2, 3, 1)), 0, "inputs: series 2 is missing"),
        (np.ones(2), pd.DataFrame({"u": ["a", "b"]}), 0, "inputs: column 'u' is not made of real"),
        (
            pd.Series(np.ones(3), MONTHS[:3]),
            series_at(["2020-01-01", "2020-02-01", "2020-04-01"]),
            0,
            "inputs: series 0 has no row at 2020-03-01",
        ),
    ],
)
def test_inputs_that_do_not_cover_the_data_are_refused(y, known, horizon, match):
    if match is None:  # series that y does not have are left aside
        assert align_inputs(Panel.of(y), known, horizon).shape == (2, 3, 1)
        return
    with pytest.raises(ValueError, match=match):
        align_inputs(Panel.of(y), known, horizon)


# -- storage --------------------------------------------------------------------------------------


def through_a_file(panel: Panel) -> Panel:
    arrays, config = panel.to_config()
    assert all(type(array) is np.ndarray for array in arrays.values())
    copies = {key: array.copy() for key, array in arrays.items()}
    return Panel.from_config(copies, json.loads(json.dumps(config)))


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
def test_storage_gives_the_same_panel(index):
    y = pd.Series(np.arange(len(index)) + 0.5, index, name="x")
    panel = Panel.of(y)
    again = through_a_file(panel)
    assert_same_panel(again, panel)
    pd.testing.assert_series_equal(again.restore(), y, check_index_type="exact")


@pytest.mark.parametrize(
    "y",
    [
        long_frame(),
        long_frame().astype({"unique_id": "category"}),
        long_frame().set_axis(list("vwxyz")),
        long_frame().assign(unique_id=pd.to_datetime(["2020", "2021", "2020", "2020", "2021"])),
        long_frame().set_axis(pd.MultiIndex.from_product([["k"], range(5)], names=["a", None])),
        pd.DataFrame(np.ones((3, 2)), columns=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)])),
        pd.DataFrame(np.ones((3, 2)), columns=pd.Index([1.5, 2.5], name="height")),
        np.ones((2, 3, 2)),
        torch.ones(3),
        [torch.ones(3, 2), torch.ones(1, 2)],
    ],
)
def test_storage_keeps_the_container(y):
    panel = Panel.of(y)
    again = through_a_file(panel)
    assert_same_panel(again, panel)
    back = again.restore()
    if isinstance(y, pd.DataFrame):
        pd.testing.assert_frame_equal(back, y, check_column_type="exact")
    else:
        assert type(back) is type(y)
        for item, given_item in zip(back, y, strict=True):
            assert type(item) is type(given_item)
            np.testing.assert_array_equal(item, given_item)


def test_storage_of_special_steps():
    holidays = pd.offsets.CustomBusinessDay(holidays=["2020-01-03"], weekmask="Mon Tue Wed Thu Fri")
    for freq in (holidays, pd.DateOffset(months=2)):
        index = pd.date_range("2020-01-02", periods=5, freq=freq)
        panel = Panel.of(pd.Series(np.ones(5), index))
        assert_same_panel(through_a_file(panel), panel)
        assert (
            through_a_file(panel).future_index(3)[0].tolist() == panel.future_index(3)[0].tolist()
        )
    odd = pd.date_range("2020-01-02", periods=3, freq=pd.DateOffset(hours=5))
    with pytest.raises(ValueError, match=r"frequency .* cannot be stored.*asfreq"):
        Panel.of(pd.Series(np.ones(3), odd)).to_config()
    label = pd.DataFrame({"unique_id": [frozenset()], "ds": [1], "y": [1.0]})
    with pytest.raises(ValueError, match=r"label frozenset\(\) .*strings or integers"):
        Panel.of(label).to_config()


# -- many, and anything -------------------------------------------------------------------------


def test_a_large_panel_is_read_without_a_loop_over_rows():
    rng = np.random.default_rng(0)
    ds = pd.date_range("2000-01-01", periods=320, freq="D").to_numpy()
    starts = rng.integers(0, 20, 2000)
    y = pd.DataFrame(
        {
            "unique_id": np.repeat(np.arange(2000), 300),
            "ds": ds[(starts[:, None] + np.arange(300)).ravel()],
            "y": rng.normal(size=600_000),
        }
    )
    begin = time.perf_counter()
    panel = Panel.of(y)
    assert time.perf_counter() - begin < 5.0  # a loop over its rows takes a minute
    np.testing.assert_array_equal(panel.values.ravel(), y["y"])
    assert len({id(index) for index in panel.index}) <= 20


@st.composite
def panels(draw):
    """Random long frames: number, lengths and starts of series, step, time zone, order of rows."""
    freq = draw(
        st.sampled_from(["MS", "ME", "W-WED", "D", "B", "3h", "QS-FEB", "YE", "2MS", "min"])
    )
    zone = draw(st.sampled_from([None, "UTC", "America/New_York"]))
    grid = pd.date_range("2019-03-07", periods=40, freq=freq, tz=zone)
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    starts = [draw(st.integers(0, 20)) for _ in lengths]
    parts = []
    for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        values = draw(
            st.lists(
                st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.just(np.nan)),
                min_size=length,
                max_size=length,
            )
        )
        values[0] = 1.0
        ds = grid[start : start + length]
        parts.append(pd.DataFrame({"unique_id": f"s{n}", "ds": ds, "y": values}))
    y = pd.concat(parts, ignore_index=True)
    if draw(st.booleans()):
        y = y.sort_values("ds", kind="stable")
    return y, grid


@given(panels())
@settings(max_examples=60, deadline=None)
def test_any_long_frame_round_trips(case):
    y, grid = case
    panel = Panel.of(y)
    pd.testing.assert_frame_equal(panel.restore(), y)
    assert_same_panel(through_a_file(panel), panel)
    pd.testing.assert_frame_equal(Panel.fill_gaps(y), y)
    series = y["unique_id"].unique()
    for n, name in enumerate(series):
        rows = y[y["unique_id"] == name]
        np.testing.assert_array_equal(panel.values[n, : len(rows), 0], rows["y"])
        # Fewer business days than a week and a day cannot be told from days.
        if len(rows) >= (7 if grid.freqstr == "B" else 3):
            end = grid.get_loc(rows["ds"].iloc[-1])
            ahead = grid[end + 1 : end + 3]
            assert panel.select([n]).future_index(len(ahead))[0].tolist() == ahead.tolist()


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_inputs_of_a_list_are_the_rows_themselves(lengths, dim, horizon):
    rng = np.random.default_rng(0)
    known = [rng.normal(size=(n + 3, dim)) for n in lengths]
    aligned = align_inputs(Panel.of([np.ones(n) for n in lengths]), known, horizon)
    assert aligned.shape == (len(lengths), max(lengths) + horizon, dim)
    for n, length in enumerate(lengths):
        np.testing.assert_array_equal(aligned[n, : length + horizon], known[n][: length + horizon])
        assert not aligned[n, length + horizon :].any()
