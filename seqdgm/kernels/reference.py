r"""Gaussian kernels in torch: any device, differentiable, all series at once.

They spell out what the compiled kernels do, operation by operation, and take the same decisions
with the same tolerances. They are the yardstick, the way to derivatives by autograd, and what runs
on a device without kernels of its own; the Python loop over time makes them slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.types import (
    CONFLICT,
    DIFFUSE,
    DIFFUSE_SCALE,
    ROUNDING,
    Filtered,
    Smoothed,
    Store,
    System,
    check_arguments,
)


class _State(NamedTuple):
    """Moments of the state, with the diffuse covariance as a factor: Pinf = A A'."""

    a: Float[Tensor, "series state"]
    P: Float[Tensor, "series state state"]
    A: Float[Tensor, "series state factor"]
    rank: Int[Tensor, "series"]


class _Element(NamedTuple):
    """One scalar observation of a step: what came of it, and what the smoother needs."""

    seen: Bool[Tensor, "series"]
    ordinary: Bool[Tensor, "series"]
    diffuse: Bool[Tensor, "series"]
    conflict: Bool[Tensor, "series"]
    h: Float[Tensor, "series state"]
    K: Float[Tensor, "series state"]
    K1: Float[Tensor, "series state"]
    v: Float[Tensor, "series"]
    f: Float[Tensor, "series"]
    f_inf: Float[Tensor, "series"]


class _Step(NamedTuple):
    """The state before and after the observations of a step."""

    predicted: _State
    filtered: _State
    elements: list[_Element]


class _Totals(NamedTuple):
    """Sums over the observations of each series."""

    n_obs: Int[Tensor, "series"]
    logdet: Float[Tensor, "series"]
    quad: Float[Tensor, "series"]
    n_diffuse: Int[Tensor, "series"]


def kalman_filter(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    store: Store,
) -> Filtered:
    """Kalman filter in torch, as documented in `seqdgm.kernels.kalman_filter`."""
    check_arguments(system, x, mask, lengths)
    totals, kept = _zero(x), []
    step = _Step(_prior(system, len(x)), _prior(system, len(x)), [])
    for step in _forward(system, x, mask, lengths):
        totals = _add(totals, step.elements)
        if store == "all":
            kept.append(step)
    result = _result(totals, step.filtered.rank)
    diffuse = bool(system.Pinf.any())
    if store == "last":
        ends = (lengths > 0).long()
        return result._replace(
            mean=_history([step.filtered.a], ends),
            cov=_history([step.filtered.P], ends),
            cov_inf=_history([_square(step.filtered.A)], ends) if diffuse else None,
        )
    if store == "all":
        v, var = _innovations(kept)
        return result._replace(
            mean=_history([s.filtered.a for s in kept], lengths),
            cov=_history([s.filtered.P for s in kept], lengths),
            cov_inf=_history([_square(s.filtered.A) for s in kept], lengths) if diffuse else None,
            pred_mean=_history([s.predicted.a for s in kept], lengths),
            pred_cov=_history([s.predicted.P for s in kept], lengths),
            innovations=v,
            innov_var=var,
        )
    return result


def kalman_smoother(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    lag_one: bool,
) -> Smoothed:
    """Fixed-interval smoother in torch, as documented in `seqdgm.kernels.kalman_smoother`."""
    check_arguments(system, x, mask, lengths)
    steps = list(_forward(system, x, mask, lengths))
    totals = _zero(x)
    for step in steps:
        totals = _add(totals, step.elements)
    n, state = len(x), system.m0.shape[-1]
    r = [x.new_zeros(n, state) for _ in range(2)]
    N = [x.new_zeros(n, state, state) for _ in range(3)]
    means, covs, lags = [], [], []
    for t in reversed(range(len(steps))):
        P, Pinf = steps[t].filtered.P, _square(steps[t].filtered.A)
        F = None
        if t + 1 < len(steps):
            F, Q = _at(system.F, t + 1), _at(system.Q, t + 1)
            NF = [k @ F for k in N]
            N = [_symmetric(F.mT @ k) for k in NF]
            r = [_apply(F.mT, k) for k in r]
        mean = steps[t].filtered.a + _apply(P, r[0]) + _apply(Pinf, r[1])
        cov = P - P @ (N[0] @ P + N[1] @ Pinf) - Pinf @ (N[1] @ P + N[2] @ Pinf)
        cov = _clean(cov)
        means.append(mean)
        covs.append(cov)
        if lag_one and F is not None:
            lags.append(F @ cov - Q @ (NF[0] @ P + NF[1] @ Pinf))
        for element in reversed(steps[t].elements):
            r, N = _pull(r, N, element)
    result = _result(totals, steps[-1].filtered.rank)
    covariances = x.new_zeros(n, 0, state, state)
    if lags:
        covariances = _history(lags[::-1], lengths - 1)
    return Smoothed(
        result.loglik,
        _history(means[::-1], lengths),
        _history(covs[::-1], lengths),
        covariances if lag_one else None,
        result.rank_left,
    )


def _forward(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
) -> Iterator[_Step]:
    """Filter step by step; a series that has ended keeps its last state."""
    state = _prior(system, len(x))
    for t in range(x.shape[1]):
        active = lengths > t
        if t > 0:
            state = _choose(active, _predict(state, system, t), state)
        predicted, elements = state, []
        seen = mask[:, t] & active[:, None]
        h, y, var = _decorrelate(system, x[:, t], seen, t)
        for i in range(x.shape[2]):
            state, element = _observe(state, h[:, i], y[:, i], var[:, i], seen[:, i])
            elements.append(element)
        state = state._replace(P=_clean(state.P))
        yield _Step(predicted, state, elements)


def _prior(system: System, n: int) -> _State:
    m0, P0 = system.m0.expand(n, -1), system.P0.expand(n, -1, -1)
    if not bool(system.Pinf.any()):
        none = torch.zeros(n, dtype=torch.int64, device=m0.device)
        return _State(m0, P0, P0[:, :, :0], none)
    A = _semidefinite_root(system.Pinf)
    rank = (A != 0).any(1).sum(1)
    return _State(m0, P0, A.expand(n, -1, -1), rank.expand(n))


def _semidefinite_root(
    S: Float[Tensor, "batch dim dim"],
) -> Float[Tensor, "batch dim dim"]:
    """Cholesky factor of a semi-definite matrix; a zero pivot leaves a zero column."""
    L, var = _factorise(S)
    return L * var.sqrt()[:, None, :]


def _factorise(
    S: Float[Tensor, "batch dim dim"],
) -> tuple[Float[Tensor, "batch dim dim"], Float[Tensor, "batch dim"]]:
    """S = L diag(var) L' with L unit lower triangular; a zero pivot has a zero column."""
    dim = S.shape[-1]
    scale = torch.diagonal(S, dim1=1, dim2=2)
    eye = torch.eye(dim, dtype=S.dtype, device=S.device)
    below = torch.ones_like(eye).tril(-1)
    columns, pivots = [], []
    for j in range(dim):
        used = S[:, j, j] > ROUNDING * scale[:, j]
        pivot = torch.where(used, S[:, j, j], 0.0)
        column = torch.where(used[:, None], S[:, :, j], 0.0) / _safe(pivot)[:, None]
        column = eye[:, j] + column * below[:, j]
        S = S - column[:, :, None] * column[:, None, :] * pivot[:, None, None]
        columns.append(column)
        pivots.append(pivot)
    return torch.stack(columns, 2), torch.stack(pivots, 1)


def _decorrelate(
    system: System, x: Float[Tensor, "series obs"], seen: Bool[Tensor, "series obs"], t: int
) -> tuple[
    Float[Tensor, "series obs state"], Float[Tensor, "series obs"], Float[Tensor, "series obs"]
]:
    """Observed elements in a basis where their errors are independent, L^-1 H and L^-1 (x - d)."""
    n = len(x)
    y = torch.where(seen, x - _at(system.d, t), 0.0)
    h = _at(system.H, t).expand(n, -1, -1)
    R = torch.where(seen[:, :, None] & seen[:, None, :], _at(system.R, t), 0.0)
    var = torch.diagonal(R, dim1=1, dim2=2)
    if not bool((R - torch.diag_embed(var)).any()):
        return h, y, var
    L, var = _factorise(R)
    both = torch.cat([torch.where(seen[:, :, None], h, 0.0), y[:, :, None]], 2)
    both = torch.linalg.solve_triangular(L, both, upper=False, unitriangular=True)
    return both[:, :, :-1], both[:, :, -1], var


def _predict(state: _State, system: System, t: int) -> _State:
    """Move the state to step t; rows of the diffuse factor that cancel to rounding become zero."""
    F = _at(system.F, t)
    P = _clean(F @ state.P @ F.mT + _at(system.Q, t))
    A = F @ state.A
    bound = _apply(F.abs(), _amplitudes(state.A))
    A, rank = _drop_rows(A, bound, state.rank)
    return _State(_apply(F, state.a) + _at(system.b, t), P, A, rank)


def _observe(
    state: _State,
    h: Float[Tensor, "series state"],
    y: Float[Tensor, "series"],
    var: Float[Tensor, "series"],
    seen: Bool[Tensor, "series"],
) -> tuple[_State, _Element]:
    """Update the state with one observation where it is seen."""
    a, P, A, rank = state
    M = _apply(P, h)
    v = y - (h * a).sum(1)
    signal = (h * M).sum(1)
    with torch.no_grad():
        spread = (h.abs() * torch.diagonal(P, dim1=1, dim2=2).clamp_min(0.0).sqrt()).sum(1)
        floor = torch.where(var > 0, 0.0, ROUNDING * spread**2)
    f = torch.where(signal <= floor, 0.0, signal) + var
    g = _apply(A.mT, h)
    f_inf = (g * g).sum(1)
    bound = (h.abs() * _amplitudes(A)).sum(1)
    diffuse = seen & (rank > 0) & (f_inf.sqrt() > DIFFUSE * bound)
    ordinary = seen & ~diffuse & (f != 0)
    size = y.abs() + (h * a).abs().sum(1)
    conflict = v.abs() > CONFLICT * size + 5.0 * math.sqrt(ROUNDING) * spread
    f, f_inf = torch.where(seen, f, 1.0), torch.where(diffuse, f_inf, 1.0)
    K = torch.where(ordinary[:, None], M / _safe(f)[:, None], 0.0)
    K = torch.where(diffuse[:, None], _apply(A, g) / f_inf[:, None], K)
    K1 = torch.where(diffuse[:, None], (M - K * f[:, None]) / f_inf[:, None], 0.0)
    element = _Element(
        seen, ordinary, diffuse, seen & ~diffuse & ~ordinary & conflict, h, K, K1, v, f, f_inf
    )
    P = _update_cov(P, M, element, var)
    bound = torch.where(diffuse[:, None], _amplitudes(A), 0.0)
    A = torch.where(diffuse[:, None, None], A - K[:, :, None] * g[:, None, :], A)
    A, rank = _drop_rows(A, bound, rank - diffuse.long())
    return _State(a + K * v[:, None], P, A, rank), element


def _update_cov(
    P: Float[Tensor, "series state state"],
    M: Float[Tensor, "series state"],
    e: _Element,
    var: Float[Tensor, "series"],
) -> Float[Tensor, "series state state"]:
    """Joseph's form, P <- (I - K h') P (I - K h')' + K var K'; zero what is known exactly."""
    W = P - M[:, :, None] * e.K[:, None, :]
    u = _apply(W.mT, e.h) - var[:, None] * e.K
    new = W - e.K[:, :, None] * u[:, None, :]
    with torch.no_grad():
        terms = torch.diagonal(P, dim1=1, dim2=2) + e.K**2 * e.f[:, None]
        floor = torch.where(var > 0, 0.0, ROUNDING)[:, None] * terms
        known = torch.diagonal(new, dim1=1, dim2=2) <= floor
    new = torch.where(known[:, :, None] | known[:, None, :], 0.0, new)
    return torch.where((e.ordinary | e.diffuse)[:, None, None], new, P)


def _amplitudes(A: Float[Tensor, "series state factor"]) -> Float[Tensor, "series state"]:
    """Size of each row of a diffuse factor, no less than a fraction of the largest."""
    norms = A.norm(dim=2)
    return norms + DIFFUSE_SCALE * norms.amax(1, keepdim=True)


def _drop_rows(
    A: Float[Tensor, "series state factor"],
    bound: Float[Tensor, "series state"],
    rank: Int[Tensor, "series"],
) -> tuple[Float[Tensor, "series state factor"], Int[Tensor, "series"]]:
    """Zero the rows of a diffuse factor that have cancelled to rounding error of their terms."""
    A = torch.where((A.norm(dim=2) > DIFFUSE * bound)[:, :, None], A, 0.0)
    rank = torch.where((A != 0).any(2).any(1), rank, 0)
    return torch.where((rank > 0)[:, None, None], A, 0.0), rank


def _pull(
    r: list[Float[Tensor, "series state"]],
    N: list[Float[Tensor, "series state state"]],
    e: _Element,
) -> tuple[list[Float[Tensor, "series state"]], list[Float[Tensor, "series state state"]]]:
    """Pull (r, N) back through one observation, power by power of 1/kappa."""
    NK, NK1 = [_apply(k, e.K) for k in N], [_apply(k, e.K1) for k in N]

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1)

    one, inf = e.ordinary / _safe(e.f), e.diffuse / e.f_inf
    s = [
        dot(e.K, NK[0]) + one,
        dot(e.K, NK[1]) + 2.0 * dot(e.K1, NK[0]) + inf,
        dot(e.K, NK[2]) + 2.0 * dot(e.K1, NK[1]) + dot(e.K1, NK1[0]) - e.f / e.f_inf * inf,
    ]
    c = [NK[0], NK[1] + NK1[0], NK[2] + NK1[1]]
    step = [e.v * one - dot(e.K, r[0]), e.v * inf - dot(e.K, r[1]) - dot(e.K1, r[0])]
    used = e.ordinary | e.diffuse
    h = torch.where(used[:, None], e.h, 0.0)

    def sides(k: int) -> Tensor:
        left = 0.5 * s[k][:, None] * h - c[k]
        outer = left[:, :, None] * h[:, None, :]
        return N[k] + outer + outer.mT

    return [r[k] + step[k][:, None] * h for k in range(2)], [sides(k) for k in range(3)]


def _zero(x: Float[Tensor, "series time obs"]) -> _Totals:
    zero = x.new_zeros(len(x))
    return _Totals(zero.long(), zero, zero, zero.long())


def _add(totals: _Totals, elements: list[_Element]) -> _Totals:
    """Add the observations of a step."""
    n_obs, logdet, quad, n_diffuse = totals
    for e in elements:
        n_obs = n_obs + e.ordinary
        n_diffuse = n_diffuse + e.diffuse
        f = torch.where(e.ordinary, e.f, 1.0)
        logdet = logdet + f.log() + e.f_inf.log()
        quad = quad + torch.where(e.ordinary, e.v**2 / f, 0.0)
        quad = torch.where(e.conflict, torch.inf, quad)
    return _Totals(n_obs, logdet, quad, n_diffuse)


def _result(totals: _Totals, rank: Int[Tensor, "series"]) -> Filtered:
    n_obs, logdet, quad, n_diffuse = totals
    loglik = -0.5 * (n_obs.to(quad) * math.log(2.0 * math.pi) + logdet + quad)
    return Filtered(loglik, n_obs, logdet, quad, n_diffuse, rank)


def _innovations(
    steps: list[_Step],
) -> tuple[Float[Tensor, "series time obs"], Float[Tensor, "series time obs"]]:
    """Innovations and their variances: NaN where missing, infinite where diffuse."""

    def table(values: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.stack(row, 1) for row in values], 1)

    v = [[torch.where(e.seen, e.v, torch.nan) for e in s.elements] for s in steps]
    var = [
        [torch.where(e.diffuse, torch.inf, torch.where(e.seen, e.f, torch.nan)) for e in s.elements]
        for s in steps
    ]
    return table(v), table(var)


def _history(parts: list[Tensor], lengths: Int[Tensor, "series"]) -> Tensor:
    """Stack over time; NaN beyond the end of each series."""
    stacked = torch.stack(parts, 1)
    past = torch.arange(stacked.shape[1], device=stacked.device) >= lengths[:, None]
    return torch.where(past.reshape(past.shape + (1,) * (stacked.ndim - 2)), torch.nan, stacked)


def _choose(condition: Bool[Tensor, "series"], new: _State, old: _State) -> _State:
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return _State(*(pick(a, b) for a, b in zip(new, old, strict=True)))


def _at(field: Tensor, t: int) -> Tensor:
    return field[:, t if field.shape[1] > 1 else 0]


def _apply(A: Float[Tensor, "batch rows cols"], x: Float[Tensor, "batch cols"]) -> Tensor:
    return (A @ x[:, :, None])[:, :, 0]


def _square(A: Float[Tensor, "series state factor"]) -> Float[Tensor, "series state state"]:
    return A @ A.mT


def _safe(x: Tensor) -> Tensor:
    """Keep the gradient of a quotient finite where the quotient is not used."""
    return torch.where(x == 0, 1.0, x)


def _symmetric(P: Tensor) -> Tensor:
    return 0.5 * (P + P.mT)


def _clean(P: Float[Tensor, "series state state"]) -> Float[Tensor, "series state state"]:
    """Make P symmetric; zero the row and column of a variance that rounding took below zero."""
    P = _symmetric(P)
    below = torch.diagonal(P, dim1=1, dim2=2) < 0
    return torch.where(below[:, :, None] | below[:, None, :], 0.0, P)
