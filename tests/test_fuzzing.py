"""Whatever the shape, gaps, scale or constancy of the data: a result or a clear error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import seqdgm as sq
from seqdgm.kernels import System, kalman_filter, kalman_smoother

FITS = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALES = st.sampled_from([1e-8, 1e-3, 1.0, 1e4, 1e8])


@st.composite
def panels(draw: Any, columns: int = 1) -> np.ndarray | list[np.ndarray]:
    """A panel of any length, gaps, scale and level, with constant series among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 4))
    lengths = [draw(st.integers(1, 40)) for _ in range(n)]
    scale, level = draw(SCALES), draw(st.sampled_from([0.0, 1.0, -1e6]))
    gaps = draw(st.sampled_from([0.0, 0.1, 0.5, 0.95]))
    kind = draw(st.sampled_from(["noise", "walk", "constant", "line", "spike"]))
    out = []
    for length in lengths:
        noise = rng.normal(size=(length, columns))
        shape: dict[str, np.ndarray] = {
            "noise": noise,
            "walk": noise.cumsum(0),
            "constant": np.zeros((length, columns)),
            "line": np.arange(length, dtype=float)[:, None] * np.ones(columns),
            "spike": np.where(np.arange(length)[:, None] == length // 2, 1e6, 0.0) + 0 * noise,
        }
        x = scale * (shape[kind] + level)
        x[rng.random(x.shape) < gaps] = np.nan
        out.append(x)
    return out


def assert_usable(call: Any) -> Any:
    """The result of a call, or None where it refuses with an error that says why."""
    try:
        return call()
    except ValueError as error:
        text = str(error)
        assert len(text) > 20, text
        assert "index" not in text or "time" in text, text
        return None


def assert_numbers(*arrays: Any) -> None:
    for array in arrays:
        assert not np.isnan(np.asarray(array)).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: sq.ARIMA((1, 1, 1)),
        lambda: sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 4)),
        lambda: sq.ARIMA((2, 0, 0), trend="ct"),
        lambda: sq.SeasonalNaive(3),
        lambda: sq.StructuralSSM(trend="stochastic", seasonal=4),
        lambda: sq.LinearGaussianSSM(latent_dim=2),
    ],
    ids=["arima", "seasonal", "trend", "naive", "structural", "linear"],
)
@pytest.mark.slow
@given(data=panels())
@FITS
def test_fit_and_forecast(make: Any, data: Any) -> None:
    fitted = assert_usable(lambda: make().fit(data, seed=1))
    if fitted is None:
        return
    inside = [np.isfinite(x).any() for x in data]
    assert all(inside)
    forecast = assert_usable(lambda: fitted.forecast(3))
    if forecast is not None:
        low, high = forecast.interval(90)
        assert_numbers(forecast.mean, low, high)
        assert (low <= high).all()
    states = assert_usable(fitted.smooth)
    if states is not None:
        for k, x in enumerate(data):
            assert_numbers(states.mean[k, : len(x)])
            assert (np.diagonal(states.cov[k, : len(x)], axis1=-2, axis2=-1) >= 0).all()
    value = assert_usable(fitted.log_prob)
    if value is not None:
        assert_numbers(value.value)


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 3),
    steps=st.integers(1, 12),
    obs=st.integers(1, 3),
    state=st.integers(1, 4),
    scale=SCALES,
    gaps=st.sampled_from([0.0, 0.3, 1.0]),
    singular=st.booleans(),
    diffuse=st.integers(0, 4),
)
@RELAXED
def test_kernels(
    seed: int,
    n: int,
    steps: int,
    obs: int,
    state: int,
    scale: float,
    gaps: float,
    singular: bool,
    diffuse: int,
) -> None:
    """Finite moments, variances that are not negative, and the series after each other alike."""
    rng = np.random.default_rng(seed)

    def semidefinite(size: int) -> torch.Tensor:
        root = rng.normal(size=(1, 1, size, max(size - singular, 0)))
        return torch.from_numpy(scale**2 * root @ root.transpose(0, 1, 3, 2))

    start = np.diag((np.arange(state) < diffuse).astype(float))
    system = System(
        F=torch.from_numpy(0.9 * rng.normal(size=(1, 1, state, state)) / np.sqrt(state)),
        Q=semidefinite(state),
        H=torch.from_numpy(rng.normal(size=(1, 1, obs, state))),
        R=semidefinite(obs) + scale**2 * (not singular) * torch.eye(obs).double(),
        b=torch.zeros(1, 1, state).double(),
        d=torch.zeros(1, 1, obs).double(),
        m0=torch.zeros(1, state).double(),
        P0=semidefinite(state)[0] * (1 - start.max()),
        Pinf=torch.from_numpy(start)[None],
    )
    x = torch.from_numpy(scale * rng.normal(size=(n, steps, obs)))
    mask = torch.from_numpy(rng.random((n, steps, obs)) >= gaps)
    lengths = torch.from_numpy(rng.integers(0, steps + 1, n))
    whole = kalman_filter(system, x, mask, lengths, store="all")
    assert not whole.loglik.isnan().any()
    for k in range(n):
        own = int(lengths[k])
        alone = slice(k, k + 1)
        one = kalman_filter(system, x[alone], mask[alone], lengths[alone], store="all")
        np.testing.assert_allclose(one.loglik, whole.loglik[alone], rtol=1e-9)
        assert whole.mean is not None
        assert whole.cov is not None
        assert whole.mean[k, :own].isfinite().all()
        assert (torch.diagonal(whole.cov[k, :own], dim1=-2, dim2=-1) >= 0).all()
    smooth = kalman_smoother(system, x, mask, lengths, lag_one=True)
    for k in range(n):
        own = int(lengths[k])
        assert smooth.mean[k, :own].isfinite().all()
        assert (torch.diagonal(smooth.cov[k, :own], dim1=-2, dim2=-1) >= 0).all()
