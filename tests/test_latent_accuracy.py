"""Accuracy of latent states against dense Gaussians, filterpy, and chi-square laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from filterpy.kalman import KalmanFilter
from filterpy.stats import NEES
from numpy.testing import assert_allclose
from scipy import stats

import seqdgm as sq
from seqdgm.evaluation.latent import (
    learn_alignment,
    state_coverage,
    state_nees,
    state_rmse,
)

N, T, D = 3000, 6, 2


@pytest.fixture(scope="module")
def made():
    return sq.datasets.simulate("linear-gaussian", N, T, seed=0)


@pytest.fixture(scope="module")
def filtered(made):
    return made.model.filter(made.y)


def moments(like, mean, cov, lengths=None):
    """A posterior with these moments, on data of no interest."""
    y = np.zeros((*mean.shape[:2], 1))
    panel = sq.Panel.of(y) if lengths is None else sq.Panel.of([y[0][:n] for n in lengths])
    return replace(like, mean=mean, cov=cov, panel=panel)


def test_smoothed_states_are_scored_as_their_dense_posterior(made):
    F, H, Q, R = (np.asarray(getattr(made.model, name)) for name in "FHQR")
    # Stack all states of a series: z ~ N(0, V), x = (I kron H) z + noise.
    noise = [np.eye(D)] + [Q] * (T - 1)
    flow = np.eye(T * D)
    for t in range(1, T):
        flow[t * D : (t + 1) * D] = F @ flow[(t - 1) * D : t * D]
        flow[t * D : (t + 1) * D, t * D : (t + 1) * D] = np.eye(D)
    V = sum(
        np.outer(flow[:, t * D + i], flow[:, t * D + j]) * noise[t][i, j]
        for t in range(T)
        for i in range(D)
        for j in range(D)
    )
    wide = np.kron(np.eye(T), H)
    gain = V @ wide.T @ np.linalg.inv(wide @ V @ wide.T + np.kron(np.eye(T), R))
    post = V - gain @ wide @ V
    error = made.states.reshape(N, -1) - made.y.values.reshape(N, -1) @ gain.T
    smoothed = made.model.smooth(made.y)

    assert_allclose(state_rmse(smoothed, made.states), np.sqrt((error**2).mean(1)), rtol=1e-6)
    by_state = np.sqrt((error.reshape(N, T, D) ** 2).mean((0, 1)))
    assert_allclose(state_rmse(smoothed, made.states, over="state"), by_state, rtol=1e-6)
    blocks = post.reshape(T, D, T, D)[np.arange(T), :, np.arange(T)]
    squares = np.stack(
        [
            np.einsum("ni,ij,nj->n", e, np.linalg.inv(block), e)
            for e, block in zip(error.reshape(N, T, D).swapaxes(0, 1), blocks, strict=True)
        ],
        1,
    )
    assert_allclose(state_nees(smoothed, made.states).value, squares.mean(1) / D, rtol=1e-5)
    inside = np.abs(error) <= stats.norm.ppf(0.9) * np.sqrt(np.diag(post))
    assert_allclose(state_coverage(smoothed, made.states, 80), 100 * inside.mean(1), atol=1e-9)


def test_filtered_states_are_scored_as_those_of_filterpy(made, filtered):
    kf = KalmanFilter(D, 1)
    kf.F, kf.H, kf.Q, kf.R = (np.asarray(getattr(made.model, name)) for name in "FHQR")
    for n in range(3):
        kf.x, kf.P = np.zeros(D), np.eye(D)
        means, covs = [], []
        for t, x in enumerate(made.y.values[n]):
            if t:
                kf.predict()
            kf.update(x)
            means.append(kf.x.copy())
            covs.append(kf.P.copy())
        expected = NEES(made.states[n], np.array(means), np.array(covs))
        assert_allclose(state_nees(filtered, made.states).value[n], np.mean(expected) / D)
        rmse = np.sqrt(np.mean((made.states[n] - means) ** 2))
        assert_allclose(state_rmse(filtered, made.states)[n], rmse)


def test_nees_of_the_right_filter_is_chi_square(made, filtered):
    nees = state_nees(filtered, made.states)
    assert np.all(np.abs(nees.by_step - 1) < 5 * np.sqrt(2 / (D * N)))
    last = made.states.copy()
    last[:, :-1] = np.nan
    alone = state_nees(filtered, last)
    assert stats.kstest(D * alone.value, stats.chi2(D).cdf).pvalue > 1e-4
    assert np.isnan(alone.by_step[:-1]).all()
    assert_allclose(nees.upper, stats.chi2.ppf(0.975, N * D) / (N * D))
    assert_allclose(nees.lower, stats.chi2.ppf(0.025, N * D) / (N * D))
    # Of 200 groups of 15 series, each within its bounds at a step with probability 95 %.
    inside = [
        state_nees(
            moments(filtered, filtered.mean[k::200], filtered.cov[k::200]), made.states[k::200]
        ).inside
        for k in range(200)
    ]
    assert abs(np.mean(inside) - 95) < 5 * np.std(inside) / 200**0.5


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_nees_tells_a_wrong_covariance(made, filtered, factor):
    wrong = replace(filtered, cov=factor * filtered.cov)
    assert_allclose(state_nees(wrong, made.states).mean * factor, 1, atol=0.03)
    assert state_nees(wrong, made.states).inside == 0


def test_a_state_known_in_part_is_scored_by_its_marginal(made, filtered):
    part = made.states.copy()
    part[:, ::2, 1] = np.nan
    marginal = (made.states - filtered.mean)[:, 0, 0] ** 2 / filtered.cov[:, 0, 0, 0]
    assert_allclose(state_nees(filtered, part).by_step[0], marginal.mean())
    whole = state_nees(filtered, made.states).by_step
    assert_allclose(state_nees(filtered, part).by_step[1::2], whole[1::2])
    known = ~np.isnan(part)
    rmse = np.sqrt(((made.states - filtered.mean)[known] ** 2).mean())
    assert_allclose(state_rmse(filtered, part, over="pooled"), rmse)


def test_coverage_of_the_right_filter(made, filtered):
    smoothed = made.model.smooth(made.y)
    for level in (80, 95):
        for found in (
            state_coverage(filtered, made.states, level),
            state_coverage(smoothed, made.states, level),
        ):
            assert abs(found.mean() - level) < 5 * found.std() / N**0.5


def test_coverage_by_draws_agrees_with_that_of_normal_intervals():
    made = sq.datasets.simulate("linear-gaussian", 300, T, seed=5)
    smoothed = made.model.smooth(made.y)
    gap = state_coverage(smoothed, made.states, 80, n_samples=4000, seed=1) - state_coverage(
        smoothed, made.states, 80
    )
    # Quantiles of 4000 draws are off by 0.01 standard deviations, so few points change sides.
    assert np.abs(gap).mean() < 2
    with pytest.raises(ValueError, match="filtered posterior holds marginals"):
        state_coverage(made.model.filter(made.y), made.states, 80, n_samples=10)


def mapped(posterior, matrix, shift):
    return replace(
        posterior, mean=posterior.mean @ matrix.T + shift, cov=matrix @ posterior.cov @ matrix.T
    )


MAP = np.array([[2.0, -1.0], [30.0, 10.0], [1.0, 1.0]])  # also into a larger space


@pytest.mark.parametrize("matrix", [MAP, MAP[:2]])
def test_alignment_undoes_an_invertible_map(made, filtered, matrix):
    # The true states are known from the posterior means of other coordinates, and the covariance
    # stays right: the residuals hold the posterior variance, which is not counted twice.
    other = mapped(filtered, matrix, np.arange(len(matrix)))
    aligned = learn_alignment(other, made.states).apply(other)
    assert_allclose(aligned.mean, filtered.mean, atol=0.05)
    gap = state_nees(aligned, made.states).mean - state_nees(filtered, made.states).mean
    assert abs(gap) < 0.03
    again = learn_alignment(filtered, made.states).apply(filtered)
    assert_allclose(aligned.mean, again.mean, atol=1e-8)
    assert_allclose(aligned.cov, again.cov, atol=1e-8)


def test_alignment_is_exact_where_the_truth_is_an_affine_map(filtered):
    truth = filtered.mean @ MAP.T + 3.0
    found = learn_alignment(filtered, truth)
    assert_allclose(found.matrix, MAP, atol=1e-8)
    assert_allclose(found.offset, 3.0, atol=1e-8)
    assert_allclose(found.residual, 0, atol=1e-8)


def test_alignment_adds_what_the_covariance_lacks(made, filtered):
    sure = replace(filtered, cov=filtered.cov / 25)
    early, late = made.states.copy(), made.states.copy()
    early[N // 2 :], late[: N // 2] = np.nan, np.nan
    assert state_nees(sure, late).mean > 20
    aligned = learn_alignment(sure, early).apply(sure)
    assert abs(state_nees(aligned, late).mean - 1) < 0.1


def test_alignment_leaves_out_states_that_say_nothing(made, filtered):
    idle = 1e-3 * np.random.default_rng(0).normal(size=(N, T, 1))
    mean = np.concatenate([filtered.mean, idle], -1)
    cov = np.zeros((N, T, 3, 3))
    cov[..., :2, :2], cov[..., 2, 2] = filtered.cov, 1.0
    found = learn_alignment(replace(filtered, mean=mean, cov=cov), made.states)
    assert_allclose(found.matrix[:, 2], 0, atol=1e-3)
    plain = learn_alignment(filtered, made.states)
    assert_allclose(found.matrix[:, :2], plain.matrix, atol=1e-3)


def test_steps_beyond_the_end_of_a_series_do_not_count(filtered):
    mean = np.zeros((2, 4, 2))
    mean[1, 2:] = np.nan
    cov = np.broadcast_to(np.eye(2), (2, 4, 2, 2))
    ragged = moments(filtered, mean, cov, lengths=[4, 2])
    truth = np.ones((2, 4, 2))
    truth[1, 2:] = 100.0
    assert_allclose(state_rmse(ragged, truth), 1)
    assert_allclose(state_nees(ragged, truth).value, 1)


def test_what_cannot_be_scored_is_named(made, filtered):
    with pytest.raises(ValueError, match="3 states and the truth 2"):
        state_rmse(mapped(filtered, MAP, 0.0), made.states)
    with pytest.raises(ValueError, match=r"\(series, time, state\)"):
        state_rmse(filtered, made.states[:, 1:])
    flat = filtered.cov.copy()
    flat[7, 3] = 0.0
    with pytest.raises(ValueError, match=r"series 7, step 3.*not positive definite"):
        state_nees(replace(filtered, cov=flat), made.states)
    lost = filtered.mean.copy()
    lost[5, 2, 0] = np.nan
    with pytest.raises(ValueError, match=r"series 5, step 2.*not finite"):
        state_rmse(replace(filtered, mean=lost), made.states)
    with pytest.raises(ValueError, match="needs 6 steps"):
        learn_alignment(
            moments(filtered, filtered.mean[:1, :5], filtered.cov[:1, :5]), made.states[:1, :5]
        )
    with pytest.raises(ValueError, match="over="):
        state_rmse(filtered, made.states, over="steps")
    with pytest.raises(ValueError, match="per cent"):
        state_coverage(filtered, made.states, 0.8)


# -- in a comparison -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short():
    return sq.datasets.simulate("linear-gaussian", 12, 80, seed=3)


def entered(short):
    learned = sq.LinearGaussianSSM(latent_dim=2)
    return {"naive": sq.SeasonalNaive(season=1), "given": short.model, "learned": learned}


OPTIONS = {"horizon": 4, "seed": 0, "n_samples": 50}
POOLED = {"fit_options": {"learned": {"pooled": True}}}


@pytest.fixture(scope="module")
def result(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    found = sq.compare(entered(short), short, **OPTIONS, **POOLED, cache=folder)
    return found, folder


def test_comparison_scores_the_states_of_a_simulation(short, result):
    table = result[0].state_accuracy
    assert set(table.loc["given"].index) == {"filtered", "smoothed"}
    assert (table.loc["given", "aligned"] == "no").all()
    assert (table.loc["learned", "aligned"] == "affine").all()
    history = short.y.split(4)[0]
    held = short.states[:, :76].copy()
    held[:, :38] = np.nan
    filtered = short.model.filter(history)
    row = table.loc[("given", "filtered")]
    assert_allclose(row["RMSE"], state_rmse(filtered, held, over="pooled"))
    assert_allclose(row["NEES"], state_nees(filtered, held).mean)
    assert_allclose(row["coverage-80"], state_coverage(filtered, held, 80).mean())
    spread = state_nees(filtered, held).value
    assert_allclose(row["NEES-se"], spread.std(ddof=1) / 12**0.5)
    assert row["series"] == 12
    # What was learned is a little worse than the truth, and much better than nothing.
    learned = table.loc[("learned", "filtered"), "RMSE"]
    assert row["RMSE"] * 0.98 < learned < 0.9 * np.nanstd(held)


def test_states_are_kept_with_the_parts_of_a_comparison(short, result):
    found, folder = result
    again = sq.compare(entered(short), short, **OPTIONS, **POOLED, cache=folder)
    assert again.state_accuracy.equals(found.state_accuracy)
    with pytest.raises(ValueError, match="cache"):
        sq.compare(entered(short), short.y, **OPTIONS, **POOLED, cache=folder)


def test_models_without_fixed_coordinates_can_be_left_out(short):
    found = sq.compare(
        entered(short), short.y, **OPTIONS, **POOLED, states=short.states, align=None
    )
    assert set(found.state_accuracy.index.get_level_values("model")) == {"given"}
    without = sq.compare([sq.SeasonalNaive(season=1)], short.y, **OPTIONS)
    assert without.state_accuracy.empty


def test_series_with_parameters_of_their_own_are_aligned_one_by_one(short):
    two = short.y.select([0, 1])
    found = sq.compare(
        {"local": sq.StructuralSSM("stochastic")}, two, **OPTIONS, states=short.states[:2]
    )
    history = two.split(4)[0]
    errors = []
    for n in (0, 1):
        own = history.select([n])
        smoothed = sq.StructuralSSM("stochastic").fit(own).smooth(own)
        early, late = short.states[n : n + 1, :76].copy(), short.states[n : n + 1, :76].copy()
        early[:, 38:], late[:, :38] = np.nan, np.nan
        aligned = learn_alignment(smoothed, early).apply(smoothed)
        errors.append(state_rmse(aligned, late)[0] ** 2)
    row = found.state_accuracy.loc[("local", "smoothed")]
    assert_allclose(row["RMSE"], np.sqrt(np.mean(errors)), rtol=1e-3)


def test_states_of_another_shape_are_refused_before_anything_is_fitted(short):
    with pytest.raises(ValueError, match="states has shape"):
        sq.compare(entered(short), short.y, **OPTIONS, states=short.states[:, 1:])
    with pytest.raises(ValueError, match="align="):
        sq.compare(entered(short), short, **OPTIONS, align="procrustes")
    with pytest.warns(RuntimeWarning, match="accuracy of states.*2 states and the truth 1"):
        found = sq.compare({"given": short.model}, short.y, **OPTIONS, states=short.states[..., :1])
    assert found.state_accuracy.empty
