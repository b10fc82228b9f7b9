"""Tasks of a backtest: one model on some series and windows, and the parts they give, joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seqdgm.cluster import Rows
from seqdgm.evaluation.attempt import Errors, Failure, Fitted, Record, attempt
from seqdgm.evaluation.checkpoint import Part, Scored
from seqdgm.evaluation.traces import thin
from seqdgm.evaluation.windows import Window, cut_windows
from seqdgm.inference import warm_up
from seqdgm.model import SequenceModel
from seqdgm.panel import Panel


class PartTask(NamedTuple):
    """One model on the series `data` and the windows of these numbers."""

    model: str
    data: Rows
    numbers: tuple[int, ...]


class Slice(NamedTuple):
    """Data of some series: with `first`, the position of the first among all."""

    panel: Panel
    inputs: Panel | None
    first: int


@dataclass(frozen=True)
class Job:
    """What all tasks of a run have in common; `score` makes a `Scored` of a record."""

    models: Mapping[str, SequenceModel]
    fit_options: Mapping[str, Mapping[str, Any]]
    horizon: int
    n_windows: int
    step: int | None
    refit: bool
    level: tuple[float, ...]
    n_samples: int
    seed: int | None
    errors: Errors
    score: Callable[[Record], Scored]


def make_parts(job: Job, data: Slice, task: PartTask) -> list[Part]:
    """Carry out a task: a `Part` for each of its windows."""
    model = job.models[task.model]
    warm_up(model)  # or the first window would be charged for imports and compilation
    windows = _windows(job, data)
    fitted: dict[str, list[Fitted]] | None = None if job.refit else {}
    options = job.fit_options.get(task.model, {})
    records = (
        attempt(task.model, model, windows[number], job.n_samples, options, fitted, job.errors)
        for number in task.numbers
    )
    return [_part(job, record) for record in records]


def lost_parts(job: Job, data: Slice, task: PartTask, error: str) -> list[Part]:
    """Return the parts of a task that could not be carried out: everything NaN, and the error."""
    windows, failures = _windows(job, data), (Failure(None, error),)
    records = (
        Record(task.model, windows[number], None, 0.0, 0.0, failures=failures)
        for number in task.numbers
    )
    return [_part(job, record) for record in records]


def _windows(job: Job, data: Slice) -> list[Window]:
    return cut_windows(
        data.panel, job.horizon, job.n_windows, job.step, data.inputs, job.seed, data.first
    )


def _part(job: Job, record: Record) -> Part:
    scored = job.score(record)
    return Part(
        record.model,
        record.window.number,
        forecast_columns(record, job.level),
        scored.scores,
        scored.pit,
        scored.traces,
        (*record.failures, *scored.failures),
        record.fit_seconds,
        record.forecast_seconds,
        record.peak_mb,
        record.window.first,
        record.forecast is None,
    )


def forecast_columns(record: Record, level: Sequence[float]) -> pd.DataFrame:
    """Mean and interval columns of one record, NaN where the model failed."""
    if record.forecast is not None:
        frame = replace(record.forecast, model=record.model).to_frame(level)
        return frame.drop(columns=["unique_id", "ds"])
    names = column_names(record.model, level)
    held = record.window.held_out
    return pd.DataFrame(np.nan, index=range(int(held.lengths.sum()) * held.n_dims), columns=names)


def column_names(model: str, level: Sequence[float]) -> list[str]:
    """Columns of a model: its mean and the ends of its intervals."""
    return [model, *(f"{model}-{end}-{lv:g}" for lv in level for end in ("lo", "hi"))]


def join_parts(parts: Sequence[Part], n_series: int) -> Part:
    """One part of all series out of those of some, in any order."""
    parts = sorted(parts, key=lambda part: part.first)
    if len(parts) == 1:
        return parts[0]
    stops = [*(part.first for part in parts[1:]), n_series]
    return parts[0]._replace(
        columns=_stacked([part.columns for part in parts]),
        scores=_stacked([part.scores for part in parts]),
        pit=_stacked([part.pit for part in parts]),
        traces=thin([(part.first, part.traces) for part in parts]),
        failures=_failures(parts, stops),
        fit_seconds=sum(part.fit_seconds for part in parts),
        forecast_seconds=sum(part.forecast_seconds for part in parts),
        peak_mb=max(part.peak_mb for part in parts),
    )


def _stacked(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True)


def _failures(parts: Sequence[Part], stops: Sequence[int]) -> tuple[Failure, ...]:
    """Failures by position among all series; of all series only where every part says the same."""
    whole = [{one.error for one in part.failures if one.series is None} for part in parts]
    common = set.intersection(*whole)
    found = [Failure(None, text) for text in sorted(common)]
    for part, stop in zip(parts, stops, strict=True):
        for series, text in part.failures:
            if series is not None:
                found.append(Failure(part.first + series, text))
            elif text not in common:
                found += [Failure(n, text) for n in range(part.first, stop)]
    return tuple(found)
