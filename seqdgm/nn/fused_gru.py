r"""The gated recurrent unit along whole series, differentiated by hand; see `fused_cells`.

.. math::
    (r, s) &= \sigma(a_t^{1:2} + W^{1:2} h_{t-1}), \qquad
    n = \tanh(a_t^3 + r \odot (W^3 h_{t-1} + b)) \\
    h_t &= (1 - s) \odot n + s \odot h_{t-1}

A layer of hundreds of units works on more memory than a processor's cache holds. So the inputs'
share :math:`a_t` is overwritten by the gates, and backwards all that a step has besides its product
is one compiled pass over its rows.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.nn.fused_cells import State, steps_of
from seqdgm.nn.ragged import Ragged


class GRUAhead:
    """The forward pass.

    Parameters
    ----------
    given : Tensor of shape (rows, 3 hidden)
        The inputs' share and the biases but b; overwritten.
    weight : Tensor of shape (3 hidden, hidden)
    bias : Tensor of shape (hidden,)
        b.
    ragged : Ragged

    Attributes
    ----------
    kept : tuple of Tensor
        h, gates, and the recurrent share of n, of all steps.
    """

    def __init__(
        self,
        given: Float[Tensor, "rows gates"],
        weight: Float[Tensor, "gates hidden"],
        bias: Float[Tensor, "hidden"],
        ragged: Ragged,
    ) -> None:
        width = weight.shape[1]
        self.bias = bias
        # Products are fastest with the weights as (in, out).
        self.for_both = weight[: 2 * width].t().contiguous()
        self.for_new = weight[2 * width :].t().contiguous()
        h, share = (given.new_empty(len(given), width) for _ in range(2))
        self.kept = (h, given, share)
        both, new = given.split([2 * width, width], 1)
        reset, keep = both.split(width, 1)
        self.steps = steps_of(ragged, h, share, both, reset, keep, new)

    def ahead(self, t: int, before: State) -> State:
        """State after step t."""
        h, share, both, reset, keep, new = self.steps[t]
        last = before[0][: h.shape[0]]
        both.addmm_(last, self.for_both).sigmoid_()
        torch.addmm(self.bias, last, self.for_new, out=share)
        new.addcmul_(reset, share).tanh_()
        return (torch.lerp(new, last, keep, out=h),)


class GRUBack:
    """The backward pass.

    Parameters
    ----------
    total : Tensor of shape (rows, hidden)
        Gradient for the output of each step, to which later steps add.
    weight : Tensor of shape (3 hidden, hidden)
    ragged : Ragged
    start : Tensor of shape (series, hidden)
        State before the first step.
    kept : tuple of Tensor
        That of `GRUAhead`.

    Attributes
    ----------
    own : Tensor of shape (rows, 3 hidden)
        Gradient for the recurrent share of the gates, once all steps are turned.
    given : tuple of Tensor
        Gradient for the inputs' share: of r and s, of shape (rows, 2 hidden), and of n.
    start : Tensor of shape (series, hidden)
        Gradient for the state before the first step.
    """

    def __init__(
        self, total: Tensor, weight: Tensor, ragged: Ragged, start: Tensor, kept: State
    ) -> None:
        width = total.shape[1]
        h, gates, share = kept
        self.weight, self.sizes, self.total = weight, ragged.sizes, total
        self.start = torch.zeros_like(start)
        # The gradient of n for the recurrent share and for the inputs', which differ by r, are side
        # by side, so that those of each stand together.
        turned = total.new_empty(len(total), 4 * width)
        self.own, self.given = (
            turned[:, : 3 * width],
            turned.split([2 * width, width, width], 1)[::2],
        )
        self.arrays = tuple(x.numpy() for x in (total, gates, share, turned))
        self.later, self.first = (
            (x.numpy(), y.numpy()) for x, y in ((h, total), (start, self.start))
        )

    def run(self) -> None:
        """Turn all steps, the last first."""
        from seqdgm.kernels.gru import turn

        ends = list(accumulate(self.sizes))
        blocks, own = self.total.split(self.sizes), self.own.split(self.sizes)
        for t in range(len(ends) - 1, -1, -1):
            n = self.sizes[t]
            before, offset = (self.later, ends[t - 1] - self.sizes[t - 1]) if t else (self.first, 0)
            turn(*self.arrays, *before, ends[t] - n, n, offset)
            target = blocks[t - 1] if t else self.start
            target[:n].addmm_(own[t], self.weight)
