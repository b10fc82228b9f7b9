"""Resampling and weight arithmetic of particle methods, batched over series.

A resampler maps normalised log-weights ``(series, particle)`` to ancestors and to the log-weights
after resampling. Whether to resample at all is not its concern: `adaptive` wraps one and leaves
alone the series whose effective sample size is large enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from seqdgm.kernels import particles as kernels
from seqdgm.kernels.particles import check_drawn, resample
from seqdgm.kernels.particles_types import Scheme, Weighed


class Resampled(NamedTuple):
    """What a resampler returns.

    Attributes
    ----------
    ancestors : Tensor of int64, shape (series, particle)
    log_weights : Tensor of shape (series, particle)
        After resampling; ``-log N`` for the standard schemes.
    transport : Tensor of shape (series, particle, particle), optional
        Row i holds the shares of the old particles in the new particle i, which is their mean. The
        ancestors are then draws from the rows, for what cannot be averaged.
    """

    ancestors: Int[Tensor, "series particle"]
    log_weights: Float[Tensor, "series particle"]
    transport: Float[Tensor, "series particle particle"] | None = None


Resampler = Callable[[Float[Tensor, "series particle"], torch.Generator], Resampled]


@runtime_checkable
class MemoryResampler(Protocol):
    """Resampling that looks at what the particles remember, not only at their weights."""

    def bind(self, h: Any) -> Resampler:
        """The resampler of particles with memories `h`, a tree with axes (series, particle)."""


def normalise(
    log_weights: Float[Tensor, "series particle"],
) -> tuple[Float[Tensor, "series particle"], Float[Tensor, "series"]]:
    """Return normalised log-weights and the log of their sum (-inf where all weights vanish)."""
    # Relative to the largest, because a sum that is much larger than 1 would round all others.
    top = log_weights.detach().amax(-1)
    shift = torch.where(torch.isfinite(top), top, 0.0)
    relative = log_weights - shift[:, None]
    rest = torch.logsumexp(relative, -1)
    safe = torch.where(torch.isfinite(rest), rest, 0.0)
    return relative - safe[:, None], shift + rest


def weigh(log_weights: Float[Tensor, "series particle"]) -> Weighed:
    """Normalised log-weights, the log of their sum and the effective sample size, in one pass."""
    if log_weights.requires_grad or not log_weights.is_cpu:
        normalised, total = normalise(log_weights)
        return Weighed(normalised, total, effective_sample_size(normalised.detach()))
    return kernels.weigh(log_weights)


def effective_sample_size(
    log_weights: Float[Tensor, "series particle"],
) -> Float[Tensor, "series"]:
    r"""Effective sample size :math:`1 / \sum_k W_k^2` of normalised log-weights."""
    return (-torch.logsumexp(2 * log_weights, -1)).exp()


def _ancestors(
    scheme: Scheme, log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Int[Tensor, "series particle"]:
    n, count = log_weights.shape
    shape = (n, _numbers(scheme, count))
    return resample(scheme, log_weights, _uniforms(log_weights, shape, generator))


def _numbers(scheme: Scheme, count: int) -> int:
    """Uniform numbers that a series takes."""
    return {"systematic": 1, "killing": 2 * count}.get(scheme, count)


def systematic(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Systematic resampling: one uniform number a series (Kitagawa 1996).

    The number of offspring of every particle is within one of its expectation. Cheapest, and mostly
    the least variable; its variance depends on the order of the particles.
    """
    return _equal(log_weights, _ancestors("systematic", log_weights, generator))


def stratified(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Stratified resampling: one uniform number in each of N strata (Kitagawa 1996)."""
    return _equal(log_weights, _ancestors("stratified", log_weights, generator))


def multinomial(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Multinomial resampling: independent ancestors (Gordon, Salmond and Smith 1993)."""
    return _equal(log_weights, _ancestors("multinomial", log_weights, generator))


def residual(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    r"""Residual resampling: :math:`\lfloor N W_k \rfloor` copies, the rest drawn.

    References
    ----------
    Liu and Chen (1998), Sequential Monte Carlo methods for dynamic systems, *JASA* 93.
    """
    return _equal(log_weights, _ancestors("residual", log_weights, generator))


def killing(log_weights: Float[Tensor, "series particle"], generator: torch.Generator) -> Resampled:
    r"""Killing: a particle stays with probability :math:`W_k / \max W`, else it is redrawn.

    It changes little where the weights differ little, as with small time steps.

    References
    ----------
    Del Moral (2004), *Feynman-Kac Formulae*, section 11.8; Karppinen, Singh and Vihola (2023),
    Conditional particle filters with bridge backward sampling, *JCGS* 33.
    """
    return _equal(log_weights, _ancestors("killing", log_weights, generator))


RESAMPLERS: dict[str, Resampler] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
    "killing": killing,
}


# ------------------------------------------------------------------- given a reference lineage
#
# An unbiased scheme followed by a random reordering has P(a_0 = k) = W_k. Given a_0 = 0, the scheme
# itself is drawn with probabilities proportional to the number of offspring of particle 0, one of
# which, chosen evenly, moves to place 0 (Andrieu, Doucet and Holenstein 2010, section 4). Where the
# law of the scheme depends on the order of the particles, everything is turned in a circle and
# nothing swapped: then it does not matter which particle the circle starts with.


def conditional_multinomial(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Multinomial resampling given that particle 0 descends from particle 0.

    References
    ----------
    Andrieu, Doucet and Holenstein (2010), Particle Markov chain Monte Carlo methods, *JRSS B* 72,
    section 4.3.
    """
    out = multinomial(log_weights, generator)
    out.ancestors[:, 0] = 0
    return out


def conditional_systematic(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Systematic resampling given that particle 0 descends from particle 0.

    References
    ----------
    Chopin and Singh (2015), On particle Gibbs sampling, *Bernoulli* 21, section 5.2.
    """
    n, count = log_weights.shape
    # Of the points j + u below N W_0 one belongs to the reference: it is uniform among them.
    point = count * log_weights[:, :1].exp() * _uniforms(log_weights, (n, 1), generator)
    first = point.floor().clamp_max(count - 1)
    offset = (point - first).clamp(0, 1 - 2**-53)
    ancestors = _turn(resample("systematic", log_weights, offset), first.long())
    ancestors[:, 0] = 0  # against rounding at the edge of W_0
    return _equal(log_weights, ancestors)


def conditional_stratified(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Stratified resampling given that particle 0 descends from particle 0.

    The strata lie anywhere with respect to the particles: the order of these starts at random.

    References
    ----------
    Chopin and Singh (2015), On particle Gibbs sampling, *Bernoulli* 21, section 5.2.
    """
    n, count = log_weights.shape
    device = log_weights.device
    start = torch.randint(count, (n, 1), generator=generator, device=device)
    turned = _turn(log_weights, start)
    place = (count - start) % count  # of the reference
    below = turned.exp().cumsum(1) - turned.exp()
    level = torch.gather(below, 1, place).clamp_min(0)
    level = level + log_weights[:, :1].exp() * _uniforms(log_weights, (n, 1), generator)
    point = count * level
    first = point.floor().clamp_max(count - 1)
    uniforms = _uniforms(log_weights, (n, count), generator)
    uniforms.scatter_(1, first.long(), (point - first).clamp(0, 1 - 2**-53))
    ancestors = resample("stratified", turned, uniforms)
    ancestors = (_turn(ancestors, first.long()) + start) % count
    ancestors[:, 0] = 0  # against rounding at the edges of W_0
    return _equal(log_weights, ancestors)


def conditional_residual(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Residual resampling given that particle 0 descends from particle 0.

    It is one of the copies of particle 0, or one of the draws from the remainders.
    """
    n, count = log_weights.shape
    expected = count * log_weights.exp()
    copies = expected.floor()
    fixed = copies.sum(1, keepdim=True)
    rest = (expected - copies) / (count - fixed)
    # Where all are copies nothing is drawn, whatever the weights are.
    log_rest = torch.where(fixed < count, rest.log(), log_weights)
    drawn = resample("multinomial", log_rest, _uniforms(log_weights, (n, count), generator))
    own = torch.arange(count, device=log_weights.device, dtype=copies.dtype).expand(n, count)
    copied = torch.searchsorted(copies.cumsum(1), own.contiguous(), right=True)
    ancestors = torch.where(own < fixed, copied.clamp_max(count - 1), drawn)
    point = expected[:, :1] * _uniforms(log_weights, (n, 1), generator)
    among_draws = (point >= copies[:, :1]) & (fixed < count)
    place = torch.where(among_draws, fixed, 0.0).long()
    return _equal(log_weights, _put_first(ancestors, place))


def conditional_killing(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Killing given that particle 0 descends from particle 0.

    A place chosen at random and killed there takes the reference, else its own place does.

    References
    ----------
    Karppinen, Singh and Vihola (2023), Conditional particle filters with bridge backward sampling,
    *JCGS* 33, algorithm 5.
    """
    n, count = log_weights.shape
    ancestors = _ancestors("killing", log_weights, generator)
    place = torch.randint(count, (n, 1), generator=generator, device=log_weights.device)
    stays = (torch.gather(log_weights, 1, place) - log_weights.max(1, keepdim=True).values).exp()
    survives = _uniforms(log_weights, (n, 1), generator) < stays
    return _equal(log_weights, _put_first(ancestors, place.masked_fill(survives, 0)))


def resample_from(
    conditional: Resampler,
    log_weights: Float[Tensor, "series particle"],
    origin: Int[Tensor, "series one"],
    generator: torch.Generator,
) -> Resampled:
    """Conditional resampling given that particle 0 descends from the particle `origin`.

    Parameters
    ----------
    conditional : Resampler
        One that is given that particle 0 descends from particle 0, such as those of `CONDITIONAL`.
    log_weights : Tensor of shape (series, particle)
        Normalised.
    origin : Tensor of int64, shape (series, 1)
    generator : torch.Generator

    Examples
    --------
    >>> log_weights = torch.tensor([[0.5, 0.25, 0.25]]).double().log()
    >>> generator = torch.Generator().manual_seed(0)
    >>> out = resample_from(conditional_systematic, log_weights, torch.tensor([[2]]), generator)
    >>> out.ancestors[0, 0]
    tensor(2)
    """
    drawn = conditional(_turn(log_weights, origin), generator)
    return drawn._replace(ancestors=(drawn.ancestors + origin) % log_weights.shape[1])


def _turn(x: Shaped[Tensor, "series particle"], start: Int[Tensor, "series one"]) -> Tensor:
    """Turn the particles in a circle so that the one at `start` comes first."""
    count = x.shape[1]
    own = torch.arange(count, device=x.device)
    return torch.gather(x, 1, (own + start) % count)


def _put_first(
    ancestors: Int[Tensor, "series particle"], place: Int[Tensor, "series one"]
) -> Int[Tensor, "series particle"]:
    """Let `place` descend from particle 0, and swap it with place 0."""
    ancestors = ancestors.scatter(1, place, ancestors[:, :1])
    ancestors[:, 0] = 0
    return ancestors


# Versions given that particle 0 descends from particle 0, for particle Gibbs.
CONDITIONAL: dict[str, Resampler] = {
    "systematic": conditional_systematic,
    "stratified": conditional_stratified,
    "multinomial": conditional_multinomial,
    "residual": conditional_residual,
    "killing": conditional_killing,
}


def find_resampler(
    spec: str | Resampler | MemoryResampler, *, conditional: bool = False
) -> Resampler | MemoryResampler:
    """The resampler of a name, or the one given.

    Raises
    ------
    ValueError
        For an unknown name, or where a conditional version does not exist.
    """
    if not isinstance(spec, str):
        return spec
    table = CONDITIONAL if conditional else RESAMPLERS
    if spec not in table:
        kind = "conditional resampler" if conditional else "resampler"
        raise ValueError(f"there is no {kind} {spec!r}; choose one of {sorted(table)}")
    return table[spec]


def adaptive(resampler: Resampler, threshold: float) -> AdaptiveResampler:
    """Resample only the series whose effective sample size is below ``threshold * N``.

    The function it returns takes log-weights and their effective sample size, and returns None
    where no series is resampled, else the draw and which series it concerns.

    Examples
    --------
    >>> log_weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).double().log()
    >>> resample = adaptive(systematic, 0.9)
    >>> ess = effective_sample_size(log_weights)
    >>> out, needed = resample(log_weights, ess, torch.Generator().manual_seed(0))
    >>> out.ancestors.tolist(), needed.tolist()
    ([[0, 1], [0, 0]], [False, True])
    """

    def resample(
        log_weights: Float[Tensor, "series particle"],
        ess: Float[Tensor, "series"],
        generator: torch.Generator,
    ) -> tuple[Resampled, Bool[Tensor, "series"]] | None:
        count = log_weights.shape[1]
        if threshold >= 1:
            return resampler(log_weights, generator), torch.ones_like(ess, dtype=torch.bool)
        needed = ess < threshold * count
        some = int(needed.sum())
        if some == 0:
            return None
        drawn = resampler(log_weights, generator)
        if some < len(needed):
            identity = torch.arange(count, device=log_weights.device)
            rows, transport = needed[:, None], drawn.transport
            if transport is not None:
                transport = torch.where(rows[..., None], transport, torch.eye(count).to(transport))
            drawn = Resampled(
                torch.where(rows, drawn.ancestors, identity),
                torch.where(rows, drawn.log_weights, log_weights),
                transport,
            )
        return drawn, needed

    return resample


class Selection(NamedTuple):
    """Normalised log-weights of series, after resampling where there was any.

    Attributes
    ----------
    log_weights : Tensor of shape (series, particle)
    ancestors : Tensor of int64, shape (series, particle), or None
        None where no series was resampled.
    resampled : Tensor of bool, shape (series,), or None
        Which series were.
    """

    log_weights: Float[Tensor, "series particle"]
    ancestors: Int[Tensor, "series particle"] | None
    resampled: Bool[Tensor, "series"] | None


def select(
    log_weights: Float[Tensor, "series particle"],
    survivors: int,
    scheme: Scheme,
    threshold: float,
    generator: torch.Generator,
) -> Selection:
    """What `weigh` and then `adaptive` give for the first series, without a gradient.

    Parameters
    ----------
    log_weights : Tensor of shape (series, particle)
        Float64, not normalised.
    survivors : int
        How many series go on.
    scheme : str
        One of `RESAMPLERS`.
    threshold : float
        Share of the particles below which the effective sample size asks for resampling.
    generator : torch.Generator

    Examples
    --------
    >>> log_weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).double().log()
    >>> found = select(log_weights, 2, "systematic", 0.9, torch.Generator().manual_seed(0))
    >>> found.ancestors.tolist(), found.resampled.tolist()
    ([[0, 1], [0, 0]], [False, True])
    """
    if not log_weights.is_cpu:
        weighed = weigh(log_weights)
        kept = weighed.log_weights[:survivors]
        done = adaptive(RESAMPLERS[scheme], threshold)(kept, weighed.ess[:survivors], generator)
        if done is None:
            return Selection(kept, None, None)
        return Selection(done[0].log_weights, done[0].ancestors, done[1])
    from seqdgm.kernels import particles_cpu

    shape = (survivors, _numbers(scheme, log_weights.shape[1]))
    found = particles_cpu.select(
        scheme, log_weights, survivors, threshold, lambda: _uniforms(log_weights, shape, generator)
    )
    if found[1] is not None and found[1].numpy().min() < 0:
        check_drawn(found[1][:, 0], "log_weights of series")
    return Selection(*found)


AdaptiveResampler = Callable[
    [Float[Tensor, "series particle"], Float[Tensor, "series"], torch.Generator],
    tuple[Resampled, Bool[Tensor, "series"]] | None,
]


def gather(x: Tensor, ancestors: Int[Tensor, "series particle"]) -> Tensor:
    """Pick particles ``x[n, ancestors[n]]`` of a tensor (series, particle, ...)."""
    if x.ndim == 2:
        return torch.gather(x, 1, ancestors)
    if len(x) == 1:
        return x[0].index_select(0, ancestors[0])[None]
    n, count = x.shape[:2]
    first = torch.arange(0, n * count, count, device=x.device)[:, None]
    flat = x.reshape(n * count, *x.shape[2:]).index_select(0, (ancestors + first).view(-1))
    return flat.view(*ancestors.shape, *x.shape[2:])


def inherit(drawn: Resampled, x: Tensor) -> Tensor:
    """What the new particles hold of a tensor (series, particle, ...) of the old ones."""
    if drawn.transport is None or not x.is_floating_point():
        return gather(x, drawn.ancestors)
    moved = drawn.transport @ x.flatten(2).to(drawn.transport.dtype)
    return moved.reshape(x.shape).to(x.dtype)


def _equal(log_weights: Tensor, ancestors: Int[Tensor, "series particle"]) -> Resampled:
    return Resampled(ancestors, torch.full_like(log_weights, -math.log(log_weights.shape[1])))


def _uniforms(like: Tensor, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=like.device)
