"""Maximum likelihood of linear-Gaussian models: one batched quasi-Newton over all series."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference.quasi_newton import maximise
from seqdgm.kernels import kalman_filter
from seqdgm.kernels.types import System
from seqdgm.results import FitReport
from seqdgm.types import Batch, check_count

CHUNK = 2**24  # observations held at once for one evaluation of all parameter rows (128 MB)


class QuasiNewtonModel(Protocol):
    """What a model must say to be fitted here.

    Attributes
    ----------
    concentrated : bool
        Whether the innovation variance is left out of the parameters: the model is then given
        with variance 1, and its maximum-likelihood variance is found in closed form.
    """

    concentrated: bool

    def free_start(self, batch: Batch, *, pooled: bool) -> Float[np.ndarray, "starts sys free"]:
        """Unconstrained starting vectors; every one is followed and the best end is kept."""

    def free_sizes(self, batch: Batch) -> Float[np.ndarray, "..."] | float:
        """Typical size of each parameter, for finite differences and step lengths."""

    def free_system(
        self,
        theta: Float[Tensor, "batch free"],
        rows: Int[Tensor, "batch"],
        u: Float[Tensor, "batch steps inputs"],
    ) -> System:
        """System matrices, one for each row of `theta`."""

    def set_free(
        self,
        theta: Float[Tensor, "sys free"],
        variance: Float[Tensor, "sys"],
        ids: tuple[Any, ...] | None,
    ) -> None:
        """Take over the optimum."""


class Likelihood(NamedTuple):
    """Log-likelihood and the innovation variance that maximises it (1 if not concentrated)."""

    value: Float[Tensor, "rows"]
    variance: Float[Tensor, "rows"]


def fit(
    model: QuasiNewtonModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    pooled: bool = False,
    max_iter: int = 200,
) -> FitReport:
    """Maximise the exact log-likelihood of every series, or of all together.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    pooled : bool
        Share the parameters over the series.
    max_iter : int
        Quasi-Newton iterations at most.

    Raises
    ------
    ValueError
        If no series has a finite likelihood at its starting values.
    """
    begin = time.perf_counter()
    check_count("max_iter", max_iter)
    starts = model.free_start(batch, pooled=pooled)
    n_sys = starts.shape[1]

    def objective(theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        parts = [
            likelihood(model, batch, torch.from_numpy(t), torch.from_numpy(r), pooled=pooled).value
            for t, r in zip(*_chunks(theta, rows % n_sys, batch), strict=True)
        ]
        return torch.cat(parts).numpy()

    sizes = np.broadcast_to(model.free_sizes(batch), (batch.n_series, starts.shape[2]))
    sizes = sizes.mean(0, keepdims=True) if pooled else sizes
    ends = maximise(
        objective,
        starts.reshape(len(starts) * n_sys, starts.shape[2]),
        max_iter=max_iter,
        step=np.tile(sizes, (len(starts), 1)),
    )
    value = np.where(np.isfinite(ends.value), ends.value, -np.inf).reshape(len(starts), n_sys)
    chosen = value.argmax(0) * n_sys + np.arange(n_sys)
    theta = torch.from_numpy(ends.theta[chosen])
    found = likelihood(model, batch, theta, torch.arange(n_sys), pooled=pooled)
    failed = ~torch.isfinite(found.value)
    names = ("the pooled series",) if pooled else batch.ids
    if bool(failed.all()):
        raise ValueError(
            f"series {names[0]!r}: the likelihood is not finite at the starting values; the series "
            "may be constant, or too short for the model"
        )
    messages = tuple(
        f"series {name!r}: {ends.messages[k]}"
        for name, k in zip(names, chosen, strict=True)
        if ends.messages[k]
    )
    model.set_free(theta, found.variance, None if pooled else batch.ids)
    return FitReport(
        method=method,
        objective=tuple(np.nansum(ends.trace[:, chosen], axis=1).tolist()),
        valid_objective=(),
        converged=ends.converged[chosen],
        n_iter=int(ends.n_iter[chosen].max(initial=0)),
        seconds=time.perf_counter() - begin,
        log_likelihood=found.value.numpy(),
        messages=messages,
    )


def likelihood(
    model: QuasiNewtonModel,
    batch: Batch,
    theta: Float[Tensor, "rows free"],
    rows: Int[Tensor, "rows"],
    *,
    pooled: bool,
) -> Likelihood:
    """Log-likelihoods of parameter rows; row k belongs to series ``rows[k]`` (to all if pooled)."""
    series = rows
    if pooled:
        series = torch.arange(batch.n_series).repeat(len(rows))
        theta = theta.repeat_interleave(batch.n_series, 0)
        rows = rows.repeat_interleave(batch.n_series, 0)
    u = batch.u[series][:, : batch.n_steps]
    system = model.free_system(theta, torch.zeros_like(rows) if pooled else rows, u)
    out = kalman_filter(
        system, batch.x[series], batch.mask[series], batch.lengths[series], store="likelihood"
    )
    parts = [out.n_obs.double(), out.logdet, out.quad, out.loglik]
    if pooled:
        parts = [part.reshape(-1, batch.n_series).sum(1) for part in parts]
    count, logdet, quad, loglik = parts
    if not model.concentrated:
        return Likelihood(loglik, torch.ones_like(loglik))
    return concentrate(
        count, logdet, quad, _rounding(batch)[series] if not pooled else _rounding(batch).max()
    )


def concentrate(
    count: Float[Tensor, "rows"],
    logdet: Float[Tensor, "rows"],
    quad: Float[Tensor, "rows"],
    floor: Float[Tensor, "rows"],
) -> Likelihood:
    r"""Likelihood at the best innovation variance :math:`\hat\sigma^2 = \text{quad} / n`.

    .. math:: -\tfrac12 \left( n \log 2 \pi \hat\sigma^2 + n + \text{logdet} \right)

    It is not finite for a series that the model fits without error: with a variance of at most
    `floor`, which is what rounding leaves of zero.
    """
    variance = quad / count
    value = -0.5 * (count * (torch.log(2 * torch.pi * variance) + 1) + logdet)
    return Likelihood(torch.where(variance > floor, value, torch.nan), variance)


def _rounding(batch: Batch) -> Float[Tensor, "series"]:
    """Variance that rounding alone can leave in each series."""
    return (1e-13 * batch.x.abs().amax((1, 2))).square()


def _chunks(
    theta: np.ndarray, rows: np.ndarray, batch: Batch
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cut a batch of parameter rows so that the data repeated for them stay within bounds."""
    pieces = -(-len(rows) * batch.x[0].numel() // CHUNK) or 1
    return np.array_split(theta, pieces), np.array_split(rows, pieces)
