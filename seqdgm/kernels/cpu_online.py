"""The compiled filter on bare arrays: a few steps at a time, without the cost of tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.cpu import _compiled
from seqdgm.kernels.cpu_filter import ALL, LOGLIK
from seqdgm.kernels.cpu_steps import Memory, Moments, make_memory


class Buffers(NamedTuple):
    """Memory of `filter_arrays`: what goes in (`x`, `mask`) and what comes out (`out`)."""

    x: np.ndarray  # (series, steps, obs)
    mask: np.ndarray  # (series, steps, obs)
    lengths: np.ndarray  # (series,)
    totals: np.ndarray  # (6, series)
    out: Moments
    memory: Memory
    zero: np.ndarray  # what `out.cov_inf` would be without diffuse elements


def make_buffers(series: int, steps: int, obs: int, state: int, *, diffuse: bool) -> Buffers:
    """Allocate memory for as many steps of as many series."""
    cov = (series, steps, state, state)
    return Buffers(
        np.zeros((series, steps, obs)),
        np.zeros((series, steps, obs), dtype=bool),
        np.full(series, steps),
        np.empty((6, series)),
        Moments(
            np.empty(cov[:3]),
            np.empty(cov),
            np.empty(cov if diffuse else (0, *cov[1:])),
            np.empty(cov[:3]),
            np.empty(cov),
            np.empty((series, steps, obs)),
            np.empty((series, steps, obs)),
        ),
        make_memory(state, obs, state if diffuse else 0, 1),
        np.zeros(cov),
    )


def filter_arrays(system: Any, buffers: Buffers) -> np.ndarray:
    """Filter what lies in the buffers; returns the log-likelihood of each series.

    The fields of `system` are contiguous float64 arrays, of the shapes that `seqdgm.kernels.System`
    says; nothing is checked.
    """
    forward, _ = _compiled()
    x, mask, lengths, totals, out, memory, _ = buffers
    forward(system, x, mask, lengths, 0, len(x), memory, totals, out, ALL)
    loglik: np.ndarray = totals[LOGLIK]
    return loglik
