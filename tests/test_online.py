"""One observation at a time against all at once, and against statsmodels."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

import seqdgm as sq
from seqdgm.kernels import System

RNG = np.random.default_rng(0)
WALK = np.cumsum(RNG.standard_normal(60)) + 20.0
WALK[[17, 40, 41]] = np.nan
U = RNG.standard_normal((61, 2))


def same(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    expected = np.asarray(expected)
    size = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)


def trend() -> sq.LinearGaussianSSM:
    return sq.LinearGaussianSSM(
        F=[[1.0, 1.0], [0.0, 1.0]],
        H=[[1.0, 0.0]],
        Q=np.diag([0.5, 0.1]),
        R=[[1.0]],
        diffuse=True,
    )


def test_steps_equal_statsmodels() -> None:
    """Local linear trend with an exactly diffuse start; statsmodels keeps 2 pi for its elements."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    reference = UnobservedComponents(WALK, level="lltrend", use_exact_diffuse=True)
    result = reference.filter([1.0, 0.5, 0.1])
    online = trend().online()
    for t, x in enumerate(WALK):
        state, forecast = online.step(x)
        if t >= 1:
            same(state.mean[0], result.filtered_state[:, t])
            same(state.cov[0], result.filtered_state_cov[:, :, t])
        if 1 <= t < len(WALK) - 1:
            same(forecast.mean[0], result.forecasts[:, t + 1])
            same(forecast.std[0] ** 2, result.forecasts_error_cov[0, 0, t + 1])
    two_pi_of_two_elements = np.log(2 * np.pi)
    same(state.log_likelihood, result.llf_obs.sum() + two_pi_of_two_elements)


def test_a_diffuse_state_has_infinite_variance_until_it_is_determined() -> None:
    online = trend().online()
    assert np.isinf(online.predict().std).all()
    state, forecast = online.step(3.0)
    same(state.mean[0, 0], 3.0)
    same(state.cov[0, 0, 0], 1.0)
    assert np.isinf(state.std[0, 1])
    assert np.isinf(forecast.std).all()
    state, forecast = online.step(5.0)
    assert np.isfinite(state.cov).all()
    assert np.isfinite(forecast.std).all()
    for t in (1, 2):
        expected = trend().filter(np.array([3.0, 5.0])[:t])
        same(expected.log_likelihood, trend().log_prob(np.array([3.0, 5.0])[:t]).value)
    same(state.mean, expected.mean[:, -1])
    same(state.cov, expected.cov[:, -1])


MODELS = {
    "level": lambda: sq.StructuralSSM(),
    "seasonal": lambda: sq.StructuralSSM(trend="stochastic", seasonal=4),
    "logs": lambda: sq.ARIMA((1, 1, 1), transform="log"),
    "trend line": lambda: sq.ARIMA((1, 1, 0), trend="ct"),
    "learned": lambda: sq.LinearGaussianSSM(latent_dim=2, scale="standard"),
}


@pytest.mark.parametrize("name", MODELS)
def test_steps_after_a_fit_equal_the_filter_and_the_forecast(name: str) -> None:
    model = MODELS[name]().fit(WALK[:30])
    held = model.data_
    online = model.online()
    before = model.forecast(1)
    same(online.predict().mean, before.mean[:, 0])
    for x in WALK[30:]:
        state, forecast = online.step(x)
    whole = model.filter(WALK)
    same(state.mean, whole.mean[:, -1])
    same(state.cov, whole.cov[:, -1])
    same(state.log_likelihood, whole.log_likelihood)
    same(state.log_likelihood, model.log_prob(WALK).value)
    assert state.n_steps.tolist() == [60]
    ahead = model.forecast(1, WALK)
    same(forecast.mean, ahead.mean[:, 0])
    draws = np.log(ahead.quantiles(np.array([0.1, 0.9]))) if name == "logs" else None
    if draws is None:
        lo, hi = ahead.interval(80)
        same(2 * 1.2815515655446004 * forecast.std, (hi - lo)[:, 0])
    else:
        s2 = ((draws[1] - draws[0]) / (2 * 1.2815515655446004)) ** 2
        same(forecast.std, (ahead.mean * np.sqrt(np.expm1(s2)))[:, 0])
    assert model.data_ is held


INPUTS = {
    "regression": lambda: sq.StructuralSSM(time_varying_regression=True),
    "arimax": lambda: sq.ARIMA((1, 0, 0), trend="c"),
    "learned": lambda: sq.LinearGaussianSSM(latent_dim=1),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_those_of_the_step(name: str) -> None:
    y = WALK + U[:60] @ [3.0, -2.0]
    model = INPUTS[name]().fit(y[:40], inputs=U[:40])
    online = model.online()
    for t in range(40, 60):
        state, forecast = online.step(y[t], inputs=U[t], next_inputs=U[t + 1])
    whole = model.filter(y, inputs=U[:60])
    same(state.mean, whole.mean[:, -1])
    same(state.cov, whole.cov[:, -1])
    same(state.log_likelihood, whole.log_likelihood)
    ahead = model.forecast(1, y, inputs=U)
    same(forecast.mean, ahead.mean[:, 0])
    same(online.predict(U[60]).std, forecast.std)
    assert online.step(np.nan, inputs=U[60])[1] is None
    with pytest.raises(ValueError, match="give inputs"):
        online.step(1.0)
    with pytest.raises(ValueError, match="cannot be missing"):
        online.step(1.0, inputs=[np.nan, 1.0])


def test_a_ragged_panel_steps_from_the_end_of_each_series() -> None:
    """Own coefficients, and a trend line, so that every series has its own clock."""
    lengths, more = (30, 42, 36), 12
    whole = [np.cumsum(RNG.standard_normal(n + more)) for n in lengths]
    model = sq.ARIMA((1, 1, 0), trend="ct").fit([y[:-more] for y in whole])
    online = model.online()
    for k in range(more):
        state, forecast = online.step(np.array([[y[len(y) - more + k]] for y in whole]))
    expected = model.filter(whole)
    assert state.n_steps.tolist() == [n + more for n in lengths]
    for n, y in enumerate(whole):
        same(state.mean[n], expected.mean[n, len(y) - 1])
        same(state.cov[n], expected.cov[n, len(y) - 1])
    same(state.log_likelihood, expected.log_likelihood)
    same(forecast.mean, model.forecast(1, whole).mean[:, 0])


def test_vectors_may_be_partly_missing() -> None:
    F, H = [[0.7, 0.2], [0.0, 0.5]], [[1.0, 0.0], [0.5, 1.0], [0.0, 1.0]]
    R = [[1.0, 0.4, 0.0], [0.4, 1.0, 0.2], [0.0, 0.2, 1.0]]
    model = sq.LinearGaussianSSM(F=F, H=H, Q=np.eye(2), R=R, m0=[0.0, 0.0], P0=np.eye(2))
    x = RNG.standard_normal((2, 15, 3))
    x[RNG.random(x.shape) < 0.3] = np.nan
    online = model.online(n_series=2)
    expected = model.filter(x)
    for t in range(15):
        state, forecast = online.step(x[:, t])
        same(state.mean, expected.mean[:, t])
        same(state.cov, expected.cov[:, t])
    same(state.log_likelihood, expected.log_likelihood)
    lo, hi = model.forecast(1, x).interval(80)
    same(2 * 1.2815515655446004 * forecast.std, (hi - lo)[:, 0])


def test_memory_does_not_grow() -> None:
    online = sq.ARIMA((1, 1, 1), trend="t").fit(WALK).online()
    online.step(1.0)
    tracemalloc.start()
    try:
        held = []
        for _ in range(4):
            for _ in range(500):
                online.step(1.0)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        # What is loaded or cached on the way grows once; a memory of the past grows every time, by
        # one number of 8 bytes a step at the least.
        assert np.diff(held).min() < 500 * 8, held
    finally:
        tracemalloc.stop()


def test_what_is_handed_out_is_a_copy() -> None:
    online, again = trend().online(), trend().online()
    for x in WALK[:6]:
        state, _ = online.step(x)
        expected, _ = again.step(x)
        same(state.mean, expected.mean, 0.0)
        for part in (state.mean, state.cov, state.log_likelihood, state.n_steps):
            part[...] = 7


class Squared(sq.StateSpaceModel):
    """A random walk whose step depends on the square of its input."""

    engines = ("kalman",)
    latent_dim = 1

    def input_width(self) -> int:
        return 1

    def linear_gaussian(self, u: torch.Tensor, rows: torch.Tensor) -> System:
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        zero = torch.zeros(1, 1, 1, dtype=torch.float64)
        return System(one, one, one, one, u**2, zero, zero[0], one[0], 0 * one[0])


def test_matrices_that_are_not_affine_are_refused() -> None:
    with pytest.raises(ValueError, match="affine in the inputs"):
        Squared().online()


def test_bad_steps_change_nothing() -> None:
    model = sq.ARIMA((1, 0, 0), transform="log").fit(WALK)
    online, again = model.online(), model.online()
    bad: list[Any] = [-1.0, 0.0, np.inf, [1.0, 2.0], np.ones((2, 1))]
    for x in bad:
        with pytest.raises(ValueError, match=r"domain|infinite|has shape"):
            online.step(x)
    same(online.step(20.0)[0].mean, again.step(20.0)[0].mean, 0.0)
    with pytest.raises(ValueError, match="n_series"):
        model.online(n_series=2)
    with pytest.raises(ValueError, match="not fitted"):
        sq.ARIMA().online()


def test_a_lag_reaches_the_smoother_through_the_verb() -> None:
    model = sq.StructuralSSM(trend="stochastic").fit(WALK)
    lagged, lag = model.smooth(lag=3), 3
    for t in (5, 30, 50, 59):
        cut = model.smooth(WALK[: t + lag + 1])
        same(lagged.mean[0, t], cut.mean[0, t])
        same(lagged.cov[0, t], cut.cov[0, t])
    with pytest.raises(ValueError, match="joint law"):
        lagged.sample(1)
    with pytest.raises(ValueError, match="diffuse initial state"):
        trend().smooth(WALK, lag=3, method="particle")


def test_ways_to_go_on_equal_those_of_statsmodels() -> None:
    """append is update, apply is y=, extend is online; as the documents say."""
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    y = WALK - 20.0
    old, new, other = y[:40], y[40:], y[20:50]
    reference = SARIMAX(old, order=(1, 0, 0), measurement_error=True)
    fitted = reference.filter([0.8, 0.3, 0.5])
    held = sq.LinearGaussianSSM(
        F=[[0.8]], H=[[1.0]], Q=[[0.5]], R=[[0.3]], m0=[0.0], P0=[[0.5 / (1 - 0.8**2)]]
    ).fit(old)
    online = held.online()
    for x in new:
        state, _ = online.step(x)
    extended = fitted.extend(new)
    same(state.mean[0], extended.filtered_state[:, -1])
    same(state.cov[0], extended.filtered_state_cov[:, :, -1])
    same(held.forecast(len(new)).log_prob(new).value, extended.llf)
    same(held.filter(other).mean[0], fitted.apply(other).filtered_state.T)
    same(held.update(new).filter().mean[0], fitted.append(new).filtered_state.T)
    same(held.log_prob().value, fitted.append(new).llf)
