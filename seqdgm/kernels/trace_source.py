"""Source code of a bootstrap filter's step from the nodes of a tape, and its compilation."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from seqdgm.kernels import (
    particles_cpu_filter,
    particles_cpu_math,
    particles_cpu_resample,
    particles_cpu_traced,
    particles_types,
    philox,
    trace_math,
)
from seqdgm.kernels.cached import digest
from seqdgm.kernels.particles_cpu_resample import BLOCK
from seqdgm.kernels.trace_tape import PARTICLE, REMEDY, Tape

_PLAIN = {
    "mul": "{0} * {1}",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "reciprocal": "1.0 / {0}",
    "pow": "{0} ** {1}",
    "remainder": "{0} % {1}",
    "where": "{1} if {0} else {2}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "truth": "{0} != 0",
    "isnan": "{0} != {0}",
    "isinf": "abs({0}) == math.inf",
    "isfinite": "abs({0}) < math.inf",
    "log2": "log({0}) * 1.4426950408889634",
    "log10": "log({0}) * 0.4342944819032518",
    "exp2": "2.0 ** {0}",
    "round": "np.rint({0})",
    "look_up": "look_up(p, {0}, {1}, {2}, {3})",
    "not": "not {0}",
}
_OWN = "abs exp log maximum minimum relu sigmoid xlogy float int"
_MATH = (
    "sqrt log1p expm1 sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh lgamma erf erfc "
    "atan2 hypot fmod"
)
_CALLS = {
    name: prefix + name
    for prefix, names in (("", _OWN), ("math.", _MATH), ("np.", "floor ceil trunc sign"))
    for name in names.split()
}
_INPUTS = {"p": "p[{}]", "u": "u[{}]", "t": "t", "x": "x[{}]", "literal": "{}"}

_HEADER = '''"""Generated: the step of a bootstrap particle filter. Sources {sources}."""

import math

import numpy as np

from seqdgm.kernels.cached import compiled
from seqdgm.kernels.particles_cpu_math import called, exp, normals, uniforms, wide
from seqdgm.kernels.particles_cpu_traced import bind_traced
from seqdgm.kernels.trace_math import log, look_up, maximum, minimum, relu, sigmoid, xlogy

'''
_FOOTER = """
run = bind_traced(initial, transition, density)


@compiled
def bootstrap(
    part, model, cloud, scratch, key, threshold, output, series, lengths, t, start, stop
):
    run(part, model, cloud, scratch, key, threshold, output, series, lengths, t, start, stop)
"""
_MOVE = "@called\ndef {name}(p, u, t, key, s, first, n, draws, w):\n    wide()\n"
_DENSITY = "@called\ndef density(p, u, t, x, seen, n, w, log_weights):\n    wide()\n"


class Program(NamedTuple):
    """A step as nodes of a tape.

    Attributes
    ----------
    initial, transition : sequence of int
        The elements of the state after the move.
    kinds : pair of sequences of str
        Of the draws that each of the two needs: "normal" or "uniform".
    density : sequence of int
        Log-density of each element of the observation, or of the whole vector.
    obs : int
        Elements of the observation.
    """

    initial: Sequence[int]
    transition: Sequence[int]
    kinds: tuple[Sequence[str], Sequence[str]]
    density: Sequence[int]
    obs: int

    @property
    def draws(self) -> int:
        """Rows of draws."""
        return max(map(len, self.kinds))


def write(tape: Tape, program: Program) -> str:
    """Source code of a module whose `bootstrap` is the filter.

    Raises
    ------
    ValueError
        If something that is needed has no formula.
    """
    state = len(program.initial)
    rows = {"old": 0, "noise": state, "new": state + program.draws}
    moves = [
        _move(tape, rows, name, kinds, nodes)
        for name, kinds, nodes in zip(
            ("initial", "transition"),
            program.kinds,
            (program.initial, program.transition),
            strict=True,
        )
    ]
    density = _density(tape, rows, program)
    return "\n\n".join([_HEADER.format(sources=_sources()), *moves, density]) + _FOOTER


def _move(
    tape: Tape, rows: dict[str, int], name: str, kinds: Sequence[str], nodes: Sequence[int]
) -> str:
    drawn, k = "", 0
    for kind, run in groupby(kinds):
        count = len(list(run))
        # A constant for the row would compile the draws anew.
        drawn += f"    for k in range({k}, {k + count}):\n"
        drawn += f"        {kind}s(key, s, t, k, first, n, draws[k])\n"
        k += count
    stores = [f"w[i + {BLOCK * (rows['new'] + d)}] = float({{{d}}})" for d in range(len(nodes))]
    return _MOVE.format(name=name) + drawn + _loop(tape, rows, nodes, stores, 4)


def _density(tape: Tape, rows: dict[str, int], program: Program) -> str:
    nodes, obs = program.density, program.obs
    total = " + ".join(f"{{{d}}}" for d in range(len(nodes)))
    whole = _loop(tape, rows, nodes, [f"log_weights[i] += {total}"], 8)
    seen = " and ".join(f"seen[{d}]" for d in range(obs))
    text = f"{_DENSITY}    if {seen}:\n{whole}"
    if len(nodes) == 1:
        return text
    # The rest is compiled for what is observed in part.
    text += "        return\n"
    for d, node in enumerate(nodes):
        text += f"    if seen[{d}]:\n" + _loop(tape, rows, [node], ["log_weights[i] += {0}"], 8)
    return text


def _loop(
    tape: Tape, rows: dict[str, int], nodes: Sequence[int], stores: Sequence[str], indent: int
) -> str:
    """A loop over particles, after what does not depend on the particle."""
    needed, waiting = set(), list(nodes)
    while waiting:
        k = waiting.pop()
        if k not in needed:
            needed.add(k)
            if tape.nodes[k].op in _PLAIN or tape.nodes[k].op in _CALLS:
                waiting.extend(tape.nodes[k].args)
    before, inside = [], []
    for k in sorted(needed):
        node = tape.nodes[k]
        (inside if node.level == PARTICLE else before).append(f"v{k} = {_text(tape, rows, k)}")
    names = [f"v{k}" for k in nodes]
    inside += [store.format(*names) for store in stores]
    margin = " " * indent
    lines = [margin + line for line in before]
    lines += [f"{margin}for i in range(n):", *(f"{margin}    {line}" for line in inside)]
    return "\n".join(lines) + "\n"


def _text(tape: Tape, rows: dict[str, int], k: int) -> str:
    node = tape.nodes[k]
    if node.op == "?":
        raise ValueError(f"{node.args[0]} has no formula that a compiled step could use; {REMEDY}")
    if node.op in rows:
        return f"w[i + {BLOCK * (rows[node.op] + node.args[0])}]"
    if node.op in _INPUTS:
        return _INPUTS[node.op].format(*node.args)
    names = [f"v{arg}" for arg in node.args]
    if node.op in _PLAIN:
        return _PLAIN[node.op].format(*names)
    return f"{_CALLS[node.op]}({', '.join(names)})"


@cache
def _sources() -> str:
    return digest(
        philox,
        particles_types,
        particles_cpu_math,
        particles_cpu_resample,
        particles_cpu_filter,
        particles_cpu_traced,
        trace_math,
    )


# -- compilation ------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where generated modules lie, with what numba has compiled of them."""
    import pooch

    return Path(pooch.os_cache("seqdgm")) / "steps"


@cache
def load(source: str) -> Callable[..., None]:
    """The filter of a generated module, compiled, or read from the disk where it was before."""
    name = f"step_{sha256(source.encode()).hexdigest()[:32]}"
    folder = cache_directory()
    path = folder / f"{name}.py"
    if not path.is_file() or path.read_text("utf-8") != source:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(".tmp", name, folder, text=True)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(source)
        Path(temporary).replace(path)
    # Numba looks up the module of what it reads from its cache.
    spec = spec_from_file_location(f"seqdgm_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    loop: Callable[..., None] = module.bootstrap
    return loop
