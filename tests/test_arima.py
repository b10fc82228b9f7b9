"""ARIMA and the seasonal naive forecast against statsmodels and closed forms."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

import seqdgm as sq

# Bundled series, with models published for them or usual for their kind.
SERIES = {
    "airline": ((0, 1, 1), (0, 1, 1, 12), "log"),
    "nile": ((0, 1, 1), (0, 0, 0, 0), None),
    "lynx": ((2, 0, 0), (0, 0, 0, 0), "log"),
    "sunspots": ((3, 0, 1), (0, 0, 0, 0), None),
    "austres": ((1, 1, 0), (0, 1, 1, 4), None),
    "wineind": ((1, 1, 2), (0, 1, 1, 12), "log"),
    "woolyrnq": ((1, 0, 0), (0, 1, 1, 4), None),
}


def reference(y: pd.Series, order, seasonal, trend=None, exog=None):
    """Statsmodels' fit of the differenced series."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sm.tsa.SARIMAX(
            y.to_numpy(),
            exog,
            order=order,
            seasonal_order=seasonal,
            trend=trend,
            simple_differencing=True,
        )
        return model.fit(disp=False, maxiter=500)


@pytest.mark.parametrize("name", SERIES)
def test_likelihood_at_the_optimum_is_not_below_statsmodels(name: str) -> None:
    order, seasonal, transform = SERIES[name]
    y = sq.datasets.load(name).y
    y = np.log(y) if transform else y
    theirs = reference(y, order, seasonal)
    model = sq.ARIMA(order, seasonal).fit(y)
    ours = model.log_prob()
    assert ours.kind == "exact"
    assert ours.value[0] >= theirs.llf - 1e-3
    # Where both found the same maximum, the estimates agree.
    if abs(ours.value[0] - theirs.llf) < 1e-4:
        estimates = np.append(model.coefficients_[0].numpy(), model.sigma2_.item())
        scale = np.maximum(np.abs(theirs.params), 0.1)
        assert np.all(np.abs(estimates - theirs.params) < 2e-2 * scale)


def test_airline_likelihood_and_published_estimates() -> None:
    """Box and Jenkins (1976): theta 0.40, Theta 0.56 (their sign), variance 1.34e-3."""
    y = sq.datasets.load("airline").y
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(np.log(y))
    assert model.log_prob().value[0] == pytest.approx(244.6965, abs=1e-4)
    assert -model.coefficients_[0].numpy() == pytest.approx([0.40, 0.56], abs=5e-3)
    assert model.sigma2_.item() == pytest.approx(1.34e-3, rel=0.02)


def test_the_likelihood_of_logs_is_reported_in_the_units_of_the_data() -> None:
    y = sq.datasets.load("airline").y
    logs = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(np.log(y)).log_prob().value[0]
    data = sq.ARIMA((0, 1, 1), (0, 1, 1, 12), transform="log").fit(y).log_prob().value[0]
    # The first 13 values start the differences: they have no density, and so no Jacobian.
    assert data == pytest.approx(logs - np.log(y)[13:].sum(), abs=1e-6)


def test_forecasts_equal_statsmodels() -> None:
    y = np.log(sq.datasets.load("airline").y)
    theirs = reference(y, (0, 1, 1), (0, 1, 1, 12))
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = sm.tsa.SARIMAX(y.to_numpy(), order=(0, 1, 1), seasonal_order=(0, 1, 1, 12))
    future = whole.smooth(theirs.params).get_forecast(24)
    ours = model.forecast(24)
    np.testing.assert_allclose(ours.mean[0, :, 0], future.predicted_mean, atol=2e-4)
    lo, hi = ours.interval(95)
    np.testing.assert_allclose(
        np.stack([lo[0, :, 0], hi[0, :, 0]], 1), future.conf_int(alpha=0.05), atol=2e-3
    )


@pytest.mark.parametrize("trend", ["c", "t", "ct"])
def test_trend_and_regressors_equal_statsmodels(trend: str) -> None:
    rng = np.random.default_rng(1)
    u = rng.normal(size=(150, 2))
    noise = sm.tsa.arma_generate_sample([1, -0.6], [1, 0.3], 150, distrvs=rng.standard_normal)
    y = pd.Series(2 + 0.02 * np.arange(150) + u @ [1.0, -0.5] + noise)
    theirs = reference(y, (1, 0, 1), (0, 0, 0, 0), trend, u)
    model = sq.ARIMA((1, 0, 1), trend=trend).fit(y, inputs=u)
    assert model.log_prob().value[0] >= theirs.llf - 1e-3
    found = dict(zip(model.coefficient_names, model.coefficients_[0].tolist(), strict=True))
    known = dict(zip(theirs.model.param_names, theirs.params, strict=True))
    assert found["u1"] == pytest.approx(known["x1"], abs=5e-3)
    assert found["ar.L1"] == pytest.approx(known["ar.L1"], abs=1e-2)


def test_missing_values_equal_statsmodels() -> None:
    y = np.log(sq.datasets.load("airline").y.copy())
    y.iloc[[30, 31, 32, 77, 120]] = np.nan
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(y)
    params = np.append(model.coefficients_[0].numpy(), model.sigma2_.item())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = sm.tsa.SARIMAX(
            y.to_numpy(), order=(0, 1, 1), seasonal_order=(0, 1, 1, 12), use_exact_diffuse=True
        )
    theirs = whole.smooth(params)
    # Statsmodels keeps the 2 pi of the 13 diffuse observations.
    convention = 13 * 0.5 * np.log(2 * np.pi)
    assert model.log_prob().value[0] == pytest.approx(theirs.llf + convention, abs=1e-6)
    filled = model.impute(y)
    smoothed = theirs.get_prediction(information_set="smoothed").predicted_mean
    gaps = y.isna().to_numpy()
    np.testing.assert_allclose(filled.to_numpy()[gaps], smoothed[gaps], atol=1e-6)


def test_a_panel_is_fitted_series_by_series() -> None:
    rng = np.random.default_rng(2)
    panel = [np.cumsum(rng.normal(size=n)) for n in (60, 90, 75)]
    joint = sq.ARIMA((1, 1, 1)).fit(panel)
    assert joint.coefficients_.shape == (3, 2)
    for k, y in enumerate(panel):
        alone = sq.ARIMA((1, 1, 1)).fit(y)
        np.testing.assert_allclose(alone.coefficients_[0], joint.coefficients_[k], atol=1e-4)
    pooled = sq.ARIMA((1, 1, 1)).fit(panel, pooled=True)
    assert pooled.coefficients_.shape == (1, 2)
    assert pooled.log_prob().value.sum() < joint.log_prob().value.sum()
    with pytest.raises(ValueError, match="no parameters"):
        joint.forecast(2, pd.DataFrame({"unique_id": "z", "ds": range(50), "y": np.arange(50.0)}))


def test_seasonal_naive_has_closed_forms() -> None:
    y = sq.datasets.load("airline").y
    model = sq.SeasonalNaive(12).fit(y)
    errors = y.to_numpy()[12:] - y.to_numpy()[:-12]
    assert model.sigma2_.item() == pytest.approx(np.mean(errors**2), rel=1e-12)
    future = model.forecast(24)
    np.testing.assert_allclose(future.mean[0, :, 0], np.tile(y.to_numpy()[-12:], 2), rtol=1e-12)
    lo, hi = future.interval(95)
    half = 1.959963984540054 * model.sigma2_.item() ** 0.5
    np.testing.assert_allclose((hi - lo)[0, :12, 0] / 2, half, rtol=1e-9)
    np.testing.assert_allclose((hi - lo)[0, 12:, 0] / 2, half * 2**0.5, rtol=1e-9)
    scores = -0.5 * (np.log(2 * np.pi * np.mean(errors**2)) + errors**2 / np.mean(errors**2))
    assert model.log_prob().value[0] == pytest.approx(scores.sum(), rel=1e-10)


def test_the_log_score_of_a_continuation_is_the_joint_predictive_density() -> None:
    y = sq.datasets.load("airline").y
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(y[:132])
    future = model.forecast(12)
    whole = model.log_prob(y).value - model.log_prob(y[:132]).value
    assert future.log_prob(y[132:]).value == pytest.approx(whole, abs=1e-8)
    draws = future.sample(20000, seed=0)[0, :, :, 0]
    from scipy.stats import multivariate_normal

    gaussian = multivariate_normal(draws.mean(0), np.cov(draws.T)).logpdf(y[132:].to_numpy())
    # 20,000 draws estimate a 12 x 12 covariance to about one per cent.
    assert future.log_prob(y[132:]).value[0] == pytest.approx(gaussian, abs=0.3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sq.ARIMA((1, 0)), "order"),
        (lambda: sq.ARIMA((-1, 0, 0)), "non-negative"),
        (lambda: sq.ARIMA((0, 0, 0), (1, 0, 0, 0)), "season"),
        (lambda: sq.ARIMA(trend="x"), "trend"),
        (lambda: sq.SeasonalNaive(0), "season"),
        (lambda: sq.ARIMA((0, 1, 1)).fit(np.ones(4)), "too short"),
        (lambda: sq.ARIMA((0, 1, 1)).fit(np.ones(40)), "constant"),
        (lambda: sq.ARIMA().fit(np.zeros((30, 2))), "one column"),
        (lambda: sq.ARIMA(transform="log").fit(np.arange(30.0)), "not positive"),
        (lambda: sq.ARIMA().forecast(3), "not fitted"),
        (lambda: sq.SeasonalNaive(2).fit(np.arange(9.0), inputs=np.arange(9.0)), "inputs"),
    ],
)
def test_bad_input_is_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
