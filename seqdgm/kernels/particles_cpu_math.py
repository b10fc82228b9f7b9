"""Exponential, logarithm and normal draws without a branch, so that loops over them are vectors.

The polynomials interpolate at Chebyshev points; their relative error is below 2e-17 where that of
a double is 1e-16. LLVM turns a loop over an array that calls these functions into vector
instructions of the machine, which calls of a library of mathematics would prevent.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from seqdgm.kernels.cpu_steps import INNER
from seqdgm.kernels.philox import MASK, MULTIPLIERS, ROUNDS, RUN, WEYL

# A product and a sum may be fused; nothing else changes, so NaN and infinity keep their meaning.
inline: Any = numba.njit(forceinline=True, fastmath={"contract"}, **INNER)
called: Any = numba.njit(fastmath={"contract"}, **INNER)

_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# Adding it moves the integer next to a number below 2^51 into the low bits of the mantissa.
_SHIFT = 1.5 * 2.0**52
_LEAST = -708.39  # where exp leaves the normal numbers; below it is 0 here
_LARGEST = 709.0
_MANTISSA = np.uint64(0x000FFFFFFFFFFFFF)
_ONE = np.uint64(0x3FF0000000000000)
_ROOT_HALF = np.uint64(0x3FE6A09E667F3BCD)
_BIAS = np.uint64(1023)
_BITS_52 = np.uint64(52)

_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
_LOW = np.uint64(MASK)
_32, _20, _12, _3 = np.uint64(32), np.uint64(20), np.uint64(12), np.uint64(3)
_63, _SIZE = np.int64(63), np.int64(0x7FFFFFFFFFFFFFFF)
_LOWEST = np.int64(-0x8000000000000000)
_HALF_STEP = 1.0 - 2.0**-53
_WORD = ir.IntType(32)
COPIES = 8
_ROUNDS = ROUNDS
_RUN = RUN


def _wide(_context: Any) -> Any:
    """Let the loops of a function use the widest vectors of the machine.

    LLVM avoids those of 512 bits unless it is told otherwise, for fear of a lower clock frequency;
    it does not pay in loops that do nothing but arithmetic.
    """

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        # llvmlite's own method refuses attributes that it does not know.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


wide: Any = intrinsic(_wide)


def _fill(_context: Any, out: Any, begin: Any, value: Any) -> Any:
    """Write a whole number to `COPIES` places of an array, in one instruction where there is one.

    The compiled loop that says the same is unrolled before it could become a vector.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, place, number = signature.args
        data = context.make_array(array)(context, builder, args[0]).data
        vector = ir.VectorType(context.get_data_type(array.dtype), COPIES)
        nothing = ir.Constant(vector, ir.Undefined)
        zero, zeros = ir.Constant(_WORD, 0), ir.Constant(ir.VectorType(_WORD, COPIES), None)
        one = context.cast(builder, args[2], number, array.dtype)
        many = builder.shuffle_vector(builder.insert_element(nothing, one, zero), nothing, zeros)
        at = builder.gep(data, [context.cast(builder, args[1], place, types.intp)])
        size = array.dtype.bitwidth // 8
        builder.store(many, builder.bitcast(at, vector.as_pointer()), align=size)
        return context.get_dummy_value()

    return types.void(out, begin, value), generate


fill: Any = intrinsic(_fill)


@inline
def exp(x: float) -> float:
    """e^x; 0 where it would not be a normal number."""
    t = x * _LOG2_E + _SHIFT
    k = t - _SHIFT
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    r2 = r * r
    r4 = r2 * r2
    low = (0.5 + 1.6666666666666669e-01 * r) + r2 * (
        4.1666666666623824e-02 + 8.333333333330039e-03 * r
    )
    middle = (1.3888888917367081e-03 + 1.9841269863171557e-04 * r) + r2 * (
        2.4801521057868204e-05 + 2.7557268276905696e-06 * r
    )
    high = 2.7620201591031547e-07 + 2.5100472505694996e-08 * r
    p = (low + r4 * (middle + r4 * high)) * r2 + r + 1.0
    power = (np.float64(t).view(np.uint64) + _BIAS) << _BITS_52
    y = p * np.uint64(power).view(np.float64)
    normal = 0.0 if x < _LEAST else float(y)
    return math.inf if x > _LARGEST else normal


@inline
def log(x: float) -> float:
    """Natural logarithm of a normal, finite x > 0."""
    bits = np.float64(x).view(np.uint64) - _ROOT_HALF
    k = np.float64(np.int64(bits) >> np.int64(52))
    mantissa = (bits & _MANTISSA) + _ROOT_HALF
    m = np.uint64(mantissa).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    v = s * s
    v2 = v * v
    low = (0.666666666666667 + 0.3999999999989889 * v) + v2 * (
        0.28571428626253836 + 0.22222211089379496 * v
    )
    high = (0.1818289243253687 + 0.15331611722055008 * v) + v2 * 0.14617807153417325
    p = low + v2 * v2 * high
    return k * _LN2_HIGH + (2.0 * s + (s * v * p + k * _LN2_LOW))


@inline
def _number(high: np.uint64, low: np.uint64) -> float:
    """The number in (0, 1) that two words make."""
    bits = ((high << _20) | (low >> _12)) | _ONE
    return np.uint64(bits).view(np.float64) - _HALF_STEP


@inline
def _pair(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[float, float]:
    """The two numbers in (0, 1) of a counter."""
    for _ in range(_ROUNDS):
        low, high = c0 * _M0, c2 * _M1
        c0 = (high >> _32) ^ c1 ^ k0
        c2 = (low >> _32) ^ c3 ^ k1
        c1, c3 = high & _LOW, low & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return _number(c0, c1), _number(c2, c3)


@inline
def uniform(key: Any, series: int, step: int, purpose: int) -> float:
    """The first number of the counter (series, 0, step, purpose)."""
    u, _ = _pair(
        np.uint64(series), np.uint64(0), np.uint64(step), np.uint64(purpose), key[0], key[1]
    )
    return u


@inline
def _turn(v: float) -> tuple[float, float]:
    """Cosine and sine of 2 pi v, 0 <= v < 1."""
    t = 4.0 * v + _SHIFT
    r = 4.0 * v - (t - _SHIFT)
    quadrant = np.float64(t).view(np.uint64) & _3
    a = r * r
    a2 = a * a
    a4 = a2 * a2
    s = (1.5707963267948966 - 6.459640975062443e-01 * a) + a2 * (
        7.969262624604276e-02 - 4.681754132336218e-03 * a
    )
    s += a4 * ((1.6044115070141775e-04 - 3.59864319355575e-06 * a) + a2 * 5.633910598053464e-08)
    s *= r
    c = (1.0 - 1.2337005501361697 * a) + a2 * (2.536695079010467e-01 - 2.0863480763311126e-02 * a)
    c += a4 * (
        (9.19260274182107e-04 - 2.520203676375042e-05 * a)
        + a2 * (4.710609515348118e-07 - 6.321230856185146e-09 * a)
    )
    odd = (quadrant & np.uint64(1)) != np.uint64(0)
    x, y = (s, c) if odd else (c, s)
    x = -x if ((quadrant + np.uint64(1)) & np.uint64(2)) != np.uint64(0) else x
    y = -y if (quadrant & np.uint64(2)) != np.uint64(0) else y
    return x, y


@called
def top(x: np.ndarray) -> float:
    """The largest element; NaN or what is not NaN where there are any."""
    wide()
    best = _LOWEST
    for i in range(len(x)):
        bits = np.float64(x[i]).view(np.int64)
        # Integers in the order of the numbers, with which the loop may go in any order.
        best = max(best, bits ^ ((bits >> _63) & _SIZE))
    best ^= (best >> _63) & _SIZE
    return np.int64(best).view(np.float64)


@called
def normals(
    key: Any, series: int, step: int, purpose: int, first: int, count: int, out: np.ndarray
) -> None:
    """Draws of the particles `first` (a multiple of 128) and later, (groups, 2, 64)."""
    wide()
    c0, c2, c3 = np.uint64(series), np.uint64(step), np.uint64(purpose)
    k0, k1 = key[0], key[1]
    # A loop for each part: the longer its body, the fewer of its rounds overlap in the machine.
    groups = (count + 2 * _RUN - 1) // (2 * _RUN)
    for group in range(groups):
        c1 = np.uint64((first + 2 * _RUN * group) // 2)
        for i in range(min(_RUN, count - 2 * _RUN * group)):
            a, b = _pair(c0, c1 + np.uint64(i), c2, c3, k0, k1)
            out[group, 0, i] = a
            out[group, 1, i] = b
    for group in range(groups):
        for i in range(min(_RUN, count - 2 * _RUN * group)):
            out[group, 0, i] = math.sqrt(-2.0 * log(out[group, 0, i]))
    for group in range(groups):
        for i in range(min(_RUN, count - 2 * _RUN * group)):
            x, y = _turn(out[group, 1, i])
            radius = out[group, 0, i]
            out[group, 0, i] = radius * x
            out[group, 1, i] = radius * y


@called
def uniforms(
    key: Any, series: int, step: int, purpose: int, first: int, count: int, out: np.ndarray
) -> None:
    """Numbers in (0, 1) in place of normal draws; see `normals`."""
    wide()
    c0, c2, c3 = np.uint64(series), np.uint64(step), np.uint64(purpose)
    k0, k1 = key[0], key[1]
    for group in range((count + 2 * _RUN - 1) // (2 * _RUN)):
        c1 = np.uint64((first + 2 * _RUN * group) // 2)
        for i in range(min(_RUN, count - 2 * _RUN * group)):
            a, b = _pair(c0, c1 + np.uint64(i), c2, c3, k0, k1)
            out[group, 0, i] = a
            out[group, 1, i] = b
