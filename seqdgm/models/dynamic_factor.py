"""Dynamic factor models: many series driven by a few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.kernels.types import System
from seqdgm.models._dynamic_factor import (
    Factors,
    FactorSpec,
    Scope,
    constrain,
    factor_ar,
    factor_free,
    normalised,
    starting_values,
    system,
    unconstrain,
)
from seqdgm.models._vector_ar import companion, stationary_covariance
from seqdgm.panel import Panel
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import Batch, check_count

if TYPE_CHECKING:
    from seqdgm.inference.em import Expected

_AR_STEPS = 1  # quasi-Newton iterations for the factors' coefficients in one EM step
_EM_STEPS = 30  # EM iterations before maximum likelihood


class DynamicFactor(StateSpaceModel):
    r"""Dynamic factor model, by exact maximum likelihood or EM.

    .. math::

        x_t &= \Lambda f_t + \mu + D u_t + e_t \\
        f_t &= A_1 f_{t-1} + \dots + A_p f_{t-p} + \eta_t, \quad \eta_t \sim N(0, I) \\
        e_{k,t} &= \phi_{k,1} e_{k,t-1} + \dots + \phi_{k,q} e_{k,t-q} + \varepsilon_{k,t}, \quad
            \varepsilon_{k,t} \sim N(0, \sigma_k^2)

    Factors and errors are stationary by construction and start in their stationary law; missing
    elements are skipped exactly. The scale of the factors is fixed by their unit innovations, their
    rotation by a diagonal :math:`\Lambda' \Sigma^{-1} \Lambda` with decreasing entries, their sign
    by a positive loading where it is largest in units of its error. On a panel every series (of
    several columns) is fitted on its own (``fit(pooled=True)`` shares the parameters).

    Parameters
    ----------
    n_factors : int
    factor_order : int
        Order p of the factors' autoregression; 0 for factors without memory.
    error_order : int
        Order q of the autoregression of each error; 0 for white errors, which ``method="em"``
        needs. Prefer EM for dozens of columns.
    trend : {"c", None}
        Whether there is a constant :math:`\mu`.
    transform : {None, "log"}
        Function applied to the data first.
    scale : {"standard", "mean", None}
        Scaling of the data inside the model; estimates are in its units, likelihoods and forecasts
        in the data's own.

    Attributes
    ----------
    loadings_ : Tensor of shape (series, dim, factors)
    mean_ : Tensor of shape (series, dim, regressors)
        Constant and coefficients of the inputs.
    ar_ : Tensor of shape (series, factor_order, factors, factors)
        Coefficient matrices of the factors by lag.
    error_ar_ : Tensor of shape (series, dim, error_order)
    error_variance_ : Tensor of shape (series, dim)

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> rng = np.random.default_rng(0)
    >>> f = np.zeros(200)
    >>> for t in range(1, 200):
    ...     f[t] = 0.8 * f[t - 1] + rng.normal()
    >>> x = np.outer(f, [1.0, 0.5, -0.6]) + 0.3 * rng.normal(size=(200, 3))
    >>> model = sq.DynamicFactor(1, scale=None).fit(x)
    >>> bool(abs(model.loadings_[0, :, 0].numpy() - [1.0, 0.5, -0.6]).max() < 0.2)
    True
    >>> model.smooth().names
    ('factor1',)

    References
    ----------
    Durbin and Koopman (2012), *Time Series Analysis by State Space Methods*, 2nd ed., section 3.7;
    Watson and Engle (1983), Alternative algorithms for the estimation of dynamic factor, MIMIC and
    varying coefficient regression models, *Journal of Econometrics* 23; Ansley and Kohn (1986)
    (stationarity).
    """

    engines: ClassVar[tuple[str, ...]] = ("kalman",)
    learners: ClassVar[Mapping[str, str]] = {"mle": "quasi-newton", "em": "em"}
    concentrated: ClassVar[bool] = False
    per_series: ClassVar[bool] = True

    def __init__(
        self,
        n_factors: int = 1,
        factor_order: int = 1,
        error_order: int = 0,
        trend: str | None = "c",
        *,
        transform: str | None = None,
        scale: str | None = "standard",
    ) -> None:
        super().__init__()
        check_count("n_factors", n_factors)
        for name, order in (("factor_order", factor_order), ("error_order", error_order)):
            if int(order) != order or order < 0:
                raise ValueError(f"{name}={order!r} must be a whole number, at least 0")
        if trend not in (None, "c"):
            raise ValueError(f"trend={trend!r} is unknown; choose 'c' or None")
        self.n_factors, self.factor_order, self.error_order = n_factors, factor_order, error_order
        self.trend, self.transform, self.scale = trend, transform, scale
        self.spec_ = FactorSpec(int(n_factors), int(factor_order), int(error_order), trend)
        self.min_length = factor_order + error_order + 2 * n_factors + 3
        self._ids: tuple[Any, ...] | None = None
        self._scope: Scope | None = None
        for name in Factors._fields:
            self.register_buffer(f"{name}_", None)

    @property
    def ready(self) -> bool:
        """Whether the parameters are known."""
        return self.loadings_ is not None

    @property
    def parameters_(self) -> Factors:
        """The parameters in use."""
        return Factors(*(getattr(self, f"{name}_") for name in Factors._fields))

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Take the number of columns and regressors into the specification."""
        self.spec_ = replace(self.spec_, dim=obs_dim, n_inputs=input_dim)
        self.latent_dim = self.spec_.n_state

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError for more factors than columns."""
        super().check_data(panel)
        if panel.n_dims < self.n_factors:
            raise ValueError(
                f"{self.n_factors} factors cannot be told apart from {panel.n_dims} columns; give "
                f"n_factors={panel.n_dims} or fewer"
            )

    def state_names(self, dim: int) -> tuple[str, ...]:
        """Names of the elements of the state: ``factor1.L1`` is last step's first factor."""
        spec = self.spec_
        names = [
            (f"factor{k + 1}", lag)
            for lag in range(max(spec.factor_order, 1))
            for k in range(spec.n_factors)
        ]
        names += [
            (f"error{k + 1}", lag) for lag in range(spec.error_order) for k in range(spec.dim)
        ]
        return tuple(name + (f".L{lag}" if lag else "") for name, lag in names)

    def estimates(self) -> dict[str, float]:
        """Parameters of a single series."""
        if not self.ready or len(self.parameters_.loadings) > 1:
            return {}
        spec, found = self.spec_, Factors(*(field[0] for field in self.parameters_))
        regressors = ["constant"] * len(spec.trend or "")
        regressors += [f"u{k + 1}" for k in range(spec.n_inputs)]
        out: dict[str, Tensor] = {}
        for k in range(spec.dim):
            out |= {f"loading[{k},{j}]": v for j, v in enumerate(found.loadings[k])}
            out |= {f"{n}[{k}]": v for n, v in zip(regressors, found.mean[k], strict=True)}
            out |= {f"error{k + 1}.ar.L{j + 1}": v for j, v in enumerate(found.error_ar[k])}
            out[f"sigma2.error{k + 1}"] = found.error_variance[k]
        for place in np.ndindex(*found.ar.shape):
            out[f"factor.ar.L{place[0] + 1}[{place[1]},{place[2]}]"] = found.ar[place]
        return {name: float(value) for name, value in out.items()}

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
        return system(self.spec_, self.parameters_.take(rows), u.numpy())

    # -- expectation-maximisation ---------------------------------------------------------------

    def em_starts(self, batch: Batch, *, pooled: bool) -> list[Factors]:
        """Principal components.

        Raises
        ------
        ValueError
            If the errors are autoregressive.
        """
        if self.error_order:
            raise ValueError(
                f"EM has no closed form with error_order={self.error_order}; use method='mle'"
            )
        found, scope = self._start(self.spec_, batch, pooled)
        self._scope = scope
        return [found]

    def em_system(self, parameters: Factors, u: Float[Tensor, "series steps inputs"]) -> System:
        """System matrices of the parameters."""
        return system(self.spec_, parameters, u.numpy())

    def em_step(self, parameters: Factors, expected: Expected) -> Factors:
        """Regression of the columns on the factors; then of the factors on their past.

        The first is in closed form. The second weighs in that the first factors come from the
        stationary law, which depends on the coefficients too, and so climbs by quasi-Newton.
        """
        spec = self.spec_
        moments = expected.emission()
        widths = [spec.n_factors, spec.n_lags - spec.n_factors, spec.n_inputs, 1]
        chosen = [True, False, True, bool(spec.trend)]
        change, spread = moments.regress(
            torch.repeat_interleave(torch.tensor(chosen), torch.tensor(widths))
        )
        loadings, _, inputs, constant = torch.split(change, widths, -1)
        mean = torch.cat([constant, inputs] if spec.trend else [inputs], -1)
        variance = torch.diagonal(spread, dim1=-2, dim2=-1)
        return parameters._replace(
            loadings=parameters.loadings + loadings,
            mean=parameters.mean + mean,
            ar=self._climb(parameters.ar, expected),
            error_variance=torch.maximum(variance, expected.least_noise),
        )

    def em_set(
        self, parameters: Factors, start: Int[Tensor, "sys"], ids: tuple[Any, ...] | None
    ) -> None:
        """Take over the end."""
        self._take(parameters, ids)

    def _climb(self, ar: Tensor, expected: Expected) -> Tensor:
        """Coefficients of the factors with a higher expected complete-data likelihood."""
        from seqdgm.inference.quasi_newton import maximise

        spec = self.spec_
        if spec.factor_order == 0:
            return ar
        r, width, old = spec.n_factors, spec.n_lags, ar.numpy()
        past = expected.transition()
        cross, square = past.rg[:, :r, :width].numpy(), past.gg[:, :width, :width].numpy()
        mean, cov = expected.first
        first = cov + mean[..., :, None] * mean[..., None, :]
        count = np.full(len(old), 1.0)
        if expected.pooled:
            count = np.full(len(old), float(len(first)))
            first = first.sum(0, keepdim=True)
        begin = first.numpy()
        shock = np.zeros((1, width, width))
        shock[:, :r, :r] = np.eye(r)

        def objective(free: np.ndarray, rows: np.ndarray) -> np.ndarray:
            new = factor_ar(spec, free)
            flat = companion(new)
            step = (flat - companion(old)[rows])[:, :r]
            fit = (step * cross[rows]).sum((1, 2)) - 0.5 * (step @ square[rows] * step).sum((1, 2))
            start = stationary_covariance(flat, np.broadcast_to(shock, flat.shape))
            size = np.linalg.slogdet(start)[1]
            spread = np.einsum("nii->n", np.linalg.solve(start, begin[rows]))
            value: np.ndarray = fit - 0.5 * (count[rows] * size + spread)
            return value

        best = maximise(objective, factor_free(old), max_iter=_AR_STEPS)
        return torch.from_numpy(factor_ar(spec, best.theta))

    # -- maximum likelihood ---------------------------------------------------------------------

    def free_start(self, batch: Batch, *, pooled: bool) -> Float[np.ndarray, "starts sys free"]:
        """Principal components, and some EM steps from them: likelihoods have several tops."""
        from seqdgm.inference.em import fit as em

        draft = type(self)(self.n_factors, self.factor_order, 0, self.trend)
        draft.build(self.spec_.dim, self.spec_.n_inputs)
        em(
            draft,
            batch,
            method="em",
            generator=torch.Generator(),
            progress=False,
            max_iter=_EM_STEPS,
            pooled=pooled,
        )
        begin, scope = self._start(self.spec_, batch, pooled)
        self._scope = scope
        starts = [draft.parameters_._replace(error_ar=torch.zeros_like(begin.error_ar)), begin]
        return np.stack([unconstrain(self.spec_, start, scope) for start in starts])

    def free_sizes(self, batch: Batch) -> Float[np.ndarray, "free"]:
        """One: everything is in units of its own."""
        return np.ones(self.spec_.n_free)

    def free_system(
        self,
        theta: Float[Tensor, "batch free"],
        rows: Int[Tensor, "batch"],
        u: Float[Tensor, "batch steps inputs"],
    ) -> System:
        """System matrices of unconstrained vectors."""
        assert self._scope is not None
        found = constrain(self.spec_, theta.numpy(), self._scope.take(rows.numpy()))
        return system(self.spec_, found, u.numpy())

    def set_free(
        self,
        theta: Float[Tensor, "sys free"],
        variance: Float[Tensor, "sys"],
        ids: tuple[Any, ...] | None,
    ) -> None:
        """Take over the optimum."""
        assert self._scope is not None
        self._take(constrain(self.spec_, theta.numpy(), self._scope), ids)

    def _take(self, parameters: Factors, ids: tuple[Any, ...] | None) -> None:
        for name, value in zip(Factors._fields, normalised(parameters), strict=True):
            setattr(self, f"{name}_", value.contiguous())
        self._ids = ids if ids is not None and len(ids) > 1 else None
        self._scope = None

    def _start(self, spec: FactorSpec, batch: Batch, pooled: bool) -> tuple[Factors, Scope]:
        """Starting values of every series, or (pooled) those of the longest one."""
        x = torch.where(batch.mask, batch.x, torch.nan).numpy()
        lengths = batch.lengths.tolist()
        chosen = [int(np.argmax(lengths))] if pooled else range(batch.n_series)
        return starting_values(
            spec, [x[k, : lengths[k]] for k in chosen], [batch.u[k].numpy() for k in chosen]
        )
