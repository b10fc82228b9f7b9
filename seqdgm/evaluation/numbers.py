"""How many digits of a number are worth printing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
NO_BREAK = "\N{NO-BREAK SPACE}"
_HUGE = 1e7


def digits(values: Sequence[float], errors: Sequence[float] | None = None) -> int:
    """Decimals at which a column of numbers is printed.

    Two significant digits of the median standard error where there are any, else three of the
    median size; between 0 and 6.

    Examples
    --------
    >>> digits([12.3456, 13.1], [0.21, 0.34]), digits([0.012345]), digits([123456.0])
    (2, 4, 0)
    """
    for numbers, significant in ((errors, 2), (values, 3)):
        size = np.abs(np.asarray([] if numbers is None else numbers, dtype=float))
        size = size[np.isfinite(size) & (size > 0)]
        if len(size):
            return min(max(significant - 1 - math.floor(math.log10(np.median(size))), 0), 6)
    return 0


def text(value: float, decimals: int) -> str:
    """Print a number with so many decimals, an en dash where there is none.

    Examples
    --------
    >>> text(-1.25, 1), text(float("nan"), 1), text(12345678.9, 2)
    ('−1.2', '–', '1.23e+07')
    """
    if math.isnan(value):
        return NOTHING
    shown = f"{value:.2e}" if abs(value) >= _HUGE else f"{value:.{decimals}f}"
    return shown.replace("-", MINUS, 1) if shown.startswith("-") else shown


def p_text(value: float) -> str:
    r"""Print a p-value.

    Examples
    --------
    >>> p_text(0.0312), p_text(1e-5)
    ('0.031', '<\xa00.001')
    """
    return f"<{NO_BREAK}0.001" if value < 0.001 else text(value, 3)
