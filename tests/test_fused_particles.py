"""Steered particles of models that unroll themselves against their steps and torch's own graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import seqdgm as sq
from seqdgm.inference import particle_scan as particles
from seqdgm.inference.joint import Along
from seqdgm.inference.objectives import Objective, evaluate
from seqdgm.inference.particle_scan import (
    Steering,
    Swarm,
    densities,
    increments,
    particle_scan,
)
from seqdgm.inference.scan import scan
from seqdgm.models.lstm_ssm import LSTMSSM
from seqdgm.models.srnn import SRNN
from seqdgm.models.storn import STORN
from seqdgm.models.vrnn import VRNN
from seqdgm.models.zforcing import ZForcing
from seqdgm.nn import fused_cells
from seqdgm.nn.dropout import thinned
from seqdgm.nn.fused_memory import Weights, draw_with_memory
from seqdgm.nn.ragged import Ragged
from seqdgm.prepare import prepare
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import Batch, make_generator, tree_map

STEERED = [
    VRNN(3, 6, 5, "bernoulli", max_epochs=1),
    VRNN(3, 6, 5, "bernoulli", cell="gru", feature_dim=4, season=4, max_epochs=1),
    LSTMSSM(3, 6, 5, "bernoulli", season=4, max_epochs=1),
    LSTMSSM(3, 6, 5, "bernoulli", cell="gru", max_epochs=1),
    ZForcing(3, 6, 5, "bernoulli", auxiliary_weight=0.1, season=4, max_epochs=1),
    ZForcing(3, 6, 5, "bernoulli", cell="gru", max_epochs=1),
]
LOOPS = [
    sq.DMM(2, 4, 4, "bernoulli", max_epochs=1),
    SRNN(2, 4, 4, "bernoulli", max_epochs=1),
    STORN(2, 4, 4, "bernoulli", max_epochs=1),
]
LENGTHS = (5, 12, 3, 8)
each_steered = pytest.mark.parametrize(
    "model", STEERED, ids=lambda m: f"{type(m).__name__}-{m.cell}"
)


def chords(gaps: bool = False) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    data = [(rng.random((n, 4)) < 0.3).astype(float) for n in LENGTHS]
    if gaps:
        data[1][4:6], data[3][2, 1] = np.nan, np.nan
    return data


def built(model: sq.StateSpaceModel, gaps: bool = False) -> tuple[sq.StateSpaceModel, Batch]:
    """A model whose draws matter much, and data in double precision."""
    data = chords(gaps)
    fitted = model.clone().fit(data, seed=0).double()
    with torch.no_grad():
        for parameter in fitted.parameters():
            parameter.normal_(0.0, 0.4, generator=make_generator(1))
    _, batch, _ = prepare(fitted, data, None)
    return fitted, replace(batch, x=batch.x.double(), u=batch.u.double())


def by_steps(monkeypatch: pytest.MonkeyPatch, model: sq.StateSpaceModel) -> None:
    monkeypatch.setattr(type(model), "unroll", StateSpaceModel.unroll)


def as_before(
    monkeypatch: pytest.MonkeyPatch, swarm: Swarm, laws: torch.distributions.Normal
) -> Iterator[Tensor]:
    """Draw the same noise and the same ancestors again, step by step."""
    assert swarm.rows is not None
    drawn = (swarm.z - laws.loc) / laws.scale
    noise = iter(swarm.rows.pad(drawn.detach()).unbind(2))

    def resample(cloud, how, batch, t, generator):
        ancestors, resampled = swarm.ancestors[:, :, t], swarm.resampled[:, t]
        cloud.s = particles.tree_map(lambda x: particles.gather(x, ancestors), cloud.s)
        return ancestors, resampled

    monkeypatch.setattr(particles, "_resample", resample)
    monkeypatch.setattr(
        particles.dist, "sample", lambda law, *_, **__: law.loc + law.scale * next(noise)
    )
    return noise


def learnt(
    model: sq.StateSpaceModel, batch: Batch, objective: Objective
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    terms = evaluate(model, batch, objective, 0.7, make_generator(5))
    parameters = list(model.parameters())
    return list(terms), torch.autograd.grad(terms.value.sum(), parameters, allow_unused=True)


def assert_close(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    largest = max(float(b.detach().abs().max()) for b in wanted if b is not None)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a - b).detach().abs().max()) <= 1e-9 * largest


@each_steered
@pytest.mark.parametrize(
    "objective",
    [
        Objective("fivo", 4),
        Objective("fivo", 3, threshold=1.0),
        Objective("fivo", 4, resampling_gradients=True),
    ],
    ids=["adaptive", "always", "scored"],
)
def test_steered_particles_equal_their_steps_under_the_same_draws(
    model: sq.StateSpaceModel, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A memory that sees no observation is unrolled whatever is missing.
    model, batch = built(model, gaps=not model.feedback)
    own, own_gradients = learnt(model, batch, objective)
    how = Steering(objective.n_particles, objective.share, 0.7, objective.resampling_gradients)
    seen = []
    unrolled = particles.unrolled
    with monkeypatch.context() as patch:
        patch.setattr(particles, "unrolled", lambda *a: seen.append(unrolled(*a)) or seen[-1])
        swarm = particle_scan(model, batch, how, make_generator(5))
    moved = swarm.ancestors != torch.arange(objective.n_particles)[:, None]
    assert int(moved.any(1).sum()) > 2
    by_steps(monkeypatch, model)
    noise = as_before(monkeypatch, swarm, seen[0].proposals)
    plain, plain_gradients = learnt(model, batch, objective)
    assert next(noise, None) is None
    assert_close(own, plain)
    assert_close(own_gradients, plain_gradients)


@each_steered
def test_steered_particles_are_thinned_like_their_series(
    model: sq.StateSpaceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    thin = model.clone().set_params(dropout=0.4)
    model, batch = built(thin)
    model.train()
    how = Steering(3, 0.6, 0.7)
    with thinned(make_generator(7), len(LENGTHS)):
        swarm = particle_scan(model, batch, how, make_generator(5))
        assert swarm.rows is not None
        found = densities(model, batch, swarm, prior=True)
        padded = swarm._replace(
            path=Along(*(tree_map(swarm.rows.pad, part) for part in swarm.path[:2]), 0),
            z=swarm.rows.pad(swarm.z),
            log_q=swarm.rows.pad(swarm.log_q),
            rows=None,
        )
        wanted = densities(model, batch, padded, prior=True)
    assert_close(found, wanted)
    weights = increments(found.emission + 0.7 * (found.prior - found.proposal), swarm.resampled)[1]
    ess = 1 / (2 * weights).exp().sum(1)
    later = batch.valid[:, 1:]
    assert torch.equal(swarm.resampled[:, 1:][later], (ess < 0.6 * 3)[:, :-1][later])
    assert bool(swarm.resampled.any())


@each_steered
def test_ancestors_are_chosen_by_the_weights_of_the_steps(
    model: sq.StateSpaceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = built(model)
    batch = batch.take(torch.tensor([1, 1, 1]))  # all draw as many uniform numbers in both
    how = Steering(4, 0.6, 0.7)
    uniforms: list[Tensor] = []
    drawn = torch.rand(12, 3, 1, dtype=torch.float64, generator=make_generator(2))
    monkeypatch.setattr(
        "seqdgm.inference.resampling._uniforms",
        lambda *_: uniforms.append(drawn[len(uniforms)]) or uniforms[-1],
    )
    with torch.no_grad():
        swarm = particle_scan(model, batch, how, make_generator(5))
        first = len(uniforms)
        uniforms.clear()
        assert swarm.rows is not None
        z = iter(swarm.rows.pad(swarm.z).unbind(2))
        by_steps(monkeypatch, model)
        monkeypatch.setattr(particles.dist, "sample", lambda *_, **__: next(z))
        steps = particle_scan(model, batch, how, make_generator(5))
    assert len(uniforms) == first > 3
    assert torch.equal(swarm.ancestors, steps.ancestors)
    assert torch.equal(swarm.resampled, steps.resampled)
    assert bool(swarm.resampled.any())
    assert not bool(swarm.resampled[:, 1:].all())


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("worth", [0, 2**17], ids=["compiled", "torch"])
def test_gradients_go_back_to_the_ancestors(
    kind: str, features: bool, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_cells, "WORTH", worth)
    # Two particles of three series; those of the first and the last go on from a single one.
    ragged = Ragged.of(torch.tensor([4, 2, 3]).repeat_interleave(2), 4)
    ancestors = [torch.tensor([1, 1, 3, 2, 5, 5]), None, torch.tensor([0, 0])]
    gates, read = {"lstm": 8, "gru": 6}[kind], 3 if features else 1
    shapes = [(9, 3), (6, gates), (3, 2), (2, 3), (2,), (gates, read), (gates, 2)]
    shapes += [(gates,)] * (kind == "gru") + [(3, 1), (3,)] * features
    shapes += [(6, 2)] * (2 if kind == "lstm" else 1)
    generator = make_generator(0)
    tensors = [
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]
    noise = torch.randn(18, 1, dtype=torch.float64, generator=generator)

    def draw(*given: Tensor) -> tuple[Tensor, ...]:
        c, inputs, p, v, d, r, u, *rest = given
        bias = rest.pop(0) if kind == "gru" else None
        f, b = (rest.pop(0), rest.pop(0)) if features else (None, None)
        weights = Weights(p, v, d, r, u, bias, f, b)
        path = draw_with_memory(
            kind, c, inputs, tuple(rest), noise, weights, ragged, 1e-3, lambda t, *_: ancestors[t]
        )
        return (path.loc, path.scale, path.z, *path.memory)

    assert torch.autograd.gradcheck(draw, tensors, fast_mode=True)


@pytest.mark.parametrize("model", LOOPS, ids=lambda m: type(m).__name__)
def test_models_that_cannot_be_steered_walk_by_steps(
    model: sq.StateSpaceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = built(model)
    own = learnt(model, batch, Objective("fivo", 4))
    by_steps(monkeypatch, model)
    for found, wanted in zip(own, learnt(model, batch, Objective("fivo", 4)), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("name", ["gaps", "wake-sleep", "autocast"])
def test_particles_walk_by_steps_where_they_must(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = built(VRNN(2, 4, 4, "bernoulli", max_epochs=1), gaps=name == "gaps")
    if name == "autocast":
        model, batch = model.float(), replace(batch, x=batch.x.float(), u=batch.u.float())
    by_hand = []
    monkeypatch.setattr(
        "seqdgm.nn.fused_memory._Memory.apply", lambda *given: by_hand.append(given)
    )
    objective = Objective("rws" if name == "wake-sleep" else "fivo", 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        terms = evaluate(model, batch, objective, 1.0, make_generator(0))
    assert not by_hand
    assert bool(terms.value.isfinite().all())


def test_one_steered_path_has_the_bound_of_its_particle() -> None:
    model, batch = built(STEERED[0])
    swarm = particle_scan(model, batch, Steering(1, 0.5), make_generator(3))
    trace = scan(model, batch, make_generator(3))
    inside = batch.valid
    log_q = trace.proposal(slice(0, batch.n_steps)).log_prob(trace.z).sum(2)
    assert swarm.rows is not None
    rows = (swarm.z, swarm.path.s.features, swarm.log_q)
    own = [swarm.rows.pad(part)[:, 0][inside] for part in rows]
    assert_close(own, [part[inside] for part in (trace.z, trace.s.features, log_q)])
