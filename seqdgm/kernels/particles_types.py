r"""What the particle kernels take and return, and the arithmetic that they share.

Weights are quantised before they are added up, :math:`q_k = \mathrm{round}(2^{52} W_k)`, integers
held in float64. Their sums are exact in every order, so a scan in parallel gives the same
cumulative sum :math:`C_k` as a loop. A draw at the level g has the ancestor

.. math:: \min \{k : C_k > \min(g, C_N - 1)\} ,

for which :math:`q_k > 0` and :math:`k \le N` whatever is rounded.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.reference import _factorise, _semidefinite_root
from seqdgm.kernels.types import System, check_arguments

Scheme = Literal["systematic", "stratified", "multinomial", "residual", "killing"]
SCHEMES: tuple[Scheme, ...] = ("systematic", "stratified", "multinomial", "residual", "killing")
UNIT = 2.0**52


class Weighed(NamedTuple):
    """Weights of a step.

    Attributes
    ----------
    log_weights : (series, particle)
        Normalised; unchanged where the total is not finite.
    total : (series,)
        Log of the sum of the weights. Minus infinity where all vanish, NaN where one is NaN.
    ess : (series,)
        Effective sample size, between 1 and the number of particles; 0 where all weights vanish,
        NaN where the total is NaN or infinite.
    """

    log_weights: Float[Tensor, "series particle"]
    total: Float[Tensor, "series"]
    ess: Float[Tensor, "series"]


class Bootstrapped(NamedTuple):
    """Result of a fused bootstrap filter.

    A series ends at the step at which its weights add up to zero or to no number; that step has the
    increment minus infinity or NaN. Increments beyond the end of a series are 0, everything else
    there is NaN.

    Attributes
    ----------
    increments : (series, time)
        Estimates of log p(x_t | x_1..t-1) in nats; exp of their sum is unbiased.
    ess : (series, time)
        Effective sample size after each step, before resampling.
    stderr : (series,)
        Standard error of the log-evidence (Lee and Whiteley 2018, equation 8); infinite where all
        particles descend from one, NaN where a series ended early. It is derived for multinomial
        resampling; systematic resampling makes families vary less than their shares of the
        evidence do, and the error comes out too small, by a quarter where every step resamples.
    mean, var : (series, time, state), or None
        Estimated mean and variance of each element of z_t given x_1..t.
    cov : (series, time, state, state), or None
        Covariance, where the filter gives it.
    """

    increments: Float[Tensor, "series time"]
    ess: Float[Tensor, "series time"]
    stderr: Float[Tensor, "series"]
    mean: Float[Tensor, "series time state"] | None
    var: Float[Tensor, "series time state"] | None
    cov: Float[Tensor, "series time state state"] | None = None


class Volatility(NamedTuple):
    r"""A stochastic volatility model, float64; each field (series,), or (1,) if it is shared.

    .. math::

        z_1 &\sim N(m_0, s_0^2), \quad
        z_t = \mu + \rho\, (z_{t-1} - \mu) + \sigma e_t, \quad e_t \sim N(0, 1) \\
        x_t &= \text{mean}_t + e^{z_t / 2} v_t, \quad v_t \sim N(0, 1) \text{ or } t_\text{df}

    with :math:`\mathrm{corr}(e_t, v_{t-1})` = leverage: a fall today goes with more volatility
    tomorrow where it is negative (Harvey and Shephard 1996; Omori, Chib, Shephard and Nakajima
    2007). The Student-t distribution is not scaled: its variance is df / (df - 2).

    Attributes
    ----------
    mu, rho, sigma : (series,)
        Mean, persistence and scale of the log-variance, :math:`\sigma \ge 0`.
    m0, s0 : (series,) or None
        Mean and standard deviation of z_1. None: mu, and :math:`\sigma / \sqrt{1 - \rho^2}`, the
        stationary ones.
    leverage : (series,) or None
        Correlation between -1 and 1; None is 0. Not with `df`.
    df : (series,) or None
        Degrees of freedom of v_t; None is a normal distribution.
    mean : (series, time), either axis may be 1, or None
        Mean of x_t; None is 0.
    """

    mu: Float[Tensor, "sys"]
    rho: Float[Tensor, "sys"]
    sigma: Float[Tensor, "sys"]
    m0: Float[Tensor, "sys"] | None = None
    s0: Float[Tensor, "sys"] | None = None
    leverage: Float[Tensor, "sys"] | None = None
    df: Float[Tensor, "sys"] | None = None
    mean: Float[Tensor, "sys time"] | None = None


class LinearProblem(NamedTuple):
    """What a fused linear-Gaussian filter reads: roots of covariances, independent errors.

    The observations are in a basis in which the errors of the seen elements are independent; there
    the log-density of a step is the sum over them of
    -((y - h z)^2 / var + log(2 pi var)) / 2. Each ``sys`` axis is 1 or the number of series, each
    ``time`` axis 1 or the number of steps.
    """

    F: Float[Tensor, "sys time state state"]
    root: Float[Tensor, "sys time state state"]  # lower, root root' = Q
    b: Float[Tensor, "sys time state"]
    m0: Float[Tensor, "sys state"]
    root0: Float[Tensor, "sys state state"]
    h: Float[Tensor, "sys time obs state"]
    var: Float[Tensor, "sys time obs"]
    y: Float[Tensor, "series time obs"]  # 0 where not seen
    mask: Bool[Tensor, "series time obs"]
    lengths: Int[Tensor, "series"]


class VolatilityProblem(NamedTuple):
    """What a fused volatility filter reads: every parameter filled in, y = x - mean."""

    mu: Float[Tensor, "sys"]
    rho: Float[Tensor, "sys"]
    sigma: Float[Tensor, "sys"]
    m0: Float[Tensor, "sys"]
    s0: Float[Tensor, "sys"]
    leverage: Float[Tensor, "sys"]
    df: Float[Tensor, "sys"] | None
    y: Float[Tensor, "sys time"]  # 0 where not seen
    mask: Bool[Tensor, "sys time"]
    lengths: Int[Tensor, "series"]


def linear_problem(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
) -> LinearProblem:
    """Factorise covariances, and make the errors of observations independent.

    Raises
    ------
    ValueError
        If shapes or types do not fit together, the start is diffuse, or R is not positive definite.
    """
    check_arguments(system, x, mask, lengths)
    if bool(system.Pinf.any()):
        raise ValueError(
            "the start is diffuse (Pinf is not 0), so there is no distribution to draw the first "
            "state from; give m0 and P0, or use the Kalman filter"
        )
    bad = torch.nonzero(torch.linalg.cholesky_ex(system.R).info)
    if len(bad):
        k, t = bad[0].tolist()
        raise ValueError(
            f"R of system {k}, step {t} is not positive definite: without an error no particle "
            "would ever meet an observation; use the Kalman filter, or add an error variance"
        )
    y = torch.where(mask, x - system.d, 0.0)
    h, var, y = _independent(system, y, mask)
    return LinearProblem(
        system.F,
        _semidefinite_root(system.Q.flatten(0, 1)).view_as(system.Q),
        system.b,
        system.m0,
        _semidefinite_root(system.P0),
        h,
        var,
        y,
        mask,
        lengths,
    )


def _independent(
    system: System, y: Float[Tensor, "series time obs"], mask: Bool[Tensor, "series time obs"]
) -> tuple[
    Float[Tensor, "sys time obs state"],
    Float[Tensor, "sys time obs"],
    Float[Tensor, "series time obs"],
]:
    """L^-1 H, the variances in R = L diag(var) L' and L^-1 y, for what is seen."""
    H, R = system.H, system.R
    var = torch.diagonal(R, dim1=2, dim2=3)
    if not bool((R - torch.diag_embed(var)).any()):
        return H, var, y
    if bool((mask.any(2) != mask.all(2)).any()):
        # Which elements are seen differs between steps, and so does the factor.
        R = torch.where(mask[..., :, None] & mask[..., None, :], R, 0.0)
        H = torch.where(mask[..., None], H, 0.0)
    L, var = _factorise(R.flatten(0, 1))
    L = L.view_as(R)
    h = torch.linalg.solve_triangular(L, H, upper=False, unitriangular=True)
    y = torch.linalg.solve_triangular(L, y[..., None], upper=False, unitriangular=True)[..., 0]
    return h, var.view(R.shape[:3]), y


def volatility_problem(
    model: Volatility,
    x: Float[Tensor, "sys time"],
    mask: Bool[Tensor, "sys time"],
    lengths: Int[Tensor, "series"],
) -> VolatilityProblem:
    """Fill in what is left out, after a check of shapes and ranges.

    Raises
    ------
    ValueError
        If shapes or types do not fit together, or a parameter is out of range.
    """
    n, steps = len(lengths), x.shape[-1]
    _check_data(x, mask, lengths)
    for name, field in zip(Volatility._fields, model, strict=True):
        if field is None:
            continue
        full = (n, steps) if name == "mean" else (n,)
        fits = len(field.shape) == len(full) and all(
            k in (1, size) for k, size in zip(field.shape, full, strict=True)
        )
        if not fits or field.dtype != torch.float64:
            raise ValueError(
                f"{name} is {field.dtype} of shape {tuple(field.shape)}; {n} series need "
                f"torch.float64 of shape {full}, where an axis may be 1"
            )
    mu, rho, sigma, m0, s0, leverage, df, mean = model
    _within("sigma", sigma, sigma >= 0, "be at least 0")
    if s0 is None:
        _within("rho", rho, rho.abs() < 1, "lie between -1 and 1, or m0 and s0 be given")
        s0 = sigma / (1.0 - rho * rho).sqrt()
    _within("s0", s0, s0 >= 0, "be at least 0")
    if leverage is None:
        leverage = torch.zeros_like(mu)
    elif df is not None:
        raise ValueError("leverage needs a normal distribution: leave df or leverage out")
    _within("leverage", leverage, leverage.abs() <= 1, "lie between -1 and 1")
    if df is not None:
        _within("df", df, df > 0, "be positive")
    y = torch.where(mask, x if mean is None else x - mean, 0.0)
    return VolatilityProblem(
        mu, rho, sigma, mu if m0 is None else m0, s0, leverage, df, y, mask, lengths
    )


def _check_data(x: Tensor, mask: Tensor, lengths: Tensor) -> None:
    if lengths.ndim != 1 or lengths.dtype != torch.int64 or len(lengths) == 0:
        raise ValueError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; it must be torch.int64, "
            "one number for each of at least one series"
        )
    n = len(lengths)
    if x.ndim != 2 or len(x) not in (1, n) or x.dtype != torch.float64:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; {n} series need torch.float64 of shape "
            f"({n}, time), or (1, time) if they share it"
        )
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be torch.bool of shape "
            f"{tuple(x.shape)}, True where x is observed"
        )
    low, high = (int(end) for end in lengths.aminmax())
    if low < 0 or high > x.shape[1]:
        raise ValueError(f"lengths must lie between 0 and the {x.shape[1]} steps of x")


def _within(name: str, field: Tensor, good: Tensor, rule: str) -> None:
    bad = torch.nonzero(~good)
    if len(bad):
        k = int(bad[0, 0])
        raise ValueError(f"{name} of series {k} is {float(field[k]):g}; it must {rule}")
