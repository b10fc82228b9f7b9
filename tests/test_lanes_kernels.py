"""Kernels that take a block of series at a time, against the dense Gaussian and the others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_kalman_kernels import FIELDS, Data, close, dense, random_data, random_system
from torch import Tensor

from seqdgm.kernels import System, cpu_lanes, reference
from seqdgm.kernels.cpu_lanes import WIDTH, supports

SERIES, STEPS = 2 * WIDTH + 3, 11  # the last block is not full
OWN = dict.fromkeys(FIELDS, SERIES)
VARYING = {"b": STEPS, "d": STEPS}
CASES: dict[str, dict[str, Any]] = {
    "scalar": {"state": 1, "obs": 1},
    "trend, shared": {"state": 2, "obs": 1, "systems": {}},
    "trend, diffuse": {"state": 2, "obs": 1, "diffuse": 2},
    "two observed, varying": {"state": 2, "obs": 2, "times": VARYING},
    "three observed, diffuse": {"state": 2, "obs": 3, "diffuse": 1, "times": VARYING},
    "no error": {"state": 2, "obs": 1, "noise": "zero"},
    "no error, diffuse": {"state": 2, "obs": 2, "noise": "zero", "diffuse": 1},
    "singular Q": {"state": 2, "obs": 1, "q_rank": 1},
}
LARGE: dict[str, dict[str, Any]] = {
    f"state {state}, {obs} observed, {diffuse} diffuse": {
        "state": state,
        "obs": obs,
        "diffuse": diffuse,
        "noise": noise,
        "times": VARYING if obs == 2 else {},
    }
    for state in (3, 8)
    for obs, diffuse, noise in ((1, 0, "zero"), (2, 0, "diagonal"), (3, 3, "diagonal"))
}


def make(options: dict[str, Any], series: int = SERIES) -> tuple[System, Data]:
    rng = np.random.default_rng(len(str(options)))
    given = {"noise": "diagonal", "systems": OWN, **options}
    state, obs = given.pop("state"), given.pop("obs")
    return random_system(rng, state, obs, **given), random_data(rng, series, STEPS, obs)


def agree(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype
            close(a, b, 1e-10)


def compare(system: System, data: Data) -> None:
    """All results against the kernels in torch."""
    assert supports(system, data.x)
    for store in ("likelihood", "last", "all"):
        agree(
            cpu_lanes.kalman_filter(system, *data, store=store),
            reference.kalman_filter(system, *data, store=store),
        )
    for lag_one in (False, True):
        agree(
            cpu_lanes.kalman_smoother(system, *data, lag_one=lag_one),
            reference.kalman_smoother(system, *data, lag_one=lag_one),
        )


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str) -> None:
    compare(*make(CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE)
def test_equals_reference_for_larger_states(case: str) -> None:
    compare(*make(LARGE[case]))


@pytest.mark.parametrize("case", ["trend, diffuse", "two observed, varying"])
def test_equals_dense_gaussian(case: str) -> None:
    system, data = make(CASES[case])
    out = cpu_lanes.kalman_smoother(system, *data, lag_one=True)
    assert out.lag_one is not None
    for n in (0, 1, 3, 5):
        x, mask, steps = data.series(n)
        expected = dense(system, x, mask, n, steps)
        blocks = expected.cov.reshape(steps, 2, steps, 2).swapaxes(1, 2)
        close(out.loglik[n], expected.loglik)
        close(out.mean[n, :steps], expected.mean)
        close(out.cov[n, :steps], blocks[np.arange(steps), np.arange(steps)])
        close(out.lag_one[n, : steps - 1], blocks[np.arange(1, steps), np.arange(steps - 1)])


@pytest.mark.parametrize("series", [1, WIDTH - 1, WIDTH, WIDTH + 1])
def test_blocks_that_are_not_full(series: int) -> None:
    compare(*make({"state": 2, "obs": 1, "systems": {}}, series))


def test_lanes_do_not_touch() -> None:
    """A series gives the same in any company, even beside one that overflows."""
    system, data = make(CASES["trend, diffuse"])
    F = system.F.clone()
    F[1] = 1e200
    mask = torch.ones_like(data.mask)
    lengths = torch.full((SERIES,), STEPS)
    lengths[2] = 1
    x = torch.nan_to_num(data.x)
    together = cpu_lanes.kalman_smoother(system._replace(F=F), x, mask, lengths, lag_one=False)
    for n in (0, 2, 7, SERIES - 1):
        alone = System._make(field[n : n + 1] if len(field) > 1 else field for field in system)
        one = slice(n, n + 1)
        out = cpu_lanes.kalman_smoother(alone, x[one], mask[one], lengths[one], lag_one=False)
        close(out.loglik, together.loglik[one], 1e-13)
        close(out.mean, together.mean[one], 1e-13)


def walk(F: float = 1.0, Q: float = 1.0, R: float = 1.0, P0: float = 1.0) -> System:
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1).double()
    return System(F * one, Q * one, one, R * one, zero, zero, zero[0], P0 * one[0], 0 * one[0])


def filtered(system: System, x: Tensor, store: Any = "likelihood") -> Any:
    lengths = torch.full((len(x),), x.shape[1])
    return cpu_lanes.kalman_filter(system, x, ~x.isnan(), lengths, store=store)


@pytest.mark.parametrize("variance", [1e-200, 1e-3, 1.0, 1e3, 1e200])
def test_logdet_of_extreme_variances(variance: float) -> None:
    """The product of thousands of variances, far beyond the range of a float."""
    x = torch.zeros(3, 4000, 1).double()
    system = walk(F=0.0, Q=0.0, R=variance, P0=0.0)
    close(filtered(system, x).logdet / (4000 * math.log(variance) or 1.0), [variance != 1.0] * 3)


def test_subnormal_and_infinite_variances() -> None:
    x = torch.zeros(2, 3, 1).double()
    tiny = filtered(walk(F=0.0, Q=0.0, R=2.0**-1023, P0=0.0), x)
    close(tiny.logdet, [3 * -1023 * math.log(2.0)] * 2, 1e-14)
    for bad in (math.inf, math.nan):
        assert not bool(filtered(walk(R=bad), x).loglik.isfinite().any())


def test_contradiction_is_impossible() -> None:
    """A constant observed without error: a repetition adds nothing, another value cannot be."""
    x = torch.tensor([[2.0, 2.0, 2.0], [2.0, 2.0, 2.5]]).double()[:, :, None]
    out = filtered(walk(Q=0.0, R=0.0), x, "all")
    assert out.n_obs.tolist() == [1, 1]
    assert out.loglik[1] == -math.inf
    normal = torch.distributions.Normal(0.0, 1.0)
    close(out.loglik[0], normal.log_prob(torch.tensor(2.0).double()), 1e-14)
    close(out.cov, torch.zeros(2, 3, 1, 1), 0.0)


def test_values_that_are_not_observed_are_not_used() -> None:
    system, data = make(CASES["two observed, varying"])
    first = cpu_lanes.kalman_smoother(system, *data, lag_one=False)
    x = torch.where(data.mask, data.x, torch.inf)
    again = cpu_lanes.kalman_smoother(system, x, data.mask, data.lengths, lag_one=False)
    assert torch.equal(first.loglik, again.loglik)
    assert torch.equal(first.mean.nan_to_num(9.0), again.mean.nan_to_num(9.0))


def test_long_series_pass_through_tiles() -> None:
    """The filter fetches data some steps at a time; b and d vary, and lengths end in any tile."""
    rng = np.random.default_rng(1)
    steps, times = 150, {"b": 150, "d": 150}
    system = random_system(rng, 2, 1, noise="diagonal", diffuse=1, times=times)
    data = random_data(rng, WIDTH + 1, steps, 1)
    data.lengths[:4] = torch.tensor([0, 63, 64, 65])
    for store in ("last", "all"):
        agree(
            cpu_lanes.kalman_filter(system, *data, store=store),
            reference.kalman_filter(system, *data, store=store),
        )


def test_threads_change_nothing() -> None:
    rng = np.random.default_rng(2)
    system = random_system(rng, 2, 1, noise="diagonal")
    x = torch.tensor(rng.standard_normal((2000, 60, 1)))
    data = (x, torch.ones_like(x, dtype=torch.bool), torch.tensor(rng.integers(1, 61, 2000)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu_lanes.kalman_smoother(system, *data, lag_one=False)
        torch.set_num_threads(2)
        two = cpu_lanes.kalman_smoother(system, *data, lag_one=False)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        assert (a is None and b is None) or torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))


def test_covariances_stay_semidefinite() -> None:
    """A nearly exact observation of a state that hardly moves, for long."""
    system, x = make(CASES["trend, shared"])[0], torch.zeros(3, 2000, 1).double()
    system = system._replace(Q=system.Q * 1e-14, R=system.R * 1e-12, P0=system.P0 * 1e6)
    lengths = torch.full((3,), 2000)
    out = cpu_lanes.kalman_smoother(system, x, ~x.isnan(), lengths, lag_one=False)
    for cov in (out.cov, filtered(system, x, "all").cov):
        assert torch.equal(cov, cov.mT)
        assert bool((torch.diagonal(cov, dim1=2, dim2=3) >= 0).all())


def test_what_is_supported() -> None:
    rng = np.random.default_rng(3)
    x = torch.zeros(SERIES, STEPS, 2).double()
    assert supports(random_system(rng, 8, 2, noise="diagonal", times=VARYING), x)
    assert not supports(random_system(rng, 9, 2, noise="diagonal"), x)
    assert not supports(random_system(rng, 2, 2), x)
    for name in ("F", "Q", "H", "R"):
        assert not supports(random_system(rng, 2, 2, noise="diagonal", times={name: STEPS}), x)
