"""Model files: the same forecasts in a fresh process, nothing executed, written whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch.distributions import Normal

import seqdgm as sq

FORECAST = """
import sys
import numpy as np
import seqdgm as sq
model = sq.load(sys.argv[1])
np.save(sys.argv[2], model.forecast(5, seed=11, n_samples=40).sample(40, seed=12))
"""


def series() -> pd.Series:
    rng = np.random.default_rng(0)
    index = pd.date_range("2001-01-01", periods=40, freq="MS")
    return pd.Series(10 + np.cumsum(rng.normal(size=40)) / 3, index, name="level")


@pytest.mark.parametrize(
    "model",
    [
        sq.SeasonalNaive(4),
        sq.ARIMA((1, 1, 0), transform="log"),
        sq.LinearGaussianSSM(latent_dim=2, scale="standard"),
        sq.RNN("lstm", 5, season=12, max_epochs=2),
        sq.DMM(2, 5, 5, max_epochs=2, scale="mean"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_fresh_process_forecasts_bit_for_bit(model, tmp_path) -> None:
    model.fit(series(), seed=0)
    expected = model.forecast(5, seed=11, n_samples=40).sample(40, seed=12)
    path, out = tmp_path / "model.safetensors", tmp_path / "out.npy"
    model.save(path)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(
        [sys.executable, "-c", FORECAST, str(path), str(out)], check=True, env=environment
    )
    np.testing.assert_array_equal(np.load(out), expected)


def test_a_panel_keeps_its_names_and_its_parameters(tmp_path) -> None:
    frame = pd.concat(
        pd.DataFrame({"unique_id": name, "ds": series().index, "y": scale * series().to_numpy()})
        for name, scale in (("b", 1.0), ("a", 5.0))
    )
    model = sq.ARIMA((1, 1, 0)).fit(frame)
    model.save(tmp_path / "m.safetensors")
    again = sq.load(tmp_path / "m.safetensors")
    one = frame[frame["unique_id"] == "a"]
    np.testing.assert_array_equal(again.log_prob(one).value, model.log_prob(frame).value[1:])
    pd.testing.assert_frame_equal(again.forecast(3).to_frame(), model.forecast(3).to_frame())


class Mine(sq.StateSpaceModel):
    """A user's model with a learned buffer of its own kind."""

    latent_dim = 1

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        self.sigma = sigma

    def initial(self, u):
        return Normal(torch.zeros(1), self.sigma * torch.ones(1))

    def transition(self, z, u):
        return Normal(z, self.sigma)

    def emission(self, z, u):
        return Normal(z, 1.0)


def test_a_foreign_class_is_never_imported_by_a_file(tmp_path) -> None:
    path = tmp_path / "mine.safetensors"
    Mine(0.5).fit(series()).save(path)
    with pytest.raises(ValueError, match=r"pass the class.*Mine"):
        sq.load(path)
    assert sq.load(path, model_class=Mine).sigma == 0.5
    with pytest.raises(ValueError, match="holds a Mine"):
        sq.load(path, model_class=sq.ARIMA)


def test_what_is_no_model_file_is_refused(tmp_path) -> None:
    text = tmp_path / "a.safetensors"
    text.write_text("not a model")
    with pytest.raises(ValueError, match="damaged"):
        sq.load(text)
    plain = tmp_path / "b.safetensors"
    save_file({"x": torch.zeros(2)}, plain)
    with pytest.raises(ValueError, match="no seqdgm model"):
        sq.load(plain)
    future = tmp_path / "c.safetensors"
    save_file({"x": torch.zeros(2)}, future, metadata={"seqdgm": json.dumps({"format": 99})})
    with pytest.raises(ValueError, match="format 99"):
        sq.load(future)
    cut = tmp_path / "d.safetensors"
    sq.SeasonalNaive(4).fit(series()).save(cut)
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        sq.load(cut)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.safetensors"
    model = sq.SeasonalNaive(4).fit(series())
    model.save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        model.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
