r"""Stochastic-approximation EM with conditional particle filters.

At iteration k a conditional particle filter moves a reference trajectory by a kernel that leaves
:math:`p_\theta(z_{1:T} \mid x)` invariant, with any number of particles. The expected
complete-data log-likelihood is followed by

.. math::

    Q_k(\theta) = (1 - \gamma_k) Q_{k-1}(\theta)
        + \gamma_k \frac1n \sum_{m=1}^n \log p_\theta(x, z_{1:T}^{(k, m)})

and maximised. :math:`\gamma_k` is 1 while the chain forgets its start and falls as
:math:`k^{-0.7}` then; so Q is a weighted sum over the trajectories of late iterations, which is how
it is kept for models that are no exponential family.

References
----------
Delyon, Lavielle and Moulines (1999), Convergence of a stochastic approximation version of the EM
algorithm, *Annals of Statistics* 27; Lindsten (2013), An efficient stochastic approximation EM
algorithm using conditional particle filters, ICASSP; Whiteley (2010), discussion of Andrieu, Doucet
and Holenstein, *JRSS B* 72 (backward simulation of the reference).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqdgm.inference.joint import joint_log_density
from seqdgm.inference.particle_score import (
    check_learnable,
    draw_trajectories,
    restore,
    settled,
    shown,
    snapshot,
    stopped,
)
from seqdgm.inference.smc import Reference, SMCOptions
from seqdgm.results import FitReport
from seqdgm.types import Batch, check_count

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

DECAY = 0.7  # exponent of the weights after the burn-in
NEGLIGIBLE = 1e-3  # trajectories of a smaller relative weight are forgotten
INNER_STEPS = 5  # quasi-Newton iterations of an M-step at most


class Retained(NamedTuple):
    """Smoothed trajectories of one or several iterations.

    Attributes
    ----------
    z : Tensor of shape (series, n, time, state)
        Finite beyond a series' end too, where it means nothing.
    x : Tensor of shape (series, n, time, dim) or None
        Observations as the model read them back; None for a model that does not.
    """

    z: Float[Tensor, "series n time state"]
    x: Float[Tensor, "series n time dim"] | None


@runtime_checkable
class ClosedForm(Protocol):
    """A model with an M-step of its own."""

    def m_step(self, batch: Batch, trajectories: Retained, weights: Float[Tensor, "n"]) -> None:
        r"""Set the parameters to the maximum of :math:`\sum_m w_m \log p_\theta(x, z^{(m)})`.

        The weights sum to 1 and are the same for all series.
        """


@dataclass
class _Memory:
    """The trajectories behind Q, and what was seen of the iterates."""

    kept: list[Retained] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    past: list[dict[str, Tensor]] = field(default_factory=list)
    converged: bool = False
    message: str = ""

    def add(self, new: Retained, gamma: float) -> None:
        """Give the newest trajectories weight gamma, and the others what is left."""
        weights = [*(w * (1 - gamma) for w in self.weights), gamma]
        kept = [*self.kept, new]
        alive = [k for k, w in enumerate(weights) if w > NEGLIGIBLE * max(weights)]
        total = sum(weights[k] for k in alive)
        self.weights = [weights[k] / total for k in alive]
        self.kept = [kept[k] for k in alive]

    def all(self) -> tuple[Retained, Float[Tensor, "n"]]:
        """Every trajectory behind Q, and its weight."""
        z = torch.cat([part.z for part in self.kept], 1)
        x = None
        if self.kept[0].x is not None:
            x = torch.cat([part.x for part in self.kept if part.x is not None], 1)
        each = [w / part.z.shape[1] for w, part in zip(self.weights, self.kept, strict=True)]
        repeats = torch.tensor([part.z.shape[1] for part in self.kept])
        weights = torch.tensor(each, dtype=torch.float64).repeat_interleave(repeats)
        return Retained(z, x), weights.to(z.device)


def fit(
    model: StateSpaceModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    n_particles: int = 50,
    n_trajectories: int = 5,
    max_iter: int = 200,
    burn_in: int = 100,
    tol: float = 1e-3,
) -> FitReport:
    r"""Maximise the likelihood by stochastic-approximation EM.

    The M-step is the model's `m_step` (see `ClosedForm`) where it has one, else a few
    quasi-Newton iterations on the weighted joint log-densities. All series share the parameters.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    n_particles : int
        Particles of each conditional filter; they set how fast the chain mixes, not where to.
    n_trajectories : int
        Trajectories drawn from each filter.
    max_iter : int
    burn_in : int
        Iterations that are forgotten at once: :math:`\gamma_k = 1`.
    tol : float
        Stop when no parameter has moved by more than ``tol * (1 + |parameter|)`` in 20 iterations.

    Returns
    -------
    FitReport
        `objective` holds the log-evidence estimate of each filter, of all series and in model
        units; the reference trajectory makes it too large, the less so the more particles.

    Raises
    ------
    ValueError
        If the model has nothing to learn, feeds back observations that are missing, or fails in
        the first iteration. A later failure stops the fit: the report says why, and names the
        series; the model keeps the last good parameters.
    """
    begin = time.perf_counter()
    for name, value in (("max_iter", max_iter), ("n_trajectories", n_trajectories)):
        check_count(name, value)
    if n_particles < 2 or tol < 0:
        raise ValueError(f"n_particles={n_particles!r} must be at least 2, tol={tol!r} at least 0")
    if model.latent_dim == 0:
        raise ValueError(f"{type(model).__name__} has no latent states; use method='mle'")
    parameters = check_learnable(model)
    memory = _Memory()
    good = snapshot(parameters)

    def iterate() -> Iterator[int]:
        nonlocal good
        reference: Reference | None = None
        for k in range(max_iter):
            gamma = 1.0 if k < burn_in else (k - burn_in + 1.0) ** -DECAY
            try:
                options = SMCOptions(n_particles, resampler="multinomial", reference=reference)
                draws = draw_trajectories(model, batch, options, generator, n_trajectories)
                assert draws.z is not None
                memory.add(Retained(draws.z, draws.x), gamma)
                _maximise(model, batch, memory, parameters)
            except ValueError as error:
                if k == 0:
                    raise
                memory.message = stopped(k, error)
                return
            good = snapshot(parameters)
            reference = Reference(draws.z[:, 0], ancestor_sampling=False)
            memory.objective.append(float(draws.log_likelihood.sum()))
            memory.past = [*memory.past[-20:], good]
            yield k
            if k > burn_in and settled(memory.past, tol):
                memory.converged = True
                return

    for _ in shown(iterate(), max_iter) if progress else iterate():
        pass
    restore(parameters, good)
    return FitReport(
        method=method,
        objective=tuple(memory.objective),
        valid_objective=(),
        converged=np.array([memory.converged]),
        n_iter=len(memory.objective),
        seconds=time.perf_counter() - begin,
        messages=(memory.message,) if memory.message else (),
    )


def _maximise(
    model: StateSpaceModel, batch: Batch, memory: _Memory, parameters: dict[str, nn.Parameter]
) -> None:
    """The M-step; ValueError, with the series named, if it leads nowhere finite."""
    retained, weights = memory.all()
    if isinstance(model, ClosedForm):
        with torch.no_grad():
            model.m_step(batch, retained, weights)
        _check(model, batch, retained, weights, parameters)
        return
    scale = 1.0 / max(1, int(batch.mask.sum()))
    optimizer = torch.optim.LBFGS(
        parameters.values(), max_iter=INNER_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        density = joint_log_density(model, batch, retained.z, retained.x)
        value: Tensor = -(density * weights).sum() * scale
        value.backward()
        return value.detach()

    with torch.enable_grad():
        optimizer.step(loss)
    _check(model, batch, retained, weights, parameters)


@torch.no_grad()
def _check(
    model: StateSpaceModel,
    batch: Batch,
    retained: Retained,
    weights: Float[Tensor, "n"],
    parameters: dict[str, nn.Parameter],
) -> None:
    wrong = [name for name, p in parameters.items() if not bool(p.isfinite().all())]
    if wrong:
        raise ValueError(f"the M-step left {wrong} not finite")
    density = (joint_log_density(model, batch, retained.z, retained.x) * weights).sum(1)
    bad = torch.nonzero(~density.isfinite())
    if len(bad):
        raise ValueError(
            f"series {batch.ids[int(bad[0, 0])]!r}: its expected complete-data log-likelihood is "
            "not finite after the M-step; keep scales away from 0"
        )
