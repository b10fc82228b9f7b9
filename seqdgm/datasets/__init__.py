"""Data sets by name, and simulators whose states are known.

`load("airline")` reads a set that comes with the package (`data/README.md` names the source and
licence of each file). `load("m3-monthly")` downloads what the benchmarks of the field use, once,
and verifies it; with the environment variable ``SEQDGM_DATA`` it is read from that folder instead.
`list()` shows all of them.
"""

from seqdgm.datasets.fetch import DatasetUnavailableError
from seqdgm.datasets.loaders import Dataset, list, load

__all__ = ["Dataset", "DatasetUnavailableError", "list", "load"]
