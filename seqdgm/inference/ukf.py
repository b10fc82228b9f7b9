r"""Unscented Kalman filter: Gaussian inference with sigma points.

The mean and covariance of :math:`z_t` and of :math:`x_t`, and their cross-covariances, are weighted
sums over :math:`2n + 1` points of the model's conditional means, plus the average of its
conditional covariances. No derivative is needed. Exact for linear-Gaussian models. New points are
drawn after each prediction, as in filterpy. The arithmetic is float64 on triangular roots, which
holds for negative weights too (see `seqdgm.inference._linearise.SigmaPoints`); unobserved elements
drop out exactly. The Monte-Carlo options ``n_particles`` and ``generator`` are not used.

Every verb takes the constants of the scaled unscented transform (van der Merwe 2004):

alpha : float
    Spread of the points; a small one stays near the mean. They lie
    :math:`\alpha \sqrt{n + \kappa}` standard deviations away.
beta : float
    Knowledge of the distribution; 2 is best for a Gaussian.
kappa : float
    Second constant of the spread.

The default ``(1, 2, 0)`` has no negative weight; ``(1, 0, 0)`` is the cubature Kalman filter.

References
----------
Julier and Uhlmann (2004), Unscented filtering and nonlinear estimation, *Proc. IEEE* 92; van der
Merwe (2004), *Sigma-point Kalman filters for probabilistic inference in dynamic state-space
models*; Särkkä (2008), Unscented Rauch-Tung-Striebel smoother, *IEEE Trans. Automatic Control* 53.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from seqdgm.inference import gaussian_approx
from seqdgm.inference._linearise import SigmaPoints
from seqdgm.types import Batch, Evidence, Gaussian, Prediction, States

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


def filter(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    alpha: float = 1.0,
    beta: float = 2.0,
    kappa: float = 0.0,
) -> States:
    """Approximate filtering moments.

    Parameters
    ----------
    model : StateSpaceModel
        Markov, with distributions whose mean and covariance torch knows in closed form.
    batch : Batch
    n_particles, generator
        Not used.
    alpha, beta, kappa : float
        Constants of the sigma points.

    Raises
    ------
    ValueError
        If the model is not Markov, its distributions have no moments in closed form, something it
        returns is not finite (with series and step), or the constants make a covariance indefinite.

    Examples
    --------
    >>> import torch, seqdgm as sq
    >>> from torch.distributions import Normal, Poisson
    >>> class Counts(sq.StateSpaceModel):
    ...     latent_dim = 1
    ...     def initial(self, u):
    ...         return Normal(torch.zeros(1), 1.0)
    ...     def transition(self, z, u):
    ...         return Normal(0.9 * z, 0.3)
    ...     def emission(self, z, u):
    ...         return Poisson(z.exp())
    >>> y = Counts().sample(50, seed=0)
    >>> Counts().filter(y, method="ukf").mean.shape
    (1, 50, 1)
    """
    return gaussian_approx.filter(model, batch, SigmaPoints(alpha, beta, kappa))


def smooth(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    alpha: float = 1.0,
    beta: float = 2.0,
    kappa: float = 0.0,
) -> States:
    """Approximate smoothing moments (unscented Rauch-Tung-Striebel), and joint draws."""
    return gaussian_approx.smooth(model, batch, SigmaPoints(alpha, beta, kappa))


def log_prob(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    start: Int[Tensor, "series"] | None = None,
    alpha: float = 1.0,
    beta: float = 2.0,
    kappa: float = 0.0,
) -> Evidence:
    """Gaussian-approximate log-likelihood; with `start`, of the steps from there on."""
    return gaussian_approx.log_prob(model, batch, SigmaPoints(alpha, beta, kappa), start)


def forecast(
    model: StateSpaceModel,
    batch: Batch,
    *,
    horizon: int,
    n_particles: int,
    generator: torch.Generator,
    alpha: float = 1.0,
    beta: float = 2.0,
    kappa: float = 0.0,
) -> Prediction:
    """Gaussian predictive moments, propagated through the sigma points."""
    return gaussian_approx.forecast(model, batch, SigmaPoints(alpha, beta, kappa), horizon)


def impute(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    alpha: float = 1.0,
    beta: float = 2.0,
    kappa: float = 0.0,
) -> Gaussian:
    """Moments of every observation given all that was observed."""
    return gaussian_approx.impute(model, batch, SigmaPoints(alpha, beta, kappa))
