"""Particle kernels on a GPU, beside the same in torch, and JAX packages where JAX has CUDA.

Where there is no GPU, nothing is timed. A package whose JAX sees no GPU counts as not installed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from _harness import Call, Contender, Task, equal, main, unbiased
from particle import (
    LOADING,
    MU,
    NOISE_STD,
    RHO,
    SIGMA,
    STATE_STD,
    TRANSITION,
    Volatility,
    same_by_matrices,
    volatility_evidence,
)

from seqdgm.kernels import System, particles
from seqdgm.kernels.particles import Implementation

DEVICE = "cuda"


@dataclass(frozen=True)
class Sizes:
    gpu: str
    many_series: int  # of `few_particles`
    few_particles: int
    many_particles: int
    steps: int
    volatility_steps: int
    checks: int


FULL = partial(Sizes, many_series=64, few_particles=1024, many_particles=10**6, steps=100,
               volatility_steps=1000, checks=8)  # fmt: skip
TINY = partial(Sizes, many_series=4, few_particles=1000, many_particles=10**4, steps=15,
               volatility_steps=40, checks=8)  # fmt: skip


def synchronised(call: Call) -> Call:
    """A call that ends when the GPU has."""

    def timed() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return timed


def need_jax_on_gpu(package: str) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    if jax.default_backend() != "gpu":
        raise ModuleNotFoundError(f"JAX, which {package} runs on, sees no GPU", name=package)


# -- weights ------------------------------------------------------------------------------------


def log_weights(n: int, count: int) -> torch.Tensor:
    rng = np.random.default_rng(5)
    return torch.log_softmax(torch.from_numpy(rng.normal(0, 1, (n, count))), 1).to(DEVICE)


def weighing(n: int, count: int) -> Task:
    a = log_weights(n, count) - 3.0

    def ours(implementation: Implementation) -> Call:
        return synchronised(lambda: particles.weigh(a, implementation=implementation))

    def plain() -> Any:
        total = torch.logsumexp(a, 1)
        normalised = a - total[:, None]
        return normalised, total, 1.0 / normalised.exp().square().sum(1)

    def value(result: Any) -> np.ndarray:
        return torch.stack([result[1], result[2]]).cpu().numpy()

    return Task(
        f"normalise and effective sample size, {n:,} x {count:,}",
        [
            Contender("seqdgm, Triton", lambda: ours("cuda"), value),
            Contender("torch", lambda: synchronised(plain), value, "torch"),
        ],
        equal(1e-9),
    )


def resampling(n: int, count: int) -> Task:
    a = log_weights(n, count)
    u = torch.from_numpy(np.random.default_rng(7).random((n, 1))).to(DEVICE)

    def ours(implementation: Implementation) -> Call:
        call = partial(particles.resample, "systematic", a, u, implementation=implementation)
        return synchronised(call)

    def plain() -> torch.Tensor:
        sums = a.exp().cumsum(1)
        levels = (torch.arange(count, device=DEVICE) + u) / count
        return torch.searchsorted(sums, levels, right=True).clamp_max(count - 1)

    def cuthbert() -> Call:
        need_jax_on_gpu("cuthbertlib")
        import jax
        from cuthbertlib.resampling.utils import inverse_cdf

        weights, numbers = jax.numpy.asarray(a.cpu()), jax.numpy.asarray(u.cpu())

        @jax.jit
        @jax.vmap
        def ancestors(row: Any, number: Any) -> Any:
            return inverse_cdf((number + jax.numpy.arange(count)) / count, row)

        return lambda: ancestors(weights, numbers).block_until_ready()

    def of_torch(result: torch.Tensor) -> np.ndarray:
        return result.double().cpu().numpy()

    # Sums that are rounded differently move a level across an edge now and then.
    return Task(
        f"systematic resampling, {n:,} x {count:,}",
        [
            Contender("seqdgm, Triton", lambda: ours("cuda"), of_torch),
            Contender("seqdgm, torch", lambda: ours("reference"), of_torch),
            Contender("torch", lambda: synchronised(plain), of_torch, "torch"),
            Contender("cuthbert", cuthbert, np.asarray, "cuthbertlib"),
        ],
        equal(0.0, atol=1.0),
    )


# -- bootstrap filters --------------------------------------------------------------------------


def evidence(result: Any) -> np.ndarray:
    return result.increments.sum(1).cpu().numpy()


def linear_gaussian(sizes: Sizes, n: int, count: int) -> Task:
    given = same_by_matrices()
    data = given.sample(sizes.steps, n, seed=1)
    Q, R = STATE_STD**2 * np.eye(4), NOISE_STD**2 * np.eye(2)
    by_step = [TRANSITION, Q, LOADING, R, np.zeros(4), np.zeros(2)]
    fields = [field[None, None] for field in by_step]
    fields += [np.zeros((1, 4)), np.eye(4)[None], np.zeros((1, 4, 4))]
    system = System(*(torch.from_numpy(field).to(DEVICE) for field in fields))
    x = torch.tensor(data.values, device=DEVICE)
    lengths = torch.full((n,), sizes.steps, device=DEVICE)

    def ours(implementation: Implementation) -> Call:
        seeds = itertools.count()
        return synchronised(
            lambda: particles.bootstrap_linear_gaussian(
                system,
                x,
                ~x.isnan(),
                lengths,
                n_particles=count,
                seed=next(seeds),
                implementation=implementation,
            )
        )

    return Task(
        f"bootstrap filter, linear-Gaussian state 4, {n:,} series, T = {sizes.steps}, "
        f"N = {count:,}",
        [
            Contender("seqdgm, Triton", lambda: ours("cuda"), evidence),
            Contender("seqdgm, torch", lambda: ours("reference"), evidence),
        ],
        unbiased(given.log_prob(data).value),
        checks=sizes.checks,
    )


def volatility(sizes: Sizes, count: int) -> Task:
    x = Volatility().sample(sizes.volatility_steps, seed=2).values[0, :, 0]
    y = torch.tensor(x[None], device=DEVICE)
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    model = particles.Volatility(MU * one, RHO * one, SIGMA * one)
    lengths = torch.full((1,), len(x), device=DEVICE)

    def ours(implementation: Implementation) -> Call:
        seeds = itertools.count()
        return synchronised(
            lambda: particles.bootstrap_volatility(
                model,
                y,
                ~y.isnan(),
                lengths,
                n_particles=count,
                seed=next(seeds),
                implementation=implementation,
            )
        )

    return Task(
        f"bootstrap filter, stochastic volatility, T = {len(x):,}, N = {count:,}",
        [
            Contender("seqdgm, Triton", lambda: ours("cuda"), evidence),
            Contender("seqdgm, torch", lambda: ours("reference"), evidence),
            Contender("smcx", partial(smcx, x, count), package="smcx"),
        ],
        unbiased(volatility_evidence(x)),
        checks=sizes.checks,
    )


def smcx(x: np.ndarray, count: int) -> Call:
    need_jax_on_gpu("smcx")
    import jax
    from jax import numpy as jnp
    from smcx import bootstrap_filter

    spread = SIGMA / (1 - RHO**2) ** 0.5

    def density(y: Any, z: Any) -> Any:
        scaled = y[0] * jnp.exp(-z[0] / 2)
        return -0.5 * (jnp.log(2 * jnp.pi) + z[0] + scaled**2)

    def log_evidence(key: Any) -> Any:
        return bootstrap_filter(
            key,
            lambda key, count: MU + spread * jax.random.normal(key, (count, 1)),
            lambda key, z: MU + RHO * (z - MU) + SIGMA * jax.random.normal(key, (1,)),
            density,
            jnp.asarray(x),
            count,
            store_history=False,
        ).marginal_loglik

    run, seeds = jax.jit(log_evidence), itertools.count()
    return lambda: run(jax.random.key(next(seeds))).block_until_ready()


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "weigh-many-series": lambda s: weighing(s.many_series, s.few_particles),
    "weigh-many-particles": lambda s: weighing(1, s.many_particles),
    "resample-many-series": lambda s: resampling(s.many_series, s.few_particles),
    "resample-many-particles": lambda s: resampling(1, s.many_particles),
    "linear-gaussian": lambda s: linear_gaussian(s, s.many_series, s.few_particles),
    "linear-gaussian-full": lambda s: linear_gaussian(s, 32 * s.many_series, s.few_particles),
    "volatility-few": lambda s: volatility(s, s.few_particles),
    "volatility-more": lambda s: volatility(s, 10 * s.few_particles),
    "volatility-many": lambda s: volatility(s, s.many_particles),
}

if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU: nothing to time")
        raise SystemExit(0)
    GPU = torch.cuda.get_device_name()
    main("cuda_particles", __doc__, TASKS, full=FULL(GPU), tiny=TINY(GPU))
