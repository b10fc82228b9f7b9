"""What the pictures show, read back from the figures' own artists."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.dates import num2date
from matplotlib.figure import Figure
from scipy import stats
from standins import LastValue

from seqdgm.evaluation import backtest, compare
from seqdgm.plotting import plot_comparison, plot_forecast, plot_states
from seqdgm.results import StatePosterior


@pytest.fixture
def monthly():
    index = pd.date_range("2000-01-01", periods=60, freq="MS")
    return pd.Series(np.arange(60.0), index, name="sales")


def line(axis, label):
    (found,) = [artist for artist in axis.lines if artist.get_label() == label]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata(), dtype=float)


def band(axis, label):
    (found,) = [artist for artist in axis.collections if artist.get_label() == label]
    return found.get_datalim(axis.transData)


def test_forecast_shows_history_mean_bands_and_truth(monthly):
    forecast = LastValue(std=2.0).fit(monthly.iloc[:54]).forecast(6)
    figure = plot_forecast(forecast, monthly.iloc[54:], level=[80, 95], history=10)
    (axis,) = figure.axes
    when, past = line(axis, "history")
    np.testing.assert_array_equal(past, np.arange(44.0, 54.0))
    assert when[-1] == np.datetime64("2004-06-01")
    when, mean = line(axis, "forecast mean")
    np.testing.assert_array_equal(mean, np.full(7, 53.0))
    assert when[-1] == np.datetime64("2004-12-01")
    np.testing.assert_array_equal(line(axis, "held out")[1], np.arange(54.0, 60.0))
    box = band(axis, "95 % interval")
    np.testing.assert_allclose([box.y0, box.y1], 53 + 2 * stats.norm.ppf([0.025, 0.975]))
    assert box.height > band(axis, "80 % interval").height
    assert axis.get_ylabel() == "sales"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["history", "95 % interval", "80 % interval", "forecast mean", "held out"]


@pytest.mark.parametrize(
    "index",
    [
        pd.period_range("2000-01", periods=60, freq="M"),
        pd.date_range("2000-01-01", periods=60, freq="h", tz="Europe/Vienna"),
        pd.timedelta_range("0s", periods=60, freq="10min"),
        pd.RangeIndex(1900, 1960),
        pd.RangeIndex(60),
    ],
    ids=["period", "zone", "timedelta", "years", "steps"],
)
def test_every_kind_of_time_index_can_be_drawn(monthly, index, tmp_path):
    y = pd.Series(monthly.to_numpy(), index)
    plot_forecast(LastValue().fit(y).forecast(5)).savefig(tmp_path / "a.png")
    result = compare({"a": LastValue(), "b": LastValue(bias=1.0)}, y, horizon=5, season=1)
    result.plot().savefig(tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_periods_are_drawn_where_they_start(monthly):
    y = monthly.to_period("M")
    (axis,) = plot_forecast(LastValue().fit(y).forecast(2)).axes
    when, _ = line(axis, "forecast mean")
    assert str(when[-1])[:10] == "2005-02-01"
    left = num2date(axis.get_xlim()[0])
    assert left.year in (2002, 2003)


def test_missing_values_are_gaps_and_lone_values_are_dots(monthly):
    y = monthly.copy()
    y.iloc[50] = y.iloc[52] = y.iloc[59] = np.nan
    (axis,) = plot_forecast(LastValue().fit(y).forecast(2)).axes
    _, past = line(axis, "history")
    assert np.isnan(past[[-10, -8, -1]]).all()
    (dots,) = [artist for artist in axis.lines if artist.get_marker() == "."]
    np.testing.assert_array_equal(dots.get_ydata(), [51.0])
    # The last value is not known, so the fan has nothing to start from.
    assert len(line(axis, "forecast mean")[1]) == 2


def test_panels_of_a_panel_and_one_on_a_given_axis():
    y = np.random.default_rng(0).normal(size=(4, 30, 2))
    forecast = LastValue().fit(y).forecast(3)
    assert len([axis for axis in plot_forecast(forecast).axes if axis.get_visible()]) == 8
    figure = Figure()
    axis = figure.subplots()
    name, column = forecast.panel.ids[2], forecast.panel.columns[1]
    assert plot_forecast(forecast, series=name, column=column, ax=axis) is figure
    np.testing.assert_array_equal(line(axis, "history")[1][-24:], y[2, -24:, 1])
    with pytest.raises(ValueError, match="8 panels do not fit"):
        plot_forecast(forecast, ax=axis)
    with pytest.raises(ValueError, match="series 'x' is not there"):
        plot_forecast(forecast, series="x")


def test_states_have_gaussian_bands_of_the_level(monthly):
    panel = LastValue().fit(monthly).forecast(1).panel
    mean = np.stack([np.arange(60.0), np.zeros(60)], axis=1)[None]
    cov = np.tile(np.diag([4.0, 9.0]), (1, 60, 1, 1))
    posterior = StatePosterior(mean, cov, np.zeros(1), ("level", "slope"), panel, "smoothed")
    figure = plot_states(posterior, level=90, observed=True)
    level, slope = figure.axes
    np.testing.assert_array_equal(line(level, "smoothed mean")[1], np.arange(60.0))
    np.testing.assert_array_equal(line(level, "data")[1], monthly)
    box = band(slope, "90 % band")
    np.testing.assert_allclose([box.y0, box.y1], 3 * stats.norm.ppf([0.05, 0.95]))
    assert len(plot_states(posterior, names=["slope"]).axes) == 1
    with pytest.raises(ValueError, match="state 'season'"):
        plot_states(posterior, names=["season"])


def test_comparison_has_a_panel_for_each_model_on_shared_axes(monthly):
    models = {"near": LastValue(), "far": LastValue(bias=5.0), "wild": LastValue(std=1e4)}
    frame = backtest(models, monthly, 6, n_windows=2)
    figure = plot_comparison(frame, monthly, notes={"far": "CRPS 4"}, tail=12)
    near, far, wild = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title("left") for axis in (near, far, wild)] == ["near", "far", "wild"]
    assert far.get_title("right") == "CRPS 4"
    for axis in (near, far, wild):
        np.testing.assert_array_equal(line(axis, "history")[1], np.arange(42.0, 54.0))
        np.testing.assert_array_equal(line(axis, "held out")[1], np.arange(54.0, 60.0))
        assert axis.get_ylim() == near.get_ylim()
    np.testing.assert_array_equal(line(far, "forecast mean")[1], [53.0] + [58.0] * 6)
    # The wild fan must not flatten the others.
    assert near.get_ylim()[1] < 60 + 18
    earlier = plot_comparison(frame, monthly, cutoff=monthly.index[47], models=["near"])
    np.testing.assert_array_equal(line(earlier.axes[0], "held out")[1], np.arange(48.0, 54.0))


def test_a_series_of_a_panel_is_chosen_by_its_name():
    rng = np.random.default_rng(0)
    frame = pd.concat(
        pd.DataFrame({"unique_id": name, "ds": np.arange(30), "y": rng.normal(size=30)})
        for name in "ab"
    )
    result = compare(LastValue(), frame, horizon=3, season=1)
    (axis,) = result.plot(series="b").axes
    own = frame[frame["unique_id"] == "b"]["y"].to_numpy()
    np.testing.assert_array_equal(line(axis, "held out")[1], own[-3:])
    with pytest.raises(ValueError, match="series 'c'"):
        result.plot(series="c")


def test_a_figure_shows_itself_in_a_notebook_and_leaves_pyplot_alone(monthly):
    png = plot_forecast(LastValue().fit(monthly).forecast(3))._repr_png_()
    assert png.startswith(b"\x89PNG")
    code = "import sys, seqdgm.plotting; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
