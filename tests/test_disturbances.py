"""Smoothed disturbances and fixed-lag moments against dense Gaussians and statsmodels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_kalman_kernels import CASES, SERIES, close, dense, joint, make_case, matrices, tensor

import seqdgm as sq
from seqdgm.inference.disturbances import disturbances, fixed_lag
from seqdgm.kernels import System, kalman_smoother

cases = pytest.mark.parametrize("case", CASES)


# ---------------------------------------------------------------- disturbances


def augmented(system: System, steps: int) -> System:
    """The same model with the state (z_t, w_t, v_t), so that its smoother gives disturbances."""
    n = max(len(field) for field in system)
    obs, z = system.H.shape[2:]

    def wide(field: torch.Tensor) -> torch.Tensor:
        return field.expand(n, steps, *field.shape[2:])

    F, Q, H, R, b = (wide(getattr(system, name)) for name in ("F", "Q", "H", "R", "b"))
    zeros = torch.zeros(n, steps, 2 * z + obs, 2 * z + obs, dtype=torch.float64)
    transition, shock = zeros.clone(), zeros.clone()
    transition[..., :z, :z] = F
    for rows in (slice(0, z), slice(z, 2 * z)):
        for cols in (slice(0, z), slice(z, 2 * z)):
            shock[..., rows, cols] = Q
    shock[..., 2 * z :, 2 * z :] = R
    start = torch.zeros(n, 2 * z + obs, dtype=torch.float64)
    start[:, :z] = system.m0
    spread, diffuse = zeros[:, 0].clone(), zeros[:1, 0].clone()
    spread[:, :z, :z], spread[:, 2 * z :, 2 * z :] = system.P0, R[:, 0]
    diffuse[:, :z, :z] = system.Pinf
    eye = torch.eye(obs, dtype=torch.float64).expand(n, steps, obs, obs)
    return System(
        F=transition,
        Q=shock,
        H=torch.cat([H, torch.zeros(n, steps, obs, z, dtype=torch.float64), eye], 3),
        R=torch.zeros(1, 1, obs, obs, dtype=torch.float64),
        b=torch.cat([b, torch.zeros(n, steps, z + obs, dtype=torch.float64)], 2),
        d=system.d,
        m0=start,
        P0=spread,
        Pinf=diffuse,
    )


@cases
def test_disturbances_equal_those_of_a_dense_gaussian(case: str) -> None:
    system, data = make_case(case)
    out = disturbances(system, *data)
    z, obs = system.H.shape[3], system.H.shape[2]
    big = augmented(system, data.x.shape[1])
    for n in range(SERIES):
        x, mask, steps = data.series(n)
        expected = dense(big, x, mask, n, steps)
        size = 2 * z + obs
        for t in range(steps):
            block = expected.cov[t * size : (t + 1) * size, t * size : (t + 1) * size]
            if t:
                close(out.state_mean[n, t], expected.mean[t, z : 2 * z])
                close(out.state_cov[n, t], block[z : 2 * z, z : 2 * z])
            close(out.obs_mean[n, t], expected.mean[t, 2 * z :])
            close(out.obs_cov[n, t], block[2 * z :, 2 * z :])
        assert bool(out.state_mean[n, 0].isnan().all())
        for part in (out.state_mean, out.state_cov, out.obs_mean, out.obs_cov, out.obs_residual):
            assert bool(part[n, steps:].isnan().all())


@cases
def test_disturbances_equal_differences_of_smoothed_moments(case: str) -> None:
    """E[w] = z_t - F z_t-1 - b and its variance, which need mean, cov and lag_one only."""
    system, data = make_case(case, seed=1)
    out, smoothed = disturbances(system, *data), kalman_smoother(system, *data, lag_one=True)
    assert smoothed.lag_one is not None
    F, b = (field if field.shape[1] == 1 else field[:, 1:] for field in (system.F, system.b))
    before, after = smoothed.mean[:, :-1], smoothed.mean[:, 1:]
    mean = after - (F @ before[..., None])[..., 0] - b
    cross = F @ smoothed.lag_one.mT
    cov = smoothed.cov[:, 1:] + F @ smoothed.cov[:, :-1] @ F.mT - cross - cross.mT
    for actual, expected in ((out.state_mean, mean), (out.state_cov, cov)):
        for n, length in enumerate(data.lengths.tolist()):
            close(actual[n, 1:length], expected[n, : length - 1])


STRUCTURAL: dict[str, dict[str, Any]] = {
    "level": {"level": "llevel"},
    "seasonal": {"level": "lltrend", "seasonal": 4},
    "smooth trend": {"level": "strend"},
    "AR": {"level": "llevel", "autoregressive": 2},
}


def from_statsmodels(y: np.ndarray, options: dict[str, Any], seed: int) -> tuple[Any, System]:
    """A random member of statsmodels' structural models, and the same system."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    model = UnobservedComponents(y, use_exact_diffuse=True, **options)
    rng = np.random.default_rng(seed)
    raw = model.transform_params(rng.standard_normal(len(model.start_params)))
    result = model.smooth(raw)
    form = model.ssm
    T, design, selection = form["transition"], form["design"], form["selection"]
    constant, diffuse, proper = form.initialization(model=form)
    return result, System(
        F=tensor(T)[None, None],
        Q=tensor(selection @ form["state_cov"] @ selection.T)[None, None],
        H=tensor(design)[None, None],
        R=tensor(form["obs_cov"])[None, None],
        b=torch.zeros(1, 1, len(T), dtype=torch.float64),
        d=torch.zeros(1, 1, 1, dtype=torch.float64),
        m0=tensor(constant)[None],
        P0=tensor(proper)[None],
        Pinf=tensor(diffuse)[None],
    )


def walk(seed: int, steps: int = 50) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y = np.cumsum(rng.standard_normal(steps)) + rng.standard_normal(steps)
    y[[0, 10, 11, 30]] = np.nan
    return y


@pytest.mark.parametrize("name", STRUCTURAL)
def test_disturbances_equal_statsmodels(name: str) -> None:
    y = walk(0)
    result, system = from_statsmodels(y, STRUCTURAL[name], 1)
    x = tensor(y)[None, :, None]
    out = disturbances(system, x, ~x.isnan(), torch.tensor([len(y)]))
    selection = result.model.ssm["selection"]
    mean = (selection @ result.smoothed_state_disturbance).T
    cov = selection @ result.smoothed_state_disturbance_cov.transpose(2, 0, 1) @ selection.T
    close(out.state_mean[0, 1:], mean[:-1])
    close(out.state_cov[0, 1:], cov[:-1])
    close(out.obs_mean[0], result.smoothed_measurement_disturbance.T)
    close(out.obs_cov[0, :, 0, 0], result.smoothed_measurement_disturbance_cov[0, 0])


def test_auxiliary_residuals_are_standard_normal_under_the_model() -> None:
    """Their exact variance under the model: the smoothed disturbance is linear in the data."""
    system, data = make_case("own", seed=2)
    out = disturbances(system, *data)
    n, (x, mask, steps) = 1, data.series(1)
    m = matrices(system, n, steps)
    mean, cov, _ = joint(m, steps)
    z, obs = system.H.shape[3], system.H.shape[2]
    H, R = np.zeros((steps * obs, steps * z)), np.zeros((steps * obs, steps * obs))
    for t in range(steps):
        H[t * obs : (t + 1) * obs, t * z : (t + 1) * z] = m["H"][t]
        R[t * obs : (t + 1) * obs, t * obs : (t + 1) * obs] = m["R"][t]
    seen = mask.ravel()
    sigma = (H @ cov @ H.T + R)[np.ix_(seen, seen)]
    gap = x.ravel()[seen] - m["d"].ravel()[seen] - (H @ mean)[seen]
    gain = R[:, seen] @ np.linalg.inv(sigma)
    standard = (gain @ gap) / np.sqrt(np.diag(gain @ sigma @ gain.T))
    close(out.obs_residual[n, :steps].ravel(), standard)
    lead = np.zeros((steps * z, steps * z))
    for t in range(1, steps):
        lead[t * z : (t + 1) * z, (t - 1) * z : t * z] = m["F"][t]
    reach = cov - lead @ cov
    gain = (reach @ H.T)[:, seen] @ np.linalg.inv(sigma)
    standard = ((gain @ gap) / np.sqrt(np.diag(gain @ sigma @ gain.T))).reshape(steps, z)
    close(out.state_residual[n, 1:steps], standard[1:])


def test_an_exact_observation_has_no_auxiliary_residual() -> None:
    system, data = make_case("zero R")
    out = disturbances(system, *data)
    assert bool(out.obs_residual.isnan().all())
    assert float(out.obs_cov[0].abs().max()) == 0.0


# ---------------------------------------------------------------- fixed lag


@cases
@pytest.mark.parametrize("lag", [1, 3])
def test_fixed_lag_equals_dense(case: str, lag: int) -> None:
    system, data = make_case(case, seed=3)
    loglik, mean, cov = fixed_lag(system, *data, lag)
    state, proper = mean.shape[-1], 0
    for n in range(SERIES):
        x, mask, steps = data.series(n)
        close(loglik[n], dense(system, x, mask, n, steps).loglik)
        for t in range(steps):
            to = min(t + lag + 1, steps)
            if not bool(cov[n, t].isfinite().all()):
                continue
            proper += 1
            expected = dense(system, x[:to], mask[:to], n, to)
            place = slice(t * state, (t + 1) * state)
            close(mean[n, t], expected.mean[t])
            close(cov[n, t], expected.cov[place, place])
        assert bool(mean[n, steps:].isnan().all())
    assert proper >= 3 * SERIES


def test_fixed_lag_equals_statsmodels_on_truncated_data() -> None:
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    y, lag = walk(3), 4
    result, system = from_statsmodels(y, STRUCTURAL["seasonal"], 4)
    x = tensor(y)[None, :, None]
    _, mean, cov = fixed_lag(system, x, ~x.isnan(), torch.tensor([len(y)]), lag)
    for t in range(12, len(y)):
        cut = UnobservedComponents(
            y[: t + lag + 1], use_exact_diffuse=True, **STRUCTURAL["seasonal"]
        )
        expected = cut.smooth(result.params)
        close(mean[0, t], expected.smoothed_state[:, t], 1e-8)
        close(cov[0, t], expected.smoothed_state_cov[:, :, t], 1e-8)


@pytest.mark.parametrize("case", ["own", "diffuse", "zero R"])
def test_a_lag_beyond_the_end_is_the_smoother(case: str) -> None:
    system, data = make_case(case, seed=5)
    _, mean, cov = fixed_lag(system, *data, lag=50)
    smoothed = kalman_smoother(system, *data, lag_one=False)
    close(mean, smoothed.mean)
    close(cov, smoothed.cov)


def test_what_the_lag_leaves_undetermined_is_infinite() -> None:
    """A local linear trend needs two observations: none, one, then both elements are known."""
    model = sq.LinearGaussianSSM(
        F=[[1.0, 1.0], [0.0, 1.0]],
        H=[[1.0, 0.0]],
        Q=np.eye(2),
        R=[[1.0]],
        diffuse=True,
    )
    y = np.array([1.0, np.nan, 2.0, 4.0])
    x = tensor(y)[None, :, None]
    system = model.linear_gaussian(torch.zeros(1, 4, 0), torch.tensor([0]))
    _, _, cov = fixed_lag(system, x, ~x.isnan(), torch.tensor([4]), 1)
    assert cov[0, 0, 0, 0] == pytest.approx(1.0)
    assert bool(torch.isinf(cov[0, 0, 1, 1]))
    expected = dense(system, x[0, :3].numpy(), ~np.isnan(y[:3])[:, None], 0, 3)
    close(cov[0, 1], expected.cov[2:4, 2:4])


def test_a_lag_is_a_whole_number() -> None:
    system, data = make_case("shared")
    with pytest.raises(ValueError, match="lag"):
        fixed_lag(system, *data, 0)
