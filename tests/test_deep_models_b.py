"""STORN, Noisin, the state-space LSTM and the DMM with feedback against plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

import seqdgm as sq
from seqdgm.inference.joint import joint_log_density
from seqdgm.inference.objectives import Objective, evaluate
from seqdgm.inference.scan import scan
from seqdgm.models.lstm_ssm import LSTMSSM
from seqdgm.models.noisin import NOISES, Noisin
from seqdgm.models.rnn import Memory
from seqdgm.models.storn import STORN
from seqdgm.prepare import prepare
from seqdgm.testing import CHECKS, check_model
from seqdgm.types import Batch, Inputs, make_generator

SMALL: dict[str, Any] = {"max_epochs": 3, "patience": 2}
LATENT = {
    "storn": STORN(2, 6, 6, **SMALL),
    "storn of two gru layers": STORN(2, 6, 6, cell="gru", layers=2, **SMALL),
    "lstm-ssm": LSTMSSM(2, 6, 6, **SMALL),
    "dmm with feedback": sq.DMM(2, 6, 6, feedback=True, **SMALL),
}


def wave(length: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 10 + 3 * np.sin(np.arange(length) / 3) + 0.3 * rng.normal(size=length)


def fitted(model: Any, n: int = 3, length: int = 12, **options: Any) -> tuple[Any, Batch]:
    """A model after a little training on two columns with two known inputs, and its batch."""
    rng = np.random.default_rng(5)
    y, u = rng.normal(size=(n, length, 2)), rng.normal(size=(n, length, 2))
    model = model.clone().set_params(scale=None, season=5, **options)
    model.fit(y, inputs=u, seed=0)
    return model, prepare(model, y, u)[1]


def draws(model: Any, batch: Batch, seed: int = 1) -> Tensor:
    return torch.randn(
        batch.n_series, batch.n_steps, model.latent_dim, generator=make_generator(seed)
    )


def known(model: Any, batch: Batch) -> Tensor:
    """Inputs, and sines and cosines of the season of five steps, written out."""
    t = torch.arange(batch.n_steps, dtype=torch.float32)
    angles = 2 * np.pi / 5 * t[:, None] * torch.tensor([1.0, 2.0])
    waves = torch.cat([angles.sin(), angles.cos()], -1).expand(batch.n_series, -1, -1)
    return torch.cat([batch.u[:, : batch.n_steps], waves], -1)


def gaussian(head: nn.Module, features: Tensor) -> Normal:
    """The head written out: location and scale out of one linear layer."""
    loc, raw = head.linear(features).chunk(2, -1)
    return Normal(loc, F.softplus(raw) + head.min_scale)


def lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    enter, forget, new, out = gates.chunk(4, -1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(c), c


def storn_density(model: STORN, batch: Batch, z: Tensor) -> Tensor:
    w, v, b, d = model.rnn.rnn.all_weights[0]
    h, c = (part[0].expand(batch.n_series, -1) for part in model.rnn.start)
    x, total = torch.zeros_like(batch.x[:, 0]), 0.0
    for t, u in enumerate(known(model, batch).unbind(1)):
        total = total + Normal(0.0, 1.0).log_prob(z[:, t]).sum(-1)
        h, c = lstm_step(torch.cat([x, u, z[:, t]], -1) @ w.T + b + h @ v.T + d, c)
        x = batch.x[:, t]
        total = total + gaussian(model.head, h).log_prob(x).sum(-1)
    return total


def lstm_ssm_density(model: LSTMSSM, batch: Batch, z: Tensor) -> Tensor:
    h, c = (part.expand(batch.n_series, -1) for part in model.recurrence.start)
    before, total = model.z0.expand(batch.n_series, -1), 0.0
    for t, u in enumerate(known(model, batch).unbind(1)):
        gates = model.gates(torch.cat([before, u], -1)) + h @ model.recurrence.recurrent.weight.T
        h, c = lstm_step(gates, c)
        loc, raw = model.prior_law.out(F.relu(model.prior_hidden(h))).chunk(2, -1)
        before = z[:, t]
        total = total + Normal(loc, F.softplus(raw) + 1e-3).log_prob(before).sum(-1)
        features = model.features(torch.cat([before, u], -1))
        total = total + gaussian(model.head, features).log_prob(batch.x[:, t]).sum(-1)
    return total


def dmm_density(model: sq.DMM, batch: Batch, z: Tensor) -> Tensor:
    gated = model.gated
    before, total = model.z0.expand(batch.n_series, -1), 0.0
    x = torch.zeros_like(batch.x[:, 0])
    for t, u in enumerate(known(model, batch).unbind(1)):
        given = torch.cat([x, u], -1) if model.feedback else u
        read = torch.cat([before, given], -1)
        for_gate, for_new = F.relu(gated.hidden(read)).chunk(2, -1)
        gate, new = torch.sigmoid(gated.gate(for_gate)), gated.proposed(for_new)
        loc = (1 - gate) * gated.linear(read) + gate * new
        before = z[:, t]
        law = Normal(loc, F.softplus(gated.scale(F.relu(new))) + gated.min_scale)
        features = model.features(torch.cat([before, given], -1))
        x = batch.x[:, t]
        total = total + law.log_prob(before).sum(-1)
        total = total + gaussian(model.head, features).log_prob(x).sum(-1)
    return total


@pytest.mark.parametrize(
    ("model", "density"),
    [
        (STORN(2, 6, 6, **SMALL), storn_density),
        (LSTMSSM(2, 6, 6, **SMALL), lstm_ssm_density),
        (sq.DMM(2, 6, 6, feedback=True, **SMALL), dmm_density),
        (sq.DMM(2, 6, 6, **SMALL), dmm_density),
    ],
)
@torch.no_grad()
def test_the_joint_density_is_that_of_the_equations(model, density) -> None:
    with torch.enable_grad():
        model, batch = fitted(model)
    z = draws(model, batch)
    found = joint_log_density(model, batch, z[:, None])[:, 0]
    torch.testing.assert_close(found.float(), density(model, batch, z), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", LATENT)
@torch.no_grad()
def test_a_fused_run_equals_single_steps(name: str) -> None:
    with torch.enable_grad():
        model, batch = fitted(LATENT[name])
    trace = scan(model, batch, make_generator(0))
    assert trace.z is not None
    assert trace.context is not None
    before = torch.cat([torch.zeros_like(batch.x[:, :1]), batch.x[:, :-1]], 1)
    s, laws, emissions = model.start((batch.n_series,)), [], []
    for t in range(batch.n_steps):
        u = batch.inputs_at(t)
        h = model.advance(s, model.embed(before[:, t]) if model.feedback else None, u)
        laws.append(model.proposal(h, trace.context[:, t], u))
        s = model.absorb(h, trace.z[:, t])
        emissions.append(model.emission(s, u))
    fused = model.emission(trace.s, batch.inputs_all())
    proposal = trace.proposal(slice(0, batch.n_steps))
    for at_once, single in ((fused, emissions), (proposal, laws)):
        for part in ("loc", "scale"):
            steps = torch.stack([getattr(law, part) for law in single], 1)
            torch.testing.assert_close(getattr(at_once, part), steps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LATENT)
@torch.no_grad()
def test_padding_and_company_do_not_change_a_density(name: str) -> None:
    with torch.enable_grad():
        model = LATENT[name].clone().fit([wave(20, 0), wave(13, 1)], seed=0)
    _, both, _ = prepare(model, [wave(20, 0), wave(13, 1)], None)
    _, one, _ = prepare(model, wave(13, 1), None)
    z = draws(model, both)
    joint = joint_log_density(model, both, z[:, None])
    alone = joint_log_density(model, one, z[1:, None, :13])
    torch.testing.assert_close(joint[1:], alone, rtol=1e-5, atol=1e-5)
    context = model.encode(both)[1, :13]
    torch.testing.assert_close(context, model.encode(one)[0], rtol=1e-5, atol=1e-5)


def test_the_proposal_of_storn_reads_neither_the_future_nor_the_memory() -> None:
    model, batch = fitted(LATENT["storn"])
    x = batch.x.clone()
    x[:, 7:] += 1
    changed = model.encode(Batch(x, batch.mask, batch.lengths, batch.u, batch.rows, batch.ids))
    same = (changed == model.encode(batch)).all(-1)
    assert same[:, :7].all()
    assert not same[:, 7:].any()
    law = model.proposal(None, changed, batch.inputs_all())
    assert law.loc.shape == (3, 12, 2)


# ------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("noise", NOISES)
def test_noise_has_mean_zero_and_variance_one(noise: str) -> None:
    family, n = NOISES[noise], 400_000
    generator = make_generator(3)
    for scale in (0.3, 1.1):
        zeros = torch.zeros(n)
        z = sq.nn.distributions.sample(family.law(zeros, scale), generator, reparameterised=True)
        drawn = family.standardise(z, scale)
        squares = drawn.square()
        assert torch.isfinite(drawn).all()
        assert abs(drawn.mean()) < 5 * drawn.std() / n**0.5
        assert abs(squares.mean() - 1) < 5 * squares.std() / n**0.5


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("injection", ["multiplicative", "additive"])
@torch.no_grad()
def test_the_noise_of_noisin_leaves_the_mean_of_the_hidden_state(noise, injection) -> None:
    model = Noisin("lstm", 3, noise=noise, injection=injection, noise_scale=0.7, **SMALL)
    with torch.enable_grad():
        model.fit(wave(20), seed=0)
    model.train()
    assert model.latent_dim == 3
    n = 100_000
    output, c = torch.tensor([0.5, -0.2, 0.9]).expand(n, 3), torch.ones(n, 1, 3)
    u = Inputs(torch.zeros(n, 0), torch.tensor(0))
    law = sq.nn.distributions.expand(model.prior(None, u), (n,), 3)
    z = sq.nn.distributions.sample(law, make_generator(4), reparameterised=True)
    s = model.absorb(Memory(output, (output[:, None], c)), z)
    gap = (s.output - output).mean(0).abs()
    assert (gap < 5 * s.output.std(0) / n**0.5).all()
    spread = 0.7 * (output[0].abs() if injection == "multiplicative" else torch.ones(3))
    squares = (s.output - output).square()
    assert ((squares.mean(0) - spread**2).abs() < 5 * squares.std(0) / n**0.5).all()
    assert torch.equal(s.cell[0][:, 0], s.output)
    assert torch.equal(s.cell[1], c)


def test_bernoulli_noise_is_dropout() -> None:
    scale = 0.5
    rate = scale**2 / (1 + scale**2)
    z = torch.rand(20_000, generator=make_generator(0))
    factor = 1 + scale * NOISES["bernoulli"].standardise(z, scale)
    kept = factor > 0.5
    torch.testing.assert_close(factor[kept], torch.full_like(factor[kept], 1 / (1 - rate)))
    torch.testing.assert_close(factor[~kept], torch.zeros_like(factor[~kept]), atol=1e-6, rtol=0)
    assert abs(float(kept.float().mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / 20_000) ** 0.5


@torch.no_grad()
def test_noisin_in_training_is_the_noisy_recursion() -> None:
    with torch.enable_grad():
        model, batch = fitted(Noisin("lstm", 4, noise="gamma", noise_scale=0.6, **SMALL))
    model.train()
    trace = scan(model, batch, make_generator(2))
    assert trace.z is not None
    w, v, b, d = model.rnn.rnn.all_weights[0]
    h, c = (part[0].expand(batch.n_series, -1) for part in model.rnn.start)
    x, total = torch.zeros_like(batch.x[:, 0]), 0.0
    for t, u in enumerate(known(model, batch).unbind(1)):
        h, c = lstm_step(torch.cat([x, u], -1) @ w.T + b + h @ v.T + d, c)
        h = h * trace.z[:, t]  # gamma noise: a positive factor of mean 1
        x = batch.x[:, t]
        total = total + gaussian(model.head, h).log_prob(x).sum(-1)
    terms = evaluate(model, batch, Objective(), 1.0, make_generator(2))
    torch.testing.assert_close(terms.value.sum(1), total, rtol=1e-5, atol=1e-4)
    assert not terms.divergence.any()
    assert (trace.z > 0).all()


def test_noisin_without_noise_is_a_recurrent_network() -> None:
    y = [wave(30, seed) for seed in range(3)]
    model = Noisin("gru", 5, **SMALL).fit(y, seed=0)
    plain = sq.RNN("gru", 5, **SMALL).fit(y, seed=1)
    plain.load_state_dict(model.state_dict())
    found, expected = model.log_prob(y), plain.log_prob(y)
    assert found.kind == "exact"
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-6)
    states, hidden = model.filter(y).mean, plain.filter(y).mean
    np.testing.assert_allclose(states, hidden, rtol=1e-5, atol=1e-6)
    assert model.filter(y).names[0] == "h1"


# ---------------------------------------------------------------------------------- missing values


@pytest.mark.parametrize("name", ["storn", "dmm with feedback"])
def test_a_missing_observation_is_integrated_out(name: str) -> None:
    """Two steps, the first missing: p(x_2) = int p(x_1, x_2) dx_1 by quadrature."""
    model = LATENT[name].clone().set_params(scale=None, max_epochs=30, learning_rate=0.05)
    model.fit([wave(30, seed) / 5 for seed in range(2)], seed=1)
    target, grid, copies = 1.7, np.linspace(-4, 8, 81), 12
    pairs = np.stack([grid, np.full_like(grid, target)], 1)
    joint = model.log_prob([*pairs] * copies, n_particles=40, seed=0).value
    exact = np.trapezoid(np.exp(joint).reshape(copies, -1), grid, axis=1)
    missing = model.log_prob([np.array([np.nan, target])] * 400, n_particles=60, seed=1)
    assert missing.kind == "estimate"
    found = np.exp(missing.value)
    spread = np.hypot(exact.std(ddof=1) / copies**0.5, found.std(ddof=1) / 20)
    assert abs(found.mean() - exact.mean()) < 5 * spread


# ---------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("name", LATENT)
def test_training_raises_the_bound_which_stays_below_the_likelihood(name: str) -> None:
    panel = [wave(24, seed) for seed in range(3)]
    model = LATENT[name].clone()
    first = model.clone().fit(panel, seed=0, max_epochs=1, learning_rate=1e-6)
    last = model.set_params(max_epochs=15, learning_rate=0.02).fit(panel, seed=0, kl_warmup=1)
    start, end = (m.log_prob(method="variational", n_particles=20, seed=0) for m in (first, last))
    gain = end.value.sum() - start.value.sum()
    assert gain > 5 * np.sqrt((start.stderr**2 + end.stderr**2).sum())
    exact = last.log_prob(n_particles=300, seed=0)
    assert exact.kind == "estimate"
    slack = 5 * np.hypot(exact.stderr, end.stderr)
    assert np.all(end.value <= exact.value + slack)


@pytest.mark.parametrize("method", ["iwae", "fivo", "rws"])
@pytest.mark.parametrize("name", ["storn", "lstm-ssm", "dmm with feedback"])
def test_every_objective_trains_every_model(name: str, method: str) -> None:
    model = LATENT[name].clone().fit([wave(12, 0), wave(9, 1)], method=method, n_particles=3)
    assert np.isfinite(model.fit_report_.objective).all()


def test_particle_em_trains_the_state_space_lstm() -> None:
    model = LATENT["lstm-ssm"].clone()
    model.fit([wave(12, 0), wave(9, 1)], method="particle-em", n_particles=5, seed=0)
    assert np.isfinite(model.fit_report_.objective).all()
    assert np.isfinite(model.log_prob(n_particles=20, seed=0).value).all()


def test_noise_trains_with_gaps() -> None:
    y = wave(20)
    y[4:6] = np.nan
    for noise in NOISES:
        model = Noisin("gru", 4, noise=noise, **SMALL).fit(y, seed=0)
        assert np.isfinite(model.fit_report_.objective).all()


@pytest.mark.parametrize("network", ["mean-field", "filtering", "smoothing", "bidirectional"])
@pytest.mark.parametrize("name", LATENT)
def test_inference_networks_are_interchangeable(name: str, network: str) -> None:
    model = LATENT[name].clone().set_params(inference_network=network, max_epochs=1)
    model.fit(wave(10), seed=0)
    assert np.isfinite(model.log_prob(method="variational", n_particles=2, seed=0).value).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: STORN(cell="rnn"), "cell"),
        (lambda: LSTMSSM(cell="rnn"), "cell"),
        (lambda: Noisin("rnn"), "cell"),
        (lambda: Noisin(noise="cauchy"), "noise='cauchy'"),
        (lambda: Noisin(noise_scale=0.0), "noise_scale"),
        (lambda: Noisin(injection="both"), "injection"),
        (lambda: STORN(inference_network="guess", **SMALL).fit(wave()), "inference_network"),
    ],
)
def test_bad_settings_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        *LATENT.values(),
        STORN(2, 6, 6, emission="negbinomial", **SMALL),
        Noisin("gru", 6, **SMALL),
        Noisin("lstm", 6, noise="bernoulli", injection="additive", **SMALL),
    ],
    ids=repr,
)
def test_model_conforms(model) -> None:
    y = None
    if model.emission_name == "negbinomial":
        y = np.random.default_rng(3).poisson(4.0, size=40).astype(float)
    assert check_model(model, y) == tuple(CHECKS)


class LinearTransition(nn.Module):
    """N(A z + b, softplus(r)), in place of the gated one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.raw = nn.Parameter(torch.zeros(dim))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Normal:
        return Normal(self.linear(z), F.softplus(self.raw) + 1e-3)


class LinearDMM(sq.DMM):
    """A DMM of linear layers; the scale of the emission does not read the state."""

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        super().build(obs_dim, input_dim, **options)
        self.gated = LinearTransition(self.latent_dim)
        self.features = nn.Identity()
        self.head = self.make_head(self.latent_dim, obs_dim, **options)


@pytest.mark.slow
def test_a_trained_linear_dmm_reaches_the_kalman_likelihood() -> None:
    truth = sq.LinearGaussianSSM(
        F=[[0.9]], H=[[1.0]], Q=[[0.25]], R=[[0.64]], m0=[0.0], P0=[[0.25]]
    )
    train, test = (truth.sample(50, n, seed=s).values for n, s in ((60, 1), (20, 2)))
    # Without a warm-up the first optimum of the bound leaves z unused.
    model = LinearDMM(1, 8, 16, scale=None, learning_rate=0.02, batch_size=20)
    model.fit(train, seed=0, max_epochs=100, kl_warmup=30)
    steps = test[..., 0].size
    exact = truth.log_prob(test).value.sum() / steps
    found = model.log_prob(test, n_particles=200, seed=0).value.sum() / steps
    bound = model.log_prob(test, method="variational", n_particles=10, seed=0).value.sum() / steps
    assert abs(found - exact) < 0.02
    assert 0 < exact - bound < 0.02
