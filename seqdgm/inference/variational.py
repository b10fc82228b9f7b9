r"""Variational inference: the evidence lower bound and its use as an engine.

.. math::

    \log p(x_{1:T}) \ge E_q \sum_t \left[ \log g(x_t \mid s_t)
        - \beta\, \mathrm{KL}(q(z_t \mid h_t, x) \,\|\, f(z_t \mid h_t)) \right], \quad \beta = 1

with the divergence in closed form where both are Gaussian. It is the particle bound with K = 1 and
an analytic divergence in place of the sampled one.

References
----------
Krishnan, Shalit and Sontag (2017), Structured inference networks for nonlinear state space models,
AAAI, equations 4-6; Kingma and Welling (2014).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference.objectives import Objective, along, evaluate, replicate
from seqdgm.inference.scan import scan
from seqdgm.types import Batch, Evidence, States

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


@torch.no_grad()
def log_prob(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    start: Int[Tensor, "series"] | None = None,
) -> Evidence:
    """Evidence lower bound, averaged over `n_particles` paths, with its standard error."""
    first = torch.zeros_like(batch.lengths) if start is None else start
    t = torch.arange(batch.n_steps, device=batch.x.device)
    counted = batch.valid & (t[None] >= first[:, None])
    draws = []
    for _ in range(n_particles):
        terms = evaluate(model, batch, Objective(), 1.0, generator)
        step = terms.reconstruction.double() - terms.divergence.double()
        draws.append(torch.where(counted, step, 0.0).sum(1))
    values = torch.stack(draws)
    spread = values.std(0) if n_particles > 1 else torch.full_like(values[0], torch.inf)
    return Evidence(values.mean(0), "lower bound", spread / n_particles**0.5)


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
def _draws(
    model: StateSpaceModel, batch: Batch, n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "series n time state"], Float[Tensor, "series n"]]:
    wide = replicate(batch, n)
    trace = scan(model, batch, generator, n)
    terms = along(model, wide, trace)
    shape = (batch.n_series, n, batch.n_steps, -1)
    value = model.report(trace.h, trace.z).double().reshape(shape)
    value = value.masked_fill(~batch.valid[:, None, :, None], torch.nan)
    total = (terms.reconstruction.double() - terms.divergence.double()).sum(1)
    return value, total.reshape(batch.n_series, n)
