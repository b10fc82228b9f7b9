"""Dynamic factor models against statsmodels and dense Gaussians."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import statsmodels.api as sm
import torch

import seqdgm as sq
from seqdgm.testing import CHECKS, check_model

LOADINGS = np.array([[1.0, 0.3], [0.6, -0.8], [-0.7, 0.5], [0.4, 0.9]])


def data(length: int, seed: int, error: float = 0.0) -> np.ndarray:
    """Two factors in four columns, with holes."""
    rng = np.random.default_rng(seed)
    f, e = np.zeros((length, 2)), np.zeros((length, 4))
    for t in range(1, length):
        f[t] = [0.8, 0.4] * f[t - 1] + rng.normal(size=2)
        e[t] = error * e[t - 1] + 0.7 * rng.normal(size=4)
    out = f @ LOADINGS.T + e
    out[10:15, 0] = np.nan
    out[20] = np.nan
    return out


def theirs(model: sq.DynamicFactor, y: np.ndarray) -> tuple[sm.tsa.DynamicFactor, np.ndarray]:
    """Statsmodels' model, which has no constant, and our parameters in its order."""
    found = [field[0].numpy() for field in model.parameters_]
    loadings, _, ar, error_ar, variance = found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = sm.tsa.DynamicFactor(
            y,
            k_factors=model.n_factors,
            factor_order=model.factor_order,
            error_order=model.error_order,
        )
    lags = np.concatenate(list(ar), 1).ravel() if len(ar) else np.zeros(0)
    return reference, np.concatenate([loadings.ravel(), variance, lags, error_ar.ravel()])


@pytest.mark.parametrize(
    ("factors", "order", "error"),
    [(1, 1, 0), (2, 1, 0), (1, 2, 0), (2, 2, 1), (1, 1, 2), (1, 0, 0)],
)
def test_likelihood_and_states_are_those_of_statsmodels(factors, order, error) -> None:
    y = data(70, 1, 0.5)
    model = sq.DynamicFactor(factors, order, error, trend=None, scale=None).fit(y, max_iter=4)
    reference, parameters = theirs(model, y)
    assert model.log_prob(y).value[0] == pytest.approx(reference.loglike(parameters), rel=1e-9)
    states = model.smooth(y)
    expected = reference.smooth(parameters)
    np.testing.assert_allclose(
        states.mean[0, :, :factors].T, expected.smoothed_state[:factors], atol=1e-7
    )
    assert len(states.names) == states.mean.shape[-1]
    assert states.names[0] == "factor1"


@pytest.mark.parametrize(
    ("factors", "order", "error"),
    [(1, 1, 0), pytest.param(2, 1, 0, marks=pytest.mark.slow), (1, 1, 1)],
)
def test_the_optimum_is_no_worse_than_that_of_statsmodels(factors, order, error) -> None:
    y = data(100, 2, 0.5 if error else 0.0)
    model = sq.DynamicFactor(factors, order, error, trend=None, scale=None).fit(y)
    assert model.fit_report_.converged.all()
    reference, _ = theirs(model, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = reference.fit(disp=0, maxiter=300).llf
    assert model.log_prob(y).value[0] >= best - 1e-4


@pytest.mark.parametrize("pooled", [False, True])
def test_em_never_lowers_the_likelihood_and_reaches_the_maximum(pooled) -> None:
    y = [data(60, 3), data(45, 4)]
    u = [np.random.default_rng(k).normal(size=(len(one), 1)) for k, one in enumerate(y)]
    climbed = sq.DynamicFactor(1, 2).fit(
        y, inputs=u, method="em", max_iter=60, tol=0.0, pooled=pooled
    )
    steps = np.diff(climbed.fit_report_.objective)
    assert len(steps) == 59
    assert steps.min() > -1e-8
    top = sq.DynamicFactor(1, 2).fit(y, inputs=u, pooled=pooled).log_prob(y, inputs=u).value.sum()
    assert top - 1.0 < climbed.log_prob(y, inputs=u).value.sum() < top + 1e-6


def test_the_mean_enters_as_in_a_dense_gaussian() -> None:
    y = data(25, 5) + np.arange(1.0, 5.0)
    u = np.random.default_rng(5).normal(size=(25, 1))
    model = sq.DynamicFactor(1, 1, scale="standard").fit(y, inputs=u, max_iter=5)
    loadings, mean, ar, _, variance = (field[0].numpy() for field in model.parameters_)
    phi = ar.item()
    lag = np.abs(np.arange(25)[:, None] - np.arange(25))
    factor = phi**lag / (1 - phi**2)
    cov = np.kron(factor, loadings @ loadings.T) + np.kron(np.eye(25), np.diag(variance))
    centre = (mean[:, 0] + u @ mean[:, 1:].T).ravel()
    loc, size = np.nanmean(y, 0), np.nanstd(y, 0)
    seen = np.isfinite(y).ravel()
    joint = torch.distributions.MultivariateNormal(
        torch.from_numpy(centre[seen]), torch.from_numpy(cov[np.ix_(seen, seen)])
    )
    x = torch.from_numpy(((y - loc) / size).ravel()[seen])
    expected = float(joint.log_prob(x)) - (np.isfinite(y) * np.log(size)).sum()
    assert model.log_prob(y, inputs=u).value[0] == pytest.approx(expected, rel=1e-10)


def test_factors_are_identified() -> None:
    model = sq.DynamicFactor(2).fit(data(100, 6))
    weighted = model.loadings_[0] / model.error_variance_[0].sqrt()[:, None]
    gram = weighted.T @ weighted
    assert abs(gram[0, 1]) < 1e-9 * gram[0, 0]
    assert gram[0, 0] > gram[1, 1]
    for column in weighted.T:
        assert column[column.abs().argmax()] > 0
    # The loadings that made the data span the same space as those found, in the data's units.
    found = model.loadings_[0].numpy() * np.nanstd(data(100, 6), axis=0)[:, None]
    basis, _ = np.linalg.qr(found)
    residual = LOADINGS - basis @ (basis.T @ LOADINGS)
    assert np.linalg.norm(residual) < 0.25 * np.linalg.norm(LOADINGS)


def test_bad_arguments_are_refused() -> None:
    for options in ({"n_factors": 0}, {"factor_order": -1}, {"error_order": 1.5}, {"trend": "ct"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            sq.DynamicFactor(**options)
    with pytest.raises(ValueError, match="4 columns"):
        sq.DynamicFactor(5).fit(data(40, 0))
    with pytest.raises(ValueError, match="method='mle'"):
        sq.DynamicFactor(1, 1, 1).fit(data(40, 0), method="em")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (sq.DynamicFactor(1), {"method": "em", "max_iter": 10}),
        pytest.param(sq.DynamicFactor(1, 2), {}, marks=pytest.mark.slow),
        pytest.param(
            sq.DynamicFactor(1, 1, 1, trend=None), {"max_iter": 5}, marks=pytest.mark.slow
        ),
    ],
)
def test_conformance(model, options) -> None:
    y = data(60, 7)[21:51, :3]
    assert check_model(model, y, fit_options=options) == tuple(CHECKS)
