"""The variational recurrent neural network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution

from seqdgm.models._deep import DeepModel, two_layers
from seqdgm.nn.deferred import LoopLinear
from seqdgm.nn.gates import GatedCell, GaussianLayer, Networks
from seqdgm.types import Batch, Inputs, Steer, Unrolled

Cell = tuple[Tensor, ...]


class State(NamedTuple):
    """State of the recurrent cell, and the features of z."""

    cell: Cell
    features: Float[Tensor, "*batch features"]


class VRNN(DeepModel):
    r"""Variational recurrent neural network: a memory that reads observations and random states.

    .. math::

        h_t &= \mathrm{RNN}(h_{t-1}, \varphi_x(x_{t-1}), \varphi_z(z_{t-1}), u_t) \\
        z_t &\sim N(\mu(h_t), \sigma(h_t)) \\
        x_t &\sim p(x_t \mid h_t, \varphi_z(z_t))

    Here :math:`h_t` is the paper's :math:`h_{t-1}`: what is remembered before step t. The inference
    network is the paper's filter :math:`q(z_t \mid h_t, x_t)`; its features of :math:`x_t` are its
    own, because it reads besides which values were observed.

    Parameters
    ----------
    latent_dim : int
        Width of z.
    hidden_dim : int
        Units of the recurrent cell.
    encoder_dim : int
        Units of the inference network's hidden layer, and of its recurrent network if it has one.
    emission : str
        Observation model; see `RNN`.
    cell : {"lstm", "gru"}
        The recurrent cell; the paper's is an LSTM.
    feature_dim : int, optional
        Units of the features, also of those of the present observation that the paper's inference
        network reads, and of the hidden layers of the prior and the emission; `hidden_dim` by
        default.
    inference_network : {"mean-field", "filtering", "smoothing", "bidirectional"}
        Which observations the inference network reads besides those in the memory: the present
        one, all up to it, from it on, or all.
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
    >>> import numpy as np
    >>> from seqdgm.models.vrnn import VRNN
    >>> y = np.sin(np.arange(40) / 3.0)
    >>> model = VRNN(latent_dim=2, hidden_dim=8, encoder_dim=8, max_epochs=3).fit(y, seed=0)
    >>> model.forecast(3, n_samples=50, seed=1).mean.shape
    (1, 3, 1)

    References
    ----------
    Chung, Kastner, Dinh, Goel, Courville and Bengio (2015), A recurrent latent variable model for
    sequential data, NIPS, equations 5-10.
    """

    engines: ClassVar[tuple[str, ...]] = ("particle", "variational")
    learners: ClassVar[Mapping[str, str]] = {
        "elbo": "gradient",
        "iwae": "gradient",
        "fivo": "gradient",
        "rws": "gradient",
    }
    feedback = True

    def __init__(
        self,
        latent_dim: int = 8,
        hidden_dim: int = 32,
        encoder_dim: int = 32,
        emission: str = "gaussian",
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        feature_dim: int | None = None,
        inference_network: str = "mean-field",
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
        self.feature_dim = feature_dim
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
        known_dim, width = self.known_dim(input_dim), self.feature_dim or self.hidden_dim
        self.recurrence = GatedCell(self.cell, self.hidden_dim)
        gate_dim = self.recurrence.gate_dim
        self.head = self.make_head(width, obs_dim, **options)
        self.z0 = nn.Parameter(torch.zeros(self.latent_dim))
        self.features_x = two_layers(self.head.encoded_dim, width)
        self.features_z = nn.Sequential(LoopLinear(self.latent_dim, width), nn.ReLU())
        self.gates_x = nn.Linear(width, gate_dim)
        self.gates_z = LoopLinear(width, gate_dim, bias=False)
        self.gates_u = nn.Linear(known_dim, gate_dim, bias=False) if known_dim else None
        self.prior_hidden = nn.Linear(self.hidden_dim, width)
        self.prior_law = GaussianLayer(width, self.latent_dim)
        self.emission_hidden = two_layers(self.hidden_dim + width, width)
        # Without a memory of its own, it has features of x_t, as wide as those of the model.
        own = width if self.inference_network == "mean-field" else self.encoder_dim
        self.encoder = self.make_encoder(self.inference_network, own, obs_dim, known_dim)
        self.proposal_context = nn.Linear(self.encoder.context_dim, self.encoder_dim)
        self.proposal_memory = LoopLinear(self.hidden_dim, self.encoder_dim, bias=False)
        self.proposal_law = GaussianLayer(self.encoder_dim, self.latent_dim)

    def start(self, batch_shape: tuple[int, ...]) -> State:
        """Learned memory and state before the first step."""
        z = self.z0.expand(*batch_shape, self.latent_dim)
        return State(self.recurrence.initial_state(batch_shape), self.features_z(z))

    def embed(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch gates"]:
        """What the features of the observation add to the gates."""
        return self.gates_x(self.features_x(super().embed(x)))

    def advance(self, s: State, x: Tensor | None, u: Inputs) -> Cell:
        """One step of the cell."""
        assert x is not None
        return self.recurrence(self._given(x, u) + self.gates_z(s.features), s.cell)

    def _given(self, x: Tensor, u: Inputs) -> Float[Tensor, "*batch gates"]:
        """What the gates read besides the memory and z."""
        return x if self.gates_u is None else x + self.gates_u(self.known(u))

    def prior(self, h: Cell, u: Inputs) -> Distribution:
        """Gaussian given the memory."""
        return self.prior_law(self.prior_hidden(h[0]))

    def absorb(self, h: Cell, z: Tensor | None) -> State:
        """The memory and the features of z."""
        assert z is not None
        return State(h, self.features_z(z))

    def emission(self, s: State, u: Inputs) -> Distribution:
        """Observation given the memory and the features of z."""
        return self.emit(self.emission_hidden(torch.cat([s.cell[0], s.features], -1)))

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
        """The cell, the inference network and the features of z at once."""
        assert x is not None
        features = self.features_z[0]
        assert isinstance(features, nn.Linear)
        networks = Networks(self.proposal_memory, self.proposal_law, self.gates_z.weight, features)
        lead, given = self.gates_z(s.features), self._given(x, u)

        def chosen(t: int, rows: Tensor, h: Cell, read: Tensor, *drawn: Tensor) -> Tensor | None:
            assert steer is not None
            return steer(t, rows, h, State(h, read), *drawn)

        return self.recurrence.unroll(
            s.cell, lead, given, c, networks, lengths, generator, None if steer is None else chosen
        )
