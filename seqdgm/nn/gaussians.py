"""Densities and conditional draws of multivariate Gaussians observed in part."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch import distributions as td

from seqdgm.nn.drawing import scale_tril

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
Gaussian = td.MultivariateNormal | td.LowRankMultivariateNormal


def shared_log_prob(dist: td.MultivariateNormal, x: Tensor) -> Tensor:
    """Log-density where all share one covariance: one triangular solve for the whole batch."""
    factor = scale_tril(dist)
    error = (x - dist.loc).broadcast_to(torch.broadcast_shapes(x.shape, dist.loc.shape))
    white = torch.linalg.solve_triangular(
        factor, error.reshape(-1, error.shape[-1]).mT, upper=False
    )
    constant = HALF_LOG_2PI * error.shape[-1] + factor.diagonal().log().sum()
    return -0.5 * white.square().sum(0).view(error.shape[:-1]) - constant


def _masked_factor(dist: td.MultivariateNormal, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance, and the Cholesky factor of it with identity rows at missing elements."""
    factor = scale_tril(dist)
    covariance = factor @ factor.mT
    both = mask[..., :, None] & mask[..., None, :]
    eye = torch.eye(mask.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance, torch.linalg.cholesky(torch.where(both, covariance, eye))


def _masked_parts(
    dist: td.LowRankMultivariateNormal, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Factor and diagonal of the covariance, and the first as seen: 0 at missing elements."""
    factor, diagonal = dist._unbroadcasted_cov_factor, dist._unbroadcasted_cov_diag
    return factor, diagonal, torch.where(mask[..., None], factor, 0.0)


def marginal_log_prob(
    dist: Gaussian, x: Float[Tensor, "*batch dim"], mask: Bool[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch"]:
    """Log-density of the observed elements, for any mix of missing patterns at once.

    Rows and columns of missing elements are replaced by those of the identity; the factor of a
    low-rank covariance stays one.
    """
    residual = torch.where(mask, torch.where(mask, x, 0.0) - dist.loc, 0.0)
    zeros = residual.new_zeros(residual.shape[-1])
    # A missing element adds the density of N(0, 1) at 0, which is taken back.
    missing = HALF_LOG_2PI * (~mask).sum(-1, dtype=residual.dtype)
    padded: Gaussian
    if isinstance(dist, td.MultivariateNormal):
        _, factor = _masked_factor(dist, mask)
        padded = td.MultivariateNormal(zeros, scale_tril=factor, validate_args=False)
    else:
        _, diagonal, seen = _masked_parts(dist, mask)
        diagonal = torch.where(mask, diagonal, 1.0)
        padded = td.LowRankMultivariateNormal(zeros, seen, diagonal, validate_args=False)
    return padded.log_prob(residual) + missing


def condition(
    dist: Gaussian,
    drawn: Float[Tensor, "*batch dim"],
    x: Float[Tensor, "*batch dim"],
    mask: Bool[Tensor, "*batch dim"],
) -> Float[Tensor, "*batch dim"]:
    """A joint draw corrected so that it is one given the observed elements, in the others."""
    residual = torch.where(mask, torch.where(mask, x, 0.0) - drawn, 0.0)
    if isinstance(dist, td.LowRankMultivariateNormal):
        factor, diagonal, seen = _masked_parts(dist, mask)
        weighted = seen / diagonal[..., None]
        capacitance = torch.eye(seen.shape[-1]).to(seen) + seen.mT @ weighted
        # Sigma_mo Sigma_oo^{-1} = W_m (I + W_o' D_o^{-1} W_o)^{-1} W_o' D_o^{-1}, by Woodbury.
        reduced = (weighted.mT @ residual[..., None].to(seen.dtype)).to(seen.dtype)
        solved = torch.cholesky_solve(reduced, torch.linalg.cholesky(capacitance))
        return drawn + (factor @ solved)[..., 0]
    covariance, root = _masked_factor(dist, mask)
    # The gain is small where particles share a covariance; the product broadcasts without copies.
    gain = torch.cholesky_solve(covariance, root)
    residual = residual.to(gain.dtype)
    return drawn + torch.einsum("...ji,...j->...i", gain, residual)
