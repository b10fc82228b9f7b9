"""The bootstrap filter of a model whose step is generated code, compiled.

The rows of a block in memory are the state before the move, the draws, and the state after it;
generated functions find them at fixed places of one array, so that their loops are vectors. They
are called by their addresses: this file is compiled once, and for a model only its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from seqdgm.kernels.particles_cpu_filter import (
    HALF,
    RENEWED,
    Cloud,
    Output,
    Scratch,
    at,
    bind_run,
    fetch,
)
from seqdgm.kernels.particles_cpu_math import called, normals, uniforms
from seqdgm.kernels.particles_cpu_resample import BLOCK

NO_DRAWS, NORMAL, UNIFORM = range(3)  # kinds of the rows of draws
INITIAL, TRANSITION, DENSITY = range(3)  # places of the addresses
ALL = -1  # elements of the observation
_COUNT, _NUMBERS = types.int64, types.CPointer(types.float64)
# p, u, t, n, w; and p, u, t, x, element, n, w, log-weights.
_MOVE = types.void(_NUMBERS, _NUMBERS, _COUNT, _COUNT, _NUMBERS)
_SCORE = types.void(_NUMBERS, _NUMBERS, _COUNT, _NUMBERS, _COUNT, _COUNT, _NUMBERS, _NUMBERS)
# Views of memory at an address need numba's own allocator to be there, if idle.
_HOW: dict[str, Any] = {"cache": True, "fastmath": {"contract"}, "error_model": "numpy"}
mover: Any = numba.cfunc(_MOVE, **_HOW)
scorer: Any = numba.cfunc(_SCORE, **_HOW)


class Traced(NamedTuple):
    """What generated functions read, and where they are."""

    p: np.ndarray  # (value,), of parameters
    u: np.ndarray  # (series, time, input)
    y: np.ndarray  # (series, time, element)
    mask: np.ndarray
    kinds: np.ndarray  # (2, draw), of the first move and of the others
    addresses: np.ndarray  # (3,)


def _call(_context: Any, address: Any, arguments: Any) -> Any:
    """Call the function at an address with a tuple of numbers, and of arrays by their memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = []
        for k, kind in enumerate(signature.args[1]):
            value = builder.extract_value(args[1], k)
            if not isinstance(kind, types.Integer):
                value = context.make_array(kind)(context, builder, value).data
            given.append(value)
        shape = ir.FunctionType(ir.VoidType(), [value.type for value in given])
        builder.call(builder.inttoptr(args[0], shape.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(address, arguments), generate


call: Any = intrinsic(_call)


@called
def _draw(
    kinds: np.ndarray, key: Any, s: int, t: int, first: int, n: int, draws: np.ndarray
) -> None:
    for k in range(len(kinds)):
        if kinds[k] == NORMAL:
            normals(key, s, t, k, first, n, draws[k])
        elif kinds[k] == UNIFORM:
            uniforms(key, s, t, k, first, n, draws[k])


@called
def _move(
    model: Traced, cloud: Cloud, scratch: Scratch, key: Any, s: int, t: int, first: int
) -> None:
    facts, rows, draws = cloud.facts, scratch.rows, scratch.draws
    half = int(facts[HALF])
    new = cloud.z[1 - half]
    n, state, which = min(BLOCK, new.shape[1] - first), len(new), INITIAL
    if t > 0:
        which = TRANSITION
        for d in range(state):
            fetch(cloud.z[half, d], cloud.ancestors, first, facts[RENEWED] > 0.0, rows[d])
    _draw(model.kinds[which], key, s, t, first, n, draws)
    call(model.addresses[which], (model.p, at(model.u, s, t), t, n, rows))
    for d in range(state):
        moved, out = rows[state + len(draws) + d], new[d, first : first + BLOCK]
        for i in range(n):
            out[i] = moved[i]


@called
def _score(model: Traced, cloud: Cloud, scratch: Scratch, s: int, t: int, first: int) -> None:
    log_weights, rows = cloud.log_weights[first : first + BLOCK], scratch.rows
    u, x, seen = at(model.u, s, t), at(model.y, s, t), at(model.mask, s, t)
    address, n, count = model.addresses[DENSITY], len(log_weights), 0
    for each in seen:
        count += each
    if count == len(seen):
        call(address, (model.p, u, t, x, np.int64(ALL), n, rows, log_weights))
    else:
        for d in range(len(seen)):
            if seen[d]:
                call(address, (model.p, u, t, x, d, n, rows, log_weights))


_run = bind_run(_move, _score)


def bind_filter(digest: str) -> Callable[..., None]:
    """The filter over a range of series, or a part of it for threads that share one."""

    def bootstrap(
        part: int,
        model: Traced,
        cloud: Cloud,
        scratch: Scratch,
        key: np.ndarray,
        threshold: float,
        output: Output,
        series: int,
        lengths: np.ndarray,
        t: int,
        start: int,
        stop: int,
    ) -> None:
        """All of series `start` to `stop`; or a part of step t, for particles `start` to `stop`."""
        _ = digest
        data = (model, cloud, scratch, key, threshold, output)
        _run(part, *data, series, lengths, t, start, stop)

    return bootstrap
