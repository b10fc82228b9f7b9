"""Vector ARMA models against statsmodels, closed forms and least squares."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from statsmodels.tsa.statespace.tools import constrain_stationary_multivariate

import seqdgm as sq
from seqdgm.kernels import kalman_filter
from seqdgm.models._varma import Varma, VarmaSpec, invertible, system
from seqdgm.models._vector_ar import (
    coefficients_from_free,
    companion,
    free_from_coefficients,
    stationary_covariance,
)
from seqdgm.testing import CHECKS, check_model

PHI = np.array([[0.5, 0.3], [-0.2, 0.6]])
THETA = np.array([[0.4, 0.0], [0.2, -0.3]])


def data(length: int, seed: int) -> np.ndarray:
    """A VARMA(1, 1) in different units, with holes."""
    rng = np.random.default_rng(seed)
    e = rng.normal(size=(length + 50, 2)) @ np.array([[1.0, 0.5], [0.0, 0.8]])
    x = np.zeros_like(e)
    for t in range(1, len(x)):
        x[t] = PHI @ x[t - 1] + e[t] + THETA @ e[t - 1]
    out = x[50:] * [1.0, 100.0] + [5.0, 1000.0]
    out[10:14, 0] = np.nan
    out[20] = np.nan
    return out


def theirs(model: sq.VARMA, y: np.ndarray) -> tuple[sm.tsa.VARMAX, np.ndarray]:
    """Statsmodels' model, and our parameters in its order: the intercept is (I - A(1)) mu."""
    found = model.parameters_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = sm.tsa.VARMAX(y, order=model.order, trend="c" if model.trend else "n")
    parts = [np.concatenate(list(m[0]), 1).ravel() for m in (found.ar, found.ma) if m.shape[1]]
    if model.trend:
        intercept = (np.eye(y.shape[1]) - found.ar[0].sum(0)) @ found.mean[0, :, 0]
        parts.insert(0, intercept)
    low = np.tril_indices(y.shape[1])
    return reference, np.concatenate([*parts, np.linalg.cholesky(found.cov[0])[low]])


@pytest.mark.parametrize("order", [(1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 0)])
def test_the_likelihood_is_that_of_statsmodels(order) -> None:
    y = data(80, 1)
    model = sq.VARMA(order, trend=None if order == (0, 1) else "c").fit(y, max_iter=8)
    if order == (0, 0):
        seen = y[np.isfinite(y).all(1)]
        alone = y[np.isfinite(y).sum(1) == 1][:, 1]
        mean, cov = model.mean_[0, :, 0], model.cov_[0]
        joint = torch.distributions.MultivariateNormal(mean, cov)
        single = torch.distributions.Normal(mean[1], cov[1, 1] ** 0.5)
        expected = joint.log_prob(torch.from_numpy(seen)).sum()
        expected = float(expected + single.log_prob(torch.from_numpy(alone)).sum())
    else:
        reference, parameters = theirs(model, y)
        expected = reference.loglike(parameters)
    assert model.log_prob(y).value[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", [(2, 0), (1, 1)])
def test_the_optimum_is_no_worse_than_that_of_statsmodels(order) -> None:
    y = data(100, 2)
    model = sq.VARMA(order).fit(y)
    assert model.fit_report_.converged.all()
    reference, parameters = theirs(model, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = reference.fit(parameters, disp=0, maxiter=100).llf
    assert model.log_prob(y).value[0] >= best - 1e-4


def test_the_conditional_part_of_a_vector_autoregression_is_least_squares() -> None:
    """Far from the start the exact likelihood is the regression's: estimates differ by O(1/T)."""
    rng = np.random.default_rng(3)
    x = np.zeros((4000, 2))
    for t in range(1, len(x)):
        x[t] = PHI @ x[t - 1] + rng.normal(size=2)
    model = sq.VARMA((1, 0), trend=None).fit(x)
    least = np.linalg.lstsq(x[:-1], x[1:], rcond=None)[0].T
    assert abs(model.ar_[0, 0].numpy() - least).max() < 2 / len(x)
    # Given the first value the likelihood is that of the regression, to the last digit.
    joint = model.log_prob(x).value - model.log_prob(x[:1]).value
    rest = torch.from_numpy(x[1:] - x[:-1] @ model.ar_[0, 0].numpy().T)
    normal = torch.distributions.MultivariateNormal(rest.new_zeros(2), model.cov_[0])
    assert joint[0] == pytest.approx(float(normal.log_prob(rest).sum()), rel=1e-10)


@pytest.mark.parametrize(("p", "k"), [(1, 2), (2, 3), (3, 2)])
def test_coefficients_are_stationary_and_those_of_ansley_and_kohn(p, k) -> None:
    rng = np.random.default_rng(p)
    free = 0.5 * rng.normal(size=(5, p, k, k))
    cov = np.eye(k) + 0.5 * np.ones((5, k, k))
    found = coefficients_from_free(free, cov)
    for row in range(5):
        expected, _ = constrain_stationary_multivariate(list(free[row]), cov[row])
        expected = np.stack(expected)
        # Ours stop at partial autocorrelations of 1 - 1e-7.
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    assert np.abs(np.linalg.eigvals(companion(found))).max() < 1
    np.testing.assert_allclose(free_from_coefficients(found, cov), free, atol=1e-6)


def test_the_stationary_covariance_solves_its_equation() -> None:
    from scipy.linalg import solve_discrete_lyapunov

    transition, noise = companion(np.stack([PHI, 0.2 * THETA])[None]), np.diag([1.0, 2, 0, 0])
    expected = solve_discrete_lyapunov(transition[0], noise)
    np.testing.assert_allclose(
        stationary_covariance(transition, noise[None])[0], expected, rtol=1e-12
    )


@pytest.mark.parametrize(("p", "q", "k"), [(1, 1, 2), (0, 2, 2), (2, 1, 3)])
def test_the_invertible_form_has_the_same_likelihood(p, q, k) -> None:
    rng = np.random.default_rng(k)
    spec = VarmaSpec(p, q, None, False, k)
    given = Varma(
        np.zeros((3, k, 0)),
        0.2 * rng.normal(size=(3, p, k, k)),
        1.5 * rng.normal(size=(3, q, k, k)),
        np.eye(k) + 0.3 * np.ones((3, k, k)),
    )
    turned = invertible(spec, given)
    assert np.abs(np.linalg.eigvals(companion(-given.ma))).max() > 1
    assert np.abs(np.linalg.eigvals(companion(-turned.ma))).max() <= 1
    x, u = torch.from_numpy(rng.normal(size=(3, 30, k))), np.zeros((3, 30, 0))
    a, b = (
        kalman_filter(
            system(spec, one, u), x, ~x.isnan(), torch.full((3,), 30), store="likelihood"
        ).loglik.numpy()
        for one in (given, turned)
    )
    np.testing.assert_allclose(a, b, rtol=1e-9)


def test_regressors_and_a_line_are_those_of_generalised_least_squares() -> None:
    y = data(60, 5)
    rng = np.random.default_rng(5)
    u = rng.normal(size=(60, 1))
    y = y + u * [2.0, -30.0] + np.arange(60)[:, None] * [0.1, 1.0]
    model = sq.VARMA((1, 0), trend="ct").fit(y, inputs=u)
    # The whole data as one Gaussian vector with the covariances of the estimate.
    phi, cov = model.ar_[0, 0].numpy(), model.cov_[0].numpy()
    first = stationary_covariance(phi[None], cov[None])[0]
    whole = np.zeros((60, 2, 60, 2))
    for s in range(60):
        for t in range(s + 1):
            block = np.linalg.matrix_power(phi, s - t) @ first
            whole[s, :, t], whole[t, :, s] = block, block.T
    columns = np.hstack([np.ones((60, 1)), np.arange(60)[:, None], u])
    design = np.einsum("tm,kj->tkjm", columns, np.eye(2)).reshape(120, 6)
    seen = np.isfinite(y).ravel()
    weight = np.linalg.inv(whole.reshape(120, 120)[np.ix_(seen, seen)])
    design, target = design[seen], y.ravel()[seen]
    best = np.linalg.solve(design.T @ weight @ design, design.T @ weight @ target)
    np.testing.assert_allclose(model.mean_[0].numpy().ravel(), best, rtol=2e-4, atol=2e-4)
    residual = target - design @ model.mean_[0].numpy().ravel()
    exact = -0.5 * (
        seen.sum() * np.log(2 * np.pi) - np.linalg.slogdet(weight)[1] + residual @ weight @ residual
    )
    assert model.log_prob(y, inputs=u).value[0] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_units_do_not_matter(unit) -> None:
    y = data(50, 6)
    plain = sq.VARMA((1, 1)).fit(y).log_prob(y).value[0]
    scaled = sq.VARMA((1, 1)).fit(unit * y).log_prob(unit * y).value[0]
    count = np.isfinite(y).sum()
    assert scaled + count * np.log(unit) == pytest.approx(plain, abs=1e-3)


def test_a_series_without_a_maximum_is_named_and_harms_no_other() -> None:
    good, flat = data(50, 7), data(50, 7)
    flat[:, 1] = 3.0
    twice = np.stack([good[:, 0], good[:, 0]], 1)
    model = sq.VARMA((1, 0)).fit([good, flat, twice])
    report = model.fit_report_
    assert [m.split(":")[0] for m in report.messages] == ["series 1", "series 2"]
    alone = sq.VARMA((1, 0)).fit(good).fit_report_.log_likelihood[0]
    assert report.log_likelihood[0] == pytest.approx(alone, rel=1e-12)
    with pytest.raises(ValueError, match="constant"):
        sq.VARMA((1, 0)).fit(flat)


def test_bad_arguments_are_refused() -> None:
    for order in [(1,), (-1, 0), (1.5, 0)]:
        with pytest.raises(ValueError, match="order"):
            sq.VARMA(order)
    with pytest.raises(ValueError, match="trend"):
        sq.VARMA(trend="n")
    with pytest.raises(ValueError, match="error_cov"):
        sq.VARMA(error_cov="scalar")
    with pytest.raises(ValueError, match="has 9 steps"):
        sq.VARMA((3, 1)).fit(data(30, 0)[:9])


@pytest.mark.parametrize(
    "model",
    [
        sq.VARMA((1, 0)),
        sq.VARMA((0, 1), error_cov="diagonal", scale="standard"),
        sq.VARMA((2, 0), trend="ct", transform="log"),
    ],
    ids=repr,
)
def test_conformance(model) -> None:
    rng = np.random.default_rng(8)
    y = np.exp(0.1 * rng.normal(size=(30, 2)).cumsum(0) + rng.normal(size=(30, 2)))
    assert check_model(model, y) == tuple(CHECKS)
