"""Scores of predictive distributions of single values; see `seqdgm.evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from seqdgm.evaluation._scores import Aggregate, Array, draws_of, history, over_known, pair, ratio
from seqdgm.evaluation.point_metrics import naive_scale


def crps(
    y: Float[Array, "series horizon"],
    samples: Float[Array, "series draw horizon"],
    *,
    aggregate: Aggregate = "series",
) -> Any:
    r"""Continuous ranked probability score from samples.

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
    aggregate : {"series", "pooled", "step"}
        What to average over; see the module.

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

    y, draws = draws_of(y, samples)
    # Centred, so that the spread of large values does not drown in rounding.
    centre = draws.mean(axis=1)
    score = scoringrules.crps_ensemble(
        y - centre, draws - centre[:, None], m_axis=1, estimator="pwm", backend="numpy"
    )
    return over_known(score, aggregate)


def quantile_score(
    y: Float[Array, "series horizon"],
    quantile: Float[Array, "series horizon"],
    q: float,
    *,
    aggregate: Aggregate = "series",
) -> Any:
    r"""Quantile (pinball) score, in the data's units; smaller is better.

    .. math:: (1\{y < \hat y\} - q)(\hat y - y)

    Parameters
    ----------
    y, quantile : ndarray of shape (series, horizon)
        Held-out values and forecast quantiles.
    q : float
        Probability of the quantile, in (0, 1).
    aggregate : {"series", "pooled", "step"}
        What to average over; see the module.

    Examples
    --------
    >>> quantile_score([[2.0]], [[1.0]], 0.9)
    array([0.9])

    References
    ----------
    Koenker and Bassett (1978), "Regression quantiles", Econometrica 46(1), equation 2.1.
    """
    return over_known(_pinball(*pair(y, quantile), q), aggregate)


def weighted_quantile_loss(
    y: Float[Array, "series horizon"],
    quantiles: Float[Array, "level series horizon"],
    levels: Sequence[float],
    *,
    aggregate: Aggregate = "pooled",
) -> Any:
    r"""Weighted quantile loss, averaged over levels: ``mean_wQuantileLoss`` of GluonTS.

    .. math:: \frac1L \sum_q \frac{\sum_{n,h} 2 (1\{y_{nh} \le \hat y_{nh}^q\} - q)
              (\hat y_{nh}^q - y_{nh})}{\sum_{n,h} |y_{nh}|}

    Pooled over all points of all series; a large series weighs more than a small one. With many
    levels it comes close to the CRPS over the mean size of the data, and is often reported as
    such. NaN where all held-out values are zero.

    Parameters
    ----------
    y : ndarray of shape (series, horizon)
        Held-out values.
    quantiles : ndarray of shape (level, series, horizon)
        Forecast quantiles; for those of draws see `sample_quantiles`.
    levels : sequence of float
        Probabilities of the quantiles; GluonTS and most tables take 0.1, 0.2, ..., 0.9.
    aggregate : {"pooled", "series", "step"}
        Points over which both sums go; the published definition is "pooled".

    Examples
    --------
    >>> float(weighted_quantile_loss([[2.0, 4.0]], [[[1.0, 4.0]]], [0.5]).round(6))
    0.166667

    References
    ----------
    Alexandrov et al. (2020), "GluonTS: Probabilistic and neural time series modeling in Python",
    JMLR 21(116); Salinas et al. (2020), "DeepAR", International Journal of Forecasting 36(3),
    section 4.1 (the rho-risk).
    """
    y = np.atleast_2d(np.asarray(y, dtype=float))
    quantiles = np.asarray(quantiles, dtype=float)
    if len(levels) == 0 or quantiles.shape != (len(levels), *y.shape):
        raise ValueError(
            f"quantiles of shape {quantiles.shape} do not fit {len(levels)} levels of y of shape "
            f"{y.shape}; give (level, series, horizon), at least one level"
        )
    loss = sum(_pinball(*pair(y, z), q) for z, q in zip(quantiles, levels, strict=True))
    return ratio(2.0 * np.asarray(loss) / len(levels), np.abs(y), aggregate)


def sample_quantiles(samples: Float[Array, "series draw *rest"], levels: Sequence[float]) -> Array:
    """Quantiles of draws by the rule of GluonTS: the sorted draw of place ``round((M - 1) q)``.

    Parameters
    ----------
    samples : ndarray of shape (series, draw, ...)
        Draws.
    levels : sequence of float
        Probabilities, in (0, 1).

    Returns
    -------
    ndarray of shape (level, series, ...)

    Examples
    --------
    >>> sample_quantiles([[3.0, 1.0, 2.0]], [0.5, 0.9]).tolist()
    [[2.0], [3.0]]
    """
    for q in levels:
        _check_probability(q)
    ordered = np.sort(np.asarray(samples, dtype=float), axis=1)
    places = np.round((ordered.shape[1] - 1) * np.asarray(levels, dtype=float)).astype(int)
    return np.moveaxis(ordered[:, places], 1, 0)


def interval_score(
    y: Float[Array, "series horizon"],
    lo: Float[Array, "series horizon"],
    hi: Float[Array, "series horizon"],
    level: float,
    *,
    aggregate: Aggregate = "series",
) -> Any:
    r"""Interval (Winkler) score, in the data's units; smaller is better.

    .. math:: (u - l) + \tfrac2\alpha (l - y)_+ + \tfrac2\alpha (y - u)_+, \qquad
              \alpha = 1 - \text{level}/100

    Parameters
    ----------
    y, lo, hi : ndarray of shape (series, horizon)
        Held-out values and ends of the prediction interval.
    level : float
        Nominal coverage in per cent.
    aggregate : {"series", "pooled", "step"}
        What to average over; see the module.

    Examples
    --------
    >>> interval_score([[3.0]], [[0.0]], [[2.0]], 80)
    array([12.])

    References
    ----------
    Gneiting and Raftery (2007), JASA 102, equation 43.
    """
    return over_known(_winkler(y, lo, hi, level), aggregate)


def msis(
    y: Float[Array, "series horizon"],
    lo: Float[Array, "series horizon"],
    hi: Float[Array, "series horizon"],
    train: Float[Array, "series time"],
    season: int = 1,
    level: float = 95,
    *,
    aggregate: Aggregate = "series",
) -> Any:
    """Mean scaled interval score: `interval_score` over the scale of `mase`.

    NaN for a series without a scale, which is left out of the other aggregates.

    Examples
    --------
    >>> msis([[3.0]], [[0.0]], [[2.0]], [[1.0, 3.0, 5.0]], level=80)
    array([6.])

    References
    ----------
    Makridakis, Spiliotis and Assimakopoulos (2020), "The M4 Competition", International Journal of
    Forecasting 36(1), section 2.3 (there at 95 %).
    """
    score = _winkler(y, lo, hi, level)
    scale = naive_scale(history(train, len(score)), season)[:, None]
    scaled = np.divide(score, scale, out=np.full_like(score, np.nan), where=scale > 0)
    return over_known(scaled, aggregate)


def coverage(
    y: Float[Array, "series horizon"],
    lo: Float[Array, "series horizon"],
    hi: Float[Array, "series horizon"],
    *,
    aggregate: Aggregate = "series",
) -> Any:
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
    y, lo = pair(y, lo)
    y, hi = pair(y, hi)
    inside = np.where(np.isnan(y), np.nan, 100.0 * ((lo <= y) & (y <= hi)))
    return over_known(inside, aggregate)


def acd(
    y: Float[Array, "series horizon"],
    lo: Float[Array, "series horizon"],
    hi: Float[Array, "series horizon"],
    level: float,
    *,
    aggregate: Aggregate = "pooled",
) -> Any:
    """Absolute coverage difference: how far `coverage` is from `level`, in per cent points.

    Tables of the M4 competition print it as a fraction: 0.01 there is 1 here.

    Examples
    --------
    >>> float(acd([[1.0, 5.0]], [[0.0, 0.0]], [[2.0, 2.0]], 80))
    30.0

    References
    ----------
    Makridakis, Spiliotis and Assimakopoulos (2020), "The M4 Competition", International Journal of
    Forecasting 36(1), section 2.3.
    """
    _check_level(level)
    return np.abs(coverage(y, lo, hi, aggregate=aggregate) - level)


def log_score(
    log_prob: ArrayLike,
    y: Float[Array, "series horizon *dim"],
    *,
    aggregate: Aggregate = "series",
) -> Any:
    r"""Log predictive density per held-out step, in nats; larger is better.

    .. math:: \frac1{H_{\text{obs}}} \log p(y_{T+1:T+H} \mid y_{1:T})

    The joint density of the held-out continuation, so correlation over the horizon counts;
    :math:`H_{\text{obs}}` is the number of steps with at least one value known. "pooled" divides
    the total by the total number of steps; a single step has no share in a joint density.

    Parameters
    ----------
    log_prob : LogProb or ndarray of shape (series,)
        ``forecast.log_prob(y)``, nats a series.
    y : ndarray of shape (series, horizon) or (series, horizon, dim)
        Held-out values.
    aggregate : {"series", "pooled"}
        What to average over.

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
    if aggregate == "step":
        raise ValueError("a joint density has no parts by step; choose 'series' or 'pooled'")
    known = ~np.isnan(np.atleast_2d(np.asarray(y, dtype=float)))
    steps = known.reshape(*known.shape[:2], -1).any(axis=2).sum(axis=1)
    total = np.asarray(log_prob, dtype=float)
    if total.shape != steps.shape:
        raise ValueError(f"log_prob has shape {total.shape} for {len(steps)} series of y")
    return ratio(total[:, None], steps[:, None], aggregate)


def pit(
    y: Float[Array, "series horizon"],
    samples: Float[Array, "series draw horizon"],
    *,
    seed: int | None = None,
) -> Float[Array, "series horizon"]:
    r"""Randomised probability integral transform, from draws; uniform for a true forecast.

    .. math:: u = \frac{\#\{x_i < y\} + v\,(1 + \#\{x_i = y\})}{M + 1}, \qquad v \sim U(0, 1)

    The place of the held-out value among the M draws, ties (discrete data) and the width of a
    place broken at random: exactly uniform, whatever M, where value and draws have the same law,
    continuous or discrete. In the limit of many draws it is
    :math:`F(y-) + v (F(y) - F(y-))`.

    Parameters
    ----------
    y : ndarray of shape (series, horizon)
        Held-out values.
    samples : ndarray of shape (series, draw, horizon)
        At least two draws from the predictive distribution.
    seed : int, optional
        Seed of v.

    Returns
    -------
    ndarray of shape (series, horizon)
        In (0, 1), NaN where the value is not known. A flat histogram: calibrated; a U: too
        narrow; a hump: too wide; a slope: biased.

    Examples
    --------
    >>> u = pit([[0.0]], [[[-1.0], [1.0], [2.0]]], seed=0)
    >>> bool(0.25 < u[0, 0] < 0.5)
    True

    References
    ----------
    Smith (1985), Journal of Forecasting 4(3); Czado, Gneiting and Held (2009), "Predictive model
    assessment for count data", Biometrics 65(4), section 2.1.
    """
    y, draws = draws_of(y, samples)
    below = (draws < y[:, None]).sum(axis=1)
    ties = (draws == y[:, None]).sum(axis=1)
    v = np.random.default_rng(seed).random(y.shape)
    u = (below + v * (1 + ties)) / (draws.shape[1] + 1)
    return np.where(np.isnan(y), np.nan, u)


def _pinball(y: Array, quantile: Array, q: float) -> Array:
    import scoringrules

    _check_probability(q)
    score: Array = scoringrules.quantile_score(y, quantile, q, backend="numpy")
    return score


def _winkler(y: Array, lo: Array, hi: Array, level: float) -> Array:
    import scoringrules

    _check_level(level)
    y, lo = pair(y, lo)
    y, hi = pair(y, hi)
    score: Array = scoringrules.interval_score(y, lo, hi, 1 - level / 100, backend="numpy")
    return score.reshape(y.shape)  # it drops axes of length one


def _check_probability(q: float) -> None:
    if not 0 < q < 1:
        raise ValueError(f"q={q!r} is not a probability between 0 and 1")


def _check_level(level: float) -> None:
    if not 0 < level < 100:
        raise ValueError(f"level={level!r} must lie between 0 and 100 per cent")
