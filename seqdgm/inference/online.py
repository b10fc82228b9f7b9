r"""One observation at a time: filters as objects of constant size.

The Kalman filter is here; that by particles is in `seqdgm.inference.online_particles`. The matrices
of a step come from an affine form, :math:`M_t = M_0 + t M' + \sum_j u_{tj} M^{(j)}`, that is read
off the model once, so that a step costs the same however many came before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.cpu_online import Buffers, filter_arrays, make_buffers
from seqdgm.kernels.types import System
from seqdgm.prepare import given_transform, prepare
from seqdgm.transform import Transform
from seqdgm.types import Batch, check_count, make_generator

if TYPE_CHECKING:
    from seqdgm.model import SequenceModel
    from seqdgm.recursion import StateSpaceModel

Array = np.ndarray

_VARYING = ("F", "Q", "H", "R", "b", "d")
_PROBE = 16  # steps over which the affine form is read off and checked


@dataclass(frozen=True)
class OnlineState:
    """The latent state given every observation so far, in model units.

    Attributes
    ----------
    mean, cov : ndarray of shape (series, state), (series, state, state)
        Filtered moments; `cov` is infinite where an element is still diffuse.
    log_likelihood : ndarray of shape (series,)
        Of all observations so far, in nats and in the data's own units.
    n_steps : ndarray of int, shape (series,)
        Steps so far, those of the model's own data included.
    """

    mean: Float[Array, "series state"]
    cov: Float[Array, "series state state"]
    log_likelihood: Float[Array, "series"]
    n_steps: Int[Array, "series"]

    @property
    def std(self) -> Float[Array, "series state"]:
        """Filtered standard deviations."""
        return np.sqrt(np.diagonal(self.cov, axis1=-2, axis2=-1))


@dataclass(frozen=True)
class OnlineForecast:
    """The next observation given every one so far, in the data's own units.

    Attributes
    ----------
    mean, std : ndarray of shape (series, dim)
        Predictive moments; `std` is infinite where the observation is still diffuse.
    draws : ndarray of shape (series, n, dim), or None
        Equally likely values, from a filter by particles; the moments are theirs.
    """

    mean: Float[Array, "series dim"]
    std: Float[Array, "series dim"]
    draws: Float[Array, "series n dim"] | None = None


class Filter(Protocol):
    """What ``model.online()`` returns: `Online` or `OnlineParticles`."""

    def step(
        self, x: Any, inputs: Any = None, next_inputs: Any = None
    ) -> tuple[OnlineState, OnlineForecast | None]:
        """Take the next observation of every series."""
        ...

    def predict(self, inputs: Any = None) -> OnlineForecast:
        """Forecast the next observation."""
        ...


@dataclass(frozen=True)
class Intake:
    """How a step's observations and inputs are read.

    Attributes
    ----------
    transform : Transform
        From data units to model units.
    ids : tuple
        Names of the series.
    n_dims, n_inputs : int
        Widths of an observation and of the inputs of a step.
    """

    transform: Transform
    ids: tuple[Any, ...]
    n_dims: int
    n_inputs: int

    def rows(
        self, name: str, value: Any, width: int
    ) -> tuple[Float[Array, "series width"], Bool[Array, "series width"]]:
        """One row a series, and which of it is there; the short forms are for one series."""
        out = np.asarray(value, dtype=np.float64)
        n_series = len(self.ids)
        if n_series == 1 and (out.ndim == 1 or (out.ndim == 0 and width == 1)):
            out = out.reshape(1, -1)
        finite = np.isfinite(out)
        if out.shape != (n_series, width):
            raise ValueError(
                f"{name} has shape {np.shape(value)}; give one row of {width} for each of the "
                f"{n_series} series, {(n_series, width)}"
            )
        if not finite.all() and np.isinf(out).any():
            k, column = np.argwhere(np.isinf(out))[0]
            raise ValueError(
                f"series {self.ids[k]!r}: {name} is infinite in column {column}; NaN means not "
                "observed"
            )
        return out, finite

    def known(self, name: str, value: Any) -> Float[Array, "series inputs"]:
        """Inputs of a step."""
        if value is None and not self.n_inputs:
            return np.zeros((len(self.ids), 0))
        if value is None:
            raise ValueError(f"the model has {self.n_inputs} inputs; give {name} of the step")
        out, finite = self.rows(name, value, self.n_inputs)
        if not finite.all():
            k = np.argwhere(~finite)[0, 0]
            raise ValueError(f"series {self.ids[k]!r}: {name} cannot be missing")
        return out

    def forward(
        self, x: Float[Array, "series dim"], mask: Bool[Array, "series dim"]
    ) -> tuple[Float[Array, "series dim"], Float[Array, "series dim"] | float]:
        """An observation in model units, and the logarithm of the Jacobian of each element."""
        if self.transform.trivial:
            return x, 0.0
        given = torch.from_numpy(np.where(mask, x, 1.0))
        scaled = self.transform.forward(given).numpy()
        if not np.isfinite(scaled[mask]).all():
            k, column = np.argwhere(mask & ~np.isfinite(scaled))[0]
            raise ValueError(
                f"series {self.ids[k]!r}: {x[k, column]:g} in column {column} is outside the "
                "domain of the model's transform; leave the observation out with NaN"
            )
        return scaled, self.transform.log_jacobian(given).numpy()


class Affine(NamedTuple):
    """A matrix that is fixed, or affine in the number of the step and in the inputs."""

    const: Float[Array, "sys ..."]
    slope: Float[Array, "sys ..."] | None
    loads: Float[Array, "sys inputs ..."] | None

    @property
    def fixed(self) -> bool:
        """Whether all steps have the same."""
        return self.slope is None and self.loads is None

    def at(self, t: Int[Array, "series"], u: Float[Array, "series inputs"]) -> Array:
        """Value at step `t` (zero-based) with inputs `u`."""
        out = self.const
        if self.slope is not None:
            out = out + t.reshape(-1, *[1] * (out.ndim - 1)) * self.slope
        if self.loads is not None:
            out = out + np.einsum("nk,nk...->n...", u, self.loads)
        return out


class Online:
    """A linear-Gaussian model that takes one observation at a time, in constant memory and time.

    Made by ``model.online()``. It starts from the filtered state of the model's data, if it has
    any, else from the initial state, and leaves the model as it is. After T steps the state equals
    the last one of ``filter`` on all the data.

    Attributes
    ----------
    n_series, n_dims, n_inputs : int
        What an observation looks like: ``(n_series, n_dims)``, with ``(n_series, n_inputs)``
        inputs.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> walk = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], Q=[[1.0]], R=[[0.0]], diffuse=True)
    >>> online = walk.online()
    >>> state, forecast = online.step(5.0)
    >>> state.mean.item(), forecast.mean.item(), forecast.std.item()
    (5.0, 5.0, 1.0)
    >>> state, forecast = online.step(np.nan)
    >>> round(forecast.std.item() ** 2, 12)
    2.0
    """

    def __init__(
        self,
        affine: dict[str, Affine],
        start: System,
        intake: Intake,
        log_likelihood: Float[Array, "series"],
        n_steps: Int[Array, "series"],
    ) -> None:
        self.n_series, self.n_dims = len(n_steps), intake.n_dims
        self.n_inputs = intake.n_inputs
        self._affine, self._intake = affine, intake
        self._fixed = {k: f.const[:, None].copy() for k, f in affine.items() if f.fixed}
        self._moving = [k for k, f in affine.items() if not f.fixed]
        self._start: dict[str, Array] = {
            name: np.array(np.broadcast_to(field, (self.n_series, *field.shape[1:])))
            for name, field in (("m0", start.m0), ("P0", start.P0), ("Pinf", start.Pinf))
        }
        self._diffuse = bool(self._start["Pinf"].any())
        self._log_likelihood, self._n_steps = log_likelihood, n_steps
        self._fresh = not bool(n_steps.any())
        self._buffers: dict[tuple[int, bool], Buffers] = {}

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
            For an observation or inputs of another shape, or that are not finite; nothing has
            changed then.
        """
        value, mask = self._intake.rows("x", x, self.n_dims)
        scaled, jacobian = self._intake.forward(value, mask)
        steps = [self._intake.known("inputs", inputs)]
        if not self.n_inputs or next_inputs is not None:
            steps.append(self._intake.known("next_inputs", next_inputs))
        loglik, states, density = self._run(scaled, mask, steps)
        mean, cov, cov_inf = states[0]
        jacobian = np.where(density, jacobian, 0.0).sum(1)
        self._start = {"m0": mean.copy(), "P0": cov.copy(), "Pinf": cov_inf.copy()}
        self._log_likelihood = self._log_likelihood + (loglik + jacobian)
        self._n_steps, self._fresh = self._n_steps + 1, False
        forecast = self._forecast(states[1], steps[1]) if len(steps) > 1 else None
        shown = cov.copy()
        if self._diffuse:
            shown[cov_inf != 0] = np.inf
            self._diffuse = bool(cov_inf.any())
        state = OnlineState(mean.copy(), shown, self._log_likelihood.copy(), self._n_steps.copy())
        return state, forecast

    def predict(self, inputs: Any = None) -> OnlineForecast:
        """Forecast the next observation, given its inputs if the model has any."""
        u = self._intake.known("inputs", inputs)
        nothing = np.zeros((self.n_series, self.n_dims))
        _, states, _ = self._run(nothing, nothing.astype(bool), [u])
        return self._forecast(states[0], u)

    def _run(
        self,
        x: Float[Array, "series dim"],
        mask: Bool[Array, "series dim"],
        inputs: list[Float[Array, "series inputs"]],
    ) -> tuple[Float[Array, "series"], list[tuple[Array, Array, Array]], Bool[Array, "series dim"]]:
        """Filter from the state held over the steps that `inputs` are known for.

        Only the first of them is observed. The state held, unless it is the initial one, stands as
        a step without observation before them, so that the transition is the filter's own. What
        comes back is overwritten by the next call: log-likelihood, moments of each step, and which
        elements of the observation have a density.
        """
        carry = 0 if self._fresh else 1
        count = carry + len(inputs)
        key = count, self._diffuse
        if key not in self._buffers:
            sizes = self.n_series, count, self.n_dims, self._start["m0"].shape[1]
            self._buffers[key] = make_buffers(*sizes, diffuse=self._diffuse)
        buffers = self._buffers[key]
        buffers.x[:, carry], buffers.mask[:, carry] = x, mask
        fields: dict[str, Any] = {**self._fixed, **self._start}
        for name in self._moving:
            affine = self._affine[name]
            rows = [affine.at(self._n_steps + k, u) for k, u in enumerate(inputs)]
            fields[name] = np.stack(rows[:1] * carry + rows, 1)
        loglik = filter_arrays(System(**fields), buffers)
        mean, cov, cov_inf = buffers.out[:3]
        if not self._diffuse:
            cov_inf = buffers.zero
        states = [(mean[:, t], cov[:, t], cov_inf[:, t]) for t in range(carry, count)]
        return loglik, states, np.isfinite(buffers.out.innov_var[:, carry])

    def _forecast(
        self, moments: tuple[Array, Array, Array], u: Float[Array, "series inputs"]
    ) -> OnlineForecast:
        """Moments of the observation that belongs to a state, in data units."""
        mean, cov, cov_inf = moments
        H, R, d = (self._affine[name].at(self._n_steps, u) for name in ("H", "R", "d"))
        level = (H @ mean[:, :, None])[:, :, 0] + d
        variance = ((H @ cov) * H).sum(-1) + R.diagonal(0, 1, 2)
        if self._diffuse:
            variance = np.where(((H @ cov_inf) * H).sum(-1) > 0, np.inf, variance)
        transform = self._intake.transform
        if transform.trivial:
            return OnlineForecast(level, np.sqrt(variance))
        a, b = torch.from_numpy(level), torch.from_numpy(variance)
        spread = transform.inverse_variance(a, b).numpy()
        return OnlineForecast(transform.inverse_mean(a, b).numpy(), np.sqrt(spread))


def begin(
    model: SequenceModel, n_series: int | None, n_particles: int, seed: Any, options: dict[str, Any]
) -> Filter:
    """Where a model's data end, or before any data, the object that takes the next observation.

    Raises
    ------
    ValueError
        If no engine of the model offers it, or `n_series` is not the number of series it holds.
    """
    from seqdgm.inference import find_verb

    start_online = find_verb(model, "auto", "online", options)
    if model.data_ is None:
        panel = None
        batch, transform = _before_data(model, n_series)
    else:
        panel, batch, transform = prepare(model, None, None)
    if n_series not in (None, batch.n_series):
        raise ValueError(
            f"n_series={n_series!r}, but the model has {batch.n_series} series; leave it out"
        )
    online: Filter = start_online(
        model,
        batch,
        panel=panel,
        transform=transform,
        n_particles=n_particles,
        generator=make_generator(seed, model.device),
        **options,
    )
    return online


def _before_data(model: SequenceModel, n_series: int | None) -> tuple[Batch, Transform]:
    """A batch without steps."""
    from seqdgm.inference import find_verb

    own = model.fitted_ids()
    n = len(own) if own is not None else 1 if n_series is None else n_series
    check_count("n_series", n)
    rows = list(range(n)) if own is not None else [0] * n
    where: Any = {"dtype": model.dtype, "device": model.device}
    u = torch.zeros(n, 1, model.input_width() or 0, **where)
    places = torch.tensor(rows, device=model.device)
    dim = model.obs_dim_
    if dim is None:
        # Only the emission of a model that was written down knows the width of its observations.
        seen = find_verb(model, "auto", "sample", ())
        dim = seen(model, u, places, make_generator(0, model.device)).shape[-1]
    batch = Batch(
        x=torch.zeros(n, 0, dim, **where),
        mask=torch.zeros(n, 0, dim, dtype=torch.bool, device=model.device),
        lengths=torch.zeros(n, dtype=torch.int64, device=model.device),
        u=u,
        rows=places,
        ids=own or tuple(range(n)),
    )
    return batch, (model.transform_ or given_transform(model, dim)).select(rows)


def affine_form(
    model: StateSpaceModel, rows: Int[Tensor, "series"], n_inputs: int
) -> dict[str, Affine]:
    """Read the matrices of a model off as functions of the number of the step and the inputs.

    Raises
    ------
    ValueError
        If they are anything else.
    """
    n = len(rows)

    def build(u: Tensor) -> dict[str, Array]:
        with torch.no_grad():
            system = model.linear_gaussian(u, rows)
        return {name: getattr(system, name).cpu().numpy() for name in _VARYING}

    blank = torch.zeros(n, _PROBE, n_inputs, dtype=torch.float64)
    base, loads = build(blank), []
    for k in range(n_inputs):
        unit = blank.clone()
        unit[..., k] = 1.0
        loads.append(build(unit))
    out = {}
    for name, field in base.items():
        moved = [load[name][:, 0] - field[:, 0] for load in loads]
        slope = (field[:, -1] - field[:, 0]) / (_PROBE - 1) if field.shape[1] > 1 else None
        out[name] = Affine(
            field[:, 0].copy(),
            slope if slope is not None and slope.any() else None,
            np.stack(moved, 1) if any(load.any() for load in moved) else None,
        )
    _check_affine(model, out, build, blank)
    return out


def _check_affine(
    model: StateSpaceModel, affine: dict[str, Affine], build: Any, blank: Tensor
) -> None:
    """Compare the affine form with the model at random inputs, step by step."""
    drawn = np.random.default_rng(0).standard_normal(blank.shape)
    for name, field in build(torch.from_numpy(drawn)).items():
        for t in range(field.shape[1]):
            found = affine[name].at(np.full(len(drawn), t), drawn[:, t])
            size = max(float(np.abs(field).max()), 1e-300)
            if np.abs(found - field[:, t]).max() > 1e-9 * size:
                raise ValueError(
                    f"{type(model).__name__}.online needs matrices that are affine in the inputs "
                    f"and in the number of the step, and {name} is not; use filter and update"
                )
