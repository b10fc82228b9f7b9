r"""Backward pass of the fixed-interval smoother, compiled.

With :math:`r = r_0 + r_1 / \kappa` and :math:`N = N_0 + N_1 / \kappa + N_2 / \kappa^2` taken
relative to the state after step t (covariance :math:`P + \kappa P_\infty`), the smoothed moments
are

.. math::

    \hat z &= a + P r_0 + P_\infty r_1 \\
    V &= P - P N_0 P - P_\infty N_1 P - P N_1 P_\infty - P_\infty N_2 P_\infty .

A transition pulls back as :math:`r \leftarrow F^\top r`, :math:`N \leftarrow F^\top N F`; a scalar
observation :math:`h` with gain :math:`K + K_1 / \kappa` as :math:`r \leftarrow h v / f + L^\top r`,
:math:`N \leftarrow h h^\top / f + L^\top N L`, :math:`L = I - (K + K_1 / \kappa) h^\top`, term by
term in :math:`1 / \kappa` (Durbin and Koopman 2012, sections 5.3 and 6.4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.cpu_steps import (
    DIFFUSED,
    KIND,
    SKIPPED,
    VAR,
    VAR_INF,
    V,
    carve,
    clean,
    cold,
    glue,
    row,
)


class Back(NamedTuple):
    """Backward recursion of one series: (r_0, r_1), (N_0, N_1, N_2) and scratch."""

    r: np.ndarray  # (2, Z)
    N: np.ndarray  # (3, Z, Z)
    NF: np.ndarray  # N_k F of the transition out of the step (3, Z, Z)
    P: np.ndarray  # filtered covariance of the step (Z, Z)
    Pinf: np.ndarray  # its diffuse part (Z, Z)
    X: np.ndarray  # scratch (Z, Z)
    NK: np.ndarray  # N_k K (3, Z)
    NK1: np.ndarray  # N_k K_1 (2, Z)
    c: np.ndarray  # their sum for each power of 1/kappa (3, Z)


def make_back(state: int) -> Back:
    """Allocate the memory of one series."""
    return Back(
        np.empty((2, state)),
        np.empty((3, state, state)),
        np.empty((3, state, state)),
        np.empty((state, state)),
        np.empty((state, state)),
        np.empty((state, state)),
        np.empty((3, state)),
        np.empty((2, state)),
        np.empty((3, state)),
    )


@cold
def add_product(A: Any, B: Any, scale: float, out: Any) -> None:
    """Add `scale` A B to `out`, skipping the zeros of A."""
    size = out.shape[0]
    for i in range(size):
        for k in range(size):
            c = scale * A[i, k]
            if c != 0.0:
                for j in range(size):
                    out[i, j] += c * B[k, j]


@cold
def add_transposed_product(A: Any, B: Any, out: Any) -> None:
    """Add A' B to `out`, skipping the zeros of A."""
    size = out.shape[0]
    for i in range(size):
        for k in range(size):
            c = A[k, i]
            if c != 0.0:
                for j in range(size):
                    out[i, j] += c * B[k, j]


@cold
def fill(X: Any, value: float) -> None:
    """Set every element of a matrix."""
    for i in range(X.shape[0]):
        for j in range(X.shape[1]):
            X[i, j] = value


@cold
def weigh(N: Any, x: Any, out: Any) -> None:
    """Product of a symmetric matrix with a vector."""
    for a in range(x.size):
        out[a] = 0.0
    for b in range(x.size):
        c = x[b]
        for a in range(x.size):
            out[a] += c * N[b, a]


@cold
def dot(a: Any, b: Any) -> float:
    """Inner product."""
    total = 0.0
    for k in range(a.size):
        total += a[k] * b[k]
    return total


@glue
def pull_transition(back: Any, F: Any, terms: int) -> None:
    """r <- F' r and N <- F' N F, keeping N F for the lag-one covariance."""
    for k in range(terms):
        fill(back.NF[k], 0.0)
        add_product(back.N[k], F, 1.0, back.NF[k])
        fill(back.N[k], 0.0)
        add_transposed_product(F, back.NF[k], back.N[k])
    for k in range(min(terms, 2)):
        for j in range(F.shape[0]):
            back.c[0, j] = 0.0
        for i in range(F.shape[0]):
            c = back.r[k, i]
            for j in range(F.shape[0]):
                back.c[0, j] += c * F[i, j]
        for j in range(F.shape[0]):
            back.r[k, j] = back.c[0, j]


@cold
def load_moments(cov: Any, factor: Any, rank: int, P: Any, Pinf: Any) -> None:
    """Fetch the filtered covariance of a step and its diffuse part."""
    for i in range(P.shape[0]):
        for j in range(P.shape[0]):
            P[i, j] = cov[i, j]
            Pinf[i, j] = dot(factor[i], factor[j]) if rank > 0 else 0.0


@glue
def smooth_state(back: Any, mean: Any, cov: Any, terms: int) -> None:
    """Smoothed from filtered moments, in place; the filtered covariance is in `back.P`."""
    for i in range(mean.size):
        mean[i] += dot(back.P[i], back.r[0])
        if terms > 1:
            mean[i] += dot(back.Pinf[i], back.r[1])
    # V = P - P (N0 P + N1 Pinf) - Pinf (N1 P + N2 Pinf)
    fill(back.X, 0.0)
    add_product(back.N[0], back.P, 1.0, back.X)
    if terms > 1:
        add_product(back.N[1], back.Pinf, 1.0, back.X)
    add_product(back.P, back.X, -1.0, cov)
    if terms > 1:
        fill(back.X, 0.0)
        add_product(back.N[1], back.P, 1.0, back.X)
        add_product(back.N[2], back.Pinf, 1.0, back.X)
        add_product(back.Pinf, back.X, -1.0, cov)
    clean(cov)


@glue
def lag_one_cov(back: Any, F: Any, Q: Any, V_t: Any, terms: int, out: Any) -> None:
    """Cov(z_{t+1}, z_t | x) = F V_t - Q (N0 F P + N1 F Pinf), N relative to the predicted state."""
    fill(out, 0.0)
    add_product(F, V_t, 1.0, out)
    fill(back.X, 0.0)
    add_product(back.NF[0], back.P, 1.0, back.X)
    if terms > 1:
        add_product(back.NF[1], back.Pinf, 1.0, back.X)
    add_product(Q, back.X, -1.0, out)


@cold
def pull_ordinary(r: Any, N: Any, NK: Any, h: Any, K: Any, v: float, f: float, terms: int) -> None:
    """Pull (r, N) back through an ordinary observation."""
    for k in range(terms):
        weigh(N[k], K, NK[k])
        s = dot(K, NK[k])
        if k == 0:
            s += 1.0 / f
        add_sides(N[k], h, NK[k], s)
    for k in range(min(terms, 2)):
        step = -dot(K, r[k])
        if k == 0:
            step += v / f
        for a in range(h.size):
            r[k, a] += step * h[a]


@cold
def pull_diffuse(back: Any, h: Any, K: Any, K1: Any, note: Any) -> None:
    """Pull (r, N) back through a diffuse observation, power by power of 1/kappa."""
    r, N, NK, NK1, c = back.r, back.N, back.NK, back.NK1, back.c
    f, f_inf = note[VAR], note[VAR_INF]
    for k in range(3):
        weigh(N[k], K, NK[k])
    for k in range(2):
        weigh(N[k], K1, NK1[k])
    for a in range(h.size):
        c[0, a] = NK[0, a]
        c[1, a] = NK[1, a] + NK1[0, a]
        c[2, a] = NK[2, a] + NK1[1, a]
    add_sides(N[0], h, c[0], dot(K, NK[0]))
    add_sides(N[1], h, c[1], dot(K, NK[1]) + 2.0 * dot(K1, NK[0]) + 1.0 / f_inf)
    second = dot(K, NK[2]) + 2.0 * dot(K1, NK[1]) + dot(K1, NK1[0])
    add_sides(N[2], h, c[2], second - f / f_inf / f_inf)
    step_0 = -dot(K, r[0])
    step_1 = note[V] / f_inf - dot(K, r[1]) - dot(K1, r[0])
    for a in range(h.size):
        r[0, a] += step_0 * h[a]
        r[1, a] += step_1 * h[a]


@cold
def add_sides(N: Any, h: Any, c: Any, s: float) -> None:
    """N <- N - c h' - h c' + s h h'."""
    for a in range(h.size):
        left, right = s * h[a] - c[a], -h[a]
        for b in range(h.size):
            N[a, b] += left * h[b] + right * c[b]


@cold
def any_diffuse(note: Any) -> bool:
    """Whether an observation of the step was diffuse."""
    found = False
    for i in range(note.shape[0]):
        found = found or note[i, KIND] == DIFFUSED
    return found


@glue
def backward(
    system: Any,
    steps: int,
    n: int,
    w: Any,
    base: int,
    back: Any,
    mean: Any,
    cov: Any,
    lag_one: Any,
) -> None:
    """Turn the filtered moments of series n into smoothed ones, last step first."""
    F, Q = system.F[row(system.F.shape[0], n)], system.Q[row(system.Q.shape[0], n)]
    fill(back.r, 0.0)
    for k in range(3):
        fill(back.N[k], 0.0)
    terms = 1
    for t in range(steps - 1, -1, -1):
        s = base + t
        rank = w.ranks[s]
        # The 1/kappa terms start at the last step that is diffuse or ceases to be.
        if rank > 0 or any_diffuse(w.note[s]):
            terms = 3
        load_moments(cov[n, t], w.factors[s] if rank > 0 else back.X, rank, back.P, back.Pinf)
        if t + 1 < steps:
            pull_transition(back, F[row(F.shape[0], t + 1)], terms)
        smooth_state(back, mean[n, t], cov[n, t], terms)
        if t + 1 < steps and lag_one.shape[0] > 0:
            F_next, Q_next = F[row(F.shape[0], t + 1)], Q[row(Q.shape[0], t + 1)]
            lag_one_cov(back, F_next, Q_next, cov[n, t], terms, lag_one[n, t])
        for i in range(w.note.shape[1] - 1, -1, -1):
            kind = w.note[s, i, KIND]
            if kind == DIFFUSED:
                pull_diffuse(back, w.h[s, i], w.K[s, i], w.K1[s, i], w.note[s, i])
            elif kind != SKIPPED:
                v, f = w.note[s, i, V], w.note[s, i, VAR]
                pull_ordinary(back.r, back.N, back.NK, w.h[s, i], w.K[s, i], v, f, terms)


def bind_smoother(digest: str) -> Callable[..., None]:
    """The backward loop over a range of series, keyed by a digest of its sources."""

    def smooth_range(
        system: Any,
        lengths: Any,
        start: int,
        stop: int,
        memory: Any,
        obs: int,
        back: Any,
        mean: Any,
        cov: Any,
        lag_one: Any,
    ) -> None:
        """Smooth series start..stop-1, whose forward passes lie one after another in memory."""
        _ = digest
        work = carve(memory, mean.shape[2], obs)
        for n in range(start, stop):
            base = (n - start) * mean.shape[1]
            backward(system, lengths[n], n, work, base, back, mean, cov, lag_one)

    return smooth_range
