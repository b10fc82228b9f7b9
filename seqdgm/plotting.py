"""Pictures of forecasts, states and comparisons.

The functions draw on the `ax` they are given, or make a figure of their own that belongs to no
window system and no pyplot state: it can be saved, shown in a notebook, or thrown away. Import
this module where it is needed; it brings matplotlib along.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure as _Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from seqdgm.panel import Panel
from seqdgm.results import Forecast, StatePosterior

HUE = "#1f6fb4"
HISTORY = "#8c8c8c"
HELD_OUT = "#111111"
GRID = "#e6e6e6"
# More panels than this are unreadable on a page; the caller chooses with `series`.
MAX_PANELS = 12


class Figure(_Figure):
    """A matplotlib figure that shows itself in a notebook without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def plot_forecast(
    forecast: Forecast,
    actual: Any = None,
    *,
    level: Sequence[float] = (80, 95),
    history: int | None = None,
    series: Any = None,
    column: str | None = None,
    ax: Axes | None = None,
) -> _Figure:
    """Draw a forecast fan after the end of its history.

    Parameters
    ----------
    forecast : Forecast
        What to draw: the mean as a line, each prediction interval as a band.
    actual : array_like, optional
        What happened, in any form of `Panel.of`, one series for each of the forecast.
    level : sequence of float
        Prediction intervals in per cent.
    history : int, optional
        Steps of history to show; default five horizons, at least 24.
    series : hashable, optional
        Name of the series; default all of them, one panel each, at most 12.
    column : str, optional
        Name of the column of a multivariate series; default all of them.
    ax : Axes, optional
        Where to draw; then `series` and `column` must leave one panel.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        For a name that is not in the forecast, or more than one panel for one `ax`.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> y = np.tile([1.0, 2.0, 3.0, 5.0], 6) + 0.1 * np.sin(np.arange(24.0))
    >>> forecast = sq.SeasonalNaive(season=4).fit(y).forecast(8)
    >>> len(plot_forecast(forecast).axes)
    1
    """
    panel = forecast.panel
    found = _cells(panel, series, column)
    cells = found[:MAX_PANELS]
    truth = None if actual is None else Panel.of(actual)
    figure, axes = _grid(ax, len(cells))
    tail = max(5 * forecast.horizon, 24) if history is None else history
    for axis, (n, d) in zip(axes, cells, strict=True):
        past = pd.Series(panel.values[n, : panel.lengths[n], d], panel.index[n])
        bands = {lv: tuple(end[n, :, d] for end in forecast.interval(lv)) for lv in level}
        _draw_history(axis, _tail(past, tail))
        _draw_fan(axis, forecast.index[n], forecast.mean[n, :, d], bands, past)
        if truth is not None:
            steps = min(int(truth.lengths[n]), forecast.horizon)
            _draw_held_out(axis, forecast.index[n][:steps], truth.values[n, :steps, d])
        _finish(axis, panel.index[n], panel.columns[d], _title(forecast, n, d, len(cells)))
    if len(cells) > 1:
        left = f", the first {len(cells)} of {len(found)}" if len(cells) < len(found) else ""
        figure.suptitle(f"{forecast.model}{left}", x=0.01, ha="left", fontsize=11)
    _legend(figure, axes, ax)
    return figure


def plot_states(
    posterior: StatePosterior,
    *,
    level: float = 95,
    names: Sequence[str] | None = None,
    series: Any = None,
    observed: bool = False,
    ax: Axes | None = None,
) -> _Figure:
    """Draw the posterior mean of each state with a Gaussian band, one panel a state.

    Parameters
    ----------
    posterior : StatePosterior
        Filtered, smoothed or predicted states.
    level : float
        Probability of the band in per cent, taken from the posterior standard deviation.
    names : sequence of str, optional
        States to draw; default the first 12.
    series : hashable, optional
        Name of the series; default the first.
    observed : bool
        Draw the data behind every state, for states on the scale of the data.
    ax : Axes, optional
        Where to draw; then `names` must leave one state.

    Returns
    -------
    Figure
    """
    from statistics import NormalDist

    panel = posterior.panel
    n = 0 if series is None else _find(panel.ids, series, "series")
    chosen = list(posterior.names[:MAX_PANELS] if names is None else names)
    states = [_find(posterior.names, name, "state") for name in chosen]
    index = (panel.index if posterior.index is None else posterior.index)[n]
    width = NormalDist().inv_cdf(0.5 + level / 200) * posterior.std
    figure, axes = _grid(ax, len(states), columns=1)
    x = _positions(index)
    for axis, k in zip(axes, states, strict=True):
        mean, half = posterior.mean[n, : len(index), k], width[n, : len(index), k]
        if observed:
            for d in range(panel.n_dims):
                values = panel.values[n, : panel.lengths[n], d]
                axis.plot(
                    _positions(panel.index[n]), values, ".", color=HISTORY, ms=4, label="data"
                )
        axis.fill_between(
            x, mean - half, mean + half, color=HUE, alpha=0.25, lw=0, label=f"{level:g} % band"
        )
        axis.plot(x, mean, color=HUE, lw=1.6, label=f"{posterior.kind} mean")
        _finish(axis, index, posterior.names[k], None)
    _legend(figure, axes, ax)
    return figure


def plot_comparison(
    forecasts: pd.DataFrame,
    history: Any,
    *,
    models: Sequence[str] | None = None,
    notes: Mapping[str, str] | None = None,
    level: Sequence[float] = (80, 95),
    series: Any = None,
    cutoff: Any = None,
    tail: int | None = None,
) -> _Figure:
    """Draw one panel a model: its forecast fan against the held-out data, on shared axes.

    Parameters
    ----------
    forecasts : DataFrame
        Frame of `seqdgm.backtest`.
    history : array_like
        The data, in any form of `Panel.of`.
    models : sequence of str, optional
        Which models, in this order; default all in the frame.
    notes : mapping of str to str, optional
        A remark for each model, shown beside its name.
    level : sequence of float
        Prediction intervals in the frame, in per cent.
    series : hashable, optional
        Name of the series (``unique_id``); default the first.
    cutoff : optional
        Which window, by the last time stamp before it; default the last window.
    tail : int, optional
        Steps of history to show; default three horizons, at least 24.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        For a series, model or cutoff that is not in the frame.
    """
    ids = list(forecasts["unique_id"].unique())
    name = ids[0] if series is None else ids[_find(ids, series, "series")]
    block = forecasts[forecasts["unique_id"] == name]
    cutoffs = list(block["cutoff"].unique())
    chosen = cutoffs[-1] if cutoff is None else cutoffs[_find(cutoffs, cutoff, "cutoff")]
    block = block[block["cutoff"] == chosen]
    known = [c for c in forecasts.columns[4:] if f"{c}-lo-{level[0]:g}" in forecasts.columns]
    models = known if models is None else [known[_find(known, m, "model")] for m in models]
    past, label = _series_before(Panel.of(history), name, chosen)
    past = _tail(past, max(3 * len(block), 24) if tail is None else tail)
    columns = 2 if len(models) > 2 else 1
    figure, axes = _grid(None, len(models), columns=columns, share=True)
    index = pd.Index(block["ds"])
    for axis, model in zip(axes, models, strict=True):
        bands = {
            lv: tuple(block[f"{model}-{end}-{lv:g}"].to_numpy() for end in ("lo", "hi"))
            for lv in level
        }
        _draw_history(axis, past)
        _draw_fan(axis, index, block[model].to_numpy(), bands, past)
        _draw_held_out(axis, index, block["y"].to_numpy())
        _finish(axis, index, label, model, (notes or {}).get(model))
        if block[model].isna().all():
            axis.text(0.5, 0.5, "failed", transform=axis.transAxes, ha="center", color=HISTORY)
    _label_outer(axes, columns)
    _limit(axes, np.concatenate([past.to_numpy(), block["y"].to_numpy()]))
    _legend(figure, axes, None)
    return figure


def _tail(past: pd.Series, steps: int) -> pd.Series:
    return past.iloc[max(len(past) - steps, 0) :]


def _draw_history(axis: Axes, past: pd.Series) -> None:
    x = _positions(past.index)
    axis.plot(x, past.to_numpy(), color=HISTORY, lw=1.2, label="history")
    # A value between two missing ones has no line through it.
    lone = past.notna() & past.shift(1).isna() & past.shift(-1).isna()
    axis.plot(x[lone.to_numpy()], past[lone].to_numpy(), ".", color=HISTORY, ms=3)


def _draw_fan(
    axis: Axes,
    index: pd.Index,
    mean: np.ndarray,
    bands: Mapping[float, tuple[np.ndarray, ...]],
    past: pd.Series,
) -> None:
    x = _positions(index)
    # The last observation is a forecast of no width: starting there shows what the fan continues.
    if len(past) and np.isfinite(past.iloc[-1]):
        x = np.concatenate([_positions(past.index[-1:]), x])
        start = past.iloc[-1:].to_numpy()
        mean = np.concatenate([start, mean])
        bands = {
            lv: tuple(np.concatenate([start, end]) for end in ends) for lv, ends in bands.items()
        }
    widest_first = sorted(bands, reverse=True)
    for shade, lv in zip(np.linspace(0.18, 0.42, len(bands)), widest_first, strict=True):
        lo, hi = bands[lv]
        axis.fill_between(x, lo, hi, color=HUE, alpha=shade, lw=0, label=f"{lv:g} % interval")
    axis.plot(x, mean, color=HUE, lw=1.8, label="forecast mean")


def _draw_held_out(axis: Axes, index: pd.Index, values: np.ndarray) -> None:
    axis.plot(
        _positions(index),
        values,
        color=HELD_OUT,
        lw=1.1,
        marker="o",
        ms=2.6,
        label="held out",
    )


def _positions(index: pd.Index) -> np.ndarray:
    """What matplotlib can place on an axis: dates without zone, or numbers."""
    if isinstance(index, pd.PeriodIndex):
        index = index.to_timestamp()
    if isinstance(index, pd.DatetimeIndex):
        return index.tz_localize(None).to_numpy()
    if isinstance(index, pd.TimedeltaIndex):
        return index.to_numpy() / _unit(index)[1]
    return index.to_numpy()


def _unit(index: pd.TimedeltaIndex) -> tuple[str, np.timedelta64]:
    """Largest unit of which the index spans at least two."""
    span = index.to_numpy().max() - index.to_numpy().min()
    units = {
        "days": np.timedelta64(1, "D"),
        "hours": np.timedelta64(1, "h"),
        "minutes": np.timedelta64(1, "m"),
    }
    fitting = (pair for pair in units.items() if span >= 2 * pair[1])
    return next(fitting, ("seconds", np.timedelta64(1, "s")))


def _finish(
    axis: Axes, index: pd.Index, label: str, title: str | None, note: str | None = None
) -> None:
    axis.set_axisbelow(True)
    axis.grid(axis="y", color=GRID, lw=0.8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(HISTORY)
    axis.tick_params(length=0, labelsize=9, colors="#444444")
    axis.margins(x=0.01)
    if isinstance(index, pd.DatetimeIndex | pd.PeriodIndex):
        locator = AutoDateLocator(minticks=3, maxticks=10)
        axis.xaxis.set_major_locator(locator)
        axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        unit = "step"
        if isinstance(index, pd.TimedeltaIndex):
            unit = _unit(index)[0]
        axis.set_xlabel(str(index.name or unit), fontsize=9, color="#444444")
    axis.set_ylabel(label, fontsize=9, color="#444444")
    if title:
        axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    if note:
        axis.set_title(note, loc="right", fontsize=9, color="#444444")


def _grid(
    ax: Axes | None, n: int, *, columns: int | None = None, share: bool = False
) -> tuple[Any, list[Axes]]:
    if ax is not None:
        if n != 1:
            raise ValueError(f"{n} panels do not fit one ax; choose one series, column or state")
        return ax.figure, [ax]
    columns = columns or (1 if n == 1 else 2 if n < 7 else 3)
    rows = -(-n // columns)
    figure = Figure(
        figsize=(8.0 if columns == 1 else 5.2 * columns, max(3.6, 2.5 * rows)),
        layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06),
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).ravel()
    for spare in axes[n:]:
        spare.set_visible(False)
    return figure, list(axes[:n])


def _label_outer(axes: Sequence[Axes], columns: int) -> None:
    """Label shared axes once: times under the last panel of a column, units at the left."""
    for place, axis in enumerate(axes):
        last = place + columns >= len(axes)
        axis.tick_params(labelbottom=last, labelleft=place % columns == 0)
        axis.set_xlabel(axis.get_xlabel() if last else "")
        axis.set_ylabel(axis.get_ylabel() if place % columns == 0 else "")
        axis.xaxis.get_offset_text().set_visible(last)


def _legend(figure: Any, axes: Sequence[Axes], ax: Axes | None) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 1.6}
    if ax is not None:
        ax.legend(handles, labels, **style)
    else:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), **style)


def _cells(panel: Panel, series: Any, column: str | None) -> list[tuple[int, int]]:
    rows = range(panel.n_series) if series is None else [_find(panel.ids, series, "series")]
    dims = range(panel.n_dims) if column is None else [_find(panel.columns, column, "column")]
    return [(n, d) for n in rows for d in dims]


def _find(names: Sequence[Any], name: Any, what: str) -> int:
    if name not in names:
        shown = ", ".join(repr(known) for known in list(names)[:10])
        raise ValueError(f"{what} {name!r} is not there; there are {shown}")
    return list(names).index(name)


def _title(forecast: Forecast, n: int, d: int, panels: int) -> str:
    if panels == 1:
        return forecast.model
    parts = [str(forecast.panel.ids[n])] if forecast.panel.n_series > 1 else []
    parts += [forecast.panel.columns[d]] if forecast.panel.n_dims > 1 else []
    return " / ".join(parts)


def _series_before(panel: Panel, name: Any, cutoff: Any) -> tuple[pd.Series, str]:
    """History of the series called `name` in long tables up to a cutoff, and its column."""
    from seqdgm.evaluation.backtest import series_name

    for n in range(panel.n_series):
        for d in range(panel.n_dims):
            if series_name(panel, n, d) == name:
                end = int(panel.index[n].get_indexer(pd.Index([cutoff]))[0]) + 1
                values = panel.values[n, :end, d]
                return pd.Series(values, panel.index[n][:end]), panel.columns[d]
    raise ValueError(f"series {name!r} of the forecasts is not in the history; pass the same data")


def _limit(axes: Sequence[Axes], shown: np.ndarray) -> None:
    """Keep the data legible: a fan may leave the picture, half the data's range off their ends."""
    low, high = np.nanmin(shown), np.nanmax(shown)
    room = (high - low) or 1.0
    bottom, top = axes[0].get_ylim()
    axes[0].set_ylim(max(bottom, low - 0.5 * room), min(top, high + 0.5 * room))
