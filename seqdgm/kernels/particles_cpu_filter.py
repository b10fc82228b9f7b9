"""Fused bootstrap filters on blocks of particles, compiled.

A step is three passes over the blocks of `BLOCK` particles: `_add_up` and `_place` where the
series resamples, and `_move`, which fetches the ancestors, moves them, and weighs them while they
are in the cache. Sums are taken over blocks, and blocks in order, so nothing depends on threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.cpu_steps import glue
from seqdgm.kernels.particles_cpu_math import called, exp, log, normals, top, uniform, wide
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

_LOG_2PI = math.log(2.0 * math.pi)
# What a series carries from step to step. BASE is the log of the sum of its log-weights as they
# are stored, HALF and EVE the halves of double buffers that are in use.
# RESAMPLE says that the series resamples before the next step, RENEWED that it did before this one.
BASE, ESS, HALF, EVE, RESAMPLINGS, RESAMPLE, RENEWED, TOTAL, FAILED = range(9)
N_FACTS = 9
TOP, SUM, SQUARES = range(3)  # of a block, before the moments of each element
# Parts of the filter; the first three are passes over the blocks.
ADD_UP, PLACE, MOVE, BEGIN, FIND, FINISH, END, WHOLE = range(8)
_ZERO = np.int64(0)  # a number that is no constant, for which a function would be compiled anew
MU, RHO, SIGMA, M0, S0, LEVERAGE, DF, CONSTANT = range(8)  # of a volatility
_LARGE = 1e300


class Model(NamedTuple):
    """A linear-Gaussian problem, or a volatility: then `volatility` is not empty."""

    F: np.ndarray
    root: np.ndarray
    b: np.ndarray
    m0: np.ndarray
    root0: np.ndarray
    h: np.ndarray
    var: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    volatility: np.ndarray


class Cloud(NamedTuple):
    """The particles of one series."""

    z: np.ndarray  # (2, state, particle)
    log_weights: np.ndarray  # (particle,)
    ancestors: np.ndarray  # (particle,)
    eve: np.ndarray  # (2, particle), the first ancestors
    sums: np.ndarray  # (block + 1,), where each block begins in the cumulative sum
    blocks: np.ndarray  # (block, 3 + 2 state)
    facts: np.ndarray  # (N_FACTS,)


class Scratch(NamedTuple):
    """Memory of a thread."""

    rows: np.ndarray  # (2 state + 1, BLOCK): elements before the move, draws, one more
    draws: np.ndarray  # (state, groups, 2, RUN): the draws again
    starts: np.ndarray  # (BLOCK + 1,)


class Output(NamedTuple):
    """Results over series and time."""

    increments: np.ndarray
    ess: np.ndarray
    stderr: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def make_cloud(n: int, state: int) -> Cloud:
    """Memory for the particles of a series."""
    blocks = -(-n // BLOCK)
    return Cloud(
        np.empty((2, state, n)),
        np.empty(n),
        np.empty(n, dtype=np.uint32),
        np.empty((2, n), dtype=np.uint32),
        np.empty(blocks + 1),
        np.empty((blocks, 3 + 2 * state)),
        np.empty(N_FACTS),
    )


def make_scratch(state: int) -> Scratch:
    """Memory of a thread."""
    rows = np.empty((2 * state + 1, BLOCK))
    draws = rows[state : 2 * state].reshape(state, BLOCK // (2 * RUN), 2, RUN)
    return Scratch(rows, draws, np.empty(BLOCK + 1, dtype=np.uint32))


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
def _at(field: np.ndarray, s: int, t: int) -> np.ndarray:
    return field[s if len(field) > 1 else 0, t if field.shape[1] > 1 else 0]


@called
def _fetch(
    z: np.ndarray, ancestors: np.ndarray, first: int, renewed: bool, out: np.ndarray
) -> None:
    wide()
    if renewed:
        own = ancestors[first : first + BLOCK]
        for p in range(len(own)):
            out[p] = z[own[p]]
    else:
        old = z[first : first + BLOCK]
        for p in range(len(old)):
            out[p] = old[p]


@called
def _add(out: np.ndarray, weights: np.ndarray, rows: np.ndarray, row: int, first: int) -> None:
    """Add weights of rows, from element `first` on; what has weight zero is left out."""
    wide()
    n, k = len(out), 0
    while k < len(weights):
        if weights[k] == 0.0:
            k += 1
            continue
        a, x = weights[k], rows[row + k, first : first + n]
        if k + 1 < len(weights):
            b, y = weights[k + 1], rows[row + k + 1, first : first + n]
            for p in range(n):
                out[p] += a * x[p] + b * y[p]
        else:
            for p in range(n):
                out[p] += a * x[p]
        k += 2


@called
def _move_linear(
    model: Model, cloud: Cloud, scratch: Scratch, key: Any, s: int, t: int, first: int
) -> None:
    facts, rows = cloud.facts, scratch.rows
    half, state = int(facts[HALF]), cloud.z.shape[1]
    new = cloud.z[1 - half]
    n = min(BLOCK, new.shape[1] - first)
    for d in range(state):
        normals(key, s, t, d, first, n, scratch.draws[d])
        if t > 0:
            _fetch(cloud.z[half, d], cloud.ancestors, first, facts[RENEWED] > 0.0, rows[d])
    for i in range(state):
        out = new[i, first : first + n]
        if t > 0:
            out[:] = _at(model.b, s, t)[i]
            _add(out, _at(model.F, s, t)[i], rows, _ZERO, _ZERO)
            _add(out, _at(model.root, s, t)[i, : i + 1], rows, state, _ZERO)
        else:
            out[:] = model.m0[s if len(model.m0) > 1 else 0, i]
            _add(out, model.root0[s if len(model.root0) > 1 else 0, i, : i + 1], rows, state, _ZERO)


@called
def _score_linear(model: Model, cloud: Cloud, scratch: Scratch, s: int, t: int, first: int) -> None:
    """Add the log-density of a step to the log-weights of a block."""
    wide()
    z = cloud.z[1 - int(cloud.facts[HALF])]
    log_weights = cloud.log_weights[first : first + BLOCK]
    n = len(log_weights)
    error = scratch.rows[len(scratch.rows) - 1, :n]
    h, var = _at(model.h, s, t), _at(model.var, s, t)
    y, seen = _at(model.y, s, t), _at(model.mask, s, t)
    for i in range(len(var)):
        if seen[i]:
            error[:] = -y[i]
            _add(error, h[i], z, _ZERO, first)
            scale, constant = 0.5 / var[i], 0.5 * (math.log(var[i]) + _LOG_2PI)
            for p in range(n):
                log_weights[p] -= scale * (error[p] * error[p]) + constant


@called
def _move_volatility(
    model: Model, cloud: Cloud, scratch: Scratch, key: Any, s: int, t: int, first: int
) -> None:
    wide()
    facts = cloud.facts
    half = int(facts[HALF])
    own = model.volatility[s if len(model.volatility) > 1 else 0]
    mu, rho, sigma, leverage = own[MU], own[RHO], own[SIGMA], own[LEVERAGE]
    m0, s0 = own[M0], own[S0]
    z = cloud.z[1 - half, 0, first : first + BLOCK]
    old, e = scratch.rows[0], scratch.rows[1]
    normals(key, s, t, _ZERO, first, len(z), scratch.draws[0])
    if t == 0:
        for p in range(len(z)):
            z[p] = m0 + s0 * e[p]
        return
    _fetch(cloud.z[half, 0], cloud.ancestors, first, facts[RENEWED] > 0.0, old)
    if leverage != 0.0 and _at(model.mask, s, t - 1)[0]:
        y, apart = leverage * _at(model.y, s, t - 1)[0], math.sqrt(1.0 - leverage * leverage)
        for p in range(len(z)):
            e[p] = y * exp(-0.5 * old[p]) + apart * e[p]
    for p in range(len(z)):
        z[p] = mu + rho * (old[p] - mu) + sigma * e[p]


@called
def _score_volatility(model: Model, cloud: Cloud, s: int, t: int, first: int) -> None:
    """Add the log-density of a step to the log-weights of a block."""
    wide()
    own = model.volatility[s if len(model.volatility) > 1 else 0]
    df, constant, y = own[DF], own[CONSTANT], _at(model.y, s, t)[0]
    z = cloud.z[1 - int(cloud.facts[HALF]), 0, first : first + BLOCK]
    log_weights = cloud.log_weights[first : first + BLOCK]
    square = y * y
    if df == 0.0:
        for p in range(len(z)):
            log_weights[p] += constant - 0.5 * (z[p] + square * exp(-z[p]))
        return
    square, power = square / df, 0.5 * df + 0.5
    for p in range(len(z)):
        ratio = 1.0 + square * exp(-z[p])
        penalty = power * log(ratio)
        # The logarithm knows neither infinity nor NaN.
        penalty = penalty if ratio < _LARGE else ratio
        log_weights[p] += constant - 0.5 * z[p] - penalty


@exact
def _move(
    model: Model, cloud: Cloud, scratch: Scratch, key: Any, s: int, t: int, first: int, wanted: bool
) -> None:
    """Move a block of particles to a step, weigh them, and note the sums of the block."""
    facts, eve = cloud.facts, int(cloud.facts[EVE])
    log_weights = cloud.log_weights[first : first + BLOCK]
    n = len(log_weights)
    renewed = facts[RENEWED] > 0.0
    if len(model.volatility) > 0:
        _move_volatility(model, cloud, scratch, key, s, t, first)
    else:
        _move_linear(model, cloud, scratch, key, s, t, first)
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
    if len(model.volatility) == 0:
        _score_linear(model, cloud, scratch, s, t, first)
    elif _at(model.mask, s, t)[0]:
        _score_volatility(model, cloud, s, t, first)
    note = cloud.blocks[first // BLOCK]
    note[TOP] = top(log_weights)
    note[SUM], note[SQUARES] = 0.0, 0.0
    if note[TOP] != -math.inf:
        note[SUM], note[SQUARES] = exp_sums(log_weights, note[TOP])
    if wanted:
        z = cloud.z[1 - int(facts[HALF])]
        for i in range(len(z)):
            part = z[i, first : first + n]
            mean, spread = _block_moments(log_weights, note[TOP], note[SUM], part)
            note[3 + 2 * i], note[4 + 2 * i] = mean, spread


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


# ---------------------------------------------------------------- a step, and a series


@exact
def _begin(cloud: Cloud) -> None:
    """Facts before the first step."""
    n = len(cloud.log_weights)
    cloud.facts[:] = 0.0
    cloud.facts[BASE], cloud.facts[ESS] = math.log(n), n


@exact
def _seen(model: Model, s: int, t: int) -> bool:
    seen = False
    for each in _at(model.mask, s, t):
        seen |= each
    return seen


@exact
def _finish_step(
    model: Model, cloud: Cloud, output: Output, s: int, t: int, threshold: float
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


@exact
def _pass(
    part: int,
    model: Model,
    cloud: Cloud,
    scratch: Scratch,
    key: Any,
    s: int,
    t: int,
    wanted: bool,
    start: int,
    stop: int,
) -> None:
    """One of the passes over the blocks of particles `start` to `stop`."""
    u = uniform(key, s, t, RESAMPLING) if part == PLACE else 0.0
    for first in range(start, stop, BLOCK):
        if part == ADD_UP:
            _add_up(cloud, first)
        elif part == PLACE:
            _place(cloud, scratch, first, u)
        else:
            _move(model, cloud, scratch, key, s, t, first, wanted)


def bind_filter(digest: str) -> Callable[..., None]:
    """The filter over a range of series, or a part of it for threads that share one."""

    def bootstrap(
        part: int,
        model: Model,
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
        """All of series `start` to `stop`; or a part of step t, for particles `start` to `stop`."""
        _ = digest
        wanted, zero, n = len(output.mean) > 0, np.int64(0), len(cloud.log_weights)
        first, last = (start, stop) if part == WHOLE else (series, series + 1)
        for s in range(first, last):
            if part in (WHOLE, BEGIN):
                _begin(cloud)
            for step in range(lengths[s] if part == WHOLE else 1):
                if part == WHOLE:
                    for each in range(ADD_UP if cloud.facts[RESAMPLE] > 0.0 else MOVE, MOVE + 1):
                        if each == PLACE:
                            _find_blocks(cloud)
                        _pass(each, model, cloud, scratch, key, s, step, wanted, zero, n)
                elif part <= MOVE:
                    _pass(part, model, cloud, scratch, key, s, t, wanted, start, stop)
                elif part == FIND:
                    _find_blocks(cloud)
                if part in (WHOLE, FINISH):
                    _finish_step(model, cloud, output, s, step if part == WHOLE else t, threshold)
                    if cloud.facts[FAILED] > 0.0:
                        break
            if part in (WHOLE, END) and lengths[s] > 0:
                output.stderr[s] = _stderr(cloud)

    return bootstrap
