r"""Particle Gibbs: posteriors of parameters and states together.

References
----------
Andrieu, Doucet and Holenstein (2010), Particle Markov chain Monte Carlo methods, *JRSS B* 72;
Lindsten, Jordan and Schön (2014), Particle Gibbs with ancestor sampling, *JMLR* 15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference import smc
from seqdgm.inference.chains import Chains, choose
from seqdgm.inference.history import History
from seqdgm.inference.parameters import Values
from seqdgm.inference.pmcmc import collect, read_counts, spread
from seqdgm.inference.posterior import ParameterPosterior
from seqdgm.inference.random_walk import RandomWalk, accept
from seqdgm.inference.smc import Reference, SMCOptions
from seqdgm.nn import distributions as dist
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import Batch, Inputs, check_count, make_generator

# z (chain, series, time, state), x (series, time, dim) with NaN where not observed, generator
# -> values (chain, *shape) of every parameter.
ParameterSampler = Callable[[Tensor, Tensor, torch.Generator], Values]


def particle_gibbs(
    model: StateSpaceModel,
    y: Any,
    priors: Mapping[str, Distribution],
    *,
    n_iter: int,
    n_chains: int = 4,
    n_particles: int = 32,
    n_warmup: int | None = None,
    n_moves: int = 10,
    ancestor_sampling: bool = True,
    sample_parameters: ParameterSampler | None = None,
    n_trajectories: int = 100,
    inputs: Any = None,
    pooled: bool = True,
    init: Mapping[str, Any] | None = None,
    resampler: str = "multinomial",
    threshold: float = 1.0,
    seed: int | torch.Generator | None = None,
    **options: Any,
) -> ParameterPosterior:
    r"""Posterior of parameters and states by particle Gibbs with ancestor sampling.

    A sweep draws the trajectories by a conditional particle filter, :math:`z' \sim K_\theta(z,
    \cdot)`, which leaves :math:`p(z \mid x, \theta)` invariant for any number of particles, and
    then moves the parameters by random-walk Metropolis steps on :math:`p(\theta)\, p(x, z' \mid
    \theta)`, or by the model's own draw.

    Parameters
    ----------
    model, y, priors, n_iter, n_chains, n_warmup, inputs, pooled, init, seed
        As in `pmmh`; the model's parameters must broadcast.
    n_particles : int
        For each chain and series; few are enough with ancestor sampling.
    n_moves : int
        Metropolis steps on the parameters in each sweep.
    ancestor_sampling : bool
        Whether the old trajectory draws new ancestors, without which it is hardly ever left at
        early steps; for Markov models.
    sample_parameters : callable, optional
        Exact draw of the parameters given states and observations, instead of Metropolis steps:
        ``sample_parameters(z, x, generator)`` with z (chain, series, time, state) and x (series,
        time, dim), both NaN beyond a series' end and x where it is missing; it returns values
        (chain, \*shape) of every parameter. With ``pooled=False`` chains and series are one axis
        `chain`, and both arguments have one series for each entry of it.
    n_trajectories : int
        Trajectories kept of each chain, evenly spaced.
    resampler : str
        One that has a conditional version.
    threshold : float
        As in `SMCOptions`; every step resamples by default.
    **options
        Other options of `SMCOptions`, such as ``proposal=``.

    Returns
    -------
    ParameterPosterior
        With `states`; its `log_likelihood` is :math:`\log p(x, z \mid \theta)`, and its
        `accept_rate` that of the moves of the parameters.

    Raises
    ------
    ValueError
        As `pmmh`; for a model with a memory besides z, unless ``ancestor_sampling=False``.

    Examples
    --------
    >>> import torch, seqdgm as sq
    >>> from torch.distributions import Normal, Uniform
    >>> class Noisy(sq.StateSpaceModel):
    ...     latent_dim, rho = 1, 0.5
    ...     def initial(self, u): return Normal(torch.zeros(1), 1.0)
    ...     def transition(self, z, u): return Normal(self.rho * z, 1.0)
    ...     def emission(self, z, u): return Normal(z, 0.5)
    >>> y = Noisy().sample(8, seed=0)
    >>> found = particle_gibbs(Noisy(), y, {"rho": Uniform(-1, 1)}, n_iter=10, seed=1)
    >>> found.draws["rho"].shape, found.states.shape
    ((4, 10), (4, 10, 1, 8, 1))
    """
    warmup = read_counts(n_iter, n_chains, n_particles, n_warmup)
    check_count("n_moves", n_moves)
    check_count("n_trajectories", n_trajectories)
    chains = Chains.of(model, y, priors, inputs, n_chains, pooled=pooled)
    generator = make_generator(seed, chains.batch.x.device)
    chains.check(None, generator)
    how = SMCOptions(n_particles, resampler, threshold, **options)
    paths = _Trajectories(chains, how, ancestor_sampling, generator)
    free, _ = chains.start(init, paths.begin, generator)
    moves = _Moves(chains, free, generator, n_moves, sample_parameters)
    wanted = np.unique(np.linspace(0, n_iter - 1, min(n_trajectories, n_iter)).astype(int))
    kept: list[tuple[Tensor, Tensor]] = []
    states = []
    rate = free.new_zeros(len(free))
    for step in range(-warmup, n_iter):
        # The filter runs under the draw of the parameters that the chain stands at.
        z = paths.sweep(moves.values)
        level, share = moves.sweep(z, adapt=step < 0)
        if step < 0:
            continue
        rate += share / n_iter
        kept.append((moves.free, level))
        if step in wanted:
            states.append(paths.visible)
    found = torch.stack(states, 1).cpu().numpy()
    return collect(chains, kept, rate, "complete data", states=found, state_draws=wanted)


class _Trajectories:
    """One trajectory of the states for every chain and series."""

    def __init__(
        self,
        chains: Chains,
        how: SMCOptions,
        ancestor_sampling: bool,
        generator: torch.Generator,
    ) -> None:
        self._chains, self._how, self._generator = chains, how, generator
        self._ancestor_sampling = ancestor_sampling
        self.z: Tensor | None = None

    def begin(self, values: Values) -> Float[Tensor, "vector"]:
        """Draw first trajectories by a plain filter, and return the evidence."""
        return self._run(values, replace(self._how, collapse="zero"))

    def sweep(self, values: Values) -> Float[Tensor, "row time state"]:
        """Draw new trajectories given the old ones."""
        assert self.z is not None
        self._run(values, replace(self._how, reference=Reference(self.z, self._ancestor_sampling)))
        return self.z

    @property
    def visible(self) -> Float[Tensor, "chain series time state"]:
        """The trajectories, NaN beyond the end of a series."""
        assert self.z is not None
        z = self.z.masked_fill(~self._chains.rows.valid[..., None], torch.nan)
        return z.unflatten(0, (self._chains.n_chains, -1))

    def _run(self, values: Values, how: SMCOptions) -> Float[Tensor, "vector"]:
        chains = self._chains
        model = chains.with_values(values)
        history = History(model)
        out = smc.run(model, chains.rows, how, self._generator, (history,))
        paths = history.genealogy(chains.rows, 1, self._generator)
        self.z = history.along(paths, "z")[:, 0]
        return chains.total(out.increments.sum(1))


class _Moves:
    """The parameters given the states."""

    def __init__(
        self,
        chains: Chains,
        free: Float[Tensor, "vector size"],
        generator: torch.Generator,
        n_moves: int,
        sampler: ParameterSampler | None,
    ) -> None:
        self._chains, self._generator = chains, generator
        self._n_moves, self._sampler = n_moves, sampler
        self._walk = RandomWalk(chains.n_groups, spread(chains, generator))
        self.free = free
        self.values: Values = chains.space.constrain(free)

    def sweep(
        self, z: Float[Tensor, "row time state"], *, adapt: bool
    ) -> tuple[Float[Tensor, "vector"], Float[Tensor, "vector"]]:
        """Move the parameters; return log p(x, z | parameters) and the share of moves accepted."""
        chains, space, generator = self._chains, self._chains.space, self._generator
        if self._sampler is not None:
            self._draw(z)
            return self._joint(self.values, z), torch.ones_like(self.free[:, 0])
        level = self._joint(self.values, z)
        density = level + space.log_prior(self.values) + space.log_jacobian(self.free)
        share = torch.zeros_like(level)
        for _ in range(self._n_moves):
            new_free = self._walk.propose(self.free, generator)
            new = space.constrain(new_free)
            log_prior, log_jacobian = space.log_prior(new), space.log_jacobian(new_free)
            inside = torch.isfinite(log_prior) & torch.isfinite(log_jacobian)
            new = choose(inside, new, self.values)
            new_level = self._joint(new, z)
            ratio = new_level + log_prior + log_jacobian - density
            taken, chance = accept(torch.where(inside, ratio, -torch.inf), generator)
            self.free = torch.where(taken[:, None], new_free, self.free)
            self.values = choose(taken, new, self.values)
            level = torch.where(taken, new_level, level)
            density = torch.where(taken, new_level + log_prior + log_jacobian, density)
            share += taken / self._n_moves
            if adapt:
                self._walk.adapt(self.free, chance)
        assert len(share) == chains.n_vectors
        return level, share

    def _joint(self, values: Values, z: Tensor) -> Float[Tensor, "vector"]:
        chains = self._chains
        return chains.total(log_joint(chains.with_values(values), chains.rows, z))

    def _draw(self, z: Float[Tensor, "row time state"]) -> None:
        """Take over what the caller's own sampler draws."""
        assert self._sampler is not None
        chains = self._chains
        batch = chains.batch if chains.pooled else chains.rows
        x = torch.where(batch.mask, batch.x, torch.nan)
        shown = z.masked_fill(~chains.rows.valid[..., None], torch.nan)
        shown = shown.unflatten(0, (chains.n_vectors, -1))
        values = dict(self._sampler(shown, x if chains.pooled else x[:, None], self._generator))
        held = self.values
        for name, value in held.items():
            if name not in values or values[name].shape != value.shape:
                found = None if name not in values else tuple(values[name].shape)
                raise ValueError(
                    f"sample_parameters returned {found} for {name!r}; it must return values of "
                    f"shape {tuple(value.shape)} of every parameter"
                )
        values = {name: values[name].to(value) for name, value in held.items()}
        free = chains.space.unconstrain(values)
        if not bool(torch.isfinite(free).all()):
            raise ValueError("sample_parameters returned a value outside the support of its prior")
        self.values, self.free = values, free


@torch.no_grad()
def log_joint(
    model: StateSpaceModel, batch: Batch, z: Float[Tensor, "series time state"]
) -> Float[Tensor, "series"]:
    r"""Log-density of states and observations, :math:`\log p(z_{1:T}, x_{1:T})`.

    Parameters
    ----------
    model : StateSpaceModel
        Parameters may have an axis of series (`substitute`).
    batch : Batch
        What is missing is integrated out; a model that feeds observations back needs all of them.
    z : Tensor of shape (series, time, state)
        Not counted beyond a series' end.

    Returns
    -------
    Tensor of shape (series,), float64
    """
    n, steps = batch.mask.shape[:2]
    mask = None if batch.complete else batch.mask
    if not model.markov:
        terms = torch.stack(_joint_terms(model, batch, z), 1)
        return torch.where(batch.valid, terms, 0.0).sum(1)
    u = batch.inputs_all()
    first = model.prior(None, Inputs(u.values[:, :1], u.t[:1]))
    assert first is not None
    width = model.latent_dim
    terms = dist.log_prob(model.emission(z, u), batch.x, mask).double().expand(n, steps).clone()
    terms[:, :1] += dist.log_prob(dist.expand(first, (n, 1), width), z[:, :1])
    if steps > 1:
        later = model.prior(z[:, :-1], Inputs(u.values[:, 1:], u.t[1:]))
        assert later is not None
        terms[:, 1:] += dist.log_prob(dist.expand(later, (n, steps - 1), width), z[:, 1:])
    return torch.where(batch.valid, terms, 0.0).sum(1)


def _joint_terms(
    model: StateSpaceModel, batch: Batch, z: Float[Tensor, "series time state"]
) -> list[Float[Tensor, "series"]]:
    """Terms of `log_joint` step by step, for a model with a memory."""
    n, dim = len(z), batch.x.shape[2]
    s, terms = model.start((n, 1)), []
    for t in range(batch.n_steps):
        u = batch.inputs_at(t, 1)
        last = batch.x[:, t - 1, None] if t else batch.x.new_zeros(n, 1, dim)
        h = model.advance(s, model.embed(last) if model.feedback else None, u)
        prior = model.prior(h, u)
        assert prior is not None
        now = z[:, t, None]
        term = dist.log_prob(dist.expand(prior, (n, 1), model.latent_dim), now).double()
        s = model.absorb(h, now)
        emission = model.emission(s, u)
        seen = dist.log_prob(emission, batch.x[:, t, None], batch.mask[:, t, None])
        terms.append((term + seen)[:, 0])
    return terms
