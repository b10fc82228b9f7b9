"""Three hundred random models with gaps: likelihoods and smoothed moments equal statsmodels'."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import pytest
import scipy.linalg
import torch
from statsmodels.tsa.statespace.kalman_smoother import SmootherResults
from statsmodels.tsa.statespace.sarimax import SARIMAX
from statsmodels.tsa.statespace.structural import UnobservedComponents
from statsmodels.tsa.statespace.varmax import VARMAX

import seqdgm as sq
from seqdgm.models._arima import ArimaSpec, constrain

SEEDS = range(100)
LIKELIHOOD, MOMENTS = 1e-7, 1e-6
AR = {"ar.L1": 0.5, "ar.L2": -0.3, "ar.L3": 0.2}
# Observations that hardly determine the regression coefficients take digits from everybody.
ILL_CONDITIONED = 24
LOG_2PI = float(np.log(2 * np.pi))


class Signal(NamedTuple):
    """What a model says about its noise-free observations given all data, (time, obs)."""

    loglik: float
    mean: np.ndarray
    variance: np.ndarray


def their_signal(results: SmootherResults, n_diffuse: int = 0) -> Signal:
    """Signal of a smoother of statsmodels, which keeps the 2 pi of diffuse elements."""
    Z, d = results.design, results.obs_intercept
    mean = np.einsum(
        "dzt,zt->td", np.broadcast_to(Z, (*Z.shape[:2], results.nobs)), _means(results)
    )
    cov = results.smoothed_state_cov
    variance = np.einsum("dzt,zyt,dyt->td", *_over_time(Z, cov, Z))
    return Signal(results.llf + 0.5 * n_diffuse * LOG_2PI, mean + d.T, variance)


def _means(results: SmootherResults) -> np.ndarray:
    return np.asarray(results.smoothed_state)


def _over_time(*arrays: np.ndarray) -> list[np.ndarray]:
    steps = max(a.shape[-1] for a in arrays)
    return [np.broadcast_to(a, (*a.shape[:-1], steps)) for a in arrays]


def our_signal(model: Any, y: np.ndarray, u: np.ndarray | None) -> Signal:
    """Signal through the public verbs and the model's own matrices."""
    states = model.smooth(y, u)
    steps = len(y)
    known = torch.zeros(1, steps, 0) if u is None else torch.from_numpy(u)[None]
    system = model.linear_gaussian(known.double(), torch.tensor([0]))
    H = np.broadcast_to(system.H[0].numpy(), (steps, *system.H.shape[2:]))
    mean = np.einsum("tdz,tz->td", H, states.mean[0]) + system.d[0].numpy()
    variance = np.einsum("tdz,tzy,tdy->td", H, states.cov[0], H)
    return Signal(float(model.log_prob(y, u)), mean, variance)


def gap(ours: Signal, theirs: Signal, y: np.ndarray) -> float:
    """Largest difference of smoothed moments, relative to their size and that of the data."""
    mean = np.abs(ours.mean - theirs.mean) / (np.nanstd(y) + np.nanmax(np.abs(y)))
    variance = np.abs(ours.variance - theirs.variance) / (np.nanvar(y) + theirs.variance)
    return float(max(mean.max(), variance.max()))


def assert_equal(ours: Signal, theirs: Signal, y: np.ndarray) -> None:
    assert ours.loglik == pytest.approx(theirs.loglik, rel=LIKELIHOOD, abs=LIKELIHOOD)
    assert gap(ours, theirs, y) < MOMENTS


def exact_variance(model: Any, y: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Smoothed variance of the signal with a hundred digits and a diffuse variance of 1e30."""
    system = model.linear_gaussian(torch.from_numpy(u)[None], torch.tensor([0]))

    def at(field: torch.Tensor, t: int) -> mp.matrix:
        return mp.matrix(field[0, t if field.shape[1] > 1 else 0].tolist())

    with mp.workdps(100):
        P = mp.matrix(system.P0[0].tolist()) + mp.mpf(10) ** 30 * mp.matrix(system.Pinf[0].tolist())
        tiny = mp.mpf(10) ** -60 * mp.eye(P.rows)
        predicted, filtered = [], []
        for t, value in enumerate(y[:, 0]):
            P = at(system.F, t) * P * at(system.F, t).T + at(system.Q, t) if t else P
            predicted.append(P)
            if np.isfinite(value):
                M = P * at(system.H, t).T
                P = P - M * M.T / ((at(system.H, t) * M)[0] + at(system.R, t)[0])
            filtered.append(P)
        out, V = [], filtered[-1]
        for t in reversed(range(len(y))):
            if t < len(y) - 1:
                J = filtered[t] * at(system.F, t + 1).T * (predicted[t + 1] + tiny) ** -1
                V = filtered[t] + J * (V - predicted[t + 1]) * J.T
            out.append(float((at(system.H, t) * V * at(system.H, t).T)[0]))
    return np.array(out[::-1])[:, None]


def with_gaps(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Some elements missing at random, and a run of whole steps."""
    out = np.where(rng.random(y.shape) < rng.uniform(0.0, 0.3), np.nan, y)
    start = int(rng.integers(0, len(y) - 10))
    out[start : start + int(rng.integers(0, 10))] = np.nan
    return out


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_sarimax(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, d, q, P, D, Q = (int(rng.integers(0, top + 1)) for top in (3, 2, 3, 1, 1, 1))
    s = int(rng.integers(4, 13)) if P + D + Q else 0
    trend = [None, "c", "t", "ct"][int(rng.integers(0, 4))]
    n_inputs = int(rng.integers(0, 3))
    spec = ArimaSpec(p, d, q, P, D, Q, s, trend, n_inputs)
    steps = int(rng.integers(60, 120))
    y = rng.normal(size=steps)
    for lag in [1] * d + [s] * D:
        for t in range(lag, steps):
            y[t] += y[t - lag]
    y = with_gaps(rng, y)
    u = rng.normal(size=(steps, n_inputs)) if n_inputs else None
    coefficients = constrain(spec, 0.7 * rng.normal(size=(1, spec.n_free)))
    model = sq.ARIMA((p, d, q), seasonal=(P, D, Q, s), trend=trend)
    model.build(1, n_inputs)
    model.coefficients_ = torch.from_numpy(coefficients)
    model.sigma2_ = torch.tensor([0.8], dtype=torch.float64)
    ar, ma, sar, sma, own_trend, beta = spec.split(coefficients)
    order = {"order": (p, d, q), "seasonal_order": (P, D, Q, s), "trend": trend}
    theirs = SARIMAX(y, exog=u, **order, use_exact_diffuse=True)
    theirs.ssm.loglikelihood_burn = 0
    params = np.concatenate([own_trend, beta, ar, ma, sar, sma, [[0.8]]], axis=1)[0]
    theirs.update(params)
    expected = their_signal(theirs.ssm.smooth(), spec.n_diff)
    assert_equal(our_signal(model, y[:, None], u), expected, y)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_structural(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    level = ["local level", "local linear trend", "smooth trend", "random walk with drift"]
    kind = level[int(rng.integers(0, 4))]
    ours: dict[str, Any] = {
        "local level": {},
        "local linear trend": {"trend": "stochastic"},
        "smooth trend": {"level": "deterministic", "trend": "stochastic"},
        "random walk with drift": {"trend": "deterministic", "irregular": False},
    }[kind]
    theirs: dict[str, Any] = {"level": kind}
    if rng.random() < 0.4:
        ours["seasonal"] = theirs["seasonal"] = int(rng.integers(3, 13))
    elif rng.random() < 0.5:
        period = 2 * int(rng.integers(2, 6)) + 1
        ours |= {"seasonal": period, "seasonal_kind": "trigonometric"}
        theirs["freq_seasonal"] = [{"period": period}]
    if rng.random() < 0.3:
        ours["ar"] = theirs["autoregressive"] = int(rng.integers(1, 4))
    n_inputs = int(rng.integers(0, 3))
    steps = int(rng.integers(50, 110))
    u = rng.normal(size=(steps, n_inputs)) if n_inputs else None
    y = with_gaps(rng, np.cumsum(rng.normal(size=steps)) + 3 * np.sin(np.arange(steps)))
    model = sq.StructuralSSM(**ours)
    model.build(1, n_inputs)
    known = {
        name: AR[name] if name in AR else float(rng.uniform(0.05, 2.0))
        for name in model.parameter_names
    }
    model.parameters_ = torch.tensor([list(known.values())], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = UnobservedComponents(
            y, exog=u, mle_regression=False, use_exact_diffuse=True, **theirs
        )
    seasons = [name for name in known if name.startswith("sigma2.seasonal")]
    peer.update([known[seasons.pop(0) if "seasonal" in n else n] for n in peer.param_names])
    expected = their_signal(peer.ssm.smooth(), model.spec_.n_diffuse)
    found = our_signal(model, y[:, None], u)
    if seed == ILL_CONDITIONED:
        truth = exact_variance(model, y[:, None], u)
        off = np.abs(found.variance / truth - 1).max()
        assert off < 1e-5
        assert off < np.abs(expected.variance / truth - 1).max()
        return
    assert_equal(found, expected, y)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_vector_autoregression(seed: int) -> None:
    rng = np.random.default_rng(2000 + seed)
    dim, p, q = int(rng.integers(2, 5)), int(rng.integers(1, 4)), int(rng.integers(0, 2))
    noisy = bool(rng.random() < 0.5)
    steps = int(rng.integers(40, 90))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blank = np.zeros((steps, dim))
        peer = VARMAX(blank, order=(p, q), trend="c", measurement_error=noisy)
    params = peer.transform_params(0.1 * rng.normal(size=peer.k_params))
    for k, name in enumerate(peer.param_names):
        if name.startswith(("sqrt.var", "measurement")):
            params[k] = rng.uniform(0.5, 1.5)  # a nearly singular one leaves no digits to compare
    y = with_gaps(rng, peer.simulate(params, steps, rng=rng))
    peer.ssm.bind(np.array(y))
    peer.update(params)
    ssm = peer.ssm
    ssm.tolerance = 0
    F, S = ssm["transition"], ssm["selection"]
    Q, H = S @ ssm["state_cov"] @ S.T, ssm["design"]
    c = ssm["state_intercept"].reshape(len(F), -1)
    assert (c == c[:, :1]).all()
    model = sq.LinearGaussianSSM(
        F=F,
        H=H,
        Q=Q,
        R=ssm["obs_cov"],
        b=c[:, 0],
        m0=np.linalg.solve(np.eye(len(F)) - F, c[:, 0]),
        P0=scipy.linalg.solve_discrete_lyapunov(F, Q),
    )
    expected = their_signal(ssm.smooth())
    assert_equal(our_signal(model, y, None), expected, y)
