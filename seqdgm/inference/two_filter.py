r"""The generalised two-filter smoother.

A backward information filter has particles for

.. math::

    \tilde p(z_t \mid x_{t:T}) \propto \gamma_t(z_t)\, p(x_{t:T} \mid z_t)

with artificial Gaussian priors :math:`\gamma_t`. Its particles are then weighed by the forward
filter's prediction of them,

.. math::

    W_{t|T}^m \propto \frac{\tilde w_t^m}{\gamma_t(\tilde z_t^m)}
        \sum_k W_{t-1}^k f(\tilde z_t^m \mid z_{t-1}^k).

References
----------
Briers, Doucet and Maskell (2010), Smoothing algorithms for state-space models, *Annals of the
Institute of Statistical Mathematics* 62, section 3.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

from seqdgm.inference.backward import check_memoryless
from seqdgm.inference.history import History
from seqdgm.inference.marginals import Weighted
from seqdgm.inference.pairwise import PAIR_ELEMENTS, Transition, states_are_z
from seqdgm.inference.resampling import (
    adaptive,
    effective_sample_size,
    gather,
    normalise,
    systematic,
)
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

INFLATION = 1.5  # of fitted covariances, so that an artificial prior has the heavier tails


class ArtificialPrior(NamedTuple):
    """Gaussian priors of the states of every step, taken to be independent over time."""

    mean: Float[Tensor, "series time state"]
    cov: Float[Tensor, "series time state state"]


@torch.no_grad()
def two_filter(
    model: StateSpaceModel,
    batch: Batch,
    history: History,
    n: int,
    generator: torch.Generator,
    *,
    prior: ArtificialPrior | None = None,
) -> Weighted:
    """Combine the filter with an information filter that runs backwards, in O(N^2) a step.

    Parameters
    ----------
    model, batch, history, generator
        As every smoother; `n` is not used.
    prior : ArtificialPrior, optional
        Default: mean and inflated covariance of what the filter predicts of every step.

    Raises
    ------
    ValueError
        If the model has a memory besides z, discrete states, or feeds back observations that are
        missing; if a covariance of the artificial prior is singular; if all particles of the
        information filter have weight zero.
    """
    check_memoryless(model)
    if not states_are_z(model):
        raise ValueError(
            f"{type(model).__name__} keeps more than z, which the information filter cannot; use "
            "smoother='ffbs'"
        )
    if model.feedback and not batch.complete:
        raise ValueError(
            f"{type(model).__name__} feeds observations back, and some are missing: the two-filter "
            "smoother cannot draw them backwards; use smoother='ffbs'"
        )
    gamma = _laws(fit_prior(model, batch, history, generator) if prior is None else prior, batch)
    shape = history.steps[0].log_weights.shape
    steps = batch.n_steps
    values: list[Tensor] = []
    weights: list[Tensor] = []
    for t in range(steps - 1, -1, -1):
        z = dist.sample(gamma[t], generator, (shape[1],)).movedim(0, 1)
        log_w = torch.full(shape, -math.log(shape[1]), dtype=torch.float64, device=z.device)
        if t < steps - 1:
            moved, log_moved = _step_back(
                model, batch, gamma, t, values[-1], weights[-1], generator
            )
            ends = (batch.lengths <= t + 1)[:, None]
            z = torch.where(ends[..., None], z, moved)
            log_w = torch.where(ends, log_w, log_moved)
        log_w = log_w + _emission(model, batch, t, z)
        log_w, total = normalise(log_w)
        _check(total, batch, t)
        values.append(z)
        weights.append(log_w)
    values.reverse()
    found = []
    for t, log_w in enumerate(weights[::-1]):
        z = values[t]
        log_w = log_w - _score(gamma[t], z) + _predicted(batch, history, t, z)
        log_w, total = normalise(log_w)
        _check(total, batch, t)
        found.append(log_w)
    return Weighted(torch.stack(values, 1), torch.stack(found, 1), None)


def fit_prior(
    model: StateSpaceModel, batch: Batch, history: History, generator: torch.Generator
) -> ArtificialPrior:
    """Moments of the filter's one-step predictions, with the covariances inflated."""
    means, covs = [], []
    weights = torch.full_like(history.steps[0].log_weights, -math.log(_count(history))).exp()
    for t in range(batch.n_steps):
        law = history.into(batch, t).prior
        if dist.is_discrete(law):
            raise ValueError(
                f"{type(model).__name__} has discrete states, which Gaussian artificial priors do "
                "not fit; use smoother='ffbs' or 'marginal'"
            )
        z = dist.sample(law, generator).double()
        mean = (weights[..., None] * z).sum(1)
        centred = z - mean[:, None]
        means.append(mean)
        covs.append(torch.einsum("nk,nki,nkj->nij", weights, centred, centred))
        weights = history.steps[t].log_weights.exp()
    return ArtificialPrior(torch.stack(means, 1), INFLATION * torch.stack(covs, 1))


def _count(history: History) -> int:
    return history.steps[0].log_weights.shape[1]


def _laws(prior: ArtificialPrior, batch: Batch) -> list[MultivariateNormal]:
    factor, failed = torch.linalg.cholesky_ex(prior.cov)
    bad = torch.nonzero(failed)
    if len(bad):
        k, t = bad[0].tolist()
        raise ValueError(
            f"series {batch.ids[k]!r}, step {t}: the covariance of the artificial prior is "
            "singular; give a regular one, or use smoother='ffbs'"
        )
    return [
        MultivariateNormal(mean, scale_tril=tril, validate_args=False)
        for mean, tril in zip(prior.mean.unbind(1), factor.unbind(1), strict=True)
    ]


def _score(law: MultivariateNormal, z: Tensor) -> Float[Tensor, "series particle"]:
    """Log-density of particles under one law a series."""
    scores: Tensor = law.log_prob(z.double().movedim(1, 0))
    return scores.movedim(0, 1)


def _step_back(
    model: StateSpaceModel,
    batch: Batch,
    gamma: list[MultivariateNormal],
    t: int,
    after: Float[Tensor, "series particle state"],
    log_weights: Float[Tensor, "series particle"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "series particle state"], Float[Tensor, "series particle"]]:
    r"""Draw z_t given z_{t+1} and weigh it, but for the observation.

    The proposal regresses draws of :math:`\gamma_t` on what the transition makes of them, which is
    exact (but for the inflation) where the transition is linear and Gaussian.
    """
    done = adaptive(systematic, 0.5)(log_weights, effective_sample_size(log_weights), generator)
    if done is not None:
        drawn, _ = done
        log_weights = drawn.log_weights
        after = gather(after, drawn.ancestors)
    shape = (len(after), after.shape[1])
    count = shape[1]
    a = dist.sample(gamma[t], generator, (count,)).movedim(0, 1)
    x = batch.x[:, t, None].expand(-1, count, -1)
    transition = Transition.of(model, batch, t + 1, a.to(after.dtype), x, shape)
    b = dist.sample(transition.prior, generator).double()
    a, mean_a, mean_b = a - a.mean(1, True), a.mean(1, True), b.mean(1, True)
    b = b - mean_b
    inner = b.mT @ b
    # A component that the transition repeats exactly makes the regression singular.
    ridge = 1e-10 * inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    inner = inner + ridge * torch.eye(b.shape[2], dtype=b.dtype, device=b.device)
    gain = torch.linalg.solve(inner, b.mT @ a)
    residual = a - b @ gain
    cov = INFLATION * (residual.mT @ residual) / count
    loc = mean_a + (after.double() - mean_b) @ gain
    proposal = MultivariateNormal(loc, cov[:, None], validate_args=False)
    z = dist.sample(proposal, generator).to(after.dtype)
    moved = Transition.of(model, batch, t + 1, z, x, shape)
    log_w = log_weights + dist.log_prob(moved.prior, after).double() + _score(gamma[t], z)
    return z, log_w - _score(gamma[t + 1], after) - proposal.log_prob(z.double())


def _emission(
    model: StateSpaceModel, batch: Batch, t: int, z: Tensor
) -> Float[Tensor, "series particle"]:
    shape = (*z.shape[:2], batch.x.shape[2])
    x, mask = batch.x[:, t, None].expand(shape), batch.mask[:, t, None].expand(shape)
    return dist.log_prob(model.emission(z, batch.inputs_at(t, 1)), x, mask).double()


def _predicted(
    batch: Batch, history: History, t: int, z: Tensor
) -> Float[Tensor, "series particle"]:
    """Log-density of particles under the filter's prediction of step t."""
    transition = history.into(batch, t)
    if t == 0:
        return dist.log_prob(transition.prior, z).double()
    weights = history.steps[t - 1].log_weights
    size = max(1, PAIR_ELEMENTS // weights.numel())
    parts = [
        torch.logsumexp(transition.pairs(part).add_(weights[:, None]), -1)
        for part in z.split(size, 1)
    ]
    return torch.cat(parts, 1)


def _check(total: Float[Tensor, "series"], batch: Batch, t: int) -> None:
    bad = torch.nonzero(~torch.isfinite(total) & (batch.lengths > t))
    if len(bad):
        raise ValueError(
            f"series {batch.ids[int(bad[0, 0])]!r}, step {t}: every particle of the information "
            "filter has weight zero; give an artificial prior that covers the data, use more "
            "particles, or use smoother='ffbs'"
        )
