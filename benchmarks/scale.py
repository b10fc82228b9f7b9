"""Processor time and memory of a backtest partition: one window of simulated monthly series.

    python benchmarks/scale.py --series 200 --model SeasonalNaive

prints one JSON object. A partition is one task of `seqdgm.backtest`, so what is printed is what a
worker of a cluster needs. Processor time, not wall time: it counts what a core-hour costs.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

import seqdgm as sq
from seqdgm.evaluation import backtest
from seqdgm.inference import warm_up

MODELS = {
    "SeasonalNaive": lambda: sq.SeasonalNaive(season=12),
    "ARIMA(0,1,1)(0,1,1)12": lambda: sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 12)),
    "AutoARIMA": lambda: sq.AutoARIMA(season=12),
    "StructuralSSM local level": lambda: sq.StructuralSSM(level="stochastic"),
}


def simulate(n: int, steps: int, seed: int) -> np.ndarray:
    """Local level with a fixed season, variances of one."""
    rng = np.random.default_rng(seed)
    level = 100 + rng.normal(size=(n, steps)).cumsum(axis=1)
    season = 5 * rng.normal(size=(n, 12))[:, np.arange(steps) % 12]
    return (level + season + rng.normal(size=(n, steps)))[..., None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--horizon", type=int, default=12)
    parser.add_argument("--model", choices=MODELS, default="SeasonalNaive")
    given = parser.parse_args()
    model = MODELS[given.model]()
    y = simulate(given.series, given.steps, seed=0)
    warm_up(model)
    backtest(model, y[:8], given.horizon, seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    backtest(model, y, given.horizon, seed=0)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "model": given.model,
        "series": given.series,
        "cpu_seconds_per_1000": round(seconds / given.series * 1000, 2),
        "process_mb": round(peak / 1024),
        "growth_mb": round((peak - before) / 1024),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
