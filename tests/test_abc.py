"""Likelihood-free filters and parameter posteriors against exact ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch.distributions import Bernoulli, Normal, Poisson

import seqdgm as sq
from seqdgm.inference import abc as engine
from seqdgm.inference.abc import TargetESS
from seqdgm.inference.abc_smc import abc as sq_abc
from seqdgm.prepare import prepare
from seqdgm.types import Batch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within(values: np.ndarray, target: np.ndarray | float, errors: float = 5.0) -> None:
    """Mean over the first axis lies within so many standard errors of the target."""
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    gap = np.abs(values.mean(0) - target)
    assert np.all(gap <= errors * stderr), (values.mean(0), target, stderr)


def batch_of(model: sq.StateSpaceModel, y: np.ndarray, n: int) -> Batch:
    _, batch, _ = prepare(model, y, None)
    return batch.take(torch.arange(batch.n_series).repeat_interleave(n))


class Level(sq.StateSpaceModel):
    """A level seen twice with noise."""

    latent_dim = 1

    def initial(self, u):
        return Normal(torch.zeros(1).double(), 1.0)

    def transition(self, z, u):
        return Normal(0.9 * z, 0.7)

    def emission(self, z, u):
        return Normal(torch.cat([z, 0.5 * z], -1), 0.6)


def known(extra: tuple[float, float] = (0.0, 0.0)) -> sq.LinearGaussianSSM:
    """`Level`, with extra error variances."""
    return sq.LinearGaussianSSM(
        F=[[0.9]],
        H=[[1.0], [0.5]],
        Q=[[0.49]],
        R=[[0.36 + extra[0], 0.0], [0.0, 0.36 + extra[1]]],
        m0=[0.0],
        P0=[[1.0]],
        diffuse=False,
    )


def data() -> np.ndarray:
    values = Level().sample(6, 2, seed=4).values.copy()
    values[1, 2] = np.nan
    values[1, 4, 0] = np.nan
    return values


@pytest.mark.parametrize("tolerance", [0.5, (0.4, 0.9)])
def test_gaussian_kernel_is_exact_for_noisier_observations(tolerance) -> None:
    """The mean of the estimates is the Kalman likelihood with R + epsilon^2."""
    y, n = data(), 3000
    out = engine.log_prob(
        Level(),
        batch_of(Level(), y, n),
        n_particles=30,
        generator=generator(),
        tolerance=tolerance,
    )
    first, second = np.broadcast_to(tolerance, 2) ** 2
    exact = known((first, second)).log_prob(y).value
    within(np.exp(out.value.view(2, n).numpy() - exact[:, None]).T, 1.0)
    assert out.kind == "estimate"


def test_filter_has_the_moments_of_the_noisier_model() -> None:
    y = data()
    exact = known((0.09, 0.09)).filter(y)
    found = Level().filter(y, method="abc", n_particles=20_000, seed=1, tolerance=0.3)
    assert np.all(np.abs(found.mean - exact.mean) < 0.06 * exact.std)
    assert np.all(np.abs(found.std / exact.std - 1) < 0.06)
    assert abs(found.log_likelihood - exact.log_likelihood).max() < 0.15


DENSITIES = {
    "gaussian": stats.norm.pdf,
    "uniform": lambda v: 0.5 * (abs(v) <= 1),
    "epanechnikov": lambda v: 0.75 * max(1 - v * v, 0.0),
}


@pytest.mark.parametrize("kernel", sorted(DENSITIES))
def test_kernels_are_densities_of_the_error(kernel: str) -> None:
    """One step, against a convolution on a grid."""
    width, y = 0.7, 0.8
    spread = np.sqrt(1.36)

    def integrand(v: float) -> float:
        return DENSITIES[kernel](v) * stats.norm.pdf(y - width * v, 0, spread)

    reach = 12 if kernel == "gaussian" else 1
    exact = quad(integrand, -reach, reach)[0]
    batch = batch_of(Level(), np.array([[[y, np.nan]]]), 4000)
    out = engine.log_prob(
        Level(), batch, n_particles=50, generator=generator(), kernel=kernel, tolerance=width
    )
    within(out.value.exp().numpy() / exact, 1.0)


class Counts(sq.StateSpaceModel):
    """Two hidden rates of counts."""

    latent_dim = 1

    def initial(self, u):
        return Bernoulli(torch.tensor([0.4]).double())

    def transition(self, z, u):
        return Bernoulli(0.3 + 0.5 * z)

    def emission(self, z, u):
        return Poisson(1 + 2 * z)


def test_uniform_kernel_counts_matches_of_integers() -> None:
    y = np.array([1.0, 3.0, np.nan, 0.0, 2.0])
    total = 0.0
    for path in np.ndindex(*[2] * len(y)):
        p = 0.4 if path[0] else 0.6
        for before, now in itertools.pairwise(path):
            up = 0.3 + 0.5 * before
            p *= up if now else 1 - up
        for state, x in zip(path, y, strict=True):
            if np.isfinite(x):
                p *= stats.poisson.pmf(x, 1 + 2 * state)
        total += p
    out = engine.log_prob(
        Counts(),
        batch_of(Counts(), y, 2000),
        n_particles=300,
        generator=generator(),
        kernel="uniform",
        tolerance=0.5,
    )
    within(out.value.exp().numpy() / total, 1.0)


@pytest.mark.parametrize("kernel", sorted(DENSITIES))
def test_adaptive_tolerance_keeps_the_share_asked_for(kernel: str) -> None:
    batch = batch_of(Level(), data()[:1], 20)
    out = engine.filter(
        Level(),
        batch,
        n_particles=1000,
        generator=generator(),
        kernel=kernel,
        tolerance=TargetESS(0.25),
        threshold=1.0,
    )
    assert torch.allclose(out.ess, torch.tensor(250.0).double(), rtol=0.02)


@pytest.mark.slow
def test_adaptive_estimate_approaches_the_likelihood() -> None:
    y = data()
    exact = known().log_prob(y).value
    gaps = []
    for count, share in ((100, 0.5), (500, 0.15), (2500, 0.04)):
        batch = batch_of(Level(), y, 20)
        out = engine.log_prob(
            Level(), batch, n_particles=count, generator=generator(), tolerance=TargetESS(share)
        )
        gaps.append(np.abs(out.value.view(2, 20).numpy().mean(1) - exact).max())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


def test_forecast_has_no_kernel_error() -> None:
    y = data()[:1, :4]
    filtered = known((4.0, 4.0)).filter(y)
    mean, variance = filtered.mean[0, -1, 0], filtered.cov[0, -1, 0, 0]
    found = Level().forecast(2, y, method="abc", n_samples=40_000, seed=0, tolerance=2.0)
    draws = found.sample(40_000, seed=1)[0, :, :, 0]
    for step in range(2):
        mean, variance = 0.9 * mean, 0.81 * variance + 0.49
        error = np.sqrt((variance + 0.36) / 40_000)
        assert abs(draws[:, step].mean() - mean) < 10 * error
        assert abs(draws[:, step].var() / (variance + 0.36) - 1) < 0.05


class Simulated(sq.StateSpaceModel):
    """Observations from a g-and-k distribution, whose density has no closed form."""

    latent_dim = 1
    engines = ("abc",)

    def initial(self, u):
        return Normal(torch.zeros(1).double(), 1.0)

    def transition(self, z, u):
        return Normal(0.8 * z, 0.6)

    def simulate(self, s, u, generator):
        e = torch.randn(s.shape, generator=generator, dtype=s.dtype)
        return s + 0.3 * (1 + 0.8 * torch.tanh(e)) * (1 + e**2) ** 0.2 * e


def test_a_model_without_a_density_has_every_verb() -> None:
    model = Simulated()
    y = model.sample(20, 2, seed=3).values.copy()
    y[0, 8:10] = np.nan
    states = model.filter(y, n_particles=500, seed=0)
    assert np.isfinite(states.mean).all()
    assert np.corrcoef(states.mean[1, :, 0], y[1, :, 0])[0, 1] > 0.8
    assert model.log_prob(y, n_particles=500, seed=0).kind == "estimate"
    assert model.smooth(y, n_particles=500, seed=0).cov.shape == (2, 20, 1, 1)
    filled = model.impute(y, n_particles=200, seed=0)
    assert np.isfinite(filled).all()
    assert np.array_equal(filled[1], y[1])
    future = model.forecast(3, y, n_samples=200, seed=0)
    assert future.mean.shape == (2, 3, 1)
    assert np.isfinite(future.log_prob(np.zeros((2, 3, 1))).value).all()
    with pytest.raises(ValueError, match="no method 'particle'"):
        model.filter(y, method="particle")


def test_bad_tolerances_are_refused() -> None:
    model, y = Level(), data()
    with pytest.raises(ValueError, match="tolerance=0"):
        model.filter(y, method="abc", tolerance=0.0)
    with pytest.raises(ValueError, match="tolerance has 3 numbers"):
        model.filter(y, method="abc", tolerance=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="no kernel 'box'"):
        model.filter(y, method="abc", kernel="box")
    with pytest.raises(ValueError, match="share"):
        TargetESS(1.5)
    with pytest.raises(ValueError, match=r"series .*step 0.*weight zero") as raised:
        model.filter(y + 1e3, method="abc", kernel="uniform", tolerance=0.1, n_particles=10)
    assert any("larger tolerance" in note for note in raised.value.__notes__)


class Wrong(Simulated):
    def simulate(self, s, u, generator):
        return s[..., 0]


def test_a_simulator_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"Wrong.simulate gives the shape"):
        Wrong().filter(np.zeros(4), n_particles=10)


# -------------------------------------------------------------------------------- parameters


class Mean(sq.StateSpaceModel):
    """Independent observations around an unknown mean."""

    latent_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.mu = 0.0

    def initial(self, u):
        return Normal(torch.zeros(1).double(), 1.0)

    def transition(self, z, u):
        return Normal(torch.zeros_like(z), 1.0)

    def emission(self, z, u):
        return Normal(self.mu + 0 * z, 1.0)


OBSERVED = np.array([0.7, 1.9, -0.2, np.nan, 0.8])


def mean_of(x: torch.Tensor) -> torch.Tensor:
    return x.nanmean((1, 2))


def gap(found: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    return (found - observed).abs().amax(1)


def cdf_gap(draws: np.ndarray, grid: np.ndarray, density: np.ndarray) -> float:
    """Kolmogorov's distance of draws from a density on a grid."""
    mass = np.cumsum(density) / density.sum()
    return float(stats.ks_1samp(draws, lambda v: np.interp(v, grid, mass)).statistic)


@pytest.mark.parametrize("n_simulations", [1, 3])
def test_population_has_the_exact_abc_posterior(n_simulations: int) -> None:
    """p(mu | |mean simulated - mean observed| <= epsilon), in closed form."""
    epsilon, n = 0.3, 2000
    found = sq_abc(
        Mean(),
        OBSERVED,
        {"mu": Normal(torch.tensor(0.0), 2.0)},
        n_particles=n,
        tolerance=epsilon,
        summary=mean_of,
        distance=gap,
        n_simulations=n_simulations,
        seed=1,
    )
    assert found.tolerance == epsilon
    assert np.all(np.diff(found.tolerances) < 0)
    grid = np.linspace(-6, 8, 4001)
    middle, spread = np.nanmean(OBSERVED), 0.5
    density = stats.norm.pdf(grid, 0, 2) * (
        stats.norm.cdf((middle + epsilon - grid) / spread)
        - stats.norm.cdf((middle - epsilon - grid) / spread)
    )
    draws = found.draws["mu"].ravel()
    # A tenth of the draws at most are copies of others.
    assert cdf_gap(draws, grid, density) < 1.95 / np.sqrt(0.5 * n)
    share = np.exp(found.log_likelihood)
    assert np.all((share * n_simulations >= 0.99) & (share <= 1))


def test_population_on_raw_series_agrees_with_rejection() -> None:
    y, epsilon = np.array([0.4, 1.1]), 0.8
    random = np.random.default_rng(0)
    mu = random.uniform(-3, 3, 400_000)
    close = np.abs(mu[:, None] + random.normal(size=(400_000, 2)) - y).max(1) <= epsilon
    prior = {"mu": torch.distributions.Uniform(-3.0, 3.0)}
    found = sq_abc(Mean(), y, prior, n_particles=2000, tolerance=epsilon, distance=gap, seed=2)
    assert stats.ks_2samp(found.draws["mu"].ravel(), mu[close]).statistic < 1.95 / np.sqrt(900)


class Ratio(sq.StateSpaceModel):
    """An autoregression seen with noise."""

    latent_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.rho = 0.5

    def initial(self, u):
        return Normal(torch.zeros(1).double(), 1.0)

    def transition(self, z, u):
        return Normal(self.rho * z, 0.5)

    def emission(self, z, u):
        return Normal(z, 0.4)


@pytest.mark.slow
def test_pmmh_has_the_posterior_of_the_noisier_model() -> None:
    """Against the Kalman likelihood with R + epsilon^2 on a grid, with few particles."""
    y = np.array([0.5, 1.1, 0.9, 0.2, 0.6, 1.3, 0.8, 0.1])
    grid = np.linspace(-1, 1, 201)
    level = [
        float(
            sq.LinearGaussianSSM(
                F=[[rho]],
                H=[[1.0]],
                Q=[[0.25]],
                R=[[0.16 + 0.25]],
                m0=[0.0],
                P0=[[1.0]],
                diffuse=False,
            ).log_prob(y)
        )
        for rho in grid
    ]
    density = np.exp(np.array(level) - max(level))
    found = sq_abc(
        Ratio(),
        y,
        {"rho": torch.distributions.Uniform(-1.0, 1.0)},
        method="pmmh",
        n_particles=20,
        tolerance=0.5,
        n_iter=300,
        n_chains=60,
        seed=3,
    )
    draws = found.draws["rho"][:, 19::20]
    exact = (grid * density).sum() / density.sum()
    within(draws.mean(1), exact)
    assert cdf_gap(draws.ravel(), grid, density) < 1.95 / np.sqrt(draws.size / 4)


class Skewed(Simulated):
    """With an unknown scale of the shocks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_ = 0.3

    def simulate(self, s, u, generator):
        e = torch.randn(s.shape, generator=generator, dtype=s.dtype)
        return s + self.scale_ * (1 + 0.8 * torch.tanh(e)) * (1 + e**2) ** 0.2 * e


def test_both_methods_take_a_model_without_a_density() -> None:
    y = Skewed().sample(40, 2, seed=5)
    prior = {"scale_": torch.distributions.Uniform(0.05, 3.0)}

    def moments(x):
        step = x[:, :, 1:] - x[:, :, :-1]
        return torch.stack([x.std((1, 2, 3)), step.std((1, 2, 3))], 1)

    found = sq_abc(Skewed(), y, prior, n_particles=200, summary=moments, max_rounds=6, seed=1)
    assert found.draws["scale_"].shape == (1, 200)
    assert found.draws["scale_"].std() < 0.5 * 0.85
    assert found.forecast(2, seed=0).mean.shape == (2, 2, 1)
    chained = sq_abc(
        Skewed(), y, prior, method="pmmh", n_particles=50, tolerance=0.4, n_iter=10, seed=1
    )
    assert chained.draws["scale_"].shape == (4, 10)


def test_bad_options_of_parameter_inference_are_refused() -> None:
    prior = {"mu": Normal(torch.tensor(0.0), 2.0)}
    with pytest.raises(ValueError, match="no method 'rejection'"):
        sq_abc(Mean(), OBSERVED, prior, method="rejection")
    with pytest.raises(ValueError, match="needs a number"):
        sq_abc(Mean(), OBSERVED, prior, method="pmmh", tolerance=TargetESS(), n_iter=5)
    with pytest.raises(ValueError, match=r"keep=1\.0"):
        sq_abc(Mean(), OBSERVED, prior, keep=1.0)
    with pytest.raises(ValueError, match="summary gives the shape"):
        sq_abc(Mean(), OBSERVED, prior, summary=lambda x: x[:, 0, 0, 0], n_particles=10)
    with pytest.raises(ValueError, match="no simulation from the prior"):
        sq_abc(Mean(), OBSERVED, prior, summary=lambda x: x.mean(1)[:, :, 0], n_particles=10)
