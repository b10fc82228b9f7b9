"""What the deep models share: an emission head, scaled data and training settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from seqdgm.nn import (
    BidirectionalEncoder,
    Encoder,
    FilteringEncoder,
    Head,
    MeanFieldEncoder,
    SmoothingEncoder,
    emission_head,
    head_options_from_data,
)
from seqdgm.nn.dropout import Dropout, check_rate
from seqdgm.nn.heads import HEADS, check_head_options
from seqdgm.nn.recurrent import Kind
from seqdgm.panel import Panel
from seqdgm.recursion import StateSpaceModel
from seqdgm.transform import SCALES
from seqdgm.types import Inputs, check_count

_SIZES = ("latent_dim", "hidden_dim", "encoder_dim", "feature_dim", "layers")
MAX_HARMONICS = 6
INFERENCE_NETWORKS = ("mean-field", "filtering", "smoothing", "bidirectional")


class DeepModel(StateSpaceModel):
    """A state-space model made of networks; parameters are shared over the panel.

    Subclasses create their networks in `build` and call `make_head` there; their `emission` ends in
    `emit`.

    Dropout and layer normalisation act where a network is run over all steps at once: dropout on
    observations that are fed back (`embed`), on the features of the emission (`emit`), and on what
    the encoder reads and says (`make_encoder`); normalisation on the features of the emission and
    on the encoder's summaries.
    """

    dtype: ClassVar[torch.dtype] = torch.float32
    emission_name: str
    emission_options: dict[str, Any] | None
    dropout: float
    layer_norm: bool
    head: Head

    @property
    def ready(self) -> bool:
        """Networks need training."""
        return self.fit_report_ is not None

    def set_common(
        self,
        emission: str,
        season: int | None,
        transform: str | None,
        scale: str | None,
        *,
        emission_options: Mapping[str, Any] | None,
        dropout: float,
        layer_norm: bool,
        **training: float,
    ) -> None:
        """Store the hyperparameters that all deep models have; sizes must be there already."""
        for name in _SIZES:
            if vars(self).get(name) is not None:
                check_count(name, vars(self)[name])
                setattr(self, name, int(vars(self)[name]))  # torch takes neither 8.0 nor numpy's 8
        if emission not in HEADS:
            raise ValueError(f"unknown emission {emission!r}; choose one of {list(HEADS)}")
        check_head_options(emission, emission_options or {})
        check_rate(dropout)
        if transform is not None and not HEADS[emission].real_valued:
            raise ValueError(
                f"transform={transform!r} would take {emission!r} data off their support; use "
                "transform=None"
            )
        if season is not None and (int(season) != season or season < 2):
            raise ValueError(f"season={season!r} must be a whole number of steps, at least 2")
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} is unknown; choose one of {SCALES}")
        self.season = None if season is None else int(season)
        self.emission_name = emission
        self.emission_options = None
        if emission_options is not None:
            # torch's layers take no numpy numbers as their sizes.
            self.emission_options = {k: np.asarray(v).item() for k, v in emission_options.items()}
        self.dropout, self.layer_norm = dropout, layer_norm
        self.transform, self.scale = transform, scale
        for name, value in training.items():
            setattr(self, name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the hyperparameters; ``emission`` is the name of the head."""
        names = [n for n in self._parameter_names() if n != "emission"]
        return {"emission": self.emission_name} | {n: getattr(self, n) for n in names}

    def effective_scale(self) -> str | None:
        """Only real-valued data may be scaled."""
        return self.scale if HEADS[self.emission_name].real_valued else None

    def build_options(self, panel: Panel) -> dict[str, Any]:
        """What only the data can tell about the head, such as the number of categories."""
        return head_options_from_data(self.emission_name, panel.values)

    def make_head(self, in_dim: int, obs_dim: int, **options: Any) -> Head:
        """Emission head over features of width `in_dim`; options of the user's come first."""
        self.norm_features = nn.LayerNorm(in_dim) if self.layer_norm else nn.Identity()
        self.thin_features, self.thin_fed = Dropout(self.dropout), Dropout(self.dropout)
        chosen = options | (self.emission_options or {})
        return emission_head(self.emission_name, in_dim, obs_dim, **chosen)

    def emit(self, features: Float[Tensor, "*batch in_dim"]) -> Distribution:
        """Distribution of the observation given the features of a step."""
        return self.head(self.thin_features(self.norm_features(features)))

    def make_encoder(
        self,
        name: str,
        hidden_dim: int,
        obs_dim: int,
        known_dim: int,
        kind: Kind = "gru",
    ) -> Encoder:
        """Inference network by name, over observations as the head encodes them.

        Raises
        ------
        ValueError
            For an unknown name.
        """
        if name not in INFERENCE_NETWORKS:
            raise ValueError(
                f"inference_network={name!r} is unknown; choose one of {list(INFERENCE_NETWORKS)}"
            )
        width = self.head.encoded_dim
        common: dict[str, Any] = {
            "mask_dim": obs_dim,
            "inputs_dim": known_dim,
            "dropout": self.dropout,
            "layer_norm": self.layer_norm,
        }
        if name == "mean-field":
            return MeanFieldEncoder(width, hidden_dim, **common)
        recurrent = {
            "filtering": FilteringEncoder,
            "smoothing": SmoothingEncoder,
            "bidirectional": BidirectionalEncoder,
        }
        return recurrent[name](width, hidden_dim, kind, **common)

    def initialise(self, values: Float[np.ndarray, "series time dim"]) -> None:
        """Start the head at the marginal distribution of each column."""
        self.head.initialise_bias(values)

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError for values that the emission cannot produce."""
        super().check_data(panel)
        if not hasattr(self, "head"):
            return
        self.head.check_missing(panel.mask, panel.ids, panel.index)
        if self.transform is None:
            self.head.validate(panel.values, panel.ids, panel.columns, panel.index)

    def known_dim(self, input_dim: int) -> int:
        """Width of what `known` gives."""
        return input_dim + 2 * len(self._frequencies())

    def known(self, u: Inputs) -> Float[Tensor, "*batch known"]:
        """Known inputs, and the harmonics of the season where the model has one."""
        frequencies = self._frequencies()
        if not frequencies:
            return u.values
        angle = u.t[..., None] * u.values.new_tensor(frequencies)
        waves = torch.cat([angle.sin(), angle.cos()], -1)
        return torch.cat([u.values, waves.expand(*u.values.shape[:-1], -1)], -1)

    def with_known(self, x: Float[Tensor, "*batch features"], u: Inputs) -> Tensor:
        """Append to features what is known of the step."""
        known = self.known(u)
        return torch.cat([x, known.expand(*x.shape[:-1], -1)], -1) if known.shape[-1] else x

    def _frequencies(self) -> list[float]:
        if self.season is None:
            return []
        count = min(self.season // 2, MAX_HARMONICS)
        return [2 * math.pi * k / self.season for k in range(1, count + 1)]

    def embed(self, x: Float[Tensor, "*batch dim"]) -> Tensor:
        """Observations as the networks read them (counts in logs, categories one-hot)."""
        return self.thin_fed(self.head.encode(x))


def two_layers(in_dim: int, hidden_dim: int) -> nn.Sequential:
    """Two rectified layers."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU()
    )
