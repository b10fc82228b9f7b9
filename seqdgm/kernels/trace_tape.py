"""A tape of scalar operations, recorded while torch computes with one series and one particle.

Each tensor that depends on the state, the observation or the step is an array of numbers of nodes;
a node is an operation on other nodes. What depends on parameters alone is computed by torch, and
enters as a value that is read anew by every recording.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONSTANT, STEP, PARTICLE = range(3)  # what a node depends on, at most
LARGEST = 5000  # nodes
Ids = np.ndarray  # of the numbers of nodes
Handler = Callable[["Tape", tuple[Any, ...], dict[str, Any], Any], Any]
_INPUTS = {"p": CONSTANT, "u": STEP, "t": STEP, "x": STEP}
_CHECKS = ("__init__", "_validate_sample")
REMEDY = "write it otherwise, or leave compile=False"
# Their results hold no number of the tensor that they are given.
_NEW = ("zeros", "ones", "full", "empty", "empty_strided")
_SHAPES_ONLY = [f"{name}_like" for name in _NEW] + [f"new_{name}" for name in _NEW]


class Node(NamedTuple):
    """An operation; of an input its place, of a literal its text, of "?" what has no formula."""

    op: str
    args: tuple[Any, ...]
    level: int


class Tape:
    """Nodes, and the values of parameters that they read.

    Attributes
    ----------
    nodes : list of Node
    values : list of float
        Of the inputs "p".
    exact : bool
        Whether all numbers are of double precision.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: list[float] = []
        self.exact = True
        self._known: dict[tuple[str, tuple[Any, ...]], int] = {}
        self._arrays: dict[int, Ids] = {}
        self._kept: list[Tensor] = []
        self._places: dict[tuple[int, int, torch.dtype], int] = {}

    # -- nodes

    def node(self, op: str, *args: Any) -> int:
        """The number of an operation on nodes."""
        for arg in args:
            if self.nodes[arg].op == "?":
                return int(arg)
        first = self.nodes[args[0]]
        if op == "log" and first.op == "exp":
            return int(first.args[0])
        if op == "float" and first.op == "int" and self.nodes[first.args[0]].op == "p":
            return int(first.args[0])
        level = max(self.nodes[arg].level for arg in args)
        if op == "div" and self.nodes[args[1]].level < level:
            # Once a step, in place of once a particle.
            return self.node("mul", args[0], self.node("reciprocal", args[1]))
        return self._add(op, args, level)

    def entry(self, op: str, place: int) -> int:
        """An input."""
        return self._add(op, (place,), _INPUTS.get(op, PARTICLE))

    def literal(self, value: float) -> int:
        """A number that is part of the program."""
        return self._add("literal", (repr(value),), CONSTANT)

    def value(self, number: float) -> int:
        """A number that every recording reads anew."""
        self.values.append(number)
        return self.entry("p", len(self.values) - 1)

    def unknown(self, name: str) -> int:
        """The result of something without a formula, an error where it is used."""
        return self._add("?", (name,), PARTICLE)

    def _add(self, op: str, args: tuple[Any, ...], level: int) -> int:
        key = (op, args)
        if key not in self._known:
            if len(self.nodes) >= LARGEST:
                raise ValueError(
                    f"a step takes more than {LARGEST:,} scalar operations for each particle, too "
                    "many to compile; leave compile=False"
                )
            self._known[key] = len(self.nodes)
            self.nodes.append(Node(op, args, level))
        return self._known[key]

    # -- arrays of nodes

    def each(self, op: str, *parts: Ids) -> Ids:
        """An operation, element by element."""
        arrays = np.broadcast_arrays(*parts)
        rows = zip(*(array.ravel().tolist() for array in arrays), strict=True)
        made = [self.node(op, *row) for row in rows]
        return np.array(made, dtype=np.int64).reshape(arrays[0].shape)

    def reduce(self, op: str, ids: Ids, axes: tuple[int, ...], keep: bool = False) -> Ids:
        """An operation along axes, from the first element to the last."""
        axes = tuple(axis % ids.ndim for axis in axes)
        for axis in sorted(axes, reverse=True):
            rows = np.moveaxis(ids, axis, 0)
            if not len(rows):
                return np.full_like(rows.sum(0), self.unknown(f"a {op} over nothing"))
            total = rows[0]
            for row in rows[1:]:
                total = self.each(op, total, row)
            ids = np.expand_dims(total, axis) if keep else total
        return ids

    def declare(self, tensor: Tensor, ids: Ids) -> None:
        """Say what a tensor holds."""
        if tuple(tensor.shape) != ids.shape:
            raise AssertionError(f"{tuple(tensor.shape)} was recorded as {ids.shape}")
        self.exact = self.exact and tensor.dtype not in (torch.float32, torch.float16)
        self._arrays[id(tensor)] = ids
        self._kept.append(tensor)

    def traced(self, value: Any) -> bool:
        """Whether a tensor depends on more than parameters."""
        return isinstance(value, Tensor) and id(value) in self._arrays

    def ids(self, value: Any, like: torch.dtype | None = None) -> Ids:
        """The nodes of a tensor or a number, as numbers of type `like` if it is given."""
        if not isinstance(value, Tensor):
            if isinstance(value, float):
                return np.array(self.value(value))
            whole = like is not None and not like.is_floating_point
            return np.array(self.literal(value if whole else float(value)))
        ids = self._arrays[id(value)] if self.traced(value) else self._parameters(value)
        return ids if like is None else self.cast(ids, value.dtype, like)

    def cast(self, ids: Ids, kind: torch.dtype, like: torch.dtype) -> Ids:
        """Numbers of one type as those of another."""
        if like == torch.bool:
            return ids if kind == torch.bool else self.each("truth", ids)
        if kind == torch.bool:
            return self.each("indicator" if like.is_floating_point else "count", ids)
        if kind.is_floating_point == like.is_floating_point:
            return ids
        return self.each("float" if like.is_floating_point else "int", ids)

    def _parameters(self, tensor: Tensor) -> Ids:
        """Elements of a tensor that torch has computed; those at one address are one."""
        self._kept.append(tensor)
        self.exact = self.exact and tensor.dtype not in (torch.float32, torch.float16)
        numbers = tensor.detach().double().numpy().ravel().tolist()
        places = np.full(tensor.shape, tensor.data_ptr(), dtype=np.int64)
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            steps = np.arange(size) * (stride * tensor.element_size())
            places += steps.reshape([-1 if k == axis else 1 for k in range(tensor.ndim)])
        found = []
        for place, number in zip(places.ravel().tolist(), numbers, strict=True):
            key = (place, tensor._version, tensor.dtype)
            if key not in self._places:
                self._places[key] = self.value(number)
            found.append(self._places[key])
        ids = np.array(found, dtype=np.int64).reshape(tensor.shape)
        if tensor.dtype.is_floating_point:
            return ids
        return self.each("truth" if tensor.dtype == torch.bool else "int", ids)


class Recorder(TorchDispatchMode):
    """Records on a tape what torch computes, by a formula for each of its operations."""

    def __init__(self, tape: Tape, formulas: dict[str, Handler]) -> None:
        super().__init__()
        self.tape = tape
        self.formulas = formulas

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute, and record."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(
                f"the model draws random numbers (aten.{name}), which a compiled step cannot; "
                f"{REMEDY}"
            )
        if name in _SHAPES_ONLY or not any(map(self.tape.traced, tree_leaves((args, kwargs)))):
            return out
        if name == "_local_scalar_dense":
            if not _checking():
                raise ValueError(
                    "the model turns a number that depends on the state, the inputs or the step "
                    "into a Python number (if, int, float, .item()), so that its course cannot be "
                    "compiled: use torch.where, or leave compile=False"
                )
            return out
        if func._schema.is_mutable:
            raise ValueError(
                f"aten.{name} writes into a tensor, which a compiled step cannot; use torch.stack "
                "or torch.where, or leave compile=False"
            )
        self._record(name, args, kwargs, out)
        return out

    def _record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        outs = (out,) if isinstance(out, Tensor) else out
        formula = self.formulas.get(name)
        found = None if formula is None else formula(self.tape, args, kwargs, out)
        parts = (found,) if isinstance(out, Tensor) or found is None else found
        for k, each in enumerate(outs):
            if isinstance(each, Tensor):
                ids = parts[k] if k < len(parts) else None
                if ids is None:
                    # No error yet: many an operation only checks arguments.
                    ids = np.full(each.shape, self.tape.unknown(f"aten.{name}"), dtype=np.int64)
                self.tape.declare(each, ids)


def _checking() -> bool:
    """Whether a distribution is checking its arguments."""
    frame = sys._getframe(1)
    while frame is not None:
        inside = frame.f_globals.get("__name__") == "torch.distributions.distribution"
        if inside and frame.f_code.co_name in _CHECKS:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
