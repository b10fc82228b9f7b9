"""Vectors of lanes for compiled loops: `WIDTH` numbers that go through a kernel together.

`emitted` turns a Python function into a part of a compiled loop: it is run once, when the loop is
compiled, on `Lanes` and `Memory` that stand for vectors of float64 and where they lie, and what it
does to them becomes instructions, in the order in which it does it. Its loops are thereby unrolled,
and its lists of lanes are registers. They are vector types of LLVM, so the machine's vector
instructions are used whatever the optimiser makes of the loops around them; a comparison gives
`Flags`, whose `choose` stands for a branch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

WIDTH = 8  # a register of AVX-512, two of AVX2
_BYTES = 8 * WIDTH

_DOUBLES = ir.VectorType(ir.DoubleType(), WIDTH)
_INTEGERS = ir.VectorType(ir.IntType(64), WIDTH)
# A product and a sum may be fused; nothing else changes, so NaN and infinity keep their meaning.
_CONTRACT = ("contract",)
_MANTISSA = 0x000FFFFFFFFFFFFF
_ONE = 0x3FF0000000000000
# The bits of 2^52; an integer below it, put into their low end, makes them those of 2^52 + itself.
_TWO_52 = 0x4330000000000000
_BIAS = 1023.0

# numba has no vectors, and loops only pass on where they lie.
pointer = types.CPointer(types.float64)


def aligned(size: int) -> np.ndarray:
    """Memory for `size` lanes, (size * WIDTH,), where a vector may be loaded in one piece."""
    raw = np.empty((size + 1) * WIDTH)
    skip = -raw.ctypes.data % _BYTES // raw.itemsize
    return raw[skip : skip + size * WIDTH]


@dataclass(frozen=True, eq=False)
class Flags:
    """A truth value for each lane."""

    builder: Any
    value: Any

    def __and__(self, other: Flags) -> Flags:
        return Flags(self.builder, self.builder.and_(self.value, other.value))

    def __or__(self, other: Flags) -> Flags:
        return Flags(self.builder, self.builder.or_(self.value, other.value))

    def __invert__(self) -> Flags:
        return Flags(self.builder, self.builder.not_(self.value))

    def choose(self, a: Lanes | float, b: Lanes | float) -> Lanes:
        """Lanes of a where the flag is set, of b elsewhere."""
        sides = (_value(a), _value(b))
        return Lanes(self.builder, self.builder.select(self.value, *sides))

    def some(self) -> Any:
        """Whether any flag is set, as a number of one bit."""
        bits = ir.IntType(WIDTH)
        word = self.builder.bitcast(self.value, bits)
        return self.builder.icmp_unsigned("!=", word, ir.Constant(bits, 0))

    @contextmanager
    def where_any(self) -> Iterator[None]:
        """Skip the body if no flag is set; it may change memory, but not make lanes for later."""
        with self.builder.if_then(self.some(), likely=False):
            yield


@dataclass(frozen=True, eq=False)
class Lanes:
    """A float64 for each lane."""

    builder: Any
    value: Any

    def __add__(self, other: Lanes | float) -> Lanes:
        return self._make(self.builder.fadd(self.value, _value(other), flags=_CONTRACT))

    def __sub__(self, other: Lanes | float) -> Lanes:
        return self._make(self.builder.fsub(self.value, _value(other), flags=_CONTRACT))

    def __mul__(self, other: Lanes | float) -> Lanes:
        return self._make(self.builder.fmul(self.value, _value(other), flags=_CONTRACT))

    __rmul__ = __mul__

    def __truediv__(self, other: Lanes | float) -> Lanes:
        return self._make(self.builder.fdiv(self.value, _value(other)))

    def __rtruediv__(self, other: float) -> Lanes:
        return self._make(self.builder.fdiv(_value(other), self.value))

    def __gt__(self, other: Lanes | float) -> Flags:
        return self._compare(">", other)

    def __lt__(self, other: Lanes | float) -> Flags:
        return self._compare("<", other)

    def __le__(self, other: Lanes | float) -> Flags:
        return self._compare("<=", other)

    def equals(self, other: Lanes | float) -> Flags:
        """Where two numbers are the same."""
        return self._compare("==", other)

    def like(self, value: float) -> Lanes:
        """A number in every lane."""
        return self._make(_constant(value, _DOUBLES))

    def root(self) -> Lanes:
        """Square root."""
        return self._call("sqrt")

    def size(self) -> Lanes:
        """Absolute value."""
        return self._call("fabs")

    def exponent(self) -> Lanes:
        """The integer e with x = m 2^e and 1 <= m < 2, for a normal x > 0."""
        builder = self.builder
        bits = builder.lshr(builder.bitcast(self.value, _INTEGERS), _constant(52, _INTEGERS))
        number = builder.bitcast(builder.or_(bits, _constant(_TWO_52, _INTEGERS)), _DOUBLES)
        return self._make(builder.fsub(number, _constant(2.0**52 + _BIAS, _DOUBLES)))

    def mantissa(self) -> Lanes:
        """The m of `exponent`."""
        builder = self.builder
        bits = builder.bitcast(self.value, _INTEGERS)
        bits = builder.and_(bits, _constant(_MANTISSA, _INTEGERS))
        return self._make(builder.bitcast(builder.or_(bits, _constant(_ONE, _INTEGERS)), _DOUBLES))

    def _make(self, value: Any) -> Lanes:
        return Lanes(self.builder, value)

    def _compare(self, sign: str, other: Lanes | float) -> Flags:
        return Flags(self.builder, self.builder.fcmp_ordered(sign, self.value, _value(other)))

    def _call(self, name: str) -> Lanes:
        kind = ir.FunctionType(_DOUBLES, [_DOUBLES])
        name = f"llvm.{name}.v{WIDTH}f64"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self._make(self.builder.call(function, [self.value]))


class Memory:
    """Lanes one after another."""

    def __init__(self, builder: Any, start: Any) -> None:
        self.builder = builder
        self.start = start

    def __getitem__(self, k: int) -> Lanes:
        return Lanes(self.builder, self.builder.load(self._at(k)))

    def __setitem__(self, k: int, lanes: Lanes | float) -> None:
        self.builder.store(_value(lanes), self._at(k))

    def part(self, k: int) -> Memory:
        """The lanes from number k on."""
        return Memory(self.builder, self._at(k))

    def get(self, size: int) -> list[Lanes]:
        """The first lanes."""
        return [self[k] for k in range(size)]

    def set(self, lanes: list[Lanes]) -> None:
        """Overwrite the first lanes."""
        for k, value in enumerate(lanes):
            self[k] = value

    def _at(self, k: int) -> Any:
        return self.builder.gep(self.start, [ir.Constant(ir.IntType(64), k)])


def _constant(value: float, kind: Any) -> Any:
    return ir.Constant(kind, [value] * WIDTH)


def _value(lanes: Lanes | float) -> Any:
    return lanes.value if isinstance(lanes, Lanes) else _constant(float(lanes), _DOUBLES)


def emitted(write: Callable[..., Any]) -> Any:
    """Make a function that emits instructions one that compiled loops can call.

    Integer arguments must be constants of the loop and arrive as integers, pointers as `Memory`.
    It returns nothing, or the one bit of `Flags.some`.
    """
    result = types.boolean if write.__annotations__["return"] == "bool" else types.void

    def typed(_context: Any, *kinds: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            given = [
                Memory(builder, builder.bitcast(value, _DOUBLES.as_pointer()))
                if kind == pointer
                else kind.literal_value
                for kind, value in zip(kinds, args, strict=True)
            ]
            bit = write(*given)
            return context.get_dummy_value() if bit is None else bit

        return result(*kinds), generate

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [context, *inspect.signature(write).parameters.values()]
    typed.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    typed.__name__ = write.__name__
    return intrinsic(prefer_literal=True)(typed)


def _local(context: Any, size: Any) -> Any:
    """Memory for a constant number of lanes, which lives as long as the loop that asks for it."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(_DOUBLES, size.literal_value))
        return builder.bitcast(memory, context.get_value_type(pointer))

    return pointer(size), generate


def _at(context: Any, array: Any, start: Any) -> Any:
    """The lanes number `start` and later in the memory of an `aligned` array."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        data = builder.bitcast(data, _DOUBLES.as_pointer())
        return builder.bitcast(builder.gep(data, [args[1]]), context.get_value_type(pointer))

    return pointer(array, types.int64), generate


local: Any = intrinsic(prefer_literal=True)(_local)
at: Any = intrinsic(_at)
