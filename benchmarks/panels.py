"""Panels: filter and smooth many local linear trends, each with variances of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _harness import Call, Contender, Task, equal, main
from _linear import Model, as_system, bound_filter, simulate

from seqdgm.kernels import kalman_smoother


@dataclass(frozen=True)
class Sizes:
    few: int
    many: int
    steps: int


FULL = Sizes(100, 10_000, 100)
TINY = Sizes(2, 4, 20)


def trend_panel(series: int, steps: int) -> tuple[Model, np.ndarray]:
    """Local linear trends, each with variances of its own, and one series from each."""
    rng = np.random.default_rng(8)
    shared = {"F": np.array([[1.0, 1.0], [0.0, 1.0]]), "H": np.array([[1.0, 0.0]])}
    variances = rng.uniform(0.05, 0.5, (series, 2))
    model = Model(
        **{name: np.tile(value, (series, 1, 1)) for name, value in shared.items()},
        Q=np.stack([np.diag(v) for v in variances]),
        R=rng.uniform(0.5, 2.0, (series, 1, 1)),
        m0=np.zeros((series, 2)),
        P0=np.tile(10.0 * np.eye(2), (series, 1, 1)),
    )
    one = [Model(*(field[k] for field in model)) for k in range(series)]
    return model, np.stack([simulate(m, steps, seed=k) for k, m in enumerate(one)])


def panel_smoother(model: Model, x: np.ndarray, threads: int) -> Call:
    system, data = as_system(model), torch.from_numpy(x)
    seen = torch.ones_like(data, dtype=torch.bool)
    lengths = torch.full((len(x),), x.shape[1])

    def call() -> Any:
        torch.set_num_threads(threads)
        return kalman_smoother(system, data, seen, lengths, lag_one=False)

    return call


def simdkalman_smoother(model: Model, x: np.ndarray) -> Call:
    from simdkalman import KalmanFilter

    kf = KalmanFilter(
        state_transition=model.F[0],
        process_noise=model.Q,
        observation_model=model.H[0],
        observation_noise=model.R,
    )
    options = {"initial_value": model.m0[..., None], "initial_covariance": model.P0}
    return lambda: kf.smooth(x, observations=False, **options)


def dynamax_smoother(model: Model, x: np.ndarray) -> Call:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from dynamax.linear_gaussian_ssm.inference import lgssm_smoother, make_lgssm_params

    def smooth(Q: Any, R: Any, y: Any) -> Any:
        params = make_lgssm_params(model.m0[0], model.P0[0], model.F[0], Q, model.H[0], R)
        out = lgssm_smoother(params, y)
        return out.smoothed_means, out.smoothed_covariances

    run = jax.jit(jax.vmap(smooth))
    held = tuple(jnp.asarray(field) for field in (model.Q, model.R, x))
    return lambda: jax.block_until_ready(run(*held))


def statsmodels_smoother(model: Model, x: np.ndarray) -> Call:
    from statsmodels.tsa.statespace.kalman_smoother import (
        SMOOTHER_STATE,
        SMOOTHER_STATE_COV,
        KalmanSmoother,
    )

    bound = []
    for k, data in enumerate(x):
        one = bound_filter(Model(*(field[k] for field in model)), data, KalmanSmoother)
        one.smoother_output = SMOOTHER_STATE | SMOOTHER_STATE_COV
        bound.append(one)
    return lambda: [one.smooth() for one in bound]


def panel(series: int, steps: int, *, one_by_one: bool) -> Task:
    model, x = trend_panel(series, steps)
    contenders = [
        Contender("seqdgm, kernel", lambda: panel_smoother(model, x, 1), lambda out: out.mean),
        Contender(
            "seqdgm, kernel, 2 threads", lambda: panel_smoother(model, x, 2), lambda out: out.mean
        ),
        Contender(
            "simdkalman",
            lambda: simdkalman_smoother(model, x),
            lambda out: out.states.mean,
            "simdkalman",
        ),
        Contender("dynamax", lambda: dynamax_smoother(model, x), lambda out: out[0], "dynamax"),
    ]
    if one_by_one:
        contenders.append(
            Contender(
                "statsmodels, one by one",
                lambda: statsmodels_smoother(model, x),
                lambda results: np.stack([r.smoothed_state.T for r in results]),
                "statsmodels",
            )
        )
    title = f"filter and smooth, {series:,} local linear trends, T = {steps}"
    return Task(title, contenders, equal(1e-7, atol=1e-7))


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "panel-few": lambda sizes: panel(sizes.few, sizes.steps, one_by_one=True),
    "panel-many": lambda sizes: panel(sizes.many, sizes.steps, one_by_one=False),
}

if __name__ == "__main__":
    main("panels", __doc__, TASKS, full=FULL, tiny=TINY)
