"""How often a series must be differenced: KPSS tests and the strength of its season."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

# Kwiatkowski et al. (1992), table 1, level stationarity, 5 %.
KPSS_CRITICAL = 0.463
# Above this strength the season is taken for one that wanders (Hyndman's nsdiffs).
STRONG_SEASON = 0.64

_STL_SEASONAL = 11  # observations of one season in a loess window, as in Hyndman's mstl
FLAT = 1e-12  # what rounding can leave of a constant series, relative to its largest value
_FEWEST = 5  # observations that a further difference must leave


def difference(
    x: Float[np.ndarray, "time ..."], d: int, D: int = 0, s: int = 1
) -> Float[np.ndarray, "rest ..."]:
    r"""Differences :math:`(1 - L)^d (1 - L^s)^D x_t` along the first axis.

    Examples
    --------
    >>> import numpy as np
    >>> difference(np.array([1.0, 4.0, 9.0, 16.0]), 2).tolist()
    [2.0, 2.0]
    """
    for lag in [s] * D + [1] * d:
        x = x[lag:] - x[:-lag]
    return x


def is_flat(x: Float[np.ndarray, "time"], scale: float) -> bool:
    """Whether the observed values are equal up to rounding in data of size `scale`."""
    seen = x[np.isfinite(x)]
    return len(seen) < 2 or float(seen.std()) <= FLAT * scale


def kpss(x: Float[np.ndarray, "time"], lags: int | None = None) -> float:
    r"""Statistic of the KPSS test that a series is stationary around a level.

    .. math::

        \hat\eta = \frac{1}{T^2 \hat s^2} \sum_{t=1}^T S_t^2, \quad S_t = \sum_{i \le t} e_i, \quad
        \hat s^2 = \frac1T \sum_t e_t^2
            + \frac2T \sum_{j=1}^{l} \Big(1 - \frac{j}{l + 1}\Big) \sum_{t > j} e_t e_{t-j},

    with e the deviations from the mean.

    Parameters
    ----------
    x : ndarray of shape (time,)
        Complete series that is not constant.
    lags : int, optional
        Lags l of the long-run variance; default :math:`\lfloor 3 \sqrt T / 13 \rfloor`.

    References
    ----------
    Kwiatkowski, Phillips, Schmidt and Shin (1992), Testing the null hypothesis of stationarity
    against the alternative of a unit root, Journal of Econometrics 54, equations 10 and 11.

    Examples
    --------
    >>> import numpy as np
    >>> round(kpss(np.arange(20.0)), 3)
    1.084
    """
    n = len(x)
    lags = int(3.0 * math.sqrt(n) / 13.0) if lags is None else lags
    e = x - x.mean()
    variance = e @ e
    for j in range(1, lags + 1):
        variance += 2.0 * (1.0 - j / (lags + 1.0)) * (e[j:] @ e[:-j])
    return float((e.cumsum() ** 2).sum() / (n * variance))


def seasonal_strength(x: Float[np.ndarray, "time"], s: int) -> float:
    r"""Strength of the season in an STL decomposition, between 0 and 1.

    .. math:: \max\Big(0,\ 1 - \frac{\mathrm{Var}(R)}{\mathrm{Var}(S + R)}\Big)

    with S the seasonal and R the remainder component. STL has the settings of the R package
    forecast: a seasonal window of 11 observations, locally constant, and two inner iterations.

    Parameters
    ----------
    x : ndarray of shape (time,)
        Complete series of more than two seasons that is not constant.
    s : int
        Season length, at least 2.

    References
    ----------
    Wang, Smith and Hyndman (2006), Characteristic-based clustering for time series data, Data
    Mining and Knowledge Discovery 13, section 3.1; Cleveland, Cleveland, McRae and Terpenning
    (1990), STL: a seasonal-trend decomposition procedure based on loess, Journal of Official
    Statistics 6(1).

    Examples
    --------
    >>> import numpy as np
    >>> round(seasonal_strength(np.tile([1.0, 5.0, 2.0, 8.0], 6), 4), 6)
    1.0
    """
    from statsmodels.tsa.seasonal import STL

    trend = math.ceil(1.5 * s / (1.0 - 1.5 / _STL_SEASONAL)) // 2 * 2 + 1
    low_pass = s // 2 * 2 + 1 + 2 * (s % 2)
    parts = STL(
        x,
        period=s,
        seasonal=_STL_SEASONAL,
        trend=trend,
        low_pass=low_pass,
        seasonal_deg=0,
        seasonal_jump=math.ceil(_STL_SEASONAL / 10),
        trend_jump=math.ceil(trend / 10),
        low_pass_jump=math.ceil(low_pass / 10),
    ).fit(inner_iter=2, outer_iter=0)
    both = np.var(parts.seasonal + parts.resid)
    return max(0.0, 1.0 - float(np.var(parts.resid) / both)) if both > 0 else 0.0


def n_differences(x: Float[np.ndarray, "time"], most: int, scale: float) -> int:
    """Differences until the KPSS test accepts a level at 5 %, `most` at most.

    Parameters
    ----------
    x : ndarray of shape (time,)
        Series; missing values are left out of the test.
    most : int
    scale : float
        Largest absolute value of the data, which tells a constant series from rounding errors.

    References
    ----------
    Hyndman and Khandakar (2008), Automatic time series forecasting: the forecast package for R,
    Journal of Statistical Software 27(3), section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> n_differences(np.arange(30.0) ** 2, 2, 900.0)
    2
    """
    for d in range(most):
        seen = x[np.isfinite(x)]
        if len(seen) <= _FEWEST or is_flat(seen, scale) or kpss(seen) <= KPSS_CRITICAL:
            return d
        x = difference(x, 1)
    return most


def n_seasonal_differences(x: Float[np.ndarray, "time"], s: int, most: int, scale: float) -> int:
    """Seasonal differences until the season's strength is at most 0.64, `most` at most.

    Parameters
    ----------
    x : ndarray of shape (time,)
        Series; for the decomposition a missing value is interpolated linearly.
    s : int
        Season length.
    most : int
    scale : float
        As in :func:`n_differences`.

    Examples
    --------
    >>> import numpy as np
    >>> n_seasonal_differences(np.tile([1.0, 5.0, 2.0, 8.0], 6), 4, 1, 8.0)
    1
    """
    for D in range(most):
        seen = np.flatnonzero(np.isfinite(x))
        if len(seen) <= max(2 * s, s + _FEWEST) or is_flat(x, scale):
            return D
        whole = np.interp(np.arange(seen[0], seen[-1] + 1), seen, x[seen])
        if seasonal_strength(whole, s) <= STRONG_SEASON:
            return D
        x = difference(x, 0, 1, s)
    return most
