"""Compile the CUDA kernels for two GPU generations, without a GPU, and record what they take.

Registers, spills and shared memory are those that ptxas reports for the very variants that
`seqdgm.kernels.cuda` and `seqdgm.kernels.particles_cuda` launch. Needs triton; sets nothing on the
machine, and writes `results/cuda_compile.json` unless told otherwise.
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
from seqdgm.kernels import particles_cuda_filter as bootstrap
from seqdgm.kernels import particles_cuda_layout, particles_cuda_models
from seqdgm.kernels import particles_cuda_weights as weights
from seqdgm.kernels.cuda import layout
from seqdgm.kernels.cuda_filter import filter_kernel
from seqdgm.kernels.cuda_smoother import smoother_kernel
from seqdgm.kernels.particles_cuda_steps import Size, Tables

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


# Particles: kernel, its constants, and whether multiplications and additions may be fused.
COUNT, SEVERAL = 1000, 10**6  # particles of a series that one program does, and many
BYTES, INT = "*u8", "*i32"
PARTICLE_TYPES: dict[str, Any] = {
    **dict.fromkeys(
        ("log_weights", "uniforms", "normalised", "result", "partials", "spans"), DOUBLE
    ),
    **dict.fromkeys(("x", "ancestors", "out", "picked"), INDEX),
    **dict.fromkeys(("count", "given", "width", "t"), "i32"),
    "needed": BYTES,
    "tables": Tables(*[DOUBLE] * 3),
    "copies": Tables(*[DOUBLE] * 3),
    "size": Size(*["i32"] * 6),
    "axes": bootstrap.Axes(*["i32"] * 3),
    "panel": bootstrap.Panel(INDEX, BYTES, INDEX, DOUBLE),
    "cloud": bootstrap.Cloud(DOUBLE, DOUBLE, INT, *[DOUBLE] * 3),
    "results": bootstrap.Results(*[DOUBLE] * 4),
}
LINEAR = particles_cuda_models.Linear(*[DOUBLE] * 4, BYTES, *["i32"] * 5)
VOLATILITY = particles_cuda_models.LogVariance(DOUBLE, DOUBLE, BYTES, "i32", "i32")


def resampling(scheme: int, phase: Any) -> dict[str, Any]:
    return {"SCHEME": scheme, "PHASE": phase.value}


def filtering(state: int, *, moments: bool = False, **more: Any) -> dict[str, Any]:
    return {"LINEAR": state > 0, "STATE": max(1, state), "MOMENTS": moments, **more}


PARTICLES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "weigh": (weights.weigh_kernel, COUNT, {"PHASE": weights.ALL.value}),
    "systematic": (weights.resample_kernel, COUNT, resampling(0, weights.ALL)),
    "residual": (weights.resample_kernel, COUNT, resampling(3, weights.ALL)),
    "killing": (weights.resample_kernel, COUNT, resampling(4, weights.ALL)),
    "systematic, several programs": (
        weights.resample_kernel,
        SEVERAL,
        resampling(0, weights.LAST),
    ),
    "gather": (weights.gather_kernel, COUNT, {"ROWS": 256, "WIDTH": 4}),
    "pick": (weights.pick_kernel, COUNT, {}),
    "bootstrap, volatility": (bootstrap.filter_kernel, COUNT, filtering(0)),
    "bootstrap, state 1": (bootstrap.filter_kernel, COUNT, filtering(1)),
    "bootstrap, state 4": (bootstrap.filter_kernel, COUNT, filtering(4)),
    "bootstrap, state 4, moments": (bootstrap.filter_kernel, COUNT, filtering(4, moments=True)),
    "bootstrap, state 16": (bootstrap.filter_kernel, COUNT, filtering(16)),
    "first half, volatility": (
        bootstrap.half_step_kernel,
        SEVERAL,
        filtering(0, SECOND=False),
    ),
    "first half, state 4": (bootstrap.half_step_kernel, SEVERAL, filtering(4, SECOND=False)),
    "first half, state 16": (bootstrap.half_step_kernel, SEVERAL, filtering(16, SECOND=False)),
    "second half, moments": (
        bootstrap.half_step_kernel,
        SEVERAL,
        filtering(4, moments=True, SECOND=True),
    ),
    "moments, several programs": (bootstrap.moments_kernel, SEVERAL, {"STATE": 4}),
}


def compile_variant(name: str, state: int, architecture: int) -> dict[str, Any]:
    """Compile one Gaussian kernel to a cubin and read what it takes."""
    kernel, types, constants = VARIANTS[name]
    blocks = layout(state)
    constants = {**constants, "B": blocks.B, "S": blocks.S}
    about = {"state": state, "series_per_program": blocks.B}
    types = {**COMMON, **types}
    return compiled(name, kernel, types, constants, about, blocks.warps, architecture)


def compile_particles(name: str, architecture: int) -> dict[str, Any]:
    """Compile one particle kernel to a cubin and read what it takes."""
    kernel, count, own = PARTICLES[name]
    plan = particles_cuda_layout.layout(1, count)
    sizes = {"CHUNK": plan.chunk, "PROGRAMS": plan.programs}
    sizes = {key: sizes[key] for key in sizes if key in kernel.arg_names}
    constants: dict[Any, Any] = {**sizes, **own}
    model = LINEAR if constants.get("LINEAR") else VOLATILITY
    about = {"particles": count, "particles_at_once": plan.chunk}
    # Ancestors are rounded after every operation, as the reference does.
    fused = kernel is not weights.resample_kernel
    # What is 1 is a constant to the compiler.
    ones = [i for i, value in enumerate(plan.size) if value == 1 and "size" in kernel.arg_names]
    size = ["constexpr" if i in ones else "i32" for i in range(len(plan.size))]
    constants |= {(kernel.arg_names.index("size"), i): 1 for i in ones}
    warps = plan.warps // (2 if kernel is weights.pick_kernel else 1)
    types = {**PARTICLE_TYPES, "model": model, "size": Size(*size)}
    return compiled(name, kernel, types, constants, about, warps, architecture, fused=fused)


def compiled(
    name: str,
    kernel: Any,
    types: dict[str, Any],
    constants: dict[Any, Any],
    about: dict[str, Any],
    warps: int,
    architecture: int,
    *,
    fused: bool = True,
) -> dict[str, Any]:
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={key: signature[key] for key in kernel.arg_names},
        constexprs=constants,
    )
    options = {"num_warps": warps, "enable_fp_fusion": fused}
    start = time.perf_counter()
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    seconds = time.perf_counter() - start
    return {
        "kernel": name,
        **about,
        "architecture": f"sm_{architecture}",
        "warps": warps,
        **resources(result.asm["ptx"], architecture),
        "shared_bytes": result.metadata.shared,
        "cubin_bytes": len(result.asm["cubin"]),
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
    parser.add_argument("--kernels", nargs="+", choices=VARIANTS, help="Gaussian kernels")
    parser.add_argument("--particles", nargs="+", choices=PARTICLES, help="particle kernels")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    # Who asks for some kernels wants no others.
    some = arguments.kernels or arguments.particles or arguments.states is not STATES
    kernels = arguments.kernels or ([] if arguments.particles else VARIANTS)
    particles = arguments.particles or ([] if some else PARTICLES)
    result: dict[str, Any] = {"triton": metadata.version("triton"), "kernels": [], "particles": []}
    for architecture in ARCHITECTURES:
        for name in particles:
            keep(result["particles"], compile_particles(name, architecture))
    for state in arguments.states:
        for name in kernels:
            for architecture in ARCHITECTURES:
                keep(result["kernels"], compile_variant(name, state, architecture))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def keep(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
