r"""Expectation-maximisation for linear-Gaussian models, with closed-form M-steps.

The E-step is the exact smoother (with lag-one covariances); the M-step regresses
:math:`z_t` on :math:`(z_{t-1}, u_t, 1)` and :math:`x_t` on :math:`(z_t, u_t, 1)` in expectation.
Whatever is held fixed is subtracted first. Missing elements of a partly observed vector are
integrated out through their conditional law given the state and the observed elements.

References
----------
Shumway and Stoffer (1982), An approach to time series smoothing and forecasting using the EM
algorithm; Shumway and Stoffer (2017), *Time Series Analysis and Its Applications*, section 6.3;
Holmes (2013), Derivation of the EM algorithm for constrained and unconstrained MARSS models.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqdgm.inference.kalman import conditional_emission
from seqdgm.kernels import kalman_smoother
from seqdgm.kernels.types import Smoothed, System
from seqdgm.results import FitReport
from seqdgm.types import Batch, check_count

if TYPE_CHECKING:
    from seqdgm.models.linear_gaussian import LinearGaussianSSM, Matrices


class Moments(NamedTuple):
    r"""Expected cross products of a regression of `y` on `g`, summed over time.

    Attributes
    ----------
    yy, yg, gg : Tensor of shape (sys, ., .)
        :math:`\sum E[y y']`, :math:`\sum E[y g']`, :math:`\sum E[g g']`.
    steps : Tensor of shape (sys,)
        Number of terms.
    """

    yy: Float[Tensor, "sys y y"]
    yg: Float[Tensor, "sys y g"]
    gg: Float[Tensor, "sys g g"]
    steps: Float[Tensor, "sys"]


def fit(
    model: LinearGaussianSSM,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    max_iter: int = 500,
    tol: float = 1e-7,
    pooled: bool = False,
) -> FitReport:
    """Run EM until the log-likelihood of every series changes by less than ``tol`` relatively.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    max_iter : int
        Iterations at most.
    tol : float
        Relative change of the log-likelihood at which a series has converged.
    pooled : bool
        Share the parameters over the series instead of fitting each on its own.
    """
    begin = time.perf_counter()
    check_count("max_iter", max_iter)
    matrices = model.starting_matrices(batch, pooled=pooled)
    names = ("the pooled series",) if pooled else batch.ids
    value = torch.full((len(names),), -torch.inf, dtype=torch.float64)
    done, failed = torch.zeros(len(names), dtype=torch.bool), torch.zeros(len(names)).bool()
    best, trace = matrices, []
    for _ in range(max_iter):
        system = matrices.system(batch.u[:, : batch.n_steps], model.diffuse_mask)
        smoothed = kalman_smoother(system, batch.x, batch.mask, batch.lengths, lag_one=True)
        now = smoothed.loglik.sum(0, keepdim=True) if pooled else smoothed.loglik
        # EM cannot lower the likelihood: where it does, rounding has taken over.
        worse = now < value - 1e-6 * (1 + value.abs())
        failed = failed | ((~torch.isfinite(now) | worse) & ~done)
        moving = ~done & ~failed
        # A series that has converged or failed keeps what it has, whatever its company does.
        best = _where(moving, matrices, best)
        done = done | (moving & ((now - value).abs() <= tol * (1 + now.abs())))
        value = torch.where(moving, now, value)
        trace.append(float(value[torch.isfinite(value)].sum()))
        if bool((done | failed).all()):
            break
        found = m_step(matrices, model.free, batch, system, smoothed, model, pooled=pooled)
        matrices = _where(~done & ~failed, found, best)
    messages = tuple(_blame(name) for name, bad in zip(names, failed.tolist(), strict=True) if bad)
    if not bool(torch.isfinite(value).any()):
        raise ValueError(messages[0])
    model.set_matrices(best, batch.ids if not pooled else None)
    return FitReport(
        method=method,
        objective=tuple(trace),
        valid_objective=(),
        converged=done.numpy(),
        n_iter=len(trace),
        seconds=time.perf_counter() - begin,
        log_likelihood=value.numpy(),
        messages=messages,
    )


def m_step(
    matrices: Matrices,
    free: frozenset[str],
    batch: Batch,
    system: System,
    smoothed: Smoothed,
    model: LinearGaussianSSM,
    *,
    pooled: bool,
) -> Matrices:
    """Matrices that maximise the expected complete-data log-likelihood."""
    assert smoothed.lag_one is not None
    mean, cov, lag = map(torch.nan_to_num, (smoothed.mean, smoothed.cov, smoothed.lag_one))
    second = cov + mean[..., :, None] * mean[..., None, :]
    u = batch.u[:, : batch.n_steps]
    changed: dict[str, Tensor] = {}
    if free & {"F", "B", "b", "Q"}:
        stats = _transition_moments(mean, second, lag, u, batch.valid, pooled)
        weights, q = _regress(
            stats, [("F", matrices.F), ("B", matrices.B), ("b", matrices.b[..., None])], free
        )
        changed |= weights
        if "Q" in free:
            changed["Q"] = q
    if free & {"H", "D", "d", "R"}:
        stats = _emission_moments(mean, second, u, batch, system, pooled)
        weights, r = _regress(
            stats, [("H", matrices.H), ("D", matrices.D), ("d", matrices.d[..., None])], free
        )
        changed |= weights
        if "R" in free:
            changed["R"] = r if model.emission_cov == "full" else _diagonal(r)
    changed |= _initial_moments(mean[:, 0], cov[:, 0], matrices, free, pooled)
    return matrices._replace(**changed)


def _transition_moments(
    mean: Float[Tensor, "series time state"],
    second: Float[Tensor, "series time state state"],
    lag: Float[Tensor, "series lag state state"],
    u: Float[Tensor, "series time inputs"],
    valid: Bool[Tensor, "series time"],
    pooled: bool,
) -> Moments:
    w = valid[:, 1:].to(mean.dtype)
    now, before, known = mean[:, 1:], mean[:, :-1], u[:, 1:]
    cross = lag + now[..., :, None] * before[..., None, :]
    rest = torch.cat([known, known.new_ones(*known.shape[:-1], 1)], -1)
    yy = _total(second[:, 1:], w, pooled)
    yg = torch.cat(
        [_total(cross, w, pooled), _total(now[..., :, None] * rest[..., None, :], w, pooled)], -1
    )
    gg = _block(
        _total(second[:, :-1], w, pooled),
        _total(before[..., :, None] * rest[..., None, :], w, pooled),
        _total(rest[..., :, None] * rest[..., None, :], w, pooled),
    )
    return Moments(yy, yg, gg, _count(w, pooled))


def _emission_moments(
    mean: Float[Tensor, "series time state"],
    second: Float[Tensor, "series time state state"],
    u: Float[Tensor, "series time inputs"],
    batch: Batch,
    system: System,
    pooled: bool,
) -> Moments:
    # A step without any observation says nothing about the emission and is left out.
    w = batch.mask.any(-1).to(mean.dtype)
    load, offset, noise = conditional_emission(system, batch)
    x = (load @ mean[..., None])[..., 0] + offset
    loaded = load @ mean[..., None] * offset[..., None, :]
    xx = load @ second @ load.mT + loaded + loaded.mT
    xx = xx + offset[..., :, None] * offset[..., None, :] + noise
    xz = load @ second + offset[..., :, None] * mean[..., None, :]
    rest = torch.cat([u, u.new_ones(*u.shape[:-1], 1)], -1)
    yg = torch.cat(
        [_total(xz, w, pooled), _total(x[..., :, None] * rest[..., None, :], w, pooled)], -1
    )
    gg = _block(
        _total(second, w, pooled),
        _total(mean[..., :, None] * rest[..., None, :], w, pooled),
        _total(rest[..., :, None] * rest[..., None, :], w, pooled),
    )
    return Moments(_total(xx, w, pooled), yg, gg, _count(w, pooled))


def _initial_moments(
    mean: Float[Tensor, "series state"],
    cov: Float[Tensor, "series state state"],
    matrices: Matrices,
    free: frozenset[str],
    pooled: bool,
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    m0 = matrices.m0
    if "m0" in free:
        m0 = out["m0"] = mean.mean(0, keepdim=True) if pooled else mean
    if "P0" in free:
        gap = mean - m0
        p0 = cov + gap[..., :, None] * gap[..., None, :]
        p0 = p0.mean(0, keepdim=True) if pooled else p0
        out["P0"] = 0.5 * (p0 + p0.mT)
    return out


def _regress(
    stats: Moments, blocks: list[tuple[str, Tensor]], free: frozenset[str]
) -> tuple[dict[str, Tensor], Float[Tensor, "sys y y"]]:
    """Maximise over the free blocks of the coefficients; the others are subtracted."""
    sizes = [block.shape[-1] for _, block in blocks]
    weights = torch.cat(
        [block.expand(len(stats.steps), *block.shape[1:]) for _, block in blocks], -1
    ).clone()
    chosen = torch.cat(
        [torch.full((size,), name in free) for (name, _), size in zip(blocks, sizes, strict=True)]
    )
    if bool(chosen.any()):
        target = stats.yg[..., chosen] - weights[..., ~chosen] @ stats.gg[:, ~chosen][..., chosen]
        inverse = torch.linalg.pinv(stats.gg[:, chosen][..., chosen], hermitian=True)
        weights[..., chosen] = target @ inverse
    product = weights @ stats.yg.mT
    spread = stats.yy - product - product.mT + weights @ stats.gg @ weights.mT
    spread = 0.5 * (spread + spread.mT) / stats.steps[:, None, None]
    parts = torch.split(weights, sizes, -1)
    learned = {
        name: part[..., 0] if name in ("b", "d") else part
        for (name, _), part in zip(blocks, parts, strict=True)
        if name in free
    }
    return learned, spread


def _total(x: Tensor, w: Float[Tensor, "series time"], pooled: bool) -> Tensor:
    total = torch.einsum("nt,ntij->nij", w, x)
    return total.sum(0, keepdim=True) if pooled else total


def _count(w: Float[Tensor, "series time"], pooled: bool) -> Float[Tensor, "sys"]:
    count = w.sum(1)
    return count.sum(0, keepdim=True) if pooled else count


def _block(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([torch.cat([a, b], -1), torch.cat([b.mT, c], -1)], -2)


def _diagonal(m: Float[Tensor, "sys dim dim"]) -> Float[Tensor, "sys dim dim"]:
    return torch.diag_embed(torch.diagonal(m, dim1=-2, dim2=-1))


def _where(chosen: Bool[Tensor, "sys"], new: Matrices, old: Matrices) -> Matrices:
    """Take the new matrices of the chosen series, the old ones of the others."""
    fields = (
        torch.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )
    return type(new)(*fields)


def _blame(name: object) -> str:
    return (
        f"series {name!r}: the log-likelihood was not finite, or fell; the update was not applied. "
        "Scale the data (scale='standard') or use a smaller latent_dim"
    )
