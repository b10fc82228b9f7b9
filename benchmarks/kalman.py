"""Gaussian models: likelihoods, whole fits, EM and a panel, beside the packages for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from _harness import Call, Contender, Task, equal, main, optimum

import seqdgm as sq
from seqdgm.kernels import kalman_filter, kalman_smoother
from seqdgm.kernels.types import System

AIRLINE: dict[str, Any] = {"order": (0, 1, 1), "seasonal_order": (0, 1, 1, 12)}
MODEL_FIELDS = ("F", "H", "Q", "R", "m0", "P0")


@dataclass(frozen=True)
class Sizes:
    short: int
    long: int
    em_steps: int
    em_iterations: int
    panel_series: int
    panel_steps: int


FULL = Sizes(1000, 10_000, 500, 50, 1000, 100)
TINY = Sizes(30, 60, 30, 3, 4, 20)


class Model(NamedTuple):
    """One linear-Gaussian model, or one for each series where the first axis says so."""

    F: np.ndarray
    H: np.ndarray
    Q: np.ndarray
    R: np.ndarray
    m0: np.ndarray
    P0: np.ndarray


# -- data ---------------------------------------------------------------------------------------


def level_model() -> Model:
    one = np.ones((1, 1))
    return Model(F=one, H=one, Q=0.5 * one, R=2.0 * one, m0=np.zeros(1), P0=10.0 * one)


def random_model(state: int, obs: int, seed: int) -> Model:
    """A stable model whose transition shrinks by at most 0.9."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(state, state))
    return Model(
        F=0.9 * raw / np.abs(np.linalg.eigvals(raw)).max(),
        H=rng.normal(size=(obs, state)),
        Q=np.diag(rng.uniform(0.2, 1.0, state)),
        R=np.diag(rng.uniform(0.2, 1.0, obs)),
        m0=np.zeros(state),
        P0=np.eye(state),
    )


def simulate(model: Model, steps: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = rng.multivariate_normal(model.m0, model.P0)
    noise_q, noise_r = np.linalg.cholesky(model.Q), np.linalg.cholesky(model.R)
    x = np.empty((steps, len(model.H)))
    for t in range(steps):
        if t:
            z = model.F @ z + noise_q @ rng.normal(size=len(z))
        x[t] = model.H @ z + noise_r @ rng.normal(size=len(noise_r))
    return x


# -- log-likelihood of a given model ------------------------------------------------------------


def as_system(model: Model) -> System:
    """The model for the kernels; one without an axis for series gets one of length 1."""
    fields = {}
    for name, value in model._asdict().items():
        field = torch.from_numpy(np.array(value, float))
        start = name in ("m0", "P0")
        bare = field.ndim == (1 if name == "m0" else 2)
        field = field[None] if bare else field
        fields[name] = field if start else field[:, None]
    sys, state = fields["m0"].shape
    obs = fields["H"].shape[-2]
    zeros = {"b": torch.zeros(sys, 1, state), "d": torch.zeros(sys, 1, obs)}
    return System(
        **fields,
        **{name: value.double() for name, value in zeros.items()},
        Pinf=torch.zeros_like(fields["P0"]),
    )


def kernel_call(model: Model, x: np.ndarray) -> Call:
    system, data = as_system(model), torch.from_numpy(x)[None]
    seen = torch.ones_like(data, dtype=torch.bool)
    lengths = torch.tensor([len(x)])
    return lambda: kalman_filter(system, data, seen, lengths, store="likelihood").loglik


def log_prob_call(model: Model, x: np.ndarray) -> Call:
    given = sq.LinearGaussianSSM(**model._asdict())
    return lambda: given.log_prob(x)


def bound_filter(model: Model, x: np.ndarray, kind: Callable[..., Any]) -> Any:
    """The model as a filter or smoother of statsmodels."""
    out = kind(k_endog=x.shape[1], k_states=len(model.F))
    out.bind(np.array(x))
    out["transition"], out["design"] = model.F, model.H
    out["state_cov"], out["obs_cov"] = model.Q, model.R
    out["selection"] = np.eye(len(model.F))
    out.initialize_known(model.m0, model.P0)
    return out


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


# -- ARIMA --------------------------------------------------------------------------------------


def log_airline() -> Any:
    return np.log(sq.datasets.load("airline").y)


def airline_model() -> sq.ARIMA:
    return sq.ARIMA(AIRLINE["order"], seasonal=AIRLINE["seasonal_order"])


def sarima_evaluation(fitted: sq.ARIMA) -> Call:
    """What an optimiser repeats: build the matrices from the coefficients, and filter."""
    assert fitted.data_ is not None
    data = torch.from_numpy(fitted.data_.values.copy())
    seen, lengths = ~torch.isnan(data), torch.tensor([data.shape[1]])
    u, rows = torch.zeros(1, data.shape[1], 0).double(), torch.tensor([0])

    def call() -> Any:
        system = fitted.linear_gaussian(u, rows)
        return kalman_filter(system, data, seen, lengths, store="likelihood").loglik

    return call


def airline_likelihood(sizes: Sizes) -> Task:
    y = log_airline()
    fitted = airline_model().fit(y)
    params = [*fitted.coefficients_[0].tolist(), fitted.sigma2_.item()]

    def statsmodels(*, simple_differencing: bool) -> Call:
        from statsmodels.tsa.statespace.sarimax import SARIMAX

        model = SARIMAX(y, **AIRLINE, simple_differencing=simple_differencing)
        return lambda: model.loglike(params)

    return Task(
        "log-likelihood, airline (0,1,1)(0,1,1)12, T = 144",
        [
            Contender("seqdgm, matrices and kernel", lambda: sarima_evaluation(fitted)),
            Contender("seqdgm, `log_prob`", lambda: fitted.log_prob),
            Contender(
                "statsmodels, differenced first",
                lambda: statsmodels(simple_differencing=True),
                package="statsmodels",
            ),
            Contender(
                "statsmodels, state space",
                lambda: statsmodels(simple_differencing=False),
                package="statsmodels",
            ),
        ],
        # The state-space form there stands in for the diffuse start by a variance of 1e6.
        equal(0.0, atol=1e-3),
    )


def arima_fit(title: str, y: Any, spec: dict[str, Any]) -> Task:
    order, seasonal = spec["order"], spec.get("seasonal_order", (0, 0, 0, 0))

    def ours() -> Call:
        return lambda: sq.ARIMA(order, seasonal=seasonal).fit(y)

    def statsmodels() -> Call:
        from statsmodels.tsa.arima.model import ARIMA

        return lambda: ARIMA(y, **spec).fit()

    def statsmodels_fast() -> Call:
        from statsmodels.tsa.statespace.sarimax import SARIMAX

        return lambda: SARIMAX(y, **spec, simple_differencing=True).fit(disp=False, cov_type="none")

    def statsforecast() -> Call:
        from statsforecast.models import ARIMA

        season = {"season_length": seasonal[3], "seasonal_order": seasonal[:3]}
        model = ARIMA(order=order, **(season if seasonal[3] else {}))
        return lambda: model.fit(y.to_numpy())

    return Task(
        title,
        [
            Contender("seqdgm", ours, lambda m: m.fit_report_.log_likelihood[0]),
            Contender("statsmodels", statsmodels, lambda r: r.llf, "statsmodels"),
            Contender(
                "statsmodels, differenced first, no standard errors",
                statsmodels_fast,
                lambda r: r.llf,
                "statsmodels",
            ),
            Contender(
                "statsforecast", statsforecast, lambda m: m.model_["loglik"], "statsforecast"
            ),
        ],
        optimum(slack=1e-3, short=0.5),
    )


def airline_fit(sizes: Sizes) -> Task:
    y = log_airline()
    return arima_fit("fit, airline (0,1,1)(0,1,1)12, T = 144", y, AIRLINE)


def arima_111_fit(sizes: Sizes) -> Task:
    noise = np.random.default_rng(4).normal(size=201)
    change = np.zeros(201)
    for t in range(1, 201):
        change[t] = 0.6 * change[t - 1] + noise[t] + 0.3 * noise[t - 1]
    index = pd.date_range("2000-01-01", periods=200, freq="MS")
    y = pd.Series(np.cumsum(change[1:]), index=index)
    return arima_fit("fit, ARIMA(1,1,1), T = 200", y, {"order": (1, 1, 1)})


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


# -- a panel ------------------------------------------------------------------------------------


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


def panel_smoother(model: Model, x: np.ndarray) -> Call:
    system, data = as_system(model), torch.from_numpy(x)
    seen = torch.ones_like(data, dtype=torch.bool)
    lengths = torch.full((len(x),), x.shape[1])
    return lambda: kalman_smoother(system, data, seen, lengths, lag_one=False)


def panel(sizes: Sizes) -> Task:
    model, x = trend_panel(sizes.panel_series, sizes.panel_steps)

    def simdkalman() -> Call:
        from simdkalman import KalmanFilter

        kf = KalmanFilter(
            state_transition=model.F[0],
            process_noise=model.Q,
            observation_model=model.H[0],
            observation_noise=model.R,
        )
        options = {"initial_value": model.m0[..., None], "initial_covariance": model.P0}
        return lambda: kf.smooth(x, observations=False, **options)

    def statsmodels() -> Call:
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

    def smoothed_states(results: Any) -> np.ndarray:
        return np.stack([r.smoothed_state.T for r in results])

    return Task(
        f"filter and smooth, {sizes.panel_series:,} local linear trends, T = {sizes.panel_steps}",
        [
            Contender("seqdgm, kernel", lambda: panel_smoother(model, x), lambda out: out.mean),
            Contender("simdkalman", simdkalman, lambda out: out.states.mean, "simdkalman"),
            Contender("statsmodels, one by one", statsmodels, smoothed_states, "statsmodels"),
        ],
        equal(1e-7, atol=1e-7),
    )


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "level-short": lambda sizes: level(sizes.short),
    "level-long": lambda sizes: level(sizes.long),
    "state-4": state_four,
    "airline-likelihood": airline_likelihood,
    "airline-fit": airline_fit,
    "arima-111-fit": arima_111_fit,
    "em": em,
    "panel": panel,
}

if __name__ == "__main__":
    main("kalman", __doc__, TASKS, full=FULL, tiny=TINY)
