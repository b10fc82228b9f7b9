"""Recurrent networks trained under unbiased noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from seqdgm.models._deep import DeepModel
from seqdgm.models.rnn import Memory
from seqdgm.nn import RecurrentCell
from seqdgm.types import Inputs

EULER_GAMMA = 0.5772156649015329


class Noise(NamedTuple):
    """A family of noise: what is drawn, and how that is brought to mean 0 and variance 1.

    Both functions are also given the standard deviation that the noise will have in the network.
    """

    law: Callable[[Tensor, float], Distribution]
    standardise: Callable[[Tensor, float], Tensor]


def _uniform(zeros: Tensor, _: float) -> Distribution:
    return td.Uniform(zeros, zeros + 1, validate_args=False)


def _normal(zeros: Tensor, _: float) -> Distribution:
    return td.Normal(zeros, zeros + 1, validate_args=False)


def _laplace(zeros: Tensor, _: float) -> Distribution:
    return td.Laplace(zeros, zeros + 0.5**0.5, validate_args=False)


def _gamma(zeros: Tensor, scale: float) -> Distribution:
    # Of mean 1 and standard deviation `scale`, so that the factor 1 + scale * noise is positive.
    return td.Gamma(zeros + scale**-2, zeros + scale**-2, validate_args=False)


def _beta(zeros: Tensor, _: float) -> Distribution:
    return td.Beta(zeros + 2, zeros + 2, validate_args=False)


def _logit(z: Tensor) -> Tensor:
    return torch.logit(z, torch.finfo(z.dtype).eps)


def _bernoulli(z: Tensor, scale: float) -> Tensor:
    keep = 1 / (1 + scale**2)
    return ((z < keep).to(z.dtype) - keep) / math.sqrt(keep * (1 - keep))


def _gumbel(z: Tensor) -> Tensor:
    info = torch.finfo(z.dtype)
    return -torch.log(-torch.log(z.clamp(info.tiny, 1 - info.eps / 2)))


NOISES: dict[str, Noise] = {
    "gaussian": Noise(_normal, lambda z, _: z),
    "logistic": Noise(_uniform, lambda z, _: _logit(z) * (math.sqrt(3) / math.pi)),
    "laplace": Noise(_laplace, lambda z, _: z),
    "gamma": Noise(_gamma, lambda z, scale: (z - 1) / scale),
    "bernoulli": Noise(_uniform, _bernoulli),
    "gumbel": Noise(_uniform, lambda z, _: (_gumbel(z) - EULER_GAMMA) * (math.sqrt(6) / math.pi)),
    "beta": Noise(_beta, lambda z, _: (z - 0.5) * math.sqrt(20)),
    "chi-square": Noise(_normal, lambda z, _: (z.square() - 1) / math.sqrt(2)),
}


class Noisin(DeepModel):
    r"""Recurrent network with unbiased noise in its hidden state while it is trained.

    .. math::

        h_t = \mathrm{RNN}(s_{t-1}, x_{t-1}, u_t), \qquad
        s_t = h_t + \gamma \epsilon_t \;\text{ or }\; h_t \odot (1 + \gamma \epsilon_t), \qquad
        x_t \sim p(x_t \mid s_t)

    with :math:`E[\epsilon_t] = 0` and :math:`V[\epsilon_t] = 1`, so that
    :math:`E[s_t \mid h_t] = h_t`: given the past, the noise leaves the mean of the hidden state as
    it is ("weak" unbiasedness). The noisy state recurs. Training maximises
    :math:`E_\epsilon \sum_t \log p(x_t \mid s_t)`, a lower bound of the noisy network's marginal
    log-likelihood.

    All verbs but `fit` use the network without noise, as one does with dropout: `log_prob` is the
    exact log-likelihood of that network where nothing is missing (see `RNN` for what it is
    otherwise), and neither the training objective nor a bound of it. `filter` returns the hidden
    state.

    Parameters
    ----------
    cell : {"lstm", "gru"}
    hidden_dim : int
        Units of the cell.
    emission : str
        Observation model; see `RNN`.
    noise : str
        Family of the noise: ``"gaussian" "logistic" "laplace" "gamma" "bernoulli" "gumbel" "beta"
        "chi-square"``. Multiplicative ``"bernoulli"`` is dropout of the hidden state, with
        rate :math:`\gamma^2 / (1 + \gamma^2)`; ``"gamma"`` has shape :math:`1 / \gamma^2`, hence a
        positive factor; ``"beta"`` is Beta(2, 2); ``"chi-square"`` has one degree of freedom.
    noise_scale : float
        Standard deviation :math:`\gamma`.
    injection : {"multiplicative", "additive"}
        How the noise enters.
    emission_options : dict, optional
        Options of the emission head, such as ``{"rank": 3}`` of ``"gaussian-lowrank"``.
    dropout : float
        Rate at which training leaves out fed-back observations and features of the emission; see
        `seqdgm.nn.dropout`.
    layer_norm : bool
        Whether the features of the emission are normalised.
    season : int, optional
        Season length in steps: the harmonics of the season (at most six), counted from each
        series' first step, join the known inputs.
    transform : {None, "log"}
        Function applied to the data first.
    scale : {"standard", "mean", None}
        Scaling of real-valued data; likelihoods stay in the data's own units.
    max_epochs, learning_rate, weight_decay, batch_size, patience
        See `seqdgm.inference.training.TrainingOptions`.

    Examples
    --------
    >>> import numpy as np
    >>> from seqdgm.models.noisin import Noisin
    >>> y = np.sin(np.arange(60) / 3.0)
    >>> model = Noisin("gru", 8, noise="gamma", max_epochs=5).fit(y, seed=0)
    >>> model.log_prob().kind
    'exact'

    References
    ----------
    Dieng, Ranganath, Altosaar and Blei (2018), Noisin: unbiased regularization for recurrent neural
    networks, ICML, section "Noise-injected RNNs".
    """

    engines: ClassVar[tuple[str, ...]] = ("particle",)
    learners: ClassVar[Mapping[str, str]] = {"elbo": "gradient"}
    feedback = True

    def __init__(
        self,
        cell: Literal["lstm", "gru"] = "lstm",
        hidden_dim: int = 40,
        emission: str = "gaussian",
        *,
        noise: str = "gaussian",
        noise_scale: float = 0.5,
        injection: Literal["multiplicative", "additive"] = "multiplicative",
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
    ) -> None:
        super().__init__()
        if cell not in ("lstm", "gru"):
            raise ValueError(f"cell={cell!r} is unknown; choose 'lstm' or 'gru'")
        if noise not in NOISES:
            raise ValueError(f"noise={noise!r} is unknown; choose one of {list(NOISES)}")
        if not noise_scale > 0:
            raise ValueError(f"noise_scale={noise_scale!r} must be positive; see RNN for no noise")
        if injection not in ("multiplicative", "additive"):
            raise ValueError(
                f"injection={injection!r} is unknown; choose 'multiplicative' or 'additive'"
            )
        self.cell: Literal["lstm", "gru"] = cell
        self.hidden_dim = hidden_dim
        self.noise, self.noise_scale, self.injection = noise, noise_scale, injection
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
        )

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Create the cell and the head."""
        self.head = self.make_head(self.hidden_dim, obs_dim, **options)
        width = self.head.encoded_dim + self.known_dim(input_dim)
        self.rnn = RecurrentCell(self.cell, width, self.hidden_dim)

    def train(self, mode: bool = True) -> Noisin:
        """Switch the noise on or off: without it there is no latent state."""
        super().train(mode)
        self.latent_dim = self.hidden_dim if mode else 0
        return self

    def start(self, batch_shape: tuple[int, ...]) -> Memory:
        """Learned memory before the first step."""
        cell = self.rnn.initial_state(batch_shape)
        return Memory(self.rnn.output(cell), cell)

    def advance(self, s: Memory, x: Tensor | None, u: Inputs) -> Memory:
        """One step of the cell."""
        assert x is not None
        assert s.cell is not None
        cell = self.rnn.step(self.with_known(x, u), s.cell)
        return Memory(self.rnn.output(cell), cell)

    def memory(self, x: Tensor, u: Inputs) -> Memory:
        """All steps at once, without noise."""
        return Memory(self.rnn.run(self.with_known(x, u)), None)

    def prior(self, h: Memory, u: Inputs) -> Distribution | None:
        """What the noise is made of; None where there is none."""
        if not self.latent_dim:
            return None
        return NOISES[self.noise].law(u.values.new_zeros(self.latent_dim), self.noise_scale)

    def absorb(self, h: Memory, z: Tensor | None) -> Memory:
        """Put the noise into the output, of which the mean stays."""
        if z is None:
            return h
        assert h.cell is not None
        noise = self.noise_scale * NOISES[self.noise].standardise(z, self.noise_scale)
        noisy = h.output + (noise if self.injection == "additive" else h.output * noise)
        return Memory(noisy, (noisy[..., None, :], *h.cell[1:]))

    def emission(self, s: Memory, u: Inputs) -> Distribution:
        """Observation given the memory."""
        return self.emit(s.output)

    def report(self, h: Memory, z: Tensor | None) -> Float[Tensor, "*batch hidden"]:
        """The hidden state."""
        return h.output

    def state_names(self, dim: int) -> tuple[str, ...]:
        """Hidden units."""
        return tuple(f"h{k + 1}" for k in range(dim))
