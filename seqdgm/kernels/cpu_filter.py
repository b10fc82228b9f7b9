"""Forward pass over a series, and over a range of the series of a panel, compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    clean,
    cold,
    contradicts,
    decorrelate,
    diffuse_gain,
    diffuse_variance,
    glue,
    innovate,
    innovation_variance,
    is_diagonal,
    load_element,
    load_prior,
    predict_cov,
    predict_factor,
    predict_mean,
    reduce_factor,
    row,
    skip_element,
    update_cov,
)

LIKELIHOOD, LAST, ALL, SMOOTH = 0, 1, 2, 3  # what a forward pass keeps
LOGLIK, N_OBS, LOGDET, QUAD, N_DIFFUSE, RANK_LEFT = range(6)  # rows of the totals
LOG_2PI = math.log(2.0 * math.pi)


class Moments(NamedTuple):
    """Histories over series and time; those that are not wanted have length 0."""

    mean: np.ndarray
    cov: np.ndarray
    cov_inf: np.ndarray
    pred_mean: np.ndarray
    pred_cov: np.ndarray
    innovations: np.ndarray
    innov_var: np.ndarray


@glue
def observe(w: Any, s: int, i: int, rank: int) -> int:
    """Update the state with one observation; returns the diffuse rank that is left."""
    v = innovate(w, s, i)
    f = innovation_variance(w, s, i)
    f_inf = 0.0
    if rank > 0:
        f_inf = diffuse_variance(w.A, w.g, w.size, w.h, s, i)
    kind = SKIPPED
    if f_inf > 0.0:
        kind = DIFFUSED
        diffuse_gain(w.A, w.g, w.M, w.K, w.K1, s, i, f, f_inf)
    elif f != 0.0:
        kind = ORDINARY
        for k in range(w.a.size):
            w.K[s, i, k] = w.M[k] / f
    w.note[s, i, KIND] = kind
    w.note[s, i, V] = v
    w.note[s, i, VAR] = f
    w.note[s, i, VAR_INF] = f_inf
    if kind != SKIPPED:
        for k in range(w.a.size):
            w.a[k] += w.K[s, i, k] * v
        update_cov(w, s, i, f)
    if kind == DIFFUSED:
        rank = rank - 1 if reduce_factor(w.A, w.g, w.size, w.K, s, i) else 0
    return rank


@glue
def add_up(w: Any, s: int, i: int, totals: Any, n: int) -> None:
    """Add one observation to the totals of its series."""
    kind, v, f = w.note[s, i, KIND], w.note[s, i, V], w.note[s, i, VAR]
    if kind == ORDINARY:
        totals[N_OBS, n] += 1.0
        totals[LOGDET, n] += math.log(f)
        totals[QUAD, n] += v * v / f
    elif kind == DIFFUSED:
        totals[N_DIFFUSE, n] += 1.0
        totals[LOGDET, n] += math.log(w.note[s, i, VAR_INF])
    elif contradicts(w.a, w.P, w.h, s, i, w.y[i], v):
        totals[QUAD, n] = math.inf


@cold
def store_moments(a: Any, P: Any, mean: Any, cov: Any, n: int, t: int) -> None:
    """Keep a mean and a covariance."""
    for i in range(a.size):
        mean[n, t, i] = a[i]
        for j in range(a.size):
            cov[n, t, i, j] = P[i, j]


@cold
def store_cov_inf(A: Any, rank: int, cov_inf: Any, n: int, t: int) -> None:
    """Keep the diffuse covariance A A'."""
    for i in range(A.shape[0]):
        for j in range(A.shape[0]):
            total = 0.0
            if rank > 0:
                for k in range(A.shape[1]):
                    total += A[i, k] * A[j, k]
            cov_inf[n, t, i, j] = total


@cold
def store_innovations(note: Any, v: Any, var: Any, n: int, t: int) -> None:
    """Keep the innovations of a step and their variances, NaN where there is none."""
    for i in range(note.shape[1]):
        v[n, t, i] = note[0, i, V]
        var[n, t, i] = math.inf if note[0, i, KIND] == DIFFUSED else note[0, i, VAR]


@cold
def store_factor(A: Any, rank: int, factors: Any, ranks: Any, s: int) -> None:
    """Keep the diffuse factor for the smoother."""
    ranks[s] = rank
    if rank > 0:
        for i in range(A.shape[0]):
            for j in range(A.shape[1]):
                factors[s, i, j] = A[i, j]


@glue
def store_step(w: Any, s: int, out: Any, n: int, t: int, last: bool, rank: int, mode: int) -> None:
    """Keep what is asked for of the state after step t."""
    if mode == ALL:
        store_innovations(w.note, out.innovations, out.innov_var, n, t)
    if mode >= ALL or (mode == LAST and last):
        to = 0 if mode == LAST else t
        store_moments(w.a, w.P, out.mean, out.cov, n, to)
        if out.cov_inf.shape[0] > 0:
            store_cov_inf(w.A, rank, out.cov_inf, n, to)
    if mode == SMOOTH:
        store_factor(w.A, rank, w.factors, w.ranks, s)


@glue
def predict(w: Any, system: Any, n: int, t: int, rank: int) -> int:
    """Move the state to step t; returns the diffuse rank that is left."""
    predict_mean(w, system, n, t)
    predict_cov(w, system, n, t)
    if rank > 0:
        F = system.F
        if not predict_factor(w.A, w.G, w.size, F, row(F.shape[0], n), row(F.shape[1], t)):
            rank = 0
    return rank


@glue
def forward(
    system: Any,
    x: Any,
    mask: Any,
    steps: int,
    n: int,
    w: Any,
    base: int,
    totals: Any,
    out: Any,
    mode: int,
) -> None:
    """Filter series n; what the smoother reads goes to the steps from `base` on."""
    R = system.R
    nR = row(R.shape[0], n)
    diagonal = True
    for k in range(totals.shape[0]):
        totals[k, n] = 0.0
    rank = load_prior(w.a, w.P, w.A, system.m0, system.P0, system.Pinf, n)
    for t in range(steps):
        if t > 0:
            rank = predict(w, system, n, t, rank)
        if mode == ALL:
            store_moments(w.a, w.P, out.pred_mean, out.pred_cov, n, t)
        if t == 0 or R.shape[1] > 1:
            diagonal = is_diagonal(R, nR, t)
        s = base + t if mode == SMOOTH else 0
        for i in range(x.shape[2]):
            if mask[n, t, i]:
                load_element(w, system, x, n, t, s, i)
                if not diagonal:
                    decorrelate(i, s, R, nR, row(R.shape[1], t), w.L, w.var, w.y, w.h)
                rank = observe(w, s, i, rank)
                add_up(w, s, i, totals, n)
            else:
                skip_element(w.note, w.L, w.var, s, i)
        clean(w.P)
        store_step(w, s, out, n, t, t == steps - 1, rank, mode)
    totals[RANK_LEFT, n] = rank
    constant = totals[N_OBS, n] * LOG_2PI
    totals[LOGLIK, n] = -0.5 * (constant + totals[LOGDET, n] + totals[QUAD, n])


def bind_filter(digest: str) -> Callable[..., None]:
    """The loop of the filter over a range of series, keyed by a digest of its sources."""

    def filter_range(
        system: Any,
        x: Any,
        mask: Any,
        lengths: Any,
        start: int,
        stop: int,
        work: Any,
        totals: Any,
        out: Any,
        mode: int,
    ) -> None:
        """Filter series start..stop-1."""
        _ = digest
        for n in range(start, stop):
            base = (n - start) * x.shape[1]
            forward(system, x, mask, lengths[n], n, work, base, totals, out, mode)

    return filter_range
