"""Monte-Carlo inference in any state-space model: the engine over the SMC driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference import fused, smc
from seqdgm.inference.history import History, draw_particles
from seqdgm.inference.proposals import Proposal
from seqdgm.inference.resampling import Resampler
from seqdgm.inference.scan import Piece, Trace, scan
from seqdgm.inference.smc import Lookahead, SMCOptions, Step, Weigh
from seqdgm.inference.smoothing import Smoother, Trajectories, mean_and_cov, trajectories
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, Evidence, Inputs, Prediction, Samples, States, check_count, tree_map

if TYPE_CHECKING:
    from seqdgm.inference.online_particles import OnlineParticles
    from seqdgm.panel import Panel
    from seqdgm.recursion import StateSpaceModel
    from seqdgm.transform import Transform


N_TRAJECTORIES = 200  # smoothed trajectories behind the moments of smooth and impute


class FilterOptions(TypedDict, total=False):
    """Options of the verbs that filter; see `seqdgm.inference.smc.SMCOptions`."""

    resampler: str | Resampler
    threshold: float
    proposal: str | Proposal
    lookahead: Literal["mean", "ekf"] | Lookahead | None
    collapse: Literal["raise", "zero"]
    weigh: Weigh | None
    compile: bool


class SmoothOptions(FilterOptions, total=False):
    """Options of the verbs that smooth; see `seqdgm.inference.smoothing`.

    `n_trajectories` draws are behind the moments of the smoothers that give trajectories.
    """

    smoother: str | Smoother
    lag: int | None
    n_trajectories: int


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


def moments(
    value: Float[Tensor, "series particle state"], weights: Float[Tensor, "series particle"]
) -> tuple[Float[Tensor, "series state"], Float[Tensor, "series state state"]]:
    """Weighted mean and covariance over particles."""
    mean = (weights[..., None] * value).sum(1)
    centred = value - mean[:, None]
    return mean, torch.einsum("nk,nki,nkj->nij", weights, centred, centred)


def filter(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[FilterOptions],
) -> States:
    """Filtering moments by particles (one is enough for a model without randomness)."""
    count = 1 if _deterministic(model, batch) else n_particles
    how = SMCOptions(count, **options)
    fast = fused.bootstrap(model, batch, how, generator, moments=True)
    if fast is not None and fast.mean is not None and fast.var is not None:
        cov = fast.var[..., None] if fast.cov is None else fast.cov
        mean, increments, ess = fast.mean, fast.increments, fast.ess
    else:
        collector = Moments(model)
        out = smc.run(model, batch, how, generator, (collector,))
        (mean, cov), increments, ess = collector.result(), out.increments, out.ess
    reported = None if count == 1 else ess.masked_fill(~batch.valid, torch.nan)
    return States(mean, cov, increments.sum(1), ess=reported)


def log_prob(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    start: Int[Tensor, "series"] | None = None,
    **options: Unpack[FilterOptions],
) -> Evidence:
    """Log of an unbiased particle estimate of the likelihood; exact without random states."""
    first = torch.zeros_like(batch.lengths) if start is None else start
    t = torch.arange(batch.n_steps, device=batch.x.device)
    counted = batch.valid & (t[None] >= first[:, None])
    if _deterministic(model, batch):
        _, steps = _run_memory(model, batch, generator)
        value = torch.where(counted, steps, 0.0).sum(1)
        return Evidence(value, "exact", torch.zeros_like(value))
    how = SMCOptions(n_particles, **options)
    out = fused.bootstrap(model, batch, how, generator) or smc.run(model, batch, how, generator)
    value = torch.where(counted, out.increments, 0.0).sum(1)
    # The error of the whole evidence says little of a part of it, whose own is not estimated.
    stderr = out.stderr if start is None else torch.full_like(out.stderr, torch.nan)
    return Evidence(value, "estimate", stderr)


def smooth(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[SmoothOptions],
) -> States:
    """Smoothing moments; see `seqdgm.inference.smoothing`."""
    if _deterministic(model, batch):
        return filter(model, batch, n_particles=1, generator=generator)._replace(
            draw=lambda n, _: (
                filter(model, batch, n_particles=1, generator=generator)
                .mean[:, None]
                .expand(-1, n, -1, -1)
            )
        )
    found = _trajectories(model, batch, n_particles, generator, draws=False, **options)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        how: SmoothOptions = {**options, "n_trajectories": n}
        drawn = _trajectories(model, batch, n_particles, generator, draws=False, **how)
        return drawn.paths["value"].double()

    return States(
        found.mean,
        found.cov,
        found.log_likelihood,
        ess=found.ess,
        draw=draw if found.joint else None,
    )


def forecast(
    model: StateSpaceModel,
    batch: Batch,
    *,
    horizon: int,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[FilterOptions],
) -> Prediction:
    """Joint trajectories: filter to the end of each series, then on without observations."""
    how = SMCOptions(n_particles, draw_observations=True, **options)
    if _deterministic(model, batch):
        return _forecast_from_memory(model, batch, horizon, n_particles, generator)
    ahead = batch.extend(horizon)
    first = int(batch.lengths.min())
    history = History(model, first)
    out = smc.run(model, ahead, how, generator, (history,))
    index = history.lineages(draw_particles(out.log_weights, n_particles, generator))
    when = (batch.lengths - first)[:, None] + torch.arange(horizon, device=batch.x.device)
    x, value = (
        torch.gather(p, 2, when[:, None, :, None].expand(-1, p.shape[1], -1, p.shape[3]))
        for p in (history.along(index, "x"), history.along(index, "value").double())
    )
    mean, cov = mean_and_cov(value)
    inside = torch.arange(ahead.n_steps, device=batch.x.device)[None] < batch.lengths[:, None]
    log_likelihood = torch.where(inside, out.increments, 0.0).sum(1)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return value[:, torch.randint(n_particles, (n,), generator=generator)]

    return Prediction(Samples(x), States(mean, cov, log_likelihood, draw=draw))


def _run_memory(
    model: StateSpaceModel, batch: Batch, generator: torch.Generator, start: Piece | None = None
) -> tuple[Trace, Float[Tensor, "series time"]]:
    """One pass of a model whose memory the data determine, and the log-density of each step.

    With a `start` the pass goes step by step, and gives states that can be gone on from.
    """
    with torch.no_grad():
        trace = scan(model, batch, generator, piece=start)
        emission = model.emission(trace.s, batch.inputs_all())
        return trace, dist.log_prob(emission, batch.x, batch.mask).double()


def _forecast_from_memory(
    model: StateSpaceModel, batch: Batch, horizon: int, n: int, generator: torch.Generator
) -> Prediction:
    """One pass to the end of each series, and trajectories only from there."""
    before = Piece(model.start((batch.n_series,)), torch.zeros_like(batch.x[:, 0]), None, True)
    trace, steps = _run_memory(model, batch, generator, before)
    rows = torch.arange(batch.n_series, device=batch.x.device)

    def at_end(leaf: Tensor) -> Tensor:
        found = leaf[rows, batch.lengths - 1]
        return found[:, None].expand(-1, n, *found.shape[1:])

    when = batch.lengths[:, None] + torch.arange(horizon, device=batch.x.device)
    u = batch.u.gather(1, when[..., None].expand(-1, -1, batch.u.shape[2]))
    known = [
        Inputs(values[:, None], t[:, None])
        for values, t in zip(u.unbind(1), (batch.begin + when).unbind(1), strict=True)
    ]
    shape = (batch.n_series, n)
    drawn, memories = run_on(
        model, tree_map(at_end, trace.s), at_end(batch.x), known, shape, generator
    )
    value = torch.stack([model.report(h, z).double() for h, z in memories], 2)
    log_likelihood = torch.where(batch.valid, steps, 0.0).sum(1)

    def draw(n_draws: int, generator: torch.Generator) -> Tensor:
        return value[:, torch.randint(n, (n_draws,), generator=generator)]

    states = States(*mean_and_cov(value), log_likelihood, draw=draw)
    return Prediction(Samples(torch.stack(drawn, 2)), states)


def online(
    model: StateSpaceModel,
    batch: Batch,
    *,
    panel: Panel | None,
    transform: Transform,
    n_particles: int,
    generator: torch.Generator,
    window: int = 32,
    **options: Unpack[FilterOptions],
) -> OnlineParticles:
    """Filter the data, which may have no steps, and go on from there one observation at a time.

    A learned proposal reads the last `window` observations.
    """
    from seqdgm.inference.online_particles import begin

    how = SMCOptions(n_particles, **options)
    return begin(
        model, batch, panel, transform, how, generator, window, lambda model, _: Moments(model)
    )


def sample(
    model: StateSpaceModel,
    u: Float[Tensor, "series steps inputs"],
    rows: Int[Tensor, "series"],
    generator: torch.Generator,
) -> Float[Tensor, "series steps dim"]:
    """Draw series from the model by running its recursion forward."""
    return simulate(model, u, (len(u),), generator)


def simulate(
    model: StateSpaceModel,
    u: Float[Tensor, "*batch steps inputs"],
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> Float[Tensor, "*shape steps dim"]:
    """Draw series of any batch shape; that of the inputs broadcasts with it."""
    x: Tensor | None = None
    if model.feedback:
        if model.obs_dim_ is None:
            raise ValueError(
                f"{type(model).__name__} feeds observations back, but their width is not known; "
                "set obs_dim_ in __init__ or call fit(y) first"
            )
        x = u.new_zeros(*shape, model.obs_dim_)
    known = [Inputs(v, torch.tensor(t, device=u.device)) for t, v in enumerate(u.unbind(-2))]
    drawn, _ = run_on(model, model.start(shape), x, known, shape, generator)
    return torch.stack(drawn, -2)


def run_on(
    model: StateSpaceModel,
    s: Any,
    x: Tensor | None,
    known: Sequence[Inputs],
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> tuple[list[Tensor], list[tuple[Any, Tensor | None]]]:
    """Observations, and memories and states, of steps after state `s` and observation `x`."""
    drawn, memories = [], []
    with torch.no_grad():
        for u in known:
            read = model.embed(x) if model.feedback and x is not None else None
            h = model.advance(s, read, u)
            prior = model.prior(h, u)
            z = None
            if prior is not None:
                z = dist.sample(dist.expand(prior, shape, model.latent_dim), generator)
            s = model.absorb(h, z)
            x = model.simulate(s, u, generator)
            drawn.append(x)
            memories.append((h, z))
    return drawn, memories


def impute(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[SmoothOptions],
) -> Samples:
    """Observations with their missing elements drawn from the smoothing distribution."""
    found = _trajectories(model, batch, n_particles, generator, draws=True, **options)
    return Samples(found.paths["x"])


def _deterministic(model: StateSpaceModel, batch: Batch) -> bool:
    """Whether nothing is random given the data: no latent state and nothing to fill in."""
    return model.latent_dim == 0 and (batch.complete or not model.feedback)


def _trajectories(
    model: StateSpaceModel,
    batch: Batch,
    n_particles: int,
    generator: torch.Generator,
    *,
    draws: bool,
    smoother: str | Smoother = "auto",
    lag: int | None = None,
    n_trajectories: int | None = None,
    **options: Unpack[FilterOptions],
) -> Trajectories:
    """Draws of states, and of missing observations where asked for, given all data."""
    n = min(n_particles, N_TRAJECTORIES) if n_trajectories is None else n_trajectories
    check_count("n_trajectories", n)
    how = SMCOptions(n_particles, draw_observations=draws, **options)
    return trajectories(model, batch, how, generator, n, smoother, lag)
