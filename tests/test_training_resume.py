"""Checkpoints: a resumed run is the run that was interrupted, and a file is never half written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import seqdgm as sq
from seqdgm.inference import checkpoints
from seqdgm.results import FitReport


class Dropping(sq.DMM):
    """A deep Markov model that draws from torch's own generator as well."""

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        super().build(obs_dim, input_dim, **options)
        self.features.append(nn.Dropout(0.3))


class Stop(Exception):  # noqa: N818 - stands for whatever ends a process
    """What interrupts."""


def data() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [np.sin(np.arange(n) / 3) + 0.2 * rng.normal(size=n) for n in (14, 20, 11, 17, 12)]


def dropping() -> Dropping:
    return Dropping(2, 4, 4, max_epochs=4, batch_size=2, kl_warmup=2, learning_rate=0.02)


OPTIONS: dict[str, Any] = {
    "seed": 0,
    "average": 0.9,
    "schedule": "plateau",
    "plateau_patience": 1,
    "lr_warmup": 1,
}
CURVES = (
    "objective",
    "valid_objective",
    "valid_epochs",
    "reconstruction",
    "divergence",
    "gradient_norm",
    "learning_rate",
    "best_epoch",
    "n_iter",
)


def assert_same(a: sq.DMM, b: sq.DMM) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for name in CURVES:
        assert getattr(a.fit_report_, name) == getattr(b.fit_report_, name), name


def after(epoch: int):
    def hook(report: FitReport) -> None:
        if report.n_iter == epoch:
            raise Stop

    return hook


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resuming_after_an_epoch_gives_the_uninterrupted_run(tmp_path, precision: str) -> None:
    path = tmp_path / "run.safetensors"
    options = {**OPTIONS, "precision": precision}
    whole = dropping().fit(data(), **options)
    with pytest.raises(Stop):
        dropping().fit(data(), checkpoint=path, checkpoint_minutes=0, on_epoch=after(2), **options)
    resumed = dropping().fit(data(), resume=path, **{**options, "seed": 99})
    assert_same(whole, resumed)
    assert resumed.fit_report_.seconds > 0


def test_resuming_within_an_epoch_gives_the_uninterrupted_run(tmp_path, monkeypatch) -> None:
    path = tmp_path / "run.safetensors"
    whole = dropping().fit(data(), **OPTIONS)
    write, written = checkpoints.write, []

    def stop_at_eighth(*arguments: Any) -> None:
        write(*arguments)
        written.append(arguments[1]["progress"])
        if len(written) == 8:
            raise Stop

    monkeypatch.setattr(checkpoints, "write", stop_at_eighth)
    with pytest.raises(Stop):
        dropping().fit(data(), checkpoint=path, checkpoint_minutes=0, **OPTIONS)
    assert written[-1]["epoch"] == 2  # three minibatches an epoch
    assert written[-1]["position"] == 2
    resumed = dropping().fit(data(), resume=path, checkpoint=path, **OPTIONS)
    assert_same(whole, resumed)


def test_a_finished_run_resumes_to_itself_and_can_be_made_longer(tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    short = dropping().fit(data(), checkpoint=path, max_epochs=2, **OPTIONS)
    assert_same(short, dropping().fit(data(), resume=path, max_epochs=2, **OPTIONS))
    longer = dropping().fit(data(), resume=path, max_epochs=4, **OPTIONS)
    assert_same(longer, dropping().fit(data(), **OPTIONS))


def test_the_state_outside_is_left_alone(tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    dropping().fit(data(), checkpoint=path, max_epochs=1, **OPTIONS)
    before = torch.get_rng_state()
    dropping().fit(data(), resume=path, max_epochs=2, **OPTIONS)
    assert torch.equal(before, torch.get_rng_state())


def test_checkpoints_hold_tensors_and_text_alone(tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    dropping().fit(data(), checkpoint=path, max_epochs=1, **OPTIONS)
    assert os.listdir(tmp_path) == ["run.safetensors"]
    with safe_open(path, framework="pt") as file:
        rooms = {name.split("/")[0] for name in file.keys()}  # noqa: SIM118
    assert rooms == {"weights", "best", "optimizer", "average", "generators"}


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch) -> None:
    path = tmp_path / "run.safetensors"
    dropping().fit(data(), checkpoint=path, max_epochs=1, **OPTIONS)
    before = path.read_bytes()

    def full(*_: Any) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        dropping().fit(data(), checkpoint=path, max_epochs=1, **OPTIONS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate=0.02, not 0.5"),
        ({"clip": 1.0}, "clip=5.0, not 1.0"),
        ({"free_bits": 0.1}, "objective"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(tmp_path, change: dict, message: str) -> None:
    path = tmp_path / "run.safetensors"
    dropping().fit(data(), checkpoint=path, max_epochs=1, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        dropping().fit(data(), resume=path, **{**OPTIONS, **change})


def test_other_data_and_other_files_are_refused(tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    model = dropping().fit(data(), checkpoint=path, max_epochs=1, **OPTIONS)
    with pytest.raises(ValueError, match="other data"):
        dropping().fit([x + 0.1 * x**2 for x in data()], resume=path, **OPTIONS)
    with pytest.raises(ValueError, match="model="):
        sq.DMM(1, 4, 4).fit(data(), resume=path)
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint"):
        dropping().fit(data(), resume=tmp_path / "model.safetensors", **OPTIONS)
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        dropping().fit(data(), resume=tmp_path / "broken.safetensors", **OPTIONS)
