"""Two processes train the model that one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_training import RNN_OPTIONS, curves, dmm, gradients, one_update, rnn, series
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed_training.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *command, str(SCRIPT), str(path)],
        check=True,
        env=own,
        timeout=300,
        capture_output=True,
    )
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def test_both_processes_end_with_the_same_model(ranks) -> None:
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name


def test_weights_and_curves_are_those_of_one_process(ranks) -> None:
    alone = rnn().fit(series(), **RNN_OPTIONS)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(ranks[0][f"rnn/{name}"], value, rtol=1e-4, atol=2e-6)
    for name, value in curves(alone).items():
        torch.testing.assert_close(ranks[0][f"curves/{name}"], value, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_the_sum_over_the_shares(ranks) -> None:
    parts, totals = [], []
    for rank in range(2):
        model = dmm().fit(series(), seed=0, max_epochs=1)
        updater, outcome = one_update(model, rank, 2, 1)
        parts.append(gradients(updater.evaluation.model))
        totals.append(torch.tensor(outcome.totals))
    expected = parts[0] + parts[1]
    torch.testing.assert_close(ranks[0]["gradient"], expected, rtol=1e-4, atol=1e-6)
    *summed, norm, due = ranks[0]["outcome"].tolist()
    torch.testing.assert_close(torch.tensor(summed), totals[0] + totals[1], rtol=1e-5, atol=0)
    assert norm == pytest.approx(float(expected.norm()), rel=1e-4)
    assert due == 1


def test_two_processes_resume_together(ranks) -> None:
    names = [name for name in ranks[0] if name.startswith("whole/")]
    assert names
    for found in ranks:
        for name in names:
            assert torch.equal(found[name], found[name.replace("whole", "resumed")]), name


def test_both_processes_name_the_series_that_one_of_them_had(folder: Path) -> None:
    for rank in range(2):
        with safe_open(folder / f"{rank}.safetensors", framework="pt") as file:
            assert "series 5 gave a loss that is not finite" in file.metadata()["message"]
