"""Gaussian kernels for CUDA: a Triton program for a block of series, all steps in one launch.

Tensors are read where they lie; an axis of length 1, or one that the caller expanded, has stride 0.
Where R is not diagonal, the observations are decorrelated beforehand. A launch allocates nothing:
outputs, and the gains that the smoother reads, are torch's; a large panel is done in parts. There
is no gradient. With ``TRITON_INTERPRET=1`` in the environment before the first import, the same
kernels run on tensors of the CPU, slowly, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import LARGEST_CUDA_STATE
from seqdgm.kernels.cuda_filter import filter_kernel
from seqdgm.kernels.cuda_smoother import smoother_kernel
from seqdgm.kernels.cuda_steps import (
    ALL,
    END,
    SMOOTH,
    Back,
    Carry,
    Data,
    Gains,
    Histories,
    Matrices,
    Moments,
    Size,
)
from seqdgm.kernels.reference import _factorise, _semidefinite_root
from seqdgm.kernels.types import Filtered, Smoothed, Store, System, check_arguments

# What a part of the panel may take besides its results.
_SCRATCH_BYTES = 2**30


class Blocks(NamedTuple):
    """How a kernel is laid out: series of a program, padded state, warps."""

    B: int
    S: int
    warps: int


class _Part(NamedTuple):
    """Some series of a panel, with uncorrelated errors, ready for the kernels."""

    series: slice
    system: Matrices
    by_series: Matrices
    by_step: Matrices
    data: Data
    carry: Carry
    size: Size
    exact: bool
    diffuse: bool


def kalman_filter(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    store: Store,
) -> Filtered:
    """Kalman filter on a GPU, as documented in `seqdgm.kernels.kalman_filter`.

    Raises
    ------
    ValueError
        If shapes or types do not fit together, the state has more than 16 elements, or a tensor
        is not on the GPU of `x`.
    """
    _check(system, x, mask, lengths)
    n, steps, obs = x.shape
    state = system.m0.shape[-1]
    diffuse = bool(system.Pinf.any())
    rows = n if store == "all" else 0
    out = Histories(
        x.new_full((rows, steps, state), math.nan),
        x.new_full((rows, steps, state, state), math.nan),
        x.new_zeros((rows if diffuse else 0, steps, state, state)),
        x.new_full((rows, steps, state), math.nan),
        x.new_full((rows, steps, state, state), math.nan),
        x.new_full((rows, steps, obs), math.nan),
        x.new_full((rows, steps, obs), math.nan),
    )
    ends = []
    for part in _parts(system, x, mask, lengths, 0):
        views = Histories(*(field[part.series] for field in out))
        none = x.new_empty(0)
        _forward(part, views, Gains(none, none, none), ALL.value if store == "all" else END.value)
        ends.append(part.carry)
    result = _result(torch.cat([end.totals for end in ends], 1))
    if store == "likelihood":
        return result
    if store == "last":
        A = torch.cat([end.factor for end in ends])
        return result._replace(
            mean=_blank(torch.cat([end.mean for end in ends])[:, None], lengths),
            cov=_blank(torch.cat([end.cov for end in ends])[:, None], lengths),
            cov_inf=_blank((A @ A.mT)[:, None], lengths) if diffuse else None,
        )
    cov_inf = _blank(out.cov_inf, lengths) if diffuse else None
    return Filtered(*result[:6], *out._replace(cov_inf=cov_inf))


def kalman_smoother(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    lag_one: bool,
) -> Smoothed:
    """Fixed-interval smoother on a GPU, as documented in `seqdgm.kernels.kalman_smoother`.

    Raises
    ------
    ValueError
        As `kalman_filter` does.
    """
    _check(system, x, mask, lengths)
    n, steps, obs = x.shape
    state = system.m0.shape[-1]
    diffuse = bool(system.Pinf.any())
    out = Moments(
        x.new_full((n, steps, state), math.nan),
        x.new_full((n, steps, state, state), math.nan),
        x.new_full((n if lag_one else 0, max(steps - 1, 0), state, state), math.nan),
    )
    totals = []
    squares = state * state * (2 if diffuse else 1)
    for part in _parts(system, x, mask, lengths, state + squares + obs * (2 * state + 4)):
        count = part.size.series
        none = x.new_empty(0)
        filtered = Histories(
            x.new_empty((count, steps, state)),
            x.new_empty((count, steps, state, state)),
            x.new_empty((count if diffuse else 0, steps, state, state)),
            *(none,) * 4,
        )
        gains = Gains(
            x.new_empty((count, steps, obs, state)),
            x.new_empty((count if diffuse else 0, steps, obs, state)),
            x.new_empty((count, steps, obs, 4)),
        )
        _forward(part, filtered, gains, SMOOTH.value)
        _backward(part, filtered, Moments(*(f[part.series] for f in out)), gains, lag_one)
        totals.append(part.carry.totals)
    result = _result(torch.cat(totals, 1))
    return Smoothed(
        result.loglik, out.mean, out.cov, out.lag_one if lag_one else None, result.rank_left
    )


def layout(state: int) -> Blocks:
    """Layout for a number of state elements: a warp has 32 to 64 elements of a covariance."""
    S = triton.next_power_of_2(state)
    # Two by two, Triton does not get through compiling the smoother in minutes; as four it does.
    S = 4 if S == 2 else S
    return Blocks(max(1, 32 // (S * S)), S, 4 if S > 8 else 1)


def _forward(part: _Part, out: Histories, gains: Gains, mode: int) -> None:
    """Launch the forward kernel: for the diffuse steps, where there are any, and the others."""
    B, S, warps = layout(part.size.state)
    grid = (triton.cdiv(part.size.series, B),)
    with torch.cuda.device_of(part.data.x):
        for diffuse in (True, False) if part.diffuse else (False,):
            filter_kernel[grid](
                *part[1:6], out, gains, part.size, B=B, S=S, MODE=mode, EXACT=part.exact,
                DIFFUSE=diffuse, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip


def _backward(part: _Part, filtered: Histories, out: Moments, gains: Gains, lag_one: bool) -> None:
    """Launch the backward kernel: for the proper steps, and the diffuse ones where there are."""
    B, S, warps = layout(part.size.state)
    grid = (triton.cdiv(part.size.series, B),)
    mean, cov = part.carry[:2]
    carry = Back(torch.empty_like(mean), torch.empty_like(cov), part.carry.steps)
    with torch.cuda.device_of(part.data.x):
        for diffuse in (False, True) if part.diffuse else (False,):
            smoother_kernel[grid](
                *part[1:5], carry, filtered, out, gains, part.size, B=B, S=S, LAG_ONE=lag_one,
                DIFFUSE=diffuse, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip


def _parts(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    scratch: int,
) -> Iterator[_Part]:
    """Divide the panel so that no part needs too much memory, `scratch` numbers a step."""
    n, steps, obs = x.shape
    state = system.m0.shape[-1]
    diagonal = torch.diagonal(system.R, dim1=2, dim2=3)
    correlated = bool((system.R - torch.diag_embed(diagonal)).any())
    if correlated:
        scratch += 3 * obs * (obs + state + 1)
    count = n if scratch == 0 else max(1, _SCRATCH_BYTES // (8 * scratch * steps))
    for low in range(0, n, count):
        series = slice(low, low + count)
        own = System(*(field[series] if len(field) > 1 else field for field in system))
        data = Data(x[series], mask[series], lengths[series])
        yield _prepare(series, own, data, correlated)


def _prepare(series: slice, system: System, data: Data, correlated: bool) -> _Part:
    """Bring a part of the panel into the form that the kernels read."""
    x, mask, lengths = data
    var = torch.diagonal(system.R, dim1=2, dim2=3)
    H, d = system.H, system.d
    if correlated:
        x, H, var = _decorrelate(system, x, mask)
        d = d.new_zeros(1, 1, d.shape[-1])
    exact = bool(((var <= 0) & mask).any())
    n, steps, obs = x.shape
    state = system.m0.shape[-1]
    tensors, by_series, by_step = [], [], []
    for field in (system.F, system.Q, H, var, system.b, d):
        tensor = _narrow(_narrow(field, 0), 1).contiguous()
        tensors.append(tensor)
        by_series.append(tensor.stride(0) if len(tensor) > 1 else 0)
        by_step.append(tensor.stride(1) if tensor.shape[1] > 1 else 0)
    A = _semidefinite_root(system.Pinf)
    totals = x.new_zeros(5, n)
    totals[4] = (A != 0).any(1).sum(1)
    blocks = triton.cdiv(n, layout(state).B)
    carry = Carry(
        system.m0.expand(n, -1).clone(memory_format=torch.contiguous_format),
        system.P0.expand(n, -1, -1).clone(memory_format=torch.contiguous_format),
        A.expand(n, -1, -1).clone(memory_format=torch.contiguous_format),
        totals,
        torch.zeros(blocks, dtype=torch.int64, device=x.device),
    )
    return _Part(
        series,
        Matrices(*tensors),
        Matrices(*by_series),
        Matrices(*by_step),
        Data(x.contiguous(), mask.contiguous().view(torch.uint8), lengths.contiguous()),
        carry,
        Size(n, steps, state, obs),
        exact,
        bool(system.Pinf.any()),
    )


def _decorrelate(
    system: System, x: Float[Tensor, "series time obs"], mask: Bool[Tensor, "series time obs"]
) -> tuple[
    Float[Tensor, "series time obs"],
    Float[Tensor, "series time obs state"],
    Float[Tensor, "series time obs"],
]:
    """L^-1 (x - d), L^-1 H and the variances in R = L diag(var) L', for what is observed."""
    n, steps, obs = x.shape
    R = torch.where(mask[..., :, None] & mask[..., None, :], system.R, 0.0)
    L, var = _factorise(R.flatten(0, 1))
    y = torch.where(mask, x - system.d, 0.0)
    h = torch.where(mask[..., None], system.H, 0.0)
    both = torch.cat([h, y[..., None]], -1).flatten(0, 1)
    both = torch.linalg.solve_triangular(L, both, upper=False, unitriangular=True)
    both = both.reshape(n, steps, obs, -1)
    return both[..., -1], both[..., :-1], var.reshape(n, steps, obs)


def _narrow(field: Tensor, axis: int) -> Tensor:
    """Undo the expansion of an axis."""
    return field.narrow(axis, 0, 1) if field.stride(axis) == 0 else field


def _result(totals: Float[Tensor, "five series"]) -> Filtered:
    n_obs, logdet, quad, n_diffuse, rank = totals
    loglik = -0.5 * (n_obs * math.log(2.0 * math.pi) + logdet + quad)
    return Filtered(loglik, n_obs.long(), logdet, quad, n_diffuse.long(), rank.long())


def _blank(history: Tensor, lengths: Int[Tensor, "series"]) -> Tensor:
    """Write NaN beyond the end of each series."""
    past = torch.arange(history.shape[1], device=history.device) >= lengths[:, None]
    return history.masked_fill_(past.reshape(past.shape + (1,) * (history.ndim - 2)), math.nan)


def _check(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
) -> None:
    """Refuse what the kernels cannot read."""
    check_arguments(system, x, mask, lengths)
    state = system.m0.shape[-1]
    if state > LARGEST_CUDA_STATE:
        raise ValueError(
            f"the 'cuda' kernels take up to {LARGEST_CUDA_STATE} state elements, not {state}; use "
            "'reference' or 'associative'"
        )
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"the 'cuda' kernels cannot read x on {x.device}; use 'cpu' or x.cuda()")
    for name, tensor in (*system._asdict().items(), ("mask", mask), ("lengths", lengths)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x on {x.device}; move it there")
