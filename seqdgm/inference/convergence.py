r"""Convergence of Markov chains: rank-normalised split R-hat and effective sample sizes.

References
----------
Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-normalization, folding, and
localization: an improved R-hat for assessing convergence of MCMC, *Bayesian Analysis* 16; Geyer
(1992), Practical Markov chain Monte Carlo, *Statistical Science* 7.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import special, stats

Array = np.ndarray


def rhat(draws: Float[Array, "chain draw *shape"]) -> Float[Array, "*shape"]:
    r"""Rank-normalised split :math:`\hat R`: the larger of that of the draws and of folded draws.

    Every chain is split in halves; the draws z are replaced by normal scores of their ranks, and of
    the ranks of :math:`|\theta - \mathrm{median}|` (which sees chains that differ in scale). With
    the variance B between and W within the chains of N draws,

    .. math:: \hat R = \sqrt{\frac{(N - 1)/N \cdot W + B / N}{W}} .

    Parameters
    ----------
    draws : ndarray of shape (chain, draw, *shape)
        At least four draws a chain.

    Returns
    -------
    ndarray of shape shape
        Near 1 where chains agree; Vehtari et al. ask for less than 1.01. NaN where draws are
        constant or not finite.

    Examples
    --------
    >>> chains = np.random.default_rng(0).normal(size=(4, 500))
    >>> bool(rhat(chains) < 1.01), bool(rhat(chains + np.arange(4)[:, None]) > 1.5)
    (True, True)
    """
    return _each(draws, _rhat)


def ess(draws: Float[Array, "chain draw *shape"], kind: str = "bulk") -> Float[Array, "*shape"]:
    r"""Effective sample size over all chains.

    .. math:: \mathrm{ESS} = \frac{M N}{1 + 2 \sum_t \hat\rho_t}

    with the autocorrelations :math:`\hat\rho_t` of split chains, summed by Geyer's initial monotone
    sequence (Vehtari et al. 2021, section 3.2).

    Parameters
    ----------
    draws : ndarray of shape (chain, draw, *shape)
        At least four draws a chain.
    kind : {"bulk", "tail", "mean"}
        Of the normal scores of ranks; the smaller one of the 5 % and the 95 % quantile; of the
        mean, as in the Monte-Carlo standard error.

    Returns
    -------
    ndarray of shape shape
        NaN where draws are constant or not finite.

    Raises
    ------
    ValueError
        For an unknown kind, or too few draws.

    Examples
    --------
    >>> chains = np.random.default_rng(0).normal(size=(4, 500))
    >>> bool(1500 < ess(chains) < 2500)
    True
    """
    kinds = {"bulk": _bulk_ess, "tail": _tail_ess, "mean": lambda x: _ess(_split(x))}
    if kind not in kinds:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {list(kinds)}")
    return _each(draws, kinds[kind])


def _each(draws: Array, function: object) -> Array:
    """A statistic of every element, NaN where it is not defined."""
    assert callable(function)
    x = np.asarray(draws, dtype=float)
    if x.ndim < 2 or x.shape[1] < 4:
        raise ValueError(
            f"draws have shape {x.shape}; convergence needs (chain, draw, ...) with at least four "
            "draws a chain"
        )
    flat = x.reshape(*x.shape[:2], -1)
    out = np.full(flat.shape[2], np.nan)
    for k in range(flat.shape[2]):
        one = flat[:, :, k]
        if np.isfinite(one).all() and np.ptp(one) > 0:
            out[k] = function(one)
    return out.reshape(x.shape[2:])


def _split(x: Float[Array, "chain draw"]) -> Float[Array, "half draw"]:
    """Both halves of every chain; an odd chain loses its middle draw."""
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, x.shape[1] - half :]])


def _scores(x: Array) -> Array:
    """Normal scores of ranks, with Blom's offset."""
    ranks = stats.rankdata(x, method="average").reshape(x.shape)
    scores: Array = special.ndtri((ranks - 0.375) / (x.size + 0.25))
    return scores


def _rhat(x: Float[Array, "chain draw"]) -> float:
    halves = _split(x)
    folded = np.abs(halves - np.median(halves))
    return max(_plain_rhat(_scores(halves)), _plain_rhat(_scores(folded)))


def _plain_rhat(x: Float[Array, "chain draw"]) -> float:
    n = x.shape[1]
    within = x.var(1, ddof=1).mean()
    between = n * x.mean(1).var(ddof=1)
    return float(np.sqrt(((n - 1) / n * within + between / n) / within))


def _bulk_ess(x: Float[Array, "chain draw"]) -> float:
    return _ess(_scores(_split(x)))


def _tail_ess(x: Float[Array, "chain draw"]) -> float:
    low, high = np.quantile(x, [0.05, 0.95])
    return min(_ess(_split((x <= end).astype(float))) for end in (low, high))


def _ess(x: Float[Array, "chain draw"]) -> float:
    m, n = x.shape
    covariance = _autocovariance(x)
    within = covariance[:, 0].mean() * n / (n - 1)
    total = within * (n - 1) / n
    if m > 1:
        total += x.mean(1).var(ddof=1)
    if total == 0:
        return float(m * n)
    rho = 1.0 - (within - covariance.mean(0)) / total
    rho[0] = 1.0
    # Sums of neighbours are positive and decrease for a reversible chain; noise takes over later.
    pairs = rho[: (n - 1) // 2 * 2].reshape(-1, 2).sum(1)
    negative = np.flatnonzero(pairs < 0)
    cut = negative[0] if len(negative) else len(pairs) - 1
    tau = -1.0 + 2.0 * np.minimum.accumulate(pairs[:cut]).sum() + max(rho[2 * cut], 0.0)
    tau = max(tau, 1.0 / np.log10(m * n))
    return float(m * n / tau)


def _autocovariance(x: Float[Array, "chain draw"]) -> Float[Array, "chain draw"]:
    """Of every chain, with the divisor N at all lags, by the fast Fourier transform."""
    n = x.shape[1]
    centred = x - x.mean(1, keepdims=True)
    size = 2 ** int(np.ceil(np.log2(2 * n)))
    spectrum = np.abs(np.fft.rfft(centred, size)) ** 2
    out: Array = np.fft.irfft(spectrum, size)[:, :n] / n
    return out
