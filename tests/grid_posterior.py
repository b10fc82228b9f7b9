"""A model with two unknown parameters, and its posterior by integration over a grid.

The likelihood is the density of a multivariate normal vector, written out with numpy: nothing here
uses the package's filters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch.distributions import Gamma, Normal, Uniform

import seqdgm as sq
from seqdgm.kernels.types import System

START, STEP = 1.0, 0.5  # standard deviations of the first state and of a step
PRIORS = {"rho": Uniform(-1.0, 1.0), "noise": Gamma(8.0, 8.0)}


class NoisyAutoregression(sq.StateSpaceModel):
    """z_1 ~ N(0, 1), z_t = rho z_{t-1} + 0.5 e_t, x_t = z_t + noise v_t."""

    engines = ("kalman", "particle")
    latent_dim = 1
    rho = 0.5
    noise = 1.0

    def initial(self, u):
        return Normal(torch.zeros(1).double(), START)

    def transition(self, z, u):
        return Normal(self.rho * z, STEP)

    def emission(self, z, u):
        return Normal(z, self.noise)

    def linear_gaussian(self, u, rows):
        rho = torch.as_tensor(self.rho).double().reshape(-1, 1, 1, 1)
        noise = torch.as_tensor(self.noise).double().reshape(-1, 1, 1, 1)
        one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1).double()
        return System(
            rho, STEP**2 * one, one, noise**2, zero, zero, zero[0], START**2 * one[0], 0 * one[0]
        )


def data(length: int = 12, seed: int = 3) -> np.ndarray:
    return NoisyAutoregression().sample(length, seed=seed).values[0, :, 0]


def covariance(rho: np.ndarray, length: int) -> np.ndarray:
    """Covariance of the states for every value of rho, (..., length, length)."""
    rho = np.asarray(rho, float)[..., None, None]
    # z = L e with L[t, s] = rho^(t - s), independent e with the variances of start and steps.
    t = np.arange(length)
    lag = np.maximum(t[:, None] - t, 0)
    factor = np.where(t[:, None] >= t, rho**lag, 0.0)
    scale = np.where(t == 0, START, STEP)
    factor = factor * scale
    return factor @ np.swapaxes(factor, -1, -2)


def log_likelihood(rho: np.ndarray, noise: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | rho, noise) for arrays of parameters of one shape."""
    cov = covariance(rho, len(x)) + np.asarray(noise)[..., None, None] ** 2 * np.eye(len(x))
    factor = np.linalg.cholesky(cov)
    scaled = np.linalg.solve(factor, np.broadcast_to(x[:, None], (*factor.shape[:-1], 1)))[..., 0]
    log_det = np.log(np.diagonal(factor, axis1=-2, axis2=-1)).sum(-1)
    return -0.5 * (scaled**2).sum(-1) - log_det - 0.5 * len(x) * np.log(2 * np.pi)


@dataclass(frozen=True)
class Grid:
    """Posterior on a grid: values of each parameter, weights of the cells and log-evidence."""

    rho: np.ndarray
    noise: np.ndarray
    weights: np.ndarray
    log_evidence: float

    @classmethod
    def of(cls, *series: np.ndarray, points: int = 160) -> Grid:
        rho = (np.arange(points) + 0.5) / points * 2 - 1
        top = 4.0
        noise = (np.arange(points) + 0.5) / points * top
        r, s = np.meshgrid(rho, noise, indexing="ij")
        log_p = stats.gamma.logpdf(s, 8.0, scale=1 / 8.0) + np.log(0.5)
        for x in series:
            log_p = log_p + log_likelihood(r, s, x)
        peak = log_p.max()
        mass = np.exp(log_p - peak)
        cell = (2 / points) * (top / points)
        return cls(rho, noise, mass / mass.sum(), float(peak + np.log(mass.sum() * cell)))

    def marginal(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return {
            "rho": (self.rho, self.weights.sum(1)),
            "noise": (self.noise, self.weights.sum(0)),
        }[name]

    def quantile(self, name: str, q: float) -> float:
        """By linear interpolation of the distribution function between the edges of cells."""
        value, weight = self.marginal(name)
        half = (value[1] - value[0]) / 2
        return float(np.interp(q, np.cumsum(weight), value + half))

    def check(self, name: str, draws: np.ndarray, errors: float = 5.0) -> float:
        """Compare means and quantiles of draws (chain, draw) of many independent chains.

        Returns the largest difference in standard errors, which come from the chains' own means.
        """
        value, weight = self.marginal(name)
        tests = {
            "mean": (draws, (value * weight).sum()),
            "square": (draws**2, (value**2 * weight).sum()),
        }
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            tests[f"{q:g}"] = ((draws <= self.quantile(name, q)).astype(float), q)
        worst = 0.0
        for what, (found, target) in tests.items():
            each = found.mean(1)
            stderr = each.std(ddof=1) / np.sqrt(len(each))
            gap = abs(each.mean() - target) / stderr
            assert gap < errors, (name, what, each.mean(), target, stderr)
            worst = max(worst, gap)
        return worst
