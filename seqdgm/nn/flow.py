r"""Affine-coupling flows: real vectors as an invertible map of Gaussian noise.

With noise :math:`\epsilon \sim N(0, I)` a layer leaves one half A of the elements as they are and
maps the other, :math:`v_B \leftarrow e^{s(v_A, c)} v_B + t(v_A, c)`, where c stands for the
features; layers take turns at the halves, and the result is scaled and shifted,
:math:`x = \mu(c) + \sigma(c) v`. The density follows from the layers' inverses and the sum of all
:math:`s` and :math:`\log \sigma`.

References
----------
Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP, *ICLR*, equations 4-8.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributions import StudentT, constraints
from torch.quasirandom import SobolEngine

from seqdgm.nn.joint import JointDistribution

MAX_LOG_SCALE = 2.0  # of a layer
N_MOMENTS = 256  # draws behind mean and variance
N_ROUNDS = 2  # in which the law of the points adapts
N_NODES = 512  # points of the integral over missing elements


class Coupling(nn.Module):
    """One layer; starts as the identity.

    Parameters
    ----------
    dim : int
        Length of the vector, at least 2.
    hidden_dim : int
        Units of the network that gives s and t.
    flip : bool
        Whether the second half stays as it is, not the first.
    """

    def __init__(self, dim: int, hidden_dim: int, flip: bool) -> None:
        super().__init__()
        first, second = (dim + 1) // 2, dim // 2
        self.sizes = (first, second)
        self.flip = flip
        kept, moved = (second, first) if flip else (first, second)
        self.read = nn.Linear(kept, hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, 2 * moved)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, v: Float[Tensor, "*batch dim"], context: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch dim"]:
        """From noise towards data."""
        kept, moved = self._halves(v)
        log_scale, shift = self._affine(kept, context)
        return self._join(kept, moved * log_scale.exp() + shift)

    def inverse(
        self, v: Float[Tensor, "*batch dim"], context: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch"]]:
        """From data towards noise, and the log-determinant of :meth:`forward` there."""
        kept, moved = self._halves(v)
        log_scale, shift = self._affine(kept, context)
        return self._join(kept, (moved - shift) * (-log_scale).exp()), log_scale.sum(-1)

    def _halves(self, v: Tensor) -> tuple[Tensor, Tensor]:
        first, second = v.split(self.sizes, -1)
        return (second, first) if self.flip else (first, second)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([moved, kept] if self.flip else [kept, moved], -1)

    def _affine(self, kept: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.out(torch.tanh(self.read(kept) + context)).chunk(2, -1)
        return MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE), shift


class CouplingFlow(JointDistribution):
    """Real vectors by affine-coupling layers over Gaussian noise.

    There is no marginal in closed form. Where a vector is observed in part, one or two missing
    elements are integrated out by adaptive importance sampling at 512 quasi-random points, the same
    at every call: `log_prob_observed` is then deterministic and differentiable, for one missing
    element exact to rounding, for two approximate (for layers with random weights of standard
    deviation 0.3 and 0.5 the median error is 0.004 and 0.03 nats, the largest 0.01 and 0.4).
    `condition` chooses among 512 random points in proportion to their weight, which is a draw from
    the conditional law up to an error of the order of 1/512. More missing elements raise a
    ValueError.

    Parameters
    ----------
    loc, scale : Tensor of shape (*batch, dim)
        The last, elementwise map.
    context : Tensor of shape (*batch, layers * hidden)
        What the features add to the hidden units of the layers' networks.
    layers : ModuleList of Coupling
        From noise towards data.

    Examples
    --------
    >>> layers = nn.ModuleList([Coupling(2, 4, False)])
    >>> dist = CouplingFlow(torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 4), layers)
    >>> dist.log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    support = constraints.real_vector
    has_rsample = True
    max_hidden: ClassVar[int] = 2
    limit: ClassVar[str] = "at most 2"

    def __init__(
        self,
        loc: Float[Tensor, "*batch dim"],
        scale: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*batch units"],
        layers: nn.ModuleList,
    ) -> None:
        super().__init__((loc, scale, context), (layers,), loc.shape[-1])

    @property
    def mean(self) -> Float[Tensor, "*batch dim"]:
        """Mean of 256 draws of fixed seed; its standard error is a sixteenth of the spread."""
        return self._moments()[0]

    @property
    def variance(self) -> Float[Tensor, "*batch dim"]:
        """Variance of the draws behind :attr:`mean`."""
        return self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        loc = self.tensors[0]
        generator = torch.Generator(loc.device).manual_seed(0)
        shape = (N_MOMENTS // 2, *[1] * (loc.ndim - 1), loc.shape[-1])
        # The same noise for all places, whose moments then depend on nothing but their parameters.
        noise = torch.randn(shape, generator=generator, dtype=loc.dtype, device=loc.device)
        first, second = torch.zeros_like(loc), torch.zeros_like(loc)
        for block in torch.cat([noise, -noise]).split(16):
            centred = self._push(block.expand(-1, *loc.shape)) - loc
            first = first + centred.sum(0)
            second = second + centred.square().sum(0)
        mean = first / N_MOMENTS
        return loc + mean, second / N_MOMENTS - mean.square()

    def draw(
        self, shape: torch.Size, generator: torch.Generator
    ) -> Float[Tensor, "*shape_batch dim"]:
        """Noise through the layers."""
        loc = self.tensors[0]
        full = (*shape, *loc.shape)
        v = torch.randn(full, generator=generator, dtype=loc.dtype, device=loc.device)
        return self._push(v)

    def _push(self, v: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        loc, scale, _ = self.tensors
        for layer, context in self._layers():
            v = layer(v, context)
        return loc + scale * v

    def _layers(self) -> list[tuple[Coupling, Tensor]]:
        layers = self.shared[0]
        return list(zip(layers, self.tensors[2].chunk(len(layers), -1), strict=True))

    def _density(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
        loc, scale, _ = self.tensors
        v = (x - loc) / scale
        log_det = scale.log().sum(-1)
        for layer, context in reversed(self._layers()):
            v, change = layer.inverse(v, context)
            log_det = log_det + change
        return -0.5 * (v.square() + math.log(2 * math.pi)).sum(-1) - log_det

    @staticmethod
    def hidden(mask: Bool[Tensor, "rows dim"]) -> Int[Tensor, "rows"]:
        """Missing elements."""
        return (~mask).sum(-1)

    def _weighted(
        self, x: Tensor, mask: Tensor, uniform: Float[Tensor, "points rows dim"]
    ) -> tuple[Float[Tensor, "points rows dim"], Float[Tensor, "points rows"]]:
        """Vectors with missing elements at points of a heavy-tailed law, and their log-weights.

        The law starts at the flow's own moments and is moved to those of the weighted points.
        """
        # Student's t with 2 degrees of freedom: a quantile in closed form, and tails heavier than
        # a flow's.
        u = uniform.clamp(1e-6, 1 - 1e-6)
        noise = (2 * u - 1) / (2 * u * (1 - u)).sqrt()
        with torch.no_grad():
            mean, variance = self._moments()
            spread = variance.sqrt()
            for _ in range(N_ROUNDS):
                points, proposed = _proposed(x, mask, noise, mean, spread)
                weight = (self._density(points) - proposed).softmax(0)[..., None]
                mean = (weight * points).sum(0)
                found = (weight * (points - mean).square()).sum(0).sqrt()
                spread = torch.maximum(found, 0.1 * spread)
            points, proposed = _proposed(x, mask, noise, mean, spread)
        return points, self._density(points) - proposed

    def _marginal(
        self, x: Float[Tensor, "rows dim"], mask: Bool[Tensor, "rows dim"]
    ) -> Float[Tensor, "rows"]:
        # One axis of the Sobol sequence for each missing element of a vector, in its order.
        axis = ((~mask).int().cumsum(-1) - 1).clamp(min=0, max=self.max_hidden - 1)
        nodes = SobolEngine(self.max_hidden).draw(N_NODES + 1, dtype=x.dtype)[1:].to(x.device)
        _, log_w = self._weighted(x, mask, nodes[:, axis])
        return log_w.logsumexp(0) - math.log(N_NODES)

    def _complete(
        self,
        x: Float[Tensor, "rows dim"],
        mask: Bool[Tensor, "rows dim"],
        generator: torch.Generator,
    ) -> Float[Tensor, "rows dim"]:
        shape = (N_NODES, *x.shape)
        uniform = torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
        points, log_w = self._weighted(x, mask, uniform)
        chosen = torch.multinomial(log_w.softmax(0).mT, 1, generator=generator)[:, 0]
        return points[chosen, torch.arange(len(x), device=x.device)]


def _proposed(
    x: Tensor, mask: Tensor, noise: Tensor, mean: Tensor, spread: Tensor
) -> tuple[Float[Tensor, "points rows dim"], Float[Tensor, "points rows"]]:
    points = torch.where(mask, x, mean + spread * noise)
    law = StudentT(2.0, mean, spread, validate_args=False)
    return points, torch.where(mask, 0.0, law.log_prob(points)).sum(-1)
