"""Formulas of torch's operations on arrays of scalar nodes: views, sums and products."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqdgm.kernels.trace_ops import FORMULAS, Args, Options, formula, option
from seqdgm.kernels.trace_tape import Handler, Ids, Tape


@formula("clone", "detach", "alias", "contiguous", "lift_fresh", "_to_copy", "to", "_conj")
def _same(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return tape.cast(tape.ids(args[0]), args[0].dtype, out.dtype)


@formula("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "_reshape_alias")
def _reshape(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    # `view` with a type looks at the memory as other numbers.
    if out.dtype != args[0].dtype:
        return None
    return tape.ids(args[0]).reshape(out.shape)


@formula("expand")
def _expand(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.broadcast_to(tape.ids(args[0]), out.shape)


@formula("permute")
def _permute(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return tape.ids(args[0]).transpose(args[1])


@formula("transpose")
def _transpose(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.swapaxes(tape.ids(args[0]), args[1], args[2])


@formula("t")
def _t(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return tape.ids(args[0]).T


@formula("select")
def _select(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.take(tape.ids(args[0]), args[2], args[1])


@formula("slice")
def _slice(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids, axis = tape.ids(args[0]), option(args, kwargs, 1, "dim", 0)
    ends = [option(args, kwargs, 2 + k, name) for k, name in enumerate(("start", "end", "step"))]
    return np.moveaxis(np.moveaxis(ids, axis, 0)[slice(*ends)], 0, axis)


def _join(join: Any) -> Handler:
    def handler(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
        parts = [tape.ids(part, out.dtype) for part in args[0]]
        ids: Ids = join(parts, axis=option(args, kwargs, 1, "dim", 0))
        return ids

    return handler


FORMULAS["cat"], FORMULAS["stack"] = _join(np.concatenate), _join(np.stack)


@formula("split", "split_with_sizes", "unbind", "chunk")
def _split(tape: Tape, args: Args, kwargs: Options, out: Any) -> list[Ids]:
    ids = tape.ids(args[0])
    parted = out[0].ndim == ids.ndim
    axis = option(args, kwargs, 2 if parted else 1, "dim", 0)
    if not parted:
        return list(np.moveaxis(ids, axis, 0))
    ends = np.cumsum([part.shape[axis] for part in out])[:-1]
    return np.split(ids, ends, axis)


@formula("flip")
def _flip(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.flip(tape.ids(args[0]), args[1])


@formula("roll")
def _roll(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    axes = option(args, kwargs, 2, "dims") or None
    return np.roll(tape.ids(args[0]), args[1] if axes else args[1][0], axes)


@formula("repeat")
def _repeat(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.tile(tape.ids(args[0]), args[1])


@formula("diagonal")
def _diagonal(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    places = [
        option(args, kwargs, 1 + k, name, (0, 0, 1)[k])
        for k, name in enumerate(("offset", "dim1", "dim2"))
    ]
    return np.diagonal(tape.ids(args[0]), *places)


def _triangle(keep: Any) -> Handler:
    def handler(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
        kept = keep(np.ones(out.shape, bool), option(args, kwargs, 1, "diagonal", 0))
        return np.where(kept, tape.ids(args[0]), tape.literal(0.0))

    return handler


FORMULAS["tril"], FORMULAS["triu"] = _triangle(np.tril), _triangle(np.triu)


@formula("index")
def _index(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    table, places = args[:2]
    moving = [k for k, place in enumerate(places) if tape.traced(place)]
    if not moving:
        own = [slice(None) if each is None else each.numpy() for each in places]
        return tape.ids(table)[tuple(own)]
    if [k for k, place in enumerate(places) if place is not None] != moving[:1]:
        return None
    return _look_up(tape, table, places[moving[0]], moving[0])


@formula("index_select")
def _index_select(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if tape.traced(args[2]):
        return _look_up(tape, args[0], args[2], args[1])
    return np.take(tape.ids(args[0]), args[2].numpy(), args[1])


@formula("embedding")
def _embedding(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    return _look_up(tape, args[0], args[1], 0) if tape.traced(args[1]) else None


def _look_up(tape: Tape, table: Tensor, place: Tensor, axis: int) -> Any:
    """Elements of a table of parameters at a place that depends on the step."""
    if tape.traced(table) or place.dtype == torch.bool:
        return None
    rows = np.moveaxis(table.detach().double().numpy(), axis, 0)
    width = rows[0].size
    first = len(tape.values)
    for number in rows.ravel().tolist():
        tape.value(number)
    starts = np.array([tape.literal(first + k) for k in range(width)])
    sizes = np.array([tape.literal(len(rows)), tape.literal(width)])
    where = tape.ids(place).reshape(-1, 1)
    found = tape.each("look_up", starts, np.array(sizes[1]), np.array(sizes[0]), where)
    found = found.reshape(*place.shape, *rows.shape[1:])
    axes = range(place.ndim)
    return np.moveaxis(found, list(axes), [axis + k for k in axes])


@formula("gather")
def _gather(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    ids, axis, place = tape.ids(args[0]), args[1], tape.ids(args[2])
    if not tape.traced(args[2]):
        return np.take_along_axis(ids, args[2].numpy(), axis)
    rows, place = np.moveaxis(ids, axis, 0), np.moveaxis(place, axis, 0)
    rows = rows[(slice(None), *(slice(size) for size in place.shape[1:]))]
    found = rows[len(rows) - 1]
    for k in range(len(rows) - 1):
        here = tape.each("eq", place, np.array(tape.literal(k)))
        found = tape.each("where", here, rows[k], found)
    return np.moveaxis(np.broadcast_to(found, place.shape), 0, axis)


def _axes(args: Args, kwargs: Options, ids: Ids) -> tuple[tuple[int, ...], bool]:
    found = option(args, kwargs, 1, "dim")
    axes = (found,) if isinstance(found, int) else tuple(found or range(ids.ndim))
    return axes, bool(option(args, kwargs, 2, "keepdim", False))


def _reduction(op: str) -> Handler:
    def handler(tape: Tape, args: Args, kwargs: Options, out: Any) -> Any:
        first = out if isinstance(out, Tensor) else out[0]
        ids = tape.ids(args[0], first.dtype)
        found = tape.reduce(op, ids, *_axes(args, kwargs, ids))
        return found if isinstance(out, Tensor) else [found]

    return handler


for _names, _op in (
    ("sum", "add"),
    ("prod", "mul"),
    ("amax max", "maximum"),
    ("amin min", "minimum"),
    ("all _is_all_true", "and"),
    ("any _is_any_true", "or"),
):
    FORMULAS.update(dict.fromkeys(_names.split(), _reduction(_op)))


@formula("mean")
def _mean(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids = tape.ids(args[0])
    total = tape.reduce("add", ids, *_axes(args, kwargs, ids))
    return tape.each("mul", total, np.array(tape.literal(total.size / ids.size)))


@formula("cumsum")
def _cumsum(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    rows = list(np.moveaxis(tape.ids(args[0], out.dtype), args[1], 0))
    for k in range(1, len(rows)):
        rows[k] = tape.each("add", rows[k - 1], rows[k])
    return np.moveaxis(np.stack(rows), 0, args[1])


def _log_sum_exp(tape: Tape, ids: Ids, axes: tuple[int, ...]) -> Ids:
    top = tape.reduce("maximum", ids, axes, True)
    total = tape.reduce("add", tape.each("exp", tape.each("sub", ids, top)), axes, True)
    return tape.each("add", top, tape.each("log", total))


@formula("logsumexp")
def _logsumexp(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids = tape.ids(args[0])
    return _log_sum_exp(tape, ids, _axes(args, kwargs, ids)[0]).reshape(out.shape)


@formula("logaddexp")
def _logaddexp(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    parts = np.broadcast_arrays(*(tape.ids(arg, out.dtype) for arg in args[:2]))
    return _log_sum_exp(tape, np.stack(parts), (0,))[0]


@formula("_log_softmax")
def _log_softmax(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids = tape.ids(args[0])
    return tape.each("sub", ids, _log_sum_exp(tape, ids, (args[1],)))


@formula("_softmax")
def _softmax(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return tape.each("exp", _log_softmax(tape, args, kwargs, out))


@formula("linalg_vector_norm")
def _norm(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if option(args, kwargs, 1, "ord", 2) != 2:
        return None
    ids = tape.ids(args[0])
    axes = tuple(option(args, kwargs, 2, "dim") or range(ids.ndim))
    total = tape.reduce("add", tape.each("mul", ids, ids), axes)
    return tape.each("sqrt", total).reshape(out.shape)


def _product(tape: Tape, a: Ids, b: Ids) -> Ids:
    """Matrix products, (..., i, j) by (..., j, k)."""
    terms = tape.each("mul", a[..., :, :, None], b[..., None, :, :])
    return tape.reduce("add", terms, (terms.ndim - 2,))


@formula("mm", "bmm", "mv", "dot")
def _matmul(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    a, b = (tape.ids(arg) for arg in args[:2])
    a = a if a.ndim > 1 else a[None]
    b = b if b.ndim > 1 else b[:, None]
    return _product(tape, a, b).reshape(out.shape)


@formula("addmm", "baddbmm", "addmv")
def _addmm(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    product = _matmul(tape, args[1:3], {}, out)
    start = tape.ids(args[0])
    for name, which in (("alpha", 0), ("beta", 1)):
        factor = kwargs.get(name, 1)
        if factor != 1:
            scaled = tape.each("mul", tape.ids(float(factor)), (product, start)[which])
            product, start = (scaled, start) if which == 0 else (product, scaled)
    return tape.each("add", start, product)


@formula("linear")
def _linear(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    x, weight = tape.ids(args[0]), tape.ids(args[1])
    product = _product(tape, x.reshape(-1, x.shape[-1]), weight.T).reshape(out.shape)
    bias = option(args, kwargs, 2, "bias")
    return product if bias is None else tape.each("add", product, tape.ids(bias))


@formula("linalg_solve_triangular")
def _solve_triangular(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if not kwargs.get("left", True):
        return None
    shape = out.shape[:-2]
    a, b = (tape.ids(arg) for arg in args[:2])
    a, b = (np.broadcast_to(ids, (*shape, *ids.shape[-2:])) for ids in (a, b))
    size = a.shape[-1]
    order = range(size)[::-1] if kwargs["upper"] else range(size)
    rows: dict[int, Ids] = {}
    for i in order:
        row = b[..., i, :]
        for j, known in rows.items():
            row = tape.each("sub", row, tape.each("mul", a[..., i, j, None], known))
        rows[i] = row if kwargs.get("unitriangular") else tape.each("div", row, a[..., i, i, None])
    return np.stack([rows[i] for i in range(size)], -2)
