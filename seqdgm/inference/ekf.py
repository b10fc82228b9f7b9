r"""Extended Kalman filter: Gaussian inference with a first-order expansion of the model.

With :math:`m, Q` the mean and covariance of the transition, :math:`h, R` those of the emission and
:math:`'` a Jacobian (by automatic differentiation, so that the model needs no derivative of its
own),

.. math::

    z_t \mid x_{1:t-1} &\approx N(m(\mu), m' P m'^T + Q(\mu)) \\
    S &= h' P h'^T + R, \quad K = P h'^T S^{-1}, \quad
    z_t \mid x_{1:t} \approx N(\mu + K (x_t - h(\mu)), (I - K h') P)

with :math:`(\mu, P)` each time the moments before the step. Exact for linear-Gaussian models. The
arithmetic is float64 on triangular roots; unobserved elements drop out exactly. The Monte-Carlo
options ``n_particles`` and ``generator`` are not used.

Every verb takes ``iterations``: with more than one, an update is a Gauss-Newton search for the
posterior mode of the state (iterated extended Kalman filter), worth it where the emission is
strongly curved over the width of the prediction.

References
----------
Särkkä and Svensson (2023), *Bayesian Filtering and Smoothing*, 2nd ed., algorithms 7.4, 7.6 and
13.1; Bell and Cathey (1993), *IEEE Trans. Automatic Control* 38.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from seqdgm.inference import gaussian_approx
from seqdgm.inference._linearise import Taylor
from seqdgm.types import Batch, Evidence, Gaussian, Prediction, States

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


def filter(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    iterations: int = 1,
) -> States:
    """Approximate filtering moments.

    Parameters
    ----------
    model : StateSpaceModel
        Markov, with distributions whose mean and covariance torch knows in closed form.
    batch : Batch
    n_particles, generator
        Not used.
    iterations : int
        Linearisations of the emission at each step.

    Raises
    ------
    ValueError
        If the model is not Markov, its distributions have no moments in closed form, or something
        it returns is not finite (with series and step).

    Examples
    --------
    >>> import torch, seqdgm as sq
    >>> from torch.distributions import Normal
    >>> class Pendulum(sq.StateSpaceModel):
    ...     latent_dim = 2
    ...     def initial(self, u):
    ...         return Normal(torch.tensor([1.0, 0.0]), 0.1)
    ...     def transition(self, z, u):
    ...         angle, speed = z.unbind(-1)
    ...         moved = [angle + 0.1 * speed, speed - 0.98 * angle.sin()]
    ...         return Normal(torch.stack(moved, -1), torch.tensor([0.01, 0.1]))
    ...     def emission(self, z, u):
    ...         return Normal(z[..., :1].sin(), 0.3)
    >>> y = Pendulum().sample(50, seed=0)
    >>> Pendulum().filter(y, method="ekf").mean.shape
    (1, 50, 2)
    >>> Pendulum().log_prob(y, method="ekf").kind
    'approximation'
    """
    return gaussian_approx.filter(model, batch, Taylor(iterations))


def smooth(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    iterations: int = 1,
) -> States:
    """Approximate smoothing moments (extended Rauch-Tung-Striebel), and joint draws."""
    return gaussian_approx.smooth(model, batch, Taylor(iterations))


def log_prob(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    start: Int[Tensor, "series"] | None = None,
    iterations: int = 1,
) -> Evidence:
    """Gaussian-approximate log-likelihood; with `start`, of the steps from there on."""
    return gaussian_approx.log_prob(model, batch, Taylor(iterations), start)


def forecast(
    model: StateSpaceModel,
    batch: Batch,
    *,
    horizon: int,
    n_particles: int,
    generator: torch.Generator,
    iterations: int = 1,
) -> Prediction:
    """Gaussian predictive moments, propagated through the linearised model."""
    return gaussian_approx.forecast(model, batch, Taylor(iterations), horizon)


def impute(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    iterations: int = 1,
) -> Gaussian:
    """Moments of every observation given all that was observed."""
    return gaussian_approx.impute(model, batch, Taylor(iterations))
