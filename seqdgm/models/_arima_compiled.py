"""Maximum likelihood of many seasonal ARIMA models, compiled: differences, starts, search.

A job is a series and a specification, and jobs of different orders share a call. A job runs
without Python from the data to the optimum: the series is differenced, its gaps become pulses
(`seqdgm.models._arma_likelihood`), starting values come from Hannan and Rissanen's regressions, and
`seqdgm.kernels.cpu_search` climbs from there and from white noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.cpu_search import (
    ANSWERS,
    DIFFERENCE,
    END,
    INVERSE,
    N_EVALUATIONS,
    N_ITER,
    NO_START,
    PHASE,
    SIZE,
    advance,
    begin,
)
from seqdgm.kernels.cpu_search import THETA as PARAMETERS
from seqdgm.kernels.cpu_search import VALUE as OBJECTIVE
from seqdgm.kernels.cpu_steps import cold
from seqdgm.models._arima_spec import _EDGE
from seqdgm.models._arma_likelihood import (
    AR,
    BACKWARD,
    COLUMNS,
    DIFF,
    FLOOR,
    FORWARD,
    GAMMA,
    INPUTS,
    MA,
    NEXT,
    OFFSET,
    PHI,
    PULSES,
    SAR,
    SDIFF,
    SEASON,
    SEASONAL,
    SHORT,
    SINGULAR,
    SMA,
    STEPS,
    TREND,
    VARIANCE,
    bend_line,
    eliminate,
    from_partial,
    likelihood,
    regress,
    whiten,
)

_START_RADIUS = 0.95  # largest inverse root of a starting polynomial
_NEAR = 0.05  # a search that comes so close to an optimum known, from below, will end there
LOGLIK, SIGMA2 = range(2)  # columns of the real results
ENDED, ITERATIONS, EVALUATIONS, DONE = range(4)  # columns of the integer results


class Jobs(NamedTuple):
    """Series and specifications."""

    orders: np.ndarray  # p, d, q, P, D, Q, s, trend (0 none, 1 c, 2 t, 3 ct), inputs (jobs, 9)
    series: np.ndarray  # row of x (jobs,)
    x: np.ndarray  # NaN where missing (series, time)
    lengths: np.ndarray  # (series,)
    u: np.ndarray  # (series or 1, time, inputs)
    start: np.ndarray  # free ARMA parameters to start from (jobs, most), or no rows


class Results(NamedTuple):
    """What was found, a row a job."""

    theta: np.ndarray  # free parameters (jobs, most)
    number: np.ndarray  # LOGLIK, SIGMA2
    note: np.ndarray  # ENDED, ITERATIONS, EVALUATIONS, DONE
    trace: np.ndarray  # objective after each iteration (max_iter + 1, jobs), or no columns


@cold
def difference(w: Any, o: Any, c: int, steps: int) -> None:
    """Difference the first `steps` elements of a column, which then begins with the first left."""
    lost = 0
    for k in range(o[DIFF] + o[SDIFF]):
        lag = 1 if k < o[DIFF] else o[SEASON]
        lost += lag
        for t in range(steps - 1, lost - 1, -1):
            w.columns[c, t] -= w.columns[c, t - lag]
    for t in range(steps - lost):
        w.columns[c, t] = w.columns[c, t + lost]


@cold
def load_series(w: Any, o: Any, x: Any, n: int, length: int) -> bool:
    """Series from its first to its last observation, gaps filled by straight lines.

    Notes where the gaps are; False where there are more than the columns that memory has.
    """
    begins, ends, largest = length, -1, 0.0
    for t in range(length):
        if math.isfinite(x[n, t]):
            begins, ends = min(begins, t), t
            largest = max(largest, abs(x[n, t]))
    fixed = 1 + (o[TREND] + 1) // 2 + o[INPUTS]
    gaps, known = 0, begins
    for t in range(begins, ends + 1):
        if not math.isfinite(x[n, t]):
            if fixed + gaps >= w.first.size:
                return False
            w.first[fixed + gaps] = t - begins
            gaps += 1
            continue
        w.columns[0, t - begins] = x[n, t]
        for k in range(known + 1, t):
            share = (k - known) / (t - known)
            w.columns[0, k - begins] = x[n, known] + share * (x[n, t] - x[n, known])
        known = t
    lost = o[DIFF] + o[SEASON] * o[SDIFF]
    w.note[STEPS], w.note[OFFSET] = ends + 1 - begins - lost, begins + lost
    w.note[COLUMNS], w.note[PULSES] = fixed + gaps, gaps
    w.number[FLOOR] = (1e-13 * largest) ** 2
    return w.note[STEPS] > gaps


@cold
def load_columns(w: Any, o: Any, u: Any, n: int) -> None:
    """Trend, regressors and pulses, differenced."""
    columns, gaps = w.note[COLUMNS], w.note[PULSES]
    lost = o[DIFF] + o[SEASON] * o[SDIFF]
    whole, begins = w.note[STEPS] + lost, w.note[OFFSET] - lost
    difference(w, o, 0, whole)
    for c in range(columns - gaps):
        w.first[c] = 0
    for t in range(w.note[STEPS] if o[TREND] % 2 == 1 else 0):
        w.columns[1, t] = 1.0
    for k in range(o[INPUTS]):
        c = 1 + (o[TREND] + 1) // 2 + k
        for t in range(whole):
            w.columns[c, t] = u[n if u.shape[0] > 1 else 0, begins + t, k]
        difference(w, o, c, whole)
    for c in range(columns - gaps, columns):
        for t in range(whole):
            w.columns[c, t] = 1.0 if t == w.first[c] else 0.0
        difference(w, o, c, whole)
        w.first[c] = max(w.first[c] - lost, 0)
    for c in range(columns):
        w.coef[0, c] = 0.0
    for t in range(w.note[STEPS]):
        w.base[t] = w.columns[0, t]


@cold
def load_problem(w: Any, o: Any, jobs: Any, n: int) -> bool:
    """Differenced data less a first regression; False where this likelihood does not apply.

    That is where there are too many gaps for it, or where the data leave a starting value of the
    differences undetermined.
    """
    if not load_series(w, o, jobs.x, n, jobs.lengths[n]):
        return False
    load_columns(w, o, jobs.u, n)
    w.poly[GAMMA, 0], w.poly[NEXT, 0] = 1.0, 0.0
    if o[TREND] >= 2:
        bend_line(w, o, 0)
    whiten(w, 0)
    eliminate(w)
    if w.note[SINGULAR] > 0:
        return False
    regress(w)
    for c in range(1, w.note[COLUMNS]):
        w.coef[0, c] = w.coef[1, c]
        for t in range(w.note[STEPS]):
            w.base[t] -= w.coef[0, c] * w.columns[c, t]
    for t in range(w.note[STEPS]):
        w.columns[0, t] = w.base[t]
    return True


@cold
def step_down(poly: Any, row: int, order: int) -> bool:
    """Partial autocorrelations in place of AR coefficients; False if not stationary."""
    for k in range(order - 1, 0, -1):
        last = poly[row, k]
        if not abs(last) < 1.0:
            return False
        for j in range((k + 1) // 2):
            a, b = poly[row, j], poly[row, k - 1 - j]
            poly[row, j] = (a + last * b) / (1.0 - last * last)
            poly[row, k - 1 - j] = (b + last * a) / (1.0 - last * last)
    return order == 0 or abs(poly[row, 0]) < 1.0


@cold
def scaled(poly: Any, order: int, factor: float) -> bool:
    """Whether the coefficients in SHORT, roots scaled, are stationary; partials in SEASONAL."""
    power = 1.0
    for j in range(order):
        power *= factor
        poly[SEASONAL, j] = poly[SHORT, j] * power
    return step_down(poly, SEASONAL, order)


@cold
def shrink(poly: Any, order: int) -> None:
    """Partial autocorrelations of the coefficients in SHORT, inverse roots at most 0.95."""
    inside, outside = 1.0, 1.0
    if not scaled(poly, order, 1.0 / _START_RADIUS):
        inside = 0.0
        for _ in range(40):
            middle = 0.5 * (inside + outside)
            if scaled(poly, order, middle / _START_RADIUS):
                inside = middle
            else:
                outside = middle
    scaled(poly, order, inside)


@cold
def burg(w: Any, order: int) -> None:
    """Innovations of a long autoregression, in FORWARD."""
    steps = w.note[STEPS]
    for t in range(steps):
        w.scratch[FORWARD, t] = w.scratch[BACKWARD, t] = w.base[t]
    for k in range(1, order + 1):
        cross = power = 0.0
        for t in range(k, steps):
            a, b = w.scratch[FORWARD, t], w.scratch[BACKWARD, t - 1]
            cross += a * b
            power += a * a + b * b
        c = 2.0 * cross / power if power > 0.0 else 0.0
        for t in range(steps - 1, k - 1, -1):
            a, b = w.scratch[FORWARD, t], w.scratch[BACKWARD, t - 1]
            w.scratch[FORWARD, t] = a - c * b
            w.scratch[BACKWARD, t] = b - c * a


@cold
def lagged(w: Any, o: Any, c: int, t: int) -> float:
    """Regressor c at step t: lags of the series, seasonal ones, then those of the innovations."""
    if c < o[AR]:
        return float(w.base[t - 1 - c])
    c -= o[AR]
    if c < o[SAR]:
        return float(w.base[t - o[SEASON] * (c + 1)])
    c -= o[SAR]
    lag = c + 1 if c < o[MA] else o[SEASON] * (c - o[MA] + 1)
    return float(w.scratch[FORWARD, t - lag])


@cold
def regress_on_lags(w: Any, o: Any, begins: int, width: int) -> None:
    """Coefficients of all lags, in row 1 of `coef`; zero where there are too few rows."""
    steps, columns, pulses = w.note[STEPS], w.note[COLUMNS], w.note[PULSES]
    for c in range(width + 1):
        w.coef[1, c] = 0.0
        for j in range(c + 1):
            w.gram[c, j] = 0.0
    if steps - begins < 3 * width:
        return
    for t in range(begins, steps):
        w.coef[2, 0] = w.base[t]
        for c in range(width):
            w.coef[2, c + 1] = lagged(w, o, c, t)
        for c in range(width + 1):
            for j in range(c + 1):
                w.gram[c, j] += w.coef[2, c] * w.coef[2, j]
    w.note[COLUMNS], w.note[PULSES] = width + 1, 0
    eliminate(w)
    regress(w)
    w.note[COLUMNS], w.note[PULSES] = columns, pulses


@cold
def take_polynomial(w: Any, s: Any, order: int, source: int, target: int, ma: bool) -> None:
    """Free parameters of the regression coefficients of one polynomial."""
    for i in range(order):
        w.poly[SHORT, i] = -w.coef[1, source + i] if ma else w.coef[1, source + i]
    shrink(w.poly, order)
    for i in range(order):
        partial = w.poly[SEASONAL, i] / _EDGE
        s.table[0, PARAMETERS, target + i] = math.asin(partial) if ma else math.atanh(partial)


@cold
def hannan_rissanen(w: Any, s: Any, o: Any) -> None:
    """Starting values: a regression of the series on its lags and those of its innovations."""
    p, q, sp, sq, season = o[AR], o[MA], o[SAR], o[SMA], o[SEASON]
    ar_order, ma_order, steps = p + season * sp, q + season * sq, w.note[STEPS]
    begins = ar_order
    if ma_order > 0:
        order = long_order(ar_order + ma_order, steps)
        burg(w, order)
        begins = max(begins, order + ma_order)
    regress_on_lags(w, o, begins, p + q + sp + sq)
    take_polynomial(w, s, p, 1, 0, False)
    take_polynomial(w, s, q, 1 + p + sp, p, True)
    take_polynomial(w, s, sp, 1 + p, p + q, False)
    take_polynomial(w, s, sq, 1 + p + sp + q, p + q + sp, True)


@cold
def long_order(orders: int, steps: int) -> int:
    """Order of the long autoregression."""
    wanted = max(orders, int(10.0 * math.log10(max(steps, 1))))
    return max(min(wanted, steps // 3), 1)


@cold
def climb(w: Any, s: Any, o: Any, limits: Any, dim: int, known: float, best: Any, j: int) -> None:
    """Search from the parameters in place; gives up on the way to the optimum known already."""
    points = INVERSE + s.table.shape[2]
    for i in range(dim):
        s.table[0, SIZE, i] = 1.0
    asked = begin(s, 0, dim)
    while asked > 0:
        for k in range(asked):
            s.number[0, ANSWERS + k] = likelihood(w, o, s.table, 0, points + k)
        asked = advance(s, 0, limits)
        if s.note[0, PHASE] == DIFFERENCE and s.number[0, OBJECTIVE] <= known:
            near = True
            for i in range(dim):
                near = near and abs(s.table[0, PARAMETERS, i] - best[j, i]) < _NEAR
            if near:
                asked = 0


@cold
def finish(w: Any, s: Any, o: Any, out: Any, j: int, dim: int) -> None:
    """Variance, trend and regression coefficients at the optimum, in the free parameters' units."""
    for i in range(dim):
        s.table[0, PARAMETERS, i] = out.theta[j, i]
    out.number[j, LOGLIK] = likelihood(w, o, s.table, 0, PARAMETERS)
    out.number[j, SIGMA2] = w.number[VARIANCE]
    regress(w)
    for c in range(1, w.note[COLUMNS] - w.note[PULSES]):
        out.theta[j, dim + c - 1] = w.coef[0, c] + w.coef[1, c]
    if o[TREND] == 3:  # the mean is a line with an intercept of its own at step 0
        total, sloped = 1.0, 0.0
        for k in range(o[AR] + o[SEASON] * o[SAR]):
            total -= w.poly[PHI, k]
            sloped += (k + 1) * w.poly[PHI, k]
        out.theta[j, dim] -= out.theta[j, dim + 1] * sloped / total


def bind_fit(digest: str) -> Callable[..., None]:
    """The loop over a range of jobs, keyed by a digest of its sources."""

    def fit_range(start: int, stop: int, jobs: Any, w: Any, s: Any, limits: Any, out: Any) -> None:
        """Fit jobs start..stop-1."""
        _ = digest
        for j in range(start, stop):
            o = jobs.orders[j]
            dim = o[AR] + o[MA] + o[SAR] + o[SMA]
            out.note[j, DONE] = load_problem(w, o, jobs, jobs.series[j])
            if out.note[j, DONE] == 0:
                continue
            given = jobs.start.shape[0] > 0
            out.note[j, EVALUATIONS], known = 0, -math.inf
            for k in range(1 if dim == 0 or given else 2):
                for i in range(dim):
                    s.table[0, PARAMETERS, i] = jobs.start[j, i] if given else 0.0
                if k == 0 and not given:
                    hannan_rissanen(w, s, o)
                climb(w, s, o, limits, dim, known, out.theta, j)
                out.note[j, EVALUATIONS] += s.note[0, N_EVALUATIONS]
                if k == 0 or s.number[0, OBJECTIVE] > known:
                    if s.note[0, END] != NO_START:
                        known = s.number[0, OBJECTIVE]
                    out.note[j, ENDED] = s.note[0, END]
                    out.note[j, ITERATIONS] = s.note[0, N_ITER]
                    for i in range(dim):
                        out.theta[j, i] = s.table[0, PARAMETERS, i]
                    for i in range(s.note[0, N_ITER] + 1 if out.trace.shape[1] > 0 else 0):
                        out.trace[i, j] = s.trace[i, 0]
            finish(w, s, o, out, j, dim)

    return fit_range
