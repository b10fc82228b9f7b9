"""Fused bootstrap filters on blocks of particles, compiled.

A step is three passes over the blocks of `BLOCK` particles: `_add_up` and `_place` where the
series resamples, and a last one that fetches the ancestors, moves them, and weighs them while they
are in the cache. Sums are taken over blocks, and blocks in order, so nothing depends on threads.

A model is a tuple of arrays with a field `mask`, (series, time, element), and two compiled
functions: ``move(model, cloud, scratch, key, s, t, first)`` writes the new states of the block that
begins with particle `first`, ``score(model, cloud, scratch, s, t, first)`` adds to its log-weights.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.cpu_steps import glue
from seqdgm.kernels.particles_cpu_math import called, exp, top, uniform, wide
from seqdgm.kernels.particles_cpu_resample import (
    BLOCK,
    accumulate,
    exact,
    exp_sums,
    inline_exact,
    place,
    quantise,
    summed,
)
from seqdgm.kernels.particles_types import UNIT
from seqdgm.kernels.philox import RESAMPLING, RUN

# What a series carries from step to step. BASE is the log of the sum of its log-weights as they
# are stored, HALF and EVE the halves of double buffers that are in use.
# RESAMPLE says that the series resamples before the next step, RENEWED that it did before this one.
BASE, ESS, HALF, EVE, RESAMPLINGS, RESAMPLE, RENEWED, TOTAL, FAILED = range(9)
N_FACTS = 9
TOP, SUM, SQUARES = range(3)  # of a block, before the moments of each element
# Parts of the filter; the first three are passes over the blocks.
ADD_UP, PLACE, MOVE, BEGIN, FIND, FINISH, END, WHOLE = range(8)
NOTHING, VARIANCES, COVARIANCES = range(3)  # which moments are wanted


class Cloud(NamedTuple):
    """The particles of one series."""

    z: np.ndarray  # (2, state, particle)
    log_weights: np.ndarray  # (particle,)
    ancestors: np.ndarray  # (particle,)
    eve: np.ndarray  # (2, particle), the first ancestors
    sums: np.ndarray  # (block + 1,), where each block begins in the cumulative sum
    blocks: np.ndarray  # (block, 3 + 2 state), then one for each pair of elements if wanted
    facts: np.ndarray  # (N_FACTS,)


class Scratch(NamedTuple):
    """Memory of a thread."""

    rows: np.ndarray  # (state + draws + more, BLOCK): elements before the move, draws, others
    draws: np.ndarray  # (draws, groups, 2, RUN): the draws again
    starts: np.ndarray  # (BLOCK + 1,)


class Output(NamedTuple):
    """Results over series and time."""

    increments: np.ndarray
    ess: np.ndarray
    stderr: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    cov: np.ndarray


def make_cloud(n: int, state: int, pairs: int = 0) -> Cloud:
    """Memory for the particles of a series."""
    blocks = -(-n // BLOCK)
    return Cloud(
        np.empty((2, state, n)),
        np.empty(n),
        np.empty(n, dtype=np.uint32),
        np.empty((2, n), dtype=np.uint32),
        np.empty(blocks + 1),
        np.empty((blocks, 3 + 2 * state + pairs)),
        np.empty(N_FACTS),
    )


def make_scratch(state: int, draws: int, more: int) -> Scratch:
    """Memory of a thread."""
    rows = np.empty((state + draws + more, BLOCK))
    own = rows[state : state + draws].reshape(draws, BLOCK // (2 * RUN), 2, RUN)
    return Scratch(rows, own, np.empty(BLOCK + 1, dtype=np.uint32))


# ---------------------------------------------------------------- resampling


@exact
def _add_up(cloud: Cloud, first: int) -> None:
    """Make the log-weights of a block the cumulative sums of its weights."""
    facts, part = cloud.facts, cloud.log_weights[first : first + BLOCK]
    quantise(part, facts[BASE], UNIT, part)
    cloud.sums[first // BLOCK + 1] = accumulate(part, 0.0)


@exact
def _place(cloud: Cloud, scratch: Scratch, first: int, u: float) -> None:
    """Write the ancestors that lie in a block."""
    n, offset = len(cloud.log_weights), cloud.sums[first // BLOCK]
    part = cloud.log_weights[first : first + BLOCK]
    place(part, first, offset, offset, cloud.facts[TOTAL], u, n, scratch.starts, cloud.ancestors)


@exact
def _find_blocks(cloud: Cloud) -> None:
    """Where blocks begin in the cumulative sum, after `ADD_UP` of all."""
    total, sums, facts = 0.0, cloud.sums, cloud.facts
    sums[0] = 0.0
    for b in range(1, len(sums)):
        total += sums[b]
        sums[b] = total
    facts[TOTAL], facts[RENEWED], facts[ESS] = total, 1.0, len(cloud.log_weights)
    facts[RESAMPLINGS] += 1.0


# ---------------------------------------------------------------- moving and weighing


@glue
def at(field: np.ndarray, s: int, t: int) -> np.ndarray:
    """What a field of a model holds for a step; axes of length 1 are shared."""
    return field[s if len(field) > 1 else 0, t if field.shape[1] > 1 else 0]


@called
def fetch(z: np.ndarray, ancestors: np.ndarray, first: int, renewed: bool, out: np.ndarray) -> None:
    """Copy an element of the ancestors of a block."""
    wide()
    if renewed:
        own = ancestors[first : first + BLOCK]
        for p in range(len(own)):
            out[p] = z[own[p]]
    else:
        old = z[first : first + BLOCK]
        for p in range(len(old)):
            out[p] = old[p]


@exact
def _start_weights(cloud: Cloud, t: int, first: int) -> None:
    """Log-weights of a block before it meets the observation, and its first ancestors."""
    facts, eve = cloud.facts, int(cloud.facts[EVE])
    log_weights = cloud.log_weights[first : first + BLOCK]
    n = len(log_weights)
    renewed = facts[RENEWED] > 0.0
    if renewed or t == 0:
        log_weights[:] = 0.0
    else:
        # Without it the numbers would grow with time, and lose digits.
        base = facts[BASE]
        for p in range(n):
            log_weights[p] -= base
    if t == 0:
        for p in range(n):
            cloud.eve[0, first + p] = np.uint32(first + p)
    elif renewed:
        old, new = cloud.eve[eve], cloud.eve[1 - eve]
        for p in range(first, first + n):
            new[p] = old[cloud.ancestors[p]]


@exact
def _note(cloud: Cloud, first: int, wanted: int) -> None:
    """Note the sums of a block."""
    log_weights = cloud.log_weights[first : first + BLOCK]
    n = len(log_weights)
    note = cloud.blocks[first // BLOCK]
    note[TOP] = top(log_weights)
    note[SUM], note[SQUARES] = 0.0, 0.0
    if note[TOP] != -math.inf:
        note[SUM], note[SQUARES] = exp_sums(log_weights, note[TOP])
    z = cloud.z[1 - int(cloud.facts[HALF])]
    if wanted > NOTHING:
        for i in range(len(z)):
            part = z[i, first : first + n]
            mean, spread = _block_moments(log_weights, note[TOP], note[SUM], part)
            note[3 + 2 * i], note[4 + 2 * i] = mean, spread
    if wanted == COVARIANCES:
        k = 3 + 2 * len(z)
        for i in range(len(z)):
            for j in range(i):
                a, b = z[i, first : first + n], z[j, first : first + n]
                own = note[3 + 2 * i], note[3 + 2 * j]
                note[k] = _block_product(log_weights, note[TOP], a, own[0], b, own[1])
                k += 1


@summed
def _block_moments(
    log_weights: np.ndarray, shift: float, total: float, z: np.ndarray
) -> tuple[float, float]:
    """Weighted mean, and weighted sum of squares about it."""
    wide()
    mean, spread = 0.0, 0.0
    if total > 0.0:
        for p in range(len(z)):
            mean += exp(log_weights[p] - shift) * z[p]
        mean /= total
        for p in range(len(z)):
            spread += exp(log_weights[p] - shift) * ((z[p] - mean) * (z[p] - mean))
    return mean, spread


@summed
def _block_product(
    log_weights: np.ndarray, shift: float, a: np.ndarray, mean: float, b: np.ndarray, other: float
) -> float:
    """Weighted sum of products of two elements about their means."""
    wide()
    total = 0.0
    for p in range(len(a)):
        total += exp(log_weights[p] - shift) * ((a[p] - mean) * (b[p] - other))
    return total


# ---------------------------------------------------------------- a step, and a series


@exact
def _begin(cloud: Cloud) -> None:
    """Facts before the first step."""
    n = len(cloud.log_weights)
    cloud.facts[:] = 0.0
    cloud.facts[BASE], cloud.facts[ESS] = math.log(n), n


@exact
def _seen(model: Any, s: int, t: int) -> bool:
    seen = False
    for each in at(model.mask, s, t):
        seen |= each
    return seen


@exact
def _finish_step(
    model: Any, cloud: Cloud, output: Output, s: int, t: int, threshold: float
) -> None:
    """Put the blocks together, and decide whether to resample before the next step."""
    facts, blocks, n = cloud.facts, cloud.blocks, len(cloud.log_weights)
    largest, total, squares = -math.inf, 0.0, 0.0
    for b in range(len(blocks)):
        largest = max(largest, blocks[b, TOP])
    for b in range(len(blocks)):
        scale = _scale(blocks, b, largest)
        total += scale * blocks[b, SUM]
        squares += scale * scale * blocks[b, SQUARES]
    if not 0.0 < total < math.inf:
        output.increments[s, t] = -math.inf if total == 0.0 else math.nan
        facts[FAILED] = 1.0
        return
    fresh = t == 0 or facts[RENEWED] > 0.0
    facts[BASE] = largest + math.log(total)
    if _seen(model, s, t):
        output.increments[s, t] = facts[BASE] - (math.log(n) if fresh else 0.0)
        facts[ESS] = total * total / squares
    output.ess[s, t] = facts[ESS]
    if len(output.mean) > 0:
        for i in range(cloud.z.shape[1]):
            _finish_moments(blocks, largest, total, i, output.mean[s, t], output.var[s, t])
    if len(output.cov) > 0:
        _finish_cov(blocks, largest, total, output.mean[s, t], output.var[s, t], output.cov[s, t])
    if facts[RENEWED] > 0.0:
        facts[EVE] = 1.0 - facts[EVE]
    facts[HALF], facts[RENEWED] = 1.0 - facts[HALF], 0.0
    facts[RESAMPLE] = 1.0 if n > 1 and facts[ESS] < threshold * n else 0.0


@inline_exact
def _scale(blocks: np.ndarray, b: int, largest: float) -> float:
    """What the weights of a block are relative to, relative to that of the largest."""
    return math.exp(blocks[b, TOP] - largest) if blocks[b, SUM] > 0.0 else 1.0


@exact
def _finish_moments(
    blocks: np.ndarray, largest: float, total: float, i: int, mean: np.ndarray, var: np.ndarray
) -> None:
    middle, spread = 0.0, 0.0
    for b in range(len(blocks)):
        middle += _scale(blocks, b, largest) * blocks[b, SUM] / total * blocks[b, 3 + 2 * i]
    for b in range(len(blocks)):
        apart = blocks[b, 3 + 2 * i] - middle
        own = blocks[b, 4 + 2 * i] + blocks[b, SUM] * (apart * apart)
        spread += _scale(blocks, b, largest) / total * own
    mean[i], var[i] = middle, spread


@exact
def _finish_cov(
    blocks: np.ndarray,
    largest: float,
    total: float,
    mean: np.ndarray,
    var: np.ndarray,
    cov: np.ndarray,
) -> None:
    k = 3 + 2 * len(mean)
    for i in range(len(mean)):
        cov[i, i] = var[i]
        for j in range(i):
            spread = 0.0
            for b in range(len(blocks)):
                apart = (blocks[b, 3 + 2 * i] - mean[i]) * (blocks[b, 3 + 2 * j] - mean[j])
                own = blocks[b, k] + blocks[b, SUM] * apart
                spread += _scale(blocks, b, largest) / total * own
            cov[i, j], cov[j, i] = spread, spread
            k += 1


@called
def _stderr(cloud: Cloud) -> float:
    """Equation 8 of Lee and Whiteley (2018), by families of particles with one first ancestor."""
    facts, n = cloud.facts, len(cloud.log_weights)
    if facts[FAILED] > 0.0:
        return math.nan
    if n == 1:
        return math.inf
    # The half of the double buffer that is not in use.
    families, eve = cloud.z[1 - int(facts[HALF]), 0], cloud.eve[int(facts[EVE])]
    families[:] = 0.0
    for p in range(n):
        families[eve[p]] += exp(cloud.log_weights[p] - facts[BASE])
    largest, squares = 0.0, 0.0
    for p in range(n):
        largest = max(largest, families[p])
        squares += families[p] * families[p]
    if largest > 1.0 - 1e-12:
        return math.inf
    growth = (n / (n - 1.0)) ** (facts[RESAMPLINGS] + 1.0)
    return math.sqrt(max(0.0, 1.0 - growth * (1.0 - squares)))


def bind_run(move: Any, score: Any) -> Any:
    """The filter of a model, from its two compiled functions."""

    @exact
    def each_block(
        part: int,
        model: Any,
        cloud: Cloud,
        scratch: Scratch,
        key: Any,
        s: int,
        t: int,
        wanted: int,
        start: int,
        stop: int,
    ) -> None:
        u = uniform(key, s, t, RESAMPLING) if part == PLACE else 0.0
        for first in range(start, stop, BLOCK):
            if part == ADD_UP:
                _add_up(cloud, first)
            elif part == PLACE:
                _place(cloud, scratch, first, u)
            else:
                move(model, cloud, scratch, key, s, t, first)
                _start_weights(cloud, t, first)
                score(model, cloud, scratch, s, t, first)
                _note(cloud, first, wanted)

    @exact
    def run(
        part: int,
        model: Any,
        cloud: Cloud,
        scratch: Scratch,
        key: np.ndarray,
        threshold: float,
        output: Output,
        series: int,
        lengths: np.ndarray,
        t: int,
        start: int,
        stop: int,
    ) -> None:
        wanted, zero, n = NOTHING, np.int64(0), len(cloud.log_weights)
        if len(output.mean) > 0:
            wanted = COVARIANCES if len(output.cov) > 0 else VARIANCES
        first, last = (start, stop) if part == WHOLE else (series, series + 1)
        for s in range(first, last):
            if part in (WHOLE, BEGIN):
                _begin(cloud)
            for step in range(lengths[s] if part == WHOLE else 1):
                if part == WHOLE:
                    for each in range(ADD_UP if cloud.facts[RESAMPLE] > 0.0 else MOVE, MOVE + 1):
                        if each == PLACE:
                            _find_blocks(cloud)
                        each_block(each, model, cloud, scratch, key, s, step, wanted, zero, n)
                elif part <= MOVE:
                    each_block(part, model, cloud, scratch, key, s, t, wanted, start, stop)
                elif part == FIND:
                    _find_blocks(cloud)
                if part in (WHOLE, FINISH):
                    _finish_step(model, cloud, output, s, step if part == WHOLE else t, threshold)
                    if cloud.facts[FAILED] > 0.0:
                        break
            if part in (WHOLE, END) and lengths[s] > 0:
                output.stderr[s] = _stderr(cloud)

    return run
