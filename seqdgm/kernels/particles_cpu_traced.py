"""The bootstrap filter of a model whose step is generated code, compiled.

The rows of a block in memory are the state before the move, the draws, and the state after it;
generated functions find them at fixed places of one array, so that their loops are vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.particles_cpu_filter import (
    HALF,
    RENEWED,
    Cloud,
    Scratch,
    at,
    bind_run,
    fetch,
)
from seqdgm.kernels.particles_cpu_math import called
from seqdgm.kernels.particles_cpu_resample import BLOCK


class Traced(NamedTuple):
    """What generated functions read: values of parameters, known inputs, data."""

    p: np.ndarray  # (value,)
    u: np.ndarray  # (series, time, input)
    y: np.ndarray  # (series, time, element)
    mask: np.ndarray


def bind_traced(initial: Any, transition: Any, density: Any) -> Any:
    """The filter, from three generated functions over the particles of a block."""

    @called
    def move(
        model: Traced, cloud: Cloud, scratch: Scratch, key: Any, s: int, t: int, first: int
    ) -> None:
        facts, rows, draws = cloud.facts, scratch.rows, scratch.draws
        half = int(facts[HALF])
        new = cloud.z[1 - half]
        n = min(BLOCK, new.shape[1] - first)
        state = len(new)
        w, u = rows.reshape(rows.size), at(model.u, s, t)
        if t == 0:
            initial(model.p, u, t, key, s, first, n, draws, w)
        else:
            for d in range(state):
                fetch(cloud.z[half, d], cloud.ancestors, first, facts[RENEWED] > 0.0, rows[d])
            transition(model.p, u, t, key, s, first, n, draws, w)
        for d in range(state):
            moved, out = rows[state + len(draws) + d], new[d, first : first + BLOCK]
            for i in range(n):
                out[i] = moved[i]

    @called
    def score(model: Traced, cloud: Cloud, scratch: Scratch, s: int, t: int, first: int) -> None:
        log_weights, rows = cloud.log_weights[first : first + BLOCK], scratch.rows
        w, u, y, seen = rows.reshape(rows.size), at(model.u, s, t), at(model.y, s, t), model.mask
        n = len(log_weights)
        density(model.p, u, t, y, at(seen, s, t), n, w, log_weights)

    return bind_run(move, score)
