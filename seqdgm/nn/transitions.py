"""Transitions of latent Markov chains: p(z_t | z_{t-1}, u_t)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F


class GatedTransition(nn.Module):
    r"""Gaussian transition that learns how far to leave a linear one.

    .. math::
        g &= \mathrm{sigmoid}(W_{g2}\, \mathrm{relu}(W_{g1} z + b_{g1}) + b_{g2}) \\
        h &= W_{h2}\, \mathrm{relu}(W_{h1} z + b_{h1}) + b_{h2} \\
        \mu &= (1 - g) \odot (W_\mu z + b_\mu) + g \odot h \\
        \sigma &= \mathrm{softplus}(W_\sigma\, \mathrm{relu}(h) + b_\sigma) + \sigma_{\min}

    with :math:`W_\mu = I` and :math:`b_\mu = 0` at the start (Krishnan, Shalit and Sontag, 2017,
    "Structured inference networks for nonlinear state space models", part "Deep Markov models"). A
    context, such as known inputs, is appended to `z` in every :math:`W z` of the first three lines,
    with weight 0 at the start in :math:`W_\mu`.

    Parameters
    ----------
    latent_dim : int
        Length of z.
    hidden_dim : int
        Units of the two hidden layers.
    context_dim : int
        Length of the context; 0 for none.
    min_scale : float
        Floor of the scale.
    gate_bias : float
        Start of :math:`b_{g2}`; negative, so that the transition starts near its linear part.

    Examples
    --------
    >>> transition = GatedTransition(latent_dim=4, hidden_dim=16)
    >>> transition(torch.zeros(3, 7, 4)).loc.shape
    torch.Size([3, 7, 4])
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dim: int,
        context_dim: int = 0,
        *,
        min_scale: float = 1e-3,
        gate_bias: float = -2.0,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.context_dim = context_dim
        self.min_scale = min_scale
        # Both hidden layers read the same input: one matrix product.
        self.hidden = nn.Linear(latent_dim + context_dim, 2 * hidden_dim)
        self.gate = nn.Linear(hidden_dim, latent_dim)
        self.proposed = nn.Linear(hidden_dim, latent_dim)
        self.linear = nn.Linear(latent_dim + context_dim, latent_dim)
        self.scale = nn.Linear(latent_dim, latent_dim)
        nn.init.constant_(self.gate.bias, gate_bias)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self,
        z: Float[Tensor, "*batch latent"],
        context: Float[Tensor, "*batch context"] | None = None,
    ) -> Normal:
        """Distribution of the next state given the present one, for any leading batch shape.

        The batch shape of the context broadcasts to that of `z`.
        """
        given = 0 if context is None else context.shape[-1]
        if given != self.context_dim:
            raise ValueError(
                f"the transition was built for a context of length {self.context_dim}, got one of "
                f"length {given}"
            )
        if context is not None and self.context_dim:
            z = torch.cat([z, context.expand(*z.shape[:-1], self.context_dim)], -1)
        for_gate, for_proposed = F.relu(self.hidden(z)).chunk(2, -1)
        gate = torch.sigmoid(self.gate(for_gate))
        proposed = self.proposed(for_proposed)
        loc = torch.lerp(self.linear(z), proposed, gate)
        scale = F.softplus(self.scale(F.relu(proposed))) + self.min_scale
        # A non-finite parameter is the training loop's to report, with the series that caused it.
        return Normal(loc, scale, validate_args=False)
