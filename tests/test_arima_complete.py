"""Fixed coefficients and Box-Cox powers of ARIMA against statsmodels, quadrature, formulas."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from scipy import integrate, optimize, stats
from scipy.special import boxcox, inv_boxcox

import seqdgm as sq
from seqdgm.models._arima_spec import ArimaSpec, constrain, free_start, unconstrain
from seqdgm.testing import CHECKS, check_model
from seqdgm.transform import Transform


def simulated(ar, ma, n: int = 200, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return sm.tsa.arma_generate_sample([1, *ar], [1, *ma], n, distrvs=rng.standard_normal)


def outside_circle(named, prefix: str, sign: float) -> bool:
    """Whether the roots of a lag polynomial lie outside the unit circle, by numpy's roots."""
    lags = {int(k.split("L")[-1]): v for k, v in named.items() if k.startswith(f"{prefix}.L")}
    poly = np.zeros(max(lags, default=0) + 1)
    poly[0] = 1.0
    for lag, value in lags.items():
        poly[lag] = sign * value
    return bool((np.abs(np.roots(poly[::-1])) > 1).all())


def constrained_maximum(y, fixed, start=0.0, **options):
    """Estimates by name and log-likelihood: statsmodels' likelihood climbed over what is free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sm.tsa.SARIMAX(np.asarray(y), simple_differencing=True, **options)
    names = model.param_names
    free = np.array([name not in fixed for name in names])
    full = np.array([fixed.get(name, start) for name in names])
    full[-1] = fixed.get("sigma2", np.var(y))

    def minus(values: np.ndarray) -> float:
        full[free] = values
        named = dict(zip(names, full, strict=True))
        signs = {"ar": -1.0, "ar.S": -1.0, "ma": 1.0, "ma.S": 1.0}
        if full[-1] <= 0 or not all(outside_circle(named, k, v) for k, v in signs.items()):
            return np.inf
        return -model.loglike(full)

    at = full[free]
    for _ in range(2):
        limits = {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000}
        found = optimize.minimize(minus, at, method="Nelder-Mead", options=limits)
        at = found.x
    full[free] = at
    return dict(zip(names, full, strict=True)), -found.fun


FIXED = {
    "one of two lags": ((2, 0, 0), (0, 0, 0, 0), None, {"ar.L1": 0.4}, [-0.4, -0.3], []),
    "a sparse polynomial": ((4, 0, 0), (0, 0, 0, 0), None, {"ar.L2": 0.0, "ar.L3": 0.0},
                            [-0.4, 0, 0, -0.3], []),
    "a whole polynomial": ((1, 0, 1), (0, 0, 0, 0), None, {"ma.L1": 0.5}, [-0.6], [0.4]),
    "part of an MA": ((0, 0, 3), (0, 0, 0, 0), None, {"ma.L2": 0.0}, [], [0.5, 0, 0.3]),
    "a seasonal lag": ((1, 0, 0), (2, 0, 0, 4), None, {"ar.S.L8": 0.1}, [-0.3, 0, 0, -0.4], []),
    "the mean": ((1, 0, 0), (0, 0, 0, 0), "c", {"const": 0.1}, [-0.6], []),
    "the variance": ((1, 0, 1), (0, 0, 0, 0), None, {"sigma2": 1.5}, [-0.6], [0.4]),
    "variance and lag": ((2, 0, 0), (0, 0, 0, 0), "c", {"sigma2": 0.9, "ar.L2": 0.2}, [-0.5], []),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_fits_with_fixed_coefficients_reach_statsmodels_maximum(name: str) -> None:
    order, seasonal, trend, fixed, ar, ma = FIXED[name]
    y = simulated(ar, ma)
    model = sq.ARIMA(order, seasonal, trend=trend, fixed=fixed).fit(y)
    theirs, llf = constrained_maximum(
        y,
        {k.replace("const", "intercept"): v for k, v in fixed.items()},
        order=order,
        seasonal_order=seasonal,
        **({} if trend is None else {"trend": trend}),
    )
    ours = model.log_prob().value[0]
    assert ours == pytest.approx(llf, abs=1e-5)
    estimates = model.estimates()
    for key, value in fixed.items():
        assert estimates[key] == value
    for key, value in theirs.items():
        assert estimates[key.replace("intercept", "const")] == pytest.approx(value, abs=2e-3)
    table = model.parameter_table().set_index("parameter")
    assert table["fixed"].to_dict() == {key: key in fixed for key in estimates}
    assert table.loc[list(fixed), "std_err"].isna().all()
    assert table.loc[~table["fixed"], "std_err"].notna().all()
    assert model.information_criteria()["k"].item() == len(estimates) - len(fixed)


def test_a_fixed_regressor_is_subtracted() -> None:
    rng = np.random.default_rng(2)
    u = pd.DataFrame({"price": rng.normal(size=100), "sun": rng.normal(size=100)})
    y = pd.Series(2 * u["price"] + simulated([-0.5], [], 100))
    model = sq.ARIMA((1, 0, 0), fixed={"price": 2.0, "sun": 0.0}).fit(y, inputs=u)
    alone = sq.ARIMA((1, 0, 0)).fit(y - 2 * u["price"])
    assert model.coefficient_names == ("ar.L1", "price", "sun")
    assert model.coefficients_[0, 0].item() == pytest.approx(alone.coefficients_.item(), abs=1e-5)
    assert model.log_prob().value[0] == pytest.approx(alone.log_prob().value[0], abs=1e-8)
    future = pd.DataFrame({"price": [1.0, 2.0], "sun": [5.0, 5.0]}, index=[100, 101])
    np.testing.assert_allclose(
        model.forecast(2, inputs=future).mean[0, :, 0],
        alone.forecast(2).mean[0, :, 0] + [2.0, 4.0],
        atol=1e-4,
    )


def test_a_panel_with_fixed_coefficients_is_fitted_series_by_series() -> None:
    panel = [simulated([-0.5, 0.2], [], n, seed) for n, seed in ((80, 1), (120, 2))]
    model = sq.ARIMA((2, 0, 0), fixed={"ar.L2": -0.2, "sigma2": 1.0}).fit(panel)
    assert model.coefficients_[:, 1].tolist() == [-0.2, -0.2]
    assert model.sigma2_.tolist() == [1.0, 1.0]
    for k, y in enumerate(panel):
        _, llf = constrained_maximum(y, {"ar.L2": -0.2, "sigma2": 1.0}, order=(2, 0, 0))
        assert model.log_prob().value[k] == pytest.approx(llf, abs=1e-6)
    pooled = sq.ARIMA((2, 0, 0), fixed={"ar.L2": -0.2}).fit(panel, pooled=True)
    assert pooled.coefficients_.shape == (1, 2)
    assert pooled.coefficients_[0, 1].item() == -0.2


def test_fixed_survives_files_clones_and_new_parameters(tmp_path) -> None:
    y = simulated([-0.5, 0.2], [])
    fixed = {"ar.L2": -0.2, "sigma2": 1.0}
    model = sq.ARIMA((2, 0, 0), fixed=fixed).fit(y)
    model.save(tmp_path / "m.safetensors")
    again = sq.load(tmp_path / "m.safetensors")
    assert again.get_params() == model.get_params()
    assert again.summary() == model.summary()
    np.testing.assert_array_equal(again.standard_errors_, model.standard_errors_)
    refit = again.clone().fit(y)
    np.testing.assert_array_equal(refit.coefficients_, model.coefficients_)
    free = model.set_params(fixed=None).fit(y)
    assert free.log_prob().value[0] > again.log_prob().value[0]


def test_free_parameters_and_coefficients_are_inverse() -> None:
    rng = np.random.default_rng(0)
    fixed = (None, 0.1, None, None, 0.3, None, None, -0.4, None, None, None, 2.0)
    spec = ArimaSpec(3, 1, 2, 1, 0, 2, 4, "ct", 2, fixed)
    assert spec.names()[7] == "ma.S.L8"
    assert (spec.n_coefficients, spec.n_free) == (12, 8)
    free = 0.6 * rng.normal(size=(50, spec.n_free))
    coefficients = constrain(spec, free)
    known = np.isfinite(coefficients).all(1)
    assert known.sum() > 20
    np.testing.assert_array_equal(
        coefficients[known][:, [1, 4, 7, 11]], [[0.1, 0.3, -0.4, 2]] * known.sum()
    )
    np.testing.assert_allclose(unconstrain(spec, coefficients[known]), free[known], atol=1e-9)
    # What is refused has a root on the wrong side, and only that.
    for row in range(50):
        named = dict(
            zip(
                [n for n, v in zip(spec.names(), fixed, strict=True) if v is None],
                free[row],
                strict=True,
            )
        )
        named |= {"ar.L2": 0.1, "ma.L2": 0.3}
        mixed = outside_circle(named, "ar", -1.0) and outside_circle(named, "ma", 1.0)
        seasonal = {"ma.S.L4": named["ma.S.L4"], "ma.S.L8": -0.4}
        assert known[row] == (mixed and outside_circle(seasonal, "ma.S", 1.0))


def test_a_start_is_moved_into_the_domain() -> None:
    """With the first lag at 1.5 the second must lie in (-1, -0.5): the stationarity triangle."""
    spec = ArimaSpec(2, fixed=(1.5, None))
    start = free_start(spec, np.array([[0.0, 0.0], [0.0, -0.7]]))
    assert -1 < start[0, 0] < -0.5
    assert start[1, 0] == -0.7
    y = simulated([-1.5, 0.7], [])
    model = sq.ARIMA((2, 0, 0), fixed={"ar.L1": 1.5}).fit(y)
    _, llf = constrained_maximum(y, {"ar.L1": 1.5}, -0.7, order=(2, 0, 0))
    assert model.log_prob().value[0] == pytest.approx(llf, abs=1e-5)
    with pytest.raises(ValueError, match="leave no polynomial"):
        free_start(ArimaSpec(2, fixed=(None, 1.5)), np.zeros((1, 2)))


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"ar.L3": 0.1}, r"ar\.L3.*ma\.L1"),
        ({"ar.L1": np.nan}, "finite number"),
        ({"ar.L1": "0"}, "finite number"),
        ({"sigma2": 0.0}, "positive"),
        ({"ar.L1": 1.5, "ar.L2": 0.2}, "not stationary"),
        ({"ma.L1": 1.5}, "not invertible"),
    ],
)
def test_bad_fixed_values_are_named_at_once(fixed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sq.ARIMA((2, 0, 1), fixed=fixed)


def test_names_of_regressors_are_checked_by_fit() -> None:
    y, u = simulated([], [], 50), pd.DataFrame({"price": np.arange(50.0) % 7})
    with pytest.raises(ValueError, match=r"sun.*price"):
        sq.ARIMA(fixed={"sun": 1.0}).fit(y, inputs=u)
    with pytest.raises(ValueError, match="share a name"):
        sq.ARIMA(trend="c").fit(y, inputs=u.set_axis(["const"], axis=1))


def test_drift_is_the_constant_of_the_differences() -> None:
    """A random walk with drift has closed forms: the mean step and its sampling variance."""
    y = sq.datasets.load("nile").y.cumsum()
    model = sq.ARIMA((0, 1, 0), trend="c").fit(y)
    steps = np.diff(y)
    assert model.estimates()["const"] == pytest.approx(steps.mean(), rel=1e-6)
    error = np.sqrt(steps.var() / len(steps))
    assert model.standard_errors_[0, 0] == pytest.approx(error, rel=1e-5)
    ahead = model.forecast(3).mean[0, :, 0]
    np.testing.assert_allclose(ahead, y.iloc[-1] + steps.mean() * np.arange(1, 4), rtol=1e-6)


POWERS = [1e-6, 0.05, 0.3, 0.5, 1.0, 1.7, 2.0]


def one(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


@pytest.mark.parametrize("power", POWERS)
def test_means_are_integrals(power: float) -> None:
    """Means of transformed Gaussians, with much and little mass beyond the end of the range."""
    map_ = Transform(one(power), one(0.3), one(1.5))
    for mean, sd in ((3.0, 1.0), (0.0, 0.5), (-1.0, 1.0), (20.0, 5.0)):
        mu, sigma = 1.5 * mean + 0.3, 1.5 * sd

        def density(g: float, mu: float = mu, sigma: float = sigma) -> float:
            return float(inv_boxcox(g, power) * stats.norm.pdf(g, mu, sigma))

        low, high = max(-1 / power, mu - 10 * sigma), mu + 15 * sigma
        expected = integrate.quad(density, low, high, epsrel=1e-13, limit=500)[0]
        found = map_.inverse_mean(one(mean)[None], one(sd**2)[None]).item()
        assert found == pytest.approx(expected, rel=1e-11)
    # A narrow one has its mean by expansion, h + h'' s^2 / 2; a certain one is the value itself.
    known = inv_boxcox(4.8, power)
    bend = (1 - power) * np.exp(np.log1p(4.8 * power) * (1 / power - 2))
    for sd in (1e-4, 0.0):
        found = map_.inverse_mean(one(3.0)[None], one(sd**2)[None]).item()
        assert found == pytest.approx(known + 0.5 * bend * (1.5 * sd) ** 2, rel=1e-13)


@pytest.mark.parametrize("power", [0.0, *POWERS])
def test_the_map_is_box_and_cox_with_its_jacobian(power: float) -> None:
    map_ = Transform(one(power), one(0.3), one(1.5))
    x = torch.tensor([[[1e-3], [0.5], [1.0], [30.0], [1e6]]], dtype=torch.float64)
    w = map_.forward(x)
    expected = (boxcox(x[0, :, 0].numpy(), power) - 0.3) / 1.5
    np.testing.assert_allclose(w[0, :, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(map_.inverse(w), x, rtol=1e-9)
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(map_.forward(x).sum(), x)
    np.testing.assert_allclose(map_.log_jacobian(x).detach(), slope.log(), rtol=1e-9, atol=1e-9)


def test_the_square_root_forecast_has_a_closed_mean() -> None:
    """x = (1 + g / 2)^2 has mean (1 + mu / 2)^2 + sigma^2 / 4 where g > -2 is nearly certain."""
    y = sq.datasets.load("airline").y
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12), transform=("boxcox", 0.5)).fit(y)
    plain = sq.ARIMA((0, 1, 1), (0, 1, 1, 12)).fit(2 * (np.sqrt(y) - 1))
    ours, theirs = model.forecast(24), plain.forecast(24)
    lo, hi = theirs.interval(95)
    variance = ((hi - lo) / 2 / stats.norm.ppf(0.975)) ** 2
    np.testing.assert_allclose(ours.mean, (1 + theirs.mean / 2) ** 2 + variance / 4, rtol=1e-6)
    np.testing.assert_allclose(ours.quantile(0.9), (1 + theirs.quantile(0.9) / 2) ** 2, rtol=1e-6)
    draws = ours.sample(4000, seed=0)
    error = draws.std(1) / np.sqrt(4000)
    assert (np.abs(draws.mean(1) - ours.mean) < 5 * error).all()
    shift = -0.5 * np.log(y)[13:].sum()
    assert model.log_prob().value[0] == pytest.approx(plain.log_prob().value[0] + shift, abs=1e-6)
    # The one-step fits are means too.
    fitted, root = model.fitted_values(), plain.fitted_values()
    spread = (2 * (np.sqrt(y) - 1) - root) / plain.residuals()
    np.testing.assert_allclose(fitted[13:], ((1 + root / 2) ** 2 + spread**2 / 4)[13:], rtol=1e-6)


def test_the_power_is_that_of_the_profile_likelihood() -> None:
    y = sq.datasets.load("airline").y
    model = sq.ARIMA((0, 1, 1), (0, 1, 1, 12), transform="boxcox").fit(y)

    def minus_profile(power: float) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            differenced = sm.tsa.SARIMAX(
                boxcox(y.to_numpy(), power),
                order=(0, 1, 1),
                seasonal_order=(0, 1, 1, 12),
                simple_differencing=True,
            )
            found = differenced.fit([-0.4, -0.55, 0.01], disp=False, method="bfgs", gtol=1e-8)
        return -(found.llf + (power - 1) * np.log(y[13:]).sum())

    best = optimize.minimize_scalar(minus_profile, bounds=(0.0, 0.5), method="bounded")
    assert model.transform_.power.item() == pytest.approx(best.x, abs=2e-3)
    row = model.information_criteria().iloc[0]
    assert row["log_likelihood"] == pytest.approx(-best.fun, abs=1e-4)
    assert row["k"] == 4
    assert f"power     {model.transform_.power.item():.4g}" in model.summary()


@pytest.mark.slow
def test_powers_of_a_panel_are_those_of_its_series(tmp_path) -> None:
    rng = np.random.default_rng(0)
    base = 20 + np.cumsum(0.1 * rng.normal(size=(3, 80)), axis=1)
    panel = [np.exp(base[0] / 5), base[1] ** 2, base[2][:60]]
    model = sq.ARIMA((1, 0, 0), trend="c", transform="boxcox").fit(panel)
    powers = model.transform_.power[:, 0]
    assert powers.shape == (3,)
    for k, y in enumerate(panel):
        alone = sq.ARIMA((1, 0, 0), trend="c", transform="boxcox").fit(y)
        assert powers[k].item() == pytest.approx(alone.transform_.power.item(), abs=5e-3)
    model.save(tmp_path / "m.safetensors")
    again = sq.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(again.transform_.power, model.transform_.power)
    np.testing.assert_array_equal(again.forecast(4).mean, model.forecast(4).mean)
    pooled = sq.ARIMA((1, 0, 0), trend="c", transform="boxcox").fit(panel[1:], pooled=True)
    assert pooled.transform_.power.shape == (1, 1)
    structural = sq.StructuralSSM(transform=("boxcox", 0.4)).fit(panel[1])
    assert structural.transform_.power.item() == 0.4
    assert structural.forecast(2).mean.shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda y: sq.ARIMA(transform="sqrt").fit(y), "unknown"),
        (lambda y: sq.ARIMA(transform=("boxcox", -0.5)).fit(y), "at least 0"),
        (lambda y: sq.ARIMA(transform=("boxcox", "a")).fit(y), "at least 0"),
        (lambda y: sq.ARIMA(transform="boxcox").fit(y - 5), "not positive"),
        (lambda y: sq.RNN(transform="boxcox", max_epochs=1).fit(y), "exact likelihood"),
        (
            lambda y: sq.LinearGaussianSSM(1, transform="boxcox").fit(np.stack([y, y], 1)),
            "one column",
        ),
        (
            lambda y: sq.LinearGaussianSSM(
                F=[[0.5]], H=[[1.0]], Q=[[1.0]], R=[[1.0]], diffuse=True, transform="boxcox"
            ).log_prob(y),
            "learned from data",
        ),
    ],
)
def test_bad_transformations_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(np.arange(1.0, 41.0) ** 1.5)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["boxcox", ("boxcox", 0.5)])
def test_fixed_and_transformed_models_conform(transform) -> None:
    model = sq.ARIMA((1, 0, 1), trend="c", fixed={"ma.L1": 0.2}, transform=transform)
    assert check_model(model) == tuple(CHECKS)
