"""Steps of the Kalman filter on one series, compiled: load, predict, observe.

Functions marked `hot` run in every step and are expanded into the loop over time; `cold` ones are
called. Both take whole arrays and indices: views made inside the loop cost more than the arithmetic
of a small state.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from seqdgm.kernels.types import CONFLICT, DIFFUSE, DIFFUSE_SCALE, ROUNDING

# No kernel allocates: memory comes from outside. So reference counting can be switched off, which
# would otherwise take more time than the arithmetic of a small state.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
INNER: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **OPTIONS}
hot = numba.njit(forceinline=True, **INNER)
cold = numba.njit(**INNER)
glue = numba.njit(inline="always", **INNER)

SKIPPED, ORDINARY, DIFFUSED = 0, 1, 2  # what became of an observation
KIND, V, VAR, VAR_INF = 0, 1, 2, 3  # columns of what is noted about it


class Moments(NamedTuple):
    """Histories over series and time; those that are not wanted have length 0."""

    mean: np.ndarray
    cov: np.ndarray
    cov_inf: np.ndarray
    pred_mean: np.ndarray
    pred_cov: np.ndarray
    innovations: np.ndarray
    innov_var: np.ndarray


class Work(NamedTuple):
    """Memory of one series: its moving state, scratch, and what the smoother reads afterwards.

    The last group has a leading axis of length T for the smoother and 1 for the filter (0 for the
    diffuse parts of a system that has none).
    """

    a: np.ndarray  # mean (Z,)
    P: np.ndarray  # covariance (Z, Z)
    A: np.ndarray  # factor of the diffuse covariance (Z, q)
    G: np.ndarray  # scratch (Z, Z)
    M: np.ndarray  # P h (Z,)
    u: np.ndarray  # scratch (Z,)
    before: np.ndarray  # diagonal of P before an update (Z,)
    g: np.ndarray  # A' h (q,)
    size: np.ndarray  # size of the rows of A (Z,)
    L: np.ndarray  # unit lower factor of R (D, D)
    y: np.ndarray  # x - d in the decorrelated basis (D,)
    var: np.ndarray  # variances of its errors (D,)
    h: np.ndarray  # rows of H in that basis (steps, D, Z)
    K: np.ndarray  # gains (steps, D, Z)
    K1: np.ndarray  # 1/kappa part of the gains of diffuse observations (steps, D, Z)
    note: np.ndarray  # KIND, V, VAR, VAR_INF of each observation (steps, D, 4)
    factors: np.ndarray  # A after each step (steps, Z, q)
    ranks: np.ndarray  # upper bound on its rank (steps,)
    P_before: np.ndarray  # predicted covariance of the step before (Z, Z)
    f_before: np.ndarray  # variances of its innovations (D,)
    B: np.ndarray  # how the sequential innovations of a step depend on each other (D, D)
    v: np.ndarray  # innovations (D,)
    watch: np.ndarray  # whether the state has become steady (3,)
    band: np.ndarray  # the two bands of a companion matrix, and a probe (3, Z)


def make_moments(
    n: int, steps: int, obs: int, state: int, diffuse: bool, predicted: bool
) -> Moments:
    """Allocate the histories; those that are not kept have no rows."""
    rows = n if steps else 0
    more = n if predicted else 0
    return Moments(
        np.empty((rows, steps, state)),
        np.empty((rows, steps, state, state)),
        np.empty((rows if diffuse else 0, steps, state, state)),
        np.empty((more, steps, state)),
        np.empty((more, steps, state, state)),
        np.empty((more, steps, obs)),
        np.empty((more, steps, obs)),
    )


class Memory(NamedTuple):
    """What `carve` cuts a `Work` from: every array that is an argument costs time."""

    values: np.ndarray
    ranks: np.ndarray
    diffuse: int


def make_memory(state: int, obs: int, diffuse: int, steps: int) -> Memory:
    """Allocate the memory of one series."""
    once = 3 * state**2 + state * (diffuse + 8) + diffuse + 2 * obs**2 + 4 * obs + 3
    each = obs * (2 * state + 4) + (diffuse * state + obs * state if diffuse else 0)
    return Memory(np.empty(once + steps * each), np.empty(steps, np.int64), diffuse)


@glue
def cut(memory: Any, start: int, rows: int, columns: int) -> Any:
    """A matrix in memory."""
    return memory[start : start + rows * columns].reshape((rows, columns))


@glue
def stack(memory: Any, start: int, steps: int, rows: int, columns: int) -> Any:
    """A matrix for each step in memory."""
    return memory[start : start + steps * rows * columns].reshape((steps, rows, columns))


@glue
def carve(memory: Any, state: int, obs: int) -> Any:
    """The fields of a `Work` as views of memory."""
    m, q, steps = memory.values, memory.diffuse, memory.ranks.size
    diffuse_steps = steps if q > 0 else 0
    vectors = 3 * state * state + state * q + 2 * obs * obs + 3 * state
    small = vectors + 5 * state + q
    gains = small + 4 * obs + 3
    notes = gains + 2 * steps * obs * state
    lifted = notes + steps * obs * 4
    return Work(
        m[vectors : vectors + state],
        cut(m, 0, state, state),
        cut(m, 3 * state * state, state, q),
        cut(m, state * state, state, state),
        m[vectors + state : vectors + 2 * state],
        m[vectors + 2 * state : vectors + 3 * state],
        m[vectors + 3 * state : vectors + 4 * state],
        m[vectors + 5 * state : vectors + 5 * state + q],
        m[vectors + 4 * state : vectors + 5 * state],
        cut(m, 3 * state * state + state * q, obs, obs),
        m[small : small + obs],
        m[small + obs : small + 2 * obs],
        stack(m, gains, steps, obs, state),
        stack(m, gains + steps * obs * state, steps, obs, state),
        stack(m, lifted, diffuse_steps, obs, state),
        stack(m, notes, steps, obs, 4),
        stack(m, lifted + diffuse_steps * obs * state, diffuse_steps, state, q),
        memory.ranks,
        cut(m, 2 * state * state, state, state),
        m[small + 2 * obs : small + 3 * obs],
        cut(m, 3 * state * state + state * q + obs * obs, obs, obs),
        m[small + 3 * obs : small + 4 * obs],
        m[small + 4 * obs : small + 4 * obs + 3],
        cut(m, vectors - 3 * state, 3, state),
    )


@hot
def row(length: int, n: int) -> int:
    """Index along an axis that is shared where its length is 1."""
    return n if length > 1 else 0


@cold
def load_prior(a: Any, P: Any, A: Any, m0: Any, P0: Any, Pinf: Any, n: int) -> int:
    """Fetch the initial moments of series n; returns the rank of their diffuse part."""
    nm, nP = row(m0.shape[0], n), row(P0.shape[0], n)
    for i in range(a.size):
        a[i] = m0[nm, i]
        for j in range(a.size):
            P[i, j] = P0[nP, i, j]
    return factor_diffuse(Pinf, row(Pinf.shape[0], n), A)


@cold
def factor_diffuse(Pinf: Any, n: int, A: Any) -> int:
    """Cholesky factor A of the semi-definite Pinf, its zero columns last; returns the rank."""
    size, q = A.shape
    for i in range(size):
        for j in range(q):
            A[i, j] = 0.0
    rank = 0
    for j in range(size):
        if rank == q:
            break
        pivot = Pinf[n, j, j]
        for k in range(rank):
            pivot -= A[j, k] * A[j, k]
        if pivot > ROUNDING * Pinf[n, j, j]:
            root = math.sqrt(pivot)
            for i in range(j, size):
                total = Pinf[n, i, j]
                for k in range(rank):
                    total -= A[i, k] * A[j, k]
                A[i, rank] = total / root
            rank += 1
    return rank


@cold
def is_diagonal(R: Any, n: int, t: int) -> bool:
    """Whether the errors of a step are uncorrelated as they stand."""
    for i in range(R.shape[2]):
        for j in range(i):
            if R[n, t, i, j] != 0.0:
                return False
    return True


@hot
def load_element(
    x: Any, d: Any, H: Any, R: Any, n: int, t: int, s: int, i: int, y: Any, var: Any, h: Any
) -> None:
    """Fetch element i of step t as it stands: y = x - d, its row of H, its own variance."""
    nH, tH = row(H.shape[0], n), row(H.shape[1], t)
    y[i] = x[n, t, i] - d[row(d.shape[0], n), row(d.shape[1], t), i]
    var[i] = R[row(R.shape[0], n), row(R.shape[1], t), i, i]
    for k in range(h.shape[2]):
        h[s, i, k] = H[nH, tH, i, k]


@cold
def decorrelate(i: int, s: int, R: Any, n: int, t: int, L: Any, var: Any, y: Any, h: Any) -> None:
    """Take the part of element i out that the elements before it explain.

    With R = L diag(var) L' for the observed block and L unit lower triangular, y = L^-1 (x - d) and
    h = L^-1 H. A zero pivot of a semi-definite R has a zero column, so no pivoting is needed.
    """
    for j in range(i):
        factor = 0.0
        if var[j] > 0.0:
            factor = R[n, t, i, j]
            for k in range(j):
                factor -= L[i, k] * L[j, k] * var[k]
            factor /= var[j]
            var[i] -= factor * factor * var[j]
            y[i] -= factor * y[j]
            for k in range(h.shape[2]):
                h[s, i, k] -= factor * h[s, j, k]
        L[i, j] = factor
    if var[i] <= ROUNDING * R[n, t, i, i]:
        var[i] = 0.0


@cold
def skip_element(note: Any, L: Any, var: Any, s: int, i: int) -> None:
    """Leave a missing element out of the factorisation."""
    note[s, i, KIND] = SKIPPED
    note[s, i, V] = math.nan
    note[s, i, VAR] = math.nan
    var[i] = 0.0
    for j in range(i):
        L[i, j] = 0.0


@hot
def predict_mean(F: Any, b: Any, n: int, t: int, a: Any, u: Any) -> None:
    """Mean of the next state: a <- F a + b."""
    nF, tF = row(F.shape[0], n), row(F.shape[1], t)
    nb, tb = row(b.shape[0], n), row(b.shape[1], t)
    for i in range(a.size):
        total = b[nb, tb, i]
        for k in range(a.size):
            total += F[nF, tF, i, k] * a[k]
        u[i] = total
    for i in range(a.size):
        a[i] = u[i]


@hot
def predict_cov(F: Any, Q: Any, n: int, t: int, P: Any, G: Any) -> None:
    """Covariance of the next state: P <- F P F' + Q, skipping the zeros of a sparse F."""
    nF, tF = row(F.shape[0], n), row(F.shape[1], t)
    nQ, tQ = row(Q.shape[0], n), row(Q.shape[1], t)
    size = P.shape[0]
    for i in range(size):
        for j in range(size):
            G[i, j] = 0.0
        for k in range(size):
            c = F[nF, tF, i, k]
            if c != 0.0:
                for j in range(size):
                    G[i, j] += c * P[k, j]
    transpose(G)
    # G = F P, so its transpose is P F', and F times that is again a sum over rows.
    for i in range(size):
        for j in range(size):
            P[i, j] = Q[nQ, tQ, i, j]
        for k in range(size):
            c = F[nF, tF, i, k]
            if c != 0.0:
                for j in range(size):
                    P[i, j] += c * G[k, j]
    clean(P)


@cold
def transpose(G: Any) -> None:
    """Transpose in place."""
    for i in range(G.shape[0]):
        for j in range(i):
            swap = G[i, j]
            G[i, j] = G[j, i]
            G[j, i] = swap


@cold
def clean(P: Any) -> None:
    """Make P symmetric; zero the row and column of a variance that rounding took below zero."""
    for i in range(P.shape[0]):
        for j in range(i):
            mean = 0.5 * (P[i, j] + P[j, i])
            P[i, j] = mean
            P[j, i] = mean
    for i in range(P.shape[0]):
        if P[i, i] < 0.0:
            drop(P, i)


@cold
def drop(P: Any, i: int) -> None:
    """Zero a row and column: that element of the state is known exactly."""
    for j in range(P.shape[0]):
        P[i, j] = 0.0
        P[j, i] = 0.0


@cold
def measure_rows(A: Any, size: Any) -> None:
    """Size of each row of a diffuse factor, no less than a fraction of the largest."""
    largest = 0.0
    for i in range(A.shape[0]):
        norm = 0.0
        for j in range(A.shape[1]):
            norm += A[i, j] * A[i, j]
        size[i] = math.sqrt(norm)
        largest = max(largest, size[i])
    for i in range(A.shape[0]):
        size[i] += DIFFUSE_SCALE * largest


@cold
def keep_row(A: Any, q: int, i: int, bound: float) -> bool:
    """Zero a row of a diffuse factor that has cancelled to rounding error of its terms."""
    norm = 0.0
    for j in range(q):
        norm += A[i, j] * A[i, j]
    if math.sqrt(norm) > DIFFUSE * bound:
        return True
    for j in range(q):
        A[i, j] = 0.0
    return False


@cold
def predict_factor(A: Any, G: Any, size: Any, F: Any, n: int, t: int) -> bool:
    """Diffuse factor of the next state: A <- F A; False when nothing diffuse is left."""
    measure_rows(A, size)
    q = A.shape[1]
    some = False
    for i in range(size.size):
        for j in range(q):
            G[i, j] = 0.0
        bound = 0.0
        for k in range(size.size):
            c = F[n, t, i, k]
            if c != 0.0:
                bound += abs(c) * size[k]
                for j in range(q):
                    G[i, j] += c * A[k, j]
        some = keep_row(G, q, i, bound) or some
    for i in range(size.size):
        for j in range(q):
            A[i, j] = G[i, j]
    return some


@hot
def innovate(y: Any, h: Any, s: int, i: int, a: Any, P: Any, M: Any) -> float:
    """Innovation of an observation; leaves M = P h."""
    size = a.size
    v = y[i]
    for j in range(size):
        M[j] = 0.0
    for k in range(size):
        c = h[s, i, k]
        if c != 0.0:
            v -= c * a[k]
            for j in range(size):
                M[j] += c * P[k, j]
    return v


@hot
def innovation_variance(h: Any, var: Any, s: int, i: int, P: Any, M: Any) -> float:
    """Finite variance h' P h + var of an observation; h' P h that cancels to rounding is zero."""
    signal = 0.0
    for k in range(M.size):
        signal += h[s, i, k] * M[k]
    floor = 0.0
    if var[i] == 0.0:
        floor = ROUNDING * spread(P, h, s, i) ** 2
    if signal <= floor:
        signal = 0.0
    return signal + var[i]


@cold
def spread(P: Any, h: Any, s: int, i: int) -> float:
    """Largest standard deviation that h' z could have with these variances."""
    total = 0.0
    for k in range(P.shape[0]):
        c = h[s, i, k]
        if c != 0.0:
            total += abs(c) * math.sqrt(P[k, k])
    return total


@cold
def contradicts(a: Any, P: Any, h: Any, s: int, i: int, y: float, v: float) -> bool:
    """Whether an observation of variance zero differs from what is known already."""
    size = abs(y)
    for k in range(a.size):
        size += abs(h[s, i, k] * a[k])
    return abs(v) > CONFLICT * size + 5.0 * math.sqrt(ROUNDING) * spread(P, h, s, i)


@cold
def diffuse_variance(A: Any, g: Any, size: Any, h: Any, s: int, i: int) -> float:
    """Diffuse variance of an observation, F_inf = |A' h|^2; leaves g = A' h."""
    measure_rows(A, size)
    bound = 0.0
    for j in range(g.size):
        g[j] = 0.0
    for k in range(size.size):
        c = h[s, i, k]
        if c != 0.0:
            bound += abs(c) * size[k]
            for j in range(g.size):
                g[j] += c * A[k, j]
    f_inf = 0.0
    for j in range(g.size):
        f_inf += g[j] * g[j]
    return 0.0 if math.sqrt(f_inf) <= DIFFUSE * bound else f_inf


@cold
def diffuse_gain(
    A: Any, g: Any, M: Any, K: Any, K1: Any, s: int, i: int, f: float, f_inf: float
) -> None:
    """Gain of a diffuse observation, K + K1 / kappa."""
    for k in range(M.size):
        total = 0.0
        for j in range(g.size):
            total += A[k, j] * g[j]
        K[s, i, k] = total / f_inf
        K1[s, i, k] = (M[k] - K[s, i, k] * f) / f_inf


@cold
def reduce_factor(A: Any, g: Any, size: Any, K: Any, s: int, i: int) -> bool:
    """Take the observed direction out of A (A <- A - K g'); False when nothing is left."""
    some = False
    for k in range(size.size):
        for j in range(g.size):
            A[k, j] -= K[s, i, k] * g[j]
        some = keep_row(A, g.size, k, size[k]) or some
    return some


@hot
def update_cov(
    P: Any, M: Any, h: Any, K: Any, u: Any, before: Any, s: int, i: int, var: float, f: float
) -> None:
    """Covariance after an observation, Joseph's form P <- (I - K h') P (I - K h')' + K var K'.

    Each pass runs along rows: W' = P - M K' first, with u = W h along the way, then
    P = W' - K (u - var K)'. A variance that cancels to rounding error of its terms (an observation
    without error determines it), or below zero, becomes zero with its row and column.
    """
    size = u.size
    for j in range(size):
        u[j] = -var * K[s, i, j]
        before[j] = P[j, j]
    for k in range(size):
        c = h[s, i, k]
        m = M[k]
        for j in range(size):
            P[k, j] -= m * K[s, i, j]
            u[j] += c * P[k, j]
    for k in range(size):
        c = K[s, i, k]
        for j in range(size):
            P[k, j] -= c * u[j]
    for k in range(size):
        floor = 0.0
        if var == 0.0:
            floor = ROUNDING * (before[k] + K[s, i, k] * K[s, i, k] * f)
        if P[k, k] <= floor:
            drop(P, k)
