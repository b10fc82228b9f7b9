"""Read the registry and turn an entry into a `Dataset`.

An entry of `registry.toml` says where its file comes from; `_path` is the only place that knows the
kinds of origin. Files are CSV and parsed as data: nothing in them is evaluated.
"""

from __future__ import annotations

import builtins
import difflib
import tomllib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True, eq=False)
class Dataset:
    """A series or panel, with what a forecaster has to know about it.

    Attributes
    ----------
    name : str
        Name in the registry.
    y : pandas.Series or pandas.DataFrame
        A Series (one univariate series), a wide frame (one series, a column a dimension) or a long
        frame `unique_id, ds, y` (a panel). Values are float64; NaN is not observed. The time index
        is complete: a DatetimeIndex with its `freq` set, or a RangeIndex where steps have no date.
    horizon : int
        Steps to forecast by default; the length of `test`.
    season : int
        Steps in a season, 1 where there is none.
    freq : str or None
        pandas offset of a step; None where steps have no date.
    source, licence, description : str
        Package and publication that the values come from, their licence, and what they are.
    train, valid, test : same type as `y`, or None
        Parts in order of time; None where the set is not split that way.
    defaults : Mapping
        Settings that suit the data: keyword arguments by model name, and `transform`, for example
        ``{"transform": "log", "arima": {"order": [0, 1, 1], "seasonal": [0, 1, 1, 12]}}``.
    """

    name: str
    y: pd.Series | pd.DataFrame = field(repr=False)
    horizon: int
    season: int
    freq: str | None
    source: str
    licence: str
    description: str
    train: pd.Series | pd.DataFrame | None = field(default=None, repr=False)
    valid: pd.Series | pd.DataFrame | None = field(default=None, repr=False)
    test: pd.Series | pd.DataFrame | None = field(default=None, repr=False)
    defaults: Mapping[str, Any] = field(default_factory=dict, repr=False)


def load(name: str) -> Dataset:
    """Load a data set by its name in the registry.

    Parameters
    ----------
    name : str
        One of the names in `seqdgm.datasets.list()`.

    Returns
    -------
    Dataset
        Its `train` and `test` are `y` without, and only, the last `horizon` steps of every series.

    Raises
    ------
    ValueError
        If there is no data set of this name.
    FileNotFoundError
        If the data folder is missing from the installation.

    Examples
    --------
    >>> import seqdgm as sq
    >>> airline = sq.datasets.load("airline")
    >>> airline.y.index.freqstr, len(airline.y), airline.season, airline.horizon
    ('MS', 144, 12, 12)
    >>> float(airline.train.iloc[-1]), float(airline.test.iloc[0])
    (405.0, 417.0)
    """
    entry = _entry(name)
    y = _read(_path(entry), entry.get("freq"))
    train, test = _split(y, entry["horizon"])
    return Dataset(
        name=name,
        y=y,
        horizon=entry["horizon"],
        season=entry["season"],
        freq=entry.get("freq"),
        source=entry["source"],
        licence=entry["licence"],
        description=entry["description"],
        train=train,
        test=test,
        defaults=deepcopy(entry.get("defaults", {})),
    )


@cache
def _registry() -> dict[str, dict[str, Any]]:
    text = files("seqdgm.datasets").joinpath("registry.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _entry(name: str) -> dict[str, Any]:
    registry = _registry()
    if name in registry:
        return registry[name]
    close = difflib.get_close_matches(str(name).lower(), registry, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"There is no data set {name!r}.{hint} seqdgm.datasets.list() shows all of them."
    )


def _path(entry: Mapping[str, Any]) -> Path:
    """The local file of an entry: inside an installed package, or in a checkout of the source."""
    package = Path(str(files("seqdgm.datasets"))).parent
    folders = (package / "data", package.parent / "data")
    for folder in folders:
        if (folder / entry["file"]).is_file():
            return folder / entry["file"]
    raise FileNotFoundError(
        f"{entry['file']} is in neither {folders[0]} nor {folders[1]}. Install seqdgm again, from "
        "a wheel or from a checkout that has its data folder."
    )


def _read(path: Path, freq: str | None) -> pd.Series | pd.DataFrame:
    table = pd.read_csv(path)
    ds = table["ds"] if freq is None else _dates(table["ds"])
    if "unique_id" in table.columns:
        return table.assign(ds=ds, y=table["y"].astype("float64"))
    wide = table.drop(columns="ds").astype("float64")
    # Either constructor refuses time stamps that leave a gap.
    wide.index = (
        pd.RangeIndex(ds.iloc[0], ds.iloc[-1] + 1, name="ds")
        if freq is None
        else pd.DatetimeIndex(ds, freq=freq, name="ds")
    )
    return wide.iloc[:, 0] if wide.shape[1] == 1 else wide


def _dates(ds: pd.Series) -> pd.Series:
    year_only = pd.api.types.is_integer_dtype(ds)
    return pd.to_datetime(ds.astype(str), format="%Y" if year_only else "%Y-%m-%d")


def _split(
    y: pd.Series | pd.DataFrame, horizon: int
) -> tuple[pd.Series | pd.DataFrame, pd.Series | pd.DataFrame]:
    if isinstance(y, pd.DataFrame) and "unique_id" in y.columns:
        steps_left = y.groupby("unique_id", sort=False).cumcount(ascending=False)
        return y[steps_left >= horizon], y[steps_left < horizon]
    return y.iloc[:-horizon], y.iloc[-horizon:]


def list() -> pd.DataFrame:
    """Data sets that `load` knows, one row each, ordered by name.

    Returns
    -------
    pandas.DataFrame
        Columns `name`, `description`, `n_series`, `n_dims` (observed dimensions of a series),
        `length` (time steps), `freq` (missing where steps have no date), `season`, `horizon`
        and `licence`. No data file is read.

    Examples
    --------
    >>> import seqdgm as sq
    >>> sq.datasets.list().query("n_series > 1")["name"].to_list()
    ['fertility', 'us_employment']
    """
    columns = (
        "description",
        "n_series",
        "n_dims",
        "length",
        "freq",
        "season",
        "horizon",
        "licence",
    )
    rows = (
        {"name": name, **{column: entry.get(column) for column in columns}}
        for name, entry in sorted(_registry().items())
    )
    return pd.DataFrame(builtins.list(rows))
