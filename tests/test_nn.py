"""Heads against scipy, cells against torch's, encoders against their own invariances."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from seqdgm.nn import (
    BidirectionalEncoder,
    FilteringEncoder,
    GatedTransition,
    GaussianProposal,
    MeanFieldEncoder,
    RecurrentCell,
    SmoothingEncoder,
    emission_head,
    head_options_from_data,
)
from seqdgm.nn import distributions as sd

F64 = torch.float64
NAMES = ["gaussian", "studentt", "bernoulli", "categorical", "poisson", "negbinomial", "mixture"]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def options(name: str) -> dict:
    return {"n_categories": 4} if name == "categorical" else {}


def data(name: str, shape: tuple[int, ...] = (6, 50, 2), seed: int = 0) -> np.ndarray:
    """Values that the family can emit, with a different marginal in each column."""
    rng = np.random.default_rng(seed)
    draw = {
        "bernoulli": lambda p: rng.binomial(1, p / 4, shape[:-1]),
        "categorical": lambda p: rng.binomial(3, p / 4, shape[:-1]),
        "poisson": lambda p: rng.poisson(40 * p, shape[:-1]),
        "negbinomial": lambda p: rng.negative_binomial(3, 1 / (1 + 10 * p), shape[:-1]),
    }.get(name, lambda p: rng.normal(p, p, shape[:-1]))
    return np.stack([draw(1.0 + d) for d in range(shape[-1])], -1).astype(np.float64)


def reference(name: str, head, features: torch.Tensor, x: np.ndarray) -> np.ndarray:
    """Log-density of each element by scipy from the documented parameterisation."""
    raw = (
        head.linear(features).detach().numpy().reshape(*features.shape[:-1], *head.parameter_shape)
    )
    raw = np.moveaxis(raw, features.ndim - 1, 0)

    def softplus(r):
        return np.logaddexp(0, r)

    if name == "gaussian":
        return stats.norm.logpdf(x, raw[0], softplus(raw[1]) + 1e-3)
    if name == "studentt":
        df = 2.1 + softplus(head.raw_df.detach().numpy())
        return stats.t.logpdf(x, df, raw[0], softplus(raw[1]) + 1e-3)
    if name == "bernoulli":
        return stats.bernoulli.logpmf(x, 1 / (1 + np.exp(-raw[0])))
    if name == "categorical":
        p = np.exp(raw[0]) / np.exp(raw[0]).sum(-1, keepdims=True)
        return np.log(np.take_along_axis(p, x[..., None].astype(int), -1))[..., 0]
    if name == "poisson":
        return stats.poisson.logpmf(x, np.exp(raw[0]))
    if name == "negbinomial":
        mean, dispersion = np.exp(raw[0]), softplus(raw[1]) + 1e-3
        return stats.nbinom.logpmf(x, 1 / dispersion, 1 / (1 + mean * dispersion))
    weights = np.exp(raw[0]) / np.exp(raw[0]).sum(-1, keepdims=True)
    parts = stats.norm.pdf(x[..., None], raw[1], softplus(raw[2]) + 1e-3)
    return np.log((weights * parts).sum(-1))


@pytest.mark.parametrize("name", NAMES)
def test_head_density_equals_scipy(name):
    head = emission_head(name, 5, 2, **options(name)).double()
    values = data(name)
    head.initialise_bias(values)
    features = torch.randn(6, 50, 5, dtype=F64)
    dist = head(features)
    assert dist.batch_shape == (6, 50, 2)
    x = torch.from_numpy(values)
    expected = reference(name, head, features, values)
    np.testing.assert_allclose(sd.log_prob_elements(dist, x).detach(), expected, rtol=1e-9)
    mask = torch.rand(x.shape) > 0.3
    value = sd.log_prob(dist, torch.where(mask, x, torch.nan), mask).detach()
    np.testing.assert_allclose(value, np.where(mask, expected, 0).sum(-1), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_head_starts_at_the_marginals(name):
    values = data(name)
    values[0, :7, 0] = np.nan
    head = emission_head(name, 5, 3, **options(name)).double()
    untouched = head.linear.bias.view(head.parameter_shape)[:, 2].clone()
    head.initialise_bias(np.concatenate([values, np.full((6, 50, 1), np.nan)], -1))
    assert torch.equal(head.linear.bias.view(head.parameter_shape)[:, 2], untouched)
    dist = head(torch.zeros(5, dtype=F64))
    mean = np.nanmean(values, (0, 1))
    np.testing.assert_allclose(sd.mean(dist)[:2].detach(), mean, rtol=0.02)
    variance = np.nanvar(values, (0, 1))
    if name == "poisson":
        variance = mean
    np.testing.assert_allclose(sd.variance(dist)[:2].detach(), variance, rtol=0.06)


@pytest.mark.parametrize("name", NAMES)
def test_head_gradients_are_finite_for_far_features_and_missing_values(name):
    head = emission_head(name, 5, 2, **options(name))
    x = torch.from_numpy(data(name)).float()
    mask = torch.rand(x.shape) > 0.3
    features = (30 * torch.randn(6, 50, 5)).requires_grad_()
    value = sd.log_prob(head(features), torch.where(mask, x, torch.nan), mask)
    assert value.dtype == torch.float32
    value.sum().backward()
    for tensor in (features, *head.parameters()):
        assert torch.isfinite(tensor.grad).all()


def test_scale_and_degrees_of_freedom_have_floors():
    head = emission_head("studentt", 1, 1, min_scale=0.25)
    with torch.no_grad():
        head.raw_df.fill_(-100.0)
        head.linear.bias.fill_(-100.0)
    dist = head(torch.zeros(1))
    assert dist.scale.item() == pytest.approx(0.25)
    assert dist.df.item() == pytest.approx(2.1)
    assert np.isfinite(dist.variance.item())
    with pytest.raises(ValueError, match="more than 2"):
        emission_head("studentt", 1, 1, min_df=2.0)


def test_constant_column_gives_a_finite_start():
    for name in NAMES:
        head = emission_head(name, 2, 1, **options(name))
        head.initialise_bias(np.zeros((2, 5, 1)))
        assert torch.isfinite(head.linear.bias).all()


@pytest.mark.parametrize(
    ("name", "bad", "needs"),
    [
        ("bernoulli", 2.0, "0 or 1; threshold"),
        ("bernoulli", 0.5, "0 or 1"),
        ("categorical", 4.0, "whole numbers from 0 to 4 - 1; number the categories"),
        ("categorical", -1.0, "whole numbers"),
        ("poisson", -1.0, "whole numbers from 0; give counts"),
        ("negbinomial", 0.5, "whole numbers from 0; give counts"),
    ],
)
def test_values_outside_the_support_are_named(name, bad, needs):
    head = emission_head(name, 5, 2, **options(name))
    values = data(name, (2, 4, 2))
    values[0, 1, 0] = np.nan
    stamps = pd.date_range("2020-01-01", periods=4, freq="D")
    place = (["a", "b"], ["u", "v"], [stamps, stamps])
    head.validate(values, *place)
    values[1, 2, 1] = bad
    message = rf"series 'b', column 'v', at 2020-01-03.*{bad:g} cannot.*{needs}"
    with pytest.raises(ValueError, match=message):
        head.validate(values, *place)


def test_real_valued_heads_take_anything():
    values = np.array([[[-1e9], [0.3], [np.nan]]])
    for name in NAMES:
        head = emission_head(name, 2, 1, **options(name))
        assert head.real_valued == (name in ("gaussian", "studentt", "mixture"))
        if head.real_valued:
            head.validate(values, ["a"], ["y"], [pd.RangeIndex(3)])


def test_options_from_data():
    values = np.array([[[0.0], [np.nan], [6.0]]])
    assert head_options_from_data("categorical", values) == {"n_categories": 7}
    assert head_options_from_data("categorical", 0 * values) == {"n_categories": 2}
    assert head_options_from_data("poisson", values) == {}
    for call in (
        lambda: emission_head("normal", 1, 1),
        lambda: head_options_from_data("x", values),
    ):
        with pytest.raises(ValueError, match=r"unknown emission .* 'gaussian', 'studentt'"):
            call()


def test_encoded_observations():
    x = torch.tensor([[2.0, torch.nan], [0.0, 3.0]])
    codes = emission_head("categorical", 1, 2, n_categories=4).encode(x, ~x.isnan())
    expected = torch.zeros(2, 8)
    expected[0, 2] = expected[1, 0] = expected[1, 7] = 1
    assert torch.equal(codes, expected)
    counts = emission_head("poisson", 1, 2)
    torch.testing.assert_close(
        counts.encode(x, ~x.isnan()), torch.tensor([[np.log(3), 0], [0, np.log(4)]]).float()
    )
    assert counts.encoded_dim == 2
    assert torch.equal(emission_head("gaussian", 1, 2).encode(x[1]), x[1])


# -------------------------------------------------------------------------------- transitions


def test_gated_transition_follows_its_equations():
    module = GatedTransition(3, 7, 2, min_scale=0.01).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    z, u = torch.randn(4, 5, 3, dtype=F64), torch.randn(4, 1, 2, dtype=F64)
    weights = {name: value.detach().numpy() for name, value in module.named_parameters()}

    def layer(name, x, rows=slice(None)):
        return x @ weights[f"{name}.weight"][rows].T + weights[f"{name}.bias"][rows]

    zu = np.concatenate([z.numpy(), np.broadcast_to(u.numpy(), (4, 5, 2))], -1)
    gate = 1 / (1 + np.exp(-layer("gate", np.maximum(layer("hidden", zu, slice(0, 7)), 0))))
    proposed = layer("proposed", np.maximum(layer("hidden", zu, slice(7, 14)), 0))
    dist = module(z, u)
    expected = (1 - gate) * layer("linear", zu) + gate * proposed
    np.testing.assert_allclose(dist.loc.detach(), expected, rtol=1e-10)
    scale = np.logaddexp(0, layer("scale", np.maximum(proposed, 0))) + 0.01
    np.testing.assert_allclose(dist.scale.detach(), scale, rtol=1e-10)


def test_gated_transition_starts_near_the_identity():
    module = GatedTransition(3, 20, context_dim=2, gate_bias=-12.0)
    z = torch.randn(50, 3)
    torch.testing.assert_close(module(z, torch.randn(50, 2)).loc, z, atol=1e-3, rtol=1e-3)
    started = GatedTransition(3, 20)(z).loc
    assert torch.corrcoef(torch.stack([started.flatten(), z.flatten()]))[0, 1] > 0.95


def test_gated_transition_refuses_a_wrong_context():
    with pytest.raises(ValueError, match="context of length 2, got one of length 0"):
        GatedTransition(3, 5, 2)(torch.zeros(3))
    with pytest.raises(ValueError, match="context of length 0, got one of length 2"):
        GatedTransition(3, 5)(torch.zeros(3), torch.zeros(2))
    GatedTransition(3, 5)(torch.zeros(3), torch.zeros(0))


# -------------------------------------------------------------------------------- recurrent


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_step_equals_run(kind, layers, dtype):
    cell = RecurrentCell(kind, 3, 8, layers).to(dtype)
    with torch.no_grad():
        cell.start.normal_()
    x = torch.randn(4, 11, 3, dtype=dtype)
    state = cell.initial_state((4,))
    outputs = []
    for t in range(11):
        state = cell.step(x[:, t], state)
        outputs.append(cell.output(state))
        assert all(part.shape == (4, layers, 8) for part in state)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    stepped, run = torch.stack(outputs, 1), cell.run(x)
    torch.testing.assert_close(stepped, run, atol=tolerance, rtol=0)
    # Carried state: the second half run from the state after the first.
    state = cell.initial_state((4,))
    for t in range(6):
        state = cell.step(x[:, t], state)
    torch.testing.assert_close(cell.run(x[:, 6:], state), run[:, 6:], atol=tolerance, rtol=0)
    for loss in (stepped, run):
        cell.zero_grad()
        loss.square().sum().backward()
        gradients = [p.grad.clone() for p in cell.parameters()]
        if loss is stepped:
            first = gradients
    torch.testing.assert_close(first, gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_run_equals_torch_from_the_learned_start(kind):
    cell = RecurrentCell(kind, 3, 8, 2).double()
    reference = (torch.nn.LSTM if kind == "lstm" else torch.nn.GRU)(3, 8, 2, batch_first=True)
    reference = reference.double()
    reference.load_state_dict(cell.rnn.state_dict())
    x = torch.randn(4, 11, 3, dtype=F64)
    torch.testing.assert_close(cell.run(x), reference(x)[0])
    assert cell.start.requires_grad


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_step_takes_any_batch_shape(kind):
    cell = RecurrentCell(kind, 3, 8, 2)
    x = torch.randn(4, 1, 3)
    state = cell.initial_state((4, 5))
    after = cell.step(x, state)
    alone = cell.step(x[:, 0], cell.initial_state((4,)))
    for part, one in zip(after, alone, strict=True):
        torch.testing.assert_close(part, one[:, None].expand(4, 5, 2, 8))
    assert cell.output(cell.step(torch.randn(3), cell.initial_state(()))).shape == (8,)


def test_unknown_cell():
    with pytest.raises(ValueError, match="unknown recurrent cell 'elman'"):
        RecurrentCell("elman", 3, 8)


# --------------------------------------------------------------------------------- encoders

ENCODERS = {
    "smoothing": lambda **k: SmoothingEncoder(2, 6, "gru", inputs_dim=1, **k),
    "smoothing lstm": lambda **k: SmoothingEncoder(2, 6, "lstm", layers=2, inputs_dim=1, **k),
    "filtering": lambda **k: FilteringEncoder(2, 6, inputs_dim=1, **k),
    "bidirectional": lambda **k: BidirectionalEncoder(2, 6, inputs_dim=1, **k),
    "mean-field": lambda **k: MeanFieldEncoder(2, 6, inputs_dim=1, **k),
}


@pytest.fixture
def panel():
    lengths = torch.tensor([9, 5, 1, 7])
    x, u = torch.randn(4, 9, 2), torch.randn(4, 9, 1)
    inside = (torch.arange(9) < lengths[:, None])[..., None]
    mask = (torch.rand(4, 9, 2) > 0.3) & inside
    return x, mask, u, lengths


@pytest.mark.parametrize("name", ENCODERS)
def test_summary_of_a_series_does_not_depend_on_its_company(name, panel):
    x, mask, u, lengths = panel
    encoder = ENCODERS[name]()
    together = encoder(x, mask, u, lengths)
    assert together.shape == (4, 9, encoder.context_dim)
    for n, length in enumerate(lengths.tolist()):
        own = (part[n : n + 1, :length] for part in (x, mask, u))
        alone = encoder(*own, lengths[n : n + 1])
        torch.testing.assert_close(together[n, :length], alone[0], atol=1e-6, rtol=0)
        assert (together[n, length:] == 0).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_missing_or_past_the_end_is_never_read(name, panel):
    x, mask, u, lengths = panel
    encoder = ENCODERS[name]()
    inside = (torch.arange(9) < lengths[:, None])[..., None]
    expected = encoder(x, mask, u, lengths)
    dirty = encoder(
        torch.where(mask, x, torch.nan), mask | ~inside, torch.where(inside, u, torch.nan), lengths
    )
    assert torch.equal(dirty, expected)
    dirty.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_missing_is_not_zero(name, panel):
    x, mask, u, lengths = panel
    encoder = ENCODERS[name]()
    n, t, d = mask.nonzero()[0].tolist()
    x = x.clone()
    x[n, t, d] = 0.0
    gone = mask.clone()
    gone[n, t, d] = False
    assert not torch.equal(encoder(x, mask, u, lengths), encoder(x, gone, u, lengths))


@pytest.mark.parametrize(
    ("name", "sees"),
    [
        ("smoothing", lambda t, s: s >= t),
        ("filtering", lambda t, s: s <= t),
        ("bidirectional", lambda t, s: True),
        ("mean-field", lambda t, s: s == t),
    ],
)
def test_each_summary_sees_its_own_part_of_the_series(name, sees):
    encoder = ENCODERS[name]().double()
    x = torch.randn(1, 5, 2, dtype=F64, requires_grad=True)
    u, mask, lengths = torch.randn(1, 5, 1, dtype=F64), torch.ones(1, 5, 2).bool(), [5]
    c = encoder(x, mask, u, torch.tensor(lengths))
    for t in range(5):
        (gradient,) = torch.autograd.grad(c[0, t].sum(), x, retain_graph=True)
        for s in range(5):
            assert bool((gradient[0, s] != 0).all()) == bool(sees(t, s))


def test_smoothing_encoder_equals_a_flipped_network(panel):
    x, mask, u, lengths = panel
    encoder = SmoothingEncoder(2, 6, inputs_dim=1)
    c = encoder(x, mask, u, lengths)
    for n, length in enumerate(lengths.tolist()):
        seen = torch.where(mask[n], x[n], 0.0)
        read = torch.cat([seen, mask[n].float(), u[n]], -1)[:length].flip(0)
        outputs, _ = encoder.cell.rnn(read[None])
        torch.testing.assert_close(c[n, :length], outputs[0].flip(0), atol=1e-6, rtol=0)


def test_one_hot_observations_are_blanked_by_column():
    head = emission_head("categorical", 1, 2, n_categories=3)
    encoder = SmoothingEncoder(head.encoded_dim, 6, mask_dim=2)
    x = torch.randint(0, 3, (4, 9, 2)).float()
    mask = torch.rand(4, 9, 2) > 0.4
    lengths = torch.full((4,), 9)
    expected = encoder(head.encode(x), mask, None, lengths)
    assert torch.equal(expected, encoder(head.encode(x, mask), mask, None, lengths))
    with pytest.raises(ValueError, match="input_dim=5 is not a multiple of mask_dim=2"):
        SmoothingEncoder(5, 6, mask_dim=2)
    with pytest.raises(ValueError, match=r"lengths \(6, 2, 0\), got \(2, 2, 1\)"):
        encoder(x, mask, torch.zeros(4, 9, 1), lengths)


# --------------------------------------------------------------------------------- proposal


def test_proposal_follows_its_equations():
    proposal = GaussianProposal(3, 6, 6, min_scale=0.01).double()
    c, z = torch.randn(4, 1, 6, dtype=F64), torch.randn(4, 5, 3, dtype=F64)
    w = {name: value.detach().numpy() for name, value in proposal.named_parameters()}

    def expected(z):
        h = (np.tanh(z @ w["state.weight"].T + w["state.bias"]) + c.numpy()) / 2
        out = h @ w["out.weight"].T + w["out.bias"]
        return out[..., :3], np.logaddexp(0, out[..., 3:]) + 0.01

    for dist, memory in ((proposal(c, z), z.numpy()), (proposal(c), np.zeros(3))):
        loc, scale = expected(memory)
        np.testing.assert_allclose(dist.loc.detach(), loc, rtol=1e-10)
        np.testing.assert_allclose(dist.scale.detach(), scale, rtol=1e-10)
    assert proposal(c, z).loc.shape == (4, 5, 3)


def test_proposal_without_memory_uses_every_parameter():
    proposal = GaussianProposal(3, 8, 6, state_dim=0)
    dist = proposal(torch.randn(4, 8))
    (dist.loc + dist.scale).sum().backward()
    assert all(p.grad is not None for p in proposal.parameters())
    assert GaussianProposal(3, 8, 6)(torch.randn(4, 8), torch.randn(4, 3)).loc.shape == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_forward_passes_keep_the_dtype_and_leave_the_generators_alone(dtype, panel):
    x, mask, u, lengths = (t.to(dtype) if t.is_floating_point() else t for t in panel)
    encoder = SmoothingEncoder(2, 6, inputs_dim=1)
    modules = [encoder, GatedTransition(3, 5), GaussianProposal(3, 6, 6)]
    modules += [emission_head(name, 3, 2, **options(name)) for name in NAMES]
    encoder, transition, proposal, *heads = (m.to(dtype) for m in modules)
    before = torch.get_rng_state()
    numpy_before = copy.deepcopy(np.random.get_state())  # noqa: NPY002
    z = proposal(encoder(x, mask, u, lengths)).loc
    assert transition(z).scale.dtype == dtype
    for head in heads:
        draw = sd.sample(head(z), torch.Generator().manual_seed(0))
        assert draw.dtype == dtype
        assert draw.shape == (4, 9, 2)
        head.validate(draw.double().numpy(), list("abcd"), list("uv"), [pd.RangeIndex(9)] * 4)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before[1], np.random.get_state()[1])  # noqa: NPY002
