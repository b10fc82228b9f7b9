"""Text formats, a small function each: tables, competitions, `.tsf`, `.ts` and lists of numbers.

Every reader takes the verified files and the options of the registry, and returns `Parts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

KEYS = 88
LOWEST_NOTE = 21


@dataclass(frozen=True, eq=False)
class Parts:
    """What a reader found; `load` cuts `y` where the file says nothing of parts."""

    y: Any
    train: Any = None
    valid: Any = None
    test: Any = None
    inputs: Any = None
    states: Any = None
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


def shipped(paths: Sequence[Path], freq: str | None) -> Parts:
    """CSV with a time column `ds`, and value columns or `unique_id, ds, y`."""
    table = pd.read_csv(paths[0])
    ds = table["ds"] if freq is None else _dates(table["ds"])
    if "unique_id" in table.columns:
        return Parts(table.assign(ds=ds, y=table["y"].astype("float64")))
    wide = table.drop(columns="ds").astype("float64")
    # Either constructor refuses time stamps that leave a gap.
    wide.index = (
        pd.RangeIndex(ds.iloc[0], ds.iloc[-1] + 1, name="ds")
        if freq is None
        else pd.DatetimeIndex(ds, freq=freq, name="ds")
    )
    return Parts(_narrow(wide))


def dated(paths: Sequence[Path], freq: str) -> Parts:
    """CSV, perhaps compressed, with a column `date` and a value column for each dimension."""
    table = pd.read_csv(paths[0])
    index = pd.DatetimeIndex(pd.to_datetime(table.pop("date")), freq=freq, name="ds")
    return Parts(table.astype("float64").set_index(index))


def numbers(paths: Sequence[Path], freq: str | None, columns: Sequence[str]) -> Parts:
    """Numbers without header or dates, a row a step, separated by commas."""
    table = pd.read_csv(paths[0], header=None, names=[*columns], skipinitialspace=True)
    return Parts(_narrow(_counted(table)))


def r_table(
    paths: Sequence[Path],
    freq: str | None,
    time: str = "time",
    start: str | None = None,
    columns: Sequence[str] | None = None,
) -> Parts:
    """CSV of an R series: perhaps row names and a time column in decimal years, then the values.

    A file without a time column takes its first date from `start`. An empty cell is missing.
    """
    table = pd.read_csv(paths[0])
    stamps = table[time] if time in table.columns else None
    wanted = (
        table[[*columns]] if columns else table.drop(columns=["rownames", time], errors="ignore")
    )
    if freq is None:
        return Parts(_narrow(_counted(wanted)))
    if start is None and stamps is not None:
        year, part = divmod(float(stamps.iloc[0]), 1)
        start = f"{int(year)}-{round(12 * part) + 1:02d}-01"
    index = pd.date_range(str(start), periods=len(wanted), freq=freq, name="ds")
    return Parts(_narrow(wanted.astype("float64").set_index(index)))


def competition(paths: Sequence[Path], freq: str | None, period: str) -> Parts:
    """JSON by series id, lists in every field: `period`, `x` (training) and `xx` (held out)."""
    table = json.loads(paths[0].read_text("utf-8"))
    rows = {name: row for name, row in table.items() if row["period"][0].lower() == period}
    return _panel(list(rows), [row["x"] for row in rows.values()], [r["xx"] for r in rows.values()])


def m4(paths: Sequence[Path], freq: str | None) -> Parts:
    """Two CSVs, training and test: an id in column V1, values, empty cells to the right."""
    train, test = (pd.read_csv(path, index_col="V1") for path in paths)
    if not train.index.equals(test.index):
        raise ValueError(f"{paths[0].name} and {paths[1].name} do not have the same series")
    x, held = ([row[~np.isnan(row)] for row in part.to_numpy(float)] for part in (train, test))
    return _panel(train.index.tolist(), x, held)


def tsf(paths: Sequence[Path], freq: str | None) -> Parts:
    """Monash `.tsf`: a header of @-lines, then `name:start:values` a line; `?` is missing.

    Latin-1, because descriptions hold bytes that are not UTF-8; any line ends.
    """
    lines = iter(paths[0].read_text("latin-1").splitlines())
    for line in lines:
        if line.strip().lower() == "@data":
            break
    names, starts, values = [], [], []
    for line in filter(None, map(str.strip, lines)):
        name, start, cells = line.split(":")
        names.append(name)
        starts.append(start)
        values.append([np.nan if cell == "?" else float(cell) for cell in cells.split(",")])
    if not names:
        raise ValueError(f"{paths[0].name} has no series after @data")
    stamps = [_stamps(start, len(row), freq) for start, row in zip(starts, values, strict=True)]
    if len(names) == 1:
        return Parts(pd.Series(values[0], stamps[0], name=names[0]))
    table = _long(names, np.zeros(len(names), int), values)
    return Parts(table.assign(ds=np.concatenate([index.to_numpy() for index in stamps])))


@lru_cache(maxsize=64)
def _stamps(start: str, length: int, freq: str | None) -> pd.DatetimeIndex:
    """Time stamps from a start such as ``2012-01-01 00-00-00``; most series share theirs."""
    day, _, clock = start.partition(" ")
    first = pd.Timestamp(f"{day} {clock.replace('-', ':')}")
    index = pd.date_range(first, periods=length, freq=freq, name="ds")
    if index[0] != first:
        raise ValueError(f"a series starts at {first}, which is no step of frequency {freq}")
    return index


def ts(paths: Sequence[Path], freq: str | None) -> Parts:
    """UEA `.ts`, training and test: dimensions separated by `:`, the label last."""
    (train, train_labels), (test, test_labels) = map(_sequences, paths)
    labels = {"train": train_labels, "test": test_labels}
    return Parts(train + test, train, None, test, labels=labels)


def libras(paths: Sequence[Path], freq: str | None) -> Parts:
    """Rows x1, y1, x2, y2, ..., class, after one line that is no row; repeated rows are dropped."""
    table = pd.read_csv(paths[0], skiprows=1, header=None).drop_duplicates()
    tracks = table.iloc[:, :-1].to_numpy(float).reshape(len(table), -1, 2)
    return Parts(tracks, labels={"y": table.iloc[:, -1].to_numpy().astype(str)})


def chorale_notes(paths: Sequence[Path], freq: str | None) -> Parts:
    """JSON of train, valid and test: sequences of lists of MIDI notes, as piano rolls."""
    table = json.loads(paths[0].read_text("utf-8"))
    train, valid, test = ([_roll(one) for one in table[key]] for key in ("train", "valid", "test"))
    return Parts(train + valid + test, train, valid, test)


def _roll(steps: Sequence[Sequence[int]]) -> np.ndarray:
    roll = np.zeros((len(steps), KEYS))
    for row, notes in zip(roll, steps, strict=True):
        row[np.array(notes, int) - LOWEST_NOTE] = 1.0
    return roll


def _sequences(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    lines = iter(path.read_text("utf-8").splitlines())
    for line in lines:
        if line.strip().lower() == "@data":
            break
    found, labels = [], []
    for line in filter(None, map(str.strip, lines)):
        *dims, label = line.split(":")
        found.append(np.array([dim.split(",") for dim in dims], float).T)
        labels.append(label)
    return found, np.array(labels)


def _panel(names: Sequence[str], x: Sequence[Any], held_out: Sequence[Any]) -> Parts:
    """Long frames of the training, held-out and all values; steps are counted from 0."""
    past = np.array([len(row) for row in x])
    start = np.zeros_like(past)
    train = _long(names, start, x)
    test = _long(names, past, held_out)
    both = [np.concatenate(pair) for pair in zip(x, held_out, strict=True)]
    return Parts(_long(names, start, both), train, None, test)


def _long(names: Sequence[str], first: np.ndarray, values: Sequence[Any]) -> pd.DataFrame:
    lengths = np.array([len(row) for row in values])
    begins = np.cumsum(lengths) - lengths
    steps = np.arange(lengths.sum()) + np.repeat(first - begins, lengths)
    ids = np.repeat(np.array(names, dtype=object), lengths)
    return pd.DataFrame({"unique_id": ids, "ds": steps, "y": np.concatenate(values).astype(float)})


def _counted(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype("float64").set_index(pd.RangeIndex(len(table), name="ds"))


def _narrow(wide: pd.DataFrame) -> pd.Series | pd.DataFrame:
    return wide.iloc[:, 0] if wide.shape[1] == 1 else wide


def _dates(ds: pd.Series) -> pd.Series:
    year_only = pd.api.types.is_integer_dtype(ds)
    return pd.to_datetime(ds.astype(str), format="%Y" if year_only else "%Y-%m-%d")
