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
from seqdgm.kernels.cpu_filter import ALL, LAST, SMOOTH
from seqdgm.kernels.cpu_likelihood import addresses, likelihood_loop
from seqdgm.kernels.cpu_smoother import make_back
from seqdgm.kernels.cpu_steps import Memory, make_memory, make_moments
from seqdgm.kernels.threads import spread
from seqdgm.kernels.types import Filtered, Smoothed, Store, System, check_arguments

_MODES: dict[Store, int] = {"last": LAST, "all": ALL}
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
    if store == "likelihood":
        return _likelihood(system, x, mask, lengths)
    arrays, diffuse = system_arrays(system)
    n, steps, obs = x.shape
    state = arrays.m0.shape[1]
    kept = 1 if store == "last" else steps
    out = make_moments(n, kept, obs, state, diffuse > 0, store == "all")
    totals = np.empty((6, n))
    data = (arrays, as_array(x), as_array(mask), as_array(lengths))

    forward, _ = _compiled()

    def run(start: int, stop: int) -> None:
        forward(*data, start, stop, _memory(state, obs, diffuse), totals, out, _MODES[store])

    spread(run, n, steps * state * state * (obs + state))
    blank(out, data[3] if store == "all" else np.minimum(data[3], 1), kept)
    return Filtered(*read_totals(totals), *map(as_tensor, out))


def _likelihood(system: System, x: Tensor, mask: Tensor, lengths: Tensor) -> Filtered:
    n, steps, obs = x.shape
    state = system.m0.shape[1]
    places, kept = addresses(system, x, mask, lengths)
    totals = np.empty((6, n))
    loop, nothing = likelihood_loop(), _nothing(0, 0, obs, state, False, False)

    def run(start: int, stop: int) -> None:
        memory = _memory(state, obs, state)
        loop(places, state, obs, start, stop, memory.values, memory.ranks, totals, nothing)

    spread(run, n, steps * state * state * (obs + state))
    del kept  # the addresses were of its memory
    return Filtered(*read_totals(totals))


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
        memory = make_memory(state, obs, diffuse, min(block, stop - start) * steps)
        back = make_back(state)
        for low in range(start, stop, block):
            high = min(low + block, stop)
            forward(*data, low, high, memory, totals, out, SMOOTH)
            backward(arrays, data[3], low, high, memory, obs, back, out.mean, out.cov, lags)

    spread(run, n, 2 * steps * state * state * (obs + 2 * state))
    blank(out, data[3], steps)
    blank([lags], data[3] - 1, steps - 1)
    loglik, *_, rank_left = read_totals(totals)
    mean, cov = torch.from_numpy(out.mean), torch.from_numpy(out.cov)
    return Smoothed(loglik, mean, cov, torch.from_numpy(lags) if lag_one else None, rank_left)


_nothing = cache(make_moments)  # arrays of length 0 can be shared
_local = threading.local()


def _memory(state: int, obs: int, diffuse: int) -> Memory:
    """Memory of the filter for one series: what this thread used last, if it is of that size."""
    if getattr(_local, "size", None) != (state, obs, diffuse):
        _local.memory, _local.size = make_memory(state, obs, diffuse, 1), (state, obs, diffuse)
    memory: Memory = _local.memory
    return memory


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """The compiled forward and backward loops, cached on disk."""
    sources = digest(types, cpu_steps, cpu_fixed, cpu_filter, cpu_smoother)
    forward, backward = cpu_filter.bind_filter(sources), cpu_smoother.bind_smoother(sources)
    return compiled(forward), compiled(backward)
