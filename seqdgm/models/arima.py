"""ARIMA models and the seasonal naive forecast, through the linear-Gaussian machinery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.inference.hessian import Natural
from seqdgm.kernels.types import System
from seqdgm.models._arima import (
    ArimaSpec,
    constrain,
    parameter_sizes,
    starting_values,
    system,
)
from seqdgm.models._arima_spec import free_start, inside
from seqdgm.models._diagnostics import LinearGaussianModel
from seqdgm.panel import Panel
from seqdgm.transform import Function
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.models._arima_fit import Fits


class _ArimaBase(LinearGaussianModel):
    """What both models share: an `ArimaSpec`, its coefficients and the exact likelihood."""

    engines: ClassVar[tuple[str, ...]] = ("kalman",)
    learners: ClassVar[Mapping[str, str]] = {"mle": "quasi-newton"}
    per_series: ClassVar[bool] = True
    obs_dim_: int | None

    def __init__(
        self, spec: ArimaSpec, transform: Function, fixed: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.transform = transform
        self._fixed = _checked_fixed(fixed, spec)
        spec = spec.fix(self._fixed, spec.names())
        self.spec_ = spec
        self.latent_dim = spec.n_state
        self.min_length = spec.n_diff + spec.n_free + 2
        self._ids: tuple[Any, ...] | None = None
        self.register_buffer("coefficients_", None)
        self.register_buffer("sigma2_", None)

    @property
    def ready(self) -> bool:
        """Whether the coefficients are known."""
        return self.sigma2_ is not None

    @property
    def concentrated(self) -> bool:
        """Whether the innovation variance is estimated, in closed form; otherwise it is fixed."""
        return "sigma2" not in self._fixed

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        """Names of the columns of ``coefficients_``; regressors are called as their columns are."""
        return self.spec_.names(self.input_columns_)

    def season_steps(self) -> int:
        """Steps of the season, 0 without one."""
        return self.spec_.s

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Take the regressors into the specification."""
        plain = replace(self.spec_, n_inputs=input_dim, fixed=())
        names = plain.names(self.input_columns_)
        unknown = [name for name in self._fixed if name not in (*names, "sigma2")]
        if unknown:
            raise ValueError(_unknown_names(unknown, names))
        self.spec_ = plain.fix(self._fixed, names)

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError unless there is one column."""
        super().check_data(panel)
        if panel.n_dims != 1:
            raise ValueError(
                f"{type(self).__name__} models one column, but y has {panel.n_dims} "
                f"({', '.join(panel.columns)}); fit one column at a time, or pass them as the "
                "series of a long table (unique_id, ds, y)"
            )

    def estimates(self) -> dict[str, float]:
        """Coefficients and innovation variance of a single series."""
        if self.sigma2_ is None or len(self.sigma2_) > 1:
            return {}
        named = zip(self.coefficient_names, self.coefficients_[0].tolist(), strict=True)
        return {**dict(named), "sigma2": float(self.sigma2_[0])}

    def extra_state(self) -> dict[str, Any]:
        """Names of the series with parameters of their own."""
        return {"ids": self._ids}

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take the names over."""
        self._ids = state["ids"]

    def fitted_ids(self) -> tuple[Any, ...] | None:
        """Names of the series that have coefficients of their own."""
        return self._ids

    def linear_gaussian(
        self, u: Float[Tensor, "series steps inputs"], rows: Int[Tensor, "series"]
    ) -> System:
        """System matrices of each series."""
        coefficients, sigma2 = self.coefficients_, self.sigma2_
        if len(sigma2) > 1:
            coefficients, sigma2 = coefficients[rows], sigma2[rows]
        return self._build_system(coefficients.numpy(), sigma2.numpy(), u)

    def fit_series(self, batch: Batch, max_iter: int) -> Fits | None:
        """Fit every series on its own by the compiled search, which knows no fixed parameters."""
        spec = self.spec_
        if not self.concentrated or spec.n_free < spec.n_arma + spec.n_trend + spec.n_inputs:
            return None
        from seqdgm.models._arima_fit import fit_jobs

        x, u = self._arrays(batch)
        return fit_jobs(spec, x, batch.lengths.numpy(), u, max_iter=max_iter, trace=True)

    def compile_search(self) -> None:
        """Compile the search, once a process."""
        from seqdgm.models._arima_fit import warm_up

        warm_up()

    def free_start(self, batch: Batch, *, pooled: bool) -> Float[np.ndarray, "starts sys free"]:
        """Hannan-Rissanen values, and the same without ARMA terms: likelihoods have several tops.

        If pooled, their mean over the series.
        """
        x, u = self._arrays(batch)
        spec = replace(self.spec_, fixed=())
        start = np.empty((batch.n_series, spec.n_free))
        lengths = batch.lengths.numpy()
        for length in np.unique(lengths):  # a series starts where it would start alone
            rows = lengths == length
            known = None if u is None else u[rows, :length]
            start[rows] = starting_values(spec, x[rows, :length], known)
        start = start.mean(0, keepdims=True) if pooled else start
        starts = [start]
        if spec.n_arma:
            plain = start.copy()
            plain[:, : spec.n_arma] = 0.0
            starts.append(plain)
        if self.spec_.fixed:
            starts = [free_start(self.spec_, constrain(spec, values)) for values in starts]
        return np.stack(starts)

    def free_sizes(self, batch: Batch) -> Float[np.ndarray, "series free"]:
        """Typical sizes: one for ARMA parameters, those of the data for trend and regressors."""
        sizes = parameter_sizes(replace(self.spec_, fixed=()), *self._arrays(batch))
        return sizes[:, ~self.spec_.given]

    def free_system(
        self,
        theta: Float[Tensor, "batch free"],
        rows: Int[Tensor, "batch"],
        u: Float[Tensor, "batch steps inputs"],
    ) -> System:
        """System matrices of unconstrained vectors, with innovation variance 1 unless fixed."""
        variance = np.full(len(theta), self._fixed.get("sigma2", 1.0))
        return self._build_system(constrain(self.spec_, theta.numpy()), variance, u)

    def set_free(
        self,
        theta: Float[Tensor, "sys free"],
        variance: Float[Tensor, "sys"],
        ids: tuple[Any, ...] | None,
    ) -> None:
        """Take over the optimum."""
        self.coefficients_ = torch.from_numpy(constrain(self.spec_, theta.numpy()))
        self.sigma2_ = variance * self._fixed.get("sigma2", 1.0)
        self._ids = ids if ids is not None and len(ids) > 1 else None

    def natural(self) -> Natural:
        """Coefficients and innovation variance."""
        values = np.column_stack([self.coefficients_.numpy(), self.sigma2_.numpy()])
        free = (*~self.spec_.given, self.concentrated)
        return Natural((*self.coefficient_names, "sigma2"), values, tuple(map(bool, free)))

    def natural_inside(
        self, values: Float[np.ndarray, "rows parameters"]
    ) -> Bool[np.ndarray, "rows"]:
        """Stationary, invertible, and a positive variance."""
        return inside(self.spec_, values[:, :-1]) & (values[:, -1] > 0)

    def natural_system(
        self,
        values: Float[np.ndarray, "rows parameters"],
        fits: Int[np.ndarray, "rows"],
        u: Float[Tensor, "rows steps inputs"],
    ) -> System:
        """System matrices of rows of coefficients and variances."""
        return self._build_system(values[:, :-1], values[:, -1], u)

    def _arrays(self, batch: Batch) -> tuple[np.ndarray, np.ndarray | None]:
        x = torch.where(batch.mask, batch.x, torch.nan)[..., 0].numpy()
        return x, batch.u[:, : batch.n_steps].numpy() if self.spec_.n_inputs else None

    def _build_system(self, coefficients: np.ndarray, sigma2: np.ndarray, u: Tensor) -> System:
        known = u.numpy() if self.spec_.n_inputs else None
        return system(self.spec_, coefficients, sigma2, known, u.shape[1])


class ARIMA(_ArimaBase):
    r"""Seasonal ARIMA(p, d, q)(P, D, Q)s with regressors, by exact maximum likelihood.

    .. math::

        \phi(L)\Phi(L^s)(1 - L)^d(1 - L^s)^D (x_t - u_t'\beta) = c + \kappa (t - 1)
            + \theta(L)\Theta(L^s)\varepsilon_t, \quad \varepsilon_t \sim N(0, \sigma^2)

    The differenced part starts exactly diffuse; a diffuse element adds
    :math:`-\tfrac12 \log F_\infty` and no :math:`2\pi` term, so the log-likelihood is that of the
    differenced series. AR polynomials are stationary and MA polynomials invertible by
    construction. Missing values are skipped exactly. On a panel every series is fitted on its own
    (``fit(pooled=True)`` shares the coefficients).

    Parameters
    ----------
    order : tuple (p, d, q)
    seasonal : tuple (P, D, Q, s)
    trend : {None, "c", "t", "ct"}
        Intercept :math:`c` (called ``const``), linear term :math:`\kappa` (``drift``) or both, in
        the equation of the differenced series. After one difference ``"c"`` is what R's
        ``forecast::Arima`` calls ``include.drift``: the series climbs by
        :math:`c / (\phi(1)\Phi(1))` a step (a season, if the difference is seasonal), and without
        AR terms by ``const`` itself. With no difference the mean is
        :math:`c / (\phi(1)\Phi(1))`, which R reports instead of :math:`c`.
    fixed : mapping of str to float, optional
        Values of coefficients that are not to be estimated, by the names of ``coefficient_names``
        (``"ar.L1"``, ``"ma.S.L12"``, ``"const"``, ``"drift"``, a regressor's column or ``"u1"``),
        or of ``"sigma2"``, in the units of the transformed data. Fixing lags at 0 gives a sparse
        polynomial.
    transform : {None, "log", "boxcox"} or tuple ("boxcox", power)
        Function applied to the data first: the logarithm or the Box-Cox function
        :math:`(x^\lambda - 1) / \lambda` with the power given, or estimated by maximum likelihood
        between 0 (the logarithm) and 2. Forecasts are transformed back without bias: means are
        means, quantiles quantiles, and likelihoods are those of the data.

    Attributes
    ----------
    coefficients_ : Tensor of shape (series, coefficients)
        Estimates, in the order of ``coefficient_names``.
    sigma2_ : Tensor of shape (series,)
        Innovation variance.

    Examples
    --------
    The airline model (Box and Jenkins 1976):

    >>> import seqdgm as sq
    >>> y = sq.datasets.load("airline").y
    >>> model = sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 12), transform="log").fit(y)
    >>> [round(c, 3) for c in model.coefficients_[0].tolist()]
    [-0.402, -0.557]
    >>> model.standard_errors_[0].round(3).tolist()
    [0.09, 0.073, 0.0]

    References
    ----------
    Harvey (1989), *Forecasting, Structural Time Series Models and the Kalman Filter*, section 3.4;
    Durbin and Koopman (2012), section 3.4 and chapter 5.
    """

    def __init__(
        self,
        order: tuple[int, int, int] = (1, 0, 0),
        seasonal: tuple[int, int, int, int] = (0, 0, 0, 0),
        trend: str | None = None,
        *,
        fixed: Mapping[str, float] | None = None,
        transform: Function = None,
    ) -> None:
        if len(tuple(order)) != 3 or len(tuple(seasonal)) != 4:
            raise ValueError(
                f"order={order!r} must be (p, d, q) and seasonal={seasonal!r} (P, D, Q, s)"
            )
        super().__init__(ArimaSpec(*order, *seasonal, trend), transform, fixed)
        self.order, self.seasonal, self.trend = tuple(order), tuple(seasonal), trend
        self.fixed = fixed


class SeasonalNaive(_ArimaBase):
    r"""The last season repeated, with Gaussian errors: :math:`x_t = x_{t-s} + \varepsilon_t`.

    It is ARIMA(0,0,0)(0,1,0)s, the yardstick of every comparison; ``season=1`` is the random walk.

    Parameters
    ----------
    season : int
        Steps in a season.
    transform : {None, "log", "boxcox"} or tuple ("boxcox", power)
        Function applied to the data first, as in `ARIMA`.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> sq.SeasonalNaive(2).fit(np.array([1.0, 5.0, 2.0, 6.0, 1.0, 5.0])).forecast(2).mean.ravel()
    array([1., 5.])

    References
    ----------
    Hyndman and Athanasopoulos (2021), *Forecasting: Principles and Practice*, 3rd ed., section 5.2.
    """

    def __init__(self, season: int = 1, *, transform: Function = None) -> None:
        if int(season) != season or season < 1:
            raise ValueError(f"season={season!r} must be a whole number of steps, at least 1")
        spec = ArimaSpec(d=1) if season == 1 else ArimaSpec(D=1, s=int(season))
        super().__init__(spec, transform)
        self.season = int(season)

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Refuse regressors, which a naive forecast has no use for."""
        if input_dim:
            raise ValueError("SeasonalNaive takes no inputs; use ARIMA for regressors")


def _checked_fixed(fixed: Mapping[str, float] | None, spec: ArimaSpec) -> dict[str, float]:
    """Fixed values as numbers; names that only the data can tell are left to `build`."""
    given = dict(fixed or {})
    for name, value in given.items():
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not isinstance(name, str) or not number or not np.isfinite(value):
            raise ValueError(f"fixed has {name!r}: {value!r}; give a finite number for each name")
    if given.get("sigma2", 1.0) <= 0:
        raise ValueError(f"fixed sigma2={given['sigma2']!r} must be positive")
    own = (*spec.names(), "sigma2")
    wrong = [k for k in given if k not in own and k.startswith(("ar.", "ma.", "const", "drift"))]
    if wrong:
        raise ValueError(_unknown_names(wrong, spec.names()))
    return {name: float(value) for name, value in given.items()}


def _unknown_names(unknown: list[str], names: tuple[str, ...]) -> str:
    return (
        f"fixed names {unknown}, which the model does not have; its names are {[*names, 'sigma2']}"
    )
