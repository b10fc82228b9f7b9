"""Data sets by name, and simulators whose states are known.

`load("airline")` reads a set that comes with the package (`data/README.md` names the source and
licence of each file). `load("m3-monthly")` downloads what the benchmarks of the field use, once,
and verifies it; with the environment variable ``SEQDGM_DATA`` it is read from that folder instead.
`list()` shows all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seqdgm.datasets.fetch import DatasetUnavailableError
from seqdgm.datasets.loaders import Dataset, list, load

if TYPE_CHECKING:
    from seqdgm.datasets.simulators import Simulation, simulate

__all__ = ["Dataset", "DatasetUnavailableError", "Simulation", "list", "load", "simulate"]


def __getattr__(name: str) -> Any:
    # Simulators need torch, and reading a table does not.
    if name in ("Simulation", "simulate"):
        from seqdgm.datasets import simulators

        return getattr(simulators, name)
    raise AttributeError(f"module 'seqdgm.datasets' has no attribute {name!r}")
