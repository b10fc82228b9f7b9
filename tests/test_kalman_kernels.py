"""Gaussian kernels against dense joint Gaussians, statsmodels, filterpy and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqdgm.kernels import Filtered, Smoothed, System, get_kernels, kalman_filter, kalman_smoother

IMPLEMENTATIONS = ("cpu", "reference")
each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


# ---------------------------------------------------------------- the dense joint Gaussian


class Dense(NamedTuple):
    """Moments by conditioning the stacked Gaussian; `diffuse` directions under a flat prior."""

    loglik: float
    mean: np.ndarray
    cov: np.ndarray  # (T Z, T Z): holds the lag-one covariances too


def matrices(system: System, n: int, steps: int) -> dict[str, np.ndarray]:
    """Matrices of series n with every axis written out."""
    out = {}
    for name, field in system._asdict().items():
        array = field.detach().numpy()
        array = array[n if len(array) > 1 else 0]
        if name not in ("m0", "P0", "Pinf"):
            array = np.repeat(array, steps, 0) if len(array) == 1 else array[:steps]
        out[name] = array
    return out


def joint(m: dict[str, np.ndarray], steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and covariance of z_1..z_T, and how they depend on the diffuse elements."""
    z = len(m["m0"])
    values, vectors = np.linalg.eigh(m["Pinf"])
    design = (vectors * np.sqrt(values.clip(0)))[:, values > 1e-12]
    blocks, mean, loads = np.zeros((steps * z, steps * z)), [m["m0"]], [design]
    marginal = m["P0"]
    for t in range(steps):
        if t:
            mean.append(m["F"][t] @ mean[-1] + m["b"][t])
            loads.append(m["F"][t] @ loads[-1])
            marginal = m["F"][t] @ marginal @ m["F"][t].T + m["Q"][t]
        carry = marginal
        for s in range(t, steps):
            if s > t:
                carry = m["F"][s] @ carry
            blocks[s * z : (s + 1) * z, t * z : (t + 1) * z] = carry
            blocks[t * z : (t + 1) * z, s * z : (s + 1) * z] = carry.T
    return np.concatenate(mean), blocks, np.concatenate(loads)


def dense(system: System, x: np.ndarray, mask: np.ndarray, n: int, steps: int) -> Dense:
    """Condition on everything that is observed among `steps` steps (which may exceed the data)."""
    m = matrices(system, n, steps)
    z, d = len(m["m0"]), x.shape[1]
    mean, cov, loads = joint(m, steps)
    H, R = np.zeros((steps * d, steps * z)), np.zeros((steps * d, steps * d))
    for t in range(steps):
        H[t * d : (t + 1) * d, t * z : (t + 1) * z] = m["H"][t]
        R[t * d : (t + 1) * d, t * d : (t + 1) * d] = m["R"][t]
    seen = mask.ravel()
    H = H[seen]
    y = x.ravel()[seen] - m["d"].ravel()[seen] - H @ mean
    sigma = H @ cov @ H.T + R[np.ix_(seen, seen)]
    X = H @ loads
    solve = np.linalg.solve(sigma, np.column_stack([y, X, H @ cov]))
    iy, iX, iH = solve[:, 0], solve[:, 1 : 1 + X.shape[1]], solve[:, 1 + X.shape[1] :]
    info = X.T @ iX
    delta = np.linalg.solve(info, X.T @ iy) if len(info) else np.zeros(0)
    rest = loads - cov @ H.T @ iX
    quad = y @ iy - delta @ info @ delta
    logdet = np.linalg.slogdet(sigma)[1] + np.linalg.slogdet(info)[1]
    loglik = -0.5 * ((len(y) - len(delta)) * math.log(2 * math.pi) + logdet + quad)
    spread = rest @ np.linalg.solve(info, rest.T) if len(info) else 0.0
    return Dense(
        float(loglik),
        (mean + cov @ H.T @ iy + rest @ delta).reshape(steps, z),
        cov - cov @ H.T @ iH + spread,
    )


# ---------------------------------------------------------------- random systems and data


def tensor(array: Any) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def positive(rng: np.random.Generator, *shape: int, rank: int | None = None) -> np.ndarray:
    """Random covariance matrices, of full rank unless told."""
    root = rng.standard_normal((*shape, shape[-1] if rank is None else rank))
    return root @ root.swapaxes(-1, -2)


def random_system(
    rng: np.random.Generator,
    state: int,
    obs: int,
    *,
    systems: dict[str, int] | None = None,
    times: dict[str, int] | None = None,
    diffuse: int = 0,
    noise: str = "full",
    q_rank: int | None = None,
) -> System:
    """A stable system; `systems` and `times` give the lengths of the axes that are not shared."""

    def axes(name: str) -> tuple[int, int]:
        return (systems or {}).get(name, 1), (times or {}).get(name, 1)

    F = 0.3 * rng.standard_normal((*axes("F"), state, state)) + 0.5 * np.eye(state)
    R = positive(rng, *axes("R"), obs)
    if noise == "diagonal":
        R = R * np.eye(obs)
    if noise == "singular":
        R = positive(rng, *axes("R"), obs, rank=max(obs - 1, 0))
    if noise == "zero":
        R = 0.0 * R
    # Diffuse directions that are no coordinate axes.
    basis = np.linalg.qr(rng.standard_normal((state, state)))[0][:, :diffuse]
    count = axes("P0")[0]
    return System(
        F=tensor(F),
        Q=tensor(positive(rng, *axes("Q"), state, rank=q_rank)),
        H=tensor(rng.standard_normal((*axes("H"), obs, state))),
        R=tensor(R),
        b=tensor(rng.standard_normal((*axes("b"), state))),
        d=tensor(rng.standard_normal((*axes("d"), obs))),
        m0=tensor(rng.standard_normal((axes("m0")[0], state))),
        P0=tensor(positive(rng, count, state)),
        Pinf=tensor(basis @ basis.T)[None],
    )


class Data(NamedTuple):
    x: Tensor
    mask: Tensor
    lengths: Tensor

    def series(self, n: int) -> tuple[np.ndarray, np.ndarray, int]:
        steps = int(self.lengths[n])
        return self.x[n, :steps].numpy(), self.mask[n, :steps].numpy(), steps


def random_data(
    rng: np.random.Generator, series: int, steps: int, obs: int, missing: float = 0.25
) -> Data:
    """Ragged data with missing elements, and whole steps missing at both ends of some series."""
    x = rng.standard_normal((series, steps, obs)) * 2.0
    mask = rng.random((series, steps, obs)) > missing
    lengths = np.maximum(steps - np.arange(series), 1)
    mask[-1, 0] = False
    mask[0, lengths[0] - 1] = False
    for n in range(series):
        mask[n, lengths[n] :] = False
    x[~mask] = np.nan
    return Data(tensor(x), torch.tensor(mask), torch.tensor(lengths))


FIELDS = ("F", "Q", "H", "R", "b", "d", "m0", "P0")
SERIES, STEPS = 4, 9
VARYING = dict.fromkeys(("F", "Q", "H", "R", "b", "d"), STEPS)
CASES: dict[str, dict[str, Any]] = {
    "shared": {},
    "varying": {"times": VARYING},
    "own": {"systems": dict.fromkeys(FIELDS, SERIES), "times": VARYING},
    "mixed": {
        "systems": {"F": SERIES, "R": SERIES, "m0": SERIES},
        "times": {"H": STEPS, "b": STEPS},
    },
    "own, fewer observed": {
        "systems": dict.fromkeys(FIELDS, SERIES),
        "times": VARYING,
        "obs": 2,
    },
    "own, more observed": {"systems": dict.fromkeys(FIELDS, SERIES), "obs": 4},
    "diagonal": {"noise": "diagonal"},
    "singular R": {"noise": "singular"},
    "zero R": {"noise": "zero", "obs": 2},
    "singular Q": {"q_rank": 1},
    "diffuse": {"diffuse": 2},
    "all diffuse": {"diffuse": 3, "times": VARYING},
    "diffuse, zero R": {"diffuse": 1, "noise": "zero", "obs": 2},
    "scalar": {"obs": 1, "state": 1, "diffuse": 1},
}
cases = pytest.mark.parametrize("case", CASES)


def make_case(case: str, seed: int = 0) -> tuple[System, Data]:
    options = dict(CASES[case])
    rng = np.random.default_rng([seed, len(case)])
    state, obs = options.pop("state", 3), options.pop("obs", 3)
    return random_system(rng, state, obs, **options), random_data(rng, SERIES, STEPS, obs)


def close(actual: Tensor | np.ndarray, expected: Any, tolerance: float = 1e-9) -> None:
    """Absolute and relative tolerance, relative to the largest entry."""
    expected = np.asarray(expected)
    size = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * size)


# ---------------------------------------------------------------- against the dense Gaussian


@each
@cases
def test_filter_equals_dense(case: str, implementation: Any) -> None:
    system, data = make_case(case)
    out = kalman_filter(system, *data, store="all", implementation=implementation)
    assert out.mean is not None
    assert out.cov is not None
    for n in range(SERIES):
        x, mask, steps = data.series(n)
        close(out.loglik[n], dense(system, x, mask, n, steps).loglik)
        for t in range(steps):
            if out.cov_inf is not None and bool((out.cov_inf[n, t] != 0).any()):
                continue
            expected = dense(system, x[: t + 1], mask[: t + 1], n, t + 1)
            state = out.mean.shape[-1]
            close(out.mean[n, t], expected.mean[-1])
            close(out.cov[n, t], expected.cov[-state:, -state:])
        assert bool(out.mean[n, steps:].isnan().all())
        assert bool(out.cov[n, steps:].isnan().all())


@each
@cases
def test_predicted_moments_equal_dense(case: str, implementation: Any) -> None:
    system, data = make_case(case, seed=1)
    out = kalman_filter(system, *data, store="all", implementation=implementation)
    assert out.pred_mean is not None
    assert out.pred_cov is not None
    for n in range(SERIES):
        x, mask, steps = data.series(n)
        for t in range(1, steps):
            if out.cov_inf is not None and bool((out.cov_inf[n, t - 1] != 0).any()):
                continue
            before = mask[: t + 1].copy()
            before[t] = False
            expected = dense(system, x[: t + 1], before, n, t + 1)
            state = out.pred_mean.shape[-1]
            close(out.pred_mean[n, t], expected.mean[-1])
            close(out.pred_cov[n, t], expected.cov[-state:, -state:])


@each
@cases
def test_smoother_equals_dense(case: str, implementation: Any) -> None:
    system, data = make_case(case, seed=2)
    out = kalman_smoother(system, *data, lag_one=True, implementation=implementation)
    assert out.lag_one is not None
    state = out.mean.shape[-1]
    for n in range(SERIES):
        x, mask, steps = data.series(n)
        expected = dense(system, x, mask, n, steps)
        blocks = expected.cov.reshape(steps, state, steps, state).swapaxes(1, 2)
        close(out.loglik[n], expected.loglik)
        close(out.mean[n, :steps], expected.mean)
        close(out.cov[n, :steps], blocks[np.arange(steps), np.arange(steps)])
        close(out.lag_one[n, : steps - 1], blocks[np.arange(1, steps), np.arange(steps - 1)])
        assert bool(out.mean[n, steps:].isnan().all())
        assert bool(out.lag_one[n, steps - 1 :].isnan().all())
        assert int(out.rank_left[n]) == 0


@each
@pytest.mark.parametrize("case", ["own", "mixed", "singular Q"])
def test_innovations_whiten_the_data(case: str, implementation: Any) -> None:
    """v / sqrt(F) is the residual times the inverse Cholesky factor of the joint covariance."""
    system, data = make_case(case)
    out = kalman_filter(system, *data, store="all", implementation=implementation)
    assert out.innovations is not None
    assert out.innov_var is not None
    for n in range(SERIES):
        x, mask, steps = data.series(n)
        m = matrices(system, n, steps)
        mean, cov, _ = joint(m, steps)
        H, R = np.zeros((x.size, mean.size)), np.zeros((x.size, x.size))
        for t in range(steps):
            rows, cols = np.arange(3) + 3 * t, np.arange(3) + 3 * t
            H[np.ix_(rows, cols)], R[np.ix_(rows, rows)] = m["H"][t], m["R"][t]
        seen = mask.ravel()
        sigma = (H @ cov @ H.T + R)[np.ix_(seen, seen)]
        residual = x.ravel()[seen] - m["d"].ravel()[seen] - (H @ mean)[seen]
        whitened = np.linalg.solve(np.linalg.cholesky(sigma), residual)
        standard = (out.innovations[n] / out.innov_var[n].sqrt())[data.mask[n]]
        close(standard, whitened)
        assert bool(out.innovations[n][~data.mask[n]].isnan().all())


@each
def test_missing_element_is_dropped_from_the_joint_density(implementation: Any) -> None:
    """A column that is never observed changes nothing, whatever its errors correlate with."""
    rng = np.random.default_rng(3)
    system = random_system(rng, 3, 3)
    data = random_data(rng, 3, 8, 3)
    mask = data.mask.clone()
    mask[..., 1] = False
    with_gap = kalman_smoother(system, data.x, mask, data.lengths, lag_one=False)
    rows = [0, 2]
    without = system._replace(
        H=system.H[:, :, rows], R=system.R[:, :, rows][..., rows], d=system.d[..., rows]
    )
    kept = (data.x[..., rows], mask[..., rows], data.lengths)
    dropped = kalman_smoother(without, *kept, lag_one=False, implementation=implementation)
    close(with_gap.loglik, dropped.loglik, 1e-12)
    close(with_gap.mean[0], dropped.mean[0], 1e-12)
    close(with_gap.cov[0], dropped.cov[0], 1e-12)


# ---------------------------------------------------------------- against other packages

STRUCTURAL: dict[str, dict[str, Any]] = {
    "level": {"level": "llevel"},
    "trend": {"level": "lltrend"},
    "smooth trend": {"level": "strend"},
    "seasonal": {"level": "llevel", "seasonal": 4},
    "trend, trigonometric": {"level": "lltrend", "freq_seasonal": [{"period": 6}]},
    "level, AR": {"level": "llevel", "autoregressive": 2},
}


@each
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("name", STRUCTURAL)
def test_structural_models_equal_statsmodels(name: str, gap: bool, implementation: Any) -> None:
    """statsmodels counts log 2 pi for diffuse observations as well; ours are the difference off."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    rng = np.random.default_rng(5)
    y = np.cumsum(rng.standard_normal(30)) + 3.0 * np.sin(np.arange(30))
    if gap:
        y[[0, 1, 9, 10, 17, 29]] = np.nan
    model = UnobservedComponents(y, use_exact_diffuse=True, **STRUCTURAL[name])
    params = np.exp(0.4 * rng.standard_normal(len(model.param_names)))
    params[[k for k, p in enumerate(model.param_names) if p.startswith("ar.")]] = 0.3
    result = model.smooth(params)
    system = from_statsmodels(model)
    x = tensor(y)[None, :, None]
    data = (x, ~x.isnan(), torch.tensor([30]))
    out = kalman_smoother(system, *data, lag_one=True, implementation=implementation)
    filtered = kalman_filter(system, *data, store="likelihood", implementation=implementation)
    constant = 0.5 * int(filtered.n_diffuse[0]) * math.log(2 * math.pi)
    close(out.loglik[0], result.llf + constant, 1e-8)
    close(filtered.loglik[0], result.llf + constant, 1e-8)
    close(out.mean[0], result.smoothed_state.T, 1e-7)
    close(out.cov[0], result.smoothed_state_cov.transpose(2, 0, 1), 1e-7)


def from_statsmodels(model: Any) -> System:
    """System of a statsmodels model with time-invariant matrices."""
    ssm = model.ssm
    select = ssm["selection"]
    mean, diffuse, stationary = ssm.initialization(model=ssm)
    return System(
        F=tensor(ssm["transition"])[None, None],
        Q=tensor(select @ ssm["state_cov"] @ select.T)[None, None],
        H=tensor(ssm["design"])[None, None],
        R=tensor(ssm["obs_cov"])[None, None],
        b=tensor(ssm["state_intercept"].ravel())[None, None],
        d=tensor(ssm["obs_intercept"].ravel())[None, None],
        m0=tensor(mean)[None],
        P0=tensor(stationary)[None],
        Pinf=tensor(diffuse)[None],
    )


@each
@pytest.mark.filterwarnings("ignore:The univariate filtering approach diagonalized")
@pytest.mark.parametrize("noise", ["full", "diagonal", "zero"])
def test_multivariate_diffuse_models_equal_statsmodels(noise: str, implementation: Any) -> None:
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    rng = np.random.default_rng(7)
    state, obs, steps = 4, 2, 25
    system = random_system(rng, state, obs, noise=noise)
    system = system._replace(Pinf=torch.eye(state).double()[None], P0=0 * system.P0)
    data = random_data(rng, 1, steps, obs)
    ssm = KalmanSmoother(k_endog=obs, k_states=state, k_posdef=state)
    m = {name: field[0].numpy() for name, field in system._asdict().items()}
    ssm["design"], ssm["obs_cov"], ssm["obs_intercept"] = m["H"][0], m["R"][0], m["d"][0][:, None]
    ssm["transition"], ssm["state_cov"], ssm["selection"] = m["F"][0], m["Q"][0], np.eye(state)
    ssm["state_intercept"] = m["b"][0][:, None]
    ssm.bind(data.x[0].numpy())
    ssm.initialize_diffuse()
    result = ssm.smooth()
    # statsmodels starts its diffuse state at zero.
    system = system._replace(m0=0 * system.m0)
    out = kalman_smoother(system, *data, lag_one=True, implementation=implementation)
    assert out.lag_one is not None
    close(out.loglik[0], result.llf + 0.5 * state * math.log(2 * math.pi), 1e-8)
    close(out.mean[0], result.smoothed_state.T, 1e-7)
    close(out.cov[0], result.smoothed_state_cov.transpose(2, 0, 1), 1e-7)
    proper = int(result.nobs_diffuse)
    autocov = result.smoothed_state_autocov.transpose(2, 0, 1)[:-1]
    close(out.lag_one[0, proper:], autocov[proper:], 1e-7)


@each
def test_random_models_equal_filterpy(implementation: Any) -> None:
    """filterpy predicts before each update; here the first update comes before any prediction."""
    from filterpy.kalman import KalmanFilter

    for seed in range(3):
        rng = np.random.default_rng([11, seed])
        state, obs, steps = 4, 2, 20
        system = random_system(rng, state, obs)._replace(d=torch.zeros(1, 1, obs).double())
        data = random_data(rng, 1, steps, obs, missing=0.0)
        m = {name: field[0].numpy() for name, field in system._asdict().items()}
        kf = KalmanFilter(dim_x=state, dim_z=obs, dim_u=1)
        kf.F, kf.Q, kf.H, kf.R = m["F"][0], m["Q"][0], m["H"][0], m["R"][0]
        kf.x, kf.P, kf.B = m["m0"][:, None], m["P0"], m["b"][0][:, None]
        means, covs, total = [], [], 0.0
        for t in range(steps):
            if t:
                kf.predict(u=np.ones((1, 1)))
            seen = bool(data.mask[0, t].all())
            kf.update(data.x[0, t].numpy()[:, None] if seen else None)
            total += kf.log_likelihood if seen else 0.0
            means.append(kf.x[:, 0].copy())
            covs.append(kf.P.copy())
        out = kalman_filter(system, *data, store="all", implementation=implementation)
        assert out.mean is not None
        assert out.cov is not None
        close(out.loglik[0], total)
        close(out.mean[0], np.stack(means))
        close(out.cov[0], np.stack(covs))


# ---------------------------------------------------------------- limits and exact observations


@each
def test_diffuse_is_the_limit_of_a_large_variance(implementation: Any) -> None:
    rng = np.random.default_rng(13)
    system = random_system(rng, 4, 2, diffuse=3)
    data = random_data(rng, 3, 12, 2)
    kappa = 1e5  # beyond, rounding errors of the limit, of order kappa^2, take over
    large = system._replace(P0=system.P0 + kappa * system.Pinf, Pinf=0 * system.Pinf)
    exact = kalman_smoother(system, *data, lag_one=True, implementation=implementation)
    limit = kalman_smoother(large, *data, lag_one=True, implementation=implementation)
    close(exact.loglik, limit.loglik + 1.5 * math.log(2 * math.pi * kappa), 1e-3)
    for a, b in zip(exact[1:4], limit[1:4], strict=True):
        assert a is not None
        assert b is not None
        close(a[0], b[0], 1e-3)


@each
def test_undetermined_state_is_reported(implementation: Any) -> None:
    """A trend needs two observations; with one, its variance stays infinite."""
    F = tensor([[1.0, 1.0], [0.0, 1.0]])[None, None]
    zero, eye = tensor(np.zeros((1, 2, 2))), tensor(np.eye(2))[None]
    system = System(
        F, zero[None], tensor([[[[1.0, 0.0]]]]), tensor([[[[1.0]]]]),
        zero[:, :1], tensor([[[0.0]]]), zero[:, 0], zero, eye,
    )  # fmt: skip
    x = tensor([[[4.0], [np.nan], [6.0]], [[4.0], [np.nan], [np.nan]]])
    data = (x, ~x.isnan(), torch.tensor([3, 3]))
    out = kalman_filter(system, *data, store="last", implementation=implementation)
    assert out.rank_left.tolist() == [0, 1]
    assert out.n_diffuse.tolist() == [2, 1]
    assert out.n_obs.tolist() == [0, 0]
    assert out.mean is not None
    assert out.cov is not None
    assert out.cov_inf is not None
    # The line through (0, 4) and (2, 6), each with error variance 1.
    close(out.mean[0, 0], [6.0, 1.0])
    close(out.cov[0, 0], [[1.0, 0.5], [0.5, 0.5]])
    # Known level at t = 0 and slope of variance kappa: level 2 steps on has 4 kappa.
    close(out.cov_inf[1, 0], [[4.0, 2.0], [2.0, 1.0]])
    assert not bool(out.cov_inf[0].any())


@each
def test_autoregression_observed_exactly(implementation: Any) -> None:
    """AR(2) in companion form with R = 0: the density is that of the regression errors."""
    phi, sigma = np.array([0.6, -0.3]), 0.7
    x = np.random.default_rng(17).standard_normal(40)
    F = tensor([[phi[0], phi[1]], [1.0, 0.0]])[None, None]
    zero = tensor(np.zeros((1, 1, 2)))
    P0 = tensor(np.eye(2))[None]
    system = System(
        F, tensor(np.diag([sigma**2, 0.0]))[None, None], tensor([[[[1.0, 0.0]]]]),
        tensor([[[[0.0]]]]), zero, zero[..., :1], zero[0], P0, 0 * P0,
    )  # fmt: skip
    errors = x[2:] - phi[0] * x[1:-1] - phi[1] * x[:-2]
    expected = -0.5 * np.sum(np.log(2 * np.pi * sigma**2) + errors**2 / sigma**2)
    expected += -0.5 * (np.log(2 * np.pi) + x[0] ** 2)
    first = sigma**2 + phi[1] ** 2
    expected += -0.5 * (np.log(2 * np.pi * first) + (x[1] - phi[0] * x[0]) ** 2 / first)
    data = (tensor(x)[None, :, None], torch.ones(1, 40, 1).bool(), torch.tensor([40]))
    out = kalman_smoother(system, *data, lag_one=True, implementation=implementation)
    close(out.loglik[0], expected)
    close(out.mean[0, :, 0], x)
    assert bool((out.cov[0, 1:] == 0).all())
    assert float(out.cov.diagonal(dim1=2, dim2=3).min()) >= 0


@each
def test_random_walk_has_the_density_of_its_differences(implementation: Any) -> None:
    """Diffuse elements add -1/2 log F_inf and no 2 pi, whatever the scale of the data."""
    for scale in (1e-8, 1.0, 1e8):
        x = scale * np.cumsum(np.random.default_rng(19).standard_normal(50))
        x[[7, 8, 20]] = np.nan
        seen = np.flatnonzero(~np.isnan(x))
        gaps, steps = np.diff(seen), np.diff(x[seen])
        variance = gaps * (0.5 * scale) ** 2
        expected = -0.5 * np.sum(np.log(2 * np.pi * variance) + steps**2 / variance)
        one, zero = tensor(np.ones((1, 1, 1, 1))), tensor(np.zeros((1, 1, 1)))
        walk = System(
            one, one * (0.5 * scale) ** 2, one, 0 * one, zero, zero, zero[0], zero, one[0]
        )
        y = tensor(x)[None, :, None]
        data = (y, ~y.isnan(), torch.tensor([50]))
        out = kalman_filter(walk, *data, store="likelihood", implementation=implementation)
        np.testing.assert_allclose(float(out.loglik[0]), expected, rtol=1e-10)


@each
def test_redundant_and_contradictory_observations(implementation: Any) -> None:
    """An exact copy of an exact observation adds nothing; a different value is impossible."""
    rng = np.random.default_rng(23)
    once = random_system(rng, 3, 2, noise="zero", diffuse=1)
    mix = tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    thrice = once._replace(H=mix @ once.H, R=tensor(np.zeros((1, 1, 3, 3))), d=once.d @ mix.T)
    x = tensor(rng.standard_normal((2, 10, 2)))
    copied = x @ mix.T
    copied[1, 6, 2] += 0.01
    lengths = torch.tensor([10, 10])
    plain = kalman_smoother(once, x, ~x.isnan(), lengths, lag_one=True)
    out = kalman_smoother(
        thrice, copied, ~copied.isnan(), lengths, lag_one=True, implementation=implementation
    )
    assert plain.lag_one is not None
    assert out.lag_one is not None
    close(out.loglik[0], plain.loglik[0])
    close(out.mean[0], plain.mean[0])
    close(out.cov[0], plain.cov[0])
    close(out.lag_one[0], plain.lag_one[0])
    assert float(out.loglik[1]) == -math.inf


@each
def test_covariances_stay_semi_definite(implementation: Any) -> None:
    """Near-unit root, exact observations, scales from 1e-6 to 1e4: no negative variance."""
    rng = np.random.default_rng(29)
    F = np.array([[0.999999, 1.0, 0.0], [0.0, 0.999999, 1e-4], [0.0, 0.0, 0.5]])
    system = random_system(rng, 3, 2, q_rank=1)._replace(
        F=tensor(F)[None, None],
        R=tensor(np.diag([1e-6, 0.0]))[None, None],
        P0=tensor(np.diag([1e4, 1.0, 1e-4]))[None],
    )
    steps = 60 if implementation == "reference" else 2000
    data = random_data(rng, 1, steps, 2)
    filtered = kalman_filter(system, *data, store="all", implementation=implementation)
    smoothed = kalman_smoother(system, *data, lag_one=False, implementation=implementation)
    assert filtered.cov is not None
    assert filtered.pred_cov is not None
    assert bool(filtered.loglik.isfinite().all())
    size = torch.linalg.eigvalsh(filtered.pred_cov)[..., -1]
    # The smoother subtracts: its errors are those of P N P, larger than those of P.
    for cov, tolerance in (
        (filtered.cov, 1e-15),
        (filtered.pred_cov, 1e-15),
        (smoothed.cov, 1e-6),
    ):
        assert torch.equal(cov, cov.mT)
        assert float(cov.diagonal(dim1=2, dim2=3).min()) >= 0.0
        assert float((torch.linalg.eigvalsh(cov)[..., 0] / size).min()) > -tolerance


# ---------------------------------------------------------------- derivatives and agreement


def test_autograd_equals_finite_differences_of_the_compiled_kernel() -> None:
    rng = np.random.default_rng(31)
    system = random_system(rng, 2, 2, diffuse=1, systems={"F": 3}, times={"H": 7})
    data = random_data(rng, 3, 7, 2)
    weights = tensor(rng.standard_normal(3))

    def total(values: System, **options: Any) -> Tensor:
        out = kalman_filter(values, *data, store="likelihood", **options)
        return (weights * out.loglik).sum()

    names = ("F", "Q", "H", "R", "b", "d", "m0", "P0")
    free = system._replace(**{k: getattr(system, k).clone().requires_grad_() for k in names})
    total(free).backward()  # the default implementation for tensors that need a gradient
    for name in names:
        field = getattr(system, name)
        direction = tensor(rng.standard_normal(field.shape))
        if name in ("Q", "R", "P0"):
            direction = direction + direction.mT
        step = 1e-5 * direction
        up = total(system._replace(**{name: field + step}), implementation="cpu")
        down = total(system._replace(**{name: field - step}), implementation="cpu")
        slope = float(up - down) / 2e-5
        gradient = getattr(free, name).grad
        assert gradient is not None
        np.testing.assert_allclose(float((gradient * direction).sum()), slope, rtol=1e-6, atol=1e-6)


def test_autograd_through_exact_and_missing_observations_is_finite() -> None:
    rng = np.random.default_rng(37)
    system = random_system(rng, 3, 2, noise="zero", diffuse=2, q_rank=1)
    data = random_data(rng, 3, 6, 2, missing=0.4)
    F = system.F.clone().requires_grad_()
    out = kalman_smoother(system._replace(F=F), *data, lag_one=True)
    assert out.lag_one is not None
    value = out.loglik.sum() + out.mean.nansum() + out.cov.nansum() + out.lag_one.nansum()
    value.backward()
    assert F.grad is not None
    assert bool(F.grad.isfinite().all())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(draw=st.data())
def test_implementations_agree(draw: Any) -> None:
    state = draw.draw(st.integers(1, 5), label="state")
    obs = draw.draw(st.integers(1, 4), label="obs")
    steps = draw.draw(st.integers(1, 8), label="steps")
    series = draw.draw(st.integers(1, 3), label="series")
    rng = np.random.default_rng(draw.draw(st.integers(0, 10**6), label="seed"))
    per_series = draw.draw(st.sets(st.sampled_from(FIELDS)), label="per series")
    varying = draw.draw(st.sets(st.sampled_from(FIELDS[:6])), label="time-varying")
    system = random_system(
        rng,
        state,
        obs,
        systems=dict.fromkeys(per_series, series),
        times=dict.fromkeys(varying, steps),
        diffuse=draw.draw(st.integers(0, state), label="diffuse"),
        noise=draw.draw(st.sampled_from(["full", "diagonal", "singular", "zero"]), label="noise"),
        q_rank=draw.draw(st.integers(0, state), label="rank of Q"),
    )
    data = random_data(rng, series, steps, obs, draw.draw(st.floats(0, 1), label="missing"))
    run: list[Callable[[str], Filtered | Smoothed]] = [
        lambda name: kalman_filter(system, *data, store="all", implementation=name),
        lambda name: kalman_filter(system, *data, store="last", implementation=name),
        lambda name: kalman_smoother(system, *data, lag_one=True, implementation=name),
    ]
    for function in run:
        compiled, reference = function("cpu"), function("reference")
        for name, a, b in zip(compiled._fields, compiled, reference, strict=True):
            assert (a is None) == (b is None), name
            if a is not None and b is not None:
                assert a.shape == b.shape, name
                assert a.dtype == b.dtype, name
                close(a, b, 1e-7)


@each
@cases
def test_what_is_stored_changes_nothing(case: str, implementation: Any) -> None:
    system, data = make_case(case, seed=4)
    every = kalman_filter(system, *data, store="all", implementation=implementation)
    last = kalman_filter(system, *data, store="last", implementation=implementation)
    only = kalman_filter(system, *data, store="likelihood", implementation=implementation)
    for a, b, c in zip(every[:6], last[:6], only[:6], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)
    assert only.mean is None
    assert only.cov is None
    assert only.cov_inf is None
    assert last.mean is not None
    assert last.cov is not None
    assert last.pred_mean is None
    assert every.mean is not None
    assert every.cov is not None
    for n in range(SERIES):
        end = int(data.lengths[n]) - 1
        assert torch.equal(last.mean[n, 0], every.mean[n, end])
        assert torch.equal(last.cov[n, 0], every.cov[n, end])


def test_threads_and_expanded_tensors_change_nothing() -> None:
    """A panel large enough for threads, against its series one by one."""
    rng = np.random.default_rng(41)
    system = random_system(rng, 3, 2, systems={"F": 60}, diffuse=1)
    data = random_data(rng, 60, 121, 2)
    expanded = system._replace(
        Q=system.Q.expand(60, 121, 3, 3),
        R=system.R.expand(1, 121, 2, 2),
        m0=system.m0.expand(60, 3),
    )
    panel = kalman_smoother(expanded, *data, lag_one=True, implementation="cpu")
    for n in range(0, 60, 7):
        own = system._replace(F=system.F[n : n + 1])
        part = Data(*(field[n : n + 1] for field in data))
        single = kalman_smoother(own, *part, lag_one=True, implementation="cpu")
        for a, b in zip(panel, single, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a[n].nan_to_num(0.0), b[0].nan_to_num(0.0))


def test_series_without_steps() -> None:
    system, data = make_case("diffuse")
    data = data._replace(lengths=torch.tensor([0, 5, 0, 2]))
    for name in IMPLEMENTATIONS:
        out = kalman_filter(system, *data, store="last", implementation=name)  # type: ignore[arg-type]
        assert out.mean is not None
        assert out.loglik[[0, 2]].tolist() == [0.0, 0.0]
        assert out.rank_left.tolist() == [2, 0, 2, out.rank_left[3]]
        assert out.mean.isnan().all(2)[:, 0].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"F": torch.zeros(1, 1, 3, 2).double()}, "F has shape"),
        ({"Q": torch.zeros(1, 5, 3, 3).double()}, "Q has shape"),
        ({"H": torch.zeros(2, 1, 3, 3).double()}, "H has shape"),
        ({"b": torch.zeros(1, 3).double()}, "b has shape"),
        ({"P0": torch.zeros(1, 3, 3)}, r"P0 is torch.float32; convert it with .double\(\)"),
        ({"x": torch.zeros(4, 9, 3)}, "x is torch.float32"),
        ({"mask": torch.ones(4, 9, 3)}, "mask is torch.float32"),
        ({"lengths": torch.tensor([9, 9, 9])}, "lengths is torch.int64 of shape"),
        ({"lengths": torch.tensor([9, 9, 9, 10])}, "lengths must lie between 0 and the 9 steps"),
    ],
)
@each
def test_bad_arguments(change: dict[str, Tensor], message: str, implementation: Any) -> None:
    system, data = make_case("shared")
    system = system._replace(**{k: v for k, v in change.items() if k in System._fields})
    data = data._replace(**{k: v for k, v in change.items() if k in Data._fields})
    with pytest.raises(ValueError, match=message):
        kalman_filter(system, *data, store="all", implementation=implementation)
    with pytest.raises(ValueError, match=message):
        kalman_smoother(system, *data, lag_one=False, implementation=implementation)


def test_choice_of_implementation() -> None:
    assert get_kernels("cpu").__name__ == "seqdgm.kernels.cpu"
    assert get_kernels("cuda").__name__ == "seqdgm.kernels.reference"
    with pytest.raises(ValueError, match="cannot read tensors on cuda"):
        get_kernels("cuda", "cpu")
    with pytest.raises(ValueError, match="use one of"):
        get_kernels("cpu", "fortran")  # type: ignore[arg-type]
    system, data = make_case("shared")
    system = system._replace(F=system.F.requires_grad_())
    with pytest.raises(ValueError, match="no gradient"):
        kalman_filter(system, *data, store="last", implementation="cpu")
    with torch.no_grad():
        assert not kalman_filter(system, *data, store="last").loglik.requires_grad
    names = ("lanes", "associative", "reference")
    assert [get_kernels("cpu", name).__name__.rpartition(".")[2] for name in names] == [
        "cpu_lanes",
        "associative",
        "reference",
    ]


def test_large_panels_take_the_vector_lanes() -> None:
    from seqdgm.kernels import LANES_PAY, LANES_WORTH, _kernels_for, cpu_lanes

    system, _ = make_case("shared")
    few = torch.zeros(LANES_PAY, 10, system.H.shape[2]).double()
    many = torch.zeros(LANES_WORTH, 10, system.H.shape[2]).double()
    assert _kernels_for(system, few, None) is not cpu_lanes
    assert (_kernels_for(system, many, None) is cpu_lanes) == cpu_lanes.supports(system, many)
