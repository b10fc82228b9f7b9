"""Metrics against hand-written definitions, closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, stats
from utilsforecast import losses

from seqdgm.evaluation import metrics

NAN = np.nan


def long(values):
    ids = np.repeat(np.arange(len(values)), values.shape[1])
    return pd.DataFrame({"unique_id": ids, "y": values.ravel()})


@pytest.fixture
def panel():
    rng = np.random.default_rng(3)
    y = rng.normal(10, 2, (4, 6))
    y[0, 2] = y[2, 5] = NAN
    forecast = y + rng.normal(0, 1, y.shape)
    forecast[np.isnan(y)] = NAN  # never read there
    train = rng.normal(10, 2, (4, 30))
    train[1, 20:] = NAN
    train[3, 7] = NAN
    return y, forecast, train


@pytest.mark.parametrize("season", [1, 4])
def test_mase_is_its_definition(panel, season):
    y, forecast, train = panel
    scale = [
        np.nanmean([abs(row[t] - row[t - season]) for t in range(season, 30)]) for row in train
    ]
    error = [np.nanmean(abs(a - b)) for a, b in zip(y, forecast, strict=True)]
    expected = np.array(error) / np.array(scale)
    np.testing.assert_allclose(metrics.mase(y, forecast, train, season), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.naive_scale(train, season), scale, rtol=1e-12)
    reference = losses.mase(
        long(y).assign(model=forecast.ravel()), ["model"], season, train_df=long(train)
    )
    np.testing.assert_allclose(metrics.mase(y, forecast, train, season), reference["model"])


def test_mase_without_a_scale_is_nan():
    constant = metrics.mase([[1.0]], [[2.0]], [[5.0, 5.0, 5.0]])
    short = metrics.mase([[1.0]], [[2.0]], [[5.0, 6.0]], season=12)
    assert np.isnan(constant).all()
    assert np.isnan(short).all()
    assert np.isnan(metrics.naive_scale([[5.0, 6.0]], season=12)).all()


def test_smape_runs_from_0_to_200(panel):
    y, forecast, _ = panel
    expected = [
        np.nanmean(200 * abs(a - b) / (abs(a) + abs(b))) for a, b in zip(y, forecast, strict=True)
    ]
    np.testing.assert_allclose(metrics.smape(y, forecast), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.smape([[1.0], [0.0]], [[-1.0], [0.0]]), [200.0, 0.0])


def test_crps_is_the_fair_double_sum():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(2, 3))
    y[1, 0] = NAN
    x = rng.normal(size=(2, 7, 3))
    expected = []
    for n in range(2):
        terms = []
        for h in range(3):
            draws = x[n, :, h]
            spread = sum(abs(a - b) for a in draws for b in draws) / (7 * 6)
            terms.append(np.mean(abs(draws - y[n, h])) - spread / 2)
        expected.append(np.nanmean(terms))
    np.testing.assert_allclose(metrics.crps(y, x), expected, rtol=1e-10)


def test_crps_of_gaussian_draws_is_the_closed_form():
    mean, std, y = 1.0, 2.0, 2.5
    z = (y - mean) / std
    exact = std * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - np.pi**-0.5)
    # 200 small ensembles: a biased estimator would be off by std / (sqrt(pi) * 10) = 0.11
    draws = np.random.default_rng(1).normal(mean, std, (200, 10, 50))
    scores = metrics.crps(np.full((200, 50), y), draws)
    assert abs(scores.mean() - exact) < 4 * scores.std() / np.sqrt(200)
    assert scores.std() / np.sqrt(200) < 0.01


def test_quantile_score_integrates_to_half_the_crps():
    y = np.array([[0.7]])
    score = lambda q: metrics.quantile_score(y, np.array([[stats.norm.ppf(q)]]), q)[0]  # noqa: E731
    total = integrate.quad(score, 0, 1)[0]
    exact = 0.7 * (2 * stats.norm.cdf(0.7) - 1) + 2 * stats.norm.pdf(0.7) - np.pi**-0.5
    assert 2 * total == pytest.approx(exact, abs=1e-6)


def test_interval_score_is_its_definition():
    y = np.array([[0.0, 1.0, 5.0, NAN]])
    lo, hi = np.full((1, 4), 0.5), np.full((1, 4), 3.0)
    terms = [2.5 + 2 / 0.2 * 0.5, 2.5, 2.5 + 2 / 0.2 * 2.0]
    np.testing.assert_allclose(metrics.interval_score(y, lo, hi, 80), [np.mean(terms)])


def test_coverage_is_per_cent_of_the_known_values():
    y = np.array([[0.0, 1.0, NAN, 3.0], [NAN, NAN, NAN, NAN]])
    inside = metrics.coverage(y, np.zeros((2, 4)), np.full((2, 4), 2.0))
    np.testing.assert_allclose(inside, [200 / 3, NAN])


def test_coverage_of_gaussian_intervals_is_nominal():
    y = np.random.default_rng(5).normal(size=(1, 20_000))
    half = np.full(y.shape, stats.norm.ppf(0.9))
    assert metrics.coverage(y, -half, half)[0] == pytest.approx(80, abs=4 * 100 * 0.4 / 20_000**0.5)


def test_log_score_divides_by_the_steps_with_a_value():
    y = np.array([[[1.0, 2.0], [NAN, 4.0], [NAN, NAN]], [[NAN, NAN]] * 3])
    np.testing.assert_allclose(metrics.log_score(np.array([-6.0, 0.0]), y), [-3.0, NAN])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: metrics.smape([[1.0, 2.0]], [[1.0, NAN]]), "step 2 ahead"),
        (lambda: metrics.crps([[1.0]], [[[NAN], [1.0]]]), "not finite"),
        (lambda: metrics.crps([[1.0]], [[[1.0]]]), "two draws"),
        (lambda: metrics.smape([[1.0]], [[1.0, 2.0]]), "shape"),
        (lambda: metrics.mase([[1.0]], [[1.0]], [[1.0, 2.0]], season=0), "season"),
        (lambda: metrics.mase([[1.0]], [[1.0]], [[1.0, 2.0]] * 2), "2"),
        (lambda: metrics.interval_score([[1.0]], [[0.0]], [[2.0]], 100), "per cent"),
        (lambda: metrics.quantile_score([[1.0]], [[0.0]], 80), "probability"),
        (lambda: metrics.log_score([1.0, 2.0], [[1.0]]), "1 series"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
