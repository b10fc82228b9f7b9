"""The particle kernels in Triton: in the interpreter, compiled for two GPUs, and on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton, which compiles the CUDA kernels, is not installed")

from test_cuda_kernels import COMPILE, run

from seqdgm.kernels import particles

CASES = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
CASES += [str(Path(__file__).parent / "interpreted_particle_cuda.py")]
HEAVY = [
    "residual", "killing", "systematic, several programs", "gather", "pick",
    "bootstrap, volatility", "bootstrap, state 1", "bootstrap, state 4",
    "bootstrap, state 4, moments", "bootstrap, state 16", "first half, volatility",
    "first half, state 4", "first half, state 16", "second half, moments",
    "moments, several programs",
]  # fmt: skip


def compiled(tmp_path: Path, names: list[str]) -> list[dict[str, Any]]:
    output = tmp_path / "compiled.json"
    run([COMPILE, "--particles", *names, "--output", output], TRITON_CACHE_DIR=str(tmp_path))
    rows: list[dict[str, Any]] = json.loads(output.read_text())["particles"]
    assert [row["architecture"] for row in rows] == ["sm_80"] * len(names) + ["sm_90"] * len(names)
    return rows


def test_the_interpreted_kernels_equal_the_reference() -> None:
    run(CASES, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_more_interpreted_kernels_equal_the_reference() -> None:
    run([*CASES, "-m", "slow"], TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernels_on_a_gpu_equal_the_reference() -> None:
    run([*CASES, "-m", "slow or not slow"], TRITON_INTERPRET="0")


def test_without_a_gpu_tensors_of_the_cpu_are_refused() -> None:
    weights = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot read tensors on cpu; use 'cpu'"):
        particles.weigh(weights, implementation="cuda")


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    for row in compiled(tmp_path, ["weigh", "systematic"]):
        assert row["cubin_bytes"] > 0
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
        # Four programs of eight warps, half of what an SM holds.
        assert row["registers"] <= 64, row


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_all_variants_compile_without_spills(tmp_path: Path, name: str) -> None:
    for row in compiled(tmp_path, [name]):
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
