"""Bounds and their gradients against plain loops, closed forms and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Normal, StudentT

import seqdgm as sq
from seqdgm.inference import joint
from seqdgm.inference.objectives import Objective, Terms, evaluate
from seqdgm.types import Batch, Inputs

A, Q, R = 0.8, 0.5, 0.7


class Linear(sq.StateSpaceModel):
    """z_t ~ N(a z_{t-1}, q), x_t ~ N(z_t, r), with a proposal N(w z_{t-1} + v x_t, s^2)."""

    latent_dim = 1

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("a", A), ("q", Q), ("r", R), ("w", 0.4), ("v", 0.3), ("s", 0.8)):
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    def initial(self, u):
        return Normal(torch.zeros(1, dtype=torch.float64), self.q.sqrt())

    def transition(self, z, u):
        return Normal(self.a * z, self.q.sqrt())

    def emission(self, s, u):
        return Normal(s, self.r.sqrt())

    def encode(self, batch):
        return torch.where(batch.mask, batch.x, 0.0)

    def proposal(self, h, c, u):
        return Normal(self.v * c + (0.0 if h is None else self.w * h), self.s)


class Fed(NamedTuple):
    z: Tensor
    x: Tensor


class Feedback(Linear):
    """As `Linear`, with z_t ~ N(a z_{t-1} + b x_{t-1}, q) and zeros before the first step."""

    feedback = True
    b = 0.5

    def start(self, batch_shape):
        return torch.zeros(*batch_shape, 1, dtype=torch.float64)

    def advance(self, s, x, u):
        return Fed(s, x)

    def prior(self, h, u):
        return Normal(self.a * h.z + self.b * h.x, self.q.sqrt())

    def proposal(self, h, c, u):
        return Normal(self.v * c + self.w * h.z + self.b * h.x, self.s)


def batch_of(x: np.ndarray, rows: int = 1) -> Batch:
    """`rows` copies of series (series, time, dim); NaN is missing, and what ends in NaN shorter."""
    values = torch.from_numpy(np.repeat(x, rows, 0))
    mask = ~values.isnan()
    steps = torch.arange(1, x.shape[1] + 1)
    lengths = (mask.any(-1) * steps).amax(1)
    return Batch(
        torch.where(mask, values, 0.0),
        mask,
        lengths,
        torch.zeros(*values.shape[:2], 0, dtype=torch.float64),
        torch.arange(len(values)),
        tuple(range(len(values))),
    )


def data(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, 1)) * 1.5


def covariance(steps: int, a: float = A, b: float = 0.0, q: float = Q, r: float = R) -> np.ndarray:
    """Covariance of the observations, from that of all pairs (z_t, x_t)."""
    transition = np.array([[a, b], [a, b]])
    shock = np.array([[q, q], [q, q + r]])
    powers = [np.linalg.matrix_power(transition, k) for k in range(steps)]
    cov = np.zeros((steps, steps))
    for i in range(steps):
        for j in range(i + 1):
            parts = (powers[i - k] @ shock @ powers[j - k].T for k in range(j + 1))
            cov[i, j] = cov[j, i] = sum(parts)[1, 1]
    return cov


def exact(x: np.ndarray, **parameters: float) -> float:
    """Log-density of one series."""
    seen = ~np.isnan(x)
    cov = covariance(len(x), **parameters)[np.ix_(seen, seen)]
    return float(stats.multivariate_normal.logpdf(x[seen], cov=cov))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(model, batch, objective, *, beta: float = 1.0, seed: int = 0) -> Terms:
    return evaluate(model, batch, objective, beta, generator(seed))


def gradients(model, value: Tensor) -> Tensor:
    given = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.stack([torch.zeros(()).double() if g is None else g for g in given])


def plain(model: Linear, batch: Batch, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x, z), log q(z) and z (series, particle, ...) of independent paths, step by step."""
    rng = generator(seed)
    n = batch.n_series
    log_p, log_q, zs, z = 0.0, 0.0, [], None
    for t in range(batch.n_steps):
        x = batch.x[:, t].repeat_interleave(count, 0)
        prior = Normal(0.0 if z is None else model.a * z, model.q.sqrt())
        law = Normal(model.v * x + (0.0 if z is None else model.w * z), model.s)
        z = law.mean + law.stddev * torch.randn(n * count, 1, generator=rng, dtype=torch.float64)
        log_p = log_p + prior.log_prob(z) + Normal(z, model.r.sqrt()).log_prob(x)
        log_q = log_q + law.log_prob(z)
        zs.append(z)
    shape = (n, count)
    return log_p.view(shape), log_q.view(shape), torch.stack(zs, 1).view(*shape, -1)


# ----------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", ["iwae", "fivo"])
def test_one_particle_is_the_bound_with_a_sampled_divergence(name: str) -> None:
    model, batch = Linear(), batch_of(data(3, 5))
    log_p, log_q, _ = plain(model, batch, 1, seed=4)
    found = run(model, batch, Objective(name), seed=4).value
    torch.testing.assert_close(found.sum(1), (log_p - log_q)[:, 0])


def test_particles_that_never_resample_are_independent_paths() -> None:
    model, batch = Linear(), batch_of(data(1, 5))
    free = run(model, batch, Objective("iwae", 4), seed=4)
    bound = run(model, batch, Objective("fivo", 4, threshold=1e-9), seed=4)
    for a, b in zip(free, bound, strict=True):
        torch.testing.assert_close(a, b)


def test_bounds_tighten_to_the_likelihood() -> None:
    x = data(1, 8, seed=3)
    truth = exact(x[0, :, 0])
    model = Linear()
    means, errors = [], []
    for objective in (Objective(), Objective("iwae", 8), Objective("iwae", 64)):
        with torch.no_grad():
            found = run(model, batch_of(x, 600), objective).value.sum(1)
        means.append(float(found.mean()))
        errors.append(float(found.std()) / math.sqrt(600))
    for low, high, *stderr in zip(means, means[1:], errors, errors[1:], strict=False):
        assert low + 5 * math.hypot(*stderr) < high
    assert means[-1] < truth
    assert means[-1] > truth - 0.5


@pytest.mark.parametrize(
    "objective",
    [Objective("iwae", 4), Objective("fivo", 4), Objective("fivo", 4, threshold=1.0)],
)
def test_the_evidence_is_unbiased(objective: Objective) -> None:
    x = data(1, 6, seed=3)
    x[0, 2:4] = np.nan
    with torch.no_grad():
        found = run(Linear(), batch_of(x, 4000), objective).value.sum(1)
    ratio = (found - exact(x[0, :, 0])).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(4000)


@pytest.mark.parametrize("objective", [Objective("iwae", 4), Objective("fivo", 4)])
def test_missing_observations_that_are_fed_back_are_drawn(objective: Objective) -> None:
    x = data(1, 6, seed=3)
    x[0, 1:3] = np.nan
    truth = exact(x[0, :, 0], b=Feedback.b)
    with torch.no_grad():
        found = run(Feedback(), batch_of(x, 4000), objective).value.sum(1)
    ratio = (found - truth).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(4000)


def test_a_divergence_without_a_closed_form_is_sampled() -> None:
    class Heavy(Linear):
        def initial(self, u):
            return StudentT(4.0, torch.zeros(1, dtype=torch.float64), self.q.sqrt())

        def transition(self, z, u):
            return StudentT(4.0, self.a * z, self.q.sqrt())

    model, batch = Heavy(), batch_of(data(2, 5))
    torch.testing.assert_close(
        run(model, batch, Objective()).value, run(model, batch, Objective("iwae")).value
    )


def test_free_bits_cost_nothing_and_teach_nothing() -> None:
    model, batch = Linear(), batch_of(data(2, 5))
    plain_terms = run(model, batch, Objective())
    free = float(plain_terms.divergence.detach().median())
    terms = run(model, batch, Objective(free_bits=free), beta=0.5)
    charged = plain_terms.divergence.clamp(min=free)
    torch.testing.assert_close(terms.value, plain_terms.reconstruction - 0.5 * charged)
    torch.testing.assert_close(terms.divergence, plain_terms.divergence)
    assert bool((charged > plain_terms.divergence).any())
    all_free = run(model, batch, Objective(free_bits=100.0))
    torch.testing.assert_close(
        gradients(model, all_free.value.sum()),
        gradients(model, run(model, batch, Objective()).reconstruction.sum()),
    )


def test_the_bound_is_averaged_over_its_paths() -> None:
    model, x = Linear(), data(2, 5)
    mean = run(model, batch_of(x), Objective(n_particles=3))
    single = run(model, batch_of(x, 3), Objective())
    for a, b in zip(mean, single, strict=True):
        torch.testing.assert_close(a, b.view(2, 3, 5).mean(1))


@pytest.mark.parametrize(
    "objective",
    [
        Objective(n_particles=2),
        Objective("iwae", 3),
        Objective("iwae", 3, doubly_reparameterised=True),
        Objective("fivo", 3),
        Objective("rws", 3),
    ],
)
def test_the_auxiliary_term_joins_the_value_alone(objective: Objective) -> None:
    class Curious(Linear):
        def auxiliary(self, h, z, c, u):
            return -((c - 0.0 * z)[..., 0] ** 2) - self.w

    x = data(2, 5)
    x[1, 3:] = np.nan
    batch = batch_of(x)
    plain_terms, terms = run(Linear(), batch, objective), run(Curious(), batch, objective)
    extra = torch.where(batch.valid, -(batch.x[..., 0] ** 2) - 0.4, 0.0)
    torch.testing.assert_close(terms.value, plain_terms.value + extra)
    torch.testing.assert_close(terms.reconstruction, plain_terms.reconstruction)
    torch.testing.assert_close(terms.divergence, plain_terms.divergence)


@pytest.mark.parametrize("name", ["elbo", "iwae", "fivo", "rws"])
def test_every_objective_of_a_model_without_latents_is_its_likelihood(name: str) -> None:
    model = sq.RNN("gru", 4)
    model.build(1, 0)
    model.double()
    batch = batch_of(data(2, 6))
    with torch.no_grad():
        terms = run(model, batch, Objective(name, 2))
        likelihood = joint.joint_log_density(model, batch, None)
    torch.testing.assert_close(terms.value.sum(1), likelihood[:, 0])
    assert not bool(terms.divergence.any())


# -------------------------------------------------------------------------------- gradients


def test_the_gradient_of_iwae_is_that_of_a_plain_loop() -> None:
    model, batch = Linear(), batch_of(data(3, 5))
    log_p, log_q, _ = plain(model, batch, 6, seed=2)
    bound = torch.logsumexp(log_p - log_q, 1) - math.log(6)
    found = run(model, batch, Objective("iwae", 6), seed=2).value
    torch.testing.assert_close(found.sum(1), bound)
    torch.testing.assert_close(gradients(model, found.sum()), gradients(model, bound.sum()))


def test_wake_sleep_learns_each_half_by_its_own_weighted_density() -> None:
    model, batch = Linear(), batch_of(data(3, 5))
    with torch.no_grad():
        log_p, log_q, z = plain(model, batch, 6, seed=2)
        weights = torch.softmax(log_p - log_q, 1)
        z = z[..., None]
    path = joint.follow(model, batch, z)
    density = joint.joint_log_density(model, batch, z)
    proposal = joint.log_proposal(model, batch, path, z, model.encode(batch)).sum(2)
    expected = gradients(model, (weights * (density + proposal)).sum())
    found = run(model, batch, Objective("rws", 6, threshold=0.0), seed=2)
    # Without resampling the particles draw their noise as the plain loop does.
    torch.testing.assert_close(found.value.sum(1), torch.logsumexp(log_p - log_q, 1) - math.log(6))
    torch.testing.assert_close(gradients(model, found.value.sum()), expected)


class Steps(NamedTuple):
    """Increments of the evidence, and the weighted log-densities of every step."""

    bound: Tensor
    density: Tensor
    proposal: Tensor


def plain_filter(model: Linear, x: Tensor, count: int, seed: int, *, wake: bool) -> Steps:
    """A particle filter of one series that resamples systematically at every step."""
    rng = generator(seed)
    bound, density, proposal = [], [], []
    z = None
    for t, value in enumerate(x):
        if t:
            u = torch.rand(1, 1, generator=rng, dtype=torch.float64)
            points = (torch.arange(count) + u[0]) / count
            z = z[torch.searchsorted(weights.cumsum(0), points, right=True)]
        before = torch.zeros(count).double() if z is None else z
        prior = Normal(model.a * before, model.q.sqrt())
        law = Normal(model.v * value + model.w * before, model.s)
        noise = torch.randn(1, count, 1, generator=rng, dtype=torch.float64)[0, :, 0]
        z = law.mean + law.stddev * noise
        z = z.detach() if wake else z
        log_p = prior.log_prob(z) + Normal(z, model.r.sqrt()).log_prob(value)
        log_w = log_p - law.log_prob(z)
        weights = torch.softmax(log_w.detach(), 0)
        bound.append(torch.logsumexp(log_w, 0) - math.log(count))
        density.append((weights * log_p).sum())
        proposal.append((weights * law.log_prob(z)).sum())
    return Steps(torch.stack(bound), torch.stack(density), torch.stack(proposal))


def test_a_filtering_bound_is_that_of_a_plain_particle_filter() -> None:
    model, batch = Linear(), batch_of(data(1, 6))
    expected = plain_filter(model, batch.x[0, :, 0], 5, 3, wake=False)
    found = run(model, batch, Objective("fivo", 5, threshold=1.0), seed=3).value
    torch.testing.assert_close(found[0], expected.bound)
    torch.testing.assert_close(
        gradients(model, found.sum()), gradients(model, expected.bound.sum())
    )


def test_adaptive_monte_carlo_learns_by_the_weights_of_the_filter() -> None:
    model, batch = Linear(), batch_of(data(1, 6))
    expected = plain_filter(model, batch.x[0, :, 0], 5, 3, wake=True)
    found = run(model, batch, Objective("rws", 5, threshold=1.0), seed=3).value
    torch.testing.assert_close(found[0], expected.bound)
    surrogate = (expected.density + expected.proposal).sum()
    torch.testing.assert_close(gradients(model, found.sum()), gradients(model, surrogate))


def test_wake_sleep_with_many_particles_climbs_the_likelihood() -> None:
    x = data(1, 5, seed=3)
    model = Linear()
    slope = (exact(x[0, :, 0], a=A + 1e-5) - exact(x[0, :, 0], a=A - 1e-5)) / 2e-5
    found = []
    for seed in range(40):
        value = run(model, batch_of(x, 50), Objective("rws", 400, threshold=0.0), seed=seed).value
        found.append(float(gradients(model, value.sum() / 50)[0]))
    stderr = np.std(found, ddof=1) / math.sqrt(len(found))
    assert abs(np.mean(found) - slope) < 5 * stderr + 0.02 * abs(slope)


def test_the_doubly_reparameterised_gradient_agrees_and_varies_less() -> None:
    model, batch = Linear(), batch_of(data(1, 4, seed=3), 200)
    beta = 0.7
    found: dict[bool, list[Tensor]] = {False: [], True: []}
    for seed in range(60):
        for doubly, kept in found.items():
            objective = Objective("iwae", 8, doubly_reparameterised=doubly)
            value = run(model, batch, objective, beta=beta, seed=seed + 1000 * doubly).value
            kept.append(gradients(model, value.sum() / 200))
    once, twice = torch.stack(found[False]), torch.stack(found[True])
    stderr = ((once.var(0) + twice.var(0)) / 60).sqrt()
    assert bool(((once.mean(0) - twice.mean(0)).abs() < 5 * stderr).all())
    assert bool((twice.var(0)[3:] < 0.7 * once.var(0)[3:]).all())  # w, v and s of the proposal


def test_resampling_gradients_are_those_of_the_expected_bound() -> None:
    """Finite differences of the mean bound, with the same noise on both sides."""
    model = Linear()
    x = np.array([[[1.5], [-2.0], [2.5]]])
    rows, step = 40_000, 0.04
    batch = batch_of(x, rows)
    sides = []
    for sign in (-1, 1):
        with torch.no_grad():
            model.v += sign * step
            value = run(model, batch, Objective("fivo", 2, threshold=1.0), seed=1).value
            sides.append(value.sum(1))
            model.v -= sign * step
    slope = (sides[1] - sides[0]) / (2 * step)
    found = {}
    for scored in (False, True):
        objective = Objective("fivo", 2, threshold=1.0, resampling_gradients=scored)
        each = [
            float(gradients(model, run(model, part, objective, seed=k).value.mean(0).sum())[4])
            for k, part in enumerate([batch.take(torch.arange(rows // 10))] * 20)
        ]
        found[scored] = (np.mean(each), np.std(each, ddof=1) / math.sqrt(20))
    error = math.hypot(float(slope.std()) / math.sqrt(rows), found[True][1])
    assert abs(found[True][0] - float(slope.mean())) < 5 * error
    assert abs(found[False][0] - float(slope.mean())) > 5 * error


# ------------------------------------------------------------------------- series and company

ALL = [
    Objective(),
    Objective("iwae", 3),
    Objective("fivo", 3),
    Objective("rws", 3, threshold=1.0),
]


@pytest.fixture
def shared_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Give every series the same noise, so that series can be compared across batches."""
    calls = [0]

    def draw(function: Callable[..., Tensor], shape: torch.Size) -> Tensor:
        calls[0] += 1
        return function(shape[1:], generator=generator(calls[0]), dtype=torch.float64).expand(shape)

    monkeypatch.setattr(
        "seqdgm.nn.drawing._normal_noise", lambda shape, like, _: draw(torch.randn, shape)
    )
    monkeypatch.setattr(
        "seqdgm.inference.resampling._uniforms",
        lambda like, shape, _: draw(torch.rand, torch.Size(shape)).contiguous(),
    )
    return lambda: calls.__setitem__(0, 0)


def small_dmm(kind: type[sq.DMM] = sq.DMM) -> sq.DMM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(2, 5, 5)
        model.build(1, 0)
    return model.double()


class Stepwise(sq.DMM):
    """The same model without a fused loop."""

    def unroll(self, *arguments):
        return None


def stepwise_dmm() -> sq.DMM:
    return small_dmm(Stepwise)


def alone_and_together(model, objective: Objective, again: Callable[[], None]) -> None:
    x = data(3, 7)
    x[1, 5:] = np.nan
    x[2, 3:] = np.nan

    def value(rows: list[int], steps: int = 7) -> Tensor:
        again()
        with torch.no_grad():
            return run(model, batch_of(x[rows, :steps]), objective).value.sum(1)

    whole = value([0, 1, 2])
    torch.testing.assert_close(value([2, 0, 1]), whole[[2, 0, 1]], rtol=0, atol=1e-8)
    torch.testing.assert_close(value([1], 5), whole[[1]], rtol=0, atol=1e-8)
    torch.testing.assert_close(value([2, 2, 1]), whole[[2, 2, 1]], rtol=0, atol=1e-8)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
@pytest.mark.parametrize("make", [Linear, Feedback, stepwise_dmm])
def test_company_does_not_change_a_series(make, objective, shared_noise) -> None:
    """Padding, order and size of the batch: a bound of a series is its own."""
    alone_and_together(make(), objective, shared_noise)


@pytest.mark.parametrize("objective", ALL[:2], ids=lambda o: o.name)
def test_company_does_not_change_a_fused_loop(objective, monkeypatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "randn", lambda shape, *, generator, dtype, device: zeros(shape, dtype=dtype)
    )
    alone_and_together(small_dmm(), objective, lambda: None)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
@pytest.mark.parametrize("make", [Linear, Feedback, small_dmm])
def test_what_is_missing_is_never_read(make, objective) -> None:
    model, x = make(), data(2, 6)
    x[0, 1:3] = np.nan
    x[1, 4:] = np.nan
    batch = batch_of(x)
    other = Batch(
        torch.where(batch.mask, batch.x, 1e3),
        batch.mask,
        batch.lengths,
        batch.u,
        batch.rows,
        batch.ids,
    )
    found, again = run(model, batch, objective), run(model, other, objective)
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a, b)
    assert not bool(found.value[1, 4:].any())


# ------------------------------------------------------------------------------------- verbs


@pytest.fixture(scope="module")
def fitted() -> sq.DMM:
    return sq.DMM(2, 5, 5, max_epochs=2).fit(np.sin(np.arange(20.0)), seed=0)


def test_likelihoods_are_named_for_what_they_are(fitted: sq.DMM) -> None:
    y = np.sin(np.arange(8.0))
    y[5] = np.nan

    def found(objective: str, n: int, **options) -> sq.LogProb:
        return fitted.log_prob(
            y, method="variational", objective=objective, n_particles=n, seed=0, **options
        )

    elbo, iwae, fivo = found("elbo", 600), found("iwae", 400), found("fivo", 400)
    bound = found("iwae", 8, n_replicates=300)
    assert (elbo.kind, iwae.kind, fivo.kind) == ("lower bound", "estimate", "estimate")
    assert bound.kind == "lower bound"
    for value in (elbo, iwae, fivo, bound):
        assert 0 < value.stderr[0] < 1
    assert elbo.value[0] + 5 * math.hypot(elbo.stderr[0], bound.stderr[0]) < bound.value[0]
    assert abs(iwae.value[0] - fivo.value[0]) < 5 * math.hypot(iwae.stderr[0], fivo.stderr[0])
    filtered = fitted.log_prob(y, n_particles=400, seed=1)
    assert abs(filtered.value[0] - fivo.value[0]) < 5 * math.hypot(
        filtered.stderr[0], fivo.stderr[0]
    )


def test_imputation_draws_from_the_variational_posterior(fitted: sq.DMM) -> None:
    y = np.sin(np.arange(20.0))
    y[5:8] = np.nan
    filled = fitted.impute(y, method="variational", seed=0)
    seen = ~np.isnan(y)
    np.testing.assert_array_equal(filled[seen], y[seen])
    repeats = np.stack(
        [fitted.impute(y, method="variational", n_particles=200, seed=k)[~seen] for k in range(20)]
    )
    states = fitted.smooth(y, method="variational", n_particles=4000, seed=0)
    z = torch.from_numpy(states.sample(4000, seed=1)[0, :, 5:8]).float()
    with torch.no_grad():
        u = Inputs(torch.zeros(3, 0), torch.arange(5, 8))
        mean = fitted.emission(z, u).mean.double().mean(0)
    expected = fitted.transform_.inverse(mean[None])[0, :, 0].numpy()
    stderr = repeats.std(0, ddof=1) * math.sqrt(1 / 20 + 200 / 4000)
    assert np.all(np.abs(repeats.mean(0) - expected) < 5 * stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vi"}, "unknown"),
        ({"n_particles": 0}, "whole number"),
        ({"name": "rws"}, "at least 2"),
        ({"threshold": 1.5}, "threshold"),
        ({"free_bits": -1.0}, "free_bits"),
        ({"name": "iwae", "free_bits": 1.0}, "elbo"),
        ({"name": "iwae", "resampling_gradients": True}, "fivo"),
        ({"name": "fivo", "doubly_reparameterised": True}, "iwae"),
    ],
)
def test_bad_objectives_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_a_model_without_a_proposal_has_nothing_to_reparameterise_twice() -> None:
    class Blind(Linear):
        def encode(self, batch):
            return None

    with pytest.raises(ValueError, match="no proposal"):
        run(Blind(), batch_of(data(1, 4)), Objective("iwae", 2, doubly_reparameterised=True))
