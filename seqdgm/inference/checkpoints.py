"""Files that hold a training run: tensors and a JSON text in the safetensors format, no pickle.

A checkpoint holds what a run needs to go on as if nothing had happened: weights, the best weights
so far, the optimizer's moments, the states of the random generators of every process, the curves,
and the place within the epoch. It is no model file: a finished fit is kept by ``model.save``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqdgm.serialize import write_whole
from seqdgm.types import Batch

FORMAT = 1


def write(path: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint, whole or not at all; an existing file is replaced in one step.

    Parameters
    ----------
    path : path
    config : dict
        Values that JSON can hold; Python writes its numbers so that they are read back exactly.
    tensors : dict of str to Tensor
    """
    from safetensors.torch import save

    payload = save(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        metadata={"seqdgm-training": json.dumps({"format": FORMAT, **config})},
    )
    write_whole(Path(path), payload)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote, onto the CPU.

    Raises
    ------
    ValueError
        If the file is damaged or is not a checkpoint of this version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get("seqdgm-training")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint ({error}); resume from another, or train anew"
        ) from error
    config = {} if header is None else json.loads(header)
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of this version; pass a file that "
            "fit(..., checkpoint=path) wrote"
        )
    return config, tensors


def fingerprint(*batches: Batch | None) -> str:
    """Digest of the data, so that a run is not resumed on others."""
    digest = hashlib.sha256()
    for batch in batches:
        for value in () if batch is None else (batch.x, batch.mask, batch.lengths, batch.u):
            digest.update(str(tuple(value.shape)).encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pack(prefix: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names with a prefix in front."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


def unpack(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that `pack` gave this prefix, without it."""
    start = len(prefix) + 1
    return {name[start:]: t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimizer by the number of the parameter and their own name."""
    state = optimizer.state_dict()["state"]
    return {f"{k}/{name}": value for k, own in state.items() for name, value in own.items()}


def set_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the moments back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
