"""Stochastic volatility of the pound/dollar rate: posteriors beside published estimates.

The 945 daily returns, 1 October 1981 to 28 June 1985, are the data set "sv". The priors are those
of Kim, Shephard and Chib (1998), and the returns are mean-corrected, as theirs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from _harness import RESULTS, environment, tabulate, write_table
from torch.distributions import (
    AffineTransform,
    Beta,
    InverseGamma,
    Normal,
    PowerTransform,
    TransformedDistribution,
    constraints,
)

import seqdgm as sq

COLUMNS = ("by", "persistence", "sigma of the log-variance", "scale exp(mu / 2)")
# Posterior means of Kim, Shephard and Chib (1998), Review of Economic Studies 65, and
# maximum likelihood by simulation of Durbin and Koopman (2012), Time Series Analysis by State Space
# Methods, 2nd ed., chapter 14.
PUBLISHED = {
    "Kim, Shephard and Chib (1998)": ("0.978", "0.158", "0.647"),
    "Durbin and Koopman (2012)": ("0.973", "0.173", "0.634"),
}


class Persistence(TransformedDistribution):
    """2 B - 1 with B a Beta variable: KSC's prior, whose mean is 0.86."""

    support = constraints.interval(-1.0, 1.0)

    def __init__(self) -> None:
        super().__init__(Beta(20.0, 1.5), [AffineTransform(-1.0, 2.0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=3000, help="kept draws of each chain")
    parser.add_argument("--tiny", action="store_true", help="few draws, to see that it all runs")
    parser.add_argument("--output", type=Path, help="folder of the results")
    options = parser.parse_args()
    returns = sq.datasets.load("sv").y.to_numpy()
    returns = returns[:100] if options.tiny else returns
    priors = {
        "mu": Normal(0.0, 10.0**0.5),
        "rho": Persistence(),
        "sigma": TransformedDistribution(InverseGamma(2.5, 0.025), [PowerTransform(0.5)]),
    }
    begin = time.perf_counter()
    found = sq.pmmh(
        sq.StochasticVolatility(mu=-0.9, rho=0.95, sigma=0.2),
        returns - returns.mean(),
        priors,
        n_iter=20 if options.tiny else options.iterations,
        n_particles=50 if options.tiny else 300,
        init={"mu": -0.9, "rho": 0.95, "sigma": 0.2},
        seed=0,
    )
    seconds = time.perf_counter() - begin
    draws = {"rho": found.draws["rho"], "sigma": found.draws["sigma"]}
    draws["scale"] = np.exp(found.draws["mu"] / 2)
    ours = [f"{x.mean():.3f} (sd {x.std():.3f})" for x in draws.values()]
    rows = [[name, *values] for name, values in PUBLISHED.items()]
    table = [["seqdgm, PMMH", *ours], *rows]
    print(tabulate(COLUMNS, table))
    summary = found.summary()[["ess_bulk", "rhat"]].round(3).to_dict("index")
    about = (
        f"Posterior means from 4 chains of {found.draws['mu'].shape[1]:,} draws, 300 particles, "
        f"{seconds:.0f} s; effective draws and R-hat {summary}; acceptance "
        f"{found.accept_rate.mean():.2f}. Durbin and Koopman's are maximum-likelihood estimates. "
        "The published figures have not been checked against the printed tables."
    )
    print(about)
    folder_out = options.output or (None if options.tiny else RESULTS)
    if folder_out is not None:
        write_table("volatility", about, COLUMNS, table, environment(), folder_out)


if __name__ == "__main__":
    main()
