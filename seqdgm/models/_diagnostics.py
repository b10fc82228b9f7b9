"""What every exactly linear-Gaussian model can say about its own fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.inference.hessian import Natural
from seqdgm.kernels.types import System
from seqdgm.panel import Panel
from seqdgm.prepare import prepare
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.plotting import Figure


class LinearGaussianModel(StateSpaceModel):
    """Base of the models with exact Gaussian innovations: standard errors, criteria, residuals.

    A subclass gives `natural`, `natural_inside` and `natural_system`; the rest follows.
    """

    def fused(self, batch: Batch) -> System | None:
        """The system, unless its start is diffuse or an observation has no error."""
        system = self.linear_gaussian(batch.u[:, : batch.n_steps], batch.rows)
        singular = bool(torch.linalg.cholesky_ex(system.R).info.any())
        return None if singular or bool(system.Pinf.any()) else system

    def natural(self) -> Natural:
        """Parameters as they are reported: names, values of each fit, and which were estimated."""
        raise NotImplementedError(f"{type(self).__name__} must define natural()")

    def natural_inside(
        self, values: Float[np.ndarray, "rows parameters"]
    ) -> Bool[np.ndarray, "rows"]:
        """Whether rows of such parameters lie within their domain."""
        raise NotImplementedError(f"{type(self).__name__} must define natural_inside(values)")

    def natural_system(
        self,
        values: Float[np.ndarray, "rows parameters"],
        fits: Int[np.ndarray, "rows"],
        u: Float[Tensor, "rows steps inputs"],
    ) -> System:
        """System matrices of rows of such parameters; row k belongs to fit ``fits[k]``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define natural_system(values, fits, u)"
        )

    def season_steps(self) -> int:
        """Steps of the longest season in the model, 0 without one."""
        return 0

    @property
    def covariance_(self) -> Float[np.ndarray, "fits parameters parameters"]:
        """Covariance of the estimates, in the order of `parameter_table`; see there."""
        from seqdgm.evaluation.diagnostics import parameter_covariance

        return parameter_covariance(self)

    @property
    def standard_errors_(self) -> Float[np.ndarray, "fits parameters"]:
        """Standard errors of the estimates, in the order of `parameter_table`; see there."""
        return np.sqrt(np.diagonal(self.covariance_, axis1=1, axis2=2))

    def parameter_table(self, level: float = 95) -> pd.DataFrame:
        """Estimates with standard errors, tests and intervals.

        See `seqdgm.evaluation.diagnostics.parameter_table` for the columns.
        """
        from seqdgm.evaluation.diagnostics import parameter_table

        return parameter_table(self, level)

    def information_criteria(self) -> pd.DataFrame:
        """Log-likelihood, AIC, AICc and BIC of every fit.

        See `seqdgm.evaluation.diagnostics.information_criteria` for what is counted.
        """
        from seqdgm.evaluation.diagnostics import information_criteria

        return information_criteria(self)

    def aic(self) -> Float[np.ndarray, "fits"]:
        """Akaike's information criterion of every fit; see `information_criteria`."""
        return self.information_criteria()["aic"].to_numpy()

    def aicc(self) -> Float[np.ndarray, "fits"]:
        """Akaike's criterion corrected for short series; see `information_criteria`."""
        return self.information_criteria()["aicc"].to_numpy()

    def bic(self) -> Float[np.ndarray, "fits"]:
        """Schwarz's Bayesian information criterion of every fit; see `information_criteria`."""
        return self.information_criteria()["bic"].to_numpy()

    def residuals(self, y: Any = None, inputs: Any = None) -> Any:
        """Standardised one-step innovations, independent N(0, 1) if the model is true.

        Parameters
        ----------
        y, inputs : array_like, optional
            Data; default those of `fit`.

        Returns
        -------
        same container as `y`
            NaN where nothing was observed, and where an observation went into determining a
            diffuse element (the first d + sD of an ARIMA model). The elements of a vector are
            taken in sequence, each given those before it.

        Examples
        --------
        >>> import numpy as np, seqdgm as sq
        >>> model = sq.SeasonalNaive(1).fit(np.array([1.0, 2.0, 1.0, 2.0]))
        >>> model.residuals()
        array([nan,  1., -1.,  1.])
        """
        from seqdgm.inference.innovations import innovations

        panel, batch, _ = prepare(self._checked(), y, inputs)
        return _restored(panel, y, innovations(self, batch).standardised.numpy())

    def fitted_values(self, y: Any = None, inputs: Any = None) -> Any:
        """Mean of every observation given those before it, in the units of the data.

        Parameters
        ----------
        y, inputs : array_like, optional
            Data; default those of `fit`.

        Returns
        -------
        same container as `y`
            NaN while the past does not determine a prediction. Predictions for missing values are
            there. With a transformation it is the mean, not the median, that is returned.

        Examples
        --------
        >>> import numpy as np, seqdgm as sq
        >>> sq.SeasonalNaive(1).fit(np.array([1.0, 2.0, 1.0, 2.0])).fitted_values()
        array([nan,  1.,  2.,  1.])
        """
        import torch

        from seqdgm.inference.innovations import innovations

        panel, batch, transform = prepare(self._checked(), y, inputs)
        found = innovations(self, batch)
        known = torch.isfinite(found.variance)
        mean = transform.inverse_mean(found.mean, torch.where(known, found.variance, 0.0))
        return _restored(panel, y, torch.where(known, mean, torch.nan).numpy())

    def diagnostics(
        self, y: Any = None, inputs: Any = None, *, lags: int | None = None
    ) -> pd.DataFrame:
        """Test the residuals for correlation, a change of variance, and normality.

        See `seqdgm.evaluation.diagnostics.residual_tests` for the columns.

        Parameters
        ----------
        y, inputs : array_like, optional
            Data; default those of `fit`.
        lags : int, optional
            Lags of the Ljung-Box test; default two seasons, or 10 without a season, and at most a
            fifth of the residuals.
        """
        from seqdgm.evaluation.diagnostics import residual_tests

        return residual_tests(self, y, inputs, lags=lags)

    def plot_diagnostics(
        self,
        y: Any = None,
        inputs: Any = None,
        *,
        series: Any = None,
        column: str | None = None,
        lags: int | None = None,
    ) -> Figure:
        """Draw the standardised innovations; see `seqdgm.plotting_diagnostics.plot_residuals`."""
        from seqdgm.inference.innovations import innovations
        from seqdgm.plotting_diagnostics import plot_residuals

        panel, batch, _ = prepare(self._checked(), y, inputs)
        values = innovations(self, batch).standardised.numpy()
        return plot_residuals(
            replace(panel, values=values), series=series, column=column, lags=lags
        )

    def describe(self) -> list[str]:
        """Lines of `summary` about the estimates."""
        from seqdgm.evaluation.diagnostics import summary_lines

        return summary_lines(self)

    def _checked(self) -> LinearGaussianModel:
        self._check_ready()
        return self


def _restored(panel: Panel, y: Any, values: np.ndarray) -> Any:
    """Values in the caller's container."""
    given = replace(panel, container="panel") if isinstance(y, Panel) else panel
    return given.restore(values)
