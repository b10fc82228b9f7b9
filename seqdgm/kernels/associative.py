r"""Gaussian kernels that are parallel in time: associative scans in torch, of depth O(log T).

For one long series on a GPU, where a loop over its steps would leave the device idle. Given
:math:`z_{t-1}`, a step is described by five quantities,

.. math::

    p(z_t \mid x_t, z_{t-1}) = N(A z_{t-1} + b, C), \quad
    p(x_t \mid z_{t-1}) \propto \exp(\eta^\top z_{t-1} - \tfrac12 z_{t-1}^\top J z_{t-1}),

and so is a run of steps; joining two runs is associative. All products from the left give the
filtered moments: :math:`(b, C)`. All products from the right give the likelihood of what follows
each step: :math:`(\eta, J)`, whence the smoothed moments. The predicted covariance is not inverted,
as the gain of the Rauch-Tung-Striebel smoother would ask for, so it may be singular.

The covariance of an observation given the state before, :math:`H Q H^\top + R`, has to be of full
rank. Memory grows with series x time. All operations are torch's, so autograd passes through them.

References
----------
Särkkä and García-Fernández (2021), Temporal parallelization of Bayesian smoothers, *IEEE
Transactions on Automatic Control* 66(1), sections III and IV.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import reference
from seqdgm.kernels.types import ROUNDING, Filtered, Smoothed, Store, System, check_arguments


class _Elements(NamedTuple):
    """Runs of steps, to be joined."""

    A: Float[Tensor, "time series state state"]
    b: Float[Tensor, "time series state"]
    C: Float[Tensor, "time series state state"]
    eta: Float[Tensor, "time series state"]
    J: Float[Tensor, "time series state state"]


class _Steps(NamedTuple):
    """The system and its observations, time first; what is missing has h = 0, R = 1 and y = 0."""

    F: Float[Tensor, "time sys state state"]
    Q: Float[Tensor, "time sys state state"]
    b: Float[Tensor, "time sys state"]
    H: Float[Tensor, "time series obs state"]
    R: Float[Tensor, "time series obs obs"]
    y: Float[Tensor, "time series obs"]
    seen: Bool[Tensor, "time series obs"]
    active: Bool[Tensor, "time series"]


class _Head(NamedTuple):
    """The first steps, taken one after another while a series is diffuse."""

    steps: int
    filtered: Filtered | None


class _Pass(NamedTuple):
    """A forward pass over the steps after the head; innovations in sequence over the elements."""

    pred_mean: Float[Tensor, "time series state"]
    pred_cov: Float[Tensor, "time series state state"]
    mean: Float[Tensor, "time series state"]
    cov: Float[Tensor, "time series state state"]
    v: Float[Tensor, "time series obs"]
    var: Float[Tensor, "time series obs"]


def kalman_filter(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    store: Store,
) -> Filtered:
    """Kalman filter by an associative scan, as documented in `seqdgm.kernels.kalman_filter`.

    While a series is diffuse, steps are taken one after another by `seqdgm.kernels.reference`; the
    scan covers the rest.

    Raises
    ------
    ValueError
        If shapes or types do not fit together, or the covariance of an observation given the state
        before is singular.
    """
    check_arguments(system, x, mask, lengths)
    head = _start(system, x, mask, lengths)
    if head.steps == x.shape[1]:
        return reference.kalman_filter(system, x, mask, lengths, store=store)
    steps = _load(system, x, mask, lengths, head.steps)
    forward = _filter(system, steps, _elements(steps, head.steps), head)
    result = _totals(forward, steps, head)
    if store == "likelihood":
        return result
    diffuse = head.filtered is not None
    if store == "last":
        end = (lengths - 1 - head.steps).clamp(min=0), torch.arange(len(x), device=x.device)
        early = lengths <= head.steps
        moments = [forward.mean[end], forward.cov[end], torch.zeros_like(forward.cov[0])]
        if head.filtered is not None:
            before = (end[1], (lengths - 1).clamp(min=0, max=head.steps - 1))
            kept = (head.filtered.mean, head.filtered.cov, head.filtered.cov_inf)
            moments = [
                torch.where(early.reshape(-1, *(1,) * (new.ndim - 1)), _given(old)[before], new)
                for new, old in zip(moments, kept, strict=True)
            ]
        mean, cov, cov_inf = (_blank(field[:, None], lengths) for field in moments)
        return result._replace(mean=mean, cov=cov, cov_inf=cov_inf if diffuse else None)
    seen = steps.seen
    parts = (
        forward.mean, forward.cov, torch.zeros_like(forward.cov), forward.pred_mean,
        forward.pred_cov, torch.where(seen, forward.v, math.nan),
        torch.where(seen, forward.var, math.nan),
    )  # fmt: skip
    histories = [part.movedim(0, 1) for part in parts]
    if head.filtered is not None:
        histories = [
            torch.cat([_given(old), new], 1)
            for old, new in zip(head.filtered[6:], histories, strict=True)
        ]
    histories = [_blank(field, lengths) for field in histories]
    full = Filtered(*result[:6], *histories)
    return full if diffuse else full._replace(cov_inf=None)


def kalman_smoother(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    lag_one: bool,
) -> Smoothed:
    r"""Smoother by two associative scans, as documented in `seqdgm.kernels.kalman_smoother`.

    With :math:`(a, P)` filtered and :math:`(\eta, J)` of all that follows,

    .. math::

        X = (I + P J)^{-1}, \quad \hat z_t = X (a + P \eta), \quad V_t = X (P + P J P) X^\top,
        \quad C_{t+1,t} = (I + C_{t+1} J_{t+2})^{-1} A_{t+1} V_t .

    Diffuse first steps are smoothed by `seqdgm.kernels.reference`, with what follows them as one
    more observation.

    Raises
    ------
    ValueError
        As `kalman_filter` does.
    """
    check_arguments(system, x, mask, lengths)
    head = _start(system, x, mask, lengths)
    k = head.steps
    if k == x.shape[1]:
        return reference.kalman_smoother(system, x, mask, lengths, lag_one=lag_one)
    steps = _load(system, x, mask, lengths, k)
    elements = _elements(steps, k)
    forward = _filter(system, steps, elements, head)
    result = _totals(forward, steps, head)
    after = _scan(elements, reverse=True)
    ahead = _Elements(*(torch.cat([f[1:], torch.zeros_like(f[:1])]) for f in after))
    mean, cov = _weigh(forward.mean, forward.cov, ahead)
    parts = [(mean.movedim(0, 1), cov.movedim(0, 1))]
    lags = [(_solve(elements.C, ahead.J, elements.A)[1:] @ cov[:-1]).movedim(0, 1)]
    if head.filtered is not None:
        first = _smooth_head(system, x, mask, lengths, k, after)
        parts.insert(0, (first.mean[:, :k], first.cov[:, :k]))
        crossing = _solve(elements.C[0], ahead.J[0], elements.A[0]) @ first.cov[:, k - 1]
        lags = [_given(first.lag_one)[:, : k - 1], crossing[:, None], *lags]
    return Smoothed(
        result.loglik,
        _blank(torch.cat([mean for mean, _ in parts], 1), lengths),
        _blank(torch.cat([cov for _, cov in parts], 1), lengths),
        _blank(torch.cat(lags, 1), lengths - 1) if lag_one else None,
        result.rank_left,
    )


def _start(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
) -> _Head:
    """Filter step by step until every series is proper or has ended."""
    if not bool(system.Pinf.any()):
        return _Head(0, None)
    total, k = x.shape[1], min(system.m0.shape[-1], x.shape[1])
    while True:
        head = _until(system, x, mask, lengths, k)
        filtered = reference.kalman_filter(*head, store="all")
        if k == total or bool(((filtered.rank_left == 0) | (lengths <= k)).all()):
            return _Head(k, filtered)
        k = min(2 * k, total)


def _until(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    k: int,
) -> tuple[System, Tensor, Tensor, Tensor]:
    """The first k steps of a panel."""
    start = System._make((*(_between(field, 0, k) for field in system[:6]), *system[6:]))
    return start, x[:, :k], mask[:, :k], lengths.clamp(max=k)


def _between(field: Tensor, low: int, high: int) -> Tensor:
    """Steps of a field, whose axis of time may have length 1."""
    return field[:, low:high] if field.shape[1] > 1 else field


def _load(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    k: int,
) -> _Steps:
    """The steps from k on, time first."""
    _, total, obs = x.shape
    active = torch.arange(k, total, device=x.device)[:, None] < lengths
    F, Q, H, R, b, d = (_between(field, k, total).movedim(1, 0) for field in system[:6])
    seen = mask[:, k:].movedim(1, 0) & active[..., None]
    both = seen[..., :, None] & seen[..., None, :]
    eye = torch.eye(obs, dtype=x.dtype, device=x.device)
    H = torch.where(seen[..., None], H, 0.0)
    R = torch.where(both, R, torch.where(seen[..., None], 0.0, eye))
    y = torch.where(seen, x[:, k:].movedim(1, 0) - d, 0.0)
    return _Steps(F, Q, b, H, R, y, seen, active)


def _elements(steps: _Steps, k: int) -> _Elements:
    """Each step given the state before; one beyond the end of its series changes nothing."""
    F, Q, b, H, R, y, _, active = steps
    L = _cholesky(H @ Q @ H.mT + R, active, k)
    right = torch.cat([H @ Q, H @ F, (y - _apply(H, b))[..., None]], -1)
    white = torch.linalg.solve_triangular(L, right, upper=False)
    state = F.shape[-1]
    HQ, HF, v = white[..., :state], white[..., state:-1], white[..., -1]
    whole = _Elements(
        F - HQ.mT @ HF,
        b + _apply(HQ.mT, v),
        _symmetric(Q - HQ.mT @ HQ),
        _apply(HF.mT, v),
        _symmetric(HF.mT @ HF),
    )
    idle = _Elements(_eye(F), *(torch.zeros_like(field) for field in whole[1:]))
    return _Elements(*(_choose(active, a, z) for a, z in zip(whole, idle, strict=True)))


def _filter(system: System, steps: _Steps, elements: _Elements, head: _Head) -> _Pass:
    """Scan from the left; then one ordinary step from each result, for the innovations.

    That step is written in Joseph's form, so that rounding errors of the scan leave every
    covariance semi-definite.
    """
    mean, cov = _prior(system, steps, head)
    one = _Steps(*(field[:1] for field in steps))
    start = _update(one, mean[None], cov[None], head.steps)
    zero = torch.zeros_like(start.mean), torch.zeros_like(start.cov)
    first = _Elements(zero[1], start.mean, start.cov, *zero)
    whole = _Elements(*(torch.cat([f, e[1:]]) for f, e in zip(first, elements, strict=True)))
    before = _scan(whole, reverse=False)
    F, Q, b = (field[1:] if len(field) > 1 else field for field in steps[:3])
    means = _apply(F, before.b[:-1]) + b
    covs = _clean(F @ before.C[:-1] @ F.mT + Q)
    pred = torch.cat([mean[None], means]), torch.cat([cov[None], covs])
    return _update(steps, *pred, head.steps)


def _prior(system: System, steps: _Steps, head: _Head) -> tuple[Tensor, Tensor]:
    """Moments of the first state after the head, before its observations."""
    n = steps.y.shape[1]
    if head.filtered is None:
        return system.m0.expand(n, -1), system.P0.expand(n, -1, -1)
    a, P = _given(head.filtered.mean)[:, -1], _given(head.filtered.cov)[:, -1]
    a, P = (_choose(steps.active[0], field, torch.zeros_like(field)) for field in (a, P))
    F, Q, b = steps.F[0], steps.Q[0], steps.b[0]
    return _apply(F, a) + b, _clean(F @ P @ F.mT + Q)


def _update(
    steps: _Steps,
    mean: Float[Tensor, "time series state"],
    cov: Float[Tensor, "time series state state"],
    k: int,
) -> _Pass:
    """Update every step with its observations."""
    H, R = steps.H, steps.R
    HP = H @ cov
    L = _cholesky(HP @ H.mT + R, steps.active, k)
    v = steps.y - _apply(H, mean)
    K = torch.cholesky_solve(HP, L).mT
    W = _eye(cov) - K @ H
    scale = torch.diagonal(L, dim1=-2, dim2=-1)
    white = torch.linalg.solve_triangular(L, v[..., None], upper=False)[..., 0]
    return _Pass(
        mean,
        cov,
        mean + _apply(K, v),
        _clean(W @ cov @ W.mT + K @ R @ K.mT),
        white * scale,
        scale**2,
    )


def _cholesky(
    S: Float[Tensor, "time series obs obs"], active: Bool[Tensor, "time series"], k: int
) -> Float[Tensor, "time series obs obs"]:
    """Cholesky factor of covariances that must have full rank, in the active steps."""
    S = _choose(active, S, _eye(S))
    L, info = torch.linalg.cholesky_ex(S)
    pivots, scale = (torch.diagonal(field, dim1=-2, dim2=-1) for field in (L, S))
    singular = (info != 0) | ~(pivots**2 > ROUNDING * scale).all(-1)
    if bool(singular.any()):
        t, n = singular.nonzero()[0].tolist()
        raise ValueError(
            f"the covariance of x given the state before is singular at step {t + k} of series {n},"
            " which the 'associative' kernels cannot take; use 'reference', or an R of full rank"
        )
    return L


def _scan(elements: _Elements, *, reverse: bool) -> _Elements:
    """All products of the elements from the left, or from the right."""
    if not reverse:
        return _prefixes(elements, _join)
    backwards = _Elements(*(field.flip(0) for field in elements))
    after = _prefixes(backwards, lambda later, earlier: _join(earlier, later))
    return _Elements(*(field.flip(0) for field in after))


def _prefixes(elements: _Elements, join: Callable[[_Elements, _Elements], _Elements]) -> _Elements:
    """Join neighbours, scan those pairs, and complete the steps between (Blelloch 1990)."""
    count = len(elements.A)
    if count < 2:
        return elements

    def every(start: int, stop: int) -> _Elements:
        return _Elements(*(field[start:stop:2] for field in elements))

    odd = _prefixes(join(every(0, count - 1), every(1, count)), join)
    some = _Elements(*(field[: (count - 1) // 2] for field in odd))
    even = join(some, every(2, count))
    out = []
    for field, first, second in zip(elements, odd, even, strict=True):
        whole = torch.empty_like(field)
        whole[0], whole[1::2], whole[2::2] = field[0], first, second
        out.append(whole)
    return _Elements(*out)


def _join(first: _Elements, then: _Elements) -> _Elements:
    """Two runs of steps, one following the other."""
    state = first.b.shape[-1]
    right = [first.A, (first.b + _apply(first.C, then.eta))[..., None], first.C]
    solved = _solve(first.C, then.J, torch.cat(right, -1))
    XA, Xb, XC = solved[..., :state], solved[..., state], solved[..., state + 1 :]
    return _Elements(
        then.A @ XA,
        _apply(then.A, Xb) + then.b,
        _symmetric(then.A @ XC @ then.A.mT) + then.C,
        _apply(XA.mT, then.eta - _apply(then.J, first.b)) + first.eta,
        _symmetric(XA.mT @ then.J @ first.A) + first.J,
    )


def _weigh(
    mean: Float[Tensor, "time series state"],
    cov: Float[Tensor, "time series state state"],
    ahead: _Elements,
) -> tuple[Float[Tensor, "time series state"], Float[Tensor, "time series state state"]]:
    """Smoothed moments: filtered ones and the likelihood of what follows."""
    X = _solve(cov, ahead.J, _eye(cov).expand_as(cov))
    whole = X @ (cov + cov @ ahead.J @ cov) @ X.mT
    return _apply(X, mean + _apply(cov, ahead.eta)), _clean(whole)


def _smooth_head(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    k: int,
    after: _Elements,
) -> Smoothed:
    """Smooth the first k steps, where what follows, J = L L', is one more step that sees L' z."""
    start, x, mask, ends = _until(system, x, mask, lengths, k)
    n, _, obs = x.shape
    state = system.m0.shape[-1]
    wide = max(obs, state)
    eye = torch.eye(wide, dtype=x.dtype, device=x.device)
    L = reference._semidefinite_root(after.J[0])
    unit = torch.diag_embed((torch.diagonal(L, dim1=1, dim2=2) == 0).to(L))
    y = torch.linalg.solve_triangular(L + unit, after.eta[0][..., None], upper=False)[..., 0]

    def extend(field: Tensor, last: Tensor, *pad: int) -> Tensor:
        shape = (max(len(field), len(last)), k, *field.shape[2:])
        field = torch.nn.functional.pad(field.expand(shape), pad)
        return torch.cat([field, last.expand(shape[0], *last.shape[1:])[:, None]], 1)

    more = wide - obs, wide - state
    square = torch.zeros_like(system.P0[:1])
    longer = start._replace(
        F=extend(start.F, eye[None, :state, :state]),
        Q=extend(start.Q, square),
        H=extend(start.H, torch.nn.functional.pad(L.mT, (0, 0, 0, more[1])), 0, 0, 0, more[0]),
        R=extend(start.R, eye[None], 0, more[0], 0, more[0]),
        b=extend(start.b, square[:, 0]),
        d=extend(start.d, torch.zeros_like(eye[:1]), 0, more[0]),
    )
    follows = (lengths > k)[:, None].expand(n, state)
    return reference.kalman_smoother(
        longer,
        extend(x, torch.nn.functional.pad(y, (0, more[1])), 0, more[0]),
        extend(mask, torch.nn.functional.pad(follows, (0, more[1])), 0, more[0]),
        ends + (lengths > k).long(),
        lag_one=True,
    )


def _totals(forward: _Pass, steps: _Steps, head: _Head) -> Filtered:
    """Log-likelihood and its parts, those of the head included."""
    seen, var = steps.seen, forward.var
    n_obs = seen.sum((0, 2))
    logdet = torch.where(seen, var.log(), 0.0).sum((0, 2))
    quad = torch.where(seen, forward.v**2 / var, 0.0).sum((0, 2))
    none = torch.zeros_like(n_obs)
    parts = Filtered(quad, n_obs, logdet, quad, none, none)
    if head.filtered is not None:
        sums = [a + b for a, b in zip(parts[:5], head.filtered[:5], strict=True)]
        parts = parts._replace(
            n_obs=sums[1],
            logdet=sums[2],
            quad=sums[3],
            n_diffuse=sums[4],
            rank_left=head.filtered.rank_left,
        )
    loglik = -0.5 * (parts.n_obs.to(quad) * math.log(2.0 * math.pi) + parts.logdet + parts.quad)
    return parts._replace(loglik=loglik)


def _blank(history: Tensor, lengths: Int[Tensor, "series"]) -> Tensor:
    """NaN beyond the end of each series."""
    past = torch.arange(history.shape[1], device=history.device) >= lengths[:, None]
    return torch.where(past.reshape(past.shape + (1,) * (history.ndim - 2)), math.nan, history)


def _choose(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the condition holds, which has the leading axes alone."""
    shape = condition.shape + (1,) * (new.ndim - condition.ndim)
    return torch.where(condition.reshape(shape), new, old)


def _solve(C: Tensor, J: Tensor, right: Tensor) -> Tensor:
    """(I + C J)^-1 of a matrix; the eigenvalues of C J are not negative."""
    return torch.linalg.solve(_eye(C) + C @ J, right)


def _given(history: Tensor | None) -> Tensor:
    assert history is not None
    return history


def _apply(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x[..., None])[..., 0]


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _symmetric(P: Tensor) -> Tensor:
    return 0.5 * (P + P.mT)


def _clean(P: Tensor) -> Tensor:
    """Make P symmetric; zero the row and column of a variance that rounding took below zero."""
    P = _symmetric(P)
    below = torch.diagonal(P, dim1=-2, dim2=-1) < 0
    return torch.where(below[..., :, None] | below[..., None, :], 0.0, P)
