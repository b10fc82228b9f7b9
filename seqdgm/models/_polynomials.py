"""Lag polynomials of ARMA processes, vectorised over parameter rows."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def coefficients_from_partial(
    partial: Float[np.ndarray, "rows order"],
) -> Float[np.ndarray, "rows order"]:
    r"""AR coefficients with the given partial autocorrelations (Durbin-Levinson recursion).

    .. math:: \phi^{(k)}_k = \pi_k, \qquad
        \phi^{(k)}_j = \phi^{(k-1)}_j - \pi_k\, \phi^{(k-1)}_{k-j}.

    The polynomial is stationary exactly when every :math:`|\pi_k| < 1`.

    References
    ----------
    Monahan (1984), A note on enforcing stationarity in autoregressive-moving average models,
    Biometrika 71(2), 403-404.

    Examples
    --------
    >>> import numpy as np
    >>> coefficients_from_partial(np.array([[0.5, -0.2]])).round(12).tolist()
    [[0.6, -0.2]]
    """
    phi = np.array(partial, dtype=np.float64)
    for k in range(1, phi.shape[1]):
        phi[:, :k] = phi[:, :k] - phi[:, k : k + 1] * phi[:, k - 1 :: -1][:, :k]
    return phi


def partial_from_coefficients(
    phi: Float[np.ndarray, "rows order"],
) -> Float[np.ndarray, "rows order"]:
    """Partial autocorrelations of AR coefficients: :func:`coefficients_from_partial` undone.

    Entries from the first one with modulus 1 or more downwards are NaN or outside (-1, 1): the
    polynomial is not stationary then.
    """
    out = np.array(phi, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for k in range(out.shape[1] - 1, 0, -1):
            last = out[:, k : k + 1]
            out[:, :k] = (out[:, :k] + last * out[:, k - 1 :: -1][:, :k]) / (1.0 - last**2)
    return out


def product(
    short: Float[np.ndarray, "rows order"], seasonal: Float[np.ndarray, "rows seasonal"], s: int
) -> Float[np.ndarray, "rows degree"]:
    """Coefficients of (1 + a_1 L + ...)(1 + A_1 L^s + ...), the leading 1 included.

    Examples
    --------
    >>> import numpy as np
    >>> product(np.array([[0.5]]), np.array([[0.2]]), 3).tolist()
    [[1.0, 0.5, 0.0, 0.2, 0.1]]
    """
    rows, k = short.shape
    factor = np.concatenate([np.ones((rows, 1)), short], axis=1)
    out = np.zeros((rows, k + s * seasonal.shape[1] + 1))
    out[:, : k + 1] = factor
    for j in range(seasonal.shape[1]):
        lag = s * (j + 1)
        out[:, lag : lag + k + 1] += seasonal[:, j : j + 1] * factor
    return out


def difference_polynomial(d: int, D: int, s: int) -> Float[np.ndarray, "degree"]:
    """Coefficients of (1 - L)^d (1 - L^s)^D, constant term first.

    Examples
    --------
    >>> difference_polynomial(1, 1, 4).tolist()
    [1.0, -1.0, 0.0, 0.0, -1.0, 1.0]
    """
    out = np.ones(1)
    for lag in [1] * d + [s] * D:
        out = np.concatenate([out, np.zeros(lag)]) - np.concatenate([np.zeros(lag), out])
    return out


def toeplitz(column: np.ndarray, n_rows: int, n_columns: int) -> np.ndarray:
    """Lower-triangular (rows, n_rows, n_columns) matrices with element (i, j) = column[i - j]."""
    lag = np.arange(n_rows)[:, None] - np.arange(n_columns)
    inside = (lag >= 0) & (lag < column.shape[1])
    return np.where(inside, column[:, np.where(inside, lag, 0)], 0.0)


def _hankel(values: np.ndarray, n_rows: int, n_columns: int) -> np.ndarray:
    """Matrices (rows, n_rows, n_columns) with element (i, j) = values[i + j]."""
    index = np.arange(n_rows)[:, None] + np.arange(n_columns)
    inside = index < values.shape[1]
    return np.where(inside, values[:, np.where(inside, index, 0)], 0.0)


def stationary_covariance(
    ar: Float[np.ndarray, "rows p+1"], ma: Float[np.ndarray, "rows q+1"]
) -> Float[np.ndarray, "rows state state"]:
    r"""Covariance of the state of a stationary ARMA process with innovation variance 1.

    The state, of dimension r = max(p, q + 1), holds what the past and present say about the future,

    .. math:: \alpha^{(i)}_t = \sum_{j \ge i} \phi_j w_{t+i-1-j}
        + \sum_{j \ge i-1} \theta_j \varepsilon_{t+i-1-j} \quad (i > 1), \qquad
        \alpha^{(1)}_t = w_t,

    so its covariance follows from the first p + 1 autocovariances of w and its first q + 1
    impulse responses. The former solve a linear system of p + 1 equations, which costs
    :math:`r^3`, not the :math:`r^6` of the vectorised Lyapunov equation.

    Parameters
    ----------
    ar, ma : ndarray
        Coefficients of :math:`\phi(L) = 1 - \phi_1 L - \dots` and
        :math:`\theta(L) = 1 + \theta_1 L + \dots`, the leading 1 included, signs as in the
        polynomial.

    References
    ----------
    McLeod (1975), Derivation of the theoretical autocovariance function of autoregressive-moving
    average time series, Applied Statistics 24(2), 255-256; Gardner, Harvey and Phillips (1980),
    Algorithm AS 154, Applied Statistics 29(3), 311-322.

    Examples
    --------
    >>> import numpy as np
    >>> stationary_covariance(np.array([[1.0, -0.6]]), np.array([[1.0]])).round(6).tolist()
    [[[1.5625]]]
    """
    p, q = ar.shape[1] - 1, ma.shape[1] - 1
    r = max(p, q + 1)
    from_noise = _hankel(ma, r, q + 1)
    out = from_noise @ from_noise.transpose(0, 2, 1)
    if p == 0:
        return out
    psi = _impulse_responses(ar, ma)
    gamma = _autocovariances(ar, ma, psi)
    lag = np.abs(np.arange(p)[:, None] - np.arange(p))
    from_series = _hankel(-ar[:, 1:], r, p)
    # cov(w_{t-1-i}, e_{t-j}) is the impulse response at lag j - 1 - i.
    cross = toeplitz(psi, q, p).transpose(0, 2, 1)
    mixed = from_series @ cross @ from_noise[:, :, 1:].transpose(0, 2, 1)
    out += mixed + mixed.transpose(0, 2, 1)
    out += from_series @ gamma[:, lag] @ from_series.transpose(0, 2, 1)
    return 0.5 * (out + out.transpose(0, 2, 1))


def _impulse_responses(ar: np.ndarray, ma: np.ndarray) -> np.ndarray:
    """Responses of w to an innovation at lags 0, ..., q."""
    psi = ma.copy()
    for k in range(1, ma.shape[1]):
        m = min(k, ar.shape[1] - 1)
        psi[:, k] -= (ar[:, 1 : m + 1] * psi[:, k - m : k][:, ::-1]).sum(1)
    return psi


def _autocovariances(ar: np.ndarray, ma: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Autocovariances of w at lags 0 to p: sum_j a_j gamma_|k-j| = sum_j theta_j psi_{j-k}."""
    p, q = ar.shape[1] - 1, ma.shape[1] - 1
    matrix = toeplitz(ar, p + 1, p + 1)
    matrix[:, :, 1:] += _hankel(ar, p + 1, p + 1)[:, :, 1:]
    right = _hankel(ma, p + 1, q + 1) @ psi[:, :, None]
    return np.linalg.solve(matrix, right)[:, :, 0]
