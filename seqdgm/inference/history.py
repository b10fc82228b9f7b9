"""What smoothers read: the particles of a filter at every step, and their lineages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference.pairwise import Transition
from seqdgm.inference.resampling import gather
from seqdgm.inference.smc import Step
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Stored(NamedTuple):
    """One step of a filter; see `seqdgm.inference.smc.Step`. `value` is the reported state."""

    z: Tensor | None
    value: Tensor
    s: Any
    x: Tensor | None
    log_weights: Float[Tensor, "series particle"]
    ancestors: Int[Tensor, "series particle"] | None


class History:
    """Collector of all steps from `first` on."""

    def __init__(self, model: StateSpaceModel, first: int = 0) -> None:
        self._model, self._first = model, first
        self.steps: list[Stored] = []

    def update(self, step: Step) -> None:
        """Take in one step."""
        if step.t < self._first:
            return
        value = self._model.report(step.h, step.z)
        self.steps.append(Stored(step.z, value, step.s, step.x, step.log_weights, step.ancestors))

    def lineages(self, final: Int[Tensor, "series n"]) -> Int[Tensor, "series n time"]:
        """Particle numbers along the lineages of the chosen particles of the last step."""
        index, path = final, [final]
        for step in reversed(self.steps[1:]):
            index = index if step.ancestors is None else gather(step.ancestors, index)
            path.append(index)
        return torch.stack(path[::-1], 2)

    def genealogy(
        self, batch: Batch, n: int, generator: torch.Generator
    ) -> Int[Tensor, "series n time"]:
        """Lineages of particles drawn at each series' own end."""
        index = draw_particles(self.steps[-1].log_weights, n, generator)
        path = [index]
        for t in range(len(self.steps) - 2, -1, -1):
            ancestors = self.steps[t + 1].ancestors
            index = index if ancestors is None else gather(ancestors, index)
            index = self.begin_ends(t, index, batch, generator)
            path.append(index)
        return torch.stack(path[::-1], 2)

    def begin_ends(
        self, t: int, index: Int[Tensor, "series n"], batch: Batch, generator: torch.Generator
    ) -> Int[Tensor, "series n"]:
        """Draw anew from the filter where a series ends at step t: nothing later is known."""
        ends = batch.lengths == t + 1
        if not bool(ends.any()):
            return index
        fresh = draw_particles(self.steps[t].log_weights, index.shape[1], generator)
        return torch.where(ends[:, None], fresh, index)

    def into(self, batch: Batch, t: int) -> Transition:
        """The law of the states of step t given the particles of the step before."""
        model = self._model
        if t == 0:
            shape = (batch.n_series, self.steps[0].log_weights.shape[1])
            x = batch.x.new_zeros(*shape, batch.x.shape[2])
            return Transition.of(model, batch, 0, model.start(shape), x, shape)
        before = self.steps[t - 1]
        n, count = before.log_weights.shape
        return Transition.of(model, batch, t, before.s, before.x, (n, count))

    def along(self, paths: Int[Tensor, "series n time"], name: str) -> Tensor:
        """What the steps hold under a name, along paths; (series, n, time, ...)."""
        steps = zip(self.steps, paths.unbind(2), strict=True)
        return torch.stack([gather(getattr(step, name), index) for step, index in steps], 2)


def draw_particles(
    log_weights: Float[Tensor, "series particle"], n: int, generator: torch.Generator
) -> Int[Tensor, "series n"]:
    """Independent draws of particle numbers by weight."""
    cumulative = log_weights.exp().cumsum(-1)
    level = torch.rand(
        (len(log_weights), n),
        generator=generator,
        dtype=cumulative.dtype,
        device=cumulative.device,
    )
    found = torch.searchsorted(cumulative, level * cumulative[:, -1:], right=True)
    return found.clamp_max(log_weights.shape[1] - 1)
