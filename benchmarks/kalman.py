"""Gaussian models: exact likelihoods and EM, beside the packages for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _harness import Call, Contender, Task, equal, main
from _linear import Model, as_system, bound_filter, level_model, random_model, simulate

import seqdgm as sq
from seqdgm.kernels import kalman_filter

MODEL_FIELDS = ("F", "H", "Q", "R", "m0", "P0")


@dataclass(frozen=True)
class Sizes:
    short: int
    long: int
    em_steps: int
    em_iterations: int


FULL = Sizes(1000, 10_000, 500, 50)
TINY = Sizes(30, 60, 30, 3)


# -- log-likelihood of a given model ------------------------------------------------------------


def kernel_call(model: Model, x: np.ndarray) -> Call:
    system, data = as_system(model), torch.from_numpy(x)[None]
    seen = torch.ones_like(data, dtype=torch.bool)
    lengths = torch.tensor([len(x)])
    return lambda: kalman_filter(system, data, seen, lengths, store="likelihood").loglik


def log_prob_call(model: Model, x: np.ndarray) -> Call:
    given = sq.LinearGaussianSSM(**model._asdict())
    return lambda: given.log_prob(x)


def statsmodels_call(model: Model, x: np.ndarray, *, univariate: bool = False) -> Call:
    from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

    bound = bound_filter(model, x, KalmanFilter)
    bound.filter_univariate = univariate
    return bound.loglike


def filterpy_call(model: Model, x: np.ndarray) -> Call:
    from filterpy.kalman import KalmanFilter

    def call() -> float:
        kf = KalmanFilter(dim_x=len(model.F), dim_z=len(model.H))
        kf.F, kf.H, kf.Q, kf.R = model.F, model.H, model.Q, model.R
        kf.x, kf.P = model.m0[:, None].copy(), model.P0.copy()
        total = 0.0
        for t, row in enumerate(x):
            if t:
                kf.predict()
            kf.update(row)
            total += kf.log_likelihood
        return total

    return call


def likelihood(title: str, model: Model, x: np.ndarray, *, step_by_step: bool = False) -> Task:
    contenders = [
        Contender("seqdgm, kernel", lambda: kernel_call(model, x)),
        Contender("seqdgm, `log_prob`", lambda: log_prob_call(model, x)),
        Contender("statsmodels", lambda: statsmodels_call(model, x), package="statsmodels"),
        Contender(
            "statsmodels, univariate",
            lambda: statsmodels_call(model, x, univariate=True),
            package="statsmodels",
        ),
    ]
    if step_by_step:
        filterpy = Contender("filterpy", lambda: filterpy_call(model, x), package="filterpy")
        contenders.append(filterpy)
    return Task(f"log-likelihood, {title}, T = {len(x):,}", contenders, equal(1e-9))


def level(steps: int) -> Task:
    model = level_model()
    return likelihood("local level", model, simulate(model, steps, seed=1))


def state_four(sizes: Sizes) -> Task:
    model = random_model(4, 2, seed=2)
    x = simulate(model, sizes.short, seed=3)
    return likelihood("state 4, observed 2", model, x, step_by_step=True)


def state_thirty_two(sizes: Sizes) -> Task:
    model = random_model(32, 16, seed=9)
    return likelihood("state 32, observed 16", model, simulate(model, sizes.short, seed=10))


# -- EM -----------------------------------------------------------------------------------------


def em(sizes: Sizes) -> Task:
    model = random_model(4, 2, seed=5)
    x = simulate(model, sizes.em_steps, seed=6)
    rng = np.random.default_rng(7)
    start = model._replace(
        F=model.F + 0.05 * rng.normal(size=(4, 4)), Q=np.eye(4), R=np.eye(2), m0=np.ones(4)
    )

    def ours() -> Call:
        # One step more than the peer's: ours reports the likelihood before its last M-step.
        options: dict[str, Any] = {"max_iter": sizes.em_iterations + 1, "tol": 0.0}
        learn = MODEL_FIELDS
        return lambda: sq.LinearGaussianSSM(**start._asdict(), learn=learn).fit(
            x, method="em", **options
        )

    def pykalman() -> Call:
        from pykalman import KalmanFilter

        names = (
            "transition_matrices",
            "observation_matrices",
            "transition_covariance",
            "observation_covariance",
            "initial_state_mean",
            "initial_state_covariance",
        )
        given = dict(zip(names, start, strict=True))
        return lambda: KalmanFilter(**given).em(x, n_iter=sizes.em_iterations, em_vars=list(names))

    return Task(
        f"EM, state 4, observed 2, T = {sizes.em_steps}, {sizes.em_iterations} iterations",
        [
            Contender("seqdgm", ours, lambda m: m.fit_report_.objective[-1]),
            Contender("pykalman", pykalman, lambda kf: kf.loglikelihood(x), "pykalman"),
        ],
        equal(1e-6),
    )


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "level-short": lambda sizes: level(sizes.short),
    "level-long": lambda sizes: level(sizes.long),
    "state-4": state_four,
    "state-32": state_thirty_two,
    "em": em,
}

if __name__ == "__main__":
    main("kalman", __doc__, TASKS, full=FULL, tiny=TINY)
