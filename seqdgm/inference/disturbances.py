r"""Smoothed disturbances, auxiliary residuals and fixed-lag moments of linear-Gaussian models.

References
----------
Durbin and Koopman (2012), *Time Series Analysis by State Space Methods*, 2nd ed., sections 4.5, 5.4
and 7.5; Harvey and Koopman (1992), Diagnostic checking of unobserved-components time series models,
*Journal of Business and Economic Statistics* 10(4); Anderson and Moore (1979), *Optimal Filtering*,
chapter 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.cpu_backward import backward_pass, fixed_lag_pass
from seqdgm.kernels.types import ROUNDING, System
from seqdgm.types import check_count


@dataclass(frozen=True)
class Disturbances:
    r"""What all observations say about the disturbances of each step; NaN beyond a series' end.

    Attributes
    ----------
    loglik : (series,)
        Log-likelihood in nats.
    state_mean, state_cov : (series, time, state), (series, time, state, state)
        Moments of w_t, the disturbance of the transition into step t; NaN at the first step, which
        has none.
    obs_mean, obs_cov : (series, time, obs), (series, time, obs, obs)
        Moments of v_t, those of elements that were not observed included.
    state_residual, obs_residual : (series, time, state), (series, time, obs)
        Auxiliary residuals: the smoothed disturbances over their standard deviations,
        :math:`E[w_t \mid x] / \operatorname{sd}(E[w_t \mid x])`, each N(0, 1) under the model but
        correlated over time. Large ones point to a break in that component, or to an outlier. NaN
        where the smoothed disturbance is zero whatever the data.
    """

    loglik: Float[Tensor, "series"]
    state_mean: Float[Tensor, "series time state"]
    state_cov: Float[Tensor, "series time state state"]
    obs_mean: Float[Tensor, "series time obs"]
    obs_cov: Float[Tensor, "series time obs obs"]
    state_residual: Float[Tensor, "series time state"]
    obs_residual: Float[Tensor, "series time obs"]


def disturbances(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
) -> Disturbances:
    r"""Disturbance smoother: p(w_t | x_1..T) and p(v_t | x_1..T).

    .. math::

        E[w_t \mid x] &= Q_t r_t, \quad \operatorname{Var}[w_t \mid x] = Q_t - Q_t N_t Q_t, \\
        E[v_t \mid x] &= R_t e_t, \quad \operatorname{Var}[v_t \mid x] = R_t - R_t D_t R_t,

    with :math:`(r_t, N_t)` relative to the predicted state and :math:`(e_t, D_t)` the smoothing
    error of the observation; nothing is inverted. They are proper while the state is diffuse.

    Parameters
    ----------
    system : System
        The matrices, float64, on the CPU.
    x, mask, lengths : Tensor
        As in `seqdgm.kernels.kalman_filter`.

    Raises
    ------
    ValueError
        If shapes or types do not fit together, or tensors are not on the CPU.

    Examples
    --------
    A random walk seen exactly has no observation error, and its disturbances are its steps:

    >>> import torch
    >>> from seqdgm.kernels import System
    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> walk = System(one, one, one, 0 * one, zero, zero, zero[0], zero, one[0])
    >>> x = torch.tensor([[[5.0], [7.0], [6.0]]], dtype=torch.float64)
    >>> out = disturbances(walk, x, ~x.isnan(), torch.tensor([3]))
    >>> out.state_mean[0, 1:, 0].tolist(), out.obs_mean[0, :, 0].tolist()
    ([2.0, -1.0], [0.0, 0.0, 0.0])
    """
    out = backward_pass(system, x, mask, lengths, histories=True)
    assert out.r is not None
    assert out.N is not None
    assert out.e is not None
    assert out.D is not None
    state_mean, state_cov, state_residual = _moments(system.Q, out.r, out.N)
    obs_mean, obs_cov, obs_residual = _moments(system.R, out.e, out.D)
    for part in (state_mean, state_cov, state_residual):
        part[:, :1] = torch.nan
    return Disturbances(
        out.filtered.loglik,
        state_mean,
        state_cov,
        obs_mean,
        obs_cov,
        state_residual,
        obs_residual,
    )


def fixed_lag(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    lag: int,
) -> tuple[
    Float[Tensor, "series"],
    Float[Tensor, "series time state"],
    Float[Tensor, "series time state state"],
]:
    r"""Fixed-lag smoother: moments of z_t given x_1..t+lag (or x_1..T, if the series ends before).

    From every filtered state :math:`(a_t, P_t)`, (r, N) are pulled back over the `lag` steps that
    follow: :math:`a_t + P_t r`, :math:`P_t - P_t N P_t`. Time grows with the product of length and
    lag.

    Parameters
    ----------
    system : System
        The matrices, float64, on the CPU.
    x, mask, lengths : Tensor
        As in `seqdgm.kernels.kalman_filter`.
    lag : int
        Steps to look ahead, at least 1.

    Returns
    -------
    loglik : Tensor, (series,)
        Log-likelihoods in nats.
    mean, cov : Tensor, (series, time, state), (series, time, state, state)
        Row t belongs to z_t. NaN beyond the end of a series; entries of `cov` that a diffuse
        element leaves undetermined are infinite.

    Raises
    ------
    ValueError
        If `lag` is no whole number of at least 1, if shapes or types do not fit together, or
        tensors are not on the CPU.

    Examples
    --------
    A random walk seen exactly every second step, with one step to look ahead:

    >>> import torch
    >>> from seqdgm.kernels import System
    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> walk = System(one, one, one, 0 * one, zero, zero, zero[0], zero, one[0])
    >>> x = torch.tensor([[[5.0], [torch.nan], [7.0]]], dtype=torch.float64)
    >>> _, mean, cov = fixed_lag(walk, x, ~x.isnan(), torch.tensor([3]), lag=1)
    >>> mean[0, :, 0].tolist(), cov[0, :, 0, 0].tolist()
    ([5.0, 6.0, 7.0], [0.0, 0.5, 0.0])
    """
    check_count("lag", lag)
    filtered, mean, cov = fixed_lag_pass(system, x, mask, lengths, int(lag))
    return filtered.loglik, mean, cov


def _moments(
    cov: Float[Tensor, "sys steps dim dim"],
    adjoint: Float[Tensor, "series time dim"],
    curvature: Float[Tensor, "series time dim dim"],
) -> tuple[
    Float[Tensor, "series time dim"],
    Float[Tensor, "series time dim dim"],
    Float[Tensor, "series time dim"],
]:
    """Mean and covariance of a disturbance given the data, and the standardised mean."""
    mean = (cov @ adjoint[..., None])[..., 0]
    explained = cov @ curvature @ cov
    variance = torch.diagonal(explained, dim1=-2, dim2=-1)
    # What rounding leaves of a variance that is zero would make any residual of it.
    size = torch.diagonal(cov, dim1=-2, dim2=-1)
    standard = mean / variance.clamp_min(0.0).sqrt()
    residual = torch.where(variance > ROUNDING * size, standard, torch.nan)
    rest = cov - 0.5 * (explained + explained.mT)
    below = torch.diagonal(rest, dim1=-2, dim2=-1) < 0
    return mean, torch.where(below[..., :, None] | below[..., None, :], 0.0, rest), residual
