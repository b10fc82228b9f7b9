"""The particle kernels in Triton: in the interpreter, compiled for two GPUs, and on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton, which compiles the CUDA kernels, is not installed")

from test_cuda_kernels import compile_kernels, run

CASES = Path(__file__).parent / "interpreted_particle_cuda.py"
