"""The deep Markov model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution

from seqdgm.models._deep import DeepModel, two_layers
from seqdgm.nn import GatedTransition, GaussianProposal
from seqdgm.nn.recurrent import Kind
from seqdgm.types import Batch, Inputs, Steer, Unrolled


class State(NamedTuple):
    """z, and the embedded previous observation."""

    z: Float[Tensor, "*batch state"]
    x: Float[Tensor, "*batch features"]


class DMM(DeepModel):
    r"""Deep Markov model: a nonlinear state-space model with networks as transition and emission.

    .. math::

        z_t &\sim N(\mu(z_{t-1}, u_t), \sigma(z_{t-1}, u_t)), \quad z_0 \text{ learned} \\
        x_t &\sim p(x_t \mid z_t, u_t)

    With `feedback` both read the previous observation too, :math:`\mu(z_{t-1}, x_{t-1}, u_t)` and
    :math:`p(x_t \mid z_t, x_{t-1}, u_t)` (the paper's "DMM-Aug").

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
    feedback : bool
        Whether transition and emission read the previous observation.
    inference_network : {"smoothing", "mean-field", "filtering", "bidirectional"}
        Which observations the inference network reads besides the previous state: those from the
        present on (the paper's), the present one, all up to it, or all.
    emission_options : dict, optional
        Options of the emission head, such as ``{"rank": 3}`` of ``"gaussian-lowrank"``.
    dropout : float
        Rate at which training leaves out fed-back observations, features of the emission, and what
        the inference network reads and says; see `seqdgm.nn.dropout`.
    layer_norm : bool
        Whether the features of the emission and the inference network's summaries are normalised.
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
    learners: ClassVar[Mapping[str, str]] = {
        "elbo": "gradient",
        "iwae": "gradient",
        "fivo": "gradient",
        "rws": "gradient",
    }

    def __init__(
        self,
        latent_dim: int = 8,
        hidden_dim: int = 32,
        encoder_dim: int = 32,
        emission: str = "gaussian",
        *,
        encoder_cell: Kind = "gru",
        feedback: bool = False,
        inference_network: str = "smoothing",
        emission_options: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        layer_norm: bool = False,
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
        self.feedback, self.inference_network = feedback, inference_network
        self.set_common(
            emission,
            season,
            transform,
            scale,
            emission_options=emission_options,
            dropout=dropout,
            layer_norm=layer_norm,
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
        self.head = self.make_head(self.hidden_dim, obs_dim, **options)
        given = known_dim + (self.head.encoded_dim if self.feedback else 0)
        self.gated = GatedTransition(self.latent_dim, self.hidden_dim, given)
        self.features = two_layers(self.latent_dim + given, self.hidden_dim)
        self.encoder = self.make_encoder(
            self.inference_network, self.encoder_dim, obs_dim, known_dim, self.encoder_cell
        )
        self.combiner = GaussianProposal(
            self.latent_dim, self.encoder.context_dim, self.encoder_dim
        )

    def start(self, batch_shape: tuple[int, ...]) -> Float[Tensor, "*batch state"]:
        """Learned state before the first step."""
        return self.z0.expand(*batch_shape, self.latent_dim)

    @property
    def markov(self) -> bool:
        """Whether z alone is the state."""
        return not self.feedback

    @property
    def memoryless(self) -> bool:
        """As `markov`: with feedback the emission reads two observations."""
        return not self.feedback

    def advance(self, s: Tensor | State, x: Tensor | None, u: Inputs) -> Tensor | State:
        """The last state, and the last observation where that is fed back."""
        z = s if isinstance(s, Tensor) else s.z
        return z if x is None else State(z, x)

    def transition(self, z: Tensor | State, u: Inputs) -> Distribution:
        """Gated Gaussian transition."""
        return self.gated(*self._read(z, u))

    def prior(self, h: Tensor | State, u: Inputs) -> Distribution:
        """The transition."""
        return self.transition(h, u)

    def absorb(self, h: Tensor | State, z: Tensor | None) -> Tensor | State:
        """The new state, beside the last observation where that is fed back."""
        assert z is not None
        return z if isinstance(h, Tensor) else State(z, h.x)

    def emission(self, s: Tensor | State, u: Inputs) -> Distribution:
        """Observation given the state."""
        z, given = self._read(s, u)
        return self.emit(self.features(z if given is None else torch.cat([z, given], -1)))

    def _read(self, s: Tensor | State, u: Inputs) -> tuple[Tensor, Tensor | None]:
        """z, and what transition and emission read besides."""
        z = s if isinstance(s, Tensor) else s.z
        parts = [self.known(u)] if isinstance(s, Tensor) else [s.x, self.known(u)]
        wide = [part.expand(*z.shape[:-1], part.shape[-1]) for part in parts if part.shape[-1]]
        return z, torch.cat(wide, -1) if wide else None

    def encode(self, batch: Batch) -> Float[Tensor, "series time context"]:
        """Summaries of the present and the future of each step."""
        known = self.known(batch.inputs_all())
        x = self.head.encode(batch.x, batch.mask)
        return self.encoder(x, batch.mask, known, batch.lengths)

    def proposal(self, h: Tensor | State, c: Tensor, u: Inputs) -> Distribution:
        """Combine the previous state with the summary."""
        return self.combiner(c, h if isinstance(h, Tensor) else h.z)

    def unroll(
        self,
        s: Float[Tensor, "series state"],
        x: Tensor | None,
        c: Tensor,
        u: Inputs,
        lengths: Int[Tensor, "series"],
        generator: torch.Generator,
        steer: Steer | None = None,
    ) -> Unrolled | None:
        """All steps of the combiner at once."""
        if steer is not None:
            return None
        proposal, z = self.combiner.unroll(c, s, lengths, generator)
        before = torch.cat([s[:, None], z[:, :-1]], 1)
        return Unrolled(self.advance(before, x, u), z, proposal)
