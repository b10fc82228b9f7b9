r"""Gradients of the log-likelihood by particle smoothing, and maximum likelihood by them.

Fisher's identity

.. math::

    \nabla_\theta \log p_\theta(x) = \mathrm{E}\left[ \nabla_\theta \log p_\theta(x, z_{1:T})
        \mid x \right]

needs the gradient of the joint density of smoothed trajectories only: nothing is differentiated
through the filter, its resampling or its draws.

References
----------
Poyiadjis, Doucet and Singh (2011), Particle approximations of the score and observed information
matrix in state space models with application to parameter estimation, *Biometrika* 98; Polyak and
Juditsky (1992), Acceleration of stochastic approximation by averaging, *SIAM Journal on Control and
Optimization* 30; Shamir and Zhang (2013), Stochastic gradient descent for non-smooth optimization,
ICML (averages that forget the start); Kingma and Ba (2015).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqdgm.inference import smoothing
from seqdgm.inference.coordinates import Coordinates
from seqdgm.inference.joint import joint_log_density
from seqdgm.inference.marginals import Weighted
from seqdgm.inference.smc import SMCOptions
from seqdgm.inference.smoothing import Smoother
from seqdgm.results import FitReport
from seqdgm.types import Batch, check_count

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

FORGET = (
    3.0  # the average of iteration k gives weight (1 + FORGET) / (k + 1 + FORGET) to the newest
)
WINDOW = 20  # iterations over which the average must have come to rest


class Draws(NamedTuple):
    """Trajectories from the smoothing distribution, with what a joint density needs of them.

    Attributes
    ----------
    z : Tensor of shape (series, n, time, state) or None
    x : Tensor of shape (series, n, time, dim) or None
        Observations with the missing ones drawn, where the model fed them back.
    log_likelihood : Tensor of shape (series,)
    """

    z: Float[Tensor, "series n time state"] | None
    x: Float[Tensor, "series n time dim"] | None
    log_likelihood: Float[Tensor, "series"]


@torch.no_grad()
def draw_trajectories(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    n: int,
    smoother: str | Smoother = "auto",
) -> Draws:
    """Draw whole trajectories; finite beyond a series' end too, where they mean nothing.

    Raises
    ------
    ValueError
        For a smoother without a joint law.
    """
    out, history, law = smoothing.run(model, batch, options, generator, n, smoother)
    if isinstance(law, Weighted):
        raise ValueError(
            f"smoother={smoother!r} weighs single states; choose one that draws trajectories: "
            "'genealogy', 'ffbs', 'ffbs-reject' or 'ffbs-mcmc'"
        )
    z = history.along(law, "z") if model.latent_dim else None
    x = history.along(law, "x") if model.feedback else None
    evidence = torch.where(batch.valid, out.increments, 0.0).sum(1)
    return Draws(z, x, evidence)


def learnable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a gradient is wanted of, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def score(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    n: int = 50,
    smoother: str | Smoother = "auto",
) -> dict[str, Tensor]:
    r"""Estimate :math:`\nabla_\theta \log p_\theta(x)`, summed over the series.

    Parameters
    ----------
    model : StateSpaceModel
        With `torch.nn.Parameter` attributes, which its distributions depend on.
    batch : Batch
    options : SMCOptions
        Of the filter.
    generator : torch.Generator
    n : int
        Trajectories of every series.
    smoother : str or Smoother
        One that draws trajectories; ``"auto"`` is backward simulation where the model admits it.

    Returns
    -------
    dict of str to Tensor
        Gradient of each learnable parameter, in its shape.

    Raises
    ------
    ValueError
        If the gradient is not finite; the series is named.

    Examples
    --------
    >>> import seqdgm as sq
    >>> from seqdgm.prepare import prepare
    >>> from torch.distributions import Normal
    >>> class Level(sq.StateSpaceModel):
    ...     latent_dim = 1
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.log_scale = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ...     def initial(self, u):
    ...         return Normal(torch.zeros(1, dtype=torch.float64), 1.0)
    ...     def transition(self, z, u):
    ...         return Normal(z, self.log_scale.exp())
    ...     def emission(self, z, u):
    ...         return Normal(z, 1.0)
    >>> model = Level()
    >>> _, batch, _ = prepare(model, np.array([0.1, -0.2, 0.3, 0.0]), None)
    >>> found = score(model, batch, SMCOptions(200), torch.Generator().manual_seed(0))
    >>> found["log_scale"].shape, bool(found["log_scale"] < 0)
    (torch.Size([1]), True)
    """
    draws = draw_trajectories(model, batch, options, generator, n, smoother)
    return gradient(model, batch, draws)


def gradient(model: StateSpaceModel, batch: Batch, draws: Draws) -> dict[str, Tensor]:
    """Gradient of the mean joint log-density of trajectories; ValueError if not finite."""
    parameters = learnable(model)
    with torch.enable_grad():
        density = joint_log_density(model, batch, draws.z, draws.x).mean(1)
        found = _grad(density.sum(), parameters)
    finite = all(bool(g.isfinite().all()) for g in found.values())
    if not finite or not bool(density.isfinite().all()):
        raise ValueError(_blame(model, batch, draws))
    return found


def _grad(value: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    given = torch.autograd.grad(
        value, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, given, strict=True))


def _blame(model: StateSpaceModel, batch: Batch, draws: Draws) -> str:
    """Which series, and which parameter, the trouble comes from."""
    parameters = learnable(model)
    for k, name in enumerate(batch.ids):
        # Of its own: a derivative that is infinite elsewhere would spoil this one.
        row = slice(k, k + 1)
        z, x = (None if part is None else part[row] for part in (draws.z, draws.x))
        with torch.enable_grad():
            one = joint_log_density(model, batch.take(torch.tensor([k])), z, x).mean()
            found = _grad(one, parameters)
        bad = [key for key, g in found.items() if not bool(g.isfinite().all())]
        if bad or not bool(one.isfinite()):
            where = f"the gradient of {bad}" if bad else "the joint log-density"
            return (
                f"series {name!r}: {where} is not finite; the model's distributions must be "
                "differentiable in their parameters where the states lie: keep scales away from 0, "
                "or lower learning_rate"
            )
    return "the gradient, summed over the series, is not finite: scale the data"


# -- maximum likelihood -------------------------------------------------------------------------


@dataclass
class _Ascent:
    """What the ascent has seen so far."""

    average: dict[str, Tensor]
    objective: list[float] = field(default_factory=list)
    past: list[dict[str, Tensor]] = field(default_factory=list)
    converged: bool = False
    message: str = ""


def fit(
    model: StateSpaceModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    n_particles: int = 200,
    n_trajectories: int = 20,
    max_iter: int = 300,
    learning_rate: float = 0.05,
    smoother: str | Smoother = "auto",
    tol: float = 1e-3,
) -> FitReport:
    r"""Maximise the likelihood by stochastic gradient ascent with the particle score.

    It climbs in unconstrained coordinates of the parameters that have a domain
    (`seqdgm.inference.coordinates`): Adam with step :math:`a (1 + k / 20)^{-0.6}` at iteration k,
    and the average of the iterates as the estimate. All series share the parameters.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    n_particles, n_trajectories : int
        Particles of each filter, and smoothed trajectories behind each gradient.
    max_iter : int
        Gradient steps at most.
    learning_rate : float
        First step :math:`a` of each coordinate, in its own units.
    smoother : str or Smoother
        As in `score`.
    tol : float
        Stop when the average has moved less than ``tol * (1 + |average|)`` in 20 iterations.

    Returns
    -------
    FitReport
        `objective` holds the estimated log-evidence of all series at each iterate, in model units.

    Raises
    ------
    ValueError
        If the model has nothing to learn, or fails at its starting values. A later failure stops
        the ascent: the report says why, and names the series; the model keeps the average of the
        iterates before it.
    """
    begin = time.perf_counter()
    check_count("max_iter", max_iter)
    check_count("n_trajectories", n_trajectories)
    if learning_rate <= 0 or tol < 0:
        raise ValueError(f"learning_rate={learning_rate!r} must be positive, tol={tol!r} not < 0")
    model.set_starts(batch)
    at = Coordinates.of(model)
    options = SMCOptions(n_particles)
    optimizer = torch.optim.Adam(at.free.values(), lr=learning_rate, maximize=True)
    state = _Ascent(average=at.snapshot())

    def ascend() -> Iterator[int]:
        for k in range(max_iter):
            try:
                draws = draw_trajectories(
                    model, batch, options, generator, n_trajectories, smoother
                )
                found = at.pull_back(gradient(model, batch, draws))
            except ValueError as error:
                if k == 0:
                    raise
                state.message = stopped(k, error)
                return
            state.objective.append(float(draws.log_likelihood.sum()))
            _average(state, at.snapshot(), k + 1)
            yield k
            if settled(state.past, tol):
                state.converged = True
                return
            optimizer.param_groups[0]["lr"] = learning_rate * (1 + k / 20) ** -0.6
            for name, p in at.free.items():
                p.grad = found[name]
            optimizer.step()
            at.write()

    for _ in shown(ascend(), max_iter) if progress else ascend():
        pass
    at.restore(state.average)
    return FitReport(
        method=method,
        objective=tuple(state.objective),
        valid_objective=(),
        converged=np.array([state.converged]),
        n_iter=len(state.objective),
        seconds=time.perf_counter() - begin,
        messages=(state.message,) if state.message else (),
    )


def _average(state: _Ascent, now: dict[str, Tensor], k: int) -> None:
    """Take iterate number k into the average, with a weight that forgets the start."""
    weight = (1 + FORGET) / (k + FORGET)
    state.average = {
        name: torch.lerp(held, now[name], weight) for name, held in state.average.items()
    }
    state.past = [*state.past[-WINDOW:], state.average]


def settled(past: list[dict[str, Tensor]], tol: float) -> bool:
    """Whether averages of the last `WINDOW` iterations have come to rest."""
    if len(past) <= WINDOW:
        return False
    first, last = past[0], past[-1]
    return all(bool(((last[k] - first[k]).abs() <= tol * (1 + last[k].abs())).all()) for k in last)


def stopped(k: int, error: ValueError) -> str:
    """The report's message for a failure at iteration k."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"iteration {k}: {error}{notes}; the update was not applied and learning stopped there"


def shown(iterations: Iterable[Any], total: int) -> Iterator[Any]:
    """Show progress on standard error."""
    from rich.console import Console
    from rich.progress import track

    yield from track(iterations, description="learning", total=total, console=Console(stderr=True))
