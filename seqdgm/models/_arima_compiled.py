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
    PHASE,
    SIZE,
    advance,
    begin,
)
from seqdgm.kernels.cpu_search import THETA as PARAMETERS
from seqdgm.kernels.cpu_search import VALUE as OBJECTIVE
from seqdgm.kernels.cpu_steps import cold, glue
from seqdgm.models._arima_spec import _EDGE
from seqdgm.models._arma_likelihood import (
    AR,
    AR_LAGS,
    BACKWARD,
    BASE,
    BEGINS,
    COLUMN,
    COLUMNS,
    DIFF,
    FIRST,
    FLOOR,
    FORWARD,
    GAMMA,
    GRAM,
    INPUTS,
    LAGS,
    LAST,
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
    STEP,
    STEPS,
    TREND,
    UNIT,
    VARIANCE,
    bend_line,
    eliminate,
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

    orders: np.ndarray  # p, q, P, Q, s, d, D, trend (0 none, 1 c, 2 t, 3 ct), inputs (jobs, 9)
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
            if COLUMN + fixed + gaps >= w.time.shape[0]:
                return False
            w.note[BEGINS + fixed + gaps] = t - begins
            gaps += 1
            continue
        w.time[COLUMN, t - begins] = x[n, t]
        for k in range(known + 1, t):
            share = (k - known) / (t - known)
            w.time[COLUMN, k - begins] = x[n, known] + share * (x[n, t] - x[n, known])
        known = t
    lost = o[DIFF] + o[SEASON] * o[SDIFF]
    w.note[STEPS], w.note[OFFSET] = ends + 1 - begins - lost, begins + lost
    w.note[COLUMNS], w.note[PULSES] = fixed + gaps, gaps
    w.number[FLOOR] = (1e-13 * largest) ** 2
    return w.note[STEPS] > gaps


@cold
def load_columns(w: Any, o: Any, u: Any, n: int) -> None:
    """Regressors and pulses next to the series; all are differenced. Then the constant."""
    columns, trends = w.note[COLUMNS], (o[TREND] + 1) // 2
    lost = o[DIFF] + o[SEASON] * o[SDIFF]
    whole, begins = w.note[STEPS] + lost, w.note[OFFSET] - lost
    for c in range(columns):
        pulse = c >= columns - w.note[PULSES]
        at = w.note[BEGINS + c]
        for t in range(whole if c > trends else 0):
            if pulse:
                w.time[COLUMN + c, t] = 1.0 if t == at else 0.0
            else:
                w.time[COLUMN + c, t] = u[n if u.shape[0] > 1 else 0, begins + t, c - 1 - trends]
        left = whole
        for k in range(o[DIFF] + o[SDIFF]):
            lag = 1 if k < o[DIFF] else o[SEASON]
            left -= lag
            for t in range(left):
                w.time[COLUMN + c, t] = w.time[COLUMN + c, t + lag] - w.time[COLUMN + c, t]
        w.note[BEGINS + c] = max(at - lost, 0) if pulse else 0
        w.gram[FIRST, c] = 0.0
    for t in range(w.note[STEPS]):
        w.time[BASE, t] = w.time[COLUMN, t]
        if o[TREND] % 2 == 1:
            w.time[COLUMN + 1, t] = 1.0


@cold
def regress_first(w: Any, o: Any) -> bool:
    """Take an ordinary regression out of the data; False if a missing value is undetermined."""
    w.note[AR_LAGS] = w.note[LAGS] = 0
    w.lag[GAMMA, 0], w.lag[NEXT, 0] = 1.0, 0.0
    if o[TREND] >= 2:
        bend_line(w, o)
    whiten(w)
    eliminate(w)
    regress(w)
    for c in range(1, w.note[COLUMNS]):
        w.gram[FIRST, c] = w.gram[LAST, c]
        for t in range(w.note[STEPS]):
            w.time[BASE, t] -= w.gram[FIRST, c] * w.time[COLUMN + c, t]
    total = 0.0
    for t in range(w.note[STEPS]):
        w.time[COLUMN, t] = w.time[BASE, t]
        total += w.time[BASE, t] * w.time[BASE, t]
    w.number[UNIT] = math.log(total / w.note[STEPS]) if total > 0.0 else 0.0
    return w.note[SINGULAR] == 0


@cold
def scaled(lag: Any, order: int, factor: float) -> bool:
    """Whether the coefficients in SHORT, roots scaled, are stationary; partials in SEASONAL."""
    power = 1.0
    for j in range(order):
        power *= factor
        lag[SEASONAL, j] = lag[SHORT, j] * power
    for k in range(order - 1, -1, -1):
        last = lag[SEASONAL, k]
        if not abs(last) < 1.0:
            return False
        for j in range((k + 1) // 2):
            a, b = lag[SEASONAL, j], lag[SEASONAL, k - 1 - j]
            lag[SEASONAL, j] = (a + last * b) / (1.0 - last * last)
            lag[SEASONAL, k - 1 - j] = (b + last * a) / (1.0 - last * last)
    return True


@cold
def shrink(lag: Any, order: int) -> None:
    """Partial autocorrelations of the coefficients in SHORT, inverse roots at most 0.95."""
    inside, outside = 0.0, 2.0  # the first factor tried is 1
    while outside - inside > 1e-9:
        middle = 0.5 * (inside + outside)
        if not scaled(lag, order, middle / _START_RADIUS):
            outside = middle
        elif middle == 1.0:
            inside = outside = 1.0
        else:
            inside = middle
    scaled(lag, order, inside)


@cold
def burg(w: Any, order: int) -> None:
    """Innovations of a long autoregression, in FORWARD."""
    steps = w.note[STEPS]
    for t in range(steps):
        w.time[FORWARD, t] = w.time[BACKWARD, t] = w.time[BASE, t]
    for k in range(1, order + 1):
        cross = power = 0.0
        for t in range(k, steps):
            a, b = w.time[FORWARD, t], w.time[BACKWARD, t - 1]
            cross += a * b
            power += a * a + b * b
        c = 2.0 * cross / power if power > 0.0 else 0.0
        for t in range(steps - 1, k - 1, -1):
            a, b = w.time[FORWARD, t], w.time[BACKWARD, t - 1]
            w.time[FORWARD, t] = a - c * b
            w.time[BACKWARD, t] = b - c * a


@cold
def regress_on_lags(w: Any, o: Any, begins: int, width: int) -> None:
    """Coefficients of lags of the series and of its innovations; zero with too few rows."""
    steps, columns, pulses = w.note[STEPS], w.note[COLUMNS], w.note[PULSES]
    for c in range(width + 1):
        w.gram[LAST, c] = 0.0
        for j in range(c + 1):
            w.gram[GRAM + c, j] = 0.0
    if steps - begins < 3 * width:
        return
    for t in range(begins, steps):
        w.gram[STEP, 0] = w.time[BASE, t]
        c = 1
        for k in range(4):
            for i in range(o[k]):
                at = t - (i + 1) * (o[SEASON] if k >= SAR else 1)
                w.gram[STEP, c] = w.time[FORWARD if k % 2 == MA else BASE, at]
                c += 1
        for c in range(width + 1):
            for j in range(c + 1):
                w.gram[GRAM + c, j] += w.gram[STEP, c] * w.gram[STEP, j]
    w.note[COLUMNS], w.note[PULSES] = width + 1, 0
    eliminate(w)
    regress(w)
    w.note[COLUMNS], w.note[PULSES] = columns, pulses


@cold
def hannan_rissanen(w: Any, s: Any, o: Any) -> None:
    """Starting values: a regression of the series on its lags and those of its innovations."""
    ar_order, ma_order = o[AR] + o[SEASON] * o[SAR], o[MA] + o[SEASON] * o[SMA]
    begins, steps = ar_order, w.note[STEPS]
    if ma_order > 0:
        order = max(ar_order + ma_order, int(10.0 * math.log10(steps)))
        order = max(min(order, steps // 3), 1)
        burg(w, order)
        begins = max(begins, order + ma_order)
    regress_on_lags(w, o, begins, o[AR] + o[MA] + o[SAR] + o[SMA])
    first = 0
    for k in range(4):
        ma = k % 2 == MA
        for i in range(o[k]):
            w.lag[SHORT, i] = -w.gram[LAST, 1 + first + i] if ma else w.gram[LAST, 1 + first + i]
        shrink(w.lag, o[k])
        for i in range(o[k]):
            partial = w.lag[SEASONAL, i] / _EDGE
            s.table[0, PARAMETERS, first + i] = math.asin(partial) if ma else math.atanh(partial)
        first += o[k]


@glue
def near(s: Any, best: Any, j: int, dim: int) -> bool:
    """Whether a search has come close to parameters that are known."""
    close = True
    for i in range(dim):
        close = close and abs(s.table[0, PARAMETERS, i] - best[j, i]) < _NEAR
    return close


@glue
def keep_best(s: Any, out: Any, j: int, dim: int, known: float, first: bool) -> float:
    """Take the end of a search over if it is higher; returns the highest objective."""
    out.note[j, EVALUATIONS] += s.note[0, N_EVALUATIONS]
    value = s.number[0, OBJECTIVE]
    if first or value > known:
        out.note[j, ENDED], out.note[j, ITERATIONS] = s.note[0, END], s.note[0, N_ITER]
        for i in range(dim):
            out.theta[j, i] = s.table[0, PARAMETERS, i]
        for i in range(s.note[0, N_ITER] + 1 if out.trace.shape[1] > 0 else 0):
            out.trace[i, j] = s.trace[i, 0]
    return value if value > known else known


@cold
def finish(w: Any, s: Any, o: Any, out: Any, j: int, dim: int) -> None:
    """Results after a likelihood: in the data's unit, with trend and regression coefficients."""
    shift = 0.5 * (w.note[STEPS] - w.note[PULSES]) * w.number[UNIT]
    out.number[j, LOGLIK], out.number[j, SIGMA2] = s.number[0, ANSWERS] - shift, w.number[VARIANCE]
    for i in range(out.note[j, ITERATIONS] + 1 if out.trace.shape[1] > 0 else 0):
        out.trace[i, j] -= shift
    theta = out.theta
    regress(w)
    for c in range(1, w.note[COLUMNS] - w.note[PULSES]):
        theta[j, dim + c - 1] = w.gram[FIRST, c] + w.gram[LAST, c]
    if o[TREND] == 3:  # the mean is a line with an intercept of its own at step 0
        total, sloped = 1.0, 0.0
        for k in range(w.note[AR_LAGS]):
            total -= w.lag[PHI, k]
            sloped += (k + 1) * w.lag[PHI, k]
        theta[j, dim] -= theta[j, dim + 1] * sloped / total


def bind_fit(digest: str) -> Callable[..., None]:
    """The loop over a range of jobs, keyed by a digest of its sources."""

    def fit_range(start: int, stop: int, jobs: Any, w: Any, s: Any, limits: Any, out: Any) -> None:
        """Fit jobs start..stop-1: a search from every start, then the likelihood at the best."""
        _ = digest
        points, given = INVERSE + s.table.shape[2], jobs.start.shape[0] > 0
        for j in range(start, stop):
            o, n = jobs.orders[j], jobs.series[j]
            dim = o[AR] + o[MA] + o[SAR] + o[SMA]
            if not load_series(w, o, jobs.x, n, jobs.lengths[n]):
                continue
            load_columns(w, o, jobs.u, n)
            if not regress_first(w, o):
                continue
            out.note[j, DONE], known = 1, -math.inf
            starts = 1 if dim == 0 or given else 2
            for k in range(starts + 1):
                for i in range(dim):
                    s.table[0, SIZE, i] = 1.0
                    s.table[0, PARAMETERS, i] = jobs.start[j, i] if given else 0.0
                    if k == starts:
                        s.table[0, PARAMETERS, i] = out.theta[j, i]
                if k == 0 and not given:
                    hannan_rissanen(w, s, o)
                asked = begin(s, 0, dim)
                while asked > 0:
                    for i in range(asked):
                        s.number[0, ANSWERS + i] = likelihood(w, o, s.table, 0, points + i)
                    if k == starts:
                        break
                    asked = advance(s, 0, limits)
                    below = s.note[0, PHASE] == DIFFERENCE and s.number[0, OBJECTIVE] <= known
                    if below and near(s, out.theta, j, dim):
                        break  # on its way to the optimum that is known
                if k < starts:
                    known = keep_best(s, out, j, dim, known, k == 0)
            finish(w, s, o, out, j, dim)

    return fit_range
