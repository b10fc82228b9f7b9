"""Backward simulation of trajectories, beside the package `particles`.

Its backward moves are timed on stochastic volatility alone: on the linear-Gaussian model its
smoothed means are 0.23 from the exact ones, as one move a step does not leave the genealogy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _harness import Agreement, Call, Contender, DisagreementError, Task, main
from particle import MU, RHO, SIGMA, Volatility
from scipy import stats

import seqdgm as sq
from seqdgm.inference.smc import SMCOptions
from seqdgm.inference.smoothing import trajectories
from seqdgm.prepare import prepare


@dataclass(frozen=True)
class Sizes:
    steps: int
    n_particles: int
    n_trajectories: int
    checks: int


FULL = Sizes(100, 1000, 100, checks=4)
TINY = Sizes(20, 200, 50, checks=4)

TRANSITION = np.array([[0.9, 0.2], [-0.1, 0.7]])
LOADING = np.array([[1.0, 0.0], [0.5, 1.0]])
STATE_COV = np.array([[0.5, 0.1], [0.1, 0.3]])
NOISE_COV = np.array([[0.4, 0.15], [0.15, 0.6]])


def smoothed(mean: np.ndarray, std: np.ndarray, n: int) -> Agreement:
    """Means of `n` trajectories agree with exact ones, up to five standard errors and O(1/n)."""

    def agree(values: Any) -> str:
        said = []
        for name, found in values.items():
            stderr = found.std(0, ddof=1) / len(found) ** 0.5
            gap = np.abs(found.mean(0) - mean)
            # Few calls: their spread says less than what a mean of n draws must have.
            allowed = 5 * np.maximum(stderr, std / (n * len(found)) ** 0.5) + 5 * std / n
            if not bool((gap <= allowed).all()):
                raise DisagreementError(f"{name}: a smoothed mean is off by {gap.max():.3g}")
            said.append(f"{name} {float(np.mean(gap / std)):.3f}")
        return f"smoothed means, distance in posterior deviations: {', '.join(said)}"

    return agree


def ours(
    model: sq.StateSpaceModel, x: np.ndarray, sizes: Sizes, smoother: str
) -> Callable[[], Call]:
    def prepared() -> Call:
        _, batch, _ = prepare(model, x, None)
        seeds = itertools.count()

        def call() -> np.ndarray:
            rng = torch.Generator().manual_seed(next(seeds))
            how = SMCOptions(sizes.n_particles)
            out = trajectories(model, batch, how, rng, sizes.n_trajectories, smoother)
            return out.paths["value"][0].numpy()

        return call

    return prepared


def theirs(build: Callable[[], Any], x: np.ndarray, sizes: Sizes, name: str) -> Callable[[], Call]:
    def prepared() -> Call:
        from particles import SMC
        from particles.state_space_models import Bootstrap

        np.random.seed(0)  # noqa: NPY002 (the package draws from numpy's global generator)
        model = build()

        def call() -> np.ndarray:
            feynman_kac = Bootstrap(ssm=model, data=x)
            smc = SMC(fk=feynman_kac, N=sizes.n_particles, ESSrmin=0.5, store_history=True)
            smc.run()
            paths = np.stack(getattr(smc.hist, name)(sizes.n_trajectories))
            return paths.reshape(*paths.shape[:2], -1).transpose(1, 0, 2)

        return call

    return prepared


def contenders(
    model: sq.StateSpaceModel, build: Callable[[], Any], x: np.ndarray, sizes: Sizes, *, moves: bool
) -> list[Contender]:
    """Filter and trajectories, by two algorithms; their means over the trajectories."""

    def mean(paths: np.ndarray) -> np.ndarray:
        return paths.mean(0)

    if moves:
        mcmc = theirs(build, x, sizes, "backward_sampling_mcmc")
        return [
            Contender("seqdgm, 'ffbs-mcmc'", ours(model, x, sizes, "ffbs-mcmc"), mean),
            Contender("particles, backward_sampling_mcmc", mcmc, mean, "particles"),
        ]
    exact = theirs(build, x, sizes, "backward_sampling_ON2")
    return [
        Contender("seqdgm, 'ffbs'", ours(model, x, sizes, "ffbs"), mean),
        Contender("particles, backward_sampling_ON2", exact, mean, "particles"),
    ]


def title(what: str, sizes: Sizes) -> str:
    return (
        f"{what}, T = {sizes.steps}, N = {sizes.n_particles:,}, {sizes.n_trajectories} trajectories"
    )


def linear_gaussian(sizes: Sizes) -> Task:
    model = sq.LinearGaussianSSM(
        F=TRANSITION, H=LOADING, Q=STATE_COV, R=NOISE_COV, m0=np.zeros(2), P0=np.eye(2)
    )
    x = model.sample(sizes.steps, seed=1).values[0]
    exact = model.smooth(x)

    def build() -> Any:
        from particles.kalman import MVLinearGauss

        return MVLinearGauss(
            F=TRANSITION,
            G=LOADING,
            covX=STATE_COV,
            covY=NOISE_COV,
            mu0=np.zeros(2),
            cov0=np.eye(2),
        )

    return Task(
        title("backward simulation, linear-Gaussian state 2", sizes),
        contenders(model, build, x, sizes, moves=False),
        smoothed(exact.mean[0], exact.std[0], sizes.n_trajectories),
        checks=sizes.checks,
    )


def volatility_grid(x: np.ndarray, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed means and standard deviations by sums over a grid of 8 deviations either side."""
    spread = SIGMA / (1 - RHO**2) ** 0.5
    grid = np.linspace(MU - 8 * spread, MU + 8 * spread, points)
    move = stats.norm.pdf(grid[:, None], MU + RHO * (grid - MU), SIGMA)
    seen = stats.norm.pdf(x[:, None], 0.0, np.exp(grid / 2))
    ahead = [stats.norm.pdf(grid, MU, spread) * seen[0]]
    for row in seen[1:]:
        ahead.append((move @ ahead[-1]) * row)
        ahead[-1] /= ahead[-1].sum()
    back = [np.ones(points)]
    for row in seen[:0:-1]:
        back.append((back[-1] * row) @ move)
        back[-1] /= back[-1].sum()
    weights = np.array(ahead) * np.array(back[::-1])
    weights /= weights.sum(1, keepdims=True)
    mean = weights @ grid
    return mean[:, None], np.sqrt(weights @ grid**2 - mean**2)[:, None]


def volatility(sizes: Sizes, *, moves: bool = False) -> Task:
    x = Volatility().sample(sizes.steps, seed=2).values[0, :, 0]
    mean, std = volatility_grid(x)

    def build() -> Any:
        from particles.state_space_models import StochVol

        return StochVol(mu=MU, rho=RHO, sigma=SIGMA)

    return Task(
        title(f"backward {'moves' if moves else 'simulation'}, stochastic volatility", sizes),
        contenders(Volatility(), build, x, sizes, moves=moves),
        smoothed(mean, std, sizes.n_trajectories),
        checks=sizes.checks,
    )


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "linear-gaussian": linear_gaussian,
    "volatility": volatility,
    "volatility-moves": lambda sizes: volatility(sizes, moves=True),
}

if __name__ == "__main__":
    main("smoothing", __doc__, TASKS, full=FULL, tiny=TINY)
