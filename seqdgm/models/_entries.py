"""Free entries of a model's matrices as a row of parameters, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Place = tuple[str, tuple[int, ...]]


def _index(place: tuple[int, ...]) -> Any:
    """Index of one entry of every matrix along the first axis."""
    return (slice(None), *place)


def places(
    matrices: Mapping[str, Float[Tensor, "fits ..."]],
    covariances: Sequence[str],
    diagonal: Sequence[str] = (),
) -> list[Place]:
    """Free entries: all of a matrix, a lower triangle of a covariance, or its diagonal.

    Examples
    --------
    >>> import torch
    >>> places({"Q": torch.eye(2)[None]}, ("Q",))
    [('Q', (0, 0)), ('Q', (1, 0)), ('Q', (1, 1))]
    """
    out = []
    for name, value in matrices.items():
        for place in np.ndindex(*value.shape[1:]):
            upper = name in covariances and place[1] > place[0]
            off = name in diagonal and place[1] != place[0]
            if not (upper or off):
                out.append((name, place))
    return out


def read(
    matrices: Mapping[str, Float[Tensor, "fits ..."]], at: Sequence[Place]
) -> Float[np.ndarray, "fits entries"]:
    """Values of the entries."""
    columns = [matrices[name][_index(place)].numpy() for name, place in at]
    return np.stack(columns, 1)


def write(
    matrices: Mapping[str, Float[Tensor, "rows ..."]],
    at: Sequence[Place],
    values: Float[np.ndarray, "rows entries"],
    covariances: Sequence[str],
) -> dict[str, Float[Tensor, "rows ..."]]:
    """Copies of the matrices with the entries replaced, those of a covariance on both sides."""
    out = {
        name: value.expand(len(values), *value.shape[1:]).clone()
        for name, value in matrices.items()
    }
    for k, (name, place) in enumerate(at):
        column = torch.from_numpy(values[:, k].copy())
        out[name][_index(place)] = column
        if name in covariances:
            out[name][_index(place[::-1])] = column
    return out


def definite(
    matrices: Mapping[str, Float[Tensor, "rows ..."]], covariances: Sequence[str]
) -> Bool[np.ndarray, "rows"]:
    """Whether all covariances are positive definite."""
    found = [
        np.linalg.eigvalsh(matrices[name].numpy())[:, 0] > 0
        for name in covariances
        if name in matrices
    ]
    return np.logical_and.reduce(found) if found else np.array(True)
