r"""Transition densities :math:`f(z_{t+1}^m \mid z_t^k)` between all pairs of states.

Smoothers weigh every particle of a step by how well it explains a given next state. Where the
transition is Gaussian, the quadratic form expands into one matrix product

.. math::

    -\tfrac12 |\tilde z - \tilde\mu_k|^2
        = \tilde z^\top \tilde\mu_k - \tfrac12 |\tilde z|^2 - \tfrac12 |\tilde\mu_k|^2

of whitened and centred vectors. It is used as long as rounding cannot show; differences are taken
first otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from seqdgm.inference.resampling import gather
from seqdgm.nn import distributions as dist
from seqdgm.nn.drawing import scale_tril
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import Batch, Inputs, tree_map

PAIR_ELEMENTS = 2_000_000  # numbers held at once where pairs are not one matrix product (16 MB)
# Largest squared whitened distance from the centre whose rounding, in float64, stays below 1e-6.
LARGEST_SQUARE = 1e9
# Families whose density is largest where its argument equals the location.
_PEAKED = (td.Normal, td.MultivariateNormal, td.StudentT, td.Laplace, td.Cauchy)


@dataclass(frozen=True)
class Transition:
    """The law of the state of a step given each particle of the step before.

    Attributes
    ----------
    model : StateSpaceModel
    h : state tree with leading axes (series, particle)
        Memory that the particles leave to the step.
    u : Inputs
        Known inputs of the step, with an axis for particles.
    shape : tuple of int
        (series, particle).
    t : int
        The step.
    ids : tuple
        Names of the series.
    """

    model: StateSpaceModel
    h: Any
    u: Inputs
    shape: tuple[int, int]
    t: int
    ids: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        model: StateSpaceModel,
        batch: Batch,
        t: int,
        s: Any,
        x: Tensor | None,
        shape: tuple[int, int],
    ) -> Transition:
        """The law of z_t given states `s` (and fed-back observations `x`) of step t - 1."""
        u = batch.inputs_at(t, 1)
        fed = model.embed(x) if model.feedback and x is not None else None
        h = model.advance(s, fed, u)
        return cls(model, h, u, shape, t, batch.ids)

    def law(self, index: Int[Tensor, "series n"] | None = None) -> Distribution:
        """Distribution of the next state of all particles, or of the chosen ones."""
        h, shape = self.h, self.shape
        if index is not None:
            h, shape = tree_map(lambda leaf: gather(leaf, index), h), (shape[0], index.shape[1])
        prior = self.model.prior(h, self.u)
        assert prior is not None
        return dist.expand(prior, shape, self.model.latent_dim)

    @cached_property
    def prior(self) -> Distribution:
        """`law` of all particles."""
        return self.law()

    def at(
        self, index: Int[Tensor, "series n"], target: Float[Tensor, "series n state"]
    ) -> Float[Tensor, "series n"]:
        """Log-density of each target given one particle; ValueError where it is not a number."""
        log_f = dist.log_prob(self.law(index), target).double()
        bad = log_f.isnan().any(1)
        if bool(bad.any()):
            raise self.failure(int(bad.long().argmax()))
        return log_f

    def failure(self, series: int) -> ValueError:
        """What to raise where nothing explains a state of one of the series."""
        return ValueError(
            f"series {self.ids[series]!r}, step {self.t}: no particle of the step before explains "
            "the state, or the transition's density is not a number; check the transition, or use "
            "smoother='genealogy', which needs no density"
        )

    def pairs(self, target: Float[Tensor, "series n state"]) -> Float[Tensor, "series n particle"]:
        """Log-density of each target given every particle."""
        return self._pairs(target)

    @cached_property
    def _pairs(self) -> Callable[[Tensor], Tensor]:
        form = _gaussian_form(self.prior)
        return self._general if form is None else form.pairs

    def _general(self, target: Tensor) -> Tensor:
        # The model is asked again for every pair: its functions know only one axis of particles.
        n, count = self.shape
        parts = []
        for part in target.split(max(1, PAIR_ELEMENTS // (n * count * target.shape[2])), 1):
            m = part.shape[1]
            index = torch.arange(count, device=part.device).repeat(m).expand(n, -1)
            wanted = part.repeat_interleave(count, 1)
            parts.append(self.at(index, wanted).reshape(n, m, count))
        return torch.cat(parts, 1)

    @cached_property
    def log_bound(self) -> Float[Tensor, "series one"]:
        """Log of an upper bound of the density over targets and particles.

        Raises
        ------
        ValueError
            If the transition is of a family without a known bound, and the model gives none.
        """
        own = self.model.transition_bound(self.u)
        if own is not None:
            own = torch.as_tensor(own, dtype=torch.float64, device=self._device)
            return own.reshape(-1, 1).expand(self.shape[0], 1)
        prior = self.prior
        if isinstance(prior, _PEAKED):
            peak = dist.log_prob(prior, prior.loc).double()
            return peak.max(1, keepdim=True).values
        if dist.is_discrete(prior):
            return torch.zeros(self.shape[0], 1, dtype=torch.float64, device=self._device)
        raise ValueError(
            f"{type(self.model).__name__}: no upper bound is known for the density of "
            f"{type(prior).__name__}; define transition_bound(u), or use smoother='ffbs' or "
            "'ffbs-mcmc'"
        )

    @property
    def _device(self) -> torch.device:
        return self.u.values.device


def states_are_z(model: StateSpaceModel) -> bool:
    """Whether the state after z is z itself."""
    return model.markov or type(model).absorb is StateSpaceModel.absorb


class _Shared(NamedTuple):
    """Gaussian laws with one covariance for all particles of a series.

    Attributes
    ----------
    centre : Tensor of shape (series, 1, state)
    whiten : function
        Multiplies by the inverse of the covariance's factor.
    loc : Tensor of shape (series, particle, state)
        Whitened and centred.
    constant : Tensor of shape (series or 1, 1)
    """

    centre: Tensor
    whiten: Callable[[Tensor], Tensor]
    loc: Tensor
    constant: Tensor

    def pairs(self, target: Tensor) -> Tensor:
        z = self.whiten(target.double() - self.centre)
        own, others = z.square().sum(-1), self.loc.square().sum(-1)
        if bool(own.max() + others.max() < LARGEST_SQUARE):
            offset = (self.constant - 0.5 * others)[:, None]
            return torch.baddbmm(offset, z, self.loc.mT).sub_(0.5 * own[..., None])
        parts = [
            (part[:, :, None] - self.loc[:, None]).square().sum(-1)
            for part in z.split(_chunk(self.loc), 1)
        ]
        return self.constant[:, None] - 0.5 * torch.cat(parts, 1)


class _Diagonal(NamedTuple):
    """Gaussian laws with a diagonal covariance of every particle's own."""

    loc: Float[Tensor, "series particle state"]
    scale: Float[Tensor, "series particle state"]

    def pairs(self, target: Tensor) -> Tensor:
        constant = -self.scale.log().sum(-1) - dist.HALF_LOG_2PI * self.loc.shape[-1]
        centre = self.loc.mean(1, keepdim=True)
        z, loc, precision = target.double() - centre, self.loc - centre, self.scale**-2
        square = z.square()
        reach = square.sum(-1).max() + loc.square().sum(-1).max()
        if bool(reach * precision.max() < LARGEST_SQUARE):
            left = torch.cat([square, z], -1)
            right = torch.cat([-0.5 * precision, loc * precision], -1)
            offset = (constant - 0.5 * (loc.square() * precision).sum(-1))[:, None]
            return torch.baddbmm(offset, left, right.mT)
        parts = [
            ((part[:, :, None] - loc[:, None]) / self.scale[:, None]).square().sum(-1)
            for part in z.split(_chunk(loc), 1)
        ]
        return constant[:, None] - 0.5 * torch.cat(parts, 1)


def _chunk(loc: Tensor) -> int:
    """Targets whose differences from all particles are held at once."""
    return max(1, PAIR_ELEMENTS // loc.numel())


def _gaussian_form(prior: Distribution) -> _Shared | _Diagonal | None:
    """A matrix-product form of a Gaussian law; None where there is none."""
    if isinstance(prior, td.Normal):
        loc, scale = prior.loc.double(), prior.scale.double()
        # An expanded axis has stride 0: one scale for all particles, without comparing them.
        if prior.scale.stride(1) != 0 and prior.scale.shape[1] > 1:
            return _Diagonal(loc, scale)
        scale = scale[:, :1]
        constant = -scale.log().sum(-1) - dist.HALF_LOG_2PI * loc.shape[-1]
        centre = loc.mean(1, keepdim=True)
        return _Shared(centre, lambda v: v / scale, (loc - centre) / scale, constant)
    if isinstance(prior, td.MultivariateNormal):
        factor = scale_tril(prior).double()
        if factor.ndim > 3 and factor.shape[-3] == 1:
            factor = factor.squeeze(-3)
        elif factor.ndim > 2:
            return None
        loc = prior.loc.double()
        return _whitened(loc, factor)
    return None


def _whitened(loc: Tensor, factor: Float[Tensor, "... state state"]) -> _Shared:
    def whiten(v: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, v.mT, upper=False).mT

    logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = (-logdet - 0.5 * math.log(2 * math.pi) * loc.shape[-1]).reshape(-1, 1)
    centre = loc.mean(1, keepdim=True)
    return _Shared(centre, whiten, whiten(loc - centre), constant)
