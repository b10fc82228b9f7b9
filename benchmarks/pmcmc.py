"""Particle marginal Metropolis-Hastings beside the package `particles`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from _harness import Agreement, Call, Contender, DisagreementError, Task, main
from torch.distributions import Gamma, Normal, Uniform

import seqdgm as sq

MU, RHO, SIGMA = -1.0, 0.95, 0.25


@dataclass(frozen=True)
class Sizes:
    steps: int
    n_particles: int
    n_chains: int
    iterations: int
    checks: int


FULL = Sizes(steps=500, n_particles=200, n_chains=4, iterations=60, checks=3)
TINY = Sizes(steps=30, n_particles=50, n_chains=4, iterations=20, checks=4)


class Volatility(sq.StateSpaceModel):
    """z_t = mu + rho (z_{t-1} - mu) + sigma e_t, x_t = exp(z_t / 2) v_t, as a user writes it."""

    latent_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.rho, self.sigma = (torch.tensor(v).double() for v in (MU, RHO, SIGMA))

    def initial(self, u):
        mu, spread = torch.atleast_1d(self.mu), self.sigma / (1 - self.rho**2).sqrt()
        return Normal(mu, spread)

    def transition(self, z, u):
        return Normal(self.mu + self.rho * (z - self.mu), self.sigma)

    def emission(self, z, u):
        return Normal(torch.zeros_like(z), torch.exp(z / 2))


def same_posterior(n_chains: int) -> Agreement:
    """The chains' means of the parameters agree, up to five standard errors of them."""

    def agree(values: Mapping[str, np.ndarray]) -> str:
        means = {name: found.reshape(-1, 3) for name, found in values.items()}
        target = next(iter(means.values()))
        worst = 0.0
        for name, found in means.items():
            gap = np.abs(found.mean(0) - target.mean(0))
            parts = [x.var(0, ddof=1) / len(x) for x in (found, target)]
            sigma = np.sqrt(parts[0] + parts[1])
            if not bool((gap <= 5 * sigma).all()):
                raise DisagreementError(f"{name}: means differ by {gap}, sigma {sigma}")
            worst = max(worst, float((gap / sigma).max()))
        return f"means of mu, rho and sigma of {n_chains} chains a call: {worst:.1f} sigma apart"

    return agree


def volatility(sizes: Sizes) -> Task:
    data = sq.StochasticVolatility(mu=MU, rho=RHO, sigma=SIGMA).sample(sizes.steps, seed=2)
    x = data.values[0, :, 0]
    truth = {"mu": MU, "rho": RHO, "sigma": SIGMA}
    priors = {"mu": Normal(0.0, 2.0), "rho": Uniform(-1.0, 1.0), "sigma": Gamma(2.0, 10.0)}

    def ours(model: sq.StateSpaceModel) -> Call:
        seeds = itertools.count()

        def call() -> np.ndarray:
            found = sq.pmmh(
                model,
                x,
                priors,
                n_iter=sizes.iterations - sizes.iterations // 4,
                n_warmup=sizes.iterations // 4,
                n_chains=sizes.n_chains,
                n_particles=sizes.n_particles,
                init=truth,
                seed=next(seeds),
            )
            return np.stack([found.draws[name].mean(1) for name in truth], 1)

        return call

    def particles() -> Call:
        from particles import distributions, mcmc
        from particles.state_space_models import StochVol

        class PMMH(mcmc.PMMH):
            def compute_post(self) -> None:
                # Their own puts an array of length 1 into an element, which numpy 2.4 refuses.
                log_prior = float(self.prior.logpdf(self.prop.theta)[0])
                self.prop.lpost[0] = log_prior
                if np.isfinite(log_prior):
                    theta = self.prop.theta[0]
                    filtering = self.alg_instance({name: theta[name] for name in truth})
                    filtering.run()
                    self.prop.lpost[0] += filtering.logLt

        np.random.seed(0)  # noqa: NPY002 (the package draws from numpy's global generator)
        laws = {
            "mu": distributions.Normal(0.0, 2.0),
            "rho": distributions.Uniform(-1.0, 1.0),
            "sigma": distributions.Gamma(2.0, 10.0),
        }
        prior = distributions.StructDist(laws)
        start = np.array([(MU, RHO, SIGMA)], dtype=prior.dtype)

        def chain() -> list[float]:
            sampler = PMMH(
                ssm_cls=StochVol,
                prior=prior,
                data=x,
                Nx=sizes.n_particles,
                niter=sizes.iterations,
                theta0=start.copy(),  # the chain moves in place
                rw_cov=np.diag([0.2, 0.03, 0.1]) ** 2,
            )
            sampler.run()
            kept = sampler.chain.theta[sizes.iterations // 4 :]
            return [float(kept[name].mean()) for name in truth]

        return lambda: np.array([chain() for _ in range(sizes.n_chains)])

    return Task(
        f"PMMH, stochastic volatility, T = {sizes.steps}, N = {sizes.n_particles}, "
        f"{sizes.n_chains} chains: an iteration of all",
        [
            Contender("seqdgm, StochasticVolatility", lambda: ours(given()), np.asarray),
            Contender("seqdgm, user's model", lambda: ours(Volatility()), np.asarray),
            Contender("particles, chain after chain", particles, np.asarray, "particles"),
        ],
        same_posterior(sizes.n_chains),
        checks=sizes.checks,
        units=sizes.iterations,
    )


def given() -> sq.StochasticVolatility:
    return sq.StochasticVolatility(mu=MU, rho=RHO, sigma=SIGMA)


TASKS: dict[str, Callable[[Sizes], Task]] = {"volatility": volatility}

if __name__ == "__main__":
    main("pmcmc", __doc__, TASKS, full=FULL, tiny=TINY)
