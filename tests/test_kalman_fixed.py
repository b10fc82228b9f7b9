"""Time-invariant systems: the shortcuts against statsmodels, dense Gaussians and more digits."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seqdgm.kernels import System, kalman_filter, kalman_smoother
from seqdgm.models._arima import system as arima_system
from seqdgm.models._arima_spec import ArimaSpec


def tensor(array: Any) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def observed(x: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """One series, (time, obs), with NaN for what is missing."""
    data = tensor(x)[None]
    return data, ~data.isnan(), torch.tensor([len(x)])


def build(F: Any, Q: Any, H: Any, R: Any, P0: Any) -> System:
    F, Q, H, R, P0 = (tensor(np.atleast_2d(field)) for field in (F, Q, H, R, P0))
    b, d = torch.zeros(1, 1, len(F)).double(), torch.zeros(1, 1, len(H)).double()
    return System(
        *(field[None, None] for field in (F, Q, H, R)), b, d, b[0], P0[None], 0 * P0[None]
    )


def random_system(seed: int, state: int, obs: int, scale: float = 1.0) -> System:
    """Stable, with correlated errors; everything observed has the unit `scale`."""
    rng = np.random.default_rng(seed)
    raw = rng.standard_normal((state, state))
    F = 0.95 * raw / np.abs(np.linalg.eigvals(raw)).max()
    roots = [rng.standard_normal((k, k)) for k in (state, obs, state)]
    Q, R, P0 = (scale**2 * root @ root.T / len(root) for root in roots)
    return build(F, Q, rng.standard_normal((obs, state)), R, P0)


def recursion(system: System, x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The textbook filter in extended precision, one element at a time (diagonal R)."""
    F, Q, H, R = (field[0, 0].numpy().astype(np.longdouble) for field in system[:4])
    P, a = system.P0[0].numpy().astype(np.longdouble), np.zeros(len(F), np.longdouble)
    total = np.longdouble(0)
    for t, row in enumerate(x):
        if t:
            a, P = F @ a, F @ P @ F.T + Q
        for h, r, y in zip(H, np.diag(R), row, strict=True):
            M = P @ h
            f, v = h @ M + r, y - h @ a
            a, P = a + M * v / f, P - np.outer(M, M) / f
            total -= (np.log(2 * np.longdouble(math.pi) * f) + v * v / f) / 2
    return float(total), a.astype(float), P.astype(float)


# ---------------------------------------------------------------- constant gains


@pytest.mark.parametrize(("state", "obs"), [(1, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("gaps", [False, True])
def test_steady_state_equals_statsmodels(state: int, obs: int, gaps: bool) -> None:
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    system = random_system(3, state, obs)
    x = np.random.default_rng(4).standard_normal((600, obs))
    if gaps:
        x[300, 0] = x[301] = x[599, -1] = np.nan
    peer = KalmanSmoother(k_endog=obs, k_states=state, tolerance=0.0)
    peer.bind(x)
    for name, field in zip(("transition", "state_cov", "design", "obs_cov"), system, strict=False):
        peer[name] = field[0, 0].numpy()
    peer["selection"] = np.eye(state)
    peer.initialize_known(np.zeros(state), system.P0[0].numpy())
    expected = peer.smooth()
    data = observed(x)
    out = kalman_filter(system, *data, store="all")
    smoothed = kalman_smoother(system, *data, lag_one=True)
    assert out.mean is not None
    assert out.cov is not None
    assert out.pred_mean is not None
    assert out.pred_cov is not None
    # The covariances have become constant, and move again after the gap.
    assert torch.equal(out.pred_cov[0, 298], out.pred_cov[0, 299])
    assert torch.equal(out.pred_cov[0, 500], out.pred_cov[0, 598])
    assert bool((out.pred_cov[0, 302] != out.pred_cov[0, 300]).any()) == gaps
    for store in ("likelihood", "last", "all"):
        total = kalman_filter(system, *data, store=store).loglik[0]  # type: ignore[arg-type]
        np.testing.assert_allclose(total, expected.llf, rtol=1e-12)
    np.testing.assert_allclose(smoothed.loglik[0], expected.llf, rtol=1e-12)
    pairs = (
        (out.mean, expected.filtered_state.T),
        (out.cov, expected.filtered_state_cov.transpose(2, 0, 1)),
        (out.pred_mean, expected.predicted_state.T[:-1]),
        (out.pred_cov, expected.predicted_state_cov.transpose(2, 0, 1)[:-1]),
        (smoothed.mean, expected.smoothed_state.T),
        (smoothed.cov, expected.smoothed_state_cov.transpose(2, 0, 1)),
        (smoothed.lag_one, expected.smoothed_state_autocov.transpose(2, 0, 1)[:-1]),
    )
    for actual, wanted in pairs:
        assert actual is not None
        np.testing.assert_allclose(actual[0], wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())
    last = kalman_filter(system, *data, store="last")
    assert last.mean is not None
    assert last.cov is not None
    assert torch.equal(last.mean[:, 0], out.mean[:, -1])
    assert torch.equal(last.cov[:, 0], out.cov[:, -1])


def test_steady_state_of_a_series_does_not_depend_on_the_others() -> None:
    system = random_system(5, 3, 2)
    x = torch.randn(3, 200, 2, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 100] = False
    lengths = torch.tensor([200, 200, 150])
    panel = kalman_filter(system, x, mask, lengths, store="likelihood").loglik
    for n in range(3):
        one = [field[n : n + 1] for field in (x, mask, lengths)]
        assert torch.equal(kalman_filter(system, *one, store="likelihood").loglik[0], panel[n])


@pytest.mark.parametrize("ratio", [1e-4, 1e-8, 1e-12, 1e-14])
@pytest.mark.parametrize("store", ["likelihood", "last"])
def test_slow_convergence_is_not_taken_for_a_steady_state(ratio: float, store: Any) -> None:
    """A level that hardly moves: its variance falls like 1/t for thousands of steps."""
    system = build(1.0, ratio, 1.0, 1.0, 1e3)
    x = np.random.default_rng(6).standard_normal((3000, 1))
    out = kalman_filter(system, *observed(x), store=store)
    expected, mean, cov = recursion(system, x)
    np.testing.assert_allclose(out.loglik[0], expected, rtol=1e-12)
    if out.mean is not None and out.cov is not None:
        np.testing.assert_allclose(out.mean[0, 0], mean, rtol=1e-10)
        np.testing.assert_allclose(out.cov[0, 0], cov, rtol=1e-9)


# ---------------------------------------------------------------- increments of rank one


def polynomial(rng: np.random.Generator, degree: int, radius: float) -> np.ndarray:
    """Coefficients of lags 1.. of a polynomial whose inverse roots lie within `radius`."""
    out = np.ones(1)
    for j in range(degree):
        root = radius if j == 0 else rng.choice([radius, 0.5])
        out = np.convolve(out, [1.0, -root * rng.choice([-1, 1])])
    return out[1:]


def arma(rng: np.random.Generator, radius: float) -> tuple[ArimaSpec, np.ndarray]:
    p, q, P, Q = (int(k) for k in rng.integers(0, 3, 4))
    spec = ArimaSpec(p, 0, q, min(P, 1), 0, min(Q, 1), int(rng.choice([4, 12])))
    radii = rng.choice([radius, 0.6], 4)
    degrees = (spec.p, spec.q, spec.P, spec.Q)
    parts = [polynomial(rng, k, r) for k, r in zip(degrees, radii, strict=True)]
    return spec, np.concatenate([-parts[0], parts[1], -parts[2], parts[3]])


@pytest.mark.parametrize("radius", [0.6, 0.9, 0.99, 0.999, 0.99999])
def test_arma_equals_the_recursion_with_more_digits(radius: float) -> None:
    """From the stationary start; roots close to the unit circle among them."""
    rng = np.random.default_rng(int(1 / (1 - radius)))
    for _ in range(12):
        spec, coefficients = arma(rng, radius)
        system = arima_system(spec, coefficients[None], np.ones(1), None, 120)
        x = rng.standard_normal((120, 1))
        out = kalman_filter(system, *observed(x), store="likelihood")
        expected = recursion(system, x)[0]
        np.testing.assert_allclose(out.loglik[0], expected, rtol=1e-9, err_msg=str(spec))


def test_arma_equals_the_dense_gaussian() -> None:
    from scipy.linalg import toeplitz
    from scipy.stats import multivariate_normal
    from statsmodels.tsa.arima_process import arma_acovf

    rng = np.random.default_rng(8)
    for _ in range(10):
        # Mild roots, so that the dense covariance has a condition number below 1e3.
        ar, ma = polynomial(rng, 2, 0.8), np.r_[polynomial(rng, 1, 0.6), 0.2, 0.1]
        system = arima_system(ArimaSpec(2, 0, 3), np.r_[-ar, ma][None], np.array([1.7]), None, 150)
        x = rng.standard_normal(150)
        cov = toeplitz(arma_acovf(np.r_[1, ar], np.r_[1, ma], 150, sigma2=1.7))
        expected = multivariate_normal.logpdf(x, np.zeros(150), cov)
        out = kalman_filter(system, *observed(x[:, None]), store="likelihood")
        np.testing.assert_allclose(out.loglik[0], expected, rtol=1e-9)


@pytest.mark.parametrize("theta", [-0.4, -0.95, -0.9999])
def test_airline_model_has_the_density_of_its_differences(theta: float) -> None:
    """The level form with its diffuse start, against statsmodels on the differenced series."""
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    y = np.cumsum(np.random.default_rng(9).standard_normal(144))
    params = np.array([theta, -0.6])
    peer = SARIMAX(y, order=(0, 1, 1), seasonal_order=(0, 1, 1, 12), simple_differencing=True)
    system = arima_system(ArimaSpec(0, 1, 1, 0, 1, 1, 12), params[None], np.array([1.3]), None, 144)
    out = kalman_filter(system, *observed(y[:, None]), store="likelihood")
    np.testing.assert_allclose(out.loglik[0], peer.loglike([*params, 1.3]), rtol=1e-9)
    assert out.n_diffuse.tolist() == [13]
    assert out.n_obs.tolist() == [131]


def test_intercepts_that_vary_do_not_stop_the_shortcuts() -> None:
    """b and d may change: only F, Q, H and R decide on the covariances."""
    rng = np.random.default_rng(10)
    for state, obs in ((3, 1), (3, 2)):
        system = random_system(11, state, obs)
        d, b = (
            tensor(rng.standard_normal((1, 80, obs))),
            tensor(rng.standard_normal((1, 80, state))),
        )
        x = rng.standard_normal((80, obs))
        mean = np.zeros((80, state))
        for t in range(1, 80):
            mean[t] = system.F[0, 0].numpy() @ mean[t - 1] + b[0, t].numpy()
        shift = mean @ system.H[0, 0].numpy().T + d[0].numpy()
        out = kalman_filter(system._replace(b=b, d=d), *observed(x + shift), store="likelihood")
        plain = kalman_filter(system, *observed(x), store="last")
        np.testing.assert_allclose(out.loglik, plain.loglik, rtol=1e-12)


# ---------------------------------------------------------------- numerical safety


def check_covariances(cov: Tensor) -> None:
    assert torch.equal(cov, cov.mT)
    assert float(cov.diagonal(dim1=-2, dim2=-1).min()) >= 0.0
    values = torch.linalg.eigvalsh(cov)
    assert bool((values[..., 0] >= -1e-12 * values[..., -1]).all())


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("noise", [0.0, 1e-14, 1.0])
@pytest.mark.parametrize("radius", [0.9, 0.9999999])
def test_extreme_scales_and_noise(scale: float, noise: float, radius: float) -> None:
    """Variances that differ by 14 digits, near-unit roots, and units from 1e-8 to 1e8."""
    rng = np.random.default_rng(12)
    F = np.array([[radius, 1.0, 0.0], [0.0, radius, 0.1], [0.0, 0.0, 0.5]])
    Q, P0 = np.diag([0.5, 1e-6, 1.0]) * scale**2, np.diag([10.0, 1.0, 1.0]) * scale**2
    H = np.array([[1.0, 0.0, 0.3], [0.0, 0.0, 1.0]])
    system = build(F, Q, H, noise * scale**2 * np.eye(2), P0)
    x = scale * rng.standard_normal((60, 2)).cumsum(0)
    out = kalman_filter(system, *observed(x), store="all")
    smoothed = kalman_smoother(system, *observed(x), lag_one=False)
    assert out.cov is not None
    assert out.pred_cov is not None
    check_covariances(out.pred_cov)
    check_covariances(out.cov)
    assert torch.equal(smoothed.cov, smoothed.cov.mT)
    assert float(smoothed.cov.diagonal(dim1=2, dim2=3).min()) >= 0.0
    expected = recursion(system, x)[0]
    np.testing.assert_allclose(out.loglik[0], expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 1e-14, 1.0])
def test_long_series_of_a_large_near_unit_root_system(noise: float) -> None:
    rng = np.random.default_rng(13)
    state, obs, steps = 64, 2, 100_000
    angles = np.linspace(0.0, 3.0, state // 2)
    F = np.zeros((state, state))
    for k, angle in enumerate(angles):
        c, s = 0.999999 * math.cos(angle), 0.999999 * math.sin(angle)
        F[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = [[c, s], [-s, c]]
    Q = np.diag(10.0 ** rng.uniform(-8, 0, state))
    system = build(
        F, Q, rng.standard_normal((obs, state)), noise * np.eye(obs), 100 * np.eye(state)
    )
    x = rng.standard_normal((steps, obs)).cumsum(0)
    x[steps // 2, 0] = np.nan
    out = kalman_filter(system, *observed(x), store="last")
    assert out.cov is not None
    check_covariances(out.cov)
    only = kalman_filter(system, *observed(x), store="likelihood")
    assert torch.equal(out.loglik, only.loglik)
    head = kalman_filter(system, *observed(x[:100]), store="likelihood").loglik[0]
    np.testing.assert_allclose(head, recursion(system, x[:100])[0], rtol=1e-9)


def test_memory_of_the_likelihood_does_not_grow_with_the_data() -> None:
    system = random_system(14, 4, 1)

    def peak(series: int, steps: int) -> int:
        x = torch.zeros(series, steps, 1).double()
        mask, lengths = torch.ones_like(x, dtype=torch.bool), torch.full((series,), steps)
        kalman_filter(system, x, mask, lengths, store="likelihood")
        tracemalloc.start()
        kalman_filter(system, x, mask, lengths, store="likelihood")
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(1, 100_000) < 1.2 * peak(1, 10) + 10_000
    assert peak(500, 4000) < 1.2 * peak(500, 400) + 10_000
