"""The associative scans against dense joint Gaussians, the other kernels, and autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_kalman_kernels import (
    SERIES,
    Data,
    cases,
    close,
    dense,
    make_case,
    random_data,
    random_system,
    tensor,
)
from torch import Tensor

from seqdgm.kernels import System, associative, cpu, reference


def same(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """All fields of two results agree, NaN and infinities included."""
    for name, a, b in zip(expected._fields, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        if b is not None:
            assert a.shape == b.shape, name
            assert a.dtype == b.dtype, name
            size = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 1.0
            atol = tolerance * max(1.0, size)
            torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True, msg=name)


@cases
def test_smoother_equals_dense(case: str) -> None:
    system, data = make_case(case, seed=2)
    out = associative.kalman_smoother(system, *data, lag_one=True)
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


@pytest.mark.parametrize("missing", [0.0, 0.6])
@cases
def test_every_field_equals_the_reference(case: str, missing: float) -> None:
    system, data = make_case(case, seed=3)
    rng = np.random.default_rng(5)
    data = random_data(rng, SERIES, data.x.shape[1], data.x.shape[2], missing)
    for store in ("likelihood", "last", "all"):
        actual = associative.kalman_filter(system, *data, store=store)
        same(actual, reference.kalman_filter(system, *data, store=store))
    for lag_one in (True, False):
        smoothed = associative.kalman_smoother(system, *data, lag_one=lag_one)
        same(smoothed, reference.kalman_smoother(system, *data, lag_one=lag_one))


@pytest.mark.parametrize("diffuse", [0, 2])
def test_long_series_equal_the_sequential_kernels(diffuse: int) -> None:
    """A near-unit root and a constant state, 3,001 steps: errors do not pile up."""
    rng = np.random.default_rng(7)
    F = np.array([[0.99999, 1.0, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]])
    Q = np.diag([0.1, 0.2, 0.0])
    system = random_system(rng, 3, 2, diffuse=diffuse)
    system = system._replace(F=tensor(F)[None, None], Q=tensor(Q)[None, None])
    data = random_data(rng, 2, 3001, 2)
    actual = associative.kalman_smoother(system, *data, lag_one=True)
    same(actual, cpu.kalman_smoother(system, *data, lag_one=True))
    filtered = associative.kalman_filter(system, *data, store="all")
    same(filtered, cpu.kalman_filter(system, *data, store="all"))
    assert filtered.cov is not None
    for cov in (filtered.cov[0], actual.cov[0]):
        assert torch.equal(cov, cov.mT)
        assert float(torch.linalg.eigvalsh(cov)[..., 0].min()) > -1e-12


def test_depth_is_logarithmic(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    system, data = random_system(rng, 2, 1), random_data(rng, 1, 1024, 1)
    calls, join = [], associative._join

    def counted(first: Any, then: Any) -> Any:
        calls.append(len(first.A))
        return join(first, then)

    monkeypatch.setattr(associative, "_join", counted)
    associative.kalman_filter(system, *data, store="likelihood")
    assert len(calls) == 20  # twice a level
    assert sum(calls) < 2 * 1024  # and no more joins than twice the steps


def test_autograd_equals_the_reference() -> None:
    rng = np.random.default_rng(13)
    system = random_system(rng, 2, 2, systems={"F": 3}, times={"H": 7})
    data = random_data(rng, 3, 7, 2)
    names = ("F", "Q", "H", "R", "b", "d", "m0", "P0")

    def gradients(kernels: Any) -> list[Tensor]:
        free = system._replace(**{k: getattr(system, k).clone().requires_grad_() for k in names})
        out = kernels.kalman_smoother(free, *data, lag_one=True)
        value = out.loglik.sum() + (out.mean**2).nansum() + out.lag_one.nansum()
        found = torch.autograd.grad(value, [getattr(free, k) for k in names])
        # A covariance may be differentiated along symmetric directions alone.
        return [g + g.mT if k in ("Q", "R", "P0") else g for k, g in zip(names, found, strict=True)]

    for a, b in zip(gradients(associative), gradients(reference), strict=True):
        close(a, b)


def test_diffuse_to_the_end() -> None:
    """A trend that was seen once stays undetermined, and there is nothing left to scan."""
    zero, eye = tensor(np.zeros((1, 2, 2))), tensor(np.eye(2))[None]
    F = tensor([[1.0, 1.0], [0.0, 1.0]])[None, None]
    system = System(
        F, zero[None], eye[None, :, :1], eye[None, :, :1, :1],
        zero[:, :1], zero[:, :1, :1], zero[:, 0], zero, eye,
    )  # fmt: skip
    x = torch.full((2, 9, 1), math.nan, dtype=torch.float64)
    x[0, [0, 2, 5]], x[1, 3] = tensor([[4.0], [6.0], [7.0]]), 5.0
    data = (x, ~x.isnan(), torch.tensor([9, 9]))
    out = associative.kalman_filter(system, *data, store="all")
    assert out.rank_left.tolist() == [0, 1]
    same(out, reference.kalman_filter(system, *data, store="all"))
    smoothed = associative.kalman_smoother(system, *data, lag_one=True)
    same(smoothed, reference.kalman_smoother(system, *data, lag_one=True))


@pytest.mark.parametrize("case", ["shared", "diffuse"])
def test_series_of_no_and_one_step(case: str) -> None:
    system, data = make_case(case)
    data = data._replace(lengths=torch.tensor([0, 9, 1, 2]))
    one = Data(data.x[:, :1], data.mask[:, :1], data.lengths.clamp(max=1))
    for panel in (data, one):
        for store in ("last", "all"):
            actual = associative.kalman_filter(system, *panel, store=store)
            same(actual, reference.kalman_filter(system, *panel, store=store))
        smoothed = associative.kalman_smoother(system, *panel, lag_one=True)
        same(smoothed, reference.kalman_smoother(system, *panel, lag_one=True))


def test_singular_observations_are_refused() -> None:
    """Two exact observations of one state: the second adds nothing, or contradicts the first."""
    system, data = make_case("zero R")
    H = system.H[:, :, :1].expand(1, 1, 2, 3)
    mask = torch.ones_like(data.mask)
    mask[:, :4, 1] = False
    mask[0, :, 1] = False
    with pytest.raises(ValueError, match="singular at step 4 of series 1"):
        associative.kalman_filter(
            system._replace(H=H), data.x.nan_to_num(), mask, data.lengths, store="last"
        )


def test_bad_shapes_are_refused() -> None:
    system, data = make_case("shared")
    with pytest.raises(ValueError, match="F has shape"):
        associative.kalman_filter(system._replace(F=system.F[..., :2]), *data, store="last")
