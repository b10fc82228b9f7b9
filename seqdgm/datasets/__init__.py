"""Data sets that come with the package: `load("airline")`, `list()`.

The values are classical series taken from permissively licensed packages; `data/README.md` names
the source and licence of each file.
"""

from seqdgm.datasets.loaders import Dataset, list, load

__all__ = ["Dataset", "list", "load"]
