"""Bootstrap particle filters of models written by a user, beside the package `particles`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _harness import Call, Contender, Task, main, unbiased
from scipy import stats
from torch.distributions import Normal

import seqdgm as sq


@dataclass(frozen=True)
class Sizes:
    series: int
    steps: int
    volatility_steps: int
    n_particles: int
    checks: int


FULL = Sizes(64, 100, 1000, 1000, checks=8)
TINY = Sizes(4, 15, 40, 200, checks=8)


# -- linear and Gaussian, state 4 ---------------------------------------------------------------

TRANSITION = np.array(
    [[0.8, 0.2, 0.0, 0.0], [-0.2, 0.8, 0.0, 0.0], [0.0, 0.0, 0.9, 0.1], [0.0, 0.0, 0.0, 0.7]]
)
LOADING = np.array([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 1.0]])
STATE_STD, NOISE_STD = 0.5, 1.0


class LinearGaussian(sq.StateSpaceModel):
    """z_t = F z_{t-1} + w_t, x_t = H z_t + v_t, as a user of the package would write it."""

    latent_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("F", torch.from_numpy(TRANSITION.copy()))
        self.register_buffer("H", torch.from_numpy(LOADING.copy()))

    def initial(self, u):
        return Normal(torch.zeros(4, dtype=self.dtype), torch.ones(4, dtype=self.dtype))

    def transition(self, z, u):
        return Normal(z @ self.F.T, STATE_STD)

    def emission(self, z, u):
        return Normal(z @ self.H.T, NOISE_STD)


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
    exact = given.log_prob(data).value

    def run(model: sq.StateSpaceModel) -> Call:
        seeds = itertools.count()
        options: dict[str, Any] = {"method": "particle", "n_particles": sizes.n_particles}
        return lambda: model.log_prob(data, seed=next(seeds), **options)

    def particles() -> Call:
        from particles import SMC
        from particles.kalman import MVLinearGauss
        from particles.state_space_models import Bootstrap

        np.random.seed(0)  # noqa: NPY002 (the package draws from numpy's global generator)
        model = MVLinearGauss(
            F=TRANSITION,
            G=LOADING,
            covX=STATE_STD**2 * np.eye(4),
            covY=NOISE_STD**2 * np.eye(2),
            mu0=np.zeros(4),
            cov0=np.eye(4),
        )

        def one(x: np.ndarray) -> float:
            smc = SMC(fk=Bootstrap(ssm=model, data=x), N=sizes.n_particles, ESSrmin=0.5)
            smc.run()
            return smc.logLt

        return lambda: [one(x) for x in data.values]

    def values(found: Any) -> np.ndarray:
        return found.value

    return Task(
        f"bootstrap filter, linear-Gaussian state 4, {sizes.series} series, T = {sizes.steps}, "
        f"N = {sizes.n_particles:,}",
        [
            Contender("seqdgm, user's model", lambda: run(LinearGaussian()), values),
            Contender("seqdgm, LinearGaussianSSM", lambda: run(given), values),
            Contender("particles, series by series", particles, np.asarray, "particles"),
        ],
        unbiased(exact),
        checks=max(2, sizes.checks // 4),
    )


# -- stochastic volatility ----------------------------------------------------------------------

MU, RHO, SIGMA = -1.0, 0.95, 0.25


class Volatility(sq.StateSpaceModel):
    """z_t = mu + rho (z_{t-1} - mu) + sigma e_t, x_t = exp(z_t / 2) v_t."""

    latent_dim = 1

    def initial(self, u):
        spread = SIGMA / (1 - RHO**2) ** 0.5
        return Normal(
            torch.full((1,), MU, dtype=self.dtype), torch.full((1,), spread, dtype=self.dtype)
        )

    def transition(self, z, u):
        return Normal(MU + RHO * (z - MU), SIGMA)

    def emission(self, z, u):
        return Normal(torch.zeros_like(z), torch.exp(z / 2))


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


def volatility(sizes: Sizes) -> Task:
    x = Volatility().sample(sizes.volatility_steps, seed=2).values[0, :, 0]

    def ours() -> Call:
        model, seeds = Volatility(), itertools.count()
        return lambda: model.log_prob(x, seed=next(seeds), n_particles=sizes.n_particles)

    def particles() -> Call:
        from particles import SMC
        from particles.state_space_models import Bootstrap, StochVol

        np.random.seed(0)  # noqa: NPY002 (the package draws from numpy's global generator)
        model = StochVol(mu=MU, rho=RHO, sigma=SIGMA)

        def call() -> float:
            smc = SMC(fk=Bootstrap(ssm=model, data=x), N=sizes.n_particles, ESSrmin=0.5)
            smc.run()
            return smc.logLt

        return call

    return Task(
        f"bootstrap filter, stochastic volatility, T = {sizes.volatility_steps:,}, "
        f"N = {sizes.n_particles:,}",
        [
            Contender("seqdgm, user's model", ours),
            Contender("particles", particles, package="particles"),
        ],
        unbiased(volatility_evidence(x)),
        checks=sizes.checks,
    )


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "linear-gaussian": linear_gaussian,
    "volatility": volatility,
}

if __name__ == "__main__":
    main("particle", __doc__, TASKS, full=FULL, tiny=TINY)
