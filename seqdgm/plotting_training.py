"""Pictures of how a fit went.

Import this module where it is needed; it brings matplotlib along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from seqdgm.plotting import HELD_OUT, HISTORY, HUE, Figure, _finish, _grid
from seqdgm.results import FitReport


class _Line(NamedTuple):
    label: str
    values: Sequence[float]
    colour: str
    epochs: Sequence[int] = ()


def plot_training(report: FitReport) -> Figure:
    """Draw the curves of a fit over its epochs or iterations.

    Parameters
    ----------
    report : FitReport
        ``model.fit_report_``.

    Returns
    -------
    Figure
        The objective with the validation objective, and the epoch that was kept as a dotted line;
        then, where the learning method records them, the parts of the objective, the norm of the
        gradient and the learning rate.

    Raises
    ------
    ValueError
        For a fit without iterations.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> y = np.sin(np.arange(40) / 3.0)
    >>> report = sq.RNN("gru", 4, max_epochs=3).fit(y, seed=0).fit_report_
    >>> [axis.get_title(loc="left") for axis in report.plot().axes if axis.get_visible()]
    ['Objective', 'Gradient norm', 'Learning rate']
    """
    if not report.objective:
        raise ValueError(f"a fit by {report.method!r} without iterations has no curves")
    panels = _panels(report)
    figure, axes = _grid(None, len(panels))
    unit = "epoch" if report.best_epoch is not None else "iteration"
    for axis, (title, label, lines) in zip(axes, panels, strict=True):
        _draw(axis, lines)
        if title == "Objective" and report.best_epoch is not None:
            axis.axvline(report.best_epoch, color=HISTORY, lw=1.0, ls=":", label="kept")
        _finish(axis, pd.RangeIndex(1, name=unit), label, title)
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(frameon=False, fontsize=9, handlelength=1.6)
    return figure


def _panels(report: FitReport) -> list[tuple[str, str, list[_Line]]]:
    nats = "nats a step" if report.best_epoch is not None else "nats"
    valid = _Line("validation", report.valid_objective, HELD_OUT, report.valid_epochs)
    objective = [_Line("training", report.objective, HUE), valid]
    parts = []
    if any(report.divergence):
        parts = [
            _Line("reconstruction", report.reconstruction, HUE),
            _Line("divergence", report.divergence, HELD_OUT),
        ]
    candidates = [
        ("Objective", nats, objective),
        ("Parts of the objective", nats, parts),
        ("Gradient norm", "norm", [_Line("gradient", report.gradient_norm, HUE)]),
        ("Learning rate", "rate", [_Line("rate", report.learning_rate, HUE)]),
    ]
    drawn = [(a, b, [line for line in lines if len(line.values)]) for a, b, lines in candidates]
    return [panel for panel in drawn if panel[2]]


def _draw(axis: Axes, lines: Sequence[_Line]) -> None:
    for line in lines:
        epochs = line.epochs or range(1, len(line.values) + 1)
        marker = "o" if len(line.values) == 1 else None
        axis.plot(epochs, line.values, color=line.colour, lw=1.6, label=line.label, marker=marker)
