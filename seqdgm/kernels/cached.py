"""Compilation of outer loops, cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numba

from seqdgm.kernels.cpu_steps import OPTIONS


def digest(*modules: ModuleType) -> str:
    """Digest of the sources of modules.

    Numba's cache looks at the file that defines a function, not at what the function calls. A loop
    that holds the digest of all its sources in a closure is compiled again when one changes.
    """
    return sha256(b"".join(Path(str(m.__file__)).read_bytes() for m in modules)).hexdigest()


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a loop that allocates nothing and releases the interpreter lock."""
    loop: Callable[..., None] = numba.njit(cache=True, nogil=True, **OPTIONS)(function)
    return loop
