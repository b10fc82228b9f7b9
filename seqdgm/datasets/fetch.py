"""Where the files of a data set are: in the package, in a folder of yours, or downloaded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from seqdgm.datasets.registry import public_files

FOLDER = "SEQDGM_DATA"
TIMEOUT = 30.0  # seconds without an answer


class DatasetUnavailableError(OSError):
    """The files of a data set cannot be had, or are not the ones that were published."""


def locate(name: str, entry: Mapping[str, Any]) -> tuple[Path, ...]:
    """Local files of a data set, verified; downloaded first if need be.

    Files that ship are found in the installation. Others are read from the folder that the
    environment variable SEQDGM_DATA names or, if it is not set, from the cache of pooch.

    Raises
    ------
    DatasetUnavailableError
        If a file is missing, cannot be downloaded, or has another checksum. One line that names
        the data set, the file and the remedy.
    """
    if "file" in entry:
        return (_shipped(name, entry["file"]),)
    found = public_files()
    return tuple(_public(name, path, found[path]) for path in entry["files"])


def is_present(entry: Mapping[str, Any]) -> bool:
    """Whether all files of a data set are here, by their sizes; nothing is downloaded."""
    if "file" in entry:
        return True
    folder = _folder() or _cache()
    sizes = public_files()
    return all(
        (folder / path).is_file() and (folder / path).stat().st_size == sizes[path]["bytes"]
        for path in entry["files"]
    )


def _folder() -> Path | None:
    given = os.environ.get(FOLDER)
    return Path(given).expanduser() if given else None


def _cache() -> Path:
    import pooch

    return Path(pooch.os_cache("seqdgm"))


def _shipped(name: str, file: str) -> Path:
    """Inside an installed package, or in a checkout of the source."""
    package = Path(str(files("seqdgm.datasets"))).parent
    folders = (package / "data", package.parent / "data")
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    raise DatasetUnavailableError(
        f"Data set {name!r}: {file} is in neither {folders[0]} nor {folders[1]}. Install seqdgm "
        "again, from a wheel or from a checkout that has its data folder."
    )


def _public(name: str, path: str, about: Mapping[str, Any]) -> Path:
    folder = _folder()
    if folder is not None:
        return _given(name, folder, path, about)
    if "url" not in about:
        raise DatasetUnavailableError(
            f"Data set {name!r}: {path} has no public address of its own. To make it, "
            f"{about['obtain']}; then set {FOLDER} to the folder that holds {path}."
        )
    return _downloaded(name, path, about)


def _given(name: str, folder: Path, path: str, about: Mapping[str, Any]) -> Path:
    file = folder / path
    if not folder.is_dir():
        problem = f"{FOLDER} names {folder}, which is not a folder. Correct it"
    elif not file.is_file():
        problem = f"{path} is not in {folder}, the folder that {FOLDER} names. {_remedy(about)}"
    else:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found == about["sha256"]:
            return file
        problem = (
            f"{file} is not the published file: it has {file.stat().st_size} bytes and SHA-256 "
            f"{found[:12]}..., not {about['bytes']} and {about['sha256'][:12]}.... "
            f"{_remedy(about)}"
        )
    raise DatasetUnavailableError(
        f"Data set {name!r}: {problem}, or unset {FOLDER} to download what is public."
    )


def _remedy(about: Mapping[str, Any]) -> str:
    return f"Get it from {about['url']}" if "url" in about else f"To make it, {about['obtain']}"


def _downloaded(name: str, path: str, about: Mapping[str, Any]) -> Path:
    import pooch

    target = _cache() / path
    try:
        # Written beside the target, verified, and only then moved to its place.
        found = pooch.retrieve(
            about["url"],
            known_hash=f"sha256:{about['sha256']}",
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(timeout=TIMEOUT),
        )
    except (OSError, ValueError) as error:
        # requests' errors are OSErrors; pooch raises a ValueError for another checksum.
        reason = (
            "what arrived is not the published file (another SHA-256)"
            if isinstance(error, ValueError)
            else f"{type(error).__name__}: {_line(error)}"
        )
        raise DatasetUnavailableError(
            f"Data set {name!r}: {path} could not be downloaded from {about['url']}: {reason}. "
            f"Try again, or put the file into a folder and set {FOLDER} to that folder."
        ) from error
    return Path(found)


def _line(error: Exception) -> str:
    """The text of an error on one line, without its tail where it is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:160]}..."
