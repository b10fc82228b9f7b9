"""Pieces of recurrences through random states, split so that little is left to the time loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from seqdgm.nn.deferred import LoopLinear
from seqdgm.nn.fused_memory import Weights, draw_with_memory, log_density
from seqdgm.nn.ragged import Ragged
from seqdgm.types import Steer, Unrolled


class Networks(NamedTuple):
    """What lies between a memory and the states that it reads.

    Attributes
    ----------
    memory : Linear
        The memory's share of the pre-activations of `law`, without a bias.
    law : GaussianLayer
        The states, given these pre-activations.
    gates : Tensor of shape (gates, features)
        Weights of the states' features in the gates.
    features : Linear, optional
        The features are the rectified outputs of this layer; the states themselves without one.
    """

    memory: nn.Linear
    law: GaussianLayer
    gates: Float[Tensor, "gates features"]
    features: nn.Linear | None = None


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
        self.start = nn.Parameter(torch.zeros(2 if kind == "lstm" else 1, 1, hidden_dim))

    def initial_state(self, batch_shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Learned state before the first step: `(h, c)` for an LSTM, `(h,)` for a GRU."""
        return tuple(part.expand(*batch_shape, -1) for part in self.start[:, 0])

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

    def unroll(
        self,
        start: tuple[Tensor, ...],
        lead: Float[Tensor, "paths gates"] | None,
        given: Float[Tensor, "series time gates"],
        c: Float[Tensor, "series time hidden"],
        networks: Networks,
        lengths: Int[Tensor, "series"],
        generator: torch.Generator,
        steer: Steer | None = None,
    ) -> Unrolled:
        """Memories that the states of all steps are drawn given, these states, and their laws.

        One path for each series, or as many as it has places in `start`, next to each other. The
        same numbers as step by step, in one hand-fused loop (`seqdgm.nn.fused_memory`). Beyond
        a series' end the laws are standard normal, and memories and draws 0; paths that are steered
        stay rows.

        Parameters
        ----------
        start : tuple of Tensor of shape (paths, hidden)
            Memory before the first step.
        lead : Tensor of shape (paths, gates), optional
            Share of the state before the first step in the gates of that step. Without one, the
            cell reads each step's state at the same step, after it was drawn.
        given : Tensor of shape (series, time, gates)
            What the gates of each step read besides the memory and a state.
        c : Tensor of shape (series, time, hidden)
            Pre-activations of the law's hidden layer, but for the memory's share.
        networks : Networks
        lengths : Tensor of int, shape (series,)
            Number of steps of each series.
        generator : torch.Generator
        steer : callable, optional
            Chooses after each step whom the paths go on from; as the state of a path it is given
            what the gates read of the draw.
        """
        memory, law, gates, features = networks
        shared, copies = Ragged.of(lengths, c.shape[1]), len(start[0]) // len(c)
        ragged = shared
        if copies > 1:
            ragged = Ragged.of(lengths.repeat_interleave(copies), c.shape[1])
        first, rows = tuple(part[ragged.order] for part in start), shared.pack(given)
        if lead is None:
            later = rows.index_select(0, shared.before)
        else:
            n = shared.sizes[0]
            at_first, later = rows.split([n, len(rows) - n])
            lead = lead[ragged.order][: n * copies] + at_first.repeat_interleave(copies, 0)
            first = self(lead, tuple(part[: n * copies] for part in first))
        noise = torch.randn(
            (len(ragged.place), law.out.out_features // 2),
            generator=generator,
            dtype=c.dtype,
            device=c.device,
        )
        own, out = self.recurrent, law.out
        of_features = () if features is None else (features.weight, features.bias)
        weights = Weights(
            memory.weight, out.weight, out.bias, gates, own.weight, own.bias, *of_features
        )
        path = draw_with_memory(
            self.kind, shared.pack(c), later, first, noise, weights, ragged, law.min_scale, steer
        )
        if steer is not None:
            law_of_rows = Normal(path.loc, path.scale, validate_args=False)
            log_q = log_density(path.scale, noise)
            return Unrolled(path.memory, path.z, law_of_rows, log_q, ragged)
        loc, scale = ragged.unpack(path.loc), ragged.unpack(path.scale, 1.0)
        states = tuple(ragged.unpack(part) for part in path.memory)
        return Unrolled(states, ragged.unpack(path.z), Normal(loc, scale, validate_args=False))


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
