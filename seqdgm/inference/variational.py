r"""Variational inference as an engine: bounds of the likelihood, and draws from the proposal.

A model's learned proposal stands for the posterior in `smooth` and `impute`, and bounds the
likelihood in `log_prob` as the objectives of `seqdgm.inference.objectives` do.

References
----------
Krishnan, Shalit and Sontag (2017), Structured inference networks for nonlinear state space models,
*AAAI*, equations 4-6; Burda, Grosse and Salakhutdinov (2016), *ICLR*; Maddison et al. (2017),
Filtering variational objectives, *NIPS 30*.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference import smc
from seqdgm.inference.objectives import Objective, Path, along, replicate
from seqdgm.inference.scan import Trace, scan
from seqdgm.inference.smc import SMCOptions
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, Evidence, Samples, States, check_count

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

N_ROWS = 512  # series x paths that are drawn at once
N_DRAWS = 200  # paths behind what impute fills in


@torch.no_grad()
def log_prob(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    start: Int[Tensor, "series"] | None = None,
    objective: Literal["elbo", "iwae", "fivo"] = "elbo",
    n_replicates: int = 1,
    threshold: float | None = None,
) -> Evidence:
    r"""Bounds of the log-likelihood, with the model's own proposal.

    Parameters
    ----------
    model, batch, generator
    n_particles : int
        Paths over which ``"elbo"`` is averaged; particles K of the others.
    start : Tensor of int, shape (series,), optional
        Score the steps from here on.
    objective : {"elbo", "iwae", "fivo"}
        ``"elbo"`` is a lower bound. The others are logarithms of unbiased estimates of the
        likelihood: without (``"iwae"``) and with (``"fivo"``) resampling.
    n_replicates : int
        For ``"iwae"`` and ``"fivo"``: independent estimates. The mean of two or more logarithms
        estimates the lower bound :math:`E \log \hat Z` and is named so; its standard error is that
        of the mean. A single one is named an estimate, with the standard error of Lee and Whiteley
        (2018).
    threshold : float, optional
        For ``"fivo"``: resample below this share of effective particles (default 0.5).

    Raises
    ------
    ValueError
        For an unknown objective, or an option of another one.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> model = sq.DMM(2, 4, 4, max_epochs=1).fit(np.arange(12.0), seed=0)
    >>> model.log_prob(method="variational", objective="iwae", n_particles=50, seed=0).kind
    'estimate'
    """
    check_count("n_replicates", n_replicates)
    if objective not in ("elbo", "iwae", "fivo"):
        raise ValueError(f"objective={objective!r} is unknown; choose 'elbo', 'iwae' or 'fivo'")
    if objective == "elbo" and n_replicates > 1:
        raise ValueError("n_replicates goes with 'iwae' and 'fivo'; give 'elbo' more n_particles")
    aim = Objective(objective, n_particles, threshold)
    first = torch.zeros_like(batch.lengths) if start is None else start
    t = torch.arange(batch.n_steps, device=batch.x.device)
    counted = batch.valid & (t[None] >= first[:, None])
    if objective == "elbo":
        totals = [
            torch.where(counted[:, None], path.reconstruction - path.divergence, 0.0).sum(2)
            for _, path in _paths(model, batch, n_particles, generator)
        ]
        return _mean(torch.cat(totals, 1))
    how = SMCOptions(n_particles, threshold=aim.share if objective == "fivo" else 0.0)
    out = smc.run(model, replicate(batch, n_replicates), how, generator)
    steps = out.increments.unflatten(0, (batch.n_series, n_replicates))
    value = torch.where(counted[:, None], steps, 0.0).sum(2)
    if n_replicates > 1:
        return _mean(value)
    # The error of the whole evidence says little of a part of it, whose own is not estimated.
    stderr = out.stderr if start is None else torch.full_like(out.stderr, torch.nan)
    return Evidence(value[:, 0], "estimate", stderr)


def _mean(values: Float[Tensor, "series n"]) -> Evidence:
    n = values.shape[1]
    spread = values.std(1) if n > 1 else torch.full_like(values[:, 0], torch.inf)
    return Evidence(values.mean(1), "lower bound", spread / n**0.5)


@torch.no_grad()
def smooth(
    model: StateSpaceModel, batch: Batch, *, n_particles: int, generator: torch.Generator
) -> States:
    """Moments of the variational posterior, from `n_particles` joint draws."""
    draws, bounds = _draws(model, batch, n_particles, generator)
    mean = draws.mean(1)
    centred = draws - mean[:, None]
    cov = torch.einsum("nsti,nstj->ntij", centred, centred) / draws.shape[1]

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return _draws(model, batch, n, generator)[0]

    return States(mean, cov, bounds.mean(1), draw=draw)


@torch.no_grad()
def impute(
    model: StateSpaceModel, batch: Batch, *, n_particles: int, generator: torch.Generator
) -> Samples:
    """Observations with their missing elements drawn from the variational posterior.

    At most `N_DRAWS` draws; a model that feeds observations back draws them as it goes.
    """
    n = min(n_particles, N_DRAWS)
    filled = []
    for trace, path in _paths(model, batch, n, generator):
        copies = path.divergence.shape[1]
        wide = replicate(batch, copies)
        x = trace.x
        if x is None:
            law = model.emission(trace.s, wide.inputs_all())
            law = dist.expand(law, wide.x.shape[:2], wide.x.shape[2])
            x = dist.fill_missing(law, wide.x, wide.mask, generator)
        x = x.masked_fill(~wide.valid[..., None], torch.nan)
        filled.append(x.unflatten(0, (batch.n_series, copies)))
    return Samples(torch.cat(filled, 1))


def _draws(
    model: StateSpaceModel, batch: Batch, n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "series n time state"], Float[Tensor, "series n"]]:
    values, totals = [], []
    for trace, path in _paths(model, batch, n, generator):
        value = model.report(trace.h, trace.z).double()
        values.append(value.unflatten(0, path.divergence.shape[:2]))
        totals.append((path.reconstruction - path.divergence).sum(2))
    value = torch.cat(values, 1).masked_fill(~batch.valid[:, None, :, None], torch.nan)
    return value, torch.cat(totals, 1)


@torch.no_grad()
def _paths(
    model: StateSpaceModel, batch: Batch, n: int, generator: torch.Generator
) -> Iterator[tuple[Trace, Path]]:
    """`n` paths of every series, some at a time; the terms have axes (series, copy, time)."""
    done = 0
    while done < n:
        copies = min(n - done, max(1, N_ROWS // batch.n_series))
        trace = scan(model, batch, generator, copies)
        found = along(model, replicate(batch, copies), trace)
        shape = (batch.n_series, copies)
        yield trace, Path(*(part.double().unflatten(0, shape) for part in found))
        done += copies
