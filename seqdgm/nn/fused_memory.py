r"""Gaussian states drawn given a gated memory that reads them, along whole series, by hand.

.. math::

    a_t &= \mathrm{relu}(c_t + P h_t), \qquad (\mu_t, r_t) = V a_t + d \\
    \sigma_t &= \mathrm{softplus}(r_t) + \sigma_{\min}, \qquad z_t = \mu_t + \sigma_t \epsilon_t \\
    f_t &= \mathrm{relu}(F z_t + b) \quad \text{or } z_t \text{ itself} \\
    (h_{t+1}, \cdot) &= \mathrm{cell}(g_{t+1} + R f_t, (h_t, \cdot))

What the cell and the inference network read besides, g and c, is computed before; priors and
emissions follow after. The gradients of all weights are one product each over (series x time),
after the loop.

Rows can be particles, of which some go on more than once and some not at all: whoever steers them
chooses after each step, and the gradients of a row's descendants add up on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqdgm.nn.fused_cells import AHEAD, BACK, State, steps_of
from seqdgm.nn.gaussians import HALF_LOG_2PI
from seqdgm.nn.ragged import Ragged
from seqdgm.types import Steer


class Weights(NamedTuple):
    """Weights and biases P, V, d, R, U (the cell's own), its bias, F and b."""

    memory: Float[Tensor, "encoder hidden"]
    out: Float[Tensor, "two_latent encoder"]
    out_bias: Float[Tensor, "two_latent"]
    gates: Float[Tensor, "gates read"]
    recurrent: Float[Tensor, "gates hidden"]
    recurrent_bias: Float[Tensor, "gates"] | None
    features: Float[Tensor, "read latent"] | None = None
    features_bias: Float[Tensor, "read"] | None = None


class Path(NamedTuple):
    """Rows of the laws, of the draws, and of the memory before each draw."""

    loc: Float[Tensor, "rows latent"]
    scale: Float[Tensor, "rows latent"]
    z: Float[Tensor, "rows latent"]
    memory: State


def draw_with_memory(
    kind: str,
    c: Float[Tensor, "shared encoder"],
    given: Float[Tensor, "shared_later gates"],
    first: State,
    noise: Float[Tensor, "rows latent"],
    weights: Weights,
    ragged: Ragged,
    min_scale: float,
    steer: Steer | None = None,
) -> Path:
    """Laws and draws of all steps, and the memory.

    Parameters
    ----------
    kind : {"lstm", "gru"}
    c : Tensor of shape (rows / copies, encoder)
        The hidden layer's pre-activations, but for the memory; each for as many rows in turn as
        there are rows of noise to it.
    given : Tensor of shape (later rows / copies, gates)
        What the gates that lead to the memory of each step but the first read besides.
    first : tuple of Tensor of shape (series, hidden)
        Memory at the first step, the longest series first: `(h,)`, or `(h, c)` of an LSTM.
    noise : Tensor of shape (rows, latent)
        Standard normal numbers.
    weights : Weights
    ragged : Ragged
    min_scale : float
        Floor of the scale.
    steer : callable, optional
        Chooses after each step whom the rows go on from, without a gradient; as a row's state it is
        given what the gates read of the draw, f.

    Examples
    --------
    A memory that keeps what it has, and a state that is its sum with c:

    >>> ragged, closed = Ragged.of(torch.tensor([2]), 2), torch.tensor([[0.0, 99.0, 0.0]])
    >>> out, gates = torch.tensor([[1.0], [0.0]]), torch.zeros(3, 1)
    >>> weights = Weights(torch.eye(1), out, torch.zeros(2), gates, gates, None)
    >>> first, noise = (torch.ones(1, 1),), torch.zeros(2, 1)
    >>> draw_with_memory("gru", torch.ones(2, 1), closed, first, noise, weights, ragged, 0.0).z
    tensor([[2.],
            [2.]])
    """
    how = (kind, ragged, min_scale, len(first), steer)
    found = _Memory.apply(how, c, given, noise, *first, *weights)
    return Path(found[0], found[1], found[2], found[3:])


def log_density(
    scale: Float[Tensor, "rows latent"], noise: Float[Tensor, "rows latent"]
) -> Float[Tensor, "rows"]:
    """Log-density of draws made with this noise: as the location moves, it does not change."""
    elements = torch.addcmul(scale.log(), noise, noise, value=0.5)
    return -HALF_LOG_2PI * scale.shape[1] - elements.sum(1)


def _later(ragged: Ragged) -> Ragged:
    """The same without the first step."""
    n = ragged.sizes[0]
    before = ragged.before[sum(ragged.sizes[1:2]) :] - n
    return ragged._replace(sizes=ragged.sizes[1:], place=ragged.place[n:], before=before)


def _descended(ragged: Ragged, chosen: Sequence[Tensor | None]) -> Ragged:
    """The same, with each row's ancestor as the row before it."""
    if all(ancestors is None for ancestors in chosen):
        return ragged
    blocks = zip(ragged.before.split(ragged.sizes[1:]), chosen, strict=True)
    # The rows of a step stand together, the first of them first.
    before = [own if ancestors is None else own[0] + ancestors for own, ancestors in blocks]
    return ragged._replace(before=torch.cat(before))


def _each(x: Float[Tensor, "shared dim"], copies: int) -> Float[Tensor, "shared copies dim"]:
    """Without a copy."""
    return x[:, None].expand(-1, copies, -1)


def _gathered(state: State, ancestors: Tensor | None) -> State:
    """What the rows of the next step hold."""
    if ancestors is None:
        return state
    return tuple(part.index_select(0, ancestors) for part in state)


def _heirs(totals: State, count: int, ancestors: Tensor | None) -> State:
    """Where the rows of the next step add their gradients for what they hold."""
    if ancestors is None:
        return tuple(total[:count] for total in totals)
    return tuple(total.new_zeros(count, total.shape[1]) for total in totals)


def _add_up(totals: State, heirs: State, ancestors: Tensor | None) -> None:
    """Add the gradients of all descendants of each row."""
    if ancestors is not None:
        for total, part in zip(totals, heirs, strict=True):
            total.index_add_(0, ancestors, part)


def _over_copies(x: Float[Tensor, "rows dim"], copies: int) -> Float[Tensor, "shared dim"]:
    return x if copies == 1 else x.unflatten(0, (-1, copies)).sum(1)


class _Memory(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[str, Ragged, float, int, Steer | None],
        c: Tensor,
        given: Tensor,
        noise: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        kind, ragged, min_scale, n_parts, steer = how
        first, w = tensors[:n_parts], Weights(*tensors[n_parts:])
        copies = len(noise) // len(c)
        cell = AHEAD[kind](_each(given, copies), w.recurrent, w.recurrent_bias, _later(ragged))
        # Products are fastest with the weights as (in, out).
        p, v, r = (x.t().contiguous() for x in (w.memory, w.out, w.gates))
        f = None if w.features is None else w.features.t().contiguous()
        a, out = _each(c, copies).clone().flatten(0, 1), c.new_empty(len(noise), len(w.out))
        scale, z = torch.empty_like(noise), torch.empty_like(noise)
        read = z if f is None else c.new_empty(len(a), f.shape[1])
        loc, raw = out.chunk(2, 1)
        state, gates = first, cell.gates.split(ragged.sizes[1:])
        chosen: list[Tensor | None] = [None] * len(gates)
        rows = steps_of(ragged, a, out, loc, raw, scale, noise, z, read)
        # What is made in here is never part of a graph, and calls are cheaper for it.
        with torch.inference_mode():
            for t, (a_t, out_t, loc_t, raw_t, scale_t, noise_t, z_t, read_t) in enumerate(rows):
                a_t.addmm_(state[0][: len(a_t)], p).relu_()
                torch.addmm(w.out_bias, a_t, v, out=out_t)
                torch.ops.aten.softplus.out(raw_t, out=scale_t).add_(min_scale)
                torch.addcmul(loc_t, scale_t, noise_t, out=z_t)
                if f is not None and w.features_bias is not None:
                    torch.addmm(w.features_bias, z_t, f, out=read_t).relu_()
                if t < len(gates):
                    if steer is not None:
                        h_t = tuple(part[: len(a_t)] for part in state)
                        log_q = log_density(scale_t, noise_t)
                        chosen[t] = steer(t, ragged.order[: len(a_t)], h_t, read_t, z_t, log_q)
                        *parts, read_t = _gathered((*state, read_t), chosen[t])
                        state = tuple(parts)
                    gates[t].addmm_(read_t[: len(gates[t])], r)
                    state = cell.ahead(t, state)
        n = ragged.sizes[0]
        memories = [
            torch.cat([start[:n], part]) for start, part in zip(first, cell.kept, strict=False)
        ]
        kept = (noise, a, out, z, read, memories[0])
        ctx.save_for_backward(*kept, *first, *w, *cell.kept)
        ctx.kind, ctx.ragged, ctx.n_parts = kind, _descended(ragged, chosen), n_parts
        ctx.chosen, ctx.copies = chosen, copies
        return loc.contiguous(), scale, z, *memories

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        noise, a, out, z, read, h, *others = ctx.saved_tensors
        ragged, n_parts, n = ctx.ragged, ctx.n_parts, ctx.ragged.sizes[0]
        first, kept = tuple(others[:n_parts]), tuple(others[n_parts + len(Weights._fields) :])
        w = Weights(*others[n_parts : n_parts + len(Weights._fields)])
        for_loc, for_scale, for_draw, *for_memory = gradients
        # Gradients for what each step returns, from its outputs and from the steps after it.
        total, total_z = tuple(x.clone() for x in for_memory), for_draw.clone()
        start = _gathered(first, ctx.chosen[0]) if ctx.chosen else first
        cell = BACK[ctx.kind](tuple(x[n:] for x in total), w.recurrent, _later(ragged), start, kept)
        slope = torch.sigmoid(out.chunk(2, 1)[1])
        for_out = torch.cat([for_loc, for_scale * slope], 1)
        spread = slope.mul_(noise)  # how a draw moves with the raw scale
        for_c = torch.empty_like(a)
        # What the cell has read, and its gradient.
        seen = read.index_select(0, ragged.before)
        for_seen = torch.empty_like(seen)
        blocks = (x.split(ragged.sizes[1:]) for x in (cell.given, seen, for_seen))
        later = list(zip(*blocks, strict=True))
        rows = steps_of(ragged, total_z, for_out, *for_out.chunk(2, 1), spread, for_c, a, *total)
        relu_back = torch.ops.aten.threshold_backward.grad_input
        for t in range(len(rows) - 1, -1, -1):
            total_t, out_t, loc_t, raw_t, spread_t, c_t, a_t, *state_t = rows[t]
            if t < len(later):
                given, seen_t, read_t = later[t]
                before = _heirs((*state_t, total_t), len(given), ctx.chosen[t])
                cell.back(t, before[:-1])
                if w.features is None:
                    before[-1].addmm_(given, w.gates)
                else:
                    torch.mm(given, w.gates, out=read_t)
                    relu_back(read_t, seen_t, 0.0, grad_input=read_t)
                    before[-1].addmm_(read_t, w.features)
                _add_up((*state_t, total_t), before, ctx.chosen[t])
            loc_t.add_(total_t)
            raw_t.addcmul_(total_t, spread_t)
            relu_back(torch.mm(out_t, w.out, out=c_t), a_t, 0.0, grad_input=c_t)
            state_t[0].addmm_(c_t, w.memory)
        for_first = [torch.zeros_like(x) for x in first]
        for whole, part in zip(for_first, total, strict=True):
            whole[:n] = part[:n]
        found = Weights(
            for_c.t() @ h,
            for_out.t() @ a,
            for_out.sum(0),
            cell.given.t() @ seen,
            cell.weights(h.index_select(0, ragged.before)),
            None if w.recurrent_bias is None else cell.bias(),
            None if w.features is None else for_seen.t() @ z.index_select(0, ragged.before),
            None if w.features is None else for_seen.sum(0),
        )
        shared = (_over_copies(x, ctx.copies) for x in (for_c, cell.given))
        return None, *shared, None, *for_first, *found
