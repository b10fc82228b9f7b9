"""Models that are linear and Gaussian given a part of their state, which particles draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from seqdgm.kernels.types import System
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import Inputs


class Linear(NamedTuple):
    """Matrices of one step, given the drawn part of its state."""

    F: Float[Tensor, "*batch state state"]
    b: Float[Tensor, "*batch state"]
    Q: Float[Tensor, "*batch state state"]
    H: Float[Tensor, "*batch dim state"]
    d: Float[Tensor, "*batch dim"]
    R: Float[Tensor, "*batch dim dim"]


class Kalman(NamedTuple):
    """Drawn part of the state, and the Gaussian law of the rest given its history and data."""

    z: Float[Tensor, "*batch drawn"]
    mean: Float[Tensor, "*batch state"]
    cov: Float[Tensor, "*batch state state"]


class ConditionallyLinearSSM(StateSpaceModel):
    r"""Base of conditionally linear-Gaussian models: subclass it, and particles draw z only.

    .. math::

        z_t &\sim p(z_t \mid z_{t-1}) \\
        a_t &= F(z_t)\, a_{t-1} + b(z_t) + w_t, \quad w_t \sim N(0, Q(z_t)) \\
        x_t &= H(z_t)\, a_t + d(z_t) + v_t, \quad v_t \sim N(0, R(z_t))

    Given the path of z the rest is linear and Gaussian, so every particle carries a Kalman filter
    for a (Rao-Blackwellised particle filter). In terms of the recursion: the memory of a particle
    is the filtered law of :math:`a_{t-1}`, its state is the predicted law of :math:`a_t`, and the
    emission is the predictive law of the observation.

    A subclass defines `initial` and `transition` of z as in the short form of
    `seqdgm.StateSpaceModel`, `linear(z)` and `linear_start(z)`, and sets `latent_dim` (width of z),
    `state_dim` (width of a) and `obs_dim_`. The reported state is a, then `indicators` of z.

    References
    ----------
    Chen and Liu (2000), Mixture Kalman filters, *Journal of the Royal Statistical Society B* 62;
    Doucet, de Freitas, Murphy and Russell (2000), Rao-Blackwellised particle filtering for dynamic
    Bayesian networks, UAI.
    """

    engines: ClassVar[tuple[str, ...]] = ("rao-blackwell",)
    learners: ClassVar[Mapping[str, str]] = {"given": "given"}
    feedback = True
    fills_missing = False
    state_dim: int = 0

    def linear(self, z: Float[Tensor, "*batch drawn"]) -> Linear:
        """Matrices of a step, given the drawn part of its state."""
        raise NotImplementedError(f"{type(self).__name__} must define linear(z)")

    def linear_start(
        self, z: Float[Tensor, "*batch drawn"]
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state state"]]:
        """Mean and covariance of the first a, given the first z."""
        raise NotImplementedError(f"{type(self).__name__} must define linear_start(z)")

    def indicators(self, z: Float[Tensor, "*batch drawn"]) -> Float[Tensor, "*batch reported"]:
        """What is reported of z, beside a; default z."""
        return z

    def conditional_system(self, z: Float[Tensor, "rows time drawn"]) -> System:
        """System matrices given whole paths of z."""
        lin = self.linear(z)
        mean, cov = self.linear_start(z[:, 0])
        return System(
            F=lin.F,
            Q=lin.Q,
            H=lin.H,
            R=lin.R,
            b=lin.b,
            d=lin.d,
            m0=mean,
            P0=cov,
            Pinf=torch.zeros_like(cov),
        )

    def updated(self, s: Kalman, x: Float[Tensor, "*batch dim"]) -> Kalman:
        """Law of a given the observation too; NaN means not observed."""
        return update(s, self.linear(s.z), x)

    # -- the recursion --------------------------------------------------------------------------

    def advance(self, s: Kalman | None, x: Tensor | None, u: Inputs) -> Kalman | None:
        """Take the last observation in."""
        if s is None:
            return None
        assert x is not None
        return self.updated(s, x)

    def prior(self, h: Kalman | None, u: Inputs) -> Distribution:
        """Law of the drawn part."""
        return self.initial(u) if h is None else self.transition(h.z, u)

    def absorb(self, h: Kalman | None, z: Tensor | None) -> Kalman:
        """Predict a for the step whose z was drawn."""
        assert z is not None
        if h is None:
            return Kalman(z, *self.linear_start(z))
        return Kalman(z, *predict(h, self.linear(z)))

    def emission(self, s: Kalman, u: Inputs) -> Distribution:
        """Predictive law of the observation."""
        return predictive(s.mean, s.cov, self.linear(s.z))

    def report(self, h: Kalman | None, z: Tensor | None) -> Float[Tensor, "*batch reported"]:
        """Mean of a before the observation of the step, and the indicators of z."""
        s = self.absorb(h, z)
        return torch.cat([s.mean, self.indicators(s.z)], -1)


def predict(
    h: Kalman, lin: Linear
) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state state"]]:
    """Mean and covariance of the next a; the axes of `h` and `lin` broadcast."""
    mean = _times(lin.F, h.mean) + lin.b
    return mean, lin.F @ h.cov @ lin.F.mT + lin.Q


def update(s: Kalman, lin: Linear, x: Float[Tensor, "*batch dim"]) -> Kalman:
    r"""Law of a given the observed elements of x (Joseph's form of the covariance).

    Rows of missing elements (NaN) become those of an observation of nothing: H = 0, R = 1.
    """
    seen = ~x.isnan()
    m = seen.to(s.mean.dtype)
    load = lin.H * m[..., None]
    noise = lin.R * m[..., :, None] * m[..., None, :] + torch.diag_embed(1 - m)
    residual = torch.where(seen, x - lin.d - _times(lin.H, s.mean), 0.0)
    cross = s.cov @ load.mT
    factor = _cholesky(load @ cross + noise)
    gain = torch.cholesky_solve(cross.mT, factor).mT
    rest = torch.eye(s.mean.shape[-1], dtype=m.dtype, device=m.device) - gain @ load
    cov = rest @ s.cov @ rest.mT + gain @ noise @ gain.mT
    return Kalman(s.z, s.mean + _times(gain, residual), 0.5 * (cov + cov.mT))


def predictive(
    mean: Float[Tensor, "*batch state"], cov: Float[Tensor, "*batch state state"], lin: Linear
) -> Distribution:
    """Law of the observation given that of a."""
    loc = _times(lin.H, mean) + lin.d
    spread = lin.H @ cov @ lin.H.mT + lin.R
    if loc.shape[-1] == 1:
        return Normal(loc, spread[..., 0].sqrt(), validate_args=False)
    return MultivariateNormal(loc, scale_tril=_cholesky(spread), validate_args=False)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _cholesky(matrix: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """Cholesky factor; NaN where there is none, which the filter reports by series and step."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return factor.masked_fill((info != 0)[..., None, None], torch.nan)
