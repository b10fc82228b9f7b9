"""ARIMA models whose orders are chosen by an information criterion, series by series."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.types import System
from seqdgm.models._arima import ArimaSpec, constrain
from seqdgm.models._auto_arima import (
    CRITERIA,
    Fit,
    Limits,
    Orders,
    Search,
    criteria,
    embed,
    exhaustive,
    make_plan,
    panel_system,
    stepwise,
    widest,
)
from seqdgm.models.arima import ARIMA
from seqdgm.panel import Panel
from seqdgm.recursion import StateSpaceModel
from seqdgm.transform import Function
from seqdgm.types import Batch, check_count


class AutoARIMA(StateSpaceModel):
    r"""Seasonal ARIMA whose orders are chosen for every series by Hyndman and Khandakar's search.

    .. math::

        \phi(L)\Phi(L^s)(1 - L)^d(1 - L^s)^D (x_t - u_t'\beta) = c
            + \theta(L)\Theta(L^s)\varepsilon_t, \quad \varepsilon_t \sim N(0, \sigma^2)

    D is 1 where the seasonal strength of an STL decomposition exceeds 0.64, d the number of
    differences until the KPSS test accepts a level at 5 %, and c is allowed if d + D is at most 1.
    The search minimises AICc over p, q, P, Q and whether there is a constant, from a few
    starting models to their neighbours. A model with a root of modulus below 1.01 is
    rejected. Every candidate is fitted by exact maximum likelihood: there is no conditional sum of
    squares anywhere, so criteria of all candidates are comparable, with missing values too.

    On a panel all series are searched together, each with its own orders.

    Parameters
    ----------
    season : int
        Steps in a season, 1 for none.
    max_p, max_q, max_P, max_Q, max_d, max_D : int
        Largest orders and differences. A short series has smaller ones: no polynomial is longer
        than a third of it.
    max_order : int
        Largest p + q + P + Q if ``stepwise=False``.
    d, D : int, optional
        Differences, instead of the tests.
    stationary : bool
        No differences.
    seasonal : bool
        Whether seasonal terms are considered.
    stepwise : bool
        Search stepwise, or (False) fit all models, which is slow.
    ic : {"aicc", "aic", "bic"}
        Information criterion.
    allow_mean, allow_drift : bool
        Whether a constant is considered with d + D = 0, and with d + D = 1.
    transform : {None, "log", "boxcox"} or tuple ("boxcox", power)
        Function applied to the data first, as in `ARIMA`; forecasts are transformed back without
        bias.

    Attributes
    ----------
    orders_ : DataFrame
        p, d, q, P, D, Q and constant of every series; its index holds their names.
    coefficients_ : Tensor of shape (series, coefficients)
        Estimates, in the order of ``coefficient_names``; zero for terms that a series' model does
        not have.
    sigma2_ : Tensor of shape (series,)
        Innovation variance.

    Examples
    --------
    >>> import seqdgm as sq
    >>> y = sq.datasets.load("airline").y
    >>> model = sq.AutoARIMA(season=12, transform="log").fit(y)
    >>> model.labels_
    ['ARIMA(0,1,1)(0,1,1)[12]']

    References
    ----------
    Hyndman and Khandakar (2008), Automatic time series forecasting: the forecast package for R,
    *Journal of Statistical Software* 27(3), section 3; Wang, Smith and Hyndman (2006),
    Characteristic-based clustering for time series data, *Data Mining and Knowledge Discovery* 13.
    """

    engines: ClassVar[tuple[str, ...]] = ("kalman",)
    learners: ClassVar[Mapping[str, str]] = {"mle": "order-search"}
    per_series: ClassVar[bool] = True
    min_length = 6

    def __init__(
        self,
        season: int = 1,
        *,
        max_p: int = 5,
        max_q: int = 5,
        max_P: int = 2,
        max_Q: int = 2,
        max_d: int = 2,
        max_D: int = 1,
        max_order: int = 5,
        d: int | None = None,
        D: int | None = None,
        stationary: bool = False,
        seasonal: bool = True,
        stepwise: bool = True,
        ic: str = "aicc",
        allow_mean: bool = True,
        allow_drift: bool = True,
        transform: Function = None,
    ) -> None:
        super().__init__()
        self.season, self.d, self.D = season, d, D
        self.max_p, self.max_q, self.max_P, self.max_Q = max_p, max_q, max_P, max_Q
        self.max_d, self.max_D, self.max_order = max_d, max_D, max_order
        self.stationary, self.seasonal, self.stepwise, self.ic = stationary, seasonal, stepwise, ic
        self.allow_mean, self.allow_drift, self.transform = allow_mean, allow_drift, transform
        check_count("season", season)
        for name in ("max_p", "max_q", "max_P", "max_Q", "max_d", "max_D", "max_order", "d", "D"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or int(value) != value or value < 0):
                raise ValueError(f"{name}={value!r} must be a whole number, at least 0")
        if ic not in CRITERIA:
            raise ValueError(f"ic={ic!r} is unknown; choose one of {CRITERIA}")
        if D and (season == 1 or not seasonal):
            raise ValueError(f"D={D} needs a season; give the season length, such as season=12")
        if stationary and (d or D):
            raise ValueError(f"stationary=True contradicts d={d} and D={D}; leave them out")
        self._ids: tuple[Any, ...] | None = None
        self.register_buffer("order_table_", None)
        self.register_buffer("coefficients_", None)
        self.register_buffer("sigma2_", None)

    # -- what was found -------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the orders and coefficients are known."""
        return self.sigma2_ is not None

    @property
    def orders_(self) -> pd.DataFrame:
        """Orders of every series."""
        self._check_ready()
        ids = (0,) if self._ids is None else self._ids
        table = pd.DataFrame(
            self.order_table_.numpy(),
            columns=list(Orders._fields),
            index=pd.Index(list(ids), tupleize_cols=False, name="unique_id"),
        )
        return table.astype({"constant": bool})

    @property
    def labels_(self) -> list[str]:
        """Name of every series' model in the usual notation."""
        self._check_ready()
        return [orders.label(self._season) for orders in self._chosen()]

    @property
    def arima_(self) -> ARIMA:
        """The chosen model of a single series as a plain, fitted `ARIMA`.

        Raises
        ------
        ValueError
            If there are several series.
        """
        self._check_ready()
        (orders, *more) = self._chosen()
        if more:
            raise ValueError(
                f"the model holds {len(more) + 1} series with orders of their own, see orders_; "
                "fit one of them to get its ARIMA"
            )
        model = self._plain(orders, self.transform)
        model.coefficients_, model.sigma2_ = self.coefficients_, self.sigma2_
        for name in ("obs_dim_", "input_dim_", "input_columns_", "data_", "inputs_"):
            setattr(model, name, getattr(self, name))
        model.transform_, model.fit_report_ = self.transform_, self.fit_report_
        return model

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        """Names of the columns of ``coefficients_``: all terms that some series has."""
        self._check_ready()
        return widest(self.order_table_.numpy(), self._season, self.input_dim_).names()

    def estimates(self) -> dict[str, float]:
        """Coefficients and innovation variance of a single series."""
        if self.sigma2_ is None or len(self.sigma2_) > 1:
            return {}
        named = zip(self.coefficient_names, self.coefficients_[0].tolist(), strict=True)
        return {**dict(named), "sigma2": float(self.sigma2_[0])}

    def summary(self) -> str:
        """Describe the model, how it was fitted, and the orders that were chosen."""
        text = super().summary()
        if not self.ready:
            return text
        counts = pd.Series(self.labels_).value_counts(sort=True)
        lines = [
            f"orders    {label}" + (f", {count} series" if len(self.sigma2_) > 1 else "")
            for label, count in counts.head(10).items()
        ]
        if len(counts) > 10:
            lines.append(f"orders    {len(counts) - 10} others, {counts[10:].sum()} series")
        return "\n".join([text, *lines])

    # -- the model ------------------------------------------------------------------------------

    def state_names(self, dim: int) -> tuple[str, ...]:
        """Names of the elements of the state; a smaller model leaves the last ones at zero."""
        return tuple(f"z{k + 1}" for k in range(dim))

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError unless there is one column."""
        super().check_data(panel)
        if panel.n_dims != 1:
            raise ValueError(
                f"AutoARIMA models one column, but y has {panel.n_dims} "
                f"({', '.join(panel.columns)}); fit one column at a time, or pass them as the "
                "series of a long table (unique_id, ds, y)"
            )

    def extra_state(self) -> dict[str, Any]:
        """Names of the series."""
        return {"ids": self._ids}

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take the names over."""
        self._ids = state["ids"]

    def fitted_ids(self) -> tuple[Any, ...] | None:
        """Names of the series, each of which has its own model."""
        return self._ids

    def linear_gaussian(
        self, u: Float[Tensor, "series steps inputs"], rows: Int[Tensor, "series"]
    ) -> System:
        """System matrices of each series, padded with zeros to the largest state."""
        orders, coefficients, sigma2 = self.order_table_, self.coefficients_, self.sigma2_
        if len(sigma2) > 1:
            orders, coefficients, sigma2 = orders[rows], coefficients[rows], sigma2[rows]
        layout = widest(self.order_table_.numpy(), self._season, self.input_dim_)
        return panel_system(
            orders.numpy(),
            coefficients.numpy(),
            sigma2.numpy(),
            layout,
            self._season,
            u.numpy() if self.input_dim_ else None,
            u.shape[1],
        )

    # -- the search -----------------------------------------------------------------------------

    def start_searches(self, batch: Batch) -> tuple[dict[int, Search], dict[int, Fit]]:
        """Search of each series, its differences settled, and the fits of those that need none."""
        limits = Limits(
            self.max_p,
            self.max_q,
            self.max_P,
            self.max_Q,
            0 if self.stationary else self.max_d,
            0 if self.stationary else self.max_D,
            self.max_order,
        )
        x, allowed = _values(batch), (self.allow_mean, self.allow_drift)
        plans = []
        for k, length in enumerate(batch.lengths.tolist()):
            u = batch.u[k, :length].numpy() if self.input_dim_ else None
            plan = make_plan(x[k, :length], u, self._season, limits, self.d, self.D, allowed)
            left = plan.n - plan.null.d - plan.null.D * self._season - self.input_dim_
            if left < 3:
                raise ValueError(
                    f"series {batch.ids[k]!r} has {plan.n} observations, too few for d="
                    f"{plan.null.d}, D={plan.null.D} and {self.input_dim_} regressors; give fewer "
                    "of them, or leave the series out"
                )
            plans.append(plan)
        search = stepwise if self.stepwise else exhaustive
        return (
            {k: search(plan) for k, plan in enumerate(plans) if plan.exact is None},
            {k: plan.exact for k, plan in enumerate(plans) if plan.exact is not None},
        )

    def fit_jobs(
        self, jobs: Sequence[tuple[int, Orders]], batch: Batch, max_iter: int
    ) -> list[Fit | None]:
        """Fit orders to series in one compiled call; None where it does not apply (many gaps)."""
        from seqdgm.models._arima_fit import fit_jobs

        specs = [self._spec(orders) for _, orders in jobs]
        series = np.array([k for k, _ in jobs], dtype=np.int64)
        u = batch.u[:, : batch.n_steps].numpy() if self.input_dim_ else None
        found = fit_jobs(
            specs, _values(batch), batch.lengths.numpy(), u, series=series, max_iter=max_iter
        )
        n = batch.mask.sum((1, 2)).numpy()[series]
        groups: dict[Orders, list[int]] = defaultdict(list)
        for j, (_, orders) in enumerate(jobs):
            if found.done[j]:
                groups[orders].append(j)
        out: list[Fit | None] = [None] * len(jobs)
        for orders, rows in groups.items():
            spec = self._spec(orders)
            fits = self.judge(
                orders,
                constrain(spec, found.theta[rows, : spec.n_free]),
                found.sigma2[rows],
                found.log_likelihood[rows],
                found.converged[rows],
                n[rows],
            )
            for j, one in zip(rows, fits, strict=True):
                out[j] = one
        return out

    def candidate(self, key: Orders) -> ARIMA:
        """Unfitted model of the orders."""
        return self._plain(key, None)

    def judge(
        self,
        key: Orders,
        coefficients: Float[np.ndarray, "series free"],
        sigma2: Float[np.ndarray, "series"],
        log_likelihood: Float[np.ndarray, "series"],
        converged: Bool[np.ndarray, "series"],
        n: Int[np.ndarray, "series"],
    ) -> list[Fit]:
        """Fits with their information criteria."""
        spec = self._spec(key)
        value = criteria(spec, coefficients, log_likelihood, n - spec.n_diff, self.ic)
        numbers = (sigma2, log_likelihood, value, converged)
        columns = zip(coefficients, *(column.tolist() for column in numbers), strict=True)
        return [Fit(key, *column) for column in columns]

    def set_chosen(self, chosen: Sequence[Fit], ids: tuple[Any, ...]) -> None:
        """Take over the best models."""
        orders = np.array([one.orders for one in chosen], dtype=np.int64)
        layout = widest(orders, self._season, self.input_dim_)
        rows = [embed(one.coefficients[None], self._spec(one.orders), layout) for one in chosen]
        self.order_table_ = torch.from_numpy(orders)
        self.coefficients_ = torch.from_numpy(np.concatenate(rows))
        self.sigma2_ = torch.tensor([one.sigma2 for one in chosen], dtype=torch.float64)
        self._ids = ids if len(ids) > 1 else None

    def join_series(self, parts: Sequence[Self], ids: tuple[Any, ...]) -> None:
        """Take over the models of parts of a panel."""
        orders = np.concatenate([part.order_table_.numpy() for part in parts])
        layout = widest(orders, self._season, self.input_dim_)
        rows = []
        for part in parts:
            own = widest(part.order_table_.numpy(), self._season, self.input_dim_)
            rows.append(embed(part.coefficients_.numpy(), own, layout))
        sigma2 = torch.cat([part.sigma2_ for part in parts])
        self.order_table_ = torch.from_numpy(orders)
        self.coefficients_ = torch.from_numpy(np.concatenate(rows))
        self.sigma2_, self._ids = sigma2, ids if len(ids) > 1 else None

    def _spec(self, orders: Orders) -> ArimaSpec:
        return orders.spec(self._season, self.input_dim_)

    def _plain(self, orders: Orders, transform: Function) -> ARIMA:
        spec = self._spec(orders)
        order, seasonal = (spec.p, spec.d, spec.q), (spec.P, spec.D, spec.Q, spec.s)
        model = ARIMA(order, seasonal, spec.trend, transform=transform)
        model.build(1, self.input_dim_)
        return model

    @property
    def _season(self) -> int:
        return int(self.season) if self.seasonal else 1

    def _chosen(self) -> Sequence[Orders]:
        return [Orders.of(row) for row in self.order_table_.tolist()]


def _values(batch: Batch) -> Float[np.ndarray, "series time"]:
    """Observations, NaN where missing."""
    return torch.where(batch.mask, batch.x, torch.nan)[..., 0].numpy()
