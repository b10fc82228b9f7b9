"""One filter pass and one compiled backward pass: smoothing errors, gradients, fixed-lag moments.

The compiled loops are in `seqdgm.kernels.cpu_score`; this module owns their memory, their cache and
the threads over the series of a panel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import cpu_adjoint, cpu_score, cpu_steps, kalman_filter, types
from seqdgm.kernels.cached import compiled, digest
from seqdgm.kernels.cpu_adjoint import Kept, make_gains, make_pull
from seqdgm.kernels.cpu_score import Errors
from seqdgm.kernels.threads import spread
from seqdgm.kernels.types import Filtered, System


class Backward(NamedTuple):
    """Result of the backward pass.

    Attributes
    ----------
    filtered : Filtered
        What the filter found on the way.
    gradient : System
        Derivatives of the log-likelihood, shaped as the fields they belong to.
    r, N : (series, time, state), (series, time, state, state), or None
        Adjoint of the predicted state's mean, and (r r' - N) / 2 that of its covariance; NaN beyond
        the end of a series. Their finite parts where the state is diffuse.
    e, D : (series, time, obs), (series, time, obs, obs), or None
        Smoothing error of the observations and its variance; zero where nothing was observed.
    """

    filtered: Filtered
    gradient: System
    r: Float[Tensor, "series time state"] | None
    N: Float[Tensor, "series time state state"] | None
    e: Float[Tensor, "series time obs"] | None
    D: Float[Tensor, "series time obs obs"] | None


def backward_pass(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    histories: bool,
) -> Backward:
    """Filter, then pull the adjoints of every series back; `histories` keeps them step by step.

    Raises
    ------
    ValueError
        If shapes or types do not fit together, or tensors are not on the CPU.
    """
    filtered, kept, arrays = _filter(system, x, mask, lengths)
    n, steps, obs = x.shape
    state = arrays.m0.shape[1]
    rows = n if histories else 0
    out = Errors(
        np.full((rows, steps, state), np.nan),
        np.full((rows, steps, state, state), np.nan),
        np.full((rows, steps, obs), np.nan),
        np.full((rows, steps, obs, obs), np.nan),
    )
    loop, _ = _compiled()

    def run(start: int, stop: int) -> System:
        grad = System._make(
            np.zeros((stop - start if len(field) > 1 else 1, *field.shape[1:])) for field in arrays
        )
        memory = make_gains(state, obs, steps), make_pull(state, obs)
        loop(arrays, kept, lengths.numpy(), start, stop, *memory, grad, out)
        return grad

    parts = spread(run, n, steps * state * state * (2 * obs + 4 * state))
    gradient = System._make(
        torch.from_numpy(np.concatenate(pieces) if len(field) > 1 else sum(pieces))
        for field, pieces in zip(arrays, zip(*parts, strict=True), strict=True)
    )
    kept_histories = (torch.from_numpy(array) if histories else None for array in out)
    return Backward(filtered, gradient, *kept_histories)


def fixed_lag_pass(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    lag: int,
) -> tuple[Filtered, Float[Tensor, "series time state"], Float[Tensor, "series time state state"]]:
    """Filter, then the moments of each state given the observations up to `lag` steps later.

    Raises
    ------
    ValueError
        If shapes or types do not fit together, or tensors are not on the CPU.
    """
    filtered, kept, arrays = _filter(system, x, mask, lengths)
    n, steps, obs = x.shape
    state = arrays.m0.shape[1]
    mean = np.full((n, steps, state), np.nan)
    cov = np.full((n, steps, state, state), np.nan)
    _, loop = _compiled()

    def run(start: int, stop: int) -> None:
        memory = make_gains(state, obs, steps), make_pull(state, obs)
        loop(arrays, kept, lengths.numpy(), start, stop, lag, *memory, mean, cov)

    spread(run, n, steps * min(lag, steps) * state * state * (2 * obs + 2 * state))
    return filtered, torch.from_numpy(mean), torch.from_numpy(cov)


def _filter(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
) -> tuple[Filtered, Kept, Any]:
    if x.device.type != "cpu" or system.F.device.type != "cpu":
        raise ValueError(
            f"the backward pass runs on the CPU, but x is on {x.device} and the system on "
            f"{system.F.device}; move them with .cpu()"
        )
    system = System._make(field.detach() for field in system)
    out = kalman_filter(system, x.detach(), mask, lengths, store="all", implementation="cpu")
    steps, state = x.shape[1], system.m0.shape[1]
    none = np.empty((0, steps, state, state))
    kept = Kept(
        *(
            none if field is None else field.numpy()
            for field in (getattr(out, name) for name in Kept._fields)
        )
    )
    return out, kept, System._make(np.ascontiguousarray(field.numpy()) for field in system)


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """The compiled loops, cached on disk and bound to a digest of all their sources."""
    key = digest(types, cpu_steps, cpu_adjoint, cpu_score)
    return compiled(cpu_score.bind_score(key)), compiled(cpu_score.bind_lag(key))
