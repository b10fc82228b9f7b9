r"""Stationary vector autoregressions: their unconstrained parameters and their covariances.

.. math::

    w_t = \Phi_1 w_{t-1} + \dots + \Phi_p w_{t-p} + \varepsilon_t, \quad
    \varepsilon_t \sim N(0, \Sigma)

The partial autocorrelation matrices of a stationary process, in Cholesky normalisation, are any p
matrices with singular values below 1, and determine it given :math:`\Sigma` (Ansley and Kohn 1986).
They are invariant under a change of the units of the series.

References
----------
Ansley and Kohn (1986), A note on reparameterizing a vector autoregressive moving average model to
enforce stationarity, *Journal of Statistical Computation and Simulation* 24; Whittle (1963), On the
fitting of multivariate autoregressions, *Biometrika* 50.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

# Largest singular value of a partial autocorrelation: beyond it a stationary variance has no
# digits left that the data could tell from a unit root.
_EDGE = 1.0 - 1e-7
_DOUBLINGS = 60


def coefficients_from_free(
    free: Float[np.ndarray, "rows order dim dim"], cov: Float[np.ndarray, "rows dim dim"]
) -> Float[np.ndarray, "rows order dim dim"]:
    r"""Stationary coefficients from unconstrained matrices A.

    The partial autocorrelations are :math:`P = B^{-1} A` with :math:`B B' = I + A A'`.

    Parameters
    ----------
    free : ndarray of shape (rows, order, dim, dim)
    cov : ndarray of shape (rows, dim, dim)
        Covariance of the innovations.

    Examples
    --------
    >>> import numpy as np
    >>> free = np.full((1, 1, 1, 1), 0.75)
    >>> round(coefficients_from_free(free, np.ones((1, 1, 1))).item(), 6)
    0.6
    """
    rows, order, dim, _ = free.shape
    if order == 0:
        return free.copy()
    eye = np.eye(dim)
    partial = _EDGE * np.linalg.solve(np.linalg.cholesky(eye + free @ _t(free)), free)
    ahead = np.broadcast_to(eye, (rows, dim, dim))
    back = ahead
    forward: list[np.ndarray] = []
    backward: list[np.ndarray] = []
    for k in range(order):
        p = partial[:, k]
        ahead_inverse, back_inverse = np.linalg.inv(ahead), np.linalg.inv(back)
        last, last_back = ahead @ p @ back_inverse, back @ _t(p) @ ahead_inverse
        forward, backward = (
            [*(f - last @ b for f, b in zip(forward, backward[::-1], strict=True)), last],
            [*(b - last_back @ f for b, f in zip(backward, forward[::-1], strict=True)), last_back],
        )
        # Roots of the error covariances stay triangular, as the normalisation wants them.
        ahead, back = (
            ahead @ np.linalg.cholesky(eye - p @ _t(p)),
            back @ np.linalg.cholesky(eye - _t(p) @ p),
        )
    # The recursion began with unit variance of the series; now its errors get the variance asked.
    change = np.linalg.cholesky(cov) @ np.linalg.inv(ahead)
    undo = np.linalg.inv(change)
    return np.stack([change @ f @ undo for f in forward], 1)


def free_from_coefficients(
    phi: Float[np.ndarray, "rows order dim dim"], cov: Float[np.ndarray, "rows dim dim"]
) -> Float[np.ndarray, "rows order dim dim"]:
    """Inverse of `coefficients_from_free`, for stationary coefficients."""
    rows, order, dim, _ = phi.shape
    if order == 0:
        return phi.copy()
    noise = np.zeros((rows, order * dim, order * dim))
    noise[:, :dim, :dim] = cov
    joint = stationary_covariance(companion(phi), noise)
    # gamma[k] = E[w_t w_{t-k}']; the last one follows from the recursion.
    gamma = [joint[:, :dim, k * dim : (k + 1) * dim] for k in range(order)]
    gamma.append(sum(phi[:, j] @ gamma[order - 1 - j] for j in range(order)))
    ahead_cov = back_cov = gamma[0]
    forward: list[np.ndarray] = []
    backward: list[np.ndarray] = []
    out = np.empty_like(phi)
    for k in range(order):
        gap = gamma[k + 1] - sum(f @ gamma[k - j] for j, f in enumerate(forward))
        ahead, back = np.linalg.cholesky(ahead_cov), np.linalg.cholesky(back_cov)
        p = np.linalg.solve(ahead, gap) @ np.linalg.inv(_t(back))
        last, last_back = gap @ np.linalg.inv(back_cov), _t(gap) @ np.linalg.inv(ahead_cov)
        forward, backward = (
            [*(f - last @ b for f, b in zip(forward, backward[::-1], strict=True)), last],
            [*(b - last_back @ f for b, f in zip(backward, forward[::-1], strict=True)), last_back],
        )
        ahead_cov, back_cov = ahead_cov - last @ _t(gap), back_cov - last_back @ gap
        p = p / _EDGE
        out[:, k] = np.linalg.solve(np.linalg.cholesky(np.eye(dim) - p @ _t(p)), p)
    return out


def companion(phi: Float[np.ndarray, "rows order dim dim"]) -> Float[np.ndarray, "rows all all"]:
    """Transition matrix of (w_t, w_{t-1}, ...)."""
    rows, order, dim, _ = phi.shape
    out = np.zeros((rows, order * dim, order * dim))
    out[:, :dim] = phi.transpose(0, 2, 1, 3).reshape(rows, dim, order * dim)
    below = np.arange((order - 1) * dim)
    out[:, dim + below, below] = 1.0
    return out


def stationary_covariance(
    transition: Float[np.ndarray, "rows state state"], noise: Float[np.ndarray, "rows state state"]
) -> Float[np.ndarray, "rows state state"]:
    r"""Solve :math:`P = F P F' + Q` by doubling: :math:`P = \sum_j F^j Q F'^j`.

    Every step doubles the number of terms, so that a root of modulus 1 - 1e-7 takes 30 steps. What
    is not stationary gives infinities or NaN.
    """
    cov, power = noise, transition
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(_DOUBLINGS):
            cov = cov + power @ cov @ _t(power)
            if not np.abs(power).max(initial=0.0) > 1e-20:
                break
            power = power @ power
    return 0.5 * (cov + _t(cov))


def shrink_to_stationary(
    phi: Float[np.ndarray, "rows order dim dim"], radius: float = 0.98
) -> Float[np.ndarray, "rows order dim dim"]:
    """Pull all roots of the series that are not stationary inside the given radius."""
    if phi.shape[1] == 0:
        return phi
    largest = np.abs(np.linalg.eigvals(companion(phi))).max(-1)
    factor = np.where(largest > radius, radius / np.where(largest > 0, largest, 1.0), 1.0)
    powers = factor[:, None] ** np.arange(1, phi.shape[1] + 1)
    return phi * powers[:, :, None, None]


def _t(matrix: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrix, -1, -2)
