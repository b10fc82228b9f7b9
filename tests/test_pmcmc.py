"""Particle MCMC against posteriors by integration, and the statistics that judge chains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from grid_posterior import PRIORS, STEP, Grid, NoisyAutoregression, data, log_likelihood
from scipy import stats
from torch.distributions import Gamma, Normal, Poisson, Uniform

import seqdgm as sq
from seqdgm.inference import convergence
from seqdgm.inference.correlated import Noise, correlated_log_prob, hilbert
from seqdgm.inference.particle_gibbs import log_joint, particle_gibbs
from seqdgm.inference.pmcmc import pmmh
from seqdgm.prepare import prepare

FOUR = {"n_particles": 4, "method": "particle"}


def test_exact_likelihood_gives_the_posterior_of_the_grid() -> None:
    found = pmmh(
        NoisyAutoregression(), data(), PRIORS, n_iter=80, n_chains=200, n_warmup=150, seed=1
    )
    assert found.kind == "exact"
    grid = Grid.of(data())
    for name in PRIORS:
        grid.check(name, found.draws[name])
    exact = log_likelihood(found.draws["rho"], found.draws["noise"], data())
    np.testing.assert_allclose(found.log_likelihood, exact, rtol=1e-8)
    prior = stats.gamma.logpdf(found.draws["noise"], 8, scale=1 / 8) + math.log(0.5)
    np.testing.assert_allclose(found.log_prior, prior, rtol=1e-6)


def test_four_particles_are_enough_for_the_posterior_of_the_grid() -> None:
    found = pmmh(
        NoisyAutoregression(),
        data(),
        PRIORS,
        n_iter=100,
        n_chains=160,
        n_warmup=150,
        seed=2,
        **FOUR,
    )
    assert found.kind == "estimate"
    grid = Grid.of(data())
    for name in PRIORS:
        grid.check(name, found.draws[name])


def test_particle_gibbs_with_four_particles_gives_the_posterior_of_the_grid() -> None:
    found = particle_gibbs(
        NoisyAutoregression(),
        data(),
        PRIORS,
        n_iter=40,
        n_chains=160,
        n_warmup=50,
        n_particles=4,
        n_moves=3,
        seed=3,
    )
    grid = Grid.of(data())
    for name in PRIORS:
        grid.check(name, found.draws[name])


@pytest.mark.slow
@pytest.mark.parametrize("ancestor_sampling", [False, True])
def test_states_of_particle_gibbs_are_those_of_the_grid(ancestor_sampling: bool) -> None:
    x = data()
    found = particle_gibbs(
        NoisyAutoregression(),
        x,
        PRIORS,
        n_iter=200,
        n_chains=200,
        n_warmup=150,
        n_particles=4,
        n_moves=3,
        ancestor_sampling=ancestor_sampling,
        n_trajectories=40,
        seed=4,
    )
    grid = Grid.of(x, points=60)
    rho, noise = np.meshgrid(grid.rho, grid.noise, indexing="ij")
    expected = (smoothed(rho, noise, x) * grid.weights[..., None]).sum((0, 1))
    each = found.states[:, :, 0, :, 0].mean(1)
    stderr = each.std(0, ddof=1) / math.sqrt(len(each))
    assert (np.abs(each.mean(0) - expected) < 5 * stderr + 1e-3).all()
    place = found.state_draws
    np.testing.assert_array_equal(place, np.linspace(0, 199, 40).astype(int))


def smoothed(rho: np.ndarray, noise: np.ndarray, x: np.ndarray) -> np.ndarray:
    """E[z | x, parameters] by Gaussian conditioning, (..., time)."""
    from grid_posterior import covariance

    cov = covariance(rho, len(x))
    whole = cov + noise[..., None, None] ** 2 * np.eye(len(x))
    seen = np.linalg.solve(whole, np.broadcast_to(x[:, None], (*whole.shape[:-1], 1)))
    return (cov @ seen)[..., 0]


class Plane(NoisyAutoregression):
    """The same law of the data: one direction of a plane in which both move alike is observed."""

    engines = ("particle",)
    latent_dim = 2

    def initial(self, u):
        return Normal(torch.zeros(2).double(), 1.0)

    def emission(self, z, u):
        return Normal(0.6 * z[..., :1] + 0.8 * z[..., 1:], self.noise)


@pytest.mark.parametrize(("size", "bits"), [(2, 4), (3, 3)])
def test_neighbours_on_the_curve_are_neighbours_in_space(size: int, bits: int) -> None:
    """Sorted by place, the cells of a grid make one path of unit steps."""
    axis = torch.arange(2**bits)
    cells = torch.cartesian_prod(*[axis] * size)
    path = cells[torch.argsort(hilbert(cells, bits))]
    assert ((path[1:] - path[:-1]).abs().sum(1) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("model", [NoisyAutoregression(), Plane()])
def test_correlated_pmmh_gives_the_posterior_of_the_grid(model: NoisyAutoregression) -> None:
    found = pmmh(
        model,
        data(),
        PRIORS,
        n_iter=200,
        n_chains=200,
        n_warmup=250,
        n_particles=4,
        correlated=0.8,
        seed=5,
    )
    grid = Grid.of(data())
    for name in PRIORS:
        grid.check(name, found.draws[name])


@pytest.mark.parametrize("model", [NoisyAutoregression(), Plane()])
def test_correlated_estimates_are_unbiased_and_move_little_with_their_noise(
    model: NoisyAutoregression,
) -> None:
    x, rows = data(), 4000
    _, batch, _ = prepare(model, x, None)
    many = batch.take(torch.zeros(rows, dtype=torch.int64))
    generator = torch.Generator().manual_seed(0)
    noise = Noise.draw(many, 16, generator, model.latent_dim)
    first = correlated_log_prob(model, many, noise)
    exact = float(log_likelihood(np.array(model.rho), np.array(model.noise), x))
    ratio = (first - exact).exp().numpy()
    assert abs(ratio.mean() - 1) < 5 * ratio.std(ddof=1) / math.sqrt(rows)
    near = correlated_log_prob(model, many, noise.refresh(0.99, generator))
    far = correlated_log_prob(model, many, Noise.draw(many, 16, generator, model.latent_dim))
    assert float((near - first).var()) < 0.08 * float((far - first).var())
    for part in noise.refresh(0.6, generator):
        assert abs(float(part.var()) - 1) < 0.05


@pytest.mark.parametrize("sampler", ["pmmh", pytest.param("gibbs", marks=pytest.mark.slow)])
def test_series_of_a_panel_share_their_parameters(sampler: str) -> None:
    y = [data(12, 3), data(7, 4)]
    settings = {"n_iter": 60, "n_chains": 150, "n_warmup": 80, "n_particles": 8, "seed": 6}
    if sampler == "pmmh":
        found = pmmh(NoisyAutoregression(), y, PRIORS, method="kalman", **settings)
    else:
        found = particle_gibbs(NoisyAutoregression(), y, PRIORS, n_moves=3, **settings)
        assert found.states.shape == (150, 60, 2, 12, 1)
        assert np.isnan(found.states[:, :, 1, 7:]).all()
        assert np.isfinite(found.states[:, :, 1, :7]).all()
    assert found.draws["rho"].shape == (150, 60)
    grid = Grid.of(*y)
    for name in PRIORS:
        grid.check(name, found.draws[name])


def test_series_have_posteriors_of_their_own_if_asked() -> None:
    y = [data(12, 3), data(7, 4)]
    found = pmmh(
        NoisyAutoregression(),
        y,
        PRIORS,
        n_iter=80,
        n_chains=150,
        n_warmup=150,
        pooled=False,
        seed=7,
    )
    assert found.draws["rho"].shape == (150, 80, 2)
    assert found.accept_rate.shape == (150, 2)
    for k, one in enumerate(y):
        grid = Grid.of(one)
        for name in PRIORS:
            grid.check(name, found.draws[name][:, :, k])
    assert list(found.summary().index) == ["rho[0]", "rho[1]", "noise[0]", "noise[1]"]


# ----------------------------------------------------------------------- calibration by simulation

SETS = 400


def simulated() -> tuple[np.ndarray, np.ndarray]:
    """Parameters from the prior, and a series of 12 steps from each (numpy alone)."""
    rng = np.random.default_rng(0)
    rho = rng.uniform(-1, 1, SETS)
    noise = rng.gamma(8.0, 1 / 8.0, SETS)
    z = rng.normal(size=SETS)
    x = np.empty((SETS, 12))
    for t in range(12):
        z = z if t == 0 else rho * z + STEP * rng.normal(size=SETS)
        x[:, t] = z + noise * rng.normal(size=SETS)
    return np.stack([rho, noise], 1), x[..., None]


def check_ranks(truth: np.ndarray, draws: dict[str, np.ndarray]) -> None:
    """Ranks of the truth among thinned draws are uniform (Talts et al. 2018), by chi-square."""
    for k, name in enumerate(("rho", "noise")):
        thin = draws[name][0, :: draws[name].shape[1] // 19][:19]
        ranks = (thin < truth[:, k]).sum(0)
        counts = np.bincount(ranks // 2, minlength=10)
        assert stats.chisquare(counts).pvalue > 1e-4, (name, counts)


@pytest.mark.slow
def test_pmmh_is_calibrated() -> None:
    truth, x = simulated()
    found = pmmh(
        NoisyAutoregression(),
        x,
        PRIORS,
        n_iter=19 * 25,
        n_warmup=300,
        n_chains=1,
        n_particles=8,
        method="particle",
        pooled=False,
        seed=8,
    )
    check_ranks(truth, found.draws)


@pytest.mark.slow
def test_particle_gibbs_is_calibrated() -> None:
    truth, x = simulated()
    found = particle_gibbs(
        NoisyAutoregression(),
        x,
        PRIORS,
        n_iter=19 * 12,
        n_warmup=100,
        n_chains=1,
        n_particles=4,
        n_moves=4,
        pooled=False,
        seed=9,
    )
    check_ranks(truth, found.draws)


# -------------------------------------------------------------------------- densities of the joint


class Remembering(sq.StateSpaceModel):
    """A moving sum of the states drives them, and observations feed back."""

    latent_dim = 1
    feedback = True
    pull = 0.3

    def __init__(self) -> None:
        super().__init__()
        self.obs_dim_ = 1

    def start(self, batch_shape):
        return torch.zeros(*batch_shape, 1).double()

    def advance(self, s, x, u):
        return 0.5 * s + self.pull * x

    def prior(self, h, u):
        return Normal(h, 0.8)

    def absorb(self, h, z):
        return h + z

    def emission(self, s, u):
        return Normal(s, 0.6)


def test_joint_density_is_the_product_of_its_steps() -> None:
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 6, 1)), rng.normal(size=(2, 6, 1))
    model = Remembering()
    _, batch, _ = prepare(model, [x[0], x[1, :4]], None)
    expected = np.zeros(2)
    for k, length in enumerate((6, 4)):
        s, last = 0.0, 0.0
        for t in range(length):
            h = 0.5 * s + 0.3 * last
            s, last = h + z[k, t, 0], x[k, t, 0]
            expected[k] += stats.norm.logpdf(z[k, t, 0], h, 0.8)
            expected[k] += stats.norm.logpdf(last, s, 0.6)
    np.testing.assert_allclose(log_joint(model, batch, torch.from_numpy(z)), expected)


def test_joint_density_of_a_markov_model_with_gaps_and_an_end() -> None:
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 6, 1)), rng.normal(size=(2, 6, 1))
    x[0, 2] = np.nan
    model = NoisyAutoregression()
    _, batch, _ = prepare(model, [x[0], x[1, :4]], None)
    expected = np.zeros(2)
    for k, length in enumerate((6, 4)):
        a, b = z[k, :length, 0], x[k, :length, 0]
        expected[k] = stats.norm.logpdf(a[0], 0, 1) + np.nansum(stats.norm.logpdf(b, a, 1.0))
        expected[k] += stats.norm.logpdf(a[1:], 0.5 * a[:-1], STEP).sum()
    np.testing.assert_allclose(log_joint(model, batch, torch.from_numpy(z)), expected)


def test_particle_gibbs_of_a_model_with_a_memory() -> None:
    y = Remembering().sample(10, seed=0)
    with pytest.raises(ValueError, match="ancestor_sampling=False"):
        particle_gibbs(Remembering(), y, {"pull": Normal(0.0, 1.0)}, n_iter=2, seed=0)
    found = particle_gibbs(
        Remembering(),
        y,
        {"pull": Normal(0.0, 1.0)},
        n_iter=3,
        n_particles=4,
        ancestor_sampling=False,
        seed=0,
    )
    assert np.isfinite(found.draws["pull"]).all()


def test_own_sampler_of_the_parameters() -> None:
    """The precision of the observations given the states has a Gamma law in closed form."""
    x = data()

    def precision(z: torch.Tensor, x: torch.Tensor, generator: torch.Generator) -> dict:
        gap = (x - z)[..., 0]
        rate = 2.0 + 0.5 * gap.square().sum((1, 2))
        shape = torch.full_like(rate, 3.0 + 0.5 * gap[0].numel())
        drawn = torch._standard_gamma(shape, generator=generator) / rate
        return {"precision": drawn}

    class ByPrecision(NoisyAutoregression):
        engines = ("particle",)
        precision = 1.0

        def emission(self, z, u):
            return Normal(z, torch.as_tensor(self.precision).rsqrt())

    settings = {"n_iter": 40, "n_warmup": 20, "n_chains": 150, "n_particles": 4, "seed": 1}
    prior = {"precision": Gamma(3.0, 2.0)}
    found = particle_gibbs(ByPrecision(), x, prior, sample_parameters=precision, **settings)
    value = np.linspace(0.005, 12, 2400)
    log_p = stats.gamma.logpdf(value, 3, scale=0.5)
    log_p = log_p + log_likelihood(np.full_like(value, 0.5), value**-0.5, x)
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    each = found.draws["precision"].mean(1)
    gap = each.mean() - (weight * value).sum()
    assert abs(gap) < 5 * each.std(ddof=1) / math.sqrt(len(each))
    np.testing.assert_allclose(found.accept_rate, 1)
    with pytest.raises(ValueError, match="sample_parameters returned None for 'precision'"):
        particle_gibbs(ByPrecision(), x, prior, sample_parameters=lambda *_: {}, **settings)


# ------------------------------------------------------------------------------- seeds and errors


@pytest.mark.parametrize("sampler", [pmmh, particle_gibbs])
def test_same_seed_gives_the_same_draws(sampler) -> None:
    settings = {"n_iter": 4, "n_particles": 5, "n_chains": 2}
    state = torch.get_rng_state()
    runs = [sampler(NoisyAutoregression(), data(), PRIORS, seed=s, **settings) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    for name in PRIORS:
        np.testing.assert_array_equal(runs[0].draws[name], runs[1].draws[name])
        assert (runs[0].draws[name] != runs[2].draws[name]).any()


def run(model=None, priors=None, y=None, **more):
    settings = {"n_iter": 2, "seed": 0, **FOUR, **more}
    y = data() if y is None else y
    return pmmh(model or NoisyAutoregression(), y, priors or PRIORS, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"priors": {"phi": Normal(0.0, 1.0)}}, "no parameter 'phi'"),
        ({"priors": {"rho": Normal(torch.zeros(2), 1.0)}}, r"shape \(2,\)"),
        ({"priors": {"rho": Poisson(2.0)}}, "discrete"),
        ({"init": {"phi": 0.3}}, r"init names \['phi'\]"),
        ({"init": {"rho": [0.1, 0.2]}}, r"shape \(2,\).*\(4,\)"),
        ({"init": {"rho": 1.5}}, r"chain 0, rho=1.5.*outside the support"),
        ({"init": {"rho": [0.1, 0.2, -1.2, 0.1]}}, "chain 2, rho=-1.2"),
        ({"n_iter": 0}, "n_iter=0"),
        ({"n_warmup": -1}, "n_warmup=-1"),
        ({"method": "ekf9"}, "no method 'ekf9'"),
        ({"smoother": "ffbs"}, "no options"),
        ({"correlated": 1.0, "method": "auto"}, "between 0 and 1"),
        ({"correlated": True}, "bootstrap filter of its own"),
    ],
)
def test_bad_arguments_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(**settings)


class Bounded(NoisyAutoregression):
    """Observations beyond the bound are impossible."""

    engines = ("particle",)
    bound = 3.0

    def emission(self, z, u):
        return Uniform(-self.bound + 0 * z, self.bound + 0 * z, validate_args=False)


def test_values_that_the_data_rule_out_are_rejected() -> None:
    x = np.array([0.5, -1.0, 2.0])
    found = run(Bounded(), {"bound": Gamma(2.0, 1.0)}, x, n_iter=60, init={"bound": 3.0})
    assert (found.draws["bound"] > 2.0).all()
    np.testing.assert_allclose(found.log_likelihood, -3 * np.log(2 * found.draws["bound"]))
    drawn = run(Bounded(), {"bound": Gamma(2.0, 1.0)}, x, n_iter=5)
    assert (drawn.draws["bound"] > 2.0).all()
    with pytest.raises(ValueError, match=r"chain 0, bound=1.5, has likelihood zero"):
        run(Bounded(), {"bound": Gamma(2.0, 1.0)}, x, init={"bound": 1.5})


class Broken(NoisyAutoregression):
    def emission(self, z, u):
        return Normal(z + (torch.as_tensor(self.rho) - 2.0).sqrt(), 1.0, validate_args=False)


def test_nan_of_the_model_is_an_error_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"series '?0 \(chain 0\)'?, step 0"):
        run(Broken(), {"rho": Uniform(-1.0, 1.0)})


# --------------------------------------------------------------------------------------- results


def test_convergence_statistics_agree_with_published_code() -> None:
    """Figures of ArviZ 0.23.4, methods "rank", "bulk", "tail" and "mean"."""
    c, t = np.meshgrid(np.arange(3), np.arange(61), indexing="ij")
    wave = np.sin(0.37 * t + c) + 0.3 * (c + 1) * np.cos(1.7 * t**2)
    walk = np.cumsum(np.cos(1.7 * t**2 + c), 1)
    figures = {
        "wave": (0.9903065051789097, 51.908530129593274, 118.47397739933143, 49.76270730441675),
        "walk": (1.7780776393299187, 5.056374822082678, 28.23024802635671, 4.947904911553337),
    }
    for x, expected in zip((wave, walk), figures.values(), strict=True):
        found = [convergence.rhat(x), *(convergence.ess(x, k) for k in ("bulk", "tail", "mean"))]
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_effective_size_is_that_of_the_autocorrelations() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 20_000))
    x = noise.copy()
    for t in range(1, x.shape[1]):
        x[:, t] = 0.8 * x[:, t - 1] + noise[:, t]
    expected = x.size * (1 - 0.8) / (1 + 0.8)
    assert abs(convergence.ess(x, "mean") / expected - 1) < 0.1
    assert abs(convergence.rhat(x) - 1) < 0.01


def test_convergence_sees_chains_of_other_places_and_scales() -> None:
    x = np.random.default_rng(0).normal(size=(4, 500, 3))
    x[0, :, 1] += 3
    x[0, :, 2] *= 10
    assert (convergence.rhat(x) > [0.99, 1.1, 1.1]).all()
    assert convergence.rhat(x)[0] < 1.02
    x[1, 3, 0], x[:, :, 1] = np.nan, 7.0
    assert np.isnan(convergence.rhat(x)[:2]).all()
    with pytest.raises(ValueError, match="four draws"):
        convergence.ess(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="'median' is unknown"):
        convergence.ess(x, "median")


def test_summary_and_dictionary() -> None:
    found = run(n_iter=8, method="kalman")
    table = found.summary()
    assert list(table.index) == ["rho", "noise"]
    draws = found.draws["noise"]
    assert table.loc["noise", "mean"] == draws.mean()
    assert table.loc["noise", "5%"] == np.quantile(draws, 0.05)
    assert table.loc["rho", "rhat"] == found.rhat()["rho"]
    assert found.to_dict().keys() == {"rho", "noise"}
    assert (found.n_chains, found.n_draws) == (4, 8)


def test_arviz_export() -> None:
    arviz = pytest.importorskip("arviz")
    found = run(n_iter=8, method="kalman")
    exported = found.to_arviz()
    assert exported.posterior["rho"].shape == (4, 8)
    for name in PRIORS:
        np.testing.assert_allclose(arviz.ess(found.draws[name]), found.ess()[name])
        np.testing.assert_allclose(arviz.rhat(found.draws[name]), found.rhat()[name])


def test_arviz_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "arviz", None)
    with pytest.raises(ModuleNotFoundError, match="pip install arviz"):
        run(n_iter=2).to_arviz()


@pytest.mark.parametrize(
    ("method", "batched"), [("kalman", True), ("particle", True), ("kalman", False)]
)
def test_forecast_averages_over_the_posterior(method: str, batched: bool) -> None:
    y = [data(12, 3), data(7, 4)]
    found = run(y=y, n_iter=40, method="kalman", n_chains=5, n_warmup=30, batched=batched)
    ahead = found.forecast(2, n_samples=4000, n_draws=40, n_particles=150, method=method, seed=0)
    assert ahead.mean.shape == (2, 2, 1)
    again = found.forecast(2, n_samples=4000, n_draws=40, n_particles=150, method=method, seed=0)
    np.testing.assert_array_equal(again.mean, ahead.mean)
    # Moments of all draws of the parameters, by the Kalman filter of each.
    mean, square = [], []
    for rho, noise in zip(found.draws["rho"].flat, found.draws["noise"].flat, strict=True):
        model = NoisyAutoregression()
        model.rho, model.noise = float(rho), float(noise)
        one = model.forecast(2, y, method="kalman")
        mean.append(one.mean)
        square.append(one.states.cov[..., 0] + noise**2 + one.mean**2)
    spread = np.std(mean, 0) / math.sqrt(40) + 1 / math.sqrt(4000)
    variance = np.mean(square, 0) - np.mean(mean, 0) ** 2
    assert (np.abs(ahead.mean - np.mean(mean, 0)) < 5 * spread * np.sqrt(variance)).all()
    drawn = ahead.sample(4000, seed=1)
    assert drawn.shape == (2, 4000, 2, 1)
    assert (np.abs(drawn.var(1) / variance - 1) < 0.25).all()
    density = float(ahead.log_prob([[0.2], [0.3]]).value[0])
    lo, hi = ahead.interval(80)
    assert (lo < ahead.mean).all()
    assert (hi > ahead.mean).all()
    assert -3 < density < 0
    with pytest.raises(ValueError, match="y_future has 3 steps"):
        ahead.log_prob([[0.0] * 3] * 2)


def test_score_of_a_forecast_is_the_average_density() -> None:
    x = data()
    found = run(n_iter=5, n_warmup=30, method="kalman")
    ahead = found.forecast(2, n_draws=1000, seed=0)
    future = np.array([0.4, -0.2])
    rho, noise = found.draws["rho"].ravel(), found.draws["noise"].ravel()
    whole = log_likelihood(rho, noise, np.r_[x, future]) - log_likelihood(rho, noise, x)
    expected = np.log(np.exp(whole).mean())
    np.testing.assert_allclose(ahead.log_prob(future).value, [expected], rtol=1e-10)
