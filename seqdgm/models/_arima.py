r"""Seasonal ARIMA with regressors as a linear-Gaussian system: pure functions of arrays.

The equations are in `seqdgm.models._arima_spec`, whose names this module passes on.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from seqdgm.kernels.types import System
from seqdgm.models._arima_spec import ArimaSpec, constrain, unconstrain
from seqdgm.models._polynomials import (
    difference_polynomial,
    product,
    stationary_covariance,
    toeplitz,
)

__all__ = [
    "ArimaSpec",
    "constrain",
    "parameter_sizes",
    "starting_values",
    "system",
    "unconstrain",
]

_START_RADIUS = 0.95  # largest inverse root of a starting polynomial
_CHUNK = 2**22  # elements of a lagged regressor matrix held at once


def system(
    spec: ArimaSpec,
    coefficients: Float[np.ndarray, "rows free"],
    sigma2: Float[np.ndarray, "rows"],
    u: Float[np.ndarray, "inputrows steps inputs"] | None,
    n_steps: int,
) -> System:
    r"""State-space form of the model, one system for each row of coefficients.

    With :math:`a(L) = \phi(L)\Phi(L^s)\delta(L)` and :math:`\vartheta(L) = \theta(L)\Theta(L^s)`,
    element i of the state is what the past and present contribute to :math:`x_{t+i-1}`,

    .. math::

        z^{(1)}_t &= a_1 z^{(1)}_{t-1} + z^{(2)}_{t-1} + c_t + \varepsilon_t
            = x_t - u_t'\beta, \\
        z^{(i)}_t &= a_i z^{(1)}_{t-1} + z^{(i+1)}_{t-1} + \vartheta_{i-1} \varepsilon_t,

    (:math:`a(L) = 1 - a_1 L - \dots`) of dimension max(p + sP + d + sD, q + sQ + 1). Keeping the
    differences in the same companion form as the ARMA part halves the state of a seasonal model.
    At the first step :math:`z_1 = A c_1 + \alpha_1`, with :math:`\alpha_1` the stationary state of
    the differenced series and :math:`c_1` diffuse, of dimension n = d + sD. Column j of A holds the
    coefficients of :math:`\phi(L)\Phi(L^s)` from row j downwards, so that the first n observations
    are :math:`c_1` times a matrix with unit diagonal and zeros above, and every
    :math:`F_{\infty,t}` of a complete series is 1: the diffuse log-likelihood is that of the
    differenced series.

    Parameters
    ----------
    spec : ArimaSpec
    coefficients : ndarray of shape (rows, spec.n_free)
        Constrained coefficients, in the order of ``spec.names()``.
    sigma2 : ndarray of shape (rows,)
        Innovation variances.
    u : ndarray of shape (rows or 1, n_steps, spec.n_inputs), or None
        Regressors.
    n_steps : int
        Steps of the system, those to be forecast included.

    Returns
    -------
    System
        Observed dimension 1 and no observation noise. A field that does not depend on the row or
        the step has length 1 there. A linear trend makes b vary: entry t (zero-based) is
        :math:`c + \kappa t`, and the differenced series starts around the stationary mean that
        :math:`c + \kappa` would give it, both as in statsmodels.

    Raises
    ------
    ValueError
        If `u` does not have one row a step and one column a regressor.

    References
    ----------
    Harvey (1989), Forecasting, Structural Time Series Models and the Kalman Filter, section 3.4;
    Durbin and Koopman (2012), Time Series Analysis by State Space Methods, section 5.6.

    Examples
    --------
    >>> import numpy as np
    >>> random_walk = system(ArimaSpec(0, 1, 0), np.zeros((1, 0)), np.ones(1), None, 10)
    >>> random_walk.F.item(), random_walk.P0.item(), random_walk.Pinf.item()
    (1.0, 1.0, 1.0)
    """
    ar, ma, sar, sma, trend, beta = spec.split(np.asarray(coefficients, dtype=np.float64))
    sigma2 = np.asarray(sigma2, dtype=np.float64)
    rows, size, n = len(sigma2), spec.n_state, spec.n_diff
    ar_poly, ma_poly = product(-ar, -sar, spec.s), product(ma, sma, spec.s)
    P0 = np.zeros((rows, size, size))
    r = max(spec.ar_order, spec.ma_order + 1)
    P0[:, :r, :r] = sigma2[:, None, None] * stationary_covariance(ar_poly, ma_poly)
    loading = np.zeros((rows, size))
    loading[:, : spec.ma_order + 1] = ma_poly
    # Without an AR part transition and diffuse directions are the same for every row.
    own = ar_poly if spec.ar_order else ar_poly[:1]
    F = np.zeros((len(own), size, size))
    F[:, np.arange(size - 1), np.arange(1, size)] = 1.0
    delta = difference_polynomial(spec.d, spec.D, spec.s)
    F[:, : spec.ar_order + n, 0] -= (toeplitz(own, spec.ar_order + n + 1, n + 1) @ delta)[:, 1:]
    diffuse = toeplitz(own, size, n)
    intercept, m0 = _intercept(spec, trend, ar_poly, n_steps)
    H = np.zeros((1, 1, 1, size))
    H[..., 0] = 1.0
    fields = {
        "F": F[:, None],
        "Q": (sigma2[:, None, None] * loading[:, :, None] * loading[:, None, :])[:, None],
        "H": H,
        "R": np.zeros((1, 1, 1, 1)),
        "b": intercept,
        "d": _offset(beta, u, n_steps),
        "m0": m0,
        "P0": P0,
        "Pinf": diffuse @ diffuse.transpose(0, 2, 1),
    }
    return System(**{name: torch.from_numpy(field) for name, field in fields.items()})


def _intercept(
    spec: ArimaSpec, trend: np.ndarray, ar_poly: np.ndarray, n_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """State intercepts (rows, steps, state) and the mean of the first state."""
    if spec.trend is None:
        return np.zeros((1, 1, spec.n_state)), np.zeros((1, spec.n_state))
    const = trend[:, :1] if "c" in spec.trend else np.zeros((len(trend), 1))
    slope = trend[:, -1:] if "t" in spec.trend else np.zeros((len(trend), 1))
    steps = np.arange(float(n_steps)) if "t" in spec.trend else np.zeros(1)
    b = np.zeros((len(trend), len(steps), spec.n_state))
    b[:, :, 0] = const + slope * steps
    mean = (const + slope) / ar_poly.sum(1, keepdims=True)
    m0 = np.zeros((len(trend), spec.n_state))
    # Contributions of a constant past: sums of the AR coefficients from each lag upwards.
    m0[:, : spec.ar_order] = -mean * ar_poly[:, :0:-1].cumsum(1)[:, ::-1]
    m0[:, :1] = mean
    return b, m0


def _offset(beta: np.ndarray, u: np.ndarray | None, n_steps: int) -> np.ndarray:
    """Regression part of the observations, (rows, steps, 1)."""
    if beta.shape[1] == 0:
        return np.zeros((1, 1, 1))
    if u is None or u.shape[1:] != (n_steps, beta.shape[1]):
        raise ValueError(
            f"inputs have shape {None if u is None else u.shape}; the model has "
            f"{beta.shape[1]} regressors and {n_steps} steps: give (series, steps, regressors)"
        )
    return np.asarray(u, dtype=np.float64) @ beta[:, :, None]


def starting_values(
    spec: ArimaSpec,
    x: Float[np.ndarray, "series time"],
    u: Float[np.ndarray, "inputrows time inputs"] | None = None,
) -> Float[np.ndarray, "series free"]:
    """Unconstrained starting values of every series, by least squares.

    Trend and regression coefficients come from ordinary least squares on the differenced series,
    the ARMA coefficients from the residuals by Hannan and Rissanen's two regressions: a long
    autoregression estimates the innovations, then the series is regressed on its own lags and
    theirs. Polynomials with roots near or inside the unit circle are shrunk. Rows that touch a
    missing value are left out, and a series with too few rows left starts from white noise.

    Parameters
    ----------
    spec : ArimaSpec
    x : ndarray of shape (series, time)
        Data, NaN where missing and beyond the end of a series.
    u : ndarray of shape (series or 1, time, spec.n_inputs), optional
        Regressors.

    References
    ----------
    Hannan and Rissanen (1982), Recursive estimation of mixed autoregressive-moving average order,
    Biometrika 69(1), 81-94.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 3.0, 2.0, 4.0]])
    >>> starting_values(ArimaSpec(trend="c"), x).round(6).tolist()
    [[2.5]]
    """
    coef, residual, _ = _regression(spec, x, u)
    arma = np.zeros((len(x), spec.n_arma))
    steps = residual.shape[1]
    block = max(1, _CHUNK // max(steps * _long_order(spec, steps), 1))
    for first in range(0, len(x) if spec.n_arma else 0, block):
        rows = slice(first, first + block)
        arma[rows] = _hannan_rissanen(spec, residual[rows])
    free = unconstrain(spec, np.concatenate([arma, np.zeros_like(coef)], axis=1))
    free[:, spec.n_arma :] = coef
    return free


def parameter_sizes(
    spec: ArimaSpec,
    x: Float[np.ndarray, "series time"],
    u: Float[np.ndarray, "inputrows time inputs"] | None = None,
) -> Float[np.ndarray, "series free"]:
    """Typical size of each unconstrained parameter, the unit of an optimiser's steps.

    ARMA parameters have size 1; a trend or regression coefficient has the size at which its term
    is as large as what the regression leaves unexplained.

    Parameters
    ----------
    spec, x, u
        As in :func:`starting_values`.

    Examples
    --------
    >>> import numpy as np
    >>> parameter_sizes(ArimaSpec(trend="c"), np.array([[1e8, 3e8]])).tolist()
    [[100000000.0]]
    """
    coef, residual, design = _regression(spec, x, u)
    unit = _rms(residual)[:, None] / _rms(design)
    size = np.where(np.isfinite(unit) & (unit > 0), unit, 1.0)
    return np.concatenate([np.ones((len(coef), spec.n_arma)), size], axis=1)


def _rms(values: Float[np.ndarray, "series time ..."]) -> np.ndarray:
    """Root mean square over time of what is observed; 1 where that is zero or nothing is."""
    seen = np.isfinite(values)
    square = (np.where(seen, values, 0.0) ** 2).sum(1) / np.maximum(seen.sum(1), 1)
    return np.where(square > 0, np.sqrt(square), 1.0)


def _difference(spec: ArimaSpec, values: np.ndarray) -> np.ndarray:
    """Apply the difference polynomial along axis 1; NaN where any term is missing."""
    steps = max(values.shape[1] - spec.n_diff, 0)
    out = np.zeros((values.shape[0], steps, *values.shape[2:]))
    for lag, weight in enumerate(difference_polynomial(spec.d, spec.D, spec.s)):
        if weight:
            first = spec.n_diff - lag
            out += weight * values[:, first : first + steps]
    return out


def _regression(
    spec: ArimaSpec, x: np.ndarray, u: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trend line and regressors by least squares: coefficients, residuals and the design."""
    w = _difference(spec, np.asarray(x, dtype=np.float64))
    time = np.arange(float(spec.n_diff), spec.n_diff + w.shape[1])
    line = [{"c": np.ones_like(time), "t": time}[letter] for letter in spec.trend or ""]
    columns = [np.broadcast_to(column, w.shape)[:, :, None] for column in line]
    if spec.n_inputs and u is not None:
        known = _difference(spec, np.asarray(u, dtype=np.float64))
        columns.append(np.broadcast_to(known, (*w.shape, spec.n_inputs)))
    design = np.concatenate(columns, axis=2) if columns else np.zeros((*w.shape, 0))
    coef = _least_squares(w, design, spare=1)
    return coef, w - (design @ coef[:, :, None])[:, :, 0], design


def _least_squares(
    y: Float[np.ndarray, "series time"], design: Float[np.ndarray, "series time dim"], spare: int
) -> Float[np.ndarray, "series dim"]:
    """Least squares of every series over its complete rows.

    Zero where fewer than `spare` rows a column are complete; the shortest solution where columns
    are collinear.
    """
    keep = np.isfinite(y) & np.isfinite(design).all(2)
    known = np.where(keep[:, :, None], design, 0.0)
    length = np.sqrt((known**2).sum(1, keepdims=True))
    known = known / np.where(length > 0, length, 1.0)
    turned = known.transpose(0, 2, 1)
    gram = np.linalg.pinv(turned @ known, rcond=1e-10, hermitian=True)
    coef = (gram @ (turned @ np.where(keep, y, 0.0)[:, :, None]))[:, :, 0]
    enough = keep.sum(1, keepdims=True) >= spare * design.shape[2]
    return np.where(enough, coef / np.where(length > 0, length, 1.0)[:, 0], 0.0)


def _lagged(values: np.ndarray, lags: list[int]) -> np.ndarray:
    """Columns (series, time, lags) of earlier values; NaN before the first."""
    out = np.full((*values.shape, len(lags)), np.nan)
    for column, lag in enumerate(lags):
        out[:, lag:, column] = values[:, : max(values.shape[1] - lag, 0)]
    return out


def _hannan_rissanen(spec: ArimaSpec, w: np.ndarray) -> Float[np.ndarray, "series arma"]:
    """AR, MA, seasonal AR and seasonal MA coefficients of every series, roots shrunk."""
    w = w / _rms(w)[:, None]
    ar_lags = [*range(1, spec.p + 1), *(spec.s * k for k in range(1, spec.P + 1))]
    ma_lags = [*range(1, spec.q + 1), *(spec.s * k for k in range(1, spec.Q + 1))]
    design = _lagged(w, ar_lags)
    if ma_lags:
        past = _lagged(w, list(range(1, _long_order(spec, w.shape[1]) + 1)))
        long = _least_squares(w, past, spare=2)
        innovations = w - (past @ long[:, :, None])[:, :, 0]
        design = np.concatenate([design, _lagged(innovations, ma_lags)], axis=2)
    coef = _least_squares(w, design, spare=3)
    ar, sar, ma, sma = np.split(coef, np.cumsum([spec.p, spec.P, spec.q]), axis=1)
    return np.concatenate([_shrunk(ar), -_shrunk(-ma), _shrunk(sar), -_shrunk(-sma)], axis=1)


def _long_order(spec: ArimaSpec, steps: int) -> int:
    """Order of the long autoregression."""
    wanted = max(spec.ar_order + spec.ma_order, int(10 * np.log10(max(steps, 1))))
    return max(min(wanted, steps // 3), 1)


def _shrunk(phi: Float[np.ndarray, "series order"]) -> Float[np.ndarray, "series order"]:
    """Scale the inverse roots of AR polynomials so that none exceeds 0.95 in modulus."""
    rows, order = phi.shape
    if order == 0:
        return phi
    companion = np.zeros((rows, order, order))
    companion[:, 0] = phi
    companion[:, np.arange(1, order), np.arange(order - 1)] = 1.0
    radius = np.abs(np.linalg.eigvals(companion)).max(1)
    factor = _START_RADIUS / np.maximum(radius, _START_RADIUS)
    return phi * factor[:, None] ** np.arange(1, order + 1)
