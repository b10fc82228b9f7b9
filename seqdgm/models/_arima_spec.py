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

Coefficients may be fixed. Optimisers then see the others only: :func:`constrain` takes a row of
free parameters and returns all coefficients. Where a part of a polynomial is fixed its free
coefficients are parameters themselves, and a row outside the domain comes back as NaN; the same
holds, without a domain, for a trend of which one term is fixed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Bool, Float

from seqdgm.models._polynomials import coefficients_from_partial, partial_from_coefficients

_POLYNOMIALS = ("ar", "ma", "seasonal ar", "seasonal ma", None, None)
TRENDS = (None, "c", "t", "ct")

# Partial autocorrelations stay this far inside the unit interval.
_EDGE = 1.0 - 1e-9
# A start where a part of a polynomial is fixed: candidates drawn, and how far inside it should be.
_CANDIDATES = 4096
_START_EDGE = 0.97


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
    fixed : tuple of float or None
        Value of each coefficient that is not estimated, None for the others; empty if none is
        fixed.

    Raises
    ------
    ValueError
        For an order that is not a non-negative integer, a seasonal order without a season, an
        unknown trend, or a polynomial fixed outside its domain.

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
    fixed: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in ("trend", "fixed"):
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
        if self.fixed:
            _check_fixed(self)

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
    def n_coefficients(self) -> int:
        """Number of coefficients, fixed ones included; the innovation variance is none."""
        return self.n_arma + self.n_trend + self.n_inputs

    @property
    def n_free(self) -> int:
        """Number of coefficients to estimate."""
        return self.n_coefficients - sum(value is not None for value in self.fixed)

    @property
    def given(self) -> Bool[np.ndarray, "coefficients"]:
        """Which coefficients are fixed."""
        if not self.fixed:
            return np.zeros(self.n_coefficients, dtype=bool)
        return np.array([value is not None for value in self.fixed], dtype=bool)

    def fix(self, values: Mapping[str, float], names: Sequence[str]) -> ArimaSpec:
        """The same orders with the named coefficients fixed; `names` are those of `names()`.

        Examples
        --------
        >>> spec = ArimaSpec(2, 0, 1)
        >>> spec.fix({"ar.L1": 0.0}, spec.names()).fixed
        (0.0, None, None)
        """
        fixed = tuple(None if name not in values else float(values[name]) for name in names)
        return replace(self, fixed=fixed if any(v is not None for v in fixed) else ())

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
        names = tuple(lags + trend + regressors)
        if len(set(names)) < len(names):
            raise ValueError(
                f"the regressors {regressors} share a name, with each other or with a coefficient "
                f"({lags + trend}); rename the columns of inputs"
            )
        return names

    def split(self, values: Float[np.ndarray, "rows coefficients"]) -> tuple[np.ndarray, ...]:
        """Columns of ar, ma, seasonal ar, seasonal ma, trend and regression coefficients."""
        counts = (self.p, self.q, self.P, self.Q, self.n_trend, self.n_inputs)
        return tuple(np.split(values, np.cumsum(counts)[:-1], axis=1))


def constrain(
    spec: ArimaSpec, free: Float[np.ndarray, "rows free"]
) -> Float[np.ndarray, "rows coefficients"]:
    r"""All coefficients from unconstrained parameters: stationary and invertible by construction.

    Partial autocorrelations are :math:`\tanh` of the AR parameters, because the likelihood falls
    without bound towards a unit root, and :math:`\sin` of the MA parameters, because it is smooth
    and even there: a maximum on the boundary, which over-differenced series have, becomes an
    ordinary maximum at :math:`\pi/2` instead of one at infinity.

    The free coefficients of a polynomial, or of a trend, of which others are fixed are parameters
    themselves; a row with a polynomial outside the domain is NaN.

    References
    ----------
    Monahan (1984), as in :func:`coefficients_from_partial`; Jones (1980), Maximum likelihood
    fitting of ARMA models to time series with missing observations, Technometrics 22(3), 389-395.

    Examples
    --------
    >>> import numpy as np
    >>> constrain(ArimaSpec(1, 0, 1), np.array([[0.0, np.pi / 6]])).round(6).tolist()
    [[0.0, -0.5]]
    >>> constrain(ArimaSpec(2, fixed=(0.0, None)), np.array([[0.3], [1.1]])).tolist()
    [[0.0, 0.3], [nan, nan]]
    """
    free = np.asarray(free, dtype=np.float64)
    full = np.empty((len(free), spec.n_coefficients))
    given = spec.given
    full[:, ~given] = free
    full[:, given] = [value for value in spec.fixed if value is not None]
    ar, ma, sar, sma, line, beta = spec.split(full)
    fixed = [bool(part.any()) for part in spec.split(given[None])]
    phi = [
        x if direct else coefficients_from_partial(_EDGE * np.tanh(x))
        for x, direct in ((ar, fixed[0]), (sar, fixed[2]))
    ]
    theta = [
        x if direct else -coefficients_from_partial(_EDGE * np.sin(x))
        for x, direct in ((ma, fixed[1]), (sma, fixed[3]))
    ]
    trend = line
    if not fixed[4]:
        total, lagged = _ar_sums(spec, *phi)
        trend = line * total[:, None]
        if spec.trend == "ct":
            trend[:, 0] += line[:, 1] * lagged
    out = np.concatenate([phi[0], theta[0], phi[1], theta[1], trend, beta], axis=1)
    if any(fixed[:4]):
        out[~inside(spec, out)] = np.nan
    return out


def unconstrain(
    spec: ArimaSpec, coefficients: Float[np.ndarray, "rows coefficients"]
) -> Float[np.ndarray, "rows free"]:
    """Unconstrained parameters of given coefficients: :func:`constrain` undone.

    Values of fixed coefficients are not read.

    Raises
    ------
    ValueError
        If an AR polynomial is not stationary or an MA polynomial is not invertible (a root on the
        unit circle of an MA polynomial of degree one is moved inside by 1e-9).
    """
    full = np.array(coefficients, dtype=np.float64)
    given = spec.given
    full[:, given] = [value for value in spec.fixed if value is not None]
    ar, ma, sar, sma, trend, beta = spec.split(full)
    fixed = [bool(part.any()) for part in spec.split(given[None])]
    parts = []
    for (phi, name), direct in zip(
        ((ar, "ar"), (-ma, "ma"), (sar, "seasonal ar"), (-sma, "seasonal ma")),
        fixed[:4],
        strict=True,
    ):
        partial = _checked_partial(phi, name) / _EDGE
        inverse = np.arcsin(partial) if "ma" in name else np.arctanh(partial)
        parts.append((-phi if "ma" in name else phi) if direct else inverse)
    line = trend.copy()
    if not fixed[4]:
        total, lagged = _ar_sums(spec, ar, sar)
        if spec.trend == "ct":
            line[:, 0] -= trend[:, 1] / total * lagged
        line /= total[:, None]
    return np.concatenate([*parts, line, beta], axis=1)[:, ~given]


def inside(
    spec: ArimaSpec, coefficients: Float[np.ndarray, "rows coefficients"]
) -> Bool[np.ndarray, "rows"]:
    """Whether AR polynomials are stationary and MA polynomials invertible (or at its limit)."""
    ar, ma, sar, sma, _, _ = spec.split(coefficients)
    largest = [
        np.abs(partial_from_coefficients(phi)).max(1, initial=0.0) for phi in (ar, sar, -ma, -sma)
    ]
    return (largest[0] < 1) & (largest[1] < 1) & (largest[2] <= 1) & (largest[3] <= 1)


def free_start(
    spec: ArimaSpec, coefficients: Float[np.ndarray, "rows coefficients"]
) -> Float[np.ndarray, "rows free"]:
    """Unconstrained parameters near given coefficients, once the fixed ones have their values.

    Where that leaves the domain, the free coefficients of the polynomial move to the nearest of
    some points drawn within it.

    Raises
    ------
    ValueError
        If what is fixed leaves none.
    """
    full = np.array(coefficients, dtype=np.float64)
    given = spec.given
    full[:, given] = [value for value in spec.fixed if value is not None]
    parts, known = spec.split(full), spec.split(given[None])
    moved = [
        _moved_inside(part, own[0], name) if name and own.any() and not own.all() else part
        for part, own, name in zip(parts, known, _POLYNOMIALS, strict=True)
    ]
    return unconstrain(spec, np.concatenate(moved, axis=1))


def _moved_inside(
    values: Float[np.ndarray, "rows order"], known: Bool[np.ndarray, "order"], name: str
) -> Float[np.ndarray, "rows order"]:
    sign = -1.0 if "ma" in name else 1.0

    def largest(phi: np.ndarray) -> np.ndarray:
        partial = np.abs(partial_from_coefficients(sign * phi))
        return np.where(np.isfinite(partial), partial, np.inf).max(1)

    outside = np.flatnonzero(largest(values) >= _START_EDGE)
    if len(outside) == 0:
        return values
    order = values.shape[1]
    # No coefficient of a stationary polynomial is larger than a binomial coefficient.
    bound = np.array([math.comb(order, k) for k in range(1, order + 1)], dtype=np.float64)
    unit = np.random.default_rng(0).uniform(-1.0, 1.0, (_CANDIDATES, order))
    # Most of the box is outside for a long polynomial; short candidates are not.
    unit *= np.linspace(0.0, 1.0, _CANDIDATES)[:, None] ** np.arange(1, order + 1)
    drawn = np.where(known, values[0], unit * bound)
    edge = largest(drawn)
    if edge.min() >= 1:
        given = {k + 1: float(values[0, k]) for k in np.flatnonzero(known)}
        raise ValueError(
            f"fixed {name} coefficients {given} (by lag) leave no polynomial with its roots "
            "outside the unit circle; fix fewer, or smaller ones"
        )
    drawn = drawn[edge < max(_START_EDGE, float(edge.min()) + 1e-9)]
    out = values.copy()
    for row in outside:
        out[row] = drawn[((drawn - values[row]) ** 2).sum(1).argmin()]
    return out


def _check_fixed(spec: ArimaSpec) -> None:
    """Refuse values of the wrong number, not finite, or that no polynomial can have."""
    if len(spec.fixed) != spec.n_coefficients:
        raise ValueError(
            f"fixed has {len(spec.fixed)} entries for {spec.n_coefficients} coefficients; give one "
            "each, None where it is to be estimated"
        )
    given, names = spec.given, spec.names()
    for name, value in zip(names, spec.fixed, strict=True):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"fixed {name}={value!r} is not a finite number")
    full = np.array([[0.0 if value is None else value for value in spec.fixed]])
    parts, known = spec.split(full)[:4], spec.split(given[None])[:4]
    for part, own, name in zip(parts, known, _POLYNOMIALS[:4], strict=True):
        if own.size and own.all():
            _checked_partial(-part if "ma" in str(name) else part, f"fixed {name}")


def _checked_partial(phi: np.ndarray, name: str) -> np.ndarray:
    pi = partial_from_coefficients(phi)
    bad = ~(np.abs(pi) <= 1.0) if "ma" in name else ~(np.abs(pi) < 1.0)
    if bad.any():
        series = int(np.flatnonzero(bad.any(1))[0])
        given = (phi if "ar" in name else -phi)[series]
        where = name if name.startswith("fixed") else f"row {series}: {name}"
        raise ValueError(
            f"{where} coefficients {given.tolist()} are not "
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
