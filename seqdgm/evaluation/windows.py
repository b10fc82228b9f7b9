"""Forecast origins: what may be seen at each, and what is held out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seqdgm.panel import Panel
from seqdgm.types import check_count

TRUTH_COLUMNS = ("unique_id", "ds", "cutoff", "y")


class Window(NamedTuple):
    """One forecast origin: what may be seen, and what is held out.

    Attributes
    ----------
    number : int
        0 for the oldest.
    train, held_out : Panel
        History of each series, and the `horizon` steps after it.
    inputs : Panel or None
        Known covariates of the history and the horizon.
    seed : int or None
        Seed of this window and its series, the same for every model.
    first : int
        Position of its first series among all.
    """

    number: int
    train: Panel
    held_out: Panel
    inputs: Panel | None
    seed: int | None
    first: int = 0

    @property
    def cutoff(self) -> list[Any]:
        """Last time stamp that the models see, of each series."""
        return [index[-1] for index in self.train.index]

    @property
    def horizon(self) -> int:
        """Steps held out."""
        return int(self.held_out.lengths[0])

    @property
    def past_inputs(self) -> Panel | None:
        """Known covariates of the history alone."""
        return None if self.inputs is None else self.inputs.split(self.horizon)[0]

    def select(self, rows: list[int]) -> Window:
        """Return the window of the series at these positions."""
        inputs = self.inputs
        if inputs is not None and inputs.n_series > 1:
            inputs = inputs.select(rows)
        return self._replace(
            train=self.train.select(rows), held_out=self.held_out.select(rows), inputs=inputs
        )

    def truth(self) -> pd.DataFrame:
        """Long table of what is held out: ``unique_id, ds, cutoff, y``."""
        held = self.held_out
        parts = []
        for n, cutoff in enumerate(self.cutoff):
            ds = held.index[n]
            for d in range(held.n_dims):
                part = {"unique_id": series_name(held, n, d), "ds": ds, "cutoff": cutoff}
                parts.append(pd.DataFrame({**part, "y": held.values[n, : len(ds), d]}))
        return pd.concat(parts, ignore_index=True)


def cut_windows(
    panel: Panel,
    horizon: int,
    n_windows: int,
    step: int | None,
    inputs: Any = None,
    seed: int | None = None,
    first: int = 0,
) -> list[Window]:
    """Cut the forecast origins of `backtest` out of a panel.

    `first` is the position of its first series among all: those from different places do not share
    their random numbers.
    """
    step = horizon if step is None else step
    for name, value in (("horizon", horizon), ("n_windows", n_windows), ("step", step)):
        check_count(name, value)
    span = span_of(horizon, n_windows, step)
    short = np.flatnonzero(panel.lengths <= span)
    if len(short):
        n = short[0]
        raise ValueError(
            f"series {panel.ids[n]!r} has {panel.lengths[n]} steps, but {n_windows} window(s) of "
            f"horizon {horizon} hold out {span} of them and something must be left to learn from; "
            "use a shorter horizon, a smaller step or fewer windows"
        )
    covariates = None if inputs is None else _covariates(panel, inputs)
    windows = []
    for number in range(n_windows):
        after = (n_windows - 1 - number) * step
        train, rest = panel.split(horizon + after)
        held_out = rest.split(after)[0] if after else rest
        known = covariates.split(after)[0] if covariates is not None and after else covariates
        own = _window_seed(seed, number, first)
        windows.append(Window(number, train, held_out, known, own, first))
    return windows


def span_of(horizon: int, n_windows: int, step: int | None) -> int:
    """Steps that the windows hold out; a series must have more."""
    return horizon + (n_windows - 1) * (horizon if step is None else step)


def series_name(panel: Panel, n: int, d: int) -> Any:
    """Name of column `d` of series `n` in long tables, as in `Forecast.to_frame`."""
    if panel.n_dims == 1:
        return panel.ids[n]
    return panel.columns[d] if panel.n_series == 1 else f"{panel.ids[n]}/{panel.columns[d]}"


def _covariates(panel: Panel, inputs: Any) -> Panel:
    known = Panel.of(inputs, name="inputs")
    if known.n_series not in (1, panel.n_series) or (known.lengths != panel.lengths).any():
        raise ValueError(
            f"inputs has {known.n_series} series of {known.lengths.tolist()[:3]} steps, y has "
            f"{panel.n_series} of {panel.lengths.tolist()[:3]}; give one row of inputs for each "
            "step of y"
        )
    return known


def _window_seed(seed: int | None, number: int, first: int) -> int | None:
    if seed is None:
        return None
    place = [first] if first else []
    return int(np.random.SeedSequence([seed, number, *place]).generate_state(1)[0])
