"""Quasi-Newton search of one series as a compiled state machine: it asks for values, it is told.

Nothing here evaluates an objective. :func:`advance` takes the values at the points that it asked
for last, and leaves the points that it wants next; 0 points end the search. So one search serves
objectives in Python, for all series at once, and compiled ones, a series at a time in a thread.

All state lies in four arrays, because the time to compile a function grows with their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.cpu_steps import cold, glue

_STEP = np.finfo(np.float64).eps ** (1 / 3)  # balances truncation and rounding, central differences
_TINY = np.finfo(np.float64).tiny
_ARMIJO = 1e-4
_MAX_HALVINGS = 30
_LONGEST = 1.0  # longest move of one parameter in one iteration, in units of its size

# Rows of the table of a series: best parameters, their typical sizes, gradient and second
# derivatives there, direction of the line search, last move, gradient before it. The inverse of
# minus the Hessian takes dim rows more, and the points asked for the rest.
THETA, SIZE, GRADIENT, CURVATURE, DIRECTION, MOVE, BEFORE, SCRATCH, INVERSE = range(9)
# Real numbers of a series: objective at theta and before the last move, step length and slope of
# the line search, and from there on the values at the points asked for.
VALUE, OLD, ALPHA, SLOPE, ANSWERS = range(5)
# Integers of a series.
DIM, PHASE, FRESH, HALVINGS, N_ITER, N_EVALUATIONS, END = range(7)
START, DIFFERENCE, LINE = range(3)  # what was asked for
GOING, CONVERGED, NO_START, NO_SIDE, NO_BETTER, EXHAUSTED = range(6)  # how it ended
_STOP, _ASK_DIFFERENCES, _ASK_TRIAL, _SET_OUT = range(4)
MESSAGES = (
    "",
    "",
    "the objective is not finite at the starting values",
    "the objective is not finite on either side of the parameters",
    "the line search found no better point although the gradient is not zero",
    "no convergence in {max_iter} iterations",
)


class Limits(NamedTuple):
    """When a search stops."""

    max_iter: int
    gradient_tol: float
    value_tol: float


class Search(NamedTuple):
    """State of the searches of many series; rows never touch each other."""

    table: np.ndarray  # (series, rows, dim)
    number: np.ndarray  # (series, ANSWERS + most points)
    note: np.ndarray  # (series, 7)
    trace: np.ndarray  # value after each iteration (max_iter + 1, series)


def make_search(series: int, dim: int, max_iter: int) -> Search:
    """Memory for the searches of `series` series with up to `dim` parameters."""
    points = max(2 * dim, 1)
    return Search(
        np.full((series, INVERSE + dim + points, dim), np.nan),
        np.empty((series, ANSWERS + points)),
        np.zeros((series, 7), np.int64),
        np.empty((max_iter + 1, series)),
    )


def filled(trace: np.ndarray, n_iter: np.ndarray) -> np.ndarray:
    """The iterations that some series took, each series resting where it stopped."""
    kept = trace[: int(n_iter.max(initial=0)) + 1].copy()
    for row in range(1, len(kept) if kept.shape[1] else 0):
        kept[row] = np.where(n_iter >= row, kept[row], kept[row - 1])
    return kept


@cold
def begin(s: Any, n: int, dim: int) -> int:
    """Ask for the value at the parameters, which the caller has set along with their sizes."""
    points = INVERSE + s.table.shape[2]
    for k in range(s.note.shape[1]):
        s.note[n, k] = 0
    s.note[n, DIM] = dim
    for i in range(dim):
        s.table[n, points, i] = s.table[n, THETA, i]
    return 1


@cold
def advance(s: Any, n: int, limits: Any) -> int:
    """Take the values of the points asked for; returns how many are asked for next."""
    phase = s.note[n, PHASE]
    if phase == START:
        action = _after_start(s, n)
    elif phase == DIFFERENCE:
        action = _after_differences(s, n, limits)
    else:
        action = _after_trial(s, n, limits)
    if action == _SET_OUT:
        action = _set_out(s, n, limits)
    if action == _ASK_DIFFERENCES:
        _ask_differences(s, n)
        return 2 * s.note[n, DIM]
    if action == _ASK_TRIAL:
        points = INVERSE + s.table.shape[2]
        for i in range(s.note[n, DIM]):
            step = s.number[n, ALPHA] * s.table[n, DIRECTION, i]
            s.table[n, points, i] = s.table[n, THETA, i] + step
        return 1
    return 0


@glue
def _after_start(s: Any, n: int) -> int:
    value = s.number[n, ANSWERS]
    if not math.isfinite(value):
        value = math.nan
        s.note[n, END] = NO_START
    elif s.note[n, DIM] == 0:
        s.note[n, END] = CONVERGED
    s.note[n, N_EVALUATIONS] = 1
    s.number[n, VALUE] = value
    s.trace[0, n] = value
    return _ASK_DIFFERENCES if s.note[n, END] == GOING else _STOP


@glue
def _scale(s: Any, n: int, i: int) -> float:
    return max(abs(s.table[n, THETA, i]), s.table[n, SIZE, i])


@cold
def _small_gradient(s: Any, n: int, tolerance: float) -> bool:
    largest = 0.0
    for i in range(s.note[n, DIM]):
        largest = max(largest, abs(s.table[n, GRADIENT, i]) * _scale(s, n, i))
    return largest <= tolerance * max(abs(s.number[n, VALUE]), 1.0)


@cold
def _promise(s: Any, n: int) -> float:
    """Gain that the quadratic model still promises, g'Bg/2."""
    dim, total = s.note[n, DIM], 0.0
    for i in range(dim):
        for j in range(dim):
            product = s.table[n, GRADIENT, i] * s.table[n, GRADIENT, j]
            total += product * s.table[n, INVERSE + i, j]
    return 0.5 * total


@cold
def _ask_differences(s: Any, n: int) -> None:
    """Ask for both neighbours along every axis."""
    dim, points = s.note[n, DIM], INVERSE + s.table.shape[2]
    s.note[n, PHASE] = DIFFERENCE
    for k in range(2 * dim):
        for j in range(dim):
            s.table[n, points + k, j] = s.table[n, THETA, j]
    for i in range(dim):
        h = _STEP * _scale(s, n, i)
        s.table[n, points + 2 * i, i] += h
        s.table[n, points + 2 * i + 1, i] -= h


@cold
def _differentiate(s: Any, n: int) -> bool:
    """Gradient and second derivatives by central differences; False where neither side exists."""
    dim, value, points = s.note[n, DIM], s.number[n, VALUE], INVERSE + s.table.shape[2]
    s.note[n, N_EVALUATIONS] += 2 * dim
    for i in range(dim):
        s.table[n, BEFORE, i] = s.table[n, GRADIENT, i]
        up, down = s.number[n, ANSWERS + 2 * i], s.number[n, ANSWERS + 2 * i + 1]
        # Differences of what was evaluated: theta + h is rounded, and h itself is not exact.
        above = s.table[n, points + 2 * i, i] - s.table[n, THETA, i]
        below = s.table[n, THETA, i] - s.table[n, points + 2 * i + 1, i]
        rise, fall = (up - value) / above, (value - down) / below
        if math.isfinite(up) and math.isfinite(down):
            slope, bend = (up - down) / (above + below), (fall - rise) / (0.5 * (above + below))
        else:  # at the edge of the domain only one side exists
            slope, bend = rise if math.isfinite(up) else fall, 0.0
        s.table[n, GRADIENT, i] = slope
        s.table[n, CURVATURE, i] = bend if math.isfinite(bend) else 0.0
        if not math.isfinite(slope):
            return False
    return True


@glue
def _after_differences(s: Any, n: int, limits: Any) -> int:
    """Update the inverse Hessian and test for convergence."""
    if not _differentiate(s, n):
        s.note[n, END] = NO_SIDE
        return _STOP
    settled = False
    if s.note[n, N_ITER] == 0:
        _reset(s, n)
    else:
        _update(s, n)
        old = s.number[n, OLD]
        limit = limits.value_tol * max(abs(old), 1.0)
        settled = s.number[n, VALUE] - old <= limit and _promise(s, n) <= limit
    if settled or _small_gradient(s, n, limits.gradient_tol):
        s.note[n, END] = CONVERGED
        return _STOP
    return _SET_OUT


@cold
def _reset(s: Any, n: int) -> None:
    """Start again from a diagonal of the inverse Hessian."""
    dim = s.note[n, DIM]
    for i in range(dim):
        for j in range(dim):
            s.table[n, INVERSE + i, j] = 0.0
        # No coordinate is sent further than its own size by a curvature that rounding invented.
        floor = max(abs(s.table[n, GRADIENT, i]) / _scale(s, n, i), _TINY)
        s.table[n, INVERSE + i, i] = 1.0 / max(abs(s.table[n, CURVATURE, i]), floor)
    s.note[n, FRESH] = 1


@cold
def _multiply(s: Any, n: int, source: int, target: int) -> float:
    """Row `target` becomes B times row `source`; returns their inner product."""
    dim, product = s.note[n, DIM], 0.0
    for i in range(dim):
        total = 0.0
        for j in range(dim):
            total += s.table[n, INVERSE + i, j] * s.table[n, source, j]
        s.table[n, target, i] = total
        product += total * s.table[n, source, i]
    return product


@glue
def _set_out(s: Any, n: int, limits: Any) -> int:
    """Begin the line search of the next iteration."""
    if s.note[n, N_ITER] >= limits.max_iter:
        s.note[n, END] = EXHAUSTED
        return _STOP
    slope = _multiply(s, n, GRADIENT, DIRECTION)
    if not (slope > 0.0 and slope < math.inf):
        _reset(s, n)
        slope = _multiply(s, n, GRADIENT, DIRECTION)
    longest = _LONGEST
    for i in range(s.note[n, DIM]):
        longest = max(longest, abs(s.table[n, DIRECTION, i]) / _scale(s, n, i))
    for i in range(s.note[n, DIM]):
        s.table[n, DIRECTION, i] *= _LONGEST / longest
    s.number[n, SLOPE] = slope * _LONGEST / longest
    s.number[n, ALPHA] = 1.0
    s.note[n, PHASE], s.note[n, HALVINGS] = LINE, 0
    return _ASK_TRIAL


@glue
def _after_trial(s: Any, n: int, limits: Any) -> int:
    """Move there if Armijo's condition holds, else try a shorter step."""
    s.note[n, N_EVALUATIONS] += 1
    value, reached = s.number[n, VALUE], s.number[n, ANSWERS]
    rise = reached - value
    promised = s.number[n, ALPHA] * s.number[n, SLOPE]
    if rise >= _ARMIJO * promised and rise > 0.0 and math.isfinite(rise):
        _move(s, n)
        return _ASK_DIFFERENCES
    shorter = 0.25
    if math.isfinite(rise):  # top of the parabola through value, slope and trial
        shorter = 0.5 * promised / max(promised - rise, 0.5 * promised, _TINY)
    s.number[n, ALPHA] *= min(max(shorter, 0.1), 0.5)
    s.note[n, HALVINGS] += 1
    # A promise below the tolerance is not worth another evaluation.
    limit = limits.value_tol * max(abs(value), 1.0)
    if promised > 1e-2 * limit and s.note[n, HALVINGS] < _MAX_HALVINGS:
        return _ASK_TRIAL
    # No better point along the direction: rounding at the top, or a bad inverse Hessian.
    s.note[n, N_ITER] += 1
    s.trace[s.note[n, N_ITER], n] = value
    if _promise(s, n) <= 10.0 * limit:
        s.note[n, END] = CONVERGED
    elif s.note[n, FRESH] == 1:
        s.note[n, END] = NO_BETTER
    else:
        _reset(s, n)
        return _SET_OUT
    return _STOP


@cold
def _move(s: Any, n: int) -> None:
    """Take the trial point over."""
    points = INVERSE + s.table.shape[2]
    s.number[n, OLD], s.number[n, VALUE] = s.number[n, VALUE], s.number[n, ANSWERS]
    for i in range(s.note[n, DIM]):
        s.table[n, MOVE, i] = s.table[n, points, i] - s.table[n, THETA, i]
        s.table[n, THETA, i] = s.table[n, points, i]
    s.note[n, N_ITER] += 1
    s.trace[s.note[n, N_ITER], n] = s.number[n, VALUE]


@cold
def _update(s: Any, n: int) -> None:
    """BFGS update of the inverse; `BEFORE`, the gradient before the move, is overwritten."""
    dim, curved, moved, dropped = s.note[n, DIM], 0.0, 0.0, 0.0
    for i in range(dim):
        drop = s.table[n, BEFORE, i] - s.table[n, GRADIENT, i]
        curved += s.table[n, MOVE, i] * drop
        moved += s.table[n, MOVE, i] * s.table[n, MOVE, i]
        dropped += drop * drop
    s.note[n, FRESH] = 0
    if not curved > 1e-10 * math.sqrt(moved * dropped):
        # Where the function still bends upwards the step was too short: four times as long a step
        # along this direction, and along no other, is what the next iteration would take.
        slope = _multiply(s, n, BEFORE, SCRATCH)
        for i in range(dim):
            for j in range(dim):
                outer = s.table[n, SCRATCH, i] * s.table[n, SCRATCH, j]
                s.table[n, INVERSE + i, j] += 3.0 * outer / slope
        return
    for i in range(dim):
        s.table[n, BEFORE, i] -= s.table[n, GRADIENT, i]
    weight = (1.0 + _multiply(s, n, BEFORE, SCRATCH) / curved) / curved
    for i in range(dim):
        a, b = s.table[n, SCRATCH, i] / curved, s.table[n, MOVE, i]
        for j in range(dim):
            c, d = s.table[n, SCRATCH, j] / curved, s.table[n, MOVE, j]
            s.table[n, INVERSE + i, j] += weight * b * d - a * d - b * c


def bind_tell(digest: str) -> Callable[..., None]:
    """The step of many searches at once, keyed by a digest of its sources."""

    def tell(s: Any, rows: Any, counts: Any, answers: Any, limits: Any) -> None:
        """Give each of `rows` its ``counts[n]`` answers, in turn; `counts` becomes the next.

        A row that asked for nothing begins its search.
        """
        _ = digest
        k = 0
        for n in rows:
            asked = counts[n]
            for i in range(asked):
                s.number[n, ANSWERS + i] = answers[k]
                k += 1
            counts[n] = advance(s, n, limits) if asked > 0 else begin(s, n, s.table.shape[2])

    return tell
