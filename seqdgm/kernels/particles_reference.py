"""Particle kernels in torch: for every device, and for autograd where weights have a gradient.

Documented in `seqdgm.kernels.particles`, with the arithmetic of `seqdgm.kernels.particles_types`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.particles_types import (
    UNIT,
    Bootstrapped,
    LinearProblem,
    Scheme,
    VolatilityProblem,
    Weighed,
)
from seqdgm.kernels.philox import normals, uniform

_LOG_2PI = math.log(2.0 * math.pi)


def weigh(log_weights: Float[Tensor, "series particle"]) -> Weighed:
    """Normalise weights."""
    # Relative to the largest, because a sum that is much larger than 1 would round all others.
    top = log_weights.detach().amax(-1)
    shift = torch.where(torch.isfinite(top), top, 0.0)
    relative = log_weights - shift[:, None]
    rest = torch.logsumexp(relative, -1)
    total = shift + rest
    finite = torch.isfinite(total)
    normalised = relative - torch.where(finite, rest, 0.0)[:, None]
    ess = (2 * rest - torch.logsumexp(2 * relative, -1)).exp()
    ess = torch.where(finite, ess, torch.where(total == -torch.inf, 0.0, torch.nan))
    return Weighed(normalised, total, ess)


def resample(
    scheme: Scheme,
    log_weights: Float[Tensor, "series particle"],
    uniforms: Float[Tensor, "series number"],
    needed: Bool[Tensor, "series"] | None,
) -> Int[Tensor, "series particle"]:
    """Ancestors; -1 in rows without a positive weight."""
    q = _quantise(log_weights)
    count = q.shape[1]
    cumulative = q.cumsum(1)
    total = cumulative[:, -1:]
    own = torch.arange(count, device=q.device)
    if scheme in ("systematic", "stratified"):
        ancestors = _find(cumulative, (own + uniforms) * (total / count))
    elif scheme == "multinomial":
        ancestors = _find(cumulative, uniforms * total)
    elif scheme == "killing":
        survives = uniforms[:, :count] * q.max(1, keepdim=True).values < q
        ancestors = torch.where(survives, own, _find(cumulative, uniforms[:, count:] * total))
    else:
        ancestors = _residual(q, total, uniforms)
    ancestors = torch.where(total > 0, ancestors, -1)
    return ancestors if needed is None else torch.where(needed[:, None], ancestors, own)


def gather(x: Tensor, ancestors: Int[Tensor, "series particle"]) -> Tensor:
    """Pick particles."""
    series = torch.arange(len(x), device=x.device)[:, None]
    return x[series, ancestors]


def pick(
    log_weights: Float[Tensor, "row particle"], uniforms: Float[Tensor, "row"]
) -> Int[Tensor, "row"]:
    """One draw a row; -1 in rows without a positive weight."""
    top = log_weights.max(1, keepdim=True).values
    normalised = log_weights - top - (log_weights - top).exp().sum(1, keepdim=True).log()
    cumulative = _quantise(normalised).cumsum(1)
    total = cumulative[:, -1]
    index = _find(cumulative, (uniforms * total)[:, None])[:, 0]
    return torch.where(total > 0, index, -1)


def _quantise(log_weights: Float[Tensor, "row particle"]) -> Float[Tensor, "row particle"]:
    """Weights as integers held in float64, whose sums are exact in any order."""
    return (log_weights.exp() * UNIT).round()


def _find(
    cumulative: Float[Tensor, "row particle"], level: Float[Tensor, "row draw"]
) -> Int[Tensor, "row draw"]:
    """The first particle whose cumulative sum exceeds the level."""
    level = torch.minimum(level, cumulative[:, -1:] - 1.0)
    found = torch.searchsorted(cumulative, level.contiguous(), right=True)
    return found.clamp_max(cumulative.shape[1] - 1)  # reached by rows of NaN only


def _residual(
    q: Float[Tensor, "series particle"],
    total: Float[Tensor, "series one"],
    uniforms: Float[Tensor, "series particle"],
) -> Int[Tensor, "series particle"]:
    count = q.shape[1]
    expected = q * (count / total)
    copies = expected.floor()
    rest = ((expected - copies) * (UNIT / count)).round().cumsum(1)
    own = torch.arange(count, device=q.device, dtype=q.dtype).expand(q.shape)
    copied = _find(copies.cumsum(1), own)
    drawn = _find(rest, uniforms * rest[:, -1:])
    return torch.where(own < copies.sum(1, keepdim=True), copied, drawn)


# ---------------------------------------------------------------- fused bootstrap filters


@dataclass
class _Cloud:
    """Particles of a panel between two steps."""

    z: Float[Tensor, "series particle state"]
    log_weights: Float[Tensor, "series particle"]
    eve: Int[Tensor, "series particle"]
    ess: Float[Tensor, "series"]
    resamplings: Int[Tensor, "series"]
    alive: Bool[Tensor, "series"]


def bootstrap_linear_gaussian(
    problem: LinearProblem, n_particles: int, seed: int, threshold: float, moments: bool
) -> Bootstrapped:
    """Bootstrap filter of a linear-Gaussian system."""
    state = problem.m0.shape[1]
    series = torch.arange(len(problem.y), device=problem.y.device)

    def move(t: int, z: Tensor | None) -> Tensor:
        e = [normals(series, n_particles, t, d, seed) for d in range(state)]
        noise = torch.stack(e, 2)
        if z is None:
            return problem.m0[:, None] + noise @ problem.root0.mT
        F, root, b = (_at(field, t) for field in (problem.F, problem.root, problem.b))
        return z @ F.mT + b[:, None] + noise @ root.mT

    def score(t: int, z: Tensor) -> Tensor:
        var, seen = _at(problem.var, t)[:, None], problem.mask[:, t, None]
        error = problem.y[:, t, None] - z @ _at(problem.h, t).mT
        density = -0.5 * (error * error / var + var.log() + _LOG_2PI)
        return torch.where(seen, density, 0.0).sum(2)

    seen = problem.mask.any(2)
    return _bootstrap(move, score, seen, problem.lengths, n_particles, seed, threshold, moments)


def bootstrap_volatility(
    problem: VolatilityProblem, n_particles: int, seed: int, threshold: float, moments: bool
) -> Bootstrapped:
    """Bootstrap filter of stochastic volatility."""
    n, steps = len(problem.lengths), problem.y.shape[1]
    series = torch.arange(n, device=problem.y.device)
    mu, rho, sigma, m0, s0, leverage = (field[:, None] for field in problem[:6])
    df = None if problem.df is None else problem.df[:, None]
    y, seen = problem.y, problem.mask
    apart = (1.0 - leverage * leverage).sqrt()

    def move(t: int, z: Tensor | None) -> Tensor:
        e = normals(series, n_particles, t, 0, seed)
        if z is None:
            return (m0 + s0 * e)[..., None]
        z = z[..., 0]
        shock = leverage * (y[:, t - 1, None] * (-0.5 * z).exp()) + apart * e
        e = torch.where(seen[:, t - 1, None], shock, e)
        return (mu + rho * (z - mu) + sigma * e)[..., None]

    def score(t: int, z: Tensor) -> Tensor:
        z = z[..., 0]
        square = y[:, t, None].square() * (-z).exp()
        if df is None:
            density = -0.5 * (_LOG_2PI + z + square)
        else:
            constant = torch.lgamma(0.5 * df + 0.5) - torch.lgamma(0.5 * df)
            constant = constant - 0.5 * (df * math.pi).log()
            density = constant - 0.5 * z - (0.5 * df + 0.5) * (square / df).log1p()
        return torch.where(seen[:, t, None], density, 0.0)

    lengths, seen_any = problem.lengths, seen.expand(n, steps)
    return _bootstrap(move, score, seen_any, lengths, n_particles, seed, threshold, moments)


def _bootstrap(
    move: Callable[[int, Tensor | None], Tensor],
    score: Callable[[int, Tensor], Tensor],
    seen: Bool[Tensor, "series time"],
    lengths: Int[Tensor, "series"],
    count: int,
    seed: int,
    threshold: float,
    moments: bool,
) -> Bootstrapped:
    n, steps = seen.shape
    device = seen.device
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    series = torch.arange(n, device=device)
    increments, ess = torch.zeros(n, steps, **options), torch.full((n, steps), torch.nan, **options)
    cloud = _Cloud(
        z=torch.empty(n, count, 0, **options),
        log_weights=torch.full((n, count), -math.log(count), **options),
        eve=torch.arange(count, device=device).repeat(n, 1),
        ess=torch.full((n,), float(count), **options),
        resamplings=torch.zeros_like(lengths),
        alive=lengths > 0,
    )
    history: list[tuple[Tensor, Tensor]] = []
    for t in range(steps):
        inside = cloud.alive & (t < lengths)
        if t > 0:
            _renew(cloud, uniform(series, t, seed), threshold, inside)
        cloud.z = move(t, cloud.z if t > 0 else None)
        update = inside & seen[:, t]
        log_weights, total, size = weigh(cloud.log_weights + score(t, cloud.z))
        good = update & torch.isfinite(total)
        increments[:, t] = torch.where(update, total, 0.0)
        cloud.alive = cloud.alive & (good | ~update)
        cloud.log_weights = torch.where(good[:, None], log_weights, cloud.log_weights)
        cloud.ess = torch.where(good, size, cloud.ess)
        valid = inside & cloud.alive
        ess[:, t] = torch.where(valid, cloud.ess, torch.nan)
        if moments:
            history.append(_moments(cloud, valid))
    stderr = torch.where(cloud.alive, _stderr(cloud), torch.nan).masked_fill(lengths == 0, 0.0)
    if not moments:
        return Bootstrapped(increments, ess, stderr, None, None)
    mean, var = (torch.stack(part, 1) for part in zip(*history, strict=True))
    return Bootstrapped(increments, ess, stderr, mean, var)


def _renew(cloud: _Cloud, u: Tensor, threshold: float, inside: Tensor) -> None:
    """Resample the series whose effective sample size is low."""
    count = cloud.eve.shape[1]
    needed = inside & (cloud.ess < threshold * count)
    if count == 1 or not bool(needed.any()):
        return
    ancestors = resample("systematic", cloud.log_weights, u[:, None], needed)
    cloud.z, cloud.eve = gather(cloud.z, ancestors), gather(cloud.eve, ancestors)
    cloud.log_weights = torch.where(needed[:, None], -math.log(count), cloud.log_weights)
    cloud.ess = torch.where(needed, float(count), cloud.ess)
    cloud.resamplings = cloud.resamplings + needed


def _moments(cloud: _Cloud, valid: Tensor) -> tuple[Tensor, Tensor]:
    weights = cloud.log_weights.exp()[..., None]
    mean = (weights * cloud.z).sum(1)
    var = (weights * (cloud.z - mean[:, None]).square()).sum(1)
    nothing = torch.full_like(mean, torch.nan)
    return torch.where(valid[:, None], mean, nothing), torch.where(valid[:, None], var, nothing)


def _stderr(cloud: _Cloud) -> Float[Tensor, "series"]:
    """Equation 8 of Lee and Whiteley (2018), by families of particles with one first ancestor."""
    count = cloud.eve.shape[1]
    weights = cloud.log_weights.exp()
    families = torch.zeros_like(weights).scatter_add_(1, cloud.eve, weights)
    growth = (count / (count - 1.0)) ** (cloud.resamplings + 1).double() if count > 1 else torch.inf
    relative = 1.0 - growth * (1.0 - families.square().sum(1))
    single = families.max(1).values > 1 - 1e-12
    return torch.where(single, torch.inf, relative.clamp_min(0.0).sqrt())


def _at(field: Tensor, t: int) -> Tensor:
    return field[:, t if field.shape[1] > 1 else 0]
