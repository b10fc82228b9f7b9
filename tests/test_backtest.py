"""Rolling-origin backtests: what is seen, what is held out, what happens on failure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from standins import Fragile, LastValue

import seqdgm as sq
from seqdgm.evaluation import backtest
from seqdgm.panel import Panel


@pytest.fixture
def monthly():
    rng = np.random.default_rng(0)
    index = pd.date_range("2000-01-01", periods=40, freq="MS", name="ds")
    return pd.Series(rng.normal(size=40).cumsum() + 50, index, name="y")


@pytest.fixture
def ragged():
    rng = np.random.default_rng(1)
    parts = []
    for name, start, n in (("b", "2000-01-01", 30), ("a", "2001-06-01", 25)):
        ds = pd.date_range(start, periods=n, freq="MS")
        parts.append(pd.DataFrame({"unique_id": name, "ds": ds, "y": rng.normal(size=n)}))
    return pd.concat(parts, ignore_index=True)


def test_windows_end_with_the_data_and_move_by_step(monthly):
    frame = backtest(LastValue(), monthly, 4, n_windows=3, step=2)
    assert list(frame.columns) == [
        "unique_id",
        "ds",
        "cutoff",
        "y",
        "LastValue",
        "LastValue-lo-80",
        "LastValue-hi-80",
        "LastValue-lo-95",
        "LastValue-hi-95",
    ]
    cutoffs = frame["cutoff"].unique()
    assert list(cutoffs) == [monthly.index[i] for i in (31, 33, 35)]
    assert frame["ds"].iloc[-1] == monthly.index[-1]
    for cutoff, block in frame.groupby("cutoff"):
        at = monthly.index.get_loc(cutoff)
        assert list(block["ds"]) == list(monthly.index[at + 1 : at + 5])
        np.testing.assert_array_equal(block["y"], monthly.iloc[at + 1 : at + 5])
        np.testing.assert_array_equal(block["LastValue"], monthly.iloc[at])
        half = stats.norm.ppf(0.9)
        np.testing.assert_allclose(block["LastValue-hi-80"], monthly.iloc[at] + half)
    assert frame.attrs["failures"] == []


@pytest.mark.parametrize("refit", [True, False])
def test_the_future_is_never_seen(monthly, refit):
    options = {"n_windows": 3, "refit": refit, "seed": 4}
    clean = backtest([LastValue()], monthly, 5, **options)
    for cutoff in clean["cutoff"].unique():
        spoilt = monthly.where(monthly.index <= cutoff, 1e6)
        again = backtest([LastValue()], spoilt, 5, **options)
        mine = clean["cutoff"] == cutoff
        assert (again["y"][mine] == 1e6).all()
        pd.testing.assert_frame_equal(again[mine].drop(columns="y"), clean[mine].drop(columns="y"))


@pytest.mark.parametrize("refit", [True, False])
def test_ragged_panel_ends_each_series_at_its_own_end(ragged, refit):
    frame = backtest(LastValue(), ragged, 3, n_windows=2, refit=refit)
    for name, block in frame.groupby("unique_id"):
        own = ragged[ragged["unique_id"] == name].reset_index(drop=True)
        assert list(block["ds"]) == list(own["ds"].iloc[-6:])
        np.testing.assert_array_equal(block["y"], own["y"].iloc[-6:])
        last = own["y"].iloc[[-7] * 3 + [-4] * 3]
        np.testing.assert_array_equal(block["LastValue"], last)


def test_a_model_is_fitted_once_without_refit(monthly):
    fits = []

    class Counting(LastValue):
        def fit(self, y, inputs=None, **options):
            fits.append(Panel.of(y).n_steps)
            return super().fit(y)

    original = Counting()
    backtest(original, monthly, 4, n_windows=3, refit=False)
    backtest(original, monthly, 4, n_windows=3)
    assert fits == [28, 28, 32, 36]
    assert original.data_ is None


def test_inputs_reach_the_horizon_and_not_beyond(monthly):
    covariate = monthly * 0 + np.arange(40.0)
    seen = []

    class Reading(LastValue):
        def fit(self, y, inputs=None, **options):
            seen.append(Panel.of(inputs).values[0, :, 0])
            return super().fit(y)

        def forecast(self, horizon, y=None, inputs=None, **options):
            seen.append(Panel.of(inputs).values[0, :, 0])
            return super().forecast(horizon, y)

    backtest(Reading(), monthly, 4, n_windows=2, inputs=covariate)
    assert [len(values) for values in seen] == [32, 36, 36, 40]
    assert all((values == np.arange(len(values))).all() for values in seen)
    with pytest.raises(ValueError, match="one row of inputs for each"):
        backtest(Reading(), monthly, 4, inputs=covariate.iloc[:-1])


def test_a_failure_is_recorded_and_the_others_go_on(monthly):
    models = {"good": LastValue(), "weak": Fragile(limit=33)}
    with pytest.warns(RuntimeWarning, match="weak failed on the window after 2002-12-01"):
        frame = backtest(models, monthly, 4, n_windows=2, level=[50])
    assert list(frame.columns[4:]) == [
        *("good", "good-lo-50", "good-hi-50"),
        *("weak", "weak-lo-50", "weak-hi-50"),
    ]
    late = frame["cutoff"] == monthly.index[35]
    assert frame.loc[late, "weak"].isna().all()
    assert frame.loc[~late, "weak"].notna().all()
    assert frame["good"].notna().all()
    (failure,) = frame.attrs["failures"]
    assert failure["model"] == "weak"
    assert failure["cutoff"] == monthly.index[35]
    assert failure["error"] == "ValueError: series 'y' is too much for me"


def test_a_programming_error_is_not_swallowed(monthly):
    with pytest.raises(TypeError, match="unexpected"):
        backtest(LastValue(), monthly, 4, fit_options={"LastValue": {"speed": 3}})


def test_columns_of_a_multivariate_series_get_the_names_of_to_frame():
    y = pd.DataFrame(np.arange(40.0).reshape(20, 2), columns=["left", "right"])
    frame = backtest(LastValue(), y, 2)
    expected = LastValue().fit(y.iloc[:18]).forecast(2).to_frame()
    assert list(frame["unique_id"]) == list(expected["unique_id"])
    assert list(frame["ds"]) == list(expected["ds"])
    np.testing.assert_array_equal(frame["LastValue"], expected["LastValue"])
    np.testing.assert_array_equal(frame["y"], y.iloc[18:].to_numpy().T.ravel())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"horizon": 40}, "has 40 steps, but 1 window"),
        ({"horizon": 10, "n_windows": 4}, "hold out 40"),
        ({"horizon": 0}, "horizon=0"),
        ({"step": 0}, "step=0"),
        ({"n_windows": 1.5}, "n_windows=1.5"),
        ({"models": [LastValue(), LastValue(bias=1.0)]}, "dict of name to model"),
        ({"models": []}, "no models"),
        ({"fit_options": {"ARIMA": {}}}, "fit_options names"),
    ],
)
def test_bad_input_is_named(monthly, change, match):
    given = {"models": LastValue(), "horizon": 4, **change}
    with pytest.raises(ValueError, match=match):
        backtest(given.pop("models"), monthly, **given)


def test_same_seed_same_frame_and_models_do_not_disturb_each_other(monthly):
    class Simulated(LastValue):
        def forecast(self, horizon, y=None, inputs=None, *, seed=None, **options):
            self.bias = float(np.random.default_rng(seed).normal())
            return super().forecast(horizon, y)

    alone = backtest({"a": Simulated()}, monthly, 3, n_windows=2, seed=7)
    company = backtest({"b": Simulated(), "a": Simulated()}, monthly, 3, n_windows=2, seed=7)
    np.testing.assert_array_equal(alone["a"], company["a"])
    noise = alone["a"] - LastValue().fit(monthly).forecast(1).mean[0, 0, 0]
    assert noise.iloc[0] != noise.iloc[-1]


def test_nothing_is_printed_without_progress(monthly, capfd):
    backtest(LastValue(), monthly, 4)
    quiet = capfd.readouterr()
    backtest(LastValue(), monthly, 4, progress=True)
    assert quiet.out == quiet.err == ""
    assert capfd.readouterr().out == ""


def test_arima_with_inputs_forecasts_as_when_called_by_hand(monthly):
    covariate = pd.Series(np.sin(np.arange(40.0)), monthly.index)
    model = sq.ARIMA((1, 0, 0), trend="c")
    frame = backtest(model, monthly, 4, n_windows=2, inputs=covariate, seed=0)
    for end, block in zip((32, 36), (frame.iloc[:4], frame.iloc[4:]), strict=True):
        fitted = model.clone().fit(monthly.iloc[:end], covariate.iloc[:end])
        by_hand = fitted.forecast(4, inputs=covariate.iloc[end : end + 4]).to_frame()
        np.testing.assert_allclose(block["ARIMA"], by_hand["ARIMA"], rtol=1e-10)
        np.testing.assert_allclose(block["ARIMA-lo-80"], by_hand["ARIMA-lo-80"], rtol=1e-10)


def test_without_refit_parameters_stay_and_the_state_moves_on(monthly):
    frame = backtest(sq.ARIMA((1, 0, 0), trend="c"), monthly, 4, n_windows=2, refit=False)
    fitted = sq.ARIMA((1, 0, 0), trend="c").fit(monthly.iloc[:32])
    moved = fitted.update(monthly.iloc[32:36]).forecast(4).to_frame()
    np.testing.assert_allclose(frame["ARIMA"].iloc[4:], moved["ARIMA"], rtol=1e-10)
