"""Models for the workers of a cluster, which import them by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
from standins import LastValue

from seqdgm.models.arima import ARIMA
from seqdgm.panel import Panel


def die_once(mark: str, keeper: int) -> None:
    """Leave a mark and kill this process, unless it is `keeper` or the mark is there."""
    if os.getpid() == keeper:
        return
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(LastValue):
    """Fits each series on its own; kills the first process, but `keeper`, that fits it."""

    per_series = True

    def __init__(self, bias: float = 0.0, std: float = 1.0, mark: str = "", keeper: int = 0):
        super().__init__(bias, std)
        self.mark, self.keeper = mark, keeper

    def fit(self, y, inputs=None, *, seed=None, progress=False, **options):
        die_once(self.mark, self.keeper)
        return super().fit(y)


class AlwaysDeadly(LastValue):
    """Kills every process, but `keeper`, that fits a series below zero."""

    per_series = True

    def __init__(self, bias: float = 0.0, std: float = 1.0, keeper: int = 0):
        super().__init__(bias, std)
        self.keeper = keeper

    def fit(self, y, inputs=None, *, seed=None, progress=False, **options):
        if np.nanmin(Panel.of(y).values) < 0 and os.getpid() != self.keeper:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(y)


class DeadlyARIMA(ARIMA):
    """Kills the first process, but `keeper`, that looks at its data."""

    mark, keeper = "", 0

    def check_data(self, panel):
        die_once(self.mark, self.keeper)
        super().check_data(panel)


class Choosy(LastValue):
    """Fits each series on its own, and refuses the negative ones."""

    per_series = True

    def fit(self, y, inputs=None, *, seed=None, progress=False, **options):
        panel = Panel.of(y)
        for n in range(panel.n_series):
            if np.nanmin(panel.values[n]) < 0:
                raise ValueError(f"series {panel.ids[n]!r} is negative")
        return super().fit(panel)
