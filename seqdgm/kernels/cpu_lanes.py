"""Gaussian kernels for panels of many series with a small state: a block of series at a time.

The series of a block go through the filter and smoother side by side, each in its lane of the
machine's vectors (see `seqdgm.kernels.cpu_lanes_vector`), and ranges of blocks in
``torch.get_num_threads()`` plain threads. The loops are compiled for each size of the state when it
is first used, and cached on disk. `supports` says which systems they take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import cpu_lanes_loops, cpu_lanes_steps, cpu_lanes_vector, types
from seqdgm.kernels.arrays import as_array, as_tensor, read_totals, system_arrays
from seqdgm.kernels.cached import compiled, digest
from seqdgm.kernels.cpu_lanes_loops import (
    ALL,
    LAST,
    LIKELIHOOD,
    Panel,
    make_memory,
    make_picks,
)
from seqdgm.kernels.cpu_lanes_vector import WIDTH
from seqdgm.kernels.cpu_steps import make_moments
from seqdgm.kernels.threads import spread
from seqdgm.kernels.types import Filtered, Smoothed, Store, System, check_arguments

MAX_STATE = 8
_MODES: dict[Store, int] = {"likelihood": LIKELIHOOD, "last": LAST, "all": ALL}
# The filter fetches data, and passes results on, for so many steps at a time.
_TILE = 64


def supports(system: System, x: Float[Tensor, "series time obs"]) -> bool:
    """Whether these kernels take a system: a small state, fixed F, Q, H and R, R diagonal.

    The intercepts b and d may vary over time, and every field may be shared or one for each series.

    Examples
    --------
    >>> import torch
    >>> one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1).double()
    >>> walk = System(one, one, one, one, zero, zero, zero[0], zero, one[0])
    >>> supports(walk, torch.zeros(100, 20, 1).double())
    True
    """
    if system.m0.shape[-1] > MAX_STATE:
        return False
    if any(field.shape[1] > 1 for field in (system.F, system.Q, system.H, system.R)):
        return False
    obs = x.shape[2]
    return obs == 1 or not bool(system.R.triu(1).any() or system.R.tril(-1).any())


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
    out = make_moments(n, kept, obs, state, diffuse > 0, store == "all")
    totals = np.empty((6, n))
    ends = lengths if store == "all" else lengths.clamp_max(1)
    given = (_flatten(arrays), _panel(x, mask, lengths, ends), make_picks(state, obs))
    flat = _flatten(out)
    loop, tile = _compiled(state, False), max(1, min(_TILE, steps))

    def run(start: int, stop: int) -> None:
        memory, places = make_memory(state, obs, tile)
        loop(*given, start, stop, tile, memory, places, totals, flat, _MODES[store])

    spread(run, n, steps * state * state * (obs + state) // WIDTH, block=WIDTH)
    if store == "all":
        unseen = ~mask.numpy()
        out.innovations[unseen] = np.nan
        out.innov_var[unseen] = np.nan
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
    arrays, _ = system_arrays(system)
    n, steps, obs = x.shape
    state = arrays.m0.shape[1]
    out = make_moments(n, steps, obs, state, False, False)
    pairs = np.empty((n if lag_one else 0, max(steps - 1, 0), state * state))
    totals = np.empty((6, n))
    given = (_flatten(arrays), _panel(x, mask, lengths, lengths), make_picks(state, obs))
    flat = _flatten(out)
    loop = _compiled(state, True)

    def run(start: int, stop: int) -> None:
        memory, places = make_memory(state, obs, max(steps, 1))
        loop(*given, start, stop, memory, places, totals, flat, pairs)

    spread(run, n, 2 * steps * state * state * (obs + 2 * state) // WIDTH, block=WIDTH)
    loglik, *_, rank_left = read_totals(totals)
    mean, cov = torch.from_numpy(out.mean), torch.from_numpy(out.cov)
    lags = torch.from_numpy(pairs).unflatten(2, (state, state)) if lag_one else None
    return Smoothed(loglik, mean, cov, lags, rank_left)


@cache
def _compiled(state: int, smoother: bool) -> Callable[..., None]:
    """The loops for a size of the state, cached on disk."""
    key = digest(types, cpu_lanes_vector, cpu_lanes_steps, cpu_lanes_loops)
    bind = cpu_lanes_loops.bind_smoother if smoother else cpu_lanes_loops.bind_filter
    return compiled(bind(key, state))


def _panel(x: Tensor, mask: Tensor, lengths: Tensor, ends: Tensor) -> Panel:
    """The data as arrays, and the series by length, so that those of a block end together."""
    length = as_array(lengths)
    order = np.argsort(length, kind="stable")
    return Panel(as_array(x), as_array(mask), length, as_array(ends), order)


def _flatten(arrays: Any) -> Any:
    """Elements of a step along one axis, and an axis of steps for what has none (m0, P0, Pinf)."""
    flat = []
    for name, array in zip(arrays._fields, arrays, strict=True):
        steps = 1 if name in ("m0", "P0", "Pinf") else array.shape[1]
        flat.append(array.reshape(len(array), steps, -1) if len(array) else np.empty((0, 0, 0)))
    return type(arrays)._make(flat)
