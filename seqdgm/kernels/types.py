r"""What the Gaussian kernels take and return, and the tolerances they share.

Every implementation works on the linear-Gaussian system

.. math::

    z_1 &\sim N(m_0, P_0 + \kappa P_\infty), \quad \kappa \to \infty \\
    z_t &= F_t z_{t-1} + b_t + w_t, \quad w_t \sim N(0, Q_t), \quad t \ge 2 \\
    x_t &= H_t z_t + d_t + v_t, \quad v_t \sim N(0, R_t)

and takes the elements of :math:`x_t` one at a time, after an :math:`L D L^\top` factorisation (unit
diagonal) of the observed block of :math:`R_t` has made their errors uncorrelated. A missing element
is left out, so nothing is ever inverted and a partly missing vector costs nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Store = Literal["likelihood", "last", "all"]

# A variance that is a difference of large terms is known no better than a few rounding errors of
# those terms. What falls below is zero: the observation is redundant, or the state known exactly.
ROUNDING = 1e-13
# The diffuse part is kept as a factor A, Pinf = A A', so these concern amplitudes (norms of its
# rows), not variances. A combination that cancels to this fraction of its terms counts as not
# diffuse: to take it at its word would put 1 / F_inf into the covariance and lose all digits. The
# first hours of a weekly cycle of a few harmonics are such a case; with this value they cost some
# 1e-3 nats once, with a much smaller or larger one much more.
DIFFUSE = 3e-5
# Each term counts as at least this fraction of the largest row, so that rounding errors in the
# system itself, a sine of pi of 1e-16, identify nothing. Rows may differ by 13 digits in scale.
DIFFUSE_SCALE = 1e-9
# A redundant observation must repeat what is known already, up to this relative error.
CONFLICT = 1e-8


class System(NamedTuple):
    """Matrices of a linear-Gaussian system (float64), shared or per series, fixed or varying.

    Each ``sys`` axis has length 1 (shared by all series) or N; each ``time`` axis has length 1
    (time-invariant) or T, separately for every field. Index t of `F`, `Q` and `b` belongs to the
    transition into step t, so entry 0 of a varying one is never read. There is no transition before
    the first observation: `m0`, `P0` and `Pinf` describe the state at that step.

    Examples
    --------
    A local level with a diffuse start:

    >>> import torch
    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> level = System(
    ...     F=one, Q=0.1 * one, H=one, R=one, b=zero, d=zero,
    ...     m0=zero[0], P0=zero, Pinf=one[0],
    ... )
    """

    F: Float[Tensor, "sys time state state"]
    Q: Float[Tensor, "sys time state state"]
    H: Float[Tensor, "sys time obs state"]
    R: Float[Tensor, "sys time obs obs"]
    b: Float[Tensor, "sys time state"]
    d: Float[Tensor, "sys time obs"]
    m0: Float[Tensor, "sys state"]
    P0: Float[Tensor, "sys state state"]
    Pinf: Float[Tensor, "sys state state"]


class Filtered(NamedTuple):
    r"""Result of the Kalman filter.

    The log-likelihood (nats, total of a series) is

    .. math:: -\tfrac12 \Big( n_\text{obs} \log 2\pi + \text{logdet} + \text{quad} \Big),

    where a diffuse observation adds :math:`\log F_\infty` to `logdet` and nothing else. It is the
    limit of :math:`\log p(x; \kappa) + \tfrac{n_\text{diffuse}}{2} \log 2 \pi \kappa`, hence the
    density of the differenced series for a differenced model (Durbin and Koopman 2012, section 7.2,
    keep the :math:`2 \pi` of the diffuse elements; so does statsmodels).

    Attributes
    ----------
    loglik : (series,)
        Log-likelihood. Minus infinity where an observation of variance zero is contradicted.
    n_obs : int64 (series,)
        Observations that are not diffuse and not redundant.
    logdet : (series,)
        Sum of log F over those, plus the sum of log F_inf over the diffuse ones.
    quad : (series,)
        Sum of v^2 / F over those.
    n_diffuse : int64 (series,)
        Observations that determined a diffuse element.
    rank_left : int64 (series,)
        Diffuse elements that are undetermined at the end; 0 means a proper state.
    mean, cov : (series, steps, state), (series, steps, state, state), or None
        Moments of z_t given x_1..t. Every step for ``store="all"``, the last step of each series
        (steps = 1) for ``"last"``. NaN beyond the end of a series.
    cov_inf : (series, steps, state, state), or None
        Factor of kappa in the covariance; exactly zero once the state is proper. None where the
        system has no diffuse element.
    pred_mean, pred_cov : as mean and cov, or None
        Moments of z_t given x_1..t-1, without the kappa part (``store="all"`` only).
    innovations : (series, time, obs), or None
        v = x_{t,i} - E[x_{t,i} | x_1..t-1, x_{t,1..i-1}]: in sequence over the elements as well,
        so ``innovations / sqrt(innov_var)`` are independent N(0, 1) under the model. NaN where
        missing.
    innov_var : (series, time, obs), or None
        Their variance F; infinite where the observation is diffuse, 0 where it is redundant.
    """

    loglik: Float[Tensor, "series"]
    n_obs: Int[Tensor, "series"]
    logdet: Float[Tensor, "series"]
    quad: Float[Tensor, "series"]
    n_diffuse: Int[Tensor, "series"]
    rank_left: Int[Tensor, "series"]
    mean: Float[Tensor, "series steps state"] | None = None
    cov: Float[Tensor, "series steps state state"] | None = None
    cov_inf: Float[Tensor, "series steps state state"] | None = None
    pred_mean: Float[Tensor, "series time state"] | None = None
    pred_cov: Float[Tensor, "series time state state"] | None = None
    innovations: Float[Tensor, "series time obs"] | None = None
    innov_var: Float[Tensor, "series time obs"] | None = None


class Smoothed(NamedTuple):
    """Result of the fixed-interval smoother; NaN beyond the end of a series.

    Attributes
    ----------
    loglik : (series,)
        As the filter gives it.
    mean, cov : (series, time, state), (series, time, state, state)
        Moments of z_t given all observations of the series.
    lag_one : (series, time - 1, state, state), or None
        Cov(z_{t+1}, z_t | x_1..T), rows belong to z_{t+1}.
    rank_left : int64 (series,)
        Diffuse elements that no observation determines. Where this is not 0 the moments above leave
        out their infinite variance.
    """

    loglik: Float[Tensor, "series"]
    mean: Float[Tensor, "series time state"]
    cov: Float[Tensor, "series time state state"]
    lag_one: Float[Tensor, "series lags state state"] | None
    rank_left: Int[Tensor, "series"]


_TAILS: dict[str, tuple[str, ...]] = {
    "F": ("state", "state"),
    "Q": ("state", "state"),
    "H": ("obs", "state"),
    "R": ("obs", "obs"),
    "b": ("state",),
    "d": ("obs",),
    "m0": ("state",),
    "P0": ("state", "state"),
    "Pinf": ("state", "state"),
}
_INITIAL = ("m0", "P0", "Pinf")


@lru_cache(maxsize=256)  # a filter of a short series takes no longer than these comparisons
def _check_shapes(n: int, steps: int, obs: int, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Refuse fields whose axes have the wrong length."""
    if n == 0:
        raise ValueError("x holds no series")
    state = shapes[System._fields.index("m0")][-1]
    width = {"state": state, "obs": obs}
    for (name, tail), shape in zip(_TAILS.items(), shapes, strict=True):
        full = (n,) if name in _INITIAL else (n, steps)
        ending = tuple(width[axis] for axis in tail)
        shared = all(k in (1, size) for k, size in zip(shape, full, strict=False))
        if shape[len(full) :] != ending or not shared:
            raise ValueError(
                f"{name} has shape {tuple(shape)}; {n} series of {steps} steps, {obs} observed and "
                f"{state} state elements need {(*full, *ending)}, where the first {len(full)} may "
                "be 1"
            )


_FLOAT64 = {torch.float64}


def check_arguments(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
) -> None:
    """Refuse shapes and types that do not fit together, before a compiled loop reads them.

    Raises
    ------
    ValueError
        If an axis has the wrong length, a field is not float64, or a length lies outside 0..T.
    """
    n, steps, obs = x.shape
    _check_shapes(n, steps, obs, tuple([field.shape for field in system]))
    if {field.dtype for field in system} != _FLOAT64:
        for name, field in zip(System._fields, system, strict=True):
            if field.dtype != torch.float64:
                raise ValueError(f"{name} is {field.dtype}; convert it with .double()")
    if x.dtype != torch.float64:
        raise ValueError(f"x is {x.dtype}; convert it with .double()")
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be torch.bool of shape "
            f"{tuple(x.shape)}, True where x is observed"
        )
    if lengths.shape != (n,) or lengths.dtype != torch.int64:
        raise ValueError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; it must be torch.int64 "
            f"of shape ({n},)"
        )
    ends = lengths.tolist() if n == 1 else [int(end) for end in lengths.aminmax()]
    if ends[0] < 0 or ends[-1] > steps:
        raise ValueError(f"lengths must lie between 0 and the {steps} steps of x")
