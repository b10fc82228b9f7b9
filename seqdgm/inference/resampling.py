"""Resampling and weight arithmetic of particle methods, batched over series.

A resampler maps normalised log-weights ``(series, particle)`` to ancestors and to the log-weights
after resampling. Whether to resample at all is not its concern: `adaptive` wraps one and leaves
alone the series whose effective sample size is large enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Resampled(NamedTuple):
    """What a resampler returns.

    Attributes
    ----------
    ancestors : Tensor of int64, shape (series, particle)
    log_weights : Tensor of shape (series, particle)
        After resampling; ``-log N`` for the standard schemes.
    """

    ancestors: Int[Tensor, "series particle"]
    log_weights: Float[Tensor, "series particle"]


Resampler = Callable[[Float[Tensor, "series particle"], torch.Generator], Resampled]


def normalise(
    log_weights: Float[Tensor, "series particle"],
) -> tuple[Float[Tensor, "series particle"], Float[Tensor, "series"]]:
    """Return normalised log-weights and the log of their sum (-inf where all weights vanish)."""
    total = torch.logsumexp(log_weights, -1)
    safe = torch.where(torch.isfinite(total), total, 0.0)
    return log_weights - safe[:, None], total


def effective_sample_size(
    log_weights: Float[Tensor, "series particle"],
) -> Float[Tensor, "series"]:
    r"""Effective sample size :math:`1 / \sum_k W_k^2` of normalised log-weights."""
    return (-torch.logsumexp(2 * log_weights, -1)).exp()


def systematic(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Systematic resampling: one uniform number a series (Kitagawa 1996)."""
    u = torch.rand(
        (len(log_weights), 1),
        generator=generator,
        dtype=log_weights.dtype,
        device=log_weights.device,
    )
    return _equal(log_weights, _invert(log_weights, u))


def multinomial(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Resampled:
    """Multinomial resampling: independent ancestors (Gordon, Salmond and Smith 1993)."""
    ancestors = torch.multinomial(
        log_weights.exp(), log_weights.shape[1], replacement=True, generator=generator
    )
    return _equal(log_weights, ancestors)


RESAMPLERS: dict[str, Resampler] = {"systematic": systematic, "multinomial": multinomial}


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


# Versions given that particle 0 descends from particle 0, for particle Gibbs.
CONDITIONAL: dict[str, Resampler] = {"multinomial": conditional_multinomial}


def find_resampler(spec: str | Resampler, *, conditional: bool = False) -> Resampler:
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
            drawn = Resampled(
                torch.where(needed[:, None], drawn.ancestors, identity),
                torch.where(needed[:, None], drawn.log_weights, log_weights),
            )
        return drawn, needed

    return resample


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
    series = torch.arange(len(x), device=x.device)[:, None]
    return x[series, ancestors]


def _equal(log_weights: Tensor, ancestors: Int[Tensor, "series particle"]) -> Resampled:
    return Resampled(ancestors, torch.full_like(log_weights, -math.log(log_weights.shape[1])))


def _invert(
    log_weights: Float[Tensor, "series particle"], offset: Float[Tensor, "series one"]
) -> Int[Tensor, "series particle"]:
    count = log_weights.shape[1]
    cumulative = torch.cumsum(log_weights.exp(), -1)
    # Rounding may leave the last sum below one; the grid is scaled to it, so no index overflows.
    grid = torch.arange(count, device=offset.device, dtype=offset.dtype) + offset
    picked = torch.searchsorted(cumulative, grid / count * cumulative[:, -1:], right=True)
    return picked.clamp_max(count - 1)
