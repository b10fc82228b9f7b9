"""Monte-Carlo inference in any state-space model: the engine over the SMC driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference import smc
from seqdgm.inference.resampling import gather
from seqdgm.inference.scan import scan
from seqdgm.inference.smc import SMCOptions, Step
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, Evidence, Inputs, Prediction, Samples, States

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


BACKWARD_ELEMENTS = 2_000_000  # densities held at once in backward simulation (16 MB)

N_TRAJECTORIES = 200  # smoothed trajectories behind the moments of smooth and impute


class Moments:
    """Weighted mean and covariance of the reported state at every step."""

    def __init__(self, model: StateSpaceModel) -> None:
        self._model = model
        self._mean: list[Tensor] = []
        self._cov: list[Tensor] = []

    def update(self, step: Step) -> None:
        """Take in one step."""
        value = self._model.report(step.h, step.z).double()
        mean, cov = moments(value, step.log_weights.exp())
        outside = ~step.active[:, None]
        self._mean.append(mean.masked_fill(outside, torch.nan))
        self._cov.append(cov.masked_fill(outside[..., None], torch.nan))

    def result(self) -> tuple[Tensor, Tensor]:
        """Means (series, time, state) and covariances (series, time, state, state)."""
        return torch.stack(self._mean, 1), torch.stack(self._cov, 1)


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


def moments(
    value: Float[Tensor, "series particle state"], weights: Float[Tensor, "series particle"]
) -> tuple[Float[Tensor, "series state"], Float[Tensor, "series state state"]]:
    """Weighted mean and covariance over particles."""
    mean = (weights[..., None] * value).sum(1)
    centred = value - mean[:, None]
    return mean, torch.einsum("nk,nki,nkj->nij", weights, centred, centred)


def filter(
    model: StateSpaceModel, batch: Batch, *, n_particles: int, generator: torch.Generator
) -> States:
    """Filtering moments by particles (one is enough for a model without randomness)."""
    collector = Moments(model)
    count = 1 if _deterministic(model, batch) else n_particles
    out = smc.run(model, batch, SMCOptions(count), generator, (collector,))
    mean, cov = collector.result()
    outside = ~batch.valid
    ess = None if count == 1 else out.ess.masked_fill(outside, torch.nan)
    return States(mean, cov, out.increments.sum(1), ess=ess)


def log_prob(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    start: Int[Tensor, "series"] | None = None,
) -> Evidence:
    """Log of an unbiased particle estimate of the likelihood; exact without random states."""
    first = torch.zeros_like(batch.lengths) if start is None else start
    t = torch.arange(batch.n_steps, device=batch.x.device)
    counted = batch.valid & (t[None] >= first[:, None])
    if _deterministic(model, batch):
        with torch.no_grad():
            trace = scan(model, batch, generator)
            emission = model.emission(trace.s, batch.inputs_all())
            steps = dist.log_prob(emission, batch.x, batch.mask).double()
        value = torch.where(counted, steps, 0.0).sum(1)
        return Evidence(value, "exact", torch.zeros_like(value))
    out = smc.run(model, batch, SMCOptions(n_particles), generator)
    value = torch.where(counted, out.increments, 0.0).sum(1)
    # The error of the whole evidence says little of a part of it, whose own is not estimated.
    stderr = out.stderr if start is None else torch.full_like(out.stderr, torch.nan)
    return Evidence(value, "estimate", stderr)


def smooth(
    model: StateSpaceModel, batch: Batch, *, n_particles: int, generator: torch.Generator
) -> States:
    """Smoothing moments from joint trajectories.

    Markov models use backward simulation (Godsill, Doucet and West 2004); models with memory trace
    the genealogy of the filter.
    """
    if _deterministic(model, batch):
        return filter(model, batch, n_particles=1, generator=generator)._replace(
            draw=lambda n, _: (
                filter(model, batch, n_particles=1, generator=generator)
                .mean[:, None]
                .expand(-1, n, -1, -1)
            )
        )
    paths, log_likelihood, ess = _trajectories(model, batch, n_particles, generator)
    value = paths["value"].double()
    outside = ~batch.valid[:, None, :, None]
    value = value.masked_fill(outside, torch.nan)
    mean = value.mean(1)
    centred = value - mean[:, None]
    cov = torch.einsum("nsti,nstj->ntij", centred, centred) / value.shape[1]

    def draw(n: int, generator: torch.Generator) -> Tensor:
        drawn = _trajectories(model, batch, n_particles, generator, n)[0]["value"]
        return drawn.double().masked_fill(outside, torch.nan)

    return States(mean, cov, log_likelihood, ess=ess, draw=draw)


def forecast(
    model: StateSpaceModel,
    batch: Batch,
    *,
    horizon: int,
    n_particles: int,
    generator: torch.Generator,
) -> Prediction:
    """Joint trajectories: filter to the end of each series, then on without observations."""
    ahead = batch.extend(horizon)
    first = int(batch.lengths.min())
    collector = Genealogy(model, first)
    options = SMCOptions(n_particles, draw_observations=True)
    out = smc.run(model, ahead, options, generator, (collector,))
    final = torch.multinomial(out.log_weights.exp(), n_particles, True, generator=generator)
    paths = collector.trace(final, ("x", "value"))
    when = (batch.lengths - first)[:, None] + torch.arange(horizon, device=batch.x.device)
    x, value = (
        torch.gather(p, 2, when[:, None, :, None].expand(-1, p.shape[1], -1, p.shape[3]))
        for p in (paths["x"], paths["value"].double())
    )
    mean = value.mean(1)
    centred = value - mean[:, None]
    cov = torch.einsum("nsti,nstj->ntij", centred, centred) / n_particles
    inside = torch.arange(ahead.n_steps, device=batch.x.device)[None] < batch.lengths[:, None]
    log_likelihood = torch.where(inside, out.increments, 0.0).sum(1)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return value[:, torch.randint(n_particles, (n,), generator=generator)]

    return Prediction(Samples(x), States(mean, cov, log_likelihood, draw=draw))


def sample(
    model: StateSpaceModel,
    u: Float[Tensor, "series steps inputs"],
    rows: Int[Tensor, "series"],
    generator: torch.Generator,
) -> Float[Tensor, "series steps dim"]:
    """Draw series from the model by running its recursion forward."""
    n = len(u)
    s = model.start((n,))
    drawn: list[Tensor] = []
    x: Tensor | None = None
    with torch.no_grad():
        for t in range(u.shape[1]):
            known = Inputs(u[:, t], torch.tensor(t, device=u.device))
            if model.feedback and x is None:
                if model.obs_dim_ is None:
                    raise ValueError(
                        f"{type(model).__name__} feeds observations back, but their width is not "
                        "known; set obs_dim_ in __init__ or call fit(y) first"
                    )
                x = u.new_zeros(n, model.obs_dim_)
            h = model.advance(
                s, model.embed(x) if model.feedback and x is not None else None, known
            )
            prior = model.prior(h, known)
            z = None
            if prior is not None:
                z = dist.sample(dist.expand(prior, (n,), model.latent_dim), generator)
            s = model.absorb(h, z)
            emission = model.emission(s, known)
            x = dist.sample(dist.expand(emission, (n,), dist.vector_dim(emission)), generator)
            drawn.append(x)
    return torch.stack(drawn, 1)


def impute(
    model: StateSpaceModel, batch: Batch, *, n_particles: int, generator: torch.Generator
) -> Samples:
    """Observations with their missing elements drawn from the smoothing distribution."""
    return Samples(_trajectories(model, batch, n_particles, generator)[0]["x"])


def _deterministic(model: StateSpaceModel, batch: Batch) -> bool:
    """Whether nothing is random given the data: no latent state and nothing to fill in."""
    return model.latent_dim == 0 and (batch.complete or not model.feedback)


def _trajectories(
    model: StateSpaceModel,
    batch: Batch,
    n_particles: int,
    generator: torch.Generator,
    n: int | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Joint draws of states and observations given all data, with evidence and ESS."""
    n = n or min(n_particles, N_TRAJECTORIES)
    collector = Genealogy(model)
    options = SMCOptions(n_particles, draw_observations=True)
    out = smc.run(model, batch, options, generator, (collector,))
    final = torch.multinomial(out.log_weights.exp(), n, True, generator=generator)
    if model.markov:
        paths = _backward_simulation(model, batch, collector, final, generator)
    else:
        paths = collector.trace(final, ("x", "value"))
    ess = out.ess.masked_fill(~batch.valid, torch.nan)
    return paths, out.increments.sum(1), ess


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
