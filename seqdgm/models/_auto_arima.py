"""Orders of ARIMA models: which to try, how to judge them, and panels of several at once."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from seqdgm.kernels.types import System
from seqdgm.models._arima import ArimaSpec, starting_values, system
from seqdgm.models._unit_roots import (
    FLAT,
    difference,
    is_flat,
    n_differences,
    n_seasonal_differences,
)

CRITERIA = ("aicc", "aic", "bic")

_MOST_MODELS = 94  # tried for one series by the stepwise search, as in the R package forecast
_LARGEST_ROOT = 1.0 / 1.01  # modulus of an inverse root; a model with a larger one is rejected
_STEPS = ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


class Orders(NamedTuple):
    """Orders of one model, and whether the differenced series has a mean."""

    p: int
    d: int
    q: int
    P: int
    D: int
    Q: int
    constant: bool

    @classmethod
    def of(cls, row: list[int]) -> Orders:
        """Orders from seven numbers."""
        p, d, q, P, D, Q, constant = row
        return cls(p, d, q, P, D, Q, bool(constant))

    def spec(self, season: int, n_inputs: int) -> ArimaSpec:
        """Specification of the model."""
        s = season if self.P or self.D or self.Q else 0
        return ArimaSpec(*self[:6], s, "c" if self.constant else None, n_inputs)

    def label(self, season: int) -> str:
        """Name in the usual notation."""
        name = f"ARIMA({self.p},{self.d},{self.q})"
        if self.P or self.D or self.Q:
            name += f"({self.P},{self.D},{self.Q})[{season}]"
        if not self.constant:
            return name
        return name + (" with drift" if self.d + self.D else " with mean")


class Fit(NamedTuple):
    """One model of one series; the criterion of a rejected one is infinite."""

    orders: Orders
    coefficients: Float[np.ndarray, "free"]
    sigma2: float
    log_likelihood: float
    criterion: float
    converged: bool
    message: str = ""


Search = Generator[list[Orders], list[float], None]


@dataclass(frozen=True)
class Limits:
    """Largest orders of a search; `total` bounds their sum where all models are tried."""

    p: int = 5
    q: int = 5
    P: int = 2
    Q: int = 2
    d: int = 2
    D: int = 1
    total: int = 5

    def within(self, n: int, season: int) -> Limits:
        """Limits for a series of n observations, as in the R package forecast.

        No polynomial is longer than a third of the series, and no non-seasonal one reaches the
        first seasonal lag.
        """
        p, q, seasonal = min(self.p, n // 3), min(self.q, n // 3), n // 3 // season
        if season == 1:
            return Limits(p, q, 0, 0, self.d, 0, self.total)
        p, q = min(p, season - 1), min(q, season - 1)
        P, Q = min(self.P, seasonal), min(self.Q, seasonal)
        return Limits(p, q, P, Q, self.d, self.D, self.total)


class Plan(NamedTuple):
    """What is settled before the search of one series.

    Attributes
    ----------
    null : Orders
        Differences and constant, without ARMA terms.
    limits : Limits
        Bounds that suit the length of the series.
    n : int
        Number of observations.
    exact : Fit or None
        Fit of `null` where it leaves nothing unexplained, and no search is needed.
    """

    null: Orders
    limits: Limits
    n: int
    exact: Fit | None


def make_plan(
    x: Float[np.ndarray, "time"],
    u: Float[np.ndarray, "time inputs"] | None,
    season: int,
    limits: Limits,
    d: int | None,
    D: int | None,
    allow_constant: tuple[bool, bool],
) -> Plan:
    """Choose the differences of a series, and see whether it is constant after them.

    With regressors the tests look at the residuals of least squares, and a difference that would
    leave a regressor constant is not taken.

    Parameters
    ----------
    x : ndarray of shape (time,)
        Series, NaN where missing.
    u : ndarray of shape (time, inputs), optional
    season : int
        1 for none.
    limits : Limits
    d, D : int, optional
        Differences where they are given.
    allow_constant : tuple of bool
        Whether a mean is allowed without differences, and a drift with one.
    """
    n = int(np.isfinite(x).sum())
    scale = float(np.nanmax(np.abs(x)))
    limits = limits.within(n, season)
    rest = x if u is None else _residuals(x, u)
    if season == 1:
        D = 0
    elif D is None:
        D = n_seasonal_differences(rest, season, limits.D, scale)
        while u is not None and D and _any_flat(difference(u, 0, D, season)):
            D -= 1
    rest = difference(rest, 0, D, season)
    if d is None:
        d = n_differences(rest, limits.d, scale)
        while u is not None and d and _any_flat(difference(u, d, D, season)):
            d -= 1
    constant = d + D < 2 and allow_constant[d + D]
    null = Orders(0, d, 0, 0, D, 0, constant)
    spec = null.spec(season, 0 if u is None else u.shape[1])
    coefficients = starting_values(spec, x[None], None if u is None else u[None])
    *_, trend, beta = spec.split(coefficients)
    left = difference(x if u is None else x - u @ beta[0], d, D, season) - trend.sum()
    if not np.isfinite(left).any() or np.sqrt(np.nanmean(left**2)) > FLAT * scale:
        return Plan(null, limits, n, None)
    said = "its model leaves nothing to be explained, so the innovation variance is 0"
    return Plan(null, limits, n, Fit(null, coefficients[0], 0.0, 0.0, -np.inf, True, said))


def _residuals(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """What an intercept and the regressors leave of a series."""
    design = np.column_stack([np.ones(len(x)), u])
    seen = np.isfinite(x)
    coefficients = np.linalg.lstsq(design[seen], x[seen], rcond=None)[0]
    return np.asarray(x - design @ coefficients)


def _any_flat(u: np.ndarray) -> bool:
    return any(is_flat(column, float(np.abs(column).max(initial=0.0))) for column in u.T)


def stepwise(plan: Plan) -> Search:
    """Hyndman and Khandakar's search: from the best of a few models to its best neighbours.

    Yields lists of orders to be fitted and is sent their criteria. It starts from orders
    (2,d,2)(1,D,1), (0,d,0)(0,D,0), (1,d,0)(1,D,0) and (0,d,1)(0,D,1), and, if a constant is
    allowed, (0,d,0)(0,D,0) without it. Then p, q or both, P, Q or both change by one, or the
    constant comes or goes; the first neighbour that is better is the next centre, until there is
    none.

    References
    ----------
    Hyndman and Khandakar (2008), Automatic time series forecasting: the forecast package for R,
    Journal of Statistical Software 27(3), section 3.2.
    """
    null, most = plan.null, plan.limits
    small = plan.n < 10
    p, q = (min(1 if small else 2, k) for k in (most.p, most.q))
    P, Q = (0 if small else min(1, k) for k in (most.P, most.Q))
    starts = [
        null._replace(p=p, q=q, P=P, Q=Q),
        null,
        null._replace(p=min(1, most.p), P=min(1, most.P)),
        null._replace(q=min(1, most.q), Q=min(1, most.Q)),
        null._replace(constant=False),
    ]
    starts = list(dict.fromkeys(starts))
    tried = dict(zip(starts, (yield starts), strict=True))
    best = min(tried, key=tried.__getitem__)
    improved = True
    while improved:
        improved = False
        for orders in _neighbours(best, plan):
            if orders in tried or len(tried) >= _MOST_MODELS:
                continue
            (tried[orders],) = yield [orders]
            if tried[orders] < tried[best]:
                best, improved = orders, True
                break


def exhaustive(plan: Plan) -> Search:
    """All orders within the limits whose sum p + q + P + Q is at most ``limits.total``."""
    most = plan.limits
    yield [
        plan.null._replace(p=p, q=q, P=P, Q=Q, constant=constant)
        for p in range(most.p + 1)
        for q in range(most.q + 1)
        for P in range(most.P + 1)
        for Q in range(most.Q + 1)
        if p + q + P + Q <= most.total
        for constant in ((False, True) if plan.null.constant else (False,))
    ]


def _neighbours(centre: Orders, plan: Plan) -> Iterator[Orders]:
    most = plan.limits
    for dP, dQ in _STEPS:
        P, Q = centre.P + dP, centre.Q + dQ
        if 0 <= P <= most.P and 0 <= Q <= most.Q:
            yield centre._replace(P=P, Q=Q)
    for dp, dq in _STEPS:
        p, q = centre.p + dp, centre.q + dq
        if 0 <= p <= most.p and 0 <= q <= most.q:
            yield centre._replace(p=p, q=q)
    if plan.null.constant:
        yield centre._replace(constant=not centre.constant)


def criteria(
    spec: ArimaSpec,
    coefficients: Float[np.ndarray, "rows free"],
    log_likelihood: Float[np.ndarray, "rows"],
    n: Int[np.ndarray, "rows"],
    ic: str,
) -> Float[np.ndarray, "rows"]:
    r"""Information criteria; infinite for a model that is not to be chosen.

    With k parameters, the innovation variance among them, and n observations after differencing:

    .. math::

        \mathrm{AIC} = -2 \log L + 2 k, \quad \mathrm{BIC} = -2 \log L + k \log n, \quad
        \mathrm{AICc} = \mathrm{AIC} + rac{2 k (k + 1)}{n - k - 1}

    A model is rejected if an AR or MA polynomial has a root of modulus below 1.01, as in the R
    package forecast, or if n is less than k + 2.
    """
    k = spec.n_free + 1
    spare = np.maximum(n - k - 1, 0)
    penalty = {
        "aic": np.full(len(n), 2.0 * k),
        "bic": k * np.log(n),
        "aicc": 2.0 * k + 2.0 * k * (k + 1) / np.maximum(spare, 1),
    }[ic]
    ar, ma, sar, sma, *_ = spec.split(coefficients)
    radius = np.zeros(len(n))
    for polynomial, lag in ((ar, 1), (-ma, 1), (sar, spec.s), (-sma, spec.s)):
        if polynomial.shape[1]:
            radius = np.maximum(radius, _largest_inverse_root(polynomial) ** (1.0 / lag))
    good = np.isfinite(log_likelihood) & (radius <= _LARGEST_ROOT) & (spare > 0)
    return np.where(good, -2.0 * log_likelihood + penalty, np.inf)


def _largest_inverse_root(phi: Float[np.ndarray, "rows order"]) -> Float[np.ndarray, "rows"]:
    r"""Largest modulus of an inverse root of :math:`1 - \phi_1 L - \dots`."""
    rows, order = phi.shape
    companion = np.zeros((rows, order, order))
    companion[:, 0] = phi
    companion[:, np.arange(1, order), np.arange(order - 1)] = 1.0
    return np.asarray(np.abs(np.linalg.eigvals(companion)).max(1))


def widest(orders: Int[np.ndarray, "rows 7"], season: int, n_inputs: int) -> ArimaSpec:
    """Smallest specification that holds all of the models; its differences are the largest too."""
    return Orders.of(orders.max(0).tolist()).spec(season, n_inputs)


def embed(
    coefficients: Float[np.ndarray, "rows free"], inner: ArimaSpec, outer: ArimaSpec
) -> Float[np.ndarray, "rows wider"]:
    """Coefficients of one specification in the columns of a larger one, or back; zero elsewhere."""
    target = np.zeros((len(coefficients), outer.n_free))
    blocks = zip(inner.split(coefficients), outer.split(target), strict=True)
    for source, place in blocks:
        width = min(source.shape[1], place.shape[1])
        place[:, :width] = source[:, :width]
    return target


def panel_system(
    orders: Int[np.ndarray, "rows 7"],
    coefficients: Float[np.ndarray, "rows free"],
    sigma2: Float[np.ndarray, "rows"],
    layout: ArimaSpec,
    season: int,
    u: Float[np.ndarray, "inputrows steps inputs"] | None,
    n_steps: int,
) -> System:
    """One system for models of different orders: smaller states are padded with zeros.

    Models with the same differences are one model with some coefficients zero; `coefficients` has
    the columns of the specification `layout`, which holds them all.
    """
    kinds, kind = np.unique(orders[:, [1, 4]], axis=0, return_inverse=True)
    groups = [np.flatnonzero(kind == k) for k in range(len(kinds))]
    parts = []
    for rows in groups:
        spec = widest(orders[rows], season, layout.n_inputs)
        known = u if u is None or len(u) == 1 else u[rows]
        own = embed(coefficients[rows], layout, spec)
        parts.append(system(spec, own, sigma2[rows], known, n_steps))
    return parts[0] if len(parts) == 1 else _joined(parts, groups, len(orders))


def _joined(parts: list[System], groups: list[np.ndarray], n: int) -> System:
    """Systems of groups of rows as one system of all rows."""
    fields = {}
    for name in System._fields:
        pieces = [getattr(part, name) for part in parts]
        tail = torch.tensor([piece.shape[1:] for piece in pieces]).max(0).values.tolist()
        whole = pieces[0].new_zeros(n, *tail)
        for rows, piece in zip(groups, pieces, strict=True):
            corner = tuple(slice(k) for k in piece.shape[1:])
            whole[(torch.from_numpy(rows), *corner)] = piece
        fields[name] = whole
    return System(**fields)
