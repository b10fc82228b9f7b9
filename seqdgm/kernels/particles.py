r"""The hot loops of particle methods: tensors in, tensors out.

One table of functions with three implementations: torch for every device and for autograd
(`seqdgm.kernels.particles_reference`), compiled loops for the CPU (`seqdgm.kernels.particles_cpu`)
and Triton for GPUs (`seqdgm.kernels.particles_cuda`). Randomness comes in as arrays of uniform
numbers, or is a function of a seed and of what it is for (`seqdgm.kernels.philox`), so all give the
same answer. See `seqdgm.kernels.particles_types` for the arithmetic that they share.
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

from seqdgm.kernels.particles_types import (
    SCHEMES,
    Bootstrapped,
    Scheme,
    Volatility,
    Weighed,
    linear_problem,
    volatility_problem,
)
from seqdgm.kernels.philox import split
from seqdgm.kernels.types import System

__all__ = [
    "Bootstrapped",
    "Volatility",
    "Weighed",
    "bootstrap_linear_gaussian",
    "bootstrap_volatility",
    "gather",
    "pick",
    "resample",
    "weigh",
]

Implementation = Literal["cpu", "reference", "cuda"]
_MODULES = {
    "cpu": "seqdgm.kernels.particles_cpu",
    "reference": "seqdgm.kernels.particles_reference",
    "cuda": "seqdgm.kernels.particles_cuda",
}
# Indices of particles are kept as 32 bits.
MAX_PARTICLES = 2**31 - 1


def weigh(
    log_weights: Float[Tensor, "series particle"], *, implementation: Implementation | None = None
) -> Weighed:
    r"""Normalise the weights of a step; their sum and effective sample size come with it.

    .. math::

        \ell = \log \sum_k e^{a_k}, \quad \log W_k = a_k - \ell, \quad
        \mathrm{ESS} = \Big( \sum_k W_k^2 \Big)^{-1} .

    Parameters
    ----------
    log_weights : Tensor, (series, particle)
        Log-weights a, float64, not normalised; minus infinity is a weight of zero.
    implementation : {"cpu", "reference", "cuda"}, optional
        By default torch where a gradient is needed; else compiled loops on the CPU and Triton on a
        GPU.

    Returns
    -------
    Weighed

    Raises
    ------
    ValueError
        If the shape or type does not fit.

    Examples
    --------
    >>> import torch
    >>> log_weights, total, ess = weigh(torch.tensor([[0.0, 0.0, -torch.inf]]).double())
    >>> log_weights.exp().tolist(), round(float(total.exp()), 6), round(float(ess), 6)
    ([[0.5, 0.5, 0.0]], 2.0, 2.0)
    """
    _check_weights(log_weights, 2)
    result: Weighed = _kernels_for(log_weights, implementation).weigh(log_weights)
    return result


def resample(
    scheme: Scheme,
    log_weights: Float[Tensor, "series particle"],
    uniforms: Float[Tensor, "series number"],
    needed: Bool[Tensor, "series"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Int[Tensor, "series particle"]:
    r"""Draw ancestors: E[number of k among them] = N W_k in every scheme.

    With the cumulative sums :math:`C_k` of `seqdgm.kernels.particles_types`, :math:`T = C_N` and
    uniform numbers u, particle j = 0 .. N - 1 takes the ancestor at the level

    ============  ==================================  =========================================
    scheme        shape of `uniforms`                 level
    ============  ==================================  =========================================
    systematic    (series, 1)                         :math:`(j + u_0)\, T / N`
    stratified    (series, N)                         :math:`(j + u_j)\, T / N`
    multinomial   (series, N)                         :math:`u_j T`
    residual      (series, N)                         copies first, then draws; see below
    killing       (series, 2 N)                       its own if it survives, or
                                                      :math:`u_{N + j} T`
    ============  ==================================  =========================================

    Residual: :math:`n_k = \lfloor q_k (N / T) \rfloor` copies of each k in order; a later j draws
    by :math:`u_j` from the remainders :math:`q_k (N / T) - n_k`, quantised in their turn to
    multiples of :math:`2^{-52} N`. Killing: j survives if :math:`u_j \max q < q_j`. Systematic and
    stratified ancestors never decrease.

    Parameters
    ----------
    scheme : {"systematic", "stratified", "multinomial", "residual", "killing"}
    log_weights : Tensor, (series, particle)
        Normalised, float64.
    uniforms : Tensor
        Float64 in [0, 1), of the shape in the table.
    needed : Tensor of bool, (series,), optional
        Series to resample; the others keep every particle. All by default.
    implementation : {"cpu", "reference", "cuda"}, optional
        As in `weigh`; ancestors have no gradient.

    Returns
    -------
    Tensor of int64, (series, particle)
        Ancestors; none has weight zero.

    Raises
    ------
    ValueError
        If the scheme is unknown, shapes or types do not fit together, or a series that needs
        resampling has no particle of positive weight or one that is NaN.

    References
    ----------
    Kitagawa (1996), systematic and stratified; Gordon, Salmond and Smith (1993), multinomial; Liu
    and Chen (1998), residual; Del Moral (2004), killing. Douc, Cappe and Moulines (2005) compare
    the first four.

    Examples
    --------
    >>> import torch
    >>> weights = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).double()
    >>> resample("systematic", weights.log(), torch.tensor([[0.5]]).double()).tolist()
    [[0, 0, 2, 3]]
    """
    _check_weights(log_weights, 2)
    n, count = log_weights.shape
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; use one of {list(SCHEMES)}")
    wanted = (n, {"systematic": 1, "killing": 2 * count}.get(scheme, count))
    if uniforms.shape != wanted or uniforms.dtype != torch.float64:
        raise ValueError(
            f"uniforms is {uniforms.dtype} of shape {tuple(uniforms.shape)}; {scheme} resampling "
            f"needs torch.float64 of shape {wanted}"
        )
    if needed is not None and (needed.shape != (n,) or needed.dtype != torch.bool):
        raise ValueError(
            f"needed is {needed.dtype} of shape {tuple(needed.shape)}; it must be torch.bool of "
            f"shape ({n},)"
        )
    _check_uniforms(uniforms)
    kernels = _kernels_for(log_weights.detach(), implementation)
    ancestors: Tensor = kernels.resample(scheme, log_weights.detach(), uniforms.detach(), needed)
    check_drawn(ancestors[:, 0], "log_weights of series")
    return ancestors


def gather(
    x: Tensor,
    ancestors: Int[Tensor, "series particle"],
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Pick particles ``x[n, ancestors[n]]`` of a tensor (series, particle, ...) of any type.

    Raises
    ------
    ValueError
        If the shapes do not fit together.

    Examples
    --------
    >>> import torch
    >>> gather(torch.tensor([[10, 20, 30]]), torch.tensor([[2, 2, 0]])).tolist()
    [[30, 30, 10]]
    """
    if ancestors.ndim != 2 or ancestors.dtype != torch.int64 or x.shape[:1] != ancestors.shape[:1]:
        raise ValueError(
            f"ancestors is {ancestors.dtype} of shape {tuple(ancestors.shape)}; it must be "
            f"torch.int64 of shape (series, particle) for {tuple(x.shape)}"
        )
    result: Tensor = _kernels_for(x, implementation).gather(x, ancestors)
    return result


def pick(
    log_weights: Float[Tensor, "*row particle"],
    uniforms: Float[Tensor, "*row"],
    *,
    implementation: Implementation | None = None,
) -> Int[Tensor, "*row"]:
    r"""One categorical draw a row: the index at the level :math:`u T` of its own weights.

    Parameters
    ----------
    log_weights : Tensor, (..., particle)
        Float64; they need not be normalised.
    uniforms : Tensor, (...)
        Float64 in [0, 1).
    implementation : {"cpu", "reference", "cuda"}, optional
        As in `weigh`.

    Returns
    -------
    Tensor of int64, (...)

    Raises
    ------
    ValueError
        If shapes or types do not fit together, or a row has no positive weight or one that is NaN.

    Examples
    --------
    >>> import torch
    >>> pick(torch.tensor([1.0, 3.0]).double().log(), torch.tensor(0.3).double()).item()
    1
    """
    _check_weights(log_weights)
    if uniforms.shape != log_weights.shape[:-1] or uniforms.dtype != torch.float64:
        raise ValueError(
            f"uniforms is {uniforms.dtype} of shape {tuple(uniforms.shape)}; it must be "
            f"torch.float64 of shape {tuple(log_weights.shape[:-1])}"
        )
    _check_uniforms(uniforms)
    kernels = _kernels_for(log_weights.detach(), implementation)
    rows = log_weights.detach().reshape(-1, log_weights.shape[-1])
    drawn: Tensor = kernels.pick(rows, uniforms.detach().reshape(-1))
    check_drawn(drawn, "log_weights of row")
    return drawn.view(uniforms.shape)


def bootstrap_linear_gaussian(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
    *,
    n_particles: int,
    seed: int,
    threshold: float = 0.5,
    moments: bool = False,
    implementation: Implementation | None = None,
) -> Bootstrapped:
    r"""Bootstrap filter of a linear-Gaussian system, fused into one loop.

    .. math::

        z_t = F_t z_{t-1} + b_t + Q_t^{1/2} e_t, \quad
        w_t = w_{t-1}\, N(x_t;\, H_t z_t + d_t,\, R_t)

    with :math:`e_t` from `seqdgm.kernels.philox`, and systematic resampling before a step where the
    effective sample size is below ``threshold * n_particles``. Elements of :math:`x_t` that are
    missing are integrated out. Nothing is kept of a particle once it has moved on, so memory is
    O(series + threads x particles) beside the result.

    Parameters
    ----------
    system : System
        The matrices, float64, with a proper start (`Pinf` = 0) and R positive definite.
    x, mask, lengths
        As in `seqdgm.kernels.kalman_filter`.
    n_particles : int
    seed : int
        Between 0 and 2^64 - 1. The result is a function of it, on every device up to rounding.
    threshold : float
        Between 0 (never resample) and 1 (whenever the weights differ).
    moments : bool
        Also return means and variances of the state.
    implementation : {"cpu", "reference", "cuda"}, optional
        As in `weigh`; there is no gradient.

    Returns
    -------
    Bootstrapped

    Raises
    ------
    ValueError
        If shapes or types do not fit together, the start is diffuse, R is not positive definite,
        or an option is out of range.

    References
    ----------
    Gordon, Salmond and Smith (1993); Lee and Whiteley (2018), *Biometrika* 105.

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> level = System(one, one, one, one, zero, zero, zero[0], one[0], 0 * one[0])
    >>> x = torch.tensor([[[0.5], [1.0]]], dtype=torch.float64)
    >>> out = bootstrap_linear_gaussian(
    ...     level, x, ~x.isnan(), torch.tensor([2]), n_particles=10_000, seed=1
    ... )
    >>> exact = torch.distributions.MultivariateNormal(
    ...     torch.zeros(2).double(), torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    ... ).log_prob(x.flatten())
    >>> bool((out.increments.sum() - exact).abs() < 5 * out.stderr)
    True
    """
    _check_options(n_particles, threshold)
    split(seed)
    problem = linear_problem(system, x, mask, lengths)
    with torch.no_grad():
        result: Bootstrapped = _kernels_for(x.detach(), implementation).bootstrap_linear_gaussian(
            problem, n_particles, seed, float(threshold), moments
        )
    return result


def bootstrap_volatility(
    model: Volatility,
    x: Float[Tensor, "sys time"],
    mask: Bool[Tensor, "sys time"],
    lengths: Int[Tensor, "series"],
    *,
    n_particles: int,
    seed: int,
    threshold: float = 0.5,
    moments: bool = False,
    implementation: Implementation | None = None,
) -> Bootstrapped:
    r"""Bootstrap filter of stochastic volatility, fused into one loop.

    The model is that of `Volatility`. Given the last observation,

    .. math::

        z_t = \mu + \rho\, (z_{t-1} - \mu) + \sigma \Big( \lambda v_{t-1} +
        \sqrt{1 - \lambda^2}\, \xi_t \Big), \quad
        v_{t-1} = e^{-z_{t-1} / 2} (x_{t-1} - \text{mean}_{t-1})

    with the leverage :math:`\lambda`; where :math:`x_{t-1}` is missing, :math:`e_t \sim N(0, 1)`.

    Parameters
    ----------
    model : Volatility
        Parameters of each series, or shared. Many parameter values for one series of data are so
        many series that share `x`.
    x : Tensor, (series, time), or (1, time) if all series share it
        Observations, float64; never read where `mask` is False.
    mask : Tensor of bool, shape of `x`
    lengths : Tensor of int64, (series,)
        Number of steps of each series, also the number of series.
    n_particles, seed, threshold, moments, implementation
        As in `bootstrap_linear_gaussian`.

    Returns
    -------
    Bootstrapped
        With a state axis of length 1.

    Raises
    ------
    ValueError
        If shapes or types do not fit together, or a parameter or option is out of range.

    Examples
    --------
    Two values of a parameter for the same returns:

    >>> import torch
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> model = Volatility(mu=-one, rho=0.95 * one, sigma=torch.tensor([0.1, 0.3]).double())
    >>> x = torch.tensor([[0.5, -0.2, 1.3]], dtype=torch.float64)
    >>> out = bootstrap_volatility(
    ...     model, x, ~x.isnan(), torch.tensor([3, 3]), n_particles=100, seed=1
    ... )
    >>> out.increments.shape
    torch.Size([2, 3])
    """
    _check_options(n_particles, threshold)
    split(seed)
    problem = volatility_problem(model, x, mask, lengths)
    with torch.no_grad():
        result: Bootstrapped = _kernels_for(x.detach(), implementation).bootstrap_volatility(
            problem, n_particles, seed, float(threshold), moments
        )
    return result


@cache  # an import statement takes longer than a small panel
def _module(implementation: Implementation) -> ModuleType:
    return import_module(_MODULES[implementation])


def _kernels_for(x: Tensor, implementation: Implementation | None) -> ModuleType:
    """The implementation for a tensor: compiled loops cannot be differentiated."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    if implementation is None:
        if wanted or not (x.is_cpu or (x.is_cuda and _has_triton())):
            return _module("reference")
        return _module("cpu" if x.is_cpu else "cuda")
    if implementation not in _MODULES:
        raise ValueError(f"implementation is {implementation!r}; use one of {sorted(_MODULES)}")
    if wanted and implementation != "reference":
        raise ValueError(
            f"the {implementation!r} kernels have no gradient; use 'reference', or torch.no_grad()"
        )
    if implementation == "cpu" and not x.is_cpu:
        raise ValueError(f"the 'cpu' kernels cannot read tensors on {x.device}; use 'reference'")
    if implementation == "cuda" and not _has_triton():
        raise ValueError("the 'cuda' kernels need triton: pip install triton, or use 'reference'")
    return _module(implementation)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check_weights(log_weights: Tensor, axes: int | None = None) -> None:
    if log_weights.dtype != torch.float64:
        raise ValueError(f"log_weights is {log_weights.dtype}; convert it with .double()")
    if log_weights.ndim != (axes or max(log_weights.ndim, 1)) or log_weights.shape[-1] == 0:
        raise ValueError(
            f"log_weights has shape {tuple(log_weights.shape)}; it needs "
            f"{'(series, particle)' if axes else '(..., particle)'} with at least one particle"
        )


def _check_uniforms(uniforms: Tensor) -> None:
    """Refuse what compiled loops would write out of bounds for."""
    if uniforms.numel():
        low, high = (float(end) for end in uniforms.aminmax())
        if not (low >= 0.0 and high < 1.0):
            raise ValueError(f"uniforms range from {low} to {high}; they must lie in [0, 1)")


def _check_options(n_particles: int, threshold: float) -> None:
    if not 1 <= n_particles <= MAX_PARTICLES:
        raise ValueError(f"n_particles is {n_particles}; it must lie in 1 .. {MAX_PARTICLES}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must lie between 0 and 1")


def check_drawn(drawn: Int[Tensor, "row"], what: str) -> None:
    """Refuse rows from which nothing can be drawn; the kernels mark them by -1."""
    bad = torch.nonzero(drawn < 0)
    if len(bad):
        raise ValueError(
            f"{what} {int(bad[0, 0])}: no weight is positive, or one is not a number, so there is "
            "nothing to draw from; check the model and the data at this step"
        )
