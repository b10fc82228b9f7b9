"""Gaussian kernels for CPU: compiled loops over time, threads over the series of a panel.

Tensors are read in place; an axis of length 1 is never expanded, and one that the caller expanded
(stride 0) is narrowed again. The loops release the interpreter lock, and ranges of series run in
``torch.get_num_threads()`` plain threads: the loops are compiled once for both cases, and a process
may be forked at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import cpu_filter, cpu_fixed, cpu_smoother, cpu_steps, types
from seqdgm.kernels.arrays import as_array, as_tensor, blank, read_totals, system_arrays
from seqdgm.kernels.cached import compiled, digest
from seqdgm.kernels.cpu_filter import ALL, LAST, LIKELIHOOD, SMOOTH
from seqdgm.kernels.cpu_smoother import make_back
from seqdgm.kernels.cpu_steps import Work, make_moments, make_work
from seqdgm.kernels.threads import spread
from seqdgm.kernels.types import Filtered, Smoothed, Store, System, check_arguments

_MODES: dict[Store, int] = {"likelihood": LIKELIHOOD, "last": LAST, "all": ALL}
# The smoother alternates between forward and backward passes over so many steps, whose gains are
# all that it keeps besides its result.
_BLOCK_STEPS = 4096


def kalman_filter(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    store: Store,
) -> Filtered:
    """Kalman filter on the CPU, as documented in `seqdgm.kernels.kalman_filter`."""
    check_arguments(system, x, mask, lengths)
    arrays, diffuse = system_arrays(system)
    n, steps, obs = x.shape
    state = arrays.m0.shape[1]
    kept = {"likelihood": 0, "last": 1, "all": steps}[store]
    shape = (obs, state, diffuse > 0, store == "all")
    out = make_moments(n, kept, *shape) if kept else _nothing(0, 0, *shape)
    totals = np.empty((6, n))
    data = (arrays, as_array(x), as_array(mask), as_array(lengths))

    forward, _ = _compiled()

    def run(start: int, stop: int) -> None:
        forward(*data, start, stop, _work(state, obs, diffuse), totals, out, _MODES[store])

    spread(run, n, steps * state * state * (obs + state))
    if kept == 0:
        return Filtered(*read_totals(totals))
    blank(out, data[3] if store == "all" else np.minimum(data[3], 1), kept)
    return Filtered(*read_totals(totals), *map(as_tensor, out))


def kalman_smoother(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    lag_one: bool,
) -> Smoothed:
    """Fixed-interval smoother on the CPU, as documented in `seqdgm.kernels.kalman_smoother`."""
    check_arguments(system, x, mask, lengths)
    arrays, diffuse = system_arrays(system)
    n, steps, obs = x.shape
    state = arrays.m0.shape[1]
    out = make_moments(n, steps, obs, state, False, False)
    lags = np.empty((n if lag_one else 0, max(steps - 1, 0), state, state))
    totals = np.empty((6, n))
    data = (arrays, as_array(x), as_array(mask), as_array(lengths))

    forward, backward = _compiled()
    block = max(1, _BLOCK_STEPS // max(steps, 1))

    def run(start: int, stop: int) -> None:
        work = make_work(state, obs, diffuse, min(block, stop - start) * steps)
        back = make_back(state)
        for low in range(start, stop, block):
            high = min(low + block, stop)
            forward(*data, low, high, work, totals, out, SMOOTH)
            backward(arrays, data[3], low, high, work, back, out.mean, out.cov, lags)

    spread(run, n, 2 * steps * state * state * (obs + 2 * state))
    blank(out, data[3], steps)
    blank([lags], data[3] - 1, steps - 1)
    loglik, *_, rank_left = read_totals(totals)
    mean, cov = torch.from_numpy(out.mean), torch.from_numpy(out.cov)
    return Smoothed(loglik, mean, cov, torch.from_numpy(lags) if lag_one else None, rank_left)


_nothing = cache(make_moments)  # arrays of length 0 can be shared
_local = threading.local()


def _work(state: int, obs: int, diffuse: int) -> Work:
    """Memory of the filter for one series: what this thread used last, if it is of that size."""
    if getattr(_local, "size", None) != (state, obs, diffuse):
        _local.work, _local.size = make_work(state, obs, diffuse, 1), (state, obs, diffuse)
    work: Work = _local.work
    return work


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """The compiled forward and backward loops, cached on disk."""
    sources = digest(types, cpu_steps, cpu_fixed, cpu_filter, cpu_smoother)
    forward, backward = cpu_filter.bind_filter(sources), cpu_smoother.bind_smoother(sources)
    return compiled(forward), compiled(backward)
