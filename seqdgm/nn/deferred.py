"""Linear layers of a time loop, whose weights' gradients are one matrix product for all steps.

Back-propagation through T steps adds T products of thin matrices, each as large as the weights. The
same sum is a single product of the inputs and the gradients of all steps, set one below the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MIN_WEIGHTS = 2**16  # below, a call costs more than the smaller products save


class _Calls:
    """Calls of one layer in a loop: what they read, and the gradients of what they returned.

    The pairs are kept apart by backward pass, of which a graph may see several.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.anchor: Tensor = _Anchor.apply(weight, self)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        rows = (x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
        self.pairs.setdefault(task, []).append(rows)

    def total(self) -> Tensor:
        pairs = self.pairs.pop(torch._C._current_graph_task_id())
        read, gradient = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        return gradient.mT @ read


_open: ContextVar[dict[int, _Calls] | None] = ContextVar("deferred", default=None)


class _Anchor(torch.autograd.Function):
    """Stands for the weights in the graph, so that their turn comes after that of all calls."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, calls: _Calls) -> Tensor:
        ctx.calls = calls
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.calls.total(), None


class _Product(torch.autograd.Function):
    """The product with the weights; its gradient in them is left to the anchor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, calls: _Calls) -> Tensor:
        ctx.calls = calls
        ctx.save_for_backward(x)
        return F.linear(x, calls.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.calls.add(x, gradient)
        back = gradient @ ctx.calls.weight if ctx.needs_input_grad[0] else None
        return back, gradient.new_zeros(()), None


@contextmanager
def deferred() -> Iterator[None]:
    """Within it, every `LoopLinear` sums up its weights' gradient once for all of its calls."""
    token = _open.set({})
    try:
        yield
    finally:
        _open.reset(token)


class LoopLinear(nn.Linear):
    """`torch.nn.Linear` for use in a loop over time; the same numbers, inside `deferred` faster.

    Examples
    --------
    >>> layer, h = LoopLinear(300, 300), torch.ones(2, 300)
    >>> with deferred():
    ...     for _ in range(5):
    ...         h = torch.tanh(layer(h))
    >>> h.sum().backward()
    >>> layer.weight.grad.shape
    torch.Size([300, 300])
    """

    def forward(self, x: Float[Tensor, "*batch input"]) -> Float[Tensor, "*batch output"]:
        """Affine map of the last axis."""
        calls = _open.get()
        learning = torch.is_grad_enabled() and self.weight.requires_grad
        small = self.weight.numel() < MIN_WEIGHTS
        if calls is None or small or not learning or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        mine = calls.get(id(self.weight))
        if mine is None:
            mine = calls[id(self.weight)] = _Calls(self.weight)
        product: Tensor = _Product.apply(x, mine.anchor, mine)
        return product if self.bias is None else product + self.bias
