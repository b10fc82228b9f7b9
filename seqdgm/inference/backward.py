r"""Backward simulation: joint trajectories from the smoothing distribution.

Given the filter's particles :math:`(z_t^k, W_t^k)` and the next state of a trajectory, the state
before it is particle k with probability proportional to :math:`W_t^k f(z_{t+1} \mid z_t^k)`. It is
drawn exactly, in O(N) a trajectory and step; by rejection from :math:`W_t`; or by independent
Metropolis moves on :math:`W_t` that start at the filter's own ancestor.

References
----------
Godsill, Doucet and West (2004), Monte Carlo smoothing for nonlinear time series, *JASA* 99; Douc,
Garivier, Moulines and Olsson (2011), Sequential Monte Carlo smoothing for general state space
hidden Markov models, *Annals of Applied Probability* 21; Bunch and Godsill (2013), Improved
particle approximations to the joint smoothing distribution using Markov chain Monte Carlo, *IEEE
Transactions on Signal Processing* 61; Dau and Chopin (2023), On backward smoothing algorithms,
*Annals of Statistics* 51.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference.history import History, draw_particles
from seqdgm.inference.pairwise import PAIR_ELEMENTS, Transition
from seqdgm.inference.resampling import gather
from seqdgm.kernels.particles import pick
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

# Chooses the particle before each target: (transition, weights of the particles, the filter's own
# choice, targets, generator) -> index (series, n).
Choice = Callable[[Transition, Tensor, Tensor, Tensor, torch.Generator], Tensor]

MOVES = 5  # Metropolis moves a step


def exact(
    transition: Transition,
    log_weights: Float[Tensor, "series particle"],
    current: Int[Tensor, "series n"],
    target: Float[Tensor, "series n state"],
    generator: torch.Generator,
) -> Int[Tensor, "series n"]:
    """Draw among all particles."""
    chosen = []
    for part in target.split(max(1, PAIR_ELEMENTS // log_weights.numel()), 1):
        log_w = transition.pairs(part).add_(log_weights[:, None])
        level = torch.rand(
            log_w.shape[:2], generator=generator, dtype=torch.float64, device=log_w.device
        )
        try:
            chosen.append(pick(log_w, level))
        except ValueError as error:
            bad = ~log_w.amax(-1).isfinite().all(1)
            raise transition.failure(int(bad.long().argmax())) from error
    return torch.cat(chosen, 1)


def reject(
    transition: Transition,
    log_weights: Float[Tensor, "series particle"],
    current: Int[Tensor, "series n"],
    target: Float[Tensor, "series n state"],
    generator: torch.Generator,
    *,
    trials: int | None = None,
) -> Int[Tensor, "series n"]:
    """Draw from the filter's weights until one is accepted, exactly after `trials` rejections.

    `trials` is a quarter of the particles unless given. Every round tries as many particles as
    there are targets, several for each target that is left.

    Raises
    ------
    ValueError
        If no bound of the transition density is known, or the model's own is exceeded.
    """
    trials = max(1, log_weights.shape[1] // 4) if trials is None else trials
    n, m = target.shape[:2]
    bound = transition.log_bound
    chosen = torch.full((n, m), -1, dtype=torch.int64, device=target.device)
    left, done = m, 0
    while left and done < trials:
        waiting = (chosen >= 0).long().argsort(dim=1, stable=True)[:, :left]
        repeats = min(max(1, m // left), trials - done)
        index = draw_particles(log_weights, left * repeats, generator)
        wanted = gather(target, waiting).repeat_interleave(repeats, 1)
        ratio = transition.at(index, wanted) - bound
        if bool((ratio > 1e-6).any()):
            raise ValueError(
                f"{type(transition.model).__name__}: the transition density exceeds "
                "transition_bound(u); give a larger bound"
            )
        level = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device)
        accepted = (level.log() < ratio).reshape(n, left, repeats)
        first = accepted.long().argmax(-1, keepdim=True)
        found = index.reshape(n, left, repeats).gather(2, first).squeeze(2)
        before = chosen.gather(1, waiting)
        found = torch.where((before < 0) & accepted.any(-1), found, before)
        chosen.scatter_(1, waiting, found)
        left, done = int((chosen < 0).sum(1).max()), done + repeats
    if left:
        waiting = (chosen >= 0).long().argsort(dim=1, stable=True)[:, :left]
        before = chosen.gather(1, waiting)
        found = exact(transition, log_weights, current, gather(target, waiting), generator)
        chosen.scatter_(1, waiting, torch.where(before < 0, found, before))
    return chosen


def metropolis(
    transition: Transition,
    log_weights: Float[Tensor, "series particle"],
    current: Int[Tensor, "series n"],
    target: Float[Tensor, "series n state"],
    generator: torch.Generator,
    *,
    moves: int = MOVES,
) -> Int[Tensor, "series n"]:
    """Independent Metropolis moves from the filter's own ancestor, which need no bound."""
    n, m = target.shape[:2]
    tried = draw_particles(log_weights, m * moves, generator)
    log_f = transition.at(torch.cat([current, tried], 1), target.repeat(1, moves + 1, 1))
    log_f = log_f.reshape(n, moves + 1, m)
    level = torch.rand(
        (n, moves, m), generator=generator, dtype=torch.float64, device=target.device
    ).log()
    held = log_f[:, 0]
    for k in range(moves):
        better = level[:, k] < log_f[:, k + 1] - held
        current = torch.where(better, tried[:, k * m : (k + 1) * m], current)
        held = torch.where(better, log_f[:, k + 1], held)
    return current


@torch.no_grad()
def simulate(
    model: StateSpaceModel,
    batch: Batch,
    history: History,
    n: int,
    generator: torch.Generator,
    *,
    choose: Choice = exact,
) -> Int[Tensor, "series n time"]:
    """Draw trajectories backwards from each series' own end; particle numbers at every step.

    Raises
    ------
    ValueError
        If the model has a memory besides z, or a transition density is not a number.
    """
    check_memoryless(model)
    steps = history.steps
    index = draw_particles(steps[-1].log_weights, n, generator)
    path = [index]
    for t in range(len(steps) - 2, -1, -1):
        step, after = steps[t], steps[t + 1]
        transition = history.into(batch, t + 1)
        assert after.z is not None
        target = gather(after.z, index)
        own = index if after.ancestors is None else gather(after.ancestors, index)
        index = choose(transition, step.log_weights, own, target, generator)
        index = history.begin_ends(t, index, batch, generator)
        path.append(index)
    return torch.stack(path[::-1], 2)


def check_memoryless(model: StateSpaceModel) -> None:
    """Raise a ValueError for a model with a memory besides z."""
    if not model.memoryless:
        raise ValueError(
            f"{type(model).__name__} has a memory besides z, which backward smoothing does not "
            "know; use smoother='genealogy' or 'fixed-lag'"
        )
