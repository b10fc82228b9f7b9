"""Pictures of the residuals of a fitted model.

Import this module where it is needed; it brings matplotlib along.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes

from seqdgm.panel import Panel
from seqdgm.plotting import HELD_OUT, HISTORY, HUE, Figure, _find, _finish, _grid, _positions

_FEWEST = 8  # residuals below which there is nothing to see
_BAND = 1.959963984540054  # standard normal quantile at 0.975


def plot_residuals(
    residuals: Panel,
    *,
    series: Any = None,
    column: str | None = None,
    lags: int | None = None,
) -> Figure:
    """Draw standardised residuals over time, their distribution, quantiles and autocorrelations.

    Parameters
    ----------
    residuals : Panel
        Standardised residuals, NaN where there are none.
    series : hashable, optional
        Name of the series; default the first.
    column : str, optional
        Name of the column; default the first.
    lags : int, optional
        Lags of the autocorrelations; default 24, and at most half the residuals.

    Returns
    -------
    Figure
        Four panels: the residuals, with dashed lines at 1.96; their histogram and kernel density
        estimate beside the standard normal density; their quantiles against normal ones; and their
        autocorrelations with 95 % bounds for white noise.

    Raises
    ------
    ValueError
        For an unknown name, or a series with fewer than 8 residuals.

    Examples
    --------
    >>> import seqdgm as sq
    >>> model = sq.ARIMA((0, 1, 1)).fit(sq.datasets.load("nile").y)
    >>> [axis.get_title(loc="left") for axis in model.plot_diagnostics().axes][2:]
    ['Normal Q-Q', 'Autocorrelation']
    """
    n = 0 if series is None else _find(residuals.ids, series, "series")
    d = 0 if column is None else _find(residuals.columns, column, "column")
    values = residuals.values[n, : residuals.lengths[n], d]
    known = np.isfinite(values)
    if known.sum() < _FEWEST:
        raise ValueError(
            f"series {residuals.ids[n]!r} has {known.sum()} residuals; {_FEWEST} are the fewest "
            "worth drawing"
        )
    first = int(np.argmax(known))
    figure, axes = _grid(None, 4)
    figure.set_size_inches(10.4, 6.4)
    _draw_series(axes[0], residuals.index[n], values)
    _draw_histogram(axes[1], values[known])
    _draw_quantiles(axes[2], values[known])
    _draw_correlations(axes[3], values[first:], lags)
    return figure


def _draw_series(axis: Axes, index: pd.Index, values: Float[np.ndarray, "time"]) -> None:
    axis.axhline(0.0, color=HISTORY, lw=0.8)
    for level in (-_BAND, _BAND):
        axis.axhline(level, color=HISTORY, lw=0.8, ls="--")
    axis.plot(_positions(index), values, color=HUE, lw=1.0, marker="o", ms=2.2)
    _finish(axis, index, "standard deviations", "Standardised residuals")


def _draw_histogram(axis: Axes, values: Float[np.ndarray, "seen"]) -> None:
    from scipy.stats import gaussian_kde

    reach = max(3.5, 1.1 * float(np.abs(values).max()))
    grid = np.linspace(-reach, reach, 301)
    # As wide as Freedman and Diaconis' rule says, for residuals of unit spread.
    bins = int(np.clip(2 * reach / (2.7 * len(values) ** (-1 / 3)), 8, 60))
    axis.hist(values, bins=bins, range=(-reach, reach), density=True, color=HUE, alpha=0.3)
    if values.std() > 0:
        axis.plot(grid, gaussian_kde(values)(grid), color=HUE, lw=1.6, label="kernel estimate")
    normal = np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi)
    axis.plot(grid, normal, color=HELD_OUT, lw=1.1, ls="--", label="N(0, 1)")
    _finish(axis, pd.RangeIndex(0), "density", "Distribution")
    axis.set_xlabel("standard deviations", fontsize=9, color="#444444")
    axis.legend(frameon=False, fontsize=8.5, handlelength=1.6)


def _draw_quantiles(axis: Axes, values: Float[np.ndarray, "seen"]) -> None:
    from scipy.special import ndtri

    # Plotting positions of Blom (1958), nearly the means of normal order statistics.
    expected = ndtri((np.arange(1, len(values) + 1) - 0.375) / (len(values) + 0.25))
    reach = 1.05 * max(np.abs(expected).max(), np.abs(values).max())
    axis.plot([-reach, reach], [-reach, reach], color=HELD_OUT, lw=1.1, ls="--")
    axis.plot(expected, np.sort(values), "o", color=HUE, ms=3.2)
    _finish(axis, pd.RangeIndex(0), "residual quantiles", "Normal Q-Q")
    axis.set_xlabel("standard normal quantiles", fontsize=9, color="#444444")


def _draw_correlations(axis: Axes, values: Float[np.ndarray, "time"], lags: int | None) -> None:
    from statsmodels.tsa.stattools import acf

    seen = int(np.isfinite(values).sum())
    most = min(24, seen // 2) if lags is None else int(lags)
    if not 0 < most < len(values):
        raise ValueError(f"lags={lags!r} must be at least 1 and below the {len(values)} residuals")
    found = acf(values, nlags=most, fft=False, missing="conservative")[1:]
    bound = _BAND / np.sqrt(seen)
    axis.axhspan(-bound, bound, color=HUE, alpha=0.15, lw=0)
    axis.axhline(0.0, color=HISTORY, lw=0.8)
    axis.vlines(np.arange(1, most + 1), 0.0, found, color=HUE, lw=1.8)
    axis.plot(np.arange(1, most + 1), found, "o", color=HUE, ms=3.2)
    _finish(axis, pd.RangeIndex(0), "correlation", "Autocorrelation")
    reach = 1.15 * max(bound, float(np.abs(found).max()))
    axis.set_ylim(-reach, reach)
    axis.set_xlabel("lag", fontsize=9, color="#444444")
