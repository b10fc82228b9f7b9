"""What the engines do with `torch.distributions` objects: draw, score, condition, stack.

The last axis of a value is the vector's axis (length D). A distribution with an empty event shape
is independent along the last axis of its batch shape; one with an event of one axis is joint over
the vector; a scalar distribution (batch shape `()`) is a vector of length 1. `Independent` counts
as what it wraps. Every draw takes an explicit generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from seqdgm.nn import gaussians
from seqdgm.nn.drawing import draw, scale_tril
from seqdgm.nn.gaussians import HALF_LOG_2PI
from seqdgm.nn.joint import JointDistribution

_GAUSSIANS = (td.MultivariateNormal, td.LowRankMultivariateNormal)


def _vector(dist: Distribution) -> Distribution:
    """The distribution with `Independent` taken off and, if scalar, a vector axis of length 1."""
    while isinstance(dist, td.Independent) and len(dist.event_shape) <= 1:
        dist = dist.base_dist
    if len(dist.event_shape) > 1:
        raise ValueError(
            f"{type(dist).__name__} has events of shape {tuple(dist.event_shape)}; a distribution "
            "over sequences' steps is over vectors, with an event of at most one axis"
        )
    if not dist.event_shape and not dist.batch_shape:
        dist = dist.expand(torch.Size([1]))
    return dist


def _check_dim(dist: Distribution, x: Tensor) -> None:
    dim = vector_dim(dist)
    if x.shape[-1] != dim:
        raise ValueError(
            f"{type(dist).__name__} is over vectors of length {dim}, but the value's last axis has "
            f"length {x.shape[-1]}; give the parameters a last axis of that length"
        )


def vector_dim(dist: Distribution) -> int:
    """Length of the vector that a distribution is over.

    Examples
    --------
    >>> vector_dim(td.Normal(torch.zeros(5, 3), 1.0)), vector_dim(td.Normal(0.0, 1.0))
    (3, 1)
    """
    dist = _vector(dist)
    return dist.event_shape[0] if dist.event_shape else dist.batch_shape[-1]


def is_joint(dist: Distribution) -> bool:
    """Whether the elements of the vector may depend on each other (`MultivariateNormal`, ...)."""
    return bool(_vector(dist).event_shape)


def is_discrete(dist: Distribution) -> bool:
    """Whether the values are integers."""
    support = dist.support
    return support is not None and bool(support.is_discrete)


# ------------------------------------------------------------------------------------ drawing


def sample(
    dist: Distribution,
    generator: torch.Generator,
    shape: Sequence[int] = (),
    reparameterised: bool = False,
) -> Float[Tensor, "*shape_batch dim"]:
    r"""Draw with an explicit generator; torch's global generators are never used.

    Common distributions have a formula here. Any other is drawn by its own method under a seed
    taken from `generator`, with the global generators put back as they were (slower, and not safe
    beside other threads that use them meanwhile).

    Parameters
    ----------
    dist : Distribution
        See the module's convention.
    generator : torch.Generator
        On the device of the parameters.
    shape : sequence of int
        Axes in front of the batch shape, with independent draws.
    reparameterised : bool
        Whether gradients flow from the draw to the parameters. For Gamma-based families these are
        the implicit gradients :math:`-\partial_\theta F(x;\theta) / p(x;\theta)` (Figurnov, Mohamed
        and Mnih, 2018) that torch computes.

    Returns
    -------
    Tensor of shape (*shape, *batch, dim)
        Of the parameters' dtype; the codes of a `Categorical` too.

    Raises
    ------
    ValueError
        If `reparameterised` and the distribution has no reparameterised draw.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> sample(td.Normal(torch.zeros(5, 3), 1.0), generator, (2,)).shape
    torch.Size([2, 5, 3])
    """
    dist = _vector(dist)
    if not reparameterised:
        with torch.no_grad():
            drawn = draw(dist, torch.Size(shape), generator)
        return drawn.to(dist.probs.dtype) if isinstance(dist, td.Categorical) else drawn
    if not dist.has_rsample:
        raise ValueError(
            f"{type(dist).__name__} has no reparameterised draw; ask for a plain one, or use an "
            "estimator that does not differentiate through the draw"
        )
    return draw(dist, torch.Size(shape), generator)


def expand(dist: Distribution, batch_shape: Sequence[int], dim: int) -> Distribution:
    """Expand to vectors of length `dim` with the given batch shape (vector axis not counted).

    Parameters
    ----------
    dist : Distribution
        Over vectors of length `dim`; an axis of the batch shape may have length 1 or be absent.
    batch_shape : sequence of int
        Axes in front of the vector's axis.
    dim : int
        Length of the vector.

    Raises
    ------
    ValueError
        If the distribution is over vectors of another length (no guessing by broadcasting).

    Examples
    --------
    >>> expand(td.Normal(torch.zeros(3), 1.0), (5, 2), 3).batch_shape
    torch.Size([5, 2, 3])
    """
    dist = _vector(dist)
    if vector_dim(dist) != dim:
        raise ValueError(
            f"{type(dist).__name__} is over vectors of length {vector_dim(dist)}, expected {dim}; "
            "give its parameters a last axis of that length"
        )
    shape = torch.Size(batch_shape if dist.event_shape else (*batch_shape, dim))
    return dist if dist.batch_shape == shape else dist.expand(shape)


def log_prob(
    dist: Distribution,
    x: Float[Tensor, "*batch dim"],
    mask: Bool[Tensor, "*batch dim"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Log-density :math:`\log p(x_o)` of the observed elements of each vector, in nats.

    Independent elements add up. A `MultivariateNormal` (or `LowRankMultivariateNormal`) is
    marginalised exactly, :math:`x_o \sim N(\mu_o, \Sigma_{oo})`, for any mix of missing patterns at
    once: rows and columns of missing elements are replaced by those of the identity, which adds
    nothing to the determinant nor to the quadratic form. A `JointDistribution` says itself what it
    does with a vector observed in part. A vector without observed elements scores
    0. Values and gradients never depend on `x` where it is missing; NaN may stand there.

    Parameters
    ----------
    dist : Distribution
        See the module's convention; its batch shape broadcasts with that of `x`.
    x : Tensor of shape (*batch, dim)
        Values.
    mask : Tensor of bool, optional
        Observed elements; None if all are.

    Returns
    -------
    Tensor of shape (*batch)

    Raises
    ------
    ValueError
        If a vector under any other joint distribution is observed in part, or lengths differ.

    Examples
    --------
    >>> x = torch.tensor([0.0, float("nan")])
    >>> round(log_prob(td.Normal(torch.zeros(2), 1.0), x, ~x.isnan()).item(), 4)
    -0.9189
    """
    dist = _vector(dist)
    if not dist.event_shape:
        each = log_prob_elements(dist, x, mask)
        return each[..., 0] if each.shape[-1] == 1 else each.sum(-1)
    _check_dim(dist, x)
    if mask is None:
        if isinstance(dist, td.MultivariateNormal) and scale_tril(dist).ndim == 2:
            return gaussians.shared_log_prob(dist, x)
        return dist.log_prob(x)
    if isinstance(dist, JointDistribution):
        return dist.log_prob_observed(x, mask)
    if isinstance(dist, _GAUSSIANS):
        return gaussians.marginal_log_prob(dist, x, mask)
    observed = _all_or_none(dist, mask)
    safe = torch.where(observed[..., None], x, _support_point(dist, x))
    return torch.where(observed, dist.log_prob(safe), 0.0)


def log_prob_elements(
    dist: Distribution,
    x: Float[Tensor, "*batch dim"],
    mask: Bool[Tensor, "*batch dim"] | None = None,
) -> Float[Tensor, "*batch dim"]:
    """Log-density of each element in nats, 0 where missing; for independent elements only.

    Raises
    ------
    ValueError
        If the distribution is joint over the vector, or lengths differ.

    Examples
    --------
    >>> log_prob_elements(td.Bernoulli(probs=torch.tensor([0.5])), torch.ones(4, 1)).exp()[:, 0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    dist = _vector(dist)
    if dist.event_shape:
        raise ValueError(
            f"{type(dist).__name__} is a joint distribution: its log-density does not split into "
            "elements; use log_prob"
        )
    _check_dim(dist, x)
    if mask is None:
        return _normal_log_prob(dist, x) if type(dist) is td.Normal else dist.log_prob(x)
    # A replacement after the fact would leave NaN in the gradient.
    safe = torch.where(mask, x, _support_point(dist, x))
    return torch.where(mask, dist.log_prob(safe), 0.0)


def _normal_log_prob(dist: td.Normal, x: Tensor) -> Tensor:
    """`Normal.log_prob` without its checks, which take longer than a small density."""
    scale = dist.scale
    error = (x - dist.loc) / scale
    if not any(scale.stride()):
        scale = scale.as_strided((1,), (1,))  # one number for all: a single logarithm
    return torch.addcmul(-HALF_LOG_2PI - scale.log(), error, error, value=-0.5)


@torch.no_grad()
def _support_point(dist: Distribution, x: Tensor) -> Tensor:
    """Values where the log-density is finite, broadcastable with `x`."""
    if is_discrete(dist) and not dist.event_shape:
        return x.new_tensor(getattr(dist.support, "lower_bound", 0))
    if isinstance(dist, td.Normal | td.StudentT | td.Laplace | td.Cauchy):
        return dist.loc
    generator = torch.Generator(x.device).manual_seed(0)
    return draw(dist, torch.Size(), generator)


def _all_or_none(dist: Distribution, mask: Tensor) -> Bool[Tensor, "*batch"]:
    """Vectors observed whole; raises if one is observed in part."""
    whole = mask.all(-1)
    partly = mask.any(-1) & ~whole
    if partly.any():
        place = tuple(partly.nonzero()[0].tolist())
        raise ValueError(
            f"{type(dist).__name__} is a joint distribution without a known marginal, and the "
            f"vector at batch place {place} is observed in part; use independent elements or "
            "MultivariateNormal, or mask the whole vector"
        )
    return whole


# ------------------------------------------------------------------------------- conditioning


def fill_missing(
    dist: Distribution,
    x: Float[Tensor, "*batch dim"],
    mask: Bool[Tensor, "*batch dim"],
    generator: torch.Generator,
    reparameterised: bool = False,
) -> Float[Tensor, "*batch dim"]:
    r"""`x` where observed, elsewhere a draw from :math:`p(x_m \mid x_o)`.

    A Gaussian is conditioned by correcting a joint draw :math:`(y_m, y_o)`, which is exact and
    needs no factor of the conditional covariance (Doucet, 2010, "A note on efficient conditional
    simulation of Gaussian distributions"):

    .. math:: x_m = y_m + \Sigma_{mo} \Sigma_{oo}^{-1} (x_o - y_o).

    Parameters
    ----------
    dist : Distribution
        See the module's convention; its batch shape broadcasts with that of `x`.
    x, mask : Tensor of shape (*batch, dim)
        Values, and which of them were observed; `x` is not read elsewhere.
    generator : torch.Generator
        On the device of the parameters.
    reparameterised : bool
        Whether gradients flow through the draw.

    Raises
    ------
    ValueError
        If a vector under any other joint distribution is observed in part, or lengths differ.

    Examples
    --------
    >>> x = torch.tensor([7.0, float("nan")])
    >>> generator = torch.Generator().manual_seed(0)
    >>> fill_missing(td.Normal(torch.zeros(2), 1.0), x, ~x.isnan(), generator)[0]
    tensor(7.)
    """
    dist = _vector(dist)
    _check_dim(dist, x)
    batch = dist.batch_shape + dist.event_shape
    batch = torch.broadcast_shapes(batch, x.shape, mask.shape)[:-1]
    drawn = sample(expand(dist, batch, x.shape[-1]), generator, (), reparameterised)
    if isinstance(dist, _GAUSSIANS):
        with torch.set_grad_enabled(reparameterised and torch.is_grad_enabled()):
            drawn = gaussians.condition(dist, drawn, x, mask)
    elif isinstance(dist, JointDistribution):
        drawn = dist.condition(drawn, x, mask, generator)
    elif dist.event_shape:
        _all_or_none(dist, mask)
    return torch.where(mask, x, drawn)


# ------------------------------------------------------------------------------------ moments


def mean(dist: Distribution) -> Float[Tensor, "*batch dim"]:
    r"""Mean of each element, where torch has a closed form.

    A `Categorical` gives the mean of its integer codes, :math:`\sum_k k p_k`, the limit of averaged
    draws. A Student-t with one degree of freedom or less has none: NaN.

    Raises
    ------
    NotImplementedError
        If there is no closed form.

    Examples
    --------
    >>> mean(td.Categorical(probs=torch.tensor([[0.5, 0.0, 0.5]])))
    tensor([1.])
    """
    dist = _vector(dist)
    if isinstance(dist, td.Categorical):
        return dist.probs @ _codes(dist)
    return dist.mean


def variance(dist: Distribution) -> Float[Tensor, "*batch dim"]:
    """Variance of each element, where torch has a closed form (`Categorical`: of the codes).

    Raises
    ------
    NotImplementedError
        If there is no closed form.

    Examples
    --------
    >>> variance(td.Categorical(probs=torch.tensor([[0.5, 0.0, 0.5]])))
    tensor([1.])
    """
    dist = _vector(dist)
    if isinstance(dist, td.Categorical):
        codes = _codes(dist)
        centred = codes - (dist.probs @ codes)[..., None]
        return (dist.probs * centred**2).sum(-1)
    return dist.variance


def _codes(dist: td.Categorical) -> Tensor:
    return torch.arange(dist.probs.shape[-1], dtype=dist.probs.dtype, device=dist.probs.device)


def kl(q: Distribution, p: Distribution) -> Float[Tensor, "*batch"]:
    r"""Kullback-Leibler divergence :math:`KL(q \| p)` of whole vectors, in nats.

    Raises
    ------
    ValueError
        If the vectors differ in length.
    NotImplementedError
        If torch knows no closed form for the pair.

    Examples
    --------
    >>> kl(td.Normal(torch.ones(2), 1.0), td.Normal(torch.zeros(2), 1.0))
    tensor(1.)
    """
    q, p = _vector(q), _vector(p)
    if vector_dim(q) != vector_dim(p):
        raise ValueError(
            f"the distributions are over vectors of length {vector_dim(q)} and {vector_dim(p)}"
        )
    divergence = td.kl_divergence(q, p)
    return divergence if q.event_shape else divergence.sum(-1)


# ----------------------------------------------------------------------------------- stacking


def stack(dists: Sequence[Distribution], dim: int) -> Distribution:
    """Stack distributions of one family along a new axis of the batch shape.

    For every torch distribution that is built from the tensors its `arg_constraints` name (Normal,
    StudentT, Bernoulli, Categorical, Poisson, NegativeBinomial, MultivariateNormal, ...),
    `Independent` and `MixtureSameFamily`.

    Parameters
    ----------
    dists : sequence of Distribution
        Of the same class and batch shape.
    dim : int
        Place of the new axis in the batch shape (the vector's axis counts where the elements are
        independent, as in `torch.stack` of the parameters).

    Raises
    ------
    ValueError
        If the classes differ, or the class cannot be rebuilt from its parameters.

    Examples
    --------
    >>> stack([td.Normal(torch.zeros(5, 3), 1.0)] * 4, 1).batch_shape
    torch.Size([5, 4, 3])
    """
    first = dists[0]
    kinds = {type(d) for d in dists}
    if len(kinds) > 1:
        names = sorted(kind.__name__ for kind in kinds)
        raise ValueError(f"distributions of one class can be stacked, not {' and '.join(names)}")
    if dim < 0:
        dim += len(first.batch_shape) + 1
    build: Any = type(first)
    if isinstance(first, JointDistribution):
        return first.stacked(dists, dim)
    if isinstance(first, td.Independent):
        base = _stack_attribute(dists, "base_dist", dim)
        return build(base, first.reinterpreted_batch_ndims, validate_args=first._validate_args)
    if isinstance(first, td.MixtureSameFamily):
        weights = _stack_attribute(dists, "mixture_distribution", dim)
        parts = _stack_attribute(dists, "component_distribution", dim)
        return build(weights, parts, validate_args=first._validate_args)
    names = _parameter_names(first)
    parameters = {n: torch.stack([getattr(d, n) for d in dists], dim) for n in names}
    return build(**parameters, validate_args=first._validate_args)


def _stack_attribute(dists: Sequence[Distribution], name: str, dim: int) -> Distribution:
    return stack([getattr(d, name) for d in dists], dim)


def _parameter_names(dist: Distribution) -> list[str]:
    """The constructor's arguments, one of each set of alternatives."""
    names = list(dist.arg_constraints)
    rebuilt = type(dist).__module__.startswith("torch.distributions")
    if not rebuilt or not names or type(dist) is td.TransformedDistribution:
        raise ValueError(
            f"{type(dist).__name__} cannot be rebuilt from its parameters; evaluate it step by step"
        )
    if isinstance(dist, td.MultivariateNormal):
        return ["loc", "scale_tril"]
    if "probs" in names and "logits" in names:
        # The one it was built from comes first; the other may have been derived from it since.
        given = next(name for name in vars(dist) if name in ("probs", "logits"))
        names = [name for name in names if name not in ("probs", "logits")] + [given]
    return names
