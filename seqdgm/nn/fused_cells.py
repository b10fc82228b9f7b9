r"""Recurrent cells for loops over time that are differentiated by hand.

A cell owns the rows of all steps (`seqdgm.nn.ragged`), views of which its two methods fill step by
step: `ahead` forwards in time and `back` backwards. What the gradient of a gate is multiplied with
is known after the forward pass and computed for all steps together; or, where that is more than a
processor's cache holds, within one compiled pass over the rows of a step. The equations are those
of `torch.nn.RNN`, `torch.nn.GRU` and `torch.nn.LSTM`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.kernels.arrays import as_array
from seqdgm.nn.ragged import Ragged

WORTH = 2**17  # outputs below which a compiled loop is not loaded

State = tuple[Tensor, ...]

# Of a gradient and the activation's value.
_through_tanh = torch.ops.aten.tanh_backward.grad_input
_through_sigmoid = torch.ops.aten.sigmoid_backward.grad_input


def pays(gradient: Float[Tensor, "rows hidden"]) -> bool:
    """Whether a compiled backward pass, which is one for CPUs, is worth its loading."""
    small = gradient.numel() < WORTH or gradient.dtype not in (torch.float32, torch.float64)
    return gradient.device.type == "cpu" and not small


class Ahead(ABC):
    """The forward pass of a cell.

    Attributes
    ----------
    gates : Tensor of shape (rows, gates)
        The inputs' share, given as such or with an axis of rows that have it in common; each step
        overwrites its own, and what is added to it before counts.
    kept : tuple of Tensor
        What `Back` reads; the parts of the state come first, of all steps.
    """

    gates: Float[Tensor, "rows gates"]
    kept: tuple[Tensor, ...]

    def __init__(self, given: Tensor, weight: Tensor, bias: Tensor | None, ragged: Ragged) -> None:
        self.gates = (given.clone() if bias is None else given + bias).flatten(0, -2)
        # Products are fastest with the weights as (in, out).
        self.weight = weight.t().contiguous()

    @abstractmethod
    def ahead(self, t: int, before: State) -> State:
        """State after step t."""


class Back(ABC):
    """The backward pass of a cell.

    Attributes
    ----------
    total : tuple of Tensor of shape (rows, hidden)
        Gradients for the parts of the state after each step, to which later steps add.
    given : Tensor of shape (rows, gates)
        Gradient for the inputs' share of the gates; that of a step is there once it was turned.
    """

    total: State
    given: Float[Tensor, "rows gates"]

    @abstractmethod
    def __init__(
        self, total: State, weight: Tensor, ragged: Ragged, start: State, kept: State
    ) -> None: ...

    @abstractmethod
    def back(self, t: int, target: State) -> None:
        """Turn step t; `target` is the total of the series that reach it one step before."""

    def weights(self, before: Float[Tensor, "rows hidden"]) -> Float[Tensor, "gates hidden"]:
        """Gradient for the recurrent weight, given the outputs before each step."""
        return self.given.t() @ before

    def bias(self) -> Float[Tensor, "gates"]:
        """Gradient for the recurrent bias."""
        return self.given.sum(0)


def before_each(start: Tensor, rows: Tensor, ragged: Ragged) -> Float[Tensor, "rows hidden"]:
    """What each row follows."""
    return torch.cat([start[: sum(ragged.sizes[:1])], rows.index_select(0, ragged.before)])


def steps_of(ragged: Ragged, *arrays: Tensor) -> list[tuple[Tensor, ...]]:
    """Blocks of all arrays, step by step."""
    return list(zip(*(x.split(ragged.sizes) for x in arrays), strict=True))


# ---------------------------------------------------------------------------------- tanh and relu


class _TanhAhead(Ahead):
    """tanh of the sum."""

    def __init__(self, given: Tensor, weight: Tensor, bias: Tensor | None, ragged: Ragged) -> None:
        super().__init__(given, weight, bias, ragged)
        self.kept = (self.gates,)
        self.steps = self.gates.split(ragged.sizes)

    def ahead(self, t: int, before: State) -> State:
        h = self.steps[t]
        return (self.squash(h.addmm_(before[0][: len(h)], self.weight)),)

    def squash(self, h: Tensor) -> Tensor:
        """The activation, in place."""
        return h.tanh_()


class _ReluAhead(_TanhAhead):
    """relu of the sum."""

    def squash(self, h: Tensor) -> Tensor:
        return h.relu_()


class _TanhBack(Back):
    """Back through tanh."""

    def __init__(
        self, total: State, weight: Tensor, ragged: Ragged, start: State, kept: State
    ) -> None:
        self.total, self.weight, self.given = total, weight, total[0]
        self.steps = steps_of(ragged, total[0], self.slope(kept[0]))

    @staticmethod
    def slope(h: Tensor) -> Tensor:
        """Derivative of the activation."""
        return 1 - h * h

    def back(self, t: int, target: State) -> None:
        total, slope = self.steps[t]
        target[0].addmm_(total.mul_(slope), self.weight)


class _ReluBack(_TanhBack):
    """Back through relu."""

    @staticmethod
    def slope(h: Tensor) -> Tensor:
        return (h > 0).to(h.dtype)


# -------------------------------------------------------------------------------------------- GRU


class _GRUAhead(Ahead):
    """Gated recurrent unit: gates r, z and n."""

    def __init__(self, given: Tensor, weight: Tensor, bias: Tensor | None, ragged: Ragged) -> None:
        width = weight.shape[1]
        self.gates = given.clone().flatten(0, -2)
        self.bias = given.new_zeros(width) if bias is None else bias[2 * width :]
        if bias is not None:
            self.gates[:, : 2 * width] += bias[: 2 * width]
        self.for_both = weight[: 2 * width].t().contiguous()
        self.for_new = weight[2 * width :].t().contiguous()
        h, share = (given.new_empty(len(self.gates), width) for _ in range(2))
        self.kept = (h, self.gates, share)
        both, new = self.gates.split([2 * width, width], 1)
        reset, keep = both.split(width, 1)
        self.steps = steps_of(ragged, h, share, both, reset, keep, new)

    def ahead(self, t: int, before: State) -> State:
        h, share, both, reset, keep, new = self.steps[t]
        last = before[0][: len(h)]
        both.addmm_(last, self.for_both).sigmoid_()
        torch.addmm(self.bias, last, self.for_new, out=share)
        new.addcmul_(reset, share).tanh_()
        return (torch.lerp(new, last, keep, out=h),)


class _GRUBack(Back):
    """Back through the gated recurrent unit."""

    def __init__(
        self, total: State, weight: Tensor, ragged: Ragged, start: State, kept: State
    ) -> None:
        h, gates, share = kept
        width = h.shape[1]
        reset, keep, new = gates.split(width, 1)
        keep = keep.contiguous()
        # The gates' gradients in units of that of h_t: n in front for the recurrent share and
        # behind for the inputs', so that the three of each lie side by side.
        slopes = h.new_empty(len(h), 4, width)
        _through_tanh(1 - keep, new, grad_input=slopes[:, 3])
        torch.mul(slopes[:, 3], reset, out=slopes[:, 0])
        _through_sigmoid(slopes[:, 3] * share, reset, grad_input=slopes[:, 1])
        before = before_each(start[0], h, ragged)
        _through_sigmoid(before.sub_(new), keep, grad_input=slopes[:, 2])
        turned = torch.empty_like(slopes)
        flat = turned.flatten(1)
        self.own, self.given = flat[:, : 3 * width], flat[:, width:]
        self.total, self.weight = total, torch.cat([weight[2 * width :], weight[: 2 * width]])
        spread = total[0][:, None]
        self.steps = steps_of(ragged, total[0], spread, slopes, keep, turned, self.own)

    def back(self, t: int, target: State) -> None:
        total, spread, slopes, keep, turned, own = self.steps[t]
        torch.mul(slopes, spread, out=turned)
        target[0].addcmul_(total, keep).addmm_(own, self.weight)

    def weights(self, before: Float[Tensor, "rows hidden"]) -> Float[Tensor, "gates hidden"]:
        return self._ordered(self.own.t() @ before)

    def bias(self) -> Float[Tensor, "gates"]:
        return self._ordered(self.own.sum(0))

    @staticmethod
    def _ordered(found: Tensor) -> Tensor:
        """Those of n behind."""
        width = len(found) // 3
        return torch.cat([found[width:], found[:width]])


# ------------------------------------------------------------------------------------------- LSTM


class _LSTMAhead(Ahead):
    """Long short-term memory: gates i, f, g and o, state (h, c)."""

    def __init__(self, given: Tensor, weight: Tensor, bias: Tensor | None, ragged: Ragged) -> None:
        super().__init__(given, weight, bias, ragged)
        width = weight.shape[1]
        h, c, squashed = (given.new_empty(len(self.gates), width) for _ in range(3))
        self.kept = (h, c, self.gates, squashed)
        both, new, out = self.gates.split([2 * width, width, width], 1)
        enter, forget = both.split(width, 1)
        self.steps = steps_of(ragged, h, c, squashed, self.gates, both, enter, forget, new, out)

    def ahead(self, t: int, before: State) -> State:
        h, c, squashed, gates, both, enter, forget, new, out = self.steps[t]
        n = len(h)
        gates.addmm_(before[0][:n], self.weight)
        both.sigmoid_()
        new.tanh_()
        out.sigmoid_()
        torch.mul(before[1][:n], forget, out=c).addcmul_(enter, new)
        return torch.mul(torch.tanh(c, out=squashed), out, out=h), c


class _LSTMBack(Back):
    """Back through the long short-term memory."""

    def __init__(
        self, total: State, weight: Tensor, ragged: Ragged, start: State, kept: State
    ) -> None:
        h, c, gates, squashed = kept
        enter, forget, new, out = gates.split(h.shape[1], 1)
        forget = forget.contiguous()
        # The gates' gradients in units of that of c_t, and of that of h_t for the last.
        slopes = h.new_empty(len(h), 4, h.shape[1])
        _through_sigmoid(new, enter, grad_input=slopes[:, 0])
        _through_sigmoid(before_each(start[1], c, ragged), forget, grad_input=slopes[:, 1])
        _through_tanh(enter, new, grad_input=slopes[:, 2])
        _through_sigmoid(squashed, out, grad_input=slopes[:, 3])
        through = _through_tanh(out, squashed, grad_input=torch.empty_like(squashed))
        turned = torch.empty_like(slopes)
        self.total, self.weight, self.given = total, weight, turned.flatten(1)
        arrays = (*total, total[1][:, None], through, slopes[:, :3], slopes[:, 3], forget)
        self.steps = steps_of(ragged, *arrays, turned[:, :3], turned[:, 3], self.given)

    def back(self, t: int, target: State) -> None:
        h, c, spread, through, slopes, slope_out, forget, inner, outer, given = self.steps[t]
        c.addcmul_(h, through)
        torch.mul(slopes, spread, out=inner)
        torch.mul(slope_out, h, out=outer)
        target[0].addmm_(given, self.weight)
        target[1].addcmul_(c, forget)


class _CompiledLSTMBack(Back):
    """The same in one pass over the rows of a step, which keeps no slopes."""

    def __init__(
        self, total: State, weight: Tensor, ragged: Ragged, start: State, kept: State
    ) -> None:
        h, c, gates, squashed = kept
        turned = torch.empty_like(gates)
        self.total, self.weight, self.given = total, weight, turned
        self.arrays = tuple(as_array(x) for x in (*total, gates, squashed, turned))
        self.start, self.cells = as_array(start[1]), as_array(c)
        own = torch.arange(sum(ragged.sizes[:1]), device=h.device)
        self.places = [x.numpy() for x in (own, *ragged.before.split(ragged.sizes[1:]))]
        self.steps = turned.split(ragged.sizes)
        self.first = [0, *accumulate(ragged.sizes)]

    def back(self, t: int, target: State) -> None:
        from seqdgm.kernels.lstm import turn

        before = self.cells if t else self.start
        turn(*self.arrays, before, self.places[t], target[1].numpy(), self.first[t])
        target[0].addmm_(self.steps[t], self.weight)


def _lstm_back(total: State, weight: Tensor, ragged: Ragged, start: State, kept: State) -> Back:
    kind = _CompiledLSTMBack if pays(total[0]) else _LSTMBack
    return kind(total, weight, ragged, start, kept)


AHEAD: dict[str, type[Ahead]] = {
    "tanh": _TanhAhead,
    "relu": _ReluAhead,
    "gru": _GRUAhead,
    "lstm": _LSTMAhead,
}
BACK: dict[str, Callable[[State, Tensor, Ragged, State, State], Back]] = {
    "tanh": _TanhBack,
    "relu": _ReluBack,
    "gru": _GRUBack,
    "lstm": _lstm_back,
}
