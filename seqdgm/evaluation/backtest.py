"""Rolling-origin evaluation: fit on the past, forecast the next steps, move on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from seqdgm.evaluation.attempt import MODEL_ERRORS, Errors, Fitted, Record, attempt
from seqdgm.evaluation.checkpoint import (
    Checkpoint,
    Part,
    Scored,
    digest_model,
    digest_panel,
    digest_settings,
)
from seqdgm.evaluation.windows import Window, cut_windows, series_name
from seqdgm.inference import warm_up
from seqdgm.model import SequenceModel
from seqdgm.panel import Panel

__all__ = [
    "MODEL_ERRORS",
    "Models",
    "Run",
    "backtest",
    "cut_windows",
    "name_models",
    "run_parts",
    "series_name",
]

Models = SequenceModel | Sequence[SequenceModel] | Mapping[str, SequenceModel]


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
    errors: Errors = "record",
    cache: str | Path | None = None,
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
    errors : {"record", "raise"}
        What a failing model does: leave NaN and a note, or end the backtest. Where each series
        has a fit of its own the others of the panel are fitted without the failing one.
    cache : path, optional
        Folder in which each finished model and window is kept (Parquet), and from which the same
        call goes on after an interruption; needs a `seed`. Models may be added. Other data, other
        settings, or another model of the same name are refused. With ``refit=False`` the windows
        of a model share its fit, and are kept or repeated together.

    Returns
    -------
    DataFrame
        Columns ``unique_id, ds, cutoff, y``, then ``<name>, <name>-lo-80, <name>-hi-80, ...`` for
        each model; one row for each series, window and step. Where a model failed its columns are
        NaN, a `RuntimeWarning` says so, and ``.attrs["failures"]`` lists model, unique_id (None:
        all series), cutoff (of that series, or the first) and error.

    Raises
    ------
    ValueError
        For a series too short for the windows, names that do not tell the models apart, or a
        cache that holds another run.

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
    run = Run(
        name_models(models),
        Panel.of(y),
        horizon,
        n_windows=n_windows,
        step=step,
        refit=refit,
        inputs=inputs,
        level=tuple(level),
        n_samples=n_samples,
        seed=seed,
        progress=progress,
        fit_options=fit_options or {},
        errors=errors,
        cache=cache,
    )
    nothing = pd.DataFrame()
    parts = list(run_parts(run, lambda record: Scored(nothing, nothing, nothing)))
    frame = assemble(run, parts)
    note_failures(frame, failure_rows(run, parts))
    return frame


@dataclass(frozen=True)
class Run:
    """The arguments of `backtest`, checked, and the windows they cut."""

    models: Mapping[str, SequenceModel]
    panel: Panel
    horizon: int
    n_windows: int
    step: int | None
    refit: bool
    inputs: Any
    level: tuple[float, ...]
    n_samples: int
    seed: int | None
    progress: bool
    fit_options: Mapping[str, Mapping[str, Any]]
    errors: Errors
    cache: str | Path | None
    windows: list[Window] = field(init=False)

    def __post_init__(self) -> None:
        """Check what no later step does, and cut the windows."""
        unknown = sorted(set(self.fit_options) - set(self.models))
        if unknown:
            raise ValueError(f"fit_options names {unknown}, but the models are {list(self.models)}")
        if self.errors not in get_args(Errors):
            raise ValueError(f"errors={self.errors!r} is unknown; choose 'record' or 'raise'")
        if self.cache is not None and self.seed is None:
            raise ValueError(
                "cache needs a seed: without one a continued run is not the run that began; pass "
                "seed=0, say"
            )
        windows = cut_windows(
            self.panel, self.horizon, self.n_windows, self.step, self.inputs, self.seed
        )
        object.__setattr__(self, "windows", windows)

    def checkpoint(self, **settings: Any) -> Checkpoint | None:
        """Open the cache; `settings` are what the caller's parts depend on besides the run's."""
        if self.cache is None:
            return None
        names = ("horizon", "n_windows", "step", "refit", "level", "n_samples", "seed")
        common = {name: getattr(self, name) for name in names}
        inputs = self.windows[-1].inputs
        return Checkpoint(
            self.cache,
            data=digest_settings(y=digest_panel(self.panel), inputs=digest_panel(inputs)),
            settings=digest_settings(**common, **settings),
            models={
                name: digest_model(model, self.fit_options.get(name, {}))
                for name, model in self.models.items()
            },
        )


def run_parts(
    run: Run,
    score: Callable[[Record], Scored],
    **settings: Any,
) -> Iterator[Part]:
    """Yield a `Part` for each window and model, oldest window first.

    A generator, so that a forecast can be scored and let go before the next one is made: its draws
    are many times the size of what is kept of it. `score` makes of a record what is kept beside
    the forecast, and says what of it failed; `settings` are what it depends on.
    """
    checkpoint = run.checkpoint(**settings)
    finished = {} if checkpoint is None else _finished(run, checkpoint)
    for name, model in run.models.items():
        if any((name, window.number) not in finished for window in run.windows):
            warm_up(model)  # or the first model would be charged for imports and compilation
    fitted: dict[str, list[Fitted]] | None = None if run.refit else {}
    with _progress_bar(run.progress, len(run.models) * run.n_windows) as advance:
        for window in run.windows:
            for name, model in run.models.items():
                advance(f"{name}, window {window.number + 1} of {run.n_windows}")
                if (name, window.number) in finished:
                    yield finished[name, window.number]
                    continue
                options = run.fit_options.get(name, {})
                record = attempt(name, model, window, run.n_samples, options, fitted, run.errors)
                scored = score(record)
                part = Part(
                    name,
                    window.number,
                    forecast_columns(record, run.level),
                    scored.scores,
                    scored.pit,
                    scored.traces,
                    (*record.failures, *scored.failures),
                    record.fit_seconds,
                    record.forecast_seconds,
                    record.peak_mb,
                )
                if checkpoint is not None:
                    checkpoint.save(part)
                yield part


def _finished(run: Run, checkpoint: Checkpoint) -> dict[tuple[str, int], Part]:
    found = {}
    for name in run.models:
        parts = [checkpoint.load(name, window.number) for window in run.windows]
        if run.refit or all(parts):
            found.update({(name, part.number): part for part in parts if part is not None})
    return found


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
    held = record.window.held_out
    return pd.DataFrame(np.nan, index=range(int(held.lengths.sum()) * held.n_dims), columns=names)


def assemble(
    run: Run, parts: Sequence[Part], what: Literal["columns", "pit"] = "columns"
) -> pd.DataFrame:
    """Put the columns of the models side by side, one block of rows a window."""
    blocks = []
    for window in run.windows:
        columns = [getattr(part, what) for part in parts if part.number == window.number]
        blocks.append(pd.concat([window.truth(), *columns], axis=1))
    return pd.concat(blocks, ignore_index=True)


def failure_rows(run: Run, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Rows of the list of failures: model, unique_id (None: all series), cutoff, error."""
    rows = []
    for part in parts:
        cutoff = run.windows[part.number].cutoff
        for n, error in part.failures:
            name = None if n is None else run.panel.ids[n]
            row = {"model": part.model, "unique_id": name, "cutoff": cutoff[n or 0]}
            rows.append({**row, "error": error})
    return rows


def note_failures(frame: pd.DataFrame, failures: list[dict[str, Any]]) -> None:
    """Keep the failures in ``frame.attrs`` and warn once, in the name of the caller's caller."""
    frame.attrs["failures"] = failures
    if not failures:
        return
    first = failures[0]
    whom = "" if first["unique_id"] is None else f" for series {first['unique_id']!r}"
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    warnings.warn(
        f"{first['model']} failed on the window after {first['cutoff']}{whom}: "
        f'{first["error"]}{more}; what it could not give is NaN, see .attrs["failures"]',
        RuntimeWarning,
        stacklevel=3,
    )


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
