"""Forward pass over a series, and over a range of the series of a panel, compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from seqdgm.kernels.cpu_fixed import (
    copy,
    filter_increments,
    has_settled,
    hold,
    is_complete,
    is_fixed,
    mix_innovations,
    repeat_step,
    reset,
    root_of_increment,
    sum_logs,
    unscaled_gain,
    watch,
)
from seqdgm.kernels.cpu_steps import (
    DIFFUSED,
    KIND,
    ORDINARY,
    SKIPPED,
    VAR,
    VAR_INF,
    V,
    carve,
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
LOGLIK, LOGDET, QUAD, N_OBS, N_DIFFUSE, RANK_LEFT = range(6)  # rows of the totals
LOG_2PI = math.log(2.0 * math.pi)


@glue
def observe(w: Any, s: int, i: int, rank: int) -> int:
    """Update the state with one observation; returns the diffuse rank that is left."""
    v = innovate(w.y, w.h, s, i, w.a, w.P, w.M)
    f = innovation_variance(w.h, w.var, s, i, w.P, w.M)
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
        update_cov(w.P, w.M, w.h, w.K, w.u, w.before, s, i, w.var[i], f)
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
def store_step(w: Any, s: int, out: Any, n: int, t: int, rank: int, mode: int) -> None:
    """Keep the state after step t."""
    store_moments(w.a, w.P, out.mean, out.cov, n, t)
    if out.cov_inf.shape[0] > 0:
        store_cov_inf(w.A, rank, out.cov_inf, n, t)
    if mode == ALL:
        store_innovations(w.note, out.innovations, out.innov_var, n, t)
    if mode == SMOOTH:
        store_factor(w.A, rank, w.factors, w.ranks, s)


@glue
def predict(w: Any, system: Any, n: int, t: int, rank: int) -> int:
    """Move the state to step t; returns the diffuse rank that is left."""
    F = system.F
    predict_mean(F, system.b, n, t, w.a, w.u)
    predict_cov(F, system.Q, n, t, w.P, w.G)
    if rank > 0:
        some = predict_factor(w.A, w.G, w.size, F, row(F.shape[0], n), row(F.shape[1], t))
        rank = rank if some else 0
    return rank


@glue
def take_step(
    w: Any,
    system: Any,
    x: Any,
    mask: Any,
    n: int,
    t: int,
    s: int,
    diagonal: bool,
    rank: int,
    totals: Any,
) -> int:
    """Use the observed elements of step t; returns the diffuse rank that is left."""
    R = system.R
    for i in range(x.shape[2]):
        if mask[n, t, i]:
            load_element(x, system.d, system.H, R, n, t, s, i, w.y, w.var, w.h)
            if not diagonal:
                nR, tR = row(R.shape[0], n), row(R.shape[1], t)
                decorrelate(i, s, R, nR, tR, w.L, w.var, w.y, w.h)
            rank = observe(w, s, i, rank)
            add_up(w, s, i, totals, n)
        else:
            skip_element(w.note, w.L, w.var, s, i)
    clean(w.P)
    return rank


@glue
def leap(w: Any, system: Any, x: Any, n: int, t: int, steps: int, totals: Any) -> bool:
    """Filter from step t to the end by increments of rank one, where that is possible.

    The predicted covariance is in `P`, that of the step before in `P_before`.
    """
    F, b, H, d = system.F, system.b, system.H, system.d
    y, k, a, g = w.before, w.u, w.size, w.M
    exact = False
    sign = root_of_increment(w.P, w.P_before, y)
    if sign != 0.0 and w.note[0, 0, KIND] == ORDINARY:
        f = unscaled_gain(F, H, n, w.P, w.var[0], g, k, w.band)
        for i in range(a.size):
            a[i] = w.a[i]
        before = w.note[0, 0, VAR]
        exact, logdet, quad = filter_increments(
            F, b, H, d, x, n, t, steps, before, f, sign, y, k, a, g, w.band
        )
        if exact:
            totals[N_OBS, n] += steps - t
            totals[LOGDET, n] += logdet
            totals[QUAD, n] += quad
    return exact


@glue
def coast(
    w: Any,
    system: Any,
    x: Any,
    mask: Any,
    n: int,
    t: int,
    steps: int,
    s: int,
    totals: Any,
    out: Any,
    mode: int,
) -> int:
    """Go on from step t with the gains of the step before; returns the next step."""
    if mode == SMOOTH:
        repeat_step(w.h, w.K, w.note, s)
    stop = t + 1 if mode >= ALL else steps
    F, b, H, d, f = system.F, system.b, system.H, system.d, w.f_before
    end, quad = hold(F, b, H, d, x, mask, n, t, stop, w.a, w.u, w.v, w.B, w.K, s, f)
    totals[N_OBS, n] += (end - t) * f.size
    totals[LOGDET, n] += (end - t) * sum_logs(f)
    totals[QUAD, n] += quad
    for i in range(f.size):
        w.note[s, i, V] = w.v[i]
    if mode == ALL:
        store_moments(w.u, w.P_before, out.pred_mean, out.pred_cov, n, t)
    return end


@cold
def start(watched: Any, before_f: Any, totals: Any, n: int) -> None:
    """Begin a series."""
    reset(watched, before_f)
    for k in range(totals.shape[0]):
        totals[k, n] = 0.0


@cold
def finish(totals: Any, n: int, rank: int) -> None:
    """Sum up a series."""
    totals[RANK_LEFT, n] = rank
    constant = totals[N_OBS, n] * LOG_2PI
    totals[LOGLIK, n] = -0.5 * (constant + totals[LOGDET, n] + totals[QUAD, n])


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
    R, fixed = system.R, is_fixed(system.F, system.Q, system.H, system.R)
    diagonal, steady, ready = True, False, False
    t = np.int64(0)  # the type of a literal would have every step compiled twice
    leaps = fixed and x.shape[2] == 1 and mode == LIKELIHOOD and is_complete(mask, n, 0, steps)
    leaps = leaps and w.a.size > 1  # one number is no more than its increment
    start(w.watch, w.f_before, totals, n)
    rank = load_prior(w.a, w.P, w.A, system.m0, system.P0, system.Pinf, n)
    while t < steps:
        now, s = t, base + t if mode == SMOOTH else 0
        steady = steady and is_complete(mask, n, t, t + 1)
        if steady:
            t = coast(w, system, x, mask, n, t, steps, s, totals, out, mode)
        else:
            if t > 0:
                rank = predict(w, system, n, t, rank)
            if ready and leap(w, system, x, n, t, steps, totals):
                break
            ready = leaps and rank == 0
            if ready:
                copy(w.P, w.P_before)
                leaps = False
            if mode == ALL:
                store_moments(w.a, w.P, out.pred_mean, out.pred_cov, n, t)
            if t == 0 or R.shape[1] > 1:
                diagonal = is_diagonal(R, row(R.shape[0], n), t)
            settled = fixed and has_settled(w.P, w.P_before, w.u, w.watch)
            rank = take_step(w, system, x, mask, n, t, s, diagonal, rank, totals)
            if fixed and watch(w.note, s, w.f_before, rank, w.watch, w.a.size) and settled:
                steady = True
                mix_innovations(w.L, diagonal, w.h, w.K, s, w.B)
            t += 1
        if mode >= ALL or (mode == LAST and t == steps):
            store_step(w, s, out, n, 0 if mode == LAST else now, rank, mode)
    finish(totals, n, rank)


def bind_filter(digest: str) -> Callable[..., None]:
    """The loop of the filter over a range of series, keyed by a digest of its sources."""

    def filter_range(
        system: Any,
        x: Any,
        mask: Any,
        lengths: Any,
        start: int,
        stop: int,
        memory: Any,
        totals: Any,
        out: Any,
        mode: int,
    ) -> None:
        """Filter series start..stop-1."""
        _ = digest
        work = carve(memory, system.m0.shape[1], x.shape[2])
        for n in range(start, stop):
            base = (n - start) * x.shape[1]
            forward(system, x, mask, lengths[n], n, work, base, totals, out, mode)

    return filter_range
