"""What is kept of fitted models: the curves of their training, and their smoothed states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from seqdgm.evaluation.attempt import MODEL_ERRORS, Failure, Fitted, Record
from seqdgm.evaluation.checkpoint import Part
from seqdgm.inference import offers

if TYPE_CHECKING:
    from seqdgm.evaluation.backtest import Run

MAX_SERIES = 8  # whose states are kept, evenly chosen
MAX_STATES = 8  # the first of each model
MAX_STEPS = 300  # the last of each series' history, and points of a training curve
# Steps that are smoothed in all, and of one series: a state of dimension Z costs Z^2 numbers each.
MAX_SMOOTHED = 20_000
_N_PATHS = 200  # of a Monte-Carlo smoother

_COLUMNS = {
    "kind": "str",
    "series": "int64",
    "name": "str",
    "step": "int64",
    "value": "float64",
    "std": "float64",
}


def trace(record: Record, *, states: bool) -> tuple[pd.DataFrame, tuple[Failure, ...]]:
    """Keep the training curves of a record, and its states where `states` says so.

    Returns
    -------
    DataFrame
        ``kind, series, name, step, value, std``. Kind ``"objective"`` and ``"validation"``: value
        after an iteration, counted from 1, the unit as the name; ``"kept"``: the iteration whose
        weights were kept. Kind ``"smoothed"`` and ``"predicted"``: moments of the named state at a
        step of the series, counted from 0. Models that no engine smooths have none.
    tuple of Failure
        What could not be smoothed.
    """
    frames = [pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in _COLUMNS.items()})]
    failures: list[Failure] = []
    if record.fitted and record.fit_seconds > 0:
        frames += _training(max(record.fitted, key=lambda one: len(one.rows)))
    history = record.window.train
    if states and record.forecast is not None and history.n_steps <= MAX_SMOOTHED:
        chosen = evenly(history.n_series, min(MAX_SERIES, MAX_SMOOTHED // history.n_steps))
        for one in record.fitted:
            rows = [n for n in one.rows if n in chosen]
            try:
                if rows and offers(one.model, "smooth"):
                    frames += _states(record, one, rows)
            except MODEL_ERRORS as error:
                failures.append(Failure(None, f"states: {type(error).__name__}: {error}"))
    return pd.concat(frames, ignore_index=True).astype(_COLUMNS), tuple(failures)


def evenly(n: int, most: int) -> list[int]:
    """Positions of at most `most` (and at least one) of `n` things, the first and last among them.

    Examples
    --------
    >>> evenly(10, 4)
    [0, 3, 6, 9]
    """
    return np.unique(np.linspace(0, n - 1, min(n, max(most, 1))).round().astype(int)).tolist()


def thin(traces: Sequence[tuple[int, pd.DataFrame]]) -> pd.DataFrame:
    """Join the traces of parts of a panel, each with the position of its first series.

    As in `trace`, one training curve (of the first part that has one) and the
    states of `MAX_SERIES` series; whatever else is kept of a series is kept.
    """
    curves: list[pd.DataFrame] = []
    states: list[pd.DataFrame] = []
    for first, frame in traces:
        if frame.empty:
            continue
        own = frame["series"] >= 0
        states.append(frame[own].assign(series=frame.loc[own, "series"] + first))
        if not curves and not own.all():
            curves.append(frame[~own])
    if not states:
        return traces[0][1]
    held = pd.concat(states, ignore_index=True)
    drawn = held["kind"].isin(["smoothed", "predicted"])
    known = np.sort(held.loc[drawn, "series"].unique())
    chosen = known[evenly(len(known), MAX_SERIES)] if len(known) else known
    return pd.concat([*curves, held[~drawn | held["series"].isin(chosen)]], ignore_index=True)


def training_table(parts: Sequence[Part]) -> pd.DataFrame:
    """Curves of all parts: ``model, window, curve, unit, iteration, value``."""
    blocks = []
    for part in parts:
        curves = part.traces[part.traces["kind"].isin(["objective", "validation", "kept"])]
        columns = {"model": part.model, "window": part.number, "curve": curves["kind"]}
        columns |= {"unit": curves["name"], "iteration": curves["step"], "value": curves["value"]}
        blocks.append(pd.DataFrame(columns))
    return pd.concat(blocks, ignore_index=True)


def states_table(run: Run, parts: Sequence[Part]) -> pd.DataFrame:
    """States of all parts: ``model, unique_id, ds, kind, state, mean, std``."""
    blocks = []
    for part in parts:
        kept = part.traces[part.traces["kind"].isin(["smoothed", "predicted"])]
        for n in kept["series"].unique():
            own = kept[kept["series"] == n]
            columns: dict[str, Any] = {
                "model": part.model,
                "unique_id": run.panel.ids[n],
                "ds": run.panel.index[n][own["step"].to_numpy()],
                "kind": own["kind"].to_numpy(),
                "state": own["name"].to_numpy(),
                "mean": own["value"].to_numpy(),
                "std": own["std"].to_numpy(),
            }
            blocks.append(pd.DataFrame(columns))
    if not blocks:
        names = ["model", "unique_id", "ds", "kind", "state", "mean", "std"]
        return pd.DataFrame(columns=names)
    return pd.concat(blocks, ignore_index=True)


def _training(one: Fitted) -> Iterator[pd.DataFrame]:
    report = one.model.fit_report_
    if report is None or len(report.objective) < 2:
        return
    unit = "nats a step" if report.best_epoch is not None else "nats"
    count = len(report.objective)
    valid = report.valid_epochs or range(1, len(report.valid_objective) + 1)
    yield _curve("objective", unit, range(1, count + 1), report.objective)
    yield _curve("validation", unit, valid, report.valid_objective)
    if report.best_epoch is not None:
        yield _curve("kept", unit, [report.best_epoch], [np.nan])


def _curve(kind: str, unit: str, steps: Sequence[int], values: Sequence[float]) -> pd.DataFrame:
    places = evenly(len(values), MAX_STEPS) if len(values) else []
    step = np.asarray(steps, dtype=np.int64)[places]
    value = np.asarray(values, dtype=float)[places]
    return pd.DataFrame(
        {"kind": kind, "series": -1, "name": unit, "step": step, "value": value, "std": np.nan}
    )


def _states(record: Record, one: Fitted, rows: list[int]) -> Iterator[pd.DataFrame]:
    window = record.window.select(rows)
    # Told apart by name, so that some series of an array find their parameters among all.
    history = replace(window.train, container="panel")
    smoothed = one.model.smooth(history, window.past_inputs, n_particles=_N_PATHS, seed=window.seed)
    assert record.forecast is not None
    future = record.forecast.states
    for k, name in enumerate(smoothed.names[:MAX_STATES]):
        for place, n in enumerate(rows):
            length = int(window.train.lengths[place])
            steps = np.arange(max(length - MAX_STEPS, 0), length)
            mean, std = smoothed.mean[place, steps, k], smoothed.std[place, steps, k]
            yield _moments("smoothed", n, name, steps, mean, std)
            if name in future.names:
                j = future.names.index(name)
                mean, std = future.mean[n, :, j], future.std[n, :, j]
                yield _moments("predicted", n, name, length + np.arange(len(mean)), mean, std)


def _moments(
    kind: str, n: int, name: str, steps: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> pd.DataFrame:
    return pd.DataFrame(
        {"kind": kind, "series": n, "name": name, "step": steps, "value": mean, "std": std}
    )
