"""Quasi-Newton search of one series as a compiled state machine: it asks for values, it is told.

Nothing here evaluates an objective. :func:`advance` takes the values at the points that it asked
for last, and leaves the points that it wants next; 0 points end the search. So one search serves
objectives in Python, for all series at once, and compiled ones, a series at a time in a thread.
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

# Integer state of a series.
DIM, PHASE, FRESH, HALVINGS, N_ITER, N_EVALUATIONS, END = range(7)
START, DIFFERENCE, LINE = range(3)  # what was asked for
GOING, CONVERGED, NO_START, NO_SIDE, NO_BETTER, EXHAUSTED = range(6)  # how it ended
MESSAGES = (
    "",
    "",
    "the objective is not finite at the starting values",
    "the objective is not finite on either side of the parameters",
    "the line search found no better point although the gradient is not zero",
    "no convergence in {max_iter} iterations",
)
ALPHA, SLOPE = 0, 1  # real state of a line search


class Limits(NamedTuple):
    """When a search stops."""

    max_iter: int
    gradient_tol: float
    value_tol: float


class Search(NamedTuple):
    """State of the searches of many series; rows never touch each other."""

    theta: np.ndarray  # best parameters (series, dim)
    value: np.ndarray  # objective there (series,)
    size: np.ndarray  # typical size of each parameter (series, dim)
    gradient: np.ndarray  # (series, dim)
    curvature: np.ndarray  # second derivatives (series, dim)
    inverse: np.ndarray  # of minus the Hessian, approximately (series, dim, dim)
    direction: np.ndarray  # of the line search (series, dim)
    move: np.ndarray  # last step (series, dim)
    before: np.ndarray  # gradient before it (series, dim)
    scratch: np.ndarray  # (series, dim)
    line: np.ndarray  # ALPHA, SLOPE and the value before the move (series, 3)
    note: np.ndarray  # integer state (series, 7)
    points: np.ndarray  # what is asked for (series, most points, dim)
    trace: np.ndarray  # value after each iteration (max_iter + 1, series)


def make_search(series: int, dim: int, max_iter: int) -> Search:
    """Memory for the searches of `series` series with up to `dim` parameters."""
    flat = (series, dim)
    return Search(
        np.empty(flat),
        np.empty(series),
        np.empty(flat),
        np.empty(flat),
        np.empty(flat),
        np.empty((series, dim, dim)),
        np.empty(flat),
        np.empty(flat),
        np.empty(flat),
        np.empty(flat),
        np.empty((series, 3)),
        np.zeros((series, 7), np.int64),
        np.empty((series, max(2 * dim, 1), dim)),
        np.empty((max_iter + 1, series)),
    )


@cold
def begin(s: Any, n: int, dim: int) -> int:
    """Ask for the value at ``theta[n]``, which the caller has set along with ``size[n]``."""
    for k in range(s.note.shape[1]):
        s.note[n, k] = 0
    s.note[n, DIM] = dim
    for i in range(dim):
        s.points[n, 0, i] = s.theta[n, i]
        s.gradient[n, i] = math.nan
    return 1


@cold
def advance(s: Any, n: int, answers: Any, first: int, limits: Any) -> int:
    """Take the values ``answers[first:]`` of the points asked for; returns how many are next."""
    if s.note[n, PHASE] == LINE:
        return _after_trial(s, n, answers[first], limits)
    if s.note[n, PHASE] == DIFFERENCE:
        return _after_differences(s, n, answers, first, limits)
    s.note[n, N_EVALUATIONS] += 1
    s.value[n] = answers[first]
    s.trace[0, n] = s.value[n]
    if not math.isfinite(s.value[n]):
        s.value[n] = math.nan
        s.trace[0, n] = math.nan
        return _end(s, n, NO_START)
    if s.note[n, DIM] == 0:
        return _end(s, n, CONVERGED)
    return _ask_differences(s, n)


@cold
def _end(s: Any, n: int, how: int) -> int:
    s.note[n, END] = how
    return 0


@glue
def _scale(s: Any, n: int, i: int) -> float:
    return max(abs(s.theta[n, i]), s.size[n, i])


@cold
def _small_gradient(s: Any, n: int, limits: Any) -> bool:
    largest = 0.0
    for i in range(s.note[n, DIM]):
        largest = max(largest, abs(s.gradient[n, i]) * _scale(s, n, i))
    return largest <= limits.gradient_tol * max(abs(s.value[n]), 1.0)


@cold
def _promise(s: Any, n: int) -> float:
    """Gain that the quadratic model still promises, g'Bg/2."""
    dim, total = s.note[n, DIM], 0.0
    for i in range(dim):
        for j in range(dim):
            total += s.gradient[n, i] * s.inverse[n, i, j] * s.gradient[n, j]
    return 0.5 * total


@cold
def _ask_differences(s: Any, n: int) -> int:
    """Ask for both neighbours along every axis."""
    dim = s.note[n, DIM]
    s.note[n, PHASE] = DIFFERENCE
    for i in range(dim):
        h = _STEP * _scale(s, n, i)
        for j in range(dim):
            s.points[n, 2 * i, j] = s.theta[n, j]
            s.points[n, 2 * i + 1, j] = s.theta[n, j]
        s.points[n, 2 * i, i] += h
        s.points[n, 2 * i + 1, i] -= h
    return 2 * dim


@cold
def _differentiate(s: Any, n: int, answers: Any, first: int) -> bool:
    """Gradient and second derivatives by central differences; False where neither side exists."""
    dim, value = s.note[n, DIM], s.value[n]
    s.note[n, N_EVALUATIONS] += 2 * dim
    for i in range(dim):
        up, down = answers[first + 2 * i], answers[first + 2 * i + 1]
        # Differences of what was evaluated: theta + h is rounded, and h itself is not exact.
        above = s.points[n, 2 * i, i] - s.theta[n, i]
        below = s.theta[n, i] - s.points[n, 2 * i + 1, i]
        rise, fall = (up - value) / above, (value - down) / below
        s.curvature[n, i] = 0.0
        if math.isfinite(up) and math.isfinite(down):
            s.gradient[n, i] = (up - down) / (above + below)
            bend = (fall - rise) / (0.5 * (above + below))
            if math.isfinite(bend):
                s.curvature[n, i] = bend
        else:  # at the edge of the domain only one side exists
            s.gradient[n, i] = rise if math.isfinite(up) else fall
        if not math.isfinite(s.gradient[n, i]):
            return False
    return True


@cold
def _after_differences(s: Any, n: int, answers: Any, first: int, limits: Any) -> int:
    """Update the inverse Hessian, test for convergence, and set out on the next iteration."""
    for i in range(s.note[n, DIM]):
        s.before[n, i] = s.gradient[n, i]
    if not _differentiate(s, n, answers, first):
        return _end(s, n, NO_SIDE)
    settled = False
    if s.note[n, N_ITER] == 0:
        _reset(s, n)
    else:
        _update(s, n)
        limit = limits.value_tol * max(abs(s.line[n, 2]), 1.0)
        settled = s.value[n] - s.line[n, 2] <= limit and _promise(s, n) <= limit
    if settled or _small_gradient(s, n, limits):
        return _end(s, n, CONVERGED)
    return _set_out(s, n, limits)


@cold
def _reset(s: Any, n: int) -> None:
    """Start again from a diagonal of the inverse Hessian."""
    dim = s.note[n, DIM]
    for i in range(dim):
        for j in range(dim):
            s.inverse[n, i, j] = 0.0
        # No coordinate is sent further than its own size by a curvature that rounding invented.
        floor = max(abs(s.gradient[n, i]) / _scale(s, n, i), _TINY)
        s.inverse[n, i, i] = 1.0 / max(abs(s.curvature[n, i]), floor)
    s.note[n, FRESH] = 1


@cold
def _point_uphill(s: Any, n: int) -> bool:
    """Direction B g and its slope; False where it does not lead upwards."""
    dim, slope, finite = s.note[n, DIM], 0.0, True
    for i in range(dim):
        total = 0.0
        for j in range(dim):
            total += s.inverse[n, i, j] * s.gradient[n, j]
        s.direction[n, i] = total
        finite = finite and math.isfinite(total)
        slope += total * s.gradient[n, i]
    s.line[n, SLOPE] = slope
    return finite and slope > 0.0


@cold
def _set_out(s: Any, n: int, limits: Any) -> int:
    """Begin the line search of the next iteration."""
    if s.note[n, N_ITER] >= limits.max_iter:
        return _end(s, n, EXHAUSTED)
    if not _point_uphill(s, n):
        _reset(s, n)
        _point_uphill(s, n)
    longest = _LONGEST
    for i in range(s.note[n, DIM]):
        longest = max(longest, abs(s.direction[n, i]) / _scale(s, n, i))
    for i in range(s.note[n, DIM]):
        s.direction[n, i] *= _LONGEST / longest
    s.line[n, SLOPE] *= _LONGEST / longest
    s.line[n, ALPHA] = 1.0
    s.note[n, PHASE], s.note[n, HALVINGS] = LINE, 0
    return _ask_trial(s, n)


@cold
def _ask_trial(s: Any, n: int) -> int:
    for i in range(s.note[n, DIM]):
        s.points[n, 0, i] = s.theta[n, i] + s.line[n, ALPHA] * s.direction[n, i]
    return 1


@cold
def _after_trial(s: Any, n: int, reached: float, limits: Any) -> int:
    """Move there if Armijo's condition holds, else try a shorter step."""
    s.note[n, N_EVALUATIONS] += 1
    rise = reached - s.value[n]
    promised = s.line[n, ALPHA] * s.line[n, SLOPE]
    if rise >= _ARMIJO * promised and rise > 0.0 and math.isfinite(rise):
        s.line[n, 2] = s.value[n]
        for i in range(s.note[n, DIM]):
            s.move[n, i] = s.points[n, 0, i] - s.theta[n, i]
            s.theta[n, i] = s.points[n, 0, i]
        s.value[n] = reached
        s.note[n, N_ITER] += 1
        s.trace[s.note[n, N_ITER], n] = reached
        return _ask_differences(s, n)
    shorter = 0.25
    if math.isfinite(rise):  # top of the parabola through value, slope and trial
        shorter = 0.5 * promised / max(max(promised - rise, 0.5 * promised), _TINY)
    s.line[n, ALPHA] *= min(max(shorter, 0.1), 0.5)
    s.note[n, HALVINGS] += 1
    # A promise below the tolerance is not worth another evaluation.
    hopeful = promised > 1e-2 * limits.value_tol * max(abs(s.value[n]), 1.0)
    if hopeful and s.note[n, HALVINGS] < _MAX_HALVINGS:
        return _ask_trial(s, n)
    return _stuck(s, n, limits)


@cold
def _stuck(s: Any, n: int, limits: Any) -> int:
    """No better point along the direction: rounding at the top, or a bad inverse Hessian."""
    s.note[n, N_ITER] += 1
    s.trace[s.note[n, N_ITER], n] = s.value[n]
    if _promise(s, n) <= 10.0 * limits.value_tol * max(abs(s.value[n]), 1.0):
        return _end(s, n, CONVERGED)
    if s.note[n, FRESH] == 1:
        return _end(s, n, NO_BETTER)
    _reset(s, n)
    return _set_out(s, n, limits)


@cold
def _update(s: Any, n: int) -> None:
    """BFGS update of the inverse where the curvature along the move allows it."""
    dim = s.note[n, DIM]
    curved = moved = dropped = 0.0
    for i in range(dim):
        drop = s.before[n, i] - s.gradient[n, i]
        curved += s.move[n, i] * drop
        moved += s.move[n, i] * s.move[n, i]
        dropped += drop * drop
    s.note[n, FRESH] = 0
    if not curved > 1e-10 * math.sqrt(moved * dropped):
        _lengthen(s, n)
        return
    bend = 0.0  # drop' B drop
    for i in range(dim):
        total = 0.0
        for j in range(dim):
            total += s.inverse[n, i, j] * (s.before[n, j] - s.gradient[n, j])
        s.scratch[n, i] = total
        bend += total * (s.before[n, i] - s.gradient[n, i])
    weight = (1.0 + bend / curved) / curved
    for i in range(dim):
        for j in range(dim):
            mixed = s.scratch[n, i] * s.move[n, j] + s.move[n, i] * s.scratch[n, j]
            s.inverse[n, i, j] += weight * s.move[n, i] * s.move[n, j] - mixed / curved


@cold
def _lengthen(s: Any, n: int) -> None:
    """Where the function still bends upwards, take four times the step along this direction."""
    dim, slope = s.note[n, DIM], 0.0
    for i in range(dim):
        total = 0.0
        for j in range(dim):
            total += s.inverse[n, i, j] * s.before[n, j]
        s.scratch[n, i] = total
        slope += total * s.before[n, i]
    for i in range(dim):
        for j in range(dim):
            s.inverse[n, i, j] += 3.0 * s.scratch[n, i] * s.scratch[n, j] / slope


def bind_tell(digest: str) -> Callable[..., None]:
    """The step of many searches at once, keyed by a digest of its sources."""

    def tell(s: Any, rows: Any, counts: Any, answers: Any, limits: Any) -> None:
        """Answer the ``counts[n]`` points of each of `rows` in turn; `counts` becomes the next."""
        _ = digest
        first = 0
        for n in rows:
            asked = counts[n]
            counts[n] = advance(s, n, answers, first, limits)
            first += asked

    return tell


def bind_begin(digest: str) -> Callable[..., None]:
    """The first step of many searches at once."""

    def begin_all(s: Any, counts: Any) -> None:
        """Ask for the value at every start."""
        _ = digest
        for n in range(counts.size):
            counts[n] = begin(s, n, s.theta.shape[1])

    return begin_all
