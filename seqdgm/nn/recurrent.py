"""Recurrent cells that run fused over whole series or one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

State = tuple[Tensor, ...]


class RecurrentCell(nn.Module):
    r"""LSTM or GRU of one or more layers, with one set of weights for two ways of running it.

    :meth:`run` is torch's fused kernel over (series, time); :meth:`step` is one step for any
    leading batch shape (series, particles, ...). Both give the same numbers. The equations are
    those of `torch.nn.LSTM` (Hochreiter and Schmidhuber, 1997) and `torch.nn.GRU` (Cho et al.,
    2014). The state before the first step is learned and starts at 0.

    Parameters
    ----------
    kind : {"lstm", "gru"}
    input_dim, hidden_dim : int
        Length of the input and of each layer's output.
    layers : int
        Number of layers, each reading the output of the one below.

    Examples
    --------
    >>> cell = RecurrentCell("gru", input_dim=3, hidden_dim=8)
    >>> state = cell.step(torch.zeros(5, 2, 3), cell.initial_state((5, 2)))
    >>> cell.output(state).shape, cell.run(torch.zeros(5, 7, 3)).shape
    (torch.Size([5, 2, 8]), torch.Size([5, 7, 8]))
    """

    def __init__(
        self,
        kind: Literal["lstm", "gru"],
        input_dim: int,
        hidden_dim: int,
        layers: int = 1,
    ) -> None:
        super().__init__()
        if kind not in ("lstm", "gru"):
            raise ValueError(f"unknown recurrent cell {kind!r}; choose 'lstm' or 'gru'")
        self.kind = kind
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.layers = layers
        self.rnn: nn.LSTM | nn.GRU = (nn.LSTM if kind == "lstm" else nn.GRU)(
            input_dim, hidden_dim, layers, batch_first=True
        )
        n_parts = 2 if kind == "lstm" else 1
        self.start = nn.Parameter(torch.zeros(n_parts, layers, hidden_dim))

    def initial_state(self, batch_shape: Sequence[int]) -> State:
        """Learned state before the first step.

        Returns
        -------
        tuple of Tensor of shape (*batch_shape, layers, hidden)
            `(h,)` for a GRU, `(h, c)` for an LSTM.
        """
        return tuple(part.expand(*batch_shape, -1, -1) for part in self.start)

    def output(self, state: State) -> Float[Tensor, "*batch hidden"]:
        """Output h of the top layer."""
        return state[0][..., -1, :]

    def step(self, x: Float[Tensor, "*batch input"], state: State) -> State:
        """State after reading one step's input; the batch shape is that of the state."""
        batch = state[0].shape[:-2]
        # torch's cells take one batch axis; an input without the particles' axis serves them all.
        below = x.expand(*batch, self.input_dim).reshape(-1, self.input_dim)
        parts: list[tuple[Tensor, ...]] = []
        for layer, weights in enumerate(self.rnn.all_weights):
            before = tuple(part[..., layer, :].reshape(-1, self.hidden_dim) for part in state)
            after: tuple[Tensor, ...]
            if self.kind == "lstm":
                after = torch.lstm_cell(below, before, *weights)
            else:
                after = (torch.gru_cell(below, *before, *weights),)
            below = after[0]
            parts.append(after)
        shape = (*batch, 1, self.hidden_dim)
        if self.layers == 1:
            return tuple(part.view(shape) for part in parts[0])
        return tuple(
            torch.cat([part.view(shape) for part in layers], -2)
            for layers in zip(*parts, strict=True)
        )

    def run(
        self, x: Float[Tensor, "series time input"], state: State | None = None
    ) -> Float[Tensor, "series time hidden"]:
        """Outputs of the top layer after each step, from `state` or the learned start."""
        if state is None:
            state = self.initial_state(x.shape[:1])
        start = tuple(part.transpose(0, 1).contiguous() for part in state)
        outputs, _ = self.rnn(x, start if self.kind == "lstm" else start[0])
        return outputs
