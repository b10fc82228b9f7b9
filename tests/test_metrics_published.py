"""Metrics against scoringrules, utilsforecast, statsmodels, and the tables of M4."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seqdgm.evaluation import metrics

NAN = np.nan
FOLDER = os.environ.get("SEQDGM_DATA")
M4 = Path(FOLDER or "") / "m4"


@pytest.fixture
def draws():
    rng = np.random.default_rng(8)
    y = rng.normal(100, 3, (4, 5))
    y[1, 2] = NAN
    return y, rng.normal(101, 4, (4, 30, 5))


@pytest.fixture
def vectors():
    rng = np.random.default_rng(9)
    return rng.normal(size=(2, 3, 4)), rng.normal(0.3, 2, (2, 25, 3, 4))


def long(values):
    ids = np.repeat(np.arange(len(values)), values.shape[1])
    return pd.DataFrame({"unique_id": ids, "y": values.ravel()})


def test_univariate_scores_are_those_of_scoringrules(draws):
    import scoringrules

    y, x = draws
    points = scoringrules.crps_ensemble(y, x, m_axis=1, estimator="fair", backend="numpy")
    np.testing.assert_allclose(metrics.crps(y, x), np.nanmean(points, 1), rtol=1e-12)
    np.testing.assert_allclose(
        metrics.crps(y, x, aggregate="step"), np.nanmean(points, 0), rtol=1e-12
    )
    lo, hi = np.quantile(x, [0.1, 0.9], axis=1)
    points = scoringrules.interval_score(y, lo, hi, 0.2, backend="numpy")
    np.testing.assert_allclose(
        metrics.interval_score(y, lo, hi, 80), np.nanmean(points, 1), rtol=1e-12
    )
    points = scoringrules.quantile_score(y, lo, 0.1, backend="numpy")
    pooled = metrics.quantile_score(y, lo, 0.1, aggregate="pooled")
    assert pooled == pytest.approx(np.nanmean(points), rel=1e-12)


def test_joint_scores_are_those_of_scoringrules(vectors):
    import scoringrules

    y, x = vectors
    ensemble = np.moveaxis(x, 1, 2)
    energy = scoringrules.es_ensemble(y, ensemble, estimator="fair", backend="numpy")
    np.testing.assert_allclose(metrics.energy_score(y, x), energy.mean(1), rtol=1e-12)
    variogram = scoringrules.vs_ensemble(y, ensemble, p=0.7, backend="numpy")
    np.testing.assert_allclose(metrics.variogram_score(y, x, 0.7), variogram.mean(1), rtol=1e-12)


def test_joint_scores_are_their_double_sums(vectors):
    y, x = vectors
    y, draws = y[0, 0], x[0, :, 0]
    m = len(draws)
    error = sum(np.sqrt(((a - y) ** 2).sum()) for a in draws) / m
    spread = sum(np.sqrt(((a - b) ** 2).sum()) for a in draws for b in draws) / (m * (m - 1))
    energy = metrics.energy_score(y[None, None], draws[None, :, None])
    np.testing.assert_allclose(energy, error - spread / 2, rtol=1e-12)
    variogram = 0.0
    for i in range(4):
        for j in range(4):
            expected = sum(abs(a[i] - a[j]) ** 0.5 for a in draws) / m
            variogram += (abs(y[i] - y[j]) ** 0.5 - expected) ** 2
    score = metrics.variogram_score(y[None, None], draws[None, :, None])
    np.testing.assert_allclose(score, variogram, rtol=1e-12)


def test_a_partly_missing_vector_is_scored_by_its_known_part(vectors):
    y, x = vectors
    gap = y.copy()
    gap[:, 0, 1] = NAN
    keep = [0, 2, 3]
    for score in (metrics.energy_score, metrics.variogram_score):
        part = score(y[:, :1, keep], x[:, :, :1, keep], aggregate="pooled")
        assert score(gap[:, :1], x[:, :, :1], aggregate="pooled") == pytest.approx(part)
    whole = metrics.crps_sum(y[:, 1:], x[:, :, 1:])
    assert metrics.crps_sum(gap, x) == pytest.approx(whole)
    one = metrics.energy_score(y[..., :1], x[..., :1])
    np.testing.assert_allclose(one, metrics.crps(y[..., 0], x[..., 0]), rtol=1e-12)


def test_point_scores_are_those_of_utilsforecast(draws):
    from utilsforecast import losses

    y, x = draws
    forecast = x.mean(1)
    frame = long(y).assign(model=forecast.ravel())
    train = np.random.default_rng(1).normal(100, 3, (4, 40))
    pairs = [
        (metrics.mape(y, forecast), 100 * losses.mape(frame, ["model"])["model"]),
        (metrics.smape(y, forecast), 200 * losses.smape(frame, ["model"])["model"]),
        (
            metrics.mase(y, forecast, train, 4),
            losses.mase(frame, ["model"], 4, train_df=long(train))["model"],
        ),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_weighted_quantile_loss_is_the_sum_of_losses_over_the_sum_of_sizes(draws):
    y, x = draws
    levels = [0.1, 0.5, 0.8]
    quantiles = metrics.sample_quantiles(x, levels)
    total, size = 0.0, 0.0
    for n in range(4):
        for h in range(5):
            if np.isnan(y[n, h]):
                continue
            size += abs(y[n, h])
            for q in levels:
                z = np.sort(x[n, :, h])[round(29 * q)]
                total += 2 * abs((z - y[n, h]) * ((y[n, h] <= z) - q)) / len(levels)
    assert metrics.weighted_quantile_loss(y, quantiles, levels) == pytest.approx(total / size)


def test_crps_sum_of_the_published_tables(vectors):
    y, x = vectors
    levels = np.arange(1, 20) / 20
    quantiles = metrics.sample_quantiles(x.sum(3), levels)
    expected = metrics.weighted_quantile_loss(y.sum(2), quantiles, levels)
    assert metrics.crps_sum(y, x, normalised=True) == pytest.approx(expected, rel=1e-12)
    # Perfectly dependent draws have another spread of the sum than independent ones.
    copies = np.repeat(x[..., :1], 4, axis=3)
    assert metrics.crps_sum(y, copies) != pytest.approx(metrics.crps_sum(y, x))


@pytest.mark.parametrize("m", [3, 10])
def test_pit_of_a_true_forecast_is_uniform(m):
    rng = np.random.default_rng(m)
    for name in ("normal", "counts"):
        size = (20_000, m + 1, 1)
        x = rng.normal(size=size) if name == "normal" else rng.poisson(0.7, size).astype(float)
        u = metrics.pit(x[:, 0], x[:, 1:], seed=1)[:, 0]
        assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert (metrics.pit(x[:, 0], x[:, 1:], seed=1)[:, 0] == u).all()
    narrow = metrics.pit(3 * x[:, 0], x[:, 1:], seed=1)
    assert stats.kstest(narrow[:, 0], "uniform").pvalue < 1e-6
    assert np.isnan(metrics.pit([[NAN]], [[[1.0], [2.0]]], seed=0)).all()


def test_aggregates_weigh_as_they_say():
    y = np.array([[1.0, 2.0], [3.0, NAN]])
    forecast = np.array([[2.0, 4.0], [3.5, 9.0]])
    train = [[1.0, 3.0], [1.0, 2.0]]  # scales 2 and 1
    scaled = np.array([[0.5, 1.0], [0.5, NAN]])
    np.testing.assert_allclose(metrics.mase(y, forecast, train), np.nanmean(scaled, 1))
    np.testing.assert_allclose(
        metrics.mase(y, forecast, train, aggregate="step"), np.nanmean(scaled, 0)
    )
    assert metrics.mase(y, forecast, train, aggregate="pooled") == pytest.approx(2 / 3)
    assert metrics.log_score([-6.0, -1.0], y, aggregate="pooled") == pytest.approx(-7 / 3)
    lo, hi = y - 1, y + np.array([[1, 1], [-2, 1]])
    assert metrics.coverage(y, lo, hi, aggregate="pooled") == pytest.approx(200 / 3)
    assert metrics.acd(y, lo, hi, 80) == pytest.approx(80 - 200 / 3)
    np.testing.assert_allclose(
        metrics.msis(y, y - 2, y + 1, train, level=90), [3 / 2, 3.0], rtol=1e-12
    )


def test_mape_leaves_out_values_of_zero():
    y, forecast = [[0.0, 100.0, 50.0], [0.0, 0.0, 0.0]], [[1.0, 90.0, 65.0], [0.0, 1.0, 2.0]]
    np.testing.assert_allclose(metrics.mape(y, forecast), [20.0, NAN])
    assert metrics.mape(y, forecast, aggregate="pooled") == pytest.approx(20.0)
    np.testing.assert_allclose(metrics.mape(y, forecast, aggregate="step"), [NAN, 10.0, 30.0])


@pytest.mark.parametrize("season", [4, 5])
def test_seasonal_indices_are_the_classical_decomposition(season):
    from statsmodels.tsa.seasonal import seasonal_decompose

    from seqdgm.evaluation.naive2 import is_seasonal, seasonal_indices

    rng = np.random.default_rng(season)
    x = 50 + np.arange(43.0) + 10 * np.sin(np.arange(43) * 2 * np.pi / season) + rng.normal(size=43)
    expected = seasonal_decompose(x, model="multiplicative", period=season).seasonal
    np.testing.assert_allclose(seasonal_indices(x, season), expected[:season], rtol=1e-12)
    r = np.array([((x - x.mean())[k:] * (x - x.mean())[: 43 - k]).sum() for k in range(season + 1)])
    r = r / r[0]
    limit = 1.645 * np.sqrt((1 + 2 * (r[1:season] ** 2).sum()) / 43)
    assert is_seasonal(x, season) == (abs(r[season]) > limit)
    forecast = metrics.naive2(np.r_[x, NAN][None], season, 3, np.array([44]))[0]
    if is_seasonal(x, season):
        index = expected[:season]
        adjusted = x[-1] / index[42 % season]
        np.testing.assert_allclose(forecast, adjusted * index[np.arange(44, 47) % season])


def test_naive2_of_a_series_without_season_is_its_last_value():
    x = np.random.default_rng(0).normal(10, 1, 40)
    np.testing.assert_array_equal(metrics.naive2(x[None], 12, 3), np.full((1, 3), x[-1]))
    np.testing.assert_array_equal(metrics.naive2(x[None, :20], 12, 2), np.full((1, 2), x[19]))
    with pytest.raises(ValueError, match="series 0 is seasonal and not positive at step 1"):
        metrics.naive2(np.tile([0.0, 1.0, 5.0, 9.0], 8)[None], 4, 1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: metrics.smape([[1.0]], [[1.0]], aggregate="mean"), "aggregate='mean'"),
        (lambda: metrics.log_score([1.0], [[1.0]], aggregate="step"), "no parts by step"),
        (lambda: metrics.weighted_quantile_loss([[1.0]], [[[1.0]]], [0.1, 0.2]), "2 levels"),
        (lambda: metrics.energy_score([[[1.0]]], [[[[NAN]], [[1.0]]]]), "step 1 ahead"),
        (lambda: metrics.energy_score([[1.0]], [[[1.0]]]), "horizon, dim"),
        (lambda: metrics.variogram_score([[[1.0]]], [[[[1.0]], [[1.0]]]], p=0), "positive"),
        (lambda: metrics.naive2([[NAN]], 1, 1), "no known value"),
        (lambda: metrics.sample_quantiles([[1.0]], [80]), "probability"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.skipif(not M4.is_dir(), reason="SEQDGM_DATA names no folder with the M4 series")
@pytest.mark.parametrize(
    ("name", "horizon", "season", "smape", "mase"),
    [("Weekly", 13, 1, 9.161, 2.777), ("Hourly", 48, 24, 18.383, 2.395)],
)
def test_naive2_has_its_official_scores(name, horizon, season, smape, mase):
    train, held = (
        pd.read_csv(M4 / f"{name}-{part}.csv").iloc[:, 1:].to_numpy(float)
        for part in ("train", "test")
    )
    point = metrics.naive2(train, season, horizon)
    assert round(metrics.smape(held, point).mean(), 3) == smape
    assert round(metrics.mase(held, point, train, season).mean(), 3) == mase
    assert metrics.owa(held, point, train, season) == 1
    plain = np.array([row[~np.isnan(row)][-1] for row in train])[:, None].repeat(horizon, 1)
    assert (metrics.owa(held, plain, train, season) == 1) == (season == 1)
