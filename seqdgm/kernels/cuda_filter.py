"""Forward pass of the Kalman filter over a block of series, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from seqdgm.kernels.cuda_steps import (
    ALL,
    END,
    clean,
    count,
    keep_observation,
    load_matrix,
    load_vector,
    observe,
    predict,
    product_nt,
    store_matrix,
    store_vector,
)


@triton.jit
def forward_step(
    t: tl.tensor,
    moments: tl.tuple,
    diffuse: tl.tuple,
    totals: tl.tuple,
    length: tl.tensor,
    n: tl.tensor,
    system: tl.tuple,
    by_series: tl.tuple,
    by_step: tl.tuple,
    data: tl.tuple,
    out: tl.tuple,
    gains: tl.tuple,
    size: tl.tuple,
    row: tl.tensor,
    col: tl.tensor,
    MODE: tl.constexpr,
    EXACT: tl.constexpr,
    DIFFUSE: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple, tl.tuple]:
    """One step: predict, take the elements of the observation one by one, store."""
    active = t < length
    place = (system, by_series, by_step, n, size, row, col)
    moments, diffuse = predict(t, moments, diffuse, length, *place, DIFFUSE)
    at = n * size.steps + t
    if MODE == ALL:
        store_vector(out.pred_mean + at * size.state, moments[0], size.state, row, active)
        pred_cov = out.pred_cov + at * size.state * size.state
        store_matrix(pred_cov, moments[1], size.state, row, col, active)
    h_base = system.H + n * by_series.H + t * by_step.H
    var_base = system.var + n * by_series.var + t * by_step.var
    d_base = system.d + n * by_series.d + t * by_step.d
    for i in range(size.obs):
        x_at = at * size.obs + i
        seen = active & (tl.load(data.mask + x_at) != 0)
        h = load_vector(h_base + i * size.state, size.state, row)
        hr = load_vector(h_base + i * size.state, size.state, col)
        y = tl.load(data.x + x_at, mask=seen, other=0.0) - tl.load(d_base + i)
        var = tl.load(var_base + i)
        moments, diffuse, result = observe(
            moments, diffuse, h, hr, y, var, seen, row, col, EXACT, DIFFUSE
        )
        totals = count(totals, result)
        keep_observation(result, x_at, seen, active, out, gains, size.state, row, MODE, DIFFUSE)
    moments = (moments[0], clean(moments[1], row == col))
    if MODE != END:
        keep_moments(at, moments, diffuse, active, out, size.state, row, col, DIFFUSE)
    return moments, diffuse, totals


@triton.jit
def keep_moments(
    at: tl.tensor,
    moments: tl.tuple,
    diffuse: tl.tuple,
    wanted: tl.tensor,
    out: tl.tuple,
    state: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    DIFFUSE: tl.constexpr,
) -> None:
    """Write the moments of a step, the finite ones and, of a diffuse one, their diffuse part."""
    a, P = moments
    store_vector(out.mean + at * state, a, state, row, wanted)
    store_matrix(out.cov + at * state * state, P, state, row, col, wanted)
    if DIFFUSE:
        A, _ = diffuse
        base = out.cov_inf + at * state * state
        store_matrix(base, product_nt(A, A), state, row, col, wanted)


@triton.jit
def filter_kernel(
    system: tl.tuple,
    by_series: tl.tuple,
    by_step: tl.tuple,
    data: tl.tuple,
    carry: tl.tuple,
    out: tl.tuple,
    gains: tl.tuple,
    size: tl.tuple,
    B: tl.constexpr,
    S: tl.constexpr,
    MODE: tl.constexpr,
    EXACT: tl.constexpr,
    DIFFUSE: tl.constexpr,
) -> None:
    """Filter the series of a block; `S` is the length of the state, padded.

    `EXACT` says that some error variances are zero. With `DIFFUSE` the kernel begins at the first
    step and stops once all series are proper, else it begins where that has stopped and runs to the
    end.
    """
    block = tl.program_id(0).to(tl.int64)
    row, col = tl.arange(0, S)[None, :, None], tl.arange(0, S)[None, None, :]
    n = block * B + tl.arange(0, B)[:, None, None]
    inside = n < size.series
    n = tl.minimum(n, size.series - 1)
    length = tl.where(inside, tl.load(data.lengths + n), 0)
    longest = tl.max(length)
    squares = n * size.state * size.state
    a = load_vector(carry.mean + n * size.state, size.state, row)
    P = load_matrix(carry.cov + squares, size.state, row, col, inside)
    moments, totals, t = (a, P), load_totals(carry.totals + n, size.series), block * 0
    fixed = (length, n, system, by_series, by_step, data, out, gains, size, row, col)
    if DIFFUSE:
        A = load_matrix(carry.factor + squares, size.state, row, col, inside)
        rank = tl.load(carry.totals + 4 * size.series + n).to(tl.int32)
        while (t < longest) & (tl.max(tl.where(t < length, rank, 0)) > 0):
            moments, (A, rank), totals = forward_step(
                t, moments, (A, rank), totals, *fixed, MODE, EXACT, True
            )
            t += 1
        store_matrix(carry.factor + squares, A, size.state, row, col, inside)
        tl.store(carry.totals + 4 * size.series + n, rank.to(tl.float64), mask=inside)
        tl.store(carry.steps + block, t)
    else:
        t = tl.load(carry.steps + block)
        while t < longest:
            moments, _, totals = forward_step(t, moments, (), totals, *fixed, MODE, EXACT, False)
            t += 1
    store_vector(carry.mean + n * size.state, moments[0], size.state, row, inside)
    store_matrix(carry.cov + squares, moments[1], size.state, row, col, inside)
    store_totals(carry.totals + n, totals, size.series, inside)


@triton.jit
def load_totals(base: tl.tensor, series: tl.tensor) -> tl.tuple:
    """Totals of the steps before."""
    n_obs, n_diffuse = tl.load(base), tl.load(base + 3 * series)
    logdet, quad = tl.load(base + series), tl.load(base + 2 * series)
    return n_obs.to(tl.int32), logdet, quad, n_diffuse.to(tl.int32)


@triton.jit
def store_totals(base: tl.tensor, totals: tl.tuple, series: tl.tensor, wanted: tl.tensor) -> None:
    """Write the totals."""
    n_obs, logdet, quad, n_diffuse = totals
    tl.store(base, n_obs.to(tl.float64), mask=wanted)
    tl.store(base + series, logdet, mask=wanted)
    tl.store(base + 2 * series, quad, mask=wanted)
    tl.store(base + 3 * series, n_diffuse.to(tl.float64), mask=wanted)
