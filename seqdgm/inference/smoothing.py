r"""Smoothing of any state-space model by particles.

Run the filter, keep its particles, and go back over them. Some smoothers draw whole trajectories
from :math:`p(z_{1:T} \mid x_{1:T})`, others weigh the particles of each step by themselves:

=================== ============ ================= =================================================
name                gives        cost a step       for
=================== ============ ================= =================================================
``"genealogy"``     trajectories O(N)              any model; few distinct states far from the end
``"ffbs"``          trajectories O(N n)            states without a memory besides z (`memoryless`)
``"ffbs-reject"``   trajectories O(n) on average   the same, with a bounded transition density
``"ffbs-mcmc"``     trajectories O(n)              the same; approximate for few moves
``"fixed-lag"``     marginals    O(N lag)          any model; ignores data beyond the lag
``"marginal"``      marginals    O(N^2)            as ``"ffbs"``
``"two-filter"``    marginals    O(N^2)            as ``"ffbs"``, with continuous states
=================== ============ ================= =================================================

for N particles and n trajectories. ``"auto"`` is ``"ffbs"`` where the model admits it, else
``"genealogy"``; ``"fixed-lag"`` where a lag is given.

References
----------
Kitagawa (1996), Monte Carlo filter and smoother for non-Gaussian nonlinear state space models,
*JCGS* 5 (genealogy); the others with their modules `backward`, `marginals` and `two_filter`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference import backward, smc
from seqdgm.inference.history import History, draw_particles
from seqdgm.inference.marginals import Weighted, fixed_lag, forward_backward
from seqdgm.inference.pairwise import states_are_z
from seqdgm.inference.resampling import gather
from seqdgm.inference.smc import SMCOptions, SMCResult
from seqdgm.inference.two_filter import two_filter
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, check_count

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

# (model, batch, history, n, generator) -> particle numbers (series, n, time) of n trajectories, or
# weighted particles of every step.
Smoother = Callable[
    ["StateSpaceModel", Batch, History, int, torch.Generator],
    Int[Tensor, "series n time"] | Weighted,
]


def genealogy(
    model: StateSpaceModel, batch: Batch, history: History, n: int, generator: torch.Generator
) -> Int[Tensor, "series n time"]:
    """Lineages of the filter's particles."""
    return history.genealogy(batch, n, generator)


SMOOTHERS: dict[str, Smoother] = {
    "genealogy": genealogy,
    "ffbs": backward.simulate,
    "ffbs-reject": partial(backward.simulate, choose=backward.reject),
    "ffbs-mcmc": partial(backward.simulate, choose=backward.metropolis),
    "marginal": forward_backward,
    "two-filter": two_filter,
}


class Trajectories(NamedTuple):
    """Draws of states (and observations) given all data; NaN beyond a series' end.

    Attributes
    ----------
    paths : dict of Tensor
        ``value`` (series, n, time, state), the reported state, and where they were asked for ``x``
        (series, n, time, dim), the observations with their missing elements drawn.
    mean, cov : Tensor of shape (series, time, state) and (series, time, state, state)
        Moments of the reported state.
    log_likelihood : Tensor of shape (series,)
    ess : Tensor of shape (series, time)
        Of the filter.
    joint : bool
        Whether the draws are whole trajectories; else those of different steps are independent.
    """

    paths: dict[str, Tensor]
    mean: Float[Tensor, "series time state"]
    cov: Float[Tensor, "series time state state"]
    log_likelihood: Float[Tensor, "series"]
    ess: Float[Tensor, "series time"]
    joint: bool


def find_smoother(spec: str | Smoother, model: StateSpaceModel, lag: int | None = None) -> Smoother:
    """The smoother of a name, or the one given.

    Raises
    ------
    ValueError
        For an unknown smoother, or a lag without or beside the one that has it.
    """
    if spec == "auto":
        spec = "fixed-lag" if lag is not None else "ffbs" if model.memoryless else "genealogy"
    if spec == "fixed-lag":
        if lag is None:
            raise ValueError("smoother='fixed-lag' needs lag=, a number of steps")
        check_count("lag", lag)
        return partial(fixed_lag, lag=int(lag))
    if lag is not None:
        raise ValueError(f"lag={lag!r} goes with smoother='fixed-lag', not with {spec!r}")
    if not isinstance(spec, str):
        return spec
    if spec not in SMOOTHERS:
        names = ["auto", "fixed-lag", *SMOOTHERS]
        raise ValueError(f"there is no smoother {spec!r}; choose one of {names}")
    return SMOOTHERS[spec]


class Smoothed(NamedTuple):
    """A run of the filter, its particles, and what a smoother made of them."""

    out: SMCResult
    history: History
    law: Int[Tensor, "series n time"] | Weighted


def run(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    n: int,
    smoother: str | Smoother = "auto",
    lag: int | None = None,
) -> Smoothed:
    """Filter and smooth; arguments as those of `trajectories`."""
    smooth = find_smoother(smoother, model, lag)
    history = History(model)
    out = smc.run(model, batch, options, generator, (history,))
    return Smoothed(out, history, smooth(model, batch, history, n, generator))


@torch.no_grad()
def trajectories(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    n: int,
    smoother: str | Smoother = "auto",
    lag: int | None = None,
) -> Trajectories:
    """Filter, then draw `n` states of every step and series from the smoothing distribution.

    Parameters
    ----------
    model, batch, options, generator
        As those of `seqdgm.inference.smc.run`. Missing observations are drawn where
        ``options.draw_observations``.
    n : int
        Trajectories, or draws of each step where the smoother has no joint law.
    smoother : str or Smoother
        A name in the table above, or a function such as
        ``partial(simulate, choose=partial(metropolis, moves=20))`` of `backward`.
    lag : int, optional
        For ``"fixed-lag"``.

    Raises
    ------
    ValueError
        For an unknown smoother, or one that the model does not admit.
    """
    # Given z, the observations of a step depend on nothing else: each trajectory draws its own.
    redraw = model.memoryless and states_are_z(model) and not model.feedback
    # A simulated observation belongs to the particle that it gave its weight.
    redraw = redraw and options.weigh is None
    wanted = options.draw_observations
    options = replace(options, draw_observations=wanted and not redraw)
    out, history, law = run(model, batch, options, generator, n, smoother, lag)
    if isinstance(law, Weighted):
        moments = _weighted_moments(law)
        value, index = _resample(law, n, generator)
    else:
        value, index = history.along(law, "value"), law
        moments = mean_and_cov(value)
    paths = {"value": value}
    if wanted:
        # A smoother with particles of its own admits no drawn observation that was fed back.
        if redraw or index is None:
            paths["x"] = _observations(model, batch, value, generator)
        else:
            paths["x"] = history.along(index, "x")
    outside = ~batch.valid
    return Trajectories(
        {k: v.masked_fill(outside[:, None, :, None], torch.nan) for k, v in paths.items()},
        moments[0].masked_fill(outside[..., None], torch.nan),
        moments[1].masked_fill(outside[..., None, None], torch.nan),
        out.increments.sum(1),
        out.ess.masked_fill(outside, torch.nan),
        joint=not isinstance(law, Weighted),
    )


def mean_and_cov(
    value: Float[Tensor, "series n time state"],
) -> tuple[Float[Tensor, "series time state"], Float[Tensor, "series time state state"]]:
    """Mean and covariance over equally weighted trajectories."""
    mean = value.double().mean(1)
    centred = value.double() - mean[:, None]
    return mean, torch.einsum("nsti,nstj->ntij", centred, centred) / value.shape[1]


def _weighted_moments(law: Weighted) -> tuple[Tensor, Tensor]:
    weights, value = law.log_weights.exp(), law.value.double()
    mean = torch.einsum("ntk,ntki->nti", weights, value)
    centred = value - mean[:, :, None]
    return mean, torch.einsum("ntk,ntki,ntkj->ntij", weights, centred, centred)


def _resample(
    law: Weighted, n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "series n time state"], Int[Tensor, "series n time"] | None]:
    """Independent draws of every step, and which of the filter's particles they are."""
    series, steps = law.log_weights.shape[:2]
    drawn = draw_particles(law.log_weights.flatten(0, 1), n, generator)
    value = gather(law.value.flatten(0, 1), drawn).reshape(series, steps, n, -1)
    index = None
    if law.particles is not None:
        index = gather(law.particles.flatten(0, 1), drawn).reshape(series, steps, n).mT
    return value.transpose(1, 2), index


def _observations(
    model: StateSpaceModel,
    batch: Batch,
    states: Float[Tensor, "series n time state"],
    generator: torch.Generator,
) -> Float[Tensor, "series n time dim"]:
    """The observations, with missing elements drawn given the states."""
    shape = (*states.shape[:2], batch.x.shape[2])
    filled = []
    for t, whole in enumerate((batch.mask.all(-1) | ~batch.valid).all(0).tolist()):
        x = batch.x[:, t, None].expand(shape)
        if not whole:
            emission = model.emission(states[:, :, t], batch.inputs_at(t, 1))
            mask = batch.mask[:, t, None].expand(shape)
            x = dist.fill_missing(dist.expand(emission, shape[:2], shape[2]), x, mask, generator)
        filled.append(x)
    return torch.stack(filled, 2)
