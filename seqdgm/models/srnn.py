"""The stochastic recurrent neural network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.nn import functional as F

from seqdgm.models._deep import DeepModel, two_layers
from seqdgm.nn import RecurrentCell
from seqdgm.nn.deferred import LoopLinear
from seqdgm.nn.fused_chain import draw_chain
from seqdgm.nn.gates import GaussianLayer
from seqdgm.nn.ragged import Ragged
from seqdgm.nn.recurrent import Kind
from seqdgm.types import Batch, Inputs, Steer, Unrolled


class Chain(NamedTuple):
    """The deterministic chain, and what it adds to the prior's hidden layer."""

    d: Float[Tensor, "*batch hidden"]
    hidden: Float[Tensor, "*batch hidden"]


class State(NamedTuple):
    """The deterministic chain and z."""

    d: Float[Tensor, "*batch hidden"]
    z: Float[Tensor, "*batch state"]


class Memory(NamedTuple):
    """The deterministic chain; with z at t - 1, all that enters the prior's hidden layer.

    `state` is what z at t - 1 adds to the hidden layer of the inference network, None where that
    ran already.
    """

    d: Float[Tensor, "*batch hidden"]
    hidden: Float[Tensor, "*batch hidden"]
    state: Float[Tensor, "*batch hidden"] | None


class SRNN(DeepModel):
    r"""Stochastic recurrent neural network: a state-space model on top of a recurrent one.

    .. math::

        d_t &= \mathrm{GRU}(d_{t-1}, x_{t-1}, u_t) \\
        z_t &\sim N(\mu(z_{t-1}, d_t), \sigma(z_{t-1}, d_t)) \\
        x_t &\sim p(x_t \mid z_t, d_t)

    The chain :math:`d_t` never sees z: where nothing is missing, all its steps are computed before
    those of z. The inference network is the paper's, with the residual mean ("Res_q"),

    .. math::

        a_t = \mathrm{GRU}(a_{t+1}, d_t, x_t), \qquad
        q(z_t \mid z_{t-1}, a_t) = N(\mu(z_{t-1}, d_t) + r(z_{t-1}, a_t), s(z_{t-1}, a_t)),

    with :math:`\mu` the mean of the prior. Where observations are missing, the backward network
    reads 0 in their place, the mask beside them, and a chain :math:`d_t` that read the same; in the
    model itself the chain reads draws.

    Parameters
    ----------
    latent_dim : int
        Width of z.
    hidden_dim : int
        Units of the chain and of the hidden layers, as well those of the prior and the emission as
        that of the inference network.
    encoder_dim : int
        Units of the inference network's chain :math:`a_t`.
    emission : str
        Observation model; see `RNN`.
    encoder_cell : {"gru", "lstm", "tanh", "relu"}
        Recurrent cell of the inference network; the paper's is a GRU.
    inference_network : {"mean-field", "filtering", "smoothing", "bidirectional"}
        Which steps' pairs of observation and chain the inference network reads: the present one,
        all up to it, from it on (the paper's), or all.
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
    >>> from seqdgm.models.srnn import SRNN
    >>> y = np.sin(np.arange(40) / 3.0)
    >>> model = SRNN(latent_dim=2, hidden_dim=8, encoder_dim=8, max_epochs=3).fit(y, seed=0)
    >>> model.smooth(n_particles=50, seed=1).mean.shape
    (1, 40, 2)

    References
    ----------
    Fraccaro, Sønderby, Paquet and Winther (2016), Sequential neural models with stochastic layers,
    NIPS, equations 1-4 and 6-12, section 3.
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
        encoder_cell: Kind = "gru",
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
        self.head = self.make_head(width, obs_dim, **options)
        self.z0 = nn.Parameter(torch.zeros(self.latent_dim))
        self.chain = RecurrentCell("gru", self.head.encoded_dim + known_dim, width)
        self.prior_chain = nn.Linear(width, width)
        # One product feeds the hidden layers of the prior and of the inference network.
        self.read_state = LoopLinear(self.latent_dim, 2 * width, bias=False)
        self.prior_law = GaussianLayer(width, self.latent_dim)
        self.emission_hidden = two_layers(width + self.latent_dim, width)
        self.encoder = self.make_encoder(
            self.inference_network, self.encoder_dim, obs_dim, known_dim + width, self.encoder_cell
        )
        self.proposal_context = nn.Linear(self.encoder.context_dim, width)
        self.proposal_law = GaussianLayer(width, self.latent_dim)

    def start(self, batch_shape: tuple[int, ...]) -> State:
        """Learned chain and state before the first step."""
        d = self.chain.output(self.chain.initial_state(batch_shape))
        return State(d, self.z0.expand(*batch_shape, self.latent_dim))

    def advance(self, s: State, x: Tensor | Chain | None, u: Inputs) -> Memory:
        """One step of the chain, unless it is given."""
        assert x is not None
        if isinstance(x, Tensor):
            state = self.chain.step(self.with_known(x, u), (s.d[..., None, :],))
            x = self._chain(self.chain.output(state))
        read = self.read_state(s.z)
        width = self.hidden_dim
        return Memory(x.d, x.hidden + read[..., :width], read[..., width:])

    def prior(self, h: Memory, u: Inputs) -> Normal:
        """Gaussian given the chain and the state before."""
        return self.prior_law(h.hidden)

    def absorb(self, h: Memory, z: Tensor | None) -> State:
        """The chain and z."""
        assert z is not None
        return State(h.d, z)

    def emission(self, s: State, u: Inputs) -> Distribution:
        """Observation given the chain and z."""
        return self.emit(self.emission_hidden(torch.cat([s.d, s.z], -1)))

    def encode(self, batch: Batch) -> Float[Tensor, "series time context"]:
        """The chain, and what the summaries add to the inference network's hidden layer."""
        known = batch.inputs_all()
        seen = self.head.encode(batch.x, batch.mask)
        before = self.head.encode(torch.zeros_like(batch.x[:, :1]))
        previous = self.thin_fed(torch.cat([before, seen[:, :-1]], 1))
        read = self.with_known(previous, known)
        chain = self._chain(self.chain.run(read, lengths=batch.lengths))
        reads = torch.cat([self.known(known), chain.d], -1)
        summary = self.encoder(seen, batch.mask, reads, batch.lengths)
        return torch.cat([*chain, self.proposal_context(summary)], -1)

    def backbone(self, c: Float[Tensor, "series time context"]) -> Chain:
        """The chain as it was encoded."""
        return Chain(*c.chunk(3, -1)[:2])

    def proposal(self, h: Memory, c: Tensor, u: Inputs) -> Distribution:
        """Gaussian around the mean of the prior."""
        assert h.state is not None
        prior = self.prior(h, u)
        found = self.proposal_law(c[..., -self.hidden_dim :] + h.state)
        return Normal(prior.loc + found.loc, found.scale, validate_args=False)

    def unroll(
        self,
        s: State,
        x: Tensor | Chain | None,
        c: Float[Tensor, "series time context"],
        u: Inputs,
        lengths: Int[Tensor, "series"],
        generator: torch.Generator,
        steer: Steer | None = None,
    ) -> Unrolled | None:
        """All steps of z at once: the hidden layers of prior and inference network as one."""
        if steer is not None:
            return None
        ragged, prior, found = Ragged.of(lengths, c.shape[1]), self.prior_law.out, self.proposal_law
        width = self.hidden_dim
        d, both = c.split([width, 2 * width], -1)
        fixed = ragged.pack(both)
        noise = torch.randn(
            (len(fixed), self.latent_dim), generator=generator, dtype=c.dtype, device=c.device
        )
        # The prior gives the inference network its mean alone.
        mean = F.pad(prior.weight[: self.latent_dim], (0, 0, 0, self.latent_dim))
        bias = F.pad(prior.bias[: self.latent_dim], (0, self.latent_dim))
        weights = (
            self.read_state.weight,
            torch.cat([mean, found.out.weight], 1),
            bias + found.out.bias,
        )
        path = draw_chain(fixed, s.z[ragged.order], noise, weights, ragged, found.min_scale)
        z = ragged.unpack(path.z)
        before = torch.cat([s.z[:, None], z[:, :-1]], 1)
        hidden = both[..., :width] + F.linear(before, self.read_state.weight[:width])
        law = Normal(ragged.unpack(path.loc), ragged.unpack(path.scale, 1.0), validate_args=False)
        return Unrolled(Memory(d, hidden, None), z, law)

    def _chain(self, d: Tensor) -> Chain:
        return Chain(d, self.prior_chain(d))
