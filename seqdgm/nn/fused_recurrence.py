r"""Recurrent layers along whole series, differentiated by hand.

A layer is given its inputs' share of the gates, :math:`p_t = W x_t + b`, for all steps at once; the
loop holds one matrix product with :math:`U h_{t-1}` forwards and one backwards, and no work on
padding. The gradient of U is computed for all steps together. The cells are those of
`seqdgm.nn.fused_cells`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from seqdgm.nn.fused_cells import AHEAD, BACK, Back, State, before_each
from seqdgm.nn.ragged import Ragged


def recur(
    kind: str,
    given: Float[Tensor, "rows gates"],
    start: State,
    weight: Float[Tensor, "gates hidden"],
    bias: Float[Tensor, "gates"],
    ragged: Ragged,
) -> Float[Tensor, "rows hidden"]:
    """Outputs h of all steps.

    Parameters
    ----------
    kind : {"tanh", "relu", "gru", "lstm"}
    given : Tensor of shape (rows, gates)
        The inputs' share of the gates, their bias included.
    start : tuple of Tensor of shape (series, hidden)
        State before the first step, the longest series first: `(h,)`, or `(h, c)` of an LSTM.
    weight, bias : Tensor of shape (gates, hidden) and (gates,)
        Of the recurrent share.
    ragged : Ragged
    """
    found: Tensor = _Layer.apply(kind, given, weight, bias, ragged, *start)
    return found


def recur_step_by_step(
    kind: str,
    given: Float[Tensor, "rows gates"],
    start: State,
    weight: Float[Tensor, "gates hidden"],
    bias: Float[Tensor, "gates"],
    ragged: Ragged,
) -> Float[Tensor, "rows hidden"]:
    """The same as `recur` by automatic differentiation, which second derivatives need."""
    state, outputs = start, []
    for share in given.split(ragged.sizes):
        state = tuple(part[: len(share)] for part in state)
        state = _cell(kind, share, state, F.linear(state[0], weight, bias))
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


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        given: Tensor,
        weight: Tensor,
        bias: Tensor,
        ragged: Ragged,
        *start: Tensor,
    ) -> Tensor:
        cell = AHEAD[kind](given, weight, bias, ragged)
        state: State = start
        for t in range(len(ragged.sizes)):
            state = cell.ahead(t, state)
        ctx.save_for_backward(given, weight, bias, *start, *cell.kept)
        ctx.ragged, ctx.n_start, ctx.kind = ragged, len(start), kind
        return cell.kept[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        n = 3 + ctx.n_start
        given, weight, bias, *start = ctx.saved_tensors[:n]
        if torch.is_grad_enabled():
            wanted = [given, weight, bias, *start]
            outputs = recur_step_by_step(ctx.kind, given, tuple(start), weight, bias, ctx.ragged)
            needed = [x for x in wanted if x.requires_grad]
            some = iter(torch.autograd.grad(outputs, needed, gradient, create_graph=True))
            found = [next(some) if x.requires_grad else None for x in wanted]
            return (None, *found[:3], None, *found[3:])
        kept, ragged = ctx.saved_tensors[n:], ctx.ragged
        total = (gradient.clone(), *(torch.zeros_like(kept[0]) for _ in start[1:]))
        cell = BACK[ctx.kind](total, weight, ragged, tuple(start), kept)
        for_start = _turn_to_start(cell, ragged, tuple(start))
        before = before_each(start[0], kept[0], ragged)
        return None, cell.given, *cell.weights(before), None, *for_start


def _turn_to_start(cell: Back, ragged: Ragged, start: State) -> State:
    """Turn all steps; the gradient for the state before the first."""
    sizes = ragged.sizes
    for_start = tuple(torch.zeros_like(x) for x in start)
    blocks = [x.split(sizes) for x in cell.total]
    for t in range(len(sizes) - 1, -1, -1):
        ahead = tuple(x[t - 1] for x in blocks) if t else for_start
        cell.back(t, tuple(x[: sizes[t]] for x in ahead))
    return for_start
