"""What the particle kernels for CUDA are made of: draws, weights, cumulative sums and searches.

A program works on a range of `span` particles of one series, a chunk at a time. What the programs
of a series have to agree on is left in memory by one launch and put together by the next, by each
program for itself: maxima, sums of weights, and sums of quantised weights. The last are integers
held in float64, so ancestors do not depend on the number of programs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from seqdgm.kernels import particles_types, philox

UNIT = tl.constexpr(particles_types.UNIT)
RUN = tl.constexpr(philox.RUN)
RESAMPLING = tl.constexpr(philox.RESAMPLING - 2**32)  # the same 32 bits, with a sign
EXPONENT = tl.constexpr(0x3FF << 52)  # of numbers from 1 to 2
BELOW_ONE = tl.constexpr(1.0 - 2.0**-53)
QUARTER = tl.constexpr(math.pi / 2)


class Size(NamedTuple):
    """How the particles of a series are divided among programs."""

    particles: int  # of a series
    programs: int
    span: int  # particles of a program, a multiple of the chunk
    highest: int  # largest power of two up to `particles`
    highest_span: int  # up to `span`
    highest_program: int  # up to `programs`


class Tables(NamedTuple):
    """Where ancestors are looked up."""

    cumulative: Any  # sums of quantised weights from the start of a span (series, particle)
    sums: Any  # of each span (series, programs)
    before: Any  # cumulative `sums`, of every program its own (series, programs, programs)


# ---------------------------------------------------------------- random numbers


@triton.jit
def number(high: tl.tensor, low: tl.tensor) -> tl.tensor:
    """Numbers strictly between 0 and 1 with 52 random bits."""
    bits = (high.to(tl.int64) << 20) | (low >> 12).to(tl.int64)
    return (bits | EXPONENT).to(tl.float64, bitcast=True) - BELOW_ONE


@triton.jit
def uniform(seed: tl.tensor, series: tl.tensor, t: tl.tensor) -> tl.tensor:
    """Number with which a series resamples before step t."""
    counter = (series, tl.to_tensor(0), t, tl.to_tensor(RESAMPLING))
    high, low, _, _ = tl.philox(seed, counter[0], counter[1], counter[2], counter[3])
    return number(high, low)


@triton.jit
def normals(
    seed: tl.tensor, series: tl.tensor, pair: tl.tensor, t: tl.tensor, purpose: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """A pair of normal draws: the first for a particle, the second for the one a run later."""
    first, second, third, fourth = tl.philox(seed, series, pair, t, purpose)
    radius = tl.sqrt(-2.0 * tl.log(number(first, second)))
    cosine, sine = cos_sin(number(third, fourth))
    return radius * cosine, radius * sine


@triton.jit
def cos_sin(turn: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Cosine and sine of 2 pi `turn`, between 0 and 1, to a rounding error or two.

    The functions of CUDA reduce arguments of any size, which takes branches and registers. The
    polynomials up to pi / 4 are those of the C library fdlibm (Sun Microsystems, 1993).
    """
    quarter = tl.floor(4.0 * turn + 0.5)
    x = (4.0 * turn - quarter) * QUARTER
    y = x * x
    p = y * 1.58969099521155010221e-10 - 2.50507602534068634195e-08
    p = y * p + 2.75573137070700676789e-06
    p = y * p - 1.98412698298579493134e-04
    p = y * p + 8.33333333332248946124e-03
    sine = x + x * y * (y * p - 1.66666666666666324348e-01)
    p = y * -1.13596475577881948265e-11 + 2.08757232129817482790e-09
    p = y * p - 2.75573143513906633035e-07
    p = y * p + 2.48015872894767294178e-05
    p = y * p - 1.38888888888741095749e-03
    cosine = 1.0 - 0.5 * y + y * y * (y * p + 4.16666666666666019037e-02)
    k = quarter.to(tl.int32)
    odd = (k & 1) != 0
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((k + 1) & 2) != 0, -c, c), tl.where((k & 2) != 0, -s, s)


# ---------------------------------------------------------------- sums of weights


@triton.jit
def reference_point(top: tl.tensor) -> tl.tensor:
    """What to subtract from log-weights before the exponential: their maximum, where it is one."""
    return tl.where((top > float("-inf")) & (top < float("inf")), top, 0.0)


@triton.jit
def no_weights() -> tl.tuple:
    """Maximum, sum of weights over it and sum of their squares, of nothing."""
    zero = tl.full((), 0.0, tl.float64)
    return zero + float("-inf"), zero, zero


@triton.jit
def add_weights(sums: tl.tuple, log_weights: tl.tensor) -> tl.tuple:
    """Take log-weights into the maximum, the sum of weights and that of squares, both over it."""
    top, total, squares = sums
    new = tl.maximum(top, tl.max(log_weights))
    point = reference_point(new)
    shrink = tl.exp(top - point)
    weights = tl.exp(log_weights - point)
    return (
        new,
        total * shrink + tl.sum(weights),
        squares * shrink * shrink + tl.sum(weights * weights),
    )


@triton.jit
def gather_sums(partials: tl.tensor, size: tl.tuple, PROGRAMS: tl.constexpr) -> tl.tuple:
    """Put the sums of all programs of a series together; they lie at `partials`, (3, programs)."""
    index = tl.arange(0, PROGRAMS)
    inside = index < size.programs
    tops = tl.load(partials + index, mask=inside, other=float("-inf"))
    totals = tl.load(partials + size.programs + index, mask=inside, other=0.0)
    squares = tl.load(partials + 2 * size.programs + index, mask=inside, other=0.0)
    top = tl.max(tops)
    shrink = tl.exp(tops - reference_point(top))
    return top, tl.sum(totals * shrink), tl.sum(squares * shrink * shrink)


@triton.jit
def leave_sums(partials: tl.tensor, program: tl.tensor, sums: tl.tuple, size: tl.tuple) -> None:
    """Leave the sums of a program where `gather_sums` finds them."""
    top, total, squares = sums
    tl.store(partials + program, top)
    tl.store(partials + size.programs + program, total)
    tl.store(partials + 2 * size.programs + program, squares)


@triton.jit
def conclude(sums: tl.tuple) -> tuple[tl.tensor, tl.tensor]:
    """Log of the sum of the weights, and the effective sample size."""
    top, total, squares = sums
    log_total = reference_point(top) + tl.log(total)
    finite = tl.abs(log_total) < float("inf")
    ess = total * total / squares
    return log_total, tl.where(finite, ess, tl.where(log_total == float("-inf"), 0.0, float("nan")))


# ---------------------------------------------------------------- ancestors


@triton.jit
def nearest(x: tl.tensor) -> tl.tensor:
    """Round numbers from 0 to 2^53 to the nearest integer, halves to even ones."""
    return tl.where(x < UNIT, (x + UNIT) - UNIT, x)


@triton.jit
def quantise(log_weights: tl.tensor) -> tl.tensor:
    """Weights as integers held in float64."""
    return nearest(tl.exp(log_weights) * UNIT)


@triton.jit
def tabulate(
    tables: tl.tuple, n: tl.tensor, particle: tl.tensor, q: tl.tensor, carry: tl.tensor,
    size: tl.tuple,
) -> None:  # fmt: skip
    """Write the cumulative sums of the weights of a chunk; `carry` is the sum before it."""
    at = tables.cumulative + n * size.particles + particle
    tl.store(at, carry + tl.cumsum(q), mask=particle < size.particles)


@triton.jit
def total_before(
    tables: tl.tuple, n: tl.tensor, program: tl.tensor, size: tl.tuple, PROGRAMS: tl.constexpr
) -> tl.tensor:
    """Add up the sums of all programs, tabulate them for this one, and return the total."""
    index = tl.arange(0, PROGRAMS)
    inside = index < size.programs
    sums = tl.load(tables.sums + n * size.programs + index, mask=inside, other=0.0)
    own = tables.before + (n * size.programs + program) * size.programs
    tl.store(own + index, tl.cumsum(sums), mask=inside)
    tl.debug_barrier()
    return tl.sum(sums)


@triton.jit
def search(sums: tl.tensor, length: tl.tensor, highest: tl.tensor, level: tl.tensor) -> tl.tensor:
    """Count the first of the `length` increasing sums that do not exceed the level."""
    found = tl.zeros(level.shape, tl.int32)
    step = tl.to_tensor(highest)
    while step > 0:
        probe = found + step
        value = tl.load(sums + probe - 1, mask=probe <= length, other=float("inf"))
        found = tl.where(value <= level, probe, found)
        step = step >> 1
    return found


@triton.jit
def find(
    tables: tl.tuple,
    n: tl.tensor,
    program: tl.tensor,
    total: tl.tensor,
    level: tl.tensor,
    size: tl.tuple,
    PROGRAMS: tl.constexpr,
) -> tl.tensor:
    """Particles at the levels: the first whose cumulative sum exceeds it."""
    level = tl.minimum(level, total - 1.0)
    sums = tables.cumulative + n * size.particles
    if PROGRAMS == 1:
        found = search(sums, size.particles, size.highest, level)
    else:
        before = tables.before + (n * size.programs + program) * size.programs
        owner = search(before, size.programs, size.highest_program, level)
        # A total that is no number is found nowhere.
        owner = tl.minimum(owner, size.programs - 1)
        level -= tl.load(before + owner - 1, mask=owner > 0, other=0.0)
        first = owner * size.span
        length = tl.minimum(size.span, size.particles - first)
        found = first + search(sums + first, length, size.highest_span, level)
    return tl.minimum(found, size.particles - 1)
