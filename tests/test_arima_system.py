"""ARIMA system matrices against statsmodels, scipy and dense Gaussian densities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from seqdgm.inference.quasi_newton import maximise
from seqdgm.kernels import kalman_filter
from seqdgm.models._arima import (
    ArimaSpec,
    constrain,
    parameter_sizes,
    starting_values,
    system,
    unconstrain,
)
from seqdgm.models._polynomials import (
    coefficients_from_partial,
    difference_polynomial,
    partial_from_coefficients,
    product,
    stationary_covariance,
)

DATA = Path(__file__).parents[1] / "data"

SPECS = [
    ArimaSpec(0, 0, 0),
    ArimaSpec(0, 1, 0),
    ArimaSpec(1, 0, 0),
    ArimaSpec(0, 0, 3),
    ArimaSpec(2, 0, 1, trend="c"),
    ArimaSpec(1, 1, 2, n_inputs=2),
    ArimaSpec(3, 2, 1, trend="c", n_inputs=1),
    ArimaSpec(0, 1, 1, 0, 1, 1, 4),
    ArimaSpec(1, 1, 1, 1, 1, 1, 4, "c", 1),
    ArimaSpec(2, 0, 0, 2, 0, 0, 5, "c"),
    ArimaSpec(0, 0, 2, 1, 1, 2, 3),
    ArimaSpec(1, 2, 0, 0, 2, 1, 2),
]
TRENDED = [
    ArimaSpec(1, 0, 1, trend="t"),
    ArimaSpec(2, 1, 1, trend="ct"),
    ArimaSpec(1, 1, 0, 1, 1, 1, 4, "ct", 1),
]


def values(name: str) -> np.ndarray:
    return pd.read_csv(DATA / f"{name}.csv").iloc[:, -1].to_numpy(float)


def draw(spec: ArimaSpec, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A series of the right order of integration, regressors, and coefficients."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=steps)
    for lag in [1] * spec.d + [spec.s] * spec.D:
        for t in range(lag, steps):
            x[t] += x[t - lag]
    u = rng.normal(size=(1, steps, spec.n_inputs))
    return x, u, constrain(spec, 0.7 * rng.normal(size=(1, spec.n_free)))


def run(spec, coefficients, sigma2, x, u, store="likelihood"):
    """Kernel over rows of coefficients, all with the same series."""
    rows, steps = len(coefficients), len(x)
    known = u if spec.n_inputs else None
    seen = torch.from_numpy(np.isfinite(x)).expand(rows, steps)[..., None]
    filled = torch.from_numpy(np.nan_to_num(x)).expand(rows, steps)[..., None]
    return kalman_filter(
        system(spec, coefficients, np.full(rows, sigma2), known, steps),
        filled,
        seen,
        torch.full((rows,), steps),
        store=store,
    )


def peer(spec: ArimaSpec, x, u, **options):
    """The same model in statsmodels."""
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    return SARIMAX(
        x,
        exog=u[0] if spec.n_inputs else None,
        order=(spec.p, spec.d, spec.q),
        seasonal_order=(spec.P, spec.D, spec.Q, spec.s),
        trend=spec.trend,
        **options,
    )


def peer_params(spec: ArimaSpec, coefficients, sigma2):
    ar, ma, sar, sma, trend, beta = spec.split(coefficients)
    return np.concatenate([trend, beta, ar, ma, sar, sma, [[sigma2]]], axis=1)[0]


def concentrated(spec, x, u):
    """Objective for the optimiser: likelihood at the best innovation variance."""

    def objective(free, rows):
        out = run(spec, constrain(spec, free), 1.0, x, u)
        n, logdet, quad = (a.double().numpy() for a in (out.n_obs, out.logdet, out.quad))
        return -0.5 * (n * (np.log(2 * np.pi * quad / n) + 1) + logdet)

    return objective


def fit(spec: ArimaSpec, x: np.ndarray, u: np.ndarray | None = None):
    u = np.zeros((1, len(x), 0)) if u is None else u
    return maximise(
        concentrated(spec, x, u),
        starting_values(spec, x[None], u),
        step=parameter_sizes(spec, x[None], u),
    )


def free_vectors(size: int):
    return arrays(np.float64, (3, size), elements=st.floats(-1e3, 1e3))


@settings(max_examples=60, deadline=None)
@given(free_vectors(8))
def test_every_free_vector_is_stationary_and_invertible(free):
    spec = ArimaSpec(3, 0, 2, 2, 0, 1, 12)
    ar, ma, sar, sma, *_ = spec.split(constrain(spec, free))
    for phi in (ar, -ma, sar, -sma):
        # The roots as numpy finds them, up to its own error for a multiple root on the circle.
        for row in phi:
            roots = np.roots(np.r_[1.0, -row])
            assert np.abs(roots).max() < 1.0 + 1e-4


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, (2, 4), elements=st.floats(-3, 3)))
def test_moderate_parameters_keep_roots_strictly_inside(x):
    phi = coefficients_from_partial(x / np.sqrt(1 + x**2))
    for row in phi:
        assert np.abs(np.roots(np.r_[1.0, -row])).max() < 1.0


def test_partial_autocorrelations_equal_statsmodels():
    from statsmodels.tsa.statespace.tools import (
        constrain_stationary_univariate,
        unconstrain_stationary_univariate,
    )

    x = np.random.default_rng(0).normal(size=(5, 6))
    phi = coefficients_from_partial(x / np.sqrt(1 + x**2))
    for row in range(5):
        theirs = constrain_stationary_univariate(-x[row])
        np.testing.assert_allclose(phi[row], theirs, rtol=1e-12)
        back = -unconstrain_stationary_univariate(theirs)
        pi = partial_from_coefficients(phi)[row]
        np.testing.assert_allclose(pi / np.sqrt(1 - pi**2), back, rtol=1e-9)


def test_partial_autocorrelations_of_the_process_are_the_parameters():
    from statsmodels.tsa.arima_process import ArmaProcess

    pi = np.array([[0.6, -0.3, 0.4]])
    process = ArmaProcess(np.r_[1.0, -coefficients_from_partial(pi)[0]], [1.0])
    np.testing.assert_allclose(process.pacf(4)[1:], pi[0], rtol=1e-10)


@pytest.mark.parametrize("spec", SPECS + TRENDED)
def test_round_trip(spec):
    rng = np.random.default_rng(1)
    # sin folds: only parameters of its first branch can come back.
    free = rng.uniform(-1.5, 1.5, size=(7, spec.n_free))
    np.testing.assert_allclose(unconstrain(spec, constrain(spec, free)), free, atol=1e-9)


def test_boundary_of_the_ma_region_is_taken_inside():
    spec = ArimaSpec(0, 1, 1)
    back = constrain(spec, unconstrain(spec, np.array([[-1.0], [1.0]])))
    np.testing.assert_allclose(back, [[-1.0], [1.0]], atol=1e-8)


@pytest.mark.parametrize(
    ("spec", "row", "text"),
    [
        (ArimaSpec(2, 0, 0), [0.6, 0.5], r"row 1: ar coefficients \[0.6, 0.5\].*not stationary"),
        (ArimaSpec(0, 0, 1), [1.5], r"row 1: ma coefficients \[1.5\].*not invertible"),
        (ArimaSpec(P=1, s=4), [1.0], "seasonal ar .*not stationary"),
    ],
)
def test_coefficients_outside_the_region_are_named(spec, row, text):
    with pytest.raises(ValueError, match=text):
        unconstrain(spec, np.stack([np.zeros(len(row)), row]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"p": -1}, "p=-1"),
        ({"q": 1.5}, "q=1.5"),
        ({"d": True}, "d=True"),
        ({"P": 1}, "no season"),
        ({"D": 1, "s": 1}, "no season"),
        ({"trend": "ctt"}, "trend='ctt'"),
    ],
)
def test_bad_specifications_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        ArimaSpec(**arguments)


def test_names_follow_the_columns():
    spec = ArimaSpec(1, 1, 2, 1, 1, 1, 12, "ct", 2)
    assert spec.names(["price", "wage"]) == (
        *("ar.L1", "ma.L1", "ma.L2", "ar.S.L12", "ma.S.L12", "const", "drift"),
        *("price", "wage"),
    )
    assert spec.n_free == len(spec.names()) == 9
    with pytest.raises(ValueError, match="1 names for 2 regressors"):
        spec.names(["price"])


def companion(ar: np.ndarray, ma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r = max(len(ar) - 1, len(ma))
    F = np.diag(np.ones(r - 1), 1)
    F[: len(ar) - 1, 0] = -ar[1:]
    return F, np.r_[ma, np.zeros(r - len(ma))]


@pytest.mark.parametrize(
    ("p", "q", "P", "Q"), [(2, 1, 0, 0), (0, 3, 0, 1), (1, 4, 1, 0), (3, 0, 1, 1)]
)
def test_stationary_covariance_solves_the_lyapunov_equation(p, q, P, Q):
    spec = ArimaSpec(p, 0, q, P, 0, Q, 5)
    ar, ma, sar, sma, *_ = spec.split(
        constrain(spec, np.random.default_rng(p + q).normal(size=(4, spec.n_free)))
    )
    ar_poly, ma_poly = product(-ar, -sar, 5), product(ma, sma, 5)
    ours = stationary_covariance(ar_poly, ma_poly)
    for row in range(4):
        F, load = companion(ar_poly[row], ma_poly[row])
        theirs = scipy.linalg.solve_discrete_lyapunov(F, np.outer(load, load))
        np.testing.assert_allclose(ours[row], theirs, atol=1e-10 * np.abs(theirs).max())


@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-8])
def test_stationary_covariance_near_a_unit_root(gap):
    phi, theta = 1.0 - gap, -0.4
    ours = stationary_covariance(np.array([[1.0, -phi]]), np.array([[1.0, theta]]))[0]
    # Closed form of the ARMA(1, 1); the coefficient itself is only known to its rounding.
    variance = 1.0 + (phi + theta) ** 2 / (1.0 - phi**2)
    expected = [[variance, theta], [theta, theta**2]]
    np.testing.assert_allclose(ours, expected, rtol=1e-15 / gap + 1e-12)


def test_stationary_variance_equals_the_autocovariance():
    from statsmodels.tsa.arima_process import arma_acovf

    ar, ma = np.array([1.0, -0.5, 0.3]), np.array([1.0, 0.4, 0.2, -0.3])
    ours = stationary_covariance(ar[None], ma[None])[0]
    F = companion(ar, ma)[0]
    gamma = [(np.linalg.matrix_power(F, k) @ ours)[0, 0] for k in range(6)]
    np.testing.assert_allclose(gamma, arma_acovf(ar, ma, 6), rtol=1e-12)


def test_polynomials_equal_numpy():
    one, season = np.poly1d([1, -1]), np.poly1d([1, 0, 0, 0, -1])
    np.testing.assert_array_equal(difference_polynomial(2, 1, 4), (one**2 * season).c)
    ours = product(np.array([[0.3, -0.2]]), np.array([[0.5, 0.1]]), 4)[0]
    expected = np.polymul([1, 0.3, -0.2], [1, 0, 0, 0, 0.5, 0, 0, 0, 0.1])
    np.testing.assert_allclose(ours, expected, rtol=1e-14)


@pytest.mark.parametrize("spec", SPECS)
def test_likelihood_is_the_dense_density_of_the_differenced_series(spec):
    from statsmodels.tsa.arima_process import arma_acovf

    x, u, coefficients = draw(spec, 40, 3)
    ar, ma, sar, sma, trend, beta = spec.split(coefficients)
    ar_poly, ma_poly = product(-ar, -sar, spec.s)[0], product(ma, sma, spec.s)[0]
    weights = difference_polynomial(spec.d, spec.D, spec.s)
    w = np.convolve(x - u[0] @ beta[0], weights, mode="valid")
    gamma = arma_acovf(ar_poly, ma_poly, len(w), 1.3)
    mean = np.full(len(w), trend[0].sum() / ar_poly.sum())
    dense = scipy.stats.multivariate_normal(mean, scipy.linalg.toeplitz(gamma)).logpdf(w)
    out = run(spec, coefficients, 1.3, x, u)
    assert out.loglik.item() == pytest.approx(dense, rel=1e-9)
    assert out.n_diffuse.item() == spec.n_diff
    assert out.n_obs.item() == len(w)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.p + s.q + s.P + s.Q])
def test_likelihood_equals_statsmodels_on_the_differenced_series(spec):
    x, u, coefficients = draw(spec, 60, 4)
    theirs = peer(spec, x, u, simple_differencing=True).loglike(
        peer_params(spec, coefficients, 0.8)
    )
    assert run(spec, coefficients, 0.8, x, u).loglik.item() == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.n_arma] + TRENDED)
@pytest.mark.parametrize("missing", [(), (0, 3, 17, 18, 19, 20, 40), (1, 2, 30)])
def test_likelihood_equals_statsmodels_exact_diffuse(spec, missing):
    x, u, coefficients = draw(spec, 60, 5)
    x[list(missing)] = np.nan
    model = peer(spec, x, u, use_exact_diffuse=True)
    model.ssm.loglikelihood_burn = 0
    theirs = model.loglikeobs(peer_params(spec, coefficients, 0.8)).sum()
    # statsmodels keeps the 2 pi of diffuse elements.
    theirs += 0.5 * spec.n_diff * np.log(2 * np.pi)
    assert run(spec, coefficients, 0.8, x, u).loglik.item() == pytest.approx(theirs, rel=1e-7)


@pytest.mark.parametrize("spec", SPECS + TRENDED)
def test_diffuse_variance_is_one_at_every_diffuse_step(spec):
    _, u, coefficients = draw(spec, spec.n_diff + 2, 6)
    matrices = system(spec, coefficients, np.ones(1), u, spec.n_diff + 2)
    F, H, V = matrices.F[0, 0].numpy(), matrices.H[0, 0].numpy(), matrices.Pinf[0].numpy()
    rows = [H @ np.linalg.matrix_power(F, k) for k in range(spec.n_diff + 1)]
    cov = np.concatenate(rows) @ V @ np.concatenate(rows).T
    n = spec.n_diff
    # Of the first n observations one after the other, given those before; nothing is left after.
    np.testing.assert_allclose(np.diag(np.linalg.cholesky(cov[:n, :n])), 1.0, atol=1e-9)
    assert np.linalg.matrix_rank(V, tol=1e-9) == n


@pytest.mark.parametrize("spec", [s for s in SPECS if s.n_arma] + TRENDED)
def test_forecasts_equal_statsmodels(spec):
    x, u, coefficients = draw(spec, 70, 7)
    known = peer(spec, x[:60], u[:, :60], use_exact_diffuse=True)
    theirs = known.smooth(peer_params(spec, coefficients, 0.8)).get_forecast(
        10, exog=u[0, 60:] if spec.n_inputs else None
    )
    x[60:] = np.nan
    out = run(spec, coefficients, 0.8, x, u, store="all")
    beta = spec.split(coefficients)[-1][0]
    mean = out.mean[0, 60:, 0].numpy() + u[0, 60:] @ beta
    np.testing.assert_allclose(mean, theirs.predicted_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.sqrt(out.cov[0, 60:, 0, 0].numpy()), theirs.se_mean, rtol=1e-6)


def test_rows_and_steps_that_agree_are_stored_once():
    spec = ArimaSpec(0, 1, 1, 0, 1, 1, 12)
    matrices = system(spec, np.zeros((5, 2)), np.ones(5), None, 30)
    assert matrices.F.shape == matrices.F.new_empty(1, 1, 14, 14).shape
    assert matrices.Q.shape[:2] == (5, 1)
    assert matrices.b.shape[:2] == matrices.d.shape[:2] == (1, 1)
    assert all(field.dtype == torch.float64 for field in matrices)


def test_regressors_of_the_wrong_length_are_named():
    with pytest.raises(ValueError, match="1 regressors and 30 steps"):
        system(ArimaSpec(1, n_inputs=1), np.zeros((1, 2)), np.ones(1), np.zeros((1, 29, 1)), 30)


def test_starting_values_are_consistent():
    from statsmodels.tsa.arima_process import ArmaProcess

    rng = np.random.default_rng(8)
    process = ArmaProcess([1.0, -0.5, 0.2], [1.0, 0.4])
    x = np.stack([process.generate_sample(8000, distrvs=rng.normal) for _ in range(3)])
    spec = ArimaSpec(2, 0, 1, trend="c")
    start = constrain(spec, starting_values(spec, x + 5.0))
    np.testing.assert_allclose(start[:, :3], np.tile([0.5, -0.2, 0.4], (3, 1)), atol=0.08)
    mean = starting_values(spec, x + 5.0)[:, 3]
    np.testing.assert_allclose(mean, x.mean(1) + 5.0, rtol=1e-10)


def test_starting_regression_equals_least_squares():
    rng = np.random.default_rng(9)
    u, noise = rng.normal(size=(2, 50, 2)), rng.normal(size=(2, 50))
    x = (u @ np.array([2.0, -3.0])) + 0.1 * noise.cumsum(1)
    x[1, 20] = np.nan
    start = starting_values(ArimaSpec(0, 1, 0, trend="c", n_inputs=2), x, u)
    for row in range(2):
        design = np.column_stack([np.ones(49), np.diff(u[row], axis=0)])
        y = np.diff(x[row])
        seen = np.isfinite(y)
        expected = np.linalg.lstsq(design[seen], y[seen], rcond=None)[0]
        np.testing.assert_allclose(start[row], expected, rtol=1e-8)


def test_starting_values_with_gaps_and_short_series_are_usable():
    rng = np.random.default_rng(10)
    x = rng.normal(size=(4, 60)).cumsum(1)
    x[0, ::2] = np.nan  # never two neighbours
    x[1, 12:] = np.nan
    x[2] = 3.0
    spec = ArimaSpec(1, 1, 1, 1, 0, 1, 4, "c")
    start = starting_values(spec, x)
    assert np.isfinite(start).all()
    np.testing.assert_array_equal(start[0], 0.0)
    whole = starting_values(spec, x[3:])
    np.testing.assert_allclose(start[3:], whole, rtol=1e-10)
    assert np.abs(whole).max() > 0


def test_starting_polynomials_stay_inside():
    # An explosive series: least squares alone finds a root outside the unit circle.
    x = (1.1 ** np.arange(60.0))[None]
    phi = constrain(ArimaSpec(1), starting_values(ArimaSpec(1), x))
    assert phi.item() == pytest.approx(0.95, abs=1e-6)


def test_airline():
    # Box and Jenkins (1976); Stata 12 manual [TS] arima, example 2, gives 244.69651.
    spec = ArimaSpec(0, 1, 1, 0, 1, 1, 12)
    best = fit(spec, np.log(values("airline")))
    assert best.converged.all()
    assert best.value.item() == pytest.approx(244.6965, abs=1e-4)
    assert best.n_evaluations < 60
    np.testing.assert_allclose(constrain(spec, best.theta)[0], [-0.4018324, -0.5569342], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("nile", ArimaSpec(1, 1, 1)),
        ("lynx", ArimaSpec(2, 0, 1, trend="c")),
        ("austres", ArimaSpec(0, 2, 1)),
        ("wineind", ArimaSpec(1, 1, 1, 0, 1, 1, 12)),
        ("sunspots", ArimaSpec(3, 0, 0, trend="c")),
    ],
)
def test_optimum_is_not_below_statsmodels(name, spec):
    x = values(name)
    u = np.zeros((1, len(x), 0))
    theirs = peer(spec, x, u, simple_differencing=True).fit(disp=False, maxiter=500)
    best = fit(spec, x)
    assert best.converged.all()
    assert best.value.item() > theirs.llf - 1e-3
    # Not a likelihood that only we compute: theirs at our optimum says the same.
    coefficients = constrain(spec, best.theta)
    out = run(spec, coefficients, 1.0, x, u)
    params = peer_params(spec, coefficients, (out.quad / out.n_obs).item())
    again = peer(spec, x, u, simple_differencing=True).loglike(params)
    assert again == pytest.approx(best.value.item(), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_optimum_does_not_depend_on_the_units(scale):
    rng = np.random.default_rng(11)
    u = rng.normal(size=(1, 120, 1))
    x = 2.0 * u[0, :, 0] + 0.05 * np.arange(120) + rng.normal(size=120).cumsum()
    spec = ArimaSpec(1, 1, 0, trend="c", n_inputs=1)
    one, other = fit(spec, x, u), fit(spec, scale * x, 1e3 * u)
    assert other.converged.all()
    shift = (len(x) - 1) * np.log(scale)
    assert other.value.item() + shift == pytest.approx(one.value.item(), abs=1e-6)


def test_maximum_on_the_boundary_is_reached():
    # White noise differenced once too often: the MA root of the likelihood lies on the circle.
    x = np.random.default_rng(12).normal(size=80)
    best = fit(ArimaSpec(0, 1, 1), x)
    assert best.converged.all()
    grid = concentrated(ArimaSpec(0, 1, 1), x, np.zeros((1, 80, 0)))(
        np.linspace(-np.pi / 2, np.pi / 2, 400)[:, None], np.zeros(400, dtype=np.int64)
    )
    assert best.value.item() >= grid.max() - 1e-9
    assert constrain(ArimaSpec(0, 1, 1), best.theta).item() < -0.9
