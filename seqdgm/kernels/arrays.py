"""Between tensors and the bare arrays that compiled loops read and write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqdgm.kernels.types import System


def as_array(tensor: Tensor, shared: int = -1) -> Any:
    """A contiguous array over the tensor's memory; axes up to `shared` may be expanded ones."""
    array = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    if array.flags.c_contiguous:
        return array
    for axis in range(shared + 1):
        if array.strides[axis] == 0:
            array = array[:1] if axis == 0 else array[:, :1]
    return np.ascontiguousarray(array)


def as_tensor(array: np.ndarray) -> Tensor | None:
    """A tensor over the array's memory; None for what was not kept."""
    return torch.from_numpy(array) if len(array) else None


def system_arrays(system: System) -> tuple[Any, int]:
    """The system as contiguous arrays, and the largest possible rank of a Pinf."""
    fields = [
        # What most fields are, without a call for each: this is half the time of a short series.
        field.numpy()
        if field.is_contiguous() and not field.requires_grad
        else as_array(field, 1 if k < 6 else 0)
        for k, field in enumerate(system)
    ]
    arrays = System._make(fields)
    diagonals = arrays.Pinf.diagonal(0, 1, 2) > 0
    total = int(np.count_nonzero(diagonals))
    if len(diagonals) == 1 or total == 0:
        return arrays, total
    return arrays, int(diagonals.sum(1).max())


def read_totals(totals: np.ndarray) -> tuple[Tensor, ...]:
    """log-likelihood, n_obs, logdet, quad, n_diffuse, rank_left."""
    counts = totals[3:].astype(np.int64)
    rows = (totals[0], counts[0], totals[1], totals[2], counts[1], counts[2])
    return tuple([torch.from_numpy(row) for row in rows])


def blank(arrays: Iterable[np.ndarray], lengths: np.ndarray, steps: int) -> None:
    """Write NaN beyond the end of each series."""
    if lengths.min() >= steps:
        return
    past = np.arange(steps) >= lengths[:, None]
    for array in arrays:
        if len(array):
            array[past] = np.nan
