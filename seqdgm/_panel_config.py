"""Panels as numpy arrays and a JSON-able dict, for model files.

A regular time index is stored as its kind, step, start and length (see :mod:`seqdgm._index`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import BaseOffset, CustomBusinessDay, DateOffset

from seqdgm._forms import Form, Parts


def label_to_config(label: Hashable) -> Any:
    """Encode a column label or series id as JSON; ``label_from_config`` is the inverse."""
    if isinstance(label, np.generic):
        label = label.item()
    if label is None or isinstance(label, (bool, int, float, str)):
        return label
    if isinstance(label, tuple):
        return {"tuple": [label_to_config(part) for part in label]}
    if isinstance(label, pd.Period):
        return {"period": [str(label), label.freqstr]}
    if isinstance(label, pd.Timestamp):
        zone = _zone_text(label.tz)
        utc = label if zone is None else label.tz_convert("UTC").tz_localize(None)
        return {"timestamp": [utc.isoformat(), utc.unit, zone]}
    raise ValueError(
        f"the label {label!r} of type {type(label).__name__} cannot be stored in a file; use "
        "strings or integers as series ids and column names"
    )


def label_from_config(config: Any) -> Any:
    """Decode what :func:`label_to_config` wrote."""
    if not isinstance(config, dict):
        return config
    if "tuple" in config:
        return tuple(label_from_config(part) for part in config["tuple"])
    if "period" in config:
        text, freq = config["period"]
        return pd.Period(text, freq=freq)
    text, unit, zone = config["timestamp"]
    stamp = pd.Timestamp(text).as_unit(unit)
    return stamp if zone is None else stamp.tz_localize("UTC").tz_convert(zone)


def _zone_text(zone: Any) -> str | None:
    """Name a time zone such that pandas finds it again."""
    if zone is None:
        return None
    text = str(zone)
    sample = pd.Timestamp("2020-07-01")
    try:
        if sample.tz_localize(text) == sample.tz_localize(zone):
            return text
    except (KeyError, ValueError, TypeError):
        pass
    raise ValueError(
        f"the time zone {zone!r} cannot be stored in a file; use tz_convert with a named zone"
    )


def _freq_to_config(freq: BaseOffset | None) -> Any:
    if freq is None:
        return None
    config: Any = freq.freqstr
    if type(freq) is DateOffset:
        config = {"n": freq.n, "months": freq.kwds.get("months", 0)}
    elif isinstance(freq, CustomBusinessDay):
        holidays = [str(day) for day in freq.holidays]
        config = {"n": freq.n, "weekmask": freq.weekmask, "holidays": holidays}
    try:
        if _freq_from_config(config) == freq:
            return config
    except ValueError:
        pass
    raise ValueError(
        f"the frequency {freq!r} of the time index cannot be stored in a file; use asfreq with "
        "a frequency that has a name, such as 'MS', 'W-MON' or 'B'"
    )


def _freq_from_config(config: Any) -> BaseOffset | None:
    if isinstance(config, dict):
        kind = DateOffset if "months" in config else CustomBusinessDay
        return kind(**config)
    return None if config is None else to_offset(config)


def step_to_config(index: Any) -> dict[str, Any]:
    """Describe the kind, step and name of a regular index, everything but start and length."""
    name = label_to_config(index.name)
    if isinstance(index, pd.RangeIndex):
        return {"kind": "range", "step": index.step, "name": name}
    if isinstance(index, pd.PeriodIndex):
        return {"kind": "period", "freq": index.freqstr, "name": name}
    config = {"unit": index.unit, "freq": _freq_to_config(index.freq), "name": name}
    if isinstance(index, pd.TimedeltaIndex):
        return {"kind": "timedelta", **config}
    return {"kind": "datetime", "tz": _zone_text(index.tz), **config}


def start_of(index: pd.Index) -> int:
    """Return the first stamp as an integer (for dates: ticks of the index's unit, in UTC)."""
    return int(index.asi8[0]) if hasattr(index, "asi8") else int(index[0])


def regular_index(config: dict[str, Any], start: int, length: int) -> pd.Index:
    """Build the index that ``step_to_config``, ``start_of`` and the length describe."""
    name = label_from_config(config["name"])
    if config["kind"] == "range":
        step = config["step"]
        return pd.RangeIndex(start, start + length * step, step, name=name)
    if config["kind"] == "period":
        freq = config["freq"]
        from_ordinals: Any = pd.PeriodIndex.from_ordinals  # type: ignore[attr-defined]
        first = from_ordinals([start], freq=freq)[0]
        return pd.period_range(first, periods=length, freq=freq, name=name)
    freq, unit = _freq_from_config(config["freq"]), config["unit"]
    if config["kind"] == "timedelta":
        first = pd.Timedelta(start, unit=unit).as_unit(unit)
        if freq is None:
            return pd.TimedeltaIndex([first] * length, name=name).as_unit(unit)
        return pd.timedelta_range(first, periods=length, freq=freq, unit=unit, name=name)
    stamp = pd.Timestamp(start, unit=unit).as_unit(unit)
    if config["tz"] is not None:
        stamp = stamp.tz_localize("UTC").tz_convert(config["tz"])
    if freq is None:
        return pd.DatetimeIndex([stamp] * length, name=name).as_unit(unit)
    return pd.date_range(stamp, periods=length, freq=freq, unit=unit, name=name)


def labels_to_config(labels: pd.Index, arrays: dict[str, np.ndarray], key: str) -> dict[str, Any]:
    """Encode any index of labels; integers go to ``arrays[key]``, the rest to JSON."""
    if isinstance(labels, pd.MultiIndex):
        names = [label_to_config(name) for name in labels.names]
        return {"tuples": [label_to_config(label) for label in labels], "names": names}
    name = label_to_config(labels.name)
    if isinstance(labels, pd.RangeIndex):
        return {"range": [labels.start, labels.stop, labels.step], "name": name}
    if isinstance(labels.dtype, np.dtype) and labels.dtype.kind in "iu":
        arrays[key] = labels.to_numpy()
        return {"array": key, "name": name}
    config = {"labels": [label_to_config(label) for label in labels], "name": name}
    if isinstance(labels, pd.CategoricalIndex):
        categories = [label_to_config(label) for label in labels.categories]
        return {**config, "categories": categories, "ordered": bool(labels.ordered)}
    return {**config, "dtype": str(labels.dtype)}


def labels_from_config(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> pd.Index:
    """Decode what :func:`labels_to_config` wrote."""
    if "tuples" in config:
        tuples = [label_from_config(label) for label in config["tuples"]]
        return pd.MultiIndex.from_tuples(tuples, names=[*map(label_from_config, config["names"])])
    name = label_from_config(config["name"])
    if "range" in config:
        start, stop, step = config["range"]
        return pd.RangeIndex(start, stop, step, name=name)
    if "array" in config:
        return pd.Index(arrays[config["array"]], name=name)
    labels = [label_from_config(label) for label in config["labels"]]
    if "categories" in config:
        categories = [label_from_config(label) for label in config["categories"]]
        dtype = pd.CategoricalDtype(categories, ordered=config["ordered"])
        return pd.CategoricalIndex(labels, dtype=dtype, name=name)
    return pd.Index(labels, dtype=config["dtype"], name=name)


def parts_to_config(parts: Parts) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the parts of a panel as (arrays, JSON-able dict)."""
    form = parts.form
    arrays = {"values": parts.values, "lengths": parts.lengths}
    arrays["starts"] = np.array([start_of(index) for index in parts.index], dtype=np.int64)
    described: dict[tuple[Any, ...], int] = {}
    steps: list[dict[str, Any]] = []
    kinds = []
    for index in parts.index:
        step = index.step if isinstance(index, pd.RangeIndex) else getattr(index, "freq", None)
        key = (index.dtype, step, index.name)
        if key not in described:
            described[key] = len(steps)
            steps.append(step_to_config(index))
        kinds.append(described[key])
    arrays["kinds"] = np.array(kinds, dtype=np.int64)
    if form.rows is not None:
        arrays["rows"] = form.rows
    config = {
        "ids": [label_to_config(series) for series in parts.ids],
        "columns": list(parts.columns),
        "container": parts.container,
        "steps": steps,
        "ndim": form.ndim,
        "item": form.item,
        "name": label_to_config(form.name),
        "integer_dtype": form.integer_dtype,
        "freq": form.freq,
    }
    for part in ("layout", "id_labels", "row_labels"):
        held = getattr(form, part)
        config[part] = None if held is None else labels_to_config(held, arrays, part)
    return arrays, config


def parts_from_config(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> Parts:
    """Build the parts that :func:`parts_to_config` described."""
    columns = (arrays[key].tolist() for key in ("kinds", "starts", "lengths"))
    keys = list(zip(*columns, strict=True))
    shared = {key: regular_index(config["steps"][key[0]], key[1], key[2]) for key in set(keys)}
    labels = {
        part: None if config[part] is None else labels_from_config(config[part], arrays)
        for part in ("layout", "id_labels", "row_labels")
    }
    form = Form(
        ndim=config["ndim"],
        item=config["item"],
        name=label_from_config(config["name"]),
        rows=arrays.get("rows"),
        integer_dtype=config["integer_dtype"],
        freq=config["freq"],
        **labels,
    )
    return Parts(
        values=arrays["values"].copy(),
        lengths=arrays["lengths"],
        ids=tuple(label_from_config(series) for series in config["ids"]),
        columns=tuple(config["columns"]),
        index=tuple(shared[key] for key in keys),
        container=config["container"],
        form=form,
    )
