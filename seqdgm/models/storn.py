"""The stochastic recurrent network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution, Normal

from seqdgm.models._deep import DeepModel
from seqdgm.nn import GaussianProposal, RecurrentCell, distributions
from seqdgm.types import Batch, Inputs, Steer, Unrolled


class Memory(NamedTuple):
    """What the cell reads besides z, and its state before the step."""

    read: Float[Tensor, "*batch features"]
    cell: tuple[Tensor, ...]


class State(NamedTuple):
    """Output of the top layer, and the state of the cell (None where it ran fused)."""

    output: Float[Tensor, "*batch hidden"]
    cell: tuple[Tensor, ...] | None


class STORN(DeepModel):
    r"""Stochastic recurrent network: a recurrent network that reads independent noise.

    .. math::

        z_t &\sim N(0, I) \\
        h_t &= \mathrm{RNN}(h_{t-1}, x_{t-1}, z_t, u_t) \\
        x_t &\sim p(x_t \mid h_t)

    The inference network is a recurrent network over the observations alone,
    :math:`q(z_t \mid x_{1:t})`. Neither it nor the prior sees :math:`h_t`: where nothing is
    missing, all z are drawn at once and the network runs fused over all steps.

    Parameters
    ----------
    latent_dim : int
        Width of z.
    hidden_dim : int
        Units of each recurrent layer.
    encoder_dim : int
        Units of the inference network.
    emission : str
        Observation model; see `RNN`.
    cell : {"lstm", "gru"}
        The recurrent cell; the paper's networks are without gates.
    layers : int
        Recurrent layers.
    inference_network : {"filtering", "mean-field", "smoothing", "bidirectional"}
        Which observations the inference network reads: all up to the present one (the paper's), it
        alone, all from it on, or all.
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
    >>> from seqdgm.models.storn import STORN
    >>> y = np.sin(np.arange(40) / 3.0)
    >>> model = STORN(latent_dim=2, hidden_dim=8, encoder_dim=8, max_epochs=3).fit(y, seed=0)
    >>> model.forecast(3, n_samples=50, seed=1).mean.shape
    (1, 3, 1)

    References
    ----------
    Bayer and Osendorfer (2014), Learning stochastic recurrent networks, arXiv:1411.7610, section 3.
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
        layers: int = 1,
        inference_network: str = "filtering",
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
        self.layers, self.inference_network = layers, inference_network
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
        width = self.head.encoded_dim + known_dim + self.latent_dim
        self.rnn = RecurrentCell(self.cell, width, self.hidden_dim, self.layers)
        self.encoder = self.make_encoder(
            self.inference_network, self.encoder_dim, obs_dim, known_dim
        )
        self.law = GaussianProposal(
            self.latent_dim, self.encoder.context_dim, self.encoder_dim, state_dim=0
        )

    def start(self, batch_shape: tuple[int, ...]) -> State:
        """Learned state before the first step."""
        cell = self.rnn.initial_state(batch_shape)
        return State(self.rnn.output(cell), cell)

    def advance(self, s: State, x: Tensor | None, u: Inputs) -> Memory:
        """What the cell will read beside z."""
        assert x is not None
        assert s.cell is not None
        return Memory(self.with_known(x, u), s.cell)

    def prior(self, h: Memory | State, u: Inputs) -> Normal:
        """Standard normal, whatever the memory."""
        zeros = u.values.new_zeros(self.latent_dim)
        return Normal(zeros, torch.ones_like(zeros), validate_args=False)

    def absorb(self, h: Memory | State, z: Tensor | None) -> State:
        """One step of the cell, unless it ran already."""
        if isinstance(h, State):
            return h
        assert z is not None
        read = h.read.expand(*z.shape[:-1], h.read.shape[-1])
        cell = self.rnn.step(torch.cat([read, z], -1), h.cell)
        return State(self.rnn.output(cell), cell)

    def emission(self, s: State, u: Inputs) -> Distribution:
        """Observation given the output of the network."""
        return self.emit(s.output)

    def encode(self, batch: Batch) -> Float[Tensor, "series time context"]:
        """Summaries of the observations."""
        known = self.known(batch.inputs_all())
        x = self.head.encode(batch.x, batch.mask)
        return self.encoder(x, batch.mask, known, batch.lengths)

    def proposal(self, h: Memory | State | None, c: Tensor, u: Inputs) -> Distribution:
        """Gaussian given the summary, whatever the memory."""
        return self.law(c)

    def unroll(
        self,
        s: State,
        x: Tensor | None,
        c: Tensor,
        u: Inputs,
        lengths: Int[Tensor, "series"],
        generator: torch.Generator,
        steer: Steer | None = None,
    ) -> Unrolled | None:
        """All draws, then all steps of the cell."""
        if steer is not None:
            return None
        assert x is not None
        proposal = self.law(c)
        z = distributions.sample(proposal, generator, reparameterised=True)
        read = torch.cat([self.with_known(x, u), z], -1)
        output = self.rnn.run(read, s.cell, lengths=lengths)
        return Unrolled(State(output, None), z, proposal)
