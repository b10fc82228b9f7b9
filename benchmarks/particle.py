"""Evidence by bootstrap particle filters: the package's models, and models that a user wrote.

The peers are particles (NumPy), pydpf (torch), smcx and cuthbert (both JAX). dynamax has no
particle filter but a Rao-Blackwellised one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import _jax
import _pydpf
import numpy as np
import torch
from _harness import Call, Contender, Task, main, unbiased
from scipy import stats
from torch.distributions import Normal

import seqdgm as sq


@dataclass(frozen=True)
class Sizes:
    """`many_checks` is the number of evidences compared where there are many particles."""

    series: int
    steps: int
    n_particles: int
    volatility_steps: int
    volatility_particles: tuple[int, int, int]
    checks: int
    many_checks: int


FULL = Sizes(64, 100, 1000, 1000, (1_000, 10_000, 100_000), checks=8, many_checks=3)
TINY = Sizes(4, 15, 200, 40, (200, 300, 400), checks=8, many_checks=3)


def evidence(
    model: sq.StateSpaceModel, data: Any, n_particles: int, threads: int = 1, **options: Any
) -> Call:
    """The call of `log_prob`, each with a seed of its own."""
    seeds = itertools.count()

    def call() -> Any:
        torch.set_num_threads(threads)
        return model.log_prob(data, seed=next(seeds), n_particles=n_particles, **options)

    return call


def values(found: Any) -> np.ndarray:
    return np.asarray(found.value)


def particles_smc(model: Any, x: np.ndarray, n_particles: int) -> float:
    from particles import SMC
    from particles.state_space_models import Bootstrap

    smc = SMC(
        fk=Bootstrap(ssm=model, data=x),
        N=n_particles,
        resampling="systematic",
        ESSrmin=0.5,
        collect="off",
    )
    smc.run()
    return float(smc.logLt)


def ours(
    given: sq.StateSpaceModel,
    written: Callable[[bool], sq.StateSpaceModel],
    data: Any,
    n_particles: int,
    **options: Any,
) -> list[Contender]:
    """The package's own model with one and two threads, then the user's, driven and compiled."""
    name = f"seqdgm, {type(given).__name__}"
    run = partial(evidence, data=data, n_particles=n_particles, **options)
    return [
        Contender(name, lambda: run(given), values),
        Contender(f"{name}, 2 threads", lambda: run(given, threads=2), values),
        Contender("seqdgm, user's model", lambda: run(written(True)), values),
        Contender("seqdgm, user's model, unchecked", lambda: run(written(False)), values),
        Contender(
            "seqdgm, user's model, compiled", lambda: run(written(True), compile=True), values
        ),
    ]


# -- linear and Gaussian, state 4 ---------------------------------------------------------------

TRANSITION = np.array(
    [[0.8, 0.2, 0.0, 0.0], [-0.2, 0.8, 0.0, 0.0], [0.0, 0.0, 0.9, 0.1], [0.0, 0.0, 0.0, 0.7]]
)
LOADING = np.array([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 1.0]])
STATE_STD, NOISE_STD = 0.5, 1.0


class LinearGaussian(sq.StateSpaceModel):
    """z_t = F z_{t-1} + w_t, x_t = H z_t + v_t, as a user of the package would write it.

    Unchecked, its distributions do not look at every parameter of every particle.
    """

    latent_dim = 4

    def __init__(self, checked: bool = True) -> None:
        super().__init__()
        self.checked = checked
        self.register_buffer("F", torch.from_numpy(TRANSITION.copy()))
        self.register_buffer("H", torch.from_numpy(LOADING.copy()))

    def initial(self, u):
        return Normal(torch.zeros(4, dtype=self.dtype), torch.ones(4, dtype=self.dtype))

    def transition(self, z, u):
        return Normal(z @ self.F.T, STATE_STD, validate_args=self.checked)

    def emission(self, z, u):
        return Normal(z @ self.H.T, NOISE_STD, validate_args=self.checked)


def same_by_matrices() -> sq.LinearGaussianSSM:
    return sq.LinearGaussianSSM(
        F=TRANSITION,
        H=LOADING,
        Q=STATE_STD**2 * np.eye(4),
        R=NOISE_STD**2 * np.eye(2),
        m0=np.zeros(4),
        P0=np.eye(4),
    )


def linear_gaussian(sizes: Sizes) -> Task:
    given = same_by_matrices()
    data = given.sample(sizes.steps, sizes.series, seed=1)

    def particles() -> Call:
        from particles.kalman import MVLinearGauss

        np.random.seed(0)  # noqa: NPY002 (the package draws from numpy's global generator)
        model = MVLinearGauss(
            F=TRANSITION,
            G=LOADING,
            covX=STATE_STD**2 * np.eye(4),
            covY=NOISE_STD**2 * np.eye(2),
            mu0=np.zeros(4),
            cov0=np.eye(4),
        )
        return lambda: [particles_smc(model, x, sizes.n_particles) for x in data.values]

    make = _jax.linear(TRANSITION, LOADING, STATE_STD, NOISE_STD)
    jax = partial(_jax.contender, make=make, x=data.values, n_particles=sizes.n_particles)
    batched = _pydpf.linear(TRANSITION, LOADING, STATE_STD, NOISE_STD)
    dpf = partial(_pydpf.contender, batched, data.values, sizes.n_particles)
    return Task(
        f"bootstrap filter, linear-Gaussian, state 4, observed 2, {sizes.series} series, "
        f"T = {sizes.steps}, N = {sizes.n_particles:,}",
        [
            *ours(given, LinearGaussian, data, sizes.n_particles, method="particle"),
            Contender("particles, series by series", particles, np.asarray, "particles"),
            dpf(),
            dpf(double=False),
            jax("smcx", _jax.smcx_filter),
            jax("smcx", _jax.smcx_filter, double=False),
            jax("cuthbert", _jax.cuthbert_filter),
            jax("cuthbert", _jax.cuthbert_filter, double=False),
        ],
        unbiased(given.log_prob(data).value),
        checks=max(2, sizes.checks // 4),
    )


# -- stochastic volatility ----------------------------------------------------------------------

MU, RHO, SIGMA = -1.0, 0.95, 0.25


class Volatility(sq.StateSpaceModel):
    """z_t = mu + rho (z_{t-1} - mu) + sigma e_t, x_t = exp(z_t / 2) v_t."""

    latent_dim = 1

    def __init__(self, checked: bool = True) -> None:
        super().__init__()
        self.checked = checked

    def initial(self, u):
        spread = SIGMA / (1 - RHO**2) ** 0.5
        return Normal(
            torch.full((1,), MU, dtype=self.dtype), torch.full((1,), spread, dtype=self.dtype)
        )

    def transition(self, z, u):
        return Normal(MU + RHO * (z - MU), SIGMA, validate_args=self.checked)

    def emission(self, z, u):
        return Normal(torch.zeros_like(z), torch.exp(z / 2), validate_args=self.checked)


def volatility_evidence(x: np.ndarray, points: int = 600) -> float:
    """log p(x) by a filter on a grid of 8 stationary standard deviations on either side.

    The trapezoidal rule converges faster than any power of the spacing for smooth densities that
    vanish at both ends, so a few hundred points leave an error far below that of any particle
    filter.
    """
    spread = SIGMA / (1 - RHO**2) ** 0.5
    grid = np.linspace(MU - 8 * spread, MU + 8 * spread, points)
    width = grid[1] - grid[0]
    move = stats.norm.pdf(grid[:, None], MU + RHO * (grid - MU), SIGMA) * width
    density, total = stats.norm.pdf(grid, MU, spread), 0.0
    for value in x:
        joint = density * stats.norm.pdf(value, 0.0, np.exp(grid / 2))
        step = joint.sum() * width
        total += float(np.log(step))
        density = move @ (joint / step)
    return total


def volatility(sizes: Sizes, which: int) -> Task:
    n_particles, many = sizes.volatility_particles[which], which == 2
    x = Volatility().sample(sizes.volatility_steps, seed=2).values

    def particles() -> Call:
        from particles.state_space_models import StochVol

        np.random.seed(0)  # noqa: NPY002 (the package draws from numpy's global generator)
        model = StochVol(mu=MU, rho=RHO, sigma=SIGMA)
        return lambda: [particles_smc(model, x[0, :, 0], n_particles)]

    make = _jax.volatility(MU, RHO, SIGMA)
    jax = partial(_jax.contender, make=make, x=x, n_particles=n_particles)
    dpf = partial(_pydpf.contender, _pydpf.volatility(MU, RHO, SIGMA), x, n_particles)
    peers = [
        Contender("particles", particles, np.asarray, "particles"),
        dpf(),
        dpf(double=False),
        jax("smcx", _jax.smcx_filter),
        jax("smcx", _jax.smcx_filter, double=False),
    ]
    # With many particles it takes twice as long as smcx, and the time for it would be the longest.
    if not many:
        peers.append(jax("cuthbert", _jax.cuthbert_filter))
        peers.append(jax("cuthbert", _jax.cuthbert_filter, double=False))
    given = sq.StochasticVolatility(mean=0.0, mu=MU, rho=RHO, sigma=SIGMA)
    return Task(
        f"bootstrap filter, stochastic volatility, T = {sizes.volatility_steps:,}, "
        f"N = {n_particles:,}",
        [*ours(given, Volatility, x[0], n_particles), *peers],
        unbiased(volatility_evidence(x[0, :, 0])),
        checks=sizes.many_checks if many else sizes.checks,
    )


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "volatility-1e3": partial(volatility, which=0),
    "volatility-1e4": partial(volatility, which=1),
    "volatility-1e5": partial(volatility, which=2),
    "linear-gaussian": linear_gaussian,
}

if __name__ == "__main__":
    main("particle", __doc__, TASKS, full=FULL, tiny=TINY)
