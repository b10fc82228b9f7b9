r"""The sequential Monte Carlo driver: one loop for every state-space model.

At every step and for every particle

.. math::

    h_t = \mathrm{advance}(s_{t-1}, x_{t-1}, u_t), \quad
    a \sim \mathrm{resample}(W_{t-1} \eta_t), \quad
    z_t \sim q(z_t \mid h_t^a, \cdot), \quad s_t = \mathrm{absorb}(h_t^a, z_t), \\
    w_t = \frac{1}{\eta_t^a} \frac{g(x_t \mid s_t)\, f(z_t \mid h_t^a)}{q(z_t \mid h_t^a, \cdot)}

with the prior as proposal (bootstrap filter), the model's own or a local approximation (guided
filter), and with a look-ahead :math:`\eta_t = \eta(h_t, x_t)` in the auxiliary filter, else 1. The
product of the mean weights is an unbiased estimate of the likelihood. Unobserved elements of
:math:`x_t` are left out of the weight; where the model feeds observations back they are drawn from
the emission. With a reference trajectory, which particle 0 follows, the same loop is the
conditional filter of particle Gibbs.

References
----------
Gordon, Salmond and Smith (1993); Pitt and Shephard (1999), Filtering via simulation: auxiliary
particle filters, *JASA* 94; Andrieu, Doucet and Holenstein (2010), *JRSS B* 72; Lindsten, Jordan
and Schön (2014), Particle Gibbs with ancestor sampling, *JMLR* 15; Lee and Whiteley (2018),
Variance estimation in the particle filter, *Biometrika* 105.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.inference.proposals import Proposal, make_proposal
from seqdgm.inference.resampling import (
    MemoryResampler,
    Resampler,
    adaptive,
    effective_sample_size,
    find_resampler,
    gather,
    inherit,
    weigh,
)
from seqdgm.inference.steps import evidence_stderr, lookahead, propose, renewing
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, Inputs, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

# log eta(h_t, x_t) of every particle, (series, particle); u, x and the mask as in `Proposal`.
Lookahead = Callable[["StateSpaceModel", Any, Inputs, Tensor, Tensor], Tensor]


class Weigh(Protocol):
    """How particles meet an observation where it is not by the emission's density."""

    def __call__(
        self,
        model: StateSpaceModel,
        s: Any,
        u: Inputs,
        x: Float[Tensor, "series one dim"],
        mask: Bool[Tensor, "series one dim"],
        log_weights: Float[Tensor, "series particle"],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "series particle"], Float[Tensor, "series particle dim"]]:
        """Logarithms of factors of the weights, and draws for what is missing of x."""


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


class Reference(NamedTuple):
    r"""A trajectory that particle 0 follows (conditional SMC).

    Attributes
    ----------
    z : Tensor of shape (series, time, state)
        Not read beyond a series' end.
    ancestor_sampling : bool
        Whether the reference draws a new ancestor at every resampling, with probabilities
        :math:`W_{t-1} f(z'_t \mid h_t)`; for `memoryless` models.
    """

    z: Float[Tensor, "series time state"]
    ancestor_sampling: bool = True


@dataclass(frozen=True)
class SMCOptions:
    """How to run the filter.

    Attributes
    ----------
    n_particles : int
    resampler : str or Resampler
        A name in `seqdgm.inference.resampling.RESAMPLERS`, or a function.
    threshold : float
        Resample when the effective sample size falls below this share of the particles; 1 resamples
        at every step.
    draw_observations : bool
        Draw unobserved elements at every step (forecasts and imputation need them).
    proposal : str or Proposal
        ``"auto"`` is the model's own where it has one, else its prior (``"bootstrap"``); see
        `seqdgm.inference.proposals.make_proposal`.
    lookahead : {None, "mean", "ekf"} or callable
        Auxiliary filter: ``"mean"`` takes the model's `lookahead`, or the emission's density at the
        mean of the prior; ``"ekf"`` that of a local linearisation (`proposals.predictive`). With no
        particle that looks possible, the weights choose alone.
    reference : Reference, optional
    weigh : Weigh, optional
        In place of the emission's density.
    differentiable : bool
        Keep gradients; see `seqdgm.inference.differentiable`. Draws are reparameterised; those that
        have no such form enter by the score of their density.
    collapse : {"raise", "zero"}
        What becomes of a series in which every particle has weight zero: a ValueError, or evidence
        of minus infinity (a parameter value that the data rule out); NaN raises either way.
    compile : bool
        Compile the model's step, for `filter` and `log_prob`: `seqdgm.inference.compiled`.
    """

    n_particles: int = 1000
    resampler: str | Resampler | MemoryResampler = "systematic"
    threshold: float = 0.5
    draw_observations: bool = False
    proposal: str | Proposal = "auto"
    lookahead: Literal["mean", "ekf"] | Lookahead | None = None
    reference: Reference | None = None
    weigh: Weigh | None = None
    differentiable: bool = False
    collapse: Literal["raise", "zero"] = "raise"
    compile: bool = False


@dataclass
class Cloud:
    """The particles between two steps, from which `run` can go on.

    Attributes
    ----------
    s, x : state trees with leading axes (series, particle)
        State, and observation where the model feeds it back.
    log_weights : Tensor of shape (series, particle)
        Normalised.
    eve, resamplings : Tensor of int, shapes (series, particle) and (series,)
        First ancestors, and how often each series was resampled.
    increments, ess : list of Tensor of shape (series,)
        Of every step so far.
    """

    s: Any
    x: Tensor | None
    log_weights: Float[Tensor, "series particle"]
    eve: Int[Tensor, "series particle"]
    resamplings: Int[Tensor, "series"]
    increments: list[Tensor] = field(default_factory=list)
    ess: list[Tensor] = field(default_factory=list)


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
    s : state tree with leading axes (series, particle)
        The particles at the end.
    stderr : Tensor of shape (series,)
        Standard error of the log-evidence (Lee and Whiteley 2018, equation 8); inf where all
        particles descend from one and the estimator has nothing to compare. It is derived for
        multinomial resampling; systematic resampling makes families vary less than their shares of
        the evidence do, and the error comes out too small, in a test case by a quarter where every
        step resamples.
    cloud : Cloud
        To go on from, at the step after the last.
    """

    increments: Float[Tensor, "series time"]
    ess: Float[Tensor, "series time"]
    log_weights: Float[Tensor, "series particle"]
    s: Any
    stderr: Float[Tensor, "series"]
    cloud: Cloud


class _Facts(NamedTuple):
    """One step of the whole batch, with what the loop would otherwise ask of tensors."""

    x: Float[Tensor, "series one dim"]
    mask: Bool[Tensor, "series one dim"]
    inside: Bool[Tensor, "series"]
    u: Inputs
    all_inside: bool
    any_inside: bool
    seen: bool
    complete: bool

    @classmethod
    def of(cls, batch: Batch, span: slice) -> Iterator[_Facts]:
        valid, mask, known = batch.valid[:, span], batch.mask[:, span], batch.inputs_all()
        values = known.values[:, span].unsqueeze(2).unbind(1)
        # Numbers of the steps, of all series or of each.
        each = known.t.ndim == 2
        when = known.t[:, span].unsqueeze(2).unbind(1) if each else known.t[span].unbind()
        columns = (
            batch.x[:, span].unsqueeze(2).unbind(1),
            mask.unsqueeze(2).unbind(1),
            valid.unbind(1),
            [Inputs(*step) for step in zip(values, when, strict=True)],
            valid.all(0).tolist(),
            valid.any(0).tolist(),
            mask.any(-1).any(0).tolist(),
            mask.all(-1).all(0).tolist(),
        )
        return (cls(*row) for row in zip(*columns, strict=True))


class _Plan(NamedTuple):
    """What stays the same over the steps of a run."""

    model: StateSpaceModel
    options: SMCOptions
    shape: tuple[int, int]
    resampler: Resampler | MemoryResampler
    binds: bool  # whether the resampler is a MemoryResampler; asking at every step is slow
    proposal: Proposal | None
    context: Any
    generator: torch.Generator


def run(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    collectors: tuple[Collector, ...] = (),
    *,
    cloud: Cloud | None = None,
    stop: int | None = None,
) -> SMCResult:
    """Run the particle filter over a batch of series.

    With `cloud`, which is used up, go on from where it stands; with `stop`, end before that step.

    Raises
    ------
    ValueError
        If every particle of a series has weight zero, or a weight is not a number: the series and
        the step are named. If the options do not fit the model.
    """
    with torch.set_grad_enabled(options.differentiable):
        plan = _make_plan(model, batch, options, generator)
        return _run(plan, batch, collectors, cloud or _begin(plan, batch), stop)


def _begin(plan: _Plan, batch: Batch) -> Cloud:
    n, count = plan.shape
    device = batch.x.device
    return Cloud(
        s=plan.model.start(plan.shape),
        x=batch.x.new_zeros(n, count, batch.x.shape[2]) if plan.model.feedback else None,
        log_weights=torch.full(plan.shape, -math.log(count), dtype=torch.float64, device=device),
        eve=torch.arange(count, device=device).expand(plan.shape),
        resamplings=torch.zeros(n, dtype=torch.int64, device=device),
    )


def _run(
    plan: _Plan, batch: Batch, collectors: tuple[Collector, ...], cloud: Cloud, stop: int | None
) -> SMCResult:
    model, first = plan.model, len(cloud.increments)
    for t, now in enumerate(_Facts.of(batch, slice(first, stop)), first):
        with _naming(t):
            fed = None if cloud.x is None else model.embed(cloud.x)
            h = model.advance(cloud.s, fed, now.u)
            h, ancestors = _resample(plan, cloud, h, t, now) if t else (h, None)
            z, x = _move(plan, cloud, h, t, now)
        _check(cloud, batch, t, plan.options.collapse)
        for collector in collectors:
            collector.update(Step(t, h, z, cloud.s, x, cloud.log_weights, ancestors, now.inside))
    return SMCResult(
        torch.stack(cloud.increments, 1),
        torch.stack(cloud.ess, 1),
        cloud.log_weights,
        cloud.s,
        evidence_stderr(cloud),
        cloud,
    )


def _make_plan(
    model: StateSpaceModel, batch: Batch, options: SMCOptions, generator: torch.Generator
) -> _Plan:
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"threshold={options.threshold!r} must lie between 0 and 1")
    if options.compile:
        raise ValueError("compile=True serves filter and log_prob alone; leave it out here")
    moving = isinstance(options.resampler, MemoryResampler)
    if moving and (options.lookahead is not None or options.reference is not None):
        raise ValueError(
            "a resampler that moves particles takes neither a look-ahead nor a reference trajectory"
        )
    if options.lookahead not in (None, "mean", "ekf") and not callable(options.lookahead):
        raise ValueError(
            f"lookahead={options.lookahead!r} must be None, 'mean', 'ekf' or a function"
        )
    reference = options.reference
    if reference is not None:
        wanted = (*batch.x.shape[:2], model.latent_dim)
        if tuple(reference.z.shape) != wanted:
            raise ValueError(
                f"the reference has shape {tuple(reference.z.shape)}, not (series, time, state) = "
                f"{wanted}"
            )
        if reference.ancestor_sampling and not model.memoryless:
            raise ValueError(
                f"{type(model).__name__} has a memory besides z, so that the reference cannot draw "
                "new ancestors step by step; use ancestor_sampling=False"
            )
        if model.feedback and model.fills_missing and not batch.complete:
            raise ValueError(
                f"{type(model).__name__} feeds observations back, and some are missing: a "
                "reference trajectory does not hold them; impute them first"
            )
    if reference is not None and options.differentiable:
        raise ValueError("the conditional filter has no gradient; use differentiable=False")
    resampler = find_resampler(options.resampler, conditional=reference is not None)
    proposal = make_proposal(options.proposal, model) if model.latent_dim else None
    return _Plan(
        model,
        options,
        (batch.n_series, options.n_particles),
        resampler,
        moving,
        proposal,
        None if proposal is None else proposal.begin(model, batch),
        generator,
    )


def _resample(
    plan: _Plan, cloud: Cloud, h: Any, t: int, now: _Facts
) -> tuple[Any, Int[Tensor, "series particle"] | None]:
    """Choose ancestors by weight and look-ahead; gather the memory that they left."""
    if plan.shape[1] == 1:
        return h, None
    chances, ess, log_eta = cloud.log_weights, cloud.ess[-1], None
    if plan.options.lookahead is not None and now.seen:
        log_eta = lookahead(plan, h, now)
        chances, _, ess = weigh(chances + log_eta)
    reference = plan.options.reference
    if plan.binds:
        resampler = cast(MemoryResampler, plan.resampler).bind(h)
    else:
        resampler = cast(Resampler, plan.resampler)
    if reference is not None and reference.ancestor_sampling:
        resampler = renewing(
            plan.model, resampler, reference.z[:, t, None], cloud.log_weights, h, now
        )
    done = adaptive(resampler, plan.options.threshold)(chances, ess, plan.generator)
    if done is None:
        return h, None
    drawn, needed = done
    ancestors = drawn.ancestors
    log_weights = drawn.log_weights
    if log_eta is not None:
        # W / chances at the ancestor: 1 without a look-ahead.
        log_weights = log_weights + gather(cloud.log_weights - chances, ancestors)
        log_weights = torch.where(needed[:, None], log_weights, cloud.log_weights)
    cloud.log_weights = log_weights
    cloud.eve = gather(cloud.eve, ancestors)
    cloud.resamplings = cloud.resamplings + needed
    return tree_map(partial(inherit, drawn), h), ancestors


def _move(
    plan: _Plan, cloud: Cloud, h: Any, t: int, now: _Facts
) -> tuple[Tensor | None, Tensor | None]:
    """Draw all particles of one step and weigh them."""
    model = plan.model
    z, log_ratio = propose(plan, h, t, now)
    cloud.s = model.absorb(h, z)
    log_g, filled = _observe(plan, cloud, now)
    log_w = cloud.log_weights
    parts = [part.double() for part in (log_g, log_ratio) if part is not None]
    if parts:
        log_w, increment, ess = weigh(log_w + sum(parts))
    else:
        increment = log_w.new_zeros(len(log_w))
        ess = effective_sample_size(log_w)
    cloud.log_weights = log_w
    cloud.increments.append(increment)
    cloud.ess.append(ess)
    if model.feedback:
        cloud.x = filled
    return z, filled


def _observe(plan: _Plan, cloud: Cloud, now: _Facts) -> tuple[Tensor | None, Tensor | None]:
    """log g, and x with its missing elements drawn; None where not needed."""
    model, options = plan.model, plan.options
    filling = model.feedback or options.draw_observations
    drawing = options.draw_observations or model.fills_missing
    shape = (*plan.shape, now.x.shape[-1])
    x, mask = now.x.expand(shape), now.mask.expand(shape)
    if options.weigh is not None:
        if not (now.seen or filling):
            return None, None
        log_g, drawn = options.weigh(
            model, cloud.s, now.u, now.x, now.mask, cloud.log_weights, plan.generator
        )
        filled = torch.where(mask, x, drawn if drawing else torch.nan)
        return log_g if now.seen else None, filled
    emission = model.emission(cloud.s, now.u)
    seen = dist.log_prob(emission, x, None if now.complete else mask) if now.seen else None
    if not filling:
        return seen, None
    if now.complete:
        return seen, x
    if not drawing:
        return seen, torch.where(mask, x, torch.nan)
    wide = dist.expand(emission, plan.shape, shape[2])
    return seen, dist.fill_missing(wide, x, mask, plan.generator, options.differentiable)


@contextmanager
def _naming(t: int) -> Iterator[None]:
    """Say at which step a distribution of the model refused its parameters."""
    try:
        yield
    except ValueError as error:
        error.add_note(f"at step {t} of the particle filter")
        raise


def _check(cloud: Cloud, batch: Batch, t: int, collapse: Literal["raise", "zero"]) -> None:
    increment = cloud.increments[-1].detach()
    if math.isfinite(float(increment.sum())):
        return
    bad = ~torch.isfinite(increment)
    if collapse == "zero":
        # The particles go on with equal weights; the evidence stays minus infinity.
        dead = increment == -torch.inf
        equal = -math.log(cloud.log_weights.shape[1])
        cloud.log_weights = torch.where(dead[:, None], equal, cloud.log_weights)
        bad = bad & ~dead
    places = torch.nonzero(bad)
    if len(places):
        k = int(places[0, 0])
        step = t + (batch.begin if isinstance(batch.begin, int) else int(batch.begin[k]))
        raise ValueError(
            f"series {batch.ids[k]!r}, step {step}: every particle has weight zero or a weight "
            "that is not a number; the observation is impossible under the model, or the model "
            "returned NaN: check the observation, use a heavier-tailed emission or more particles"
        )
