"""Models that the fused bootstrap filters of the CPU know: linear-Gaussian ones, and volatility."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from seqdgm.kernels.particles_cpu_filter import (
    HALF,
    RENEWED,
    Cloud,
    Output,
    Scratch,
    at,
    bind_run,
    fetch,
)
from seqdgm.kernels.particles_cpu_math import called, exp, log, normals, wide
from seqdgm.kernels.particles_cpu_resample import BLOCK

_LOG_2PI = math.log(2.0 * math.pi)
_ZERO = np.int64(0)  # a number that is no constant, for which a function would be compiled anew
MU, RHO, SIGMA, M0, S0, LEVERAGE, DF, CONSTANT = range(8)  # of a volatility
_LARGE = 1e300


class Model(NamedTuple):
    """A linear-Gaussian problem, or a volatility: then `volatility` is not empty."""

    F: np.ndarray
    root: np.ndarray
    b: np.ndarray
    m0: np.ndarray
    root0: np.ndarray
    h: np.ndarray
    var: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    volatility: np.ndarray


@called
def _add(out: np.ndarray, weights: np.ndarray, rows: np.ndarray, row: int, first: int) -> None:
    """Add weights of rows, from element `first` on; what has weight zero is left out."""
    wide()
    n, k = len(out), 0
    while k < len(weights):
        if weights[k] == 0.0:
            k += 1
            continue
        a, x = weights[k], rows[row + k, first : first + n]
        if k + 1 < len(weights):
            b, y = weights[k + 1], rows[row + k + 1, first : first + n]
            for p in range(n):
                out[p] += a * x[p] + b * y[p]
        else:
            for p in range(n):
                out[p] += a * x[p]
        k += 2


@called
def _move_linear(
    model: Model, cloud: Cloud, scratch: Scratch, key: Any, s: int, t: int, first: int
) -> None:
    facts, rows = cloud.facts, scratch.rows
    half, state = int(facts[HALF]), cloud.z.shape[1]
    new = cloud.z[1 - half]
    n = min(BLOCK, new.shape[1] - first)
    for d in range(state):
        normals(key, s, t, d, first, n, scratch.draws[d])
        if t > 0:
            fetch(cloud.z[half, d], cloud.ancestors, first, facts[RENEWED] > 0.0, rows[d])
    for i in range(state):
        out = new[i, first : first + n]
        if t > 0:
            out[:] = at(model.b, s, t)[i]
            _add(out, at(model.F, s, t)[i], rows, _ZERO, _ZERO)
            _add(out, at(model.root, s, t)[i, : i + 1], rows, state, _ZERO)
        else:
            out[:] = model.m0[s if len(model.m0) > 1 else 0, i]
            _add(out, model.root0[s if len(model.root0) > 1 else 0, i, : i + 1], rows, state, _ZERO)


@called
def _score_linear(model: Model, cloud: Cloud, scratch: Scratch, s: int, t: int, first: int) -> None:
    """Add the log-density of a step to the log-weights of a block."""
    wide()
    z = cloud.z[1 - int(cloud.facts[HALF])]
    log_weights = cloud.log_weights[first : first + BLOCK]
    n = len(log_weights)
    error = scratch.rows[len(scratch.rows) - 1, :n]
    h, var = at(model.h, s, t), at(model.var, s, t)
    y, seen = at(model.y, s, t), at(model.mask, s, t)
    for i in range(len(var)):
        if seen[i]:
            error[:] = -y[i]
            _add(error, h[i], z, _ZERO, first)
            scale, constant = 0.5 / var[i], 0.5 * (math.log(var[i]) + _LOG_2PI)
            for p in range(n):
                log_weights[p] -= scale * (error[p] * error[p]) + constant


@called
def _move_volatility(
    model: Model, cloud: Cloud, scratch: Scratch, key: Any, s: int, t: int, first: int
) -> None:
    wide()
    facts = cloud.facts
    half = int(facts[HALF])
    own = model.volatility[s if len(model.volatility) > 1 else 0]
    mu, rho, sigma, leverage = own[MU], own[RHO], own[SIGMA], own[LEVERAGE]
    m0, s0 = own[M0], own[S0]
    z = cloud.z[1 - half, 0, first : first + BLOCK]
    old, e = scratch.rows[0], scratch.rows[1]
    normals(key, s, t, _ZERO, first, len(z), scratch.draws[0])
    if t == 0:
        for p in range(len(z)):
            z[p] = m0 + s0 * e[p]
        return
    fetch(cloud.z[half, 0], cloud.ancestors, first, facts[RENEWED] > 0.0, old)
    if leverage != 0.0 and at(model.mask, s, t - 1)[0]:
        y, apart = leverage * at(model.y, s, t - 1)[0], math.sqrt(1.0 - leverage * leverage)
        for p in range(len(z)):
            e[p] = y * exp(-0.5 * old[p]) + apart * e[p]
    for p in range(len(z)):
        z[p] = mu + rho * (old[p] - mu) + sigma * e[p]


@called
def _score_volatility(model: Model, cloud: Cloud, s: int, t: int, first: int) -> None:
    """Add the log-density of a step to the log-weights of a block."""
    wide()
    own = model.volatility[s if len(model.volatility) > 1 else 0]
    df, constant, y = own[DF], own[CONSTANT], at(model.y, s, t)[0]
    z = cloud.z[1 - int(cloud.facts[HALF]), 0, first : first + BLOCK]
    log_weights = cloud.log_weights[first : first + BLOCK]
    square = y * y
    if df == 0.0:
        for p in range(len(z)):
            log_weights[p] += constant - 0.5 * (z[p] + square * exp(-z[p]))
        return
    square, power = square / df, 0.5 * df + 0.5
    for p in range(len(z)):
        ratio = 1.0 + square * exp(-z[p])
        penalty = power * log(ratio)
        # The logarithm knows neither infinity nor NaN.
        penalty = penalty if ratio < _LARGE else ratio
        log_weights[p] += constant - 0.5 * z[p] - penalty


@called
def move(
    model: Model, cloud: Cloud, scratch: Scratch, key: Any, s: int, t: int, first: int
) -> None:
    """Move a block of particles to step t."""
    if len(model.volatility) > 0:
        _move_volatility(model, cloud, scratch, key, s, t, first)
    else:
        _move_linear(model, cloud, scratch, key, s, t, first)


@called
def score(model: Model, cloud: Cloud, scratch: Scratch, s: int, t: int, first: int) -> None:
    """Add the log-densities of the observation to the log-weights of a block."""
    if len(model.volatility) == 0:
        _score_linear(model, cloud, scratch, s, t, first)
    elif at(model.mask, s, t)[0]:
        _score_volatility(model, cloud, s, t, first)


_run = bind_run(move, score)


def bind_filter(digest: str) -> Callable[..., None]:
    """The filter over a range of series, or a part of it for threads that share one."""

    def bootstrap(
        part: int,
        model: Model,
        cloud: Cloud,
        scratch: Scratch,
        key: np.ndarray,
        threshold: float,
        output: Output,
        series: int,
        lengths: np.ndarray,
        t: int,
        start: int,
        stop: int,
    ) -> None:
        """All of series `start` to `stop`; or a part of step t, for particles `start` to `stop`."""
        _ = digest
        data = (model, cloud, scratch, key, threshold, output)
        _run(part, *data, series, lengths, t, start, stop)

    return bootstrap
