"""The Box-Cox power that suits a model: maximum of its profile likelihood."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.inference.innovations import innovations
from seqdgm.model import SequenceModel
from seqdgm.panel import Panel
from seqdgm.prepare import log_jacobian
from seqdgm.results import FitReport
from seqdgm.transform import POWERS
from seqdgm.types import Batch

Attempt = Callable[[Any, Float[Tensor, "sys dim"]], tuple[FitReport, Batch]]

_GRID = (0.0, 0.5, 1.0, 1.5, 2.0)
_REFINEMENTS = (0.25, 0.05)  # half-widths of the parabolas that follow


def profile_power(
    draft: SequenceModel,
    panel: Panel,
    attempt: Attempt,
    *,
    pooled: bool,
) -> Float[Tensor, "sys 1"]:
    r"""Power with the largest likelihood of the data, all other parameters at their best.

    .. math:: \ell(\lambda) = \max_\theta \log p(g_\lambda(x); \theta)
        + (\lambda - 1) \sum_t \log x_t, \qquad 0 \le \lambda \le 2

    Observations that determine a diffuse element have no density, so they are left out of the sum:
    what is compared is the density of the others given them. The best of a coarse grid is refined
    by two parabolas through three points each. All series are fitted at once, each at its own
    power.

    Parameters
    ----------
    draft : SequenceModel
        The model before the fit; it is copied for every attempt.
    panel : Panel
        The data.
    attempt : callable
        ``attempt(copy, power)`` fits a copy with the given powers and returns the report and the
        transformed data.
    pooled : bool
        Whether the series share one power.

    Returns
    -------
    Tensor of shape (series or 1, 1)

    Raises
    ------
    ValueError
        For more than one column, and for a model without an exact likelihood.

    References
    ----------
    Box and Cox (1964), An analysis of transformations, *Journal of the Royal Statistical Society*
    B 26(2), 211-252, section 3.
    """
    if panel.n_dims != 1:
        raise ValueError(
            f"transform='boxcox' estimates the power of one column, but y has {panel.n_dims}; give "
            "the power: transform=('boxcox', 0.5)"
        )
    if "kalman" not in draft.engines:
        raise ValueError(
            f"{type(draft).__name__} has no exact likelihood to estimate a power with; give it: "
            "transform=('boxcox', 0.5)"
        )
    n = 1 if pooled else panel.n_series
    skip: list[torch.Tensor] = []

    def value(power: np.ndarray) -> np.ndarray:
        trial: Any = copy.deepcopy(draft)
        report, batch = attempt(trial, torch.from_numpy(power.copy())[:, None])
        if not skip:  # which observations are diffuse does not depend on their values
            skip.append(innovations(trial, batch).diffuse)
        assert report.log_likelihood is not None
        assert trial.transform_ is not None
        jacobian = log_jacobian(panel, trial.transform_, diffuse=lambda: skip[0])
        total = report.log_likelihood + (jacobian.sum() if pooled else jacobian)
        return np.where(np.isfinite(total), total, -np.inf)

    grid = np.array(_GRID)
    best = grid[np.argmax([value(np.full(n, power)) for power in grid], axis=0)]
    for half in _REFINEMENTS:
        centre = np.clip(best, POWERS[0] + half, POWERS[1] - half)
        three = centre + half * np.array([[-1.0], [0.0], [1.0]])
        best = np.clip(_top(three, np.stack([value(power) for power in three])), *POWERS)
    return torch.from_numpy(best)[:, None]


def _top(
    at: Float[np.ndarray, "3 series"], value: Float[np.ndarray, "3 series"]
) -> Float[np.ndarray, "series"]:
    """Top of the parabolas through three equidistant points, at most one step outside them.

    The best of the three where the parabola has no top.
    """
    step = at[1] - at[0]
    known = np.isfinite(value).all(0)
    low, middle, high = np.where(known, value, 0.0)
    bend = 2.0 * middle - low - high
    curved = known & (bend > 0)
    move = 0.5 * step * (high - low) / np.where(curved, bend, 1.0)
    highest = np.take_along_axis(at, value.argmax(0)[None], 0)[0]
    return np.where(curved, at[1] + np.clip(move, -2.0 * step, 2.0 * step), highest)
