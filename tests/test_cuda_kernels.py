"""The Triton kernels: in the interpreter, compiled for two GPU generations, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton, which compiles the CUDA kernels, is not installed")

TESTS = Path(__file__).parent
CASES = TESTS / "interpreted_cuda.py"
COMPILE = TESTS.parent / "benchmarks" / "cuda_compile.py"


def run(command: list[Any], **environment: str) -> None:
    """Run Python in a process of its own: triton reads its settings when a kernel is defined."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **environment},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def pytest_of_cases() -> list[Any]:
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", CASES]


def compiled(tmp_path: Path, states: list[int], kernels: list[str]) -> list[dict[str, Any]]:
    output = tmp_path / "compiled.json"
    options = ["--states", *states, *(["--kernels", *kernels] if kernels else [])]
    run([COMPILE, *options, "--output", output], TRITON_CACHE_DIR=str(tmp_path))
    return list(json.loads(output.read_text())["kernels"])


def test_the_interpreted_kernels_equal_the_reference() -> None:
    run(pytest_of_cases(), TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernels_on_a_gpu_equal_the_reference() -> None:
    run(pytest_of_cases(), TRITON_INTERPRET="0")


def test_without_a_gpu_tensors_of_the_cpu_are_refused() -> None:
    from seqdgm.kernels import System, cuda

    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    walk = System(one, one, one, one, zero, zero, zero[0], zero, one[0])
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="cannot read x on cpu; use 'cpu' or"):
        cuda.kalman_filter(walk, one[0], mask, torch.tensor([1]), store="last")


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    rows = compiled(tmp_path, [4], ["log-likelihood", "smoother"])
    assert [row["architecture"] for row in rows] == ["sm_80", "sm_90"] * 2
    for row in rows:
        assert row["cubin_bytes"] > 0
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
        assert row["registers"] <= 200, row


@pytest.mark.slow
@pytest.mark.parametrize("state", [1, 2, 4])
def test_all_variants_compile_without_spills(tmp_path: Path, state: int) -> None:
    """Only a diffuse start may spill a little, for a few steps."""
    for row in compiled(tmp_path, [state], []):
        allowed = 64 if "diffuse" in row["kernel"] else 0
        assert row["spill_store_bytes"] <= allowed, row
        assert row["spill_load_bytes"] <= allowed, row
