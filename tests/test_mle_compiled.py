"""The compiled ARIMA search against the Kalman filter, statsmodels and the batched search."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import seqdgm as sq
from seqdgm.inference.quasi_newton import maximise
from seqdgm.kernels import kalman_filter
from seqdgm.models._arima import ArimaSpec, constrain, parameter_sizes, starting_values, system
from seqdgm.models._arima_fit import fit_jobs

SPECS = [
    ArimaSpec(),
    ArimaSpec(1, 0, 0),
    ArimaSpec(2, 1, 2),
    ArimaSpec(0, 2, 3, trend="c"),
    ArimaSpec(0, 1, 1, 0, 1, 1, 4),
    ArimaSpec(0, 0, 2, 1, 1, 2, 3),
    ArimaSpec(5, 0, 1, 1, 0, 1, 4, "ct"),
    ArimaSpec(1, 0, 1, trend="t"),
    ArimaSpec(0, 0, 1, trend="ct", n_inputs=1),
    ArimaSpec(1, 1, 1, 1, 1, 1, 4, "c", 2),
]
GAPS = [(), (0, 3, 17, 18, 19, 20, 40), (1, 2, 30), (0, 1, 58, 59)]


def draw(spec: ArimaSpec, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A series of the right order of integration, and regressors."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=steps)
    for lag in [1] * spec.d + [spec.s] * spec.D:
        for t in range(lag, steps):
            x[t] += x[t - lag]
    return x, rng.normal(size=(1, steps, spec.n_inputs))


def filtered(spec, theta, x, u) -> np.ndarray:
    """Concentrated log-likelihoods of rows of free parameters, by the filter with diffuse start."""
    rows, steps = len(theta), len(x)
    known = u if spec.n_inputs else None
    seen = torch.from_numpy(np.isfinite(x)).expand(rows, steps)[..., None]
    filled = torch.from_numpy(np.nan_to_num(x)).expand(rows, steps)[..., None]
    whole = system(spec, constrain(spec, theta), np.ones(rows), known, steps)
    lengths = torch.full((rows,), steps)
    out = kalman_filter(whole, filled, seen, lengths, store="likelihood")
    n, logdet, quad = (a.double().numpy() for a in (out.n_obs, out.logdet, out.quad))
    return -0.5 * (n * (np.log(2 * np.pi * quad / n) + 1) + logdet)


def one(spec, x, u=None, **options):
    return fit_jobs(spec, x[None], np.array([len(x)]), u if spec.n_inputs else None, **options)


def values(name: str) -> np.ndarray:
    return sq.datasets.load(name).y.to_numpy(np.float64)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("gaps", GAPS)
def test_likelihood_equals_the_filter_and_its_regression_is_the_best(spec, gaps):
    x, u = draw(spec, 60, 1)
    x[list(gaps)] = np.nan
    start = 0.7 * np.random.default_rng(2).normal(size=(1, spec.n_arma))
    found = one(spec, x, u, start=start, max_iter=0)
    assert found.done.all()
    np.testing.assert_array_equal(found.theta[:, : spec.n_arma], start)
    value = filtered(spec, found.theta, x, u)
    np.testing.assert_allclose(found.log_likelihood, value, rtol=1e-10)
    # Trend and regression coefficients are concentrated out: no others do better.
    others = np.repeat(found.theta, 2 * (spec.n_free - spec.n_arma), axis=0)
    for k in range(spec.n_free - spec.n_arma):
        others[2 * k : 2 * k + 2, spec.n_arma + k] += [1e-3, -1e-3]
    if len(others):
        assert (filtered(spec, others, x, u) < value).all()


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_likelihood_near_a_unit_root_equals_the_filter(distance):
    x = np.random.default_rng(3).normal(size=300).cumsum()
    spec = ArimaSpec(1, 0, 1)
    start = np.array([[np.arctanh(1 - distance), 0.3]])
    found = one(spec, x, start=start, max_iter=0)
    np.testing.assert_allclose(found.log_likelihood, filtered(spec, start, x, None), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("airline", ArimaSpec(0, 1, 1, 0, 1, 1, 12)),
        ("nile", ArimaSpec(1, 1, 1)),
        ("lynx", ArimaSpec(2, 0, 1, trend="c")),
        ("austres", ArimaSpec(0, 2, 1)),
        ("wineind", ArimaSpec(1, 1, 1, 0, 1, 1, 12)),
        ("sunspots", ArimaSpec(3, 0, 1, trend="c")),
        ("woolyrnq", ArimaSpec(1, 0, 0, 0, 1, 1, 4)),
    ],
)
def test_optimum_is_not_below_statsmodels(name, spec):
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    x = values(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SARIMAX(
            x,
            order=(spec.p, spec.d, spec.q),
            seasonal_order=(spec.P, spec.D, spec.Q, spec.s),
            trend=spec.trend,
            simple_differencing=True,
        ).fit(disp=False, maxiter=500)
    found = one(spec, x)
    assert found.converged.all()
    assert found.messages == ("",)
    assert found.log_likelihood[0] >= theirs.llf - 1e-6 * abs(theirs.llf)
    np.testing.assert_allclose(
        found.log_likelihood, filtered(spec, found.theta, x, None), rtol=1e-10
    )


@pytest.mark.parametrize("spec", [ArimaSpec(1, 1, 1), ArimaSpec(1, 0, 1, 0, 1, 1, 4, "c", 1)])
@pytest.mark.parametrize("gaps", GAPS)
def test_optimum_with_gaps_is_that_of_the_batched_search(spec, gaps):
    x, u = draw(spec, 60, 4)
    x[list(gaps)] = np.nan
    known = u if spec.n_inputs else None
    batched = maximise(
        lambda theta, rows: filtered(spec, theta, x, u),
        starting_values(spec, x[None], known),
        step=parameter_sizes(spec, x[None], known),
    )
    found = one(spec, x, u)
    assert found.converged.all()
    assert found.log_likelihood[0] >= batched.value[0] - 1e-6


def test_jobs_do_not_touch_each_other():
    rng = np.random.default_rng(5)
    lengths = np.array([60, 90, 75, 90])
    x = rng.normal(size=(4, 90)).cumsum(1)
    x[1, 30:33] = np.nan
    x[2] = 7.0
    for n, length in enumerate(lengths):
        x[n, length:] = np.nan
    specs = [ArimaSpec(1, 1, 1), ArimaSpec(0, 1, 1, 0, 1, 1, 12), ArimaSpec(2, 0, 0, trend="ct")]
    jobs = [(spec, n) for n in range(4) for spec in specs]
    together = fit_jobs([s for s, _ in jobs], x, lengths, series=[n for _, n in jobs], trace=True)
    assert together.done.all()
    for j, (spec, n) in enumerate(jobs):
        alone = fit_jobs(spec, x[n : n + 1, : lengths[n]], lengths[n : n + 1], trace=True)
        np.testing.assert_array_equal(together.theta[j, : spec.n_free], alone.theta[0])
        np.testing.assert_array_equal(together.log_likelihood[j], alone.log_likelihood[0])
        steps = alone.n_iter[0] + 1
        np.testing.assert_array_equal(together.trace[:steps, j], alone.trace[:, 0])
        # The constant series has no finite likelihood, and says so.
        assert np.isfinite(together.log_likelihood[j]) == (n != 2)
        assert bool(together.messages[j]) == (n == 2)
    rises = np.diff(together.trace[:, [j for j, (_, n) in enumerate(jobs) if n != 2]], axis=0)
    assert (rises >= 0).all()


def test_a_panel_may_hold_series_of_every_kind():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(4, 120)).cumsum(1)
    x[1, 40:45] = np.nan
    x[2, ::3] = np.nan  # more gaps than pulses are meant for
    x[3] = 1.0
    model = sq.ARIMA((1, 1, 1)).fit(x[:, :, None])
    report = model.fit_report_
    assert report.converged.tolist() == [True, True, True, False]
    assert np.isfinite(report.log_likelihood).tolist() == [True, True, True, False]
    assert len(report.messages) == 1
    for n in range(3):
        alone = sq.ARIMA((1, 1, 1)).fit(x[n])
        np.testing.assert_allclose(alone.coefficients_[0], model.coefficients_[n], rtol=1e-12)
        exact = alone.log_prob().value[0]
        assert report.log_likelihood[n] == pytest.approx(exact, rel=1e-10)
    total = np.nansum(report.log_likelihood)
    assert report.objective[-1] == pytest.approx(total, rel=1e-9)


def test_a_month_that_is_never_observed_is_left_to_the_diffuse_filter():
    x = values("airline")[:120].copy()
    x[::12] = np.nan
    spec = ArimaSpec(0, 0, 1, 0, 1, 0, 12)
    assert not one(spec, x).done.any()
    model = sq.ARIMA((0, 0, 1), (0, 1, 0, 12)).fit(x)
    report = model.fit_report_
    assert report.log_likelihood[0] == pytest.approx(model.log_prob().value[0], rel=1e-10)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_optimum_does_not_depend_on_the_units(scale):
    spec = ArimaSpec(1, 1, 1, trend="c", n_inputs=1)
    x, u = draw(spec, 100, 7)
    x += 3.0 * u[0, :, 0] + 0.2 * np.arange(100)
    plain, scaled = one(spec, x, u), one(spec, scale * x, 1e3 * u)
    shift = 99 * np.log(scale)
    assert scaled.log_likelihood[0] + shift == pytest.approx(plain.log_likelihood[0], abs=1e-6)
    ratio = scaled.theta[0, 2:] / plain.theta[0, 2:]
    np.testing.assert_allclose(ratio, [scale, scale / 1e3], rtol=1e-4)


def test_maximum_on_the_boundary_is_reached():
    x = np.random.default_rng(12).normal(size=80)  # differenced once too often
    spec = ArimaSpec(0, 1, 1)
    found = one(spec, x)
    grid = filtered(spec, np.linspace(-np.pi / 2, np.pi / 2, 400)[:, None], x, None)
    assert found.converged.all()
    assert found.log_likelihood[0] >= grid.max() - 1e-8


def test_iterations_are_limited():
    found = one(ArimaSpec(2, 1, 2), values("nile"), max_iter=1)
    assert not found.converged.any()
    assert found.messages == ("no convergence in 1 iterations",)
