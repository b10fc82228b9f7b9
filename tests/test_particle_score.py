"""Particle score and maximum likelihood by it, against the exact likelihood."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, norm
from torch import nn
from torch.distributions import Normal

import seqdgm as sq
from seqdgm.inference.joint import joint_log_density
from seqdgm.inference.particle_score import Draws, draw_trajectories, gradient, learnable, score
from seqdgm.inference.smc import SMCOptions
from seqdgm.prepare import prepare
from seqdgm.types import Batch

NAMES = ("phi", "log_q", "log_r", "c")
START = np.array([0.5, 0.0, 0.0, 0.3])
TRUTH = np.array([0.8, -0.5, -0.3, 0.5])


class Linear(sq.StateSpaceModel):
    """z' = phi z + e, x = c + z + u + v, written with the parameters to be learned."""

    latent_dim = 1

    def __init__(self, values: np.ndarray = START) -> None:
        super().__init__()
        for name, value in zip(NAMES, values, strict=True):
            setattr(self, name, nn.Parameter(torch.tensor([value], dtype=torch.float64)))

    def initial(self, u):
        return Normal(torch.zeros(1).double(), 1.0)

    def transition(self, z, u):
        return Normal(self.phi * z, self.log_q.exp())

    def emission(self, s, u):
        return Normal(self.c + s + u.values.sum(-1, keepdim=True), self.log_r.exp())


class WithMemory(Linear):
    """The same, but by way of a memory that nobody but the recursion knows."""

    def start(self, batch_shape):
        return None

    def absorb(self, h, z):
        return z


class Fed(Linear):
    """z' = phi x + e: reads the observation back."""

    feedback = True

    def start(self, batch_shape):
        return torch.zeros(*batch_shape, 1, dtype=self.dtype)

    def advance(self, s, x, u):
        return self.phi * x

    def prior(self, h, u):
        return Normal(h, self.log_q.exp())


def exact(values: np.ndarray) -> sq.LinearGaussianSSM:
    phi, log_q, log_r, c = values
    return sq.LinearGaussianSSM(
        F=[[phi]],
        H=[[1.0]],
        Q=[[np.exp(2 * log_q)]],
        R=[[np.exp(2 * log_r)]],
        D=[[1.0]],
        m0=[0.0],
        P0=[[1.0]],
        d=[c],
    )


def exact_fed(values: np.ndarray) -> sq.LinearGaussianSSM:
    """State x alone: x' = c + phi x + e + v, seen as it is."""
    phi, log_q, log_r, c = values
    noise = np.exp(2 * log_q) + np.exp(2 * log_r)
    return sq.LinearGaussianSSM(
        F=[[phi]], H=[[1.0]], Q=[[noise]], R=[[1e-10]], b=[c], m0=[c], P0=[[noise]]
    )


def slopes(build, y, u=None) -> np.ndarray:
    """Finite differences of the exact log-likelihood, all series together."""

    def value(theta):
        return build(theta).log_prob(y, inputs=u).value.sum()

    eye = 1e-5 * np.eye(4)
    return np.array([(value(START + e) - value(START - e)) / 2e-5 for e in eye])


def data() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two series of different length with a gap, and their inputs."""
    rng = np.random.default_rng(0)
    u = [rng.normal(size=(12, 1)), rng.normal(size=(7, 1))]
    values = [exact(TRUTH).sample(len(part), 1, inputs=part[None], seed=3).values[0] for part in u]
    values[0] = values[0].copy()
    values[0][4:6] = np.nan
    return values, u


def scores(model, batch: Batch, smoother: str, repeats: int = 20) -> np.ndarray:
    found = []
    for seed in range(repeats):
        rng = torch.Generator().manual_seed(seed)
        part = score(model, batch, SMCOptions(60), rng, 20, smoother)
        found.append([part[name].item() for name in NAMES])
    return np.array(found)


def assert_mean(values: np.ndarray, target: np.ndarray) -> None:
    """Within 5 standard errors, and the bias of O(1/N) that a smoother of N particles has."""
    spread = values.std(0, ddof=1)
    slack = 5 * spread / np.sqrt(len(values)) + 0.05 * spread
    assert np.all(np.abs(values.mean(0) - target) <= slack), (values.mean(0), target, slack)


@pytest.mark.parametrize(
    ("kind", "smoother"),
    [
        (Linear, "ffbs"),
        pytest.param(Linear, "ffbs-reject", marks=pytest.mark.slow),
        pytest.param(Linear, "genealogy", marks=pytest.mark.slow),
        pytest.param(WithMemory, "auto", marks=pytest.mark.slow),
    ],
)
def test_score_is_the_gradient_of_the_exact_likelihood(kind, smoother: str) -> None:
    y, u = data()
    model = kind()
    _, batch, _ = prepare(model, y, u)
    assert model.memoryless == (kind is Linear)
    assert_mean(scores(model, batch, smoother), slopes(exact, y, u))


@pytest.mark.slow
@pytest.mark.parametrize("y", [[0.5, 1.2, 0.1, -0.4], [0.5, np.nan, np.nan, 1.0, np.nan, -0.4]])
def test_score_of_a_model_with_feedback(y: list[float]) -> None:
    model = Fed()
    model.obs_dim_ = 1
    _, batch, _ = prepare(model, np.array(y), None)
    assert_mean(scores(model, batch, "auto"), slopes(exact_fed, np.array(y)))


def test_joint_density_is_that_of_the_graph() -> None:
    """A multivariate normal over (z, x), built from the equations by hand."""
    y, u = data()
    model = Linear()
    _, batch, _ = prepare(model, y, u)
    z = torch.randn(2, 3, 12, 1, generator=torch.Generator().manual_seed(0)).double()
    phi, log_q, log_r, c = START
    found = joint_log_density(model, batch, z)
    memory = joint_log_density(WithMemory(), batch, z)
    assert torch.allclose(found, memory, rtol=1e-12)
    for n, (values, known) in enumerate(zip(y, u, strict=True)):
        steps = len(values)
        move = np.eye(steps) - phi * np.eye(steps, k=-1)
        noise = np.diag([1.0] + [np.exp(2 * log_q)] * (steps - 1))
        cov = np.linalg.inv(move) @ noise @ np.linalg.inv(move).T
        seen = ~np.isnan(values[:, 0])
        for k in range(3):
            path = z[n, k, :steps, 0].numpy()
            expected = multivariate_normal.logpdf(path, np.zeros(steps), cov)
            gap = values[:, 0] - c - path - known[:, 0]
            expected += norm.logpdf(gap[seen], 0, np.exp(log_r)).sum()
            assert abs(found[n, k].item() - expected) < 1e-9


def test_what_is_held_fixed_has_no_gradient() -> None:
    y, u = data()
    model = Linear()
    model.phi.requires_grad_(False)
    _, batch, _ = prepare(model, y, u)
    found = score(model, batch, SMCOptions(20), torch.Generator().manual_seed(0), 3)
    assert sorted(found) == ["c", "log_q", "log_r"] == sorted(learnable(model))
    assert model.c.grad is None


def test_a_gradient_that_is_not_finite_names_the_series() -> None:
    class Cusp(Linear):
        """The derivative of a square root at 0 is infinite."""

        def emission(self, s, u):
            return Normal(s + (self.c * (s > 50)).abs().sqrt(), 1.0)

    model = Cusp()
    _, batch, _ = prepare(model, [np.zeros(3), np.zeros(3)], None)
    z = torch.full((2, 2, 3, 1), 60.0).double()
    z[1] = 0.0
    draws = Draws(z, None, torch.zeros(2).double())
    with pytest.raises(ValueError, match=r"series 1: the gradient of \['c'\] is not finite"):
        gradient(model, batch, draws)
    with pytest.raises(ValueError, match="weighs single states"):
        draw_trajectories(
            Linear(), batch, SMCOptions(10), torch.Generator().manual_seed(0), 3, "marginal"
        )


# -- learning -----------------------------------------------------------------------------------


def panel() -> np.ndarray:
    return exact(TRUTH).sample(25, 6, inputs=np.zeros((6, 25, 1)), seed=3).values


def deficit(model: sq.StateSpaceModel, y: np.ndarray) -> float:
    """How far the exact likelihood at the estimates lies below its maximum."""
    u = np.zeros((*y.shape[:2], 1))

    def loss(theta):
        return -exact(theta).log_prob(y, inputs=u).value.sum()

    best = minimize(loss, TRUTH, method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-4})
    return loss(np.array([getattr(model, name).item() for name in NAMES])) - best.fun


@pytest.mark.slow
def test_maximum_likelihood_reaches_the_exact_maximum() -> None:
    y = panel()
    options = {"n_particles": 100, "n_trajectories": 10, "max_iter": 150}
    model = Linear().fit(y, method="mle", seed=0, **options)
    # The truth lies 2 below the maximum on average (four parameters), the start about 15.
    assert deficit(Linear(), y) > 5
    assert deficit(model, y) < 0.25
    report = model.fit_report_
    assert report.n_iter == len(report.objective)
    assert np.mean(report.objective[-20:]) > report.objective[0] + 5
    again = Linear().fit(y, method="mle", seed=0, **options)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_the_ascent_goes_up_and_stops_by_itself() -> None:
    y = panel()[:2, :12]
    options = {"n_particles": 30, "n_trajectories": 5}
    model = Linear().fit(y, method="mle", seed=0, max_iter=15, **options)
    assert model.fit_report_.n_iter == 15
    assert not model.fit_report_.converged[0]
    assert deficit_drop(model, y) > 0.3
    rest = Linear().fit(y, method="mle", seed=0, max_iter=30, tol=10.0, **options).fit_report_
    assert rest.converged[0]
    assert rest.n_iter == 21


def deficit_drop(model: Linear, y: np.ndarray) -> float:
    u = np.zeros((*y.shape[:2], 1))
    before, after = (
        exact(np.array([getattr(m, k).item() for k in NAMES])).log_prob(y, inputs=u).value.sum()
        for m in (Linear(), model)
    )
    return after - before


def test_a_failure_keeps_the_last_good_parameters() -> None:
    class Cliff(Linear):
        """Not a number once the scale has come down a little."""

        def emission(self, s, u):
            bad = self.log_r.detach() < -0.07
            return Normal(self.c + s, torch.where(bad, torch.nan, self.log_r.exp()))

    y = 0.1 * panel()[:2]
    options = {"n_particles": 30, "n_trajectories": 5, "max_iter": 30}
    model = Cliff().fit(y, method="mle", seed=0, **options)
    report = model.fit_report_
    assert 0 < report.n_iter < 30
    assert not report.converged[0]
    assert report.messages[0].startswith(f"iteration {report.n_iter}: ")
    assert -0.07 <= model.log_r.item() < 0
    failing = Cliff(np.array([0.5, 0.0, -1.0, 0.0]))
    with pytest.raises(ValueError):  # noqa: PT011 (torch's own words)
        failing.fit(y, method="mle", seed=0, **options)
    assert failing.fit_report_ is None


def test_fit_says_how_to_learn() -> None:
    y = panel()[0]
    with pytest.raises(ValueError, match="fit\\(y, method='mle'\\)"):
        Linear().fit(y)
    model = Linear().requires_grad_(False)
    assert model.fit(y).fit_report_ is not None
    with pytest.raises(ValueError, match="nothing to learn"):
        model.fit(y, method="mle")
    with pytest.raises(ValueError, match="learning_rate"):
        Linear().fit(y, method="mle", learning_rate=0.0)
    with pytest.raises(ValueError, match="no options"):
        Linear().fit(y, method="mle", epochs=3)
