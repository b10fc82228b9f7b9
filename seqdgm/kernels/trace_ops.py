"""Formulas of torch's operations on arrays of scalar nodes (`seqdgm.kernels.trace_tape`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqdgm.kernels.trace_tape import Handler, Ids, Tape

Args = tuple[Any, ...]
Options = dict[str, Any]
FORMULAS: dict[str, Handler] = {}


def _formula(*names: str) -> Any:
    def add(handler: Handler) -> Handler:
        FORMULAS.update(dict.fromkeys(names, handler))
        return handler

    return add


def _option(args: Args, kwargs: Options, place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


# -- element by element -----------------------------------------------------------------------


def _elementwise(op: str, arguments: int) -> Handler:
    def handler(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
        return tape.each(op, *(tape.ids(arg, out.dtype) for arg in args[:arguments]))

    return handler


def _question(op: str, arguments: int) -> Handler:
    """An operation whose answer is yes or no, on numbers of the type that its arguments share."""

    def handler(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
        kind = torch.result_type(args[0], args[arguments - 1])
        return tape.each(op, *(tape.ids(arg, kind) for arg in args[:arguments]))

    return handler


_UNARY = (
    "neg abs exp log log1p expm1 log2 log10 exp2 sqrt reciprocal sin cos tan asin acos atan sinh "
    "cosh tanh asinh acosh atanh sigmoid relu lgamma erf erfc floor ceil round trunc sign"
)
for _name in _UNARY.split():
    FORMULAS[_name] = _elementwise(_name, 1)
for _name in ["mul", "maximum", "minimum", "fmod", "remainder", "atan2", "hypot", "xlogy"]:
    FORMULAS[_name] = _elementwise(_name, 2)
for _name in ("gt", "ge", "lt", "le", "eq", "ne"):
    FORMULAS[_name] = _question(_name, 2)
for _name in ("isnan", "isinf", "isfinite"):
    FORMULAS[_name] = _question(_name, 1)
for _name in ("and", "or", "xor"):
    FORMULAS[f"logical_{_name}"] = FORMULAS[f"bitwise_{_name}"] = _elementwise(_name, 2)
FORMULAS["logical_not"] = FORMULAS["bitwise_not"] = _elementwise("not", 1)


@_formula("add")
def _add(tape: Tape, args: Args, kwargs: Options, out: Tensor, op: str = "add") -> Ids:
    a, b = (tape.ids(arg, out.dtype) for arg in args[:2])
    factor = _option(args, kwargs, 2, "alpha", 1)
    if factor != 1:
        b = tape.each("mul", b, tape.ids(factor, out.dtype))
    return tape.each(op, a, b)


def _sub(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _add(tape, args, kwargs, out, "sub")


def _rsub(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _sub(tape, (args[1], args[0], *args[2:]), kwargs, out)


FORMULAS["sub"], FORMULAS["rsub"] = _sub, _rsub


@_formula("div", "true_divide")
def _div(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    mode = kwargs.get("rounding_mode")
    ids = tape.each("div", *(tape.ids(arg, torch.float64) for arg in args[:2]))
    if mode is not None:
        ids = tape.each({"floor": "floor", "trunc": "trunc"}[mode], ids)
    return tape.cast(ids, torch.float64, out.dtype)


@_formula("floor_divide")
def _floor_divide(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _div(tape, args, {"rounding_mode": "floor"}, out)


@_formula("pow")
def _pow(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    base, power = args[:2]
    if isinstance(power, Tensor) or not isinstance(base, Tensor) or not out.is_floating_point():
        return tape.each("pow", tape.ids(base, out.dtype), tape.ids(power, out.dtype))
    ids = tape.ids(base, out.dtype)
    if power in (2, 3, 4):
        square = tape.each("mul", ids, ids)
        return square if power == 2 else tape.each("mul", square, ids if power == 3 else square)
    if power in (0.5, -0.5):
        ids = tape.each("sqrt", ids)
        return ids if power > 0 else tape.each("reciprocal", ids)
    if power in (1, -1):
        return ids if power > 0 else tape.each("reciprocal", ids)
    return tape.each("pow", ids, tape.ids(float(power)))


@_formula("square")
def _square(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _pow(tape, (args[0], 2), {}, out)


@_formula("rsqrt")
def _rsqrt(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _pow(tape, (args[0], -0.5), {}, out)


@_formula("addcmul")
def _addcmul(tape: Tape, args: Args, kwargs: Options, out: Tensor, op: str = "mul") -> Ids:
    a, b, c = (tape.ids(arg, out.dtype) for arg in args[:3])
    part, factor = tape.each(op, b, c), kwargs.get("value", 1)
    if factor != 1:
        part = tape.each("mul", tape.ids(float(factor)), part)
    return tape.each("add", a, part)


def _addcdiv(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _addcmul(tape, args, kwargs, out, "div")


FORMULAS["addcdiv"] = _addcdiv


@_formula("lerp")
def _lerp(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    a, b, weight = (tape.ids(arg, out.dtype) for arg in args[:3])
    return tape.each("add", a, tape.each("mul", weight, tape.each("sub", b, a)))


@_formula("where")
def _where(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if len(args) < 3:
        return None
    a, b = (tape.ids(arg, out.dtype) for arg in args[1:3])
    return tape.each("where", tape.ids(args[0], torch.bool), a, b)


@_formula("masked_fill")
def _masked_fill(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _where(tape, (args[1], args[2], args[0]), {}, out)


@_formula("clamp")
def _clamp(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids = tape.ids(args[0], out.dtype)
    low, high = _option(args, kwargs, 1, "min"), _option(args, kwargs, 2, "max")
    if low is not None:
        ids = tape.each("maximum", ids, tape.ids(low, out.dtype))
    return ids if high is None else tape.each("minimum", ids, tape.ids(high, out.dtype))


@_formula("clamp_min")
def _clamp_min(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _clamp(tape, (args[0], args[1], None), {}, out)


@_formula("clamp_max")
def _clamp_max(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _clamp(tape, (args[0], None, args[1]), {}, out)


@_formula("softplus")
def _softplus(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    x = tape.ids(args[0])
    beta = tape.ids(float(_option(args, kwargs, 1, "beta", 1)))
    bound = tape.ids(float(_option(args, kwargs, 2, "threshold", 20)))
    scaled = tape.each("mul", x, beta)
    soft = tape.each("div", tape.each("log1p", tape.each("exp", scaled)), beta)
    return tape.each("where", tape.each("gt", scaled, bound), x, soft)


@_formula("log_sigmoid_forward")
def _log_sigmoid(tape: Tape, args: Args, kwargs: Options, out: Any) -> list[Ids]:
    x = tape.ids(args[0])
    least = tape.each("minimum", x, np.array(tape.literal(0.0)))
    return [tape.each("sub", least, _log1p_exp_abs(tape, x))]


def _log1p_exp_abs(tape: Tape, x: Ids) -> Ids:
    return tape.each("log1p", tape.each("exp", tape.each("neg", tape.each("abs", x))))


@_formula("binary_cross_entropy_with_logits")
def _cross_entropy(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if any(_option(args, kwargs, 2 + k, name) is not None for k, name in enumerate(_WEIGHTS)):
        return None
    if _option(args, kwargs, 4, "reduction", 1) != 0:
        return None
    x, y = (tape.ids(arg, out.dtype) for arg in args[:2])
    linear = tape.each("sub", tape.each("relu", x), tape.each("mul", x, y))
    return tape.each("add", linear, _log1p_exp_abs(tape, x))


_WEIGHTS = ("weight", "pos_weight")


@_formula("silu")
def _silu(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    x = tape.ids(args[0])
    return tape.each("mul", x, tape.each("sigmoid", x))


@_formula("leaky_relu")
def _leaky_relu(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    x, slope = tape.ids(args[0]), tape.ids(float(_option(args, kwargs, 1, "negative_slope", 0.01)))
    positive = tape.each("gt", x, np.array(tape.literal(0.0)))
    return tape.each("where", positive, x, tape.each("mul", slope, x))


@_formula("gelu")
def _gelu(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if kwargs.get("approximate", "none") != "none":
        return None
    x = tape.ids(args[0])
    root, half, one = (np.array(tape.literal(v)) for v in (math.sqrt(0.5), 0.5, 1.0))
    share = tape.each("add", one, tape.each("erf", tape.each("mul", x, root)))
    return tape.each("mul", tape.each("mul", half, x), share)


# -- shapes -----------------------------------------------------------------------------------


@_formula("clone", "detach", "alias", "contiguous", "lift_fresh", "_to_copy", "to", "_conj")
def _same(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return tape.cast(tape.ids(args[0]), args[0].dtype, out.dtype)


@_formula("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "_reshape_alias")
def _reshape(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    # `view` with a type looks at the memory as other numbers.
    if out.dtype != args[0].dtype:
        return None
    return tape.ids(args[0]).reshape(out.shape)


@_formula("expand")
def _expand(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.broadcast_to(tape.ids(args[0]), out.shape)


@_formula("permute")
def _permute(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return tape.ids(args[0]).transpose(args[1])


@_formula("transpose")
def _transpose(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.swapaxes(tape.ids(args[0]), args[1], args[2])


@_formula("t")
def _t(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return tape.ids(args[0]).T


@_formula("select")
def _select(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.take(tape.ids(args[0]), args[2], args[1])


@_formula("slice")
def _slice(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids, axis = tape.ids(args[0]), _option(args, kwargs, 1, "dim", 0)
    ends = [_option(args, kwargs, 2 + k, name) for k, name in enumerate(("start", "end", "step"))]
    return np.moveaxis(np.moveaxis(ids, axis, 0)[slice(*ends)], 0, axis)


def _join(join: Any) -> Handler:
    def handler(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
        parts = [tape.ids(part, out.dtype) for part in args[0]]
        ids: Ids = join(parts, axis=_option(args, kwargs, 1, "dim", 0))
        return ids

    return handler


FORMULAS["cat"], FORMULAS["stack"] = _join(np.concatenate), _join(np.stack)


@_formula("split", "split_with_sizes", "unbind", "chunk")
def _split(tape: Tape, args: Args, kwargs: Options, out: Any) -> list[Ids]:
    ids = tape.ids(args[0])
    parted = out[0].ndim == ids.ndim
    axis = _option(args, kwargs, 2 if parted else 1, "dim", 0)
    if not parted:
        return list(np.moveaxis(ids, axis, 0))
    ends = np.cumsum([part.shape[axis] for part in out])[:-1]
    return np.split(ids, ends, axis)


@_formula("flip")
def _flip(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.flip(tape.ids(args[0]), args[1])


@_formula("roll")
def _roll(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    axes = _option(args, kwargs, 2, "dims") or None
    return np.roll(tape.ids(args[0]), args[1] if axes else args[1][0], axes)


@_formula("repeat")
def _repeat(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return np.tile(tape.ids(args[0]), args[1])


@_formula("diagonal")
def _diagonal(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    places = [
        _option(args, kwargs, 1 + k, name, (0, 0, 1)[k])
        for k, name in enumerate(("offset", "dim1", "dim2"))
    ]
    return np.diagonal(tape.ids(args[0]), *places)


def _triangle(keep: Any) -> Handler:
    def handler(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
        kept = keep(np.ones(out.shape, bool), _option(args, kwargs, 1, "diagonal", 0))
        return np.where(kept, tape.ids(args[0]), tape.literal(0.0))

    return handler


FORMULAS["tril"], FORMULAS["triu"] = _triangle(np.tril), _triangle(np.triu)


@_formula("index")
def _index(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    table, places = args[:2]
    moving = [k for k, place in enumerate(places) if tape.traced(place)]
    if not moving:
        own = [slice(None) if each is None else each.numpy() for each in places]
        return tape.ids(table)[tuple(own)]
    if [k for k, place in enumerate(places) if place is not None] != moving[:1]:
        return None
    return _look_up(tape, table, places[moving[0]], moving[0])


@_formula("index_select")
def _index_select(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if tape.traced(args[2]):
        return _look_up(tape, args[0], args[2], args[1])
    return np.take(tape.ids(args[0]), args[2].numpy(), args[1])


@_formula("embedding")
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


@_formula("gather")
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


# -- sums and products ------------------------------------------------------------------------


def _axes(args: Args, kwargs: Options, ids: Ids) -> tuple[tuple[int, ...], bool]:
    found = _option(args, kwargs, 1, "dim")
    axes = (found,) if isinstance(found, int) else tuple(found or range(ids.ndim))
    return axes, bool(_option(args, kwargs, 2, "keepdim", False))


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


@_formula("mean")
def _mean(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids = tape.ids(args[0])
    total = tape.reduce("add", ids, *_axes(args, kwargs, ids))
    return tape.each("mul", total, np.array(tape.literal(total.size / ids.size)))


@_formula("cumsum")
def _cumsum(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    rows = list(np.moveaxis(tape.ids(args[0], out.dtype), args[1], 0))
    for k in range(1, len(rows)):
        rows[k] = tape.each("add", rows[k - 1], rows[k])
    return np.moveaxis(np.stack(rows), 0, args[1])


def _log_sum_exp(tape: Tape, ids: Ids, axes: tuple[int, ...]) -> Ids:
    top = tape.reduce("maximum", ids, axes, True)
    total = tape.reduce("add", tape.each("exp", tape.each("sub", ids, top)), axes, True)
    return tape.each("add", top, tape.each("log", total))


@_formula("logsumexp")
def _logsumexp(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids = tape.ids(args[0])
    return _log_sum_exp(tape, ids, _axes(args, kwargs, ids)[0]).reshape(out.shape)


@_formula("logaddexp")
def _logaddexp(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    parts = np.broadcast_arrays(*(tape.ids(arg, out.dtype) for arg in args[:2]))
    return _log_sum_exp(tape, np.stack(parts), (0,))[0]


@_formula("_log_softmax")
def _log_softmax(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids = tape.ids(args[0])
    return tape.each("sub", ids, _log_sum_exp(tape, ids, (args[1],)))


@_formula("_softmax")
def _softmax(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return tape.each("exp", _log_softmax(tape, args, kwargs, out))


@_formula("linalg_vector_norm")
def _norm(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if _option(args, kwargs, 1, "ord", 2) != 2:
        return None
    ids = tape.ids(args[0])
    axes = tuple(_option(args, kwargs, 2, "dim") or range(ids.ndim))
    total = tape.reduce("add", tape.each("mul", ids, ids), axes)
    return tape.each("sqrt", total).reshape(out.shape)


def _product(tape: Tape, a: Ids, b: Ids) -> Ids:
    """Matrix products, (..., i, j) by (..., j, k)."""
    terms = tape.each("mul", a[..., :, :, None], b[..., None, :, :])
    return tape.reduce("add", terms, (terms.ndim - 2,))


@_formula("mm", "bmm", "mv", "dot")
def _matmul(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    a, b = (tape.ids(arg) for arg in args[:2])
    a = a if a.ndim > 1 else a[None]
    b = b if b.ndim > 1 else b[:, None]
    return _product(tape, a, b).reshape(out.shape)


@_formula("addmm", "baddbmm", "addmv")
def _addmm(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    product = _matmul(tape, args[1:3], {}, out)
    start = tape.ids(args[0])
    for name, which in (("alpha", 0), ("beta", 1)):
        factor = kwargs.get(name, 1)
        if factor != 1:
            scaled = tape.each("mul", tape.ids(float(factor)), (product, start)[which])
            product, start = (scaled, start) if which == 0 else (product, scaled)
    return tape.each("add", start, product)


@_formula("linear")
def _linear(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    x, weight = tape.ids(args[0]), tape.ids(args[1])
    product = _product(tape, x.reshape(-1, x.shape[-1]), weight.T).reshape(out.shape)
    bias = _option(args, kwargs, 2, "bias")
    return product if bias is None else tape.each("add", product, tape.ids(bias))


@_formula("linalg_solve_triangular")
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
