"""Structural time series models: level, slope, seasons, cycle, AR part and regression by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.inference.hessian import Natural
from seqdgm.kernels.types import System
from seqdgm.models._diagnostics import LinearGaussianModel
from seqdgm.models._polynomials import partial_from_coefficients
from seqdgm.models._structural import StructuralSpec, system
from seqdgm.models._structural_checks import (
    KINDS,
    check_cycle,
    check_fixed,
    check_kind,
    flags,
    seasons,
)
from seqdgm.models._structural_search import (
    Scope,
    constrain,
    find_scope,
    starting_values,
    step_sizes,
)
from seqdgm.panel import Panel
from seqdgm.prepare import prepare
from seqdgm.transform import Function
from seqdgm.types import Batch


class StructuralSSM(LinearGaussianModel):
    r"""Structural time series model (unobserved components), by exact maximum likelihood.

    .. math::

        x_t &= \mu_t + \sum_s \gamma^{(s)}_t + c_t + a_t + u_t'\beta_t + \varepsilon_t,
            \quad \varepsilon_t \sim N(0, \sigma_\varepsilon^2) \\
        \mu_t &= \mu_{t-1} + \nu_{t-1} + \eta_t, \quad \eta_t \sim N(0, \sigma_\eta^2) \\
        \nu_t &= \phi\, \nu_{t-1} + \zeta_t, \quad \zeta_t \sim N(0, \sigma_\zeta^2) \\
        \gamma_t &= -\gamma_{t-1} - \dots - \gamma_{t-s+1} + \omega_t
            \quad \text{(dummy)} \\
        \begin{pmatrix} \gamma_{j,t} \\ \gamma^*_{j,t} \end{pmatrix} &=
            \begin{pmatrix} \cos\lambda_j & \sin\lambda_j \\ -\sin\lambda_j & \cos\lambda_j
            \end{pmatrix}
            \begin{pmatrix} \gamma_{j,t-1} \\ \gamma^*_{j,t-1} \end{pmatrix} + \omega_{j,t},
            \quad \lambda_j = 2 \pi j / s, \quad \gamma_t = \textstyle\sum_j \gamma_{j,t}
            \quad \text{(trigonometric)} \\
        \begin{pmatrix} c_t \\ c^*_t \end{pmatrix} &=
            \rho \begin{pmatrix} \cos\lambda & \sin\lambda \\ -\sin\lambda & \cos\lambda
            \end{pmatrix}
            \begin{pmatrix} c_{t-1} \\ c^*_{t-1} \end{pmatrix} + \kappa_t \\
        a_t &= \phi_1 a_{t-1} + \dots + \phi_p a_{t-p} + \xi_t, \qquad
        \beta_t = \beta_{t-1} + \tau_t

    Level, slope, seasons, a deterministic cycle and the regression coefficients start exactly
    diffuse; a stochastic cycle and the AR part start in their stationary law. A diffuse element
    adds :math:`-\tfrac12 \log F_\infty` to the log-likelihood and no :math:`2\pi` term. Regression
    coefficients are elements of the state (Durbin and Koopman 2012, section 3.6), so forecasts and
    components carry their uncertainty; they are diffuse in units of one over the root mean square
    of their regressor in the fit. Likelihoods of models with different diffuse elements, different
    regressors among them, are not comparable. One variance is found in closed form.
    Missing values are skipped exactly. On a panel every series is fitted on its own
    (``fit(pooled=True)`` shares the parameters).

    Parameters
    ----------
    level : {"stochastic", "deterministic", None}
    trend : {None, "stochastic", "deterministic", "damped"}
        Slope of the level; ``"damped"`` is stochastic with :math:`0 \le \phi \le 1`, the others
        have :math:`\phi = 1`.
    seasonal : int or sequence of int, optional
        Period, or several at once such as (24, 168). What a longer period shares with a shorter one
        belongs to the shorter one.
    seasonal_kind : {"dummy", "trigonometric"}
        Dummy seasons of period s have s - 1 states each; trigonometric ones two a harmonic.
    harmonics : int or sequence of int, optional
        Trigonometric terms of each period; default all, half the period.
    seasonal_stochastic : bool or sequence of bool
        Whether the seasons change: of all periods, or of each in the order given.
    cycle : {None, "stochastic", "deterministic"}
        ``"stochastic"`` is damped, with :math:`\rho < 1`; ``"deterministic"`` a fixed wave.
    cycle_bounds : tuple of float
        Shortest (at least 2) and longest period of the cycle in steps. No cycle is longer than the
        series. Those of a deterministic cycle must leave out the periods of all seasonal harmonics:
        two equal waves cannot be told apart.
    ar : int
        Order of the autoregressive component.
    irregular : bool
        Whether there is observation noise.
    time_varying_regression : bool
        Whether the coefficients of the inputs are random walks.
    fixed : dict, optional
        Parameters that are not estimated, by their names in ``parameter_names``, with their values:
        ``{"sigma2.irregular": 1.0, "cycle.damping": 0.9}``. Variances are in the square of the
        model's units. AR coefficients are fixed all together.
    transform : {None, "log", "boxcox"} or tuple ("boxcox", power)
        Function applied to the data first, as in `ARIMA`; forecasts are transformed back without
        bias.

    Attributes
    ----------
    parameters_ : Tensor of shape (series, parameters)
        Estimates, in the order of ``parameter_names``.

    Examples
    --------
    The local level of the Nile (Durbin and Koopman 2012, section 2.2.5):

    >>> import seqdgm as sq
    >>> from seqdgm.models.structural import StructuralSSM
    >>> model = StructuralSSM(level="stochastic").fit(sq.datasets.load("nile").y)
    >>> {name: round(value, -1) for name, value in model.estimates().items()}
    {'sigma2.irregular': 15100.0, 'sigma2.level': 1470.0}

    References
    ----------
    Harvey (1989), *Forecasting, Structural Time Series Models and the Kalman Filter*, chapters 2
    and 4; Durbin and Koopman (2012), *Time Series Analysis by State Space Methods*, 2nd ed.,
    chapter 3.
    """

    engines: ClassVar[tuple[str, ...]] = ("kalman",)
    learners: ClassVar[Mapping[str, str]] = {"mle": "quasi-newton"}
    per_series: ClassVar[bool] = True

    def __init__(
        self,
        level: str | None = "stochastic",
        trend: str | None = None,
        seasonal: int | Sequence[int] | None = None,
        *,
        seasonal_kind: str = "dummy",
        harmonics: int | Sequence[int] | None = None,
        seasonal_stochastic: bool | Sequence[bool] = True,
        cycle: str | None = None,
        cycle_bounds: tuple[float, float] = (2.0, math.inf),
        ar: int = 0,
        irregular: bool = True,
        time_varying_regression: bool = False,
        fixed: Mapping[str, float] | None = None,
        transform: Function = None,
    ) -> None:
        super().__init__()
        self.level, self.trend, self.seasonal = level, trend, seasonal
        self.seasonal_kind, self.harmonics = seasonal_kind, harmonics
        self.seasonal_stochastic, self.cycle, self.ar = seasonal_stochastic, cycle, ar
        self.cycle_bounds, self.irregular = cycle_bounds, irregular
        self.time_varying_regression, self.transform = time_varying_regression, transform
        self.fixed = None if fixed is None else dict(fixed)
        check_kind("level", level, KINDS)
        check_kind("trend", trend, (*KINDS, "damped"))
        check_kind("cycle", cycle, KINDS)
        if trend is not None and level is None:
            raise ValueError("a trend is the slope of a level; give level as well, or trend=None")
        if int(ar) != ar or ar < 0:
            raise ValueError(f"ar={ar!r} must be a whole number, at least 0")
        periods, numbers = seasons(seasonal, seasonal_kind, harmonics)
        self.spec_ = StructuralSpec(
            level,
            trend,
            periods,
            numbers,
            flags(seasonal, seasonal_stochastic),
            cycle,
            int(ar),
            bool(irregular),
            bool(time_varying_regression),
            fixed=tuple((str(name), float(value)) for name, value in (fixed or {}).items()),
        )
        check_cycle(self.spec_, cycle_bounds)
        if not self.spec_.sources:
            raise ValueError(
                "nothing in the model is random; use irregular=True or a stochastic component"
            )
        self.latent_dim = self.spec_.n_state
        self.min_length = self.spec_.n_diffuse + self.spec_.n_free + 2
        self._ids: tuple[Any, ...] | None = None
        self._scope: Scope | None = None
        self.register_buffer("parameters_", None)
        self.register_buffer("input_sizes_", None)

    @property
    def concentrated(self) -> bool:
        """Whether the fit finds one variance in closed form."""
        return self.spec_.concentrated

    @property
    def ready(self) -> bool:
        """Whether the parameters are known."""
        return self.parameters_ is not None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the columns of ``parameters_``: variances are called ``sigma2.<component>``."""
        return self.spec_.names

    def state_names(self, dim: int) -> tuple[str, ...]:
        """Names of the elements of the state; ``seasonal_12.L1`` is last step's seasonal."""
        return self.spec_.state_names()

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Take the number of regressors into the specification."""
        self.spec_ = replace(self.spec_, n_inputs=input_dim)
        self.latent_dim = self.spec_.n_state
        check_fixed(self.spec_)
        if self.latent_dim == 0:
            raise ValueError(
                "the model has no component but the irregular one; give level, or inputs to fit"
            )

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError unless there is one column."""
        super().check_data(panel)
        if panel.n_dims != 1:
            raise ValueError(
                f"{type(self).__name__} models one column, but y has {panel.n_dims} "
                f"({', '.join(panel.columns)}); fit one column at a time, or pass them as the "
                "series of a long table (unique_id, ds, y)"
            )

    def components(
        self, y: Any = None, inputs: Any = None, *, smoothed: bool = True
    ) -> pd.DataFrame:
        """Components by name, with standard deviations, in the units of the model (logs if so).

        Parameters
        ----------
        y, inputs : array_like, optional
            Data; default those of `fit`.
        smoothed : bool
            Given all observations, or (False) those up to each step.

        Returns
        -------
        DataFrame
            Long table ``unique_id, ds`` and, for every component there is, ``level``, ``trend``
            (the slope), ``seasonal_<period>``, ``cycle``, ``ar``, ``regression`` and ``irregular``,
            each followed by ``<component>-std``. All but ``trend`` add up to the observed value.
            A standard deviation is infinite while a part of the component is still diffuse, and
            ``irregular`` has mean 0 and its own variance where nothing was observed.

        Examples
        --------
        >>> import seqdgm as sq
        >>> from seqdgm.models.structural import StructuralSSM
        >>> y = sq.datasets.load("airline").y
        >>> model = StructuralSSM(trend="stochastic", seasonal=12, transform="log").fit(y)
        >>> list(model.components().columns)[2:8:2]
        ['level', 'trend', 'seasonal_12']
        """
        states = self.smooth(y, inputs) if smoothed else self.filter(y, inputs)
        panel, batch, _ = prepare(self, y, inputs)
        parts = _emission(self.linear_gaussian(batch.u, batch.rows), batch.n_steps)
        load, noise = (part.expand(batch.n_series, *part.shape[1:]).numpy() for part in parts)
        names, moments = self._moments(states.mean, states.cov, load)
        if self.spec_.irregular:
            mean, variance = _projected(states.mean, states.cov, load)
            seen = batch.mask[..., 0].numpy()
            names.append("irregular")
            moments.append(
                (
                    np.where(seen, batch.x[..., 0].numpy() - mean, 0.0),
                    np.where(seen, variance, noise[..., 0]),
                )
            )
        tables = []
        for n, ds in enumerate(panel.index):
            table: dict[str, Any] = {"unique_id": [panel.ids[n]] * len(ds), "ds": ds}
            for name, (mean, variance) in zip(names, moments, strict=True):
                table[name] = mean[n, : len(ds)]
                table[f"{name}-std"] = np.sqrt(np.maximum(variance[n, : len(ds)], 0.0))
            tables.append(pd.DataFrame(table))
        return pd.concat(tables, ignore_index=True)

    def estimates(self) -> dict[str, float]:
        """Parameters of a single series."""
        if self.parameters_ is None or len(self.parameters_) > 1:
            return {}
        return dict(zip(self.parameter_names, self.parameters_[0].tolist(), strict=True))

    def extra_state(self) -> dict[str, Any]:
        """Names of the series with parameters of their own."""
        return {"ids": self._ids}

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take the names over."""
        self._ids = state["ids"]

    def fitted_ids(self) -> tuple[Any, ...] | None:
        """Names of the series that have parameters of their own."""
        return self._ids

    def linear_gaussian(
        self, u: Float[Tensor, "series steps inputs"], rows: Int[Tensor, "series"]
    ) -> System:
        """System matrices of each series."""
        parameters, sizes = self.parameters_, self.input_sizes_
        if len(parameters) > 1:
            parameters, sizes = parameters[rows], sizes[rows]
        return self._build_system(parameters.numpy(), None if sizes is None else sizes.numpy(), u)

    def free_start(self, batch: Batch, *, pooled: bool) -> Float[np.ndarray, "starts sys free"]:
        """Starting vectors that differ in which component moves most."""
        x = torch.where(batch.mask, batch.x, torch.nan)[..., 0].numpy()
        u = batch.u[:, : batch.n_steps].numpy() if self.spec_.n_inputs else None
        scope = find_scope(self.spec_, batch.lengths.numpy(), u, self.cycle_bounds, step_sizes(x))
        if pooled:
            scope = Scope(
                scope.periods.max(0)[None], scope.units.mean(0)[None], scope.sizes.mean(0)[None]
            )
        self._scope = scope
        start = starting_values(self.spec_, x, scope.periods)
        return start.mean(1, keepdims=True) if pooled else start

    def free_sizes(self, batch: Batch) -> Float[np.ndarray, "free"]:
        """One: angles and partial autocorrelations have no scale of their own."""
        return np.ones(self.spec_.n_free)

    def free_system(
        self,
        theta: Float[Tensor, "batch free"],
        rows: Int[Tensor, "batch"],
        u: Float[Tensor, "batch steps inputs"],
    ) -> System:
        """System matrices of unconstrained vectors, with variances up to a common factor."""
        assert self._scope is not None
        scope = self._scope.take(rows.numpy())
        parameters = constrain(self.spec_, theta.numpy(), scope)
        return self._build_system(parameters, scope.sizes, u)

    def set_free(
        self,
        theta: Float[Tensor, "sys free"],
        variance: Float[Tensor, "sys"],
        ids: tuple[Any, ...] | None,
    ) -> None:
        """Take over the optimum."""
        assert self._scope is not None
        parameters = torch.from_numpy(constrain(self.spec_, theta.numpy(), self._scope))
        parameters[:, : len(self.spec_.sources)] *= variance[:, None]
        self.parameters_ = parameters
        self.input_sizes_ = torch.from_numpy(self._scope.sizes)
        self._ids = ids if ids is not None and len(ids) > 1 else None
        self._scope = None

    def season_steps(self) -> int:
        """Steps of the longest season, 0 without one."""
        return max(self.spec_.periods, default=0)

    def natural(self) -> Natural:
        """Variances, and the parameters of cycle, damping and AR part."""
        names, known = self.parameter_names, self.fixed or {}
        free = tuple(name not in known for name in names)
        return Natural(names, self.parameters_.numpy(), free)

    def natural_inside(
        self, values: Float[np.ndarray, "rows parameters"]
    ) -> Bool[np.ndarray, "rows"]:
        """No negative variance, damping between 0 and 1, a period of at least 2, stationary AR."""
        inside = (values[:, : len(self.spec_.sources)] >= 0).all(1)
        named = dict(zip(self.parameter_names, values.T, strict=True))
        for name in ("trend.damping", "cycle.damping"):
            rho = named.get(name, np.zeros(len(values)))
            inside &= (rho >= 0) & (rho < 1)
        inside &= named.get("cycle.period", np.full(len(values), 2.0)) >= 2
        ar = values[:, values.shape[1] - self.spec_.ar :]
        return inside & (np.abs(partial_from_coefficients(ar)).max(1, initial=0.0) < 1)

    def natural_system(
        self,
        values: Float[np.ndarray, "rows parameters"],
        fits: Int[np.ndarray, "rows"],
        u: Float[Tensor, "rows steps inputs"],
    ) -> System:
        """System matrices of rows of parameters."""
        sizes = None if self.input_sizes_ is None else self.input_sizes_.numpy()[fits]
        return self._build_system(values, sizes, u)

    def _build_system(self, parameters: np.ndarray, sizes: np.ndarray | None, u: Tensor) -> System:
        if not self.spec_.n_inputs:
            return system(self.spec_, parameters, None)
        return system(self.spec_, parameters, u.numpy(), sizes)

    def _moments(
        self, mean: np.ndarray, cov: np.ndarray, load: np.ndarray
    ) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
        """Mean and variance of each component that is a part of the state."""
        names, moments = [], []
        for block in self.spec_.blocks:
            chosen = np.zeros_like(load)
            chosen[..., block.part] = load[..., block.part]
            if block.name == "trend":
                chosen[..., block.part] = 1.0
            names.append(block.name)
            moments.append(_projected(mean, cov, chosen))
        return names, moments


def _emission(
    matrices: System, steps: int
) -> tuple[Float[Tensor, "sys time state"], Float[Tensor, "sys time obs"]]:
    """Row of H and variance of the observation noise at every step, for one observed column."""
    load, noise = matrices.H[:, :, 0], matrices.R[:, :, 0]
    return (
        load[:, :steps].expand(load.shape[0], steps, -1),
        noise[:, :steps].expand(noise.shape[0], steps, -1),
    )


def _projected(
    mean: Float[np.ndarray, "series time state"],
    cov: Float[np.ndarray, "series time state state"],
    load: Float[np.ndarray, "series time state"],
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of load'z; infinite where an element with a load is diffuse."""
    used = load != 0
    diffuse = (used & np.isinf(np.diagonal(cov, axis1=-2, axis2=-1))).any(-1)
    known = np.where(np.isinf(cov), 0.0, cov)
    variance = np.einsum("ntk,ntkl,ntl->nt", load, known, load)
    return (load * mean).sum(-1), np.where(diffuse, np.inf, variance)
