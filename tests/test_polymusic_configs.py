"""The configurations of the benchmark on polyphonic music name models and options that exist."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqdgm.inference.training_options import read_options

FOLDER = Path(__file__).parents[1] / "benchmarks" / "polymusic"
NAMES = sorted(path.stem for path in (FOLDER / "configs").glob("*.toml"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module("train")
    for name in ("train", "pianorolls"):
        sys.modules.pop(name)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_a_model_and_of_training(script: Any, name: str) -> None:
    for data in script.FILES:
        chosen = script.settings(name, data, 7)
        kind = script.CLASSES[chosen["model"].pop("class")]
        model = kind(**chosen["model"])
        method = chosen["fit"].pop("method", next(iter(model.learners)))
        assert method in model.learners
        assert read_options(model, method, chosen["fit"]).max_epochs == 7


def test_every_class_has_a_configuration(script: Any) -> None:
    used = {script.settings(name, "jsb", None)["model"]["class"] for name in NAMES}
    assert used == set(script.CLASSES)


def test_scores_are_nats_per_step_and_valid_json(script: Any) -> None:
    """By hand from the likelihoods of each series; no error where none is known."""
    rolls = [np.eye(88)[:4], np.zeros((6, 88))]
    kind = script.CLASSES["DMM"]
    model = kind(2, 4, 4, emission="bernoulli", max_epochs=1).fit(rolls, seed=0)
    found = script.scores(model, rolls, script.Effort(3, 1, 3))
    order = [rolls[0], rolls[1]]
    total = model.log_prob(order, method="variational", n_particles=3, seed=0).value.sum()
    assert found["elbo"]["nats_per_step"] == pytest.approx(-total / 10)
    assert found["elbo"]["kind"] == "lower bound"
    assert found["iwae"]["stderr"] is None
    assert {part["kind"] for part in found.values()} == {"lower bound", "estimate"}
