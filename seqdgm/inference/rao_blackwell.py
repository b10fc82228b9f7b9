r"""Rao-Blackwellised particle inference: particles for one part of the state, Kalman for the rest.

For models that are linear and Gaussian given the path of z
(`seqdgm.models._conditionally_linear`). The particle filter draws z and weighs it by the predictive
law of the observation; given its path everything else is exact. Moments are those of the mixture

.. math::

    E[a] = \sum_i W_i m_i, \quad
    \mathrm{Cov}[a] = \sum_i W_i \left(P_i + (m_i - E[a]) (m_i - E[a])^\top\right).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference import kalman, particle, smc
from seqdgm.inference.particle import FilterOptions
from seqdgm.inference.resampling import gather
from seqdgm.inference.smc import SMCOptions, Step
from seqdgm.kernels.types import System
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, Inputs, Prediction, Samples, States

if TYPE_CHECKING:
    from seqdgm.inference.online_particles import OnlineParticles
    from seqdgm.models._conditionally_linear import ConditionallyLinearSSM, Linear
    from seqdgm.panel import Panel
    from seqdgm.transform import Transform

N_TRAJECTORIES = 200  # paths of z behind the moments of smooth and impute

log_prob = particle.log_prob
sample = particle.sample


class Measured(NamedTuple):
    """Particles after a step, its observation taken in."""

    z: Float[Tensor, "series particle drawn"]
    mean: Float[Tensor, "series particle state"]
    cov: Float[Tensor, "series particle state state"]
    log_weights: Float[Tensor, "series particle"]
    ancestors: Int[Tensor, "series particle"] | None


class _Mixtures:
    """Collector of the moments of the mixture over particles."""

    def __init__(self, model: ConditionallyLinearSSM, batch: Batch) -> None:
        self._model, self._x = model, _unfilled(batch)
        self._mean: list[Tensor] = []
        self._cov: list[Tensor] = []

    def update(self, step: Step) -> None:
        now = self._model.updated(step.s, self._x[:, step.t, None])
        value = torch.cat([now.mean, self._model.indicators(now.z)], -1)
        mean, cov = mixture(value, now.cov, step.log_weights.exp())
        outside = ~step.active[:, None]
        self._mean.append(mean.masked_fill(outside, torch.nan))
        self._cov.append(cov.masked_fill(outside[..., None], torch.nan))

    def result(self) -> tuple[Tensor, Tensor]:
        return torch.stack(self._mean, 1), torch.stack(self._cov, 1)


class _History:
    """Collector of the measured particles of every step from `first` on."""

    def __init__(self, model: ConditionallyLinearSSM, batch: Batch, first: int = 0) -> None:
        self._model, self._x, self._first = model, _unfilled(batch), first
        self.steps: list[Measured] = []

    def update(self, step: Step) -> None:
        if step.t >= self._first:
            now = self._model.updated(step.s, self._x[:, step.t, None])
            self.steps.append(Measured(*now, step.log_weights, step.ancestors))

    def lineages(self, final: Int[Tensor, "series n"]) -> list[Int[Tensor, "series n"]]:
        """Particle that each of the chosen final ones descends from, at every step."""
        out = [final]
        for step in reversed(self.steps[1:]):
            out.append(_ancestors(step, out[-1]))
        return out[::-1]


def mixture(
    value: Float[Tensor, "series particle reported"],
    cov: Float[Tensor, "series particle state state"],
    weights: Float[Tensor, "series particle"],
) -> tuple[Float[Tensor, "series reported"], Float[Tensor, "series reported reported"]]:
    """Moments of a mixture; what is reported begins with the state that has a covariance."""
    mean, spread = particle.moments(value, weights)
    state = cov.shape[-1]
    within = torch.einsum("nk,nkij->nij", weights, cov)
    return mean, spread + torch.nn.functional.pad(within, (0, value.shape[-1] - state) * 2)


def filter(
    model: ConditionallyLinearSSM,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[FilterOptions],
) -> States:
    """Filtering moments of the linear part, and of what the model reports of the drawn one."""
    collector = _Mixtures(model, batch)
    out = smc.run(model, batch, SMCOptions(n_particles, **options), generator, (collector,))
    ess = out.ess.masked_fill(~batch.valid, torch.nan)
    return States(*collector.result(), out.increments.sum(1), ess=ess)


def online(
    model: ConditionallyLinearSSM,
    batch: Batch,
    *,
    panel: Panel | None,
    transform: Transform,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[FilterOptions],
) -> OnlineParticles:
    """Filter the data, which may have no steps, and go on from there one observation at a time."""
    from seqdgm.inference.online_particles import begin

    how = SMCOptions(n_particles, **options)
    return begin(model, batch, panel, transform, how, generator, 2, _Mixtures)


def smooth(
    model: ConditionallyLinearSSM,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    moves: int = 10,
    **options: Unpack[FilterOptions],
) -> States:
    """Smoothing moments: paths of z drawn backwards, and a Kalman smoother along each.

    The backward pass starts at the ancestor of every particle and makes Metropolis-Hastings moves
    towards the backward kernel of the Rao-Blackwellised smoother (Bunch and Godsill 2013; Lindsten,
    Bunch, Särkkä, Schön and Godsill 2016), in O(paths x moves) a step.

    Parameters
    ----------
    model, batch, n_particles, generator
        As every engine.
    moves : int
        Moves a step; with 0 the paths are those of the genealogy, few of which differ early on.
    **options
        See `seqdgm.inference.smc.SMCOptions`.

    Raises
    ------
    ValueError
        If some R is singular: only the genealogy (``moves=0``) does without its inverse.

    References
    ----------
    Bunch and Godsill (2013), Improved particle approximations to the joint smoothing distribution
    using Markov chain Monte Carlo, *IEEE Transactions on Signal Processing* 61; Lindsten et al.
    (2016), Rao-Blackwellized particle smoothers for conditionally linear Gaussian models, *IEEE
    Journal of Selected Topics in Signal Processing* 10, section III.
    """
    paths, out = _paths(model, batch, n_particles, generator, moves, **options)
    moments = []
    for k, path in enumerate(paths):
        given = _given(model, batch, k, path)
        states = kalman.smooth(given.model, given.batch, n_particles=1, generator=generator)
        value = torch.cat([states.mean, model.indicators(path)], -1)
        even = value.new_full((value.shape[1], len(path)), 1 / len(path))
        moments.append(mixture(value.transpose(0, 1), states.cov.transpose(0, 1), even))
    outside = ~batch.valid[..., None]
    mean, cov = (torch.stack(parts) for parts in zip(*moments, strict=True))

    def draw(n: int, generator: torch.Generator) -> Tensor:
        drawn = []
        for k, path in enumerate(
            _paths(model, batch, n_particles, generator, moves, n, **options)[0]
        ):
            given = _given(model, batch, k, path)
            states = kalman.smooth(given.model, given.batch, n_particles=1, generator=generator)
            assert states.draw is not None
            linear = states.draw(1, generator)[:, 0]
            drawn.append(torch.cat([linear, model.indicators(path)], -1))
        return torch.stack(drawn).masked_fill(outside[:, None], torch.nan)

    return States(
        mean.masked_fill(outside, torch.nan),
        cov.masked_fill(outside[..., None], torch.nan),
        out.increments.sum(1),
        ess=out.ess.masked_fill(~batch.valid, torch.nan),
        draw=draw,
    )


def impute(
    model: ConditionallyLinearSSM,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    moves: int = 10,
    **options: Unpack[FilterOptions],
) -> Samples:
    """Observations, the missing ones drawn given all others; `moves` as in `smooth`."""
    drawn = []
    for k, path in enumerate(_paths(model, batch, n_particles, generator, moves, **options)[0]):
        given = _given(model, batch, k, path)
        filled = kalman.impute(given.model, given.batch, n_particles=1, generator=generator)
        drawn.append(filled.draw(1, generator)[:, 0])
    return Samples(torch.stack(drawn))


def forecast(
    model: ConditionallyLinearSSM,
    batch: Batch,
    *,
    horizon: int,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[FilterOptions],
) -> Prediction:
    """Joint trajectories: paths of z run on past the end, and the linear part drawn given each."""
    ahead = batch.extend(horizon)
    first = int(batch.lengths.min())
    collector = _History(model, ahead, first)
    out = smc.run(model, ahead, SMCOptions(n_particles, **options), generator, (collector,))
    final = torch.multinomial(out.log_weights.exp(), n_particles, True, generator=generator)
    lineage = collector.lineages(final)
    when = (batch.lengths - first)[:, None] + torch.arange(horizon, device=batch.x.device)
    pairs = list(zip(collector.steps, lineage, strict=True))
    z, mean, cov = (
        _select(torch.stack(path, 2), when)
        for path in (
            [gather(step.z, index) for step, index in pairs],
            [gather(step.mean, index) for step, index in pairs],
            [gather(step.cov, index) for step, index in pairs],
        )
    )
    even = mean.new_full(mean.shape[:2], 1 / n_particles)
    value = torch.cat([mean, model.indicators(z)], -1)
    moments = [mixture(value[:, :, t], cov[:, :, t], even) for t in range(horizon)]
    total_mean, total_cov = (torch.stack(m, 1) for m in zip(*moments, strict=True))
    paths = z.flatten(0, 1)
    system = model.conditional_system(paths)._replace(
        m0=mean[:, :, 0].flatten(0, 1), P0=cov[:, :, 0].flatten(0, 1)
    )
    a, x = kalman.simulate(system, len(paths), 1, horizon, generator)
    joint = torch.cat([a[:, 0], model.indicators(paths)], -1).unflatten(0, z.shape[:2])
    inside = torch.arange(ahead.n_steps, device=batch.x.device)[None] < batch.lengths[:, None]
    log_likelihood = torch.where(inside, out.increments, 0.0).sum(1)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return joint[:, torch.randint(n_particles, (n,), generator=generator)]

    states = States(total_mean, total_cov, log_likelihood, draw=draw)
    return Prediction(Samples(x[:, 0].unflatten(0, z.shape[:2])), states)


@dataclass(frozen=True)
class _Conditional:
    """The linear-Gaussian model that is left given paths of z, as the exact engine sees it."""

    system: System

    def linear_gaussian(self, u: Tensor, rows: Tensor) -> System:
        return self.system


class _Given(NamedTuple):
    """A conditional model, and its series once for every path."""

    model: Any
    batch: Batch


def _given(
    model: ConditionallyLinearSSM, batch: Batch, k: int, path: Float[Tensor, "n time drawn"]
) -> _Given:
    rows = torch.full((len(path),), k, device=batch.x.device)
    return _Given(_Conditional(model.conditional_system(path)), batch.take(rows))


def _paths(
    model: ConditionallyLinearSSM,
    batch: Batch,
    n_particles: int,
    generator: torch.Generator,
    moves: int,
    n: int | None = None,
    **options: Unpack[FilterOptions],
) -> tuple[Float[Tensor, "series n time drawn"], smc.SMCResult]:
    """Paths of z given all data, and the run they come from."""
    n = n or min(n_particles, N_TRAJECTORIES)
    history = _History(model, batch)
    out = smc.run(model, batch, SMCOptions(n_particles, **options), generator, (history,))
    final = torch.multinomial(out.log_weights.exp(), n, True, generator=generator)
    if moves:
        chosen = _backward(model, batch, history.steps, final, moves, generator)
    else:
        chosen = history.lineages(final)
    z = [gather(step.z, index) for step, index in zip(history.steps, chosen, strict=True)]
    return torch.stack(z, 2), out


class Drawn(NamedTuple):
    """Paths of z given all data, and the log-evidence of the filter that they come from."""

    z: Float[Tensor, "series n time drawn"]
    log_likelihood: Float[Tensor, "series"]


@torch.no_grad()
def draw_paths(
    model: ConditionallyLinearSSM,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    n: int,
    *,
    backward: bool = True,
) -> Drawn:
    """Draw `n` paths of z of every series, by exact backward simulation over all particles.

    With a reference in `options` that is the kernel of the particle Gibbs sampler, which leaves
    p(z | x) invariant with any number of particles. With ``backward=False`` the paths are those of
    the genealogy.
    """
    history = _History(model, batch)
    out = smc.run(model, batch, options, generator, (history,))
    final = torch.multinomial(out.log_weights.exp(), n, True, generator=generator)
    if backward:
        chosen = _backward(model, batch, history.steps, final, None, generator)
    else:
        chosen = history.lineages(final)
    z = [gather(step.z, index) for step, index in zip(history.steps, chosen, strict=True)]
    return Drawn(torch.stack(z, 2), torch.where(batch.valid, out.increments, 0.0).sum(1))


class Information(NamedTuple):
    r"""What later observations say of a: :math:`\exp(-a^\top \Omega a / 2 + \lambda^\top a)`."""

    omega: Float[Tensor, "*batch state state"]
    lam: Float[Tensor, "*batch state"]

    def observed(self, lin: Linear, x: Float[Tensor, "*batch dim"]) -> Information:
        """Add the observed elements of x.

        Raises
        ------
        ValueError
            If R is singular, so that x tells a combination of a exactly.
        """
        seen = ~x.isnan()
        m = seen.to(self.lam.dtype)
        load = lin.H * m[..., None]
        noise = lin.R * m[..., :, None] * m[..., None, :] + torch.diag_embed(1 - m)
        factor, info = torch.linalg.cholesky_ex(noise)
        if bool(info.any()):
            raise ValueError(
                "R is singular, so the smoother's backward moves have no information to work "
                "with; pass moves=0 (smoother='genealogy' to fit), or add a little noise to R"
            )
        white = torch.cholesky_solve(load, factor)
        residual = torch.where(seen, x - lin.d, 0.0)
        return Information(
            self.omega + load.mT @ white, self.lam + (white.mT @ residual[..., None])[..., 0]
        )

    def carried(self, lin: Linear) -> Information:
        """The same of the a before, through the transition."""
        mixed = _identity(self.omega) + self.omega @ lin.Q
        offset = self.lam - (self.omega @ lin.b[..., None])[..., 0]
        both = torch.cat([self.omega @ lin.F, offset[..., None]], -1)
        solved = lin.F.mT @ torch.linalg.solve(mixed, both)
        omega = solved[..., :-1]
        return Information(0.5 * (omega + omega.mT), solved[..., -1])

    def log_integral(
        self, mean: Float[Tensor, "*batch state"], cov: Float[Tensor, "*batch state state"]
    ) -> Float[Tensor, "*batch"]:
        """Log of its expectation under N(mean, cov)."""
        pull = (self.omega @ mean[..., None])[..., 0]
        rest = self.lam - pull
        mixed = _identity(cov) + cov @ self.omega
        gain = torch.linalg.solve(mixed, cov @ rest[..., None])[..., 0]
        quadratic = (mean * (pull - 2 * self.lam)).sum(-1) - (rest * gain).sum(-1)
        return -0.5 * (torch.linalg.slogdet(mixed).logabsdet + quadratic)


def _backward(
    model: ConditionallyLinearSSM,
    batch: Batch,
    steps: list[Measured],
    final: Int[Tensor, "series n"],
    moves: int | None,
    generator: torch.Generator,
) -> list[Int[Tensor, "series n"]]:
    """Particle that each path goes through at every step, moved away from its genealogy.

    Without a number of moves each is drawn from its law given the path that follows.
    """
    x = _unfilled(batch)
    chosen = [final]
    size = model.state_dim
    info = Information(x.new_zeros(*final.shape, size, size), x.new_zeros(*final.shape, size))
    for t in range(len(steps) - 1, 0, -1):
        z = gather(steps[t].z, chosen[-1])
        lin = model.linear(z)
        info = info.observed(lin, x[:, t, None]).carried(lin)
        before, u = steps[t - 1], batch.inputs_at(t, extra_axes=1)
        if moves is None:
            chosen.append(_simulated(model, u, before, z, info, generator))
            continue
        target = partial(_log_target, model, u, before, z, info)
        chosen.append(_moved(target, before, _ancestors(steps[t], chosen[-1]), moves, generator))
    return chosen[::-1]


def _log_target(
    model: ConditionallyLinearSSM,
    u: Inputs,
    before: Measured,
    z: Float[Tensor, "series n drawn"],
    info: Information,
    index: Int[Tensor, "series n"],
) -> Float[Tensor, "series n"]:
    """Density of the next z and of later data given each path's particle, up to a constant."""
    origin, mean, cov = (gather(leaf, index) for leaf in before[:3])
    law = dist.expand(model.transition(origin, u), index.shape, z.shape[-1])
    return dist.log_prob(law, z).double() + info.log_integral(mean, cov).double()


def _simulated(
    model: ConditionallyLinearSSM,
    u: Inputs,
    before: Measured,
    z: Float[Tensor, "series n drawn"],
    info: Information,
    generator: torch.Generator,
) -> Int[Tensor, "series n"]:
    """Draw the particle of every path among all of them."""
    series, count = before.log_weights.shape
    n = z.shape[1]
    every = torch.arange(count, device=z.device).repeat(series, n)
    wide = Information(*(leaf.repeat_interleave(count, 1) for leaf in info))
    target = _log_target(model, u, before, z.repeat_interleave(count, 1), wide, every)
    logits = before.log_weights[:, None] + target.unflatten(1, (n, count))
    weights = torch.softmax(logits, -1)
    return torch.multinomial(weights.flatten(0, 1), 1, generator=generator).reshape(series, n)


def _moved(
    target: Callable[[Tensor], Tensor],
    step: Measured,
    index: Int[Tensor, "series n"],
    moves: int,
    generator: torch.Generator,
) -> Int[Tensor, "series n"]:
    """Metropolis-Hastings moves that propose particles by their weights, which cancel."""
    series, n = index.shape
    weights = step.log_weights.exp()
    proposed = torch.multinomial(weights, moves * n, True, generator=generator)
    level = torch.rand(
        (series, moves, n), generator=generator, dtype=weights.dtype, device=weights.device
    ).log()
    held = target(index)
    for k, offer in enumerate(proposed.reshape(series, moves, n).unbind(1)):
        value = target(offer)
        accept = level[:, k] < value - held
        index, held = torch.where(accept, offer, index), torch.where(accept, value, held)
    return index


def _ancestors(step: Measured, index: Int[Tensor, "series n"]) -> Int[Tensor, "series n"]:
    return index if step.ancestors is None else step.ancestors.gather(1, index)


def _unfilled(batch: Batch) -> Float[Tensor, "series time dim"]:
    return batch.x.masked_fill(~batch.mask, torch.nan)


def _identity(like: Float[Tensor, "*batch state state"]) -> Float[Tensor, "state state"]:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _select(
    paths: Float[Tensor, "series n steps ..."], when: Int[Tensor, "series horizon"]
) -> Float[Tensor, "series n horizon ..."]:
    """The chosen steps of each series."""
    series = torch.arange(len(paths), device=paths.device)[:, None]
    return paths.transpose(1, 2)[series, when].transpose(1, 2)
