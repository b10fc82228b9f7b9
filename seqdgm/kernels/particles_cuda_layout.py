"""How the particle kernels for CUDA are laid out."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from seqdgm.kernels.particles_cuda_steps import Size, Tables

BLOCK = 4096  # particles up to which one program does a series
RESIDENT = 1024  # programs that fill a GPU several times over
SMALLEST_CHUNK, LARGEST_CHUNK = 128, 512
EACH = 2  # particles of a thread: a pair, which shares its normal draws


class Layout(NamedTuple):
    """How a kernel is laid out: the division of a series, particles done at once, warps."""

    size: Size
    chunk: int
    programs: int  # padded
    warps: int

    @property
    def one(self) -> bool:
        """Whether one program does all particles of a series."""
        return self.size.programs == 1


def layout(n: int, count: int) -> Layout:
    """Layout for `n` series of `count` particles."""
    chunk = min(max(triton.next_power_of_2(count), SMALLEST_CHUNK), LARGEST_CHUNK)
    programs = 1
    if count > BLOCK:
        programs = max(1, min(triton.cdiv(count, chunk), RESIDENT // n))
    span = triton.cdiv(triton.cdiv(count, programs), chunk) * chunk
    programs = triton.cdiv(count, span)
    size = Size(count, programs, span, *(1 << k.bit_length() - 1 for k in (count, span, programs)))
    return Layout(size, chunk, triton.next_power_of_2(programs), chunk // (32 * EACH))


def tables(like: Tensor, n: int, plan: Layout) -> Tables:
    """Room for cumulative sums."""
    programs = plan.size.programs
    return Tables(
        like.new_empty(n, plan.size.particles),
        like.new_empty(n, programs),
        like.new_empty(n, programs, programs),
    )


def readable(x: Tensor) -> Tensor:
    """Refuse tensors that the kernels cannot read."""
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"the 'cuda' kernels cannot read tensors on {x.device}; use 'cpu'")
    return x.detach()
