"""The tables of a report, as HTML in which every name that a user gave is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from seqdgm._index import stamp_text
from seqdgm.evaluation.latex import LOSSES, best
from seqdgm.evaluation.numbers import NOTHING, digits, p_text, text

if TYPE_CHECKING:
    from seqdgm.evaluation.compare import Comparison

N_COLOURS = 8  # of the style sheet
MAX_ROWS = 200  # of a table by series or failure


class Column(NamedTuple):
    """A column of a table.

    Attributes
    ----------
    heading : str
        Plain text.
    shown : list of str
        HTML of each cell.
    keys : list of float, optional
        What to sort numbers by; None for a column of text.
    """

    heading: str
    shown: list[str]
    keys: list[float] | None = None


def render(columns: Sequence[Column], label: str, note: str = "") -> str:
    """Lay out a table that sorts by a click on a heading and scrolls within its own box."""
    heads = "".join(
        f'<th scope="col" aria-sort="none"{_class(column)}>'
        f'<button type="button">{escape(column.heading)}</button></th>'
        for column in columns
    )
    rows = []
    for i in range(len(columns[0].shown)):
        cells = []
        for k, column in enumerate(columns):
            key = ""
            if column.keys is not None:
                value = column.keys[i]
                key = f' data-value="{"" if math.isnan(value) else repr(float(value))}"'
            tag = 'th scope="row"' if k == 0 else "td"
            end = "th" if k == 0 else "td"
            cells.append(f"<{tag}{_class(column)}{key}>{column.shown[i]}</{end}>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption class=unseen>{escape(label)}</caption>"
    body = "\n".join(rows)
    table = (
        f'<table class="sortable">{caption}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    note = f'<p class="note">{note}</p>' if note else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'
        f"{note}"
    )


def _class(column: Column) -> str:
    return "" if column.keys is None else ' class="number"'


def escape(value: Any) -> str:
    """Make text harmless in HTML, quotes included."""
    return html.escape(str(value), quote=True)


def words(heading: str, values: Iterable[Any]) -> Column:
    """Make a column of text."""
    return Column(heading, [escape(value) for value in values])


def numbers(
    heading: str,
    values: Iterable[float],
    errors: Iterable[float] | None = None,
    *,
    decimals: int | None = None,
    strong: Iterable[bool] | None = None,
) -> Column:
    """Make a column of numbers, standard errors under them where there are any."""
    keys = [float(value) for value in values]
    spread = [float("nan")] * len(keys) if errors is None else [float(error) for error in errors]
    decimals = digits(keys, spread) if decimals is None else decimals
    marked = [False] * len(keys) if strong is None else list(strong)
    shown = []
    for value, error, mark in zip(keys, spread, marked, strict=True):
        cell = f"<strong>{text(value, decimals)}</strong>" if mark else text(value, decimals)
        small = "" if math.isnan(error) else f"<small>±&nbsp;{text(error, decimals)}</small>"
        shown.append(cell + small)
    return Column(heading, shown, keys)


def sizes(heading: str, values: Iterable[float]) -> Column:
    """Make a column of numbers of very different size, three significant digits each."""
    keys = [float(value) for value in values]
    return Column(heading, [text(key, digits([key])) for key in keys], keys)


def counts(heading: str, values: Iterable[float]) -> Column:
    """Make a column of whole numbers."""
    keys = [float(value) for value in values]
    return Column(heading, [NOTHING if math.isnan(k) else f"{k:.0f}" for k in keys], keys)


def model_names(table: pd.DataFrame) -> Column:
    """Names of the models with the colours that they have in the plots."""
    return Column(
        "model",
        [_coloured(name, k) for k, name in enumerate(table.index)],
    )


def _coloured(name: Any, k: int) -> str:
    return (
        f'<span class="name"><span class="key k{k % N_COLOURS}" aria-hidden="true"></span>'
        f"<span>{escape(name)}</span></span>"
    )


def leaderboard(comparison: Comparison) -> str:
    """Accuracy, sharpness, likelihood and tests: a row a model."""
    table = comparison.table
    columns = [model_names(table)]
    for name in LOSSES:
        if name in table:
            heading = {"energy_score": "energy score"}.get(name, name)
            strong = best(table, name) if len(table) > 1 else None
            columns.append(numbers(heading, table[name], _errors(table, name), strong=strong))
        if name == "CRPS":
            columns += _tests(comparison)
    for level in comparison.level:
        name = f"coverage-{level:g}"
        heading = f"in {level:g} %"
        columns.append(numbers(heading, table[name], _errors(table, name), decimals=1))
    columns.append(numbers("log score", table["log_score"], _errors(table, "log_score")))
    columns.append(words("kind", [kind or NOTHING for kind in table["log_score_kind"]]))
    columns.append(counts("units", table["units"]))
    return render(columns, "Leaderboard")


def _tests(comparison: Comparison) -> list[Column]:
    """The p-values of the CRPS, plain and adjusted."""
    table = comparison.table
    out = []
    for name, heading in (("p_value", "p"), ("p_holm", "p (Holm)")):
        keys = [float(value) for value in table[name]]
        shown = [
            "<small>baseline</small>" if str(model) == comparison.baseline else escape(p_text(key))
            for model, key in zip(table.index, keys, strict=True)
        ]
        out.append(Column(heading, shown, keys))
    return out


def calibration(comparison: Comparison) -> str:
    """Coverage, its distance from the nominal one, and the interval score of each level."""
    table = comparison.table
    columns = [model_names(table)]
    for level in comparison.level:
        name = f"coverage-{level:g}"
        columns.append(numbers(f"in {level:g} %", table[name], _errors(table, name), decimals=1))
        columns.append(numbers(f"ACD {level:g} %", table[f"ACD-{level:g}"], decimals=1))
        name = f"MSIS-{level:g}"
        columns.append(numbers(f"MSIS {level:g} %", table[name], _errors(table, name)))
    return render(
        columns,
        "Intervals",
        "ACD: distance of the coverage from the nominal one, in per cent points. MSIS: mean scaled "
        "interval score, in units of the error of the seasonal naive forecast; smaller is better.",
    )


def likelihoods(comparison: Comparison) -> str:
    """Held-out log-likelihood, what kind of number it is, and its two errors."""
    table = comparison.likelihoods
    errors = list(table["se"])
    decimals = digits(list(table["log_score"]), errors)
    columns = [
        model_names(table),
        numbers("nats a step", table["log_score"], decimals=decimals),
        words("kind", [kind or NOTHING for kind in table["kind"]]),
        numbers("Monte Carlo s.e.", table["stderr"], decimals=digits([], list(table["stderr"]))),
        numbers("s.e. over units", errors, decimals=decimals),
        counts("units", table["units"]),
    ]
    return render(
        columns,
        "Held-out log-likelihood",
        "Only numbers of one kind compare directly: an estimate is the logarithm of an unbiased "
        "estimate, a lower bound may lie below the truth by any amount, an approximation on either "
        "side of it. A model whose lower bound is above another's exact value is the better one.",
    )


def state_accuracy(comparison: Comparison) -> str:
    """Accuracy of latent states where the truth is known, or nothing."""
    table = comparison.state_accuracy
    if table.empty:
        return ""
    places = {str(name): k for k, name in enumerate(comparison.table.index)}
    models = [str(name) for name in table.index.get_level_values("model")]
    columns = [
        Column("model", [_coloured(name, places[name]) for name in models]),
        words("states", table.index.get_level_values("which")),
        words("map to the truth", table["aligned"]),
        numbers("RMSE", table["RMSE"], _errors(table, "RMSE")),
        numbers("NEES / d", table["NEES"], _errors(table, "NEES")),
    ]
    for name in map(str, table.columns):
        if name.startswith("coverage-") and not name.endswith("-se"):
            heading = f"in {name.removeprefix('coverage-')} %"
            columns.append(numbers(heading, table[name], _errors(table, name), decimals=1))
    columns.append(counts("series", table["series"]))
    return render(
        columns,
        "Accuracy of the states",
        "Against the true states, on the second half of the history. NEES: squared error in units "
        "of the model's own covariance, over the number of states: 1 where that is right, larger "
        "where it is too small. A model that learned its states is read through the affine map "
        "that is best on the first half.",
    )


def cost(comparison: Comparison) -> str:
    """Wall time and memory."""
    table = comparison.table
    windows = comparison.settings.get("n_windows", 1)
    series = comparison.panel.n_series
    per = 1000.0 / (series * windows)
    total = table["fit_seconds"] + table["forecast_seconds"]
    columns = [
        model_names(table),
        sizes("fit, s", table["fit_seconds"]),
        sizes("forecast, s", table["forecast_seconds"]),
        sizes("s per 1,000 series", total * per),
        sizes("peak memory, MB", table["peak_mb"]),
    ]
    return render(
        columns,
        "Time and memory",
        f"Wall time of all {windows} window(s), without imports and compilation; per 1,000 series "
        "on one window each. Memory: growth of "
        "the process' resident memory at its peak, the largest over the windows; what an earlier "
        "model had taken and not given back is not counted again.",
    )


def description(comparison: Comparison) -> str:
    """The data: sizes, missing values, index, season, horizon."""
    panel, settings = comparison.panel, comparison.settings
    lengths = panel.lengths
    inside = int(lengths.sum()) * panel.n_dims
    missing = inside - int(np.count_nonzero(panel.mask))
    spread = (
        f"{lengths.min()}"
        if lengths.min() == lengths.max()
        else f"{lengths.min()} to {lengths.max()}, median {np.median(lengths):g}"
    )
    rows: dict[str, Any] = {
        "series": panel.n_series,
        "columns": f"{panel.n_dims} ({', '.join(panel.columns[:10])}"
        + (", …)" if panel.n_dims > 10 else ")"),
        "steps of a series": spread,
        "missing values": f"{missing} of {inside} ({100 * missing / inside:.2g} %)",
        "time index": _index_text(panel.index[0]),
        "first and last step": _span_text(panel.index),
        "season of the MASE": f"{comparison.season} step(s)",
        "horizon": f"{comparison.horizon} steps",
        "forecast origins": f"{settings.get('n_windows', 1)}, "
        f"{settings.get('step', comparison.horizon)} steps apart",
        "known inputs": ", ".join(map(str, settings.get("inputs", ()))) or "none",
    }
    return pairs(rows, "Data", hidden=True) + _series_table(comparison)


def _series_table(comparison: Comparison) -> str:
    panel = comparison.panel
    shown = range(min(panel.n_series * panel.n_dims, MAX_ROWS))
    cells = [divmod(k, panel.n_dims) for k in shown]
    values = [panel.values[n, : panel.lengths[n], d] for n, d in cells]
    names = [str(panel.ids[n]) for n, _ in cells]
    if panel.n_dims > 1:
        names = [f"{name} / {panel.columns[d]}" for name, (_, d) in zip(names, cells, strict=True)]
    known = [one[~np.isnan(one)] for one in values]
    columns = [
        words("series", names),
        counts("steps", [len(one) for one in values]),
        counts("missing", [int(np.isnan(one).sum()) for one in values]),
        *(
            numbers(heading, [summary(one) if len(one) else np.nan for one in known])
            for heading, summary in (
                ("mean", np.mean),
                ("s.d.", np.std),
                ("min", np.min),
                ("max", np.max),
            )
        ),
    ]
    left = panel.n_series * panel.n_dims - len(cells)
    note = f"The first {len(cells)}; {left} more are left out." if left else ""
    return (
        f"<details><summary>Each series</summary>{render(columns, 'Each series', note)}</details>"
    )


def _index_text(index: pd.Index) -> str:
    if isinstance(index, pd.DatetimeIndex | pd.PeriodIndex | pd.TimedeltaIndex):
        freq = getattr(index, "freqstr", None)
        if freq is None and len(index) > 2 and not isinstance(index, pd.PeriodIndex):
            freq = pd.infer_freq(index)
        kind = {"DatetimeIndex": "dates", "PeriodIndex": "periods"}.get(
            type(index).__name__, "time differences"
        )
        return f"{kind}, frequency {freq}" if freq else kind
    return "counted steps"


def _span_text(index: Sequence[pd.Index]) -> str:
    first, last = {stamp_text(one[0]) for one in index}, {stamp_text(one[-1]) for one in index}
    if len(first) == len(last) == 1:
        return f"{first.pop()} to {last.pop()}"
    return (
        f"{len(first)} different first and {len(last)} different last steps, from "
        f"{stamp_text(min(one[0] for one in index))} to {stamp_text(max(one[-1] for one in index))}"
    )


def failures(comparison: Comparison) -> str:
    """What failed, or that nothing did."""
    rows = comparison.failures
    if not rows:
        return "<p>Every model gave a forecast and a score for every series and window.</p>"
    shown = rows[:MAX_ROWS]
    columns = [
        words("model", [row["model"] for row in shown]),
        words("series", ["all" if row["unique_id"] is None else row["unique_id"] for row in shown]),
        words("after", [stamp_text(row["cutoff"]) for row in shown]),
        words("error", [row["error"] for row in shown]),
    ]
    left = len(rows) - len(shown)
    return render(columns, "Failures", f"{left} more are left out." if left else "")


def provenance(comparison: Comparison) -> str:
    """Settings, models as text, and versions."""
    settings = dict(comparison.settings)
    models = settings.pop("models", {})
    options = settings.pop("fit_options", {})
    packages = settings.pop("versions", {})
    general = {
        "seed": "none: another run gives other numbers"
        if settings.get("seed") is None
        else settings["seed"],
        "fit at each origin": "anew" if settings.get("refit") else "once, at the first",
        "draws of each forecast": settings.get("n_samples", NOTHING),
        "intervals, per cent": ", ".join(f"{level:g}" for level in comparison.level),
        "test": f"{comparison.test}, against {comparison.baseline}",
        "means": "each series on a window weighs the same"
        if comparison.aggregate == "series"
        else "each held-out value weighs the same",
    }
    calls = {
        name: call + (f", fit with {dict(options[name])}" if options.get(name) else "")
        for name, call in models.items()
    }
    return (
        pairs(general, "Settings")
        + (pairs(calls, "Models") if calls else "")
        + pairs(packages, "Versions")
    )


def pairs(rows: Mapping[str, Any], label: str, *, hidden: bool = False) -> str:
    """Lay out names and values; `hidden` leaves the caption to those who hear the page."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="pairs"><caption{" class=unseen" if hidden else ""}>{escape(label)}'
        f"</caption><tbody>{body}</tbody></table>"
        "</div>"
    )


def _errors(table: pd.DataFrame, name: str) -> pd.Series | None:
    return table.get(f"{name}-se")
