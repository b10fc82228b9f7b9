"""Systematic resampling by itself: ancestors of many small clouds of particles, and of a large one.

Everybody is given weights as it takes them: seqdgm and cuthbert their logarithms, the others the
weights themselves. In single precision the cumulative sums of a million weights are off by whole
particles, so JAX runs in double precision there, and in both for the small clouds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import _jax
import numpy as np
import torch
from _harness import Agreement, Call, Contender, DisagreementError, Task, main

from seqdgm.kernels.particles import resample


@dataclass(frozen=True)
class Sizes:
    """Clouds and particles of the two tasks."""

    small: tuple[int, int]
    large: tuple[int, int]


FULL = Sizes((64, 1024), (1, 1_000_000))
TINY = Sizes((3, 64), (1, 2_000))
KEYS = 16  # JAX makes keys for its random numbers outside the clock


def log_weights(clouds: int, n_particles: int) -> np.ndarray:
    """Normalised log-weights of standard normal errors: an effective sample size of N / 2.7."""
    found = np.random.default_rng(3).normal(size=(clouds, n_particles))
    return np.asarray(found - np.logaddexp.reduce(found, axis=1, keepdims=True))


def counts(ancestors: Any) -> np.ndarray:
    """How often each particle was drawn."""
    ancestors = np.asarray(ancestors)
    rows = [np.bincount(row, minlength=len(row)) for row in ancestors]
    return np.stack(rows).astype(float)


def stratified(weights: np.ndarray, rounding: float = 0.01) -> Agreement:
    """Each of N particles is drawn N W times, rounded up or down, as systematic resampling does."""
    expected = weights * weights.shape[1]

    def agree(values: Mapping[str, np.ndarray]) -> str:
        worst = 0.0
        for name, found in values.items():
            gap = float(np.abs(found - expected).max())
            if not gap < 1 + rounding:
                raise DisagreementError(f"{name} draws a particle {gap:.3g} times too often")
            worst = max(worst, gap)
        return f"copies differ from N W by {worst:.4f} at most"

    return agree


def kernel(log_w: np.ndarray, threads: int = 1) -> Call:
    given, generator = torch.from_numpy(log_w), torch.Generator().manual_seed(0)
    shape = (len(log_w), 1)

    def call() -> torch.Tensor:
        torch.set_num_threads(threads)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
        return resample("systematic", given, uniforms)

    return call


def search(weights: np.ndarray) -> Call:
    """What one would write in torch."""
    given, generator = torch.from_numpy(weights), torch.Generator().manual_seed(0)
    clouds, count = weights.shape

    def call() -> torch.Tensor:
        offset = torch.rand((clouds, 1), generator=generator, dtype=torch.float64)
        levels = (torch.arange(count, dtype=torch.float64) + offset) / count
        return torch.searchsorted(given.cumsum(1), levels, right=True).clamp_max(count - 1)

    return call


def particles(weights: np.ndarray) -> Call:
    from particles.resampling import systematic

    np.random.seed(0)  # noqa: NPY002 (the package draws from numpy's global generator)
    return lambda: [systematic(row) for row in weights]


def filterpy(weights: np.ndarray) -> Call:
    from filterpy.monte_carlo import systematic_resample

    np.random.seed(0)  # noqa: NPY002 (the package draws from numpy's global generator)
    return lambda: [systematic_resample(row) for row in weights]


def smcx_draw(count: int) -> Callable[[Any, Any], Any]:
    import smcx

    return lambda key, log_w: smcx.systematic(key, log_w, count)


def cuthbert_draw(count: int) -> Callable[[Any, Any], Any]:
    from cuthbertlib.resampling import systematic

    # Without positions it has nothing to gather.
    return lambda key, log_w: systematic.resampling(key, log_w, (), count)[0]


def jax_contender(
    package: str,
    build: Callable[[int], Callable[[Any, Any], Any]],
    given: np.ndarray,
    double: bool = True,
) -> Contender:
    """All clouds in one compiled program."""

    def prepare() -> Call:
        jax = _jax.start(package)
        clouds, count = given.shape
        with jax.enable_x64(double):
            data = jax.numpy.asarray(given, jax.numpy.float64 if double else jax.numpy.float32)
            run = jax.jit(jax.vmap(build(count)))
            keys = itertools.cycle(
                [jax.random.split(jax.random.key(k), clouds) for k in range(KEYS)]
            )

        def call() -> Any:
            with jax.enable_x64(double):
                return jax.block_until_ready(run(next(keys), data))

        return call

    name = f"{package}, float64" if double else _jax.SINGLE.format(package)
    return Contender(name, prepare, counts, package, counts=double)


def systematic(sizes: Sizes, large: bool) -> Task:
    clouds, count = sizes.large if large else sizes.small
    log_w = log_weights(clouds, count)
    weights = np.exp(log_w)
    smcx = partial(jax_contender, "smcx", smcx_draw, weights)
    cuthbert = partial(jax_contender, "cuthbertlib", cuthbert_draw, log_w)
    single = () if large else (smcx(double=False), cuthbert(double=False))
    return Task(
        f"systematic resampling, {clouds} x {count:,}",
        [
            Contender("seqdgm, kernel", lambda: kernel(log_w), counts),
            Contender("seqdgm, kernel, 2 threads", lambda: kernel(log_w, 2), counts),
            Contender("particles", lambda: particles(weights), counts, "particles"),
            Contender("torch, searchsorted", lambda: search(weights), counts, "torch"),
            Contender("filterpy", lambda: filterpy(weights), counts, "filterpy"),
            smcx(),
            cuthbert(),
            *single,
        ],
        stratified(weights),
    )


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "small": partial(systematic, large=False),
    "large": partial(systematic, large=True),
}

if __name__ == "__main__":
    main("resampling", __doc__, TASKS, full=FULL, tiny=TINY)
