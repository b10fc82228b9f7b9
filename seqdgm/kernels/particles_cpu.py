"""Particle kernels for the CPU: compiled loops, threads over series or over blocks of particles.

Documented in `seqdgm.kernels.particles`. The loops release the interpreter lock and are cached on
disk. Where there are fewer series than threads, the threads share the particles of a series: no
result depends on that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import (
    particles_cpu_filter,
    particles_cpu_math,
    particles_cpu_models,
    particles_cpu_resample,
    particles_cpu_traced,
    particles_reference,
    particles_types,
    philox,
)
from seqdgm.kernels.arrays import as_array, as_tensor
from seqdgm.kernels.cached import compiled, digest
from seqdgm.kernels.particles_cpu_filter import (
    ADD_UP,
    BEGIN,
    COVARIANCES,
    END,
    FAILED,
    FIND,
    FINISH,
    MOVE,
    NOTHING,
    PLACE,
    RESAMPLE,
    WHOLE,
    Cloud,
    Output,
    Scratch,
    make_cloud,
    make_scratch,
)
from seqdgm.kernels.particles_cpu_models import Model
from seqdgm.kernels.particles_cpu_resample import BLOCK
from seqdgm.kernels.particles_types import (
    SCHEMES,
    Bootstrapped,
    LinearProblem,
    Scheme,
    VolatilityProblem,
    Weighed,
)
from seqdgm.kernels.philox import split
from seqdgm.kernels.threads import spread

_LOG_2PI = math.log(2.0 * math.pi)
# Particles from which threads share a series, and what a step of one costs in multiplications.
_WORTH_SHARING = 32 * BLOCK
_WORK = 50


def weigh(log_weights: Float[Tensor, "series particle"]) -> Weighed:
    """Normalise weights."""
    x = as_array(log_weights)
    out, totals, ess = np.empty_like(x), np.empty(len(x)), np.empty(len(x))
    loop = _compiled("weigh")

    def run(start: int, stop: int) -> None:
        loop(x, start, stop, out, totals, ess)

    spread(run, len(x), 10 * x.shape[1])
    return Weighed(torch.from_numpy(out), torch.from_numpy(totals), torch.from_numpy(ess))


def resample(
    scheme: Scheme,
    log_weights: Float[Tensor, "series particle"],
    uniforms: Float[Tensor, "series number"],
    needed: Bool[Tensor, "series"] | None,
) -> Int[Tensor, "series particle"]:
    """Ancestors; -1 in rows without a positive weight."""
    x, u = as_array(log_weights), as_array(uniforms)
    n, count = x.shape
    out = np.empty((n, count), dtype=np.int64)
    wanted = np.ones(n, dtype=bool) if needed is None else as_array(needed)
    if scheme == "systematic" and count >= _WORTH_SHARING and n < torch.get_num_threads():
        for s in range(n):
            if wanted[s]:
                _resample_blocks(x[s], float(u[s, 0]), out[s])
            else:
                out[s] = np.arange(count)
        return torch.from_numpy(out)
    loop, number = _compiled("resample"), SCHEMES.index(scheme)
    guided = 0 if scheme in ("systematic", "stratified") else count
    summed = BLOCK if scheme == "systematic" else count

    def run(start: int, stop: int) -> None:
        c, guide = np.empty(summed), np.empty(guided, dtype=np.int64)
        starts = np.empty(BLOCK + 1, dtype=np.uint32)
        loop(number, x, u, wanted, start, stop, c, guide, starts, out)

    spread(run, n, 20 * count)
    return torch.from_numpy(out)


def select(
    scheme: Scheme,
    log_weights: Float[Tensor, "series particle"],
    survivors: int,
    threshold: float,
    draw: Callable[[], Float[Tensor, "survivor number"]],
) -> tuple[
    Float[Tensor, "survivor particle"],
    Int[Tensor, "survivor particle"] | None,
    Bool[Tensor, "survivor"] | None,
]:
    """`weigh`, and `resample` where that is needed, for cloud after small cloud.

    Between the loops there are a dozen operations on a few numbers, which cost more in tensors.
    Parameters and results are those of `seqdgm.inference.resampling.select`; `draw` is asked for
    uniform numbers in [0, 1) where there is something to draw.
    """
    weighed = weigh(log_weights)
    kept, count = weighed.log_weights[:survivors], log_weights.shape[1]
    needed = weighed.ess.numpy()[:survivors] < threshold * count
    if threshold >= 1:
        needed[:] = True
    if not needed.any():
        return kept, None, None
    ancestors = resample(scheme, kept, draw(), torch.from_numpy(needed))
    kept.numpy()[needed] = -math.log(count)
    return kept, ancestors, torch.from_numpy(needed)


def _resample_blocks(log_weights: np.ndarray, u: float, out: np.ndarray) -> None:
    """Systematic ancestors of one long series, its blocks in threads."""
    count = len(log_weights)
    sums, loop = np.zeros(-(-count // BLOCK) + 1), _compiled("blocks")

    def run(out: np.ndarray, start: int, stop: int) -> None:
        c, starts = np.empty(BLOCK), np.empty(BLOCK + 1, dtype=np.uint32)
        loop(log_weights, u, start, stop, c, sums, starts, out)

    spread(partial(run, out[:0]), count, 20, block=BLOCK)
    np.cumsum(sums, out=sums)
    if 0.0 < sums[-1] < math.inf:
        spread(partial(run, out), count, 20, block=BLOCK)
    else:
        out[:] = -1


def gather(x: Tensor, ancestors: Int[Tensor, "series particle"]) -> Tensor:
    """Pick particles: their memory is copied in words of 8 or 4 bytes."""
    size = x.element_size() * math.prod(x.shape[2:])
    if size == 0 or size % 4:
        return particles_reference.gather(x, ancestors)
    n, count = x.shape[:2]
    word = torch.int64 if size % 8 == 0 else torch.int32
    memory = x.detach().contiguous().view(n, count, -1).view(word).numpy()
    picked = as_array(ancestors)
    out = np.empty((n, picked.shape[1], memory.shape[2]), dtype=memory.dtype)
    bad, loop = np.zeros(1, dtype=bool), _compiled("gather")

    def run(start: int, stop: int) -> None:
        loop(memory, picked, start, stop, out, bad)

    spread(run, n, picked.shape[1] * (memory.shape[2] + 2))
    if bad[0]:
        raise ValueError(f"an ancestor does not lie between 0 and {count - 1}")
    return torch.from_numpy(out).view(x.dtype).view(*picked.shape, *x.shape[2:])


def pick(
    log_weights: Float[Tensor, "row particle"], uniforms: Float[Tensor, "row"]
) -> Int[Tensor, "row"]:
    """One draw a row; -1 in rows without a positive weight."""
    x, u = as_array(log_weights), as_array(uniforms)
    out, loop = np.empty(len(x), dtype=np.int64), _compiled("pick")

    def run(start: int, stop: int) -> None:
        loop(x, u, start, stop, np.empty(x.shape[1]), out)

    spread(run, len(x), 15 * x.shape[1])
    return torch.from_numpy(out)


def bootstrap_linear_gaussian(
    problem: LinearProblem, n_particles: int, seed: int, threshold: float, moments: bool
) -> Bootstrapped:
    """Bootstrap filter of a linear-Gaussian system."""
    arrays = [
        as_array(field, 0 if name in ("m0", "root0") else 1)
        for name, field in zip(problem._fields[:-1], problem[:-1], strict=True)
    ]
    model = Model._make([*arrays, np.empty((0, 8))])
    state = problem.F.shape[-1]
    work = Work(_compiled("filter"), model, problem.y.shape[1], Sizes(state, state, 1))
    return bootstrap(work, problem.lengths, n_particles, seed, threshold, int(moments))


def bootstrap_volatility(
    problem: VolatilityProblem, n_particles: int, seed: int, threshold: float, moments: bool
) -> Bootstrapped:
    """Bootstrap filter of stochastic volatility."""
    df = torch.zeros(1, dtype=torch.float64) if problem.df is None else problem.df
    constant = torch.lgamma(0.5 * df + 0.5) - torch.lgamma(0.5 * df) - 0.5 * (df * math.pi).log()
    if problem.df is None:
        constant = torch.full_like(df, -0.5 * _LOG_2PI)
    columns = torch.broadcast_tensors(*problem[:6], df, constant)
    volatility = torch.stack(columns, 1).numpy()
    y, mask = problem.y[..., None], problem.mask[..., None]
    nothing = [np.empty((0,) * axes) for axes in (4, 4, 3, 2, 3, 4, 3)]
    model = Model._make([*nothing, as_array(y, 1), as_array(mask, 1), volatility])
    work = Work(_compiled("filter"), model, problem.y.shape[1], Sizes(1, 1, 1))
    return bootstrap(work, problem.lengths, n_particles, seed, threshold, int(moments))


class Sizes(NamedTuple):
    """Rows that a block of particles needs: its elements, draws for them, and others."""

    state: int
    draws: int
    more: int


class Work(NamedTuple):
    """A compiled filter, the arrays of its model, the number of steps, and its rows."""

    loop: Callable[..., None]
    model: NamedTuple
    steps: int
    sizes: Sizes


def traced(model: particles_cpu_traced.Traced, sizes: Sizes) -> Work:
    """The filter of generated functions."""
    return Work(_compiled("traced"), model, model.y.shape[1], sizes)


def bootstrap(
    work: Work, lengths: Tensor, count: int, seed: int, threshold: float, wanted: int
) -> Bootstrapped:
    """Run a compiled filter; `wanted` says which moments (`particles_cpu_filter`)."""
    n, steps, state = len(lengths), work.steps, work.sizes.state
    shape = (n if wanted > NOTHING else 0, steps, state)
    output = Output(
        np.zeros((n, steps)),
        np.full((n, steps), np.nan),
        np.zeros(n),
        np.full(shape, np.nan),
        np.full(shape, np.nan),
        np.full((n if wanted == COVARIANCES else 0, steps, state, state), np.nan),
    )
    ends, key = as_array(lengths), np.array(split(seed), dtype=np.uint64)
    pairs = state * (state - 1) // 2 if wanted == COVARIANCES else 0
    if count >= _WORTH_SHARING and n < torch.get_num_threads():
        _share(work, ends, make_cloud(count, state, pairs), key, threshold, output)
    else:

        def run(start: int, stop: int) -> None:
            memory = (make_cloud(count, state, pairs), make_scratch(*work.sizes))
            work.loop(WHOLE, work.model, *memory, key, threshold, output, 0, ends, 0, start, stop)

        spread(run, n, steps * count * _WORK)
    increments, ess, stderr = (torch.from_numpy(array) for array in output[:3])
    return Bootstrapped(increments, ess, stderr, *(as_tensor(array) for array in output[3:]))


def _share(
    work: Work,
    lengths: np.ndarray,
    cloud: Cloud,
    key: np.ndarray,
    threshold: float,
    output: Output,
) -> None:
    """Filter few series of many particles, with all threads at one series."""
    count, facts = len(cloud.log_weights), cloud.facts
    threads = torch.get_num_threads()
    scratches = [make_scratch(*work.sizes) for _ in range(threads)]
    blocks = -(-count // BLOCK)
    edges = [min(count, BLOCK * (blocks * k // threads)) for k in range(threads + 1)]

    with ThreadPoolExecutor(threads) as pool:

        def do(part: int, s: int, t: int) -> None:
            def run(scratch: Scratch, start: int, stop: int) -> None:
                data = (work.model, cloud, scratch, key, threshold, output)
                work.loop(part, *data, s, lengths, t, start, stop)

            if part in (ADD_UP, PLACE, MOVE):
                list(pool.map(run, scratches, edges[:-1], edges[1:]))
            else:
                run(scratches[0], 0, 0)

        for s, length in enumerate(lengths.tolist()):
            do(BEGIN, s, 0)
            for t in range(length):
                if facts[RESAMPLE]:
                    for part in (ADD_UP, FIND, PLACE):
                        do(part, s, t)
                do(MOVE, s, t)
                do(FINISH, s, t)
                if facts[FAILED]:
                    break
            if length:
                do(END, s, 0)


@cache
def _compiled(name: str) -> Callable[..., None]:
    """A compiled loop, cached on disk."""
    bind = {
        "weigh": particles_cpu_resample.bind_weigh,
        "resample": particles_cpu_resample.bind_resample,
        "blocks": particles_cpu_resample.bind_blocks,
        "gather": particles_cpu_resample.bind_gather,
        "pick": particles_cpu_resample.bind_pick,
        "filter": particles_cpu_models.bind_filter,
        "traced": particles_cpu_traced.bind_filter,
    }[name]
    sources = (philox, particles_types, particles_cpu_math, particles_cpu_resample)
    models = (particles_cpu_models, particles_cpu_traced)
    return compiled(bind(digest(*sources, particles_cpu_filter, *models)))
