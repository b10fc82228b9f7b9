"""Source code of a bootstrap filter's step from the nodes of a tape, and its compilation."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
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
    "indicator": "1.0 if {0} else 0.0",
    "count": "1 if {0} else 0",
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
from numba import carray

from seqdgm.kernels.particles_cpu_math import exp, wide
from seqdgm.kernels.particles_cpu_traced import mover, scorer
from seqdgm.kernels.trace_math import log, look_up, maximum, minimum, relu, sigmoid, xlogy
'''
_MOVE = """
@mover
def {name}(p_, u_, t, n, w_):
    wide()
    p, u, w = carray(p_, ({values},)), carray(u_, ({inputs},)), carray(w_, ({memory},))
"""
_DENSITY = """
@scorer
def density(p_, u_, t, x_, element, n, w_, log_weights_):
    wide()
    p, u, w = carray(p_, ({values},)), carray(u_, ({inputs},)), carray(w_, ({memory},))
    x, log_weights = carray(x_, ({obs},)), carray(log_weights_, (n,))
"""
_FOOTER = """
ADDRESSES = (initial.address, transition.address, density.address)
"""


class Program(NamedTuple):
    """A step as nodes of a tape.

    Attributes
    ----------
    initial, transition : sequence of int
        The elements of the state after the move.
    kinds : pair of sequences of int
        Of the draws that each of the two needs (`seqdgm.kernels.particles_cpu_traced`).
    density : sequence of int
        Log-density of each element of the observation, or of the whole vector.
    inputs, obs : int
        Known inputs, and elements of the observation.
    """

    initial: Sequence[int]
    transition: Sequence[int]
    kinds: tuple[Sequence[int], Sequence[int]]
    density: Sequence[int]
    inputs: int
    obs: int

    @property
    def draws(self) -> int:
        """Rows of draws."""
        return max(map(len, self.kinds))


def write(tape: Tape, program: Program) -> str:
    """Source code of a module with the addresses of the three functions.

    Raises
    ------
    ValueError
        If something that is needed has no formula.
    """
    state = len(program.initial)
    rows = {"old": 0, "noise": state, "new": state + program.draws}
    sizes = {
        "values": len(tape.values),
        "inputs": program.inputs,
        "memory": BLOCK * (2 * state + program.draws),
        "obs": program.obs,
    }
    parts = [_HEADER.format(sources=_sources())]
    for name, nodes in (("initial", program.initial), ("transition", program.transition)):
        stores = [f"w[i + {BLOCK * (rows['new'] + d)}] = float({{{d}}})" for d in range(state)]
        parts.append(_MOVE.format(name=name, **sizes) + _loop(tape, rows, nodes, stores, 4))
    density = program.density
    total = " + ".join(f"{{{d}}}" for d in range(len(density)))
    parts.append(f"{_DENSITY.format(**sizes)}    if element == -1:\n")
    parts[-1] += _loop(tape, rows, density, [f"log_weights[i] += {total}"], 8)
    # The rest is for what is observed in part.
    for d, node in enumerate(density if program.obs == len(density) > 1 else ()):
        parts[-1] += f"    if element == {d}:\n"
        parts[-1] += _loop(tape, rows, [node], ["log_weights[i] += {0}"], 8)
    return "\n".join([*parts, _FOOTER])


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
    before: list[str] = []
    inside: list[str] = []
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
def load(source: str) -> tuple[int, ...]:
    """Addresses of the functions of a generated module, which stay until the process ends.

    They are compiled, or read from the disk where they were before.
    """
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
    addresses: tuple[int, ...] = module.ADDRESSES
    return addresses
