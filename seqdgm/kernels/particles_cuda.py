"""Particle kernels for CUDA, in Triton.

One program does all particles of a series while they fit a block or there are series enough to
fill a GPU; otherwise several programs share a series. There is no gradient. With
``TRITON_INTERPRET=1`` in the environment before the first import, the same kernels run on tensors
of the CPU, slowly, for tests. Documented in `seqdgm.kernels.particles`, with the arithmetic of
`seqdgm.kernels.particles_types`.
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.particles_cuda_bootstrap import (
    bootstrap_linear_gaussian,
    bootstrap_volatility,
)
from seqdgm.kernels.particles_cuda_layout import layout, readable, tables
from seqdgm.kernels.particles_cuda_weights import (
    ALL,
    FIRST,
    LAST,
    SECOND,
    gather_kernel,
    pick_kernel,
    resample_kernel,
    weigh_kernel,
)
from seqdgm.kernels.particles_types import SCHEMES, Scheme, Weighed

__all__ = [
    "bootstrap_linear_gaussian",
    "bootstrap_volatility",
    "gather",
    "pick",
    "resample",
    "weigh",
]

GATHERED, WIDEST = 1024, 128  # elements that a program gathers at once, and columns


def weigh(log_weights: Float[Tensor, "series particle"]) -> Weighed:
    """Normalise weights."""
    log_weights = readable(log_weights).contiguous()
    n, count = log_weights.shape
    plan = layout(n, count)
    normalised, result = torch.empty_like(log_weights), log_weights.new_empty(n, 2)
    partials = log_weights.new_empty(n, 3, plan.size.programs)
    with torch.cuda.device_of(log_weights):
        for phase in (ALL,) if plan.one else (FIRST, LAST):
            weigh_kernel[(plan.size.programs, n)](
                log_weights, normalised, result, partials, plan.size, CHUNK=plan.chunk,
                PROGRAMS=plan.programs, PHASE=phase.value, num_warps=plan.warps,
                enable_fp_fusion=True,
            )  # fmt: skip
    return Weighed(normalised, result[:, 0], result[:, 1])


def resample(
    scheme: Scheme,
    log_weights: Float[Tensor, "series particle"],
    uniforms: Float[Tensor, "series number"],
    needed: Bool[Tensor, "series"] | None,
) -> Int[Tensor, "series particle"]:
    """Ancestors; -1 in rows without a positive weight."""
    log_weights = readable(log_weights).contiguous()
    n, count = log_weights.shape
    plan = layout(n, count)
    if needed is None:
        needed = torch.ones(n, dtype=torch.bool, device=log_weights.device)
    ancestors = torch.empty(n, count, dtype=torch.int64, device=log_weights.device)
    table = tables(log_weights, n, plan)
    copies = tables(log_weights, n, plan) if scheme == "residual" else table
    spans = log_weights.new_empty(n, 2, plan.size.programs)
    phases = (FIRST, SECOND, LAST) if scheme == "residual" else (FIRST, LAST)
    with torch.cuda.device_of(log_weights):
        for phase in (ALL,) if plan.one else phases:
            # The reference rounds after every operation, and so do ancestors.
            resample_kernel[(plan.size.programs, n)](
                log_weights, uniforms.contiguous(), needed.contiguous().view(torch.uint8),
                ancestors, table, copies, spans, plan.size, SCHEME=SCHEMES.index(scheme),
                CHUNK=plan.chunk, PROGRAMS=plan.programs, PHASE=phase.value, num_warps=plan.warps,
                enable_fp_fusion=False,
            )  # fmt: skip
    return ancestors


def gather(x: Tensor, ancestors: Int[Tensor, "series particle"]) -> Tensor:
    """Pick particles."""
    flat = readable(x).contiguous()
    n, count = ancestors.shape
    given, width = x.shape[1], max(1, x[0, 0].numel())
    out = torch.empty(n, count, *x.shape[2:], dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    # A complex number is two others; what the bits of an element mean does not matter.
    words = max(1, x.element_size() // 8)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(x.element_size(), torch.int64)
    WIDTH = min(triton.next_power_of_2(width * words), WIDEST)
    ROWS = GATHERED // WIDTH
    with torch.cuda.device_of(x):
        gather_kernel[(triton.cdiv(count, ROWS), n)](
            flat.view(-1).view(kind), ancestors.contiguous(), out.view(-1).view(kind), count,
            given, width * words, ROWS=ROWS, WIDTH=WIDTH, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def pick(
    log_weights: Float[Tensor, "row particle"], uniforms: Float[Tensor, "row"]
) -> Int[Tensor, "row"]:
    """One draw a row; -1 in rows without a positive weight."""
    log_weights = readable(log_weights).contiguous()
    rows, count = log_weights.shape
    picked = torch.empty(rows, dtype=torch.int64, device=log_weights.device)
    if rows == 0:
        return picked
    plan = layout(rows, count)
    # Three passes with little to do between barriers: half the warps wait less for each other.
    with torch.cuda.device_of(log_weights):
        pick_kernel[(rows,)](
            log_weights, uniforms.contiguous(), picked, count, CHUNK=plan.chunk,
            num_warps=plan.warps // 2, enable_fp_fusion=True,
        )  # fmt: skip
    return picked
