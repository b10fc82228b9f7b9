"""VRNN, SRNN and Z-Forcing: their recursions against plain torch, and what training does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from seqdgm.inference.objectives import Objective, along, evaluate
from seqdgm.inference.particle_scan import Steering, densities, particle_scan
from seqdgm.inference.scan import scan
from seqdgm.models.srnn import SRNN
from seqdgm.models.vrnn import VRNN
from seqdgm.models.zforcing import ZForcing
from seqdgm.nn.deferred import MIN_WEIGHTS, LoopLinear, deferred
from seqdgm.nn.fused_chain import draw_chain
from seqdgm.nn.gates import GatedCell
from seqdgm.nn.heads import HEADS
from seqdgm.nn.ragged import Ragged
from seqdgm.testing import CHECKS, check_model
from seqdgm.types import Batch, make_generator

MODELS = [VRNN, SRNN, ZForcing]
SMALL = {"max_epochs": 3, "patience": 2}


def built(model: Any, obs_dim: int = 2, input_dim: int = 0, seed: int = 0, **options: Any) -> Any:
    """The model with random networks, as before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.build(obs_dim, input_dim, **options)
    return model


def batch_of(x: Tensor, mask: Tensor | None = None, u: Tensor | None = None) -> Batch:
    n, steps, _ = x.shape
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return Batch(
        x.masked_fill(~mask, 0.0),
        mask,
        torch.full((n,), steps),
        x.new_zeros(n, steps, 0) if u is None else u,
        torch.arange(n),
        tuple(range(n)),
    )


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed))


def oscillators(n: int, steps: int, seed: int) -> list[np.ndarray]:
    """Van der Pol oscillators with random phases, seen through noise."""
    rng = np.random.default_rng(seed)
    position, speed = rng.uniform(-1.5, 1.5, size=(2, n))
    seen = []
    for _ in range(steps):
        for _ in range(4):
            change = (1 - position**2) * speed - position
            position, speed = position + 0.1 * speed, speed + 0.1 * change
        seen.append(position + 0.1 * rng.normal(size=n))
    return list(np.stack(seen, 1))


@pytest.fixture(scope="module")
def trained() -> dict[type, Any]:
    """Each model, trained on a few oscillators."""
    options = {"max_epochs": 25, "learning_rate": 0.02, "kl_warmup": 5, "patience": 100}
    series = oscillators(12, 20, 0)
    return {m: m(2, 8, 8, scale=None, **options).fit(series, seed=0) for m in MODELS}


# ------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize(
    "model", [VRNN(2, 5, 5, **SMALL), SRNN(2, 5, 5, season=12, **SMALL), ZForcing(2, 5, 5, **SMALL)]
)
def test_model_conforms(model) -> None:
    y = 20 + 5 * np.sin(np.arange(26) / 2) + np.random.default_rng(7).normal(size=26)
    assert check_model(model, y) == tuple(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_model_conforms_on_counts_with_another_inference_network(model) -> None:
    counts = np.random.default_rng(3).poisson(4.0, size=(30, 2)).astype(float)
    small = model(2, 5, 5, "negbinomial", inference_network="bidirectional", **SMALL)
    assert check_model(small, counts) == tuple(CHECKS)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("emission", HEADS)
def test_every_emission_has_a_finite_bound_and_gradient(model, emission) -> None:
    options = {"categorical": {"n_categories": 2}, "mixture": {}}.get(emission, {})
    net = built(model(2, 4, 4, emission), **options)
    x = (normals(3, 6, 2) > 0).float()
    terms = evaluate(net, batch_of(x), Objective(), 1.0, make_generator(1))
    terms.value.sum().backward()
    assert torch.isfinite(terms.value).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("model", MODELS)
def test_unknown_options_are_named(model) -> None:
    with pytest.raises(ValueError, match="inference_network='forward' is unknown"):
        built(model(2, 4, 4, inference_network="forward"))
    if model is not SRNN:
        with pytest.raises(ValueError, match="cell='rnn' is unknown"):
            model(2, 4, 4, cell="rnn")
    with pytest.raises(ValueError, match="auxiliary_weight=-1"):
        ZForcing(2, 4, 4, auxiliary_weight=-1)


# -------------------------------------------------------------------- recursions by plain torch


def gaussian(layer: nn.Linear, hidden: Tensor) -> Normal:
    """The law that the docstrings write down."""
    loc, raw = F.linear(torch.relu(hidden), layer.weight, layer.bias).chunk(2, -1)
    return Normal(loc, torch.log1p(raw.exp()) + 1e-3)


def merged(cell: GatedCell, inputs: list[Tensor], bias: Tensor) -> nn.Module:
    """torch's own cell with the weights of the parts set side by side."""
    kind = nn.LSTMCell if cell.kind == "lstm" else nn.GRUCell
    plain = kind(sum(w.shape[1] for w in inputs), cell.hidden_dim)
    with torch.no_grad():
        plain.weight_ih.copy_(torch.cat(inputs, 1))
        plain.bias_ih.copy_(bias)
        plain.weight_hh.copy_(cell.recurrent.weight)
        plain.bias_hh.zero_()
        if cell.recurrent.bias is not None:
            plain.bias_hh.copy_(cell.recurrent.bias)
    return plain


def plain_vrnn(m: VRNN, x: Tensor, u: Tensor, z: Tensor, c: Tensor):
    """Chung et al. (2015), equations 5-9, step by step."""
    weights = [m.gates_x.weight, m.gates_z.weight, m.gates_u.weight]
    cell = merged(m.recurrence, weights, m.gates_x.bias)
    state = tuple(part.expand(len(x), -1) for part in m.recurrence.start)
    before, phi_z = torch.zeros_like(x[:, 0]), m.features_z(m.z0).expand(len(x), -1)
    for t in range(x.shape[1]):
        read = torch.cat([m.features_x(before), phi_z, u[:, t]], 1)
        state = cell(read, state if m.cell == "lstm" else state[0])
        state = state if m.cell == "lstm" else (state,)
        h = state[0]
        prior = gaussian(m.prior_law.out, m.prior_hidden(h))
        joined = torch.cat([m.proposal_context.weight, m.proposal_memory.weight], 1)
        q = gaussian(
            m.proposal_law.out,
            F.linear(torch.cat([c[:, t], h], 1), joined, m.proposal_context.bias),
        )
        phi_z = m.features_z(z[:, t])
        yield prior, q, m.head(m.emission_hidden(torch.cat([h, phi_z], 1)))
        before = x[:, t]


def plain_srnn(m: SRNN, x: Tensor, u: Tensor, z: Tensor, c: Tensor):
    """Fraccaro et al. (2016), equations 1-4 and the residual mean of section 3, step by step."""
    cell = nn.GRUCell(m.chain.input_dim, m.hidden_dim)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    cell.load_state_dict({n: getattr(m.chain.rnn, f"{n}_l0") for n in names})
    d = m.chain.start[0].expand(len(x), -1)
    before, z_before = torch.zeros_like(x[:, 0]), m.z0.expand(len(x), -1)
    for_prior, for_q = m.read_state.weight.chunk(2)
    for t in range(x.shape[1]):
        d = cell(torch.cat([before, u[:, t]], 1), d)
        joined = torch.cat([m.prior_chain.weight, for_prior], 1)
        hidden = F.linear(torch.cat([d, z_before], 1), joined, m.prior_chain.bias)
        prior = gaussian(m.prior_law.out, hidden)
        joined = torch.cat([m.proposal_context.weight, for_q], 1)
        hidden = F.linear(torch.cat([c[:, t], z_before], 1), joined, m.proposal_context.bias)
        residual = gaussian(m.proposal_law.out, hidden)
        q = Normal(prior.loc + residual.loc, residual.scale)
        yield prior, q, m.head(m.emission_hidden(torch.cat([d, z[:, t]], 1)))
        before, z_before = x[:, t], z[:, t]


def plain_zforcing(m: ZForcing, x: Tensor, u: Tensor, z: Tensor, c: Tensor):
    """Goyal et al. (2017), section 3, step by step."""
    gates = m.recurrence.gate_dim
    x_gates, x_prior = m.read_x.weight.split([gates, m.hidden_dim])
    u_gates, u_prior = m.read_u.weight.split([gates, m.hidden_dim])
    bias, prior_bias = m.read_x.bias.split([gates, m.hidden_dim])
    cell = merged(m.recurrence, [x_gates, m.gates_z.weight, u_gates], bias)
    state = tuple(part.expand(len(x), -1) for part in m.recurrence.start)
    before = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = state[0]
        joined = torch.cat([m.prior_memory.weight, x_prior, u_prior], 1)
        prior = gaussian(
            m.prior_law.out, F.linear(torch.cat([h, before, u[:, t]], 1), joined, prior_bias)
        )
        joined = torch.cat([m.proposal_context.weight, m.proposal_memory.weight], 1)
        hidden = F.linear(torch.cat([c[:, t], h], 1), joined, m.proposal_context.bias)
        q = gaussian(m.proposal_law.out, hidden)
        state = cell(torch.cat([before, z[:, t], u[:, t]], 1), state)
        yield prior, q, m.head(m.emission_hidden(state[0]))
        before = x[:, t]


def summaries(m: Any, batch: Batch) -> Tensor:
    """What the paper's inference network reads: its recurrence by hand, backwards in time."""
    read = [batch.x, batch.mask.float(), batch.u]
    if isinstance(m, SRNN):
        first = torch.zeros_like(batch.x[:, :1])
        before = torch.cat([torch.cat([first, batch.x[:, :-1]], 1), batch.u], 2)
        read.append(m.chain.rnn(before, m.chain.start.expand(1, len(before), -1).contiguous())[0])
    read = torch.cat(read, 2)
    if isinstance(m, VRNN):
        return m.encoder.net(read)
    net = m.encoder.cell
    start = net.start.expand(1, len(read), -1).contiguous()
    return net.rnn(read.flip(1), start)[0].flip(1)


CASES = [
    (VRNN(3, 6, 5, cell="lstm", feature_dim=4), plain_vrnn),
    (VRNN(3, 6, 5, cell="gru"), plain_vrnn),
    (SRNN(3, 6, 5), plain_srnn),
    (ZForcing(3, 6, 5), plain_zforcing),
]


@pytest.mark.parametrize(("model", "plain"), CASES)
def test_terms_of_the_bound_equal_those_of_the_papers_equations(model, plain) -> None:
    net = built(model.clone(), input_dim=1, seed=3)
    with torch.no_grad():
        for p in net.parameters():  # learned starts are 0 before training
            p.add_(0.1 * normals(*p.shape, seed=p.numel()))
    batch = batch_of(normals(4, 5, 2, seed=1), u=normals(4, 5, 1, seed=2))
    trace = scan(net, batch, make_generator(0))
    found, laws = along(net, batch, trace), trace.proposal(slice(0, 5))
    assert trace.z is not None
    steps = plain(net, batch.x, batch.u, trace.z, summaries(net, batch))
    for t, (prior, q, emission) in enumerate(steps):
        torch.testing.assert_close(laws.loc[:, t], q.loc, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found.divergence[:, t], kl_divergence(q, prior).sum(-1), rtol=1e-4, atol=1e-4
        )
        log_g = emission.log_prob(batch.x[:, t]).sum(-1)
        torch.testing.assert_close(found.reconstruction[:, t], log_g, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [*MODELS, lambda *a: VRNN(*a, cell="gru")])
def test_all_steps_at_once_equal_one_step_at_a_time(model) -> None:
    net = built(model(3, 6, 5), input_dim=1, seed=4)
    batch = batch_of(normals(4, 7, 2, seed=1), u=normals(4, 7, 1, seed=2))
    with torch.no_grad():
        trace = scan(net, batch, make_generator(0))
        laws = trace.proposal(slice(0, 7))
        s, before = net.start((4,)), torch.zeros(4, 2)
        for t in range(7):
            u = batch.inputs_at(t)
            h = net.advance(s, net.embed(before), u)
            q = net.proposal(h, trace.context[:, t], u)
            torch.testing.assert_close(laws.loc[:, t], q.loc, rtol=1e-5, atol=1e-5)
            s, before = net.absorb(h, trace.z[:, t]), batch.x[:, t]
            law = net.emission(s, u)
            whole = net.emission(trace.s, batch.inputs_all())
            torch.testing.assert_close(law.loc, whole.loc[:, t], rtol=1e-5, atol=1e-5)


def test_the_chain_of_srnn_runs_before_the_loop() -> None:
    net = built(SRNN(3, 6, 5))
    batch = batch_of(normals(4, 7, 2))
    calls = []
    net.chain.step = lambda *args: calls.append(args)
    with torch.no_grad():
        scan(net, batch, make_generator(0))
        particle_scan(net, batch, Steering(4, 0.5), make_generator(0))
    assert not calls


@pytest.mark.parametrize("model", MODELS)
def test_the_summaries_of_a_series_do_not_depend_on_its_company(model) -> None:
    net = built(model(3, 6, 5))
    x = normals(3, 8, 2)
    wide = batch_of(x)
    lengths = torch.tensor([8, 5, 2])
    inside = (torch.arange(8) < lengths[:, None])[..., None]
    ragged = Batch(x * inside, inside.expand_as(x), lengths, wide.u, wide.rows, wide.ids)
    with torch.no_grad():
        together = net.encode(ragged)
        for k, length in enumerate(lengths.tolist()):
            alone = net.encode(batch_of(x[k : k + 1, :length]))
            torch.testing.assert_close(together[k, :length], alone[0], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- missing data


@pytest.mark.parametrize("model", MODELS)
def test_a_missing_observation_is_integrated_out(model, trained) -> None:
    """p(x_2) = int p(x_1, x_2) dx_1: both sides estimated without bias, many times over."""
    net = trained[model]
    target, grid = 0.7, np.linspace(-6, 6, 61)
    width, repeats = grid[1] - grid[0], 20
    pairs = [np.array([a, target]) for a in grid] * repeats
    joint = np.exp(net.log_prob(pairs, n_particles=50, seed=0).value).reshape(repeats, -1)
    integrals = joint.sum(1) * width
    gaps = [np.array([np.nan, target])] * 200
    direct = np.exp(net.log_prob(gaps, n_particles=50, seed=1).value)
    stderr = np.hypot(integrals.std(ddof=1) / repeats**0.5, direct.std(ddof=1) / len(direct) ** 0.5)
    assert abs(integrals.mean() - direct.mean()) < 5 * stderr
    assert stderr < 0.05 * direct.mean()


@pytest.mark.parametrize("model", MODELS)
def test_values_under_the_mask_are_never_read(model) -> None:
    net = built(model(3, 6, 5))
    x = normals(4, 7, 2)
    mask = normals(4, 7, 2, seed=5) > -0.5
    batch = batch_of(x, mask)
    other = Batch(torch.where(mask, x, 9.0), mask, batch.lengths, batch.u, batch.rows, batch.ids)
    with torch.no_grad():
        a, b = (evaluate(net, k, Objective(), 1.0, make_generator(2)) for k in (batch, other))
    torch.testing.assert_close(a.value, b.value)


# ---------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("model", MODELS)
def test_training_beats_the_untrained_model_on_other_series(model, trained) -> None:
    test, done = oscillators(30, 20, 1), trained[model]
    start = done.clone().set_params(max_epochs=1, learning_rate=1e-9).fit(test[:1], seed=0)
    assert done.fit_report_.objective[-1] > done.fit_report_.objective[0]
    bounds = [
        m.log_prob(test, method="variational", n_particles=10, seed=2).value for m in (done, start)
    ]
    gain = bounds[0] - bounds[1]
    assert gain.mean() > 5 * gain.std(ddof=1) / len(gain) ** 0.5
    future = done.forecast(6, test[:3], n_samples=40, seed=3)
    assert future.mean.shape == (3, 6, 1)
    assert future.sample(5, seed=0).shape == (3, 5, 6, 1)


@pytest.mark.parametrize("model", MODELS)
def test_the_bound_lies_below_the_particle_estimate(model, trained) -> None:
    net, test = trained[model], oscillators(12, 20, 2)
    bound = net.log_prob(test, method="variational", n_particles=100, seed=0)
    estimate = net.log_prob(test, n_particles=400, seed=0)
    assert (bound.kind, estimate.kind) == ("lower bound", "estimate")
    gap = estimate.value - bound.value
    stderr = np.hypot(bound.stderr, estimate.stderr)
    assert np.all(gap > -5 * stderr)
    assert gap.sum() > 5 * np.sqrt(np.sum(stderr**2))


@pytest.mark.parametrize("model", MODELS)
def test_known_inputs_are_read(model) -> None:
    rng = np.random.default_rng(0)
    u = rng.normal(size=(12, 9, 1))
    y = 2 * u[:, :8] + 0.1 * rng.normal(size=(12, 8, 1))
    net = model(2, 8, 8, max_epochs=40, learning_rate=0.03).fit(y, inputs=u[:, :8], seed=0)
    u[:6, 8], u[6:, 8] = 1.5, -1.5
    future = net.forecast(1, y, inputs=u, n_samples=100, seed=0).mean[:, 0, 0]
    assert future[:6].min() > 1
    assert future[6:].max() < -1


# ------------------------------------------------------------------------------- auxiliary cost


def test_the_auxiliary_cost_is_a_gaussian_density_that_spares_the_backward_network() -> None:
    net = built(ZForcing(2, 5, 4, auxiliary_weight=0.3))
    batch = batch_of(normals(3, 6, 2))
    trace = scan(net, batch, make_generator(0))
    cost = net.auxiliary(trace.h, trace.z, trace.context, batch.inputs_all())
    raw = net.auxiliary_law.out(torch.relu(net.auxiliary_hidden(trace.z)))
    loc, scale = raw[..., :4], torch.log1p(raw[..., 4:].exp()) + 0.1
    b = summaries(net, batch)
    density = -0.5 * ((b - loc) / scale) ** 2 - scale.log() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(cost, 0.3 * density.sum(-1), rtol=1e-4, atol=1e-5)
    # With z held fixed, the backward network gets no gradient, and the auxiliary one does.
    held = net.auxiliary(trace.h, trace.z.detach(), trace.context, batch.inputs_all())
    own = [net.auxiliary_hidden.weight, *net.encoder.parameters()]
    first, *others = torch.autograd.grad(held.sum(), own, allow_unused=True)
    assert first is not None
    assert all(gradient is None for gradient in others)


def test_the_auxiliary_cost_enters_training_and_no_likelihood() -> None:
    batch = batch_of(normals(3, 6, 2))
    found = {}
    for weight in (0.0, 1.0):
        net = built(ZForcing(2, 5, 4, auxiliary_weight=weight))
        with torch.no_grad():
            found[weight] = evaluate(net, batch, Objective(), 1.0, make_generator(0))
            trace = scan(net, batch, make_generator(0))
            cost = net.auxiliary(trace.h, trace.z, trace.context, batch.inputs_all())
    torch.testing.assert_close(found[1.0].value, found[0.0].value + cost)
    torch.testing.assert_close(found[1.0].reconstruction, found[0.0].reconstruction)
    torch.testing.assert_close(found[1.0].divergence, found[0.0].divergence)


# ---------------------------------------------------------------------------- pieces of the loop


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_gated_cell_equals_torchs(kind) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = GatedCell(kind, 5)
        inputs = nn.Linear(3, cell.gate_dim)
        plain = merged(cell, [inputs.weight], inputs.bias)
    x, h, c = normals(4, 3), normals(4, 5, seed=1), normals(4, 5, seed=2)
    state = (h, c) if kind == "lstm" else (h,)
    wanted = plain(x, state if kind == "lstm" else h)
    for a, b in zip(cell(inputs(x), state), wanted if kind == "lstm" else (wanted,), strict=True):
        torch.testing.assert_close(a, b)


def test_the_unrolled_srnn_has_the_gradient_of_its_steps() -> None:
    x, lengths = normals(3, 8, 2), torch.tensor([5, 8, 2])
    inside = (torch.arange(8) < lengths[:, None])[..., None].expand_as(x)
    batch = Batch(x * inside, inside, lengths, x[..., :0], torch.arange(3), (0, 1, 2))
    found = {}
    for name in ("unrolled", "by steps"):
        net = built(SRNN(3, 6, 5))
        with torch.no_grad():  # one path, whatever the order in which noise is drawn
            net.proposal_law.out.bias[3:] = -40.0
            net.proposal_law.min_scale = 1e-6
            net.z0.fill_(0.3)
        if name == "by steps":
            net.unroll = lambda *_: None
        value = evaluate(net, batch, Objective(), 1e-3, make_generator(0)).value
        value.sum().backward()
        found[name] = [value.detach(), *(p.grad for p in net.parameters())]
    for a, b in zip(*found.values(), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_the_fused_chain_has_the_gradient_of_plain_back_propagation() -> None:
    ragged, floor = Ragged.of(torch.tensor([2, 5, 3]), 5), 0.1
    shapes = [(10, 6), (3, 2), (6, 2), (4, 6), (4,)]
    wanted = [normals(*k, seed=n).double().requires_grad_() for n, k in enumerate(shapes)]
    noise = normals(10, 2, seed=9).double()
    c, first, w, v, d = wanted

    def plain() -> list[Tensor]:
        z, laws = first, []
        for c_t, noise_t in zip(c.split(ragged.sizes), noise.split(ragged.sizes), strict=True):
            out = torch.relu(c_t + z[: len(c_t)] @ w.T) @ v.T + d
            scale = F.softplus(out[:, 2:]) + floor
            z = out[:, :2] + scale * noise_t
            laws.append((out[:, :2], scale, z))
        return [torch.cat(part) for part in zip(*laws, strict=True)]

    path = draw_chain(c, first, noise, (w, v, d), ragged, floor)
    pull = [normals(10, 2, seed=20 + k).double() for k in range(3)]
    torch.testing.assert_close(list(path), plain())
    torch.testing.assert_close(
        torch.autograd.grad(list(path), wanted, pull), torch.autograd.grad(plain(), wanted, pull)
    )


def test_deferred_gradients_equal_those_of_plain_back_propagation() -> None:
    width = int(MIN_WEIGHTS**0.5) + 1
    layer, start = LoopLinear(width, width), normals(3, 2, width).requires_grad_()

    def loss() -> Tensor:
        h, total = start, torch.zeros(())
        for _ in range(4):
            h = torch.tanh(layer(h))
            total = total + h.square().sum()
        return total

    wanted = [start, layer.weight, layer.bias]
    plain = torch.autograd.grad(loss(), wanted)
    with deferred():
        kept = loss()
    # A pass that leaves the weights out must leave nothing behind for the passes after it.
    torch.autograd.grad(kept, start, retain_graph=True)
    for _ in range(2):
        found = torch.autograd.grad(kept, wanted, retain_graph=True)
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with deferred():
        layer.weight.requires_grad_(False)
        torch.testing.assert_close(torch.autograd.grad(loss(), start)[0], plain[0])


def test_the_auxiliary_cost_of_particles_is_that_of_each_by_itself() -> None:
    net = built(ZForcing(2, 5, 4, auxiliary_weight=0.3))
    batch = replace(batch_of(normals(3, 6, 2)), lengths=torch.tensor([6, 4, 5]))
    swarm = particle_scan(net, batch, Steering(7, 0.5), make_generator(0))
    assert swarm.context is not None
    assert swarm.rows is not None
    cost = densities(net, batch, swarm, prior=False).auxiliary
    assert cost is not None
    assert cost.shape == (3, 7, 6)
    z = swarm.rows.pad(swarm.z)
    for k in range(7):
        one = net.auxiliary(swarm.path.h, z[:, k], swarm.context, batch.inputs_all())
        wanted = torch.where(batch.valid, one.double(), 0.0)
        torch.testing.assert_close(cost[:, k], wanted)
