"""ARIMA models: one likelihood, whole fits of a series, and fits of a panel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from _harness import Call, Contender, Task, equal, main, optimum

import seqdgm as sq
from seqdgm.kernels import kalman_filter
from seqdgm.models._arima_fit import fit_jobs
from seqdgm.models._arima_spec import unconstrain

EVALUATIONS = 100
AIRLINE: dict[str, Any] = {"order": (0, 1, 1), "seasonal_order": (0, 1, 1, 12)}


@dataclass(frozen=True)
class Sizes:
    panel_series: int
    panel_steps: int


FULL = Sizes(1000, 100)
TINY = Sizes(4, 50)


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


def airline_peers(y: pd.Series, params: list[float]) -> list[Contender]:
    """Likelihoods of the airline model by others, for the same parameters."""

    def statsmodels(*, simple_differencing: bool) -> Call:
        from statsmodels.tsa.statespace.sarimax import SARIMAX

        model = SARIMAX(y, **AIRLINE, simple_differencing=simple_differencing)
        return lambda: model.loglike(params)

    def statsforecast() -> Call:
        from statsforecast.arima import arima_like, make_arima

        ma = np.zeros(13)
        ma[0], ma[11], ma[12] = params[0], params[1], params[0] * params[1]
        x, nothing = y.to_numpy(), np.zeros(0)
        difference = np.convolve([1.0, -1.0], [1.0, *np.zeros(11), -1.0])
        start = make_arima(nothing, ma, -difference[1:])

        def call() -> float:
            # The loop writes into the moments that it is given.
            a, P, Pn = start["a"].copy(), start["P"].copy(), start["Pn"].copy()
            theta, delta = start["theta"], start["delta"]
            squares, logs, count, _ = arima_like(x, nothing, theta, delta, a, P, Pn, 0, False)
            variance = params[-1]
            log_2pi = np.log(2 * np.pi * variance)
            return float(-0.5 * (count * log_2pi + logs + squares / variance))

        return call

    return [
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
        Contender("statsforecast, filter alone", statsforecast, package="statsforecast"),
    ]


# Forms that are not differenced first stand in for the diffuse start by a variance of 1e6.
SAME_LIKELIHOOD = equal(0.0, atol=5e-3)


def airline_likelihood(sizes: Sizes) -> Task:
    y = log_airline()
    fitted = airline_model().fit(y)
    params = [*fitted.coefficients_[0].tolist(), fitted.sigma2_.item()]
    return Task(
        "log-likelihood, airline (0,1,1)(0,1,1)12, T = 144",
        [
            Contender("seqdgm, matrices and kernel", lambda: sarima_evaluation(fitted)),
            Contender("seqdgm, `log_prob`", lambda: fitted.log_prob),
            *airline_peers(y, params),
        ],
        SAME_LIKELIHOOD,
    )


def airline_search(sizes: Sizes) -> Task:
    """What a search repeats: the likelihood at other parameters, here a hundred times."""
    y = log_airline()
    fitted = airline_model().fit(y)
    params = [*fitted.coefficients_[0].tolist(), fitted.sigma2_.item()]

    def ours() -> Call:
        spec, times = fitted.spec_, np.zeros(EVALUATIONS, int)
        start = np.repeat(unconstrain(spec, fitted.coefficients_.numpy()), EVALUATIONS, 0)
        x, lengths = y.to_numpy()[None], np.array([len(y)])
        return lambda: fit_jobs(spec, x, lengths, series=times, start=start, max_iter=0)

    def repeated(peer: Contender) -> Contender:
        def prepare() -> Call:
            call = peer.prepare()
            return lambda: [call() for _ in range(EVALUATIONS)]

        return Contender(peer.name, prepare, lambda values: values[0], peer.package)

    return Task(
        "one of many log-likelihoods in a search, airline",
        [
            Contender("seqdgm, compiled search", ours, lambda fits: fits.log_likelihood[0]),
            *map(repeated, airline_peers(y, params)),
        ],
        SAME_LIKELIHOOD,
        units=EVALUATIONS,
    )


def exact(y: Any, spec: dict[str, Any], params: Any) -> float:
    """Likelihood of the differenced series at its best variance, by a package none of us wrote.

    The packages report likelihoods of their own kinds; what their optimisers reach is compared.
    """
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    options = {"simple_differencing": True, "concentrate_scale": True}
    return float(SARIMAX(np.asarray(y), **spec, **options).loglike(np.asarray(params, float)))


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

    def reached(params: Any) -> float:
        return exact(y, spec, params)

    return Task(
        title,
        [
            Contender("seqdgm", ours, lambda m: reached(m.coefficients_[0])),
            Contender("statsmodels", statsmodels, lambda r: reached(r.params[:-1]), "statsmodels"),
            Contender(
                "statsmodels, differenced first, no standard errors",
                statsmodels_fast,
                lambda r: reached(r.params[:-1]),
                "statsmodels",
            ),
            Contender(
                "statsforecast",
                statsforecast,
                lambda m: reached(list(m.model_["coef"].values())),
                "statsforecast",
            ),
        ],
        optimum(slack=1e-3, short=0.5),
    )


def airline_fit(sizes: Sizes) -> Task:
    y = log_airline()
    return arima_fit("fit, airline (0,1,1)(0,1,1)12, T = 144", y, AIRLINE)


def walk(steps: int, seed: int) -> np.ndarray:
    """A series of ARIMA(1,1,1)."""
    noise = np.random.default_rng(seed).normal(size=steps + 1)
    change = np.zeros(steps + 1)
    for t in range(1, steps + 1):
        change[t] = 0.6 * change[t - 1] + noise[t] + 0.3 * noise[t - 1]
    return np.cumsum(change[1:])


def arima_111_fit(sizes: Sizes) -> Task:
    index = pd.date_range("2000-01-01", periods=200, freq="MS")
    y = pd.Series(walk(200, seed=4), index=index)
    return arima_fit("fit, ARIMA(1,1,1), T = 200", y, {"order": (1, 1, 1)})


# -- a panel ------------------------------------------------------------------------------------


def arima_panel(sizes: Sizes) -> Task:
    dates = pd.date_range("2000-01-01", periods=sizes.panel_steps, freq="MS")
    long = pd.concat(
        pd.DataFrame({"unique_id": k, "ds": dates, "y": walk(sizes.panel_steps, seed=k)})
        for k in range(sizes.panel_series)
    )

    def statsforecast(processes: int) -> Call:
        from statsforecast import StatsForecast
        from statsforecast.models import ARIMA

        return lambda: StatsForecast([ARIMA(order=(1, 1, 1))], freq="MS", n_jobs=processes).fit(
            long
        )

    def threads(count: int) -> Call:
        torch.set_num_threads(count)
        return lambda: sq.ARIMA((1, 1, 1)).fit(long)

    series = long["y"].to_numpy().reshape(sizes.panel_series, -1)

    def reached(params: Any) -> float:
        spec = {"order": (1, 1, 1)}
        return sum(exact(y, spec, row) for y, row in zip(series, params, strict=True))

    return Task(
        f"fit, {sizes.panel_series:,} ARIMA(1,1,1), T = {sizes.panel_steps}",
        [
            Contender("seqdgm", lambda: threads(2), lambda m: reached(m.coefficients_)),
            Contender(
                "statsforecast, 2 processes",
                lambda: statsforecast(2),
                lambda sf: reached([[*m.model_["coef"].values()] for m in sf.fitted_[:, 0]]),
                "statsforecast",
            ),
        ],
        optimum(slack=1e-3 * sizes.panel_series, short=0.5 * sizes.panel_series),
    )


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "airline-likelihood": airline_likelihood,
    "airline-search": airline_search,
    "airline-fit": airline_fit,
    "arima-111-fit": arima_111_fit,
    "arima-panel": arima_panel,
}

if __name__ == "__main__":
    main("arima", __doc__, TASKS, full=FULL, tiny=TINY)
