r"""The sequential Monte Carlo driver: one loop for every state-space model.

At every step and for every particle

.. math::

    h_t = \mathrm{advance}(s_{t-1}, x_{t-1}, u_t), \quad
    z_t \sim q(z_t \mid h_t, \cdot), \quad s_t = \mathrm{absorb}(h_t, z_t), \quad
    w_t = g(x_t \mid s_t)\, f(z_t \mid h_t) / q(z_t \mid h_t, \cdot)

with the prior as proposal where the model has none (bootstrap filter). The product of the mean
weights is an unbiased estimate of the likelihood. Unobserved elements of :math:`x_t` are left out
of the weight; where the model feeds observations back they are drawn from the emission.

References
----------
Gordon, Salmond and Smith (1993); Doucet and Johansen (2009), A tutorial on particle filtering and
smoothing; Lee and Whiteley (2018), Variance estimation in the particle filter, *Biometrika* 105.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.inference.resampling import (
    RESAMPLERS,
    effective_sample_size,
    gather,
    normalise,
    resample_where,
)
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Step(NamedTuple):
    """The particle system after one step.

    Attributes
    ----------
    t : int
    h, z, s : state trees with leading axes (series, particle)
    x : Tensor of shape (series, particle, dim) or None
        Observation with its missing elements drawn, where the run draws them.
    log_weights : Tensor of shape (series, particle)
        Normalised.
    ancestors : Tensor of int or None
        Indices into the previous step's particles; None where nobody resampled.
    active : Tensor of bool, shape (series,)
        Whether the step lies within the series.
    """

    t: int
    h: Any
    z: Tensor | None
    s: Any
    x: Tensor | None
    log_weights: Float[Tensor, "series particle"]
    ancestors: Int[Tensor, "series particle"] | None
    active: Bool[Tensor, "series"]


class Collector(Protocol):
    """Something that looks at each step and keeps what it needs."""

    def update(self, step: Step) -> None:
        """Take in one step."""


@dataclass(frozen=True)
class SMCOptions:
    """How to run the filter.

    Attributes
    ----------
    n_particles : int
    resampler : str
        Name in `seqdgm.inference.resampling.RESAMPLERS`.
    threshold : float
        Resample when the effective sample size falls below this share of the particles.
    draw_observations : bool
        Draw unobserved elements at every step (forecasts and imputation need them).
    """

    n_particles: int = 1000
    resampler: str = "systematic"
    threshold: float = 0.5
    draw_observations: bool = False


class SMCResult(NamedTuple):
    """Evidence of a run.

    Attributes
    ----------
    increments : Tensor of shape (series, time), float64
        Estimates of log p(x_t | x_1..t-1); their sum is the log of an unbiased estimate.
    ess : Tensor of shape (series, time)
        Effective sample size after each step, before resampling.
    log_weights : Tensor of shape (series, particle)
        Normalised, at the end.
    stderr : Tensor of shape (series,)
        Standard error of the log-evidence (Lee and Whiteley 2018, equation 8); inf where all
        particles descend from one and the estimator has nothing to compare.
    """

    increments: Float[Tensor, "series time"]
    ess: Float[Tensor, "series time"]
    log_weights: Float[Tensor, "series particle"]
    stderr: Float[Tensor, "series"]


class _Facts(NamedTuple):
    """What holds for one step of the whole batch, so that the loop need not ask tensors."""

    inside: Bool[Tensor, "series"]
    all_inside: bool
    any_inside: bool
    seen: bool
    complete: bool

    @classmethod
    def of(cls, batch: Batch) -> list[_Facts]:
        valid = batch.valid
        columns = (
            valid.unbind(1),
            valid.all(0).tolist(),
            valid.any(0).tolist(),
            batch.mask.any(-1).any(0).tolist(),
            batch.mask.all(-1).all(0).tolist(),
        )
        return [cls(*row) for row in zip(*columns, strict=True)]


@dataclass
class _Cloud:
    """Mutable state of the loop."""

    s: Any
    x: Tensor | None
    log_weights: Float[Tensor, "series particle"]
    eve: Int[Tensor, "series particle"]
    resamplings: Int[Tensor, "series"]
    ess: Float[Tensor, "series"]
    increments: list[Tensor] = field(default_factory=list)
    history: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def run(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    collectors: tuple[Collector, ...] = (),
) -> SMCResult:
    """Run the particle filter over a batch of series.

    Raises
    ------
    ValueError
        If every particle of a series has weight zero, or a weight is not a number: the series and
        the step are named.
    """
    shape = (batch.n_series, options.n_particles)
    device = batch.x.device
    uniform = batch.x.new_zeros(shape, dtype=torch.float64) - float(
        torch.tensor(float(options.n_particles), dtype=torch.float64).log()
    )
    cloud = _Cloud(
        s=model.start(shape),
        x=batch.x.new_zeros(*shape, batch.x.shape[2]) if model.feedback else None,
        log_weights=uniform,
        eve=torch.arange(shape[1], device=device).expand(shape).clone(),
        resamplings=torch.zeros(shape[0], dtype=torch.int64, device=device),
        ess=torch.full((shape[0],), float(shape[1]), dtype=torch.float64, device=device),
    )
    context = model.encode(batch)
    for t, facts in enumerate(_Facts.of(batch)):
        ancestors = _resample(cloud, options, uniform, generator) if t else None
        h, z, x = _move(model, batch, cloud, context, t, facts, options, generator)
        for collector in collectors:
            collector.update(Step(t, h, z, cloud.s, x, cloud.log_weights, ancestors, facts.inside))
    return SMCResult(
        torch.stack(cloud.increments, 1),
        torch.stack(cloud.history, 1),
        cloud.log_weights,
        _evidence_stderr(cloud),
    )


def _resample(
    cloud: _Cloud, options: SMCOptions, uniform: Tensor, generator: torch.Generator
) -> Int[Tensor, "series particle"] | None:
    needed = cloud.ess < options.threshold * options.n_particles
    if options.n_particles == 1 or not bool(needed.any()):
        return None
    drawn = RESAMPLERS[options.resampler](cloud.log_weights, generator)
    ancestors = resample_where(needed, drawn)
    cloud.s = tree_map(lambda leaf: gather(leaf, ancestors), cloud.s)
    cloud.x = None if cloud.x is None else gather(cloud.x, ancestors)
    cloud.eve = gather(cloud.eve, ancestors)
    cloud.log_weights = torch.where(needed[:, None], uniform, cloud.log_weights)
    cloud.ess = torch.where(needed, float(options.n_particles), cloud.ess)
    cloud.resamplings = cloud.resamplings + needed
    return ancestors


def _move(
    model: StateSpaceModel,
    batch: Batch,
    cloud: _Cloud,
    context: Tensor | None,
    t: int,
    facts: _Facts,
    options: SMCOptions,
    generator: torch.Generator,
) -> tuple[Any, Tensor | None, Tensor | None]:
    """Advance all particles by one step and weigh them."""
    u = batch.inputs_at(t, extra_axes=1)
    fed = None if cloud.x is None else model.embed(cloud.x)
    h = model.advance(cloud.s, fed, u)
    z, log_ratio = _propose(model, h, context, t, facts, u, cloud.log_weights.shape, generator)
    cloud.s = model.absorb(h, z)
    emission = model.emission(cloud.s, u)
    shape = (*cloud.log_weights.shape, batch.x.shape[-1])
    x = batch.x[:, t, None].expand(shape)
    mask = batch.mask[:, t, None].expand(shape)
    log_w = cloud.log_weights
    if facts.seen or log_ratio is not None:
        gain = torch.zeros_like(log_w) if log_ratio is None else log_ratio.double()
        if facts.seen:
            unsure = None if facts.complete else mask
            gain = gain + dist.log_prob(emission, x, unsure).double()
        log_w, increment = normalise(log_w + gain)
        _check(increment, batch, t)
        cloud.ess = effective_sample_size(log_w)
    else:
        increment = log_w.new_zeros(len(log_w))
    cloud.log_weights = log_w
    cloud.increments.append(increment)
    cloud.history.append(cloud.ess)
    filled: Tensor | None = x if model.feedback else None
    if options.draw_observations or (model.feedback and not facts.complete):
        wide = dist.expand(emission, shape[:2], shape[2])
        filled = dist.fill_missing(wide, x, mask, generator)
    if model.feedback:
        cloud.x = filled
    return h, z, filled


def _propose(
    model: StateSpaceModel,
    h: Any,
    context: Tensor | None,
    t: int,
    facts: _Facts,
    u: Any,
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> tuple[Tensor | None, Tensor | None]:
    """Draw z and return it with log f - log q (None where z comes from the prior)."""
    prior = model.prior(h, u)
    if prior is None:
        return None, None
    prior = dist.expand(prior, shape, model.latent_dim)
    if context is None or not facts.any_inside:
        return dist.sample(prior, generator), None
    proposal = dist.expand(model.proposal(h, context[:, t, None], u), shape, model.latent_dim)
    z = dist.sample(proposal, generator)
    inside = facts.inside[:, None]
    if not facts.all_inside:
        # Beyond the end of a series nothing was observed: the future comes from the prior.
        z = torch.where(inside[..., None], z, dist.sample(prior, generator))
    ratio = dist.log_prob(prior, z) - dist.log_prob(proposal, z)
    return z, torch.where(inside, ratio, 0.0)


def _check(increment: Float[Tensor, "series"], batch: Batch, t: int) -> None:
    bad = torch.nonzero(~torch.isfinite(increment))
    if len(bad):
        k = int(bad[0, 0])
        raise ValueError(
            f"series {batch.ids[k]!r}, step {t}: every particle has weight zero or a weight that "
            "is not a number; the observation is impossible under the model, or the model "
            "returned NaN: check the observation, use a heavier-tailed emission or more particles"
        )


def _evidence_stderr(cloud: _Cloud) -> Float[Tensor, "series"]:
    count = cloud.eve.shape[1]
    if count == 1:
        return torch.full_like(cloud.ess, torch.inf)
    weights = cloud.log_weights.exp()
    families = torch.zeros_like(weights).scatter_add_(1, cloud.eve, weights)
    growth = (count / (count - 1.0)) ** (cloud.resamplings + 1).double()
    relative = 1.0 - growth * (1.0 - families.square().sum(1))
    single = families.max(1).values > 1 - 1e-12
    return torch.where(single, torch.inf, relative.clamp_min(0.0).sqrt())
