"""One-step predictions and innovations of linear-Gaussian models."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqdgm.inference.kalman import observation_moments
from seqdgm.kernels import kalman_filter
from seqdgm.kernels.types import DIFFUSE, System
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

CHUNK = 2**22  # elements of filtered covariances held at once


class Innovations(NamedTuple):
    """What is known of every observation one step before it is seen, in model units.

    Attributes
    ----------
    mean, variance : Tensor of shape (series, time, dim)
        Moments of x_t given x_1..t-1, for missing observations too; the variance is infinite while
        a diffuse element leaves the prediction undetermined. NaN beyond the end of a series.
    standardised : Tensor of shape (series, time, dim)
        Innovations over their standard deviations, independent N(0, 1) under the model: the
        elements of a vector are taken in sequence, each given those before it. NaN where missing,
        diffuse or without variance.
    diffuse : Tensor of bool, shape (series, time, dim)
        Observations that went into determining a diffuse element; they have no density.
    """

    mean: Float[Tensor, "series time dim"]
    variance: Float[Tensor, "series time dim"]
    standardised: Float[Tensor, "series time dim"]
    diffuse: Bool[Tensor, "series time dim"]


def innovations(model: StateSpaceModel, batch: Batch) -> Innovations:
    """Filter a panel and return its one-step predictions; memory is bounded over series."""
    held = batch.n_steps * model.latent_dim**2
    pieces = torch.arange(batch.n_series).split(max(1, CHUNK // max(held, 1)))
    parts = [_innovations(model, batch.take(rows)) for rows in pieces]
    return Innovations(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _innovations(model: StateSpaceModel, batch: Batch) -> Innovations:
    system = model.linear_gaussian(batch.u[:, : batch.n_steps], batch.rows)
    out = kalman_filter(system, batch.x, batch.mask, batch.lengths, store="all")
    assert out.pred_mean is not None
    assert out.pred_cov is not None
    assert out.innovations is not None
    assert out.innov_var is not None
    mean, cov = observation_moments(system, out.pred_mean, out.pred_cov)
    variance = torch.diagonal(cov, dim1=-2, dim2=-1).clamp_min(0.0)
    if out.cov_inf is not None:
        variance = torch.where(_undetermined(system, out.cov_inf), torch.inf, variance)
    known = torch.isfinite(out.innov_var) & (out.innov_var > 0)
    root = torch.where(known, out.innov_var, 1.0).sqrt()
    standardised = torch.where(known, out.innovations / root, torch.nan)
    return Innovations(mean, variance, standardised, torch.isposinf(out.innov_var))


def _undetermined(
    system: System, cov_inf: Float[Tensor, "series time state state"]
) -> Bool[Tensor, "series time dim"]:
    """Whether the variance of a prediction has a diffuse part, beyond rounding of its terms."""
    f = system.F.expand(-1, cov_inf.shape[1], -1, -1)[:, 1:]
    first = system.Pinf[:, None].expand(len(cov_inf), -1, -1, -1)
    predicted = torch.cat([first, f @ cov_inf[:, :-1] @ f.mT], 1)
    part = torch.diagonal(system.H @ predicted @ system.H.mT, dim1=-2, dim2=-1)
    spread = torch.diagonal(predicted, dim1=-2, dim2=-1).sqrt()
    terms = (system.H.abs() @ spread[..., None])[..., 0]
    return part > (DIFFUSE * terms) ** 2
