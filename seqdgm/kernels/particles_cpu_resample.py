"""Loops that normalise weights, draw ancestors and pick particles, compiled.

Cumulative sums are made in blocks of `BLOCK` particles: sums of integers are exact, so a block can
be added up before it is known where it begins, and no result depends on the blocks. The arithmetic
is that of `seqdgm.kernels.particles_types`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from seqdgm.kernels.cpu_steps import INNER
from seqdgm.kernels.particles_cpu_math import COPIES, called, exp, fill, top, wide
from seqdgm.kernels.particles_types import UNIT

BLOCK = 1024
SYSTEMATIC, STRATIFIED, MULTINOMIAL, RESIDUAL, KILLING = range(5)

# Levels are products and sums that every implementation rounds alike: nothing may be fused here.
exact: Any = numba.njit(**INNER)
inline_exact: Any = numba.njit(forceinline=True, **INNER)
# Sums in any order, which is what makes them vectors.
summed: Any = numba.njit(fastmath={"contract", "reassoc", "nsz"}, **INNER)


@summed
def exp_sums(x: np.ndarray, shift: float) -> tuple[float, float]:
    """Sum of exp(x - shift), and of its square."""
    wide()
    total, squares = 0.0, 0.0
    for i in range(len(x)):
        w = exp(x[i] - shift)
        total += w
        squares += w * w
    return total, squares


@called
def quantise(log_weights: np.ndarray, shift: float, scale: float, out: np.ndarray) -> None:
    """round(exp(x - shift) * scale)."""
    wide()
    for i in range(len(log_weights)):
        out[i] = np.rint(exp(log_weights[i] - shift) * scale)


@exact
def accumulate(q: np.ndarray, start: float) -> float:
    """Make an array its cumulative sums from `start` on, and return the last."""
    total = start
    whole = len(q) - len(q) % 8
    for i in range(0, whole, 8):
        # Sums of eight do not wait for those before them.
        p = q[i : i + 8]
        a, b, c, d, e, f, g, h = p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]
        b, d, f, h = b + a, d + c, f + e, h + g
        c, d, g, h = c + b, d + b, g + f, h + f
        e, f, g, h = e + d, f + d, g + d, h + d
        p[0], p[1], p[2], p[3] = total + a, total + b, total + c, total + d
        p[4], p[5], p[6] = total + e, total + f, total + g
        total += h
        p[7] = total
    rest = q[whole:]
    for i in range(len(rest)):
        total += rest[i]
        rest[i] = total
    return total


@summed
def quantised_sum(log_weights: np.ndarray) -> float:
    """Sum of the quantised weights, exact in any order."""
    wide()
    total = 0.0
    for i in range(len(log_weights)):
        total += np.rint(exp(log_weights[i]) * UNIT)
    return total


@inline_exact
def _below(C: float, total: float, u: float, n: int) -> float:
    """How many systematic levels lie below C."""
    step, rate = total / n, n / total
    # The product is wrong by far less than half a level: only the nearest has to be compared.
    near = np.rint(C * rate - u)
    below = near + (1.0 if (near + u) * step < C else 0.0)
    return below if total > C else n + 0.0


@exact
def _starts(
    c: np.ndarray,
    before: float,
    offset: float,
    total: float,
    u: float,
    n: int,
    out: np.ndarray,
) -> None:
    """Where the copies of a block of particles begin, and where those of the last one end."""
    wide()
    out[0] = np.uint32(np.int32(_below(before, total, u, n)))
    ends = out[1:]
    for i in range(len(c)):
        ends[i] = np.uint32(np.int32(_below(offset + c[i], total, u, n)))


@exact
def place(
    c: np.ndarray,
    first: int,
    before: float,
    offset: float,
    total: float,
    u: float,
    n: int,
    starts: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write the systematic ancestors that lie in a block of particles.

    The block begins with particle `first`, where the cumulative sum is `before`; those of its
    particles are offset + c. u in [0, 1) is the uniform number of n levels. A particle is written
    `COPIES` times at once, whether it has fewer copies or none: the next one writes over what was
    too much. So only particles of many copies have a branch that a processor cannot guess.
    """
    _starts(c, before, offset, total, u, n, starts)
    # Beyond it there is no room for copies that are too much.
    room = np.int64(starts[len(c)]) - COPIES
    end = np.int64(starts[0])
    for i in range(len(c)):
        begin, end = end, np.int64(starts[i + 1])
        if end <= room:
            fill(out, begin, first + i)
            while begin + COPIES < end:
                begin += COPIES
                fill(out, begin, first + i)
        else:
            for j in range(begin, end):
                out[j] = first + i


@inline_exact
def _search(c: np.ndarray, level: float, low: int, high: int) -> int:
    """The first index from low to high whose cumulative sum exceeds the level; high if none."""
    while low < high:
        middle = (low + high) >> 1
        if c[middle] > level:
            high = middle
        else:
            low = middle + 1
    return low


@exact
def _draw(
    c: np.ndarray, total: float, u: np.ndarray, guide: np.ndarray, first: int, out: np.ndarray
) -> None:
    """Ancestors at the levels u * total, for particles `first` and later."""
    n = len(c)
    rate = n / total
    for j in range(first, n):
        level = min(u[j] * total, total - 1.0)
        # The guide is exact up to the rounding of this product.
        k = np.int64(level * rate)
        high = guide[k + 2] if k + 2 < n else n - 1
        low = guide[k - 1] if k > 0 else 0
        out[j] = _search(c, level, low, high)


@exact
def _stratified(c: np.ndarray, total: float, u: np.ndarray, out: np.ndarray) -> None:
    k, step = 0, total / len(c)
    for j in range(len(c)):
        level = min((j + u[j]) * step, total - 1.0)
        while c[k] <= level:
            k += 1
        out[j] = k


@exact
def _copies(c: np.ndarray, total: float, out: np.ndarray) -> int:
    """Write the copies of residual resampling and return their number; c become the remainders."""
    n, copied, before = len(c), 0, 0.0
    rate, scale = n / total, UNIT / n
    for k in range(n):
        expected = (c[k] - before) * rate
        copies = np.floor(expected)
        before = c[k]
        c[k] = np.rint((expected - copies) * scale)
        for _ in range(np.int64(copies)):
            out[copied] = k
            copied += 1
    return copied


@exact
def _cumulate(c: np.ndarray) -> float:
    total = 0.0
    for first in range(0, len(c), BLOCK):
        total = accumulate(c[first : first + BLOCK], total)
    return total


@exact
def _systematic(c: np.ndarray, total: float, u: float, starts: np.ndarray, out: np.ndarray) -> None:
    before = 0.0
    for first in range(0, len(c), BLOCK):
        part = c[first : first + BLOCK]
        place(part, first, before, 0.0, total, u, len(c), starts, out)
        before = part[len(part) - 1]


@exact
def _killing(
    c: np.ndarray, total: float, u: np.ndarray, guide: np.ndarray, out: np.ndarray
) -> None:
    n, largest, before = len(c), 0.0, 0.0
    for k in range(n):
        largest = max(largest, c[k] - before)
        before = c[k]
    _draw(c, total, u[n:], guide, 0, out)
    before = 0.0
    for k in range(n):
        if u[k] * largest < c[k] - before:
            out[k] = k
        before = c[k]


@exact
def _systematic_row(
    log_weights: np.ndarray, u: float, c: np.ndarray, starts: np.ndarray, out: np.ndarray
) -> None:
    """Systematic ancestors, with the cumulative sums of at most one block at a time in memory."""
    n = len(log_weights)
    if n <= BLOCK:
        quantise(log_weights, 0.0, UNIT, c[:n])
        whole = accumulate(c[:n], 0.0)
        if 0.0 < whole < math.inf:
            place(c[:n], 0, 0.0, 0.0, whole, u, n, starts, out)
        else:
            out[:] = -1
        return
    total, before = 0.0, 0.0
    for first in range(0, n, BLOCK):
        total += quantised_sum(log_weights[first : first + BLOCK])
    if not 0.0 < total < math.inf:
        out[:] = -1
        return
    for first in range(0, n, BLOCK):
        part = c[: min(BLOCK, n - first)]
        quantise(log_weights[first : first + BLOCK], 0.0, UNIT, part)
        after = accumulate(part, before)
        place(part, first, before, 0.0, total, u, n, starts, out)
        before = after


@exact
def _row(
    scheme: int,
    log_weights: np.ndarray,
    u: np.ndarray,
    c: np.ndarray,
    guide: np.ndarray,
    starts: np.ndarray,
    out: np.ndarray,
) -> None:
    """Ancestors of one series; -1 if no weight is positive."""
    if scheme == SYSTEMATIC:
        _systematic_row(log_weights, u[0], c, starts, out)
        return
    quantise(log_weights, 0.0, UNIT, c)
    total = _cumulate(c)
    if not 0.0 < total < math.inf:
        out[:] = -1
    elif scheme == STRATIFIED:
        _stratified(c, total, u, out)
    else:
        first = 0
        if scheme == RESIDUAL:
            first = _copies(c, total, out)
            total = _cumulate(c)
        if first < len(c):
            _systematic(c, total, 0.0, starts, guide)
            if scheme == KILLING:
                _killing(c, total, u, guide, out)
            else:
                _draw(c, total, u, guide, first, out)


def bind_resample(digest: str) -> Callable[..., None]:
    """The loop that resamples the series from `start` to `stop`."""

    def resample(
        scheme: int,
        log_weights: np.ndarray,
        uniforms: np.ndarray,
        needed: np.ndarray,
        start: int,
        stop: int,
        c: np.ndarray,
        guide: np.ndarray,
        starts: np.ndarray,
        out: np.ndarray,
    ) -> None:
        _ = digest
        for s in range(start, stop):
            if needed[s]:
                _row(scheme, log_weights[s], uniforms[s], c, guide, starts, out[s])
            else:
                for k in range(out.shape[1]):
                    out[s, k] = k

    return resample


def bind_blocks(digest: str) -> Callable[..., None]:
    """Blocks of one long series, in two passes: add up, and write the ancestors that they own."""

    def blocks(
        log_weights: np.ndarray,
        u: float,
        start: int,
        stop: int,
        c: np.ndarray,
        sums: np.ndarray,
        starts: np.ndarray,
        out: np.ndarray,
    ) -> None:
        _ = digest
        n = len(log_weights)
        for first in range(start, stop, BLOCK):
            weights = log_weights[first : first + BLOCK]
            b = first // BLOCK
            if len(out) == 0:
                sums[b + 1] = quantised_sum(weights)
            else:
                part = c[: len(weights)]
                quantise(weights, 0.0, UNIT, part)
                before = sums[b]
                accumulate(part, before)
                place(part, first, before, 0.0, sums[len(sums) - 1], u, n, starts, out)

    return blocks


def bind_weigh(digest: str) -> Callable[..., None]:
    """The loop that normalises the weights of series."""

    def weigh(
        x: np.ndarray, start: int, stop: int, out: np.ndarray, totals: np.ndarray, ess: np.ndarray
    ) -> None:
        _ = digest
        for s in range(start, stop):
            row, result = x[s], out[s]
            largest = top(row)
            rest = 0.0
            if not math.isinf(largest):
                total, squares = exp_sums(row, largest)
                rest = math.log(total)
                totals[s] = largest + rest
                ess[s] = total * total / squares
            else:
                totals[s] = largest
                ess[s] = 0.0 if largest < 0.0 else math.nan
            # Relative to the largest: a total much larger than 1 would round all others.
            finite = math.isfinite(totals[s])
            largest, rest = (largest, rest) if finite else (0.0, 0.0)
            for k in range(len(row)):
                result[k] = (row[k] - largest) - rest

    return weigh


def bind_pick(digest: str) -> Callable[..., None]:
    """The loop that draws one particle a row."""

    def pick(
        log_weights: np.ndarray,
        uniforms: np.ndarray,
        start: int,
        stop: int,
        c: np.ndarray,
        out: np.ndarray,
    ) -> None:
        _ = digest
        for r in range(start, stop):
            row = log_weights[r]
            largest = top(row)
            total, _ = exp_sums(row, largest)
            quantise(row, largest + math.log(total), UNIT, c)
            total = _cumulate(c)
            if 0.0 < total < math.inf:
                level = min(uniforms[r] * total, total - 1.0)
                out[r] = _search(c, level, 0, len(c) - 1)
            else:
                out[r] = -1

    return pick


def bind_gather(digest: str) -> Callable[..., None]:
    """The loop that copies particles; `bad` is set where an ancestor is none."""

    def gather(
        x: np.ndarray,
        ancestors: np.ndarray,
        start: int,
        stop: int,
        out: np.ndarray,
        bad: np.ndarray,
    ) -> None:
        _ = digest
        _, n, width = x.shape
        for s in range(start, stop):
            for j in range(ancestors.shape[1]):
                k = ancestors[s, j]
                if k < 0 or k >= n:
                    bad[0] = True
                    return
                for i in range(width):
                    out[s, j, i] = x[s, k, i]

    return gather
