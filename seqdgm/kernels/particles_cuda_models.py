"""How the particles of the fused filters move and what an observation adds to their weights.

A state is a tuple of its elements, each a tile (2, pairs) of particles: no product of a matrix
needs threads to talk to each other, and no element is padding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from seqdgm.kernels.particles_cuda_steps import normals

LOG_2PI = tl.constexpr(math.log(2.0 * math.pi))


class Linear(NamedTuple):
    """A `LinearProblem` in records, and how far apart they lie for series and for steps."""

    start: Any  # m0, root0
    dynamics: Any  # b, F, root
    emission: Any  # for each element of an observation 1 / var, -log(2 pi var) / 2, h
    y: Any  # (series, time, obs)
    mask: Any  # as bytes
    start_by_series: Any
    dynamics_by_series: Any
    dynamics_by_step: Any
    emission_by_series: Any
    emission_by_step: Any


class LogVariance(NamedTuple):
    """A `VolatilityProblem`."""

    parameters: Any  # mu, rho, sigma, m0, s0, leverage, df (0 if normal), log-constant of t
    y: Any
    mask: Any  # as bytes
    parameters_by_series: Any
    y_by_series: Any


@triton.jit
def paired(draws: tl.tuple, pair: tl.tensor, half: tl.tensor, purpose: tl.tensor) -> tl.tensor:
    """Normal draws of the particles of pairs; `draws`: address of the seed, series, step."""
    seed, n, t = draws
    # A seed that is read anew keeps no registers for the keys of all rounds.
    seed = tl.load(seed, volatile=True)
    cosine, sine = normals(seed, n, pair, t, tl.to_tensor(purpose))
    return tl.where(half == 0, cosine, sine)


@triton.jit
def move_linear(
    draws: tl.tuple,
    pair: tl.tensor,
    half: tl.tensor,
    before: tl.tensor,
    known: tl.tensor,
    model: tl.tuple,
    count: tl.tensor,
    steps: tl.tensor,
    obs: tl.tensor,
    STATE: tl.constexpr,
) -> tuple[tl.tuple, tl.tensor]:
    """States after a step, and the log-density of the observation.

    `before` are the addresses of the ancestors, `known` says which there are; at first none.
    """
    _, n, t = draws
    n, later = n.to(tl.int64), t > 0
    dynamics = model.dynamics + n * model.dynamics_by_series
    dynamics += t.to(tl.int64) * model.dynamics_by_step
    F, root = dynamics + STATE, dynamics + STATE + STATE * STATE
    if t == 0:
        dynamics = model.start + n * model.start_by_series
        root = dynamics + STATE
    z = ()
    for i in tl.static_range(STATE):
        z += (tl.load(dynamics + i) + tl.zeros(known.shape, tl.float64),)  # type: ignore[assignment]
    for j in range(STATE):
        old = tl.load(before + j * count, mask=known, other=0.0)
        z = add_column(z, F + j, old, later, STATE)
    for j in range(STATE):
        e = paired(draws, pair, half, j)
        z = add_column(z, root + j, e, t >= 0, STATE)
    at = (n * steps + t) * obs
    emission = model.emission + n * model.emission_by_series
    emission += t.to(tl.int64) * model.emission_by_step
    gain = tl.zeros(known.shape, tl.float64)
    for o in range(obs):
        if tl.load(model.mask + at + o) != 0:
            row = emission + o * (STATE + 2)
            error = tl.load(model.y + at + o) - product(row + 2, z, STATE)
            gain += tl.load(row + 1) - 0.5 * tl.load(row) * error * error
    return z, gain


@triton.jit
def add_column(
    z: tl.tuple, column: tl.tensor, x: tl.tensor, wanted: tl.tensor, STATE: tl.constexpr
) -> tl.tuple:
    """Add a column of a square matrix times a number to a vector."""
    new = ()
    for i in tl.static_range(STATE):
        moved = z[i] + tl.load(column + i * STATE, mask=wanted, other=0.0) * x
        new += (moved,)  # type: ignore[assignment]
    return new


@triton.jit
def product(h: tl.tensor, z: tl.tuple, STATE: tl.constexpr) -> tl.tensor:
    """The scalar product h z."""
    total = tl.load(h) * z[0]
    for i in tl.static_range(1, STATE):
        total += tl.load(h + i) * z[i]
    return total


@triton.jit
def move_volatility(
    draws: tl.tuple,
    pair: tl.tensor,
    half: tl.tensor,
    before: tl.tensor,
    known: tl.tensor,
    model: tl.tuple,
) -> tuple[tl.tuple, tl.tensor]:
    """Log-variances after a step, and the log-density of the observation."""
    _, n, t = draws
    own = model.parameters + n * model.parameters_by_series
    mu, rho, sigma = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    leverage, df = tl.load(own + 5), tl.load(own + 6)
    at = n.to(tl.int64) * model.y_by_series + t
    e = paired(draws, pair, half, 0)
    if t == 0:
        z = tl.load(own + 3) + tl.load(own + 4) * e
    else:
        old = tl.load(before, mask=known, other=0.0)
        if (leverage != 0.0) & (tl.load(model.mask + at - 1) != 0):
            shock = tl.load(model.y + at - 1) * tl.exp(-0.5 * old)
            e = leverage * shock + tl.sqrt(1.0 - leverage * leverage) * e
        z = mu + rho * (old - mu) + sigma * e
    gain = tl.zeros(known.shape, tl.float64)
    if tl.load(model.mask + at) != 0:
        y = tl.load(model.y + at)
        square = y * y * tl.exp(-z)
        if df > 0.0:
            gain = tl.load(own + 7) - 0.5 * z - (0.5 * df + 0.5) * tl.log(1.0 + square / df)
        else:
            gain = -0.5 * (LOG_2PI + z + square)
    return (z,), gain
