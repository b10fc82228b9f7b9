"""Whether one model is better than another: tests of paired scores, and ranks of several models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray


def diebold_mariano(difference: Float[Array, "time"], horizon: int = 1) -> tuple[float, float]:
    r"""Test equal accuracy of two forecasts of one series, in the small-sample form.

    .. math:: \text{DM}^* = \sqrt{\frac{n + 1 - 2h + h (h - 1) / n}{n}} \;
              \frac{\bar d}{\sqrt{(\gamma_0 + 2 \sum_{k<h} \gamma_k) / n}}

    against Student's t with n - 1 degrees of freedom, with the autocovariances :math:`\gamma_k`
    (divisor n) of the differences d, which h-step forecasts correlate up to lag h - 1.

    Parameters
    ----------
    difference : ndarray of shape (time,)
        Loss of one forecast minus that of the other, in the order of time.
    horizon : int
        h, in forecast origins.

    Returns
    -------
    tuple of float
        Statistic and two-sided p-value; NaN with fewer than h + 2 values, or where the estimated
        variance is not positive.

    Examples
    --------
    >>> statistic, p = diebold_mariano([1.0, 2.0, 0.5, 1.5, 1.0])
    >>> round(statistic, 3), round(p, 4)
    (4.707, 0.0093)

    References
    ----------
    Diebold and Mariano (1995), Journal of Business & Economic Statistics 13(3); Harvey, Leybourne
    and Newbold (1997), "Testing the equality of prediction mean squared errors", International
    Journal of Forecasting 13(2), equations 8 and 9.
    """
    from scipy.stats import t

    d = np.asarray(difference, dtype=float)
    n = len(d)
    if int(horizon) != horizon or horizon < 1:
        raise ValueError(f"horizon={horizon!r} must be a whole number, at least 1")
    if n < horizon + 2:
        return float("nan"), float("nan")
    e = d - d.mean()
    covariances = [e @ e, *(2 * (e[k:] @ e[:-k]) for k in range(1, horizon))]
    variance = float(sum(covariances)) / n**2
    if not variance > 0:
        return float("nan"), float("nan")
    small = (n + 1 - 2 * horizon + horizon * (horizon - 1) / n) / n
    statistic = float(d.mean() / np.sqrt(variance) * np.sqrt(small))
    return statistic, float(2 * t.sf(abs(statistic), n - 1))


def paired_bootstrap(
    difference: Float[Array, "units"],
    cluster: Array | None = None,
    *,
    n_draws: int = 9999,
    seed: int | None = 0,
) -> float:
    """Two-sided p-value of a mean paired difference of zero, by resampling clusters.

    The differences are centred, so that the hypothesis holds, and whole clusters are drawn with
    replacement: the windows of one series stay together, whatever they have in common. The
    p-value is the share of studentised means at least as large as that of the data, which
    count as one of the draws.

    Parameters
    ----------
    difference : ndarray of shape (units,)
        Paired differences of scores.
    cluster : array of shape (units,), optional
        What a unit belongs to (its series); default each to itself.
    n_draws, seed : int
        Number of draws, and their seed.

    Returns
    -------
    float
        NaN for fewer than two clusters, or without any variation.

    Examples
    --------
    >>> import numpy as np
    >>> paired_bootstrap(np.linspace(1.0, 2.0, 30), n_draws=999)
    0.001

    References
    ----------
    Efron and Tibshirani (1993), *An Introduction to the Bootstrap*, algorithm 16.2; Davison and
    Hinkley (1997), *Bootstrap Methods and their Application*, section 4.4.
    """
    d = np.asarray(difference, dtype=float)
    if not len(d):
        return float("nan")
    codes = np.arange(len(d)) if cluster is None else pd.factorize(np.asarray(cluster))[0]
    sums, counts = np.bincount(codes, weights=d - d.mean()), np.bincount(codes)
    n = len(sums)
    if n < 2 or np.allclose(sums, 0.0, atol=1e-14 * np.abs(d).max()):
        return float("nan")

    def studentised(s: Array, c: Array, shift: float) -> Array:
        mean = s.sum(axis=-1, keepdims=True) / c.sum(axis=-1, keepdims=True)
        error = np.sqrt(((s - c * mean) ** 2).sum(axis=-1))
        value = np.abs(mean[..., 0] + shift) * c.sum(axis=-1)
        # All draws of one cluster: no variation, and a mean that no scale can judge.
        return np.divide(value, error, out=np.full(value.shape, np.inf), where=error > 0)

    rng = np.random.default_rng(seed)
    observed = studentised(sums[None], counts[None], float(d.mean()))[0]
    beyond = 0
    for start in range(0, n_draws, 500):  # in blocks: a large panel's draws would fill the memory
        picks = rng.integers(0, n, (min(500, n_draws - start), n))
        beyond += int((studentised(sums[picks], counts[picks], 0.0) >= observed).sum())
    return (beyond + 1) / (n_draws + 1)


def holm(p_values: Float[Array, "tests"]) -> Float[Array, "tests"]:
    """Adjust p-values for their number by Holm's step-down method; NaN stays and does not count.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]

    References
    ----------
    Holm (1979), "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6(2).
    """
    p = np.asarray(p_values, dtype=float)
    out = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    steps = p[order] * np.arange(len(order), 0, -1)
    out[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return out


@dataclass(frozen=True)
class Ranking:
    """Ranks of several models over many units, with the Friedman and Nemenyi tests.

    Attributes
    ----------
    ranks : Series
        Mean rank of each model, best first; 1 is the smallest loss, ties share their mean rank.
    n_units : int
        Units on which every model was scored.
    statistic, p_value : float
        Friedman's chi-square test that all models rank alike.
    critical_difference : float
        Nemenyi: two mean ranks that are further apart differ at `alpha`, all pairs considered.
    alpha : float
        Level of the tests.

    References
    ----------
    Demsar (2006), "Statistical comparisons of classifiers over multiple data sets", JMLR 7, section
    3.2 and figure 1; Friedman (1937), JASA 32; Nemenyi (1963).
    """

    ranks: pd.Series
    n_units: int
    statistic: float
    p_value: float
    critical_difference: float
    alpha: float

    def groups(self) -> list[tuple[str, ...]]:
        """Largest sets of models, best first, that the Nemenyi test does not tell apart."""
        values, names = self.ranks.to_numpy(), list(self.ranks.index)
        found: list[tuple[int, int]] = []
        for first in range(len(values)):
            last = int(np.searchsorted(values, values[first] + self.critical_difference, "right"))
            if last - first > 1 and (not found or last > found[-1][1]):
                found.append((first, last))
        return [tuple(names[first:last]) for first, last in found]

    def plot(self) -> Figure:
        """Draw the critical-difference diagram; bars join models that are not told apart."""
        from matplotlib.figure import Figure

        k = len(self.ranks)
        bars = self.groups()
        rows = (k + 1) // 2
        top = -0.25 * (len(bars) + 1)
        figure = Figure(figsize=(8.0, 1.5 + 0.3 * rows + 0.15 * len(bars)))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        # Room for the names beside the scale.
        axes.set(xlim=(1 - 0.6 * k, k + 0.6 * k), ylim=(top - 0.5 * rows, 2.0))
        axes.plot([1, k], [0, 0], color="0.2", lw=1)
        for rank in range(1, k + 1):
            axes.plot([rank, rank], [0, 0.12], color="0.2", lw=1)
            axes.text(rank, 0.2, str(rank), ha="center", va="bottom", fontsize=9)
        for place, (name, rank) in enumerate(self.ranks.items()):
            left = place < rows
            line = top - 0.5 * (place if left else k - 1 - place)
            end = 1 - 0.04 * k if left else k + 0.04 * k
            axes.plot([rank, rank, end], [0, line, line], color="0.45", lw=0.8)
            text = f"{name}  {rank:.2f}" if left else f"{rank:.2f}  {name}"
            axes.text(end, line, f" {text} ", ha="right" if left else "left", va="center")
        for row, group in enumerate(bars):
            ends = self.ranks[group[0]] - 0.02 * k, self.ranks[group[-1]] + 0.02 * k
            axes.plot(ends, [-0.25 * (row + 1)] * 2, color="C3", lw=3, solid_capstyle="butt")
        axes.plot([1, 1 + self.critical_difference], [1.1, 1.1], color="C3", lw=2)
        note = f"critical difference {self.critical_difference:.2f} ({100 * self.alpha:g} %)"
        axes.text(1, 1.25, f"{note}, {self.n_units} units", fontsize=9, va="bottom")
        return figure


def rank_models(scores: pd.DataFrame, alpha: float = 0.05) -> Ranking:
    r"""Rank models unit by unit, and test whether the ranks differ.

    .. math:: \text{CD} = q_\alpha \sqrt{\frac{k (k + 1)}{6 N}}

    with the quantile of the studentised range over :math:`\sqrt 2`, k models and N units.

    Parameters
    ----------
    scores : DataFrame
        Losses, a row a unit, a column a model; a unit with a missing score is left out.
    alpha : float
        Level of the tests.

    Raises
    ------
    ValueError
        For fewer than two models, or fewer than two complete units.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> a = np.arange(20.0)
    >>> ranking = rank_models(pd.DataFrame({"poor": a + 2, "fine": a, "fair": a + 1}))
    >>> ranking.ranks.to_dict(), round(ranking.critical_difference, 3)
    ({'fine': 1.0, 'fair': 2.0, 'poor': 3.0}, 0.741)

    References
    ----------
    Demsar (2006), JMLR 7, section 3.2.2.
    """
    from scipy.stats import chi2, rankdata, studentized_range

    complete = scores.dropna()
    n, k = complete.shape
    if k < 2 or n < 2:
        raise ValueError(
            f"{k} models on {n} units that all of them were scored on cannot be ranked; give two "
            "of each, at least"
        )
    ranks = rankdata(complete.to_numpy(dtype=float), axis=1)
    mean = ranks.mean(axis=0)
    # Of the ranks as they are, which corrects for ties.
    spread = ((ranks - (k + 1) / 2) ** 2).sum() / (n * (k - 1))
    between = n * ((mean - (k + 1) / 2) ** 2).sum()
    statistic = float(between / spread) if spread > 0 else 0.0
    q = float(studentized_range.ppf(1 - alpha, k, np.inf)) / np.sqrt(2)
    return Ranking(
        pd.Series(mean, index=complete.columns.astype(str), name="rank").sort_values(kind="stable"),
        n,
        statistic,
        float(chi2.sf(statistic, k - 1)),
        float(q * np.sqrt(k * (k + 1) / (6 * n))),
        alpha,
    )
