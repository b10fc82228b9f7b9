r"""Parameter posteriors of models that can only be simulated (approximate Bayesian computation).

From whole series: the posterior of parameters whose simulated data come as close to the data as a
tolerance, :math:`p(\theta \mid d(S(x), S(\hat x)) \le \varepsilon)`, by a population that moves
down through tolerances (`abc` with ``method="smc"``). Step by step: particle marginal
Metropolis-Hastings with the filter of `seqdgm.inference.abc` (``method="pmmh"``).

References
----------
Toni, Welch, Strelkowa, Ipsen and Stumpf (2009), *J. R. Soc. Interface* 6; Drovandi and Pettitt
(2011), Estimation of parameters for macroparasite population evolution using approximate Bayesian
computation, *Biometrics* 67; Del Moral, Doucet and Jasra (2012), An adaptive sequential Monte Carlo
method for approximate Bayesian computation, *Statistics and Computing* 22; Jasra, Lee, Yau and
Zhang (2013), Alive particle filters, arXiv:1304.0151 (ABC-PMMH); Prangle (2017), Adapting the ABC
distance function, *Bayesian Analysis* 12 (scales).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference.chains import Chains
from seqdgm.inference.parameters import substitute
from seqdgm.inference.particle import simulate
from seqdgm.inference.pmcmc import collect, pmmh
from seqdgm.inference.posterior import ParameterPosterior
from seqdgm.inference.random_walk import accept
from seqdgm.inference.resampling import effective_sample_size, normalise, systematic
from seqdgm.types import check_count, make_generator

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

# Simulated data sets (simulation, series, time, dim) to summaries (simulation, summary).
Summary = Callable[[Tensor], Tensor]
# Summaries (simulation, summary) and those of the data (summary,) to distances (simulation,).
Distance = Callable[[Tensor, Tensor], Tensor]
HALVINGS = 50  # of the bracket of the next tolerance
STUCK = 0.1  # share of the population that may not have moved after the moves of a round
MAX_MOVES = 30


@dataclass(frozen=True)
class ABCPosterior(ParameterPosterior):
    """Draws from an ABC posterior, as one chain of exchangeable draws.

    The attribute `log_likelihood` holds the logarithm of the share of simulated data sets within
    the tolerance.

    Attributes
    ----------
    tolerance : float
        Distance that was reached.
    tolerances : ndarray of shape (round,)
        On the way down to it.
    n_simulated : int
        Simulated data sets.
    """

    tolerance: float = math.nan
    tolerances: np.ndarray | None = None
    n_simulated: int = 0


def abc(
    model: StateSpaceModel,
    y: Any,
    priors: Mapping[str, Distribution],
    *,
    method: Literal["smc", "pmmh"] = "smc",
    n_particles: int = 1000,
    tolerance: Any = None,
    inputs: Any = None,
    seed: int | torch.Generator | None = None,
    **options: Any,
) -> ParameterPosterior:
    r"""Posterior of the parameters of a model that can be simulated.

    Parameters
    ----------
    model : StateSpaceModel
        Its parameters must broadcast with ``(series, particle, dim)``; see `substitute`.
    y : array_like
        Data; the series of a panel share the parameters.
    priors : mapping of str to torch.distributions.Distribution
        By attribute name, as in `seqdgm.inference.pmcmc.pmmh`.
    method : {"smc", "pmmh"}
        ``"smc"`` compares whole simulated series with the data. ``"pmmh"`` runs Metropolis-Hastings
        with the likelihood of the ABC filter, which follows the data step by step and so affords
        much smaller tolerances for long series.
    n_particles : int
        ``"smc"``: draws of the parameters. ``"pmmh"``: particles of the filter.
    tolerance : float, optional
        ``"smc"``: distance at which to stop; default as far down as moves are accepted.
        ``"pmmh"``: that of the filter (required, and fixed: an adaptive one leaves no posterior
        invariant).
    inputs : array_like, optional
        Known covariates.
    seed : int or torch.Generator, optional
    **options
        ``"smc"``: `summary`, `distance`, `n_simulations`, `keep`, `min_accept`, `max_rounds` of
        `population`. ``"pmmh"``: those of `seqdgm.inference.pmcmc.pmmh`, and `kernel`.

    Returns
    -------
    ABCPosterior or ParameterPosterior

    Raises
    ------
    ValueError
        For priors that do not fit the model, or where no simulation has a finite distance.

    Examples
    --------
    >>> import torch, seqdgm as sq
    >>> from torch.distributions import Normal, Uniform
    >>> class Noisy(sq.StateSpaceModel):
    ...     latent_dim, rho = 1, 0.5
    ...     def initial(self, u): return Normal(torch.zeros(1), 1.0)
    ...     def transition(self, z, u): return Normal(self.rho * z, 1.0)
    ...     def emission(self, z, u): return Normal(z, 0.5)
    >>> y = Noisy().sample(30, seed=0)
    >>> def lagged(x):
    ...     return (x[:, :, 1:] * x[:, :, :-1]).mean((1, 2))
    >>> prior = {"rho": Uniform(-1, 1)}
    >>> found = abc(Noisy(), y, prior, n_particles=100, summary=lagged, max_rounds=3, seed=1)
    >>> found.draws["rho"].shape
    (1, 100)
    """
    if method == "pmmh":
        if not isinstance(tolerance, float | int | tuple):
            raise ValueError(
                f"tolerance={tolerance!r}: method='pmmh' needs a number, or one for each element"
            )
        return pmmh(
            model,
            y,
            priors,
            method="abc",
            n_particles=n_particles,
            tolerance=tolerance,
            inputs=inputs,
            seed=seed,
            **options,
        )
    if method != "smc":
        raise ValueError(f"there is no method {method!r}; choose 'smc' or 'pmmh'")
    return population(
        model,
        y,
        priors,
        n_draws=n_particles,
        tolerance=tolerance,
        inputs=inputs,
        seed=seed,
        **options,
    )


def population(
    model: StateSpaceModel,
    y: Any,
    priors: Mapping[str, Distribution],
    *,
    n_draws: int = 1000,
    tolerance: float | None = None,
    summary: Summary | None = None,
    distance: Distance | None = None,
    n_simulations: int = 1,
    keep: float = 0.5,
    min_accept: float = 0.02,
    max_rounds: int = 100,
    inputs: Any = None,
    seed: int | torch.Generator | None = None,
) -> ABCPosterior:
    r"""ABC by sequential Monte Carlo over parameters, with adaptive tolerances.

    Each round lowers the tolerance to where the effective sample size is `keep` of the population,
    resamples, and moves every draw by Metropolis-Hastings steps that leave the ABC posterior of the
    new tolerance invariant, until a tenth or less have stayed where they were.

    Parameters
    ----------
    model, y, priors, inputs, seed
        As in `abc`.
    n_draws : int
        Population.
    tolerance : float, optional
        Distance at which to stop.
    summary : callable, optional
        Simulated data sets (simulation, series, time, dim) in data units, NaN where the data are
        missing, to summaries (simulation, summary). Default all observed elements.
    distance : callable, optional
        Of summaries (simulation, summary) from those of the data (summary,). Default the root mean
        square of differences in units of the summary's median absolute deviation under the prior.
    n_simulations : int
        Data sets for each value of the parameters; more make moves more often accepted.
    keep : float
        Between 0 and 1.
    min_accept : float
        Stop when a smaller share of moves is accepted.
    max_rounds : int

    Returns
    -------
    ABCPosterior
    """
    for name, value in {"n_draws": n_draws, "n_simulations": n_simulations}.items():
        check_count(name, value)
    if not 0 < keep < 1:
        raise ValueError(f"keep={keep!r} must lie between 0 and 1")
    chains = Chains.of(model, y, priors, inputs, 1)
    generator = make_generator(seed, chains.batch.x.device)
    laboratory = _Laboratory(chains, summary, distance, n_simulations, generator)
    free = chains.space.unconstrain(chains.space.sample(n_draws, generator))
    d = laboratory.begin(free)
    eps, rate, moves = math.inf, 1.0, 1
    passed: list[float] = []
    while len(passed) < max_rounds and rate >= min_accept:
        lower = _next_tolerance(d, eps, keep, 0.0 if tolerance is None else tolerance)
        if lower >= eps:
            break
        log_w, _ = normalise(_hits(d, lower).log()[None] - _hits(d, eps).log()[None])
        chosen = systematic(log_w, generator).ancestors[0]
        free, d, eps = free[chosen], d[chosen], lower
        passed.append(eps)
        free, d, rate = _move(laboratory, free, d, eps, moves, generator)
        moves = min(MAX_MOVES, math.ceil(math.log(STUCK) / math.log1p(-min(max(rate, 0.01), 0.9))))
    order = torch.randperm(n_draws, generator=generator, device=free.device)
    level = (_hits(d, eps) / n_simulations).log() - chains.log_jacobian
    kept = [(free[k, None], level[k, None]) for k in order.tolist()]
    found = collect(chains, kept, level.new_tensor([rate]), "abc")
    held = {f.name: getattr(found, f.name) for f in fields(found)}
    return ABCPosterior(
        **held, tolerance=eps, tolerances=np.array(passed), n_simulated=laboratory.count
    )


def _hits(d: Float[Tensor, "row simulation"], eps: float) -> Float[Tensor, "row"]:
    """Simulations of each draw within the tolerance."""
    return (d <= eps).double().sum(1)


def _next_tolerance(
    d: Float[Tensor, "row simulation"], eps: float, keep: float, least: float
) -> float:
    """The smallest tolerance that keeps the share asked for, but lower than the last."""
    now = _hits(d, eps)

    def size(level: float) -> float:
        log_w, total = normalise((_hits(d, level) / now).log()[None])
        return float(effective_sample_size(log_w)) if math.isfinite(float(total)) else 0.0

    values = torch.unique(d[d <= eps])
    low, high = -1, len(values) - 1  # places of tolerances with too few and with enough
    for _ in range(HALVINGS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        enough = size(float(values[middle])) >= keep * len(d)
        low, high = (low, middle) if enough else (middle, high)
    if float(values[high]) >= eps and high > 0:
        high -= 1  # ties: fewer survive, but it goes down
    return max(float(values[high]), least)


def _move(
    laboratory: _Laboratory,
    free: Float[Tensor, "row size"],
    d: Float[Tensor, "row simulation"],
    eps: float,
    moves: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, float]:
    """Metropolis-Hastings steps with the spread of the population; the share accepted."""
    size = free.shape[1]
    centred = free - free.mean(0)
    cov = centred.mT @ centred / len(free)
    floor = 1e-12 * torch.diag(torch.diagonal(cov).clamp_min(1e-300))
    factor = 2.38 / math.sqrt(size) * torch.linalg.cholesky(cov + floor)
    density, hits, accepted = laboratory.density(free), _hits(d, eps), 0.0
    for _ in range(moves):
        noise = torch.randn(free.shape, generator=generator, dtype=free.dtype, device=free.device)
        new = free + noise @ factor.mT
        new_density = laboratory.density(new)
        inside = torch.isfinite(new_density)
        new = torch.where(inside[:, None], new, free)
        new_d = laboratory.run(new)
        new_hits = _hits(new_d, eps)
        ratio = torch.where(inside, new_density - density, -torch.inf)
        taken, _ = accept(ratio + new_hits.log() - hits.log(), generator)
        free = torch.where(taken[:, None], new, free)
        d = torch.where(taken[:, None], new_d, d)
        density, hits = torch.where(taken, new_density, density), torch.where(taken, new_hits, hits)
        accepted += float(taken.double().mean()) / moves
    return free, d, accepted


class _Laboratory:
    """Simulates data sets and tells how far they are from the data."""

    def __init__(
        self,
        chains: Chains,
        summary: Summary | None,
        distance: Distance | None,
        n_simulations: int,
        generator: torch.Generator,
    ) -> None:
        self.chains, self.count = chains, 0
        self._summary, self._distance = summary, distance
        self._times, self._generator = n_simulations, generator
        panel = chains.panel
        self._mask = torch.from_numpy(panel.mask.copy()).to(chains.batch.x.device)
        values = torch.from_numpy(panel.values.copy()).to(self._mask.device)
        self._observed = self._summarise(torch.where(self._mask, values, torch.nan)[None])[0]
        self._scale = torch.ones_like(self._observed)

    def begin(self, free: Float[Tensor, "row size"]) -> Float[Tensor, "row simulation"]:
        """Distances of a first population, from which the scales of the summaries come."""
        simulated = self._summaries(free)
        if self._distance is None:
            middle = simulated.nanquantile(0.5, 0)
            spread = 1.4826 * (simulated - middle).abs().nanquantile(0.5, 0)
            self._scale = torch.where(spread > 0, spread, 1.0)
        found = self._compare(simulated).view(len(free), self._times)
        if not bool(torch.isfinite(found).any()):
            raise ValueError(
                "no simulation from the prior has a finite distance from the data: check the "
                "summary, or use a narrower prior"
            )
        return found

    def run(self, free: Float[Tensor, "row size"]) -> Float[Tensor, "row simulation"]:
        """Distances of fresh simulations at each row's parameters."""
        return self._compare(self._summaries(free)).view(len(free), self._times)

    def density(self, free: Float[Tensor, "row size"]) -> Float[Tensor, "row"]:
        """Log of the prior in unconstrained coordinates; minus infinity where not finite."""
        space = self.chains.space
        found = space.log_prior(space.constrain(free)) + space.log_jacobian(free)
        return torch.where(torch.isfinite(found), found, -torch.inf)

    def _summaries(self, free: Float[Tensor, "row size"]) -> Float[Tensor, "simulation summary"]:
        batch, rows = self.chains.batch, len(free)
        values = {k: v.to(batch.x) for k, v in self.chains.space.constrain(free).items()}
        model = substitute(self.chains.model, values)
        series = batch.n_series
        u = batch.u[:, : batch.n_steps].repeat(self._times, 1, 1)[None]
        x = simulate(model, u, (rows, self._times * series), self._generator)
        self.count += rows * self._times
        x = x.unflatten(1, (self._times, series)).flatten(0, 1)
        x = self.chains.transform.inverse(x.transpose(0, 1).double()).transpose(0, 1)
        return self._summarise(torch.where(self._mask, x, torch.nan))

    def _summarise(
        self, x: Float[Tensor, "simulation series time dim"]
    ) -> Float[Tensor, "simulation summary"]:
        if self._summary is None:
            return x[:, self._mask]
        found = self._summary(x)
        if found.ndim != 2 or len(found) != len(x):
            raise ValueError(
                f"summary gives the shape {tuple(found.shape)} for {len(x)} data sets; it must be "
                "(simulation, summary)"
            )
        return found.double()

    def _compare(
        self, simulated: Float[Tensor, "simulation summary"]
    ) -> Float[Tensor, "simulation"]:
        if self._distance is not None:
            found = self._distance(simulated, self._observed)
        else:
            found = ((simulated - self._observed) / self._scale).square().mean(1).sqrt()
        return torch.where(found.isnan(), torch.inf, found)
