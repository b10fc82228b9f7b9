"""Functions that generated loops call, where numba has none or a slow one."""

from __future__ import annotations

import math

import numpy as np

from seqdgm.kernels import particles_cpu_math
from seqdgm.kernels.particles_cpu_math import exp, inline

_SMALLEST = 2.2250738585072014e-308  # below it numbers are not normal
_UP, _LOG_UP = 2.0**54, 54.0 * math.log(2.0)
_log = particles_cpu_math.log


@inline
def log(x: float) -> float:
    """Natural logarithm; minus infinity at 0, NaN below."""
    small = x < _SMALLEST
    y = _log(x * _UP if small else x) - (_LOG_UP if small else 0.0)
    # The comparison is false for infinity and NaN, which are their own logarithms here.
    y = y if x < math.inf else x
    below = -math.inf if x == 0.0 else math.nan
    return y if not x <= 0.0 else below


@inline
def maximum(a: float, b: float) -> float:
    """The larger number; NaN if there is one."""
    return a if a >= b or a != a else b


@inline
def minimum(a: float, b: float) -> float:
    """The smaller number; NaN if there is one."""
    return a if a <= b or a != a else b


@inline
def relu(x: float) -> float:
    """The positive part."""
    return 0.0 if x <= 0.0 else x


@inline
def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exp(-x))


@inline
def xlogy(x: float, y: float) -> float:
    """X log y, 0 where x is."""
    found = x * log(y)
    return 0.0 if x == 0.0 and y == y else found


@inline
def look_up(p: np.ndarray, first: int, width: int, size: int, place: int) -> float:
    """An element of a table; NaN, which no weight may be, where there is none."""
    k = place + size if place < 0 else place
    return float(p[first + width * k]) if 0 <= k < size else math.nan
