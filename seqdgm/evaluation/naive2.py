"""Naive2, the benchmark of the M competitions: the last value, seasonally adjusted on evidence."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

Array = np.ndarray

_Z = 1.645  # two-sided 90 %, with the digits of the competition's code


def naive2(
    train: Float[Array, "series time"],
    season: int,
    horizon: int,
    lengths: Int[Array, "series"] | None = None,
) -> Float[Array, "series horizon"]:
    """Forecast every step by the last value, seasonally adjusted by a classical decomposition.

    A series is adjusted if `is_seasonal` finds a season in it: its values are divided by the
    indices of `seasonal_indices`, the last one is repeated, and the forecasts are multiplied by
    the indices of their own places. Any other series repeats its last value.

    Parameters
    ----------
    train : ndarray of shape (series, time)
        Training parts, NaN after the end of a shorter series. Missing values before it are left
        out of every mean.
    season : int
        Season length in steps, 1 for none.
    horizon : int
        Steps to forecast.
    lengths : ndarray of shape (series,), optional
        Steps after which the forecasts begin; default each series' last known value.

    Raises
    ------
    ValueError
        For a series without a value, and for a seasonal one with values that are not positive, on
        which multiplicative indices mean nothing.

    Examples
    --------
    >>> import numpy as np
    >>> y = np.tile([1.0, 2.0, 3.0, 6.0], 5)[None]
    >>> naive2(y, 4, 5).round(6)
    array([[1., 2., 3., 6., 1.]])

    References
    ----------
    Makridakis, Spiliotis and Assimakopoulos (2020), "The M4 Competition", International Journal of
    Forecasting 36(1), section 2.4 and its published code.
    """
    train = np.atleast_2d(np.asarray(train, dtype=float))
    out = np.empty((len(train), horizon))
    for n, row in enumerate(train):
        known = np.flatnonzero(~np.isnan(row))
        if not len(known):
            raise ValueError(f"series {n} has no known value to forecast from; leave it out")
        x = row[: known[-1] + 1]
        if not is_seasonal(x, season):
            out[n] = x[-1]
            continue
        if np.nanmin(x) <= 0:
            raise ValueError(
                f"series {n} is seasonal and not positive at step {np.nanargmin(x) + 1}: "
                "multiplicative indices need positive values; use another benchmark"
            )
        index = seasonal_indices(x, season)
        end = len(x) if lengths is None else int(lengths[n])
        out[n] = (
            x[-1] / index[(len(x) - 1) % season] * index[np.arange(end, end + horizon) % season]
        )
    return out


def is_seasonal(x: Float[Array, "time"], season: int) -> bool:
    r"""Test at 90 % whether a series correlates with itself a season ago.

    .. math:: |r_m| > 1.645 \sqrt{\frac{1 + 2 \sum_{k < m} r_k^2}{n}}

    with the autocorrelations :math:`r_k` and n known values. False for fewer than three seasons.

    Examples
    --------
    >>> import numpy as np
    >>> is_seasonal(np.tile([1.0, 2.0, 3.0, 6.0], 5), 4)
    True
    """
    x = np.asarray(x, dtype=float)
    known = ~np.isnan(x)
    if season < 2 or len(x) < 3 * season:
        return False
    centred = np.where(known, x - x[known].mean(), 0.0)
    power = centred @ centred
    if power == 0:
        return False
    r = np.array([centred[k:] @ centred[:-k] for k in range(1, season + 1)]) / power
    limit = _Z * np.sqrt((1 + 2 * (r[:-1] ** 2).sum()) / known.sum())
    return bool(abs(r[-1]) > limit)


def seasonal_indices(x: Float[Array, "time"], season: int) -> Float[Array, "season"]:
    """Multiplicative seasonal indices of the places of a season, of mean 1.

    Each value is divided by the centred moving average over a season (the two ends of an even one
    at half weight), the quotients are averaged by place, and the averages are scaled to mean 1.

    Examples
    --------
    >>> import numpy as np
    >>> seasonal_indices(np.tile([1.0, 2.0, 3.0, 6.0], 5), 4).round(6).tolist()
    [0.333333, 0.666667, 1.0, 2.0]

    References
    ----------
    Kendall and Stuart (1983), *The Advanced Theory of Statistics*, volume 3, pages 410-414.
    """
    x = np.asarray(x, dtype=float)
    even = season % 2 == 0
    weights = np.full(season + even, 1.0 / season)
    if even:
        weights[[0, -1]] /= 2
    half = len(weights) // 2
    quotient = np.full(len(x), np.nan)
    quotient[half : len(x) - half] = x[half : len(x) - half] / np.convolve(x, weights, "valid")
    index = np.array([np.nanmean(quotient[place::season]) for place in range(season)])
    return index / index.mean()
