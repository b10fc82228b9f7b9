r"""Backward pass of the fixed-interval smoother over a block of series, in Triton.

The recursion of `seqdgm.kernels.cpu_smoother`: :math:`(r, N)` relative to the state after a step,
with their expansions in :math:`1 / \kappa` on diffuse steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqdgm.kernels.cuda_steps import (
    DIFFUSED,
    ORDINARY,
    across,
    clean,
    down,
    flip,
    load_matrix,
    load_vector,
    product,
    product_tn,
    store_matrix,
    store_vector,
)


@triton.jit
def symmetric(N: tl.tensor) -> tl.tensor:
    """Mean of a matrix and its transpose."""
    return 0.5 * (N + flip(N))


@triton.jit
def sides(N: tl.tensor, h: tl.tensor, hr: tl.tensor, c: tl.tensor, s: tl.tensor) -> tl.tensor:
    """N - c h' - h c' + s h h'."""
    left = 0.5 * s * h - c
    return N + left * hr + h * flip(left)


@triton.jit
def pull_ordinary(
    r: tl.tensor,
    N: tl.tensor,
    h: tl.tensor,
    hr: tl.tensor,
    K: tl.tensor,
    Kr: tl.tensor,
    v: tl.tensor,
    weight: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Pull (r, N) back through an observation of precision `weight`, 0 where there is none."""
    NK = across(N * Kr)
    N = sides(N, h, hr, NK, down(K * NK) + weight)
    return r + (v * weight - down(K * r)) * h, N


@triton.jit
def pull_diffuse(
    r: tl.tuple,
    N: tl.tuple,
    h: tl.tensor,
    hr: tl.tensor,
    K: tl.tensor,
    Kr: tl.tensor,
    K1: tl.tensor,
    note: tl.tuple,
) -> tuple[tl.tuple, tl.tuple]:
    """Pull (r, N) back power by power of 1/kappa, through an observation of any kind."""
    r0, r1 = r
    N0, N1, N2 = N
    v, f, one, inf = note
    K1r = flip(K1)
    NK0, NK1, NK2 = across(N0 * Kr), across(N1 * Kr), across(N2 * Kr)
    NL0, NL1 = across(N0 * K1r), across(N1 * K1r)
    s0 = down(K * NK0) + one
    s1 = down(K * NK1) + 2.0 * down(K1 * NK0) + inf
    s2 = down(K * NK2) + 2.0 * down(K1 * NK1) + down(K1 * NL0) - f * inf * inf
    step0 = v * one - down(K * r0)
    step1 = v * inf - down(K * r1) - down(K1 * r0)
    N0, N1 = sides(N0, h, hr, NK0, s0), sides(N1, h, hr, NK1 + NL0, s1)
    return (r0 + step0 * h, r1 + step1 * h), (N0, N1, sides(N2, h, hr, NK2 + NL1, s2))


@triton.jit
def pull_observations(
    t: tl.tensor,
    r: tl.tuple,
    N: tl.tuple,
    active: tl.tensor,
    n: tl.tensor,
    system: tl.tuple,
    by_series: tl.tuple,
    by_step: tl.tuple,
    gains: tl.tuple,
    size: tl.tuple,
    row: tl.tensor,
    col: tl.tensor,
    DIFFUSE: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """Pull (r, N) back through the elements of an observation, the last one first."""
    h_base = system.H + n * by_series.H + t * by_step.H
    for k in range(size.obs):
        i = size.obs - 1 - k
        at = (n * size.steps + t) * size.obs + i
        kind = tl.load(gains.note + 4 * at, mask=active, other=0.0)
        ordinary = active & (kind == ORDINARY)
        diffused = active & (kind == DIFFUSED)
        v = tl.load(gains.note + 4 * at + 1, mask=ordinary | diffused, other=0.0)
        f = tl.load(gains.note + 4 * at + 2, mask=ordinary | diffused, other=1.0)
        h = load_vector(h_base + i * size.state, size.state, row)
        hr = load_vector(h_base + i * size.state, size.state, col)
        K_base = gains.K + at * size.state
        K = tl.load(K_base + row, mask=active & (row < size.state), other=0.0)
        Kr = tl.load(K_base + col, mask=active & (col < size.state), other=0.0)
        one = tl.where(ordinary, 1.0 / tl.where(ordinary, f, 1.0), 0.0)
        if DIFFUSE:
            f_inf = tl.load(gains.note + 4 * at + 3, mask=diffused, other=1.0)
            inside = active & (row < size.state)
            K1 = tl.load(gains.K1 + at * size.state + row, mask=inside, other=0.0)
            note = (v, f, one, tl.where(diffused, 1.0 / f_inf, 0.0))
            r, N = pull_diffuse(r, N, h, hr, K, Kr, K1, note)
        else:
            r0, N0 = pull_ordinary(r[0], N[0], h, hr, K, Kr, v, one)
            r, N = (r0,), (N0,)
    return r, N


@triton.jit
def backward_step(
    t: tl.tensor,
    r: tl.tuple,
    N: tl.tuple,
    length: tl.tensor,
    n: tl.tensor,
    system: tl.tuple,
    by_series: tl.tuple,
    by_step: tl.tuple,
    filtered: tl.tuple,
    smoothed: tl.tuple,
    gains: tl.tuple,
    size: tl.tuple,
    row: tl.tensor,
    col: tl.tensor,
    LAG_ONE: tl.constexpr,
    DIFFUSE: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """One step: through the transition out of it, its smoothed moments, through its elements."""
    active = t < length
    follows = t + 1 < length
    F = load_matrix(system.F + n * by_series.F + (t + 1) * by_step.F, size.state, row, col, follows)
    at = n * size.steps + t
    squares = at * size.state * size.state
    P = load_matrix(filtered.cov + squares, size.state, row, col, active)
    inside = active & (row < size.state)
    mean = tl.load(filtered.mean + at * size.state + row, mask=inside, other=0.0)
    NF = product(N[0], F)
    N0, r0 = symmetric(product_tn(F, NF)), flip(down(F * r[0]))
    X = product(N0, P)
    NFP = product(NF, P)
    mean += across(P * flip(r0))
    V = P - product(P, X)
    if DIFFUSE:
        Pinf = load_matrix(filtered.cov_inf + squares, size.state, row, col, active)
        NF1 = product(N[1], F)
        N1, r1 = symmetric(product_tn(F, NF1)), flip(down(F * r[1]))
        N2 = symmetric(product_tn(F, product(N[2], F)))
        mean += across(Pinf * flip(r1))
        V -= product(P, product(N1, Pinf)) + product(Pinf, product(N1, P) + product(N2, Pinf))
        NFP += product(NF1, Pinf)
        r, N = (r0, r1), (N0, N1, N2)
    else:
        r, N = (r0,), (N0,)
    V = clean(V, row == col)
    store_vector(smoothed.mean + at * size.state, mean, size.state, row, active)
    store_matrix(smoothed.cov + squares, V, size.state, row, col, active)
    if LAG_ONE:
        Q = load_matrix(
            system.Q + n * by_series.Q + (t + 1) * by_step.Q, size.state, row, col, follows
        )
        lag = smoothed.lag_one + (at - n) * size.state * size.state
        store_matrix(lag, product(F, V) - product(Q, NFP), size.state, row, col, follows)
    place = (active, n, system, by_series, by_step, gains, size, row, col)
    return pull_observations(t, r, N, *place, DIFFUSE)


@triton.jit
def smoother_kernel(
    system: tl.tuple,
    by_series: tl.tuple,
    by_step: tl.tuple,
    data: tl.tuple,
    carry: tl.tuple,
    filtered: tl.tuple,
    smoothed: tl.tuple,
    gains: tl.tuple,
    size: tl.tuple,
    B: tl.constexpr,
    S: tl.constexpr,
    LAG_ONE: tl.constexpr,
    DIFFUSE: tl.constexpr,
) -> None:
    """Smooth the series of a block, last step first.

    Without `DIFFUSE` the kernel stops where the forward launch of the diffuse start did, and leaves
    (r, N) for a second launch, which goes on to the first step.
    """
    block = tl.program_id(0).to(tl.int64)
    row, col = tl.arange(0, S)[None, :, None], tl.arange(0, S)[None, None, :]
    n = block * B + tl.arange(0, B)[:, None, None]
    inside = n < size.series
    n = tl.minimum(n, size.series - 1)
    length = tl.where(inside, tl.load(data.lengths + n), 0)
    squares = n * size.state * size.state
    first = tl.load(carry.steps + block)
    fixed = (length, n, system, by_series, by_step, filtered, smoothed, gains, size, row, col)
    if DIFFUSE:
        r0 = load_vector(carry.r + n * size.state, size.state, row)
        N0 = load_matrix(carry.N + squares, size.state, row, col, inside)
        r, N = (r0, tl.zeros_like(r0)), (N0, tl.zeros_like(N0), tl.zeros_like(N0))
        t = first
        while t > 0:
            t -= 1
            r, N = backward_step(t, r, N, *fixed, LAG_ONE, True)
    else:
        r_only = (tl.zeros((B, S, 1), tl.float64),)
        N_only = (tl.zeros((B, S, S), tl.float64),)
        t = tl.max(length)
        while t > first:
            t -= 1
            r_only, N_only = backward_step(t, r_only, N_only, *fixed, LAG_ONE, False)
        store_vector(carry.r + n * size.state, r_only[0], size.state, row, inside)
        store_matrix(carry.N + squares, N_only[0], size.state, row, col, inside)
