"""Dynamic factor models as linear-Gaussian systems: pure functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.kernels.types import System
from seqdgm.models._polynomials import coefficients_from_partial, partial_from_coefficients
from seqdgm.models._subspace import interpolate
from seqdgm.models._varma import design, regress_mean
from seqdgm.models._vector_ar import (
    coefficients_from_free,
    companion,
    free_from_coefficients,
    shrink_to_stationary,
    stationary_covariance,
)

_EDGE = 1.0 - 1e-6  # largest partial autocorrelation of an error


@dataclass(frozen=True)
class FactorSpec:
    """Orders and widths of a dynamic factor model.

    Attributes
    ----------
    n_factors, factor_order, error_order : int
    trend : {None, "c"}
    dim, n_inputs : int
        Number of observed columns and of regressors.
    """

    n_factors: int
    factor_order: int
    error_order: int
    trend: str | None
    dim: int = 1
    n_inputs: int = 0

    @property
    def n_mean(self) -> int:
        """Regressors of the mean: constant and inputs."""
        return len(self.trend or "") + self.n_inputs

    @property
    def n_lags(self) -> int:
        """Width of the part of the state that holds factors and their lags."""
        return self.n_factors * max(self.factor_order, 1)

    @property
    def n_state(self) -> int:
        """Width of the state."""
        return self.n_lags + self.dim * self.error_order

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Free parameters: loadings, mean, factor AR, error AR, log standard deviations."""
        return (
            self.dim * self.n_factors,
            self.dim * self.n_mean,
            self.factor_order * self.n_factors**2,
            self.dim * self.error_order,
            self.dim,
        )

    @property
    def n_free(self) -> int:
        """Number of free parameters."""
        return sum(self.sizes)


class Factors(NamedTuple):
    """Parameters; the first axis is 1 (shared) or the number of series.

    Attributes
    ----------
    loadings : effect of each factor on each column
    mean : coefficients of constant and inputs in the mean of each column
    ar : coefficient matrices of the factors by lag
    error_ar : coefficients of the errors of each column by lag
    error_variance : variance of the innovations of these errors
    """

    loadings: Float[Tensor, "rows dim factors"]
    mean: Float[Tensor, "rows dim regressors"]
    ar: Float[Tensor, "rows lags factors factors"]
    error_ar: Float[Tensor, "rows dim errorlags"]
    error_variance: Float[Tensor, "rows dim"]

    def take(self, rows: Tensor) -> Factors:
        """Parameters of the chosen rows."""
        return self if len(self.loadings) == 1 else Factors(*(field[rows] for field in self))


class Scope(NamedTuple):
    """What the search is centred on and measured in.

    Attributes
    ----------
    scale : ndarray of shape (rows, dim)
        Standard deviations of the columns.
    centre, unit : ndarray of shape (rows, dim, regressors)
        Of the coefficients of the mean.
    """

    scale: Float[np.ndarray, "rows dim"]
    centre: Float[np.ndarray, "rows dim regressors"]
    unit: Float[np.ndarray, "rows dim regressors"]

    def take(self, rows: np.ndarray) -> Scope:
        """Scope of the chosen rows."""
        return Scope(*(field[rows] for field in self))


def system(
    spec: FactorSpec, parameters: Factors, u: Float[np.ndarray, "series steps inputs"]
) -> System:
    """System matrices: the state holds the factors, their lags, and errors that have an AR part."""
    loadings, mean, ar, error_ar, variance = (field.numpy() for field in parameters)
    rows, dim, state, width = len(loadings), spec.dim, spec.n_state, spec.n_lags
    r = spec.n_factors
    F, Q, P0 = (np.zeros((rows, state, state)) for _ in range(3))
    noise = np.zeros((rows, width, width))
    noise[:, :r, :r] = np.eye(r)
    if spec.factor_order:
        F[:, :width, :width] = companion(ar)
    Q[:, :width, :width] = noise
    P0[:, :width, :width] = stationary_covariance(F[:, :width, :width], noise)
    H = np.zeros((rows, dim, state))
    H[:, :, :r] = loadings
    R = np.zeros((1, dim, dim))
    if spec.error_order:
        place = width + np.arange(spec.error_order * dim).reshape(spec.error_order, dim)
        small = companion(error_ar.reshape(rows * dim, spec.error_order, 1, 1))
        shock = np.zeros_like(small)
        shock[:, 0, 0] = variance.reshape(-1)
        spread = stationary_covariance(small, shock)
        for a, b in np.ndindex(spec.error_order, spec.error_order):
            F[:, place[a], place[b]] = small[:, a, b].reshape(rows, dim)
            P0[:, place[a], place[b]] = spread[:, a, b].reshape(rows, dim)
        Q[:, place[0], place[0]] = variance
        H[:, np.arange(dim), place[0]] = 1.0
    else:
        R = variance[:, :, None] * np.eye(dim)
    offset = np.zeros((1, 1, dim))
    if spec.n_mean:
        offset = design(spec.trend, u) @ mean.transpose(0, 2, 1)
    fields = {
        "F": F[:, None],
        "Q": Q[:, None],
        "H": H[:, None],
        "R": R[:, None],
        "b": np.zeros((1, 1, state)),
        "d": offset,
        "m0": np.zeros((1, state)),
        "P0": P0,
        "Pinf": np.zeros((1, state, state)),
    }
    return System(**{n: torch.from_numpy(np.ascontiguousarray(f)) for n, f in fields.items()})


def constrain(spec: FactorSpec, free: Float[np.ndarray, "rows free"], scope: Scope) -> Factors:
    """Parameters with stationary factors and errors from unconstrained ones."""
    rows, dim, r = len(free), spec.dim, spec.n_factors
    loadings, mean, ar, error, log_sd = np.split(free, np.cumsum(spec.sizes)[:-1], axis=1)
    partial = _EDGE * np.tanh(error.reshape(rows * dim, spec.error_order))
    error_ar = coefficients_from_partial(partial) if spec.error_order else partial
    fields = (
        scope.scale[:, :, None] * loadings.reshape(rows, dim, r),
        scope.centre + scope.unit * mean.reshape(rows, dim, spec.n_mean),
        factor_ar(spec, ar),
        error_ar.reshape(rows, dim, spec.error_order),
        (scope.scale * np.exp(log_sd)) ** 2,
    )
    return Factors(*(torch.from_numpy(np.ascontiguousarray(field)) for field in fields))


def factor_ar(
    spec: FactorSpec, free: Float[np.ndarray, "rows free"]
) -> Float[np.ndarray, "rows lags factors factors"]:
    """Coefficients of the factors, whose innovations are standard, from unconstrained ones."""
    r = spec.n_factors
    shaped = free.reshape(len(free), spec.factor_order, r, r)
    return coefficients_from_free(shaped, np.tile(np.eye(r), (len(free), 1, 1)))


def factor_free(ar: Float[np.ndarray, "rows lags factors factors"]) -> np.ndarray:
    """Inverse of `factor_ar`."""
    eye = np.tile(np.eye(ar.shape[-1]), (len(ar), 1, 1))
    return free_from_coefficients(ar, eye).reshape(len(ar), -1)


def unconstrain(
    spec: FactorSpec, parameters: Factors, scope: Scope
) -> Float[np.ndarray, "rows free"]:
    """Inverse of `constrain`."""
    loadings, mean, ar, error_ar, variance = (field.numpy() for field in parameters)
    rows = len(loadings)
    error = error_ar.reshape(rows * spec.dim, spec.error_order)
    if spec.error_order:
        error = np.arctanh(partial_from_coefficients(error) / _EDGE)
    parts = [
        loadings / scope.scale[:, :, None],
        (mean - scope.centre) / scope.unit,
        factor_free(ar),
        error,
        0.5 * np.log(variance) - np.log(scope.scale),
    ]
    return np.concatenate([part.reshape(rows, -1) for part in parts], 1)


def starting_values(
    spec: FactorSpec,
    x: list[Float[np.ndarray, "time dim"]],
    u: list[Float[np.ndarray, "steps inputs"]],
) -> tuple[Factors, Scope]:
    """Principal components of each series, and least squares on them.

    Gaps are bridged by straight lines here; the likelihood treats them exactly.
    """
    found, scopes = [], []
    for values, known in zip(x, u, strict=True):
        columns = design(spec.trend, known[None, : len(values)])[0]
        mean, rest = regress_mean(values, columns)
        filled = interpolate(rest)
        spread = filled.std(0)
        scale = np.where(spread > 1e-12 * (1.0 + np.nanmax(np.abs(values), 0)), spread, 1.0)
        size = np.sqrt((columns**2).mean(0))
        unit = scale[:, None] / np.where(size > 0, size, 1.0)
        loadings, ar, residual = _components(filled / scale, spec)
        error_ar = np.zeros((spec.dim, spec.error_order))
        if spec.error_order:
            error_ar = np.stack([_autoregression(e, spec.error_order) for e in residual.T])
        variance = np.maximum(residual.var(0), 1e-2) * scale**2
        found.append((scale[:, None] * loadings, mean, ar, error_ar, variance))
        scopes.append(Scope(scale, mean, unit))
    fields = (torch.from_numpy(np.stack(f)) for f in zip(*found, strict=True))
    return Factors(*fields), Scope(*(np.stack(f) for f in zip(*scopes, strict=True)))


def _components(
    w: Float[np.ndarray, "time dim"], spec: FactorSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loadings and AR coefficients of factors with standard innovations, and what they leave."""
    time, r = len(w), spec.n_factors
    _, size, right = np.linalg.svd(w, full_matrices=False)
    factors = np.zeros((time, r))
    count = min(r, len(size))
    factors[:, :count] = w @ right[:count].T
    factors /= np.maximum(factors.std(0), 1e-8)
    p = spec.factor_order
    lagged = np.hstack(
        [factors[p - k : time - k] for k in range(1, p + 1)] or [np.zeros((time, 0))]
    )
    weights = np.linalg.lstsq(lagged, factors[p:], rcond=None)[0]
    left = factors[p:] - lagged @ weights
    root = np.linalg.cholesky(left.T @ left / max(1, len(left)) + 1e-3 * np.eye(r))
    back = np.linalg.inv(root)
    ar = back @ weights.reshape(p, r, r).transpose(0, 2, 1) @ root
    factors = factors @ back.T
    loadings = np.linalg.lstsq(factors, w, rcond=None)[0].T
    return loadings, shrink_to_stationary(ar[None], 0.95)[0], w - factors @ loadings.T


def _autoregression(e: Float[np.ndarray, "time"], order: int) -> Float[np.ndarray, "order"]:
    """Stationary coefficients of one error by least squares."""
    lagged = np.stack([e[order - k : len(e) - k] for k in range(1, order + 1)], 1)
    found = np.linalg.lstsq(lagged, e[order:], rcond=None)[0]
    return shrink_to_stationary(found[None, :, None, None], 0.95)[0, :, 0, 0]


def normalised(parameters: Factors) -> Factors:
    r"""The rotation of the factors that makes :math:`\Lambda' \Sigma^{-1} \Lambda` diagonal.

    Its entries are in decreasing order, and the loading of each factor that is largest in units of
    its error is positive. The likelihood does not change.
    """
    weighted = parameters.loadings / parameters.error_variance.sqrt()[..., None]
    _, turn = torch.linalg.eigh(weighted.mT @ weighted)
    turn = turn.flip(-1)
    turned = weighted @ turn
    top = turned.gather(1, turned.abs().argmax(1, keepdim=True))
    turn = turn * torch.where(top < 0, -1.0, 1.0)
    return parameters._replace(
        loadings=parameters.loadings @ turn,
        ar=turn.mT[:, None] @ parameters.ar @ turn[:, None],
    )
