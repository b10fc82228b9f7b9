r"""A Gaussian chain through one rectified layer along whole series, differentiated by hand.

.. math::

    a_t &= \mathrm{relu}(c_t + W z_{t-1}), \qquad (\mu_t, r_t) = V a_t + d \\
    \sigma_t &= \mathrm{softplus}(r_t) + \sigma_{\min}, \qquad z_t = \mu_t + \sigma_t \epsilon_t

A step takes two matrix products forwards and two backwards. The gradients of all weights are one
product each over (series x time), after the loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqdgm.nn.fused_cells import steps_of
from seqdgm.nn.ragged import Ragged


class Path(NamedTuple):
    """Rows of the laws and of the draws."""

    loc: Float[Tensor, "rows latent"]
    scale: Float[Tensor, "rows latent"]
    z: Float[Tensor, "rows latent"]


def draw_chain(
    c: Float[Tensor, "rows hidden"],
    first: Float[Tensor, "series latent"],
    noise: Float[Tensor, "rows latent"],
    weights: tuple[Tensor, Tensor, Tensor],
    ragged: Ragged,
    min_scale: float,
) -> Path:
    """Laws and draws of all steps.

    Parameters
    ----------
    c : Tensor of shape (rows, hidden)
        The hidden layer's pre-activations, but for z.
    first : Tensor of shape (series, latent)
        State before the first step, the longest series first.
    noise : Tensor of shape (rows, latent)
        Standard normal numbers.
    weights : tuple of Tensor
        W, V and d, of shapes (hidden, latent), (2 latent, hidden) and (2 latent,).
    ragged : Ragged
    min_scale : float
        Floor of the scale.

    Examples
    --------
    >>> ragged = Ragged.of(torch.tensor([2]), 2)
    >>> weights = torch.eye(1), torch.tensor([[1.0], [0.0]]), torch.zeros(2)
    >>> draw_chain(torch.ones(2, 1), torch.ones(1, 1), torch.zeros(2, 1), weights, ragged, 0.0).z
    tensor([[2.],
            [3.]])
    """
    return Path(*_Chain.apply(c, first, noise, *weights, ragged, min_scale))


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        c: Tensor,
        first: Tensor,
        noise: Tensor,
        w: Tensor,
        v: Tensor,
        d: Tensor,
        ragged: Ragged,
        min_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Products are fastest with the weights as (in, out).
        w_in, v_in = w.t().contiguous(), v.t().contiguous()
        a, out = torch.empty_like(c), c.new_empty(len(c), len(v))
        scale, z = torch.empty_like(noise), torch.empty_like(noise)
        loc, raw = out.chunk(2, 1)
        rows, before = steps_of(ragged, c, noise, a, out, loc, raw, scale, z), first
        for c_t, noise_t, a_t, out_t, loc_t, raw_t, scale_t, z_t in rows:
            torch.addmm(c_t, before[: len(c_t)], w_in, out=a_t).relu_()
            torch.addmm(d, a_t, v_in, out=out_t)
            torch.ops.aten.softplus.out(raw_t, out=scale_t).add_(min_scale)
            before = torch.addcmul(loc_t, scale_t, noise_t, out=z_t)
        ctx.save_for_backward(first, noise, w, v, a, out, z)
        ctx.ragged = ragged
        return loc.contiguous(), scale, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        first, noise, w, v, a, out, z = ctx.saved_tensors
        for_loc, for_scale, for_z = gradients
        sizes, latent = ctx.ragged.sizes, first.shape[-1]
        slope = torch.sigmoid(out[:, latent:])
        for_out = torch.cat([for_loc, for_scale * slope], 1)
        spread = slope.mul_(noise)  # how a draw moves with the raw scale
        total = for_z.clone()  # gradient for z_t, from its outputs and from the steps after it
        for_c = torch.empty_like(a)
        steps = steps_of(ctx.ragged, total, for_out, *for_out.chunk(2, 1), spread, for_c, a)
        relu_back = torch.ops.aten.threshold_backward.grad_input
        for t in range(len(steps) - 1, -1, -1):
            total_t, out_t, loc_t, raw_t, spread_t, c_t, a_t = steps[t]
            loc_t.add_(total_t)
            raw_t.addcmul_(total_t, spread_t)
            relu_back(torch.mm(out_t, v, out=c_t), a_t, 0.0, grad_input=c_t)
            if t:
                steps[t - 1][0][: len(c_t)].addmm_(c_t, w)
        for_first = torch.zeros_like(first)
        torch.mm(for_c[: sizes[0]], w, out=for_first[: sizes[0]])
        before = torch.cat([first[: sizes[0]], z.index_select(0, ctx.ragged.before)])
        for_w, for_v = for_c.t() @ before, for_out.t() @ a
        return for_c, for_first, None, for_w, for_v, for_out.sum(0), None, None
