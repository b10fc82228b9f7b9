r"""Log-squares of a stochastic volatility model as a linear-Gaussian one (quasi-likelihood).

With :math:`y_t = \log (x_t - m_t)^2`, :math:`c = E \log v^2` and :math:`R = \mathrm{Var} \log v^2`

.. math::

    y_t = c + z_t + \xi_t, \quad E \xi_t = 0, \quad \mathrm{Var}\, \xi_t = R

is linear, but :math:`\xi_t` is not Gaussian; taking it for Gaussian gives consistent estimates
(Harvey, Ruiz and Shephard 1994). With leverage the signs of the errors are conditioned on (Harvey
and Shephard 1996): given :math:`s_t = \mathrm{sign}(v_t)` and with :math:`\kappa = E|s(v)|`

.. math::

    E[\sigma e_{t+1} \mid s_t] = s_t \phi \sigma \kappa, \quad
    \mathrm{Cov}(\sigma e_{t+1}, \xi_t \mid s_t) = 2 \log 2\; s_t \phi \sigma \kappa,

so that the last observation enters the transition of the next state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.kernels.types import System
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.models.stochastic_volatility import StochasticVolatility

# Unconstrained forms, and back.
FORMS: dict[str, tuple[Callable[[float], float], Callable[[Tensor], Tensor]]] = {
    "mu": (float, torch.Tensor.clone),
    "rho": (math.atanh, torch.tanh),
    "sigma": (math.log, torch.exp),
    "df": (lambda value: math.log(value - 2), lambda theta: 2 + theta.exp()),
    "correlation": (math.atanh, torch.tanh),
}


@dataclass(frozen=True)
class LogSquares:
    """The linear-Gaussian stand-in, as the quasi-Newton learner wants it.

    Attributes
    ----------
    model : StochasticVolatility
        Takes the optimum over.
    mu_start : float
        Where the search for the mean of the log-variance begins.
    """

    concentrated: ClassVar[bool] = False
    model: StochasticVolatility
    mu_start: float

    @classmethod
    def of(
        cls, model: StochasticVolatility, batch: Batch, residual: Float[Tensor, "series time 1"]
    ) -> tuple[LogSquares, Batch]:
        """Stand-in of a model, and the log-squares of the residuals as its data.

        A residual of exactly zero has no logarithm; it counts as half of the smallest one that is
        not zero. The signs and values that the next transition needs travel as inputs.

        Raises
        ------
        ValueError
            If all residuals are zero.
        """
        size = residual.abs()
        smallest = torch.where(batch.mask & (size > 0), size, torch.inf).min()
        if not bool(torch.isfinite(smallest)):
            raise ValueError(
                f"series {batch.ids[0]!r}: every observation equals its mean, so there is no "
                "volatility to learn"
            )
        y = torch.where(batch.mask, 2 * size.clamp_min(0.5 * smallest).log(), 0.0)
        signs = torch.where(batch.mask, residual.sign(), 0.0)
        before = torch.cat([signs, y], 2)
        known = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], 1)
        df = model.df
        centre = _log_square_mean(None if df is None else df.detach())
        return cls(model, float(y[batch.mask].mean() - centre)), replace(batch, x=y, u=known)

    @property
    def names(self) -> list[str]:
        """Parameters to be learned."""
        return [name for name in FORMS if name in self.model.free]

    def free_start(self, batch: Batch, *, pooled: bool) -> Float[np.ndarray, "starts sys free"]:
        """Two persistences to start from, the higher one typical of daily returns."""
        starts = []
        for rho, sigma in ((0.95, 0.25), (0.6, 0.7)):
            natural = {"mu": self.mu_start, "rho": rho, "sigma": sigma, "df": 10.0}
            natural["correlation"] = -0.1
            starts.append([[FORMS[name][0](natural[name]) for name in self.names]])
        return np.array(starts)

    def free_sizes(self, batch: Batch) -> float:
        """One: all are logarithms or their like."""
        return 1.0

    def free_system(
        self,
        theta: Float[Tensor, "batch free"],
        rows: Int[Tensor, "batch"],
        u: Float[Tensor, "batch steps inputs"],
    ) -> System:
        """System matrices of unconstrained vectors."""
        p = self._natural(theta)
        mu, rho, sigma = (p[name][:, None] for name in ("mu", "rho", "sigma"))
        df = p.get("df")
        wide = None if df is None else df[:, None]
        centre, spread = _log_square_mean(wide), _log_square_variance(wide)
        sign, last = u[..., 0], u[..., 1]
        f, b, q = rho, (1 - rho) * mu, sigma**2
        if "correlation" in p:
            shift = p["correlation"][:, None] * sigma * _mean_size(wide) * sign
            gain = 2 * math.log(2) * shift / spread
            f, b = rho - gain, b + shift + gain * (last - centre)
            q = sigma**2 - shift**2 - gain**2 * spread
        stationary = (sigma**2 / (1 - rho**2))[..., None]
        return System(
            F=f[..., None, None],
            Q=q[..., None, None],
            H=torch.ones_like(mu)[..., None, None],
            R=(spread + torch.zeros_like(mu))[..., None, None],
            b=b[..., None],
            d=(centre + torch.zeros_like(mu))[..., None],
            m0=mu,
            P0=stationary,
            Pinf=torch.zeros_like(stationary),
        )

    def set_free(
        self,
        theta: Float[Tensor, "sys free"],
        variance: Float[Tensor, "sys"],
        ids: tuple[Any, ...] | None,
    ) -> None:
        """Hand the optimum to the model."""
        with torch.no_grad():
            for name, value in self._natural(theta).items():
                getattr(self.model, name).copy_(value[0])

    def _natural(self, theta: Float[Tensor, "rows free"]) -> dict[str, Tensor]:
        found = dict(zip(self.names, theta.unbind(1), strict=True))
        out = {}
        for name, (_, back) in FORMS.items():
            held = getattr(self.model, name)
            if name in found:
                out[name] = back(found[name])
            elif held is not None:
                out[name] = held.detach().expand(len(theta))
        return out


def _log_square_mean(df: Tensor | None) -> Tensor:
    """E log v^2."""
    half = torch.digamma(torch.tensor(0.5, dtype=torch.float64))
    return half + math.log(2) if df is None else half - torch.digamma(df / 2) + df.log()


def _log_square_variance(df: Tensor | None) -> Tensor:
    """Var log v^2."""
    half = torch.tensor(math.pi**2 / 2, dtype=torch.float64)
    return half if df is None else half + torch.polygamma(1, df / 2)


def _mean_size(df: Tensor | None) -> Tensor:
    """E |s(v)|: for Student-t errors s(v)^2 / (df + 1) is Beta(1/2, df/2)."""
    if df is None:
        return torch.tensor(math.sqrt(2 / math.pi), dtype=torch.float64)
    log_ratio = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2 + 1)
    return ((df + 1) / math.pi).sqrt() * log_ratio.exp()
