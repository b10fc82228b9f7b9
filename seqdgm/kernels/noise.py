"""Standard normal numbers by the block, from a generator's seed and a compiled loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.kernels import particles_cpu_math, philox
from seqdgm.kernels.cached import compiled, digest
from seqdgm.kernels.particles_cpu_math import normals
from seqdgm.kernels.philox import RUN, split
from seqdgm.kernels.threads import spread

_CHUNK = 2 * RUN * 64  # numbers that a thread makes at a time
_LARGEST_SEED = 2**63 - 1


def standard_normal(shape: torch.Size, generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Independent standard normal numbers, float64 on the CPU, 5 to 10 times as fast as torch's.

    They are Philox4x32-10 draws (`seqdgm.kernels.philox`) under a seed that is drawn from the
    generator, so they depend on the generator's state alone, whatever the number of threads.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> standard_normal(torch.Size([2, 3]), generator).shape
    torch.Size([2, 3])
    """
    seed = int(torch.randint(_LARGEST_SEED, (), generator=generator))
    key = np.array(split(seed), dtype=np.uint64)
    count = math.prod(shape)
    out = np.empty((-(-count // (2 * RUN)), 2, RUN))
    loop = _compiled()

    def run(start: int, stop: int) -> None:
        loop(key, start, min(stop, count) - start, out[start // (2 * RUN) :])

    spread(run, count, 20, block=_CHUNK)
    return torch.from_numpy(out).view(-1)[:count].view(shape)


def bind_fill(sources: str) -> Callable[..., None]:
    """The loop to be compiled; `sources` is what its code depends on."""

    def fill(key: np.ndarray, first: int, count: int, out: np.ndarray) -> None:
        _ = sources
        normals(key, 0, 0, 0, first, count, out)

    return fill


@cache
def _compiled() -> Callable[..., None]:
    return compiled(bind_fill(digest(philox, particles_cpu_math)))
