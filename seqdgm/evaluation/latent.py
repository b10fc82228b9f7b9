"""How well latent states are known, where the truth is: errors, consistency and coverage.

The truth is an array (series, time, state), NaN where it is not known; whatever is NaN is not
scored. The states of a model that was learned have no coordinates of their own: its likelihood is
the same after any invertible map of them. `learn_alignment` finds the affine map of its posterior
means that comes closest to the truth of a training part, and only what it then says is scored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float
from scipy import stats

from seqdgm.results import StatePosterior

Array = np.ndarray
Over = Literal["series", "state", "pooled"]

# Share of its whole variance that the mean of a state must have, or it says nothing: Burda, Grosse
# and Salakhutdinov (2016), "Importance weighted autoencoders", section 5.3.
_ACTIVE = 0.01


def state_rmse(
    posterior: StatePosterior, truth: Float[Array, "series time state"], *, over: Over = "series"
) -> Any:
    r"""Root mean squared error of the posterior means, in the units of the states.

    .. math:: \sqrt{\mathrm{mean}\,(E[z_{tk} \mid x] - z_{tk})^2}

    Parameters
    ----------
    posterior : StatePosterior
        Filtered or smoothed states.
    truth : ndarray of shape (series, time, state)
        True states; NaN is left out.
    over : {"series", "state", "pooled"}
        One number for each series, for each element of the state, or for all together.

    Returns
    -------
    ndarray of shape (series,) or (state,), or float
        NaN where nothing is known.

    Raises
    ------
    ValueError
        For a truth of another shape, and a posterior that is not finite where the truth is known.

    Examples
    --------
    >>> import seqdgm as sq
    >>> made = sq.datasets.simulate("linear-gaussian", 20, 100, seed=0)
    >>> filtered, smoothed = made.model.filter(made.y), made.model.smooth(made.y)
    >>> error = [state_rmse(found, made.states, over="pooled") for found in (filtered, smoothed)]
    >>> bool(error[1] < error[0])
    True
    """
    if over not in get_args(Over):
        raise ValueError(f"over={over!r} is unknown; choose 'series', 'state' or 'pooled'")
    error, known = _errors(posterior, truth)
    axis = {"series": (1, 2), "state": (0, 1), "pooled": None}[over]
    return np.sqrt(_mean(error**2, known, axis))


@dataclass(frozen=True)
class Nees:
    """Normalised squared errors, 1 where the covariance is right; see `state_nees`.

    Attributes
    ----------
    value : ndarray of shape (series,)
        Mean over the steps of each series.
    by_step : ndarray of shape (time,)
        Mean over the series at each step; NaN where nothing is known.
    lower, upper : ndarray of shape (time,)
        Between which `by_step` lies with probability `level` if the posterior is right.
    level : float
        In per cent.
    """

    value: Float[Array, "series"]
    by_step: Float[Array, "time"]
    lower: Float[Array, "time"]
    upper: Float[Array, "time"]
    level: float

    @property
    def mean(self) -> float:
        """Mean over the series."""
        return float(np.nanmean(self.value))

    @property
    def inside(self) -> float:
        """Share of the steps that lie within their bounds, in per cent."""
        known = ~np.isnan(self.by_step)
        held = (self.lower <= self.by_step) & (self.by_step <= self.upper)
        return 100.0 * float(held[known].mean()) if known.any() else float("nan")


def state_nees(
    posterior: StatePosterior, truth: Float[Array, "series time state"], *, level: float = 95
) -> Nees:
    r"""Normalised estimation error squared, divided by the dimension of the state.

    .. math:: \epsilon_t = (z_t - \hat z_t)^\top P_t^{-1} (z_t - \hat z_t) / d

    If the posterior is Gaussian and right, :math:`d\,\epsilon_t` is chi-square with d degrees of
    freedom: its mean over series that are independent lies within the chi-square bounds, and 1 is
    its expectation. Above 1 the covariance is too small for the errors, below 1 too large. Errors
    of one series at different steps depend on each other, so the bounds are those of one step.

    Parameters
    ----------
    posterior, truth
        As in `state_rmse`. Where part of a state is known, the marginal of that part is used.
    level : float
        Probability of the bounds in per cent.

    Raises
    ------
    ValueError
        Besides, for a covariance that is not positive definite.

    Examples
    --------
    >>> import seqdgm as sq
    >>> made = sq.datasets.simulate("linear-gaussian", 200, 50, seed=0)
    >>> nees = state_nees(made.model.filter(made.y), made.states)
    >>> bool(0.95 < nees.mean < 1.05)
    True

    References
    ----------
    Bar-Shalom, Li and Kirubarajan (2001), *Estimation with Applications to Tracking and
    Navigation*, section 5.4.2; the division by d: Li, Zhao and Jilkov (2001), "Practical measures
    and test for credibility of an estimator".
    """
    share = _share(level)
    error, known = _errors(posterior, truth)
    squares = np.zeros(error.shape[:2])
    for pattern in np.unique(known[known.any(-1)], axis=0):
        at = np.argwhere((known == pattern).all(-1))
        n, t = at.T
        cov = posterior.cov[n, t][:, pattern][:, :, pattern]
        part = error[n, t][:, pattern, None]
        bad = ~(np.linalg.eigvalsh(cov)[:, 0] > 0)
        if bad.any():
            k, step = at[np.flatnonzero(bad)[0]]
            raise ValueError(
                f"series {posterior.panel.ids[k]!r}, step {step}: the covariance of the state is "
                "not positive definite; take more particles, or leave out elements of the state "
                "that are known exactly by setting their truth to NaN"
            )
        squares[n, t] = (part * np.linalg.solve(cov, part)).sum((1, 2))
    count = known.sum(-1)
    freedom = count.sum(0).astype(float)
    freedom[freedom == 0] = np.nan
    lower, upper = (stats.chi2.ppf(0.5 + side * share / 2, freedom) / freedom for side in (-1, 1))
    by_series = squares.sum(1) / np.where(count.any(1), count.sum(1), np.nan)
    return Nees(by_series, squares.sum(0) / freedom, lower, upper, level)


def state_coverage(
    posterior: StatePosterior,
    truth: Float[Array, "series time state"],
    level: float = 95,
    *,
    n_samples: int | None = None,
    seed: int | None = None,
) -> Float[Array, "series"]:
    """Share of the true states within their central posterior intervals, in per cent.

    Parameters
    ----------
    posterior, truth
        As in `state_rmse`.
    level : float
        Probability of the intervals in per cent.
    n_samples : int, optional
        Take the intervals from so many draws of a smoothed posterior; default those of the normal
        distribution with the posterior's mean and variance.
    seed : int, optional
        Seed of the draws.

    Examples
    --------
    >>> import seqdgm as sq
    >>> made = sq.datasets.simulate("linear-gaussian", 200, 50, seed=0)
    >>> found = state_coverage(made.model.filter(made.y), made.states, 80).mean()
    >>> bool(78 < found < 82)
    True
    """
    share = _share(level)
    error, known = _errors(posterior, truth)
    if n_samples is None:
        inside = np.abs(error) <= stats.norm.ppf(0.5 + share / 2) * posterior.std
    else:
        draws = posterior.sample(n_samples, seed)
        ends = np.quantile(draws, [0.5 - share / 2, 0.5 + share / 2], axis=1)
        inside = (ends[0] <= truth) & (truth <= ends[1])
    covered: Array = 100.0 * _mean(inside.astype(float), known, (1, 2))
    return covered


class Alignment(NamedTuple):
    """Affine map from a model's states to the truth; see `learn_alignment`.

    Attributes
    ----------
    matrix : ndarray of shape (state, model state)
    offset : ndarray of shape (state,)
    residual : ndarray of shape (state, state)
        Covariance of what the map leaves unexplained and the model's own covariance does not hold.
    """

    matrix: Float[Array, "state model"]
    offset: Float[Array, "state"]
    residual: Float[Array, "state state"]

    def apply(self, posterior: StatePosterior) -> StatePosterior:
        """Return the posterior of the true states: mapped moments, residual covariance added.

        It has marginals only, and nothing to draw trajectories from.
        """
        mean = posterior.mean @ self.matrix.T + self.offset
        cov = self.matrix @ posterior.cov @ self.matrix.T + self.residual
        names = tuple(f"z{k + 1}" for k in range(len(self.offset)))
        return replace(posterior, mean=mean, cov=cov, names=names, draw=None)


def learn_alignment(
    posterior: StatePosterior, truth: Float[Array, "series time state"]
) -> Alignment:
    r"""Map a model's states to the truth: least squares on a part whose truth is known.

    The likelihood of a learned model fixes its states only up to an invertible map, so they are
    compared with the truth through

    .. math::

        z_t \approx A\,\hat s_t + b, \qquad
        \mathrm{Cov}(z_t) = A\,P_t A^\top + \left(S - \overline{A\,P_t A^\top}\right)_+

    with posterior means :math:`\hat s_t`, covariances :math:`P_t`, the residual covariance S, and
    :math:`(\cdot)_+` the part with eigenvalues above 0. The residuals hold the uncertainty that the
    model states itself; the whole of S would count that twice. Directions in which the means hardly
    vary beside the posterior variance (1 % of the sum) carry no information and are left out.

    Errors after alignment are the best that a linear reading of the states gives. Their covariance
    is calibrated on the training part when the model's is too small, so that NEES and coverage on
    other data say whether it carries over, not whether the model's own was right; NEES below 1 says
    that the model's own is too large.

    Parameters
    ----------
    posterior : StatePosterior
        States of the training part.
    truth : ndarray of shape (series, time, state)
        True states of the training part; a step counts if it is known whole.

    Raises
    ------
    ValueError
        For fewer than twice as many known steps as the map has columns.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> made = sq.datasets.simulate("linear-gaussian", 40, 50, seed=0)
    >>> model = sq.LinearGaussianSSM(latent_dim=2).fit(made.y, pooled=True, seed=0)
    >>> known = learn_alignment(model.smooth(made.y), made.states)
    >>> new = sq.datasets.simulate("linear-gaussian", 40, 50, seed=1)
    >>> aligned = known.apply(model.smooth(new.y))
    >>> bool(state_rmse(aligned, new.states, over="pooled") < new.states.std())
    True
    """
    held = np.asarray(truth, dtype=float)
    rows = np.isfinite(held).all(-1)
    check_truth(posterior, held, same_states=False)
    rows &= _inside(posterior)
    mean, cov, target = posterior.mean[rows], posterior.cov[rows], held[rows]
    least = 2 * (mean.shape[1] + 1)
    if len(target) < least:
        raise ValueError(
            f"the map from {mean.shape[1]} states to the truth needs {least} steps whose truth is "
            f"known, there are {len(target)}; pass more of the truth"
        )
    _check_finite(posterior, rows[..., None])
    centre, origin = mean.mean(0), target.mean(0)
    basis = _informative(np.cov(mean.T, bias=True).reshape(2 * (mean.shape[1],)), cov.mean(0))
    weights = np.linalg.lstsq((mean - centre) @ basis, target - origin, rcond=None)[0]
    matrix = (basis @ weights).T
    residual = target - origin - (mean - centre) @ matrix.T
    beyond = residual.T @ residual / len(target) - matrix @ cov.mean(0) @ matrix.T
    values, vectors = np.linalg.eigh(beyond)
    return Alignment(matrix, origin - matrix @ centre, (vectors * values.clip(min=0)) @ vectors.T)


def check_truth(
    posterior: StatePosterior, truth: Float[Array, "series time state"], *, same_states: bool = True
) -> None:
    """Raise a ValueError unless the truth has the posterior's series and steps (and states)."""
    shape = posterior.mean.shape
    if truth.ndim != 3 or truth.shape[:2] != shape[:2]:
        raise ValueError(
            f"the true states have shape {truth.shape}, the posterior {shape}; pass an array of "
            "(series, time, state) with NaN where the truth is not known"
        )
    if same_states and truth.shape[2] != shape[2]:
        raise ValueError(
            f"the model has {shape[2]} states and the truth {truth.shape[2]}: they do not share "
            "coordinates; map the model's to the truth by learn_alignment"
        )


def _errors(posterior: StatePosterior, truth: Array) -> tuple[Array, Array]:
    """Truth less mean, 0 where it is not known, and where it is."""
    truth = np.asarray(truth, dtype=float)
    check_truth(posterior, truth)
    known = np.isfinite(truth) & _inside(posterior)[..., None]
    _check_finite(posterior, known)
    return np.where(known, truth - posterior.mean, 0.0), known


def _inside(posterior: StatePosterior) -> Array:
    inside: Array = np.arange(posterior.mean.shape[1]) < posterior.panel.lengths[:, None]
    return inside


def _check_finite(posterior: StatePosterior, known: Array) -> None:
    bad = known.any(-1) & ~(
        np.isfinite(posterior.mean).all(-1) & np.isfinite(posterior.cov).all((-2, -1))
    )
    if bad.any():
        n, t = np.argwhere(bad)[0]
        raise ValueError(
            f"series {posterior.panel.ids[n]!r}, step {t}: the posterior of the state is not "
            "finite; set the truth to NaN there to leave it out"
        )


def _informative(spread: Array, cov: Array) -> Array:
    """Directions (as columns) in which the means vary beside the mean posterior covariance."""
    values, vectors = np.linalg.eigh(spread + cov)
    kept = values > 1e-12 * values.max(initial=0.0)
    whiten = vectors[:, kept] / np.sqrt(values[kept])
    share, turn = np.linalg.eigh(whiten.T @ spread @ whiten)
    basis: Array = whiten @ turn[:, share > _ACTIVE]
    return basis


def _mean(values: Array, known: Array, axis: tuple[int, ...] | None) -> Any:
    count = known.sum(axis)
    above = np.where(known, values, 0.0).sum(axis)
    return above / np.where(count > 0, count, np.nan)


def _share(level: float) -> float:
    if not 1 <= level < 100:
        raise ValueError(f"level={level!r} must be in per cent, from 1 to below 100")
    return level / 100
