r"""Time-invariant systems, compiled: what can be saved when F, Q, H and R never change.

Steady state
    The predicted covariance converges geometrically. Where its last change and the rate of change
    bound all that is to come below `STEADY`, the gains stay as they are, and only the mean goes on
    (`hold`). A missing element ends this: the recursion goes on from the constant covariance.

Increments of rank one
    Where one scalar is observed, :math:`P_{t+1} - P_t = m_t y_t y_t^\top` (predicted covariances)
    stays of rank one if it is so once: after a stationary or a fixed start, and after the diffuse
    start of an integrated process. Then the gain and the variance of the innovation have a
    recursion of their own, which takes O(Z) instead of O(Z^2) operations a step for a companion
    matrix (`filter_increments`): with :math:`k_t = F P_t h`, :math:`g = F y_t`,
    :math:`\alpha = h^\top y_t`,

    .. math::

        f_{t+1} = f_t + m_t \alpha^2, \quad k_{t+1} = k_t + m_t \alpha g, \quad
        y_{t+1} = g - k_{t+1} \alpha / f_{t+1}, \quad m_{t+1} = m_t f_{t+1} / f_t .

    Morf, Sidhu and Kailath (1974), Some new algorithms for recursive estimation in constant linear
    discrete-time systems, *IEEE Transactions on Automatic Control* 19, 315-323; Herbst (2015),
    Using the "Chandrasekhar recursions" for likelihood evaluation of DSGE models, *Computational
    Economics* 45, 693-705.

    A sum of increments keeps the rounding errors of all its terms, and the closed loop
    :math:`F - k_t h^\top / f_t` hands them on. What it makes of the standard deviations of the
    first state, seen in the innovations, measures by how much. Where the square of that sum, or the
    first variance, exceeds `LOUD` times the present one, the ordinary recursion takes over:
    autoregressions and moving averages with roots close to the unit circle.
"""

from __future__ import annotations

import math
from typing import Any

import numba

from seqdgm.kernels.cpu_steps import INNER, KIND, ORDINARY, VAR, cold, row
from seqdgm.kernels.types import ROUNDING

# What the covariance may still change by, relative to its variances, when it is taken as constant.
# The log-likelihood changes by no more than that, relative to the number of observations.
STEADY = 1e-12
# Increments that change a variance by less than this, relatively, are below its rounding error.
NEGLIGIBLE = 1e-18
# With this bound the log-likelihood keeps 9 digits.
LOUD = 1e3
# What is watched: steps with the same variances of innovations, how many are enough, and the last
# change of the covariance, -1 before the first.
QUIET, ENOUGH, CHANGE = 0, 1, 2

# Sums in any order, so that products of vectors use all lanes of the processor.
fast = numba.njit(fastmath={"reassoc", "contract", "nsz"}, **INNER)


@cold
def is_fixed(F: Any, Q: Any, H: Any, R: Any) -> bool:
    """Whether the covariances of a complete series depend on the number of steps alone."""
    return F.shape[1] == 1 and Q.shape[1] == 1 and H.shape[1] == 1 and R.shape[1] == 1


@cold
def is_complete(mask: Any, n: int, start: int, stop: int) -> bool:
    """Whether every element of steps start..stop-1 is observed."""
    for t in range(start, stop):
        for i in range(mask.shape[2]):
            if not mask[n, t, i]:
                return False
    return True


@cold
def copy(P: Any, out: Any) -> None:
    """Copy a matrix."""
    for i in range(P.shape[0]):
        for j in range(P.shape[1]):
            out[i, j] = P[i, j]


# ---------------------------------------------------------------- steady state


@cold
def reset(watched: Any, before_f: Any) -> None:
    """Begin a series: no variance is known yet."""
    watched[QUIET] = 0.0
    for i in range(before_f.size):
        before_f[i] = 0.0


@cold
def watch(note: Any, s: int, before_f: Any, rank: int, watched: Any, state: int) -> bool:
    """Count the steps for which all variances of innovations have been the same.

    This costs next to nothing, and after state / obs steps P is compared as well (`has_settled`).
    """
    same = rank == 0
    for i in range(before_f.size):
        f = note[s, i, VAR]
        same = same and note[s, i, KIND] == ORDINARY and abs(f - before_f[i]) <= STEADY * f
        before_f[i] = f
    watched[QUIET] = watched[QUIET] + 1.0 if same else 0.0
    watched[ENOUGH] = state / before_f.size
    return same


@cold
def has_settled(P: Any, before: Any, root: Any, watched: Any) -> bool:
    """Whether a predicted covariance has converged, once the variances of innovations have.

    Changes that fall at the rate of the last two must sum to less than `STEADY`.
    """
    if watched[QUIET] < 1.0 or watched[QUIET] < watched[ENOUGH]:
        watched[CHANGE] = -1.0
        return False
    now, last = change(P, before, root), watched[CHANGE]
    if last == -1.0:
        now = math.inf
    watched[CHANGE] = now
    return now == 0.0 or (now < last < math.inf and now * now <= STEADY * (last - now))


@cold
def change(P: Any, before: Any, root: Any) -> float:
    """Largest change of a covariance, in standard deviations; takes over the new one."""
    for i in range(root.size):
        root[i] = math.sqrt(P[i, i])
    largest = 0.0
    for i in range(root.size):
        for j in range(i + 1):
            step = abs(P[i, j] - before[i, j])
            if step > 0.0:
                largest = max(largest, step / (root[i] * root[j]))
            before[i, j] = P[i, j]
            before[j, i] = P[i, j]
    return largest


@cold
def repeat_step(h: Any, K: Any, note: Any, s: int) -> None:
    """Keep for step s of the smoother what it kept for the step before."""
    for i in range(note.shape[1]):
        for k in range(h.shape[2]):
            h[s, i, k] = h[s - 1, i, k]
            K[s, i, k] = K[s - 1, i, k]
        for k in range(note.shape[2]):
            note[s, i, k] = note[s - 1, i, k]


@cold
def mix_innovations(L: Any, diagonal: bool, h: Any, K: Any, s: int, B: Any) -> None:
    """Unit lower triangular B with B v = x - d - H a, for the sequential innovations v of a step.

    Element i comes after the updates with those before it, v_i = y_i - h_i' (a + sum_j K_j v_j),
    and x - d = L y, H = L h.
    """
    size = B.shape[0]
    for i in range(size):
        for j in range(i):
            total = 0.0
            for k in range(h.shape[2]):
                total += h[s, i, k] * K[s, j, k]
            B[i, j] = total
    if diagonal:
        return
    for i in range(size - 1, -1, -1):
        for j in range(i):
            total = B[i, j] + L[i, j]
            for k in range(j + 1, i):
                total += L[i, k] * B[k, j]
            B[i, j] = total


@fast
def hold(
    F: Any,
    b: Any,
    H: Any,
    d: Any,
    x: Any,
    mask: Any,
    n: int,
    start: int,
    stop: int,
    a: Any,
    u: Any,
    v: Any,
    B: Any,
    K: Any,
    s: int,
    last: Any,
) -> tuple[int, float]:
    """Filter with constant gains, up to `stop` or the first step that is not complete.

    Returns that step, and the sum of v^2 / f. Starts and ends with filtered means in `a`; leaves
    the last predicted one in `u` and innovations in `v`.
    """
    nF, nb = row(F.shape[0], n), row(b.shape[0], n)
    nH, nd = row(H.shape[0], n), row(d.shape[0], n)
    size, obs = a.size, v.size
    quad = 0.0
    if size == 1 and obs == 1 and b.shape[1] == 1 and d.shape[1] == 1:
        # In registers: through memory a step waits for the one before to be stored.
        f, c, h, k1 = F[nF, 0, 0, 0], b[nb, 0, 0], H[nH, 0, 0, 0], K[s, 0, 0]
        mean, ahead, error, offset = a[0], u[0], v[0], d[nd, 0, 0]
        t = start
        while t < stop and mask[n, t, 0]:
            ahead = f * mean + c
            error = x[n, t, 0] - offset - h * ahead
            mean = ahead + k1 * error
            quad += error * error
            t += 1
        a[0], u[0], v[0] = mean, ahead, error
        return t, quad / last[0]
    for t in range(start, stop):
        for i in range(obs):
            if not mask[n, t, i]:
                return t, quad
        tb, td = row(b.shape[1], t), row(d.shape[1], t)
        for i in range(size):
            total = b[nb, tb, i]
            for k in range(size):
                total += F[nF, 0, i, k] * a[k]
            u[i] = total
        for i in range(size):
            a[i] = u[i]
        for i in range(obs):
            total = x[n, t, i] - d[nd, td, i]
            for k in range(size):
                total -= H[nH, 0, i, k] * u[k]
            for j in range(i):
                total -= B[i, j] * v[j]
            v[i] = total
            quad += total * total / last[i]
            for k in range(size):
                a[k] += K[s, i, k] * total
    return stop, quad


@cold
def sum_logs(f: Any) -> float:
    """Logarithm of a product."""
    total = 0.0
    for i in range(f.size):
        total += math.log(f[i])
    return total


# ---------------------------------------------------------------- increments of rank one


@cold
def root_of_increment(P: Any, before: Any, y: Any) -> float:
    """Split P - before = m y y' and return m = 1 or -1; 0 where it is not of rank one."""
    size, pivot, largest = y.size, 0, 0.0
    for i in range(size):
        step = abs(P[i, i] - before[i, i])
        if step > largest:
            largest, pivot = step, i
    if largest == 0.0:
        return 0.0
    sign = 1.0 if P[pivot, pivot] > before[pivot, pivot] else -1.0
    root = sign * math.sqrt(largest)
    for i in range(size):
        y[i] = (P[i, pivot] - before[i, pivot]) / root
    for i in range(size):
        for j in range(i + 1):
            rest = P[i, j] - before[i, j] - sign * y[i] * y[j]
            scale = max(P[i, i], before[i, i]) * max(P[j, j], before[j, j])
            if rest * rest > ROUNDING * ROUNDING * scale:
                return 0.0
    return sign


@cold
def unscaled_gain(F: Any, H: Any, n: int, P: Any, var: float, g: Any, k: Any, band: Any) -> float:
    """Gain F P h times f; returns the variance f = h' P h + var of the innovation."""
    nF, nH = row(F.shape[0], n), row(H.shape[0], n)
    f = var
    for i in range(g.size):
        g[i] = 0.0
        for j in range(g.size):
            g[i] += P[i, j] * H[nH, 0, 0, j]
        f += H[nH, 0, 0, i] * g[i]
    for i in range(g.size):
        k[i] = 0.0
        # Irregular weights, so that no closed loop cancels them.
        band[2, i] = math.sin(1.0 + i * i) * math.sqrt(2.0 * P[i, i] / g.size)
        for j in range(g.size):
            k[i] += F[nF, 0, i, j] * g[j]
    return f


@cold
def split_companion(F: Any, n: int, band: Any) -> bool:
    """First column and superdiagonal of F, into `band`; False where there is anything else."""
    size = F.shape[2]
    for i in range(size):
        band[0, i] = F[n, 0, i, 0]
        band[1, i] = F[n, 0, i, i + 1] if i + 1 < size else 0.0
        for j in range(1, size):
            if j != i + 1 and F[n, 0, i, j] != 0.0:
                return False
    return True


@fast
def multiply(F: Any, n: int, band: Any, companion: bool, x: Any, out: Any) -> None:
    """Product F x."""
    size = x.size
    if companion:
        first = x[0]
        for i in range(size - 1):
            out[i] = band[0, i] * first + band[1, i] * x[i + 1]
        out[size - 1] = band[0, size - 1] * first
    else:
        for i in range(size):
            total = 0.0
            for k in range(size):
                total += F[n, 0, i, k] * x[k]
            out[i] = total


@fast
def filter_increments(
    F: Any,
    b: Any,
    H: Any,
    d: Any,
    x: Any,
    n: int,
    start: int,
    stop: int,
    f_before: float,
    f: float,
    m: float,
    y: Any,
    k: Any,
    a: Any,
    g: Any,
    band: Any,
) -> tuple[bool, float, float]:
    """Filter the rest of a complete series by recursions for k and f.

    Before step `start` the mean is `a`, the innovation has variance f (f_before the one before it),
    the gain is k / f, and m y y' is the increment of the covariance into that step; ``band[2]``
    holds standard deviations of the state. Returns whether the result keeps its digits, and the
    sums of log f and of v^2 / f.
    """
    nF, nb = row(F.shape[0], n), row(b.shape[0], n)
    nH, nd = row(H.shape[0], n), row(d.shape[0], n)
    size, first, idle = a.size, f_before, 0
    companion = split_companion(F, nF, band)
    product, logdet, quad, echo = 1.0, 0.0, 0.0, 0.0
    probe = band[2]
    alpha = 0.0
    for i in range(size):
        alpha += H[nH, 0, 0, i] * y[i]
    multiply(F, nF, band, companion, y, g)
    for i in range(size):
        y[i] = g[i] - alpha / f * k[i]
    m *= f / f_before
    for t in range(start, stop):
        v = x[n, t, 0] - d[nd, row(d.shape[1], t), 0]
        for i in range(size):
            v -= H[nH, 0, 0, i] * a[i]
        gain = v / f
        quad += v * gain
        product *= f
        if not 1e-100 < product < 1e100:
            logdet += math.log(product)
            product = 1.0
        multiply(F, nF, band, companion, a, g)
        tb = min(t + 1, b.shape[1] - 1)
        for i in range(size):
            a[i] = g[i] + b[nb, tb, i] + gain * k[i]
        if idle > size:
            continue
        alpha, heard = 0.0, 0.0
        for i in range(size):
            alpha += H[nH, 0, 0, i] * y[i]
            heard += H[nH, 0, 0, i] * probe[i]
        step = m * alpha
        f_before, f = f, f + step * alpha
        idle = idle + 1 if abs(step * alpha) <= NEGLIGIBLE * f else 0
        multiply(F, nF, band, companion, y, g)
        ratio = alpha / f
        for i in range(size):
            k[i] += step * g[i]
            y[i] = g[i] - ratio * k[i]
        m *= f / f_before
        multiply(F, nF, band, companion, probe, g)
        ratio = heard / f
        for i in range(size):
            probe[i] = g[i] - ratio * k[i]
        echo += abs(heard)
        if not max(echo * echo, first) <= LOUD * f:
            return False, 0.0, 0.0
    return True, logdet + math.log(product), quad
