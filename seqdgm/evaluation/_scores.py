"""What every metric does: pair forecasts with held-out values, and average over known points."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

Array = np.ndarray

#: Over what a metric averages: each series' horizon, all points alike, or the series of each step.
Aggregate = Literal["series", "pooled", "step"]


def over_known(score: Float[Array, "series horizon"], aggregate: Aggregate) -> Any:
    """Average a score of each point over what is known of it (NaN is left out).

    ``"series"`` gives (series,), ``"step"`` (horizon,) and ``"pooled"`` one number, in which every
    known point weighs the same; NaN where nothing is known.
    """
    return ratio(score, ~np.isnan(score), aggregate)


def ratio(
    numerator: Float[Array, "series horizon"],
    denominator: Float[Array, "series horizon"],
    aggregate: Aggregate,
) -> Any:
    """Sum one array and another as `aggregate` says, points of unknown numerator left out."""
    check_aggregate(aggregate)
    axis = {"series": 1, "step": 0, "pooled": None}[aggregate]
    known = ~np.isnan(numerator)
    above = np.asarray(np.where(known, numerator, 0.0).sum(axis=axis))
    below = np.asarray(np.where(known, denominator, 0.0).sum(axis=axis))
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)[()]


def check_aggregate(aggregate: Aggregate) -> None:
    """Refuse an unknown way of averaging."""
    if aggregate not in get_args(Aggregate):
        raise ValueError(
            f"aggregate={aggregate!r} is unknown; choose 'series' (one number a series), 'pooled' "
            "(all points weigh the same) or 'step' (one number a step of the horizon)"
        )


def pair(y: Array, forecast: Array) -> tuple[Array, Array]:
    """Held-out values and forecasts as (series, horizon), checked."""
    y = np.atleast_2d(np.asarray(y, dtype=float))
    forecast = np.atleast_2d(np.asarray(forecast, dtype=float))
    if y.ndim != 2 or y.shape != forecast.shape:
        raise ValueError(
            f"held-out values have shape {y.shape} and forecasts {forecast.shape}; both must be "
            "(series, horizon)"
        )
    check_finite(y, forecast, "the forecast")
    return y, forecast


def history(train: Array, n_series: int) -> Array:
    """Training part as (series, time), one row for each held-out one."""
    train = np.atleast_2d(np.asarray(train, dtype=float))
    if train.ndim != 2 or len(train) != n_series:
        raise ValueError(
            f"y holds {n_series} series and train has shape {train.shape}; it must be "
            f"({n_series}, time), the same series"
        )
    return train


def draws_of(y: Array, samples: Array) -> tuple[Array, Array]:
    """Held-out values (series, horizon) and draws (series, draw, horizon), checked."""
    y = np.atleast_2d(np.asarray(y, dtype=float))
    draws = np.asarray(samples, dtype=float)
    if draws.ndim != 3 or draws.shape[::2] != y.shape or draws.shape[1] < 2:
        raise ValueError(
            f"samples of shape {draws.shape} do not fit y of shape {y.shape}; give "
            f"({y.shape[0]}, draws, {y.shape[-1]}) with two draws or more"
        )
    check_finite(y, draws.sum(axis=1), "samples")
    return y, draws


def vectors_of(y: Array, samples: Array) -> tuple[Array, Array]:
    """Held-out vectors (series, horizon, dim) and draws (series, draw, horizon, dim), checked."""
    y, draws = np.asarray(y, dtype=float), np.asarray(samples, dtype=float)
    fits = y.ndim == 3 and draws.ndim == 4 and draws.shape[:1] + draws.shape[2:] == y.shape
    if not fits or draws.shape[1] < 2:
        raise ValueError(
            f"samples of shape {draws.shape} do not fit y of shape {y.shape}; give y as (series, "
            "horizon, dim) and two draws or more as (series, draw, horizon, dim)"
        )
    flat = y.shape[0], y.shape[1] * y.shape[2]
    check_finite(y.reshape(flat), draws.sum(axis=1).reshape(flat), "samples", y.shape[2])
    return y, draws


def check_finite(y: Array, forecast: Array, name: str, dim: int = 1) -> None:
    """Refuse a forecast that is not finite where the held-out value is known."""
    bad = np.argwhere(~np.isnan(y) & ~np.isfinite(forecast))
    if len(bad):
        n, h = bad[0]
        raise ValueError(
            f"series {n}, step {h // dim + 1} ahead: {name} is not finite; score it as failed"
        )
