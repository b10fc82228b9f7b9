r"""Value and gradient of the exact log-likelihood in one filter pass and one backward pass.

By Fisher's identity, :math:`\nabla \log p(x) = E[\nabla \log p(x, z) \mid x]`, the score of a
linear-Gaussian model needs smoothed moments only, and no derivative of the filter. Written in terms
of the smoothing errors it needs no inverse of Q or R either, which may be singular: with
:math:`(r_t, N_t)` relative to the predicted state, :math:`(e_t, D_t)` the smoothing error of the
observation and its variance, and :math:`\hat z` the smoothed mean,

.. math::

    \frac{\partial \log p}{\partial Q_t} &= \tfrac12 (r_t r_t^\top - N_t), \qquad
    \frac{\partial \log p}{\partial R_t} = \tfrac12 (e_t e_t^\top - D_t), \\
    \frac{\partial \log p}{\partial F_t} &= r_t \hat z_{t-1}^\top - N_t F_t P_{t-1|t-1}, \\
    \frac{\partial \log p}{\partial H_t} &= e_t \hat z_t^\top
        - (D_t H_t - K_t^\top N_t^+) P_{t|t-1}, \\
    \frac{\partial \log p}{\partial b_t} &= r_t, \qquad
    \frac{\partial \log p}{\partial d_t} = e_t, \qquad
    \frac{\partial \log p}{\partial m_0} = r_1, \qquad
    \frac{\partial \log p}{\partial P_0} = \tfrac12 (r_1 r_1^\top - N_1),

where :math:`N_t^+` comes after the observation. A diffuse start adds the products of the terms in
:math:`1 / \kappa` with the diffuse covariances, and

.. math::

    \frac{\partial \log p}{\partial P_\infty} = \tfrac12 \big(r^{(0)} r^{(1)\top}
        + r^{(1)} r^{(0)\top} - N^{(1)}\big),

which holds for a change of the directions, :math:`dP_\infty = dA A^\top + A\, dA^\top`.

References
----------
Koopman and Shephard (1992), Exact score for time series models in state space form, *Biometrika*
79(4); Koopman (1993), Disturbance smoother for state space models, *Biometrika* 80(1); Durbin and
Koopman (2012), *Time Series Analysis by State Space Methods*, 2nd ed., sections 4.5, 5.4 and 7.3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.cpu_backward import backward_pass
from seqdgm.kernels.types import System

# Central differences of smooth functions lose least at the cube root of the rounding error.
_STEP = 6e-6


def score(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
) -> tuple[Float[Tensor, "series"], System]:
    r"""Log-likelihood of every series, and its derivatives with respect to the system.

    Parameters
    ----------
    system : System
        The matrices, float64, on the CPU; Q, R and P0 may be singular, or zero.
    x, mask, lengths : Tensor
        Observations, what of them is observed, and the lengths of the series, as in
        `seqdgm.kernels.kalman_filter`.

    Returns
    -------
    loglik : Tensor, (series,)
        Log-likelihoods in nats.
    gradient : System
        A tensor for each field, of its shape. A field with its own row for each series (or step)
        gets the derivative for each; one that is shared gets the sum over the series (or steps)
        that share it, so it is the gradient of ``loglik.sum()``. Gradients of covariances are
        symmetric: :math:`d \log p = \operatorname{tr}(G\, dQ)`. A redundant observation, of
        variance zero, adds nothing.

    Raises
    ------
    ValueError
        If shapes or types do not fit together, or tensors are not on the CPU.

    Examples
    --------
    One observation of a proper scalar state, x = 3 with variance P0 + R = 4:

    >>> import torch
    >>> from seqdgm.kernels import System
    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> system = System(one, one, one, one, zero, zero, zero[0], 3 * one[0], 0 * one[0])
    >>> x = torch.tensor([[[3.0]]], dtype=torch.float64)
    >>> loglik, gradient = score(system, x, ~x.isnan(), torch.tensor([1]))
    >>> gradient.m0.item() == 3 / 4, gradient.R.item() == (3**2 / 4**2 - 1 / 4) / 2
    (True, True)
    """
    out = backward_pass(system, x, mask, lengths, histories=False)
    return out.filtered.loglik, out.gradient


def value_and_score(
    build: Callable[[Float[Tensor, "sys free"]], System],
    theta: Float[Tensor, "sys free"],
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    derivative: Literal["autograd", "difference"] = "autograd",
) -> tuple[Float[Tensor, "series"], Float[Tensor, "sys free"]]:
    r"""Log-likelihood of every series, and its gradient with respect to parameters.

    The derivatives of the system come from `score`; only the function that builds the system is
    differentiated here, never a recursion over time.

    Parameters
    ----------
    build : callable
        From parameters to a `System`.
    theta : Tensor, (sys, free)
        Parameters: one row that all series share, or one for each series, on which then nothing but
        the system of that series depends.
    x, mask, lengths : Tensor
        As in `score`.
    derivative : {"autograd", "difference"}
        How to differentiate `build`: by torch, or by central differences of the matrices it returns
        (two calls a parameter and no further filter pass), for one that is not written in torch.

    Returns
    -------
    loglik : Tensor, (series,)
        Log-likelihoods in nats.
    gradient : Tensor, (sys, free)
        Gradient of ``loglik.sum()``; with a row for each series, row n is that of ``loglik[n]``.

    Raises
    ------
    ValueError
        If torch cannot follow `build`, or as in `score`.

    Examples
    --------
    The variance of white noise, as its logarithm:

    >>> import torch
    >>> from seqdgm.kernels import System
    >>> zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    >>> def build(theta):
    ...     variance = theta.exp()[:, :, None, None]
    ...     fields = (zero, zero, zero, variance, zero[0], zero[0], zero[0, 0], zero[0], zero[0])
    ...     return System(*fields)
    >>> x = torch.tensor([[[2.0], [0.0]]], dtype=torch.float64)
    >>> theta = torch.zeros(1, 1, dtype=torch.float64)
    >>> value_and_score(build, theta, x, ~x.isnan(), torch.tensor([2]))[1].item()
    1.0
    """
    if derivative == "difference":
        with torch.no_grad():
            loglik, gradient = score(build(theta), x, mask, lengths)
            return loglik, _by_differences(build, theta, gradient)
    if derivative != "autograd":
        raise ValueError(f"derivative={derivative!r} is unknown; use 'autograd' or 'difference'")
    leaf = theta.detach().requires_grad_()
    with torch.enable_grad():
        system = build(leaf)
    loglik, gradient = score(system, x, mask, lengths)
    used = [(f, g) for f, g in zip(system, gradient, strict=True) if f.requires_grad]
    if not used:
        raise ValueError(
            "no field of build(theta) has a gradient; write build in torch operations, or pass "
            "derivative='difference'"
        )
    fields, weights = zip(*used, strict=True)
    return loglik, torch.autograd.grad(fields, leaf, weights)[0]


def _by_differences(
    build: Callable[[Tensor], System], theta: Float[Tensor, "sys free"], gradient: System
) -> Float[Tensor, "sys free"]:
    """Chain rule through central differences of the system."""
    columns = []
    for k in range(theta.shape[1]):
        step = torch.zeros_like(theta)
        step[:, k] = _STEP * theta[:, k].abs().clamp_min(1.0)
        ahead, behind = theta + step, theta - step
        change = sum(
            _total(weight * (high - low), len(theta))
            for weight, high, low in zip(gradient, build(ahead), build(behind), strict=True)
        )
        columns.append(change / (ahead - behind)[:, k])
    return torch.stack(columns, 1)


def _total(terms: Tensor, rows: int) -> Float[Tensor, "rows"]:
    """Sum over everything, or over everything but the first axis if each row has its own."""
    return terms.flatten(1).sum(1) if len(terms) == rows else terms.sum().expand(rows)
