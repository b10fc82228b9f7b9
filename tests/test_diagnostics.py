"""Standard errors, criteria, residual tests against statsmodels, R's printed results, formulas."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats

import seqdgm as sq
from seqdgm.inference.hessian import hessian

# Monthly accidental deaths in the USA, 1973-1978 (Brockwell and Davis 1991); R's USAccDeaths.
DEATHS = [
    9007, 8106, 8928, 9137, 10017, 10826, 11317, 10744, 9713, 9938, 9161, 8927, 7750, 6981, 8038,
    8422, 8714, 9512, 10120, 9823, 8743, 9129, 8710, 8680, 8162, 7306, 8124, 7870, 9387, 9556,
    10093, 9620, 8285, 8466, 8160, 8034, 7717, 7461, 7767, 7925, 8623, 8945, 10078, 9179, 8037,
    8488, 7874, 8647, 7792, 6957, 7726, 8106, 8890, 9299, 10625, 9302, 8314, 8850, 8265, 8796,
    7836, 6892, 7791, 8192, 9115, 9434, 10484, 9827, 9110, 9070, 8633, 9240,
]  # fmt: skip


def airline(gaps: bool = False) -> pd.Series:
    y = np.log(sq.datasets.load("airline").y)
    if gaps:
        y.iloc[[40, 41, 77, 120]] = np.nan
    return y


def theirs(y: pd.Series, order, seasonal, params, **options):
    """Statsmodels' results at given parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sm.tsa.SARIMAX(
            y.to_numpy(), order=order, seasonal_order=seasonal, simple_differencing=True, **options
        )
        return model.smooth(params, cov_type="approx")


CASES = {
    "airline": (airline, (0, 1, 1), (0, 1, 1, 12), None),
    "nile": (lambda: sq.datasets.load("nile").y, (1, 0, 1), (0, 0, 0, 0), "c"),
    "lynx": (lambda: np.log(sq.datasets.load("lynx").y), (2, 0, 0), (0, 0, 0, 0), "ct"),
    "woolyrnq": (lambda: sq.datasets.load("woolyrnq").y, (1, 0, 0), (0, 1, 1, 4), "c"),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_statsmodels_at_the_same_parameters(name: str) -> None:
    load, order, seasonal, trend = CASES[name]
    y = load()
    model = sq.ARIMA(order, seasonal, trend=trend).fit(y)
    table = model.parameter_table()
    estimates = dict(zip(table["parameter"], table["estimate"], strict=True))
    errors = dict(zip(table["parameter"], table["std_err"], strict=True))
    options = {} if trend is None else {"trend": trend}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blank = sm.tsa.SARIMAX(
            y.to_numpy(), order=order, seasonal_order=seasonal, simple_differencing=True, **options
        )
    names = {"intercept": "const"}
    ours = [names.get(n, n) for n in blank.param_names]
    results = theirs(y, order, seasonal, [estimates[n] for n in ours], **options)
    found = model.information_criteria().iloc[0]
    np.testing.assert_allclose(
        found[["n", "log_likelihood", "aic", "aicc", "bic"]].to_numpy(float),
        [results.nobs, results.llf, results.aic, results.aicc, results.bic],
        rtol=1e-8,
    )
    np.testing.assert_allclose([errors[n] for n in ours], results.bse, rtol=1e-4)
    z = [estimates[n] / errors[n] for n in ours]
    np.testing.assert_allclose(
        table.set_index("parameter").loc[ours, "z"].to_numpy(float), z, rtol=1e-12
    )
    np.testing.assert_allclose(
        table.set_index("parameter").loc[ours, "p_value"].to_numpy(float),
        results.pvalues,
        rtol=3e-3,
        atol=1e-12,
    )
    interval = table.set_index("parameter").loc[ours, ["lo-95", "hi-95"]].to_numpy(float)
    np.testing.assert_allclose(interval, results.conf_int(), rtol=1e-3, atol=1e-5)
    # Residuals and their tests.
    lost = len(y) - int(results.nobs)
    residuals = model.residuals()
    assert residuals.index.equals(y.index)
    assert residuals.iloc[:lost].isna().all()
    np.testing.assert_allclose(
        residuals.to_numpy()[lost:],
        results.filter_results.standardized_forecasts_error[0],
        atol=1e-8,
    )
    tests = model.diagnostics().iloc[0]
    box = results.test_serial_correlation("ljungbox", lags=int(tests["lags"]))[0]
    np.testing.assert_allclose([tests["ljung_box"], tests["ljung_box_p"]], box[:, -1], rtol=1e-8)
    period = seasonal[3]
    assert tests["lags"] == min(2 * period if period else 10, int(results.nobs) // 5)
    variance = results.test_heteroskedasticity("breakvar")[0]
    np.testing.assert_allclose(
        [tests["break_variance"], tests["break_variance_p"]], variance, rtol=1e-8
    )
    normal = results.test_normality("jarquebera")[0]
    found = tests[["jarque_bera", "jarque_bera_p", "skewness", "kurtosis"]]
    np.testing.assert_allclose(found.to_numpy(float), normal, rtol=1e-8)


def test_residuals_and_predictions_across_gaps_equal_statsmodels() -> None:
    y = airline(gaps=True)
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(y)
    params = [*model.coefficients_[0].tolist(), model.sigma2_.item()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = sm.tsa.SARIMAX(
            y.to_numpy(), order=(0, 1, 1), seasonal_order=(0, 1, 1, 12), use_exact_diffuse=True
        )
    results = whole.smooth(params)
    expected = results.filter_results.standardized_forecasts_error[0].copy()
    expected[:13] = np.nan
    expected[y.isna().to_numpy()] = np.nan  # statsmodels has zeros there
    np.testing.assert_allclose(model.residuals().to_numpy(), expected, atol=1e-7)
    fitted = model.fitted_values()
    assert fitted.iloc[:13].isna().all()
    np.testing.assert_allclose(fitted.to_numpy()[13:], results.fittedvalues[13:], atol=1e-7)
    tests = model.diagnostics().iloc[0]
    e = expected[13:]
    seen = e[np.isfinite(e)]
    third = round(len(seen) / 3)
    ratio = (seen[-third:] ** 2).sum() / (seen[:third] ** 2).sum()
    assert tests["break_variance"] == pytest.approx(ratio, rel=1e-6)
    assert tests["break_variance_p"] == pytest.approx(
        2 * min(stats.f.cdf(ratio, third, third), stats.f.sf(ratio, third, third)), rel=1e-6
    )
    normality = stats.jarque_bera(seen)
    assert tests["jarque_bera"] == pytest.approx(normality.statistic, rel=1e-6)
    assert tests["jarque_bera_p"] == pytest.approx(normality.pvalue, rel=1e-6)
    # Ljung and Box's statistic from the pairs that are there.
    known = np.isfinite(e)
    centred = np.where(known, e - e[known].mean(), 0.0)
    n, most = known.sum(), int(tests["lags"])
    pairs = [centred[k:] @ centred[:-k] / (centred @ centred) for k in range(1, most + 1)]
    statistic = n * (n + 2) * sum(r**2 / (n - k) for k, r in enumerate(pairs, start=1))
    assert tests["ljung_box"] == pytest.approx(statistic, rel=1e-6)


def test_results_printed_by_r() -> None:
    """R's examples of ``arima`` and ``AirPassengers``, to the digits printed."""
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(np.array(DEATHS, dtype=float))
    assert model.coefficients_[0].numpy() == pytest.approx([-0.4303, -0.5528], abs=1e-4)
    assert model.standard_errors_[0, :2] == pytest.approx([0.1228, 0.1784], abs=1e-4)
    assert model.sigma2_.item() == pytest.approx(99347, rel=1e-4)
    row = model.information_criteria().iloc[0]
    assert row["log_likelihood"] == pytest.approx(-425.44, abs=0.005)
    assert row["aic"] == pytest.approx(856.88, abs=0.005)
    logs = np.log10(sq.datasets.load("airline").y)
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(logs)
    assert model.coefficients_[0].numpy() == pytest.approx([-0.4018, -0.5569], abs=1e-4)
    assert model.standard_errors_[0, :2] == pytest.approx([0.0896, 0.0731], abs=1e-4)
    assert model.sigma2_.item() == pytest.approx(0.0002543, abs=5e-8)
    # R starts with a large variance where the start here is exactly diffuse.
    assert model.aic()[0] == pytest.approx(-701.92, abs=0.015)


def test_a_local_level_equals_statsmodels() -> None:
    y = sq.datasets.load("nile").y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = sm.tsa.UnobservedComponents(y.to_numpy(), "llevel", use_exact_diffuse=True)
    structural = sq.StructuralSSM().fit(y)
    matrices = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True).fit(y, method="mle")
    for model, order in ((structural, [0, 1]), (matrices, [1, 0])):
        table = model.parameter_table().iloc[order]
        results = level.smooth(table["estimate"].to_numpy(float), cov_type="approx")
        np.testing.assert_allclose(table["std_err"].to_numpy(float), results.bse, rtol=1e-4)
        diffuse = 0.5 * np.log(2 * np.pi)
        row = model.information_criteria().iloc[0]
        assert row["log_likelihood"] == pytest.approx(results.llf + diffuse, abs=1e-8)
        assert (row["n"], row["k"]) == (99, 2)
        np.testing.assert_allclose(
            model.residuals().to_numpy()[1:],
            results.filter_results.standardized_forecasts_error[0, 1:],
            atol=1e-7,
        )


def test_structural_standard_errors_with_seasons_and_an_ar_part_equal_statsmodels() -> None:
    rng = np.random.default_rng(5)
    noise = sm.tsa.arma_generate_sample([1, -0.7], [1], 160, distrvs=rng.standard_normal)
    season = np.tile([3.0, -1.0, -4.0, 2.0], 40)
    y = pd.Series(season + noise + np.cumsum(0.5 * rng.normal(size=160)))
    model = sq.StructuralSSM(seasonal=4, ar=1, irregular=False).fit(y)
    table = model.parameter_table().set_index("parameter")
    names = ["sigma2.level", "sigma2.seasonal_4", "sigma2.ar", "ar.L1"]
    values = table.loc[names, "estimate"].to_numpy(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = sm.tsa.UnobservedComponents(
            y.to_numpy(), "rwalk", seasonal=4, autoregressive=1, use_exact_diffuse=True
        )
        results = reference.smooth(values, cov_type="approx")
    errors = table.loc[names, "std_err"].to_numpy(float)
    known = np.isfinite(errors)
    assert known[[0, 2, 3]].all()
    if known.all():
        np.testing.assert_allclose(errors, results.bse, rtol=1e-4)
    else:  # a variance at zero: the others given it
        block = np.linalg.inv(results.cov_params_approx)[np.ix_(known, known)]
        np.testing.assert_allclose(errors[known], np.sqrt(np.diag(np.linalg.inv(block))), rtol=1e-3)


def test_the_covariance_of_regression_coefficients_is_that_of_least_squares() -> None:
    """With white noise the information is X'X / sigma2, beside 2 sigma2^2 / n for the variance."""
    rng = np.random.default_rng(3)
    u = pd.DataFrame({"price": rng.normal(size=80) * 1e3, "sun": rng.normal(size=80)})
    y = 4.0 + 1e-3 * u["price"] - u["sun"] + rng.normal(size=80)
    model = sq.ARIMA((0, 0, 0), trend="c").fit(y, inputs=u)
    assert model.coefficient_names == ("const", "price", "sun")
    design = np.column_stack([np.ones(80), u])
    sigma2 = model.sigma2_.item()
    expected = np.zeros((4, 4))
    expected[:3, :3] = sigma2 * np.linalg.inv(design.T @ design)
    expected[3, 3] = 2 * sigma2**2 / 80
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(model.covariance_[0] / scale, expected / scale, atol=1e-6)


def test_a_panel_is_its_series_and_a_pooled_fit_adds_them_up() -> None:
    rng = np.random.default_rng(4)
    panel = [np.cumsum(rng.normal(size=n)) for n in (60, 90)]
    joint = sq.ARIMA((1, 1, 0)).fit(panel)
    for k, y in enumerate(panel):
        alone = sq.ARIMA((1, 1, 0)).fit(y)
        np.testing.assert_allclose(joint.standard_errors_[k], alone.standard_errors_[0], rtol=1e-4)
        assert joint.bic()[k] == pytest.approx(alone.bic()[0], abs=1e-6)
        np.testing.assert_allclose(joint.residuals()[k], alone.residuals(), atol=1e-4)
    pooled = sq.ARIMA((1, 1, 0)).fit(panel, pooled=True)
    row = pooled.information_criteria().iloc[0]
    assert (row["unique_id"], row["n"], row["k"]) == ("pooled", 59 + 89, 2)
    assert row["log_likelihood"] == pytest.approx(pooled.log_prob().value.sum(), abs=1e-9)

    def total(theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Sum of the conditional and stationary log densities of both AR(1) series."""
        phi, s2 = theta.T
        out = np.zeros(len(theta))
        for y in panel:
            w = np.diff(y)[None]
            out += -0.5 * (np.log(2 * np.pi * s2 / (1 - phi**2)) + w[:, 0] ** 2 * (1 - phi**2) / s2)
            e = w[:, 1:] - phi[:, None] * w[:, :-1]
            out += (-0.5 * (np.log(2 * np.pi * s2[:, None]) + e**2 / s2[:, None])).sum(1)
        return out

    at = np.array([[pooled.coefficients_.item(), pooled.sigma2_.item()]])
    expected = np.linalg.inv(-hessian(total, at)[0])
    np.testing.assert_allclose(pooled.covariance_[0], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_hessian_knows_no_units(scale: float) -> None:
    """Of a log density whose second derivatives are known, near and far from a round number."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3))
    precision = root @ root.T + np.eye(3)
    units = np.array([scale, 1.0, 1e3])
    centre = units * np.array([0.0, 2.0, -5.0])

    def f(theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        x = (theta - centre) / units
        return -0.5 * np.einsum("ni,ij,nj->n", x, precision, x) - 0.02 * (x**4).sum(1)

    found = hessian(f, centre[None])[0] * np.outer(units, units)
    np.testing.assert_allclose(found, -precision, rtol=1e-6, atol=1e-6)


def test_a_boundary_is_reported_and_the_rest_is_conditional_on_it() -> None:
    rng = np.random.default_rng(1)
    white = np.diff(rng.normal(size=80))  # over-differenced: the MA root is on the unit circle
    model = sq.ARIMA((0, 0, 1)).fit(white)
    assert abs(model.coefficients_.item()) > 1 - 1e-5
    errors = model.standard_errors_[0]
    assert np.isnan(errors[0])
    # Of n Gaussian numbers with known shape, the variance has standard error s2 sqrt(2 / n).
    assert errors[1] == pytest.approx(model.sigma2_.item() * np.sqrt(2 / 79), rel=1e-5)


def test_summary_shows_the_table() -> None:
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12), fixed={"ma.L1": -0.4}).fit(airline())
    lines = model.summary().splitlines()
    shown = next(line for line in lines if "ma.S.L12" in line).split()
    table = model.parameter_table().set_index("parameter").loc["ma.S.L12"]
    assert float(shown[1]) == pytest.approx(table["estimate"], rel=1e-4)
    assert float(shown[2]) == pytest.approx(table["std_err"], rel=1e-3)
    assert any("ma.L1 (fixed)" in line and "-0.4" in line for line in lines)
    assert any(f"AIC {model.aic()[0]:.2f}" in line and "131 observations" in line for line in lines)


def test_the_picture_shows_the_residuals() -> None:
    y = airline(gaps=True)
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(y)
    figure = model.plot_diagnostics(lags=12)
    series, histogram, quantiles, correlations = figure.axes
    residuals = model.residuals().to_numpy()
    np.testing.assert_array_equal(series.lines[-1].get_ydata(), residuals)
    seen = residuals[np.isfinite(residuals)]
    area = sum(bar.get_width() * bar.get_height() for bar in histogram.patches)
    assert area == pytest.approx(1.0)
    kernel = histogram.lines[0]
    assert np.trapezoid(kernel.get_ydata(), kernel.get_xdata()) == pytest.approx(1.0, abs=0.02)
    np.testing.assert_array_equal(quantiles.lines[-1].get_ydata(), np.sort(seen))
    tests = model.diagnostics(lags=12).iloc[0]
    r = correlations.lines[-1].get_ydata()
    n = len(seen)
    statistic = n * (n + 2) * (r**2 / (n - np.arange(1, 13))).sum()
    assert tests["ljung_box"] == pytest.approx(statistic, rel=1e-10)


def test_residuals_come_back_as_the_data_came() -> None:
    values = np.arange(12.0).reshape(2, 6) ** 1.5
    long = pd.DataFrame(
        {"unique_id": np.repeat(["b", "a"], 6), "ds": np.tile(range(6), 2), "y": values.ravel()}
    )
    model = sq.SeasonalNaive(1).fit(long)
    residuals = model.residuals()
    steps = np.diff(values, axis=1)
    expected = steps / np.sqrt((steps**2).mean(1, keepdims=True))
    assert list(residuals["unique_id"]) == list(long["unique_id"])
    np.testing.assert_allclose(residuals["y"].to_numpy().reshape(2, 6)[:, 1:], expected)
    fitted = model.fitted_values(long[long["unique_id"] == "a"])
    np.testing.assert_allclose(fitted["y"].to_numpy()[1:], values[1, :-1])


def test_innovations_of_a_vector_are_those_of_the_cholesky_factor() -> None:
    """statsmodels whitens a vector by the Cholesky factor of its innovation covariance."""
    y = np.diff(np.log(sq.datasets.load("us_macro").y.iloc[:, :2].to_numpy()), axis=0) * 100
    model = sq.LinearGaussianSSM(latent_dim=1).fit(y, method="em", max_iter=5)
    m = model.matrices
    reference = sm.tsa.statespace.MLEModel(y, k_states=1)
    names = {"design": m.H[0], "obs_cov": m.R[0], "transition": m.F[0], "state_cov": m.Q[0]}
    for name, value in names.items():
        reference[name] = value.numpy()
    reference["selection"] = np.eye(1)
    reference["obs_intercept"] = m.d[0].numpy()
    reference["state_intercept"] = m.b[0].numpy()
    reference.initialize_known(m.m0[0].numpy(), m.P0[0].numpy())
    results = reference.ssm.filter()
    np.testing.assert_allclose(model.residuals(), results.standardized_forecasts_error.T, atol=1e-8)
    np.testing.assert_allclose(model.fitted_values(), results.forecasts.T, atol=1e-8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sq.ARIMA().residuals(), "not fitted"),
        (lambda: sq.ARIMA().aic(), "not fitted"),
        (lambda: sq.ARIMA().plot_diagnostics(), "not fitted"),
        (lambda: sq.ARIMA().fit(np.arange(30.0) ** 2).parameter_table(0.95), "per cent"),
        (lambda: sq.ARIMA().fit(np.arange(30.0) ** 2).diagnostics(lags=30), "lags"),
        (lambda: sq.ARIMA().fit(np.arange(30.0) ** 2).plot_diagnostics(series="z"), "'z'"),
        (lambda: sq.SeasonalNaive(1).fit(np.arange(6.0) ** 2).plot_diagnostics(), "fewest"),
        (
            lambda: sq.LinearGaussianSSM(
                F=[[1.0]], H=[[1.0]], Q=[[1.0]], R=[[1.0]], diffuse=True
            ).aic(),
            "pass y",
        ),
    ],
)
def test_bad_input_is_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_drawing_is_imported_late() -> None:
    code = (
        "import sys, seqdgm as sq; sq.ARIMA(); late = {'matplotlib', 'statsmodels', 'numba'};"
        "assert not (late | {'seqdgm.evaluation.diagnostics'}) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_units_change_no_test_and_no_comparison() -> None:
    y = np.cumsum(np.random.default_rng(7).normal(size=60))
    base = sq.ARIMA((1, 1, 0), trend="c").fit(y)
    for unit in (1e-8, 1e8):
        model = sq.ARIMA((1, 1, 0), trend="c").fit(unit * y)
        found, expected = (m.parameter_table()["z"].to_numpy() for m in (model, base))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        # A density changes by the unit, once for each of the 59 differences.
        shift = 2 * 59 * np.log(unit)
        assert model.aic()[0] == pytest.approx(base.aic()[0] + shift, abs=1e-6)
    level = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True).fit(y, method="mle")
    scaled = level.clone().set_params(scale="standard").fit(y, method="mle")
    assert scaled.aic()[0] == pytest.approx(level.aic()[0], abs=1e-6)


def test_a_series_that_failed_leaves_the_others_alone() -> None:
    y = np.cumsum(np.random.default_rng(8).normal(size=40))
    model = sq.ARIMA((0, 1, 1)).fit([np.ones(40), y])
    alone = sq.ARIMA((0, 1, 1)).fit(y)
    np.testing.assert_allclose(model.standard_errors_[1], alone.standard_errors_[0], rtol=1e-5)
    assert np.isnan(model.standard_errors_[0]).all()
    assert np.isnan(model.aic()[0])
    assert model.aic()[1] == pytest.approx(alone.aic()[0], abs=1e-8)
    assert model.diagnostics()["n"].tolist() == [0, 39]
