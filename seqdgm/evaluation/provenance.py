"""How a comparison came about: its settings, and what it ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

import seqdgm
from seqdgm.evaluation.backtest import Run

_PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "statsmodels",
    "numba",
    "scoringrules",
    "utilsforecast",
)


def describe(run: Run) -> dict[str, Any]:
    """Settings of a run by name, the models as text, and ``"versions"``."""
    inputs = run.windows[-1].inputs
    return {
        "models": {name: repr(model) for name, model in run.models.items()},
        "fit_options": {name: dict(options) for name, options in run.fit_options.items()},
        "n_windows": run.n_windows,
        "step": run.horizon if run.step is None else run.step,
        "refit": run.refit,
        "n_samples": run.n_samples,
        "seed": run.seed,
        "inputs": () if inputs is None else inputs.columns,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Python, packages and machine."""
    found = {"seqdgm": seqdgm.__version__, "python": platform.python_version()}
    found |= {name: version(name) for name in _PACKAGES}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical processors"
    return found | {"machine": f"{machine}, {torch.get_num_threads()} thread(s) used by torch"}
