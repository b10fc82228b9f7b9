r"""Steps of the backward pass for disturbances, scores and fixed lags, compiled.

It reads what the filter stored and pulls :math:`(r, N)` back as the smoother does, but for the
observation errors too: with :math:`v_1, \dots, v_D` appended to the state before the observations
of a step, the adjoint of their mean is the smoothing error :math:`e`, and

.. math::

    e_i &= v_i / f_i - K_i^\top r, \\
    D_{ii} &= 1 / f_i + K_i^\top N K_i, \quad D_{ji} = -c_j, \quad c_j = C_j K_i \quad (j > i), \\
    C_i &= D_{ii} h_i^\top - K_i^\top N, \quad C_j \leftarrow C_j - c_j h_i^\top,

where the elements are taken last first and :math:`C` holds the rows of N that belong to the errors,
against the state. The derivatives of the log-likelihood with respect to the mean and the covariance
of the state before the observations of a step are :math:`r` and :math:`(r r^\top - N) / 2`; those
of everything else follow without an inverse. Diffuse steps use the powers of :math:`1 / \kappa`
(Koopman and Shephard 1992; Durbin and Koopman 2012, sections 4.5, 5.4 and 7.3.3).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.cpu_steps import (
    DIFFUSED,
    KIND,
    ORDINARY,
    SKIPPED,
    VAR,
    VAR_INF,
    V,
    cold,
    decorrelate,
    glue,
    is_diagonal,
    row,
)


class Kept(NamedTuple):
    """What the filter stored; `cov_inf` has no rows for a system without diffuse elements."""

    mean: np.ndarray
    cov: np.ndarray
    cov_inf: np.ndarray
    pred_mean: np.ndarray
    pred_cov: np.ndarray
    innovations: np.ndarray
    innov_var: np.ndarray


class Gains(NamedTuple):
    """Observations of one series as the filter took them, element by element."""

    h: np.ndarray  # rows of H in the decorrelated basis (T, D, Z)
    K: np.ndarray  # gains (T, D, Z)
    K1: np.ndarray  # 1/kappa part of the gains of diffuse observations (T, D, Z)
    note: np.ndarray  # KIND, V, VAR, VAR_INF (T, D, 4)
    L: np.ndarray  # unit lower factor of R (T, D, D)
    P: np.ndarray  # scratch (Z, Z)
    Pinf: np.ndarray  # diffuse covariance, predicted (Z, Z)
    G: np.ndarray  # scratch (Z, Z)
    M: np.ndarray  # P h (Z,)
    u: np.ndarray  # scratch (Z,)
    var: np.ndarray  # variances of the decorrelated errors (D,)
    y: np.ndarray  # scratch (D,)


class Pull(NamedTuple):
    """Adjoints: (r_0, r_1), (N_0, N_1, N_2), those of the errors, and scratch."""

    r: np.ndarray  # (2, Z)
    N: np.ndarray  # (3, Z, Z)
    NF: np.ndarray  # N F of the transition (3, Z, Z)
    c: np.ndarray  # N K for each power of 1/kappa (3, Z)
    s: np.ndarray  # scalars of an element (3,)
    w: np.ndarray  # scratch (Z,)
    e: np.ndarray  # smoothing error (D,)
    D: np.ndarray  # its variance (D, D)
    C: np.ndarray  # adjoint of the covariance of errors and state, but for e r' (2, D, Z)
    X: np.ndarray  # scratch (Z, Z)


def make_gains(state: int, obs: int, steps: int) -> Gains:
    """Allocate the memory of one series."""
    return Gains(
        np.empty((steps, obs, state)),
        np.empty((steps, obs, state)),
        np.empty((steps, obs, state)),
        np.empty((steps, obs, 4)),
        np.empty((steps, obs, obs)),
        np.empty((state, state)),
        np.empty((state, state)),
        np.empty((state, state)),
        np.empty(state),
        np.empty(state),
        np.empty(obs),
        np.empty(obs),
    )


def make_pull(state: int, obs: int) -> Pull:
    """Allocate the memory of one series."""
    return Pull(
        np.empty((2, state)),
        np.empty((3, state, state)),
        np.empty((3, state, state)),
        np.empty((3, state)),
        np.empty(3),
        np.empty(state),
        np.empty(obs),
        np.empty((obs, obs)),
        np.empty((2, obs, state)),
        np.empty((state, state)),
    )


# ---------------------------------------------------------------- small products


@cold
def copy(source: Any, target: Any) -> None:
    """Copy an array; plain assignment would allocate."""
    for index in np.ndindex(source.shape):
        target[index] = source[index]


@cold
def dot(a: Any, b: Any) -> float:
    """Inner product."""
    total = 0.0
    for k in range(a.size):
        total += a[k] * b[k]
    return total


@cold
def add_product(A: Any, B: Any, scale: float, out: Any) -> None:
    """Add `scale` A B to `out`, skipping the zeros of A."""
    for i in range(A.shape[0]):
        for k in range(B.shape[0]):
            c = scale * A[i, k]
            if c != 0.0:
                for j in range(B.shape[1]):
                    out[i, j] += c * B[k, j]


@cold
def add_outer(a: Any, b: Any, scale: float, out: Any) -> None:
    """Add `scale` a b' to `out`."""
    for i in range(a.size):
        for j in range(b.size):
            out[i, j] += scale * a[i] * b[j]


@cold
def add_apply(A: Any, x: Any, scale: float, out: Any) -> None:
    """Add `scale` A x to `out`, A symmetric."""
    for k in range(x.size):
        c = scale * x[k]
        if c != 0.0:
            for j in range(out.size):
                out[j] += c * A[k, j]


@cold
def some(A: Any) -> bool:
    """Whether any element of a matrix is not zero."""
    for i in range(A.shape[0]):
        for j in range(A.shape[1]):
            if A[i, j] != 0.0:
                return True
    return False


@cold
def sandwich(F: Any, P: Any, X: Any, out: Any) -> None:
    """F P F' for a symmetric P, with scratch X."""
    X[:] = 0.0
    add_product(F, P, 1.0, X)
    for i in range(F.shape[0]):
        for j in range(F.shape[0]):
            out[i, j] = dot(X[i], F[j])


# ---------------------------------------------------------------- forward: gains


@cold
def load_predicted(system: Any, kept: Any, n: int, t: int, g: Any) -> None:
    """Fetch the predicted covariance of a step and its diffuse part."""
    copy(kept.pred_cov[n, t], g.P)
    g.Pinf[:] = 0.0
    if kept.cov_inf.shape[0] > 0:
        if t == 0:
            copy(system.Pinf[row(system.Pinf.shape[0], n)], g.Pinf)
        elif some(kept.cov_inf[n, t - 1]):
            F = system.F[row(system.F.shape[0], n), row(system.F.shape[1], t)]
            sandwich(F, kept.cov_inf[n, t - 1], g.G, g.Pinf)


@cold
def take_out(g: Any, t: int, i: int) -> None:
    """Covariance after element i, in Joseph's form, and its diffuse part."""
    K, var = g.K[t, i], g.var[i]
    for b in range(K.size):
        g.u[b] = -var * K[b]
    for a in range(K.size):
        for b in range(K.size):
            g.P[a, b] -= g.M[a] * K[b]
            g.u[b] += g.h[t, i, a] * g.P[a, b]
    add_outer(K, g.u, -1.0, g.P)
    if g.note[t, i, KIND] == DIFFUSED:
        add_outer(K, K, -g.note[t, i, VAR_INF], g.Pinf)


@cold
def set_gain(g: Any, t: int, i: int, f: float) -> None:
    """Gain of element i, whose innovation variance the filter found to be f."""
    h = g.h[t, i]
    g.M[:] = 0.0
    add_apply(g.P, h, 1.0, g.M)
    kind = SKIPPED
    if math.isinf(f):
        kind = DIFFUSED
        g.u[:] = 0.0
        add_apply(g.Pinf, h, 1.0, g.u)
        f_inf, f = dot(h, g.u), dot(h, g.M) + g.var[i]
        g.note[t, i, VAR_INF] = f_inf
        for k in range(h.size):
            g.K[t, i, k] = g.u[k] / f_inf
            g.K1[t, i, k] = (g.M[k] - g.K[t, i, k] * f) / f_inf
    elif f > 0.0:
        kind = ORDINARY
        for k in range(h.size):
            g.K[t, i, k] = g.M[k] / f
    g.note[t, i, KIND], g.note[t, i, VAR] = kind, f


@glue
def find_gains(system: Any, kept: Any, n: int, steps: int, g: Any) -> None:
    """Gains of every observation of series n, from the predicted covariances of the filter."""
    H, R = system.H, system.R
    nH, nR = row(H.shape[0], n), row(R.shape[0], n)
    for t in range(steps):
        load_predicted(system, kept, n, t, g)
        tH, tR = row(H.shape[1], t), row(R.shape[1], t)
        diagonal = is_diagonal(R, nR, tR)
        for i in range(H.shape[2]):
            g.L[t, i] = 0.0
            g.note[t, i, KIND] = SKIPPED
            g.note[t, i, V] = kept.innovations[n, t, i]
            g.var[i] = 0.0
            if math.isnan(g.note[t, i, V]):
                continue
            g.var[i], g.y[i] = R[nR, tR, i, i], 0.0
            copy(H[nH, tH, i], g.h[t, i])
            if not diagonal:
                decorrelate(i, t, R, nR, tR, g.L[t], g.var, g.y, g.h)
            set_gain(g, t, i, kept.innov_var[n, t, i])
            if g.note[t, i, KIND] != SKIPPED and i + 1 < H.shape[2]:
                take_out(g, t, i)


# ---------------------------------------------------------------- backward


@cold
def clear(b: Any) -> None:
    """Nothing is known yet of what follows."""
    b.r[:] = 0.0
    b.N[:] = 0.0


@cold
def pull_errors(b: Any, h: Any, K: Any, K1: Any, i: int, diffuse: bool) -> None:
    """Adjoints of the errors once element i has been pulled back; its scalars are in `b.s`."""
    for j in range(i + 1, b.e.size):
        c0 = dot(b.C[0, j], K)
        c1 = dot(b.C[1, j], K)
        if diffuse:
            c1 += dot(b.C[0, j], K1)
        b.D[i, j] = -c0
        b.D[j, i] = -c0
        for k in range(h.size):
            b.C[0, j, k] -= c0 * h[k]
            b.C[1, j, k] -= c1 * h[k]
    b.D[i, i] = b.s[0]
    for k in range(h.size):
        b.C[0, i, k] = b.s[0] * h[k] - b.c[0, k]
        b.C[1, i, k] = b.s[1] * h[k] - b.c[1, k]


@cold
def weigh_gains(b: Any, K: Any, K1: Any, note: Any, terms: int) -> None:
    """N K and the scalars D of an element, power by power of 1/kappa."""
    b.c[:] = 0.0
    b.s[:] = 0.0
    for k in range(terms):
        add_apply(b.N[k], K, 1.0, b.c[k])
        b.s[k] = dot(K, b.c[k])
    if note[KIND] == ORDINARY:
        b.s[0] += 1.0 / note[VAR]
    else:
        f_inf = note[VAR_INF]
        for k in range(2):
            b.w[:] = 0.0
            add_apply(b.N[k], K1, 1.0, b.w)
            b.s[k + 1] += 2.0 * dot(K, b.w)
            if k == 0:
                b.s[2] += dot(K1, b.w)
            for a in range(K.size):
                b.c[k + 1, a] += b.w[a]
        b.s[1] += 1.0 / f_inf
        b.s[2] -= note[VAR] / f_inf / f_inf


@cold
def pull_element(b: Any, h: Any, K: Any, K1: Any, note: Any, i: int, terms: int) -> None:
    """Pull (r, N) and the adjoints of the errors back through observation i."""
    diffuse = note[KIND] == DIFFUSED
    weigh_gains(b, K, K1, note, terms)
    pull_errors(b, h, K, K1, i, diffuse)
    step_0, step_1 = -dot(K, b.r[0]), -dot(K, b.r[1])
    if diffuse:
        step_1 += note[V] / note[VAR_INF] - dot(K1, b.r[0])
    else:
        step_0 += note[V] / note[VAR]
    b.e[i] = step_0
    for a in range(h.size):
        b.r[0, a] += step_0 * h[a]
        b.r[1, a] += step_1 * h[a]
    for k in range(terms):
        for a in range(h.size):
            left, right = b.s[k] * h[a] - b.c[k, a], -h[a]
            for j in range(h.size):
                b.N[k, a, j] += left * h[j] + right * b.c[k, j]


@glue
def pull_observations(b: Any, g: Any, t: int, terms: int) -> None:
    """Pull everything back through the observations of step t."""
    b.e[:] = 0.0
    b.D[:] = 0.0
    b.C[:] = 0.0
    for i in range(b.e.size - 1, -1, -1):
        if g.note[t, i, KIND] != SKIPPED:
            pull_element(b, g.h[t, i], g.K[t, i], g.K1[t, i], g.note[t, i], i, terms)


@cold
def pull_transition(b: Any, F: Any, terms: int) -> None:
    """r <- F' r and N <- F' N F, keeping N F."""
    for k in range(terms):
        b.NF[k] = 0.0
        add_product(b.N[k], F, 1.0, b.NF[k])
        b.N[k] = 0.0
        for i in range(F.shape[0]):
            for a in range(F.shape[0]):
                c = F[i, a]
                if c != 0.0:
                    for j in range(F.shape[0]):
                        b.N[k, a, j] += c * b.NF[k, i, j]
    for k in range(min(terms, 2)):
        b.w[:] = 0.0
        for i in range(F.shape[0]):
            for j in range(F.shape[0]):
                b.w[j] += b.r[k, i] * F[i, j]
        copy(b.w, b.r[k])


@cold
def restore_basis(b: Any, L: Any) -> None:
    """Adjoints of the errors from those of the decorrelated ones: products with L'^-1."""
    size = b.e.size
    for j in range(size - 1, -1, -1):
        for i in range(j + 1, size):
            c = L[i, j]
            if c != 0.0:
                b.e[j] -= c * b.e[i]
                for k in range(b.C.shape[2]):
                    b.C[0, j, k] -= c * b.C[0, i, k]
                    b.C[1, j, k] -= c * b.C[1, i, k]
                for k in range(size):
                    b.D[j, k] -= c * b.D[i, k]
    for j in range(size - 1, -1, -1):
        for i in range(j + 1, size):
            c = L[i, j]
            if c != 0.0:
                for k in range(size):
                    b.D[k, j] -= c * b.D[k, i]


@cold
def step_terms(kept: Any, g: Any, n: int, t: int, terms: int) -> int:
    """Powers of 1/kappa to carry, from the last step that is diffuse or ceases to be."""
    if kept.cov_inf.shape[0] == 0 or terms == 3:
        return terms
    for i in range(g.note.shape[1]):
        if g.note[t, i, KIND] == DIFFUSED:
            return 3
    return 3 if some(kept.cov_inf[n, t]) else 1
