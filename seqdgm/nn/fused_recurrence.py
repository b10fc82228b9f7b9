r"""Recurrent layers along whole series, differentiated by hand.

A layer is given its inputs' share of the gates, :math:`p_t = W x_t + b`, for all steps at once; the
loop holds one matrix product with :math:`U h_{t-1}` forwards and one backwards, and no work on
padding. What the gradient of a gate is multiplied with is known after the forward pass and computed
for all steps together, and so is the gradient of U. The equations are those of `torch.nn.RNN`,
`torch.nn.GRU` and `torch.nn.LSTM`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from seqdgm.nn.ragged import Ragged

State = tuple[Tensor, ...]


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
    found: Tensor = _LAYERS[kind].apply(given, weight, bias, ragged, *start)
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
    """What the layers have in common; each has a loop forwards and one backwards."""

    kind: str
    run: Callable[..., tuple[Tensor, ...]]
    turn: Callable[..., tuple[Tensor, ...]]

    @classmethod
    def forward(
        cls, ctx: Any, given: Tensor, weight: Tensor, bias: Tensor, ragged: Ragged, *start: Tensor
    ) -> Tensor:
        kept = cls.run(given, weight.t().contiguous(), bias, ragged, *start)
        ctx.save_for_backward(given, weight, bias, *start, *kept)
        ctx.ragged, ctx.n_start, ctx.layer = ragged, len(start), cls
        return kept[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        n = 3 + ctx.n_start
        given, weight, bias, *start = ctx.saved_tensors[:n]
        if torch.is_grad_enabled():
            wanted = [given, weight, bias, *start]
            outputs = recur_step_by_step(
                ctx.layer.kind, given, tuple(start), weight, bias, ctx.ragged
            )
            needed = [x for x in wanted if x.requires_grad]
            some = iter(torch.autograd.grad(outputs, needed, gradient, create_graph=True))
            found = [next(some) if x.requires_grad else None for x in wanted]
            return (*found[:3], None, *found[3:])
        kept = ctx.saved_tensors[n:]
        sizes = ctx.ragged.sizes
        for_given, for_gates, for_start = ctx.layer.turn(gradient, weight, ctx.ragged, start, kept)
        before = _before(start[0], kept[0], ctx.ragged)
        whole = [torch.zeros_like(x) for x in start]
        for x, part in zip(whole, for_start, strict=True):
            x[: sizes[0]] = part
        return for_given, for_gates.t() @ before, for_gates.sum(0), None, *whole


def _before(start: Tensor, rows: Tensor, ragged: Ragged) -> Tensor:
    """What each row follows."""
    return torch.cat([start[: ragged.sizes[0]], rows.index_select(0, ragged.before)])


class _Simple(_Layer):
    """tanh or relu of the sum."""

    @classmethod
    def run(
        cls, given: Tensor, u: Tensor, bias: Tensor, ragged: Ragged, start: Tensor
    ) -> tuple[Tensor, ...]:
        h = given + bias
        before = start
        for h_t in h.split(ragged.sizes):
            h_t.addmm_(before[: len(h_t)], u)
            before = h_t.tanh_() if cls.kind == "tanh" else h_t.relu_()
        return (h,)

    @classmethod
    def turn(
        cls, gradient: Tensor, weight: Tensor, ragged: Ragged, start: Any, kept: Any
    ) -> tuple[Any, ...]:
        total = gradient.clone()
        (h,) = kept
        slope = 1 - h * h if cls.kind == "tanh" else (h > 0).to(h.dtype)
        steps = list(zip(total.split(ragged.sizes), slope.split(ragged.sizes), strict=True))
        for t in range(len(steps) - 1, -1, -1):
            total_t, slope_t = steps[t]
            total_t.mul_(slope_t)
            if t:
                steps[t - 1][0][: len(total_t)].addmm_(total_t, weight)
        return total, total, (total[: ragged.sizes[0]] @ weight,)


class _Tanh(_Simple):
    kind = "tanh"


class _Relu(_Simple):
    kind = "relu"


class _GRU(_Layer):
    kind = "gru"

    @staticmethod
    def run(
        given: Tensor, u: Tensor, bias: Tensor, ragged: Ragged, start: Tensor
    ) -> tuple[Tensor, ...]:
        width = start.shape[-1]
        h, new, for_new = (given.new_empty(len(given), width) for _ in range(3))
        gates = given[:, : 2 * width].contiguous()
        proposed = given[:, 2 * width :]
        share = given.new_empty(max(ragged.sizes), 3 * width)
        blocks = (x.split(ragged.sizes) for x in (h, gates, new, for_new, proposed))
        before = start
        for h_t, gates_t, new_t, for_new_t, proposed_t in zip(*blocks, strict=True):
            n = len(h_t)
            share_t = torch.addmm(bias, before[:n], u, out=share[:n])
            gates_t.add_(share_t[:, : 2 * width]).sigmoid_()
            for_new_t.copy_(share_t[:, 2 * width :])
            torch.addcmul(proposed_t, gates_t[:, :width], for_new_t, out=new_t).tanh_()
            before = torch.lerp(new_t, before[:n], gates_t[:, width:], out=h_t)
        return h, gates, new, for_new

    @staticmethod
    def turn(
        gradient: Tensor, weight: Tensor, ragged: Ragged, start: Any, kept: Any
    ) -> tuple[Any, ...]:
        h, gates, new, for_new = kept
        total = gradient.clone()
        width = h.shape[1]
        reset, keep = gates.split(width, 1)
        keep = keep.contiguous()
        before = _before(start[0], h, ragged)
        # The gates' gradients in units of that of h_t.
        slope_new = (1 - keep) * (1 - new * new)
        slopes = torch.empty(len(h), 3, width, dtype=h.dtype, device=h.device)
        torch.mul(slope_new * for_new, reset * (1 - reset), out=slopes[:, 0])
        torch.mul(before - new, keep * (1 - keep), out=slopes[:, 1])
        torch.mul(slope_new, reset, out=slopes[:, 2])
        for_gates = torch.empty_like(slopes)
        blocks = (x.split(ragged.sizes) for x in (total, slopes, keep, for_gates))
        steps = list(zip(*blocks, strict=True))
        for t in range(len(steps) - 1, -1, -1):
            total_t, slopes_t, keep_t, gates_t = steps[t]
            torch.mul(slopes_t, total_t[:, None], out=gates_t)
            if t:
                ahead = steps[t - 1][0][: len(total_t)]
                ahead.addcmul_(total_t, keep_t).addmm_(gates_t.flatten(1), weight)
        n = ragged.sizes[0]
        for_start = torch.addmm(total[:n] * keep[:n], for_gates[:n].flatten(1), weight)
        for_given = torch.cat([for_gates[:, 0], for_gates[:, 1], total * slope_new], 1)
        return for_given, for_gates.flatten(1), (for_start,)


class _LSTM(_Layer):
    kind = "lstm"

    @staticmethod
    def run(
        given: Tensor, u: Tensor, bias: Tensor, ragged: Ragged, start: Tensor, memory: Tensor
    ) -> tuple[Tensor, ...]:
        width = start.shape[-1]
        gates = given + bias
        h, c, squashed = (given.new_empty(len(given), width) for _ in range(3))
        blocks = (x.split(ragged.sizes) for x in (gates, h, c, squashed))
        before, c_before = start, memory
        for gates_t, h_t, c_t, squashed_t in zip(*blocks, strict=True):
            n = len(h_t)
            gates_t.addmm_(before[:n], u)
            gates_t[:, : 2 * width].sigmoid_()
            gates_t[:, 2 * width : 3 * width].tanh_()
            gates_t[:, 3 * width :].sigmoid_()
            enter, forget, new, out = gates_t.split(width, 1)
            torch.mul(c_before[:n], forget, out=c_t).addcmul_(enter, new)
            before = torch.mul(torch.tanh(c_t, out=squashed_t), out, out=h_t)
            c_before = c_t
        return h, c, gates, squashed

    @staticmethod
    def turn(
        gradient: Tensor, weight: Tensor, ragged: Ragged, start: Any, kept: Any
    ) -> tuple[Any, ...]:
        h, c, gates, squashed = kept
        total = gradient.clone()
        enter, forget, new, out = gates.split(h.shape[1], 1)
        forget = forget.contiguous()
        # The gates' gradients in units of that of c_t, and of that of h_t for the last.
        slopes = torch.empty(len(h), 4, h.shape[1], dtype=h.dtype, device=h.device)
        torch.mul(new, enter * (1 - enter), out=slopes[:, 0])
        torch.mul(_before(start[1], c, ragged), forget * (1 - forget), out=slopes[:, 1])
        torch.mul(enter, 1 - new * new, out=slopes[:, 2])
        torch.mul(squashed, out * (1 - out), out=slopes[:, 3])
        through = out * (1 - squashed * squashed)
        for_c, for_gates = torch.zeros_like(c), torch.empty_like(slopes)
        arrays = (total, for_c, through, slopes, forget, for_gates)
        steps = list(zip(*(x.split(ragged.sizes) for x in arrays), strict=True))
        for t in range(len(steps) - 1, -1, -1):
            total_t, c_t, through_t, slopes_t, forget_t, gates_t = steps[t]
            c_t.addcmul_(total_t, through_t)
            torch.mul(slopes_t[:, :3], c_t[:, None], out=gates_t[:, :3])
            torch.mul(slopes_t[:, 3], total_t, out=gates_t[:, 3])
            if t:
                n = len(total_t)
                steps[t - 1][0][:n].addmm_(gates_t.flatten(1), weight)
                torch.mul(c_t, forget_t, out=steps[t - 1][1][:n])
        n = ragged.sizes[0]
        flat = for_gates.flatten(1)
        return flat, flat, (flat[:n] @ weight, for_c[:n] * forget[:n])


_LAYERS: dict[str, type[_Layer]] = {"tanh": _Tanh, "relu": _Relu, "gru": _GRU, "lstm": _LSTM}
