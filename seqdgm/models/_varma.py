"""Vector ARMA models as linear-Gaussian systems: pure functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from seqdgm.kernels.types import System
from seqdgm.models._subspace import interpolate
from seqdgm.models._vector_ar import (
    coefficients_from_free,
    free_from_coefficients,
    shrink_to_stationary,
    stationary_covariance,
)


@dataclass(frozen=True)
class VarmaSpec:
    """Orders and widths of a vector ARMA model.

    Attributes
    ----------
    p, q : int
        Autoregressive and moving-average order.
    trend : {None, "c", "ct"}
    diagonal : bool
        Whether the errors of different series are uncorrelated.
    dim, n_inputs : int
        Number of observed columns and of regressors.
    """

    p: int
    q: int
    trend: str | None
    diagonal: bool
    dim: int = 1
    n_inputs: int = 0

    @property
    def n_mean(self) -> int:
        """Regressors of the mean: constant, time, inputs."""
        return len(self.trend or "") + self.n_inputs

    @property
    def n_state(self) -> int:
        """Width of the state."""
        return self.dim * max(self.p, self.q + 1)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Free parameters: mean, AR, MA, log standard deviations, correlations."""
        pairs = 0 if self.diagonal else self.dim * (self.dim - 1) // 2
        square = self.dim**2
        return self.dim * self.n_mean, self.p * square, self.q * square, self.dim, pairs

    @property
    def n_free(self) -> int:
        """Number of free parameters."""
        return sum(self.sizes)


class Varma(NamedTuple):
    """Parameters; the first axis is 1 (shared) or the number of series.

    Attributes
    ----------
    mean : coefficients of constant, time and inputs in the mean of each column
    ar, ma : coefficient matrices by lag
    cov : covariance of the errors
    """

    mean: Float[np.ndarray, "rows dim regressors"]
    ar: Float[np.ndarray, "rows p dim dim"]
    ma: Float[np.ndarray, "rows q dim dim"]
    cov: Float[np.ndarray, "rows dim dim"]

    def take(self, rows: np.ndarray) -> Varma:
        """Parameters of the chosen rows."""
        return self if len(self.cov) == 1 else Varma(*(field[rows] for field in self))


class Scope(NamedTuple):
    """What the coefficients of the mean are searched around and measured in.

    Attributes
    ----------
    centre, unit : ndarray of shape (rows, dim, regressors)
    regular : ndarray of bool, shape (rows,)
        Whether the errors of the start are of full rank, so that the likelihood has a maximum.
    """

    centre: Float[np.ndarray, "rows dim regressors"]
    unit: Float[np.ndarray, "rows dim regressors"]
    regular: np.ndarray

    def take(self, rows: np.ndarray) -> Scope:
        """Scope of the chosen rows."""
        return Scope(*(field[rows] for field in self))


def design(
    trend: str | None, u: Float[np.ndarray, "series steps inputs"]
) -> Float[np.ndarray, "series steps regressors"]:
    """Regressors of the mean at every step: 1, t - 1 and the inputs."""
    count, steps = u.shape[:2]
    time = np.broadcast_to(np.arange(steps, dtype=np.float64)[None, :, None], (count, steps, 1))
    parts = [np.ones_like(time)] if trend else []
    parts += [time] if trend == "ct" else []
    return np.concatenate([*parts, u], 2)


def system(
    spec: VarmaSpec, parameters: Varma, u: Float[np.ndarray, "series steps inputs"]
) -> System:
    r"""System matrices in the form of Harvey (1989), section 8.1.

    The state has max(p, q + 1) blocks; block j is what is known of :math:`w_{t+j}` at t.
    """
    rows, dim, state = len(parameters.cov), spec.dim, spec.n_state
    blocks = state // dim
    F = np.zeros((rows, state, state))
    F[:, : spec.p * dim, :dim] = parameters.ar.reshape(rows, spec.p * dim, dim)
    ahead = np.arange(state - dim)
    F[:, ahead, ahead + dim] = 1.0
    weights = np.zeros((rows, blocks, dim, dim))
    weights[:, 0] = np.eye(dim)
    weights[:, 1 : 1 + spec.q] = parameters.ma
    load = weights.reshape(rows, state, dim)
    Q = load @ parameters.cov @ load.transpose(0, 2, 1)
    offset = np.zeros((1, 1, dim))
    if spec.n_mean:
        offset = design(spec.trend, u) @ parameters.mean.transpose(0, 2, 1)
    fields = {
        "F": F[:, None],
        "Q": 0.5 * (Q + Q.transpose(0, 2, 1))[:, None],
        "H": np.eye(dim, state)[None, None],
        "R": np.zeros((1, 1, dim, dim)),
        "b": np.zeros((1, 1, state)),
        "d": offset,
        "m0": np.zeros((1, state)),
        "P0": stationary_covariance(F, Q),
        "Pinf": np.zeros((1, state, state)),
    }
    return System(**{n: torch.from_numpy(np.ascontiguousarray(f)) for n, f in fields.items()})


def constrain(spec: VarmaSpec, free: Float[np.ndarray, "rows free"], scope: Scope) -> Varma:
    r"""Stationary parameters from unconstrained ones.

    The moving average is free, in units of the errors: :math:`\Theta_j = L M_j L^{-1}` with
    :math:`\Sigma = L L'`. A root on the unit circle, where the maximum often is, is an ordinary
    point of the likelihood; `invertible` finds the usual representation at the end.
    """
    rows, dim = len(free), spec.dim
    edges = np.cumsum(spec.sizes)[:-1]
    mean, ar, ma, log_sd, below = np.split(free, edges, axis=1)
    root = np.tile(np.eye(dim), (rows, 1, 1))
    if not spec.diagonal:
        low = np.tril_indices(dim, -1)
        root[:, low[0], low[1]] = below
    root = np.exp(log_sd)[:, :, None] * root
    cov = root @ root.transpose(0, 2, 1)
    return Varma(
        scope.centre + scope.unit * mean.reshape(rows, dim, spec.n_mean),
        coefficients_from_free(ar.reshape(rows, spec.p, dim, dim), cov),
        root[:, None] @ ma.reshape(rows, spec.q, dim, dim) @ np.linalg.inv(root)[:, None],
        cov,
    )


def unconstrain(spec: VarmaSpec, parameters: Varma, scope: Scope) -> Float[np.ndarray, "rows free"]:
    """Inverse of `constrain`."""
    root = np.linalg.cholesky(parameters.cov)
    sd = np.diagonal(root, axis1=1, axis2=2)
    low = np.tril_indices(spec.dim, -1)
    parts = [
        (parameters.mean - scope.centre) / scope.unit,
        free_from_coefficients(parameters.ar, parameters.cov),
        np.linalg.inv(root)[:, None] @ parameters.ma @ root[:, None],
        np.log(sd),
    ]
    if not spec.diagonal:
        parts.append((root / sd[:, :, None])[:, low[0], low[1]])
    return np.concatenate([part.reshape(len(root), -1) for part in parts], 1)


def invertible(spec: VarmaSpec, parameters: Varma) -> Varma:
    r"""Representation of the same process whose errors are its innovations.

    In the innovations form :math:`s_{t+1} = F s_t + K \varepsilon_t`,
    :math:`w_t = H s_t + \varepsilon_t`, the filter's steady state P obeys a Riccati equation with
    no noise. It lives on the invariant subspace of the roots of :math:`F - K H` outside the unit
    circle, and its inverse solves a Lyapunov equation there.
    """
    from scipy.linalg import schur

    dim, state = spec.dim, spec.n_state
    ma, cov = parameters.ma.copy(), parameters.cov.copy()
    H = np.eye(dim, state)
    for row in range(len(cov)):
        if spec.q == 0:
            break
        shift = np.eye(state, k=dim)
        ar = np.zeros((state, dim))
        ar[: spec.p * dim] = parameters.ar[row].reshape(-1, dim)
        gain = ar.copy()
        gain[: spec.q * dim] += ma[row].reshape(-1, dim)
        left, basis, outside = schur(shift + (ar - gain) @ H, output="real", sort="ouc")
        if outside == 0:
            continue
        back = np.linalg.inv(left[:outside, :outside])
        seen = H @ basis[:, :outside]
        information = back.T @ seen.T @ np.linalg.solve(cov[row], seen) @ back
        steady = np.linalg.inv(stationary_covariance(back.T[None], information[None])[0])
        spread = basis[:, :outside] @ steady @ basis[:, :outside].T
        innovation = cov[row] + spread[:dim, :dim]
        transition = shift + ar @ H
        new = (transition @ spread[:, :dim] + gain @ cov[row]) @ np.linalg.inv(innovation) - ar
        ma[row] = new[: spec.q * dim].reshape(spec.q, dim, dim)
        cov[row] = 0.5 * (innovation + innovation.T)
    return parameters._replace(ma=ma, cov=cov)


def starting_values(
    spec: VarmaSpec,
    x: list[Float[np.ndarray, "time dim"]],
    u: list[Float[np.ndarray, "steps inputs"]],
) -> tuple[Varma, Scope]:
    """Least-squares start of each series, by the two regressions of Hannan and Rissanen (1982).

    Gaps are bridged by straight lines here; the likelihood treats them exactly.
    """
    found, scopes = [], []
    for values, known in zip(x, u, strict=True):
        columns = design(spec.trend, known[None, : len(values)])[0]
        mean, rest = regress_mean(values, columns)
        filled = interpolate(rest)
        ar, ma, residual = _hannan_rissanen(filled, spec)
        scale = np.maximum(filled.std(0), np.finfo(float).tiny)
        size = np.sqrt((columns**2).mean(0)) if len(columns) else np.ones(spec.n_mean)
        unit = scale[:, None] / np.where(size > 0, size, 1.0)
        cov = residual.T @ residual / max(1, len(residual))
        noise = np.sqrt(np.diag(cov))
        # What rounding leaves of a constant, or of a column that repeats the others, is no error.
        regular = bool((noise > 1e-12 * np.maximum(1.0, np.nanmax(np.abs(values), 0))).all())
        noise = np.where(noise > 0, noise, 1.0)
        correlation = cov / noise[:, None] / noise
        np.fill_diagonal(correlation, 1.0)
        regular = regular and bool(np.linalg.eigvalsh(correlation)[0] > 1e-10)
        if spec.diagonal or not regular:
            correlation = np.eye(spec.dim)
        found.append(Varma(mean, ar, ma, correlation * noise[:, None] * noise))
        scopes.append(Scope(mean, unit, np.array(regular)))
    return (
        Varma(*(np.stack(f) for f in zip(*found, strict=True))),
        Scope(*(np.stack(f) for f in zip(*scopes, strict=True))),
    )


def regress_mean(
    values: Float[np.ndarray, "time dim"], columns: Float[np.ndarray, "time regressors"]
) -> tuple[Float[np.ndarray, "dim regressors"], Float[np.ndarray, "time dim"]]:
    """Least-squares coefficients of each column on what was observed of it, and the residuals."""
    mean = np.zeros((values.shape[1], columns.shape[1]))
    for k, column in enumerate(values.T):
        seen = np.isfinite(column)
        if seen.any() and columns.shape[1]:
            mean[k] = np.linalg.lstsq(columns[seen], column[seen], rcond=None)[0]
    return mean, values - columns @ mean.T


def _hannan_rissanen(
    w: Float[np.ndarray, "time dim"], spec: VarmaSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AR and MA coefficients, stationary and invertible, and the residuals."""
    time, dim = w.shape
    error = np.zeros_like(w)
    begin = spec.p
    if spec.q:
        longest = max(spec.p + spec.q, 1 + int(np.log(max(time, 2)) ** 1.5))
        order = max(1, min(longest, (time // 2 - 1) // (dim + 1)))
        coefficients = _lagged(w, order)
        error[order:] = w[order:] - coefficients @ _fit(coefficients, w[order:])
        begin = max(spec.p, order + spec.q)
    begin = min(begin, max(spec.p, spec.q, time - 2 * dim * (spec.p + spec.q) - 1))
    regressors = np.hstack(
        [_lagged(w, spec.p)[begin - spec.p :], _lagged(error, spec.q)[begin - spec.q :]]
    )
    weights = _fit(regressors, w[begin:])
    blocks = weights.reshape(spec.p + spec.q, dim, dim).transpose(0, 2, 1)
    residual = w[begin:] - regressors @ weights
    ar = shrink_to_stationary(blocks[None, : spec.p])[0]
    ma = -shrink_to_stationary(-blocks[None, spec.p :])[0]
    return ar, ma, residual


def _lagged(w: Float[np.ndarray, "time dim"], order: int) -> Float[np.ndarray, "rows lagged"]:
    """(w_{t-1}, ..., w_{t-order}) for t = order, order + 1, ..."""
    time = len(w)
    parts = [w[order - k : time - k] for k in range(1, order + 1)]
    return np.hstack(parts) if parts else np.zeros((time, 0))


def _fit(regressors: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(regressors, target, rcond=None)[0]
