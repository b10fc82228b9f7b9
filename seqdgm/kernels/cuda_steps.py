"""Kalman filter and smoother in Triton: a program works on a block of series, step after step.

Everything is a tile (series, rows, columns) with the state padded by zeros to a power of two, so
that a matrix, a column and a row meet by broadcasting; products are sums over broadcast axes. What
is decided for one series of a block (missing, diffuse, redundant, ended) is a mask.

A forward pass takes two launches where the start is diffuse: one for the first steps, until every
series of a block is proper, and one for the others, which carries no diffuse part and keeps its
registers for more series. The backward pass takes the same two in turn. The equations, decisions
and tolerances are those of `seqdgm.kernels.reference`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from seqdgm.kernels import types

ROUNDING = tl.constexpr(types.ROUNDING)
DIFFUSE_TOLERANCE = tl.constexpr(types.DIFFUSE)
DIFFUSE_SCALE = tl.constexpr(types.DIFFUSE_SCALE)
CONFLICT = tl.constexpr(types.CONFLICT)
CONFLICT_SPREAD = tl.constexpr(5.0 * math.sqrt(types.ROUNDING))

END = tl.constexpr(0)  # what a forward pass keeps: the end, all moments, or the gains as well
ALL = tl.constexpr(1)
SMOOTH = tl.constexpr(2)
SKIPPED = tl.constexpr(0)  # what became of an observation
ORDINARY = tl.constexpr(1)
DIFFUSED = tl.constexpr(2)


class Matrices(NamedTuple):
    """Fields of a system, `var` for the diagonal R, or how far apart their entries lie.

    The distance is counted in elements, between two series or between two steps; it is 0 where a
    field is shared.
    """

    F: Any
    Q: Any
    H: Any
    var: Any
    b: Any
    d: Any


class Size(NamedTuple):
    """Lengths of the axes."""

    series: int
    steps: int
    state: int
    obs: int


class Data(NamedTuple):
    """The panel: x (series, time, obs), its mask as bytes, and the lengths."""

    x: Any
    mask: Any
    lengths: Any


class Carry(NamedTuple):
    """Where the forward pass stands: read at the start of a launch, written at its end."""

    mean: Any  # (series, state)
    cov: Any  # (series, state, state)
    factor: Any  # A, where something is diffuse (series, state, state)
    totals: Any  # n_obs, logdet, quad, n_diffuse, diffuse rank (5, series)
    steps: Any  # int64, steps that the launch of the diffuse start has done (blocks,)


class Histories(NamedTuple):
    """What a forward pass keeps of each step; unused ones have no elements."""

    mean: Any  # (series, time, state)
    cov: Any  # (series, time, state, state)
    cov_inf: Any  # (series, time, state, state)
    pred_mean: Any  # (series, time, state)
    pred_cov: Any  # (series, time, state, state)
    innovations: Any  # (series, time, obs)
    innov_var: Any  # (series, time, obs)


class Gains(NamedTuple):
    """What the backward pass reads besides the filtered moments; unused ones have no elements."""

    K: Any  # gains (series, time, obs, state)
    K1: Any  # their 1/kappa part (series, time, obs, state)
    note: Any  # kind, v, f, f_inf of each observation (series, time, obs, 4)


class Moments(NamedTuple):
    """What the backward pass writes; `lag_one` has no elements where it is not wanted."""

    mean: Any  # (series, time, state)
    cov: Any  # (series, time, state, state)
    lag_one: Any  # (series, time - 1, state, state)


class Back(NamedTuple):
    """Where the backward pass stands after the proper steps."""

    r: Any  # (series, state)
    N: Any  # (series, state, state)
    steps: Any  # as in `Carry`


# ---------------------------------------------------------------- tiles


@triton.jit
def load_vector(base: tl.tensor, length: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Vector at the addresses `base` of the series, along the axis of `index`."""
    return tl.load(base + index, mask=index < length, other=0.0)


@triton.jit
def load_matrix(
    base: tl.tensor, size: tl.tensor, row: tl.tensor, col: tl.tensor, wanted: tl.tensor
) -> tl.tensor:
    """Square matrix at the addresses `base`; zero where it is not wanted."""
    inside = wanted & (row < size) & (col < size)
    return tl.load(base + row * size + col, mask=inside, other=0.0)


@triton.jit
def store_vector(
    base: tl.tensor, value: tl.tensor, length: tl.tensor, index: tl.tensor, wanted: tl.tensor
) -> None:
    """Write a vector for the series that want it."""
    tl.store(base + index, value, mask=wanted & (index < length))


@triton.jit
def store_matrix(
    base: tl.tensor,
    value: tl.tensor,
    size: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    wanted: tl.tensor,
) -> None:
    """Write a square matrix for the series that want it."""
    tl.store(base + row * size + col, value, mask=wanted & (row < size) & (col < size))


@triton.jit
def product(X: tl.tensor, Y: tl.tensor) -> tl.tensor:
    """X Y."""
    return tl.sum(X[:, :, :, None] * Y[:, None, :, :], axis=2)


@triton.jit
def product_nt(X: tl.tensor, Y: tl.tensor) -> tl.tensor:
    """X Y'."""
    return tl.sum(X[:, :, None, :] * Y[:, None, :, :], axis=3)


@triton.jit
def product_tn(X: tl.tensor, Y: tl.tensor) -> tl.tensor:
    """X' Y."""
    return tl.sum(X[:, :, :, None] * Y[:, :, None, :], axis=1)


@triton.jit
def across(X: tl.tensor) -> tl.tensor:
    """Sum over the columns."""
    return tl.sum(X, axis=2, keep_dims=True)


@triton.jit
def down(X: tl.tensor) -> tl.tensor:
    """Sum over the rows."""
    return tl.sum(X, axis=1, keep_dims=True)


@triton.jit
def flip(x: tl.tensor) -> tl.tensor:
    """Transpose."""
    return tl.permute(x, (0, 2, 1))


@triton.jit
def clean(P: tl.tensor, eye: tl.tensor) -> tl.tensor:
    """Make P symmetric; zero the row and column of a variance that rounding took below zero."""
    P = 0.5 * (P + flip(P))
    variances = tl.where(eye, P, 0.0)
    return tl.where((across(variances) < 0.0) | (down(variances) < 0.0), 0.0, P)


# ---------------------------------------------------------------- diffuse factor, Pinf = A A'


@triton.jit
def amplitudes(A: tl.tensor) -> tl.tensor:
    """Size of each row, no less than a fraction of the largest."""
    norms = tl.sqrt(across(A * A))
    return norms + DIFFUSE_SCALE * tl.max(norms, axis=1, keep_dims=True)


@triton.jit
def drop_rows(A: tl.tensor, bound: tl.tensor, rank: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Zero the rows that have cancelled to rounding error of their terms."""
    squares, least = across(A * A), DIFFUSE_TOLERANCE * bound
    kept = squares > least * least
    rank = tl.where(down(kept.to(tl.int32)) > 0, rank, 0)
    return tl.where(kept & (rank > 0), A, 0.0), rank


# ---------------------------------------------------------------- forward


@triton.jit
def predict(
    t: tl.tensor,
    moments: tl.tuple,
    diffuse: tl.tuple,
    length: tl.tensor,
    system: tl.tuple,
    by_series: tl.tuple,
    by_step: tl.tuple,
    n: tl.tensor,
    size: tl.tuple,
    row: tl.tensor,
    col: tl.tensor,
    DIFFUSE: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """Move the active series to step t, unless it is the first."""
    a, P = moments
    moves = tl.minimum(t, length - t) > 0
    F = load_matrix(system.F + n * by_series.F + t * by_step.F, size.state, row, col, moves)
    Q = load_matrix(system.Q + n * by_series.Q + t * by_step.Q, size.state, row, col, moves)
    b = load_vector(system.b + n * by_series.b + t * by_step.b, size.state, row)
    a = tl.where(moves, across(F * flip(a)) + b, a)
    P = tl.where(moves, clean(product_nt(product(F, P), F) + Q, row == col), P)
    if DIFFUSE:
        A, rank = diffuse
        bound = across(tl.abs(F) * flip(amplitudes(A)))
        moved, left = drop_rows(product(F, A), bound, rank)
        diffuse = (tl.where(moves, moved, A), tl.where(moves, left, rank))
    return (a, P), diffuse


@triton.jit
def observe(
    moments: tl.tuple,
    diffuse: tl.tuple,
    h: tl.tensor,
    hr: tl.tensor,
    y: tl.tensor,
    var: tl.tensor,
    seen: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    EXACT: tl.constexpr,
    DIFFUSE: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple, tl.tuple]:
    """Update with one observation where it is seen; `h` is a column, `hr` the same as a row.

    Returns the moments, the diffuse part, and of the observation its kind, v, f, f_inf, K, K1 and
    whether it contradicts what is known.
    """
    a, P = moments
    M, Mr = across(P * hr), down(P * h)
    v, signal = y - down(h * a), down(h * M)
    floor = tl.zeros_like(v)
    spread = tl.zeros_like(v)
    if EXACT:
        deviations = tl.sqrt(tl.maximum(across(tl.where(row == col, P, 0.0)), 0.0))
        spread = down(tl.abs(h) * deviations)
        floor = tl.where(var > 0.0, 0.0, ROUNDING * spread * spread)
    f = tl.where(signal <= floor, 0.0, signal) + var
    ordinary = seen & (f != 0.0)
    diffused = tl.zeros(seen.shape, tl.int1)
    scale = tl.where(ordinary, 1.0 / tl.where(ordinary, f, 1.0), 0.0)
    K, Kr = M * scale, Mr * scale
    f_inf, K1 = tl.full(f.shape, 1.0, tl.float64), tl.zeros_like(M)
    if DIFFUSE:
        A, rank = diffuse
        g, size = down(A * h), amplitudes(A)
        f_inf = across(g * g)
        bound = down(tl.abs(h) * size)
        least = DIFFUSE_TOLERANCE * bound
        diffused = seen & (rank > 0) & (f_inf > least * least)
        ordinary = ordinary & ~diffused
        f_inf = tl.where(diffused, f_inf, 1.0)
        scale = tl.where(diffused, 1.0 / f_inf, 0.0)
        K = tl.where(diffused, across(A * g) * scale, K)
        Kr = tl.where(diffused, flip(K), Kr)
        K1 = (M - K * f) * scale
        left, bound = A - tl.where(diffused, K, 0.0) * g, tl.where(diffused, size, 0.0)
        diffuse = drop_rows(left, bound, rank - diffused.to(tl.int32))
    used = ordinary | diffused
    conflict = seen & ~used
    if EXACT:
        reach = CONFLICT * (tl.abs(y) + down(tl.abs(h * a))) + CONFLICT_SPREAD * spread
        conflict = conflict & (tl.abs(v) > reach)
    P = tl.where(used, update_cov(P, h, M, K, Kr, var, f, row == col, EXACT), P)
    a = tl.where(used, a + K * v, a)
    kind = tl.where(diffused, DIFFUSED, tl.where(ordinary, ORDINARY, SKIPPED))
    return (a, P), diffuse, (kind, v, f, f_inf, K, K1, conflict)


@triton.jit
def update_cov(
    P: tl.tensor,
    h: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    Kr: tl.tensor,
    var: tl.tensor,
    f: tl.tensor,
    eye: tl.tensor,
    EXACT: tl.constexpr,
) -> tl.tensor:
    """Joseph's form, P <- (I - K h') P (I - K h')' + K var K'; zero what is known exactly."""
    W = P - M * Kr
    new = W - K * (down(W * h) - var * Kr)
    if EXACT:
        before, after = tl.where(eye, P, 0.0), tl.where(eye, new, 0.0)
        rounding = tl.where(var > 0.0, 0.0, ROUNDING)
        known = across(after) <= rounding * (across(before) + K * K * f)
        known_r = down(after) <= rounding * (down(before) + Kr * Kr * f)
        new = tl.where(known | known_r, 0.0, new)
    return new


@triton.jit
def count(totals: tl.tuple, result: tl.tuple) -> tl.tuple:
    """Add one observation to the totals of its series."""
    n_obs, logdet, quad, n_diffuse = totals
    kind, v, f, f_inf, _, _, conflict = result
    ordinary = kind == ORDINARY
    f = tl.where(ordinary, f, 1.0)
    quad += tl.where(ordinary, v * v / f, 0.0)
    return (
        n_obs + ordinary.to(tl.int32),
        logdet + tl.log(f * f_inf),
        tl.where(conflict, float("inf"), quad),
        n_diffuse + (kind == DIFFUSED).to(tl.int32),
    )


@triton.jit
def keep_observation(
    result: tl.tuple,
    at: tl.tensor,
    seen: tl.tensor,
    active: tl.tensor,
    out: tl.tuple,
    gains: tl.tuple,
    state: tl.tensor,
    row: tl.tensor,
    MODE: tl.constexpr,
    DIFFUSE: tl.constexpr,
) -> None:
    """Keep an observation, number `at` of the panel, as far as `MODE` asks for it."""
    kind, v, f, f_inf, K, K1, _ = result
    if MODE == ALL:
        tl.store(out.innovations + at, v, mask=seen)
        tl.store(out.innov_var + at, tl.where(kind == DIFFUSED, float("inf"), f), mask=seen)
    if MODE == SMOOTH:
        store_vector(gains.K + at * state, K, state, row, active)
        if DIFFUSE:
            store_vector(gains.K1 + at * state, K1, state, row, active)
        tl.store(gains.note + 4 * at, kind.to(tl.float64), mask=active)
        tl.store(gains.note + 4 * at + 1, v, mask=active)
        tl.store(gains.note + 4 * at + 2, f, mask=active)
        tl.store(gains.note + 4 * at + 3, f_inf, mask=active)
