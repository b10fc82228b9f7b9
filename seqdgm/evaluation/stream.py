"""Backtests of panels larger than memory: partitioned Parquet in, partitioned Parquet out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from seqdgm.cluster import PARTITION_SIZE, Rows, run_tasks
from seqdgm.evaluation.attempt import Errors
from seqdgm.evaluation.backtest import (
    Models,
    Run,
    assemble,
    failure_rows,
    name_models,
)
from seqdgm.evaluation.checkpoint import Scored, digest_model, digest_settings, note_run
from seqdgm.evaluation.parts import PartTask, Slice, column_names, make_parts
from seqdgm.evaluation.windows import span_of
from seqdgm.fitting import separate
from seqdgm.panel import Panel
from seqdgm.progress import progress_bar
from seqdgm.serialize import write_whole
from seqdgm.types import check_count

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as pads

_KEYS = ("unique_id", "ds")
_BLOCK = 1 << 22
_FAILURE_COLUMNS = ("model", "unique_id", "cutoff", "error")


class Streamed(NamedTuple):
    """Results of `backtest_parquet`, on disk.

    Attributes
    ----------
    forecasts : pyarrow.dataset.Dataset
        The rows of `seqdgm.backtest`, one file a partition, in the order of the series.
    failures : pyarrow.dataset.Dataset
        Columns ``model, unique_id, cutoff, error``, all text: one row a failure. A series that is
        too short or has an infinite value has no rows among the forecasts, and one here for each
        model.
    """

    forecasts: pads.Dataset
    failures: pads.Dataset


class Partition(NamedTuple):
    """Consecutive series of a Parquet source.

    Attributes
    ----------
    number : int
    first, stop : int
        Positions of its series among all.
    skip, rows : int
        Rows to leave out before it in `pieces`, and its own.
    pieces : tuple
        The row groups that hold it, as fragments.
    """

    number: int
    first: int
    stop: int
    skip: int
    rows: int
    pieces: tuple[Any, ...]

    @property
    def data(self) -> None:
        """Each task reads its own."""
        return


@dataclass(frozen=True)
class StreamJob:
    """What all partitions have in common."""

    schema: pa.Schema
    columns: tuple[str, ...]
    inputs: tuple[str, ...]
    options: Mapping[str, Any]
    out: Path


def backtest_parquet(
    models: Models,
    source: str | Path | pads.Dataset,
    horizon: int,
    out: str | Path,
    *,
    seed: int,
    columns: Sequence[str] = ("y",),
    inputs: Sequence[str] = (),
    n_windows: int = 1,
    step: int | None = None,
    refit: bool = True,
    level: Sequence[float] = (80, 95),
    n_samples: int = 1000,
    progress: bool = False,
    fit_options: Mapping[str, Mapping[str, Any]] | None = None,
    errors: Errors = "record",
    cluster: str | None = None,
    partition_size: int = PARTITION_SIZE,
) -> Streamed:
    """Backtest a panel in Parquet files, a partition of its series at a time.

    The result is that of `seqdgm.backtest` on the whole panel with the same `partition_size`, row
    for row. Memory holds one partition a process. An interrupted call goes on where it was:
    partitions that are in `out` are not made again.

    Parameters
    ----------
    models : SequenceModel, list of them, or dict of name to model
        Models that fit each series on its own.
    source : path or pyarrow dataset
        A file, or a folder of files (hive partitions are columns), of the columns ``unique_id``,
        ``ds`` and `columns`, **sorted by unique_id**, over the files in the order of their paths
        too, and by time within a series. A series may run over the end of a row group or a file.
        Row groups much larger than a partition are read once for each partition in them.
    horizon : int
        Steps to forecast from each origin.
    out : path
        Folder for the results; on a cluster every machine must reach it, and `source`, by the same
        path.
    seed : int
        Same seed, same result.
    columns, inputs : sequence of str
        Names of the columns of values and of known covariates.
    n_windows, step, refit, level, n_samples, progress, fit_options, errors, cluster
        As in `seqdgm.backtest`.
    partition_size : int
        Series of a partition.

    Returns
    -------
    Streamed
        ``.forecasts`` and ``.failures``, pyarrow datasets in `out`.

    Raises
    ------
    ValueError
        For series that are not sorted by name, a model that shares its parameters over the panel
        and so needs all of it, missing columns, and an `out` that holds another run.

    Examples
    --------
    >>> import seqdgm as sq
    >>> from seqdgm.evaluation.stream import backtest_parquet
    >>> done = backtest_parquet(
    ...     sq.SeasonalNaive(season=12), "sales/", 12, "forecasts/", seed=0, cluster="ray"
    ... )  # doctest: +SKIP
    >>> done.forecasts.head(5)  # doctest: +SKIP
    """
    named, known = name_models(models), fit_options or {}
    for name, model in named.items():
        if not separate(model, known.get(name, {})):
            raise ValueError(
                f"{name} shares its parameters over the series and needs the whole panel in "
                "memory; use seqdgm.backtest, or a model that fits each series on its own"
            )
    check_count("partition_size", partition_size)
    dataset = _open(source, (*_KEYS, *columns, *inputs))
    options = {
        "horizon": horizon,
        "n_windows": n_windows,
        "step": step,
        "refit": refit,
        "level": tuple(level),
        "n_samples": n_samples,
        "seed": seed,
        "errors": errors,
    }
    folder = Path(out).absolute()
    for name in ("forecasts", "failures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    plan = list(_partitions(dataset, partition_size))
    digests = {
        "models": {name: digest_model(model, known.get(name, {})) for name, model in named.items()},
        "settings": digest_settings(**options, columns=list(columns), inputs=list(inputs)),
        "data": digest_settings(files=_digests(dataset), partition_size=partition_size),
    }
    note_run(folder, "out", digests)
    todo = [one for one in plan if not _target(folder, "forecasts", one.number).is_file()]
    given = {**options, "models": named, "fit_options": known}
    job = StreamJob(dataset.schema, tuple(columns), tuple(inputs), given, folder)
    with progress_bar(progress, len(plan)) as advance:
        advance(len(plan) - len(todo), "")
        results = run_tasks(
            _write_partition, todo, common=job, load=lambda key: None, cluster=cluster
        )
        for one, _ in results:
            advance(1, f"series {one.first + 1} to {one.stop}")
    import pyarrow.dataset as pads

    return Streamed(*(pads.dataset(folder / name) for name in ("forecasts", "failures")))


def _open(source: Any, needed: Sequence[str]) -> pads.Dataset:
    import pyarrow.dataset as pads

    known = isinstance(source, pads.Dataset)
    dataset = source if known else pads.dataset(source, format="parquet", partitioning="hive")
    missing = [name for name in needed if name not in dataset.schema.names]
    if missing:
        raise ValueError(
            f"the Parquet source has no column {missing[0]!r}, only {dataset.schema.names}; "
            "rename its columns, or name them with columns= and inputs="
        )
    return dataset


def _digests(dataset: pads.Dataset) -> list[str]:
    """Digest of the bytes of each file."""
    found = []
    for file in dataset.get_fragments():
        state = hashlib.sha256()
        with file.filesystem.open_input_stream(file.path) as stream:
            while block := stream.read(_BLOCK):
                state.update(block)
        found.append(state.hexdigest())
    return found


def _partitions(dataset: pads.Dataset, size: int) -> Iterator[Partition]:
    """Cut the source between series; one pass over the names, a row group at a time."""
    number, n_series, last = 0, 0, None
    pieces: list[Any] = []
    skip = rows = 0
    for piece in (group for file in dataset.get_fragments() for group in file.split_by_row_group()):
        ids = _names(dataset, piece)
        # Where another series begins: the rows of this piece before which the name changes.
        starts = np.flatnonzero(ids[1:] != ids[:-1]) + 1
        if len(ids) and (last is None or ids[0] != last):
            starts = np.concatenate([[0], starts])
        before = 0
        for start in starts:
            name = ids[start]
            previous = ids[start - 1] if start else last
            if previous is not None and not previous < name:
                raise ValueError(
                    f"series {name!r} comes after {previous!r} in {piece.path!r}: the Parquet "
                    "source must be sorted by unique_id, over all files in the order of their "
                    "paths, so that the rows of a series stand together; sort it and write it again"
                )
            if n_series and n_series % size == 0:
                taken = [*pieces, piece] if start > before else pieces
                own = rows + int(start) - before
                yield Partition(number, number * size, n_series, skip, own, tuple(taken))
                number, pieces, rows, skip, before = number + 1, [], 0, int(start), int(start)
            n_series += 1
        if len(ids):
            pieces.append(piece)
            rows += len(ids) - before
            last = ids[-1]
    if not n_series:
        raise ValueError("the Parquet source holds no rows; give at least one series")
    yield Partition(number, number * size, n_series, skip, rows, tuple(pieces))


def _names(dataset: pads.Dataset, piece: Any) -> np.ndarray:
    column = piece.to_table(schema=dataset.schema, columns=["unique_id"]).column(0)
    if column.null_count:
        raise ValueError(f"{piece.path!r} has rows without unique_id; name their series, or drop")
    names: np.ndarray = column.to_pandas().to_numpy(dtype=object)
    return names


def _write_partition(job: StreamJob, data: None, part: Partition) -> None:
    """Backtest one partition and write its files; it counts once its forecasts are there."""
    import pyarrow as pa

    names = [*_KEYS, *job.columns, *job.inputs]
    tables = [piece.to_table(schema=job.schema, columns=names) for piece in part.pieces]
    frame = pa.concat_tables(tables).slice(part.skip, part.rows).to_pandas()
    refused = _unusable(frame, job) if job.options["errors"] == "record" else {}
    used = frame[~frame["unique_id"].isin(list(refused))] if refused else frame
    rows = [
        {"model": model, "unique_id": name, "cutoff": None, "error": error}
        for name, error in refused.items()
        for model in job.options["models"]
    ]
    if len(used):
        found, failed = _backtest(job, used, part)
        rows += failed
    else:
        found = _no_forecasts(frame, job)
    lost = pd.DataFrame(rows, columns=list(_FAILURE_COLUMNS))
    texts = lost.astype(object).where(lost.notna(), None).map(_text)
    schema = pa.schema([(name, pa.string()) for name in _FAILURE_COLUMNS])
    table = pa.Table.from_pandas(texts, schema=schema, preserve_index=False)
    _write(table, _target(job.out, "failures", part.number))
    forecasts = pa.Table.from_pandas(found, preserve_index=False)
    _write(forecasts, _target(job.out, "forecasts", part.number))


def _backtest(
    job: StreamJob, frame: pd.DataFrame, part: Partition
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Forecasts and failures of the series in `frame`."""
    panel = Panel.of(frame[[*_KEYS, *job.columns]])
    inputs = Panel.of(frame[[*_KEYS, *job.inputs]], name="inputs") if job.inputs else None
    run = Run(
        panel=panel,
        inputs=inputs,
        progress=False,
        cache=None,
        cluster=None,
        partition_size=max(panel.n_series, 1),
        **job.options,
    )
    nothing = pd.DataFrame()
    common = run.job(lambda record: Scored(nothing, nothing, nothing))
    numbers = tuple(window.number for window in run.windows)
    own = Slice(panel, run.windows[-1].inputs, part.first)
    rows = Rows(part.first, part.stop)
    made = [make_parts(common, own, PartTask(name, rows, numbers)) for name in run.models]
    parts = [one._replace(first=0) for of_model in made for one in of_model]
    return assemble(run, parts), failure_rows(run, parts)


def _unusable(frame: pd.DataFrame, job: StreamJob) -> dict[Any, str]:
    """Series that no model can be given, and why."""
    span = span_of(*(job.options[name] for name in ("horizon", "n_windows", "step")))
    names = frame["unique_id"]
    values = frame[[*job.columns, *job.inputs]].to_numpy(dtype=float)
    infinite = np.isinf(values).any(axis=1)
    found = {name: "a value is infinite" for name in names[infinite].unique()}
    lengths = names.groupby(names, observed=True).size()
    for name, length in lengths[lengths <= span].items():
        found[name] = f"{length} steps are too few where {span} are held out"
    return found


def _no_forecasts(frame: pd.DataFrame, job: StreamJob) -> pd.DataFrame:
    """Return the table of forecasts without rows."""
    none = frame.iloc[:0]
    names = ["y"]
    for model in job.options["models"]:
        names += column_names(model, job.options["level"])
    head = none[list(_KEYS)].assign(cutoff=none["ds"])
    return head.assign(**{name: pd.Series(dtype=float) for name in names})


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _write(table: pa.Table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    payload = pa.BufferOutputStream()
    pq.write_table(table, payload)
    write_whole(path, payload.getvalue().to_pybytes())


def _target(folder: Path, name: str, number: int) -> Path:
    return folder / name / f"part-{number:08d}.parquet"
