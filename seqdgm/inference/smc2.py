r"""SMC^2: parameters and states filtered together, as observations come in.

A population of parameter values is reweighted at every step by the estimates
:math:`\hat p(x_t \mid x_{1:t-1}, \theta)` of one particle filter each. When the effective sample
size of the population falls, it is resampled and moved by particle marginal Metropolis-Hastings on
the data so far; when too few of these moves are accepted, the filters get twice as many particles.

References
----------
Chopin, Jacob and Papaspiliopoulos (2013), SMC^2: an efficient algorithm for sequential analysis of
state-space models, *JRSS B* 75.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference import smc
from seqdgm.inference.chains import Chains, choose
from seqdgm.inference.parameters import Values
from seqdgm.inference.pmcmc import collect
from seqdgm.inference.posterior import ParameterPosterior
from seqdgm.inference.random_walk import accept
from seqdgm.inference.resampling import effective_sample_size, normalise, systematic
from seqdgm.inference.smc import Cloud, SMCOptions
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import check_count, make_generator, tree_map

LEAST_ACCEPTED = 0.1  # share of moves accepted below which the filters get more particles


def smc2(
    model: StateSpaceModel,
    y: Any,
    priors: Mapping[str, Distribution],
    *,
    n_theta: int = 500,
    n_particles: int = 100,
    n_moves: int = 3,
    theta_threshold: float = 0.5,
    max_particles: int = 10_000,
    inputs: Any = None,
    seed: int | torch.Generator | None = None,
    **options: Any,
) -> ParameterPosterior:
    r"""Posterior of parameters and evidence of the model by SMC^2.

    .. math:: \hat p(x_{1:T}) = \prod_t \sum_m W_{t-1}^m\, \hat p(x_t \mid x_{1:t-1}, \theta^m)

    Parameters
    ----------
    model, y, priors, inputs, seed
        As in `seqdgm.inference.pmcmc.pmmh`; the series of a panel share the parameters, and their
        steps count as made at the same time. The model's parameters must broadcast.
    n_theta : int
        Values of the parameters.
    n_particles : int
        For each of them and each series, to begin with.
    n_moves : int
        Metropolis-Hastings moves of each value at a rejuvenation, with random-walk proposals scaled
        by the covariance of the population.
    theta_threshold : float
        Rejuvenate when the effective sample size of the population falls below this share.
    max_particles : int
        The number of particles is not doubled beyond it.
    **options
        Options of `SMCOptions`, such as ``proposal=``.

    Returns
    -------
    ParameterPosterior
        One chain of `n_theta` equally weighted draws, with `log_evidence` in nats and in the data's
        own units. The draws after the last rejuvenation are not a Markov chain: their effective
        sample size by autocorrelation says nothing.

    Raises
    ------
    ValueError
        If the model does not take several values of its parameters at once, or all values drawn
        from the prior give the data likelihood zero.

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
    >>> found = smc2(Noisy(), y, {"rho": Uniform(-1, 1)}, n_theta=50, n_particles=20, seed=1)
    >>> found.draws["rho"].shape
    (1, 50)
    """
    counts = {"n_theta": n_theta, "n_particles": n_particles, "n_moves": n_moves}
    for name, value in counts.items():
        check_count(name, value)
    if not 0 <= theta_threshold <= 1:
        raise ValueError(f"theta_threshold={theta_threshold!r} must lie between 0 and 1")
    chains = Chains.of(model, y, priors, inputs, n_theta)
    generator = make_generator(seed, chains.batch.x.device)
    chains.check(None, generator)
    how = SMCOptions(n_particles, collapse="zero", **options)
    population = _Population(chains, how, generator)
    for t in range(chains.batch.n_steps):
        population.step(t)
        low = population.ess < theta_threshold * n_theta
        if low or t == chains.batch.n_steps - 1:
            population.resample()
            rate = population.move(n_moves)
            if rate < LEAST_ACCEPTED and 2 * population.n_particles <= max_particles:
                population.double()
    population.resample()
    jacobian = float(chains.log_jacobian[0])
    draws = [(row[None], level[None]) for row, level in zip(*population.draws, strict=True)]
    return collect(
        replace(chains, n_chains=1),
        draws,
        torch.tensor([population.accept_rate]),
        "estimate",
        log_evidence=population.log_evidence + jacobian,
    )


class _Population:
    """Weighted values of the parameters, each with a particle filter."""

    def __init__(self, chains: Chains, how: SMCOptions, generator: torch.Generator) -> None:
        self._chains, self._how, self._generator = chains, how, generator
        self._values: Values = chains.space.sample(chains.n_vectors, generator)
        self._free = chains.space.unconstrain(self._values)
        self._log_weights = self._free.new_full((len(self._free),), -math.log(len(self._free)))
        self._level = torch.zeros_like(self._log_weights)
        self._cloud: Cloud | None = None
        self.log_evidence = 0.0
        self.accept_rate = math.nan

    @property
    def n_particles(self) -> int:
        """Particles of each filter."""
        return self._how.n_particles

    @property
    def ess(self) -> float:
        """Effective sample size of the values."""
        return float(effective_sample_size(self._log_weights[None])[0])

    @property
    def draws(self) -> tuple[Tensor, Tensor]:
        """Free coordinates and log-likelihoods, where all weights are equal."""
        return self._free, self._level

    def step(self, t: int) -> None:
        """Take in the observations of one step."""
        increment, self._cloud = self._filter(self._values, self._cloud, t + 1)
        self._reweigh(increment, f"at step {t}")
        self._level = self._level + increment

    def resample(self) -> None:
        """Draw values by weight; their filters go with them."""
        pick = systematic(self._log_weights[None], self._generator).ancestors[0]
        self._values = {name: value[pick] for name, value in self._values.items()}
        self._free, self._level = self._free[pick], self._level[pick]
        rows = self._rows_of(pick)
        assert self._cloud is not None
        self._cloud = _map_cloud(lambda leaf: leaf[rows], self._cloud)
        self._log_weights = torch.full_like(self._log_weights, -math.log(len(pick)))

    def move(self, times: int) -> float:
        """Metropolis-Hastings moves of all values on the data so far; the share accepted."""
        space, generator = self._chains.space, self._generator
        size = self._free.shape[1]
        spread = torch.cov(self._free.T).reshape(size, size)
        scale = spread.diagonal().clamp_min(1e-12)
        factor = torch.linalg.cholesky(spread + torch.diag(1e-6 * scale))
        accepted = 0.0
        assert self._cloud is not None
        stop = len(self._cloud.increments)
        for _ in range(times):
            noise = torch.randn(
                self._free.shape, generator=generator, dtype=scale.dtype, device=scale.device
            )
            new_free = self._free + (2.38 / math.sqrt(size)) * noise @ factor.T
            new = space.constrain(new_free)
            density = space.log_prior(new) + space.log_jacobian(new_free)
            inside = torch.isfinite(density)
            new = choose(inside, new, self._values)
            level, cloud = self._filter(new, None, stop)
            old = space.log_prior(self._values) + space.log_jacobian(self._free)
            ratio = torch.where(inside, level + density - self._level - old, -torch.inf)
            taken, _ = accept(ratio, generator)
            self._values = choose(taken, new, self._values)
            self._free = torch.where(taken[:, None], new_free, self._free)
            self._level = torch.where(taken, level, self._level)
            self._cloud = _merge(self._rows_of(taken), cloud, self._cloud)
            accepted += float(taken.double().mean()) / times
        self.accept_rate = accepted
        return accepted

    def double(self) -> None:
        """Give every filter twice the particles, weighting by the ratio of the two estimates."""
        assert self._cloud is not None
        self._how = replace(self._how, n_particles=2 * self._how.n_particles)
        level, self._cloud = self._filter(self._values, None, len(self._cloud.increments))
        self._reweigh(level - self._level, "with more particles")
        self._level = level

    def _filter(
        self, values: Values, cloud: Cloud | None, stop: int
    ) -> tuple[Float[Tensor, "vector"], Cloud]:
        """Run the filters up to a step; the evidence of the steps that were run."""
        chains = self._chains
        first = 0 if cloud is None else len(cloud.increments)
        out = smc.run(
            chains.with_values(values),
            chains.rows,
            self._how,
            self._generator,
            cloud=cloud,
            stop=stop,
        )
        return chains.total(out.increments[:, first:].sum(1)), out.cloud

    def _reweigh(self, increment: Float[Tensor, "vector"], when: str) -> None:
        weights, total = normalise((self._log_weights + increment)[None])
        if not math.isfinite(float(total)):
            raise ValueError(
                f"every value of the parameters gives the data likelihood zero {when}; use priors "
                "nearer to plausible values, a larger n_theta or more particles"
            )
        self._log_weights = weights[0]
        self.log_evidence += float(total)

    def _rows_of(self, entry: Tensor) -> Tensor:
        """Rows of the batch (or a choice of them) for values (or a choice of them)."""
        n = self._chains.batch.n_series
        if entry.dtype == torch.bool:
            return entry.repeat_interleave(n)
        series = torch.arange(n, device=entry.device)
        return (entry[:, None] * n + series).flatten()


def _map_cloud(f: Any, cloud: Cloud) -> Cloud:
    return Cloud(
        tree_map(f, cloud.s),
        None if cloud.x is None else f(cloud.x),
        f(cloud.log_weights),
        f(cloud.eve),
        f(cloud.resamplings),
        [f(step) for step in cloud.increments],
        [f(step) for step in cloud.ess],
    )


def _merge(rows: Bool[Tensor, "row"], new: Cloud, old: Cloud) -> Cloud:
    """The new filter of the rows that moved, the old one of the others."""
    index = torch.nonzero(rows)[:, 0]

    def put(theirs: Tensor, ours: Tensor) -> Tensor:
        # A leaf that does not depend on the row may have an axis of length one.
        full = ours.expand(len(rows), *ours.shape[1:]).clone()
        full[index] = theirs.expand(len(rows), *theirs.shape[1:])[index]
        return full

    return Cloud(
        _zip_map(put, new.s, old.s),
        None if new.x is None or old.x is None else put(new.x, old.x),
        put(new.log_weights, old.log_weights),
        put(new.eve, old.eve),
        put(new.resamplings, old.resamplings),
        [put(a, b) for a, b in zip(new.increments, old.increments, strict=True)],
        [put(a, b) for a, b in zip(new.ess, old.ess, strict=True)],
    )


def _zip_map(f: Any, a: Any, b: Any) -> Any:
    if a is None:
        return None
    if isinstance(a, Tensor):
        return f(a, b)
    merged = [_zip_map(f, p, q) for p, q in zip(a, b, strict=True)]
    return type(a)(*merged) if hasattr(a, "_fields") else tuple(merged)
