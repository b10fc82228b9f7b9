"""The base class of every model: hyperparameters, and the verbs over the inference engines."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from seqdgm.cluster import PARTITION_SIZE
from seqdgm.description import Description
from seqdgm.panel import Panel, align_inputs
from seqdgm.prepare import (
    check_inputs,
    given_transform,
    log_jacobian,
    make_batch,
    match_rows,
    prepare,
    transform_for,
)
from seqdgm.results import Forecast, LogProb, StatePosterior
from seqdgm.transform import Transform
from seqdgm.types import Batch, States, check_count, draw_seed, make_generator

if TYPE_CHECKING:
    from seqdgm.inference.online import Filter

Seed = int | torch.Generator | None


class SequenceModel(Description):
    """A distribution over sequences, with the verbs that every model shares.

    Every verb validates its input into a `Panel`, moves it to tensors in model units, hands it to
    an engine of `seqdgm.inference` and gives the result back in the caller's index and the data's
    own units. Subclasses say what they are; they never call an engine.

    What a subclass may say of itself is in `seqdgm.description.Description`.
    """

    def fit(
        self,
        y: Any,
        inputs: Any = None,
        *,
        valid: Any = None,
        valid_inputs: Any = None,
        method: str | None = None,
        seed: Seed = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        cluster: str | None = None,
        partition_size: int = PARTITION_SIZE,
        **options: Any,
    ) -> Self:
        """Learn the model's parameters.

        Parameters
        ----------
        y : array_like
            Data in any form of `Panel.of`; NaN means not observed.
        inputs : array_like, optional
            Known covariates of every step.
        valid : array_like, optional
            Other series, that decide when the training of a deep model stops and which weights are
            kept; default the last tenth of each series of `y`, which is then not learned from.
        valid_inputs : array_like, optional
            Known covariates of `valid`.
        method : str, optional
            Learning method; the keys of ``model.learners``. Default: the first of them.
        seed : int or torch.Generator, optional
            Seed of whatever is random in the fit.
        device : str, optional
            Where a deep model trains; default the CPU.
        progress : bool
            Show progress on standard error.
        cluster : str, optional
            Where to fit the parts of a panel whose series have fits of their own: None here, one
            after the other; ``"ray"`` or an address as in `seqdgm.cluster.run_tasks`.
            A panel of one part is fitted here.
        partition_size : int
            Series of a part. The random numbers of a fit depend on it, and nothing on `cluster`.
        **options
            Options of the learning method (see its function in `seqdgm.inference`).

        Returns
        -------
        model
            Itself, with ``fit_report_``.

        Raises
        ------
        ValueError
            For unusable data or options. The model is then what it was before the call.
        """
        from seqdgm.fitting import FitCall, fit_panel

        call = FitCall(method, valid, valid_inputs, device, progress, options)
        draft = fit_panel(
            self._blank(),
            y,
            inputs,
            call,
            seed=seed,
            cluster=cluster,
            partition_size=partition_size,
        )
        self.__dict__ = draft.__dict__
        return self

    def filter(
        self,
        y: Any = None,
        inputs: Any = None,
        *,
        method: str = "auto",
        n_particles: int = 1000,
        seed: Seed = None,
        **options: Any,
    ) -> StatePosterior:
        """Posterior of each state given the observations up to its own time.

        Parameters
        ----------
        y : array_like, optional
            Data; default the data of `fit`.
        inputs : array_like, optional
            Known covariates.
        method : str
            ``"auto"`` takes the most exact engine the model admits.
        n_particles : int
            Particles of a Monte-Carlo engine.
        seed : int or torch.Generator, optional
        **options
            Options of the engine, such as ``resampler=``, ``threshold=``, ``proposal=`` and
            ``lookahead=`` of ``"particle"`` (`seqdgm.inference.smc.SMCOptions`).
        """
        return self._states("filter", y, inputs, method, n_particles, seed, options)

    def smooth(
        self,
        y: Any = None,
        inputs: Any = None,
        *,
        method: str = "auto",
        n_particles: int = 1000,
        seed: Seed = None,
        **options: Any,
    ) -> StatePosterior:
        """Posterior of each state given all observations; parameters as in `filter`.

        With ``lag=``, given the observations up to so many steps after the state's own (fixed-lag
        smoothing). ``smoother=`` chooses the algorithm of ``"particle"``
        (`seqdgm.inference.smoothing.SMOOTHERS`).
        """
        return self._states("smooth", y, inputs, method, n_particles, seed, options)

    def log_prob(
        self,
        y: Any = None,
        inputs: Any = None,
        *,
        method: str = "auto",
        n_particles: int = 1000,
        seed: Seed = None,
        **options: Any,
    ) -> LogProb:
        """Log-likelihood of each series in nats, in the data's own units; see `LogProb`.

        Parameters as in `filter`. An estimate draws its random numbers for the whole panel, so that
        with the same seed a series has another one in other company; exact values do not change.
        """
        from seqdgm.inference import find_verb

        check_count("n_particles", n_particles)
        panel, batch, transform = self._prepare(y, inputs)
        evidence = find_verb(self, method, "log_prob", options)(
            self,
            batch,
            n_particles=n_particles,
            generator=make_generator(seed, self.device),
            **options,
        )
        jacobian = log_jacobian(panel, transform, diffuse=evidence.diffuse)
        value = _numpy(evidence.value) + jacobian
        return LogProb(value, evidence.kind, _numpy(evidence.stderr))

    def forecast(
        self,
        horizon: int,
        y: Any = None,
        inputs: Any = None,
        *,
        n_samples: int = 1000,
        method: str = "auto",
        seed: Seed = None,
        **options: Any,
    ) -> Forecast:
        """Joint predictive distribution of the `horizon` steps after each series' end.

        Parameters
        ----------
        horizon : int
            Number of steps, at least 1.
        y : array_like, optional
            History; default the data of `fit` and `update`.
        inputs : array_like, optional
            Known covariates, covering the horizon; needed whenever the model was fitted with them.
        n_samples : int
            Trajectories of a Monte-Carlo engine.
        method : str
            Inference engine.
        seed : int or torch.Generator, optional
        **options
            Options of the engine, as in `filter`.
        """
        from seqdgm.inference import find_verb

        check_count("horizon", horizon)
        check_count("n_samples", n_samples)
        horizon = int(horizon)
        panel, batch, transform = self._prepare(y, inputs, horizon)
        generator = make_generator(seed, self.device)
        prediction = find_verb(self, method, "forecast", options)(
            self, batch, horizon=horizon, n_particles=n_samples, generator=generator, **options
        )
        index = panel.future_index(horizon)
        score_seed = draw_seed(generator)
        observations = prediction.observations

        def draw(n: int, seed: int | None) -> np.ndarray:
            return _numpy(observations.data_draw(transform, n, make_generator(seed, self.device)))

        def score(y_future: Any) -> LogProb:
            return self._continuation_log_prob(
                panel, batch.u, y_future, method, n_samples, score_seed, options
            )

        return Forecast(
            mean=_numpy(observations.data_mean(transform)),
            panel=panel,
            index=index,
            model=type(self).__name__,
            states=self._posterior(prediction.states, panel, "predicted", transform, index),
            quantiles=lambda q: _numpy(observations.data_quantiles(transform, torch.from_numpy(q))),
            draw=draw,
            score=score,
        )

    def sample(self, length: int, n: int = 1, inputs: Any = None, *, seed: Seed = None) -> Panel:
        """Draw `n` series of `length` steps from the model (from each fitted series' parameters).

        An exactly diffuse initial element has no distribution to draw from: it starts at its entry
        of the initial mean.
        """
        from seqdgm.inference import find_verb

        check_count("length", length)
        check_count("n", n)
        self._check_ready()
        own = self.fitted_ids()
        rows = [k for k in range(1 if own is None else len(own)) for _ in range(n)]
        blank = Panel.of(np.zeros((len(rows), length, 1)))
        u = align_inputs(blank, inputs)
        check_inputs(self, u, inputs)
        x = find_verb(self, "auto", "sample", {})(
            self,
            torch.from_numpy(u.copy()).to(self.device, self.dtype),
            torch.tensor(rows, device=self.device),
            make_generator(seed, self.device),
        )
        transform = (self.transform_ or given_transform(self, x.shape[2])).select(rows)
        values = _numpy(transform.inverse(x.double()))
        return Panel.of(values)

    def impute(
        self,
        y: Any = None,
        inputs: Any = None,
        *,
        method: str = "auto",
        n_particles: int = 1000,
        draw: bool = False,
        seed: Seed = None,
        **options: Any,
    ) -> Any:
        """Fill what was not observed by its posterior mean given everything that was.

        Parameters
        ----------
        draw : bool
            Fill by one joint draw from the posterior instead: values that can occur together, with
            the spread that the mean hides. Several draws (multiple imputation) take several seeds.

        Returns
        -------
        same container as `y`
            Observed values are returned as they came.
        """
        from seqdgm.inference import find_verb

        check_count("n_particles", n_particles)
        panel, batch, transform = self._prepare(y, inputs)
        generator = make_generator(seed, self.device)
        found = find_verb(self, method, "impute", options)(
            self, batch, n_particles=n_particles, generator=generator, **options
        )
        if draw:
            filled = _numpy(found.data_draw(transform, 1, generator)[:, 0])
        else:
            filled = _numpy(found.data_mean(transform))
        inside = np.arange(panel.n_steps)[None, :, None] < panel.lengths[:, None, None]
        values = np.where(panel.mask, panel.values, np.where(inside, filled, np.nan))
        given = replace(panel, container="panel") if isinstance(y, Panel) else panel
        return given.restore(values)

    def update(self, y_new: Any, inputs: Any = None) -> Self:
        """Append new observations to the data the model holds, without refitting.

        The parameters stay; `filter`, `smooth`, `forecast` and `log_prob` called without data use
        the extended series from then on.
        """
        self._check_ready()
        if self.data_ is None:
            raise ValueError("the model holds no data to extend; call fit(y) first")
        data = self.data_.append(y_new)
        new = _after(data, self.data_.lengths)
        u_new = align_inputs(new, inputs)
        check_inputs(self, u_new, inputs)
        self.check_data(new)
        assert self.inputs_ is not None
        u = np.zeros((data.n_series, data.n_steps, u_new.shape[2]))
        for k, (old, added) in enumerate(zip(self.data_.lengths, new.lengths, strict=True)):
            u[k, :old] = self.inputs_[k, :old]
            u[k, old : old + added] = u_new[k, :added]
        self.data_, self.inputs_ = data, u
        return self

    def online(
        self,
        n_series: int | None = None,
        *,
        n_particles: int = 1000,
        seed: Seed = None,
        **options: Any,
    ) -> Filter:
        """Filter from here on one observation at a time, in constant memory and time.

        The object starts from the filtered state of the data the model holds, or from the initial
        state if it holds none. Its ``step(x)`` returns the state given `x` too, and the forecast of
        the observation after it: exactly for linear-Gaussian models
        (`seqdgm.inference.online.Online`), by particles for all others
        (`seqdgm.inference.online_particles.OnlineParticles`).

        Parameters
        ----------
        n_series : int, optional
            Series to take at a time, for a model without data; default those with parameters of
            their own, else one.
        n_particles : int
            Particles of a series, and draws of its forecasts, where there is no exact filter.
        seed : int or torch.Generator, optional
            For the particles.
        **options
            Of the filter by particles: `window`, and those of ``filter``.
        """
        from seqdgm.inference.online import begin

        self._check_ready()
        check_count("n_particles", n_particles)
        return begin(self, n_series, n_particles, seed, options)

    def summary(self) -> str:
        """Describe the model and how it was fitted, as text."""
        from seqdgm.summary import summarise

        return summarise(self)

    def save(self, path: str | Path) -> None:
        """Write the model, its data and its fit report to one ``.safetensors`` file."""
        from seqdgm.serialize import save

        save(self, path)

    def _blank(self) -> Self:
        held = self.__dict__
        kept = {k: v for k, v in held.items() if k not in ("data_", "inputs_", "fit_report_")}
        draft = type(self).__new__(type(self))
        draft.__dict__ = copy.deepcopy(kept)
        draft.data_ = draft.inputs_ = draft.fit_report_ = None
        return draft

    def _check_ready(self) -> None:
        if not self.ready:
            raise ValueError(f"this {type(self).__name__} is not fitted; call fit(y) first")

    def _prepare(self, y: Any, inputs: Any, horizon: int = 0) -> tuple[Panel, Batch, Transform]:
        self._check_ready()
        return prepare(self, y, inputs, horizon)

    def _states(
        self,
        verb: str,
        y: Any,
        inputs: Any,
        method: str,
        n_particles: int,
        seed: Seed,
        options: dict[str, Any],
    ) -> StatePosterior:
        from seqdgm.inference import find_verb

        check_count("n_particles", n_particles)
        panel, batch, transform = self._prepare(y, inputs)
        run = find_verb(self, method, verb, options)
        generator = make_generator(seed, self.device)
        states = run(self, batch, n_particles=n_particles, generator=generator, **options)
        kind = "filtered" if verb == "filter" else "smoothed"
        return self._posterior(states, panel, kind, transform)

    def _posterior(
        self,
        states: States,
        panel: Panel,
        kind: Any,
        transform: Transform,
        index: Any = None,
    ) -> StatePosterior:
        raw = states.draw

        def draw(n: int, seed: int | None) -> np.ndarray:
            assert raw is not None
            return _numpy(raw(n, make_generator(seed, self.device)))

        return StatePosterior(
            mean=_numpy(states.mean),
            cov=_numpy(states.cov),
            log_likelihood=_numpy(states.log_likelihood)
            + log_jacobian(panel, transform, diffuse=states.diffuse),
            names=self.state_names(states.mean.shape[-1]),
            panel=panel,
            kind=kind,
            ess=None if states.ess is None else _numpy(states.ess),
            draw=None if raw is None else draw,
            index=index,
        )

    def _continuation_log_prob(
        self,
        panel: Panel,
        u: Tensor,
        y_future: Any,
        method: str,
        n_particles: int,
        seed: int,
        options: dict[str, Any],
    ) -> LogProb:
        """log p(y_future | history): the evidence of the joint steps after the history."""
        from seqdgm.inference import find_verb

        whole = panel.append(y_future)
        self.check_data(whole)
        steps = int((whole.lengths - panel.lengths).max())
        if steps > u.shape[1] - panel.n_steps:
            raise ValueError(
                f"y_future has {steps} steps, the forecast {u.shape[1] - panel.n_steps}"
            )
        transform = transform_for(self, panel)
        known = u.double().cpu().numpy()
        full = make_batch(self, whole, known, match_rows(self, panel), transform)
        evidence = find_verb(self, method, "log_prob", options)(
            self,
            full,
            n_particles=n_particles,
            generator=make_generator(seed, self.device),
            start=torch.from_numpy(panel.lengths.copy()).to(self.device),
            **options,
        )
        jacobian = log_jacobian(whole, transform, panel.lengths)
        return LogProb(_numpy(evidence.value) + jacobian, evidence.kind, _numpy(evidence.stderr))


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _after(panel: Panel, lengths: np.ndarray) -> Panel:
    """The steps of each series after its first ``lengths[n]``."""
    added = panel.lengths - lengths
    values = np.full((panel.n_series, int(added.max(initial=1)), panel.n_dims), np.nan)
    for k, (old, more) in enumerate(zip(lengths, added, strict=True)):
        values[k, :more] = panel.values[k, old : old + more]
    index = tuple(stamps[old:] for stamps, old in zip(panel.index, lengths, strict=True))
    return panel.span(values, added, index)
