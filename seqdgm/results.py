"""What the verbs return: posteriors over states, forecasts, log-likelihoods, fit reports."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from seqdgm.panel import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray


@dataclass(frozen=True)
class LogProb:
    """Log-likelihood of each series in nats, with every constant, and what kind of number it is.

    Attributes
    ----------
    value : ndarray of shape (series,)
        Total log-likelihood of each series, in the data's own units. Diffuse elements of a
        linear-Gaussian model add ``-1/2 log F_inf`` and no ``2 pi`` term.
    kind : {"exact", "estimate", "lower bound", "approximation"}
        ``"estimate"``: log of an unbiased particle estimate of the likelihood;
        ``"lower bound"``: evidence lower bound; ``"approximation"``: by the extended or unscented
        Kalman filter, exact for linear-Gaussian models and off by an unknown amount, in either
        direction, for others.
    stderr : ndarray of shape (series,)
        Standard error of `value` (0 where exact; inf where a particle filter cannot tell because
        all particles share one ancestor; NaN for an approximation and for a forecast's log score by
        particles).

    Examples
    --------
    >>> float(LogProb(np.array([-1.5]), "exact", np.zeros(1)))
    -1.5
    """

    value: Float[Array, "series"]
    kind: Literal["exact", "estimate", "lower bound", "approximation"]
    stderr: Float[Array, "series"]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.value, dtype=dtype, copy=True if copy is None else copy)

    def __float__(self) -> float:
        if len(self.value) != 1:
            raise TypeError(
                f"{len(self.value)} series have {len(self.value)} log-likelihoods; use .value, or "
                ".value.sum() for the total"
            )
        return float(self.value[0])

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True)
class FitReport:
    """How a fit went.

    Attributes
    ----------
    method : str
        Learning method (``"mle"``, ``"em"``, ``"elbo"``).
    objective : tuple of float
        Objective in nats after each iteration or epoch; larger is better.
    valid_objective : tuple of float
        The same on the validation part, where one was held out (without a weight of the
        divergence other than 1).
    converged : ndarray of bool, shape (series,)
        Whether the stopping rule was met before the iteration limit (one entry if pooled).
    n_iter : int
        Iterations or epochs.
    seconds : float
        Wall-clock time of the fit.
    log_likelihood : ndarray of shape (series,) or None
        Exact log-likelihood at the estimate, where the model has one.
    messages : tuple of str
        What the user should know: failures and the series they concern.
    valid_epochs : tuple of int
        Epochs, counted from 1, after which `valid_objective` was taken.
    best_epoch : int or None
        Epoch whose weights were kept, where training chooses among epochs.
    reconstruction, divergence : tuple of float
        The two parts of a variational objective in each epoch, nats per step: the expected
        log-likelihood of the observations, and the Kullback-Leibler divergence of the posterior
        from the prior (without its weight).
    gradient_norm : tuple of float
        Mean norm of the gradient, before clipping, in each epoch.
    learning_rate : tuple of float
        Step size at the end of each epoch.
    """

    method: str
    objective: tuple[float, ...]
    valid_objective: tuple[float, ...]
    converged: Bool[Array, "series"]
    n_iter: int
    seconds: float
    log_likelihood: Float[Array, "series"] | None = None
    messages: tuple[str, ...] = ()
    valid_epochs: tuple[int, ...] = ()
    best_epoch: int | None = None
    reconstruction: tuple[float, ...] = ()
    divergence: tuple[float, ...] = ()
    gradient_norm: tuple[float, ...] = ()
    learning_rate: tuple[float, ...] = ()

    def plot(self, **options: Any) -> Figure:
        """Draw the curves of the fit; see `seqdgm.plotting_training.plot_training`."""
        from seqdgm.plotting_training import plot_training

        return plot_training(self, **options)


@dataclass(frozen=True)
class StatePosterior:
    """Posterior of the latent states, filtered or smoothed.

    Attributes
    ----------
    mean : ndarray of shape (series, time, state)
        Posterior mean; NaN beyond a series' own end.
    cov : ndarray of shape (series, time, state, state)
        Posterior covariance.
    log_likelihood : ndarray of shape (series,)
        Log-likelihood found on the way (see `LogProb` for its kind).
    ess : ndarray of shape (series, time) or None
        Effective sample size where particles were used.
    names : tuple of str
        State names.
    panel : Panel
        The data the states belong to.
    kind : {"filtered", "smoothed", "predicted"}
    """

    mean: Float[Array, "series time state"]
    cov: Float[Array, "series time state state"]
    log_likelihood: Float[Array, "series"]
    names: tuple[str, ...]
    panel: Panel
    kind: Literal["filtered", "smoothed", "predicted"]
    ess: Float[Array, "series time"] | None = None
    draw: Callable[[int, int | None], Array] | None = field(default=None, repr=False)
    index: tuple[pd.Index, ...] | None = field(default=None, repr=False)

    @property
    def std(self) -> Float[Array, "series time state"]:
        """Posterior standard deviation."""
        return np.sqrt(np.maximum(np.diagonal(self.cov, axis1=-2, axis2=-1), 0.0))

    def sample(self, n: int, seed: int | None = None) -> Float[Array, "series n time state"]:
        """Draw whole trajectories from the joint posterior.

        Parameters
        ----------
        n : int
            Number of trajectories of each series.
        seed : int, optional
            Seed of the draw.

        Raises
        ------
        ValueError
            For a filtered posterior, which is a set of marginals without a joint law.
        """
        if self.draw is None:
            raise ValueError(
                f"a {self.kind} posterior holds marginals, not the joint law of a trajectory; "
                "call model.smooth(...).sample(n)"
            )
        return self.draw(n, seed)

    def to_frame(self) -> pd.DataFrame:
        """Long table ``unique_id, ds, <state>, <state>-std, ...`` in the caller's index."""
        index = self.panel.index if self.index is None else self.index
        parts = []
        for n, ds in enumerate(index):
            part = {"unique_id": [self.panel.ids[n]] * len(ds), "ds": ds}
            for k, name in enumerate(self.names):
                part[name] = self.mean[n, : len(ds), k]
                part[f"{name}-std"] = self.std[n, : len(ds), k]
            parts.append(pd.DataFrame(part))
        return pd.concat(parts, ignore_index=True)

    def plot(self, **options: Any) -> Figure:
        """Draw the states with 95 % bands; see `seqdgm.plotting.plot_states`."""
        from seqdgm.plotting import plot_states

        return plot_states(self, **options)


@dataclass(frozen=True)
class Forecast:
    """Joint predictive distribution of the steps after each series' end.

    Attributes
    ----------
    mean : ndarray of shape (series, horizon, dim)
        Predictive mean in the data's own units.
    panel : Panel
        The history the forecast continues.
    index : tuple of Index
        Future time index of each series.
    model : str
        Display name of the model.
    states : StatePosterior
        Predictive distribution of the future latent states.
    """

    mean: Float[Array, "series horizon dim"]
    panel: Panel
    index: tuple[pd.Index, ...]
    model: str
    states: StatePosterior
    quantiles: Callable[[Array], Array] = field(repr=False)
    draw: Callable[[int, int | None], Array] = field(repr=False)
    score: Callable[[Any], LogProb] = field(repr=False)

    @property
    def horizon(self) -> int:
        """Number of steps forecast."""
        return self.mean.shape[1]

    def quantile(self, q: float) -> Float[Array, "series horizon dim"]:
        """Marginal predictive quantile at probability `q` in (0, 1)."""
        if not 0 < q < 1:
            raise ValueError(f"q={q!r} is not a probability between 0 and 1")
        return self.quantiles(np.array([q]))[0]

    def interval(self, level: float) -> tuple[Array, Array]:
        """Central prediction interval.

        Parameters
        ----------
        level : float
            Coverage in per cent: 90 means 90 %. A level below 1 is taken as 0.9 % and warns.

        Returns
        -------
        tuple of ndarray
            Lower and upper ends, each of shape (series, horizon, dim).
        """
        if not 0 < level < 100:
            raise ValueError(f"level={level!r} must lie between 0 and 100 per cent")
        if level < 1:
            warnings.warn(
                f"level={level!r} means {level} per cent; did you mean {100 * level:g}?",
                UserWarning,
                stacklevel=2,
            )
        lo, hi = self.quantiles(np.array([50 - level / 2, 50 + level / 2]) / 100)
        return lo, hi

    def sample(self, n: int, seed: int | None = None) -> Float[Array, "series n horizon dim"]:
        """Draw `n` joint trajectories of each series."""
        return self.draw(n, seed)

    def log_prob(self, y_future: Any) -> LogProb:
        """Joint log density of the held-out continuation, in nats.

        Parameters
        ----------
        y_future : array_like
            The steps that follow the history, at most `horizon` of them; NaN is integrated out.
        """
        return self.score(y_future)

    def to_frame(self, level: Sequence[float] = (80, 95)) -> pd.DataFrame:
        """Long table ``unique_id, ds, <Model>, <Model>-lo-80, <Model>-hi-80, ...``.

        A series with several dimensions gives one block a dimension, named
        ``<series>/<column>`` (or just the column where there is one series).
        """
        bounds = {lv: self.interval(lv) for lv in level}
        parts = []
        for n, ds in enumerate(self.index):
            for d in range(self.mean.shape[2]):
                part = {"unique_id": [self._name(n, d)] * len(ds), "ds": ds}
                part[self.model] = self.mean[n, :, d]
                for lv, (lo, hi) in bounds.items():
                    part[f"{self.model}-lo-{lv:g}"] = lo[n, :, d]
                    part[f"{self.model}-hi-{lv:g}"] = hi[n, :, d]
                parts.append(pd.DataFrame(part))
        return pd.concat(parts, ignore_index=True)

    def _name(self, n: int, d: int) -> Any:
        if self.mean.shape[2] == 1:
            return self.panel.ids[n]
        if self.panel.n_series == 1:
            return self.panel.columns[d]
        return f"{self.panel.ids[n]}/{self.panel.columns[d]}"

    def plot(self, **options: Any) -> Figure:
        """Draw the forecast fan after its history; see `seqdgm.plotting.plot_forecast`."""
        from seqdgm.plotting import plot_forecast

        return plot_forecast(self, **options)
