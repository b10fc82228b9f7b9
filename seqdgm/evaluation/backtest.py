"""Rolling-origin evaluation: fit on the past, forecast the next steps, move on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seqdgm.inference import warm_up
from seqdgm.model import SequenceModel
from seqdgm.panel import Panel
from seqdgm.results import Forecast

# What a model raises when the data or the arithmetic defeat it. Anything else (a wrong type, a
# missing attribute) is a mistake in the code and is not swallowed.
MODEL_ERRORS = (ArithmeticError, RuntimeError, ValueError)

Models = SequenceModel | Sequence[SequenceModel] | Mapping[str, SequenceModel]


class Window(NamedTuple):
    """One forecast origin: what may be seen, and what is held out.

    Attributes
    ----------
    number : int
        0 for the oldest.
    train, held_out : Panel
        History of each series, and the `horizon` steps after it.
    inputs : Panel or None
        Known covariates of the history and the horizon.
    seed : int or None
        Seed of this window, the same for every model.
    """

    number: int
    train: Panel
    held_out: Panel
    inputs: Panel | None
    seed: int | None

    @property
    def cutoff(self) -> list[Any]:
        """Last time stamp that the models see, of each series."""
        return [index[-1] for index in self.train.index]


@dataclass(frozen=True)
class Record:
    """What one model did on one window; `forecast` is None where it failed, and `error` says why.

    `fit_seconds` is 0 where the model was not refitted.
    """

    model: str
    window: Window
    forecast: Forecast | None
    fit_seconds: float
    forecast_seconds: float
    error: str | None = None

    @property
    def failure(self) -> dict[str, Any]:
        """Row of the list of failures."""
        cutoff = self.window.cutoff
        return {"model": self.model, "cutoff": cutoff[0], "error": self.error}


def backtest(
    models: Models,
    y: Any,
    horizon: int,
    *,
    n_windows: int = 1,
    step: int | None = None,
    refit: bool = True,
    inputs: Any = None,
    level: Sequence[float] = (80, 95),
    n_samples: int = 1000,
    seed: int | None = None,
    progress: bool = False,
    fit_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> pd.DataFrame:
    r"""Forecast from several origins in the past, each with what was known there.

    Window w of W ends :math:`(W - w)\,\text{step}` steps before the end of each series; the last
    one ends with the data. A model sees the history before the window and nothing after it.

    Parameters
    ----------
    models : SequenceModel, list of them, or dict of name to model
        Models to evaluate; they are cloned, never changed. In a list the class name is the name.
    y : array_like
        Data in any form of `Panel.of`.
    horizon : int
        Steps to forecast from each origin.
    n_windows : int
        Number of origins.
    step : int, optional
        Steps from one origin to the next; default `horizon`, so that windows do not overlap.
    refit : bool
        Fit anew at each origin. False: fit at the first one, and condition the fitted model on
        the longer history afterwards.
    inputs : array_like, optional
        Known covariates of every step of `y`.
    level : sequence of float
        Prediction intervals, in per cent.
    n_samples : int
        Trajectories of models that forecast by simulation.
    seed : int, optional
        Same seed, same result. Every model gets the same seed on a window, whatever its company.
    progress : bool
        Show a progress bar on standard error.
    fit_options : dict of name to dict, optional
        Keyword arguments for the `fit` of the named models.

    Returns
    -------
    DataFrame
        Columns ``unique_id, ds, cutoff, y``, then ``<name>, <name>-lo-80, <name>-hi-80, ...`` for
        each model; one row for each series, window and step. Where a model failed its columns are
        NaN, a `RuntimeWarning` says so, and ``.attrs["failures"]`` lists model, cutoff (of the
        first series) and error.

    Raises
    ------
    ValueError
        For a series too short for the windows, or names that do not tell the models apart.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> y = np.tile([1.0, 2.0, 3.0, 5.0], 6) + 0.1 * np.sin(np.arange(24.0))
    >>> frame = sq.backtest(sq.SeasonalNaive(season=4), y, 4, n_windows=2)
    >>> list(frame.columns[:6])
    ['unique_id', 'ds', 'cutoff', 'y', 'SeasonalNaive', 'SeasonalNaive-lo-80']

    References
    ----------
    Tashman (2000), "Out-of-sample tests of forecasting accuracy", International Journal of
    Forecasting 16(4): rolling-origin evaluation.
    """
    named = name_models(models)
    records = run_windows(
        named,
        Panel.of(y),
        horizon,
        n_windows=n_windows,
        step=step,
        refit=refit,
        inputs=inputs,
        n_samples=n_samples,
        seed=seed,
        progress=progress,
        fit_options=fit_options,
    )
    parts = [(record, forecast_columns(record, level)) for record in records]
    frame = assemble(parts)
    note_failures(frame, [record.failure for record, _ in parts if record.error is not None])
    return frame


def run_windows(
    models: Mapping[str, SequenceModel],
    panel: Panel,
    horizon: int,
    *,
    n_windows: int,
    step: int | None,
    refit: bool,
    inputs: Any,
    n_samples: int,
    seed: int | None,
    progress: bool,
    fit_options: Mapping[str, Mapping[str, Any]] | None,
) -> Iterator[Record]:
    """Yield a `Record` for each window and model, oldest window first.

    A generator, so that a forecast can be scored and let go before the next one is made.
    """
    options = dict(fit_options or {})
    unknown = sorted(set(options) - set(models))
    if unknown:
        raise ValueError(f"fit_options names {unknown}, but the models are {list(models)}")
    windows = cut_windows(panel, horizon, n_windows, step, inputs, seed)
    for model in models.values():
        warm_up(model)  # or the first model would be charged for imports and compilation
    fitted: dict[str, SequenceModel] = {}
    with _progress_bar(progress, len(models) * n_windows) as advance:
        for window in windows:
            for name, model in models.items():
                advance(f"{name}, window {window.number + 1} of {n_windows}")
                keep = None if refit else fitted
                yield _run_one(name, model, window, n_samples, options.get(name, {}), keep)


def cut_windows(
    panel: Panel,
    horizon: int,
    n_windows: int,
    step: int | None,
    inputs: Any = None,
    seed: int | None = None,
) -> list[Window]:
    """Cut the forecast origins of `backtest` out of a panel."""
    step = horizon if step is None else step
    for name, value in (("horizon", horizon), ("n_windows", n_windows), ("step", step)):
        if int(value) != value or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number, at least 1")
    span = horizon + (n_windows - 1) * step
    short = np.flatnonzero(panel.lengths <= span)
    if len(short):
        n = short[0]
        raise ValueError(
            f"series {panel.ids[n]!r} has {panel.lengths[n]} steps, but {n_windows} window(s) of "
            f"horizon {horizon} hold out {span} of them and something must be left to learn from; "
            "use a shorter horizon, a smaller step or fewer windows"
        )
    covariates = None if inputs is None else _covariates(panel, inputs)
    windows = []
    for number in range(n_windows):
        after = (n_windows - 1 - number) * step
        train, rest = panel.split(horizon + after)
        held_out = rest.split(after)[0] if after else rest
        known = covariates.split(after)[0] if covariates is not None and after else covariates
        windows.append(Window(number, train, held_out, known, _window_seed(seed, number)))
    return windows


def name_models(models: Models) -> dict[str, SequenceModel]:
    """Give every model the name under which it appears in tables."""
    if isinstance(models, Mapping):
        named = {str(name): model for name, model in models.items()}
    else:
        several = [models] if isinstance(models, SequenceModel) else list(models)
        named = {type(model).__name__: model for model in several}
        if len(named) < len(several):
            raise ValueError(
                f"two models of the same class among {[type(m).__name__ for m in several]}; tell "
                "them apart with a dict of name to model"
            )
    if not named:
        raise ValueError("no models were given; pass at least one")
    return named


def forecast_columns(record: Record, level: Sequence[float]) -> pd.DataFrame:
    """Mean and interval columns of one record, NaN where the model failed."""
    if record.forecast is not None:
        frame = replace(record.forecast, model=record.model).to_frame(level)
        return frame.drop(columns=["unique_id", "ds"])
    names = [record.model]
    names += [f"{record.model}-{end}-{lv:g}" for lv in level for end in ("lo", "hi")]
    return pd.DataFrame(np.nan, index=range(_rows(record.window)), columns=names)


def assemble(parts: Sequence[tuple[Record, pd.DataFrame]]) -> pd.DataFrame:
    """Put the columns of `forecast_columns` side by side, one block of rows a window."""
    blocks: dict[int, list[pd.DataFrame]] = {}
    for record, columns in parts:
        block = blocks.setdefault(record.window.number, [])
        if not block:
            block.append(_truth(record.window))
        block.append(columns)
    return pd.concat([pd.concat(block, axis=1) for block in blocks.values()], ignore_index=True)


def note_failures(frame: pd.DataFrame, failures: list[dict[str, Any]]) -> None:
    """Keep the failures in ``frame.attrs`` and warn once, in the name of the caller's caller."""
    frame.attrs["failures"] = failures
    if not failures:
        return
    first = failures[0]
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    warnings.warn(
        f"{first['model']} failed on the window after {first['cutoff']}: {first['error']}{more}; "
        'what it could not give is NaN, see .attrs["failures"]',
        RuntimeWarning,
        stacklevel=3,
    )


def _run_one(
    name: str,
    model: SequenceModel,
    window: Window,
    n_samples: int,
    options: Mapping[str, Any],
    fitted: dict[str, SequenceModel] | None,
) -> Record:
    history = None
    fit_seconds = forecast_seconds = 0.0
    start = time.perf_counter()
    try:
        if fitted is not None and name in fitted:
            active, history = fitted[name], window.train
        else:
            past = None if window.inputs is None else _past(window)
            active = model.clone().fit(window.train, past, seed=window.seed, **options)
            fit_seconds = time.perf_counter() - start
            if fitted is not None:
                fitted[name] = active
        start = time.perf_counter()
        horizon = int(window.held_out.lengths[0])
        forecast = active.forecast(
            horizon, history, window.inputs, n_samples=n_samples, seed=window.seed
        )
        forecast_seconds = time.perf_counter() - start
    except MODEL_ERRORS as error:
        text = f"{type(error).__name__}: {error}"
        return Record(name, window, None, fit_seconds, forecast_seconds, text)
    return Record(name, window, forecast, fit_seconds, forecast_seconds)


def _truth(window: Window) -> pd.DataFrame:
    held = window.held_out
    parts = []
    for n, cutoff in enumerate(window.cutoff):
        ds = held.index[n]
        for d in range(held.n_dims):
            part = {"unique_id": series_name(held, n, d), "ds": ds, "cutoff": cutoff}
            parts.append(pd.DataFrame({**part, "y": held.values[n, : len(ds), d]}))
    return pd.concat(parts, ignore_index=True)


def series_name(panel: Panel, n: int, d: int) -> Any:
    """Name of column `d` of series `n` in long tables, as in `Forecast.to_frame`."""
    if panel.n_dims == 1:
        return panel.ids[n]
    return panel.columns[d] if panel.n_series == 1 else f"{panel.ids[n]}/{panel.columns[d]}"


def _rows(window: Window) -> int:
    return int(window.held_out.lengths.sum()) * window.held_out.n_dims


def _past(window: Window) -> Panel:
    assert window.inputs is not None
    return window.inputs.split(int(window.held_out.lengths[0]))[0]


def _covariates(panel: Panel, inputs: Any) -> Panel:
    known = Panel.of(inputs, name="inputs")
    if known.n_series not in (1, panel.n_series) or (known.lengths != panel.lengths).any():
        raise ValueError(
            f"inputs has {known.n_series} series of {known.lengths.tolist()[:3]} steps, y has "
            f"{panel.n_series} of {panel.lengths.tolist()[:3]}; give one row of inputs for each "
            "step of y"
        )
    return known


def _window_seed(seed: int | None, number: int) -> int | None:
    if seed is None:
        return None
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


@contextmanager
def _progress_bar(show: bool, total: int) -> Iterator[Callable[[str], None]]:
    if not show:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def advance(text: str) -> None:
            bar.update(task, advance=1, description=text)

        yield advance
