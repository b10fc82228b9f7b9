"""The table of a comparison as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from seqdgm.evaluation.numbers import MINUS, NO_BREAK, NOTHING, digits, p_text, text
from seqdgm.serialize import write_whole

if TYPE_CHECKING:
    from seqdgm.evaluation.compare import Comparison

# Smaller is better; of these the best is set in bold.
LOSSES = ("CRPS", "MASE", "sMAPE", "CRPS_sum", "energy_score", "wQL", "OWA")
_NAMES = {
    "energy_score": "ES",
    "log_score": "log score",
    "p_value": "$p$",
    "p_holm": "$p$ (Holm)",
}
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # At the beginning of a row these would be arguments of what ends the row before.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    MINUS: "$-$",
    NOTHING: "--",
    NO_BREAK: "~",
    "\n": " ",
}


def to_latex(
    comparison: Comparison,
    path: str | Path | None = None,
    *,
    columns: Sequence[str] | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> str:
    r"""Set the table of a comparison in LaTeX, for the package booktabs.

    Parameters
    ----------
    comparison : Comparison
    path : path, optional
        File to write, whole or not at all.
    columns : sequence of str, optional
        Columns of ``comparison.table``; default the losses, the coverages, the log score and the
        p-values. Standard errors stand in brackets behind their metric.
    caption, label : str, optional
        Default caption: what was forecast and what the numbers are. Taken as LaTeX.

    Returns
    -------
    str
        A ``table`` environment. The smallest of each loss is bold, models that failed somewhere set
        aside. ``>`` marks a log score that is a lower bound, a tilde an estimate.

    Raises
    ------
    ValueError
        For a column that the table does not have.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> y = np.tile([1.0, 2.0, 3.0, 5.0], 6) + 0.1 * np.sin(np.arange(24.0))
    >>> result = sq.compare([sq.SeasonalNaive(season=4)], y, horizon=4, season=4, seed=0)
    >>> print(result.to_latex(columns=["MASE"]).splitlines()[5])
    model & MASE \\
    """
    table = comparison.table
    chosen = _default_columns(comparison) if columns is None else list(columns)
    unknown = [name for name in chosen if name not in table]
    if unknown:
        raise ValueError(f"the table has no column {unknown[0]!r}; it has {list(table.columns)}")
    cells = [_column(table, name) for name in chosen]
    heads = ["model", *(_NAMES.get(name) or _escaped(name) for name in chosen)]
    rows = [
        " & ".join([_escaped(str(model)), *entries])
        for model, *entries in zip(table.index, *cells, strict=True)
    ]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(comparison) if caption is None else caption}}}",
        *([rf"\label{{{label}}}"] if label else []),
        rf"\begin{{tabular}}{{l{'r' * len(chosen)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
        *(rf"{row} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    out = "\n".join(lines) + "\n"
    if path is not None:
        write_whole(Path(path), out.encode())
    return out


def best(table: pd.DataFrame, name: str) -> np.ndarray:
    """Mark the smallest of a loss among the models that were scored on every unit."""
    values = table[name].where(table["units"] == table["units"].max())
    return (values == values.min()).to_numpy()


def _default_columns(comparison: Comparison) -> list[str]:
    table = comparison.table
    coverages = [f"coverage-{level:g}" for level in comparison.level]
    losses = [name for name in LOSSES if name != "OWA"]
    names = [*losses, *coverages, "log_score", "p_value", "p_holm"]
    return [name for name in names if name in table and not table[name].isna().all()]


def _column(table: pd.DataFrame, name: str) -> list[str]:
    values = table[name]
    if not pd.api.types.is_numeric_dtype(values):
        return [_escaped(str(value)) for value in values]
    if name in ("p_value", "p_holm"):
        return [_escaped(p_text(value)) for value in values]
    errors = table[f"{name}-se"] if f"{name}-se" in table else values * np.nan
    decimals = 1 if name.startswith("coverage-") else digits(list(values), list(errors))
    bold = best(table, name) if name in LOSSES and len(table) > 1 else np.zeros(len(table), bool)
    marks = [""] * len(table)
    if name == "log_score":
        signs = {
            "lower bound": r"$>$\,",
            "estimate": r"$\sim$\,",
            "approximation": r"$\approx$\,",
        }
        marks = [signs.get(kind, "") for kind in table["log_score_kind"]]
    out = []
    for value, error, strong, mark in zip(values, errors, bold, marks, strict=True):
        cell = mark + _escaped(text(value, decimals))
        cell = rf"\textbf{{{cell}}}" if strong else cell
        out.append(cell if np.isnan(error) else f"{cell} ({_escaped(text(error, decimals))})")
    return out


def _caption(comparison: Comparison) -> str:
    windows = comparison.settings.get("n_windows", 1)
    count = comparison.panel.n_series
    parts = [
        f"{count} series, {comparison.horizon} steps ahead, {windows} forecast origin(s).",
        f"MASE with season {comparison.season}. Standard errors over series and origins in "
        "brackets; log score in nats a step ($\\sim$ estimate, $>$ lower bound, $\\approx$ "
        f"approximation); $p$: {comparison.test} test of the CRPS against "
        f"{_escaped(comparison.baseline)}.",
    ]
    return " ".join(parts)


def _escaped(name: str) -> str:
    return "".join(_ESCAPES.get(letter, letter) for letter in name)
