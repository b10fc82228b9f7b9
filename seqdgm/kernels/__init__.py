r"""The hot loops of exact Gaussian inference: tensors in, tensors out.

One table of functions, `kalman_filter` and `kalman_smoother`, with five implementations: torch for
every device and for autograd (`seqdgm.kernels.reference`), compiled loops for the CPU, one series
after another (`seqdgm.kernels.cpu`) or a block of them in the lanes of vectors
(`seqdgm.kernels.cpu_lanes`), Triton for GPUs (`seqdgm.kernels.cuda`), and a scan that is parallel
in time (`seqdgm.kernels.associative`). See `seqdgm.kernels.types` for the system they work on.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.types import Filtered, Smoothed, Store, System

__all__ = ["Filtered", "Smoothed", "System", "get_kernels", "kalman_filter", "kalman_smoother"]

Implementation = Literal["cpu", "lanes", "reference", "associative", "cuda"]

COMPILED = ("cpu", "lanes")
LANES_PAY = 16  # series from which a block of them is faster than one after another
LANES_WORTH = 10_000  # series-steps below which the loops for a size of the state are not loaded
LARGEST_CUDA_STATE = 16
_MODULES = {
    "cpu": "seqdgm.kernels.cpu",
    "lanes": "seqdgm.kernels.cpu_lanes",
    "reference": "seqdgm.kernels.reference",
    "associative": "seqdgm.kernels.associative",
    "cuda": "seqdgm.kernels.cuda",
}


def kalman_filter(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    store: Store,
    implementation: Implementation | None = None,
) -> Filtered:
    r"""Filter a panel: p(z_t | x_1..t) and the exact log-likelihood of every series.

    The elements of x_t are taken one at a time, after their errors have been decorrelated. With
    :math:`h` a row of H, :math:`\sigma^2` its error variance and :math:`v = y - h^\top a`,

    .. math::

        M = P h, \quad F = h^\top M + \sigma^2, \quad K = M / F, \quad a \leftarrow a + K v, \quad
        P \leftarrow (I - K h^\top) P (I - K h^\top)^\top + \sigma^2 K K^\top .

    While :math:`F_\infty = h^\top P_\infty h > 0` the gain is :math:`K = P_\infty h / F_\infty`,
    and :math:`P_\infty \leftarrow P_\infty - F_\infty K K^\top` loses a rank; it is kept as a
    factor, and is exactly zero once the last diffuse element is determined. Joseph's form keeps
    variances from going negative; one below the rounding error of its terms is set to zero.

    Parameters
    ----------
    system : System
        The matrices, float64.
    x : Tensor, (series, time, obs)
        Observations, float64; never read where `mask` is False.
    mask : Tensor of bool, (series, time, obs)
        What is observed.
    lengths : Tensor of int64, (series,)
        Number of steps of each series; later ones are not processed.
    store : {"likelihood", "last", "all"}
        Return the log-likelihood only (memory does not grow with time), the state after the last
        step of each series as well, or all steps.
    implementation : {"cpu", "lanes", "reference", "associative", "cuda"}, optional
        By default torch where a gradient is needed; else compiled loops on the CPU ("lanes" for
        large panels of small states), Triton on a GPU for up to 16 state elements, and torch for
        the rest. The scan is never chosen unasked: it wants few, very long series on a GPU, and
        refuses an observation of variance zero.

    Returns
    -------
    Filtered
        Log-likelihoods in nats, and moments as `store` says.

    Raises
    ------
    ValueError
        If shapes or types do not fit together.

    References
    ----------
    Durbin and Koopman (2012), *Time Series Analysis by State Space Methods*, 2nd ed., sections 5.2,
    6.4 and 7.2.

    Examples
    --------
    The second observation of a random walk with a diffuse start has variance Q:

    >>> import torch
    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> walk = System(one, one, one, 0 * one, zero, zero, zero[0], zero, one[0])
    >>> x = torch.tensor([[[5.0], [7.0]]], dtype=torch.float64)
    >>> out = kalman_filter(walk, x, ~x.isnan(), torch.tensor([2]), store="likelihood")
    >>> normal = torch.distributions.Normal(0.0, 1.0)
    >>> bool(torch.isclose(out.loglik[0], normal.log_prob(torch.tensor(2.0).double())))
    True
    """
    kernels = _kernels_for(system, x, implementation)
    result: Filtered = kernels.kalman_filter(system, x, mask, lengths, store=store)
    return result


def kalman_smoother(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    lag_one: bool,
    implementation: Implementation | None = None,
) -> Smoothed:
    r"""Smooth a panel: p(z_t | x_1..T), and Cov(z_{t+1}, z_t | x_1..T) with `lag_one`.

    A backward pass over :math:`(r, N)` relative to the filtered state gives

    .. math::

        \hat z_t = a_t + P_t r, \quad V_t = P_t - P_t N P_t, \quad
        C_{t+1,t} = F_{t+1} V_t - Q_{t+1} N^+ F_{t+1} P_t

    with :math:`N^+` relative to the predicted state at t+1; nothing is inverted, so singular
    covariances are allowed. Diffuse steps use the expansions of r and N in 1/kappa.

    Parameters
    ----------
    system, x, mask, lengths, implementation
        As in `kalman_filter`.
    lag_one : bool
        Whether to return the lag-one covariances.

    Returns
    -------
    Smoothed
        Log-likelihoods in nats and moments.

    Raises
    ------
    ValueError
        If shapes or types do not fit together.

    References
    ----------
    Durbin and Koopman (2012), sections 4.4, 4.7, 5.3 and 6.4.

    Examples
    --------
    The gap in a random walk is filled by a straight line:

    >>> import torch
    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> walk = System(one, one, one, 0 * one, zero, zero, zero[0], zero, one[0])
    >>> x = torch.tensor([[[5.0], [float("nan")], [7.0]]], dtype=torch.float64)
    >>> out = kalman_smoother(walk, x, ~x.isnan(), torch.tensor([3]), lag_one=False)
    >>> [round(float(mean), 6) for mean in out.mean[0, :, 0]]
    [5.0, 6.0, 7.0]
    """
    kernels = _kernels_for(system, x, implementation)
    result: Smoothed = kernels.kalman_smoother(system, x, mask, lengths, lag_one=lag_one)
    return result


def get_kernels(
    device: torch.device | str, implementation: Implementation | None = None
) -> ModuleType:
    """Module with the implementation for a device, or the one asked for.

    Raises
    ------
    ValueError
        If the implementation cannot read tensors of the device, triton is not installed, or the
        name is unknown.
    """
    kind = torch.device(device).type
    if implementation is None:
        implementation = "cpu" if kind == "cpu" else "reference"
    if implementation not in _MODULES:
        raise ValueError(f"implementation is {implementation!r}; use one of {sorted(_MODULES)}")
    if implementation in COMPILED and kind != "cpu":
        raise ValueError(
            f"the {implementation!r} kernels cannot read tensors on {kind}; use 'reference'"
        )
    if implementation == "cuda" and find_spec("triton") is None:
        raise ValueError("the 'cuda' kernels need triton: pip install triton, or use 'reference'")
    return _module(implementation)


@cache  # an import statement takes longer than a short series
def _module(implementation: Implementation) -> ModuleType:
    return import_module(_MODULES[implementation])


def _kernels_for(system: System, x: Tensor, implementation: Implementation | None) -> ModuleType:
    """The implementation for these tensors: compiled loops cannot be differentiated."""
    wanted = torch.is_grad_enabled() and any([field.requires_grad for field in (x, *system)])
    if implementation is None:
        return _module("reference" if wanted else _fastest(system, x))
    if wanted and (implementation in COMPILED or implementation == "cuda"):
        raise ValueError(
            f"the {implementation!r} kernels have no gradient; use 'reference', or torch.no_grad()"
        )
    return get_kernels(x.device, implementation)


def _fastest(system: System, x: Tensor) -> Implementation:
    """The fastest implementation that takes a system, where no gradient is wanted."""
    if not x.is_cpu:
        fits = system.m0.shape[-1] <= LARGEST_CUDA_STATE and find_spec("triton") is not None
        return "cuda" if x.is_cuda and fits else "reference"
    n, steps, _ = x.shape
    if n >= LANES_PAY and n * steps >= LANES_WORTH:
        from seqdgm.kernels import cpu_lanes

        if cpu_lanes.supports(system, x):
            return "lanes"
    return "cpu"
