"""One observation at a time by particles: a filter of constant size for every state-space model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.inference import smc
from seqdgm.inference.history import draw_particles
from seqdgm.inference.online import Intake, OnlineForecast, OnlineState
from seqdgm.inference.particle import run_on
from seqdgm.inference.resampling import effective_sample_size, gather
from seqdgm.inference.smc import Cloud, Collector, SMCOptions, Step
from seqdgm.panel import Panel
from seqdgm.prepare import log_jacobian
from seqdgm.transform import Transform
from seqdgm.types import Batch, Inputs, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

Array = np.ndarray


class End(NamedTuple):
    """Particles after the last step of each series; leading axes (series, particle).

    Attributes
    ----------
    s : state tree
    x : Tensor or None
        Last observation with its missing elements drawn, where the model reads it back.
    log_weights : Tensor
        Normalised.
    """

    s: Any
    x: Tensor | None
    log_weights: Float[Tensor, "series particle"]

    def cloud(self, past: int, count: int) -> Cloud:
        """As the driver goes on from it after `past` steps; one particle may become `count`."""
        s, x, log_w = self
        if log_w.shape[1] < count:
            spread = log_w.new_zeros(len(log_w), count, dtype=torch.int64)
            s, x = tree_map(lambda leaf: gather(leaf, spread), (s, x))
            log_w = log_w.new_full(spread.shape, -math.log(count))
        blank = torch.zeros_like(log_w[:, 0])
        eve = torch.arange(count, device=log_w.device).expand(log_w.shape)
        ess = effective_sample_size(log_w)
        return Cloud(s, x, log_w, eve, blank.long(), [blank] * past, [ess] * past)


class Ends:
    """Collector of the particles at each series' own end."""

    def __init__(self, lengths: Int[Tensor, "series"], *, feedback: bool) -> None:
        self._lengths, self._feedback = lengths, feedback
        self._shortest = int(lengths.min())
        self.end: End | None = None

    def update(self, step: Step) -> None:
        """Take in one step."""
        found = End(step.s, step.x if self._feedback else None, step.log_weights)
        if step.t < self._shortest:
            self.end = found
            return
        going = step.t < self._lengths

        def newer(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(going.view(-1, *[1] * (new.ndim - 1)), new, old)

        self.end = tree_map(newer, found, self.end)


class Reporting(Collector, Protocol):
    """A collector of the mean and covariance of what a model reports, at every step."""

    def result(self) -> tuple[Tensor, Tensor]:
        """Means (series, time, state) and covariances (series, time, state, state)."""
        ...


@dataclass(frozen=True)
class Setting:
    """What stays the same from step to step.

    Attributes
    ----------
    model : StateSpaceModel
    intake : Intake
    options : SMCOptions
        With the particles of a model whose states are random.
    generator : torch.Generator
    window : int
        Observations that a learned proposal reads.
    collector : callable
        Makes the collector of the state's moments, of a model and a batch.
    """

    model: StateSpaceModel
    intake: Intake
    options: SMCOptions
    generator: torch.Generator
    window: int
    collector: Callable[[Any, Batch], Reporting]


class OnlineParticles:
    r"""A state-space model that takes one observation at a time, in constant memory and time.

    Made by ``model.online()`` where there is no exact filter. The particle filter of ``filter``
    goes on from the particles at the end of the model's data, if it has any, and leaves the model
    as it is. A model without random states has one particle and is exact, until it reads back an
    observation of which something is missing: that is drawn, by `n_particles` particles from there
    on.

    A learned proposal reads the last `window` observations and nothing before: networks that
    summarise a step by itself and its future lose nothing by it, those that summarise the past lose
    what is older. Weights make up for any proposal, so that likelihoods stay unbiased.

    Attributes
    ----------
    n_series, n_dims, n_inputs : int
        What an observation looks like: ``(n_series, n_dims)``, with ``(n_series, n_inputs)``
        inputs.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> y = np.sin(np.arange(60) / 3)
    >>> online = sq.RNN("gru", 4, max_epochs=2).fit(y, seed=0).online(n_particles=100, seed=0)
    >>> state, forecast = online.step(y[0])
    >>> state.n_steps.item(), forecast.mean.shape, forecast.draws.shape
    (61, (1, 1), (1, 100, 1))
    """

    def __init__(
        self,
        setting: Setting,
        window: Batch,
        end: End | None,
        log_likelihood: Float[Array, "series"],
        n_steps: Int[Array, "series"],
    ) -> None:
        self.n_series, self.n_dims = len(n_steps), setting.intake.n_dims
        self.n_inputs = setting.intake.n_inputs
        self._setting, self._window, self._end = setting, window, end
        self._log_likelihood, self._n_steps = log_likelihood, n_steps

    def step(
        self, x: Any, inputs: Any = None, next_inputs: Any = None
    ) -> tuple[OnlineState, OnlineForecast | None]:
        """Take the next observation of every series.

        Parameters
        ----------
        x : float or array_like of shape (dim,) or (series, dim)
            Observation in the data's own units; NaN is not observed. The short forms are for a
            single series.
        inputs : array_like of shape (inputs,) or (series, inputs), optional
            Known covariates of this step; needed if the model has inputs.
        next_inputs : array_like of the same shape, optional
            Those of the next step, for its forecast.

        Returns
        -------
        state : OnlineState
            The state given this observation too.
        forecast : OnlineForecast or None
            The observation after it; None if the model has inputs and `next_inputs` were not given.

        Raises
        ------
        ValueError
            For an observation or inputs of another shape, that are not finite, or that the model
            cannot produce; nothing but the random numbers has changed then.
        """
        intake = self._setting.intake
        value, mask = intake.rows("x", x, self.n_dims)
        self._check(value)
        scaled, jacobian = intake.forward(value, mask)
        u, ahead = intake.known("inputs", inputs), None
        if not self.n_inputs or next_inputs is not None:
            ahead = intake.known("next_inputs", next_inputs)
        mean, cov, increment = self._advance(scaled, mask, u)
        jacobian = np.where(mask, jacobian, 0.0).sum(1)
        self._log_likelihood = self._log_likelihood + (increment + jacobian)
        self._n_steps = self._n_steps + 1
        state = OnlineState(mean, cov, self._log_likelihood.copy(), self._n_steps.copy())
        return state, None if ahead is None else self._forecast(ahead)

    def predict(self, inputs: Any = None) -> OnlineForecast:
        """Forecast the next observation, given its inputs if the model has any."""
        return self._forecast(self._setting.intake.known("inputs", inputs))

    def _check(self, x: Float[Array, "series dim"]) -> None:
        """Raise a ValueError for an observation that the model cannot produce."""
        model, ids = self._setting.model, self._setting.intake.ids
        columns = tuple(map(str, range(self.n_dims)))
        if model.data_ is not None:
            columns = model.data_.columns
        index = tuple(pd.RangeIndex(t, t + 1) for t in self._n_steps.tolist())
        ones = np.ones(len(ids), dtype=np.int64)
        model.check_data(Panel(x[:, None], ones, ids, columns, index, "array"))

    def _advance(
        self,
        x: Float[Array, "series dim"],
        mask: Bool[Array, "series dim"],
        u: Float[Array, "series inputs"],
    ) -> tuple[Float[Array, "series state"], Float[Array, "series state state"], Array]:
        """Filter one step, and take it over if that went well: moments and log-density."""
        model, options = self._setting.model, self._setting.options
        window = _append(self._window, x, mask, u, self._setting.window)
        drawing = model.latent_dim > 0 or (model.feedback and not mask.all())
        held = 1 if self._end is None else self._end.log_weights.shape[1]
        count = options.n_particles if drawing else held
        cloud = None if self._end is None else self._end.cloud(window.n_steps - 1, count)
        moments = self._setting.collector(model, window)
        out = smc.run(
            model,
            window,
            replace(options, n_particles=count),
            self._setting.generator,
            (moments,),
            cloud=cloud,
        )
        self._window, self._end = window, End(out.s, out.cloud.x, out.log_weights)
        mean, cov = (part[:, -1].cpu().numpy() for part in moments.result())
        return mean, cov, out.increments[:, -1].cpu().numpy()

    def _forecast(self, u: Float[Array, "series inputs"]) -> OnlineForecast:
        """Draws of the next observation, in data units, and their moments."""
        model, generator = self._setting.model, self._setting.generator
        like, shape = self._window.x, (self.n_series, self._setting.options.n_particles)
        if self._end is None:
            s, x = model.start(shape), like.new_zeros(*shape, self.n_dims)
        else:
            index = draw_particles(self._end.log_weights, shape[1], generator)
            s, x = tree_map(lambda leaf: gather(leaf, index), self._end[:2])
        t = torch.from_numpy(self._n_steps[:, None]).to(like.device)
        known = Inputs(torch.from_numpy(u).to(like)[:, None], t)
        (drawn,), _ = run_on(model, s, x, [known], shape, generator)
        draws = self._setting.intake.transform.inverse(drawn.double()).cpu().numpy()
        return OnlineForecast(draws.mean(1), draws.std(1), draws)


def begin(
    model: StateSpaceModel,
    batch: Batch,
    panel: Panel | None,
    transform: Transform,
    options: SMCOptions,
    generator: torch.Generator,
    window: int,
    collector: Callable[[Any, Batch], Reporting],
) -> OnlineParticles:
    """Filter the data, of which there may be none, and go on from there; see `Setting`.

    Raises
    ------
    ValueError
        For a window that is not a whole number, at least 2.
    """
    if int(window) != window or window < 2:
        raise ValueError(f"window={window!r} must be a whole number of steps, at least 2")
    intake = Intake(transform, batch.ids, batch.x.shape[2], batch.u.shape[2])
    setting = Setting(model, intake, options, generator, int(window), collector)
    end, log_likelihood = None, np.zeros(batch.n_series)
    if panel is not None:
        exact = model.latent_dim == 0 and (batch.complete or not model.feedback)
        how = replace(options, n_particles=1) if exact else options
        ends = Ends(batch.lengths, feedback=model.feedback)
        out = smc.run(model, batch, how, generator, (ends,))
        end = ends.end
        value = torch.where(batch.valid, out.increments, 0.0).sum(1)
        log_likelihood = value.cpu().numpy() + log_jacobian(panel, transform)
    steps = batch.lengths.cpu().numpy().copy()
    return OnlineParticles(setting, _last(batch, setting.window - 1), end, log_likelihood, steps)


def _last(batch: Batch, steps: int) -> Batch:
    """The last steps of every series, as many as the shortest has."""
    count = min(steps, int(batch.lengths.min()))
    first = batch.lengths - count
    when = first[:, None] + torch.arange(count, device=first.device)

    def at(leaf: Tensor) -> Tensor:
        return leaf.gather(1, when[..., None].expand(-1, -1, leaf.shape[2]))

    same = bool((first == first[0]).all())
    return replace(
        batch,
        x=at(batch.x),
        mask=at(batch.mask),
        u=at(batch.u),
        lengths=torch.full_like(first, count),
        begin=int(first[0]) if same else first,
    )


def _append(
    window: Batch,
    x: Float[Array, "series dim"],
    mask: Bool[Array, "series dim"],
    u: Float[Array, "series inputs"],
    size: int,
) -> Batch:
    """A window with one more step, less its first one where it is full."""
    drop = int(window.n_steps == size)

    def longer(held: Tensor, new: Array) -> Tensor:
        return torch.cat([held[:, drop:], torch.from_numpy(new).to(held)[:, None]], 1)

    return replace(
        window,
        x=longer(window.x, np.where(mask, x, 0.0)),
        mask=longer(window.mask, mask),
        u=longer(window.u, u),
        lengths=window.lengths + (1 - drop),
        begin=window.begin + drop,
    )
