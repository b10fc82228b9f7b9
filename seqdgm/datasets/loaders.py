"""`load`: from a name to a `Dataset`; `list`: what there is.

An entry of `registry.toml` names a reader of `READERS`, its files and its options; `fetch.locate`
is the only place that knows where files come from. Files are parsed as data: nothing in them is
evaluated.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from seqdgm.datasets import formats, matlab
from seqdgm.datasets.fetch import is_present, locate
from seqdgm.datasets.formats import Parts
from seqdgm.datasets.registry import entry, licence, registry

READERS: Mapping[str, Callable[..., Parts]] = {
    reader.__name__: reader
    for reader in (
        formats.shipped,
        formats.dated,
        formats.numbers,
        formats.r_table,
        formats.competition,
        formats.m4,
        formats.tsf,
        formats.ts,
        formats.libras,
        formats.chorale_notes,
        matlab.polyphonic,
        matlab.mocap,
        matlab.rail,
        matlab.tubes,
        matlab.stereo,
    )
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A series or panel, with what a forecaster has to know about it.

    Attributes
    ----------
    name : str
        Name in the registry.
    y : pandas.Series, pandas.DataFrame, list of ndarray, or ndarray
        A Series (one univariate series), a wide frame (one series, a column a dimension), a long
        frame `unique_id, ds, y` (a panel, whose series may differ in length), a list of arrays of
        shape (time, dim) or an array of shape (series, time, dim). Values are float64; NaN is not
        observed. The time index is complete: a DatetimeIndex with its `freq` set, or counted steps
        where the source has no dates.
    horizon : int or None
        Steps to forecast by default; None where forecasting is not what the set is for.
    season : int
        Steps in a season, 1 where there is none.
    freq : str or None
        pandas offset of a step; None where steps have no date.
    source, licence, description : str
        Publication or package that the values come from, their licence as stated there, and what
        they are.
    train, valid, test : same type as `y`, or None
        The published parts where there are some, else `y` without, and only, the last `horizon`
        steps of every series; None where the set is not split that way.
    defaults : Mapping
        Settings that suit the data: keyword arguments by model name, and `transform`, for example
        ``{"transform": "log", "arima": {"order": [0, 1, 1], "seasonal": [0, 1, 1, 12]}}``.
    inputs, states : pandas.DataFrame or None
        Known inputs and true states, in the index of `y`, where the source has them.
    labels : Mapping of str to ndarray
        Class of each sequence, by part ("train", "test") or for "y" as a whole.
    constants : Mapping
        What else the source states: noise variances, places of landmarks, the step in seconds.
    """

    name: str
    y: Any = field(repr=False)
    horizon: int | None
    season: int
    freq: str | None
    source: str
    licence: str
    description: str
    train: Any = field(default=None, repr=False)
    valid: Any = field(default=None, repr=False)
    test: Any = field(default=None, repr=False)
    defaults: Mapping[str, Any] = field(default_factory=dict, repr=False)
    inputs: pd.DataFrame | None = field(default=None, repr=False)
    states: pd.DataFrame | None = field(default=None, repr=False)
    labels: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    constants: Mapping[str, Any] = field(default_factory=dict, repr=False)


def load(name: str) -> Dataset:
    """Load a data set by its name in the registry.

    Some sets come with the package. The files of the others are read from the folder that the
    environment variable ``SEQDGM_DATA`` names or, if it is not set, downloaded once into the
    user's cache. Checksums are verified in either case.

    Parameters
    ----------
    name : str
        One of the names in `seqdgm.datasets.list()`.

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        If there is no data set of this name.
    DatasetUnavailableError
        An OSError: if a file is missing, cannot be downloaded, or is not the published one.

    Examples
    --------
    >>> import seqdgm as sq
    >>> airline = sq.datasets.load("airline")
    >>> airline.y.index.freqstr, len(airline.y), airline.season, airline.horizon
    ('MS', 144, 12, 12)
    >>> float(airline.train.iloc[-1]), float(airline.test.iloc[0])
    (405.0, 417.0)
    """
    found = entry(name)
    freq, horizon = found.get("freq"), found.get("horizon")
    read = READERS[found.get("loader", "shipped")]
    parts = read(locate(name, found), freq, **found.get("options", {}))
    train, valid, test = _split(parts, found.get("split", "horizon"), horizon)
    return Dataset(
        name=name,
        y=parts.y,
        horizon=horizon,
        season=found["season"],
        freq=freq,
        source=found["source"],
        licence=licence(found),
        description=found["description"],
        train=train,
        valid=valid,
        test=test,
        defaults=deepcopy(found.get("defaults", {})),
        inputs=parts.inputs,
        states=parts.states,
        labels=parts.labels,
        constants=parts.constants,
    )


def _split(parts: Parts, rule: Any, horizon: int | None) -> tuple[Any, Any, Any]:
    """Parts that the files give ("given"), the last steps ("horizon"), lengths, or "none"."""
    y = parts.y
    if rule in ("given", "none"):
        return parts.train, parts.valid, parts.test
    if rule == "horizon":
        assert horizon is not None
        if isinstance(y, pd.DataFrame) and "unique_id" in y.columns:
            steps_left = y.groupby("unique_id", sort=False).cumcount(ascending=False)
            return y[steps_left >= horizon], None, y[steps_left < horizon]
        return y.iloc[:-horizon], None, y.iloc[-horizon:]
    first, second, third = np.cumsum(rule).tolist()
    return y.iloc[:first], y.iloc[first:second], y.iloc[second:third]


def list() -> pd.DataFrame:
    """Data sets that `load` knows, one row each, ordered by name.

    Returns
    -------
    pandas.DataFrame
        Columns `name`, `description`, `n_series`, `n_dims` (observed dimensions of a series),
        `length` (time steps, of the longest series), `freq` (missing where steps have no date),
        `season`, `horizon` (missing where there is none), `licence`, `origin` ("package" or
        "download") and `present` (whether the files are here, by their sizes). No data file is
        read, and nothing is downloaded.

    Examples
    --------
    >>> import seqdgm as sq
    >>> sq.datasets.list().query("origin == 'package' and n_series > 1")["name"].to_list()
    ['fertility', 'us_employment']
    """
    columns = ("description", "n_series", "n_dims", "length", "freq", "season", "horizon")
    rows = (
        {
            "name": name,
            **{column: found.get(column) for column in columns},
            "licence": licence(found),
            "origin": "package" if "file" in found else "download",
            "present": is_present(found),
        }
        for name, found in sorted(registry().items())
    )
    return pd.DataFrame(builtins.list(rows)).astype({"horizon": "Int64"})
