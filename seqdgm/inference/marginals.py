r"""Smoothers of single states: weighted particles for :math:`p(z_t \mid x)`, without a joint law.

References
----------
Kitagawa and Sato (2001), Monte Carlo smoothing and self-organising state-space model, in
*Sequential Monte Carlo Methods in Practice* (fixed lag); Doucet, Godsill and Andrieu (2000), On
sequential Monte Carlo sampling methods for Bayesian filtering, *Statistics and Computing* 10,
section IV (forward filtering, backward smoothing).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference.backward import check_memoryless
from seqdgm.inference.history import History
from seqdgm.inference.pairwise import PAIR_ELEMENTS
from seqdgm.inference.resampling import gather
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Weighted(NamedTuple):
    """Weighted particles of every step; nothing joins those of different steps.

    Attributes
    ----------
    value : Tensor of shape (series, time, particle, state)
        Reported states.
    log_weights : Tensor of shape (series, time, particle)
        Normalised.
    particles : Tensor of int or None
        Which particles of the filter's steps these are; None where they are others.
    """

    value: Float[Tensor, "series time particle state"]
    log_weights: Float[Tensor, "series time particle"]
    particles: Int[Tensor, "series time particle"] | None


@torch.no_grad()
def forward_backward(
    model: StateSpaceModel, batch: Batch, history: History, n: int, generator: torch.Generator
) -> Weighted:
    r"""Reweight the filter's particles backwards, in O(N^2) a step.

    .. math::

        W_{t|T}^k = W_t^k \sum_m W_{t+1|T}^m
            \frac{f(z_{t+1}^m \mid z_t^k)}{\sum_l W_t^l f(z_{t+1}^m \mid z_t^l)}

    (Doucet, Godsill and Andrieu 2000, equation 43). `n` and `generator` are not used.
    """
    check_memoryless(model)
    steps = history.steps
    found = [steps[-1].log_weights]
    for t in range(len(steps) - 2, -1, -1):
        step, after = steps[t], steps[t + 1]
        assert after.z is not None
        transition = history.into(batch, t + 1)
        weights = found[-1].exp()
        total = torch.zeros_like(weights)
        size = max(1, PAIR_ELEMENTS // weights.numel())
        for target, part in zip(after.z.split(size, 1), weights.split(size, 1), strict=True):
            log_w = transition.pairs(target).add_(step.log_weights[:, None])
            # A target that nothing explains has weight zero itself.
            top = log_w.amax(-1, keepdim=True)
            share = log_w.sub_(torch.where(top == -torch.inf, 0.0, top)).exp_()
            explained = share.sum(-1)
            part = torch.where(explained == 0, 0.0, part / explained)
            total += torch.bmm(part[:, None], share)[:, 0]
        mass = total.sum(-1, keepdim=True)
        bad = ~(mass[:, 0] > 0)
        if bool(bad.any()):
            raise transition.failure(int(bad.long().argmax()))
        total = total / mass
        ends = batch.lengths == t + 1
        found.append(torch.where(ends[:, None], step.log_weights, total.log()))
    value = torch.stack([step.value for step in steps], 1)
    index = torch.arange(value.shape[2], device=value.device).expand(value.shape[:3])
    return Weighted(value, torch.stack(found[::-1], 1), index)


@torch.no_grad()
def fixed_lag(
    model: StateSpaceModel,
    batch: Batch,
    history: History,
    n: int,
    generator: torch.Generator,
    *,
    lag: int,
) -> Weighted:
    r"""States of step t by the lineages and weights of step :math:`\min(t + lag, T)`.

    An approximation of :math:`p(z_t \mid x_{1:T})` by :math:`p(z_t \mid x_{1:t+lag})`, for any
    model. Short lags keep many distinct particles. `n` and `generator` are not used.
    """
    steps = history.steps
    shape = steps[0].log_weights.shape
    count, total = shape[1], len(steps)
    device = steps[0].log_weights.device
    own = torch.arange(count, device=device).expand(shape)
    index = own[:, None].expand(-1, total, -1).clone()
    log_weights = torch.stack([step.log_weights for step in steps], 1)
    filtered = log_weights.clone()
    lengths = batch.lengths[:, None]
    lines = own[:, None]  # (series, steps held, particle): lineages of the latest steps
    for t, step in enumerate(steps):
        if t:
            if step.ancestors is not None:
                lines = lines.gather(2, step.ancestors[:, None].expand(-1, lines.shape[1], -1))
            lines = torch.cat([lines, own[:, None]], 1)[:, -lag - 1 :]
        first = t + 1 - lines.shape[1]
        held = torch.arange(first, t + 1, device=device)
        # A step is left alone once its lag is over or its series has ended.
        now = ((held == t - lag)[None] & (lengths > t)) | (lengths == t + 1)
        index[:, first : t + 1] = torch.where(now[..., None], lines, index[:, first : t + 1])
        log_weights[:, first : t + 1] = torch.where(
            now[..., None], filtered[:, t, None], log_weights[:, first : t + 1]
        )
    value = torch.stack([gather(step.value, index[:, t]) for t, step in enumerate(steps)], 1)
    return Weighted(value, log_weights, index)
