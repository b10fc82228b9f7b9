"""Observed information of linear-Gaussian models: second derivatives by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import kalman_filter
from seqdgm.kernels.types import System
from seqdgm.types import Batch

Objective = Callable[[Float[np.ndarray, "rows dim"], Int[np.ndarray, "rows"]], np.ndarray]

# Steps along one parameter lower the objective by this many nats: a twentieth of a standard error
# or so, far above rounding and well within the range of the expansion.
_DROP = 2e-3
_ROUNDS = 12  # at most, to find such steps; each can change a step a thousandfold
_FIRST = 1e-3  # first step, relative to the parameter
_CHUNK = 2**22  # observations filtered at once


class Natural(NamedTuple):
    """Parameters of a model in the units in which they are reported.

    Attributes
    ----------
    names : tuple of str
    values : ndarray of shape (fits, parameters)
        One row for each fitted series, or one that all share.
    free : tuple of bool
        Which of them were estimated; the others were given.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "fits parameters"]
    free: tuple[bool, ...]


class NaturalModel(Protocol):
    """What a model must say for its observed information."""

    def natural(self) -> Natural:
        """Its parameters."""

    def natural_inside(
        self, values: Float[np.ndarray, "rows parameters"]
    ) -> Bool[np.ndarray, "rows"]:
        """Whether rows of parameters lie within their domain."""

    def natural_system(
        self,
        values: Float[np.ndarray, "rows parameters"],
        fits: Int[np.ndarray, "rows"],
        u: Float[Tensor, "rows steps inputs"],
    ) -> System:
        """System matrices, one for each row; row k belongs to fit ``fits[k]``."""


def observed_information(model: NaturalModel, batch: Batch) -> Float[np.ndarray, "fits free free"]:
    r"""Minus the Hessian of the exact log-likelihood at the estimates.

    .. math:: -\frac{\partial^2 \log p(x; \theta)}{\partial \theta\, \partial \theta^\top},
        \qquad \theta \text{ the free parameters in their natural units}

    Parameters
    ----------
    model : NaturalModel
    batch : Batch
        The data of the fit, one series for each fit (any number if they share one).

    Returns
    -------
    ndarray of shape (fits, free, free)
        NaN in the row and column of a parameter at the boundary of its domain, or along which the
        likelihood has no maximum.
    """
    _, values, free = model.natural()
    at = np.flatnonzero(free)
    shared = len(values) == 1

    def log_likelihood(theta: np.ndarray, fits: np.ndarray) -> np.ndarray:
        full = values[fits]
        full[:, at] = theta
        out = np.full(len(full), np.nan)
        inside = np.flatnonzero(model.natural_inside(full))
        per_row = batch.x[0].numel() * (batch.n_series if shared else 1)
        for part in np.array_split(inside, -(-len(inside) * per_row // _CHUNK) or 1):
            out[part] = _log_likelihood(model, batch, full[part], fits[part], shared=shared)
        return out

    return -hessian(log_likelihood, values[:, at])


def _log_likelihood(
    model: NaturalModel,
    batch: Batch,
    values: Float[np.ndarray, "rows parameters"],
    fits: Int[np.ndarray, "rows"],
    *,
    shared: bool,
) -> Float[np.ndarray, "rows"]:
    """Log-likelihood of each row, of all series together where they share one fit."""
    if len(values) == 0:
        return np.zeros(0)
    copies = batch.n_series if shared else 1
    rows = np.repeat(np.arange(len(values)), copies)
    series = torch.from_numpy(np.tile(np.arange(copies), len(values)) if shared else fits)
    u = batch.u[series][:, : batch.n_steps]
    system = model.natural_system(values[rows], fits[rows], u)
    out = kalman_filter(
        system, batch.x[series], batch.mask[series], batch.lengths[series], store="likelihood"
    )
    return out.loglik.numpy().reshape(-1, copies).sum(1)


def hessian(
    objective: Objective, theta: Float[np.ndarray, "series dim"]
) -> Float[np.ndarray, "series dim dim"]:
    r"""Hessian of one function a series at its own parameters.

    Central differences over h and 2h, with one step of Richardson's extrapolation,

    .. math:: H = \tfrac13 (4 D_h - D_{2h}), \quad
        (D_h)_{ij} = \frac{f(+i, +j) - f(+i, -j) - f(-i, +j) + f(-i, -j)}{4 h_i h_j},

    leave an error of order :math:`h^4`. The steps come from the function itself: each lowers it by
    about 0.002, whatever the unit of the parameter.

    Parameters
    ----------
    objective : callable
        ``objective(theta, rows)`` with `theta` (B, dim) and `rows` (B,) the series each row belongs
        to, returning (B,) values; not finite outside the domain.
    theta : ndarray of shape (series, dim)
        Maxima, or points near them.

    Returns
    -------
    ndarray of shape (series, dim, dim)
        NaN in the row and column of a parameter along which the function has no maximum within its
        domain, as at a boundary.

    Examples
    --------
    >>> import numpy as np
    >>> f = lambda theta, rows: -theta[:, 0] ** 2 - theta[:, 0] * theta[:, 1] - theta[:, 1] ** 2
    >>> hessian(f, np.zeros((1, 2))).round(6).tolist()
    [[[-2.0, -1.0], [-1.0, -2.0]]]
    """
    theta = np.asarray(theta, dtype=np.float64)
    n, dim = theta.shape
    if dim == 0:
        return np.zeros((n, 0, 0))
    centre = objective(theta, np.arange(n))
    step = _steps(objective, theta, centre)
    return (
        4.0 * _central(objective, theta, centre, step)
        - _central(objective, theta, centre, 2.0 * step)
    ) / 3.0


def _evaluate(
    objective: Objective,
    theta: Float[np.ndarray, "series dim"],
    moves: Float[np.ndarray, "series moves dim"],
) -> Float[np.ndarray, "series moves"]:
    n, count, dim = moves.shape
    rows = np.repeat(np.arange(n), count)
    values = objective((theta[:, None] + moves).reshape(-1, dim), rows)
    return np.where(np.isfinite(values), values, np.nan).reshape(n, count)


def _steps(
    objective: Objective, theta: Float[np.ndarray, "series dim"], centre: np.ndarray
) -> Float[np.ndarray, "series dim"]:
    """Step of each parameter that lowers the function by about `_DROP`; NaN where none does."""
    dim = theta.shape[1]
    step = _FIRST * np.where(theta != 0, np.abs(theta), 1.0)
    for _ in range(_ROUNDS):
        along = np.einsum("ni,ij->nij", step, np.eye(dim))
        values = _evaluate(objective, theta, np.concatenate([along, -along], 1))
        drop = centre[:, None] - 0.5 * (values[:, :dim] + values[:, dim:])
        # Rounding may hide the drop of a short step; outside the domain the step was too long.
        growth = np.sqrt(_DROP / np.maximum(drop, 1e-6 * _DROP))
        step = step * np.where(np.isnan(drop), 0.1, np.maximum(growth, 1e-3))
        if np.all((growth > 0.7) & (growth < 1.4)):
            break
    return np.where((growth > 0.5) & (growth < 2.0), step, np.nan)


def _central(
    objective: Objective,
    theta: Float[np.ndarray, "series dim"],
    centre: np.ndarray,
    step: Float[np.ndarray, "series dim"],
) -> Float[np.ndarray, "series dim dim"]:
    n, dim = theta.shape
    first, second = np.triu_indices(dim, 1)
    along = np.einsum("ni,ij->nij", step, np.eye(dim))
    both, apart = along[:, first] + along[:, second], along[:, first] - along[:, second]
    moves = np.concatenate([along, -along, both, -both, apart, -apart], 1)
    values = _evaluate(objective, theta, moves)
    sizes = np.cumsum([dim, dim, len(first), len(first), len(first)])
    up, down, pp, mm, pm, mp = np.split(values, sizes, axis=1)
    out = np.empty((n, dim, dim))
    out[:, np.arange(dim), np.arange(dim)] = (up - 2.0 * centre[:, None] + down) / step**2
    mixed = (pp + mm - pm - mp) / (4.0 * step[:, first] * step[:, second])
    out[:, first, second] = mixed
    out[:, second, first] = mixed
    return out
