"""The recurrent autoregressive model: no latent state, a memory of all past observations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.models._deep import DeepModel
from seqdgm.nn import RecurrentCell
from seqdgm.types import Inputs


class Memory(NamedTuple):
    """Output of the top layer, and the state of the cell (None where it ran fused)."""

    output: Float[Tensor, "*batch hidden"]
    cell: tuple[Tensor, ...] | None


class RNN(DeepModel):
    r"""Autoregressive recurrent network.

    .. math::

        h_t = \mathrm{RNN}(h_{t-1}, x_{t-1}, u_t), \quad x_t \sim p(x_t \mid h_t)

    The likelihood is exact where nothing is missing. Missing observations are drawn from the model
    itself (never zero-filled), which makes the likelihood an unbiased Monte-Carlo estimate and its
    training objective a lower bound. `filter` returns the hidden state; forecasts sample
    trajectories.

    Parameters
    ----------
    cell : {"lstm", "gru"}
    hidden_dim : int
        Units of each layer.
    layers : int
        Recurrent layers.
    emission : str
        Observation model. Of columns that are independent given the state: ``"gaussian" "studentt"
        "bernoulli" "categorical" "poisson" "negbinomial" "mixture"``; joint over the columns:
        ``"gaussian-full" "gaussian-lowrank" "nade"`` (binary) ``"flow"`` (real, two columns or
        more).
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
    >>> import numpy as np, seqdgm as sq
    >>> y = np.sin(np.arange(60) / 3.0)
    >>> model = sq.RNN(cell="gru", hidden_dim=8, max_epochs=5).fit(y, seed=0)
    >>> model.forecast(3, n_samples=50, seed=1).mean.shape
    (1, 3, 1)

    References
    ----------
    Graves (2013), Generating sequences with recurrent neural networks; Salinas et al. (2020),
    DeepAR, *International Journal of Forecasting* 36.
    """

    engines: ClassVar[tuple[str, ...]] = ("particle",)
    learners: ClassVar[Mapping[str, str]] = {"mle": "gradient"}
    feedback = True
    latent_dim = 0

    def __init__(
        self,
        cell: Literal["lstm", "gru"] = "lstm",
        hidden_dim: int = 40,
        layers: int = 1,
        emission: str = "gaussian",
        *,
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
        self.cell, self.hidden_dim, self.layers = cell, hidden_dim, layers
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
        self.rnn = RecurrentCell(self.cell, width, self.hidden_dim, self.layers)

    def start(self, batch_shape: tuple[int, ...]) -> Memory:
        """Learned memory before the first step."""
        state = self.rnn.initial_state(batch_shape)
        return Memory(self.rnn.output(state), state)

    def advance(self, s: Memory, x: Tensor | None, u: Inputs) -> Memory:
        """One step of the cell."""
        assert x is not None
        assert s.cell is not None
        state = self.rnn.step(self.with_known(x, u), s.cell)
        return Memory(self.rnn.output(state), state)

    def memory(self, x: Tensor, u: Inputs) -> Memory:
        """All steps at once."""
        return Memory(self.rnn.run(self.with_known(x, u)), None)

    def prior(self, h: Memory, u: Inputs) -> None:
        """There is no latent state."""
        return None

    def absorb(self, h: Memory, z: Tensor | None) -> Memory:
        """The memory is the state."""
        return h

    def emission(self, s: Memory, u: Inputs) -> Distribution:
        """Observation given the memory."""
        return self.emit(s.output)

    def report(self, h: Memory, z: Tensor | None) -> Float[Tensor, "*batch hidden"]:
        """The hidden state."""
        return h.output

    def state_names(self, dim: int) -> tuple[str, ...]:
        """Hidden units."""
        return tuple(f"h{k + 1}" for k in range(dim))
