"""Scores against autograd of the dense joint Gaussian and of the torch filter, and differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_kalman_kernels import CASES, SERIES, Data, make_case, random_data, random_system
from torch import Tensor

import seqdgm as sq
from seqdgm.inference.score import score, value_and_score
from seqdgm.kernels import System, kalman_filter
from seqdgm.prepare import prepare

cases = pytest.mark.parametrize("case", CASES)
FIELDS = ("F", "Q", "H", "R", "b", "d", "m0", "P0")


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    size = float(torch.cat([torch.ones(1).double(), expected.detach().abs().ravel()]).max())
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=tolerance * size)


def at(field: Tensor, n: int, t: int) -> Tensor:
    return field[n if len(field) > 1 else 0, t if field.shape[1] > 1 else 0]


def dense_loglik(s: System, A: Tensor, data: Data, n: int) -> Tensor:
    """Log-density of series n as one Gaussian vector; columns of A under a flat prior."""
    x, mask, steps = data.series(n)
    a, P = s.m0[n if len(s.m0) > 1 else 0], s.P0[n if len(s.P0) > 1 else 0]
    load, means, rows, blocks, carried = A, [], [], [], []
    for t in range(steps):
        if t:
            F = at(s.F, n, t)
            a, load, P = F @ a + at(s.b, n, t), F @ load, F @ P @ F.T + at(s.Q, n, t)
            carried = [F @ one for one in carried]
        H = at(s.H, n, t)
        carried.append(P)
        means.append(H @ a + at(s.d, n, t))
        rows.append(H @ load)
        blocks.append([H @ one @ at(s.H, n, k).T for k, one in enumerate(carried)])
        blocks[-1][-1] = blocks[-1][-1] + at(s.R, n, t)
    full = [[blocks[max(t, k)][min(t, k)] for k in range(steps)] for t in range(steps)]
    full = [[b if k <= t else b.T for k, b in enumerate(row)] for t, row in enumerate(full)]
    seen = torch.tensor(mask.ravel())
    sigma = torch.cat([torch.cat(row, 1) for row in full])[seen][:, seen]
    X, y = torch.cat(rows)[seen], (torch.tensor(x).ravel() - torch.cat(means))[seen]
    iy, iX = torch.linalg.solve(sigma, y), torch.linalg.solve(sigma, X)
    info = X.T @ iX
    quad = y @ iy
    logdet = torch.linalg.slogdet(sigma)[1]
    if A.shape[1]:
        quad = quad - (X.T @ iy) @ torch.linalg.solve(info, X.T @ iy)
        logdet = logdet + torch.linalg.slogdet(info)[1]
    return -0.5 * ((len(y) - A.shape[1]) * math.log(2 * math.pi) + logdet + quad)


def root(Pinf: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(Pinf)
    return (vectors * values.clamp_min(0.0).sqrt())[:, values > 1e-12]


@cases
@pytest.mark.parametrize("seed", [0, 1])
def test_score_equals_autograd_of_the_dense_gaussian(case: str, seed: int) -> None:
    system, data = make_case(case, seed)
    loglik, gradient = score(system, *data)
    leaves = System._make(field.clone().requires_grad_() for field in system)
    A = root(system.Pinf[0]).requires_grad_()
    values = torch.stack([dense_loglik(leaves, A, data, n) for n in range(SERIES)])
    wanted = [getattr(leaves, name) for name in FIELDS]
    found = torch.autograd.grad(values.sum(), [*wanted, A], materialize_grads=True)
    near(loglik, values)
    for name, expected in zip(FIELDS, found, strict=False):
        if name in ("Q", "R", "P0"):
            expected = 0.5 * (expected + expected.mT)
        near(getattr(gradient, name), expected)
    near(2 * gradient.Pinf[0] @ A.detach(), found[-1])


@pytest.mark.parametrize("case", ["shared", "varying", "own", "mixed", "singular Q", "all diffuse"])
def test_score_equals_autograd_of_the_torch_filter(case: str) -> None:
    system, data = make_case(case, seed=3)
    leaves = System._make(field.clone().requires_grad_() for field in system)
    x = data.x.nan_to_num()
    out = kalman_filter(leaves, x, *data[1:], store="likelihood", implementation="reference")
    found = torch.autograd.grad(out.loglik.sum(), leaves[:-1], materialize_grads=True)
    loglik, gradient = score(system, *data)
    near(loglik, out.loglik)
    for name, actual, expected in zip(FIELDS, gradient, found, strict=False):
        near(actual, 0.5 * (expected + expected.mT) if name in ("Q", "R", "P0") else expected)


def test_own_gradients_are_those_of_each_series_alone() -> None:
    system, data = make_case("own", seed=4)
    gradient = score(system, *data)[1]
    for n in range(SERIES):
        one = System._make(f[n : n + 1] if len(f) > 1 else f for f in system)
        alone = score(one, *(part[n : n + 1] for part in data))[1]
        for name in FIELDS:
            near(getattr(gradient, name)[n : n + 1], getattr(alone, name), 1e-13)


def test_threads_add_up() -> None:
    rng = np.random.default_rng(5)
    system = random_system(rng, 4, 2, diffuse=1, systems={"F": 40, "m0": 40})
    data = random_data(rng, 40, 60, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        loglik, alone = score(system, *data)
        torch.set_num_threads(2)
        for actual, expected in zip(score(system, *data)[1], alone, strict=True):
            near(actual, expected, 1e-12)
    finally:
        torch.set_num_threads(threads)
    assert bool(torch.isfinite(loglik).all())


def central(f: Callable[[Tensor], Tensor], theta: Tensor, size: float = 1e-3) -> Tensor:
    """Fourth-order central differences of a function with one value for each row of theta."""
    columns = []
    for k in range(theta.shape[1]):
        step = torch.zeros_like(theta)
        step[:, k] = size
        near_by, far = f(theta + step) - f(theta - step), f(theta + 2 * step) - f(theta - 2 * step)
        columns.append((8 * near_by - far) / (12 * size))
    return torch.stack(columns, 1)


MODELS: dict[str, Callable[[], sq.SequenceModel]] = {
    "airline": lambda: sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 12)),
    "arima": lambda: sq.ARIMA((2, 1, 1), trend="ct"),
    "sar": lambda: sq.ARIMA((1, 0, 1), seasonal=(1, 1, 0, 4), trend="c"),
    "structural": lambda: sq.StructuralSSM(trend="damped", seasonal=4, cycle="stochastic", ar=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_score_of_models_equals_differences_of_their_likelihood(name: str) -> None:
    """ARIMA has R = 0, Q of rank one, a diffuse start that depends on the parameters, and gaps."""
    rng = np.random.default_rng(6)
    y = np.cumsum(rng.standard_normal((3, 60)), axis=1)[:, :, None]
    y[0, 5:9] = y[1, 40] = np.nan
    model = MODELS[name]().fit(y)
    _, batch, _ = prepare(model, None, None)
    start = torch.from_numpy(model.free_start(batch, pooled=False)[0])
    rows, u = torch.arange(3), batch.u
    theta = start + 0.1 * torch.from_numpy(rng.standard_normal(start.shape))
    data = (batch.x, batch.mask, batch.lengths)

    def build(theta: Tensor) -> System:
        return model.free_system(theta, rows, u)

    def value(theta: Tensor) -> Tensor:
        return kalman_filter(build(theta), *data, store="likelihood").loglik

    loglik, gradient = value_and_score(build, theta, *data, derivative="difference")
    near(loglik, value(theta), 1e-12)
    near(gradient, central(value, theta), 1e-7)


def test_chain_rule_by_autograd_and_by_differences() -> None:
    rng = np.random.default_rng(7)
    data = random_data(rng, 3, 12, 2)
    base = random_system(rng, 2, 2)

    def build(theta: Tensor) -> System:
        low = torch.zeros(len(theta), 2, 2, dtype=theta.dtype)
        low = low + torch.diag_embed(theta[:, :2].exp())
        decay = theta[:, 2].tanh()[:, None, None] * torch.eye(2, dtype=theta.dtype)
        return base._replace(Q=(low @ low.mT)[:, None], F=decay[:, None], d=theta[:, None, 3:])

    def value(theta: Tensor) -> Tensor:
        return kalman_filter(build(theta), *data, store="likelihood").loglik

    own = torch.from_numpy(rng.standard_normal((3, 5)))
    for theta in (own, own[:1]):
        loglik, gradient = value_and_score(build, theta, *data)
        total = value if len(theta) > 1 else lambda theta: value(theta).sum()[None]
        near(loglik, value(theta), 1e-12)
        near(gradient, central(total, theta), 1e-9)
        by_difference = value_and_score(build, theta, *data, derivative="difference")[1]
        near(by_difference, gradient, 1e-9)


def test_what_cannot_be_differentiated_is_refused() -> None:
    system, data = make_case("shared")
    with pytest.raises(ValueError, match="difference"):
        value_and_score(lambda theta: system, torch.zeros(1, 1).double(), *data)
    with pytest.raises(ValueError, match="unknown"):
        value_and_score(lambda theta: system, torch.zeros(1, 1).double(), *data, derivative="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Q has shape"):
        score(system._replace(Q=system.R[:, :, :1]), *data)
