"""Extended and unscented Kalman filters against exact, dense and filterpy's answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from filterpy.kalman import (
    ExtendedKalmanFilter,
    MerweScaledSigmaPoints,
    UnscentedKalmanFilter,
    unscented_transform,
)
from scipy import linalg, optimize, stats
from torch import distributions as td
from torch.distributions import Independent, MultivariateNormal, Normal, Poisson, StudentT

import seqdgm as sq
from seqdgm.inference._linearise import SigmaPoints, Taylor, triangular
from seqdgm.kernels.types import System

F0, F1 = [[0.9, 0.2], [-0.1, 0.7]], [[0.0, 0.3], [-0.3, 0.1]]
H = [[1.0, 0.0], [0.5, 1.0], [-0.2, 0.4]]
Q = [[0.5, 0.1], [0.1, 0.3]]
R = [[0.4, 0.15, 0.1], [0.15, 0.6, -0.1], [0.1, -0.1, 0.5]]
B, D = [[0.5], [-0.2]], [[0.1], [0.7], [0.0]]
METHODS = [
    ("ekf", {}),
    ("ekf", {"iterations": 3}),
    ("ukf", {}),
    ("ukf", {"alpha": 1.0, "kappa": 0.0, "beta": 0.0}),
    ("ukf", {"alpha": 1e-2, "beta": 2.0, "kappa": 1.0}),
]


def t64(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


class Driven(sq.StateSpaceModel):
    """Linear-Gaussian with a transition that changes with time, correlated noises and an input."""

    engines = ("kalman", "particle", "ekf", "ukf")
    latent_dim = 2

    def initial(self, u):
        return MultivariateNormal(t64([0.5, -0.5]), torch.diag(t64([1.0, 2.0])))

    def turn(self, t):
        return t64(F0) + torch.sin(0.3 * t.double())[..., None, None] * t64(F1)

    def transition(self, z, u):
        mean = (self.turn(u.t) @ z[..., None])[..., 0] + u.values @ t64(B).mT
        return MultivariateNormal(mean, t64(Q))

    def emission(self, z, u):
        return MultivariateNormal(z @ t64(H).mT + u.values @ t64(D).mT, t64(R))

    def linear_gaussian(self, u, rows):
        first = self.initial(None)
        return System(
            F=self.turn(torch.arange(u.shape[1]))[None],
            Q=t64(Q)[None, None],
            H=t64(H)[None, None],
            R=t64(R)[None, None],
            b=u @ t64(B).mT,
            d=u @ t64(D).mT,
            m0=first.loc[None],
            P0=first.covariance_matrix[None],
            Pinf=torch.zeros(1, 2, 2).double(),
        )


def driven_data() -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Ragged, with gaps and partly missing vectors; inputs of the steps and of four more."""
    rng = np.random.default_rng(0)
    lengths = (13, 10)
    known = [rng.normal(size=(length + 4, 1)) for length in lengths]
    y = [rng.normal(size=(length, 3)) for length in lengths]
    y[0][5:8] = np.nan
    y[0][10, 1] = y[1][3, :2] = y[1][9, 2] = np.nan
    y[1][0] = np.nan
    return y, [u[:length] for u, length in zip(known, lengths, strict=True)], known


def same(a, b, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_linear_gaussian_models_give_the_kalman_filter(method, options) -> None:
    model, (y, u, known) = Driven(), driven_data()
    for verb in ("filter", "smooth"):
        exact = getattr(model, verb)(y, u)
        found = getattr(model, verb)(y, u, method=method, **options)
        same(found.mean, exact.mean)
        same(found.cov, exact.cov)
        same(found.log_likelihood, exact.log_likelihood)
    found = model.log_prob(y, u, method=method, **options)
    same(found.value, model.log_prob(y, u).value)
    assert found.kind == "approximation"
    assert np.isnan(found.stderr).all()
    exact = model.forecast(4, y, known)
    ahead = model.forecast(4, y, known, method=method, **options)
    same(ahead.mean, exact.mean)
    same(ahead.quantile(0.9), exact.quantile(0.9))
    same(ahead.states.mean, exact.states.mean)
    same(ahead.states.cov, exact.states.cov)
    same(ahead.states.log_likelihood, exact.states.log_likelihood)
    future = [np.ones((4, 3)), np.array([[0.0, np.nan, 1.0]])]
    same(ahead.log_prob(future).value, exact.log_prob(future).value)
    for a, b in zip(model.impute(y, u, method=method, **options), model.impute(y, u), strict=True):
        same(a, b)


class Static(Driven):
    """The same without inputs and changes, whose joint law is a dense Gaussian."""

    def turn(self, t):
        return t64(F0).expand(*t.shape, 2, 2)

    def transition(self, z, u):
        return MultivariateNormal(z @ t64(F0).mT, t64(Q))

    def emission(self, z, u):
        return Normal(z @ t64(H).mT, t64([0.5, 0.8, 0.3]))


def dense(steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean and covariance of all states, stacked, and the loadings and noise of all data."""
    f = np.array(F0)
    mean, cov = [np.array([0.5, -0.5])], np.zeros((2 * steps, 2 * steps))
    cov[:2, :2] = np.diag([1.0, 2.0])
    for t in range(1, steps):
        mean.append(f @ mean[-1])
        now, before = slice(2 * t, 2 * t + 2), slice(2 * t - 2, 2 * t)
        cov[now, : 2 * t] = f @ cov[before, : 2 * t]
        cov[: 2 * t, now] = cov[now, : 2 * t].T
        cov[now, now] = f @ cov[before, before] @ f.T + np.array(Q)
    load = linalg.block_diag(*[np.array(H)] * steps)
    noise = np.diag(np.tile(np.square([0.5, 0.8, 0.3]), steps))
    return np.concatenate(mean), cov, load, noise


def check_draws(draws: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> None:
    """Moments of draws (n, elements), within five standard errors."""
    n = len(draws)
    variance = np.diag(cov)
    assert (np.abs(draws.mean(0) - mean) <= 5 * np.sqrt(variance / n)).all()
    error = np.sqrt((np.outer(variance, variance) + cov**2) / n)
    assert (np.abs(np.cov(draws.T) - cov) <= 5 * error).all()


@pytest.mark.parametrize("method", ["ekf", "ukf"])
def test_joint_draws_have_the_joint_law(method) -> None:
    model, steps, horizon, n = Static(), 6, 3, 20_000
    y = np.random.default_rng(1).normal(size=(steps, 3))
    y[2], y[4, 1] = np.nan, np.nan
    seen = np.concatenate([y.ravel(), np.full(3 * horizon, np.nan)])
    mean, cov, load, noise = dense(steps + horizon)
    rows = load[np.isfinite(seen)]
    inner = rows @ cov @ rows.T + noise[np.isfinite(seen)][:, np.isfinite(seen)]
    gain = np.linalg.solve(inner, rows @ cov).T
    mean = mean + gain @ (seen[np.isfinite(seen)] - rows @ mean)
    cov = cov - gain @ rows @ cov
    past, future = slice(2 * steps), slice(3 * steps, None)
    draws = model.smooth(y, method=method).sample(n, seed=0)[0].reshape(n, -1)
    check_draws(draws, mean[past], cov[past, past])
    ahead = model.forecast(horizon, y, method=method)
    check_draws(
        ahead.sample(n, seed=0)[0].reshape(n, -1),
        (load @ mean)[future],
        (load @ cov @ load.T + noise)[future, future],
    )
    states = ahead.states.sample(n, seed=0)[0].reshape(n, -1)
    check_draws(states, mean[2 * steps :], cov[2 * steps :, 2 * steps :])


# ------------------------------------------------------------------------------ nonlinear models


class Growth(sq.StateSpaceModel):
    """Gordon, Salmond and Smith (1993)."""

    latent_dim = 1

    def initial(self, u):
        return Normal(t64([0.5]), 1.0)

    def transition(self, z, u):
        mean = z / 2 + 25 * z / (1 + z**2) + 8 * torch.cos(1.2 * u.t.double())[..., None]
        return Normal(mean, 10**0.5)

    def emission(self, z, u):
        return Normal(z**2 / 20, 1.0)


def growth(z: float, t: int) -> float:
    return z / 2 + 25 * z / (1 + z**2) + 8 * np.cos(1.2 * t)


class Radar(sq.StateSpaceModel):
    """Position and velocity in the plane, seen by range and bearing from the origin."""

    latent_dim = 4
    step = torch.eye(4, dtype=torch.float64) + torch.diag(torch.full((2,), 0.5), 2).double()
    noise = t64([0.1, 0.1, 0.3, 0.2])
    start_mean, start_std = t64([5.0, 4.0, 0.5, -0.3]), t64([1.0, 0.5, 0.3, 0.3])

    def initial(self, u):
        return Independent(Normal(self.start_mean, self.start_std), 1)

    def transition(self, z, u):
        return Independent(Normal(z @ self.step.mT, self.noise), 1)

    def emission(self, z, u):
        x, y = z[..., 0], z[..., 1]
        return Normal(torch.stack([torch.hypot(x, y), torch.atan2(y, x)], -1), t64([0.2, 0.05]))


def radar_jacobian(z: np.ndarray) -> np.ndarray:
    x, y = z[:2]
    r = np.hypot(x, y)
    return np.array([[x / r, y / r, 0, 0], [-y / r**2, x / r**2, 0, 0]])


def radar_mean(z: np.ndarray) -> np.ndarray:
    return np.array([np.hypot(z[0], z[1]), np.arctan2(z[1], z[0])])


def radar_data() -> np.ndarray:
    return Radar().sample(15, seed=3).values[0]


def test_ekf_agrees_with_filterpy() -> None:
    y = radar_data()
    found = Radar().filter(y, method="ekf")
    other = ExtendedKalmanFilter(dim_x=4, dim_z=2)
    other.x, other.P = Radar.start_mean.numpy(), np.diag(Radar.start_std.numpy() ** 2)
    other.F, other.Q = Radar.step.numpy(), np.diag(Radar.noise.numpy() ** 2)
    other.R = np.diag([0.2**2, 0.05**2])
    total = 0.0
    for t, x in enumerate(y):
        if t:
            other.predict()
        other.update(x, radar_jacobian, radar_mean)
        same(found.mean[0, t], other.x)
        same(found.cov[0, t], other.P)
        total += stats.multivariate_normal(np.zeros(2), other.S).logpdf(other.y)
    same(found.log_likelihood, [total])


CONSTANTS = [(0.5, 2.0, 1.0), (1.0, 2.0, 0.0), (0.1, 2.0, -1.0)]


@pytest.mark.parametrize(("alpha", "beta", "kappa"), CONSTANTS)
def test_ukf_agrees_with_filterpy(alpha, beta, kappa) -> None:
    y = radar_data()
    options = {"alpha": alpha, "beta": beta, "kappa": kappa}
    f = Radar.step.numpy()
    points = MerweScaledSigmaPoints(4, alpha, beta, kappa)
    other = UnscentedKalmanFilter(4, 2, 1.0, radar_mean, lambda z, dt: f @ z, points)
    other.x, other.P = Radar.start_mean.numpy(), np.diag(Radar.start_std.numpy() ** 2)
    other.Q, other.R = np.diag(Radar.noise.numpy() ** 2), np.diag([0.2**2, 0.05**2])
    found = Radar().filter(y, method="ukf", **options)
    means, covs = [], []
    for t, x in enumerate(y):
        if t:
            other.predict()
        else:
            other.sigmas_f = points.sigma_points(other.x, other.P)
        other.update(x)
        means.append(other.x)
        covs.append(other.P)
    same(found.mean[0], means, 1e-8)
    same(found.cov[0], covs, 1e-8)
    mean, cov, _ = other.rts_smoother(np.array(means), np.array(covs))
    found = Radar().smooth(y, method="ukf", **options)
    same(found.mean[0], mean, 1e-8)
    same(found.cov[0], cov, 1e-8)


@pytest.mark.parametrize(("alpha", "beta", "kappa"), CONSTANTS)
def test_ukf_agrees_with_filterpy_on_the_growth_model(alpha, beta, kappa) -> None:
    """Both the transition and the emission are nonlinear, and the transition changes with time."""
    y = Growth().sample(30, seed=1).values[0]
    kappa += 1
    points = MerweScaledSigmaPoints(1, alpha, beta, kappa)
    other = UnscentedKalmanFilter(
        1, 1, 1.0, lambda z: z**2 / 20, lambda z, dt, t: growth(z, t), points
    )
    other.x, other.P, other.Q = np.array([0.5]), np.eye(1), 10 * np.eye(1)
    found = Growth().filter(y, method="ukf", alpha=alpha, beta=beta, kappa=kappa)
    total = 0.0
    for t, x in enumerate(y):
        if t:
            other.predict(t=t)
        else:
            other.sigmas_f = points.sigma_points(other.x, other.P)
        other.update(x)
        same(found.mean[0, t], other.x, 1e-8)
        same(found.cov[0, t], other.P, 1e-8)
        total += stats.norm.logpdf(other.y[0], 0, other.S[0, 0] ** 0.5)
    same(found.log_likelihood, [total], 1e-8)


def test_extended_smoother_agrees_with_the_textbook_recursion() -> None:
    """Särkkä and Svensson (2023), algorithms 7.4 and 13.1, with derivatives by hand."""
    y = Growth().sample(25, seed=2).values[0]
    filtered, predicted, slopes = [], [], []
    m, p = 0.5, 1.0
    for t, x in enumerate(y[:, 0]):
        if t:
            slope = 0.5 + 25 * (1 - m**2) / (1 + m**2) ** 2
            m, p = growth(m, t), slope**2 * p + 10
            slopes.append(slope)
        predicted.append((m, p))
        h = m / 10
        s = h**2 * p + 1
        m, p = m + p * h / s * (x - m**2 / 20), p - (p * h) ** 2 / s
        filtered.append((m, p))
    out = [filtered[-1]]
    for t in range(len(y) - 2, -1, -1):
        (m, p), (ahead, spread) = filtered[t], predicted[t + 1]
        gain = p * slopes[t] / spread
        out.append((m + gain * (out[-1][0] - ahead), p + gain**2 * (out[-1][1] - spread)))
    expected = np.array(out[::-1])
    found = Growth().smooth(y, method="ekf")
    same(found.mean[0, :, 0], expected[:, 0])
    same(found.cov[0, :, 0, 0], expected[:, 1])


class Beacons(sq.StateSpaceModel):
    """A place in the plane, seen by its distances from three beacons."""

    latent_dim = 2
    beacons = t64([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])

    def initial(self, u):
        return MultivariateNormal(t64([2.0, 2.5]), t64([[2.0, 0.5], [0.5, 1.0]]))

    def transition(self, z, u):
        return Normal(z, 0.1)

    def emission(self, z, u):
        distance = (z[..., None, :] - self.beacons).norm(dim=-1)
        return Normal(distance, t64([0.2, 0.1, 0.3]))


def test_iterations_find_the_posterior_mode() -> None:
    x = np.array([[1.8, 2.6, 3.4]])
    first = Beacons().initial(None)
    whiten = np.linalg.inv(np.linalg.cholesky(first.covariance_matrix.numpy()))
    beacons, std = Beacons.beacons.numpy(), np.array([0.2, 0.1, 0.3])

    def residuals(z):
        distance = np.linalg.norm(z - beacons, axis=-1)
        return np.concatenate([whiten @ (z - first.loc.numpy()), (x[0] - distance) / std])

    mode = optimize.least_squares(residuals, first.loc.numpy(), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    found = Beacons().filter(x, method="ekf", iterations=40)
    same(found.mean[0, 0], mode.x, 1e-6)
    same(found.cov[0, 0], np.linalg.inv(mode.jac.T @ mode.jac), 1e-5)
    once = Beacons().filter(x, method="ekf")
    assert np.abs(once.mean - found.mean).max() > 0.01
    # The same identity as in Laplace's approximation: p(x) = p(x, z) / q(z | x) at the mode.
    z = torch.from_numpy(mode.x)
    joint = Beacons().emission(z, None).log_prob(torch.from_numpy(x)).sum() + first.log_prob(z)
    laplace = joint.item() + np.log(2 * np.pi) + 0.5 * np.linalg.slogdet(found.cov[0, 0])[1]
    same(found.log_likelihood, [laplace], 1e-6)


class Counts(sq.StateSpaceModel):
    """Poisson counts with a log-rate that has heavy-tailed shocks."""

    latent_dim = 1

    def initial(self, u):
        return Normal(t64([0.3]), 0.6)

    def transition(self, z, u):
        return StudentT(5.0, 0.9 * z, 0.2)

    def emission(self, z, u):
        return Poisson(z.exp())


def test_moments_of_other_families_are_matched() -> None:
    y = np.array([[2.0], [4.0]])
    rule = MerweScaledSigmaPoints(1, 1.0, 2.0, 0.5)
    m, p, total = np.array([0.3]), np.array([[0.36]]), 0.0
    for t, x in enumerate(y[:, 0]):
        if t:
            m, p = 0.9 * m, 0.81 * p + 0.04 * 5 / 3
        z = rule.sigma_points(m, p)
        rate, s = unscented_transform(np.exp(z), rule.Wm, rule.Wc)
        s = s + rule.Wm @ np.exp(z)
        cross = (rule.Wc * (z - m)[:, 0]) @ (np.exp(z) - rate)
        total += stats.norm.logpdf(x, rate[0], s[0, 0] ** 0.5)
        m, p = m + cross / s[0] * (x - rate), p - cross**2 / s
        # The extended filter takes the moments at the mean.
    found = Counts().filter(y, method="ukf", alpha=1.0, beta=2.0, kappa=0.5)
    same(found.mean[0, -1], m)
    same(found.cov[0, -1], p)
    same(found.log_likelihood, [total])
    once = Counts().filter(y[:1], method="ekf")
    rate = np.exp(0.3)
    same(once.mean[0, 0, 0], 0.3 + 0.36 * rate / (0.36 * rate**2 + rate) * (2 - rate))


def test_mean_covariance_has_positive_weights_for_narrow_points() -> None:
    """A weight of -99 at the centre would make the mean of these variances negative."""

    def law(z):
        return Normal(0 * z, (1 / (1 + 50 * z**2)).sqrt())

    mean, root = t64([0.0]), t64([[1.0]])
    found = SigmaPoints(0.1, 2.0, 0.0)(law, mean, root, 1)
    same(found.noise.square().sum(), 1 / 51)  # the cubature points are at -1 and 1
    points = MerweScaledSigmaPoints(1, 0.1, 2.0, 0.0)
    assert points.Wm @ (1 / (1 + 50 * np.array([0.0, 0.1, -0.1]) ** 2)) < 0


@pytest.mark.parametrize("rule", [Taylor(), SigmaPoints(), SigmaPoints(0.3, 2.0, 1.0)])
def test_joint_noise_that_moves_with_the_state(rule) -> None:
    def root(z):
        scale = 1 + 0.5 * torch.tanh(z[..., :1, None])
        return torch.tril(torch.eye(2).double() * scale + 0.3)

    def law(z):
        return MultivariateNormal(z**2, scale_tril=root(z))

    mean, spread = t64([[0.5, -0.3], [1.0, 0.2]]), t64([[1.0, 0.0], [0.4, 0.5]]).expand(2, 2, 2)
    found = rule(law, mean, spread, 2)
    n, k = 2, 0
    if isinstance(rule, Taylor):
        centre = root(mean)[k]
        same(found.noise[k], centre)
        same(found.load[k], torch.diag(2 * mean[k]) @ spread[k])
        return
    weights = MerweScaledSigmaPoints(n, rule.alpha, rule.beta, rule.kappa)
    points = torch.from_numpy(
        weights.sigma_points(mean[k].numpy(), (spread @ spread.mT)[k].numpy())
    )
    _, curved = unscented_transform(points.numpy() ** 2, weights.Wm, weights.Wc)
    noise = (found.noise @ found.noise.mT)[k].numpy()
    load = (found.load @ found.load.mT)[k].numpy()
    if rule.alpha < 1:
        cubature = MerweScaledSigmaPoints(n, 1.0, 0.0, 0.0)
        cov = (spread @ spread.mT)[k].numpy()
        points = torch.from_numpy(cubature.sigma_points(mean[k].numpy(), cov))
        weights = cubature
    each = (root(points) @ root(points).mT).numpy()
    same(load + noise, curved + np.einsum("p,pij->ij", weights.Wm, each))


# -------------------------------------------------------------------------------------- numbers


def test_triangular_root_has_the_same_square() -> None:
    array = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)).double()
    array[0, 2] = array[0, 1]  # rank 2
    lower = triangular(array)
    same(lower @ lower.mT, array @ array.mT, 1e-12)
    assert torch.equal(lower, lower.tril())
    assert (torch.diagonal(lower, dim1=-2, dim2=-1) >= 0).all()


class Sharp(sq.StateSpaceModel):
    """Twenty constants, seen one combination at a time almost without noise."""

    latent_dim = 20
    load = torch.randn(20, 20, generator=torch.Generator().manual_seed(1)).double()

    def initial(self, u):
        return Normal(torch.zeros(20).double(), 10.0)

    def transition(self, z, u):
        return Normal(z, 1e-12)

    def emission(self, z, u):
        return Normal(z @ self.load[u.t % 20][..., None], 1e-9)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_covariances_stay_semi_definite_almost_without_noise(method, options) -> None:
    truth = np.random.default_rng(2).normal(size=20)
    y = np.tile(Sharp.load.numpy() @ truth, 2)[:, None]
    for verb in ("filter", "smooth"):
        found = getattr(Sharp(), verb)(y, method=method, **options)
        values = np.linalg.eigvalsh(found.cov[0])
        assert (values[:, 0] >= -1e-13 * values[:, -1]).all()
        # After twenty combinations the constants are known to the noise times the condition.
        allowed = 1e-9 * np.linalg.cond(Sharp.load.numpy())
        assert np.abs(found.mean[0, 19:] - truth).max() < 100 * allowed
        assert found.std[0, -1].max() < 10 * allowed


def test_results_are_float64_whatever_the_model() -> None:
    class Small(Growth):
        dtype = torch.float32

        def initial(self, u):
            return Normal(torch.zeros(1), 1.0)

    y = Growth().sample(10, seed=0)
    for method in ("ekf", "ukf"):
        found = Small().smooth(y, method=method)
        assert found.mean.dtype == np.float64
        same(found.mean[:, 1:], Growth().smooth(y, method=method).mean[:, 1:], 0.2)


# --------------------------------------------------------------------------------------- errors


def test_auto_never_chooses_an_approximation() -> None:
    y = Growth().sample(10, seed=0)
    assert Growth().log_prob(y, n_particles=50, seed=0).kind == "estimate"
    assert Growth().filter(y, n_particles=50, seed=0).ess is not None


def broken(kind: str, validate: bool) -> sq.StateSpaceModel:
    """NaN from step 3 on, in the series whose input is negative."""

    class Broken(Growth):
        def spoil(self, u, mean):
            bad = (u.values < 0) & (u.t >= 3)[..., None]
            return torch.where(bad, torch.nan, mean)

        def transition(self, z, u):
            mean = 0.5 * z
            return Normal(
                self.spoil(u, mean) if kind == "transition" else mean, 1.0, validate_args=validate
            )

        def emission(self, z, u):
            return Normal(
                self.spoil(u, z) if kind == "emission" else z, 1.0, validate_args=validate
            )

    return Broken()


@pytest.mark.parametrize("method", ["ekf", "ukf"])
@pytest.mark.parametrize("kind", ["transition", "emission"])
@pytest.mark.parametrize("validate", [True, False])
def test_what_is_not_a_number_is_named(method, kind, validate) -> None:
    inputs = np.array([[[1.0]] * 6, [[-1.0]] * 6])
    with pytest.raises(ValueError, match=f"series 1, step 3: .*{kind}"):
        broken(kind, validate).filter(np.ones((2, 6, 1)), inputs, method=method)


@pytest.mark.parametrize("method", ["ekf", "ukf"])
def test_a_forecast_that_is_not_a_number_is_named(method) -> None:
    inputs = [np.array([[1.0]] * 9), np.array([[1.0]] * 4 + [[-1.0]] * 3)]
    y = [np.ones((6, 1)), np.ones((4, 1))]
    with pytest.raises(ValueError, match=r"series 1, step 4: .*transition"):
        broken("transition", False).forecast(3, y, inputs, method=method)


@pytest.mark.parametrize("method", ["ekf", "ukf"])
@pytest.mark.parametrize(
    ("law", "message"),
    [
        (lambda z: StudentT(2.0, z, 1.0), "df <= 2"),
        (lambda z: td.Cauchy(z, 1.0), "not finite"),
        (
            lambda z: td.TransformedDistribution(Normal(z, 1.0), [td.SigmoidTransform()]),
            "closed form",
        ),
        (lambda z: td.OneHotCategorical(logits=torch.cat([z, -z], -1)), "expected 1"),
        (lambda z: td.OneHotCategorical(logits=z), "closed form"),
    ],
)
def test_laws_without_moments_are_refused(method, law, message) -> None:
    class Odd(Growth):
        def emission(self, z, u):
            return law(z)

    with pytest.raises(ValueError, match=f"series 0, step 0: .*emission.*{message}"):
        Odd().filter(np.ones((4, 1)), method=method)


def test_models_with_a_memory_are_refused() -> None:
    class Memory(Growth):
        def absorb(self, h, z):
            return z if h is None else h + z

    with pytest.raises(ValueError, match="not a Markov model"):
        Memory().filter(np.ones((4, 1)), method="ekf")


def test_constants_of_the_sigma_points_are_checked() -> None:
    y = np.ones((4, 1))
    with pytest.raises(ValueError, match=r"^alpha=.*in one place"):
        Growth().filter(y, method="ukf", alpha=0.0)
    with pytest.raises(ValueError, match=r"^alpha=.*in one place"):
        Growth().filter(y, method="ukf", kappa=-1.0)
    with pytest.raises(ValueError, match=r"^alpha=.*beta of at least -0\.5"):
        Growth().filter(y, method="ukf", alpha=1.0, kappa=0.5, beta=-0.6)
    Growth().filter(y, method="ukf", alpha=1.0, kappa=0.5, beta=-0.5)
    with pytest.raises(ValueError, match="iterations"):
        Growth().filter(y, method="ekf", iterations=0)
