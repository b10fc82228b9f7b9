"""Compile the CUDA kernels for two GPU generations, without a GPU, and record what they take.

Registers, spills and shared memory are those that ptxas reports for the very variants that
`seqdgm.kernels.cuda` launches. Needs triton; sets nothing on the machine, and writes
`results/cuda_compile.json` unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
except ImportError:
    print("triton is not installed: nothing to compile")
    raise SystemExit(0) from None

from seqdgm.kernels import cuda_steps as steps
from seqdgm.kernels.cuda import layout
from seqdgm.kernels.cuda_filter import filter_kernel
from seqdgm.kernels.cuda_smoother import smoother_kernel

RESULTS = Path(__file__).parent / "results" / "cuda_compile.json"
ARCHITECTURES = (80, 90)
STATES = (1, 2, 4, 8, 16)
DOUBLE, INDEX = "*fp64", "*i64"
COMMON: dict[str, Any] = {
    "system": steps.Matrices(*[DOUBLE] * 6),
    "by_series": steps.Matrices(*["i32"] * 6),
    "by_step": steps.Matrices(*["i32"] * 6),
    "data": steps.Data(DOUBLE, "*u8", INDEX),
    "gains": steps.Gains(*[DOUBLE] * 3),
    "size": steps.Size(*["i32"] * 4),
}
FORWARD = {"carry": steps.Carry(*[DOUBLE] * 4, INDEX), "out": steps.Histories(*[DOUBLE] * 7)}
BACKWARD = {
    "carry": steps.Back(DOUBLE, DOUBLE, INDEX),
    "filtered": steps.Histories(*[DOUBLE] * 7),
    "smoothed": steps.Moments(*[DOUBLE] * 3),
}
# Name, kernel, the types of its own arguments, and its constants: the leanest and the fullest ones.
VARIANTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "log-likelihood": (
        filter_kernel,
        FORWARD,
        {"MODE": steps.END.value, "EXACT": False, "DIFFUSE": False},
    ),
    "filter, variances zero": (
        filter_kernel,
        FORWARD,
        {"MODE": steps.ALL.value, "EXACT": True, "DIFFUSE": False},
    ),
    "filter, diffuse start": (
        filter_kernel,
        FORWARD,
        {"MODE": steps.SMOOTH.value, "EXACT": True, "DIFFUSE": True},
    ),
    "smoother": (smoother_kernel, BACKWARD, {"LAG_ONE": True, "DIFFUSE": False}),
    "smoother, diffuse start": (smoother_kernel, BACKWARD, {"LAG_ONE": True, "DIFFUSE": True}),
}


def compile_variant(name: str, state: int, architecture: int) -> dict[str, Any]:
    """Compile one kernel to a cubin and read what it takes."""
    kernel, types, constants = VARIANTS[name]
    blocks = layout(state)
    constants = {**constants, "B": blocks.B, "S": blocks.S}
    signature = {**COMMON, **types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={key: signature[key] for key in kernel.arg_names},
        constexprs=constants,
    )
    options = {"num_warps": blocks.warps, "enable_fp_fusion": True}
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    seconds = time.perf_counter() - start
    return {
        "kernel": name,
        "state": state,
        "architecture": f"sm_{architecture}",
        "series_per_program": blocks.B,
        "warps": blocks.warps,
        **resources(compiled.asm["ptx"], architecture),
        "shared_bytes": compiled.metadata.shared,
        "cubin_bytes": len(compiled.asm["cubin"]),
        "compile_seconds": round(seconds, 1),
    }


def resources(ptx: str, architecture: int) -> dict[str, int]:
    """Registers and spills as ptxas reports them, called as triton calls it."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", "--regAllocOptLevel=2"]
        report = subprocess.run(
            [*command, f"--gpu-name={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))],
            check=True,
            capture_output=True,
            text=True,
        ).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        assert found is not None, report
        return int(found[1])

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_store_bytes": number(r"(\d+) bytes spill stores"),
        "spill_load_bytes": number(r"(\d+) bytes spill loads"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, nargs="+", default=STATES)
    parser.add_argument("--kernels", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for state in arguments.states:
        for name in arguments.kernels:
            for architecture in ARCHITECTURES:
                rows.append(compile_variant(name, state, architecture))
                print(json.dumps(rows[-1]), flush=True)
    result = {"triton": metadata.version("triton"), "kernels": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
