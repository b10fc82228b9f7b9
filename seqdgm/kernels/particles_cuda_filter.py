"""Fused bootstrap filters in Triton.

A step has two halves. In the first the particles find their ancestors, move and are weighed. In the
second the sum of all weights is known: the step is concluded, and where the next one resamples the
cumulative sums are tabulated. One program that does a series runs through all steps in one launch;
several programs are launched for each half, and what they know of the series lies in memory.

Particles come in pairs, `RUN` apart, that share a pair of normal draws: a tile has two rows, the
first and the second of each pair, and a thread has both. Particles are kept in two copies, one read
and one written, that swap at every step; first ancestors are too, and swap when they change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from seqdgm.kernels.particles_cuda_models import move_linear, move_volatility
from seqdgm.kernels.particles_cuda_steps import (
    RUN,
    add_weights,
    conclude,
    find,
    gather_sums,
    leave_sums,
    no_weights,
    quantise,
    tabulate,
    total_before,
    uniform,
)


class Status(NamedTuple):
    """What is known of a series after a step; kept in memory as float64."""

    shift: Any  # log of the sum of the weights as they are kept
    ess: Any
    alive: Any  # whether the weights always had a sum
    needed: Any  # whether to resample before the next step
    resamplings: Any
    steps: Any  # that were done


class Cloud(NamedTuple):
    """The particles of all series."""

    z: Any  # (2, series, state, particle)
    log_weights: Any  # (series, particle)
    eve: Any  # first ancestors, int32 (2, series, particle)
    partials: Any  # sums of the weights of each span (series, 3, programs)
    moments: Any  # weight, mean and sum of squares of each span (series, state, 3, programs)
    status: Any  # (2, series, 6)


class Panel(NamedTuple):
    """What is observed, and how to filter it."""

    lengths: Any
    seen: Any  # whether anything is, as bytes (series, time)
    seed: Any  # int64 (1,)
    options: Any  # effective sample size below which to resample, log of a uniform weight (2,)


class Results(NamedTuple):
    """What the filter writes; `mean` and `var` have no elements where they are not wanted."""

    increments: Any  # (series, time)
    ess: Any  # (series, time)
    mean: Any  # (series, time, state)
    var: Any  # (series, time, state)


class Axes(NamedTuple):
    """Lengths of the axes besides particles and state."""

    series: int
    steps: int
    obs: int


# ---------------------------------------------------------------- first half of a step


@triton.jit
def move(
    t: tl.tensor,
    place: tl.tuple,
    status: tl.tuple,
    model: tl.tuple,
    panel: tl.tuple,
    cloud: tl.tuple,
    tables: tl.tuple,
    size: tl.tuple,
    axes: tl.tuple,
    LINEAR: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> tl.tuple:
    """Resample, move and weigh the particles of a span; return the sums of its weights."""
    n, program, first, last = place
    shift, _, _, needed, resamplings, _ = status
    seed, flat = tl.load(panel.seed), tl.load(panel.options + 1)
    old, new = ((t + 1) & 1) * axes.series + n, (t & 1) * axes.series + n
    weights = cloud.log_weights + n * size.particles
    draws = (panel.seed, n.to(tl.int32), t)
    total, u = flat * 0.0, flat * 0.0
    if needed != 0:
        total = total_before(tables, n, program, size, PROGRAMS)
        u = uniform(seed, n.to(tl.int32), t)
    sums = no_weights()
    for start in range(first, last, CHUNK):
        pair = (start // 2 + tl.arange(0, CHUNK // 2))[None, :]
        half = tl.arange(0, 2)[:, None]
        particle = (pair // RUN) * (2 * RUN) + pair % RUN + RUN * half
        inside = particle < last
        ancestor = particle
        if needed != 0:
            level = (particle.to(tl.float64) + u) * (total / size.particles)
            ancestor = find(tables, n, program, total, level, size, PROGRAMS)
            heirs = cloud.eve + (((resamplings + 1) & 1) * axes.series + n) * size.particles
            eve = cloud.eve + ((resamplings & 1) * axes.series + n) * size.particles
            eve = tl.load(eve + ancestor, mask=inside)
            tl.store(heirs + particle, eve, mask=inside)
            log_weights = tl.zeros(ancestor.shape, tl.float64) + flat
        else:
            log_weights = tl.load(weights + particle, mask=inside, other=float("-inf")) - shift
        before = cloud.z + old * STATE * size.particles + ancestor
        known = particle < tl.where(t > 0, last, 0)
        if LINEAR:
            z, gain = move_linear(
                draws, pair, half, before, known, model, size.particles, axes.steps, axes.obs, STATE
            )
        else:
            z, gain = move_volatility(draws, pair, half, before, known, model)
        for i in tl.static_range(STATE):
            tl.store(cloud.z + (new * STATE + i) * size.particles + particle, z[i], mask=inside)
        log_weights = tl.where(inside, log_weights + gain, float("-inf"))
        tl.store(weights + particle, log_weights, mask=inside)
        sums = add_weights(sums, log_weights)
    return sums


# ---------------------------------------------------------------- second half


@triton.jit
def settle(
    t: tl.tensor,
    place: tl.tuple,
    status: tl.tuple,
    sums: tl.tuple,
    panel: tl.tuple,
    cloud: tl.tuple,
    tables: tl.tuple,
    results: tl.tuple,
    size: tl.tuple,
    axes: tl.tuple,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MOMENTS: tl.constexpr,
) -> tl.tuple:
    """Conclude a step, and tabulate the weights where the next one resamples."""
    n, program, _, _ = place
    _, ess, _, needed, resamplings, _ = status
    at = n * axes.steps + t
    total, new_ess = conclude(sums)
    update = tl.load(panel.seen + at) != 0
    good = update & (tl.abs(total) < float("inf"))
    alive = good | ~update
    resamplings += needed
    ess = tl.where(good, new_ess, tl.where(needed != 0, size.particles, ess))
    shift = tl.where(good, total, 0.0)
    tl.store(results.increments + at, total, mask=update & (program == 0))
    tl.store(results.ess + at, ess, mask=alive & (program == 0))
    further = (t + 1 < tl.load(panel.lengths + n)) & (size.particles > 1)
    resample = alive & further & (ess < tl.load(panel.options))
    own = cloud.log_weights + n * size.particles
    if resample:
        tabulate_span(own, place, shift, tables, size, CHUNK)
    if MOMENTS:
        leave_moments(
            t, place, alive, shift, own, cloud, results, size, axes, STATE, CHUNK, PROGRAMS
        )
    return shift, ess, alive.to(tl.int32), resample.to(tl.int32), resamplings, t + 1


@triton.jit
def tabulate_span(
    log_weights: tl.tensor,
    place: tl.tuple,
    shift: tl.tensor,
    tables: tl.tuple,
    size: tl.tuple,
    CHUNK: tl.constexpr,
) -> None:
    """Cumulative sums of the quantised weights of a span."""
    n, program, first, last = place
    carry = tl.full((), 0.0, tl.float64)
    for start in range(first, last, CHUNK):
        particle = start + tl.arange(0, CHUNK)
        values = tl.load(log_weights + particle, mask=particle < last, other=float("-inf"))
        q = quantise(values - shift)
        tabulate(tables, n, particle, q, carry, size)
        carry += tl.sum(q)
    tl.store(tables.sums + n * size.programs + program, carry)


@triton.jit
def span_moments(
    log_weights: tl.tensor, z: tl.tensor, place: tl.tuple, shift: tl.tensor, CHUNK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weight of a span, mean of a state element in it, and weighted sum of squares about that."""
    _, _, first, last = place
    weight = tl.full((), 0.0, tl.float64)
    mean, squares = weight, weight
    for start in range(first, last, CHUNK):
        particle = start + tl.arange(0, CHUNK)
        inside = particle < last
        w = tl.exp(tl.load(log_weights + particle, mask=inside, other=float("-inf")) - shift)
        weight += tl.sum(w)
        mean += tl.sum(w * tl.load(z + particle, mask=inside, other=0.0))
    mean = tl.where(weight > 0.0, mean / weight, 0.0)
    for start in range(first, last, CHUNK):
        particle = start + tl.arange(0, CHUNK)
        inside = particle < last
        w = tl.exp(tl.load(log_weights + particle, mask=inside, other=float("-inf")) - shift)
        error = tl.load(z + particle, mask=inside, other=0.0) - mean
        squares += tl.sum(w * error * error)
    return weight, mean, squares


@triton.jit
def leave_moments(
    t: tl.tensor,
    place: tl.tuple,
    alive: tl.tensor,
    shift: tl.tensor,
    log_weights: tl.tensor,
    cloud: tl.tuple,
    results: tl.tuple,
    size: tl.tuple,
    axes: tl.tuple,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Write the moments of a series, or those of a span for `moments_kernel`."""
    n, program, _, _ = place
    if alive:
        at = (n * axes.steps + t) * STATE
        for i in range(STATE):
            z = cloud.z + (((t & 1) * axes.series + n) * STATE + i) * size.particles
            weight, mean, squares = span_moments(log_weights, z, place, shift, CHUNK)
            if PROGRAMS == 1:
                tl.store(results.mean + at + i, mean)
                tl.store(results.var + at + i, squares / weight)
            else:
                part = cloud.moments + (n * STATE + i) * 3 * size.programs + program
                tl.store(part, weight)
                tl.store(part + size.programs, mean)
                tl.store(part + 2 * size.programs, squares)


# ---------------------------------------------------------------- launched


@triton.jit
def filter_kernel(
    model: tl.tuple,
    panel: tl.tuple,
    cloud: tl.tuple,
    tables: tl.tuple,
    results: tl.tuple,
    size: tl.tuple,
    axes: tl.tuple,
    LINEAR: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    MOMENTS: tl.constexpr,
) -> None:
    """Filter a series: one program, all steps."""
    n = tl.program_id(0).to(tl.int64)
    place = (n, tl.program_id(0) * 0, tl.program_id(0) * 0, tl.to_tensor(size.particles))
    length = tl.load(panel.lengths + n)
    status = load_status(cloud.status + (axes.series + n) * 6)
    t = tl.program_id(0) * 0
    while (t < length) & (status[2] != 0):
        sums = move(
            t, place, status, model, panel, cloud, tables, size, axes, LINEAR, STATE, CHUNK, 1
        )
        # What the threads of a program have written is read by others.
        tl.debug_barrier()
        status = settle(
            t, place, status, sums, panel, cloud, tables, results, size, axes, STATE, CHUNK, 1,
            MOMENTS,
        )  # fmt: skip
        tl.debug_barrier()
        t += 1
    store_status(cloud.status + n * 6, status, n >= 0)


@triton.jit(do_not_specialize=["t"])
def half_step_kernel(
    t: tl.tensor,
    model: tl.tuple,
    panel: tl.tuple,
    cloud: tl.tuple,
    tables: tl.tuple,
    results: tl.tuple,
    size: tl.tuple,
    axes: tl.tuple,
    SECOND: tl.constexpr,
    LINEAR: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MOMENTS: tl.constexpr,
) -> None:
    """Half a step of a series that several programs share."""
    n, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    first = program * size.span
    place = (n, program, first, tl.minimum(first + size.span, size.particles))
    status = load_status(cloud.status + (((t + 1) & 1) * axes.series + n) * 6)
    active = (t < tl.load(panel.lengths + n)) & (status[2] != 0)
    partials = cloud.partials + n * 3 * size.programs
    if SECOND:
        if active:
            sums = gather_sums(partials, size, PROGRAMS)
            status = settle(
                t, place, status, sums, panel, cloud, tables, results, size, axes, STATE, CHUNK,
                PROGRAMS, MOMENTS,
            )  # fmt: skip
        store_status(cloud.status + ((t & 1) * axes.series + n) * 6, status, program == 0)
    elif active:
        sums = move(
            t, place, status, model, panel, cloud, tables, size, axes, LINEAR, STATE, CHUNK,
            PROGRAMS,
        )  # fmt: skip
        leave_sums(partials, program, sums, size)


@triton.jit(do_not_specialize=["t"])
def moments_kernel(
    t: tl.tensor,
    cloud: tl.tuple,
    results: tl.tuple,
    size: tl.tuple,
    axes: tl.tuple,
    STATE: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Moments of a step from those of the spans (Chan, Golub and LeVeque 1983)."""
    n, i = tl.program_id(1).to(tl.int64), tl.program_id(0)
    status = load_status(cloud.status + ((t & 1) * axes.series + n) * 6)
    if (status[2] != 0) & (status[5] == t + 1):
        index = tl.arange(0, PROGRAMS)
        inside = index < size.programs
        part = cloud.moments + (n * STATE + i) * 3 * size.programs + index
        weights = tl.load(part, mask=inside, other=0.0)
        means = tl.load(part + size.programs, mask=inside, other=0.0)
        squares = tl.load(part + 2 * size.programs, mask=inside, other=0.0)
        weight = tl.sum(weights)
        mean = tl.sum(weights * means) / weight
        apart = means - mean
        at = (n * axes.steps + t) * STATE + i
        tl.store(results.mean + at, mean)
        tl.store(results.var + at, tl.sum(squares + weights * apart * apart) / weight)


@triton.jit
def load_status(base: tl.tensor) -> tl.tuple:
    """Read a `Status`."""
    alive, needed = tl.load(base + 2).to(tl.int32), tl.load(base + 3).to(tl.int32)
    resamplings, steps = tl.load(base + 4).to(tl.int32), tl.load(base + 5).to(tl.int32)
    return tl.load(base), tl.load(base + 1), alive, needed, resamplings, steps


@triton.jit
def store_status(base: tl.tensor, status: tl.tuple, wanted: tl.tensor) -> None:
    """Write a `Status`."""
    for i in tl.static_range(6):
        tl.store(base + i, status[i].to(tl.float64), mask=wanted)
