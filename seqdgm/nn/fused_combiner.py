r"""The combiner of a Gaussian proposal along whole series, differentiated by hand.

.. math::

    a_t &= \tanh(W z_{t-1} + b), \qquad
    (\mu_t, r_t) = \tfrac12 V (a_t + c_t) + d \\
    \sigma_t &= \mathrm{softplus}(r_t) + \sigma_{\min}, \qquad z_t = \mu_t + \sigma_t \epsilon_t

A step takes two matrix products forwards and two backwards. The gradients of all weights are one
product each over (series x time), after the loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from seqdgm.nn.ragged import Ragged


class Weights(NamedTuple):
    """Weights and biases W, b, V, d."""

    state: Float[Tensor, "hidden latent"]
    state_bias: Float[Tensor, "hidden"]
    out: Float[Tensor, "two_latent hidden"]
    out_bias: Float[Tensor, "two_latent"]


class Path(NamedTuple):
    """Rows of the proposals and of the draws."""

    loc: Float[Tensor, "rows latent"]
    scale: Float[Tensor, "rows latent"]
    z: Float[Tensor, "rows latent"]


def combine(
    c: Float[Tensor, "rows hidden"],
    first: Float[Tensor, "series latent"],
    noise: Float[Tensor, "rows latent"],
    weights: Weights,
    ragged: Ragged,
    min_scale: float,
) -> Path:
    """Proposals and draws of all steps.

    Parameters
    ----------
    c : Tensor of shape (rows, hidden)
        Summaries.
    first : Tensor of shape (series, latent)
        State before the first step, the longest series first.
    noise : Tensor of shape (rows, latent)
        Standard normal numbers.
    weights : Weights
    ragged : Ragged
    min_scale : float
        Floor of the scale.
    """
    return Path(*_Combine.apply(c, first, noise, *weights, ragged, min_scale))


def combine_step_by_step(
    c: Float[Tensor, "rows hidden"],
    first: Float[Tensor, "series latent"],
    noise: Float[Tensor, "rows latent"],
    weights: Weights,
    ragged: Ragged,
    min_scale: float,
) -> Path:
    """The same as `combine` by automatic differentiation, which second derivatives need."""
    z, parts = first, []
    steps = zip(c.split(ragged.sizes), noise.split(ragged.sizes), strict=True)
    for summary, epsilon in steps:
        hidden = torch.tanh(F.linear(z[: len(summary)], weights.state, weights.state_bias))
        out = F.linear(0.5 * (hidden + summary), weights.out, weights.out_bias)
        loc, raw = out.chunk(2, -1)
        scale = F.softplus(raw) + min_scale
        z = torch.addcmul(loc, scale, epsilon)
        parts.append((loc, scale, z))
    return Path(*(torch.cat(part) for part in zip(*parts, strict=True)))


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        c: Tensor,
        first: Tensor,
        noise: Tensor,
        w: Tensor,
        b: Tensor,
        v: Tensor,
        d: Tensor,
        ragged: Ragged,
        min_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes, latent = ragged.sizes, first.shape[-1]
        # Products are fastest with the weights as (in, out).
        w_in, v_in = w.t().contiguous(), (0.5 * v).t().contiguous()
        a, out = torch.empty_like(c), c.new_empty(len(c), 2 * latent)
        scale, z = torch.empty_like(noise), torch.empty_like(noise)
        hidden = c.new_empty(max(sizes), c.shape[1])
        blocks = (x.split(sizes) for x in (c, noise, a, out, scale, z))
        before = first
        for c_t, noise_t, a_t, out_t, scale_t, z_t in zip(*blocks, strict=True):
            n = len(c_t)
            torch.addmm(b, before[:n], w_in, out=a_t).tanh_()
            torch.addmm(d, torch.add(a_t, c_t, out=hidden[:n]), v_in, out=out_t)
            torch.ops.aten.softplus.out(out_t[:, latent:], out=scale_t).add_(min_scale)
            before = torch.addcmul(out_t[:, :latent], scale_t, noise_t, out=z_t)
        ctx.save_for_backward(c, first, noise, w, b, v, d, a, out, z)
        ctx.ragged, ctx.min_scale = ragged, min_scale
        return out[:, :latent].contiguous(), scale, z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:7]
        if torch.is_grad_enabled():
            found = _differentiably(inputs, gradients, ctx.ragged, ctx.min_scale)
        else:
            found = _by_hand(ctx.saved_tensors, gradients, ctx.ragged)
        c, first, w, b, v, d = found
        return c, first, None, w, b, v, d, None, None


def _by_hand(
    saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...], ragged: Ragged
) -> tuple[Tensor | None, ...]:
    """Gradients for c, first, W, b, V and d."""
    c, first, noise, w, _, v, _, a, out, z = saved
    for_loc, for_scale, for_z = gradients
    sizes, latent = ragged.sizes, first.shape[-1]
    slope = torch.sigmoid(out[:, latent:])
    for_out = torch.cat([for_loc, for_scale * slope], 1)
    spread = slope.mul_(noise)  # how a draw moves with the raw scale
    total = for_z.clone()  # gradient for z_t, from its outputs and from the steps after it
    half = 0.5 * v
    for_c, for_state = torch.empty_like(c), torch.empty_like(a)
    blocks = (x.split(sizes) for x in (total, for_out, spread, for_c, for_state, a))
    steps = list(zip(*blocks, strict=True))
    for t in range(len(steps) - 1, -1, -1):
        total_t, out_t, spread_t, c_t, state_t, a_t = steps[t]
        out_t[:, :latent].add_(total_t)
        out_t[:, latent:].addcmul_(total_t, spread_t)
        torch.mm(out_t, half, out=c_t)
        torch.ops.aten.tanh_backward.grad_input(c_t, a_t, grad_input=state_t)
        if t:
            steps[t - 1][0][: len(state_t)].addmm_(state_t, w)
    for_first = torch.zeros_like(first)
    torch.mm(for_state[: sizes[0]], w, out=for_first[: sizes[0]])
    before = torch.cat([first[: sizes[0]], z.index_select(0, ragged.before)])
    return (
        for_c,
        for_first,
        for_state.t() @ before,
        for_state.sum(0),
        0.5 * (for_out.t() @ (a + c)),
        for_out.sum(0),
    )


def _differentiably(
    inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], ragged: Ragged, min_scale: float
) -> tuple[Tensor | None, ...]:
    """The same with a graph of its own."""
    c, first, noise, *weights = inputs
    wanted = [c, first, *weights]
    path = combine_step_by_step(c, first, noise, Weights(*weights), ragged, min_scale)
    needed = [x for x in wanted if x.requires_grad]
    found = iter(torch.autograd.grad(path, needed, gradients, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in wanted)
