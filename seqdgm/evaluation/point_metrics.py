"""Scores of point forecasts; see `seqdgm.evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from seqdgm.evaluation._scores import Aggregate, Array, check_aggregate, history, pair
from seqdgm.evaluation.naive2 import naive2


def mase(
    y: Float[Array, "series horizon"],
    forecast: Float[Array, "series horizon"],
    train: Float[Array, "series time"],
    season: int = 1,
    *,
    aggregate: Aggregate = "series",
) -> Any:
    r"""Mean absolute scaled error.

    .. math:: \frac{\frac1H \sum_h |y_{T+h} - \hat y_{T+h}|}
                   {\frac{1}{T-m} \sum_{t=m+1}^{T} |y_t - y_{t-m}|}

    The scale is the in-sample error of the seasonal naive forecast with season `season` (m) on the
    training part; 1 means as good as that forecast was one step ahead. Pairs of which one value is
    missing are left out of the scale. A series whose scale is zero or unknown scores NaN, and is
    left out of the other aggregates.

    Parameters
    ----------
    y, forecast : ndarray of shape (series, horizon)
        Held-out values and point forecasts.
    train : ndarray of shape (series, time)
        Training part, NaN after the end of a shorter series.
    season : int
        Season length m in steps (1: the plain naive forecast).
    aggregate : {"series", "pooled", "step"}
        What to average over; see the module.

    Examples
    --------
    >>> mase([[5.0, 6.0]], [[4.0, 5.0]], [[1.0, 2.0, 3.0, 4.0]])
    array([1.])

    References
    ----------
    Hyndman and Koehler (2006), "Another look at measures of forecast accuracy", International
    Journal of Forecasting 22(4), section 3.
    """
    from utilsforecast import losses

    y, forecast = pair(y, forecast)
    scale = naive_scale(history(train, len(y)), season)[:, None]
    # The scale differs by series, so that it has to go in before points are pooled.
    unit = np.where(scale > 0, scale, np.nan)
    return _loss(losses.mae, y / unit, forecast / unit, aggregate)


def naive_scale(train: Float[Array, "series time"], season: int = 1) -> Float[Array, "series"]:
    """Mean absolute difference over one season, the denominator of `mase`, in the data's units.

    NaN for a series without a pair of values one season apart.

    Examples
    --------
    >>> naive_scale([[1.0, 2.0, 4.0]])
    array([1.5])
    """
    from utilsforecast import losses

    train = np.atleast_2d(np.asarray(train, dtype=float))
    if season < 1:
        raise ValueError(f"season={season!r} must be a whole number of steps, 1 or more")
    if train.shape[1] <= season:
        return np.full(len(train), np.nan)
    scale: Array = _loss(losses.mae, train[:, season:], train[:, :-season], "series")
    return scale


def smape(
    y: Float[Array, "series horizon"],
    forecast: Float[Array, "series horizon"],
    *,
    aggregate: Aggregate = "series",
) -> Any:
    r"""Symmetric mean absolute percentage error, from 0 to 200.

    .. math:: \frac{200}{H} \sum_h \frac{|y_h - \hat y_h|}{|y_h| + |\hat y_h|}

    A term whose value and forecast are both zero counts as 0.

    Examples
    --------
    >>> smape([[100.0]], [[50.0]]).round(3)
    array([66.667])

    References
    ----------
    Makridakis and Hibon (2000), "The M3-Competition", International Journal of Forecasting 16(4),
    appendix A; the sizes in the denominator as in Makridakis, Spiliotis and Assimakopoulos (2020),
    International Journal of Forecasting 36(1).
    """
    from utilsforecast import losses

    # utilsforecast divides by the sum of the two sizes, not by their mean, and gives a fraction.
    return 200.0 * _loss(losses.smape, *pair(y, forecast), aggregate)


def mape(
    y: Float[Array, "series horizon"],
    forecast: Float[Array, "series horizon"],
    *,
    aggregate: Aggregate = "series",
) -> Any:
    r"""Mean absolute percentage error, in per cent.

    .. math:: \frac{100}{H} \sum_h \left|\frac{y_h - \hat y_h}{y_h}\right|

    A held-out value of zero has no percentage error and is left out; data with many of them want
    another metric.

    Examples
    --------
    >>> mape([[100.0, 50.0]], [[90.0, 55.0]])
    array([10.])

    References
    ----------
    Hyndman and Koehler (2006), International Journal of Forecasting 22(4), section 2.2.
    """
    from utilsforecast import losses

    return 100.0 * _loss(losses.mape, *pair(y, forecast), aggregate)


def owa(
    y: Float[Array, "series horizon"],
    forecast: Float[Array, "series horizon"],
    train: Float[Array, "series time"],
    season: int = 1,
    *,
    benchmark: Float[Array, "series horizon"] | None = None,
) -> float:
    r"""Overall weighted average of the M4 competition: 1 is as good as Naive2.

    .. math:: \tfrac12 \left(\frac{\text{sMAPE}}{\text{sMAPE}_{\text{Naive2}}}
              + \frac{\text{MASE}}{\text{MASE}_{\text{Naive2}}}\right)

    Each of the four is first the mean over the series of their own scores, so there is one number
    for a set of series and none for a single step.

    Parameters
    ----------
    y, forecast, train, season
        As in `mase`.
    benchmark : ndarray of shape (series, horizon), optional
        Forecasts to divide by; default those of `naive2` from `train`.

    Examples
    --------
    >>> owa([[5.0, 6.0]], [[4.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]])
    1.0

    References
    ----------
    Makridakis, Spiliotis and Assimakopoulos (2020), "The M4 Competition: 100,000 time series and
    61 forecasting methods", International Journal of Forecasting 36(1), section 2.3.
    """
    y, forecast = pair(y, forecast)
    train = history(train, len(y))
    other = naive2(train, season, y.shape[1]) if benchmark is None else benchmark
    scores = [[smape(y, f), mase(y, f, train, season)] for f in (forecast, other)]
    mine, theirs = np.nanmean(np.array(scores), axis=2)
    return float((mine / theirs).mean())


def _loss(loss: Callable[..., Any], y: Array, forecast: Array, aggregate: Aggregate) -> Any:
    """Average a loss of utilsforecast over the groups of points that `aggregate` names."""
    check_aggregate(aggregate)
    n, steps = y.shape
    points = np.arange(n * steps)
    group = {"series": points // steps, "step": points % steps, "pooled": 0 * points}[aggregate]
    frame = pd.DataFrame({"unique_id": group, "y": y.ravel(), "forecast": forecast.ravel()})
    score = loss(frame, ["forecast"])["forecast"].to_numpy(dtype=float)
    return score[0] if aggregate == "pooled" else score
