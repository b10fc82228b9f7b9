"""Bootstrap filters of pydpf, which takes all series as one batch.

It resamples at every step, as its documentation recommends for batches; besides, with its
conditional resampler (1.2.3) and half the particles as threshold the evidence of the volatility
model ends in a KeyError. A model is written with plain tensor operations, which is faster than
with the package's distributions. Double precision needs torch's default to be double while the
filter runs, for the offsets of systematic resampling; the factors of the evidence come back in
single precision all the same.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from _harness import Call, Contender
from torch import Tensor

SINGLE = "pydpf, float32 (shown, does not count)"


class Walk(NamedTuple):
    """A Markov model of many particles: `first` and `move` turn noise into states."""

    dim: int
    first: Callable[[Tensor], Tensor]
    move: Callable[[Tensor, Tensor], Tensor]
    log_density: Callable[[Tensor, Tensor], Tensor]


MakeWalk = Callable[[torch.dtype], Walk]


def contender(make: MakeWalk, x: np.ndarray, n_particles: int, *, double: bool = True) -> Contender:
    """Evidence of all series in `x`, (series, steps, dim), with one thread."""

    def prepare() -> Call:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is no GPU
            import pydpf
        kind = torch.float64 if double else torch.float32
        data = torch.tensor(x, dtype=kind).transpose(0, 1).contiguous()
        generator = torch.Generator()
        run = pydpf.ParticleFilter(
            pydpf.SystematicResampler(generator), _model(pydpf, make(kind), generator, kind)
        ).eval()
        factors, seeds = pydpf.LogLikelihoodFactors(), itertools.count()

        def call() -> Tensor:
            torch.set_num_threads(1)
            generator.manual_seed(next(seeds))
            before = torch.get_default_dtype()
            torch.set_default_dtype(kind)
            try:
                with torch.inference_mode():
                    found = run(n_particles, len(data) - 1, factors, data)
            finally:
                torch.set_default_dtype(before)
            return found.double().sum((0, 2))

        return call

    name = "pydpf, float64" if double else SINGLE
    return Contender(name, prepare, np.asarray, "pydpf", counts=double)


def _model(pydpf: Any, walk: Walk, generator: torch.Generator, kind: torch.dtype) -> Any:
    """The walk as pydpf takes it: a module for each of its laws."""

    def noise(series: int, count: int) -> Tensor:
        return torch.randn(series, count, walk.dim, dtype=kind, generator=generator)

    class Prior(pydpf.Module):
        def sample(self, batch_size: int, n_particles: int, **rest: Any) -> Tensor:
            return walk.first(noise(batch_size, n_particles))

    class Dynamics(pydpf.Module):
        def sample(self, prev_state: Tensor, **rest: Any) -> Tensor:
            return walk.move(prev_state, noise(*prev_state.shape[:2]))

    class Observation(pydpf.Module):
        def fitness(self, state: Tensor, observation: Tensor, **rest: Any) -> Tensor:
            return walk.log_density(observation[:, None], state)

    return pydpf.FilteringModel(
        prior_model=Prior(), dynamic_model=Dynamics(), observation_model=Observation()
    )


def volatility(mu: float, rho: float, sigma: float) -> MakeWalk:
    """Stochastic volatility that begins in its stationary distribution."""
    spread, half_log = sigma / math.sqrt(1 - rho**2), 0.5 * math.log(2 * math.pi)

    def log_density(x: Tensor, z: Tensor) -> Tensor:
        return (-0.5 * (z + x**2 * torch.exp(-z)) - half_log)[..., 0]

    walk = Walk(
        1,
        lambda noise: mu + spread * noise,
        lambda z, noise: mu * (1 - rho) + rho * z + sigma * noise,
        log_density,
    )
    return lambda kind: walk


def linear(F: np.ndarray, H: np.ndarray, state_std: float, noise_std: float) -> MakeWalk:
    """Linear and Gaussian with independent errors, from N(0, I)."""
    constant = len(H) * math.log(noise_std * math.sqrt(2 * math.pi))

    def make(kind: torch.dtype) -> Walk:
        transition, loading = (torch.from_numpy(m.T.copy()).to(kind) for m in (F, H))

        def log_density(x: Tensor, z: Tensor) -> Tensor:
            error = (x - z @ loading) / noise_std
            return -0.5 * (error * error).sum(-1) - constant

        return Walk(
            len(F),
            lambda noise: noise,
            lambda z, noise: z @ transition + state_std * noise,
            log_density,
        )

    return make
