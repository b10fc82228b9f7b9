r"""Exact Gaussian likelihood of stationary ARMA processes, compiled: O(p + q) a step.

For a stationary start the covariance of the predicted state changes by a matrix of rank one in
every step, so the gain needs no covariance: with :math:`\alpha` the predicted state of
:math:`w_t = \sum_j \phi_j w_{t-j} + \varepsilon_t + \sum_j \theta_j \varepsilon_{t-j}` (r = max(p,
q) elements, transition F, first element the prediction of :math:`w_t`), f the variance of the
innovation v in units of that of :math:`\varepsilon`, k the gain and y a second vector that starts
equal to it,

.. math::

    \alpha \leftarrow F \alpha + k v, \quad \rho = y_1, \quad f \leftarrow (1 - \rho^2) f, \quad
    k \leftarrow \frac{k - \rho F y}{1 - \rho^2}, \quad y \leftarrow F y - \rho k .

:math:`\rho` are the partial autocorrelations of w: a hyperbolic rotation a step, in its stable
mixed form. Several columns are whitened at once: the series, what explains its mean, and a pulse
for every missing value. Regression coefficients are concentrated out, and missing values are
integrated out (a flat density for each is what "not observed" means), both by elimination from the
cross-products of the whitened columns.

References
----------
Morf, Sidhu and Kailath (1974), Some new algorithms for recursive estimation in constant, linear,
discrete-time systems, IEEE Transactions on Automatic Control 19(4), 315-323; Pearlman (1980), An
algorithm for the exact likelihood of a high-order autoregressive-moving average process, Biometrika
67(1), 232-233; Gomez and Maravall (1994), Estimation, prediction, and interpolation for
nonstationary series with the Kalman filter, JASA 89(426), 611-624 (missing values).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.cpu_steps import cold, glue
from seqdgm.models._arima_spec import _EDGE

AR, MA, SAR, SMA, SEASON, DIFF, SDIFF, TREND, INPUTS = range(9)  # columns of the orders
# Rows of the table over lags: coefficients at lags 1, 2, ...; impulse responses and autocovariances
# at lags 0, 1, ...; gain and second vector of the recursion; scratch. Then the states of all
# columns, and a square matrix.
PHI, THETA, PSI, GAMMA, GAIN, NEXT, SHORT, SEASONAL, STATE = range(9)
# Rows of the table over time: series without its first regression, scratch, and the columns that
# are whitened: the series, trend, regressors, pulses.
BASE, LINE, FORWARD, BACKWARD, COLUMN = range(5)
# Rows of the table over columns: coefficients of the first regression and of the last one, values
# at one step, and cross-products (or what elimination has left of them).
FIRST, LAST, STEP, GRAM = range(4)
VARIANCE, LOGDET, QUAD, FLOOR, UNIT = range(5)  # real numbers of the problem at hand
# Its integers, and from there on the first steps at which columns are not zero.
STEPS, COLUMNS, PULSES, OFFSET, SINGULAR, AR_LAGS, LAGS, BEGINS = range(8)

_SETTLED = 1e-9  # the gain changes by the square of what y has fallen to
_COLLINEAR = 1e-12  # part of a column that the others leave, below which it is theirs
_LOG_2PI = math.log(2.0 * math.pi)


class Work(NamedTuple):
    """Memory for one problem at a time; few arrays, because each costs time to compile."""

    lag: np.ndarray  # (STATE + columns + lags + 1, lags + 2)
    time: np.ndarray  # (COLUMN + columns, time)
    gram: np.ndarray  # (GRAM + regressors, regressors)
    number: np.ndarray
    note: np.ndarray


def make_work(lags: int, columns: int, regressors: int, steps: int) -> Work:
    """Allocate memory for so many lags, columns, regressors in any regression, and steps."""
    return Work(
        np.zeros((STATE + columns + lags + 1, lags + 2)),
        np.zeros((COLUMN + columns, steps)),
        np.zeros((GRAM + regressors, regressors)),
        np.zeros(5),
        np.zeros(BEGINS + columns, np.int64),
    )


@cold
def from_partial(lag: Any, row: int, order: int) -> None:
    """AR coefficients in place of partial autocorrelations (Durbin and Levinson)."""
    for k in range(1, order):
        last = lag[row, k]
        for j in range((k + 1) // 2):
            a, b = lag[row, j], lag[row, k - 1 - j]
            lag[row, j] = a - last * b
            lag[row, k - 1 - j] = b - last * a


@cold
def load_polynomials(w: Any, o: Any, table: Any, n: int, row: int) -> None:
    """Coefficients of the free vector ``table[n, row]``, as `constrain` defines them."""
    for ma in range(2):
        source = o[AR] if ma else 0
        for half in range(2):
            order = o[2 * half + ma]
            for i in range(order):
                x = table[n, row, source + i]
                w.lag[SHORT + half, i] = _EDGE * (math.sin(x) if ma else math.tanh(x))
            from_partial(w.lag, SHORT + half, order)
            source += o[ma] + o[ma + 1]
        sign = -1.0 if ma else 1.0
        for i in range(w.lag.shape[1]):
            w.lag[PHI + ma, i] = sign * w.lag[SHORT, i] if i < o[ma] else 0.0
        for j in range(o[SAR + ma]):
            first = o[SEASON] * (j + 1)
            w.lag[PHI + ma, first - 1] += sign * w.lag[SEASONAL, j]
            for i in range(o[ma]):
                w.lag[PHI + ma, first + i] -= sign * w.lag[SHORT, i] * w.lag[SEASONAL, j]


@cold
def solve(lag: Any, size: int) -> None:
    """Solve for row GAMMA in place by elimination with row exchanges."""
    m = lag.shape[0] - lag.shape[1] + 1
    for k in range(size):
        pivot = k
        for i in range(k + 1, size):
            if abs(lag[m + i, k]) > abs(lag[m + pivot, k]):
                pivot = i
        if pivot != k:
            lag[GAMMA, k], lag[GAMMA, pivot] = lag[GAMMA, pivot], lag[GAMMA, k]
            for j in range(k, size):
                lag[m + k, j], lag[m + pivot, j] = lag[m + pivot, j], lag[m + k, j]
        for i in range(k + 1, size):
            if lag[m + i, k] != 0.0:
                c = lag[m + i, k] / lag[m + k, k]
                for j in range(k + 1, size):
                    lag[m + i, j] -= c * lag[m + k, j]
                lag[GAMMA, i] -= c * lag[GAMMA, k]
    for k in range(size - 1, -1, -1):
        total = lag[GAMMA, k]
        for j in range(k + 1, size):
            total -= lag[m + k, j] * lag[GAMMA, j]
        lag[GAMMA, k] = total / lag[m + k, k]


@cold
def start_gain(lag: Any, p: int, q: int) -> None:
    """Autocovariances of the process, and the gain of the first step."""
    m = lag.shape[0] - lag.shape[1] + 1
    for k in range(q + 1):
        total = lag[THETA, k - 1] if k > 0 else 1.0
        for j in range(1, min(k, p) + 1):
            total += lag[PHI, j - 1] * lag[PSI, k - j]
        lag[PSI, k] = total
    for k in range(p + 1):  # sum_j a_j gamma_|k-j| = sum_j theta_j psi_{j-k}
        total = 0.0
        for j in range(k, q + 1):
            total += (lag[THETA, j - 1] if j > 0 else 1.0) * lag[PSI, j - k]
        lag[GAMMA, k] = total
        for j in range(p + 1):
            lag[m + k, j] = 0.0
        for j in range(p + 1):
            lag[m + k, abs(k - j)] -= lag[PHI, j - 1] if j > 0 else -1.0
    solve(lag, p + 1)
    for i in range(max(p, q)):
        total = 0.0
        for j in range(i, p):
            total += lag[PHI, j] * lag[GAMMA, j - i]
        for j in range(i, q):
            total += lag[THETA, j] * lag[PSI, j - i]
        lag[GAIN, i] = lag[NEXT, i] = total / lag[GAMMA, 0]
    lag[NEXT, max(p, q)] = 0.0


@glue
def rotate(lag: Any, r: int, f: float) -> float:
    """Gain of the next step; returns its innovation variance."""
    rho = lag[NEXT, 0]
    left = 1.0 - rho * rho
    for i in range(r):
        z = lag[PHI, i] * rho + lag[NEXT, i + 1]
        k = (lag[GAIN, i] - rho * z) / left
        lag[GAIN, i] = k
        lag[NEXT, i] = z - rho * k
    return f * left


@glue
def settle(lag: Any, r: int) -> bool:
    """Put the gain of the infinite past in place once nothing moves any more."""
    for i in range(r):
        if abs(lag[NEXT, i]) > _SETTLED:
            return False
    for i in range(r):
        lag[GAIN, i] = lag[PHI, i] + lag[THETA, i]
    return True


@cold
def whiten(w: Any) -> None:
    """Cross-products of the innovations of all columns, and the log-determinant."""
    steps, columns, r = w.note[STEPS], w.note[COLUMNS], w.note[LAGS]
    for c in range(columns):
        for i in range(r + 1):
            w.lag[STATE + c, i] = 0.0
        for j in range(c + 1):
            w.gram[GRAM + c, j] = 0.0
    f = w.lag[GAMMA, 0]
    logdet, factor, settled, active = 0.0, 1.0, False, 1
    if not (f > 0.0 and f < math.inf):
        f = math.nan
    for t in range(steps):
        while active < columns and w.note[BEGINS + active] <= t:
            active += 1
        for c in range(active):
            seen = w.lag[STATE + c, 0]
            v = w.time[COLUMN + c, t] - seen
            w.gram[STEP, c] = v
            for j in range(c + 1):
                w.gram[GRAM + c, j] += w.gram[STEP, j] * v / f
            for i in range(r):
                ahead = w.lag[STATE + c, i + 1] + w.lag[PHI, i] * seen
                w.lag[STATE + c, i] = ahead + w.lag[GAIN, i] * v
        if not settled:
            factor *= f
            if not (factor > 1e-100 and factor < 1e100):
                logdet += math.log(factor)
                factor = 1.0
            f = rotate(w.lag, r, f)
            if t % 8 == 0 and settle(w.lag, r):
                settled, f = True, 1.0
    w.number[LOGDET] = logdet + math.log(factor)


@cold
def eliminate(w: Any) -> None:
    """Take all columns but the first out of it, from the last on; pulses are the last."""
    columns = w.note[COLUMNS]
    w.note[SINGULAR] = 0
    for c in range(columns):
        w.gram[STEP, c] = w.gram[GRAM + c, c]
    for c in range(columns - 1, 0, -1):
        pivot, pulse = w.gram[GRAM + c, c], c >= columns - w.note[PULSES]
        if not pivot > _COLLINEAR * w.gram[STEP, c]:
            w.note[SINGULAR] += pulse
            for j in range(c + 1):
                w.gram[GRAM + c, j] = 0.0
            continue
        if pulse:
            w.number[LOGDET] += math.log(pivot)
        for i in range(c):
            share = w.gram[GRAM + c, i] / pivot
            for j in range(i + 1):
                w.gram[GRAM + i, j] -= share * w.gram[GRAM + c, j]
    w.number[QUAD] = w.gram[GRAM, 0]


@cold
def regress(w: Any) -> None:
    """Coefficients of the columns, from what elimination has left."""
    for c in range(1, w.note[COLUMNS]):
        total, pivot = w.gram[GRAM + c, 0], w.gram[GRAM + c, c]
        for j in range(1, c):
            total -= w.gram[GRAM + c, j] * w.gram[LAST, j]
        w.gram[LAST, c] = total / pivot if pivot > 0.0 else 0.0


@cold
def bend_line(w: Any, o: Any) -> None:
    """Column of the linear trend: what its mean makes of the line after a constant past."""
    p, offset, total = w.note[AR_LAGS], w.note[OFFSET], 1.0
    row = COLUMN + o[TREND] - 1
    for j in range(p):
        total -= w.lag[PHI, j]
    for t in range(offset + w.note[STEPS]):
        mean = total * t if t > 0 else 1.0
        for j in range(p if t > 0 else 0):
            before = t - 1 - j
            mean += w.lag[PHI, j] * (w.time[LINE, before] if before > 0 else 1.0)
        w.time[LINE, t] = mean
        if t >= offset:
            k, straight = t - offset, max(t, 1)
            w.time[row, k] = mean
            shift = w.gram[FIRST, o[TREND] - 1] * (mean - straight)
            w.time[COLUMN, k] = w.time[BASE, k] - shift


@cold
def likelihood(w: Any, o: Any, table: Any, n: int, row: int) -> float:
    r"""Log-likelihood of a free vector, at the best innovation variance and regression.

    With n observations beyond those that start differences, and m of them missing, it is

    .. math:: -\tfrac12 \left( (n - m) (\log 2 \pi \hat\sigma^2 + 1) + \log |\Omega|
        + \log |X_m^\top \Omega^{-1} X_m| \right),

    :math:`X_m` the differenced pulses of the missing values. It is given in a unit of the data
    (UNIT is the logarithm of its square), so that a search stops at the same place in any.
    """
    p, q = o[AR] + o[SEASON] * o[SAR], o[MA] + o[SEASON] * o[SMA]
    w.note[AR_LAGS], w.note[LAGS] = p, max(p, q)
    load_polynomials(w, o, table, n, row)
    start_gain(w.lag, p, q)
    if o[TREND] >= 2:
        bend_line(w, o)
    whiten(w)
    eliminate(w)
    count = w.note[STEPS] - w.note[PULSES]
    variance = w.number[QUAD] / count
    w.number[VARIANCE] = variance
    if not variance > w.number[FLOOR]:
        return math.nan
    size = math.log(variance) - w.number[UNIT] + _LOG_2PI + 1.0
    return -0.5 * (count * size + w.number[LOGDET])
