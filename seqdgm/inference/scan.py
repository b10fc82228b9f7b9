"""One pass of the recursion along observed series, for learning and exact likelihoods.

Only what recurs stays in the time loop: `advance`, `proposal` and `absorb`. Priors, divergences and
emissions are evaluated afterwards, in one call over (series x time). A model whose memory does not
see z runs fused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.nn import distributions as dist
from seqdgm.nn.deferred import deferred
from seqdgm.types import Batch, Inputs, Steer, tree_map, tree_stack, tree_unbind

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Trace(NamedTuple):
    """One path through the recursion; every tensor has leading axes (series, time).

    Attributes
    ----------
    h, z, s : state trees; `h` starts at step `first`
    first : int
        1 where the first state has a law of its own and no memory before it, else 0.
    proposals : list of Distribution, or Distribution
        What z was drawn from, at each step or (of a model that unrolls itself) at all of them;
        empty without latent states.
    context : Tensor or None
        Encoded data that the proposals read.
    x : Tensor or None
        Observations with the missing ones drawn, where the model fed those back.
    log_q : Tensor or None
        Log-densities of the draws of steered paths.
    """

    h: Any
    z: Tensor | None
    s: Any
    first: int
    proposals: list[Distribution] | Distribution
    context: Tensor | None = None
    x: Tensor | None = None
    log_q: Tensor | None = None

    def proposal(self, steps: slice) -> Distribution:
        """What z was drawn from at some steps; all of them, where the model unrolled itself."""
        if isinstance(self.proposals, list):
            return dist.stack(self.proposals[steps], 1)
        return self.proposals


class Piece(NamedTuple):
    """What a window of the series takes over from the steps before it.

    Attributes
    ----------
    s : state tree
        State before the window; None where the first state has a law of its own.
    x : Tensor of shape (series, dim)
        Observation before it; 0 at the beginning of the series.
    context : Tensor of shape (series, time, features) or None
        The steps of the window of what `model.encode` gives for the whole series.
    complete : bool
        Whether nothing is missing in the whole series.
    """

    s: Any
    x: Tensor
    context: Tensor | None
    complete: bool


def scan(
    model: StateSpaceModel,
    batch: Batch,
    generator: torch.Generator,
    copies: int = 1,
    piece: Piece | None = None,
) -> Trace:
    """Draw paths of states along the data, by the proposal, with gradients.

    Missing observations that the model feeds back are drawn from its own emission as it goes. The
    `copies` paths of a series come one after another in the axis of the series; what all of them
    read is computed once. A window of the series goes on from a `piece` (then with one copy).
    """
    if piece is None and model.latent_dim == 0 and (batch.complete or not model.feedback):
        h = model.memory(model.embed(previous(batch)), batch.inputs_all())
        if h is not None:
            return Trace(h, None, model.absorb(h, None), 0, [])
    with deferred():
        return _loop(model, batch, generator, copies, piece)


def prior_over_time(
    model: StateSpaceModel, batch: Batch, trace: Trace
) -> list[tuple[slice, Distribution]]:
    """Priors of all z along a trace, in as few calls as the first step allows."""
    out = []
    steps = batch.n_steps
    if trace.first:
        first = model.prior(None, batch.inputs_at(0))
        assert first is not None
        wide = dist.expand(first, (batch.n_series,), model.latent_dim)
        out.append((slice(0, 1), dist.stack([wide], 1)))
    if steps > trace.first:
        u = batch.inputs_all()
        later = Inputs(u.values[:, trace.first :], u.t[trace.first :])
        rest = model.prior(trace.h, later)
        assert rest is not None
        shape = (batch.n_series, steps - trace.first)
        out.append((slice(trace.first, steps), dist.expand(rest, shape, model.latent_dim)))
    return out


def copied(batch: Batch, copies: int) -> Int[Tensor, "rows"]:
    """Numbers of the series, each as often as it has paths."""
    return torch.arange(batch.n_series, device=batch.x.device).repeat_interleave(copies)


def previous(batch: Batch, piece: Piece | None = None) -> Tensor:
    """Observations shifted by one step, zeros before the first of a series."""
    first = torch.zeros_like(batch.x[:, :1]) if piece is None else piece.x[:, None]
    return torch.cat([first, batch.x[:, :-1]], 1)


def fed(
    model: StateSpaceModel, batch: Batch, context: Tensor | None, piece: Piece | None = None
) -> Any:
    """What `advance` reads, over time; None where observations have to be drawn on the way."""
    complete = batch.complete if piece is None else piece.complete
    if not (model.feedback and complete):
        return None
    backbone = None if context is None else model.backbone(context)
    return model.embed(previous(batch, piece)) if backbone is None else backbone


def unrolled(
    model: StateSpaceModel,
    lengths: Int[Tensor, "series"],
    generator: torch.Generator,
    given: tuple[Any, Any, Tensor | None, Inputs],
    steer: Steer | None = None,
) -> Trace | None:
    """The trace of a model that unrolls itself, out of its state, embedding, context and inputs."""
    s, x, context, known = given
    # Autocasting works operation by operation, which there are none of.
    if context is None or torch.is_autocast_enabled(context.device.type):
        return None
    if model.feedback and x is None:
        return None
    found = model.unroll(s, x, context, known, lengths, generator, steer)
    if found is None:
        return None
    s = model.absorb(found.h, found.z)
    return Trace(found.h, found.z, s, 0, found.proposal, context, log_q=found.log_q)


def _loop(
    model: StateSpaceModel,
    batch: Batch,
    generator: torch.Generator,
    copies: int,
    piece: Piece | None,
) -> Trace:
    context = model.encode(batch) if piece is None else piece.context
    over_time = fed(model, batch, context, piece)
    if copies > 1:
        rows = copied(batch, copies)
        batch = batch.take(rows)
        context = None if context is None else context[rows]
        over_time = tree_map(lambda leaf: leaf[rows], over_time)
    given = None if over_time is None else tree_unbind(over_time, 1)
    n = batch.n_series
    s = model.start((n,)) if piece is None else piece.s
    x = torch.zeros_like(batch.x[:, 0]) if piece is None else piece.x
    known = batch.inputs_all()
    whole = unrolled(model, batch.lengths, generator, (s, over_time, context, known))
    if whole is not None:
        return whole
    hs, zs, ss, xs, proposals = [], [], [], [], []
    steps = zip(known.values.unbind(1), known.t.unbind(), strict=True)
    summaries = None if context is None else context.unbind(1)
    for t, u in enumerate(Inputs(*step) for step in steps):
        read = None
        if model.feedback:
            read = model.embed(x) if given is None else given[t]
        h = model.advance(s, read, u)
        z = None
        if model.latent_dim:
            q = model.prior(h, u) if summaries is None else model.proposal(h, summaries[t], u)
            assert q is not None
            q = dist.expand(q, (n,), model.latent_dim)
            z = dist.sample(q, generator, reparameterised=True)
            proposals.append(q)
            zs.append(z)
        s = model.absorb(h, z)
        if model.feedback and given is None:
            with torch.no_grad():
                emission = dist.expand(model.emission(s, u), (n,), batch.x.shape[2])
                x = dist.fill_missing(emission, batch.x[:, t], batch.mask[:, t], generator)
            xs.append(x)
        hs.append(h)
        ss.append(s)
    first = int(hs[0] is None)
    return Trace(
        tree_stack(hs[first:], 1) if len(hs) > first else None,
        torch.stack(zs, 1) if zs else None,
        tree_stack(ss, 1),
        first,
        proposals,
        context,
        torch.stack(xs, 1) if xs else None,
    )
