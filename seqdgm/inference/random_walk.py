r"""Adaptive random-walk Metropolis proposals for many chains at once.

.. math::

    \phi' = \phi + \begin{cases}
        s\, \frac{2.38}{\sqrt P}\, L e & \text{with probability } 0.95 \\
        \frac{0.1}{\sqrt P}\, D e & \text{with probability } 0.05
    \end{cases}, \quad e \sim N(0, I)

with :math:`L L^\top` the covariance of the chains around their own running means, D the spread of
the prior and s tuned towards the wanted acceptance rate. All three stop changing when the warm-up
ends, so that what is kept afterwards comes from one Markov kernel.

References
----------
Haario, Saksman and Tamminen (2001), An adaptive Metropolis algorithm, *Bernoulli* 7; Roberts and
Rosenthal (2009), Examples of adaptive MCMC, *JCGS* 18; Andrieu and Thoms (2008), A tutorial on
adaptive MCMC, *Statistics and Computing* 18.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NARROW = 0.05  # share of small steps of a fixed size, which move a chain whatever was adapted
FORGET = 0.6  # exponent of the adaptation's step sizes, (n + 1) ** -0.6


@dataclass
class RandomWalk:
    """Proposal of the chains, with what it learned of their target.

    Attributes
    ----------
    n_groups : int
        Posteriors; vectors are in the order chain, group, and each group adapts to its own.
    spread : Tensor of shape (size,)
        Standard deviations of the prior in the unconstrained coordinates.
    target : float
        Acceptance rate wanted.
    """

    n_groups: int
    spread: Float[Tensor, "size"]
    target: float = 0.234
    steps: int = 0
    log_scale: Tensor = field(init=False)
    mean: Tensor | None = field(default=None, init=False)
    cov: Tensor = field(init=False)
    factor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.log_scale = self.spread.new_full((self.n_groups,), math.log(0.3))
        self.cov = torch.diag(self.spread.square()).repeat(self.n_groups, 1, 1)
        self.factor = torch.linalg.cholesky(self.cov)

    def propose(
        self, free: Float[Tensor, "vector size"], generator: torch.Generator
    ) -> Float[Tensor, "vector size"]:
        """One symmetric step of every vector."""
        n, size = free.shape
        noise = torch.randn(free.shape, generator=generator, dtype=free.dtype, device=free.device)
        pick = torch.rand((n, 1), generator=generator, dtype=free.dtype, device=free.device)
        grouped = noise.view(-1, self.n_groups, size)
        wide = torch.einsum("gij,cgj->cgi", self.factor, grouped)
        wide = (2.38 / math.sqrt(size)) * self.log_scale.exp()[:, None] * wide
        narrow = (0.1 / math.sqrt(size)) * self.spread * noise
        return free + torch.where(pick < NARROW, narrow, wide.reshape(n, size))

    def adapt(self, free: Float[Tensor, "vector size"], chance: Float[Tensor, "vector"]) -> None:
        """Learn from where the chains are now, and from their chances of acceptance."""
        self.steps += 1
        gain = (self.steps + 1) ** -FORGET
        size = free.shape[1]
        now = free.view(-1, self.n_groups, size)
        rate = chance.view(-1, self.n_groups).mean(0)
        self.log_scale = self.log_scale + 2.0 * gain * (rate - self.target)
        if self.mean is None:
            self.mean = now.clone()
            return
        gap = now - self.mean
        self.mean = self.mean + gain * gap
        outer = torch.einsum("cgi,cgj->gij", gap, gap) / len(now)
        self.cov = (1 - gain) * self.cov + gain * outer
        floor = torch.diag(1e-12 * self.spread.square())
        self.factor = torch.linalg.cholesky(self.cov + floor)


def accept(
    log_ratio: Float[Tensor, "vector"], generator: torch.Generator
) -> tuple[Bool[Tensor, "vector"], Float[Tensor, "vector"]]:
    """Which proposals are accepted, and the chance that each had."""
    u = torch.rand(
        log_ratio.shape, generator=generator, dtype=log_ratio.dtype, device=log_ratio.device
    )
    return u.log() < log_ratio, log_ratio.clamp_max(0.0).exp()
