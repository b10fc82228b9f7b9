"""Simulated series have the laws that their systems state, and filters find their states."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import solve_ivp

import seqdgm as sq
from seqdgm.datasets.simulators import SYSTEMS


def within(values, expected, what=""):
    """Mean of independent values, within five standard errors."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean() - expected) < 5 * error + 1e-12, what


@pytest.mark.parametrize("name", SYSTEMS)
def test_shapes_and_seeds(name):
    made, again, other = (sq.datasets.simulate(name, 2, 12, seed=seed) for seed in (3, 3, 4))
    assert made.y.values.shape[:2] == made.states.shape[:2] == (2, 12)
    np.testing.assert_array_equal(made.y.values, again.y.values)
    np.testing.assert_array_equal(made.states, again.states)
    assert not np.array_equal(made.states, other.states)
    assert np.isfinite(made.states).all()
    assert made.model.ready


def test_linear_gaussian_moments_are_those_of_the_recursion():
    F, Q = np.array([[0.8, 0.3], [0.0, 0.5]]), np.array([[1.0, 0.4], [0.4, 0.5]])
    H, R = np.array([[1.0, -1.0]]), np.array([[0.3]])
    made = sq.datasets.simulate("linear-gaussian", 4000, 4, seed=0, F=F, Q=Q, H=H, R=R)
    cov = np.eye(2)
    for t in range(4):
        z = made.states[:, t]
        for i in range(2):
            within(z[:, i], 0.0)
            for j in range(2):
                within(z[:, i] * z[:, j], cov[i, j], f"step {t}")
        within(made.y.values[:, t, 0] ** 2, (H @ cov @ H.T + R).item())
        cov = F @ cov @ F.T + Q


def test_kalman_errors_are_as_large_as_the_filter_says():
    made = sq.datasets.simulate("linear-gaussian", 1000, 20, seed=1)
    found = made.model.filter(made.y)
    error = (made.states - found.mean)[:, -1]
    within(np.einsum("ni,nij,nj->n", error, np.linalg.inv(found.cov[:, -1]), error), 2.0)


def test_switching_regimes_follow_their_chain():
    Pi = [[0.9, 0.1], [0.3, 0.7]]
    made = sq.datasets.simulate("switching", 3000, 5, seed=0, Pi=Pi)
    k = made.states[..., 1:].argmax(-1)
    np.testing.assert_array_equal(made.states[..., 1:].sum(-1), 1)
    within((k[:, 0] == 1).astype(float), 0.25)
    for i in range(2):
        within((k[:, 1:][k[:, :-1] == i] == 1).astype(float), Pi[i][1])
    # x given the regime and the state before
    z, x = made.states[..., 0], made.y.values[..., 0]
    F, Q = np.array([0.9, 0.5])[k[:, 1:]], np.array([0.05, 4.0])[k[:, 1:]]
    within(((z[:, 1:] - F * z[:, :-1]) ** 2 / Q)[:, 2], 1.0)
    within((x - z)[:, 3] ** 2, 0.2)


def test_growth_is_the_published_recursion():
    made = sq.datasets.simulate("growth", 3000, 6, seed=0)
    z, x = made.states[..., 0], made.y.values[..., 0]
    within(z[:, 0] ** 2, 2.0)
    for t in range(1, 6):
        mean = z[:, t - 1] / 2 + 25 * z[:, t - 1] / (1 + z[:, t - 1] ** 2) + 8 * np.cos(1.2 * t)
        within(z[:, t] - mean, 0.0)
        within((z[:, t] - mean) ** 2, 10.0)
        within((x[:, t] - z[:, t] ** 2 / 20) ** 2, 1.0)


def lorenz63(t, z):
    return [10 * (z[1] - z[0]), z[0] * (28 - z[2]) - z[1], z[0] * z[1] - 8 / 3 * z[2]]


def lorenz96(t, z):
    return [(z[(d + 1) % 8] - z[d - 2]) * z[d - 1] - z[d] + 8 for d in range(8)]


@pytest.mark.parametrize(
    ("name", "slope", "dt", "substeps"),
    [("lorenz-63", lorenz63, 0.05, 20), ("lorenz-96", lorenz96, 0.1, 20)],
)
def test_flows_are_those_of_an_adaptive_integrator(name, slope, dt, substeps):
    made = sq.datasets.simulate(name, 1, 5, seed=0, noise=1e-12, dt=dt, substeps=substeps)
    z = made.states[0]
    for before, after in pairwise(z):
        expected = solve_ivp(slope, (0, dt), before, rtol=1e-11, atol=1e-11).y[:, -1]
        np.testing.assert_allclose(after, expected, atol=2e-5)


def test_pendulum_noise_has_the_covariance_of_its_source():
    dt, q = 0.05, 0.1
    made = sq.datasets.simulate("pendulum", 3000, 3, seed=0)
    a, w = made.states[:, 1].T
    noise = made.states[:, 2] - np.stack([a + w * dt, w - 9.81 * np.sin(a) * dt], -1)
    cov = q * np.array([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]])
    for i in range(2):
        for j in range(2):
            within(noise[:, i] * noise[:, j], cov[i, j])
    within((made.y.values[:, 2, 0] - np.sin(made.states[:, 2, 0])) ** 2, 0.1)


def test_ball_bounces_off_walls_and_keeps_its_speed():
    made = sq.datasets.simulate("bouncing-ball", 50, 200, seed=0, noise=1e-9)
    place, velocity = made.states[..., :2], made.states[..., 2:]
    assert np.abs(place).max() <= 1 + 1e-8
    assert np.ptp(np.abs(velocity), axis=1).max() < 1e-6
    straight = np.isclose(place[:, 1:], place[:, :-1] + velocity[:, :-1], atol=1e-6)
    turned = np.sign(velocity[:, 1:]) != np.sign(velocity[:, :-1])
    np.testing.assert_array_equal(straight, ~turned)
    assert turned.sum() > 100


def test_counts_have_the_moments_of_a_lognormal_rate():
    made = sq.datasets.simulate("poisson-counts", 5000, 3, seed=0)
    variance = 0.2**2 / (1 - 0.95**2)
    for t in range(3):
        within(made.states[:, t, 0], 1.5)
        within((made.states[:, t, 0] - 1.5) ** 2, variance)
        within(made.y.values[:, t, 0], np.exp(1.5 + variance / 2))


def test_volatility_scales_the_returns():
    made = sq.datasets.simulate("stochastic-volatility", 4000, 3, seed=0)
    z, x = made.states[..., 0], made.y.values[..., 0]
    within(z[:, 2], -0.5)
    within((z[:, 2] - (-0.5 + 0.97 * (z[:, 1] + 0.5))) ** 2, 0.04)
    within(x[:, 2] ** 2 / np.exp(z[:, 2]), 1.0)


def test_bad_names_and_parameters_are_told():
    with pytest.raises(ValueError, match=r"no simulator 'lorenz'.*lorenz-63"):
        sq.datasets.simulate("lorenz")
    with pytest.raises(ValueError, match=r"'growth'.*unexpected keyword argument 'sigma'"):
        sq.datasets.simulate("growth", sigma=1.0)
    with pytest.raises(ValueError, match="n_steps=0"):
        sq.datasets.simulate("growth", n_steps=0)
    with pytest.raises(ValueError, match=r"q=-1\.0 must be above 0"):
        sq.datasets.simulate("growth", q=-1.0)
