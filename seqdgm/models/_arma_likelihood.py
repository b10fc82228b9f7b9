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

:math:`\rho` are the partial autocorrelations of w: a hyperbolic rotation a step, in its stable mixed
form. Several columns are whitened at once: the series, what explains its mean, and a pulse for
every missing value. Regression coefficients are concentrated out and missing values integrated out
(a flat density for each is what "not observed" means), both by elimination from the
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

AR, DIFF, MA, SAR, SDIFF, SMA, SEASON, TREND, INPUTS = range(9)  # columns of the orders
# Rows of the polynomial table: coefficients at lags 1, 2, ...; impulse responses and
# autocovariances at lags 0, 1, ...; gain and second vector of the recursion; scratch.
PHI, THETA, PSI, GAMMA, GAIN, NEXT, SHORT, SEASONAL = range(8)
VARIANCE, LOGDET, QUAD, FLOOR = range(4)  # real numbers of the problem at hand
STEPS, COLUMNS, PULSES, OFFSET, SINGULAR = range(5)  # its integers
LINE, FORWARD, BACKWARD = range(3)  # rows of the scratch memory

_SETTLED = 1e-9  # the gain changes by the square of what y has fallen to
_COLLINEAR = 1e-12  # part of a column that the others leave, below which it is theirs
_LOG_2PI = math.log(2.0 * math.pi)


class Work(NamedTuple):
    """Memory for one problem at a time."""

    poly: np.ndarray  # (8, largest lag + 2)
    matrix: np.ndarray  # (lags + 1, lags + 1)
    columns: np.ndarray  # series, trend, regressors, pulses (columns, time)
    base: np.ndarray  # series without its first regression (time,)
    state: np.ndarray  # predicted states (columns, largest lag + 2)
    gram: np.ndarray  # cross-products of whitened columns, then what elimination leaves
    coef: np.ndarray  # row 0: first regression; row 1: the last elimination; row 2: v (3, columns)
    first: np.ndarray  # first step at which a column is not zero (columns,)
    scratch: np.ndarray  # (3, time)
    number: np.ndarray  # (4,)
    note: np.ndarray  # (5,)


def make_work(lags: int, columns: int, products: int, steps: int) -> Work:
    """Allocate memory for so many lags, columns, regressors in any regression, and steps."""
    return Work(
        np.zeros((8, lags + 2)),
        np.empty((lags + 1, lags + 1)),
        np.zeros((columns, steps)),
        np.empty(steps),
        np.empty((columns, lags + 2)),
        np.empty((products, products)),
        np.zeros((3, products)),
        np.zeros(columns, np.int64),
        np.empty((3, steps)),
        np.zeros(4),
        np.zeros(5, np.int64),
    )


@cold
def from_partial(poly: Any, row: int, order: int) -> None:
    """AR coefficients in place of partial autocorrelations (Durbin and Levinson)."""
    for k in range(1, order):
        last = poly[row, k]
        for j in range((k + 1) // 2):
            a, b = poly[row, j], poly[row, k - 1 - j]
            poly[row, j] = a - last * b
            poly[row, k - 1 - j] = b - last * a


@cold
def multiply(poly: Any, row: int, order: int, seasonal: int, s: int, cross: float) -> None:
    """Coefficients of the product of the polynomials in SHORT and SEASONAL, by lag from 1."""
    for lag in range(poly.shape[1]):
        poly[row, lag] = 0.0
    for i in range(order):
        poly[row, i] = poly[SHORT, i]
    for j in range(seasonal):
        lag = s * (j + 1)
        poly[row, lag - 1] += poly[SEASONAL, j]
        for i in range(order):
            poly[row, lag + i] += cross * poly[SHORT, i] * poly[SEASONAL, j]


@cold
def load_polynomials(w: Any, o: Any, table: Any, n: int, row: int) -> None:
    """Coefficients of the free vector ``table[n, row]``, as `constrain` defines them."""
    p, q, sp = o[AR], o[MA], o[SAR]
    for i in range(p):
        w.poly[SHORT, i] = _EDGE * math.tanh(table[n, row, i])
    for i in range(sp):
        w.poly[SEASONAL, i] = _EDGE * math.tanh(table[n, row, p + q + i])
    from_partial(w.poly, SHORT, p)
    from_partial(w.poly, SEASONAL, sp)
    multiply(w.poly, PHI, p, sp, o[SEASON], -1.0)
    for i in range(q):
        w.poly[SHORT, i] = _EDGE * math.sin(table[n, row, p + i])
    for i in range(o[SMA]):
        w.poly[SEASONAL, i] = _EDGE * math.sin(table[n, row, p + q + sp + i])
    from_partial(w.poly, SHORT, q)
    from_partial(w.poly, SEASONAL, o[SMA])
    for i in range(q):
        w.poly[SHORT, i] *= -1.0
    for i in range(o[SMA]):
        w.poly[SEASONAL, i] *= -1.0
    multiply(w.poly, THETA, q, o[SMA], o[SEASON], 1.0)


@cold
def solve(matrix: Any, poly: Any, size: int) -> None:
    """Solve for ``poly[GAMMA]`` in place by elimination with row exchanges."""
    for k in range(size):
        pivot = k
        for i in range(k + 1, size):
            if abs(matrix[i, k]) > abs(matrix[pivot, k]):
                pivot = i
        if pivot != k:
            poly[GAMMA, k], poly[GAMMA, pivot] = poly[GAMMA, pivot], poly[GAMMA, k]
            for j in range(k, size):
                matrix[k, j], matrix[pivot, j] = matrix[pivot, j], matrix[k, j]
        for i in range(k + 1, size):
            if matrix[i, k] != 0.0:
                c = matrix[i, k] / matrix[k, k]
                for j in range(k + 1, size):
                    matrix[i, j] -= c * matrix[k, j]
                poly[GAMMA, i] -= c * poly[GAMMA, k]
    for k in range(size - 1, -1, -1):
        total = poly[GAMMA, k]
        for j in range(k + 1, size):
            total -= matrix[k, j] * poly[GAMMA, j]
        poly[GAMMA, k] = total / matrix[k, k]


@cold
def start_gain(w: Any, p: int, q: int) -> None:
    """Autocovariances of the process, and the gain of the first step."""
    poly, matrix = w.poly, w.matrix
    poly[PSI, 0] = 1.0
    for k in range(1, q + 1):
        total = poly[THETA, k - 1]
        for j in range(1, min(k, p) + 1):
            total += poly[PHI, j - 1] * poly[PSI, k - j]
        poly[PSI, k] = total
    for k in range(p + 1):
        total = poly[PSI, 0] if k == 0 else 0.0
        for j in range(max(k, 1), q + 1):
            total += poly[THETA, j - 1] * poly[PSI, j - k]
        poly[GAMMA, k] = total
    if p > 0:  # sum_j a_j gamma_|k-j| = sum_j theta_j psi_{j-k}
        for k in range(p + 1):
            for j in range(p + 1):
                matrix[k, j] = 0.0
            matrix[k, k] = 1.0
            for j in range(1, p + 1):
                matrix[k, abs(k - j)] -= poly[PHI, j - 1]
        solve(matrix, poly, p + 1)
    for i in range(max(p, q)):
        total = 0.0
        for j in range(i, p):
            total += poly[PHI, j] * poly[GAMMA, j - i]
        for j in range(i, q):
            total += poly[THETA, j] * poly[PSI, j - i]
        poly[GAIN, i] = total / poly[GAMMA, 0]
        poly[NEXT, i] = poly[GAIN, i]
    poly[NEXT, max(p, q)] = 0.0


@glue
def rotate(poly: Any, r: int, f: float) -> float:
    """Gain of the next step; returns its innovation variance."""
    rho = poly[NEXT, 0]
    left = 1.0 - rho * rho
    for i in range(r):
        z = poly[PHI, i] * rho + poly[NEXT, i + 1]
        k = (poly[GAIN, i] - rho * z) / left
        poly[GAIN, i] = k
        poly[NEXT, i] = z - rho * k
    return f * left


@cold
def settle(poly: Any, r: int) -> bool:
    """Put the gain of the infinite past in place once nothing moves any more."""
    for i in range(r):
        if abs(poly[NEXT, i]) > _SETTLED:
            return False
    for i in range(r):
        poly[GAIN, i] = poly[PHI, i] + poly[THETA, i]
    return True


@glue
def predict(w: Any, c: int, v: float, r: int) -> None:
    """Move the state of a column: F a + k v."""
    seen = w.state[c, 0]
    for i in range(r):
        w.state[c, i] = w.state[c, i + 1] + w.poly[PHI, i] * seen + w.poly[GAIN, i] * v


@cold
def whiten(w: Any, r: int) -> None:
    """Cross-products of the innovations of all columns, in `gram`, and the log-determinant."""
    steps, columns = w.note[STEPS], w.note[COLUMNS]
    for c in range(columns):
        for i in range(r + 1):
            w.state[c, i] = 0.0
        for j in range(c + 1):
            w.gram[c, j] = 0.0
    f = w.poly[GAMMA, 0]
    logdet, factor, settled, active, quad = 0.0, 1.0, False, 1, 0.0
    if not (f > 0.0 and f < math.inf):
        f = math.nan
    for t in range(steps):
        while active < columns and w.first[active] <= t:
            active += 1
        v = w.columns[0, t] - w.state[0, 0]
        quad += v * v / f
        predict(w, 0, v, r)
        if active > 1:
            w.coef[2, 0] = v
            cross_products(w, t, active, f, r)
        if not settled:
            factor *= f
            if not (factor > 1e-100 and factor < 1e100):
                logdet += math.log(factor)
                factor = 1.0
            f = rotate(w.poly, r, f)
            if t % 8 == 0 and settle(w.poly, r):
                settled, f = True, 1.0
    w.gram[0, 0] = quad
    w.number[LOGDET] = logdet + math.log(factor)


@cold
def cross_products(w: Any, t: int, active: int, f: float, r: int) -> None:
    """Innovations of all columns but the first, and their products."""
    for c in range(1, active):
        v = w.columns[c, t] - w.state[c, 0]
        w.coef[2, c] = v
        for j in range(c + 1):
            w.gram[c, j] += w.coef[2, j] * v / f
        predict(w, c, v, r)


@cold
def eliminate(w: Any) -> None:
    """Take all columns but the first out of it, from the last on; pulses are the last."""
    columns = w.note[COLUMNS]
    w.note[SINGULAR] = 0
    for c in range(columns):
        w.coef[2, c] = w.gram[c, c]
    for c in range(columns - 1, 0, -1):
        pivot, pulse = w.gram[c, c], c >= columns - w.note[PULSES]
        if not pivot > _COLLINEAR * w.coef[2, c]:
            w.note[SINGULAR] += pulse
            for j in range(c + 1):
                w.gram[c, j] = 0.0
            continue
        if pulse:
            w.number[LOGDET] += math.log(pivot)
        for i in range(c):
            share = w.gram[c, i] / pivot
            for j in range(i + 1):
                w.gram[i, j] -= share * w.gram[c, j]
    w.number[QUAD] = w.gram[0, 0]


@cold
def regress(w: Any) -> None:
    """Coefficients of the columns, from what elimination has left."""
    for c in range(1, w.note[COLUMNS]):
        total = w.gram[c, 0]
        for j in range(1, c):
            total -= w.gram[c, j] * w.coef[1, j]
        w.coef[1, c] = total / w.gram[c, c] if w.gram[c, c] > 0.0 else 0.0


@cold
def bend_line(w: Any, o: Any, p: int) -> None:
    """Column of the linear trend: what its mean makes of the line after a constant past."""
    c, offset, total = o[TREND] - 1, w.note[OFFSET], 1.0
    for j in range(p):
        total -= w.poly[PHI, j]
    for t in range(offset + w.note[STEPS]):
        mean = total * t if t > 0 else 1.0
        for j in range(p if t > 0 else 0):
            before = t - 1 - j
            mean += w.poly[PHI, j] * (w.scratch[LINE, before] if before > 0 else 1.0)
        w.scratch[LINE, t] = mean
    for t in range(w.note[STEPS]):
        bent, straight = w.scratch[LINE, offset + t], max(offset + t, 1)
        w.columns[c, t] = bent
        w.columns[0, t] = w.base[t] - w.coef[0, c] * (bent - straight)


@cold
def likelihood(w: Any, o: Any, table: Any, n: int, row: int) -> float:
    r"""Log-likelihood of a free vector, at the best innovation variance and regression.

    With n observations beyond those that start differences, and m of them missing, it is

    .. math:: -\tfrac12 \left( (n - m) (\log 2 \pi \hat\sigma^2 + 1) + \log |\Omega|
        + \log |X_m^\top \Omega^{-1} X_m| \right),

    :math:`X_m` the differenced pulses of the missing values.
    """
    p, q = o[AR] + o[SEASON] * o[SAR], o[MA] + o[SEASON] * o[SMA]
    load_polynomials(w, o, table, n, row)
    start_gain(w, p, q)
    if o[TREND] >= 2:
        bend_line(w, o, p)
    whiten(w, max(p, q))
    eliminate(w)
    count = w.note[STEPS] - w.note[PULSES]
    variance = w.number[QUAD] / count
    w.number[VARIANCE] = variance
    if not variance > w.number[FLOOR]:
        return math.nan
    return -0.5 * (count * (math.log(variance) + _LOG_2PI + 1.0) + w.number[LOGDET])
