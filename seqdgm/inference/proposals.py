r"""Proposals of particle filters: what z_t is drawn from, given the memory and the observation.

The weights :math:`g f / q` keep the evidence unbiased whatever the proposal :math:`q(z_t \mid h_t,
x_t)` is, as long as it covers the support of the prior :math:`f(z_t \mid h_t)`. The locally optimal
one is :math:`p(z_t \mid h_t, x_t)`, which makes the weight :math:`p(x_t \mid h_t)`; `LocalEKF` and
`LocalUKF` approximate it by a Gaussian, particle by particle.

References
----------
Doucet, Godsill and Andrieu (2000), On sequential Monte Carlo sampling methods for Bayesian
filtering, *Statistics and Computing* 10, section II; van der Merwe, Doucet, de Freitas and Wan
(2001), The unscented particle filter, *NIPS 13*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution, constraints

from seqdgm.inference._linearise import (
    Conditional,
    Rule,
    SigmaPoints,
    Taylor,
    matched,
    narrow,
    product,
    update,
)
from seqdgm.types import Batch, Inputs, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Proposal(Protocol):
    """Where the particles of a step are drawn from."""

    def begin(self, model: StateSpaceModel, batch: Batch) -> Any:
        """What `propose` needs of the data, computed once."""

    def propose(
        self,
        model: StateSpaceModel,
        context: Any,
        t: int,
        h: Any,
        u: Inputs,
        x: Float[Tensor, "series one dim"],
        mask: Bool[Tensor, "series one dim"],
    ) -> Distribution:
        """Distribution of z_t for every particle; `h` has axes (series, particle, ...)."""
        ...


class LearnedProposal:
    """The model's own proposal, which reads the encoded data."""

    def begin(self, model: StateSpaceModel, batch: Batch) -> Tensor:
        """Encode the data."""
        context = model.encode(batch)
        if context is None:
            raise ValueError(
                f"{type(model).__name__} has a proposal, but encode(batch) gives it nothing to "
                "read; return what it needs, (series, time, features)"
            )
        return context

    def propose(
        self,
        model: StateSpaceModel,
        context: Tensor,
        t: int,
        h: Any,
        u: Inputs,
        x: Float[Tensor, "series one dim"],
        mask: Bool[Tensor, "series one dim"],
    ) -> Distribution:
        """The model's `proposal` at step t."""
        return model.proposal(h, context[:, t, None], u)


@dataclass(frozen=True)
class LocalEKF:
    r"""Gaussian approximation of :math:`p(z_t \mid h_t, x_t)` by a first-order expansion.

    The prior :math:`f(z_t \mid h_t)` of every particle is replaced by the Gaussian with its
    moments, the emission's mean by its tangent at the prior's mean, and the Gaussian is conditioned
    on the observed elements of :math:`x_t`. For a Gaussian prior and a linear-Gaussian emission
    that is the locally optimal proposal. Where the mean of an emission does not move with the state
    (stochastic volatility) nothing is learned, and the proposal is the prior's Gaussian.

    A particle whose linearisation is not finite draws from the Gaussian of its prior.

    Parameters
    ----------
    iterations : int
        Linearisations, each around what the last one gave (Gauss-Newton steps to the mode of
        :math:`p(z_t \mid h_t, x_t)`). 1 is enough for a linear emission; for a curved one, a
        single tangent at the prior's mean gives a Gaussian that is narrow and in the wrong place
        as soon as the observation is sharper than the prior, which can be far worse than the
        bootstrap filter.
    inflation : float
        Factor on the covariance.
    df : float, optional
        Degrees of freedom of Student-t shocks in place of Gaussian ones, independent along the
        columns of the covariance's root. Heavy tails bound the weights where the Gaussian is too
        narrow or in the wrong place.

    Raises
    ------
    ValueError
        For a model whose prior is not over the whole space (discrete or positive states), or has
        no moments in closed form.

    Examples
    --------
    >>> import seqdgm as sq
    >>> from seqdgm.inference.proposals import LocalEKF
    >>> model = sq.LinearGaussianSSM(
    ...     F=[[0.9]], H=[[1.0]], Q=[[1.0]], R=[[0.01]], m0=[0.0], P0=[[1.0]], diffuse=False
    ... )
    >>> y = model.sample(20, seed=0)
    >>> blind = model.filter(y, method="particle", seed=0, proposal="bootstrap")
    >>> guided = model.filter(y, method="particle", seed=0, proposal=LocalEKF())
    >>> bool(guided.ess.min() > 3 * blind.ess.min())
    True

    References
    ----------
    Doucet, Godsill and Andrieu (2000), section II.D.
    """

    iterations: int = 3
    inflation: float = 1.0
    df: float | None = None

    def __post_init__(self) -> None:
        _check_tails(self.inflation, self.df)
        Taylor(self.iterations)

    def begin(self, model: StateSpaceModel, batch: Batch) -> None:
        """Nothing to prepare."""

    def propose(
        self,
        model: StateSpaceModel,
        context: Any,
        t: int,
        h: Any,
        u: Inputs,
        x: Float[Tensor, "series one dim"],
        mask: Bool[Tensor, "series one dim"],
    ) -> Distribution:
        """The prior conditioned on the observed elements of x; the prior itself without any."""
        found = _condition(Taylor(self.iterations), model, h, u, x, mask)
        return found if isinstance(found, Distribution) else _build(*found, self.inflation, self.df)


@dataclass(frozen=True)
class LocalUKF:
    r"""Gaussian approximation of :math:`p(z_t \mid h_t, x_t)` by sigma points.

    As `LocalEKF`, with the emission taken at :math:`2n + 1` points around the prior's mean in place
    of its derivative.

    Parameters
    ----------
    alpha, beta, kappa : float
        Constants of the scaled unscented transform; see `seqdgm.inference.ukf`.
    inflation, df
        As in `LocalEKF`.

    References
    ----------
    van der Merwe, Doucet, de Freitas and Wan (2001).
    """

    alpha: float = 1.0
    beta: float = 2.0
    kappa: float = 0.0
    inflation: float = 1.0
    df: float | None = None

    def __post_init__(self) -> None:
        _check_tails(self.inflation, self.df)

    def begin(self, model: StateSpaceModel, batch: Batch) -> None:
        """Nothing to prepare."""

    def propose(
        self,
        model: StateSpaceModel,
        context: Any,
        t: int,
        h: Any,
        u: Inputs,
        x: Float[Tensor, "series one dim"],
        mask: Bool[Tensor, "series one dim"],
    ) -> Distribution:
        """The prior conditioned on the observed elements of x; the prior itself without any."""
        rule = SigmaPoints(self.alpha, self.beta, self.kappa)
        found = _condition(rule, model, h, u, x, mask)
        return found if isinstance(found, Distribution) else _build(*found, self.inflation, self.df)


@torch.no_grad()  # The weights are right for any look-ahead.
def predictive(
    model: StateSpaceModel,
    h: Any,
    u: Inputs,
    x: Float[Tensor, "series one dim"],
    mask: Bool[Tensor, "series one dim"],
) -> Float[Tensor, "series particle"]:
    r"""Gaussian approximation of :math:`\log p(x_t \mid h_t)`, for ``lookahead="ekf"``.

    With m and P the mean and covariance of the prior of every particle, g and R those of the
    emission, and G the derivative of g at m,

    .. math:: \log N\left(x_t;\; g(m),\; G P G^\top + R(m)\right)

    over the observed elements of :math:`x_t`. It is exact for a Gaussian prior and a
    linear-Gaussian emission, where with the proposal `LocalEKF` every particle gets the same weight
    if all are resampled at every step (``threshold=1``).

    Parameters
    ----------
    model : StateSpaceModel
    h : state tree with leading axes (series, particle)
    u, x, mask
        As in `Proposal`.

    Returns
    -------
    Tensor of shape (series, particle)
        In nats; minus infinity for a particle whose linearisation is not finite, 0 where nothing
        is observed.

    Raises
    ------
    ValueError
        As `LocalEKF`.

    Examples
    --------
    >>> import seqdgm as sq
    >>> model = sq.LinearGaussianSSM(
    ...     F=[[0.9]], H=[[1.0]], Q=[[1.0]], R=[[0.01]], m0=[0.0], P0=[[1.0]], diffuse=False
    ... )
    >>> y = model.sample(20, seed=0)
    >>> options = {"method": "particle", "proposal": "ekf", "threshold": 1.0, "seed": 0}
    >>> adapted = model.filter(y, lookahead="ekf", **options)
    >>> bool(adapted.ess.min() > model.filter(y, **options).ess.min())
    True

    References
    ----------
    Pitt and Shephard (1999), Filtering via simulation: auxiliary particle filters, *JASA* 94 (full
    adaption); Doucet, Godsill and Andrieu (2000), section II.D (the linearisation).
    """
    prior = model.prior(h, u)
    assert prior is not None
    _, _, found = _linearised(Taylor(), model, prior, h, u, x, mask, "lookahead='mean'")
    return torch.where(found.log_prob.isfinite(), found.log_prob, -torch.inf)


def make_proposal(spec: str | Proposal, model: StateSpaceModel) -> Proposal | None:
    """The proposal of a name, or the one given; None draws from the prior.

    Parameters
    ----------
    spec : str or Proposal
        ``"auto"`` (the model's own where it has one, else the prior), ``"bootstrap"`` (the prior),
        ``"learned"`` (the model's own), ``"ekf"`` (`LocalEKF`), ``"ukf"`` (`LocalUKF`), or an
        object.
    model : StateSpaceModel

    Raises
    ------
    ValueError
        For an unknown name, or "learned" where the model has no proposal of its own.
    """
    if not isinstance(spec, str):
        return spec
    local: dict[str, Proposal] = {"ekf": LocalEKF(), "ukf": LocalUKF()}
    if spec in local:
        return local[spec]
    if spec not in ("auto", "learned", "bootstrap"):
        raise ValueError(
            f"there is no proposal {spec!r}; choose 'auto', 'bootstrap', 'learned', 'ekf', 'ukf', "
            "or an object with begin and propose"
        )
    own = model.has_proposal
    if spec == "learned" and not own:
        raise ValueError(f"{type(model).__name__} has no proposal of its own; use 'bootstrap'")
    return LearnedProposal() if own and spec != "bootstrap" else None


def _check_tails(inflation: float, df: float | None) -> None:
    if not inflation > 0:
        raise ValueError(f"inflation={inflation!r} must be positive")
    if df is not None and not df > 0:
        raise ValueError(f"df={df!r} must be positive, or None for a Gaussian")


def _condition(
    rule: Rule,
    model: StateSpaceModel,
    h: Any,
    u: Inputs,
    x: Float[Tensor, "series one dim"],
    mask: Bool[Tensor, "series one dim"],
) -> Distribution | tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state state"]]:
    """Mean and root of the Gaussian of every particle; the prior where nothing is observed."""
    prior = model.prior(h, u)
    assert prior is not None
    return _gaussian(rule, model, prior, h, u, x, mask) if bool(mask.any()) else prior


@torch.no_grad()  # The weights are right for any proposal, so it may stand still in a gradient.
def _gaussian(
    rule: Rule,
    model: StateSpaceModel,
    prior: Distribution,
    h: Any,
    u: Inputs,
    x: Float[Tensor, "series one dim"],
    mask: Bool[Tensor, "series one dim"],
) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state state"]]:
    mean, root, found = _linearised(rule, model, prior, h, u, x, mask, "proposal='bootstrap'")
    finite = found.mean.isfinite().all(-1) & found.root.isfinite().all(-1).all(-1)
    shift = torch.where(finite[..., None], found.mean, 0.0)
    root = narrow(root)
    moved = mean + product(root, shift)
    spread = root @ narrow(found.root)
    if not bool(finite.all()):
        spread = torch.where(finite[..., None, None], spread, root)
    return moved.to(model.dtype), spread.to(model.dtype)


def _linearised(
    rule: Rule,
    model: StateSpaceModel,
    prior: Distribution,
    h: Any,
    u: Inputs,
    x: Float[Tensor, "series one dim"],
    mask: Bool[Tensor, "series one dim"],
    remedy: str,
) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state state"], Conditional]:
    """Mean and root of the prior, and the law of its shocks given x."""
    if not _whole_space(prior):
        raise ValueError(
            f"the prior of {type(model).__name__} is a {type(prior).__name__}, not a density over "
            f"the whole space, and a Gaussian does not suit it; use {remedy}"
        )
    lead = prior.batch_shape if prior.event_shape else prior.batch_shape[:-1]
    shape = torch.broadcast_shapes(lead, x.shape[:-1])
    mean, root = matched(prior, shape, model.latent_dim)
    if not bool(torch.isfinite(mean.sum() + root.sum())):
        raise ValueError(
            f"the prior of {type(model).__name__} has no finite mean and covariance for every "
            f"particle, and a Gaussian does not suit it; use {remedy}"
        )

    def law(z: Tensor) -> Distribution:
        wide = tree_map(lambda leaf: leaf.expand(len(z), *leaf.shape), h)
        return model.emission(model.absorb(wide, z.to(model.dtype)), u)

    seen = None if bool(mask.all()) else mask
    return mean, root, update(rule, law, mean, root, x.double(), seen)


def _whole_space(prior: Distribution) -> bool:
    """Whether the support is all of the real vectors."""
    support: Any = prior.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real


def _build(
    mean: Float[Tensor, "*batch state"],
    root: Float[Tensor, "*batch state state"],
    inflation: float,
    df: float | None,
) -> Distribution:
    """Distribution mean + sqrt(inflation) root e with independent shocks e."""
    root = root * math.sqrt(inflation)
    if mean.shape[-1] == 1:
        scale = root[..., 0]
        if df is None:
            return td.Normal(mean, scale, validate_args=False)
        return td.StudentT(df, mean, scale, validate_args=False)
    if df is None:
        return td.MultivariateNormal(mean, scale_tril=root, validate_args=False)
    shocks = td.StudentT(torch.full_like(mean, df), validate_args=False)
    base = td.Independent(shocks, 1, validate_args=False)
    return td.TransformedDistribution(base, [_Triangular(mean, root)], validate_args=False)


class _Triangular(td.Transform):
    """y = mean + root x with a lower triangular root."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self, mean: Float[Tensor, "*batch state"], root: Float[Tensor, "*batch state state"]
    ) -> None:
        super().__init__()
        self.mean, self.root = mean, root

    def _call(self, x: Tensor) -> Tensor:
        return self.mean + (self.root @ x[..., None])[..., 0]

    def _inverse(self, y: Tensor) -> Tensor:
        away = (y - self.mean)[..., None]
        return torch.linalg.solve_triangular(self.root, away, upper=False)[..., 0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-determinant of the root."""
        return torch.diagonal(self.root, dim1=-2, dim2=-1).log().sum(-1)
