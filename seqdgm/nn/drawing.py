"""Draws from `torch.distributions` with an explicit generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from seqdgm.nn.joint import JointDistribution
from seqdgm.types import seeded

Drawer = Callable[..., Tensor]
_LARGE = 512  # normal numbers from which the compiled loop is faster than torch's


def draw(
    dist: Distribution, shape: torch.Size, generator: torch.Generator
) -> Float[Tensor, "*shape_batch_event"]:
    """Draw from a distribution, with gradients where it has a reparameterised draw.

    Parameters
    ----------
    dist : Distribution
        Any; families without a formula here are drawn by their own method under a seed taken from
        `generator`, with the global generators put back as they were.
    shape : torch.Size
        Axes in front of the batch shape.
    generator : torch.Generator
        On the device of the parameters.

    Examples
    --------
    >>> draw(td.Poisson(torch.ones(3)), torch.Size([2]), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    if isinstance(dist, JointDistribution):
        return dist.draw(shape, generator)
    # The exact type, because a subclass may have changed how it draws.
    drawer = _DRAWERS.get(type(dist))
    if drawer is not None:
        return drawer(dist, shape, generator)
    with seeded(generator):
        return dist.rsample(shape) if dist.has_rsample else dist.sample(shape)


def _full(dist: Distribution, shape: torch.Size) -> torch.Size:
    return shape + dist.batch_shape + dist.event_shape


def _normal_noise(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    large = like.dtype == torch.float64 and shape.numel() >= _LARGE
    if large and like.device.type == "cpu":
        from seqdgm.kernels.noise import standard_normal

        return standard_normal(shape, generator)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _uniform_noise(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def _gamma_noise(shape: torch.Size, concentration: Tensor, generator: torch.Generator) -> Tensor:
    # The sampler knows no half precision.
    wide = concentration if concentration.dtype.itemsize > 2 else concentration.float()
    # Small concentrations underflow to 0, which is outside the support.
    tiny = torch.finfo(wide.dtype).tiny
    return torch._standard_gamma(wide.expand(shape), generator=generator).clamp(min=tiny)


def _draw_normal(d: td.Normal, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.addcmul(d.loc, d.scale, _normal_noise(_full(d, shape), d.loc, generator))


def _draw_studentt(d: td.StudentT, shape: torch.Size, generator: torch.Generator) -> Tensor:
    full = _full(d, shape)
    noise = _normal_noise(full, d.loc, generator)
    chi2 = 2 * _gamma_noise(full, d.df / 2, generator)
    return d.loc + d.scale * noise * torch.rsqrt(chi2 / d.df)


def _draw_laplace(d: td.Laplace, shape: torch.Size, generator: torch.Generator) -> Tensor:
    # Open at both ends, where the logarithm is infinite.
    u = torch.empty(_full(d, shape), dtype=d.loc.dtype, device=d.loc.device)
    u.uniform_(torch.finfo(u.dtype).eps - 1, 1, generator=generator)
    return d.loc - d.scale * u.sign() * torch.log1p(-u.abs())


def _draw_uniform(d: td.Uniform, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return d.low + (d.high - d.low) * _uniform_noise(_full(d, shape), d.low, generator)


def _draw_exponential(d: td.Exponential, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.empty(_full(d, shape), dtype=d.rate.dtype, device=d.rate.device)
    return noise.exponential_(generator=generator) / d.rate


def _draw_gamma(d: td.Gamma, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return _gamma_noise(_full(d, shape), d.concentration, generator) / d.rate


def _draw_beta(d: td.Beta, shape: torch.Size, generator: torch.Generator) -> Tensor:
    full = _full(d, shape)
    a = _gamma_noise(full, d.concentration1, generator)
    b = _gamma_noise(full, d.concentration0, generator)
    info = torch.finfo(a.dtype)
    return (a / (a + b)).clamp(info.tiny, 1 - info.eps)


def _draw_bernoulli(d: td.Bernoulli, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.bernoulli(d.probs.expand(_full(d, shape)), generator=generator)


def _draw_categorical(d: td.Categorical, shape: torch.Size, generator: torch.Generator) -> Tensor:
    flat = d.probs.reshape(-1, d.probs.shape[-1])
    draws = torch.multinomial(flat, shape.numel(), replacement=True, generator=generator)
    return draws.T.reshape(_full(d, shape))


def _draw_poisson(d: td.Poisson, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.poisson(d.rate.expand(_full(d, shape)), generator=generator)


def _draw_binomial(d: td.Binomial, shape: torch.Size, generator: torch.Generator) -> Tensor:
    full = _full(d, shape)
    return torch.binomial(d.total_count.expand(full), d.probs.expand(full), generator=generator)


def _draw_negbinomial(
    d: td.NegativeBinomial, shape: torch.Size, generator: torch.Generator
) -> Tensor:
    rate = _gamma_noise(_full(d, shape), d.total_count, generator) * d.logits.exp()
    return torch.poisson(rate, generator=generator)


def scale_tril(d: td.MultivariateNormal) -> Float[Tensor, "... dim dim"]:
    """Cholesky factor of the covariance, not expanded to the batch where it is shared."""
    # One factor for the whole batch stays one: the public `scale_tril` is expanded to the batch.
    return d._unbroadcasted_scale_tril


def _draw_mvn(d: td.MultivariateNormal, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = _normal_noise(_full(d, shape), d.loc, generator)
    factor = scale_tril(d)
    if factor.ndim == 2:
        return d.loc + noise @ factor.mT
    return d.loc + (factor @ noise[..., None])[..., 0]


def _draw_low_rank(
    d: td.LowRankMultivariateNormal, shape: torch.Size, generator: torch.Generator
) -> Tensor:
    factor, diagonal = d._unbroadcasted_cov_factor, d._unbroadcasted_cov_diag
    full = _full(d, shape)
    common = _normal_noise(torch.Size((*full[:-1], factor.shape[-1])), d.loc, generator)
    own = _normal_noise(full, d.loc, generator)
    return d.loc + (factor @ common[..., None])[..., 0] + diagonal.sqrt() * own


def _draw_mixture(d: td.MixtureSameFamily, shape: torch.Size, generator: torch.Generator) -> Tensor:
    n_event = len(d.event_shape)
    chosen = draw(d.mixture_distribution, shape, generator)
    values = draw(d.component_distribution, shape, generator)
    place = chosen.reshape(chosen.shape + (1,) * (1 + n_event))
    axis = -1 - n_event
    place = place.expand((*values.shape[:axis], 1, *d.event_shape))
    return values.gather(axis, place).squeeze(axis)


def _draw_transformed(
    d: td.TransformedDistribution, shape: torch.Size, generator: torch.Generator
) -> Tensor:
    x = draw(d.base_dist, shape, generator)
    for transform in d.transforms:
        x = transform(x)
    return x


def _draw_independent(d: td.Independent, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return draw(d.base_dist, shape, generator)


_DRAWERS: dict[type, Drawer] = {
    td.Normal: _draw_normal,
    td.StudentT: _draw_studentt,
    td.Laplace: _draw_laplace,
    td.Uniform: _draw_uniform,
    td.Exponential: _draw_exponential,
    td.Gamma: _draw_gamma,
    td.Chi2: _draw_gamma,
    td.Beta: _draw_beta,
    td.Bernoulli: _draw_bernoulli,
    td.Categorical: _draw_categorical,
    td.Poisson: _draw_poisson,
    td.Binomial: _draw_binomial,
    td.NegativeBinomial: _draw_negbinomial,
    td.MultivariateNormal: _draw_mvn,
    td.LowRankMultivariateNormal: _draw_low_rank,
    td.MixtureSameFamily: _draw_mixture,
    td.LogNormal: _draw_transformed,
    td.TransformedDistribution: _draw_transformed,
    td.Independent: _draw_independent,
}
