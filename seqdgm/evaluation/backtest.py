"""Rolling-origin evaluation: fit on the past, forecast the next steps, move on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from seqdgm.cluster import PARTITION_SIZE, Rows, partitions, run_tasks
from seqdgm.evaluation.attempt import MODEL_ERRORS, Errors, Record
from seqdgm.evaluation.checkpoint import (
    Checkpoint,
    Part,
    Scored,
    digest_model,
    digest_panel,
    digest_settings,
)
from seqdgm.evaluation.parts import (
    Job,
    PartTask,
    Slice,
    column_names,
    join_parts,
    lost_parts,
    make_parts,
)
from seqdgm.evaluation.windows import TRUTH_COLUMNS, Window, cut_windows, series_name
from seqdgm.fitting import separate
from seqdgm.model import SequenceModel
from seqdgm.panel import Panel
from seqdgm.progress import progress_bar
from seqdgm.types import check_count

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
    cluster: str | None = None,
    partition_size: int = PARTITION_SIZE,
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
        settings, or another model of the same name are refused; a model is known by its class, its
        hyperparameters and, for a class that is not of this package, the source of the class. A
        window on which a model failed for every series is not kept. With ``refit=False`` the
        windows of a model share its fit, and are kept or repeated together.
    cluster : str, optional
        Where the work is done: None in this process; ``"ray"`` on the Ray cluster that is there or
        on this machine; or the address of one, as ``"ray://host:10001"``. The tasks, and so the
        result, are the same anywhere. Needs ``pip install 'seqdgm[cluster]'``.
    partition_size : int
        Series of a task, for models that fit each series on its own; other models take the panel
        whole. The random numbers of a series depend on it, nothing else does.

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
        cluster=cluster,
        partition_size=partition_size,
    )
    nothing = pd.DataFrame()
    parts = run_parts(run, lambda record: Scored(nothing, nothing, nothing))
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
    cluster: str | None
    partition_size: int
    windows: list[Window] = field(init=False)

    def __post_init__(self) -> None:
        """Check what no later step does, and cut the windows."""
        unknown = sorted(set(self.fit_options) - set(self.models))
        if unknown:
            raise ValueError(f"fit_options names {unknown}, but the models are {list(self.models)}")
        self._check_names()
        check_count("n_samples", self.n_samples)
        if self.errors not in get_args(Errors):
            raise ValueError(f"errors={self.errors!r} is unknown; choose 'record' or 'raise'")
        if self.cache is not None and self.seed is None:
            raise ValueError(
                "cache needs a seed: without one a continued run is not the run that began; pass "
                "seed=0, say"
            )
        check_count("partition_size", self.partition_size)
        windows = cut_windows(
            self.panel, self.horizon, self.n_windows, self.step, self.inputs, self.seed
        )
        object.__setattr__(self, "windows", windows)

    def _check_names(self) -> None:
        """Refuse names of models whose columns would take each other's place."""
        taken = dict.fromkeys(TRUTH_COLUMNS, "what is held out")
        for name in self.models:
            for column in column_names(name, self.level):
                if column in taken:
                    raise ValueError(
                        f"the column {column!r} of model {name!r} is also one of {taken[column]}; "
                        "give the model another name"
                    )
                taken[column] = f"model {name!r}"

    def partitions(self, name: str) -> list[Rows]:
        """Take the series apart where the named model fits each on its own."""
        n = self.panel.n_series
        split = separate(self.models[name], self.fit_options.get(name, {}))
        return partitions(n, self.partition_size if split else n)

    def slice(self, rows: Rows) -> Slice:
        """Return the data of some series."""
        panel, inputs = self.panel, self.windows[-1].inputs
        if rows.stop - rows.first < panel.n_series:
            places = list(range(*rows))
            panel = panel.select(places)
            if inputs is not None and inputs.n_series > 1:
                inputs = inputs.select(places)
        return Slice(panel, inputs, rows.first)

    def job(self, score: Callable[[Record], Scored]) -> Job:
        """Return what all tasks have in common."""
        names = ["models", "fit_options", "horizon", "n_windows", "step", "refit", "level"]
        names += ["n_samples", "seed", "errors"]
        return Job(**{name: getattr(self, name) for name in names}, score=score)

    def checkpoint(self, **settings: Any) -> Checkpoint | None:
        """Open the cache; `settings` are what the caller's parts depend on besides the run's."""
        if self.cache is None:
            return None
        names = ("horizon", "n_windows", "step", "refit", "level", "n_samples", "seed")
        common = {name: getattr(self, name) for name in names}
        if self.panel.n_series > self.partition_size:
            common["partition_size"] = self.partition_size
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


def run_parts(run: Run, score: Callable[[Record], Scored], **settings: Any) -> list[Part]:
    """Return a `Part` for each window and model, oldest window first.

    `score` makes of a record what is kept beside the forecast, and says what of it failed, so that
    the draws, many times the size of what is kept of them, go before the next ones are made;
    `settings` are what it depends on. Locally and on a cluster the same tasks are carried out.
    """
    checkpoint = run.checkpoint(**settings)
    found: dict[tuple[str, int], list[Part]] = {
        (name, window.number): [] for window in run.windows for name in run.models
    }
    tasks = []
    for name in run.models:
        for rows in run.partitions(name):
            held = [] if checkpoint is None else _finished(run, checkpoint, name, rows)
            for part in held:
                found[name, part.number].append(part)
            done = {part.number for part in held}
            left = tuple(window.number for window in run.windows if window.number not in done)
            # Without refit the windows share a fit, and so a task.
            groups = [(number,) for number in left] if run.refit else [left] if left else []
            tasks += [PartTask(name, rows, numbers) for numbers in groups]
    tasks.sort(key=lambda task: (task.data.first, task.numbers[0]))
    held_back = sum(map(len, found.values()))
    total = held_back + sum(len(task.numbers) for task in tasks)
    with progress_bar(run.progress, total) as advance:
        advance(held_back, "")
        results = run_tasks(
            make_parts,
            tasks,
            common=run.job(score),
            load=run.slice,
            cluster=run.cluster,
            lost=lost_parts if run.errors == "record" else None,
        )
        for task, parts in results:
            for part in parts:
                # A model that failed altogether is tried again: it may have lacked memory.
                if checkpoint is not None and not part.lost:
                    checkpoint.save(part)
                found[task.model, part.number].append(part)
            advance(len(parts), f"{task.model}, window {task.numbers[-1] + 1} of {run.n_windows}")
    return [join_parts(parts, run.panel.n_series) for parts in found.values()]


def _finished(run: Run, checkpoint: Checkpoint, name: str, rows: Rows) -> list[Part]:
    """The parts of some series that are kept; without refit all windows or none."""
    parts = [checkpoint.load(name, window.number, rows.first) for window in run.windows]
    return [part for part in parts if part is not None] if run.refit or all(parts) else []


def name_models(models: Models) -> dict[str, SequenceModel]:
    """Give every model the name under which it appears in tables."""
    if isinstance(models, Mapping):
        named = {str(name): model for name, model in models.items()}
        if len(named) < len(models):
            raise ValueError(
                f"two of the names {list(models)} are the same as text; names tell models apart"
            )
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
