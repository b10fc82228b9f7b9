r"""Objectives of learning: bounds of the log-likelihood, step by step and with gradients.

With :math:`w_t = g(x_t \mid s_t) f(z_t \mid h_t) / q(z_t \mid h_t, x)`, one path drawn from the
proposal gives the evidence lower bound,

.. math::

    \log p(x_{1:T}) \ge E_q \sum_t \left[ \log g(x_t \mid s_t)
        - \mathrm{KL}(q(z_t \mid h_t, x) \,\|\, f(z_t \mid h_t)) \right],

with the divergence in closed form where there is one.

References
----------
Krishnan, Shalit and Sontag (2017), Structured inference networks for nonlinear state space models,
AAAI, equations 4-6; Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improved
variational inference with inverse autoregressive flow, *NIPS 29*, appendix C.8 (free bits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference.scan import Trace, prior_over_time, scan
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, check_count

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

Name = Literal["elbo"]


@dataclass(frozen=True)
class Objective:
    """What to maximise.

    Attributes
    ----------
    name : str
        ``"elbo"``.
    n_particles : int
        Paths of every series, over which the evidence lower bound is averaged.
    free_bits : float
        Nats of divergence that cost nothing at each step: a smaller one counts as this many.
    """

    name: Name = "elbo"
    n_particles: int = 1
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        check_count("n_particles", self.n_particles)
        if self.name not in get_args(Name):
            raise ValueError(f"objective={self.name!r} is unknown; choose one of {get_args(Name)}")
        if self.free_bits < 0:
            raise ValueError(f"free_bits={self.free_bits!r} must not be negative")


class Terms(NamedTuple):
    """An objective, step by step; zero beyond a series' end.

    Attributes
    ----------
    value : Tensor of shape (series, time)
        To be maximised, with gradients.
    reconstruction : Tensor of shape (series, time)
        log g(x_t | s_t) over observed elements.
    divergence : Tensor of shape (series, time)
        Of the proposal from the prior; zero without latent states. The bound of the log-likelihood
        itself is the reconstruction less the divergence.
    """

    value: Float[Tensor, "series time"]
    reconstruction: Float[Tensor, "series time"]
    divergence: Float[Tensor, "series time"]


def evaluate(
    model: StateSpaceModel,
    batch: Batch,
    objective: Objective,
    beta: float,
    generator: torch.Generator,
) -> Terms:
    """An objective of every step of a batch, with gradients.

    Parameters
    ----------
    model : StateSpaceModel
        One without latent states has its log-likelihood as every objective.
    batch : Batch
    objective : Objective
    beta : float
        Weight of the divergence; below 1 while it is warmed up.
    generator : torch.Generator

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> from seqdgm.prepare import prepare
    >>> model = sq.DMM(2, 4, 4, max_epochs=1).fit(np.arange(12.0), seed=0)
    >>> _, batch, _ = prepare(model, np.arange(12.0), None)
    >>> terms = evaluate(model, batch, Objective(), 1.0, torch.Generator().manual_seed(0))
    >>> terms.value.shape
    torch.Size([1, 12])
    """
    count = objective.n_particles if model.latent_dim else 1
    wide, context = replicate(model, batch, count)
    trace = scan(model, wide, generator, context)
    found = along(model, wide, trace)
    divergence = found.divergence
    if objective.free_bits and model.latent_dim:
        floor = divergence.clamp_min(objective.free_bits)
        value = found.reconstruction - beta * torch.where(wide.valid, floor, 0.0)
    else:
        value = found.reconstruction - beta * divergence
    extra = auxiliary(model, wide, trace)
    if extra is not None:
        value = value + extra
    terms = Terms(value, found.reconstruction, divergence)
    if count == 1:
        return terms
    return Terms(*(part.unflatten(0, (batch.n_series, count)).mean(1) for part in terms))


class Path(NamedTuple):
    """Terms of the bound along one path, zero beyond a series' end; see `Terms`."""

    reconstruction: Float[Tensor, "series time"]
    divergence: Float[Tensor, "series time"]


def along(model: StateSpaceModel, batch: Batch, trace: Trace) -> Path:
    """Reconstruction and divergence along a path that the proposal drew."""
    emission = model.emission(trace.s, batch.inputs_all())
    shape = (batch.n_series, batch.n_steps)
    wide = dist.expand(emission, shape, batch.x.shape[2])
    valid = batch.valid
    reconstruction = torch.where(valid, dist.log_prob(wide, batch.x, batch.mask), 0.0)
    if trace.context is None or trace.z is None:
        # Nothing proposes: z comes from the prior itself.
        return Path(reconstruction, torch.zeros_like(reconstruction))
    parts = []
    for steps, prior in prior_over_time(model, batch, trace):
        proposal = dist.stack(trace.proposals[steps], 1)
        parts.append(divergence(proposal, prior, trace.z[:, steps]))
    return Path(reconstruction, torch.where(valid, torch.cat(parts, 1), 0.0))


def divergence(q: Distribution, p: Distribution, z: Tensor) -> Float[Tensor, "*batch"]:
    """KL(q || p) in closed form, or log q(z) - log p(z) where there is none."""
    try:
        return dist.kl(q, p)
    except NotImplementedError:
        return dist.log_prob(q, z) - dist.log_prob(p, z)


def replicate(model: StateSpaceModel, batch: Batch, count: int) -> tuple[Batch, Tensor | None]:
    """Every series `count` times over, and the encoded data, which are encoded once."""
    context = model.encode(batch) if model.latent_dim else None
    if count == 1:
        return batch, context
    rows = torch.arange(batch.n_series, device=batch.x.device).repeat_interleave(count)
    return batch.take(rows), None if context is None else context[rows]


def auxiliary(
    model: StateSpaceModel, batch: Batch, trace: Trace
) -> Float[Tensor, "series time"] | None:
    """The model's own term of training, zero beyond a series' end; None where it has none."""
    if trace.z is None or trace.context is None:
        return None
    extra = model.auxiliary(trace.h, trace.z, trace.context, batch.inputs_all())
    return None if extra is None else torch.where(batch.valid, extra, 0.0)
