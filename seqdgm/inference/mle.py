"""Maximum likelihood of linear-Gaussian models: one batched quasi-Newton over all series."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.inference import quasi_newton
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


class SeriesFits(Protocol):
    """What a search of the model's own has found, a row a series.

    Attributes
    ----------
    done : ndarray of bool
        The series that it was able to serve; the other rows mean nothing.
    """

    theta: Float[np.ndarray, "series free"]
    log_likelihood: Float[np.ndarray, "series"]
    sigma2: Float[np.ndarray, "series"]
    converged: Bool[np.ndarray, "series"]
    n_iter: Int[np.ndarray, "series"]
    done: Bool[np.ndarray, "series"]
    messages: tuple[str, ...]
    trace: Float[np.ndarray, "iterations series"]


class CompiledModel(QuasiNewtonModel, Protocol):
    """A model that has the search with its own likelihood compiled in."""

    def fit_series(self, batch: Batch, max_iter: int) -> SeriesFits | None:
        """Fit every series on its own; None where the model as it stands cannot."""

    def compile_search(self) -> None:
        """Compile it."""


class Ends(NamedTuple):
    """Best parameters of every system, and the way there."""

    theta: Float[np.ndarray, "sys free"]
    value: Float[np.ndarray, "sys"]
    variance: Float[np.ndarray, "sys"]
    converged: Bool[np.ndarray, "sys"]
    n_iter: Int[np.ndarray, "sys"]
    messages: tuple[str, ...]
    trace: Float[np.ndarray, "iterations sys"]


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
    ends = None if pooled else _compiled_ends(model, batch, max_iter)
    ends = ends or _follow(model, batch, max_iter, pooled=pooled)
    names = ("the pooled series",) if pooled else batch.ids
    if not np.isfinite(ends.value).any():
        raise ValueError(
            f"series {names[0]!r}: the likelihood is not finite at the starting values; the series "
            "may be constant, or too short for the model"
        )
    messages = tuple(
        f"series {name!r}: {message}"
        for name, message in zip(names, ends.messages, strict=True)
        if message
    )
    theta, variance = torch.from_numpy(ends.theta), torch.from_numpy(ends.variance)
    model.set_free(theta, variance, None if pooled else batch.ids)
    return FitReport(
        method=method,
        objective=tuple(np.nansum(ends.trace, axis=1).tolist()),
        valid_objective=(),
        converged=ends.converged,
        n_iter=int(ends.n_iter.max(initial=0)),
        seconds=time.perf_counter() - begin,
        log_likelihood=ends.value,
        messages=messages,
    )


def warm_up() -> None:
    """Compile (or load from disk) the batched search."""
    quasi_newton.warm_up()


def _compiled_ends(model: QuasiNewtonModel, batch: Batch, max_iter: int) -> Ends | None:
    """Searches of the model's own where it has them, and the batched one for what they leave."""
    search: Any = getattr(model, "fit_series", None)  # see CompiledModel
    fits: SeriesFits | None = search(batch, max_iter) if search else None
    if fits is None or not fits.done.any():
        return None
    found = Ends(
        fits.theta,
        fits.log_likelihood,
        fits.sigma2,
        fits.converged,
        fits.n_iter,
        fits.messages,
        fits.trace,
    )
    left = np.flatnonzero(~fits.done)
    if not len(left):
        return found
    rest = _follow(model, batch.take(torch.from_numpy(left)), max_iter, pooled=False)
    longest = max(len(found.trace), len(rest.trace))
    trace = np.concatenate([found.trace, found.trace[[-1] * (longest - len(found.trace))]])
    trace[:, left] = rest.trace[[*range(len(rest.trace)), *[-1] * (longest - len(rest.trace))]]
    messages = list(found.messages)
    for row, message in zip(left, rest.messages, strict=True):
        messages[row] = message
    for kept, more in zip(found[:5], rest[:5], strict=True):
        kept[left] = more
    return found._replace(messages=tuple(messages), trace=trace)


def _follow(model: QuasiNewtonModel, batch: Batch, max_iter: int, *, pooled: bool) -> Ends:
    """Search from every starting vector of every system, all together, and take the best ends."""
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
    theta = ends.theta[chosen]
    found = likelihood(model, batch, torch.from_numpy(theta), torch.arange(n_sys), pooled=pooled)
    return Ends(
        theta,
        found.value.numpy(),
        found.variance.numpy(),
        ends.converged[chosen],
        ends.n_iter[chosen],
        tuple(ends.messages[k] for k in chosen),
        ends.trace[:, chosen],
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
