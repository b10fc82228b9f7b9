r"""Orders and parameters of seasonal ARIMA models with regressors.

The model of a series :math:`x_t` with regressors :math:`u_t` is

.. math::

    \phi(L)\Phi(L^s)\, \delta(L)\,(x_t - u_t'\beta) = c + \kappa\,(t - 1)
        + \theta(L)\Theta(L^s)\,\varepsilon_t, \qquad
    \delta(L) = (1 - L)^d (1 - L^s)^D,

with :math:`\phi(L) = 1 - \phi_1 L - \dots` and :math:`\theta(L) = 1 + \theta_1 L + \dots`, the
signs of statsmodels; t counts from 1 at the first observation. Optimisers see unconstrained
numbers: partial autocorrelations instead of AR and MA coefficients, and the line
:math:`a + b\,(t - 1)` that the mean of the differenced series follows instead of :math:`c` and
:math:`\kappa`, which keeps them well determined near a unit root.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float

from seqdgm.models._polynomials import coefficients_from_partial, partial_from_coefficients

TRENDS = (None, "c", "t", "ct")

# Partial autocorrelations stay this far inside the unit interval.
_EDGE = 1.0 - 1e-9


@dataclass(frozen=True)
class ArimaSpec:
    """Orders of a seasonal ARIMA model with regressors.

    Parameters
    ----------
    p, d, q : int
        Autoregressive order, differences, moving-average order.
    P, D, Q, s : int
        The same at the seasonal lag, and the season length (0 or 1: no season).
    trend : {None, "c", "t", "ct"}
        Intercept, linear term, or both, in the equation of the differenced series.
    n_inputs : int
        Number of regressors.

    Raises
    ------
    ValueError
        For an order that is not a non-negative integer, a seasonal order without a season, or an
        unknown trend.

    Examples
    --------
    >>> spec = ArimaSpec(0, 1, 1, 0, 1, 1, 12)
    >>> spec.n_free, spec.names(), spec.n_state
    (2, ('ma.L1', 'ma.S.L12'), 14)
    """

    p: int = 0
    d: int = 0
    q: int = 0
    P: int = 0
    D: int = 0
    Q: int = 0
    s: int = 0
    trend: str | None = None
    n_inputs: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "trend":
                continue
            value = getattr(self, field.name)
            try:
                integer = operator.index(value)
            except TypeError:
                integer = -1
            if integer < 0 or isinstance(value, bool):
                raise ValueError(
                    f"{field.name}={value!r} is not a non-negative integer; orders are "
                    "(p, d, q) and seasonal=(P, D, Q, s)"
                )
        if (self.P or self.D or self.Q) and self.s < 2:
            raise ValueError(
                f"seasonal=({self.P}, {self.D}, {self.Q}, {self.s}) has no season; give the "
                "season length s >= 2, such as 12 for monthly data"
            )
        if self.trend not in TRENDS:
            raise ValueError(f"trend={self.trend!r} is unknown; choose one of {TRENDS}")

    @property
    def ar_order(self) -> int:
        """Degree of the product of both AR polynomials."""
        return self.p + self.s * self.P

    @property
    def ma_order(self) -> int:
        """Degree of the product of both MA polynomials."""
        return self.q + self.s * self.Q

    @property
    def n_diff(self) -> int:
        """Observations lost to differencing, which is the number of diffuse directions."""
        return self.d + self.s * self.D

    @property
    def n_state(self) -> int:
        """State dimension of :func:`system`."""
        return max(self.ar_order + self.n_diff, self.ma_order + 1)

    @property
    def n_arma(self) -> int:
        """Number of AR and MA coefficients."""
        return self.p + self.q + self.P + self.Q

    @property
    def n_trend(self) -> int:
        """Number of trend coefficients."""
        return 0 if self.trend is None else len(self.trend)

    @property
    def n_free(self) -> int:
        """Number of parameters besides the innovation variance."""
        return self.n_arma + self.n_trend + self.n_inputs

    def names(self, inputs: Sequence[str] | None = None) -> tuple[str, ...]:
        """Names of the coefficients in their order; `inputs` names the regressors."""
        regressors = [f"u{k + 1}" for k in range(self.n_inputs)] if inputs is None else list(inputs)
        if len(regressors) != self.n_inputs:
            raise ValueError(f"{len(regressors)} names for {self.n_inputs} regressors")
        lags = [f"ar.L{k + 1}" for k in range(self.p)]
        lags += [f"ma.L{k + 1}" for k in range(self.q)]
        lags += [f"ar.S.L{self.s * (k + 1)}" for k in range(self.P)]
        lags += [f"ma.S.L{self.s * (k + 1)}" for k in range(self.Q)]
        trend = [{"c": "const", "t": "drift"}[letter] for letter in self.trend or ""]
        return tuple(lags + trend + regressors)

    def split(self, values: Float[np.ndarray, "rows free"]) -> tuple[np.ndarray, ...]:
        """Columns of ar, ma, seasonal ar, seasonal ma, trend and regression coefficients."""
        counts = (self.p, self.q, self.P, self.Q, self.n_trend, self.n_inputs)
        return tuple(np.split(values, np.cumsum(counts)[:-1], axis=1))


def constrain(
    spec: ArimaSpec, free: Float[np.ndarray, "rows free"]
) -> Float[np.ndarray, "rows free"]:
    r"""Coefficients from unconstrained parameters: stationary and invertible by construction.

    Partial autocorrelations are :math:`\tanh` of the AR parameters, because the likelihood falls
    without bound towards a unit root, and :math:`\sin` of the MA parameters, because it is smooth
    and even there: a maximum on the boundary, which over-differenced series have, becomes an
    ordinary maximum at :math:`\pi/2` instead of one at infinity.

    References
    ----------
    Monahan (1984), as in :func:`coefficients_from_partial`; Jones (1980), Maximum likelihood
    fitting of ARMA models to time series with missing observations, Technometrics 22(3), 389-395.

    Examples
    --------
    >>> import numpy as np
    >>> constrain(ArimaSpec(1, 0, 1), np.array([[0.0, np.pi / 6]])).round(6).tolist()
    [[0.0, -0.5]]
    """
    ar, ma, sar, sma, line, beta = spec.split(np.asarray(free, dtype=np.float64))
    phi = [coefficients_from_partial(_EDGE * np.tanh(x)) for x in (ar, sar)]
    theta = [-coefficients_from_partial(_EDGE * np.sin(x)) for x in (ma, sma)]
    total, lagged = _ar_sums(spec, *phi)
    trend = line * total[:, None]
    if spec.trend == "ct":
        trend[:, 0] += line[:, 1] * lagged
    return np.concatenate([phi[0], theta[0], phi[1], theta[1], trend, beta], axis=1)


def unconstrain(
    spec: ArimaSpec, coefficients: Float[np.ndarray, "rows free"]
) -> Float[np.ndarray, "rows free"]:
    """Unconstrained parameters of given coefficients: :func:`constrain` undone.

    Raises
    ------
    ValueError
        If an AR polynomial is not stationary or an MA polynomial is not invertible (a root on the
        unit circle of an MA polynomial of degree one is moved inside by 1e-9).
    """
    ar, ma, sar, sma, trend, beta = spec.split(np.asarray(coefficients, dtype=np.float64))
    total, lagged = _ar_sums(spec, ar, sar)
    partial = [
        _checked_partial(phi, name)
        for phi, name in ((ar, "ar"), (-ma, "ma"), (sar, "seasonal ar"), (-sma, "seasonal ma"))
    ]
    line = trend.copy()
    if spec.trend == "ct":
        line[:, 0] -= trend[:, 1] / total * lagged
    line /= total[:, None]
    inverse = (np.arctanh, np.arcsin, np.arctanh, np.arcsin)
    return np.concatenate(
        [f(pi / _EDGE) for f, pi in zip(inverse, partial, strict=True)] + [line, beta], axis=1
    )


def _checked_partial(phi: np.ndarray, name: str) -> np.ndarray:
    pi = partial_from_coefficients(phi)
    bad = ~(np.abs(pi) <= 1.0) if "ma" in name else ~(np.abs(pi) < 1.0)
    if bad.any():
        series = int(np.flatnonzero(bad.any(1))[0])
        given = (phi if "ar" in name else -phi)[series]
        raise ValueError(
            f"row {series}: {name} coefficients {given.tolist()} are not "
            f"{'stationary' if 'ar' in name else 'invertible'}; give a polynomial whose roots lie "
            "outside the unit circle"
        )
    largest = np.nextafter(_EDGE, 0.0)
    return np.clip(pi, -largest, largest)


def _ar_sums(spec: ArimaSpec, ar: np.ndarray, sar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Of the product AR polynomial: its value at 1 and the sum of j times its lag-j coefficient.

    A line a + b t passes through it as :math:`\phi(1)(a + b t) + b \sum_j j\phi_j`.
    """
    one, one_s = 1.0 - ar.sum(1), 1.0 - sar.sum(1)
    slope = ar @ np.arange(1.0, spec.p + 1)
    slope_s = spec.s * (sar @ np.arange(1.0, spec.P + 1))
    return one * one_s, slope * one_s + one * slope_s
