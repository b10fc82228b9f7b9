r"""Gradients of the particle filter's evidence with respect to a model's parameters.

The draws of states move with the parameters (reparameterised) or enter by the score of their
density; what stands between the evidence and its gradient is resampling, which jumps. Three ways:

``"stop-gradient"``
    Ancestors as ever, and the weights :math:`W_k / \perp(W_k)` after resampling, where
    :math:`\perp` stops the gradient: their value is 1, their derivative the score of the ancestor.
    The gradient of :math:`\hat Z` is unbiased for that of the likelihood, for every unbiased scheme
    and threshold; that of :math:`\log \hat Z` is consistent. Its variance grows with the length.
``"soft"``
    Ancestors from :math:`\alpha W_k + (1 - \alpha) / N`, and the ratio as weight. The evidence is
    unbiased; the gradient leaves out how the ancestors' distribution moves, a bias that more
    particles do not remove, smaller the smaller :math:`\alpha` is, at the price of more variance.
``"optimal-transport"``
    Particles move by the entropy-regularised optimal transport from W to equal weights. Nothing
    jumps, so the filter is a smooth function of the parameters whose gradient is exact; but the
    evidence itself is biased, by what vanishes as N grows and the regularisation shrinks. For
    continuous states only.

References
----------
Ścibior and Wood (2021), Differentiable particle filtering without modifying the forward pass,
arXiv:2106.10314; Karkus, Hsu and Lee (2018), Particle filter networks with application to visual
localization, *CoRL*; Corenflos, Thornton, Deligiannidis and Doucet (2021), Differentiable particle
filtering via entropy-regularized optimal transport, *ICML*; Reich (2013), A nonparametric ensemble
transform method for Bayesian inference, *SIAM J. Sci. Comput.* 35.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.inference import smc
from seqdgm.inference.resampling import (
    MemoryResampler,
    Resampled,
    Resampler,
    find_resampler,
    gather,
    systematic,
)
from seqdgm.inference.smc import SMCOptions
from seqdgm.kernels.particles import pick
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


def evidence(
    model: StateSpaceModel, batch: Batch, options: SMCOptions, generator: torch.Generator
) -> Float[Tensor, "series"]:
    """Log-evidence of each series by the particle filter, with gradients.

    Parameters
    ----------
    model : StateSpaceModel
        Its parameters that require gradients get them.
    batch : Batch
        Series in model units.
    options : SMCOptions
        ``resampler`` may also be a name in `DIFFERENTIABLE`. The name of any other scheme stands
        for `stop_gradient` of it, which leaves the values as they are.
    generator : torch.Generator

    Returns
    -------
    Tensor of shape (series,), float64

    Raises
    ------
    ValueError
        As in `seqdgm.inference.smc.run`.

    Examples
    --------
    >>> import seqdgm as sq
    >>> from torch.distributions import Normal
    >>> from seqdgm.prepare import prepare
    >>> class Walk(sq.StateSpaceModel):
    ...     latent_dim = 1
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rho = torch.nn.Parameter(torch.tensor(0.5))
    ...     def initial(self, u): return Normal(torch.zeros(1), 1.0)
    ...     def transition(self, z, u): return Normal(self.rho * z, 1.0)
    ...     def emission(self, z, u): return Normal(z, 1.0)
    >>> model = Walk()
    >>> _, batch, _ = prepare(model, torch.tensor([0.3, 1.0, 1.2]), None)
    >>> value = evidence(model, batch, SMCOptions(100), torch.Generator().manual_seed(0))
    >>> value.sum().backward()
    >>> bool(model.rho.grad > 0)
    True
    """
    resampler = options.resampler
    if isinstance(resampler, str) and resampler in DIFFERENTIABLE:
        resampler = DIFFERENTIABLE[resampler]()
    elif isinstance(resampler, str):
        plain = find_resampler(resampler)
        assert not isinstance(plain, MemoryResampler)
        resampler = stop_gradient(plain)
    how = replace(options, resampler=resampler, differentiable=True)
    return smc.run(model, batch, how, generator).increments.sum(1)


def stop_gradient(resampler: Resampler = systematic) -> Resampler:
    r"""Give a scheme the gradient of what it expects.

    The log-weights after resampling become :math:`\log W_a - \perp(\log W_a)` more, for the
    ancestor a.

    References
    ----------
    Ścibior and Wood (2021), section 4.
    """

    def resample(
        log_weights: Float[Tensor, "series particle"], generator: torch.Generator
    ) -> Resampled:
        drawn = resampler(log_weights.detach(), generator)
        chosen = gather(log_weights, drawn.ancestors)
        return drawn._replace(log_weights=drawn.log_weights + chosen - chosen.detach())

    return resample


def soft(alpha: float = 0.5, resampler: Resampler = systematic) -> Resampler:
    r"""Resample from :math:`q_k = \alpha W_k + (1 - \alpha) / N`, with weights W / (N q) after it.

    Raises
    ------
    ValueError
        Unless 0 < alpha < 1.

    References
    ----------
    Karkus, Hsu and Lee (2018), section 4.3.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha!r} must lie between 0 and 1")

    def resample(
        log_weights: Float[Tensor, "series particle"], generator: torch.Generator
    ) -> Resampled:
        mixed = torch.log(alpha * log_weights.exp() + (1 - alpha) / log_weights.shape[1])
        drawn = resampler(mixed.detach(), generator)
        ratio = gather(log_weights - mixed, drawn.ancestors)
        return drawn._replace(log_weights=drawn.log_weights + ratio)

    return resample


@dataclass(frozen=True)
class OptimalTransport:
    r"""Move the particles to equal weights by entropy-regularised optimal transport.

    With :math:`C_{ij} = \|x_i - x_j\|^2 / \delta^2` for the memories x of the particles,
    :math:`\delta = \sqrt{d} \max_k \mathrm{sd}(x_k)`, the plan

    .. math::

        P = \arg\min_P \sum_{ij} P_{ij} C_{ij} + \varepsilon \sum_{ij} P_{ij} (\log P_{ij} - 1),
        \quad P 1 = 1 / N, \quad P^\top 1 = W

    moves particle i to :math:`N \sum_j P_{ij} x_j`. The weighted mean stays what it was; the spread
    shrinks, by less the smaller :math:`\varepsilon` is. The gradient is that of the optimum, by the
    implicit function theorem. An iteration and the gradient take time :math:`O(N^3)` and memory
    :math:`O(N^2)`.

    Parameters
    ----------
    epsilon : float
        Regularisation.
    shrink : float
        Factor from one regularisation to the next on the way down to it, from 1 of the largest
        cost.
    tolerance : float
        Largest error of W, relative to 1 / N, at which to stop.
    max_iterations : int
        At the last regularisation.

    Raises
    ------
    ValueError
        If the iterations do not converge, or the particles have no continuous memory.

    References
    ----------
    Corenflos, Thornton, Deligiannidis and Doucet (2021), algorithms 2 and 3; Cuturi (2013),
    Sinkhorn distances, *NeurIPS*; Feydy et al. (2019), *AISTATS* (averaged updates and scaling of
    epsilon).
    """

    epsilon: float = 0.1
    shrink: float = 0.5
    tolerance: float = 1e-9
    max_iterations: int = 500

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"epsilon={self.epsilon!r} must be positive")
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink={self.shrink!r} must lie between 0 and 1")

    def bind(self, h: Any) -> Resampler:
        """The resampler of particles with these memories."""
        leaves = [leaf for leaf in _leaves(h) if leaf.is_floating_point()]
        if not leaves:
            raise ValueError(
                "optimal transport moves what the particles remember, and here they remember no "
                "real numbers; use 'stop-gradient'"
            )
        x = torch.cat([leaf.flatten(2).double() for leaf in leaves], 2)

        def resample(
            log_weights: Float[Tensor, "series particle"], generator: torch.Generator
        ) -> Resampled:
            n, count = log_weights.shape
            rows = count * self.plan(x, log_weights)
            uniforms = torch.rand(
                (n, count), generator=generator, dtype=rows.dtype, device=rows.device
            )
            equal = torch.full_like(log_weights, -math.log(count))
            return Resampled(pick(rows.detach().log(), uniforms), equal, rows)

        return resample

    def plan(
        self,
        x: Float[Tensor, "series particle dim"],
        log_weights: Float[Tensor, "series particle"],
    ) -> Float[Tensor, "series particle particle"]:
        """The plan P, with gradients; its rows add up to 1 / N and its columns to W."""
        variance = x.var(1, correction=0).amax(1).clamp_min(torch.finfo(x.dtype).tiny)
        scaled = x / (x.shape[2] * variance).sqrt()[:, None, None]
        cost = (scaled[:, :, None] - scaled[:, None]).square().sum(-1)
        plan: Tensor = _Plan.apply(cost, log_weights.exp(), self)
        return plan

    def solve(
        self,
        cost: Float[Tensor, "series particle particle"],
        weights: Float[Tensor, "series particle"],
    ) -> Float[Tensor, "series particle particle"]:
        """The plan by Sinkhorn's and Newton's iterations in logarithms, without gradients."""
        start = torch.zeros_like(weights)
        final = torch.full_like(weights[:, :1], self.epsilon)
        eps = torch.maximum(cost.amax((1, 2))[:, None], final)
        iterations, error = 0, torch.inf
        sinkhorn = _Sinkhorn(cost, weights, eps)
        while iterations < self.max_iterations:
            plan, excess, update = sinkhorn.look(start)
            error = float(excess.abs().max()) * cost.shape[1]
            last = bool((sinkhorn.eps <= final).all())
            if last and error <= self.tolerance:
                return plan
            if not last and error <= 0.1:
                sinkhorn = sinkhorn._replace(eps=torch.maximum(self.shrink * sinkhorn.eps, final))
            start = sinkhorn.improve(start, plan, excess, update)
            iterations += 1
        raise ValueError(
            f"optimal transport did not converge in {self.max_iterations} iterations (error "
            f"{error:.1e} of 1 / N); use a larger epsilon than {self.epsilon} or a larger tolerance"
        )


class _Sinkhorn(NamedTuple):
    """The dual problem in the potential g of the columns; that of the rows follows."""

    cost: Float[Tensor, "series particle particle"]
    weights: Float[Tensor, "series particle"]
    eps: Float[Tensor, "series one"]

    def rows(self, g: Float[Tensor, "series particle"]) -> Float[Tensor, "series particle"]:
        """The potential that gives every row its sum 1 / N."""
        inner = (g[:, None] - self.cost) / self.eps[..., None] + self.weights.log()[:, None]
        return -self.eps * torch.logsumexp(inner, 2)

    def look(self, g: Float[Tensor, "series particle"]) -> tuple[Tensor, Tensor, Tensor]:
        """The plan, what its columns exceed W by, and Sinkhorn's update of g."""
        count = g.shape[1]
        inner = (self.rows(g)[..., None] - self.cost) / self.eps[..., None] - math.log(count)
        update = -self.eps * torch.logsumexp(inner, 1)
        columns = (g / self.eps + self.weights.log())[:, None]
        return (
            torch.exp(inner + columns),
            self.weights * torch.expm1((g - update) / self.eps),
            update,
        )

    def improve(self, g: Tensor, plan: Tensor, excess: Tensor, update: Tensor) -> Tensor:
        """Newton's step, whole near the optimum; else what does most for the dual objective."""
        matrix, scale = _eliminated(plan, self.weights + excess)
        step = self.eps * scale * torch.linalg.solve_ex(matrix, scale * excess)[0]
        tries = [torch.where(self.weights > 0, g - k * step, update) for k in (1.0, 0.3, 0.1, 0.03)]
        error = self.look(tries[0])[1].abs().amax(1)
        helps = error < 0.5 * excess.abs().amax(1)
        tries.append(update)
        gains = [self.rows(x).mean(1) + (self.weights * x).nansum(1) for x in tries]
        best = torch.stack(gains, 1).nan_to_num(-torch.inf).argmax(1).masked_fill(helps, 0)
        return torch.stack(tries, 1)[torch.arange(len(g), device=g.device), best]


def _eliminated(
    plan: Float[Tensor, "series particle particle"], columns: Float[Tensor, "series particle"]
) -> tuple[Float[Tensor, "series particle particle"], Float[Tensor, "series particle"]]:
    """The matrix diag(columns) - N P'P, scaled on both sides, and the scale 1 / sqrt(columns)."""
    count = plan.shape[1]
    root = columns.sqrt()
    scale = torch.where(root > 0, 1 / root, 0.0)
    narrow = plan * scale[:, None]
    matrix = torch.eye(count).to(plan) - count * narrow.mT @ narrow
    # Shifting both potentials against each other changes nothing: fix that direction.
    return matrix + root[..., None] * root[:, None], scale


class _Plan(torch.autograd.Function):
    r"""The optimal plan, with the gradient of the optimum.

    With :math:`P = \exp((f_i + g_j - C_{ij}) / \varepsilon)` the fixed marginals tie dP to dC and
    dW; for :math:`M = P \circ \partial L / \partial P` the adjoint of that linear system is

    .. math::

        \lambda / N + P \mu = M 1, \quad P^\top \lambda + W \circ \mu = M^\top 1, \\
        \partial L / \partial W = \mu, \quad
        \partial L / \partial C = (P \circ (\lambda 1^\top + 1 \mu^\top) - M) / \varepsilon
    """

    @staticmethod
    def forward(ctx: Any, cost: Tensor, weights: Tensor, transport: OptimalTransport) -> Tensor:
        plan = transport.solve(cost, weights)
        ctx.save_for_backward(plan, weights)
        ctx.epsilon = transport.epsilon
        return plan

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        plan, weights = ctx.saved_tensors
        count = plan.shape[1]
        pull = plan * grad
        across, down = pull.sum(2), pull.sum(1)
        # Eliminate lambda, and scale by the roots of W, which tames small weights.
        matrix, scale = _eliminated(plan, weights)
        right = scale * (down - count * (plan.mT @ across[..., None])[..., 0])
        mu = scale * torch.linalg.solve(matrix, right)
        lam = count * (across - (plan @ mu[..., None])[..., 0])
        cost_grad = (plan * (lam[..., None] + mu[:, None]) - pull) / ctx.epsilon
        return cost_grad, mu, None


def _leaves(tree: Any) -> list[Tensor]:
    if tree is None:
        return []
    return [tree] if isinstance(tree, Tensor) else [leaf for part in tree for leaf in _leaves(part)]


DIFFERENTIABLE: dict[str, Callable[[], Resampler | MemoryResampler]] = {
    "stop-gradient": stop_gradient,
    "soft": soft,
    "optimal-transport": OptimalTransport,
}
