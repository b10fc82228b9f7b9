"""Joint draws from the smoothing distribution of any state-space model, by particles.

References
----------
Kitagawa (1996), Monte Carlo filter and smoother for non-Gaussian nonlinear state space models,
*JCGS* 5 (genealogy); Godsill, Doucet and West (2004), Monte Carlo smoothing for nonlinear time
series, *JASA* 99 (backward simulation).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference import smc
from seqdgm.inference.resampling import gather
from seqdgm.inference.smc import SMCOptions, Step
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, Inputs

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

BACKWARD_ELEMENTS = 2_000_000  # densities held at once in backward simulation (16 MB)
SMOOTHERS = ("auto", "ffbs", "genealogy")


class Trajectories(NamedTuple):
    """Joint draws of states and observations given all data.

    Attributes
    ----------
    paths : dict of Tensor
        ``value`` (series, n, time, state) and ``x`` (series, n, time, dim).
    log_likelihood : Tensor of shape (series,)
    ess : Tensor of shape (series, time)
        NaN beyond a series' end.
    """

    paths: dict[str, Tensor]
    log_likelihood: Float[Tensor, "series"]
    ess: Float[Tensor, "series time"]


def trajectories(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    n: int,
    smoother: str = "auto",
) -> Trajectories:
    """Filter, then draw `n` trajectories of every series from the smoothing distribution.

    ``"auto"`` is backward simulation for Markov models, and the genealogy of the filter for models
    with a memory.

    Raises
    ------
    ValueError
        For an unknown smoother, or one that the model does not admit.
    """
    if smoother not in SMOOTHERS:
        raise ValueError(f"there is no smoother {smoother!r}; choose one of {list(SMOOTHERS)}")
    if smoother == "ffbs" and not model.markov:
        raise ValueError(
            f"{type(model).__name__} has a memory besides z, which backward simulation does not "
            "know; use smoother='genealogy'"
        )
    collector = Genealogy(model)
    out = smc.run(model, batch, options, generator, (collector,))
    final = torch.multinomial(out.log_weights.exp(), n, True, generator=generator)
    if model.markov and smoother != "genealogy":
        paths = _backward_simulation(model, batch, collector, final, generator)
    else:
        paths = collector.trace(final, ("x", "value"))
    ess = out.ess.masked_fill(~batch.valid, torch.nan)
    return Trajectories(paths, out.increments.sum(1), ess)


class Genealogy:
    """Particles, weights, ancestors and drawn observations of every step from `first` on."""

    def __init__(self, model: StateSpaceModel, first: int = 0) -> None:
        self._model, self._first = model, first
        self.steps: list[dict[str, Any]] = []

    def update(self, step: Step) -> None:
        """Take in one step."""
        if step.t < self._first:
            return
        self.steps.append(
            {
                "z": step.z,
                "value": self._model.report(step.h, step.z),
                "s": step.s,
                "x": step.x,
                "log_weights": step.log_weights,
                "ancestors": step.ancestors,
            }
        )

    def trace(self, final: Int[Tensor, "series n"], keys: tuple[str, ...]) -> dict[str, Tensor]:
        """Follow the lineages of the chosen final particles back; (series, n, time, ...)."""
        lineage = final
        paths: dict[str, list[Tensor]] = {key: [] for key in keys}
        for step in reversed(self.steps):
            for key in keys:
                paths[key].append(gather(step[key], lineage))
            if step["ancestors"] is not None:
                lineage = torch.gather(step["ancestors"], 1, lineage)
        return {key: torch.stack(path[::-1], 2) for key, path in paths.items()}


@torch.no_grad()
def _backward_simulation(
    model: StateSpaceModel,
    batch: Batch,
    genealogy: Genealogy,
    final: Int[Tensor, "series n"],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Draw trajectories backwards: weights W_t f(z_{t+1} | z_t) at every step."""
    steps = genealogy.steps
    n, count = final.shape
    z = gather(steps[-1]["z"], final)
    path = [z]
    for t in range(batch.n_steps - 2, -1, -1):
        pick = _pick_backward(model, steps[t], z, batch.inputs_at(t + 1, 2), generator)
        z = gather(steps[t]["z"], pick)
        path.append(z)
    states = torch.stack(path[::-1], 2)
    observations = []
    for t in range(batch.n_steps):
        emission = model.emission(states[:, :, t], batch.inputs_at(t, extra_axes=1))
        shape = (n, count, batch.x.shape[2])
        x, mask = batch.x[:, t, None].expand(shape), batch.mask[:, t, None].expand(shape)
        wide = dist.expand(emission, (n, count), shape[2])
        observations.append(dist.fill_missing(wide, x, mask, generator))
    return {"value": states, "x": torch.stack(observations, 2)}


def _pick_backward(
    model: StateSpaceModel,
    step: dict[str, Any],
    z: Float[Tensor, "series n state"],
    u: Inputs,
    generator: torch.Generator,
) -> Int[Tensor, "series n"]:
    """Choose, for each trajectory, the particle its next state came from."""
    particles = step["z"]
    n, count, width = len(z), particles.shape[1], z.shape[2]
    prior = model.prior(particles[:, None], u)
    assert prior is not None
    prior = dist.expand(prior, (n, 1, count), width)
    chunk = max(1, BACKWARD_ELEMENTS // (n * count * width))
    picks = []
    for part in z.split(chunk, 1):
        target = part[:, :, None].expand(n, part.shape[1], count, width)
        wide = dist.expand(prior, target.shape[:3], width)
        log_w = step["log_weights"][:, None] + dist.log_prob(wide, target).double()
        total = torch.cumsum(torch.softmax(log_w, -1), -1)
        level = torch.rand(
            (*total.shape[:2], 1), generator=generator, dtype=total.dtype, device=z.device
        )
        pick = torch.searchsorted(total, level * total[..., -1:]).squeeze(-1)
        picks.append(pick.clamp_max(count - 1))
    return torch.cat(picks, 1)
