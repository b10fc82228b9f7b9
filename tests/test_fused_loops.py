"""Hand-written loops over time against torch's own layers and automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqdgm as sq
from seqdgm.inference.objectives import Objective, evaluate
from seqdgm.inference.scan import scan
from seqdgm.models.lstm_ssm import LSTMSSM
from seqdgm.models.srnn import SRNN
from seqdgm.models.vrnn import VRNN
from seqdgm.models.zforcing import ZForcing
from seqdgm.nn import GaussianProposal, RecurrentCell
from seqdgm.nn.fused_combiner import Weights, combine, combine_step_by_step
from seqdgm.nn.fused_memory import Weights as MemoryWeights
from seqdgm.nn.fused_memory import draw_with_memory
from seqdgm.nn.fused_recurrence import Weights as LayerWeights
from seqdgm.nn.fused_recurrence import recur
from seqdgm.nn.ragged import Ragged
from seqdgm.nn.recurrent import KINDS
from seqdgm.prepare import prepare
from seqdgm.types import make_generator

PRECISION = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
LENGTHS = torch.tensor([4, 9, 1, 6, 9, 2, 5])


def leaves(dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(*shape, dtype=dtype, generator=generator) for shape in shapes)
    return [x.requires_grad_() for x in made]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# ------------------------------------------------------------------------------------ ragged rows


@pytest.mark.parametrize("backwards", [False, True])
def test_rows_hold_each_step_of_each_series_once(backwards: bool) -> None:
    ragged = Ragged.of(LENGTHS, 11, backwards)
    x = torch.arange(7 * 11.0).view(7, 11, 1)
    rows = ragged.pack(x)
    assert ragged.sizes == tuple(int((t < LENGTHS).sum()) for t in range(9))
    position = 0
    for t, size in enumerate(ragged.sizes):
        for k in range(size):
            series = int(ragged.order[k])
            step = int(LENGTHS[series]) - 1 - t if backwards else t
            assert rows[position].item() == x[series, step, 0].item()
            position += 1
    assert position == len(rows)
    inside = torch.arange(11) < LENGTHS[:, None]
    assert torch.equal(ragged.unpack(rows, -1.0), torch.where(inside[..., None], x, -1.0))
    change = rows[ragged.sizes[0] :] - rows[ragged.before]
    assert bool((change == (-1 if backwards else 1)).all())


# ------------------------------------------------------------------------------- recurrent layers


def by_torch(cell: RecurrentCell, x: Tensor, backwards: bool) -> Tensor:
    """torch's layer on packed sequences, each turned round by hand."""
    series = [s[:n].flip(0) if backwards else s[:n] for s, n in zip(x, LENGTHS, strict=True)]
    packed = nn.utils.rnn.pack_sequence(series, enforce_sorted=False)
    start = tuple(part[:, None].expand(-1, len(x), -1).contiguous() for part in cell.start)
    out, _ = cell.rnn(packed, start if cell.kind == "lstm" else start[0])
    padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
    if backwards:
        padded = torch.stack(
            [
                torch.cat([s[:n].flip(0), s[n:]])
                for s, n in zip(padded.unbind(), LENGTHS, strict=True)
            ]
        )
    return padded


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_recurrent_layers_equal_those_of_torch(
    kind: str, backwards: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    cell = RecurrentCell(kind, 3, 5, layers=2).to(dtype)
    nn.init.normal_(cell.start)
    (x,) = leaves(dtype, (7, 9, 3))
    own = cell.run(x, lengths=LENGTHS, backwards=backwards)
    theirs = by_torch(cell, x, backwards)
    assert_close([own], [theirs], tolerance)
    (weights,) = leaves(dtype, own.shape)
    wanted = [x, *cell.parameters()]
    gradients = [torch.autograd.grad(out, wanted, weights) for out in (own, theirs)]
    assert_close(*gradients, tolerance)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_of_a_cell_continues_its_run(kind: str) -> None:
    torch.manual_seed(0)
    cell = RecurrentCell(kind, 3, 5, layers=2).double()
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    state, steps = cell.initial_state((4,)), []
    for t in range(6):
        state = cell.step(x[:, t], state)
        steps.append(cell.output(state))
    assert_close([cell.run(x)], [torch.stack(steps, 1)], 1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
def test_recurrent_layers_have_second_derivatives(kind: str) -> None:
    width, gates = 2, {"gru": 6, "lstm": 8}.get(kind, 2)
    ragged = Ragged.of(torch.tensor([1, 3]), 3)
    shapes = [(gates, 3), (gates, width), (gates,), (gates,), (4, 1), (4, 2), (2, width)]
    tensors = leaves(torch.float64, *shapes, *shapes[-1:] * (kind == "lstm"))

    def layer(*given: Tensor) -> Tensor:
        return recur(kind, given[4:6], given[6:], LayerWeights(*given[:4]), ragged)

    assert torch.autograd.gradcheck(layer, tensors)
    assert torch.autograd.gradgradcheck(layer, tensors)


# --------------------------------------------------------------------------------------- combiner


def combiner(dtype: torch.dtype) -> tuple[Ragged, Callable[..., list[Tensor]], list[Tensor]]:
    ragged = Ragged.of(LENGTHS, 11)
    rows = len(ragged.place)
    tensors = leaves(dtype, (rows, 6), (7, 3), (6, 3), (6,), (6, 6), (6,))
    (noise,) = leaves(dtype, (rows, 3))

    def call(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> list[Tensor]:
        c, first, *weights = inputs
        return list(function(c, first, noise.detach(), Weights(*weights), ragged, 1e-3))

    return ragged, call, tensors


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_the_combiner_and_its_gradients_equal_a_plain_loop(
    dtype: torch.dtype, tolerance: float
) -> None:
    _, call, tensors = combiner(dtype)
    own, plain = call(combine, *tensors), call(combine_step_by_step, *tensors)
    assert_close(own, plain, tolerance)
    weights = leaves(dtype, *(x.shape for x in own))
    gradients = [torch.autograd.grad(path, tensors, weights) for path in (own, plain)]
    assert_close(*gradients, tolerance)
    # Each output by itself: the others then have no gradient at all.
    for k in range(3):
        own, plain = call(combine, *tensors), call(combine_step_by_step, *tensors)
        alone = [
            torch.autograd.grad(p[k].square().sum(), tensors, allow_unused=True)
            for p in (own, plain)
        ]
        assert_close(*alone, tolerance)


def test_the_combiner_has_second_derivatives() -> None:
    ragged = Ragged.of(torch.tensor([1, 3]), 3)
    tensors = leaves(torch.float64, (4, 2), (2, 1), (2, 1), (2,), (2, 2), (2,))
    noise = torch.randn(4, 1, dtype=torch.float64, generator=make_generator(1))

    def path(c: Tensor, first: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(combine(c, first, noise, Weights(*weights), ragged, 1e-3))

    assert torch.autograd.gradcheck(path, tensors)
    assert torch.autograd.gradgradcheck(path, tensors)


@pytest.mark.parametrize("context_dim", [6, 4])
def test_a_proposal_unrolls_to_what_it_gives_step_by_step(context_dim: int) -> None:
    torch.manual_seed(0)
    proposal = GaussianProposal(3, context_dim, 6).double()
    context, first = torch.randn(7, 11, context_dim).double(), torch.randn(7, 3).double()
    with torch.no_grad():
        law, z = proposal.unroll(context, first, LENGTHS, make_generator(2))
        again = proposal(context, torch.cat([first[:, None], z[:, :-1]], 1))
    inside = (torch.arange(11) < LENGTHS[:, None])[..., None]
    for found, expected in ((law.loc, again.loc), (law.scale, again.scale)):
        assert (found - expected)[inside.expand_as(found)].abs().max() < 1e-12
    noise = ((z - law.loc) / law.scale)[inside.expand_as(z)]
    drawn = torch.randn(int(LENGTHS.sum()), 3, dtype=torch.float64, generator=make_generator(2))
    assert np.allclose(np.sort(noise), np.sort(drawn.flatten()))
    assert bool((z[~inside.expand_as(z)] == 0).all())


# ------------------------------------------------------------------- states drawn given a memory


def through_torchs_cell(
    kind: str,
    c: Tensor,
    given: Tensor,
    first: tuple[Tensor, ...],
    noise: Tensor,
    w: MemoryWeights,
    ragged: Ragged,
    min_scale: float,
) -> list[Tensor]:
    """The equations of `fused_memory` one after another, around torch's own cells."""
    memory, parts = first, []
    shares = iter(given.split(ragged.sizes[1:]))
    eye = torch.eye(len(w.gates), dtype=c.dtype)
    for c_t, noise_t in zip(c.split(ragged.sizes), noise.split(ragged.sizes), strict=True):
        memory = tuple(part[: len(c_t)] for part in memory)
        out = F.linear(torch.relu(c_t + memory[0] @ w.memory.T), w.out, w.out_bias)
        loc, raw = out.chunk(2, 1)
        scale = F.softplus(raw) + min_scale
        z = loc + scale * noise_t
        parts.append((loc, scale, z, *memory))
        share = next(shares, None)
        if share is None:
            break
        read = z if w.features is None else torch.relu(F.linear(z, w.features, w.features_bias))
        gates = share + (read @ w.gates.T)[: len(share)]
        before = tuple(part[: len(share)] for part in memory)
        if kind == "lstm":
            memory = torch.lstm_cell(gates, before, eye, w.recurrent)
        else:
            none = torch.zeros_like(w.recurrent_bias)
            memory = (torch.gru_cell(gates, *before, eye, w.recurrent, none, w.recurrent_bias),)
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([1, 1])], ids=["ragged", "one step"])
def test_states_drawn_given_a_memory_and_their_gradients_equal_a_plain_loop(
    kind: str, features: bool, dtype: torch.dtype, tolerance: float, lengths: Tensor
) -> None:
    ragged, n, rows = Ragged.of(lengths, 11), len(lengths), int(lengths.sum())
    gates, read = {"lstm": 20, "gru": 15}[kind], 4 if features else 3
    shapes = [(rows, 6), (rows - n, gates), (6, 5), (6, 6), (6,), (gates, read), (gates, 5)]
    shapes += [(gates,)] * (kind == "gru") + [(4, 3), (4,)] * features
    shapes += [(n, 5)] * (2 if kind == "lstm" else 1)
    tensors = leaves(dtype, *shapes)
    (noise,) = leaves(dtype, (rows, 3))

    def call(function: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
        c, given, p, v, d, r, u, *rest = tensors
        bias = rest.pop(0) if kind == "gru" else None
        f, b = (rest.pop(0), rest.pop(0)) if features else (None, None)
        w = MemoryWeights(p, v, d, r, u, bias, f, b)
        found = function(kind, c, given, tuple(rest), noise.detach(), w, ragged, 1e-3)
        return [*found[:3], *found[3]] if function is draw_with_memory else list(found)

    def gradients(found: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        some = torch.autograd.grad(found, tensors, weights, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(some, tensors, strict=True)]

    own, plain = call(draw_with_memory), call(through_torchs_cell)
    assert_close(own, plain, tolerance)
    weights = leaves(dtype, *(x.shape for x in own))
    pairs = zip(gradients(own, weights), gradients(plain, weights), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert not a.numel() or (a - b).abs().max() <= 10 * tolerance * b.abs().max()


# ------------------------------------------------------------------------------------- whole model


def dmm() -> tuple[sq.DMM, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    data = [(rng.random((n, 4)) < 0.3).astype(float) for n in (5, 12, 3, 8)]
    model = sq.DMM(3, 5, 6, emission="bernoulli", max_epochs=2).fit(data, seed=0)
    return model.double(), data


def test_the_bound_and_its_gradient_equal_those_of_a_plain_loop() -> None:
    model, data = dmm()
    _, batch, _ = prepare(model, data, None)
    x = batch.x.double()
    batch = replace(batch, x=x, u=batch.u.double())
    trace = scan(model, batch, make_generator(5))
    law = trace.proposal(slice(0, batch.n_steps))
    noise = ((trace.z - law.loc) / law.scale).detach()
    value = evaluate(model, batch, Objective(), 0.7, make_generator(5)).value.sum()
    z, context, total = model.start((4,)), model.encode(batch), 0.0
    for t in range(batch.n_steps):
        u = batch.inputs_at(t)
        q, p = model.proposal(z, context[:, t], u), model.prior(z, u)
        z = q.loc + q.scale * noise[:, t]
        logits = model.emission(z, u).logits
        fit = -F.binary_cross_entropy_with_logits(logits, x[:, t], reduction="none").sum(1)
        divergence = torch.distributions.kl_divergence(q, p).sum(1)
        total = total + torch.where(batch.valid[:, t], fit - 0.7 * divergence, 0.0).sum()
    assert_close([value], [total], 1e-10)
    used = [p for name, p in model.named_parameters() if name != "combiner.start"]
    assert_close(torch.autograd.grad(value, used), torch.autograd.grad(total, used), 1e-10)


def test_padding_leaves_the_bound_alone() -> None:
    model, data = dmm()
    _, batch, _ = prepare(model.float(), data, None)
    batch = batch.take(torch.tensor([0, 2, 3]))
    steps = int(batch.lengths.max())
    cut = {name: getattr(batch, name)[:, :steps] for name in ("x", "mask", "u")}
    short = evaluate(model, replace(batch, **cut), Objective(), 1.0, make_generator(3))
    wide = evaluate(model, batch, Objective(), 1.0, make_generator(3))
    assert batch.n_steps > steps
    assert_close([wide.value.sum(1)], [short.value.sum(1)], 1e-5)
    assert bool((wide.value[:, steps:] == 0).all())


def test_under_autocast_the_loop_runs_step_by_step() -> None:
    model, data = dmm()
    _, batch, _ = prepare(model.float(), data, None)
    with torch.autocast("cpu", torch.bfloat16):
        trace = scan(model, batch, make_generator(0))
        assert isinstance(trace.proposals, list)
    whole = scan(model, batch, make_generator(0))
    assert isinstance(whole.proposals, torch.distributions.Normal)


UNROLLED = [
    VRNN(3, 6, 5, "bernoulli", max_epochs=1),
    VRNN(3, 6, 5, "bernoulli", cell="gru", feature_dim=4, season=4, max_epochs=1),
    SRNN(3, 6, 5, "bernoulli", encoder_cell="relu", season=4, max_epochs=1),
    LSTMSSM(3, 6, 5, "bernoulli", max_epochs=1),
    LSTMSSM(3, 6, 5, "bernoulli", cell="gru", season=4, max_epochs=1),
    ZForcing(3, 6, 5, "bernoulli", auxiliary_weight=0.1, max_epochs=1),
    ZForcing(3, 6, 5, "bernoulli", cell="gru", season=4, max_epochs=1),
]


def chords(gaps: bool = False) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    data = [(rng.random((n, 4)) < 0.3).astype(float) for n in (5, 12, 3, 8)]
    if gaps:
        data[1][4:6], data[3][2, 1] = np.nan, np.nan
    return data


@pytest.mark.parametrize("model", UNROLLED, ids=lambda m: f"{type(m).__name__}-{m.season}")
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_unrolled_models_equal_their_steps_under_the_same_noise(
    model: sq.StateSpaceModel,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A memory that sees no observation is unrolled whatever is missing.
    gaps = not model.feedback
    fitted = model.clone().fit(chords(gaps), seed=0).to(dtype)
    with torch.no_grad():
        for parameter in fitted.parameters():
            parameter.normal_(0.0, 0.4, generator=make_generator(1))
    _, batch, _ = prepare(fitted, chords(gaps), None)
    batch = replace(batch, x=batch.x.to(dtype), u=batch.u.to(dtype))

    def learn() -> tuple[Tensor, Sequence[Tensor | None]]:
        value = evaluate(fitted, batch, Objective(), 0.7, make_generator(5)).value
        parameters = list(fitted.parameters())
        return value, torch.autograd.grad(value.sum(), parameters, allow_unused=True)

    own, own_gradients = learn()
    trace = scan(fitted, batch, make_generator(5))
    law = trace.proposal(slice(0, batch.n_steps))
    noise = iter(((trace.z - law.loc) / law.scale).detach().unbind(1))
    monkeypatch.setattr(type(fitted), "unroll", sq.StateSpaceModel.unroll)
    monkeypatch.setattr(
        "seqdgm.inference.scan.dist.sample", lambda law, *_, **__: law.loc + law.scale * next(noise)
    )
    plain, plain_gradients = learn()
    assert not isinstance(trace.proposals, list)
    assert next(noise, None) is None
    assert_close([own], [plain], tolerance)
    largest = max(g.abs().max() for g in plain_gradients if g is not None)
    for a, b in zip(own_gradients, plain_gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= tolerance * largest


@pytest.mark.parametrize("kind", [VRNN, SRNN, ZForcing])
def test_models_that_feed_observations_back_walk_through_gaps_by_steps(
    kind: type[sq.StateSpaceModel],
) -> None:
    model = kind(2, 4, 4, "bernoulli", max_epochs=1).fit(chords(gaps=True), seed=0)
    _, batch, _ = prepare(model, chords(gaps=True), None)
    trace = scan(model, batch, make_generator(0))
    assert isinstance(trace.proposals, list)
    assert trace.x is not None
    assert bool(trace.x.isfinite().all())
