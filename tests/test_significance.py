"""Tests of paired scores against scipy, published tables and their own definitions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from standins import LastValue

from seqdgm.evaluation import compare, metrics
from seqdgm.evaluation.significance import diebold_mariano, holm, paired_bootstrap, rank_models


def test_diebold_mariano_of_one_step_is_the_t_test():
    # Without autocovariances the corrected statistic is Student's.
    d = np.random.default_rng(0).normal(0.3, 1, 40)
    expected = stats.ttest_1samp(d, 0)
    statistic, p = diebold_mariano(d)
    assert statistic == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue)


def test_diebold_mariano_of_several_steps_is_its_definition():
    d = np.random.default_rng(1).normal(0.3, 1, 30)
    n, h, mean = 30, 3, d.mean()
    gamma = [sum((d[t] - mean) * (d[t - k] - mean) for t in range(k, n)) / n for k in range(h)]
    plain = mean / np.sqrt((gamma[0] + 2 * gamma[1] + 2 * gamma[2]) / n)
    corrected = plain * np.sqrt((n + 1 - 2 * h + h * (h - 1) / n) / n)
    assert diebold_mariano(d, h)[0] == pytest.approx(corrected)
    assert diebold_mariano(d, h)[1] == pytest.approx(2 * stats.t.sf(abs(corrected), n - 1))
    assert np.isnan(diebold_mariano([1.0, 2.0])).all()
    assert np.isnan(diebold_mariano(np.ones(9))).all()


@pytest.mark.parametrize("test", ["dm", "bootstrap"])
def test_size_under_the_null_is_nominal(test):
    rng = np.random.default_rng(3)
    runs, level = 400, 0.1
    if test == "dm":  # differences of two-step forecasts: moving averages of order one
        e = rng.normal(size=(runs, 101))
        p = [diebold_mariano(d, 2)[1] for d in e[:, 1:] + 0.7 * e[:, :-1]]
    else:  # five windows of each series, which share the series' level
        d = rng.normal(size=(runs, 40, 1)) + rng.normal(size=(runs, 40, 5))
        series = np.repeat(np.arange(40), 5)
        p = [paired_bootstrap(row.ravel(), series, n_draws=199, seed=k) for k, row in enumerate(d)]
        # Taking the windows as independent would reject far too often.
        naive = [stats.ttest_1samp(row.ravel(), 0).pvalue for row in d]
        assert np.mean(np.array(naive) < level) > 2 * level
    error = np.sqrt(level * (1 - level) / runs)
    assert abs(np.mean(np.array(p) <= level) - level) < 4 * error


def test_bootstrap_agrees_with_the_t_test_where_that_is_right():
    d = np.random.default_rng(5).normal(0.25, 1, 100)
    p = paired_bootstrap(d, seed=1)
    expected = stats.ttest_1samp(d, 0).pvalue
    assert abs(p - expected) < 0.02
    assert paired_bootstrap(d, seed=1) == p
    for few in ([], [1.0], np.ones(5)):
        assert np.isnan(paired_bootstrap(np.array(few)))


def test_holm_is_that_of_statsmodels():
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(4).uniform(0, 0.2, 7)
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    with_gap = holm(np.r_[p[:3], np.nan, p[3:]])
    np.testing.assert_allclose(np.delete(with_gap, 3), holm(p))
    assert np.isnan(with_gap[3])


def test_friedman_is_that_of_scipy_also_with_ties():
    x = np.random.default_rng(0).normal(size=(20, 4)).round(1)
    ranking = rank_models(pd.DataFrame(x, columns=list("abcd")))
    expected = stats.friedmanchisquare(*x.T)
    assert ranking.statistic == pytest.approx(expected.statistic)
    assert ranking.p_value == pytest.approx(expected.pvalue)
    means = stats.rankdata(x, axis=1).mean(0)
    assert ranking.ranks.to_dict() == pytest.approx(dict(zip("abcd", means, strict=True)))


@pytest.mark.parametrize(
    ("k", "alpha", "q"),
    [(2, 0.05, 1.960), (5, 0.05, 2.728), (10, 0.05, 3.164), (4, 0.10, 2.291), (7, 0.10, 2.693)],
)
def test_critical_difference_has_the_published_quantiles(k, alpha, q):
    # Demsar (2006), table 5.
    x = pd.DataFrame(np.random.default_rng(k).normal(size=(14, k)))
    found = rank_models(x, alpha).critical_difference / np.sqrt(k * (k + 1) / (6 * 14))
    assert found == pytest.approx(q, abs=1e-3)


def test_groups_join_what_is_not_told_apart(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(200, 1))
    x = base + rng.normal(size=(200, 4)) + [0.0, 0.02, 5.0, 5.02]
    x[0, 0] = np.nan
    ranking = rank_models(pd.DataFrame(x, columns=list("abcd")))
    assert ranking.n_units == 199
    assert sorted(map(sorted, ranking.groups())) == [["a", "b"], ["c", "d"]]
    figure = ranking.plot()
    texts = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(name in texts for name in "abcd")
    assert "199 units" in texts
    figure.savefig(tmp_path / "ranks.png")
    with pytest.raises(ValueError, match="cannot be ranked"):
        rank_models(pd.DataFrame({"a": [1.0, 2.0]}))


@pytest.fixture
def walks():
    rng = np.random.default_rng(0)
    return 100 + rng.normal(size=(12, 60, 1)).cumsum(axis=1)


MODELS = {"base": LastValue(), "near": LastValue(bias=0.1), "far": LastValue(bias=8.0)}


def test_the_table_corrects_for_the_number_of_models(walks):
    result = compare(
        MODELS, walks, horizon=3, season=1, n_windows=4, seed=0, baseline="base", test="bootstrap"
    )
    table = result.table
    wide = result.scores.assign(x=result.scores["CRPS"] / result.scores["scale"])
    wide = wide.pivot(index=["unique_id", "window"], columns="model", values="x")
    series = np.asarray(wide.index.get_level_values("unique_id"))
    for name in ("near", "far"):
        difference = (wide[name] - wide["base"]).to_numpy()
        assert table.loc[name, "p_value"] == paired_bootstrap(difference, series, seed=0)
    assert table.loc["far", "p_holm"] == pytest.approx(2 * table.loc["far", "p_value"])
    ranking = result.rank()
    assert ranking.ranks.index[-1] == "far"
    assert result.rank("log_score").ranks.index[-1] == "far"
    with pytest.raises(ValueError, match="metric='speed'"):
        result.rank("speed")


def test_diebold_mariano_in_the_table_is_over_the_windows(walks):
    options = {"horizon": 4, "step": 2, "n_windows": 15, "season": 1, "seed": 0}
    result = compare(MODELS, walks[:1], baseline="base", test="diebold-mariano", **options)
    scores = result.scores.assign(x=result.scores["CRPS"] / result.scores["scale"])
    wide = scores.pivot(index="window", columns="model", values="x")
    expected = diebold_mariano((wide["far"] - wide["base"]).to_numpy(), 2)[1]
    assert result.table.loc["far", "p_value"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="test='t'"):
        compare(MODELS, walks, horizon=3, season=1, test="t")
    with pytest.raises(ValueError, match="aggregate='step'"):
        compare(MODELS, walks, horizon=3, season=1, aggregate="step")


def test_pooled_means_weigh_every_point_alike(walks):
    walks[0, 57:59] = np.nan
    result = compare(LastValue(), walks, horizon=3, season=1, seed=0, aggregate="pooled")
    row = result.table.iloc[0]
    y, train = walks[:, 57:, 0], walks[:, :57, 0]
    point = train[:, -1:].repeat(3, 1)
    for name, value in (
        ("MASE", metrics.mase(y, point, train, aggregate="pooled")),
        ("sMAPE", metrics.smape(y, point, aggregate="pooled")),
    ):
        assert row[name] == pytest.approx(value)
    each = compare(LastValue(), walks, horizon=3, season=1, seed=0).table.iloc[0]
    assert each["MASE"] == pytest.approx(metrics.mase(y, point, train).mean())
    levels = np.arange(1, 10) / 10
    quantiles = point + stats.norm.ppf(levels)[:, None, None]
    loss = metrics.weighted_quantile_loss(y, quantiles, levels)
    assert row["wQL"] == pytest.approx(loss)
    assert row["OWA"] == pytest.approx(metrics.owa(y, point, train))
    assert row["ACD-80"] == pytest.approx(abs(row["coverage-80"] - 80))


def test_likelihoods_say_what_they_are(walks):
    result = compare(MODELS, walks, horizon=3, season=1, seed=0)
    held = result.likelihoods
    assert list(held.index) == list(result.table.index)
    assert set(held["kind"]) == {"exact"}
    assert (held["stderr"] == 0).all()
    np.testing.assert_allclose(held["log_score"], result.table["log_score"])


def test_vectors_get_their_joint_scores():
    y = np.random.default_rng(0).normal(size=(4, 30, 3))
    result = compare(LastValue(), y, horizon=2, season=1, seed=0, n_samples=100)
    assert np.isfinite(result.table[["CRPS_sum", "energy_score"]].to_numpy(float)).all()
    draws = LastValue().fit(y[:, :28]).forecast(2).sample(100, seed=None)
    assert draws.shape == (4, 100, 2, 3)
    assert np.isnan(result.table["OWA"].iloc[0])  # values below zero
