"""Loops over time and over blocks of series, compiled for one size of the state.

A block is `WIDTH` series, one a lane; the lanes that a panel leaves over repeat its last series.
Fields of the system and data are fetched into lanes (`load`, `load_data`), and results brought back
from lanes to the histories of single series (`bring`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import numba
import numpy as np

from seqdgm.kernels.cpu_lanes_steps import (
    EXPONENT,
    N_DIFFUSE,
    N_NOTES,
    N_OBS,
    N_TOTALS,
    PRODUCT,
    QUAD,
    RANK,
    VAR,
    V,
    back_size,
    begin,
    begin_back,
    begin_diffuse,
    is_diffuse,
    keep,
    keep_diffuse,
    keep_last,
    keep_totals,
    observe,
    predict,
    predict_factor,
    pull,
    pull_diffuse,
    pull_transition,
    smooth,
    smooth_pair,
    state_size,
    triangle,
)
from seqdgm.kernels.cpu_lanes_vector import WIDTH, aligned, at, local

LIKELIHOOD, LAST, ALL = 0, 1, 2  # what the filter keeps
LOG_2, LOG_2PI = math.log(2.0), math.log(2.0 * math.pi)
_STRIP = 32  # steps whose lanes stay in the nearest cache while they are brought back

# No kernel allocates, so reference counting can be switched off.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
_INNER: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **OPTIONS}
cold = numba.njit(**_INNER)


class Panel(NamedTuple):
    """The data, and the series in the order in which blocks take them."""

    x: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray  # how many steps of each series the histories hold
    order: np.ndarray


class Picks(NamedTuple):
    """Which elements of a flattened field go into lanes one after another, or come from them."""

    plain: np.ndarray  # all, as they stand
    lower: np.ndarray  # the lower triangle of a matrix
    full: np.ndarray  # a matrix from its lower triangle
    diagonal: np.ndarray  # the diagonal of R
    v: np.ndarray  # innovations from the notes of a step
    var: np.ndarray  # their variances


def make_picks(state: int, obs: int) -> Picks:
    """Picks for systems of a size."""
    rows, columns = np.tril_indices(state)
    full = np.empty((state, state), np.int64)
    full[rows, columns] = full[columns, rows] = np.arange(len(rows))
    notes = N_NOTES * np.arange(obs)
    plain = np.arange(state * max(state, obs))
    return Picks(
        plain,
        rows * state + columns,
        full.ravel(),
        np.arange(obs) * (obs + 1),
        notes + V,
        notes + VAR,
    )


class Places(NamedTuple):
    """Where in the memory of a block its lanes begin: matrices, and `tile` steps of the rest."""

    F: int  # (Z, Z)
    Q: int  # lower triangle
    H: int  # (D, Z)
    R: int  # diagonal (D,)
    m0: int
    P0: int
    Pinf: int  # lower triangle
    lengths: int
    totals: int
    b: int  # (tile or 1, Z)
    y: int  # x - d, 0 where nothing is observed (tile, D)
    seen: int  # 1 or 0 (tile, D)
    note: int  # what is noted of observations (tile, D, N_NOTES)
    K: int  # their gains (tile, D, Z)
    K1: int  # the 1/kappa part of those
    mean: int  # (tile, Z)
    cov: int  # lower triangle (tile, .)
    cov_inf: int
    pred_mean: int
    pred_cov: int
    pairs: int  # lag-one covariances (tile, Z, Z)


def make_memory(state: int, obs: int, tile: int) -> tuple[np.ndarray, Places]:
    """Memory of one block; what is never written costs nothing."""
    square, low = state * state, triangle(state)
    sizes = Places(
        F=square,
        Q=low,
        H=obs * state,
        R=obs,
        m0=state,
        P0=low,
        Pinf=low,
        lengths=1,
        totals=N_TOTALS,
        b=tile * state,
        y=tile * obs,
        seen=tile * obs,
        note=tile * obs * N_NOTES,
        K=tile * obs * state,
        K1=tile * obs * state,
        mean=tile * state,
        cov=tile * low,
        cov_inf=tile * low,
        pred_mean=tile * state,
        pred_cov=tile * low,
        pairs=tile * square,
    )
    *starts, end = accumulate(sizes, initial=0)
    return aligned(end), Places._make(starts)


# ---------------------------------------------------------------- between series and lanes


@cold
def load(
    field: Any, picks: Any, order: Any, first: int, stop: int, start: int, end: int, m: Any, to: int
) -> None:
    """Fetch steps start..end-1 of a flattened field of the system; length 1 means shared."""
    for lane in range(WIDTH):
        n = order[min(first + lane, stop - 1)] if field.shape[0] > 1 else 0
        place = to * WIDTH + lane
        for t in range(start, end):
            at_t = t if field.shape[1] > 1 else 0
            for k in range(picks.size):
                m[place] = field[n, at_t, picks[k]]
                place += WIDTH


@cold
def load_data(
    panel: Any, d: Any, first: int, stop: int, start: int, end: int, m: Any, y: int, seen: int
) -> None:
    """Fetch steps start..end-1 of x - d, and which of them are observed."""
    D = panel.x.shape[2]
    for lane in range(WIDTH):
        n = panel.order[min(first + lane, stop - 1)]
        nd = n if d.shape[0] > 1 else 0
        place = lane
        for t in range(start, end):
            td = t if d.shape[1] > 1 else 0
            for i in range(D):
                there = t < panel.lengths[n] and panel.mask[n, t, i]
                m[y * WIDTH + place] = panel.x[n, t, i] - d[nd, td, i] if there else 0.0
                m[seen * WIDTH + place] = 1.0 if there else 0.0
                place += WIDTH


@cold
def bring(
    m: Any,
    place: int,
    every: int,
    picks: Any,
    out: Any,
    ends: Any,
    less: int,
    order: Any,
    first: int,
    stop: int,
    start: int,
    end: int,
) -> None:
    """Bring steps start..end-1 of a flattened history back; NaN from step ends - less on.

    A step takes `every` lanes from `place` on, of which element k is the one that `picks` says.
    """
    for strip in range(start, end, _STRIP):
        for lane in range(min(WIDTH, stop - first)):
            n = order[first + lane]
            for t in range(strip, min(strip + _STRIP, end)):
                base = place + (t - start) * every
                for k in range(out.shape[2]):
                    value = m[(base + picks[k]) * WIDTH + lane]
                    out[n, t, k] = value if t < ends[n] - less else math.nan


@cold
def bring_totals(m: Any, place: int, totals: Any, order: Any, first: int, stop: int) -> None:
    """Bring back log-likelihood, n_obs, logdet, quad, n_diffuse and rank_left."""
    for lane in range(min(WIDTH, stop - first)):
        n, base = order[first + lane], place * WIDTH + lane
        n_obs, quad = m[base + N_OBS * WIDTH], m[base + QUAD * WIDTH]
        logdet = math.log(m[base + PRODUCT * WIDTH]) + LOG_2 * m[base + EXPONENT * WIDTH]
        totals[0, n] = -0.5 * (n_obs * LOG_2PI + logdet + quad)
        totals[1, n] = logdet
        totals[2, n] = quad
        totals[3, n] = n_obs
        totals[4, n] = m[base + N_DIFFUSE * WIDTH]
        totals[5, n] = m[base + RANK * WIDTH]


@cold
def load_block(
    system: Any, panel: Any, picks: Any, first: int, stop: int, m: Any, w: Any
) -> tuple[bool, int]:
    """Fetch what does not vary over time; whether a variance is zero, and the longest length."""
    order, Z, D = panel.order, system.m0.shape[2], panel.x.shape[2]
    load(system.F, picks.plain[: Z * Z], order, first, stop, 0, 1, m, w.F)
    load(system.H, picks.plain[: D * Z], order, first, stop, 0, 1, m, w.H)
    load(system.m0, picks.plain[:Z], order, first, stop, 0, 1, m, w.m0)
    load(system.R, picks.diagonal, order, first, stop, 0, 1, m, w.R)
    load(system.Q, picks.lower, order, first, stop, 0, 1, m, w.Q)
    load(system.P0, picks.lower, order, first, stop, 0, 1, m, w.P0)
    load(system.Pinf, picks.lower, order, first, stop, 0, 1, m, w.Pinf)
    longest = 0
    for lane in range(WIDTH):
        length = panel.lengths[order[min(first + lane, stop - 1)]]
        m[w.lengths * WIDTH + lane] = length
        longest = max(longest, length)
    exact = False
    for k in range(w.R * WIDTH, (w.R + D) * WIDTH):
        exact = exact or m[k] == 0.0
    return exact, longest


@cold
def load_tile(
    system: Any,
    panel: Any,
    picks: Any,
    first: int,
    stop: int,
    start: int,
    end: int,
    m: Any,
    w: Any,
) -> None:
    """Fetch the data of steps start..end-1, and b."""
    load_data(panel, system.d, first, stop, start, end, m, w.y, w.seen)
    last = end if system.b.shape[1] > 1 else start + 1
    all_of_b = picks.plain[: system.m0.shape[2]]
    load(system.b, all_of_b, panel.order, first, stop, start, last, m, w.b)


@cold
def bring_moments(
    m: Any, w: Any, picks: Any, out: Any, panel: Any, first: int, stop: int, start: int, end: int
) -> None:
    """Bring back means and covariances of steps start..end-1."""
    Z, low, ends, order = out.mean.shape[2], picks.lower.size, panel.ends, panel.order
    bring(m, w.mean, Z, picks.plain, out.mean, ends, 0, order, first, stop, start, end)
    bring(m, w.cov, low, picks.full, out.cov, ends, 0, order, first, stop, start, end)
    if out.cov_inf.shape[0] > 0:
        bring(m, w.cov_inf, low, picks.full, out.cov_inf, ends, 0, order, first, stop, start, end)


@cold
def bring_all(
    m: Any, w: Any, picks: Any, out: Any, panel: Any, first: int, stop: int, start: int, end: int
) -> None:
    """Bring back all that the filter keeps of steps start..end-1."""
    bring_moments(m, w, picks, out, panel, first, stop, start, end)
    Z, low, notes = out.mean.shape[2], picks.lower.size, out.innovations.shape[2] * N_NOTES
    ends, order = panel.ends, panel.order
    bring(m, w.pred_mean, Z, picks.plain, out.pred_mean, ends, 0, order, first, stop, start, end)
    bring(m, w.pred_cov, low, picks.full, out.pred_cov, ends, 0, order, first, stop, start, end)
    bring(m, w.note, notes, picks.v, out.innovations, ends, 0, order, first, stop, start, end)
    bring(m, w.note, notes, picks.var, out.innov_var, ends, 0, order, first, stop, start, end)


# ---------------------------------------------------------------- ranges of blocks


def bind_filter(digest: str, Z: int) -> Callable[..., None]:
    """The filter over a range of series, for states of size Z."""
    size, low = state_size(Z), triangle(Z)

    def filter_range(
        system: Any,
        panel: Any,
        picks: Any,
        start: int,
        stop: int,
        tile: int,
        m: Any,
        w: Any,
        totals: Any,
        out: Any,
        mode: int,
    ) -> None:
        """Filter the series at places start..stop-1."""
        _ = digest
        T, D = panel.x.shape[1], panel.x.shape[2]
        s = local(size)
        b_step = Z if system.b.shape[1] > 1 else 0
        for first in range(start, stop, WIDTH):
            exact, steps = load_block(system, panel, picks, first, stop, m, w)
            begin(Z, s, at(m, w.lengths), at(m, w.m0), at(m, w.P0))
            begin_diffuse(Z, s, at(m, w.Pinf))
            for head in range(0, T, tile):
                end = min(head + tile, T)
                if head < steps:
                    load_tile(system, panel, picks, first, stop, head, min(end, steps), m, w)
                for t in range(head, min(end, steps)):
                    k = t - head
                    diffuse = is_diffuse(Z, s)
                    if t > 0:
                        predict(Z, s, at(m, w.F), at(m, w.Q), at(m, w.b + b_step * k))
                        if diffuse:
                            predict_factor(Z, s, at(m, w.F))
                    if mode == ALL:
                        keep(Z, s, at(m, w.pred_mean + k * Z), at(m, w.pred_cov + k * low))
                    for i in range(D):
                        o = k * D + i
                        h, var = at(m, w.H + i * Z), at(m, w.R + i)
                        y, seen, note = (
                            at(m, w.y + o),
                            at(m, w.seen + o),
                            at(m, w.note + o * N_NOTES),
                        )
                        if diffuse:
                            observe(Z, 1, 1, s, h, y, var, seen, note, at(m, w.K), at(m, w.K1))
                        elif exact:
                            observe(Z, 1, 0, s, h, y, var, seen, note, at(m, w.K), at(m, w.K1))
                        else:
                            observe(Z, 0, 0, s, h, y, var, seen, note, at(m, w.K), at(m, w.K1))
                    if mode == ALL:
                        keep(Z, s, at(m, w.mean + k * Z), at(m, w.cov + k * low))
                        keep_diffuse(Z, s, at(m, w.cov_inf + k * low))
                    elif mode == LAST:
                        keep_last(Z, s, at(m, w.mean), at(m, w.cov), at(m, w.cov_inf))
                if mode == ALL:
                    bring_all(m, w, picks, out, panel, first, stop, head, end)
            if mode == LAST:
                bring_moments(m, w, picks, out, panel, first, stop, 0, 1)
            keep_totals(Z, s, at(m, w.totals))
            bring_totals(m, w.totals, totals, panel.order, first, stop)

    return filter_range


def bind_smoother(digest: str, Z: int) -> Callable[..., None]:
    """The filter and smoother over a range of series, for states of size Z."""
    size, room, low, square = state_size(Z), back_size(Z), triangle(Z), Z * Z

    def smooth_range(
        system: Any,
        panel: Any,
        picks: Any,
        start: int,
        stop: int,
        m: Any,
        w: Any,
        totals: Any,
        out: Any,
        pairs: Any,
    ) -> None:
        """Smooth the series at places start..stop-1."""
        _ = digest
        T, D = panel.x.shape[1], panel.x.shape[2]
        s, back = local(size), local(room)
        b_step = Z if system.b.shape[1] > 1 else 0
        for first in range(start, stop, WIDTH):
            exact, steps = load_block(system, panel, picks, first, stop, m, w)
            begin(Z, s, at(m, w.lengths), at(m, w.m0), at(m, w.P0))
            begin_diffuse(Z, s, at(m, w.Pinf))
            load_tile(system, panel, picks, first, stop, 0, steps, m, w)
            inf_steps = 0
            for t in range(steps):
                diffuse = is_diffuse(Z, s)
                if t > 0:
                    predict(Z, s, at(m, w.F), at(m, w.Q), at(m, w.b + b_step * t))
                    if diffuse:
                        predict_factor(Z, s, at(m, w.F))
                for i in range(D):
                    o = t * D + i
                    h, var = at(m, w.H + i * Z), at(m, w.R + i)
                    y, seen, note = at(m, w.y + o), at(m, w.seen + o), at(m, w.note + o * N_NOTES)
                    K, K1 = at(m, w.K + o * Z), at(m, w.K1 + o * Z)
                    if diffuse:
                        observe(Z, 1, 1, s, h, y, var, seen, note, K, K1)
                    elif exact:
                        observe(Z, 1, 0, s, h, y, var, seen, note, K, K1)
                    else:
                        observe(Z, 0, 0, s, h, y, var, seen, note, K, K1)
                keep(Z, s, at(m, w.mean + t * Z), at(m, w.cov + t * low))
                if diffuse:
                    keep_diffuse(Z, s, at(m, w.cov_inf + t * low))
                    inf_steps = t + 1
            keep_totals(Z, s, at(m, w.totals))
            begin_back(Z, back)
            for t in range(steps - 1, -1, -1):
                # The 1/kappa terms start at the last step that is diffuse or ceases to be.
                diffuse = t < inf_steps
                mean, cov = at(m, w.mean + t * Z), at(m, w.cov + t * low)
                inf, pair = at(m, w.cov_inf + t * low), at(m, w.pairs + t * square)
                if diffuse:
                    if t + 1 < steps:
                        pull_transition(Z, 1, back, at(m, w.F))
                    smooth(Z, 1, back, mean, cov, inf)
                    if pairs.shape[0] > 0:
                        smooth_pair(Z, 1, back, at(m, w.F), at(m, w.Q), inf, cov, pair)
                else:
                    if t + 1 < steps:
                        pull_transition(Z, 0, back, at(m, w.F))
                    smooth(Z, 0, back, mean, cov, inf)
                    if pairs.shape[0] > 0:
                        smooth_pair(Z, 0, back, at(m, w.F), at(m, w.Q), inf, cov, pair)
                for i in range(D - 1, -1, -1):
                    o, h = t * D + i, at(m, w.H + i * Z)
                    note, K = at(m, w.note + o * N_NOTES), at(m, w.K + o * Z)
                    if diffuse:
                        pull_diffuse(Z, back, h, K, at(m, w.K1 + o * Z), note)
                    else:
                        pull(Z, back, h, K, note)
            bring_moments(m, w, picks, out, panel, first, stop, 0, T)
            if pairs.shape[0] > 0:
                ends, plain, order = panel.ends, picks.plain, panel.order
                bring(m, w.pairs, square, plain, pairs, ends, 1, order, first, stop, 0, T - 1)
            bring_totals(m, w.totals, totals, panel.order, first, stop)

    return smooth_range
