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


# -- element by element -----------------------------------------------------------------------


def _elementwise(op: str, arguments: int) -> Handler:
    def handler(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
        return tape.each(op, *(tape.ids(arg, out.dtype) for arg in args[:arguments]))

    return handler


def _comparison(op: str) -> Handler:
    def handler(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
        kind = torch.result_type(args[0], args[1])
        return tape.each(op, *(tape.ids(arg, kind) for arg in args))

    return handler


_UNARY = (
    "neg abs exp log log1p expm1 log2 log10 exp2 sqrt rsqrt reciprocal sin cos tan asin acos atan "
    "sinh cosh tanh asinh acosh atanh sigmoid relu lgamma erf erfc floor ceil round trunc sign silu"
)
_BINARY = "mul maximum minimum fmod remainder atan2 hypot xlogy logaddexp"
for _name in _UNARY.split():
    FORMULAS[_name] = _elementwise(_name, 1)
for _name in _BINARY.split():
    FORMULAS[_name] = _elementwise(_name, 2)
for _name in ("gt", "ge", "lt", "le", "eq", "ne"):
    FORMULAS[_name] = _comparison(_name)
for _name in ("and", "or", "xor"):
    FORMULAS[f"logical_{_name}"] = _elementwise(_name, 2)
    FORMULAS[f"bitwise_{_name}"] = _elementwise(_name, 2)
FORMULAS["logical_not"] = FORMULAS["bitwise_not"] = _elementwise("not", 1)


@_formula("isnan", "isinf", "isfinite")
def _is(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids | None:
    return None


@_formula("add", "sub", "rsub")
def _add(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
    raise NotImplementedError


def _sum(op: str, swap: bool = False) -> Handler:
    def handler(tape: Tape, args: Args, kwargs: Options, out: Tensor) -> Ids:
        a, b = (tape.ids(arg, out.dtype) for arg in args[:2])
        factor = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        if swap:
            a, b = b, a
            return tape.each(op, a, b if factor == 1 else _scaled(tape, b, factor, out))
        return tape.each(op, a, b if factor == 1 else _scaled(tape, b, factor, out))

    return handler


def _scaled(tape: Tape, ids: Ids, factor: Any, out: Tensor) -> Ids:
    return ids if factor == 1 else tape.each("mul", ids, tape.ids(factor, out.dtype))


FORMULAS["add"], FORMULAS["sub"] = _sum("add"), _sum("sub")
FORMULAS.pop("rsub")
for _name in ("isnan", "isinf", "isfinite"):
    FORMULAS[_name] = _elementwise(_name, 1)
