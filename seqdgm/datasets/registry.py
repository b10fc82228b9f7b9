"""What is known about each data set, before any of its files is read."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def registry() -> dict[str, dict[str, Any]]:
    """Entries of all data sets by name."""
    return _read("registry.toml")


@cache
def public_files() -> dict[str, dict[str, Any]]:
    """Public files by path: `sha256`, `bytes`, `licence`, and `url` or else `obtain`."""
    return _read("files.toml")


def entry(name: str) -> Mapping[str, Any]:
    """Entry of a data set, or a ValueError with the names that are close."""
    known = registry()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(str(name).lower().replace(" ", "_"), known, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"There is no data set {name!r}.{hint} seqdgm.datasets.list() shows all of them."
    )


def licence(found: Mapping[str, Any]) -> str:
    """Licence of an entry: its own, or that of its files."""
    if "licence" in found:
        return str(found["licence"])
    # A dictionary keeps the order, a set would not.
    return "; ".join(dict.fromkeys(public_files()[path]["licence"] for path in found["files"]))


def _read(name: str) -> dict[str, dict[str, Any]]:
    text = files("seqdgm.datasets").joinpath(name).read_text(encoding="utf-8")
    return tomllib.loads(text)
