"""Z-Forcing: a stochastic recurrent network whose random states are made to tell of the future."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution

from seqdgm.models._deep import DeepModel
from seqdgm.nn import distributions as dist
from seqdgm.nn.deferred import LoopLinear
from seqdgm.nn.gates import GatedCell, GaussianLayer, Networks
from seqdgm.types import Batch, Inputs, Steer, Unrolled

Cell = tuple[Tensor, ...]


class Memory(NamedTuple):
    """The cell before z, and what the previous observation adds to the gates and to the prior."""

    cell: Cell
    gates: Float[Tensor, "*batch gates"]
    hidden: Float[Tensor, "*batch hidden"]


class ZForcing(DeepModel):
    r"""Z-Forcing: the memory reads z, and z is trained to tell what a backward network has read.

    .. math::

        z_t &\sim N(\mu(h_{t-1}, x_{t-1}, u_t), \sigma(h_{t-1}, x_{t-1}, u_t)) \\
        h_t &= \mathrm{LSTM}(h_{t-1}, x_{t-1}, z_t, u_t) \\
        x_t &\sim p(x_t \mid h_t)

    The inference network is :math:`q(z_t \mid h_{t-1}, b_t)` with :math:`b_t` the state of a
    recurrent network that reads :math:`x_{t:T}` backwards. Training adds to the bound

    .. math:: \alpha \sum_t \log p_\xi(b_t \mid z_t),

    a Gaussian whose gradient does not reach :math:`b_t`, so that z cannot be left unused.
    Likelihoods never contain it.

    Parameters
    ----------
    latent_dim : int
        Width of z.
    hidden_dim : int
        Units of the recurrent cell and of the hidden layers of the prior and the emission.
    encoder_dim : int
        Units of the inference network.
    emission : str
        Observation model; see `RNN`.
    cell : {"lstm", "gru"}
        The recurrent cell; the paper's is an LSTM.
    auxiliary_weight : float
        The weight :math:`\alpha` of the auxiliary cost, at least 0.
    inference_network : {"mean-field", "filtering", "smoothing", "bidirectional"}
        Which observations :math:`b_t` reads: the present one, all up to it, from it on (the
        paper's), or all.
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
    >>> from seqdgm.models.zforcing import ZForcing
    >>> y = np.sin(np.arange(40) / 3.0)
    >>> model = ZForcing(latent_dim=2, hidden_dim=8, encoder_dim=8, max_epochs=3).fit(y, seed=0)
    >>> model.log_prob(n_particles=100, seed=1).kind
    'estimate'

    References
    ----------
    Goyal, Sordoni, Côté, Ke and Bengio (2017), Z-Forcing: training stochastic recurrent networks,
    NIPS, section 3.
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
        auxiliary_weight: float = 0.005,
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
        if not auxiliary_weight >= 0:
            raise ValueError(f"auxiliary_weight={auxiliary_weight!r} must be at least 0")
        self.latent_dim, self.hidden_dim, self.encoder_dim = latent_dim, hidden_dim, encoder_dim
        self.cell: Literal["lstm", "gru"] = cell
        self.auxiliary_weight = auxiliary_weight
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
        known_dim, width = self.known_dim(input_dim), self.hidden_dim
        self.recurrence = GatedCell(self.cell, width)
        gate_dim = self.recurrence.gate_dim
        self.head = self.make_head(width, obs_dim, **options)
        # One product feeds the gates and the hidden layer of the prior.
        self.read_x = nn.Linear(self.head.encoded_dim, gate_dim + width)
        self.read_u = nn.Linear(known_dim, gate_dim + width, bias=False) if known_dim else None
        self.gates_z = LoopLinear(self.latent_dim, gate_dim, bias=False)
        self.prior_memory = nn.Linear(width, width, bias=False)
        self.prior_law = GaussianLayer(width, self.latent_dim)
        self.emission_hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.encoder = self.make_encoder(
            self.inference_network, self.encoder_dim, obs_dim, known_dim
        )
        self.proposal_context = nn.Linear(self.encoder.context_dim, self.encoder_dim)
        self.proposal_memory = LoopLinear(width, self.encoder_dim, bias=False)
        self.proposal_law = GaussianLayer(self.encoder_dim, self.latent_dim)
        self.auxiliary_hidden = nn.Linear(self.latent_dim, width)
        # Without a floor the density of a summary that hardly varies would outgrow the bound.
        self.auxiliary_law = GaussianLayer(width, self.encoder.context_dim, min_scale=0.1)

    def start(self, batch_shape: tuple[int, ...]) -> Cell:
        """Learned memory before the first step."""
        return self.recurrence.initial_state(batch_shape)

    def embed(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch read"]:
        """What the observation adds to the gates and to the hidden layer of the prior."""
        return self.read_x(super().embed(x))

    def advance(self, s: Cell, x: Tensor | None, u: Inputs) -> Memory:
        """Set the memory beside what is known of the step."""
        assert x is not None
        read = x if self.read_u is None else x + self.read_u(self.known(u))
        gate_dim = self.recurrence.gate_dim
        return Memory(s, read[..., :gate_dim], read[..., gate_dim:])

    def prior(self, h: Memory, u: Inputs) -> Distribution:
        """Gaussian given the memory and the previous observation."""
        return self.prior_law(h.hidden + self.prior_memory(h.cell[0]))

    def absorb(self, h: Memory, z: Tensor | None) -> Cell:
        """One step of the cell."""
        assert z is not None
        return self.recurrence(h.gates + self.gates_z(z), h.cell)

    def emission(self, s: Cell, u: Inputs) -> Distribution:
        """Observation given the memory."""
        return self.emit(self.emission_hidden(s[0]))

    def encode(self, batch: Batch) -> Float[Tensor, "series time context"]:
        """The summaries, and what they add to the hidden layer of the inference network."""
        known = self.known(batch.inputs_all())
        x = self.head.encode(batch.x, batch.mask)
        summary = self.encoder(x, batch.mask, known, batch.lengths)
        return torch.cat([summary, self.proposal_context(summary)], -1)

    def proposal(self, h: Memory, c: Tensor, u: Inputs) -> Distribution:
        """Gaussian given the memory and the summary."""
        hidden = c[..., self.encoder.context_dim :] + self.proposal_memory(h.cell[0])
        return self.proposal_law(hidden)

    def unroll(
        self,
        s: Cell,
        x: Tensor | None,
        c: Float[Tensor, "series time context"],
        u: Inputs,
        lengths: Int[Tensor, "series"],
        generator: torch.Generator,
        steer: Steer | None = None,
    ) -> Unrolled:
        """The cell and the inference network at once."""
        assert x is not None
        h, copies = self.advance(s, x, u), len(s[0]) // len(c)
        networks = Networks(self.proposal_memory, self.proposal_law, self.gates_z.weight)
        read = c[..., self.encoder.context_dim :]

        def chosen(t: int, rows: Tensor, cell: Cell, z: Tensor, *drawn: Tensor) -> Tensor | None:
            assert steer is not None
            given = (x[:, t].index_select(0, rows // copies) for x in (h.gates, h.hidden))
            here = Memory(cell, *given)
            return steer(t, rows, here, self.absorb(here, z), *drawn)

        found = self.recurrence.unroll(
            s, None, h.gates, read, networks, lengths, generator, None if steer is None else chosen
        )
        if found.rows is None:
            return found._replace(h=Memory(found.h, h.gates, h.hidden))
        place = found.rows.shared(copies)
        given = (x.flatten(0, 1).index_select(0, place) for x in (h.gates, h.hidden))
        return found._replace(h=Memory(found.h, *given))

    def auxiliary(self, h: Memory, z: Tensor, c: Tensor, u: Inputs) -> Float[Tensor, "*batch"]:
        """Weighted log-density of the summaries given z, without a gradient to the summaries."""
        law = self.auxiliary_law(self.auxiliary_hidden(z))
        summary = c[..., : self.encoder.context_dim].detach()
        return self.auxiliary_weight * dist.log_prob(law, summary)
