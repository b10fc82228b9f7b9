"""What the emission heads share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributions import Distribution

from seqdgm.nn.joint import JointDistribution


def inverse_softplus(y: np.ndarray) -> np.ndarray:
    """Number whose softplus is y."""
    return y + np.log(-np.expm1(-y))


def raw_scale(scale: np.ndarray, floor: float) -> np.ndarray:
    """Number whose softplus plus the floor is the scale, which is kept clear of the floor."""
    return inverse_softplus(np.maximum(scale - floor, floor))


class Head(nn.Module):
    """Base of the emission heads: one linear layer, then a family of distributions.

    Parameters
    ----------
    in_dim : int
        Length of the features.
    obs_dim : int
        Number of columns of x.
    n_parameters : int
        Unconstrained numbers that the family needs for a vector.

    Attributes
    ----------
    real_valued : bool
        Whether the data may be scaled and shifted.
    law : type of JointDistribution, or None
        Family whose vectors miss only so many elements, where it is one.
    encoded_dim : int
        Length of :meth:`encode`'s result.
    """

    real_valued: ClassVar[bool] = True
    law: ClassVar[type[JointDistribution] | None] = None
    needs: ClassVar[str] = ""
    remedy: ClassVar[str] = ""

    def __init__(self, in_dim: int, obs_dim: int, n_parameters: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.obs_dim = obs_dim
        self.encoded_dim = obs_dim
        self.linear = nn.Linear(in_dim, n_parameters)

    def forward(self, features: Float[Tensor, "*batch in_dim"]) -> Distribution:
        """Distribution of x over vectors of length `obs_dim`."""
        raise NotImplementedError

    def initialise_bias(self, values: Float[np.ndarray, "series time dim"]) -> None:
        """Start from the marginal distribution of the data, whatever the features.

        Parameters
        ----------
        values : array of shape (series, time, dim)
            Training data in the units that the head works in; NaN where missing. A column without
            values keeps its start.
        """
        raise NotImplementedError

    def encode(
        self, x: Float[Tensor, "*batch dim"], mask: Bool[Tensor, "*batch dim"] | None = None
    ) -> Float[Tensor, "*batch encoded"]:
        """Observations as networks should read them, 0 where missing.

        Real and binary values as they are, counts as log(1 + x), categories one-hot, grouped by
        column.
        """
        if mask is None:
            return self._code(x)
        seen = mask.repeat_interleave(self.encoded_dim // self.obs_dim, -1)
        return torch.where(seen, self._code(torch.where(mask, x, 0.0)), 0.0)

    def _code(self, x: Tensor) -> Tensor:
        return x

    def validate(
        self,
        values: Float[np.ndarray, "series time dim"],
        ids: Sequence[Hashable],
        columns: Sequence[str],
        index: Sequence[pd.Index],
    ) -> None:
        """Check that the observed values can occur under this family.

        Parameters
        ----------
        values : array of shape (series, time, dim)
            NaN where missing.
        ids, columns, index
            Names of the series, of the columns, and the time stamps of each series.

        Raises
        ------
        ValueError
            Naming the first series, column and time stamp at fault, and a remedy.
        """
        with np.errstate(invalid="ignore"):
            faults = np.argwhere(np.isfinite(values) & ~self._possible(values))
        if faults.size:
            n, t, d = faults[0]
            raise ValueError(
                f"series {ids[n]!r}, column {columns[d]!r}, at {index[n][t]}: the value "
                f"{values[n, t, d]:g} cannot occur under this emission, which needs "
                f"{self.needs.format(self=self)}; {self.remedy.format(self=self)}"
            )

    def check_missing(
        self,
        mask: Bool[np.ndarray, "series time dim"],
        ids: Sequence[Hashable],
        index: Sequence[pd.Index],
    ) -> None:
        """Check that no vector misses more elements than the family can integrate out.

        Raises
        ------
        ValueError
            Naming the first series and time stamp at fault, and a remedy.
        """
        if self.law is None:
            return
        seen = torch.from_numpy(mask.copy())
        partly = seen.any(-1) & ~seen.all(-1)
        many = self.law.hidden(seen.flatten(0, 1)).view(partly.shape) > self.law.max_hidden
        faults = torch.nonzero(partly & many).tolist()
        if faults:
            n, t = faults[0]
            raise ValueError(
                f"series {ids[n]!r} at {index[n][t]}: {self.law.remedy(mask.shape[-1])}"
            )

    def _possible(self, values: np.ndarray) -> np.ndarray:
        return np.ones(values.shape, dtype=bool)
