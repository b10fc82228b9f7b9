"""Bootstrap filters of the packages that run on JAX, for models of one particle at a time.

A package compiles the whole filter, all series, to one program that gives back the evidence alone;
neither keeps a history. JAX ignores the threads of OpenMP, and the flags of XLA that are said to
limit its own have no effect on the CPU; NPROC does, if it is set before JAX starts.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from _harness import Call, Contender

# In single precision they do less work than the others.
SINGLE = "{}, float32 (shown, does not count)"


class Walk(NamedTuple):
    """A Markov model of one particle: `first` and `move` draw, `log_density(x, z)` weighs."""

    first: Callable[[Any], Any]
    move: Callable[[Any, Any], Any]
    log_density: Callable[[Any, Any], Any]


MakeWalk = Callable[[Any], Walk]  # from the type of its numbers
Filter = Callable[[Walk, int], Callable[[Any, Any], Any]]


def start(package: str) -> Any:
    """JAX with one thread and double precision, after `package` was imported."""
    os.environ.setdefault("NPROC", "1")
    import_module(package)
    import jax

    # Callbacks run in threads that see only the global setting.
    jax.config.update("jax_enable_x64", True)
    return jax


def smcx_filter(walk: Walk, n_particles: int) -> Callable[[Any, Any], Any]:
    """Evidence of one series, (steps, dim), by smcx."""
    import jax
    import smcx

    def first(key: Any, count: int) -> Any:
        return jax.vmap(walk.first)(jax.random.split(key, count))

    def run(key: Any, x: Any) -> Any:
        return smcx.bootstrap_filter(
            key,
            first,
            walk.move,
            walk.log_density,
            x,
            n_particles,
            resampling_fn=smcx.systematic,
            resampling_threshold=0.5,
            store_history=False,
        ).marginal_loglik

    return run


def cuthbert_filter(walk: Walk, n_particles: int) -> Callable[[Any, Any], Any]:
    """Evidence of one series, (steps, dim), by cuthbert.

    Its first state comes before the first observation, so that the first move stays where it is.
    """
    import cuthbert
    import jax
    from cuthbert.smc.particle_filter import build_filter
    from cuthbertlib.resampling import ess_decorator, systematic

    def move(key: Any, z: Any, step: Any) -> Any:
        return jax.numpy.where(step[1], z, walk.move(key, z))

    def weigh(before: Any, z: Any, step: Any) -> Any:
        return walk.log_density(step[0], z)

    resampler = ess_decorator(systematic.resampling, 0.5)
    built = build_filter(walk.first, move, weigh, n_particles, resampler)

    def run(key: Any, x: Any) -> Any:
        begin, rest = jax.random.split(key)
        steps = (x, jax.numpy.arange(len(x)) == 0)
        states = cuthbert.filter(built, steps, built.init_prepare(key=begin), key=rest)
        return states.log_normalizing_constant[-1]

    return run


def contender(
    package: str,
    build: Filter,
    make: MakeWalk,
    x: np.ndarray,
    n_particles: int,
    *,
    double: bool = True,
) -> Contender:
    """Evidence of all series in `x`, (series, steps, dim), in one compiled program.

    The series are mapped over one after the other. Vectorised over them a program resamples all of
    them at every step, as it cannot branch for each.
    """

    def prepare() -> Call:
        jax = start(package)
        with jax.enable_x64(double):
            kind = jax.numpy.float64 if double else jax.numpy.float32
            data = jax.numpy.asarray(x, kind)
            one = build(make(kind), n_particles)
            run = jax.jit(lambda keys, x: jax.lax.map(lambda pair: one(*pair), (keys, x)))
        seeds = itertools.count()

        def call() -> np.ndarray:
            with jax.enable_x64(double):
                keys = jax.random.split(jax.random.key(next(seeds)), len(x))
                return np.asarray(run(keys, data), float)

        return call

    name = f"{package}, float64" if double else SINGLE.format(package)
    return Contender(name, prepare, np.asarray, package, counts=double)


def volatility(mu: float, rho: float, sigma: float) -> MakeWalk:
    """Stochastic volatility that begins in its stationary distribution."""

    def make(kind: Any) -> Walk:
        import jax
        import jax.numpy as jnp

        spread = sigma / (1 - rho**2) ** 0.5
        half_log = 0.5 * float(np.log(2 * np.pi))

        def first(key: Any) -> Any:
            return mu + spread * jax.random.normal(key, (), kind)

        def move(key: Any, z: Any) -> Any:
            return mu + rho * (z - mu) + sigma * jax.random.normal(key, (), kind)

        def log_density(x: Any, z: Any) -> Any:
            return -0.5 * (z + x[0] ** 2 * jnp.exp(-z)) - half_log

        return Walk(first, move, log_density)

    return make


def linear(F: np.ndarray, H: np.ndarray, state_std: float, noise_std: float) -> MakeWalk:
    """Linear and Gaussian with independent errors, from N(0, I)."""

    def make(kind: Any) -> Walk:
        import jax
        import jax.numpy as jnp

        transition, loading = jnp.asarray(F, kind), jnp.asarray(H, kind)
        constant = len(H) * float(np.log(noise_std * np.sqrt(2 * np.pi)))

        def first(key: Any) -> Any:
            return jax.random.normal(key, (len(F),), kind)

        def move(key: Any, z: Any) -> Any:
            return transition @ z + state_std * jax.random.normal(key, (len(F),), kind)

        def log_density(x: Any, z: Any) -> Any:
            error = (x - loading @ z) / noise_std
            return -0.5 * (error * error).sum() - constant

        return Walk(first, move, log_density)

    return make
