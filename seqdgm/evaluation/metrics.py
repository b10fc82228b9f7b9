"""Scores of forecasts against held-out data.

Arrays have the shape (series, horizon), draws (series, draw, horizon), vectors one more axis. A
held-out value that is NaN is left out, element by element; what has no held-out value scores NaN. A
forecast that is not finite where the held-out value is known raises: averaging over the rest would
flatter it.

What a metric averages over is said by ``aggregate``: ``"series"`` gives one number a series, (the
mean over its horizon, of which tables of the M4 competition take the mean over the series);
``"pooled"`` one number, every known point weighing the same, as in the tables of M3 and Tourism;
``"step"`` one number for each step of the horizon, the mean over the series. A metric that is a
quotient of sums (`weighted_quantile_loss`) takes both sums over the same points.
"""

from __future__ import annotations

from seqdgm.evaluation._scores import Aggregate, over_known
from seqdgm.evaluation.density_metrics import (
    acd,
    coverage,
    crps,
    interval_score,
    log_score,
    msis,
    pit,
    quantile_score,
    sample_quantiles,
    weighted_quantile_loss,
)
from seqdgm.evaluation.joint_metrics import crps_sum, energy_score, variogram_score
from seqdgm.evaluation.naive2 import naive2
from seqdgm.evaluation.point_metrics import mape, mase, naive_scale, owa, smape

__all__ = [
    "Aggregate",
    "acd",
    "coverage",
    "crps",
    "crps_sum",
    "energy_score",
    "interval_score",
    "log_score",
    "mape",
    "mase",
    "msis",
    "naive2",
    "naive_scale",
    "over_known",
    "owa",
    "pit",
    "quantile_score",
    "sample_quantiles",
    "smape",
    "variogram_score",
    "weighted_quantile_loss",
]
