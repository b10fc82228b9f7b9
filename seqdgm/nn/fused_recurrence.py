r"""Recurrent layers along whole series, differentiated by hand.

The inputs' share of the gates, :math:`W x_t + b`, is one product for all steps; the loop holds one
matrix product with :math:`U h_{t-1}` forwards and one backwards, and no work on padding. The
gradients of W and U are computed for all steps together, and that of the inputs for those that want
one. The cells are those of `seqdgm.nn.fused_cells` and `seqdgm.nn.fused_gru`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from seqdgm.nn.fused_cells import AHEAD, BACK, State, before_each, pays
from seqdgm.nn.fused_gru import GRUAhead, GRUBack
from seqdgm.nn.ragged import Ragged


class Weights(NamedTuple):
    """Weights and biases of a layer, in the order of torch's: W, U, b and that of U."""

    inputs: Float[Tensor, "gates inputs"]
    recurrent: Float[Tensor, "gates hidden"]
    inputs_bias: Float[Tensor, "gates"]
    recurrent_bias: Float[Tensor, "gates"]


def recur(
    kind: str,
    read: Sequence[Float[Tensor, "rows _"]],
    start: State,
    weights: Weights,
    ragged: Ragged,
) -> Float[Tensor, "rows hidden"]:
    """Outputs h of all steps.

    Parameters
    ----------
    kind : {"tanh", "relu", "gru", "lstm"}
    read : sequence of Tensor of shape (rows, features)
        Inputs, side by side; apart where only some of them have a gradient.
    start : tuple of Tensor of shape (series, hidden)
        State before the first step, the longest series first: `(h,)`, or `(h, c)` of an LSTM.
    weights : Weights
    ragged : Ragged
    """
    found: Tensor = _Layer.apply((kind, ragged, len(start)), *weights, *start, *read)
    return found


def recur_step_by_step(
    kind: str,
    read: Sequence[Float[Tensor, "rows _"]],
    start: State,
    weights: Weights,
    ragged: Ragged,
) -> Float[Tensor, "rows hidden"]:
    """The same as `recur` by automatic differentiation, which second derivatives need."""
    given = F.linear(_beside(read), weights.inputs, weights.inputs_bias)
    state, outputs = start, []
    for share in given.split(ragged.sizes):
        state = tuple(part[: len(share)] for part in state)
        recurrent = F.linear(state[0], weights.recurrent, weights.recurrent_bias)
        state = _cell(kind, share, state, recurrent)
        outputs.append(state[0])
    return torch.cat(outputs)


def _cell(kind: str, given: Tensor, state: State, recurrent: Tensor) -> State:
    if kind in ("tanh", "relu"):
        return (getattr(torch, kind)(given + recurrent),)
    if kind == "gru":
        given_r, given_z, given_n = given.chunk(3, -1)
        for_r, for_z, for_n = recurrent.chunk(3, -1)
        keep = torch.sigmoid(given_z + for_z)
        new = torch.tanh(given_n + torch.sigmoid(given_r + for_r) * for_n)
        return (torch.lerp(new, state[0], keep),)
    enter, forget, new, out = (given + recurrent).chunk(4, -1)
    memory = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return out.sigmoid() * memory.tanh(), memory


def _beside(read: Sequence[Tensor]) -> Tensor:
    return read[0] if len(read) == 1 else torch.cat(tuple(read), 1)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: tuple[str, Ragged, int], *tensors: Tensor) -> Tensor:
        kind, ragged, n_start = how
        w, start, read = Weights(*tensors[:4]), tensors[4 : 4 + n_start], tensors[4 + n_start :]
        whole, bias = _beside(read), w.recurrent_bias
        cell: Any
        if kind == "gru":
            # The bias within the reset gate's product cannot join that of the inputs.
            apart = bias[2 * bias.shape[0] // 3 :]
            joined = w.inputs_bias + F.pad(bias[: -len(apart)], (0, len(apart)))
            cell = GRUAhead(F.linear(whole, w.inputs, joined), w.recurrent, apart, ragged)
        else:
            given = F.linear(whole, w.inputs, w.inputs_bias + bias)
            cell = AHEAD[kind](given, w.recurrent, None, ragged)
        state: State = start
        for t in range(len(ragged.sizes)):
            state = cell.ahead(t, state)
        ctx.save_for_backward(*tensors, whole, *cell.kept)
        ctx.how, ctx.n_given = how, len(tensors)
        h: Tensor = cell.kept[0]
        return h

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors, (whole, *kept) = ctx.saved_tensors[: ctx.n_given], ctx.saved_tensors[ctx.n_given :]
        kind, ragged, n_start = ctx.how
        w, start, read = Weights(*tensors[:4]), tensors[4 : 4 + n_start], tensors[4 + n_start :]
        if torch.is_grad_enabled():
            outputs = recur_step_by_step(kind, read, start, w, ragged)
            needed = [x for x in tensors if x.requires_grad]
            some = iter(torch.autograd.grad(outputs, needed, gradient, create_graph=True))
            return None, *(next(some) if x.requires_grad else None for x in tensors)
        turned = _turn(kind, gradient, w.recurrent, ragged, start, tuple(kept))
        for_read, column = [], 0
        for x, wanted in zip(read, ctx.needs_input_grad[-len(read) :], strict=True):
            columns = slice(column, column + x.shape[1])
            for_read.append(turned.through(w.inputs[:, columns]) if wanted else None)
            column = columns.stop
        for_inputs, for_bias = turned.weights(whole)
        return None, for_inputs, turned.recurrent, for_bias, turned.bias, *turned.start, *for_read


class _Turned(NamedTuple):
    """Gradients.

    Attributes
    ----------
    given : tuple of Tensor of shape (rows, some gates)
        For the inputs' share of the gates, in blocks of gates.
    recurrent, bias : Tensor of shape (gates, hidden) and (gates,)
        For the recurrent weight and bias.
    start : tuple of Tensor of shape (series, hidden)
        For the state before the first step.
    """

    given: tuple[Float[Tensor, "rows _"], ...]
    recurrent: Float[Tensor, "gates hidden"]
    bias: Float[Tensor, "gates"]
    start: State

    def weights(self, read: Float[Tensor, "rows inputs"]) -> tuple[Tensor, Tensor]:
        """Gradients for W and b."""
        widths = [block.shape[1] for block in self.given]
        found = read.new_empty(sum(widths), read.shape[1])
        for block, target in zip(self.given, found.split(widths), strict=True):
            torch.mm(block.t(), read, out=target)
        return found, torch.cat([block.sum(0) for block in self.given])

    def through(self, weight: Float[Tensor, "gates features"]) -> Float[Tensor, "rows features"]:
        """Gradient for what was read with some columns of W."""
        parts = weight.split([block.shape[1] for block in self.given])
        found = self.given[0] @ parts[0]
        for block, part in zip(self.given[1:], parts[1:], strict=True):
            found.addmm_(block, part)
        return found


def _turn(
    kind: str, gradient: Tensor, weight: Tensor, ragged: Ragged, start: State, kept: State
) -> _Turned:
    """Turn all steps, the last first."""
    before = before_each(start[0], kept[0], ragged)
    if kind == "gru" and pays(gradient):
        gru = GRUBack(gradient.clone(), weight, ragged, start[0], kept)
        gru.run()
        return _Turned(gru.given, gru.own.t() @ before, gru.own.sum(0), (gru.start,))
    total = (gradient.clone(), *(torch.zeros_like(kept[0]) for _ in start[1:]))
    cell = BACK[kind](total, weight, ragged, start, kept)
    sizes, for_start = ragged.sizes, tuple(torch.zeros_like(x) for x in start)
    blocks = [x.split(sizes) for x in total]
    for t in range(len(sizes) - 1, -1, -1):
        ahead = tuple(x[t - 1] for x in blocks) if t else for_start
        cell.back(t, tuple(x[: sizes[t]] for x in ahead))
    return _Turned((cell.given,), cell.weights(before), cell.bias(), for_start)
