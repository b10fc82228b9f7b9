"""Formulas of torch's operations on arrays of scalar nodes: those that go element by element."""

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


def formula(*names: str) -> Any:
    """Register the formula of operations, by their names without namespace and overload."""

    def add(handler: Handler) -> Handler:
        FORMULAS.update(dict.fromkeys(names, handler))
        return handler

    return add


def option(args: Args, kwargs: Options, place: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by its place or by its name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


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


@formula("add")
def _add(tape: Tape, args: Args, kwargs: Options, out: Tensor, op: str = "add") -> Ids:
    a, b = (tape.ids(arg, out.dtype) for arg in args[:2])
    factor = option(args, kwargs, 2, "alpha", 1)
    if factor != 1:
        b = tape.each("mul", b, tape.ids(factor, out.dtype))
    return tape.each(op, a, b)


def _sub(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _add(tape, args, kwargs, out, "sub")


def _rsub(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _sub(tape, (args[1], args[0], *args[2:]), kwargs, out)


FORMULAS["sub"], FORMULAS["rsub"] = _sub, _rsub


@formula("div", "true_divide")
def _div(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    mode = kwargs.get("rounding_mode")
    ids = tape.each("div", *(tape.ids(arg, torch.float64) for arg in args[:2]))
    if mode is not None:
        ids = tape.each({"floor": "floor", "trunc": "trunc"}[mode], ids)
    return tape.cast(ids, torch.float64, out.dtype)


@formula("floor_divide")
def _floor_divide(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _div(tape, args, {"rounding_mode": "floor"}, out)


@formula("pow")
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


@formula("square")
def _square(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _pow(tape, (args[0], 2), {}, out)


@formula("rsqrt")
def _rsqrt(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _pow(tape, (args[0], -0.5), {}, out)


@formula("addcmul")
def _addcmul(tape: Tape, args: Args, kwargs: Options, out: Tensor, op: str = "mul") -> Ids:
    a, b, c = (tape.ids(arg, out.dtype) for arg in args[:3])
    part, factor = tape.each(op, b, c), kwargs.get("value", 1)
    if factor != 1:
        part = tape.each("mul", tape.ids(float(factor)), part)
    return tape.each("add", a, part)


def _addcdiv(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _addcmul(tape, args, kwargs, out, "div")


FORMULAS["addcdiv"] = _addcdiv


@formula("lerp")
def _lerp(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    a, b, weight = (tape.ids(arg, out.dtype) for arg in args[:3])
    return tape.each("add", a, tape.each("mul", weight, tape.each("sub", b, a)))


@formula("where")
def _where(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if len(args) < 3:
        return None
    a, b = (tape.ids(arg, out.dtype) for arg in args[1:3])
    return tape.each("where", tape.ids(args[0], torch.bool), a, b)


@formula("masked_fill")
def _masked_fill(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _where(tape, (args[1], args[2], args[0]), {}, out)


@formula("clamp")
def _clamp(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    ids = tape.ids(args[0], out.dtype)
    low, high = option(args, kwargs, 1, "min"), option(args, kwargs, 2, "max")
    if low is not None:
        ids = tape.each("maximum", ids, tape.ids(low, out.dtype))
    return ids if high is None else tape.each("minimum", ids, tape.ids(high, out.dtype))


@formula("clamp_min")
def _clamp_min(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _clamp(tape, (args[0], args[1], None), {}, out)


@formula("clamp_max")
def _clamp_max(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    return _clamp(tape, (args[0], None, args[1]), {}, out)


@formula("softplus")
def _softplus(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    x = tape.ids(args[0])
    beta = tape.ids(float(option(args, kwargs, 1, "beta", 1)))
    bound = tape.ids(float(option(args, kwargs, 2, "threshold", 20)))
    scaled = tape.each("mul", x, beta)
    soft = tape.each("div", tape.each("log1p", tape.each("exp", scaled)), beta)
    return tape.each("where", tape.each("gt", scaled, bound), x, soft)


@formula("log_sigmoid_forward")
def _log_sigmoid(tape: Tape, args: Args, kwargs: Options, out: Any) -> list[Ids]:
    x = tape.ids(args[0])
    least = tape.each("minimum", x, np.array(tape.literal(0.0)))
    return [tape.each("sub", least, _log1p_exp_abs(tape, x))]


def _log1p_exp_abs(tape: Tape, x: Ids) -> Ids:
    return tape.each("log1p", tape.each("exp", tape.each("neg", tape.each("abs", x))))


@formula("binary_cross_entropy_with_logits")
def _cross_entropy(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if any(option(args, kwargs, 2 + k, name) is not None for k, name in enumerate(_WEIGHTS)):
        return None
    if option(args, kwargs, 4, "reduction", 1) != 0:
        return None
    x, y = (tape.ids(arg, out.dtype) for arg in args[:2])
    linear = tape.each("sub", tape.each("relu", x), tape.each("mul", x, y))
    return tape.each("add", linear, _log1p_exp_abs(tape, x))


_WEIGHTS = ("weight", "pos_weight")


@formula("silu")
def _silu(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    x = tape.ids(args[0])
    return tape.each("mul", x, tape.each("sigmoid", x))


@formula("leaky_relu")
def _leaky_relu(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    x, slope = tape.ids(args[0]), tape.ids(float(option(args, kwargs, 1, "negative_slope", 0.01)))
    positive = tape.each("gt", x, np.array(tape.literal(0.0)))
    return tape.each("where", positive, x, tape.each("mul", slope, x))


@formula("gelu")
def _gelu(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Any:
    if kwargs.get("approximate", "none") != "none":
        return None
    x = tape.ids(args[0])
    root, half, one = (np.array(tape.literal(v)) for v in (math.sqrt(0.5), 0.5, 1.0))
    share = tape.each("add", one, tape.each("erf", tape.each("mul", x, root)))
    return tape.each("mul", tape.each("mul", half, x), share)
