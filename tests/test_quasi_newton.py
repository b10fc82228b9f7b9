"""The batched quasi-Newton search against scipy.optimize and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from seqdgm.inference.quasi_newton import maximise

RNG = np.random.default_rng(0)
CENTRE = RNG.uniform(0.5, 2.0, 12)
NARROW = RNG.uniform(1.0, 100.0, 12)


def valley(theta, rows):
    """Minus Rosenbrock's function with another valley for every series."""
    a, b = CENTRE[rows], NARROW[rows]
    return -((a - theta[:, 0]) ** 2 + b * (theta[:, 1] - theta[:, 0] ** 2) ** 2)


def alone(objective, n):
    """The same objective for series n only."""
    return lambda theta, rows: objective(theta, np.full_like(rows, n))


def test_valleys_of_every_series_end_where_scipy_ends():
    best = maximise(valley, np.tile([-1.2, 1.0], (12, 1)))
    assert best.converged.all()
    assert best.messages == ("",) * 12
    np.testing.assert_allclose(best.theta, np.c_[CENTRE, CENTRE**2], atol=1e-5)
    for n in range(12):
        theirs = minimize(lambda x, n=n: -valley(x[None], np.array([n]))[0], [-1.2, 1.0], tol=1e-9)
        assert best.value[n] >= -theirs.fun - 1e-9
        # No more than twice scipy's evaluations would hide a search that has lost its curvature.
        assert best.n_iter[n] <= 2 * theirs.nit


def test_non_quadratic_optimum_equals_scipy():
    rng = np.random.default_rng(1)
    A, b = rng.normal(size=(4, 30, 3)), rng.normal(size=(4, 3))

    def objective(theta, rows):
        eta = np.einsum("bki,bi->bk", A[rows], theta)
        return (b[rows] * theta).sum(1) - np.logaddexp(0, eta).sum(1) - 0.1 * (theta**2).sum(1)

    best = maximise(objective, np.zeros((4, 3)))
    assert best.converged.all()
    for n in range(4):
        theirs = minimize(
            lambda x, n=n: -objective(x[None], np.array([n]))[0],
            np.zeros(3),
            options={"gtol": 1e-7},
        )
        np.testing.assert_allclose(best.theta[n], theirs.x, atol=1e-5)
        assert best.value[n] == pytest.approx(-theirs.fun, abs=1e-9)


def test_quadratic_has_its_closed_form():
    rng = np.random.default_rng(2)
    root = rng.normal(size=(6, 5, 5))
    hessian = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(5)
    linear = rng.normal(size=(6, 5))

    def objective(theta, rows):
        bend = np.einsum("bi,bij,bj->b", theta, hessian[rows], theta)
        return (linear[rows] * theta).sum(1) - 0.5 * bend

    best = maximise(objective, np.ones((6, 5)))
    expected = np.linalg.solve(hessian, linear[:, :, None])[:, :, 0]
    assert best.converged.all()
    np.testing.assert_allclose(best.value, 0.5 * (linear * expected).sum(1), atol=1e-8)
    slope = linear - np.einsum("nij,nj->ni", hessian, best.theta)
    np.testing.assert_allclose(best.gradient, slope, atol=1e-7)


def test_batch_equals_every_series_alone():
    start = np.random.default_rng(3).normal(size=(12, 2))
    together = maximise(valley, start)
    total = 0
    for n in range(12):
        single = maximise(alone(valley, n), start[n : n + 1])
        np.testing.assert_array_equal(single.theta[0], together.theta[n])
        assert single.value[0] == together.value[n]
        assert single.n_iter[0] == together.n_iter[n]
        total += single.n_evaluations
    assert together.n_evaluations == total


def test_one_call_holds_all_rows_of_a_gradient():
    calls = []

    def counted(theta, rows):
        calls.append(len(rows))
        return valley(theta, rows)

    best = maximise(counted, np.tile([-1.2, 1.0], (12, 1)), max_iter=3)
    assert calls[:2] == [12, 48]
    assert best.n_evaluations == sum(calls)
    # Line searches of different lengths share their calls.
    assert len(calls) < 30


@pytest.mark.parametrize("outside", [np.nan, np.inf, -np.inf])
def test_points_outside_the_domain_are_never_taken(outside):
    taken = []

    def objective(theta, rows):
        inside = (theta > 0).all(1)
        safe = np.where(inside[:, None], theta, 1.0)
        value = (np.log(safe) - (rows[:, None] + 1) * safe).sum(1)
        taken.append(inside)
        return np.where(inside, value, outside)

    # log x - k x has its maximum at 1/k; from far to the right a full step leaves the domain.
    best = maximise(objective, np.full((3, 2), 30.0))
    assert best.converged.all()
    assert not np.concatenate(taken).all()
    np.testing.assert_allclose(
        best.theta, np.repeat(1 / np.arange(1.0, 4.0), 2).reshape(3, 2), atol=1e-5
    )
    np.testing.assert_allclose(best.value, -2 * np.log(np.arange(1.0, 4.0)) - 2, atol=1e-9)


def test_gradient_at_the_edge_of_the_domain_is_one_sided():
    def objective(theta, rows):
        return np.where(theta[:, 0] >= 0, -((theta[:, 0] + 1) ** 2), np.nan)

    best = maximise(objective, np.zeros((1, 1)))
    # The maximum over the domain is its edge: the slope there is -2 and nothing better exists.
    assert best.theta.item() == 0.0
    assert best.gradient.item() == pytest.approx(-2.0, abs=1e-4)
    assert not best.converged.item()
    assert "no better point" in best.messages[0]


def test_a_series_that_fails_leaves_the_others_alone():
    start = np.tile([-1.2, 1.0], (3, 1))

    def one_fails(theta, rows):
        return np.where(rows == 1, np.nan, valley(theta, rows))

    best, whole = maximise(one_fails, start), maximise(valley, start)
    assert best.converged.tolist() == [True, False, True]
    assert best.messages == ("", "the objective is not finite at the starting values", "")
    assert np.isnan(best.value[1])
    np.testing.assert_array_equal(best.theta[1], start[1])
    np.testing.assert_array_equal(best.theta[[0, 2]], whole.theta[[0, 2]])


def test_a_point_without_neighbours_fails_with_its_reason():
    def island(theta, rows):
        return np.where((theta == 0).all(1), 1.0, np.nan)

    best = maximise(island, np.zeros((1, 2)))
    assert best.value.item() == 1.0
    assert not best.converged.item()
    assert "either side" in best.messages[0]


def test_no_parameters_only_evaluates():
    best = maximise(lambda theta, rows: np.where(rows == 1, np.inf, 2.0 * rows), np.zeros((3, 0)))
    assert best.theta.shape == best.gradient.shape == (3, 0)
    np.testing.assert_array_equal(best.value, [0.0, np.nan, 4.0])
    assert best.converged.tolist() == [True, False, True]
    assert best.n_evaluations == 3


def test_iterations_are_limited_and_the_trace_never_falls():
    best = maximise(valley, np.tile([-1.2, 1.0], (12, 1)), max_iter=4)
    assert best.n_iter.tolist() == [4] * 12
    assert not best.converged.any()
    assert best.messages[0] == "no convergence in 4 iterations"
    assert len(best.trace) == 5
    assert (np.diff(best.trace, axis=0) >= 0).all()
    np.testing.assert_allclose(best.value, valley(best.theta, np.arange(12)), rtol=0)
    np.testing.assert_array_equal(best.trace[-1], best.value)


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_parameters_of_any_size_are_found_when_their_size_is_given(size):
    best = maximise(lambda x, rows: -np.cosh(x[:, 0] / size - 0.7), np.zeros((1, 1)), step=size)
    assert best.converged.item()
    assert best.theta.item() / size == pytest.approx(0.7, abs=1e-5)


def test_a_start_where_the_function_bends_upwards_is_left_quickly():
    # Further than 1 from its top the function is convex: a Newton step would go the wrong way.
    best = maximise(lambda x, rows: -np.log1p((x[:, 0] - 40.0) ** 2), np.zeros((1, 1)))
    assert best.converged.item()
    assert best.theta.item() == pytest.approx(40.0, abs=1e-4)
    assert best.n_iter.item() < 25


def test_flat_function_is_converged_at_once():
    best = maximise(lambda x, rows: np.full(len(rows), 3.0), np.ones((2, 3)))
    assert best.converged.all()
    assert best.n_iter.tolist() == [0, 0]
    np.testing.assert_array_equal(best.theta, 1.0)


@pytest.mark.parametrize(
    ("start", "step", "text"),
    [
        (np.zeros(3), None, r"shape \(3,\)"),
        (np.array([[0.0], [np.nan]]), None, "series 1, parameter 0 is nan"),
        (np.zeros((1, 1)), 0.0, "positive"),
    ],
)
def test_bad_arguments_are_named(start, step, text):
    with pytest.raises(ValueError, match=text):
        maximise(valley, start, step=step)


def test_an_objective_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"shape \(2, 1\) for 2 parameter rows"):
        maximise(lambda theta, rows: theta[:, :1], np.zeros((2, 2)))
