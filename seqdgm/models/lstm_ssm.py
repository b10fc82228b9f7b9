"""The state-space LSTM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from seqdgm.models._deep import DeepModel, two_layers
from seqdgm.nn.deferred import LoopLinear
from seqdgm.nn.gates import GatedCell, GaussianLayer, Networks
from seqdgm.types import Batch, Inputs, Steer, Unrolled

Cell = tuple[Tensor, ...]


class State(NamedTuple):
    """State of the recurrent cell, and z."""

    cell: Cell
    z: Float[Tensor, "*batch state"]


class LSTMSSM(DeepModel):
    r"""State-space LSTM: a recurrent network remembers all past states, not only the last.

    .. math::

        h_t &= \mathrm{LSTM}(h_{t-1}, z_{t-1}, u_t) \\
        z_t &\sim N(\mu(h_t), \sigma(h_t)) \\
        x_t &\sim p(x_t \mid z_t, u_t)

    Observations never enter the memory: what is known of the past is in z alone. The inference
    network :math:`q(z_t \mid h_t, x_{t:T})` reads the memory and the present and the future.

    Parameters
    ----------
    latent_dim : int
        Width of z.
    hidden_dim : int
        Units of the recurrent cell and of the hidden layers of prior and emission.
    encoder_dim : int
        Units of the inference network.
    emission : str
        Observation model; see `RNN`.
    cell : {"lstm", "gru"}
        The recurrent cell; the paper's is an LSTM.
    inference_network : {"smoothing", "mean-field", "filtering", "bidirectional"}
        Which observations the inference network reads besides the memory: those from the present
        on, the present one, all up to it, or all.
    emission_options : dict, optional
        Options of the emission head, such as ``{"rank": 3}`` of ``"gaussian-lowrank"``.
    dropout : float
        Rate at which training leaves out features of the emission, and what the inference network
        reads and says; see `seqdgm.nn.dropout`.
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
    >>> import numpy as np
    >>> from seqdgm.models.lstm_ssm import LSTMSSM
    >>> y = np.sin(np.arange(40) / 3.0)
    >>> model = LSTMSSM(latent_dim=2, hidden_dim=8, encoder_dim=8, max_epochs=3).fit(y, seed=0)
    >>> model.smooth(n_particles=50, seed=1).mean.shape
    (1, 40, 2)

    References
    ----------
    Zheng, Zaheer, Ahmed, Wang, Xing and Smola (2017), State space LSTM models with particle MCMC
    inference, arXiv:1711.11179, the Gaussian model. The paper's emission is linear, here it is a
    network. Its learning draws the states by particle Gibbs, ``fit(method="particle-em")``; the
    default is the evidence lower bound.
    """

    engines: ClassVar[tuple[str, ...]] = ("particle", "variational")
    learners: ClassVar[Mapping[str, str]] = {
        "elbo": "gradient",
        "iwae": "gradient",
        "fivo": "gradient",
        "rws": "gradient",
        "particle-em": "particle-em-networks",
    }

    def __init__(
        self,
        latent_dim: int = 8,
        hidden_dim: int = 32,
        encoder_dim: int = 32,
        emission: str = "gaussian",
        *,
        cell: Literal["lstm", "gru"] = "lstm",
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
        if cell not in ("lstm", "gru"):
            raise ValueError(f"cell={cell!r} is unknown; choose 'lstm' or 'gru'")
        self.latent_dim, self.hidden_dim, self.encoder_dim = latent_dim, hidden_dim, encoder_dim
        self.cell: Literal["lstm", "gru"] = cell
        self.inference_network = inference_network
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
        self.head = self.make_head(self.hidden_dim, obs_dim, **options)
        self.z0 = nn.Parameter(torch.zeros(self.latent_dim))
        self.recurrence = GatedCell(self.cell, self.hidden_dim)
        self.gates = LoopLinear(self.latent_dim + known_dim, self.recurrence.gate_dim)
        self.prior_hidden = nn.Linear(self.hidden_dim, self.hidden_dim)
        self.prior_law = GaussianLayer(self.hidden_dim, self.latent_dim)
        self.features = two_layers(self.latent_dim + known_dim, self.hidden_dim)
        self.encoder = self.make_encoder(
            self.inference_network, self.encoder_dim, obs_dim, known_dim
        )
        self.proposal_context = nn.Linear(self.encoder.context_dim, self.encoder_dim)
        self.proposal_memory = LoopLinear(self.hidden_dim, self.encoder_dim, bias=False)
        self.proposal_law = GaussianLayer(self.encoder_dim, self.latent_dim)

    def start(self, batch_shape: tuple[int, ...]) -> State:
        """Learned memory and state before the first step."""
        z = self.z0.expand(*batch_shape, self.latent_dim)
        return State(self.recurrence.initial_state(batch_shape), z)

    def advance(self, s: State, x: Tensor | None, u: Inputs) -> Cell:
        """One step of the cell, which reads the last state."""
        return self.recurrence(self.gates(self.with_known(s.z, u)), s.cell)

    def prior(self, h: Cell, u: Inputs) -> Distribution:
        """Gaussian given the memory."""
        return self.prior_law(self.prior_hidden(h[0]))

    def absorb(self, h: Cell, z: Tensor | None) -> State:
        """The memory and z."""
        assert z is not None
        return State(h, z)

    def emission(self, s: State, u: Inputs) -> Distribution:
        """Observation given z."""
        return self.emit(self.features(self.with_known(s.z, u)))

    def encode(self, batch: Batch) -> Float[Tensor, "series time hidden"]:
        """What the inference network's summaries add to its hidden layer."""
        known = self.known(batch.inputs_all())
        x = self.head.encode(batch.x, batch.mask)
        return self.proposal_context(self.encoder(x, batch.mask, known, batch.lengths))

    def proposal(self, h: Cell, c: Tensor, u: Inputs) -> Distribution:
        """Gaussian given the memory and the summary."""
        return self.proposal_law(c + self.proposal_memory(h[0]))

    def unroll(
        self,
        s: State,
        x: Tensor | None,
        c: Float[Tensor, "series time context"],
        u: Inputs,
        lengths: Int[Tensor, "series"],
        generator: torch.Generator,
        steer: Steer | None = None,
    ) -> Unrolled:
        """The cell and the inference network at once."""
        of_z, of_known = self.gates.weight.tensor_split([self.latent_dim], 1)
        given = F.linear(self.known(u), of_known, self.gates.bias)
        networks = Networks(self.proposal_memory, self.proposal_law, of_z)
        lead = F.linear(s.z, of_z)

        def chosen(t: int, rows: Tensor, h: Cell, read: Tensor, *drawn: Tensor) -> Tensor | None:
            assert steer is not None
            return steer(t, rows, h, State(h, read), *drawn)

        return self.recurrence.unroll(
            s.cell, lead, given, c, networks, lengths, generator, None if steer is None else chosen
        )
