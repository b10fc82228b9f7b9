"""The deep Markov model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution

from seqdgm.models._deep import DeepModel, two_layers
from seqdgm.nn import GatedTransition, GaussianProposal, SmoothingEncoder
from seqdgm.nn.recurrent import Kind
from seqdgm.types import Batch, Inputs, Unrolled


class DMM(DeepModel):
    r"""Deep Markov model: a nonlinear state-space model with networks as transition and emission.

    .. math::

        z_t &\sim N(\mu(z_{t-1}, u_t), \sigma(z_{t-1}, u_t)), \quad z_0 \text{ learned} \\
        x_t &\sim p(x_t \mid z_t, u_t)

    The transition is gated between a linear and a nonlinear map and starts at the identity. The
    inference network reads the data backwards, :math:`q(z_t \mid z_{t-1}, x_{t:T})`; it is trained
    with the evidence lower bound (closed-form KL, warmed up) and serves as the proposal of the
    particle filter, so that the log-likelihood is estimated without the bound's gap.

    Parameters
    ----------
    latent_dim : int
        Width of z.
    hidden_dim : int
        Units of the transition's and the emission's hidden layers.
    encoder_dim : int
        Units of the inference network.
    encoder_cell : {"gru", "lstm", "tanh", "relu"}
        Its recurrent cell; the last two are simple networks with that activation.
    emission : str
        Observation model; see `RNN`.
    season : int, optional
        Season length in steps: the harmonics of the season (at most six), counted from each
        series' first step, join the known inputs.
    transform : {None, "log"}
        Function applied to the data first.
    scale : {"standard", "mean", None}
        Scaling of real-valued data; likelihoods stay in the data's own units.
    max_epochs, learning_rate, weight_decay, batch_size, patience, kl_warmup
        See `seqdgm.inference.training.TrainingOptions`.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> y = np.sin(np.arange(40) / 3.0)
    >>> model = sq.DMM(latent_dim=2, hidden_dim=8, encoder_dim=8, max_epochs=3).fit(y, seed=0)
    >>> model.log_prob(n_particles=100, seed=1).kind
    'estimate'

    References
    ----------
    Krishnan, Shalit and Sontag (2017), Structured inference networks for nonlinear state space
    models, AAAI, sections "Deep Markov Models" and "Structured Inference Networks".
    """

    engines: ClassVar[tuple[str, ...]] = ("particle", "variational")
    learners: ClassVar[Mapping[str, str]] = {"elbo": "gradient"}

    def __init__(
        self,
        latent_dim: int = 8,
        hidden_dim: int = 32,
        encoder_dim: int = 32,
        emission: str = "gaussian",
        *,
        encoder_cell: Kind = "gru",
        season: int | None = None,
        transform: str | None = None,
        scale: str | None = "standard",
        max_epochs: int = 300,
        learning_rate: float = 5e-3,
        weight_decay: float = 1e-4,
        batch_size: int = 32,
        patience: int = 60,
        kl_warmup: int = 40,
    ) -> None:
        super().__init__()
        self.latent_dim, self.hidden_dim, self.encoder_dim = latent_dim, hidden_dim, encoder_dim
        self.encoder_cell: Kind = encoder_cell
        self.set_common(
            emission,
            season,
            transform,
            scale,
            max_epochs=max_epochs,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            patience=patience,
            kl_warmup=kl_warmup,
        )

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Create the networks."""
        known_dim = self.known_dim(input_dim)
        self.z0 = nn.Parameter(torch.zeros(self.latent_dim))
        self.gated = GatedTransition(self.latent_dim, self.hidden_dim, known_dim)
        self.features = two_layers(self.latent_dim + known_dim, self.hidden_dim)
        self.head = self.make_head(self.hidden_dim, obs_dim, **options)
        self.encoder = SmoothingEncoder(
            self.head.encoded_dim,
            self.encoder_dim,
            self.encoder_cell,
            mask_dim=obs_dim,
            inputs_dim=known_dim,
        )
        self.combiner = GaussianProposal(
            self.latent_dim, self.encoder.context_dim, self.encoder_dim
        )

    def start(self, batch_shape: tuple[int, ...]) -> Float[Tensor, "*batch state"]:
        """Learned state before the first step."""
        return self.z0.expand(*batch_shape, self.latent_dim)

    def transition(self, z: Float[Tensor, "*batch state"], u: Inputs) -> Distribution:
        """Gated Gaussian transition."""
        known = self.known(u)
        return self.gated(z, known.expand(*z.shape[:-1], -1) if known.shape[-1] else None)

    def emission(self, s: Float[Tensor, "*batch state"], u: Inputs) -> Distribution:
        """Observation given the state."""
        return self.head(self.features(self.with_known(s, u)))

    def encode(self, batch: Batch) -> Float[Tensor, "series time context"]:
        """Summaries of the present and the future of each step."""
        known = self.known(batch.inputs_all())
        x = self.head.encode(batch.x, batch.mask)
        return self.encoder(x, batch.mask, known, batch.lengths)

    def proposal(self, h: Float[Tensor, "*batch state"], c: Tensor, u: Inputs) -> Distribution:
        """Combine the previous state with the summary."""
        return self.combiner(c, h)

    def unroll(
        self,
        s: Float[Tensor, "series state"],
        x: Tensor | None,
        c: Tensor,
        u: Inputs,
        lengths: Int[Tensor, "series"],
        generator: torch.Generator,
    ) -> Unrolled:
        """All steps of the combiner at once."""
        proposal, z = self.combiner.unroll(c, s, lengths, generator)
        return Unrolled(torch.cat([s[:, None], z[:, :-1]], 1), z, proposal)
