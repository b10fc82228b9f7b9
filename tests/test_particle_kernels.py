"""Particle kernels: one arithmetic in every implementation, and unbiased results."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from seqdgm.kernels import System, kalman_filter, particles_cpu_math, particles_reference
from seqdgm.kernels.particles import (
    Volatility,
    bootstrap_linear_gaussian,
    bootstrap_volatility,
    gather,
    pick,
    resample,
    weigh,
)
from seqdgm.kernels.particles_types import SCHEMES
from seqdgm.kernels.philox import normals, philox, uniform

IMPLEMENTATIONS = ["cpu", "reference"]
F64: dict[str, Any] = {"dtype": torch.float64}
inf, nan = torch.inf, torch.nan


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"implementation": request.param}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), **F64)


def draws(scheme: str, n: int, count: int, seed: int = 1) -> Tensor:
    return random(n, {"systematic": 1, "killing": 2 * count}.get(scheme, count), seed=seed)


def random_weights(n: int, count: int, spread: float = 3.0) -> Tensor:
    """Log-weights, some of them of weight zero: also the first and the last."""
    a = torch.randn(n, count, generator=torch.Generator().manual_seed(2), **F64) * spread
    a[random(n, count, seed=3) < 0.2] = -inf
    a[:, [0, -1]] = -inf
    a[:, count // 2] = 0.0
    return a


def within(value: Tensor, expected: Any, errors: float = 5.0) -> None:
    """The mean over axis 0 equals what is expected, within standard errors."""
    stderr = value.std(0) / math.sqrt(len(value))
    torch.testing.assert_close(
        (value.mean(0) - expected).abs() <= errors * stderr + 1e-12, torch.ones_like(stderr).bool()
    )


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: Any, key: int, words: str) -> None:
    """The vectors that come with Random123."""
    found = philox(tuple(torch.tensor(word) for word in counter), key)
    assert [f"{int(word):08x}" for word in found] == words.split()


@numba.njit
def _normals(key: np.ndarray, step: int, purpose: int, first: int, out: np.ndarray) -> None:
    particles_cpu_math.normals(key, 3, step, purpose, first, out.size, out)


@numba.njit
def _apply(x: np.ndarray, exp: np.ndarray, log: np.ndarray) -> None:
    for i in range(len(x)):
        exp[i] = particles_cpu_math.exp(x[i])
        log[i] = particles_cpu_math.log(abs(x[i]))


def test_normal_draws_have_their_distribution_out_to_the_tails() -> None:
    out = np.empty((2**14, 2, 64))
    seed = 2**40 + 5
    _normals(np.array([seed % 2**32, seed // 2**32], dtype=np.uint64), 7, 1, 0, out)
    x = out.ravel()
    reference = normals(torch.tensor([3]), 2**14, 7, 1, seed)[0].numpy()
    np.testing.assert_allclose(x[: 2**14], reference, rtol=1e-13, atol=1e-14)
    assert stats.kstest(x[::16], "norm").pvalue > 1e-4
    for quantile in (1.0, 2.0, 3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(quantile) * x.size
        assert abs(np.sum(np.abs(x) > quantile) - expected) < 5 * math.sqrt(expected)
    lags = [np.mean(x[lag:] * x[:-lag]) * math.sqrt(x.size) for lag in (1, 63, 64, 65, 128)]
    assert np.abs(lags).max() < 5
    assert abs(np.mean(out[:, 0] ** 2 * out[:, 1] ** 2) - 1) * math.sqrt(
        x.size / 2
    ) < 5 * math.sqrt(8)


def test_draws_depend_on_series_step_purpose_and_seed_alone() -> None:
    few, many = torch.tensor([1, 2]), torch.tensor([0, 1, 2, 3])
    assert (normals(few, 70, 5, 0, 9) == normals(many, 300, 5, 0, 9)[1:3, :70]).all()
    others = [normals(few, 70, *args) for args in ((6, 0, 9), (5, 1, 9), (5, 0, 10))]
    assert all((normals(few, 70, 5, 0, 9) != other).all() for other in others)
    u = uniform(torch.arange(20000), 4, 9)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4


def test_exponential_and_logarithm_are_accurate_to_rounding() -> None:
    x = np.concatenate([np.linspace(-708, 708, 100_000), np.linspace(-1, 1, 10_000)])
    exp, log = np.empty_like(x), np.empty_like(x)
    _apply(x, exp, log)
    np.testing.assert_allclose(exp, np.exp(x), rtol=4e-16)
    np.testing.assert_allclose(log, np.log(np.abs(x)), rtol=5e-16, atol=1e-16)
    special = np.array([-np.inf, -800.0, 800.0, np.inf, np.nan, 0.0])
    exp = np.empty_like(special)
    _apply(special, exp, np.empty_like(special))
    np.testing.assert_array_equal(exp, [0.0, 0.0, np.inf, np.inf, np.nan, 1.0])


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 5000])
def test_weights_are_normalised(count: int, kernels: dict[str, Any]) -> None:
    a = random_weights(5, count)
    a[0] += 1000.0
    log_weights, total, ess = weigh(a, **kernels)
    weights = (a - a.amax(1, keepdim=True)).exp()
    torch.testing.assert_close(total, a.amax(1) + weights.sum(1).log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_weights.exp(), weights / weights.sum(1, keepdim=True))
    torch.testing.assert_close(ess, weights.sum(1) ** 2 / (weights**2).sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("offset", [-1e17, 1e17, 1e300])
def test_astronomic_weights_are_normalised(offset: float, kernels: dict[str, Any]) -> None:
    """The spacing of doubles at the total is far above 1."""
    a = torch.full((2, 6), offset, **F64)
    a[1, 2:] -= 0.5 * abs(offset)
    log_weights, total, ess = weigh(a, **kernels)
    torch.testing.assert_close(log_weights.exp().sum(1), torch.ones(2, **F64))
    torch.testing.assert_close(ess, torch.tensor([6.0, 2.0], **F64))
    torch.testing.assert_close(total, torch.full((2,), offset, **F64))


def test_weights_that_vanish_or_are_not_numbers_are_told_apart(kernels: dict[str, Any]) -> None:
    a = torch.tensor([[-inf, -inf, -inf], [0.0, nan, 0.0], [0.0, -inf, -nan], [-inf, 5, -inf]])
    log_weights, total, ess = weigh(a.double(), **kernels)
    torch.testing.assert_close(
        total, torch.tensor([-inf, nan, nan, 5.0], **F64), equal_nan=True, rtol=0, atol=0
    )
    torch.testing.assert_close(ess, torch.tensor([0.0, nan, nan, 1.0], **F64), equal_nan=True)
    torch.testing.assert_close(log_weights[:3], a[:3].double(), equal_nan=True)
    assert log_weights[3].tolist() == [-inf, 0.0, -inf]


def test_weights_have_a_gradient_where_it_is_wanted() -> None:
    a = random_weights(2, 6).requires_grad_()
    weigh(a).total.sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, a.detach().softmax(1))
    with pytest.raises(ValueError, match="no gradient"):
        weigh(a, implementation="cpu")


# -- ancestors ------------------------------------------------------------------------------------


def naive(scheme: str, weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Ancestors by the definition, in exact rational arithmetic where it matters."""
    n = len(weights)
    q = [round(weight * 2.0**52) for weight in weights.tolist()]
    c = np.cumsum(np.array(q, dtype=object))
    total = int(c[-1])

    def first(sums: np.ndarray, level: float) -> int:
        return next(k for k in range(n) if sums[k] > min(level, int(sums[-1]) - 1))

    if scheme in ("systematic", "stratified"):
        return np.array([first(c, (j + u[j % len(u)]) * (total / n)) for j in range(n)])
    if scheme == "multinomial":
        return np.array([first(c, each * total) for each in u])
    if scheme == "killing":
        lives = [u[j] * max(q) < q[j] for j in range(n)]
        return np.array([j if lives[j] else first(c, u[n + j] * total) for j in range(n)])
    expected = np.array(q, dtype=float) * (n / total)
    copies = np.floor(expected).astype(int)
    rest = np.cumsum(np.rint((expected - copies) * (2.0**52 / n)))
    start = np.repeat(np.arange(n), copies)
    return np.concatenate([start, [first(rest, each * rest[-1]) for each in u[len(start) :]]])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_ancestors_are_those_of_the_definition(
    scheme: str, count: int, kernels: dict[str, Any]
) -> None:
    log_weights = weigh(random_weights(4, count)).log_weights
    u = draws(scheme, 4, count)
    found = resample(scheme, log_weights, u, **kernels)
    weights = log_weights.exp().numpy()
    for row, w, each in zip(found.numpy(), weights, u.numpy(), strict=True):
        np.testing.assert_array_equal(row, naive(scheme, w, each))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("count", [1025, 4096, 50_000])
def test_ancestors_are_the_same_in_every_implementation(scheme: str, count: int) -> None:
    log_weights = weigh(random_weights(2, count)).log_weights
    u = draws(scheme, 2, count)
    found = [resample(scheme, log_weights, u, implementation=each) for each in IMPLEMENTATIONS]
    assert (found[0] == found[1]).all()
    assert torch.isfinite(gather(log_weights, found[0])).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53])
def test_rounding_never_draws_a_particle_of_weight_zero(
    scheme: str, u: float, kernels: dict[str, Any]
) -> None:
    count = 12
    a = torch.full((6, count), -inf, **F64)
    a[0, 5] = 0.0  # all weight in one
    a[1, 0] = 0.0
    a[2, -1] = 0.0
    a[3, 3:9] = 0.0  # nothing at the ends
    a[4, 3:9:2] = torch.tensor([0.0, -30.0, -710.0])  # down to subnormal weights
    a[5] = 0.0
    log_weights = weigh(a).log_weights
    found = resample(scheme, log_weights, torch.full_like(draws(scheme, 6, count), u), **kernels)
    assert found.min() >= 0
    assert found.max() < count
    assert (gather(log_weights, found) > -720).all()
    assert (found[0] == 5).all()
    assert (found[1] == 0).all()
    assert (found[2] == count - 1).all()
    assert not ((found[4] != 3) & (found[4] != 5)).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_of_copies_are_unbiased(scheme: str, kernels: dict[str, Any]) -> None:
    count, rows = 7, 40_000
    log_weights = torch.tensor([0.3, 0.0, 0.05, 0.35, 1e-3, 0.149, 0.15], **F64).log()
    ancestors = resample(
        scheme, log_weights.repeat(rows, 1), draws(scheme, rows, count, seed=11), **kernels
    )
    copies = torch.nn.functional.one_hot(ancestors, count).sum(1).double()
    within(copies, count * log_weights.exp())


def test_series_that_need_no_resampling_keep_every_particle(kernels: dict[str, Any]) -> None:
    log_weights = weigh(random_weights(3, 1500)).log_weights
    log_weights[1] = nan  # never read
    needed = torch.tensor([True, False, False])
    found = resample("systematic", log_weights, random(3, 1), needed, **kernels)
    assert (found[1:] == torch.arange(1500)).all()
    assert (found[0] == resample("systematic", log_weights[:1], random(3, 1)[:1])).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [-inf, nan])
def test_weights_to_draw_from_are_asked_for(
    scheme: str, bad: float, kernels: dict[str, Any]
) -> None:
    log_weights = weigh(random_weights(3, 5)).log_weights
    log_weights[1] = bad if bad == -inf else log_weights[1]
    log_weights[1, 2] = bad
    with pytest.raises(ValueError, match="series 1"):
        resample(scheme, log_weights, draws(scheme, 3, 5), **kernels)
    with pytest.raises(ValueError, match="row 1"):
        pick(log_weights, random(3), **kernels)


@pytest.mark.usefixtures("two_threads")
def test_a_long_series_may_be_resampled_in_threads() -> None:
    log_weights = weigh(random_weights(1, 100_000, spread=5.0)).log_weights
    found = [
        resample("systematic", log_weights, random(1, 1), implementation=each)
        for each in IMPLEMENTATIONS
    ]
    assert (found[0] == found[1]).all()
    with pytest.raises(ValueError, match="series 0"):
        resample("systematic", torch.full_like(log_weights, -inf), random(1, 1))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("tail", [(), (3,), (2, 4), (0,)])
def test_particles_of_any_type_are_gathered(
    kind: torch.dtype, tail: tuple[int, ...], kernels: dict[str, Any]
) -> None:
    x = (random(3, 11, *tail) * 100).to(kind)
    ancestors = (random(3, 8, seed=4) * 11).long()
    found = gather(x, ancestors, **kernels)
    assert found.dtype == kind
    for n in range(3):
        assert (found[n] == x[n, ancestors[n]]).all()


def test_ancestors_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 4"):
        gather(random(2, 5), torch.tensor([[0, 5], [1, 1]]))


def test_picks_follow_the_weights(kernels: dict[str, Any]) -> None:
    rows = 40_000
    a = torch.tensor([-inf, 700.0, 701.0, -800.0, 699.5, -inf], **F64)
    found = pick(a.repeat(2, rows // 2, 1), random(2, rows // 2, seed=5), **kernels)
    assert found.shape == (2, rows // 2)
    within(torch.nn.functional.one_hot(found.flatten(), 6).double(), a.softmax(0))
    assert pick(a, torch.tensor(0.0, **F64), **kernels) == 1
    assert pick(a, torch.tensor(1.0 - 2.0**-53, **F64), **kernels) == 4


# -- fused filters --------------------------------------------------------------------------------


def linear_system(state: int = 2, obs: int = 2, steps: int = 1, series: int = 1) -> System:
    """A stable system with full covariances; matrices vary over `steps` and `series`."""
    g = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(series, *shape, generator=g, **F64)

    A, B = normal(steps, state, state), normal(steps, obs, obs)
    return System(
        F=0.7 * torch.eye(state, **F64) + 0.1 * normal(steps, state, state),
        Q=0.3 * (A @ A.mT),
        H=normal(steps, obs, state),
        R=0.5 * (B @ B.mT) + torch.eye(obs, **F64),
        b=0.2 * normal(steps, state),
        d=0.2 * normal(steps, obs),
        m0=normal(state),
        P0=torch.eye(state, **F64)[None] + 0.3,
        Pinf=torch.zeros(1, state, state, **F64),
    )


def linear_data(obs: int = 2, steps: int = 5, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Complete; a gap and a missing element; short: so many rows of each."""
    x = torch.randn(1, steps, obs, generator=torch.Generator().manual_seed(7), **F64)
    x = x.repeat(3, 1, 1)
    x[1, 1, 0] = nan
    x[1, 3] = nan
    lengths = torch.tensor([steps, steps, 3])
    return (
        *(part.repeat_interleave(rows, 0) for part in (x, ~x.isnan())),
        lengths.repeat_interleave(rows),
    )


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("count", [4, 16, 64])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_evidence_of_a_linear_system_is_unbiased(
    count: int, threshold: float, varying: bool
) -> None:
    rows = 4000
    system = linear_system(steps=5 if varying else 1)
    x, mask, lengths = linear_data(rows=rows)
    out = bootstrap_linear_gaussian(
        system, x, mask, lengths, n_particles=count, seed=count, threshold=threshold
    )
    exact = kalman_filter(system, x, mask, lengths, store="likelihood").loglik
    within((out.increments.sum(1) - exact).exp().view(3, rows).T, 1.0)
    assert (out.increments[2 * rows :, 3:] == 0).all()
    assert out.ess[2 * rows :, 3:].isnan().all()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_variance_of_the_evidence_is_unbiased(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lee and Whiteley (2018), theorem 1: exact, for multinomial resampling or none."""
    rows, count = 1500, 100
    system = linear_system()
    x, mask, lengths = (part[:rows] for part in linear_data(rows=rows, steps=4))
    generator = torch.Generator().manual_seed(9)

    def multinomial(_scheme: str, log_weights: Tensor, _u: Tensor, needed: Tensor) -> Tensor:
        u = torch.rand(log_weights.shape, generator=generator, **F64)
        return resample("multinomial", log_weights, u, needed)

    monkeypatch.setattr(particles_reference, "resample", multinomial)
    for each in IMPLEMENTATIONS if threshold == 0 else ["reference"]:
        options: dict[str, Any] = {"threshold": threshold, "implementation": each}
        out = bootstrap_linear_gaussian(
            system, x, mask, lengths, n_particles=count, seed=1, **options
        )
        exact = kalman_filter(system, x[:1], mask[:1], lengths[:1], store="likelihood").loglik
        ratio = (out.increments.sum(1) - exact).exp()
        assert torch.isfinite(out.stderr).all()
        within((ratio * out.stderr).square() - (ratio - 1).square(), 0.0)


def test_moments_of_a_linear_system_are_those_of_the_kalman_filter() -> None:
    rows = 32
    system = linear_system(state=3)
    x, mask, lengths = linear_data(rows=rows)
    out = bootstrap_linear_gaussian(
        system, x, mask, lengths, n_particles=5000, seed=2, moments=True
    )
    exact = kalman_filter(system, x, mask, lengths, store="all")
    assert out.mean is not None
    assert out.var is not None
    assert exact.mean is not None
    assert exact.cov is not None
    for found, expected in (
        (out.mean, exact.mean),
        (out.var, torch.diagonal(exact.cov, dim1=2, dim2=3)),
    ):
        assert (found.isnan() == expected.isnan()).all()
        for k in range(3):
            part = slice(k * rows, (k + 1) * rows)
            end = int(lengths[k * rows])
            within(found[part, :end], expected[k * rows, :end])


SYSTEMS = {
    "two elements": (linear_system(), 2),
    "varying, by series": (linear_system(steps=5, series=3), 2),
    "five elements": (linear_system(state=5, obs=1), 1),
    "diagonal R": (linear_system(obs=3)._replace(R=torch.eye(3, **F64)[None, None] * 0.5), 3),
}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("count", [1, 3, 127, 1500])
def test_linear_filters_agree_particle_by_particle(name: str, count: int) -> None:
    system, obs = SYSTEMS[name]
    data = linear_data(obs=obs)
    agree(bootstrap_linear_gaussian, system, *data, n_particles=count, threshold=0.7)


def agree(run: Any, *args: Any, **options: Any) -> None:
    found = [
        run(*args, **options, seed=2**33 + 7, moments=True, implementation=each)
        for each in IMPLEMENTATIONS
    ]
    for name, a, b in zip(found[0]._fields, *found, strict=True):
        # The error of a square root of nearly nothing is that of its square.
        if name == "stderr":
            a, b = a.square(), b.square()
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, equal_nan=True)


ONE = torch.ones(1, **F64)
BASE = Volatility(mu=-0.5 * ONE, rho=0.9 * ONE, sigma=0.4 * ONE)
VOLATILITIES = {
    "normal": BASE,
    "Student": BASE._replace(df=4.0 * ONE),
    "leverage": BASE._replace(leverage=-0.7 * ONE),
    "mean": BASE._replace(mean=torch.linspace(-0.5, 0.5, 8, **F64)[None]),
    "start": BASE._replace(rho=ONE, m0=0.3 * ONE, s0=0.2 * ONE),
}


def volatility_data() -> tuple[Tensor, Tensor]:
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(8), **F64)
    x[0, 3] = nan
    return x, ~x.isnan()


def integrate(model: Volatility, x: np.ndarray, points: int = 500) -> float:
    """log p(x) on a grid: the trapezoidal rule, whose error is far below any particle filter's."""
    mu, rho, sigma = (float(field) for field in model[:3])
    m0 = mu if model.m0 is None else float(model.m0)
    s0 = sigma / math.sqrt(1 - rho**2) if model.s0 is None else float(model.s0)
    leverage = 0.0 if model.leverage is None else float(model.leverage)
    mean = np.zeros(len(x)) if model.mean is None else model.mean[0].numpy()
    v = stats.norm if model.df is None else stats.t(float(model.df))
    grid = np.linspace(m0 - 7, m0 + 7, points)
    width, scale = grid[1] - grid[0], np.exp(grid / 2)
    density, total = stats.norm.pdf(grid, m0, s0), 0.0
    for value, middle in zip(x, mean, strict=True):
        shift, spread = np.zeros(points), sigma
        if not np.isnan(value):
            density = density * v.pdf((value - middle) / scale) / scale
            shift = sigma * leverage * (value - middle) / scale
            spread = sigma * math.sqrt(1 - leverage**2)
        step = density.sum() * width
        total += math.log(step)
        move = stats.norm.pdf(grid[:, None], mu + rho * (grid - mu) + shift, spread) * width
        density = move @ (density / step)
    return total


@pytest.mark.parametrize("name", VOLATILITIES)
@pytest.mark.parametrize("count", [4, 64])
def test_the_evidence_of_volatility_is_unbiased(name: str, count: int) -> None:
    x, mask = volatility_data()
    lengths = torch.full((6000,), x.shape[1])
    out = bootstrap_volatility(VOLATILITIES[name], x, mask, lengths, n_particles=count, seed=3)
    within((out.increments.sum(1) - integrate(VOLATILITIES[name], x[0].numpy())).exp(), 1.0)


@pytest.mark.parametrize("name", VOLATILITIES)
@pytest.mark.parametrize("count", [1, 130, 2500])
def test_volatility_filters_agree_particle_by_particle(name: str, count: int) -> None:
    lengths = torch.tensor([8, 5, 0])
    model = VOLATILITIES[name]._replace(sigma=torch.tensor([0.2, 0.5, 0.3], **F64))
    agree(bootstrap_volatility, model, *volatility_data(), lengths, n_particles=count)


def test_data_may_be_shared_without_a_copy(kernels: dict[str, Any]) -> None:
    """Axes of stride 0 are read where they lie; each series still has its own draws."""
    x, mask, lengths = (part[1:2] for part in linear_data())
    options: dict[str, Any] = {"n_particles": 50, "seed": 6, **kernels}
    found = [
        bootstrap_linear_gaussian(linear_system(), *data, **options).increments
        for data in (
            (x.expand(3, -1, -1), mask.expand(3, -1, -1), lengths.expand(3)),
            (x.repeat(3, 1, 1), mask.repeat(3, 1, 1), lengths.repeat(3)),
        )
    ]
    assert (found[0] == found[1]).all()
    assert (found[0][0, 0] != found[0][1:, 0]).all()


@pytest.mark.usefixtures("two_threads")
def test_threads_change_nothing() -> None:
    """Four series are shared out whole; one series of many particles in blocks."""
    x, mask = volatility_data()
    count, options = 40_000, {"seed": 4, "moments": True}
    model = BASE._replace(leverage=-0.5 * ONE)
    shared = bootstrap_volatility(model, x, mask, torch.tensor([8]), n_particles=count, **options)
    lengths = torch.tensor([8, 2, 7, 8])
    whole = bootstrap_volatility(model, x, mask, lengths, n_particles=count, **options)
    torch.set_num_threads(1)
    alone = bootstrap_volatility(model, x, mask, lengths, n_particles=count, **options)
    for part, other, one in zip(shared, whole, alone, strict=True):
        if one is None:
            continue  # covariances, which a state of one element has not
        assert (part[0].nan_to_num() == one[0].nan_to_num()).all()
        assert (other.nan_to_num() == one.nan_to_num()).all()


def test_a_series_stops_where_its_weights_vanish(kernels: dict[str, Any]) -> None:
    system = linear_system()
    x, mask, lengths = linear_data()
    x[0, 2] = 1e200
    x[1, 2] = nan
    mask[1, 2] = True
    out = bootstrap_linear_gaussian(system, x, mask, lengths, n_particles=20, seed=5, **kernels)
    assert out.increments[0, 2] == -inf
    assert out.increments[0].sum() == -inf
    assert out.increments[1, 2].isnan()
    assert (out.increments[:2, 3:] == 0).all()
    assert out.ess[:2, 2:].isnan().all()
    assert out.stderr[:2].isnan().all()
    assert torch.isfinite(out.increments[2]).all()


@pytest.mark.parametrize("name", VOLATILITIES)
def test_an_impossible_return_is_told_from_one_that_is_no_number(
    name: str, kernels: dict[str, Any]
) -> None:
    x, mask = (part.repeat(2, 1) for part in volatility_data())
    x[0, 4], x[1, 4] = 1e200, nan
    out = bootstrap_volatility(
        VOLATILITIES[name], x, mask, torch.tensor([8, 8]), n_particles=20, seed=5, **kernels
    )
    assert out.increments[0, 4] == -inf
    assert out.increments[1, 4].isnan()
    assert (out.increments[:, 5:] == 0).all()


def test_bad_arguments_are_refused_by_name() -> None:
    system = linear_system()
    data = linear_data()
    options: dict[str, Any] = {"n_particles": 10, "seed": 0}

    def linear(system: System = system, **changed: Any) -> None:
        bootstrap_linear_gaussian(system, *data, **(options | changed))

    def volatility(**changed: Any) -> None:
        bootstrap_volatility(
            BASE._replace(**changed), *volatility_data(), torch.tensor([8]), **options
        )

    for run, words in (
        (lambda: linear(n_particles=0), "n_particles is 0"),
        (lambda: linear(threshold=1.5), "threshold is 1.5"),
        (lambda: linear(seed=-1), "seed is -1"),
        (lambda: linear(system._replace(Pinf=system.P0)), "diffuse"),
        (lambda: linear(system._replace(R=0.0 * system.R)), "R of system 0, step 0"),
        (lambda: volatility(rho=ONE), "rho of series 0 is 1"),
        (lambda: volatility(sigma=-ONE), "sigma of series 0"),
        (lambda: volatility(df=4 * ONE, leverage=0.1 * ONE), "leverage needs"),
        (lambda: volatility(leverage=2 * ONE), "leverage of series 0 is 2"),
        (lambda: volatility(mu=torch.zeros(2, **F64)), "mu is"),
        (lambda: weigh(torch.zeros(2, 3)), "float32"),
        (lambda: resample("best", torch.zeros(2, 3, **F64), random(2, 1)), "scheme is 'best'"),
        (lambda: resample("systematic", torch.zeros(2, 3, **F64), random(2, 3)), "uniforms"),
        (lambda: resample("systematic", torch.zeros(2, 3, **F64), 1 + random(2, 1)), "range from"),
        (lambda: pick(torch.zeros(2, 3, **F64), random(3)), "uniforms is"),
        (lambda: gather(torch.zeros(2, 3), torch.zeros(3, 3).long()), "ancestors is"),
        (lambda: weigh(torch.zeros(2, 3, **F64), implementation="best"), "implementation"),
    ):
        with pytest.raises(ValueError, match=words):
            run()


MEMORY = """
import torch
from seqdgm.kernels.particles import Volatility, bootstrap_volatility
one = torch.ones(1, dtype=torch.float64)
x = torch.zeros(1, 5, dtype=torch.float64)
model = Volatility(-one, 0.9 * one, one)
def run(n, steps):
    bootstrap_volatility(
        model, x[:, :steps], x[:, :steps] == 0, torch.tensor([steps]), n_particles=n, seed=1,
        threshold=1.0,
    )
    # Not ru_maxrss, which begins at the peak of the process that started this one.
    (peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 2**20
print(run(100, 5), run(10**7, 2), run(10**7, 5))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_time() -> None:
    """Ten million particles, in GiB: a few numbers a particle, however many steps."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    before, short, long = (float(word) for word in done.stdout.split())
    assert long < 1.8
    assert long - short < 0.02
    assert long - before < 0.6
