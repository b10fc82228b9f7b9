"""Recurrent cells that run fused over whole series or one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqdgm.nn.fused_recurrence import Weights, recur
from seqdgm.nn.ragged import Ragged

State = tuple[Tensor, ...]
Kind = Literal["lstm", "gru", "tanh", "relu"]

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": partial(nn.RNN, nonlinearity="tanh"),
    "relu": partial(nn.RNN, nonlinearity="relu"),
}
_CELLS = {"gru": torch.gru_cell, "tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}


class RecurrentCell(nn.Module):
    r"""Recurrent network of one or more layers, with one set of weights for two ways of running it.

    :meth:`run` is one fused loop over (series, time); :meth:`step` is one step for any leading
    batch shape (series, particles, ...). Both give the same numbers. The equations are those of
    `torch.nn.LSTM` (Hochreiter and Schmidhuber, 1997) and `torch.nn.GRU` (Cho et al., 2014). The
    state before the first step is learned and starts at 0.

    Parameters
    ----------
    kind : {"lstm", "gru", "tanh", "relu"}
        The last two are simple networks with that activation (`torch.nn.RNN`).
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
        kind: Kind,
        input_dim: int,
        hidden_dim: int,
        layers: int = 1,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown recurrent cell {kind!r}; choose one of {list(KINDS)}")
        self.kind = kind
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.layers = layers
        self.rnn: nn.RNNBase = KINDS[kind](input_dim, hidden_dim, layers, batch_first=True)
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
                after = (_CELLS[self.kind](below, *before, *weights),)
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
        self,
        x: Float[Tensor, "series time input"] | Sequence[Float[Tensor, "series time _"]],
        state: State | None = None,
        *,
        lengths: Int[Tensor, "series"] | None = None,
        backwards: bool = False,
    ) -> Float[Tensor, "series time hidden"]:
        """Outputs of the top layer after each step, from `state` or the learned start.

        Parameters
        ----------
        x : Tensor of shape (series, time, input_dim), or sequence of Tensor
            A sequence is read side by side; nothing is spent on a gradient for parts without one.
        state : tuple of Tensor of shape (series, layers, hidden), optional
        lengths : Tensor of int, shape (series,), optional
            Number of steps of each series, all of them by default. The output beyond is
            unspecified, but finite.
        backwards : bool
            Read each series from its own last step to its first.
        """
        parts = (x,) if isinstance(x, Tensor) else tuple(x)
        n_series, n_steps, device = *parts[0].shape[:2], parts[0].device
        if lengths is None:
            lengths = torch.full((n_series,), n_steps, device=device)
        if state is None:
            state = self.initial_state((n_series,))
        if device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return self._run_by_hand(parts, state, lengths, backwards)
        x = torch.cat(parts, -1)
        start = tuple(part.transpose(0, 1).contiguous() for part in state)
        read = reverse(x, lengths) if backwards else x
        outputs, _ = self.rnn(read, start if self.kind == "lstm" else start[0])
        return reverse(outputs, lengths) if backwards else outputs

    def _run_by_hand(
        self, parts: tuple[Tensor, ...], state: State, lengths: Tensor, backwards: bool
    ) -> Float[Tensor, "series time hidden"]:
        """The loop of this package, which a GPU's fused kernels beat, without the padding."""
        ragged = Ragged.of(lengths, parts[0].shape[1], backwards)
        read = tuple(ragged.pack(part) for part in parts)
        for layer, weights in enumerate(self.rnn.all_weights):
            start = tuple(part[ragged.order, layer] for part in state)
            read = (recur(self.kind, read, start, Weights(*weights), ragged),)
        return ragged.unpack(read[0])


def reverse(
    x: Float[Tensor, "series time dim"], lengths: Int[Tensor, "series"]
) -> Float[Tensor, "series time dim"]:
    """Each series backwards within its own length; its own inverse."""
    t = torch.arange(x.shape[1], device=x.device)
    back = lengths[:, None] - 1 - t
    place = torch.where(back >= 0, back, t)
    return x.gather(1, place[..., None].expand_as(x))
