"""The comparison's table against scores worked out by hand, scipy and statsmodels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from standins import Fragile, LastValue

from seqdgm.datasets import Dataset
from seqdgm.evaluation import backtest, compare, default_models
from seqdgm.evaluation.defaults import infer_season
from seqdgm.panel import Panel


@pytest.fixture
def walks():
    """Twenty random walks of very different size, with a value missing in the held-out part."""
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.integers(0, 3, 20)
    y = size[:, None, None] * (100 + rng.normal(size=(20, 40, 1)).cumsum(axis=1))
    y[3, 38] = np.nan
    return y


def gaussian_crps(y, mean, std):
    z = (y - mean) / std
    return std * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - np.pi**-0.5)


def test_table_is_the_mean_over_series_of_scores_by_hand(walks):
    result = compare(LastValue(std=5.0), walks, horizon=4, season=2, n_samples=4000, seed=1)
    train, held = walks[:, :36, 0], walks[:, 36:, 0]
    last = train[:, -1:]
    row = result.table.loc["LastValue"]
    scale = np.abs(train[:, 2:] - train[:, :-2]).mean(axis=1)
    mase = np.nanmean(np.abs(held - last), axis=1) / scale
    smape = np.nanmean(200 * np.abs(held - last) / (np.abs(held) + np.abs(last)), axis=1)
    known = ~np.isnan(held)
    inside = np.abs(held - last) <= 5 * stats.norm.ppf(0.9)
    density = np.where(known, stats.norm.logpdf(held, last, 5.0), 0).sum(axis=1) / known.sum(axis=1)
    assert row["MASE"] == pytest.approx(mase.mean())
    assert row["MASE-se"] == pytest.approx(mase.std(ddof=1) / 20**0.5)
    assert row["sMAPE"] == pytest.approx(smape.mean())
    expected = np.nanmean(np.where(known, 100.0 * inside, np.nan), axis=1).mean()
    assert row["coverage-80"] == pytest.approx(expected)
    assert row["log_score"] == pytest.approx(density.mean())
    assert row["CRPS"] == pytest.approx(
        np.nanmean(gaussian_crps(held, last, 5.0), axis=1).mean(), rel=0.01
    )
    assert row["log_score_kind"] == "exact"
    assert row["units"] == 20
    assert row["fit_seconds"] > 0
    assert row["forecast_seconds"] > 0
    assert result.season == 2
    assert result.baseline == "LastValue"


def test_models_are_sorted_by_crps_and_the_failed_come_last(walks):
    models = {"off": LastValue(bias=400.0), "fair": LastValue(), "weak": Fragile(limit=34)}
    with pytest.warns(RuntimeWarning, match="weak failed"):
        result = compare(models, walks, horizon=4, n_windows=2, season=1)
    assert list(result.table.index) == ["fair", "off", "weak"]
    assert list(result.table["units"]) == [40, 40, 20]
    assert result.table.loc["weak", "CRPS"] < result.table.loc["off", "CRPS"]
    assert [failure["model"] for failure in result.failures] == ["weak"]


def test_p_value_is_the_signed_rank_test_of_scaled_differences(walks):
    models = {"base": LastValue(std=5.0), "other": LastValue(std=5.0, bias=1.0)}
    result = compare(models, walks, horizon=4, season=1, seed=0, baseline="base")
    units = result.scores.pivot(index="unique_id", columns="model", values="CRPS")
    units = units.loc[list(result.panel.ids)]
    scale = np.abs(np.diff(walks[:, :36, 0])).mean(axis=1)
    difference = (units["other"] - units["base"]).to_numpy() / scale
    expected = stats.wilcoxon(difference[difference != 0]).pvalue
    assert result.table.loc["other", "p_value"] == pytest.approx(expected)
    assert np.isnan(result.table.loc["base", "p_value"])


def test_one_unit_has_neither_standard_error_nor_test():
    models = {"a": LastValue(), "b": LastValue(bias=1.0)}
    table = compare(models, np.arange(30.0), horizon=3, season=1).table
    assert table[["CRPS-se", "MASE-se", "log_score-se", "p_value"]].isna().all(axis=None)


def test_forecasts_are_those_of_backtest(walks):
    result = compare(LastValue(), walks, horizon=4, n_windows=2, season=1)
    pd.testing.assert_frame_equal(result.forecasts, backtest(LastValue(), walks, 4, n_windows=2))


def test_columns_of_a_multivariate_series_are_averaged():
    rng = np.random.default_rng(2)
    y = pd.DataFrame(rng.normal(size=(30, 2)), columns=["left", "right"])
    both = compare(LastValue(), y, horizon=4, season=1, n_samples=50, seed=0).table.iloc[0]
    single = [
        compare(LastValue(), y[c], horizon=4, season=1, seed=0).table.iloc[0] for c in y.columns
    ]
    for metric in ("MASE", "sMAPE", "coverage-95"):
        assert both[metric] == pytest.approx((single[0][metric] + single[1][metric]) / 2)
    # The joint density of a step is that of both its columns.
    assert both["log_score"] == pytest.approx(single[0]["log_score"] + single[1]["log_score"])


def test_a_score_that_cannot_be_computed_is_a_failure(walks):
    class Speechless(LastValue):
        def forecast(self, *args, **options):
            forecast = super().forecast(*args, **options)

            def score(y_future):
                raise ValueError("no density")

            object.__setattr__(forecast, "score", score)
            return forecast

    with pytest.warns(RuntimeWarning, match="scoring: ValueError: no density"):
        result = compare(Speechless(), walks, horizon=4, season=1)
    row = result.table.iloc[0]
    assert np.isnan(row["log_score"])
    assert np.isfinite(row["CRPS"])


def test_a_data_set_brings_horizon_and_season():
    index = pd.date_range("2000-01-01", periods=60, freq="MS")
    y = pd.Series(np.arange(60.0), index)
    data = Dataset("x", y, horizon=6, season=12, freq="MS", source="", licence="", description="")
    result = compare(LastValue(), data)
    assert (result.horizon, result.season) == (6, 12)
    assert compare(LastValue(), y, horizon=2).season == 12
    with pytest.raises(ValueError, match="horizon"):
        compare(LastValue(), y)
    with pytest.raises(ValueError, match="baseline='ARIMA'"):
        compare(LastValue(), data, baseline="ARIMA")


def test_to_csv_keeps_every_digit(walks, tmp_path):
    result = compare(LastValue(), walks, horizon=4, season=1, seed=0)
    result.to_csv(tmp_path / "table.csv")
    back = pd.read_csv(tmp_path / "table.csv", index_col="model", float_precision="round_trip")
    pd.testing.assert_frame_equal(back, result.table, check_exact=True, check_dtype=False)
    assert "LastValue" in repr(result)


@pytest.mark.parametrize(
    ("freq", "season"),
    [
        ("MS", 12),
        ("ME", 12),
        ("QS-OCT", 4),
        ("YS", 1),
        ("W-SAT", 52),
        ("D", 7),
        ("h", 24),
        ("min", 1),
        ("2D", 1),
    ],
)
def test_season_of_a_time_index(freq, season):
    index = pd.date_range("2000-01-01", periods=20, freq=freq)
    assert infer_season(Panel.of(pd.Series(np.arange(20.0), index))) == season


def test_season_of_periods_and_of_counted_steps():
    months = pd.Series(np.arange(9.0), pd.period_range("2000-01", periods=9, freq="M"))
    assert infer_season(Panel.of(months)) == 12
    assert infer_season(Panel.of(np.arange(9.0))) == 1


def test_default_models_take_the_recommendations():
    defaults = {"transform": "log", "arima": {"order": [2, 0, 0], "seasonal": [1, 0, 0, 4]}}
    models = default_models(4, 8, defaults)
    assert list(models) == ["SeasonalNaive", "ARIMA", "LinearGaussianSSM", "RNN", "DMM"]
    given = models["ARIMA"].get_params()
    assert tuple(given["order"]) == (2, 0, 0)
    assert tuple(given["seasonal"]) == (1, 0, 0, 4)
    assert given["transform"] == "log"
    assert models["SeasonalNaive"].get_params()["season"] == 4
    with pytest.raises(ValueError, match="model 'prophet' is unknown"):
        default_models(names=["prophet"])
