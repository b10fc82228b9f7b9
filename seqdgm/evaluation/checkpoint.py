"""Finished parts of a backtest in a folder, from which an interrupted one goes on."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from seqdgm.evaluation.attempt import Failure
from seqdgm.panel import Panel
from seqdgm.serialize import write_whole


class Scored(NamedTuple):
    """What a comparison makes of a record; empty in a mere backtest.

    Attributes
    ----------
    scores : DataFrame
        Metrics, a row a series.
    pit : DataFrame
        Probability integral transforms in one column, the rows of `Window.truth`.
    traces : DataFrame
        Smoothed states and training curves; see `seqdgm.evaluation.traces`.
    failures : tuple of Failure
        What could not be computed.
    """

    scores: pd.DataFrame
    pit: pd.DataFrame
    traces: pd.DataFrame
    failures: tuple[Failure, ...] = ()


class Part(NamedTuple):
    """What is kept of one model on one window.

    Attributes
    ----------
    columns : DataFrame
        Mean and intervals, the rows of `Window.truth`.
    scores, pit, traces : DataFrame
        As in `Scored`.
    first : int
        Position of its first series among all.
    lost : bool
        Whether the model failed for all series; such a part is not written to a folder.
    """

    model: str
    number: int
    columns: pd.DataFrame
    scores: pd.DataFrame
    pit: pd.DataFrame
    traces: pd.DataFrame
    failures: tuple[Failure, ...]
    fit_seconds: float
    forecast_seconds: float
    peak_mb: float
    first: int = 0
    lost: bool = False


class Checkpoint:
    """A folder of parts: ``run.json`` says of what run, Parquet files hold each part.

    Parameters
    ----------
    folder : path
        Made if it is not there.
    data, settings : str
        Digests of what every part depends on.
    models : mapping of str to str
        Digest of each model with its options.

    Raises
    ------
    ValueError
        Where the folder holds parts of other data, settings, or of another model of the same name.
    """

    def __init__(
        self, folder: str | Path, *, data: str, settings: str, models: Mapping[str, str]
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._digests = dict(models)
        of_models = {f"model {name!r}": digest for name, digest in models.items()}
        note_run(self.folder, "cache", {"data": data, "settings": settings, **of_models})

    def load(self, model: str, number: int, first: int = 0) -> Part | None:
        """Return a finished part, or None."""
        note = self._path(model, number, first, "json")
        if not note.is_file():
            return None
        held = read_note(note)
        columns, scores, pit, traces = (
            _frame(self._path(model, number, first, name)) for name in _FRAMES
        )
        failures = tuple(Failure(*failure) for failure in held["failures"])
        fit, forecast, peak = (float(held[name]) for name in _TIMES)
        frames = (columns, scores, pit, traces)
        return Part(model, number, *frames, failures, fit, forecast, peak, first)

    def save(self, part: Part) -> None:
        """Write a part; it counts as finished once its last file, the note, is there."""
        for name in _FRAMES:
            payload = getattr(part, name).to_parquet(None)
            write_whole(self._path(part.model, part.number, part.first, name), payload)
        note = {key: getattr(part, key) for key in ("failures", *_TIMES)}
        path = self._path(part.model, part.number, part.first, "json")
        write_whole(path, json.dumps(note).encode())

    def _path(self, model: str, number: int, first: int, what: str) -> Path:
        # The digest names the file: a model's own name may hold what no file name can.
        stem = f"{self._digests[model][:16]}-{_digest(model)[:8]}-{number:05d}"
        stem += f"-{first:08d}" if first else ""
        return self.folder / (f"{stem}.json" if what == "json" else f"{stem}.{what}.parquet")


def note_run(folder: Path, argument: str, digests: Mapping[str, Any]) -> None:
    """Write down what the results in a folder depend on, beside what is written there already.

    Raises
    ------
    ValueError
        Where one of the digests there is another; `argument` is what the caller named the folder.
    """
    path = folder / "run.json"
    held = read_note(path) if path.is_file() else {}
    differ = [key for key, digest in digests.items() if held.get(key, digest) != digest]
    if differ:
        raise ValueError(
            f"{argument}={str(folder)!r} holds the results of another run: its "
            f"{', '.join(differ)} differ from those given; name another folder, or delete this one "
            "to start afresh"
        )
    write_whole(path, json.dumps({**held, **digests}, indent=1, sort_keys=True).encode())


def read_note(path: Path) -> dict[str, Any]:
    """Read a JSON file of a folder of results; a ValueError with the remedy where it is damaged."""
    try:
        held: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, error) from error
    return held


def _frame(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (ValueError, OSError) as error:  # pyarrow's errors are of these kinds
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{str(path)!r} cannot be read ({error}); delete the folder to start afresh")


_FRAMES = ("columns", "scores", "pit", "traces")
_TIMES = ("fit_seconds", "forecast_seconds", "peak_mb")


def digest_panel(panel: Panel | None) -> str:
    """Digest of the values, lengths, names and time stamps of a panel."""
    if panel is None:
        return _digest(None)
    stamps = [(str(index.dtype), str(index[0]), str(index[-1])) for index in panel.index]
    return _digest(
        [panel.values, panel.lengths, list(map(repr, panel.ids)), list(panel.columns), stamps]
    )


def digest_model(model: Any, options: Mapping[str, Any]) -> str:
    """Digest of a model's class, its hyperparameters and the options of its fit."""
    return _digest([type(model), model.get_params(), dict(options)])


def digest_settings(**settings: Any) -> str:
    """Digest of keyword arguments and of what a part consists of."""
    return _digest([_FRAMES, _TIMES, settings])


def _digest(value: Any) -> str:
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    """Hash by content; whatever has no content of its own counts by its `repr`."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    elif isinstance(value, torch.nn.Module):
        value = [type(value), repr(value), dict(value.state_dict())]
    state.update(type(value).__name__.encode())
    if isinstance(value, np.ndarray) and value.dtype != object:
        state.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            _feed(state, key)
            _feed(state, value[key])
    elif isinstance(value, type):
        for kind in value.__mro__:
            state.update(f"{kind.__module__}:{kind.__qualname__}\0{_source(kind)}".encode())
    elif isinstance(value, FunctionType):
        state.update(f"{value.__module__}:{value.__qualname__}\0{_source(value)}".encode())
    elif isinstance(value, (list, tuple, np.ndarray)):
        state.update(str(len(value)).encode())
        for item in value:
            _feed(state, item)
    else:
        state.update(repr(value).encode() + b"\0")


def _source(value: Any) -> str:
    """Source of a class or function of a user's own, where it is known; of a package none."""
    package = value.__module__.partition(".")[0]
    if package in ("builtins", "seqdgm", "torch", "abc", "typing"):
        return ""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return ""
