"""Particle marginal Metropolis-Hastings: posteriors of the parameters of a state-space model.

A Metropolis-Hastings chain on the parameters whose likelihood is an unbiased estimate by particles:
with all random numbers as part of its state it leaves the exact posterior invariant, however few
the particles. All chains, and all series of a panel, are one batch.

References
----------
Andrieu, Doucet and Holenstein (2010), Particle Markov chain Monte Carlo methods, *JRSS B* 72;
Deligiannidis, Doucet and Pitt (2018), The correlated pseudomarginal method, *JRSS B* 80.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference.chains import Chains, Likelihood, choose
from seqdgm.inference.correlated import Noise, check_correlated, correlated_log_prob
from seqdgm.inference.parameters import Values
from seqdgm.inference.posterior import ParameterPosterior
from seqdgm.inference.random_walk import RandomWalk, accept
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import check_count, make_generator


def pmmh(
    model: StateSpaceModel,
    y: Any,
    priors: Mapping[str, Distribution],
    *,
    n_iter: int,
    n_chains: int = 4,
    n_particles: int = 200,
    n_warmup: int | None = None,
    inputs: Any = None,
    method: str = "auto",
    correlated: bool | float = False,
    pooled: bool = True,
    batched: bool = True,
    init: Mapping[str, Any] | None = None,
    seed: int | torch.Generator | None = None,
    **options: Any,
) -> ParameterPosterior:
    r"""Posterior of parameters by particle marginal Metropolis-Hastings.

    .. math:: \alpha = \min \left( 1, \frac{\hat p(x \mid \theta')\, p(\theta')}
        {\hat p(x \mid \theta)\, p(\theta)} \right)

    with adaptive random-walk proposals in unconstrained coordinates (`RandomWalk`), which adapt
    during the warm-up only. Where the model has an exact likelihood it is used, and this is plain
    Metropolis-Hastings.

    Parameters
    ----------
    model : StateSpaceModel
        Its parameters must broadcast with ``(series, particle, dim)``; see `substitute`.
    y : array_like
        Data; the series of a panel share the parameters and their log-likelihoods add up.
    priors : mapping of str to torch.distributions.Distribution
        Prior of each parameter that is unknown, by attribute name; the rest is fixed. A parameter
        of a shape needs a prior over that shape. The support of the prior is that of the parameter.
    n_iter : int
        Draws kept of each chain.
    n_chains : int
    n_particles : int
        For each chain and series. The standard deviation of the log-likelihood's estimate, summed
        over series, should be between 1 and 1.8 (Doucet, Pitt, Deligiannidis and Kohn 2015).
    n_warmup : int, optional
        Iterations before those, in which proposals adapt; default half of `n_iter`.
    inputs : array_like, optional
        Known covariates.
    method : str
        Engine of the likelihood: ``"kalman"``, ``"particle"``; ``"auto"`` takes the most exact.
    correlated : bool or float
        Keep the random numbers of the filter from one iteration to the next and refresh them a
        little, :math:`e' = \rho e + \sqrt{1 - \rho^2}\, \xi`, so that errors of the two estimates
        cancel; a number is :math:`\rho` (True: 0.99). For states with a Gaussian prior,
        independent over their dimensions; see `seqdgm.inference.correlated`.
    pooled : bool
        False: every series has parameters and a posterior of its own (still one batch).
    batched : bool
        False runs one chain after the other, for models whose parameters do not broadcast.
    init : mapping of str to array_like, optional
        Starts, one value for all chains or one for each; default draws from the prior.
    seed : int or torch.Generator, optional
    **options
        Options of the engine's ``log_prob``, such as ``threshold=`` and ``proposal=``.

    Returns
    -------
    ParameterPosterior

    Raises
    ------
    ValueError
        For priors or starts that do not fit the model, functions of the model that do not take
        several values of the parameters at once, or an estimate that is not a number. A value under
        which no particle survives is rejected.

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
    >>> found = pmmh(Noisy(), y, {"rho": Uniform(-1, 1)}, n_iter=10, n_particles=20, seed=1)
    >>> found.draws["rho"].shape
    (4, 10)
    """
    warmup = read_counts(n_iter, n_chains, n_particles, n_warmup)
    chains = Chains.of(model, y, priors, inputs, n_chains, pooled=pooled, batched=batched)
    generator = make_generator(seed, chains.batch.x.device)
    if correlated:
        rho = 0.99 if correlated is True else float(correlated)
        settings = options if method == "auto" else {"method": method, **options}
        target: _Plain | _Correlated = _Correlated(chains, n_particles, generator, rho, settings)
    else:
        target = _Plain(chains, Likelihood(model, method, n_particles, generator, options))
    chains.check(target.exact, generator)
    free, level = chains.start(init, target.begin, generator)
    walk = RandomWalk(chains.n_groups, spread(chains, generator))
    space = chains.space
    values = space.constrain(free)
    density = space.log_prior(values) + space.log_jacobian(free)
    kept: list[tuple[Tensor, Tensor]] = []
    accepted = torch.zeros_like(level)
    for step in range(warmup + n_iter):
        new_free = walk.propose(free, generator)
        new = space.constrain(new_free)
        inside = torch.isfinite(space.log_prior(new)) & torch.isfinite(space.log_jacobian(new_free))
        new, new_free = choose(inside, new, values), torch.where(inside[:, None], new_free, free)
        new_density = space.log_prior(new) + space.log_jacobian(new_free)
        new_level = target.propose(new)
        ratio = torch.where(inside, new_level + new_density - level - density, -torch.inf)
        taken, chance = accept(ratio, generator)
        target.settle(taken)
        free = torch.where(taken[:, None], new_free, free)
        values = choose(taken, new, values)
        level = torch.where(taken, new_level, level)
        density = torch.where(taken, new_density, density)
        if step < warmup:
            walk.adapt(free, chance)
        else:
            accepted += taken
            kept.append((free, level))
    return collect(chains, kept, accepted / n_iter, target.kind)


def spread(chains: Chains, generator: torch.Generator) -> Float[Tensor, "size"]:
    """Standard deviations of the prior in unconstrained coordinates, by its quartiles."""
    free = chains.space.unconstrain(chains.space.sample(1000, generator))
    low, high = torch.quantile(free, free.new_tensor([0.25, 0.75]), dim=0)
    return (high - low) / 1.349


def collect(
    chains: Chains,
    kept: list[tuple[Float[Tensor, "vector size"], Float[Tensor, "vector"]]],
    rate: Float[Tensor, "vector"],
    kind: str,
    **more: Any,
) -> ParameterPosterior:
    """The result of draws (free coordinates, log-likelihood in model units), one entry a draw."""
    free, level = torch.stack([f for f, _ in kept]), torch.stack([v for _, v in kept])
    values = chains.space.constrain(free.flatten(0, 1))
    prior = chains.space.log_prior(values)

    def arranged(value: Tensor) -> np.ndarray:
        # (draw, chain and group, ...) to (chain, draw, group, ...), without a group for a panel.
        parts = value.unflatten(0, (len(kept), chains.n_chains, chains.n_groups)).transpose(0, 1)
        held: np.ndarray = (parts[:, :, 0] if chains.pooled else parts).contiguous().cpu().numpy()
        return held

    level = level + chains.log_jacobian
    return ParameterPosterior(
        draws={name: arranged(value) for name, value in values.items()},
        log_likelihood=arranged(level.flatten()),
        kind=kind,
        log_prior=arranged(prior),
        accept_rate=arranged(rate.repeat(len(kept)))[:, 0],
        chains=chains,
        **more,
    )


class _Plain:
    """The likelihood of an engine, drawn anew at every proposal."""

    def __init__(self, chains: Chains, likelihood: Likelihood) -> None:
        self._chains, self._likelihood = chains, likelihood
        # An exact engine is checked as a whole, the functions of the model one by one.
        self.exact = None if likelihood.by_particles else likelihood

    @property
    def kind(self) -> str:
        return self._likelihood.kind

    def begin(self, values: Values) -> Float[Tensor, "vector"]:
        return self._chains.evidence(values, self._likelihood)

    propose = begin

    def settle(self, taken: Bool[Tensor, "vector"]) -> None:
        """Nothing is kept."""


class _Correlated:
    """The estimate of the correlated filter, whose random numbers are part of the chain."""

    exact = None
    kind = "estimate"

    def __init__(
        self,
        chains: Chains,
        n_particles: int,
        generator: torch.Generator,
        rho: float,
        settings: Mapping[str, Any],
    ) -> None:
        if not 0 < rho < 1:
            raise ValueError(f"correlated={rho!r} must be True, or a correlation between 0 and 1")
        if settings:
            raise ValueError(
                f"correlated=True is a bootstrap filter of its own, without {sorted(settings)}"
            )
        if not chains.batched:
            raise ValueError("correlated=True runs all chains at once; leave batched=False out")
        check_correlated(chains.model, chains.batch)
        self._chains, self._count, self._rho = chains, n_particles, rho
        self._generator = generator
        self._noise = self._new = Noise.draw(
            chains.rows, n_particles, generator, chains.model.latent_dim
        )

    def begin(self, values: Values) -> Float[Tensor, "vector"]:
        rows, width = self._chains.rows, self._chains.model.latent_dim
        self._noise = Noise.draw(rows, self._count, self._generator, width)
        return self._score(values, self._noise)

    def propose(self, values: Values) -> Float[Tensor, "vector"]:
        self._new = self._noise.refresh(self._rho, self._generator)
        return self._score(values, self._new)

    def settle(self, taken: Bool[Tensor, "vector"]) -> None:
        self._noise = self._new.choose(self._chains.to_rows(taken), self._noise)

    def _score(self, values: Values, noise: Noise) -> Float[Tensor, "vector"]:
        chains = self._chains
        model = chains.with_values(values)
        return chains.total(correlated_log_prob(model, chains.rows, noise))


def read_counts(n_iter: int, n_chains: int, n_particles: int, n_warmup: int | None) -> int:
    """Check the counts, and return the length of the warm-up."""
    counts = {"n_iter": n_iter, "n_chains": n_chains, "n_particles": n_particles}
    for name, value in counts.items():
        check_count(name, value)
    if n_warmup is None:
        return n_iter // 2
    if n_warmup != 0:
        check_count("n_warmup", n_warmup)
    return n_warmup
