"""Scores of a forecast against held-out data, one number a series.

Arrays have shape (series, horizon). A held-out value that is NaN is left out, element by element;
a series without any held-out value scores NaN. A forecast that is not finite where the held-out
value is known raises: averaging over the rest would flatter it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

Array = np.ndarray


def mase(
    y: Float[Array, "series horizon"],
    forecast: Float[Array, "series horizon"],
    train: Float[Array, "series time"],
    season: int = 1,
) -> Float[Array, "series"]:
    r"""Mean absolute scaled error.

    .. math:: \frac{\frac1H \sum_h |y_{T+h} - \hat y_{T+h}|}
                   {\frac{1}{T-m} \sum_{t=m+1}^{T} |y_t - y_{t-m}|}

    The scale is the in-sample error of the seasonal naive forecast with season `season` (m) on the
    training part; 1 means as good as that forecast was one step ahead. Pairs of which one value is
    missing are left out of the scale. A series whose scale is zero or unknown scores NaN.

    Parameters
    ----------
    y, forecast : ndarray of shape (series, horizon)
        Held-out values and point forecasts.
    train : ndarray of shape (series, time)
        Training part, NaN after the end of a shorter series.
    season : int
        Season length m in steps (1: the plain naive forecast).

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

    y, forecast = _pair(y, forecast)
    train = np.atleast_2d(np.asarray(train, dtype=float))
    if len(train) != len(y):
        raise ValueError(f"y holds {len(y)} series and train {len(train)}; they must be the same")
    error = losses.mae(_long(y).assign(model=forecast.ravel()), ["model"])["model"].to_numpy()
    scale = naive_scale(train, season)
    # utilsforecast's own mase is infinite on a constant training part.
    return np.divide(error, scale, out=np.full(len(y), np.nan), where=scale > 0)


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
    frame = _long(train[:, season:]).assign(model=train[:, :-season].ravel())
    return losses.mae(frame, ["model"])["model"].to_numpy(dtype=float)


def smape(
    y: Float[Array, "series horizon"], forecast: Float[Array, "series horizon"]
) -> Float[Array, "series"]:
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
    appendix A.
    """
    from utilsforecast import losses

    y, forecast = _pair(y, forecast)
    frame = _long(y).assign(model=forecast.ravel())
    # utilsforecast divides by the sum of the two sizes, not by their mean, and gives a fraction.
    return 200.0 * losses.smape(frame, ["model"])["model"].to_numpy(dtype=float)


def crps(
    y: Float[Array, "series horizon"], samples: Float[Array, "series draw horizon"]
) -> Float[Array, "series"]:
    r"""Continuous ranked probability score from samples, mean over the horizon.

    .. math:: E|X - y| - \tfrac12 E|X - X'|

    estimated without bias (the fair estimator, in its equivalent sorted form, which costs
    n log n). It is in the data's units, smaller is better, and equals the absolute error where the
    forecast is a point.

    Parameters
    ----------
    y : ndarray of shape (series, horizon)
        Held-out values.
    samples : ndarray of shape (series, draw, horizon)
        At least two draws from the predictive distribution.

    Examples
    --------
    >>> crps([[0.0]], [[[-1.0], [1.0]]])
    array([0.])

    References
    ----------
    Gneiting and Raftery (2007), "Strictly proper scoring rules, prediction, and estimation", JASA
    102, section 4.2; Zamo and Naveau (2018), Mathematical Geosciences 50, equations 5 and 6.
    """
    import scoringrules

    y = np.atleast_2d(np.asarray(y, dtype=float))
    draws = np.asarray(samples, dtype=float)
    if draws.ndim != 3 or draws.shape[::2] != y.shape or draws.shape[1] < 2:
        raise ValueError(
            f"samples of shape {draws.shape} do not fit y of shape {y.shape}; give "
            f"({y.shape[0]}, draws, {y.shape[1]}) with two draws or more"
        )
    _check_finite(y, draws.sum(axis=1), "samples")
    score = scoringrules.crps_ensemble(y, draws, m_axis=1, estimator="pwm", backend="numpy")
    return _mean(score, ~np.isnan(y))


def quantile_score(
    y: Float[Array, "series horizon"], quantile: Float[Array, "series horizon"], q: float
) -> Float[Array, "series"]:
    r"""Quantile (pinball) score, mean over the horizon, in the data's units; smaller is better.

    .. math:: (1\{y < \hat y\} - q)(\hat y - y)

    Parameters
    ----------
    y, quantile : ndarray of shape (series, horizon)
        Held-out values and forecast quantiles.
    q : float
        Probability of the quantile, in (0, 1).

    Examples
    --------
    >>> quantile_score([[2.0]], [[1.0]], 0.9)
    array([0.9])

    References
    ----------
    Koenker and Bassett (1978), "Regression quantiles", Econometrica 46(1), equation 2.1.
    """
    import scoringrules

    if not 0 < q < 1:
        raise ValueError(f"q={q!r} is not a probability between 0 and 1")
    y, quantile = _pair(y, quantile)
    score = scoringrules.quantile_score(y, quantile, q, backend="numpy")
    return _mean(score, ~np.isnan(y))


def interval_score(
    y: Float[Array, "series horizon"],
    lo: Float[Array, "series horizon"],
    hi: Float[Array, "series horizon"],
    level: float,
) -> Float[Array, "series"]:
    r"""Interval (Winkler) score, mean over the horizon, in the data's units; smaller is better.

    .. math:: (u - l) + \tfrac2\alpha (l - y)_+ + \tfrac2\alpha (y - u)_+, \qquad
              \alpha = 1 - \text{level}/100

    Parameters
    ----------
    y, lo, hi : ndarray of shape (series, horizon)
        Held-out values and ends of the prediction interval.
    level : float
        Nominal coverage in per cent.

    Examples
    --------
    >>> interval_score([[3.0]], [[0.0]], [[2.0]], 80)
    array([12.])

    References
    ----------
    Gneiting and Raftery (2007), JASA 102, equation 43.
    """
    import scoringrules

    if not 0 < level < 100:
        raise ValueError(f"level={level!r} must lie between 0 and 100 per cent")
    y, lo = _pair(y, lo)
    y, hi = _pair(y, hi)
    score = scoringrules.interval_score(y, lo, hi, 1 - level / 100, backend="numpy")
    return _mean(score, ~np.isnan(y))


def coverage(
    y: Float[Array, "series horizon"],
    lo: Float[Array, "series horizon"],
    hi: Float[Array, "series horizon"],
) -> Float[Array, "series"]:
    """Per cent of the held-out values inside the closed interval, from 0 to 100.

    Examples
    --------
    >>> coverage([[1.0, 5.0]], [[0.0, 0.0]], [[2.0, 2.0]])
    array([50.])

    References
    ----------
    Christoffersen (1998), "Evaluating interval forecasts", International Economic Review 39(4),
    definition 1 (unconditional coverage).
    """
    y, lo = _pair(y, lo)
    y, hi = _pair(y, hi)
    return _mean(100.0 * ((lo <= y) & (y <= hi)), ~np.isnan(y))


def log_score(
    log_prob: ArrayLike, y: Float[Array, "series horizon *dim"]
) -> Float[Array, "series"]:
    r"""Log predictive density per held-out step, in nats; larger is better.

    .. math:: \frac1{H_{\text{obs}}} \log p(y_{T+1:T+H} \mid y_{1:T})

    The joint density of the held-out continuation, so correlation over the horizon counts;
    :math:`H_{\text{obs}}` is the number of steps with at least one value known.

    Parameters
    ----------
    log_prob : LogProb or ndarray of shape (series,)
        ``forecast.log_prob(y)``, nats a series.
    y : ndarray of shape (series, horizon) or (series, horizon, dim)
        Held-out values.

    Examples
    --------
    >>> import numpy as np
    >>> log_score([-6.0], [[1.0, np.nan, 2.0]])
    array([-3.])

    References
    ----------
    Good (1952), "Rational decisions", JRSS B 14(1); Gneiting and Raftery (2007), JASA 102,
    section 4.1.
    """
    known = ~np.isnan(np.atleast_2d(np.asarray(y, dtype=float)))
    steps = known.reshape(*known.shape[:2], -1).any(axis=2).sum(axis=1)
    total = np.asarray(log_prob, dtype=float)
    if total.shape != steps.shape:
        raise ValueError(f"log_prob has shape {total.shape} for {len(steps)} series of y")
    return np.divide(total, steps, out=np.full(len(steps), np.nan), where=steps > 0)


def _pair(y: Array, forecast: Array) -> tuple[Array, Array]:
    y = np.atleast_2d(np.asarray(y, dtype=float))
    forecast = np.atleast_2d(np.asarray(forecast, dtype=float))
    if y.ndim != 2 or y.shape != forecast.shape:
        raise ValueError(
            f"held-out values have shape {y.shape} and forecasts {forecast.shape}; both must be "
            "(series, horizon)"
        )
    _check_finite(y, forecast, "the forecast")
    return y, forecast


def _check_finite(y: Array, forecast: Array, name: str) -> None:
    bad = np.argwhere(~np.isnan(y) & ~np.isfinite(forecast))
    if len(bad):
        n, h = bad[0]
        raise ValueError(
            f"series {n}, step {h + 1} ahead: {name} is not finite; score it as failed"
        )


def _long(values: Array) -> pd.DataFrame:
    n, steps = values.shape
    return pd.DataFrame({"unique_id": np.repeat(np.arange(n), steps), "y": values.ravel()})


def _mean(score: Array, known: Bool[Array, "series horizon"]) -> Float[Array, "series"]:
    count = known.sum(axis=1)
    total = np.where(known, score, 0.0).sum(axis=1)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
