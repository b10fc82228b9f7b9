"""Draws from the posterior of parameters: diagnostics, tables, forecasts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.inference import convergence, find_verb
from seqdgm.inference.chains import Chains
from seqdgm.panel import Panel
from seqdgm.prepare import log_jacobian, prepare
from seqdgm.results import Forecast, LogProb, StatePosterior
from seqdgm.transform import Transform
from seqdgm.types import Batch, Prediction, Samples, check_count, draw_seed, make_generator

Array = np.ndarray


@dataclass(frozen=True)
class ParameterPosterior:
    """Draws of parameters given data, by chain.

    Where each series has a posterior of its own (``pooled=False``), an axis of series follows that
    of the draws.

    Attributes
    ----------
    draws : dict of str to ndarray of shape (chain, draw, ...)
        Of every parameter.
    log_likelihood : ndarray of shape (chain, draw)
        Of the data at each draw, in nats and in the data's own units, summed over the series that
        share the parameters.
    kind : {"exact", "estimate", "lower bound", "approximation", "complete data"}
        What `log_likelihood` is: that of an exact or approximate engine, the estimate with which
        the draw was accepted, or the log-density of observations and states together (particle
        Gibbs).
    log_prior : ndarray of shape (chain, draw)
    accept_rate : ndarray of shape (chain,)
        Share of proposals accepted after the warm-up.
    states : ndarray of shape (chain, kept, series, time, state) or None
        Trajectories of the latent states (particle Gibbs); every one belongs to the draw of the
        same place in `state_draws`. NaN beyond a series' end.
    state_draws : ndarray of int, shape (kept,), or None
    log_evidence : float or None
        Log of the marginal likelihood of the model (SMC^2).

    Examples
    --------
    >>> import torch, seqdgm as sq
    >>> from torch.distributions import Normal, Uniform
    >>> from seqdgm.inference.pmcmc import pmmh
    >>> class Noisy(sq.StateSpaceModel):
    ...     latent_dim, rho = 1, 0.5
    ...     def initial(self, u): return Normal(torch.zeros(1), 1.0)
    ...     def transition(self, z, u): return Normal(self.rho * z, 1.0)
    ...     def emission(self, z, u): return Normal(z, 0.5)
    >>> y = Noisy().sample(8, seed=0)
    >>> posterior = pmmh(Noisy(), y, {"rho": Uniform(-1, 1)}, n_iter=10, n_particles=20, seed=1)
    >>> posterior.draws["rho"].shape, posterior.kind
    ((4, 10), 'estimate')
    >>> posterior.summary().index.tolist()
    ['rho']
    >>> posterior.forecast(3, seed=2).mean.shape
    (1, 3, 1)
    """

    draws: dict[str, Array]
    log_likelihood: Float[Array, "chain draw *series"]
    kind: str
    log_prior: Float[Array, "chain draw *series"]
    accept_rate: Float[Array, "chain *series"]
    chains: Chains = field(repr=False)
    states: Float[Array, "chain kept series time state"] | None = field(default=None, repr=False)
    state_draws: Array | None = field(default=None, repr=False)
    log_evidence: float | None = None

    @property
    def n_chains(self) -> int:
        """Number of chains."""
        return self.log_prior.shape[0]

    @property
    def n_draws(self) -> int:
        """Draws of each chain."""
        return self.log_prior.shape[1]

    def rhat(self) -> dict[str, Array]:
        """Rank-normalised split R-hat of every parameter; see `convergence.rhat`."""
        return {name: convergence.rhat(value) for name, value in self.draws.items()}

    def ess(self, kind: str = "bulk") -> dict[str, Array]:
        """Effective sample size of every parameter; see `convergence.ess`."""
        return {name: convergence.ess(value, kind) for name, value in self.draws.items()}

    def summary(self) -> pd.DataFrame:
        """Table with one row a parameter: moments, quantiles, Monte-Carlo error, convergence.

        Columns ``mean, std, 5%, 50%, 95%, mcse, ess_bulk, ess_tail, rhat``.
        """
        rows, index = [], []
        for name, value in self.draws.items():
            bulk, tail, precise = (
                convergence.ess(value, kind) for kind in ("bulk", "tail", "mean")
            )
            shrink = convergence.rhat(value)
            for number, place in enumerate(product(*map(range, value.shape[2:]))):
                x = value.reshape(*value.shape[:2], -1)[..., number]
                std = x.std(ddof=1)
                low, mid, high = np.quantile(x, [0.05, 0.5, 0.95])
                error = std / math.sqrt(precise[place]) if precise[place] > 0 else math.nan
                rows.append(
                    (x.mean(), std, low, mid, high, error, bulk[place], tail[place], shrink[place])
                )
                index.append(self._label(name, place))
        columns = ["mean", "std", "5%", "50%", "95%", "mcse", "ess_bulk", "ess_tail", "rhat"]
        return pd.DataFrame(rows, index=index, columns=columns)

    def to_dict(self) -> dict[str, Array]:
        """The draws as arrays (chain, draw, ...), as ``arviz.from_dict(posterior=...)`` takes."""
        return dict(self.draws)

    def to_arviz(self) -> Any:
        """The draws as an ``arviz.InferenceData``, with log-densities as sample statistics.

        Raises
        ------
        ModuleNotFoundError
            If ArviZ is not installed.
        """
        try:
            import arviz
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_arviz needs ArviZ: pip install arviz (or read .to_dict(), whose arrays have "
                "the axes chain and draw)",
                name="arviz",
            ) from error
        lp = self.log_likelihood + self.log_prior
        return arviz.from_dict(
            posterior=self.to_dict(),
            sample_stats={"lp": lp, "log_prior": self.log_prior},
        )

    def forecast(
        self,
        horizon: int,
        n_samples: int = 1000,
        *,
        inputs: Any = None,
        n_draws: int = 100,
        n_particles: int = 100,
        method: str = "auto",
        seed: int | torch.Generator | None = None,
        **options: Any,
    ) -> Forecast:
        r"""Forecast that averages over the posterior, all draws in one batch.

        .. math:: p(x_{T+1:T+H} \mid x) = \int p(x_{T+1:T+H} \mid x, \theta)\, p(\theta \mid x)\,
            d\theta

        Parameters
        ----------
        horizon : int
        n_samples : int
            Trajectories of each series, spread evenly over the draws.
        inputs : array_like, optional
            Known covariates of history and horizon.
        n_draws : int
            Draws of the parameters, taken at random; all where there are fewer.
        n_particles : int
            Particles for each draw, of a Monte-Carlo engine.
        method : str
            Inference engine.
        seed : int or torch.Generator, optional
        **options
            Options of the engine.

        Returns
        -------
        Forecast
            Its `log_prob` is the log of the average density over the draws.
        """
        for name, value in (("horizon", horizon), ("n_samples", n_samples), ("n_draws", n_draws)):
            check_count(name, value)
        panel, batch, transform = prepare(self.chains.model, self.chains.panel, inputs, horizon)
        generator = make_generator(seed, batch.x.device)
        values, used = self._take(n_draws, generator)
        chains = replace(self.chains, batch=batch, transform=transform, n_chains=used)
        per = -(-n_samples // used)
        ahead = _Ahead(chains, values, method, max(n_particles, per), options)
        x, states = ahead.run(horizon, per, generator)
        held, whole = Samples(x[:, :n_samples]), Transform.identity(x.shape[-1])
        score_seed = draw_seed(generator)

        def draw(n: int, seed: int | None) -> Array:
            return held.data_draw(whole, n, make_generator(seed, x.device)).cpu().numpy()

        return Forecast(
            mean=held.data_mean(whole).cpu().numpy(),
            panel=panel,
            index=panel.future_index(horizon),
            model=type(self.chains.model).__name__,
            states=states,
            quantiles=lambda q: held.data_quantiles(whole, torch.from_numpy(q)).numpy(),
            draw=draw,
            score=lambda y_future: ahead.score(y_future, score_seed),
        )

    def _take(self, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], int]:
        """Some draws at random, as vectors in the order draw, group."""
        count = self.n_chains * self.n_draws
        order = torch.randperm(count, generator=generator, device=generator.device)[:n].cpu()
        kept = 2 if self.chains.pooled else 3
        values = {}
        for name, value in self.draws.items():
            flat = torch.from_numpy(value.reshape(count, *value.shape[2:]))[order]
            values[name] = flat.reshape(-1, *value.shape[kept:])
        return values, len(order)

    def _label(self, name: str, place: tuple[int, ...]) -> str:
        entries = [str(k) for k in place]
        if not self.chains.pooled:
            entries[0] = str(self.chains.panel.ids[place[0]])
        return f"{name}[{','.join(entries)}]" if entries else name


@dataclass(frozen=True)
class _Ahead:
    """The steps after the data under many draws of the parameters."""

    chains: Chains
    values: dict[str, Tensor]
    method: str
    n_particles: int
    options: dict[str, Any]

    @torch.no_grad()
    def run(
        self, horizon: int, per: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "series n horizon dim"], StatePosterior]:
        """`per` trajectories of every draw in data units, and moments of the states."""
        chains = self.chains
        verb = find_verb(chains.model, self.method, "forecast", self.options)
        n, transform = chains.batch.n_series, chains.transform
        place, drawn, found = 0, [], []
        for model, batch in chains.parts(self.values):
            out: Prediction = verb(
                model,
                batch,
                horizon=horizon,
                n_particles=self.n_particles,
                generator=generator,
                **self.options,
            )
            own = [k % n for k in range(place, place + batch.n_series)]
            place += batch.n_series
            drawn.append(out.observations.data_draw(transform.select(own), per, generator))
            found.append(out.states)
        x = torch.cat(drawn)
        x = x.view(-1, n, *x.shape[1:]).permute(1, 2, 0, 3, 4).flatten(1, 2)
        mean = torch.cat([s.mean for s in found]).unflatten(0, (-1, n))
        cov = torch.cat([s.cov for s in found]).unflatten(0, (-1, n))
        gap = mean - mean.mean(0)
        spread = cov.mean(0) + torch.einsum("dnti,dntj->ntij", gap, gap) / len(gap)
        level = torch.cat([s.log_likelihood for s in found]).view(-1, n).mean(0)
        jacobian = log_jacobian(chains.panel, transform)
        states = StatePosterior(
            mean=mean.mean(0).double().cpu().numpy(),
            cov=spread.double().cpu().numpy(),
            log_likelihood=level.double().cpu().numpy() + jacobian,
            names=chains.model.state_names(mean.shape[-1]),
            panel=chains.panel,
            kind="predicted",
            index=chains.panel.future_index(horizon),
        )
        return x, states

    @torch.no_grad()
    def score(self, y_future: Any, seed: int) -> LogProb:
        """Log of the average over the draws of p(y_future | history, parameters)."""
        chains = self.chains
        whole: Panel = chains.panel.append(y_future)
        chains.model.check_data(whole)
        known = chains.batch.u
        steps = int((whole.lengths - chains.panel.lengths).max())
        if steps > known.shape[1] - chains.panel.n_steps:
            raise ValueError(
                f"y_future has {steps} steps, the forecast {known.shape[1] - chains.panel.n_steps}"
            )
        full = Batch.of(
            whole,
            known.double().cpu().numpy(),
            chains.transform,
            chains.batch.rows.tolist(),
            dtype=chains.batch.x.dtype,
            device=chains.batch.x.device,
        )
        longer = replace(chains, batch=full)
        generator = make_generator(seed, full.x.device)
        verb = find_verb(chains.model, self.method, "log_prob", self.options)
        begin = torch.from_numpy(chains.panel.lengths.copy()).to(full.x.device)
        values, place, n = [], 0, full.n_series
        for model, batch in longer.parts(self.values):
            own = (torch.arange(place, place + batch.n_series, device=begin.device)) % n
            place += batch.n_series
            out = verb(
                model,
                batch,
                n_particles=self.n_particles,
                generator=generator,
                start=begin[own],
                **self.options,
            )
            values.append(out.value)
        each = torch.cat(values).view(-1, n)
        value = torch.logsumexp(each, 0) - math.log(len(each))
        relative = (each - value).exp().std(0) / math.sqrt(len(each))
        jacobian = log_jacobian(whole, chains.transform, chains.panel.lengths)
        total = value.double().cpu().numpy() + jacobian
        return LogProb(total, "estimate", relative.double().cpu().numpy())
