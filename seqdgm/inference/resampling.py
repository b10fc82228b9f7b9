"""Resampling and weight arithmetic of particle methods, batched over series.

A resampler maps normalised log-weights ``(series, particle)`` to ancestor indices of the same
shape; adaptivity is the caller's (`resample_where`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Resampler = Callable[
    [Float[Tensor, "series particle"], torch.Generator], Int[Tensor, "series particle"]
]


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
) -> Int[Tensor, "series particle"]:
    """Systematic resampling: one uniform number a series (Kitagawa 1996)."""
    u = torch.rand(
        (len(log_weights), 1),
        generator=generator,
        dtype=log_weights.dtype,
        device=log_weights.device,
    )
    return _invert(log_weights, u)


def multinomial(
    log_weights: Float[Tensor, "series particle"], generator: torch.Generator
) -> Int[Tensor, "series particle"]:
    """Multinomial resampling: independent ancestors (Gordon, Salmond and Smith 1993)."""
    return torch.multinomial(
        log_weights.exp(), log_weights.shape[1], replacement=True, generator=generator
    )


RESAMPLERS: dict[str, Resampler] = {"systematic": systematic, "multinomial": multinomial}


def resample_where(
    needed: Bool[Tensor, "series"], ancestors: Int[Tensor, "series particle"]
) -> Int[Tensor, "series particle"]:
    """Ancestors of the series that resample; the others keep every particle."""
    identity = torch.arange(ancestors.shape[1], device=ancestors.device)
    return torch.where(needed[:, None], ancestors, identity)


def gather(x: Tensor, ancestors: Int[Tensor, "series particle"]) -> Tensor:
    """Pick particles ``x[n, ancestors[n]]`` of a tensor (series, particle, ...)."""
    series = torch.arange(len(x), device=x.device)[:, None]
    return x[series, ancestors]


def _invert(
    log_weights: Float[Tensor, "series particle"], offset: Float[Tensor, "series one"]
) -> Int[Tensor, "series particle"]:
    count = log_weights.shape[1]
    cumulative = torch.cumsum(log_weights.exp(), -1)
    # Rounding may leave the last sum below one; the grid is scaled to it, so no index overflows.
    grid = torch.arange(count, device=offset.device, dtype=offset.dtype) + offset
    picked = torch.searchsorted(cumulative, grid / count * cumulative[:, -1:], right=True)
    return picked.clamp_max(count - 1)
