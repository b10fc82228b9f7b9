"""Particle filter, smoother and variational bound against exact answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

import seqdgm as sq
from seqdgm.inference import smc
from seqdgm.inference.resampling import RESAMPLERS, effective_sample_size, normalise, systematic
from seqdgm.inference.smc import SMCOptions
from seqdgm.prepare import prepare

F = [[0.9, 0.2], [-0.1, 0.7]]
H = [[1.0, 0.0], [0.5, 1.0]]
Q = [[0.5, 0.1], [0.1, 0.3]]
R = [[0.4, 0.15], [0.15, 0.6]]


def linear_model() -> sq.LinearGaussianSSM:
    return sq.LinearGaussianSSM(
        F=F, H=H, Q=Q, R=R, m0=[0.5, -0.5], P0=[[1.0, 0.0], [0.0, 2.0]], diffuse=False
    )


def gappy(seed: int = 0, length: int = 20, n: int = 2) -> np.ndarray:
    values = linear_model().sample(length, n, seed=seed).values.copy()
    values[:, 5:8] = np.nan
    values[:, 9, 0] = np.nan
    values[0, 11, 1] = np.nan
    return values


def within(values: np.ndarray, target: np.ndarray | float, errors: float = 5.0) -> None:
    """Mean over the first axis lies within so many standard errors of the target."""
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(0) - target) <= errors * stderr), (
        values.mean(0),
        target,
        stderr,
    )


@pytest.mark.parametrize("resampler", sorted(RESAMPLERS))
@pytest.mark.parametrize("n_particles", [16, 256])
def test_evidence_is_unbiased(resampler: str, n_particles: int) -> None:
    model, y = linear_model(), gappy()
    exact = model.log_prob(y).value
    _, batch, _ = prepare(model, y, None)
    ratios = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        out = smc.run(model, batch, SMCOptions(n_particles, resampler), generator)
        ratios.append(np.exp(out.increments.sum(1).numpy() - exact))
    within(np.array(ratios), 1.0)


def test_filter_moments_agree_with_kalman() -> None:
    model, y = linear_model(), gappy()
    exact = model.filter(y)
    runs = [model.filter(y, method="particle", n_particles=400, seed=s) for s in range(20)]
    means = np.array([run.mean for run in runs])
    # A ratio estimate is biased by O(1/N): allow for it beside the Monte-Carlo error.
    gap = np.abs(means.mean(0) - exact.mean)
    stderr = means.std(0, ddof=1) / np.sqrt(len(means))
    assert np.all(gap <= 5 * stderr + 5 * exact.std / 400)
    assert runs[0].ess.shape == (2, 20)
    assert (runs[0].ess <= 400 + 1e-6).all()


def test_backward_simulation_agrees_with_the_smoother() -> None:
    model, y = linear_model(), gappy(length=12, n=1)
    exact = model.smooth(y)
    means = np.array(
        [model.smooth(y, method="particle", n_particles=400, seed=s).mean for s in range(20)]
    )
    stderr = means.std(0, ddof=1) / np.sqrt(len(means))
    assert np.all(np.abs(means.mean(0) - exact.mean) <= 5 * stderr + 5 * exact.std / 400)


def test_simulation_smoother_has_the_smoothed_moments() -> None:
    model, y = linear_model(), gappy(length=12, n=1)
    smoothed = model.smooth(y)
    draws = smoothed.sample(4000, seed=0)
    stderr = smoothed.std / np.sqrt(4000)
    assert np.all(np.abs(draws.mean(1) - smoothed.mean) <= 5 * stderr)
    ratio = draws.std(1, ddof=1) / smoothed.std
    assert np.all(np.abs(ratio - 1) <= 5 / np.sqrt(2 * 4000))


def test_stderr_of_the_evidence_is_honest() -> None:
    model, y = linear_model(), gappy(n=1)
    runs = [model.log_prob(y, method="particle", n_particles=200, seed=s) for s in range(60)]
    spread = np.std([run.value[0] for run in runs], ddof=1)
    claimed = np.median([run.stderr[0] for run in runs])
    assert 0.5 * spread < claimed < 2.5 * spread


def test_one_particle_per_ancestor_reports_infinite_stderr() -> None:
    model, y = linear_model(), gappy(length=300, n=1)
    assert np.isinf(model.log_prob(y, method="particle", n_particles=4, seed=0).stderr[0])


class HiddenMarkov(sq.StateSpaceModel):
    """Two states coded as 0 and 1, so that exhaustive summation gives the likelihood."""

    latent_dim = 1

    def initial(self, u):
        return Bernoulli(torch.tensor([0.3]).double())

    def transition(self, z, u):
        return Bernoulli(0.2 + 0.6 * z)

    def emission(self, z, u):
        return Normal(2 * z, 1.0)


def test_evidence_equals_an_exhaustive_sum() -> None:
    y = np.array([0.1, 2.2, np.nan, 1.9, -0.5])
    total = 0.0
    for path in np.ndindex(*[2] * len(y)):
        p = 0.3 if path[0] else 0.7
        for before, now in itertools.pairwise(path):
            up = 0.2 + 0.6 * before
            p *= up if now else 1 - up
        for state, x in zip(path, y, strict=True):
            if np.isfinite(x):
                p *= np.exp(-0.5 * (x - 2 * state) ** 2) / np.sqrt(2 * np.pi)
        total += p
    ratios = [
        np.exp(HiddenMarkov().log_prob(y, n_particles=100, seed=s).value[0]) / total
        for s in range(40)
    ]
    within(np.array(ratios), 1.0)


class Guided(sq.StateSpaceModel):
    """A local level with a proposal that looks at the observation."""

    latent_dim = 1

    def initial(self, u):
        return Normal(torch.zeros(1).double(), torch.ones(1).double())

    def transition(self, z, u):
        return Normal(z, 1.0)

    def emission(self, z, u):
        return Normal(z, 0.2)


class WithProposal(Guided):
    def encode(self, batch):
        return torch.cat([batch.x, batch.mask.to(batch.x.dtype)], -1)

    def proposal(self, h, c, u):
        x, seen = c[..., :1], c[..., 1:]
        previous = torch.zeros_like(x) if h is None else h
        gain = seen / (1 + 0.04)
        return Normal(previous + gain * (x - previous), (1 - gain).sqrt())


def test_a_proposal_keeps_the_evidence_unbiased_and_lowers_its_variance() -> None:
    y = WithProposal().sample(25, seed=3).values.copy()
    y[0, 10:12] = np.nan
    exact = sq.LinearGaussianSSM(
        F=[[1.0]], H=[[1.0]], Q=[[1.0]], R=[[0.04]], m0=[0.0], P0=[[1.0]]
    ).log_prob(y)
    spread = {}
    for model in (Guided(), WithProposal()):
        values = np.array([model.log_prob(y, n_particles=50, seed=s).value for s in range(40)])
        within(np.exp(values - exact.value), 1.0)
        spread[type(model).__name__] = values.std()
    assert spread["WithProposal"] < 0.7 * spread["Guided"]


class Variational(WithProposal):
    engines = ("particle", "variational")


class Crude(Variational):
    def proposal(self, h, c, u):
        q = super().proposal(h, c, u)
        return Normal(q.loc, 1.5 * q.scale)


def test_the_bound_is_below_the_likelihood() -> None:
    y = Variational().sample(8, seed=1).values
    known = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], Q=[[1.0]], R=[[0.04]], m0=[0.0], P0=[[1.0]])
    exact = known.log_prob(y).value[0]
    bounds = {}
    for model in (Variational(), Crude()):
        found = model.log_prob(y, method="variational", n_particles=1000, seed=0)
        assert found.kind == "lower bound"
        assert found.value[0] - 5 * found.stderr[0] < exact
        bounds[type(model)] = found.value[0] + 5 * found.stderr[0]
    assert bounds[Crude] < exact


def test_the_bound_is_tight_where_the_proposal_is_the_posterior() -> None:
    """With a single step the proposal of these models is p(z | x)."""
    y = np.array([[[1.3]], [[-0.4]]])
    known = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], Q=[[1.0]], R=[[0.04]], m0=[0.0], P0=[[1.0]])
    found = Variational().log_prob(y, method="variational", n_particles=2000, seed=0)
    assert np.all(np.abs(found.value - known.log_prob(y).value) <= 5 * found.stderr)


class Impossible(Guided):
    def emission(self, z, u):
        return Categorical(logits=torch.stack([torch.zeros_like(z), z - torch.inf], -1))


def test_an_impossible_observation_names_series_and_step() -> None:
    with pytest.raises(ValueError, match=r"series .*step 2.*weight"):
        Impossible().log_prob(np.array([0.0, 0.0, 1.0, 0.0]), n_particles=20, seed=0)


def test_systematic_resampling_is_unbiased_and_balanced() -> None:
    log_w, _ = normalise(torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64)))
    counts = []
    for seed in range(400):
        ancestors = systematic(log_w, torch.Generator().manual_seed(seed)).ancestors
        counts.append(torch.bincount(ancestors[0], minlength=4).numpy())
    counts = np.array(counts)
    expected = 4 * log_w.exp()[0].numpy()
    assert np.all(np.abs(counts - expected) < 1)
    stderr = counts.std(0, ddof=1) / 20
    assert np.all(np.abs(counts.mean(0) - expected) <= 5 * stderr + 1e-12)
    assert float(effective_sample_size(log_w)[0]) == pytest.approx(1 / (log_w.exp() ** 2).sum())


def test_forecast_agrees_with_kalman() -> None:
    model, y = linear_model(), gappy(n=1)
    exact = model.forecast(4, y)
    runs = [model.forecast(4, y, method="particle", n_samples=500, seed=s).mean for s in range(20)]
    means = np.array(runs)
    stderr = means.std(0, ddof=1) / np.sqrt(len(means))
    width = (exact.interval(90)[1] - exact.interval(90)[0]) / 3.29
    assert np.all(np.abs(means.mean(0) - exact.mean) <= 5 * stderr + 5 * width / 500)
