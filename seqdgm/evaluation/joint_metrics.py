"""Scores of predictive distributions of vectors; see `seqdgm.evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from seqdgm.evaluation._scores import Aggregate, Array, over_known, vectors_of
from seqdgm.evaluation.density_metrics import crps, sample_quantiles, weighted_quantile_loss

# Those of the published tables.
_SUM_LEVELS = tuple((np.arange(1, 20) / 20).tolist())


def crps_sum(
    y: Float[Array, "series horizon dim"],
    samples: Float[Array, "series draw horizon dim"],
    *,
    normalised: bool = False,
    aggregate: Aggregate = "pooled",
) -> Any:
    r"""CRPS of the sum over the dimensions.

    .. math:: E_t\left[\text{CRPS}\left(F_{\text{sum}, t}, \sum_i y_{it}\right)\right]

    It sees the dependence between the dimensions, through the spread of their sum, and nothing
    else of it. A step of which a dimension is missing is left out: its sum is not known.

    Parameters
    ----------
    y : ndarray of shape (series, horizon, dim)
        Held-out vectors.
    samples : ndarray of shape (series, draw, horizon, dim)
        At least two draws from the predictive distribution.
    normalised : bool
        False: the fair estimate, in the data's units. True: as in the published tables of deep
        multivariate forecasts, the `weighted_quantile_loss` of the sum at 0.05, 0.10, ..., 0.95.
    aggregate : {"pooled", "series", "step"}
        What to average over; the published tables are "pooled".

    Examples
    --------
    >>> import numpy as np
    >>> draws = np.array([[[[-1.0, 1.0]], [[1.0, 1.0]]]])
    >>> float(crps_sum([[[0.0, 1.0]]], draws))
    0.0

    References
    ----------
    Salinas, Bohlke-Schneider, Callot, Medico and Gasthaus (2019), "High-dimensional multivariate
    forecasting with low-rank Gaussian copula processes", NeurIPS 32, section 5 and appendix G.1.
    """
    y, draws = vectors_of(y, samples)
    total = y.sum(axis=2)
    sums = np.where(np.isnan(total)[:, None], 0.0, draws.sum(axis=3))
    if not normalised:
        return crps(total, sums, aggregate=aggregate)
    quantiles = sample_quantiles(sums, _SUM_LEVELS)
    return weighted_quantile_loss(total, quantiles, _SUM_LEVELS, aggregate=aggregate)


def energy_score(
    y: Float[Array, "series horizon dim"],
    samples: Float[Array, "series draw horizon dim"],
    *,
    aggregate: Aggregate = "series",
) -> Any:
    r"""Energy score of the vector of each step, in the data's units; smaller is better.

    .. math:: E\lVert X - y\rVert - \tfrac12 E\lVert X - X'\rVert

    estimated without bias, as `crps`, which it is for one dimension. Of a vector that is partly
    missing, the known part is scored. For the joint law over the horizon give trajectories as
    vectors: shape (series, 1, horizon * dim). It costs the square of the number of draws.

    Examples
    --------
    >>> import numpy as np
    >>> energy_score([[[3.0, 4.0]]], np.zeros((1, 2, 1, 2)))
    array([5.])

    References
    ----------
    Gneiting and Raftery (2007), JASA 102, equation 22; Gneiting, Stanberry, Grimit, Held and
    Johnson (2008), Test 17(2), section 2.4.
    """
    from scipy.spatial.distance import pdist

    # scoringrules has this score, in memory of the square of the draws times the dimensions.
    def score(y: Array, draws: Array) -> float:
        # The mean over the distinct pairs is the fair estimate of E|X - X'|.
        return float(np.linalg.norm(draws - y, axis=1).mean() - 0.5 * pdist(draws).mean())

    return over_known(_each_step(y, samples, score), aggregate)


def variogram_score(
    y: Float[Array, "series horizon dim"],
    samples: Float[Array, "series draw horizon dim"],
    p: float = 0.5,
    *,
    aggregate: Aggregate = "series",
) -> Any:
    r"""Variogram score of the vector of each step; smaller is better.

    .. math:: \sum_{i,j} \left(|y_i - y_j|^p - E|X_i - X_j|^p\right)^2

    with equal weights, both orders of a pair counted. It sees wrong correlations better than the
    energy score, and no common shift of all dimensions. Of a vector that is partly missing, the
    known part is scored; with fewer than two known dimensions it is NaN.

    Parameters
    ----------
    y, samples, aggregate
        As in `energy_score`.
    p : float
        Power, positive.

    Examples
    --------
    >>> import numpy as np
    >>> variogram_score([[[0.0, 4.0]]], np.zeros((1, 2, 1, 2)))
    array([8.])

    References
    ----------
    Scheuerer and Hamill (2015), "Variogram-based proper scoring rules for probabilistic forecasts
    of multivariate quantities", Monthly Weather Review 143(4), equation 11.
    """
    if not p > 0:
        raise ValueError(f"p={p!r} must be positive")

    def score(y: Array, draws: Array) -> float:
        if len(y) < 2:
            return float("nan")
        # One row of pairs at a time: all of them at once, as in scoringrules, would hold draws x
        # dim x dim numbers.
        rows = [
            (np.abs(y - y[i]) ** p - (np.abs(draws - draws[:, [i]]) ** p).mean(axis=0)) ** 2
            for i in range(len(y))
        ]
        return float(np.sum(rows))

    return over_known(_each_step(y, samples, score), aggregate)


def _each_step(y: Array, samples: Array, score: Callable[[Array, Array], float]) -> Array:
    """Score of the known part of each vector, NaN where nothing of it is known."""
    y, draws = vectors_of(y, samples)
    out = np.full(y.shape[:2], np.nan)
    for n, h in np.ndindex(*out.shape):
        known = ~np.isnan(y[n, h])
        if known.any():
            out[n, h] = score(y[n, h, known], np.ascontiguousarray(draws[n, :, h, known].T))
    return out
