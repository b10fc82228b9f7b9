"""Paths of interacting particles along observed series, for learning.

The loop is that of `seqdgm.inference.scan` with an axis for particles, which are resampled as they
go. Whom to keep is decided without gradients; afterwards every prior, proposal and emission is
evaluated once more, with gradients, in one call over (series x particles x time). A model that
unrolls itself is steered: it asks after each step whom the particles go on from. What it gives
stays rows of steps within the series, and nothing but log-densities is ever padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference import joint
from seqdgm.inference.joint import Along
from seqdgm.inference.resampling import (
    RESAMPLERS,
    AdaptiveResampler,
    adaptive,
    gather,
    select,
    weigh,
)
from seqdgm.inference.scan import fed, unrolled
from seqdgm.kernels.particles_types import Scheme
from seqdgm.nn import distributions as dist
from seqdgm.nn.deferred import deferred
from seqdgm.nn.dropout import rows_of
from seqdgm.nn.ragged import Ragged
from seqdgm.types import Batch, Inputs, tree_map, tree_stack, tree_unbind

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


@dataclass(frozen=True)
class Steering:
    """How particles are drawn and resampled.

    Attributes
    ----------
    n_particles : int
    threshold : float
        Resample when the effective sample size falls below this share of the particles.
    beta : float
        Power of f / q in the weights.
    independent : bool
        Whether ancestors are drawn independently of each other (multinomial resampling); else
        systematically.
    reparameterised : bool
        Whether gradients flow through the draws. Where not, the proposals have no gradient to the
        memory either: what the memory learns, it learns from the model.
    """

    n_particles: int
    threshold: float
    beta: float = 1.0
    independent: bool = False
    reparameterised: bool = True

    @property
    def scheme(self) -> Scheme:
        """How ancestors are drawn."""
        return "multinomial" if self.independent else "systematic"

    @property
    def resample(self) -> AdaptiveResampler:
        """Draws ancestors for the series whose effective sample size is too small."""
        return adaptive(RESAMPLERS[self.scheme], self.threshold)


class Rows(NamedTuple):
    """Data of the rows of all steps (`seqdgm.nn.ragged`); a series' particles stand together.

    Attributes
    ----------
    ragged : Ragged
        Of series that have each a row for every particle.
    n_particles : int
    x : Tensor of shape (rows, dim)
    mask : Tensor of bool, shape (rows, dim), or None
        Observed elements; None if all are.
    u : Inputs
    """

    ragged: Ragged
    n_particles: int
    x: Float[Tensor, "rows dim"]
    mask: Bool[Tensor, "rows dim"] | None
    u: Inputs

    @classmethod
    def of(cls, batch: Batch, n_particles: int) -> Rows:
        """Rows of a batch."""
        ragged = Ragged.of(batch.lengths.repeat_interleave(n_particles), batch.n_steps)
        place, known = ragged.shared(n_particles), batch.inputs_all()
        arrays = (batch.x, known.values, *(() if batch.complete else (batch.mask,)))
        x, values, *mask = (part.flatten(0, 1).index_select(0, place) for part in arrays)
        u = Inputs(values, known.t[place % batch.n_steps])
        return cls(ragged, n_particles, x, mask[0] if mask else None, u)

    @property
    def series(self) -> Int[Tensor, "rows"]:
        """Series that each row belongs to."""
        return self.ragged.place // (self.n_particles * self.ragged.shape[1])

    def pad(self, rows: Float[Tensor, "rows *part"]) -> Float[Tensor, "series particle time *part"]:
        """Padded form of rows, 0 beyond each series' end."""
        columns = rows[:, None] if rows.ndim == 1 else rows
        padded = self.ragged.unpack(columns).unflatten(0, (-1, self.n_particles))
        return padded[..., 0] if rows.ndim == 1 else padded


class Swarm(NamedTuple):
    """Particles of every step.

    Attributes
    ----------
    path : Along
    z : Tensor of shape (series, particle, time, state)
    log_q : Tensor of shape (series, particle, time) or None
        Log-density of what z was drawn from; None where that is the prior.
    ancestors : Tensor of int, shape (series, particle, time)
        Numbers of the particles of the step before.
    resampled : Tensor of bool, shape (series, time)
        Whether the series was resampled before the step.
    context : Tensor of shape (series, time, features) or None
        Encoded data.
    rows : Rows or None
        Of a model that unrolled itself. `path`, `z` and `log_q` have its rows as one axis then, in
        place of (series, particle, time).
    """

    path: Along
    z: Float[Tensor, "series particle time state"] | Float[Tensor, "rows state"]
    log_q: Float[Tensor, "series particle time"] | Float[Tensor, "rows"] | None
    ancestors: Int[Tensor, "series particle time"]
    resampled: Bool[Tensor, "series time"]
    context: Tensor | None
    rows: Rows | None = None


class Densities(NamedTuple):
    """Log-densities along particles, of shape (series, particle, time), in float64, with gradients.

    Zero beyond a series' end. `auxiliary` is the model's own term of training. None: not there, or
    not asked for.
    """

    emission: Float[Tensor, "series particle time"]
    prior: Float[Tensor, "series particle time"] | None
    proposal: Float[Tensor, "series particle time"] | None
    auxiliary: Float[Tensor, "series particle time"] | None


@dataclass
class _Cloud:
    """The particles between two steps.

    `x` are observations with the missing ones drawn, where the model reads those back.
    """

    s: Any
    x: Tensor | None
    log_weights: Float[Tensor, "series particle"]
    ess: Float[Tensor, "series"]


class _Step(NamedTuple):
    """What is kept of one step."""

    h: Any
    z: Tensor
    s: Any
    law: Distribution
    ancestors: Int[Tensor, "series particle"]
    resampled: Bool[Tensor, "series"]


@deferred()
def particle_scan(
    model: StateSpaceModel, batch: Batch, how: Steering, generator: torch.Generator
) -> Swarm:
    """Draw particles along the data, by the proposal, with gradients.

    Missing observations that the model feeds back are drawn from its own emission as it goes.
    """
    shape = (batch.n_series, how.n_particles)
    context = model.encode(batch)
    over_time = fed(model, batch, context)
    if how.reparameterised:
        whole = _steered(model, batch, how, generator, (over_time, context))
        if whole is not None:
            return whole
    given = None if over_time is None else tree_unbind(over_time, 1)
    summaries = None if context is None else context[:, None].unbind(2)
    drawn = model.feedback and given is None
    cloud = _Cloud(
        model.start(shape),
        batch.x.new_zeros(*shape, batch.x.shape[2]) if drawn else None,
        batch.x.new_zeros(shape, dtype=torch.float64),
        batch.x.new_full(shape[:1], how.n_particles, dtype=torch.float64),
    )
    steps = []
    for t in range(batch.n_steps):
        u = batch.inputs_at(t, 1)
        chosen = _resample(cloud, how, batch, t, generator)
        read = None
        if given is not None:
            read = tree_map(lambda leaf: leaf[:, None].expand(*shape, -1), given[t])
        if cloud.x is not None:
            read = model.embed(cloud.x)
        h = model.advance(cloud.s, read, u)
        law = _law(model, h, None if summaries is None else summaries[t], u, how)
        law = dist.expand(law, shape, model.latent_dim)
        z = dist.sample(law, generator, reparameterised=how.reparameterised)
        cloud.s = model.absorb(h, z)
        steps.append(_Step(h, z, cloud.s, law, *chosen))
        _weigh(model, batch, t, u, how, steps[-1], cloud, generator, bootstrap=context is None)
    return _stacked(steps, context)


def _for_all(leaf: Tensor, shape: tuple[int, int]) -> Tensor:
    """What all particles of a series share."""
    return leaf[:, None].expand(*shape, *leaf.shape[1:])


def _resample(
    cloud: _Cloud, how: Steering, batch: Batch, t: int, generator: torch.Generator
) -> tuple[Int[Tensor, "series particle"], Bool[Tensor, "series"]]:
    """Let the particles of series with uneven weights choose their ancestors."""
    own = torch.arange(how.n_particles, device=batch.x.device).expand_as(cloud.log_weights)
    never = torch.zeros_like(batch.lengths, dtype=torch.bool)
    done = how.resample(cloud.log_weights, cloud.ess, generator) if t else None
    if done is None:
        return own, never
    (ancestors, cloud.log_weights, _), resampled = done
    cloud.s = tree_map(partial(gather, ancestors=ancestors), cloud.s)
    cloud.x = None if cloud.x is None else gather(cloud.x, ancestors)
    return ancestors, resampled


def _law(
    model: StateSpaceModel, h: Any, c: Tensor | None, u: Inputs, how: Steering
) -> Distribution:
    """What z is drawn from: the proposal, or the prior of a model without one."""
    if c is not None:
        return model.proposal(h if how.reparameterised else tree_map(Tensor.detach, h), c, u)
    prior = model.prior(h, u)
    assert prior is not None
    return prior


@torch.no_grad()
def _weigh(
    model: StateSpaceModel,
    batch: Batch,
    t: int,
    u: Inputs,
    how: Steering,
    step: _Step,
    cloud: _Cloud,
    generator: torch.Generator,
    *,
    bootstrap: bool,
) -> None:
    """Weigh the particles, and draw what is missing of the observation and read back."""
    shape = (*cloud.log_weights.shape, batch.x.shape[2])
    x, mask = batch.x[:, t, None].expand(shape), batch.mask[:, t, None].expand(shape)
    emission = dist.expand(model.emission(step.s, u), shape[:2], shape[2])
    log_w = dist.log_prob(emission, x, mask).double()
    if not bootstrap:
        ratio = _log_prior(model, step.h, u, step.z) - dist.log_prob(step.law, step.z)
        log_w = log_w + how.beta * ratio
    inside = (t < batch.lengths)[:, None]
    log_w = cloud.log_weights + torch.where(inside, log_w, 0.0)
    cloud.log_weights, _, cloud.ess = weigh(_drawable(log_w))
    if cloud.x is not None:
        cloud.x = dist.fill_missing(emission, x, mask, generator)


def _drawable(
    log_weights: Float[Tensor, "series particle"],
) -> Float[Tensor, "series particle"]:
    """Equal weights in place of those from which nothing can be drawn.

    The loss of such a series is not finite; whoever learns from it stops there and names it.
    """
    return torch.where(log_weights.amax(1, keepdim=True).isfinite(), log_weights, 0.0)


def _log_prior(
    model: StateSpaceModel, h: Any, u: Inputs, z: Float[Tensor, "*batch state"]
) -> Float[Tensor, "*batch"]:
    prior = model.prior(h, u)
    assert prior is not None
    return dist.log_prob(dist.expand(prior, z.shape[:-1], model.latent_dim), z)


def _stacked(steps: list[_Step], context: Tensor | None) -> Swarm:
    hs, zs, ss, laws, ancestors, resampled = (list(part) for part in zip(*steps, strict=True))
    first, z = int(hs[0] is None), torch.stack(zs, 2)
    return Swarm(
        Along(tree_stack(hs[first:], 2) if len(hs) > first else None, tree_stack(ss, 2), first),
        z,
        None if context is None else dist.log_prob(dist.stack(laws, 2), z),
        torch.stack(ancestors, 2),
        torch.stack(resampled, 1),
        context,
    )


# --------------------------------------------------------------------------------- unrolled models


class _Pilot:
    """Steers the particles of a model that unrolls itself; those of a series stand together."""

    def __init__(
        self,
        model: StateSpaceModel,
        batch: Batch,
        how: Steering,
        rows: Rows,
        generator: torch.Generator,
    ) -> None:
        self.model, self.how, self.generator = model, how, generator
        count, steps, ragged = how.n_particles, batch.n_steps, rows.ragged
        # Series from the longest to the shortest, and how many of them reach each step.
        self.order = ragged.order[::count] // count
        self.sizes = [size // count for size in ragged.sizes]
        arrays = (rows.u.values, rows.series, rows.x, *(() if rows.mask is None else (rows.mask,)))
        self.data = [x.split(ragged.sizes) for x in arrays]
        self.t = batch.inputs_all().t.unbind()
        self.log_weights = batch.x.new_zeros((len(batch.x), count), dtype=torch.float64)
        own = torch.arange(count, device=batch.x.device)
        self.ancestors = own.repeat(steps, len(self.order), 1)
        self.resampled = torch.zeros_like(batch.valid.t())
        self.first = count * torch.arange(len(self.order), device=batch.x.device)[:, None]

    def __call__(
        self, t: int, rows: Int[Tensor, "rows"], h: Any, s: Any, z: Tensor, log_q: Tensor
    ) -> Int[Tensor, "later"] | None:
        """Weigh the particles of step t, and let them choose their ancestors."""
        values, series, x, *mask = (part[t] for part in self.data)
        u, later = Inputs(values, self.t[t]), self.sizes[t + 1]
        with rows_of(series):
            emission = dist.expand(self.model.emission(s, u), (len(z),), x.shape[1])
            log_g = dist.log_prob(emission, x, *mask)
            ratio = _log_prior(self.model, h, u, z) - log_q
        how, log_w = self.how, torch.add(log_g.double(), ratio, alpha=self.how.beta)
        log_w = _drawable(self.log_weights + log_w.view(-1, how.n_particles))
        found = select(log_w, later, how.scheme, how.threshold, self.generator)
        self.log_weights, ancestors, resampled = found
        if ancestors is None or resampled is None:
            return None
        self.resampled[t + 1, :later] = resampled
        self.ancestors[t + 1, :later] = ancestors
        return (ancestors + self.first[:later]).view(-1)

    def chosen(self) -> tuple[Int[Tensor, "series particle time"], Bool[Tensor, "series time"]]:
        """Ancestors of all steps, and which series were resampled."""
        place = torch.argsort(self.order)
        return self.ancestors[:, place].permute(1, 2, 0), self.resampled[:, place].t()


def _steered(
    model: StateSpaceModel,
    batch: Batch,
    how: Steering,
    generator: torch.Generator,
    given: tuple[Any, Tensor | None],
) -> Swarm | None:
    """The particles of a model that unrolls itself, out of its embedding and context."""
    rows = Rows.of(batch, how.n_particles)
    pilot = _Pilot(model, batch, how, rows, generator)
    start = model.start((batch.n_series * how.n_particles,))
    whole = (start, *given, batch.inputs_all())
    trace = unrolled(model, batch.lengths, generator, whole, pilot)
    if trace is None:
        return None
    assert trace.z is not None
    path = Along(trace.h, trace.s, 0)
    return Swarm(path, trace.z, trace.log_q, *pilot.chosen(), given[1], rows)


# --------------------------------------------------------------------------------- log-densities


def densities(model: StateSpaceModel, batch: Batch, swarm: Swarm, *, prior: bool) -> Densities:
    """Log-densities along particles; that of the prior where it is asked for."""
    if swarm.rows is not None:
        return _densities_of_rows(model, swarm, swarm.rows, prior=prior)
    wide = (*swarm.z.shape[:3], batch.x.shape[2])
    seen, mask = batch.x[:, None].expand(wide), batch.mask[:, None].expand(wide)
    log_g = joint.log_emission(model, batch, swarm.path, seen, mask)
    log_f = joint.log_prior(model, batch, swarm.path, swarm.z) if prior else None
    inside, log_q, extra = batch.valid[:, None], None, None
    if swarm.log_q is not None:
        log_q = torch.where(inside, swarm.log_q.double(), 0.0)
    if swarm.context is not None:
        known = batch.inputs_all()
        u = Inputs(known.values[:, None], known.t)
        extra = model.auxiliary(swarm.path.h, swarm.z, swarm.context[:, None], u)
        extra = None if extra is None else torch.where(inside, extra.double(), 0.0)
    return Densities(log_g, log_f, log_q, extra)


def _densities_of_rows(
    model: StateSpaceModel, swarm: Swarm, rows: Rows, *, prior: bool
) -> Densities:
    from seqdgm.recursion import StateSpaceModel

    h, z, extra = swarm.path.h, swarm.z, None
    with rows_of(rows.series):
        emission = dist.expand(model.emission(swarm.path.s, rows.u), z.shape[:1], rows.x.shape[1])
        log_g = dist.log_prob(emission, rows.x, rows.mask)
        log_f = _log_prior(model, h, rows.u, z) if prior else None
        if swarm.context is not None and type(model).auxiliary is not StateSpaceModel.auxiliary:
            c = swarm.context.flatten(0, 1)
            place = rows.ragged.shared(rows.n_particles)
            extra = model.auxiliary(h, z, c.index_select(0, place), rows.u)
    found = (log_g, log_f, swarm.log_q, extra)
    padded = rows.pad(torch.stack([part for part in found if part is not None], 1).double())
    columns = iter(padded.unbind(3))
    return Densities._make(None if part is None else next(columns) for part in found)


def increments(
    log_weights: Float[Tensor, "series particle time"], resampled: Bool[Tensor, "series time"]
) -> tuple[Float[Tensor, "series time"], Float[Tensor, "series particle time"]]:
    r"""Increments of the log-evidence, and normalised log-weights after each step.

    Parameters
    ----------
    log_weights : Tensor of shape (series, particle, time)
        Of every step by itself, :math:`\log w_t^k`.
    resampled : Tensor of bool, shape (series, time)
        Whether all particles had the same weight before the step.

    Examples
    --------
    >>> log_w = torch.tensor([[[0.0, 1.0], [0.0, 3.0]]], dtype=torch.float64)
    >>> steps, weights = increments(log_w, torch.zeros(1, 2, dtype=torch.bool))
    >>> round(steps.sum().item(), 4)  # log of (e + e^3) / 2
    2.4338
    """
    after = log_weights.cumsum(2)
    before = after - log_weights
    t = torch.arange(log_weights.shape[2], device=log_weights.device)
    since = torch.where(resampled, t, 0).cummax(1).values[:, None].expand_as(before)
    base = before.gather(2, since)
    total = torch.logsumexp(after - base, 1)
    return total - torch.logsumexp(before - base, 1), after - base - total[:, None]
