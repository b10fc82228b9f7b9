"""Growth of time and memory of bootstrap filters in particles, steps and series.

Each size runs in a process of its own, whose peak memory is read before and after the call.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from _harness import duration, environment, tabulate, write_table
from particle import MU, RHO, SIGMA, Volatility
from scaling import peak_bytes

import seqdgm as sq

# (series, particles, steps): each grows by itself.
SIZES = [
    *[(1, 10**k, 100) for k in range(2, 8)],
    *[(1, 1_000, 10**k) for k in range(2, 6)],
    *[(10**k, 1_000, 100) for k in range(1, 4)],
]
LARGEST = (1, 10**7, 1_000)
WRITTEN_AT_MOST = 10**7  # particle-steps of the model that a user wrote, which takes longest
REPEATED_AT_MOST = 10**8  # particle-steps of which the best of three calls is taken
COLUMNS = (
    "work",
    "series",
    "particles",
    "steps",
    "time",
    "time a particle-step",
    "memory beyond the data",
)


def models() -> dict[str, sq.StateSpaceModel]:
    given = sq.StochasticVolatility(mean=0.0, mu=MU, rho=RHO, sigma=SIGMA)
    return {"StochasticVolatility": given, "user's model": Volatility(checked=False)}


def measure(work: str, series: int, n_particles: int, steps: int) -> dict[str, float]:
    """Seconds of the best call, and bytes that the first one adds to the peak."""
    torch.set_num_threads(1)
    model = models()[work]
    x = np.exp(MU / 2) * np.random.default_rng(2).normal(size=(series, steps, 1))
    model.log_prob(x[:2, :4], seed=0, n_particles=100)
    repeats = 3 if series * n_particles * steps <= REPEATED_AT_MOST else 1
    before, seconds = peak_bytes(), []
    for k in range(repeats):
        begin = time.perf_counter()
        model.log_prob(x, seed=k, n_particles=n_particles)
        seconds.append(time.perf_counter() - begin)
        grown = peak_bytes() - before if k == 0 else grown
    return {"seconds": min(seconds), "bytes": grown}


def in_a_process(work: str, *size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", work, *map(str, size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def sizes(work: str, *, tiny: bool) -> list[tuple[int, int, int]]:
    if tiny:
        return [(1, 100, 10), (2, 200, 20)]
    if work == "user's model":
        return [size for size in SIZES if np.prod(size) <= WRITTEN_AT_MOST]
    return [*SIZES, LARGEST]


def main(*, tiny: bool) -> None:
    rows = []
    for work in models():
        for size in sizes(work, tiny=tiny):
            found = in_a_process(work, *size)
            each = found["seconds"] / float(np.prod(size))
            grown = f"{found['bytes'] / 2**20:,.0f} MB"
            cells = [duration(found["seconds"]), duration(each), grown]
            rows.append([work, *(f"{axis:,}" for axis in size), *cells])
    print(tabulate(COLUMNS, rows))
    if not tiny:
        about = "Log-likelihood of stochastic volatility by a bootstrap filter, one thread."
        write_table("particle_scaling", about, COLUMNS, rows, environment())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes; nothing is recorded")
    parser.add_argument("--measure", nargs=4, metavar=("WORK", "SERIES", "PARTICLES", "STEPS"))
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], *map(int, options.measure[1:]))))
    else:
        main(tiny=options.tiny)
