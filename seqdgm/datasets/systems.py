"""Non-linear systems of the literature, as state-space models with their parameters given."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal, Poisson

from seqdgm.recursion import StateSpaceModel
from seqdgm.types import Inputs

State = Float[Tensor, "*batch state"]


def runge_kutta(slope: Callable[[Tensor], Tensor], z: Tensor, dt: float, n: int) -> Tensor:
    """State after `n` steps of length `dt` of the classical fourth-order method."""
    for _ in range(n):
        k1 = slope(z)
        k2 = slope(z + dt / 2 * k1)
        k3 = slope(z + dt / 2 * k2)
        k4 = slope(z + dt * k3)
        z = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


def _check(**scales: float) -> None:
    for name, value in scales.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be above 0 and finite")


class Growth(StateSpaceModel):
    r"""Univariate non-stationary growth model of Gordon, Salmond and Smith (1993), section 6.1.

    .. math::

        z_t &= z_{t-1} / 2 + 25 z_{t-1} / (1 + z_{t-1}^2) + 8 \cos(1.2\, t) + w_t,
        \quad w_t \sim N(0, q) \\
        x_t &= z_t^2 / 20 + v_t, \quad v_t \sim N(0, r)

    for steps t = 0, 1, ..., with :math:`z_0 \sim N(0, p)`; the paper has q = 10, r = 1, p = 2.
    """

    latent_dim = 1

    def __init__(self, q: float = 10.0, r: float = 1.0, p: float = 2.0) -> None:
        super().__init__()
        _check(q=q, r=r, p=p)
        self.q, self.r, self.p = q, r, p

    def initial(self, u: Inputs) -> Distribution:
        """Law of the first state."""
        return Normal(torch.zeros(1, dtype=torch.float64), self.p**0.5)

    def transition(self, z: State, u: Inputs) -> Distribution:
        """Growth, a yearly cycle and noise."""
        mean = z / 2 + 25 * z / (1 + z**2) + 8 * torch.cos(1.2 * u.t)[..., None]
        return Normal(mean, self.q**0.5)

    def emission(self, s: State, u: Inputs) -> Distribution:
        """The square of the state, which hides its sign."""
        return Normal(s**2 / 20, self.r**0.5)


class Lorenz63(StateSpaceModel):
    r"""The attractor of Lorenz (1963), with noise, seen through noise.

    .. math::

        \dot z_1 = \sigma (z_2 - z_1), \quad \dot z_2 = z_1 (\rho - z_3) - z_2, \quad
        \dot z_3 = z_1 z_2 - \beta z_3

    moves a state for `dt` (Runge-Kutta in `substeps`), then normal noise of standard deviation
    `noise` is added to each element. The first `observed` elements are measured with errors of
    standard deviation `error`.
    """

    latent_dim = 3

    def __init__(
        self,
        sigma: float = 10.0,
        rho: float = 28.0,
        beta: float = 8.0 / 3.0,
        dt: float = 0.05,
        substeps: int = 5,
        noise: float = 0.1,
        error: float = 1.0,
        observed: int = 3,
    ) -> None:
        super().__init__()
        _check(dt=dt, substeps=substeps, noise=noise, error=error)
        if observed not in (1, 2, 3):
            raise ValueError(f"observed={observed!r} must be 1, 2 or 3")
        self.sigma, self.rho, self.beta = sigma, rho, beta
        self.dt, self.substeps, self.noise = dt, substeps, noise
        self.error, self.observed = error, observed

    def slope(self, z: State) -> State:
        """Time derivative of the state."""
        a, b, c = z.unbind(-1)
        return torch.stack(
            [self.sigma * (b - a), a * (self.rho - c) - b, a * b - self.beta * c], -1
        )

    def initial(self, u: Inputs) -> Distribution:
        """Wide around the middle of the attractor."""
        return Normal(torch.tensor([0.0, 0.0, 25.0], dtype=torch.float64), 8.0)

    def transition(self, z: State, u: Inputs) -> Distribution:
        """The flow, with a little noise."""
        moved = runge_kutta(self.slope, z, self.dt / self.substeps, self.substeps)
        return Normal(moved, self.noise)

    def emission(self, s: State, u: Inputs) -> Distribution:
        """The elements that are measured."""
        return Normal(s[..., : self.observed], self.error)


class Lorenz96(StateSpaceModel):
    r"""Weather on a circle of latitude (Lorenz 1996), every `every`-th site measured.

    .. math:: \dot z_d = (z_{d+1} - z_{d-2})\, z_{d-1} - z_d + F

    with d modulo `sites` and `forcing` F; `dt`, `substeps`, `noise` and `error` as in `Lorenz63`.
    """

    def __init__(
        self,
        sites: int = 8,
        forcing: float = 8.0,
        dt: float = 0.1,
        substeps: int = 2,
        noise: float = 0.3,
        error: float = 0.5,
        every: int = 2,
    ) -> None:
        super().__init__()
        _check(dt=dt, substeps=substeps, noise=noise, error=error, every=every)
        if sites < 4:
            raise ValueError(f"sites={sites!r} must be at least 4")
        self.latent_dim = self.sites = sites
        self.forcing, self.dt, self.substeps = forcing, dt, substeps
        self.noise, self.error, self.every = noise, error, every

    def slope(self, z: State) -> State:
        """Time derivative of the state."""
        ahead, back, two_back = (torch.roll(z, by, -1) for by in (-1, 1, 2))
        return (ahead - two_back) * back - z + self.forcing

    def initial(self, u: Inputs) -> Distribution:
        """Wide around the mean of the attractor."""
        return Normal(torch.full((self.sites,), 2.0, dtype=torch.float64), 3.0)

    def transition(self, z: State, u: Inputs) -> Distribution:
        """The flow, with a little noise."""
        moved = runge_kutta(self.slope, z, self.dt / self.substeps, self.substeps)
        return Normal(moved, self.noise)

    def emission(self, s: State, u: Inputs) -> Distribution:
        """The sites that are measured."""
        return Normal(s[..., :: self.every], self.error)


class Pendulum(StateSpaceModel):
    r"""Pendulum with noise, seen from above (Särkkä 2013, *Bayesian Filtering and Smoothing*).

    .. math::

        \alpha_t = \alpha_{t-1} + \omega_{t-1} \Delta, \quad
        \omega_t = \omega_{t-1} - g \sin(\alpha_{t-1}) \Delta, \quad
        x_t = \sin(\alpha_t) + v_t

    with noise of covariance :math:`q \begin{pmatrix} \Delta^3/3 & \Delta^2/2 \\ \Delta^2/2 & \Delta
    \end{pmatrix}` on the state and :math:`v_t \sim N(0, r)`; :math:`\Delta` is `dt`. It is released
    at about `angle`, at rest, with standard deviations of `spread`.
    """

    latent_dim = 2

    def __init__(
        self,
        dt: float = 0.05,
        g: float = 9.81,
        q: float = 0.1,
        r: float = 0.1,
        angle: float = 1.5,
        spread: float = 0.1,
    ) -> None:
        super().__init__()
        _check(dt=dt, g=g, q=q, r=r, spread=spread)
        self.dt, self.g, self.q, self.r, self.angle, self.spread = dt, g, q, r, angle, spread

    def initial(self, u: Inputs) -> Distribution:
        """Released at rest."""
        return Normal(torch.tensor([self.angle, 0.0], dtype=torch.float64), self.spread)

    def transition(self, z: State, u: Inputs) -> Distribution:
        """Euler's step, with the noise of an integrated random force."""
        dt = self.dt
        angle, speed = z.unbind(-1)
        mean = torch.stack([angle + speed * dt, speed - self.g * torch.sin(angle) * dt], -1)
        cov = self.q * torch.tensor([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]], dtype=mean.dtype)
        return MultivariateNormal(mean, cov)

    def emission(self, s: State, u: Inputs) -> Distribution:
        """Horizontal place of the bob."""
        return Normal(torch.sin(s[..., :1]), self.r**0.5)


class BouncingBall(StateSpaceModel):
    r"""A ball in a square box whose walls reflect it; its place is measured with noise.

    .. math::

        (p, v)_t = \mathrm{reflect}(p_{t-1} + v_{t-1}, v_{t-1}) + w_t, \quad
        x_t \sim N(p_t, \mathrm{error}^2)

    `reflect` folds the place into the box :math:`[-1, 1]^2` and turns the velocity at a wall. The
    noise :math:`w_t` has standard deviation `noise` on the velocity and a tenth of it on the place.
    The ball starts near the middle with a velocity of standard deviation `speed` on each axis.
    """

    latent_dim = 4

    def __init__(self, speed: float = 0.15, noise: float = 0.005, error: float = 0.05) -> None:
        super().__init__()
        _check(speed=speed, noise=noise, error=error)
        self.speed, self.noise, self.error = speed, noise, error

    def initial(self, u: Inputs) -> Distribution:
        """Near the middle, in any direction."""
        scale = torch.tensor([0.2, 0.2, self.speed, self.speed], dtype=torch.float64)
        return Normal(torch.zeros(4, dtype=torch.float64), scale)

    def transition(self, z: State, u: Inputs) -> Distribution:
        """Free flight, reflected by the walls."""
        place, velocity = z.chunk(2, -1)
        # Unfolded, the ball flies straight through mirrored boxes; odd ones run backwards.
        free = place + velocity + 1
        inside = torch.remainder(free, 4)
        mirrored = inside > 2
        place = torch.where(mirrored, 4 - inside, inside) - 1
        velocity = torch.where(mirrored, -velocity, velocity)
        scale = z.new_tensor([0.1, 0.1, 1.0, 1.0]) * self.noise
        return Normal(torch.cat([place, velocity], -1), scale)

    def emission(self, s: State, u: Inputs) -> Distribution:
        """The place."""
        return Normal(s[..., :2], self.error)


class PoissonCounts(StateSpaceModel):
    r"""Counts whose log-rate is a stationary autoregression.

    .. math::

        z_t = \mu + \rho (z_{t-1} - \mu) + \sigma e_t, \quad
        z_1 \sim N(\mu, \sigma^2 / (1 - \rho^2)), \quad x_t \sim \mathrm{Poisson}(e^{z_t})

    Zeger (1988), A regression model for time series of counts, *Biometrika* 75, in the
    parameter-driven form.
    """

    latent_dim = 1

    def __init__(self, mu: float = 1.5, rho: float = 0.95, sigma: float = 0.2) -> None:
        super().__init__()
        _check(sigma=sigma)
        if not -1 < rho < 1:
            raise ValueError(f"rho={rho!r} must lie between -1 and 1")
        self.mu, self.rho, self.sigma = mu, rho, sigma

    def initial(self, u: Inputs) -> Distribution:
        """Stationary law of the log-rate."""
        scale = self.sigma / (1 - self.rho**2) ** 0.5
        return Normal(torch.full((1,), self.mu, dtype=torch.float64), scale)

    def transition(self, z: State, u: Inputs) -> Distribution:
        """Autoregression."""
        return Normal(self.mu + self.rho * (z - self.mu), self.sigma)

    def emission(self, s: State, u: Inputs) -> Distribution:
        """Counts."""
        return Poisson(s.exp())
