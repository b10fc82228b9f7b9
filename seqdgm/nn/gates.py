"""Pieces of recurrences through random states, split so that little is left to the time loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from seqdgm.nn.deferred import LoopLinear


class GatedCell(nn.Module):
    r"""LSTM or GRU cell that is given the sum of its inputs' pre-activations.

    The caller multiplies each input with weights of its own, ``nn.Linear(width, gate_dim)``, for
    all time steps at once where it can, and adds the products up to :math:`a_t`; one of them brings
    the bias. With :math:`H` units, the LSTM (Hochreiter and Schmidhuber, 1997) is

    .. math::
        (i, f, g, o) &= a_t + W h_{t-1} \in R^{4H} \\
        c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g), \qquad
        h_t = \sigma(o) \odot \tanh(c_t)

    and the GRU (Cho et al., 2014, in the form of `torch.nn.GRU`)

    .. math::
        (r, s) &= \sigma(a_t^{1:2} + W^{1:2} h_{t-1} + b^{1:2}), \qquad
        n = \tanh(a_t^3 + r \odot (W^3 h_{t-1} + b^3)) \\
        h_t &= (1 - s) \odot n + s \odot h_{t-1}.

    The state before the first step is learned and starts at 0.

    Parameters
    ----------
    kind : {"lstm", "gru"}
    hidden_dim : int
        Number of units H.

    Attributes
    ----------
    gate_dim : int
        Length of the pre-activations, 4H or 3H.

    Examples
    --------
    >>> cell = GatedCell("lstm", 8)
    >>> h, c = cell(torch.zeros(5, 2, cell.gate_dim), cell.initial_state((5, 2)))
    >>> h.shape
    torch.Size([5, 2, 8])
    """

    def __init__(self, kind: Literal["lstm", "gru"], hidden_dim: int) -> None:
        super().__init__()
        if kind not in ("lstm", "gru"):
            raise ValueError(f"unknown recurrent cell {kind!r}; choose 'lstm' or 'gru'")
        self.kind = kind
        self.hidden_dim = hidden_dim
        self.gate_dim = (4 if kind == "lstm" else 3) * hidden_dim
        # Orthogonal recurrent weights keep the size of the state over many steps.
        self.recurrent = LoopLinear(hidden_dim, self.gate_dim, bias=kind == "gru")
        for block in self.recurrent.weight.split(hidden_dim):
            nn.init.orthogonal_(block)
        self.start = nn.Parameter(torch.zeros(2 if kind == "lstm" else 1, hidden_dim))

    def initial_state(self, batch_shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Learned state before the first step: `(h, c)` for an LSTM, `(h,)` for a GRU."""
        return tuple(part.expand(*batch_shape, -1) for part in self.start)

    def forward(
        self, gates: Float[Tensor, "*batch gates"], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """State after one step, for any leading batch shape."""
        own = self.recurrent(state[0])
        if self.kind == "lstm":
            enter, keep, new, out = (gates + own).chunk(4, -1)
            c = torch.sigmoid(keep) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
            return torch.sigmoid(out) * torch.tanh(c), c
        width = 2 * self.hidden_dim
        reset, keep = torch.sigmoid(gates[..., :width] + own[..., :width]).chunk(2, -1)
        new = torch.tanh(torch.addcmul(gates[..., width:], reset, own[..., width:]))
        return (torch.lerp(new, state[0], keep),)


class GaussianLayer(nn.Module):
    r"""Diagonal Gaussian from the pre-activations of one rectified layer.

    .. math::
        h = \mathrm{relu}(a), \qquad \mu = W_\mu h + b_\mu, \qquad
        \sigma = \mathrm{softplus}(W_\sigma h + b_\sigma) + \sigma_{\min}

    Parameters
    ----------
    hidden_dim, dim : int
        Lengths of the pre-activations and of the vector.
    min_scale : float
        Floor of the scale.

    Examples
    --------
    >>> GaussianLayer(8, 3)(torch.zeros(5, 2, 8)).loc.shape
    torch.Size([5, 2, 3])
    """

    def __init__(self, hidden_dim: int, dim: int, *, min_scale: float = 1e-3) -> None:
        super().__init__()
        self.out = LoopLinear(hidden_dim, 2 * dim)
        self.min_scale = min_scale

    def forward(self, hidden: Float[Tensor, "*batch hidden"]) -> Normal:
        """Distribution for any leading batch shape."""
        loc, raw_scale = self.out(F.relu(hidden)).chunk(2, -1)
        # A non-finite parameter is the training loop's to report, with the series that caused it.
        return Normal(loc, F.softplus(raw_scale) + self.min_scale, validate_args=False)
