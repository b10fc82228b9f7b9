"""Vector autoregressive moving-average models, by exact maximum likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.kernels.types import System
from seqdgm.models._varma import (
    Scope,
    Varma,
    VarmaSpec,
    constrain,
    invertible,
    starting_values,
    system,
    unconstrain,
)
from seqdgm.panel import Panel
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import Batch


class VARMA(StateSpaceModel):
    r"""Vector ARMA(p, q) with a trend and regressors, by exact maximum likelihood.

    .. math::

        x_t &= \mu + \kappa\, (t - 1) + D u_t + w_t \\
        w_t &= \Phi_1 w_{t-1} + \dots + \Phi_p w_{t-p} + \varepsilon_t
            + \Theta_1 \varepsilon_{t-1} + \dots + \Theta_q \varepsilon_{t-q},
            \quad \varepsilon_t \sim N(0, \Sigma)

    :math:`w_t` starts in its stationary law. Every step of the search is stationary by construction
    (Ansley and Kohn 1986), and the moving average found is given in its invertible form. The mean
    is that of the series: in the other common form the intercept is
    :math:`c = (I - \Phi_1 - \dots - \Phi_p) \mu`. Missing elements are skipped exactly. On a panel
    every series is fitted on its own (``fit(pooled=True)`` shares the parameters).

    Parameters
    ----------
    order : tuple (p, q)
        With both above 0 the coefficients need not be unique, though the law of the data is:
        prefer ``(p, 0)`` unless the moving average is wanted.
    trend : {"c", "ct", None}
        Constant, constant and line, or a mean of zero.
    error_cov : {"full", "diagonal"}
        Whether the errors of different columns are correlated.
    transform : {None, "log"}
        Function applied to the data first; forecasts are transformed back without bias.
    scale : {None, "standard", "mean"}
        Scaling of the data inside the model; likelihoods stay in the data's own units.

    Attributes
    ----------
    mean_ : Tensor of shape (series, dim, regressors)
        Coefficients of the constant, of time and of the inputs.
    ar_, ma_ : Tensor of shape (series, p, dim, dim) and (series, q, dim, dim)
        Coefficient matrices by lag.
    cov_ : Tensor of shape (series, dim, dim)
        Covariance of the errors.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> phi, x = np.array([[0.5, 0.3], [0.0, 0.7]]), np.zeros((300, 2))
    >>> noise = np.random.default_rng(0).normal(size=(300, 2))
    >>> for t in range(1, 300):
    ...     x[t] = phi @ x[t - 1] + noise[t]
    >>> model = sq.VARMA((1, 0)).fit(x)
    >>> bool(abs(model.ar_[0, 0].numpy() - phi).max() < 0.1)
    True

    References
    ----------
    Ansley and Kohn (1986), A note on reparameterizing a vector autoregressive moving average model
    to enforce stationarity, *Journal of Statistical Computation and Simulation* 24; Lütkepohl
    (2005), *New Introduction to Multiple Time Series Analysis*, chapters 11 and 12; Hannan and
    Rissanen (1982), Recursive estimation of mixed autoregressive-moving average order,
    *Biometrika* 69 (starting values).
    """

    engines: ClassVar[tuple[str, ...]] = ("kalman",)
    learners: ClassVar[Mapping[str, str]] = {"mle": "quasi-newton"}
    concentrated: ClassVar[bool] = False
    per_series: ClassVar[bool] = True

    def __init__(
        self,
        order: tuple[int, int] = (1, 0),
        trend: str | None = "c",
        *,
        error_cov: str = "full",
        transform: str | None = None,
        scale: str | None = None,
    ) -> None:
        super().__init__()
        orders = tuple(order)
        if len(orders) != 2 or any(int(k) != k or k < 0 for k in orders):
            raise ValueError(f"order={order!r} must be (p, q), two whole numbers of at least 0")
        if trend not in (None, "c", "ct"):
            raise ValueError(f"trend={trend!r} is unknown; choose None, 'c' or 'ct'")
        if error_cov not in ("full", "diagonal"):
            raise ValueError(f"error_cov={error_cov!r} is unknown; use 'full' or 'diagonal'")
        self.order, self.trend, self.error_cov = orders, trend, error_cov
        self.transform, self.scale = transform, scale
        self.spec_ = VarmaSpec(int(orders[0]), int(orders[1]), trend, error_cov == "diagonal")
        self.min_length = self.spec_.p + self.spec_.q + self.spec_.n_mean + 2
        self._ids: tuple[Any, ...] | None = None
        self._scope: Scope | None = None
        for name in Varma._fields:
            self.register_buffer(f"{name}_", None)

    @property
    def ready(self) -> bool:
        """Whether the parameters are known."""
        return self.cov_ is not None

    @property
    def parameters_(self) -> Varma:
        """The parameters in use."""
        return Varma(*(getattr(self, f"{name}_").numpy() for name in Varma._fields))

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Take the number of columns and regressors into the specification."""
        self.spec_ = replace(self.spec_, dim=obs_dim, n_inputs=input_dim)
        self.latent_dim = self.spec_.n_state

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError for a series too short to leave errors of full rank."""
        super().check_data(panel)
        spec = self.spec_
        need = spec.dim * (spec.p + spec.q + 1) + spec.n_mean + 1
        for name, length in zip(panel.ids, panel.lengths.tolist(), strict=True):
            if self.ready or length >= need:
                continue
            raise ValueError(
                f"series {name!r} has {length} steps; {self!r} with {spec.dim} columns needs at "
                f"least {need}: give a longer series or lower orders"
            )

    def state_names(self, dim: int) -> tuple[str, ...]:
        """Names of the elements of the state: what is known of each column some steps ahead."""
        columns = range(1, self.spec_.dim + 1)
        blocks = range(self.spec_.n_state // self.spec_.dim)
        return tuple(f"w{k}" if j == 0 else f"w{k}+{j}" for j in blocks for k in columns)

    def estimates(self) -> dict[str, float]:
        """Parameters of a single series; ``ar.L1[0,1]`` is the effect of column 1 on column 0."""
        if not self.ready or len(self.parameters_.cov) > 1:
            return {}
        spec, found = self.spec_, self.parameters_
        trend = ["constant", "time"][: len(spec.trend or "")]
        regressors = trend + [f"u{k + 1}" for k in range(spec.n_inputs)]
        out = {
            f"{name}[{k}]": float(found.mean[0, k, j])
            for j, name in enumerate(regressors)
            for k in range(spec.dim)
        }
        for kind, matrices in (("ar", found.ar[0]), ("ma", found.ma[0])):
            for place in np.ndindex(*matrices.shape):
                lag, row, column = place
                out[f"{kind}.L{lag + 1}[{row},{column}]"] = float(matrices[place])
        for row, column in zip(*np.tril_indices(spec.dim), strict=True):
            out[f"cov[{row},{column}]"] = float(found.cov[0, row, column])
        return out

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
        return system(self.spec_, self.parameters_.take(rows.numpy()), u.numpy())

    def free_start(self, batch: Batch, *, pooled: bool) -> Float[np.ndarray, "starts sys free"]:
        """Hannan-Rissanen values, and the same without MA terms; their mean if pooled."""
        x = torch.where(batch.mask, batch.x, torch.nan).numpy()
        lengths = batch.lengths.tolist()
        series = [x[k, :length] for k, length in enumerate(lengths)]
        begin, scope = starting_values(self.spec_, series, list(batch.u.numpy()))
        starts = [begin]
        if self.spec_.q:
            plain, _ = starting_values(replace(self.spec_, q=0), series, list(batch.u.numpy()))
            starts.append(plain._replace(ma=np.zeros_like(begin.ma)))
        free = np.stack([unconstrain(self.spec_, start, scope) for start in starts])
        if pooled:
            centre, unit = scope.centre.mean(0)[None], scope.unit.mean(0)[None]
            scope = Scope(centre, unit, np.array([scope.regular.any()]))
            free = free.mean(1, keepdims=True)
        self._scope = scope
        return free

    def free_sizes(self, batch: Batch) -> Float[np.ndarray, "free"]:
        """One: logarithms, partial autocorrelations, and means in units of their own."""
        return np.ones(self.spec_.n_free)

    def free_system(
        self,
        theta: Float[Tensor, "batch free"],
        rows: Int[Tensor, "batch"],
        u: Float[Tensor, "batch steps inputs"],
    ) -> System:
        """System matrices of unconstrained vectors; not finite where there is no maximum."""
        assert self._scope is not None
        scope = self._scope.take(rows.numpy())
        found = constrain(self.spec_, theta.numpy(), scope)
        cov = np.where(scope.regular[:, None, None], found.cov, np.nan)
        return system(self.spec_, found._replace(cov=cov), u.numpy())

    def set_free(
        self,
        theta: Float[Tensor, "sys free"],
        variance: Float[Tensor, "sys"],
        ids: tuple[Any, ...] | None,
    ) -> None:
        """Take over the optimum."""
        assert self._scope is not None
        found = invertible(self.spec_, constrain(self.spec_, theta.numpy(), self._scope))
        for name, value in zip(Varma._fields, found, strict=True):
            setattr(self, f"{name}_", torch.from_numpy(np.ascontiguousarray(value)))
        self._ids = ids if ids is not None and len(ids) > 1 else None
        self._scope = None
