"""Heads whose columns depend on each other given the features."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributions as td
from torch.nn import functional as F

from seqdgm.nn.flow import Coupling, CouplingFlow
from seqdgm.nn.heads.base import Head, raw_scale
from seqdgm.nn.nade import NADE

MAX_RATIO = 30.0  # of a column's shared spread to its own: float32 factors what stays below


def _bounded(raw: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
    """Vectors pulled into the ball of radius `MAX_RATIO`, small ones almost as they are."""
    return raw * torch.rsqrt(1 + raw.square().sum(-1, keepdim=True) / MAX_RATIO**2)


def _unbounded(ratio: Float[np.ndarray, "dim k"]) -> Float[np.ndarray, "dim k"]:
    """Inverse of `_bounded`."""
    return ratio / np.sqrt(1 - (ratio**2).sum(-1, keepdims=True) / MAX_RATIO**2)


def _moments(
    rows: Float[np.ndarray, "rows dim"], floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns with values, their means, and their covariance clear of a floor.

    From the complete rows; where those are too few to span the columns, correlations are left out.
    """
    columns = np.flatnonzero(np.isfinite(rows).any(0))
    rows = rows[:, columns]
    variance = np.nanvar(rows, 0) + (2 * floor) ** 2
    whole = rows[np.isfinite(rows).all(1)]
    covariance = np.diag(variance)
    if len(whole) > 2 * len(columns):
        found = np.atleast_2d(np.cov(whole.T))
        spread = np.sqrt(np.maximum(np.diag(found), floor**2))
        # Shrunk a little, so that columns that move as one leave a proper covariance.
        correlation = 0.99 * found / np.outer(spread, spread)
        np.fill_diagonal(correlation, 1.0)
        covariance = correlation * np.sqrt(np.outer(variance, variance))
    return columns, np.nanmean(rows, 0), covariance


class FullGaussianHead(Head):
    r""":math:`x \sim N(\mu, \Sigma)` with any covariance; the features set its Cholesky factor.

    Row i of the factor is :math:`\sigma_i (r_i, 1, 0, \dots) / \sqrt{1 + |r_i|^2}`, so that
    :math:`\sigma = \mathrm{softplus}(\cdot) + s_{\min}` is the standard deviation of each column.
    The i - 1 numbers :math:`r_i` say how it hangs on the columns before; :math:`|r_i| \le 30`
    keeps at least a 901st of each variance its own. They start without dependence on the features.
    Vectors observed in part are marginalised and conditioned exactly.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns D; the head has :math:`D (D + 3) / 2` outputs.
    min_scale : float
        Floor of :math:`\sigma`, in the units that the head works in.
    """

    def __init__(self, in_dim: int, obs_dim: int, *, min_scale: float = 1e-3) -> None:
        super().__init__(in_dim, obs_dim, obs_dim * (obs_dim + 3) // 2)
        self.min_scale = min_scale
        with torch.no_grad():
            self.linear.weight[2 * obs_dim :] = 0.0
            self.linear.bias[2 * obs_dim :] = 0.0

    def forward(self, features: Float[Tensor, "*batch in_dim"]) -> td.MultivariateNormal:
        """MultivariateNormal."""
        dim = self.obs_dim
        loc, scale, raw = self.linear(features).split([dim, dim, dim * (dim - 1) // 2], -1)
        below = raw.new_zeros(*raw.shape[:-1], dim, dim)
        rows, columns = np.tril_indices(dim, -1)
        below[..., rows, columns] = raw
        below = _bounded(below)
        length = (1 + below.square().sum(-1)).sqrt()
        own = (F.softplus(scale) + self.min_scale) / length
        eye = torch.eye(dim, dtype=raw.dtype, device=raw.device)
        return td.MultivariateNormal(
            loc, scale_tril=own[..., None] * (below + eye), validate_args=False
        )

    def initialise_bias(self, values: Float[np.ndarray, "series time dim"]) -> None:
        """Start from mean and covariance of the data."""
        dim = self.obs_dim
        seen, mean, covariance = _moments(values.reshape(-1, dim), self.min_scale)
        if not seen.size:
            return
        root = np.linalg.cholesky(covariance)
        own = np.diag(root)
        below = np.zeros((dim, dim))
        below[np.ix_(seen, seen)] = _unbounded(np.tril(root, -1) / own[:, None])
        scale = raw_scale(np.sqrt(np.diag(covariance)), self.min_scale)
        bias = self.linear.bias
        with torch.no_grad():
            bias[seen] = torch.from_numpy(mean).to(bias)
            bias[dim + seen] = torch.from_numpy(scale).to(bias)
            bias[2 * dim :] = torch.from_numpy(below[np.tril_indices(dim, -1)]).to(bias)


class LowRankGaussianHead(Head):
    r""":math:`x \sim N(\mu, \mathrm{diag}(\sigma) (I + R R') \mathrm{diag}(\sigma))`.

    The features set the mean, :math:`\sigma = \mathrm{softplus}(\cdot) + s_{\min}` and the matrix R
    of low rank, whose rows are at most 30 long, so that at least a 901st of each variance is a
    column's own. Vectors observed in part are marginalised and conditioned exactly, at the cost of
    the rank and not of the columns. Starts at probabilistic
    principal components (Tipping and Bishop, 1999) with each column's own variance.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns.
    rank : int
        Columns of R, cut off at `obs_dim`.
    min_scale : float
        Floor of :math:`\sigma`, in the units that the head works in.
    """

    def __init__(
        self, in_dim: int, obs_dim: int, *, rank: int = 5, min_scale: float = 1e-3
    ) -> None:
        if rank < 1:
            raise ValueError(
                f"rank={rank} must be at least 1; without correlations choose the "
                "emission 'gaussian'"
            )
        kept = min(rank, obs_dim)
        super().__init__(in_dim, obs_dim, (2 + kept) * obs_dim)
        self.rank = kept
        self.min_scale = min_scale

    def forward(self, features: Float[Tensor, "*batch in_dim"]) -> td.LowRankMultivariateNormal:
        """LowRankMultivariateNormal."""
        dim = self.obs_dim
        loc, scale, factor = self.linear(features).split([dim, dim, dim * self.rank], -1)
        own = F.softplus(scale) + self.min_scale
        shared = own[..., None] * _bounded(factor.unflatten(-1, (dim, self.rank)))
        return td.LowRankMultivariateNormal(loc, shared, own.square(), validate_args=False)

    def initialise_bias(self, values: Float[np.ndarray, "series time dim"]) -> None:
        """Start from mean and principal components of the data."""
        dim = self.obs_dim
        seen, mean, covariance = _moments(values.reshape(-1, dim), self.min_scale)
        if not seen.size:
            return
        spread = np.sqrt(np.diag(covariance))
        roots, vectors = np.linalg.eigh(covariance / np.outer(spread, spread))
        kept = min(self.rank, max(len(seen) - 1, 0))
        noise = roots[: len(seen) - kept].mean()
        weights = vectors[:, len(seen) - kept :] * np.sqrt(
            np.maximum(roots[len(seen) - kept :] - noise, 0.0)
        )
        # At least a hundredth of a column's variance stays its own.
        weights *= np.sqrt(np.minimum(1.0, 0.99 / np.maximum((weights**2).sum(1), 0.99)))[:, None]
        own = np.sqrt(1 - (weights**2).sum(1))
        factor = np.zeros((dim, kept))
        factor[seen] = _unbounded(weights / own[:, None])
        # Components that the data do not ask for start small, but not at their saddle point of 0.
        bias = self.linear.bias
        with torch.no_grad():
            start = bias[2 * dim :].view(dim, self.rank).clone() * 0.01
            start[:, :kept] = torch.from_numpy(factor).to(bias)
            bias[seen] = torch.from_numpy(mean).to(bias)
            bias[dim + seen] = torch.from_numpy(raw_scale(spread * own, self.min_scale)).to(bias)
            bias[2 * dim :] = start.flatten()


class NADEHead(Head):
    r"""Binary vectors by a chain of conditionals; the features set the biases.

    See :class:`seqdgm.nn.nade.NADE`: exact where a vector is observed in part, with at most 8
    missing elements before its last observed one.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns.
    hidden_dim : int
        Units of the chain's hidden layer.
    """

    law: ClassVar[type[NADE]] = NADE
    real_valued: ClassVar[bool] = False
    needs: ClassVar[str] = "0 or 1"
    remedy: ClassVar[str] = "threshold the data, or choose emission='gaussian' or 'poisson'"

    def __init__(self, in_dim: int, obs_dim: int, *, hidden_dim: int = 100) -> None:
        super().__init__(in_dim, obs_dim, obs_dim + hidden_dim)
        self.hidden_dim = hidden_dim
        self.w = nn.Parameter(0.05 * torch.randn(obs_dim, hidden_dim))
        self.v = nn.Parameter(0.05 * torch.randn(obs_dim, hidden_dim))

    def forward(self, features: Float[Tensor, "*batch in_dim"]) -> NADE:
        """NADE."""
        b, c = self.linear(features).split([self.obs_dim, self.hidden_dim], -1)
        return NADE(b, c, self.w, self.v)

    def initialise_bias(self, values: Float[np.ndarray, "series time dim"]) -> None:
        """Start from the share of ones in each column, up to the small start of the weights."""
        rows = torch.from_numpy(values.reshape(-1, self.obs_dim))
        ones, seen = rows.nansum(0), rows.isfinite().sum(0)
        # Half a count on either side keeps the logit finite.
        logit = ((ones + 0.5) / (seen - ones + 0.5)).log()
        bias = self.linear.bias
        with torch.no_grad():
            offset = self.v @ bias[self.obs_dim :].sigmoid()
            start = logit.to(bias) - offset
            bias[: self.obs_dim] = torch.where(
                (seen > 0).to(bias.device), start, bias[: self.obs_dim]
            )

    def _possible(self, values: np.ndarray) -> np.ndarray:
        return (values == 0) | (values == 1)


class FlowHead(Head):
    r"""Real vectors by affine-coupling layers whose networks read the features.

    See :class:`seqdgm.nn.flow.CouplingFlow`: where a vector is observed in part, one or two
    missing elements are integrated out numerically, and more are refused. Starts at independent
    Gaussians.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns, at least 2.
    n_layers : int
        Coupling layers.
    hidden_dim : int
        Units of each layer's network.
    min_scale : float
        Floor of the scale of the last, elementwise map, in the units that the head works in.

    Raises
    ------
    ValueError
        For one column, which has no other half to read.
    """

    law: ClassVar[type[CouplingFlow]] = CouplingFlow

    def __init__(
        self,
        in_dim: int,
        obs_dim: int,
        *,
        n_layers: int = 4,
        hidden_dim: int = 32,
        min_scale: float = 1e-3,
    ) -> None:
        if obs_dim < 2:
            raise ValueError(
                "the emission 'flow' couples columns and needs at least two; for one column choose "
                "'mixture' or 'studentt'"
            )
        super().__init__(in_dim, obs_dim, 2 * obs_dim + n_layers * hidden_dim)
        self.min_scale = min_scale
        self.layers = nn.ModuleList(
            Coupling(obs_dim, hidden_dim, flip=bool(i % 2)) for i in range(n_layers)
        )

    def forward(self, features: Float[Tensor, "*batch in_dim"]) -> CouplingFlow:
        """CouplingFlow."""
        dim = self.obs_dim
        loc, scale, context = self.linear(features).split(
            [dim, dim, self.linear.out_features - 2 * dim], -1
        )
        return CouplingFlow(loc, F.softplus(scale) + self.min_scale, context, self.layers)

    def initialise_bias(self, values: Float[np.ndarray, "series time dim"]) -> None:
        """Start from mean and scale of each column."""
        seen, mean, covariance = _moments(values.reshape(-1, self.obs_dim), self.min_scale)
        scale = raw_scale(np.sqrt(np.diag(covariance)), self.min_scale)
        bias = self.linear.bias
        with torch.no_grad():
            bias[seen] = torch.from_numpy(mean).to(bias)
            bias[self.obs_dim + seen] = torch.from_numpy(scale).to(bias)
