"""Weights, resampling, gathering and backward draws in Triton.

Where one program does all particles of a series, one launch does everything. Where there are more,
a kernel is launched for every `PHASE`: a launch is what makes the programs wait for each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqdgm.kernels.particles_cuda_steps import (
    UNIT,
    add_weights,
    conclude,
    find,
    gather_sums,
    leave_sums,
    nearest,
    no_weights,
    quantise,
    reference_point,
    tabulate,
    total_before,
)

ALL = tl.constexpr(0)  # the phases: all of them, or
FIRST = tl.constexpr(1)
SECOND = tl.constexpr(2)
LAST = tl.constexpr(3)
SYSTEMATIC = tl.constexpr(0)
STRATIFIED = tl.constexpr(1)
MULTINOMIAL = tl.constexpr(2)
RESIDUAL = tl.constexpr(3)
KILLING = tl.constexpr(4)


@triton.jit
def weigh_kernel(
    log_weights: tl.tensor,
    normalised: tl.tensor,
    result: tl.tensor,
    partials: tl.tensor,
    size: tl.tuple,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PHASE: tl.constexpr,
) -> None:
    """Normalise weights; `result` is the total and the effective sample size, (series, 2)."""
    n, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    first = program * size.span
    last = tl.minimum(first + size.span, size.particles)
    row, index = n * size.particles, tl.arange(0, CHUNK)
    own = partials + n * 3 * size.programs
    sums = no_weights()
    if PHASE != LAST:
        for start in range(first, last, CHUNK):
            particle = start + index
            inside = particle < last
            values = tl.load(log_weights + row + particle, mask=inside, other=float("-inf"))
            sums = add_weights(sums, values)
    if PHASE == FIRST:
        leave_sums(own, program, sums, size)
    else:
        if PHASE == LAST:
            sums = gather_sums(own, size, PROGRAMS)
        total, ess = conclude(sums)
        shift = reference_point(total)
        for start in range(first, last, CHUNK):
            particle = start + index
            inside = particle < last
            values = tl.load(log_weights + row + particle, mask=inside)
            tl.store(normalised + row + particle, values - shift, mask=inside)
        tl.store(result + 2 * n, total, mask=program == 0)
        tl.store(result + 2 * n + 1, ess, mask=program == 0)


# ---------------------------------------------------------------- resampling


@triton.jit
def resample_kernel(
    log_weights: tl.tensor,
    uniforms: tl.tensor,
    needed: tl.tensor,
    ancestors: tl.tensor,
    tables: tl.tuple,
    copies: tl.tuple,
    spans: tl.tensor,
    size: tl.tuple,
    SCHEME: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PHASE: tl.constexpr,
) -> None:
    """Draw ancestors.

    The first phase adds up the weights, the second, of residual resampling only, tabulates copies
    and remainders, and the last one draws. `spans` holds the sum of the weights and the largest one
    of the span of each program, (series, 2, programs). `tables` is what is drawn from.
    """
    n, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    first = program * size.span
    place = (n, program, first, tl.minimum(first + size.span, size.particles))
    if tl.load(needed + n) != 0:
        if (PHASE == ALL) | (PHASE == FIRST):
            add_up(log_weights, tables, spans, place, size, SCHEME, CHUNK)
            tl.debug_barrier()
        if (SCHEME == RESIDUAL) & ((PHASE == ALL) | (PHASE == SECOND)):
            divide(log_weights, tables, copies, spans, place, size, CHUNK, PROGRAMS)
            tl.debug_barrier()
        if (PHASE == ALL) | (PHASE == LAST):
            draw(
                log_weights, uniforms, ancestors, tables, copies, spans, place, size,
                SCHEME, CHUNK, PROGRAMS,
            )  # fmt: skip
    elif (PHASE == ALL) | (PHASE == LAST):
        for start in range(first, place[3], CHUNK):
            particle = start + tl.arange(0, CHUNK)
            at = ancestors + n * size.particles + particle
            tl.store(at, particle.to(tl.int64), mask=particle < place[3])


@triton.jit
def load_weights(
    log_weights: tl.tensor,
    n: tl.tensor,
    particle: tl.tensor,
    last: tl.tensor,
    size: tl.tuple,
) -> tl.tensor:
    """Quantised weights of a chunk; zero beyond the end."""
    at = log_weights + n * size.particles + particle
    return quantise(tl.load(at, mask=particle < last, other=float("-inf")))


@triton.jit
def add_up(
    log_weights: tl.tensor,
    tables: tl.tuple,
    spans: tl.tensor,
    place: tl.tuple,
    size: tl.tuple,
    SCHEME: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Sum and largest weight of a span, and unless copies come first the cumulative sums."""
    n, program, first, last = place
    carry = tl.full((), 0.0, tl.float64)
    top = carry
    for start in range(first, last, CHUNK):
        particle = start + tl.arange(0, CHUNK)
        q = load_weights(log_weights, n, particle, last, size)
        if SCHEME != RESIDUAL:
            tabulate(tables, n, particle, q, carry, size)
        carry += tl.sum(q)
        top = tl.maximum(top, tl.max(q))
    own = spans + n * 2 * size.programs + program
    tl.store(own, carry)
    tl.store(own + size.programs, top)
    if SCHEME != RESIDUAL:
        tl.store(tables.sums + n * size.programs + program, carry)


@triton.jit
def load_spans(
    spans: tl.tensor, n: tl.tensor, size: tl.tuple, PROGRAMS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Sum of all weights of a series, and the largest."""
    index = tl.arange(0, PROGRAMS)
    inside = index < size.programs
    row = spans + n * 2 * size.programs + index
    total = tl.sum(tl.load(row, mask=inside, other=0.0))
    return total, tl.max(tl.load(row + size.programs, mask=inside, other=0.0))


@triton.jit
def divide(
    log_weights: tl.tensor,
    tables: tl.tuple,
    copies: tl.tuple,
    spans: tl.tensor,
    place: tl.tuple,
    size: tl.tuple,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Cumulative sums of the copies of the particles of a span, and of the remainders."""
    n, program, first, last = place
    total, _ = load_spans(spans, n, size, PROGRAMS)
    count = tl.to_tensor(size.particles).to(tl.float64)
    carry = tl.full((), 0.0, tl.float64)
    whole = carry
    for start in range(first, last, CHUNK):
        particle = start + tl.arange(0, CHUNK)
        q = load_weights(log_weights, n, particle, last, size)
        expected = q * (count / total)
        sure = tl.floor(expected)
        rest = nearest((expected - sure) * (UNIT / count))
        tabulate(copies, n, particle, sure, whole, size)
        tabulate(tables, n, particle, rest, carry, size)
        whole += tl.sum(sure)
        carry += tl.sum(rest)
    tl.store(copies.sums + n * size.programs + program, whole)
    tl.store(tables.sums + n * size.programs + program, carry)


@triton.jit
def draw(
    log_weights: tl.tensor,
    uniforms: tl.tensor,
    ancestors: tl.tensor,
    tables: tl.tuple,
    copies: tl.tuple,
    spans: tl.tensor,
    place: tl.tuple,
    size: tl.tuple,
    SCHEME: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Ancestors of the particles of a span; -1 where no weight is positive."""
    n, program, first, last = place
    total = total_before(tables, n, program, size, PROGRAMS)
    weight, top = load_spans(spans, n, size, PROGRAMS)
    if SCHEME == RESIDUAL:
        whole = total_before(copies, n, program, size, PROGRAMS)
    numbers = uniforms + n * size.particles
    if SCHEME == SYSTEMATIC:
        numbers = uniforms + n
    if SCHEME == KILLING:
        numbers = uniforms + n * 2 * size.particles
    for start in range(first, last, CHUNK):
        particle = start + tl.arange(0, CHUNK)
        inside = particle < last
        if SCHEME == SYSTEMATIC:
            u = tl.load(numbers)
        elif SCHEME == KILLING:
            u = tl.load(numbers + size.particles + particle, mask=inside, other=0.0)
        else:
            u = tl.load(numbers + particle, mask=inside, other=0.0)
        if (SCHEME == SYSTEMATIC) | (SCHEME == STRATIFIED):
            level = (particle.to(tl.float64) + u) * (total / size.particles)
        else:
            level = u * total
        found = find(tables, n, program, total, level, size, PROGRAMS)
        if SCHEME == RESIDUAL:
            order = particle.to(tl.float64)
            copied = find(copies, n, program, whole, order, size, PROGRAMS)
            found = tl.where(order < whole, copied, found)
        if SCHEME == KILLING:
            q = load_weights(log_weights, n, particle, last, size)
            chance = tl.load(numbers + particle, mask=inside, other=0.0)
            found = tl.where(chance * top < q, particle, found)
        found = tl.where(weight > 0.0, found, -1)
        tl.store(ancestors + n * size.particles + particle, found.to(tl.int64), mask=inside)


# ---------------------------------------------------------------- gathering and backward draws


@triton.jit
def gather_kernel(
    x: tl.tensor,
    ancestors: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    given: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Rows of `width` elements: `count` of a series, out of `given`."""
    n = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    ancestor = tl.load(ancestors + n * count + row, mask=row < count, other=0)
    source = x + (n * given + ancestor) * width
    target = out + (n * count + row) * width
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        inside = (row < count) & (column < width)
        tl.store(target + column, tl.load(source + column, mask=inside), mask=inside)


@triton.jit
def pick_kernel(
    log_weights: tl.tensor,
    uniforms: tl.tensor,
    picked: tl.tensor,
    count: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """One draw of a row: a pass for the maximum and the sum, one to quantise, one to count."""
    n = tl.program_id(0).to(tl.int64)
    row, index = log_weights + n * count, tl.arange(0, CHUNK)
    sums = no_weights()
    zero = sums[1]
    for start in range(0, count, CHUNK):
        values = tl.load(row + start + index, mask=start + index < count, other=float("-inf"))
        sums = add_weights(sums, values)
    top, log_sum = sums[0], tl.log(sums[1])
    total = zero
    for start in range(0, count, CHUNK):
        values = tl.load(row + start + index, mask=start + index < count, other=float("-inf"))
        total += tl.sum(quantise(values - top - log_sum))
    level = tl.minimum(tl.load(uniforms + n) * total, total - 1.0)
    carry, found = zero, tl.program_id(0) * 0
    for start in range(0, count, CHUNK):
        values = tl.load(row + start + index, mask=start + index < count, other=float("-inf"))
        q = quantise(values - top - log_sum)
        below = (start + index < count) & (carry + tl.cumsum(q) <= level)
        found += tl.sum(below.to(tl.int32))
        carry += tl.sum(q)
    tl.store(picked + n, tl.where(total > 0.0, found, -1).to(tl.int64))
