"""Model files: one ``.safetensors`` file of weights, data and a JSON text; never pickle."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from seqdgm.panel import Panel
from seqdgm.results import FitReport
from seqdgm.transform import Transform

if TYPE_CHECKING:
    from seqdgm.model import SequenceModel

FORMAT = 2


def save(model: SequenceModel, path: str | Path) -> None:
    """Write a model to one file, whole or not at all.

    Parameters
    ----------
    model : SequenceModel
        Any model of the package, or the user's own.
    path : path
        Where to write; an existing file is replaced.
    """
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {
        "format": FORMAT,
        "class": f"{type(model).__module__}:{type(model).__qualname__}",
        "params": _store(model.get_params(), "params", tensors),
        "obs_dim": model.obs_dim_,
        "input_dim": model.input_dim_,
        "input_columns": model.input_columns_,
        "build_options": model.build_options_,
        "state": _store(model.extra_state(), "state", tensors),
        "report": None,
    }
    for name, value in model.state_dict().items():
        tensors[f"weights/{name}"] = value.detach().cpu().contiguous()
    if model.transform_ is not None:
        for name, value in vars(model.transform_).items():
            if value is not None:
                tensors[f"transform/{name}"] = value
    if model.data_ is not None:
        arrays, config["data"] = model.data_.to_config()
        for name, array in arrays.items():
            tensors[f"data/{name}"] = torch.from_numpy(np.array(array))
    if model.inputs_ is not None:
        tensors["inputs"] = torch.from_numpy(np.array(model.inputs_))
    if model.fit_report_ is not None:
        config["report"] = _store(asdict(model.fit_report_), "report", tensors)
    payload = to_bytes(
        {k: v.contiguous().clone() for k, v in tensors.items()},
        metadata={"seqdgm": json.dumps(config)},
    )
    write_whole(Path(path), payload)


def load(
    path: str | Path, device: str = "cpu", *, model_class: type[SequenceModel] | None = None
) -> SequenceModel:
    """Read a model written by ``model.save``.

    Parameters
    ----------
    path : path
    device : str
        Where to put the model; a file written on a GPU loads on a CPU.
    model_class : type, optional
        Class of the model, needed if it is not one of the package's own: a file can name a class,
        but it never makes one be imported.

    Raises
    ------
    ValueError
        If the file is not a model file, is damaged, or holds a class that was not passed.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get("seqdgm")
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no model file ({error}); save it again") from error
    if header is None:
        raise ValueError(
            f"{path} holds tensors but no seqdgm model; write it with model.save(path)"
        )
    config = json.loads(header)
    if config["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {config['format']}, this version reads {FORMAT}; use the version "
            "that wrote it"
        )
    model = _find_class(config["class"], model_class)(**_restore(config["params"], tensors))
    model.obs_dim_, model.input_dim_ = config["obs_dim"], config["input_dim"]
    columns = config["input_columns"]
    model.input_columns_ = None if columns is None else tuple(columns)
    model.build_options_ = config["build_options"]
    if config["report"] is not None:
        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away
            model.build(model.obs_dim_ or 0, model.input_dim_, **model.build_options_)
        model.fit_report_ = FitReport(**_restore(config["report"], tensors))
    _set_weights(model, tensors)
    model.restore_extra(_restore(config["state"], tensors))
    if "transform/loc" in tensors:
        model.transform_ = Transform(
            tensors.get("transform/power"), tensors["transform/loc"], tensors["transform/scale"]
        )
    if "data" in config:
        arrays = {k[5:]: v.numpy() for k, v in tensors.items() if k.startswith("data/")}
        model.data_ = Panel.from_config(arrays, config["data"])
    if "inputs" in tensors:
        model.inputs_ = tensors["inputs"].numpy()
    model.eval()
    model.to(device)
    return model


def write_whole(path: Path, payload: bytes) -> None:
    """Write a file through a temporary one beside it, so that nobody ever sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        beside.write_bytes(payload)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _find_class(name: str, given: type[SequenceModel] | None) -> type[SequenceModel]:
    module, qualname = name.split(":")
    if given is not None:
        if given.__qualname__ != qualname:
            raise ValueError(f"the file holds a {qualname}, not a {given.__qualname__}")
        return given
    if not module.startswith("seqdgm."):
        raise ValueError(
            f"the file holds a {qualname} of module {module!r}; pass the class: "
            f"sq.load(path, model_class={qualname})"
        )
    found: type[SequenceModel] = getattr(import_module(module), qualname)
    return found


def _set_weights(model: SequenceModel, tensors: dict[str, Tensor]) -> None:
    """Put tensors in place; buffers may have another shape than a fresh model's."""
    for key, value in tensors.items():
        if not key.startswith("weights/"):
            continue
        owner, _, name = key.removeprefix("weights/").rpartition(".")
        module = model.get_submodule(owner)
        if name in module._parameters:
            parameter = module._parameters[name]
            assert parameter is not None
            with torch.no_grad():
                parameter.copy_(value)
        else:
            module._buffers[name] = value


def _store(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON form of a value; arrays go to `tensors` and leave a reference."""
    if isinstance(value, dict):
        return {k: _store(v, f"{key}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, np.ndarray | Tensor):
        tensors[key] = torch.as_tensor(value).detach().cpu()
        return {"__array__": key, "numpy": isinstance(value, np.ndarray)}
    if isinstance(value, tuple):
        return {"__tuple__": [_store(v, f"{key}/{k}", tensors) for k, v in enumerate(value)]}
    if isinstance(value, list):
        return [_store(v, f"{key}/{k}", tensors) for k, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{key} is a {type(value).__name__}, which a model file cannot hold; use numbers, strings, "
        "lists or arrays as hyperparameters"
    )


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "__array__" in value:
            tensor = tensors[value["__array__"]]
            return tensor.numpy() if value["numpy"] else tensor
        if "__tuple__" in value:
            return tuple(_restore(v, tensors) for v in value["__tuple__"])
        return {k: _restore(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore(v, tensors) for v in value]
    return value
