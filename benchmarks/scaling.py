"""Growth of time and memory of the Gaussian kernels in series and in steps.

Each size runs in a process of its own, whose peak memory is read before and after the call.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _harness import duration, environment, tabulate, write_table
from _linear import as_system, random_model

from seqdgm.kernels import kalman_filter, kalman_smoother

STATE = 4
# (series, steps): a hundred to ten million series-steps, in both directions.
SIZES = [
    *[(1, 10**k) for k in range(2, 7)],
    *[(10**k, 100) for k in range(1, 5)],
    (10_000, 1_000),
]
SMOOTHED_AT_MOST = 1_000_000  # series-steps; the result of more is large by itself
WORK: dict[str, Callable[..., Any]] = {
    "log-likelihood": lambda *data: kalman_filter(*data, store="likelihood"),
    "smoother": lambda *data: kalman_smoother(*data, lag_one=False),
}
COLUMNS = ("work", "series", "steps", "time", "time a series-step", "memory beyond the data")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(work: str, series: int, steps: int) -> dict[str, float]:
    """Seconds of the best of three calls, and bytes that the first one adds to the peak."""
    shared = as_system(random_model(STATE, 1, seed=1))
    rng = np.random.default_rng(2)
    warm = prepared(shared, rng.normal(size=(2, 4, 1)))
    WORK[work](*warm)
    data = prepared(shared, rng.normal(size=(series, steps, 1)))
    before, seconds = peak_bytes(), []
    for k in range(3):
        begin = time.perf_counter()
        WORK[work](*data)
        seconds.append(time.perf_counter() - begin)
        grown = peak_bytes() - before if k == 0 else grown
    return {"seconds": min(seconds), "bytes": grown}


def prepared(system: Any, x: np.ndarray) -> tuple[Any, ...]:
    data = torch.from_numpy(x)
    lengths = torch.full((len(x),), x.shape[1])
    return system, data, torch.ones_like(data, dtype=torch.bool), lengths


def in_a_process(work: str, series: int, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, work, str(series), str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    rows = []
    for work in WORK:
        for series, steps in SIZES:
            if work == "smoother" and series * steps > SMOOTHED_AT_MOST:
                continue
            found = in_a_process(work, series, steps)
            each = found["seconds"] / (series * steps)
            size = f"{found['bytes'] / 2**20:,.0f} MB"
            rows.append([work, f"{series:,}", f"{steps:,}"])
            rows[-1] += [duration(found["seconds"]), duration(each), size]
    print(tabulate(COLUMNS, rows))
    about = f"State {STATE}, observed 1, shared matrices. Memory holds the result of the smoother."
    write_table("scaling", about, COLUMNS, rows, environment())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
