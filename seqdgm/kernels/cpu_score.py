"""Backward loops over a range of series: gradients with smoothing errors, and fixed-lag moments.

The equations are in `seqdgm.kernels.cpu_adjoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.cpu_adjoint import (
    add_apply,
    add_outer,
    add_product,
    clear,
    copy,
    find_gains,
    load_predicted,
    pull_observations,
    pull_transition,
    restore_basis,
    some,
    step_terms,
)
from seqdgm.kernels.cpu_steps import cold, glue, row


class Errors(NamedTuple):
    """Histories of (r, N), relative to the predicted state, and (e, D); no rows: not wanted."""

    r: np.ndarray
    N: np.ndarray
    e: np.ndarray
    D: np.ndarray


# ---------------------------------------------------------------- the score


@cold
def add_curvature(b: Any, out: Any) -> None:
    """Add (r r' - N) / 2 to the gradient of a covariance of the state."""
    add_outer(b.r[0], b.r[0], 0.5, out)
    for i in range(out.shape[0]):
        for j in range(out.shape[0]):
            out[i, j] -= 0.5 * b.N[0, i, j]


@cold
def smoothed_mean(a: Any, P: Any, Pinf: Any, b: Any, terms: int) -> None:
    """E[z | x] from moments that (r, N) are relative to, in `b.w`."""
    copy(a, b.w)
    add_apply(P, b.r[0], 1.0, b.w)
    if terms > 1:
        add_apply(Pinf, b.r[1], 1.0, b.w)


@glue
def add_emission(b: Any, g: Any, kept: Any, grad: Any, n: int, k: int, t: int, terms: int) -> None:
    """Gradients with respect to H, R and d of a step."""
    H = grad.H[row(grad.H.shape[0], k), row(grad.H.shape[1], t)]
    R = grad.R[row(grad.R.shape[0], k), row(grad.R.shape[1], t)]
    d = grad.d[row(grad.d.shape[0], k), row(grad.d.shape[1], t)]
    smoothed_mean(kept.pred_mean[n, t], kept.pred_cov[n, t], g.Pinf, b, terms)
    add_outer(b.e, b.w, 1.0, H)
    add_product(b.C[0], kept.pred_cov[n, t], -1.0, H)
    if terms > 1:
        add_product(b.C[1], g.Pinf, -1.0, H)
    add_outer(b.e, b.e, 0.5, R)
    for i in range(b.e.size):
        d[i] += b.e[i]
        for j in range(b.e.size):
            R[i, j] -= 0.5 * b.D[i, j]


@glue
def add_start(b: Any, grad: Any, k: int, terms: int) -> None:
    """Gradients with respect to m0, P0 and Pinf."""
    m0 = grad.m0[row(grad.m0.shape[0], k)]
    for i in range(m0.size):
        m0[i] += b.r[0, i]
    add_curvature(b, grad.P0[row(grad.P0.shape[0], k)])
    if terms > 1:
        Pinf = grad.Pinf[row(grad.Pinf.shape[0], k)]
        add_outer(b.r[0], b.r[1], 0.5, Pinf)
        add_outer(b.r[1], b.r[0], 0.5, Pinf)
        for i in range(m0.size):
            for j in range(m0.size):
                Pinf[i, j] -= 0.5 * b.N[1, i, j]


@glue
def add_transition(
    b: Any, system: Any, kept: Any, grad: Any, n: int, k: int, t: int, terms: int
) -> None:
    """Pull back through the transition into step t; gradients with respect to F, Q and b."""
    add_curvature(b, grad.Q[row(grad.Q.shape[0], k), row(grad.Q.shape[1], t)])
    offset = grad.b[row(grad.b.shape[0], k), row(grad.b.shape[1], t)]
    dF = grad.F[row(grad.F.shape[0], k), row(grad.F.shape[1], t)]
    copy(b.r[0], b.X[0])
    for i in range(offset.size):
        offset[i] += b.r[0, i]
    pull_transition(b, system.F[row(system.F.shape[0], n), row(system.F.shape[1], t)], terms)
    Pinf = kept.cov_inf[n, t - 1] if terms > 1 else kept.cov[n, t - 1]
    smoothed_mean(kept.mean[n, t - 1], kept.cov[n, t - 1], Pinf, b, terms)
    add_outer(b.X[0], b.w, 1.0, dF)
    add_product(b.NF[0], kept.cov[n, t - 1], -1.0, dF)
    if terms > 1:
        add_product(b.NF[1], Pinf, -1.0, dF)


@glue
def backward(
    system: Any, kept: Any, steps: int, n: int, k: int, g: Any, b: Any, grad: Any, out: Any
) -> None:
    """Gradient of series n, added to row k of `grad`, and its histories."""
    find_gains(system, kept, n, steps, g)
    clear(b)
    terms = 1
    for t in range(steps - 1, -1, -1):
        terms = step_terms(kept, g, n, t, terms)
        pull_observations(b, g, t, terms)
        restore_basis(b, g.L[t])
        if terms > 1:
            load_predicted(system, kept, n, t, g)
        add_emission(b, g, kept, grad, n, k, t, terms)
        if out.r.shape[0] > 0:
            copy(b.r[0], out.r[n, t])
            copy(b.N[0], out.N[n, t])
            copy(b.e, out.e[n, t])
            copy(b.D, out.D[n, t])
        if t > 0:
            add_transition(b, system, kept, grad, n, k, t, terms)
        else:
            add_start(b, grad, k, terms)


def bind_score(digest: str) -> Callable[..., None]:
    """The backward loop over a range of series, keyed by a digest of its sources."""

    def score_range(
        system: Any,
        kept: Any,
        lengths: Any,
        start: int,
        stop: int,
        gains: Any,
        pull: Any,
        grad: Any,
        out: Any,
    ) -> None:
        """Add the gradients of series start..stop-1 to `grad`, whose own rows begin at `start`."""
        _ = digest
        for n in range(start, stop):
            backward(system, kept, lengths[n], n, n - start, gains, pull, grad, out)

    return score_range


# ---------------------------------------------------------------- fixed-lag moments


@cold
def smooth_step(b: Any, P: Any, Pinf: Any, terms: int, mean: Any, cov: Any) -> None:
    """Moments of z given what has been pulled back, from the filtered ones in `mean` and `cov`.

    A diffuse element that is still undetermined has infinite variance.
    """
    smoothed_mean(mean, P, Pinf, b, terms)
    copy(b.w, mean)
    b.X[:] = 0.0
    add_product(b.N[0], P, 1.0, b.X)
    if terms > 1:
        add_product(b.N[1], Pinf, 1.0, b.X)
    add_product(P, b.X, -1.0, cov)
    if terms > 1:
        b.X[:] = 0.0
        add_product(b.N[1], P, 1.0, b.X)
        add_product(b.N[2], Pinf, 1.0, b.X)
        add_product(Pinf, b.X, -1.0, cov)
    for i in range(mean.size):
        for j in range(i + 1):
            value = 0.5 * (cov[i, j] + cov[j, i])
            cov[i, j], cov[j, i] = value, value
    if terms > 1:
        mark_diffuse(b, Pinf, cov)


@cold
def mark_diffuse(b: Any, Pinf: Any, cov: Any) -> None:
    """Infinite covariance where Pinf - Pinf N_1 Pinf has not vanished."""
    b.X[:] = 0.0
    add_product(b.N[1], Pinf, 1.0, b.X)
    copy(Pinf, b.NF[0])
    add_product(Pinf, b.X, -1.0, b.NF[0])
    for i in range(Pinf.shape[0]):
        for j in range(Pinf.shape[0]):
            if abs(b.NF[0, i, j]) > 1e-8 * math.sqrt(Pinf[i, i] * Pinf[j, j]):
                cov[i, j] = math.inf


@glue
def lagged(
    system: Any, kept: Any, steps: int, lag: int, n: int, g: Any, b: Any, mean: Any, cov: Any
) -> None:
    """Moments of every z_s of series n given the observations up to step s + lag."""
    find_gains(system, kept, n, steps, g)
    nF = row(system.F.shape[0], n)
    for s in range(steps):
        clear(b)
        copy(kept.mean[n, s], mean[n, s])
        copy(kept.cov[n, s], cov[n, s])
        diffuse = kept.cov_inf.shape[0] > 0 and some(kept.cov_inf[n, s])
        terms = 3 if diffuse else 1
        Pinf = kept.cov_inf[n, s] if diffuse else kept.cov[n, s]
        for t in range(min(s + lag, steps - 1), s, -1):
            pull_observations(b, g, t, terms)
            pull_transition(b, system.F[nF, row(system.F.shape[1], t)], terms)
        smooth_step(b, kept.cov[n, s], Pinf, terms, mean[n, s], cov[n, s])


def bind_lag(digest: str) -> Callable[..., None]:
    """The fixed-lag loop over a range of series, keyed by a digest of its sources."""

    def lag_range(
        system: Any,
        kept: Any,
        lengths: Any,
        start: int,
        stop: int,
        lag: int,
        gains: Any,
        pull: Any,
        mean: Any,
        cov: Any,
    ) -> None:
        """Fixed-lag moments of series start..stop-1."""
        _ = digest
        for n in range(start, stop):
            lagged(system, kept, lengths[n], lag, n, gains, pull, mean, cov)

    return lag_range
