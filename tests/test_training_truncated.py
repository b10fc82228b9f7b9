"""Truncated back-propagation: the objective of whole series, gradients that stop at the borders."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import seqdgm as sq
from seqdgm.inference.objectives import Objective, evaluate
from seqdgm.inference.training_options import TrainingOptions
from seqdgm.inference.updates import Updater
from seqdgm.models.srnn import SRNN
from seqdgm.nn import GaussianProposal, SmoothingEncoder
from seqdgm.prepare import prepare
from seqdgm.types import Batch, tree_map

WINDOW = 4


class Level(sq.StateSpaceModel):
    """A level that is fed the last observation; its proposal reads the future."""

    learners = {"elbo": "gradient"}  # noqa: RUF012
    dtype = torch.float32
    latent_dim = 2
    feedback = True
    borders = False

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        self.z0 = nn.Parameter(torch.full((2,), 0.3))
        self.move = nn.Linear(3 + input_dim, 2)
        self.out = nn.Linear(2, 1)
        self.encoder = SmoothingEncoder(1, 3)
        self.combiner = GaussianProposal(2, 3, 3)

    def start(self, batch_shape):
        return self.z0.expand(*batch_shape, 2)

    def advance(self, s, x, u):
        if self.borders and int(u.t) and int(u.t) % WINDOW == 0:
            s = tree_map(torch.Tensor.detach, s)
        return torch.cat([s, x, u.values.expand(*s.shape[:-1], -1)], -1)

    def prior(self, h, u):
        return Normal(0.9 * self.move(h), 0.5 + 0.01 * u.t[..., None])

    def emission(self, s, u):
        return Normal(self.out(s), 0.7)

    def encode(self, batch: Batch) -> torch.Tensor:
        return self.encoder(batch.x, batch.mask, None, batch.lengths)

    def proposal(self, h, c, u):
        return self.combiner(c, h[..., :2])


def series() -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.normal(size=n).cumsum() / 3 for n in (14, 9, 12)]


def known() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(size=(len(y), 1)) for y in series()]


def updated(model: sq.StateSpaceModel, batch: Batch, **options: Any) -> tuple[Any, torch.Tensor]:
    updater = Updater.of(model, replace(TrainingOptions(), clip=1e9, **options))
    outcome = updater(
        batch,
        weight=0.1,
        beta=0.7,
        rate=1e-3,
        generator=torch.Generator().manual_seed(5),
        due=False,
    )
    return outcome, torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("missing", [False, True])
def test_windows_have_the_value_of_the_whole_and_gradients_cut_at_the_borders(missing) -> None:
    y = series()
    if missing:
        y[0][2:7] = np.nan  # both windows draw what is fed back
        y[1][[3, 8]] = np.nan
        y[2][[0, 9]] = np.nan
        y[0][12] = np.nan
    model = Level().fit(y, known(), seed=0, max_epochs=1, valid_fraction=0.0)
    _, batch, _ = prepare(model, y, known())
    cut = copy.deepcopy(model)
    cut.borders = True
    # Gradients by autograd over the whole series, with the state detached at the borders.
    terms = evaluate(cut, batch, Objective(), 0.7, torch.Generator().manual_seed(5))
    (-0.1 * terms.value.sum()).backward()
    expected = torch.cat([p.grad.ravel() for p in cut.parameters() if p.grad is not None])
    outcome, found = updated(copy.deepcopy(model), batch, truncate=WINDOW)
    totals = [part.double().sum().item() for part in terms]
    np.testing.assert_allclose(outcome.totals, [*totals, sum(map(len, y))], rtol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    whole, full = updated(copy.deepcopy(model), batch)
    np.testing.assert_allclose(outcome.totals, whole.totals, rtol=1e-5)
    assert float((full - found).abs().max()) > 1e-3  # the cut is felt
    one, same = updated(copy.deepcopy(model), batch, truncate=14)
    torch.testing.assert_close(same, full)
    assert one.totals == whole.totals


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_an_autoregressive_network_is_updated_after_each_window(cell: str) -> None:
    y = series()
    model = sq.RNN(cell, 3, scale=None, max_epochs=1).fit(y, seed=0)
    _, batch, _ = prepare(model, y, None)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.ndim == 2], "weight_decay": 1e-4},
            {"params": [p for p in plain.parameters() if p.ndim != 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    previous = torch.cat([torch.zeros_like(batch.x[:, :1]), batch.x[:, :-1]], 1)
    state, total = None, 0.0
    for begin in range(0, 14, WINDOW):
        steps = slice(begin, begin + WINDOW)
        if state is None:
            parts = tuple(part[:, None].expand(-1, 3, -1).contiguous() for part in plain.rnn.start)
            state = parts if cell == "lstm" else parts[0]
        hidden, state = plain.rnn.rnn(previous[:, steps], state)
        law = plain.head(hidden)
        value = (law.log_prob(batch.x[:, steps]) * batch.mask[:, steps]).sum()
        optimizer.zero_grad()
        (-value * 0.1 * 4).backward()
        optimizer.step()
        state = tree_map(torch.Tensor.detach, state)
        total += value.item()
    windows = copy.deepcopy(model)
    outcome, _ = updated(windows, batch, truncate=WINDOW)
    assert outcome.totals[0] == pytest.approx(total, rel=1e-5)
    for a, b in zip(windows.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_truncated_training_learns_and_resumes(tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    options = {"seed": 0, "truncate": 5, "average": 0.9, "learning_rate": 0.02}
    model = sq.RNN("gru", 4, max_epochs=8).fit(series(), **options)
    assert model.fit_report_.objective[-1] > model.fit_report_.objective[0]
    sq.RNN("gru", 4, max_epochs=3).fit(series(), checkpoint=path, **options)
    again = sq.RNN("gru", 4, max_epochs=8).fit(series(), resume=path, **options)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_fault_within_a_window_is_named() -> None:
    y = series()
    model = sq.RNN("gru", 3, scale=None, max_epochs=1).fit(y, seed=0)
    _, batch, _ = prepare(model, y, None)
    wild = batch.x.clone()
    wild[2, 6] = 1e30
    outcome, _ = updated(model, replace(batch, x=wild), truncate=WINDOW)
    assert outcome.fault == "series 2 gave a loss that is not finite"


def test_particles_are_not_cut() -> None:
    with pytest.raises(ValueError, match="truncate= goes with one path"):
        sq.DMM(1, 3, 3, max_epochs=1).fit(series(), truncate=4, n_particles=3)


def test_windows_of_a_model_that_unrolls_itself_have_the_bound_of_the_whole() -> None:
    """Draws come in another order then: compared over 400 copies of each series."""
    model = sq.DMM(2, 4, 4, max_epochs=3).fit(series(), seed=0)
    copies = [y for y in series() for _ in range(400)]
    _, batch, _ = prepare(model, copies, None)
    found = []
    for options in ({"truncate": WINDOW}, {}):
        values: list[torch.Tensor] = []
        updater = Updater.of(copy.deepcopy(model), replace(TrainingOptions(), **options))
        updater.evaluation.register_forward_hook(
            lambda _, __, out, values=values: values.append(out[0].value.detach())
        )
        updater(
            batch,
            weight=1e-3,
            beta=1.0,
            rate=1e-3,
            generator=torch.Generator().manual_seed(1),
            due=False,
        )
        assert len(values) == (4 if options else 1)
        found.append(torch.cat(values, 1).double().sum(1).reshape(3, 400))
    gap = found[0].mean(1) - found[1].mean(1)
    stderr = (found[0].var(1) / 400 + found[1].var(1) / 400).sqrt()
    assert torch.all(gap.abs() < 5 * stderr)


def test_windows_of_a_chain_that_runs_before_the_loop_have_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Unrolled, each window draws its noise at once: other numbers than those of the whole.
    monkeypatch.setattr(SRNN, "unroll", sq.StateSpaceModel.unroll)
    model = SRNN(2, 4, 4, max_epochs=1).fit(series(), seed=0)
    _, batch, _ = prepare(model, series(), None)
    whole, _ = updated(copy.deepcopy(model), batch)
    windows, _ = updated(copy.deepcopy(model), batch, truncate=WINDOW)
    np.testing.assert_allclose(windows.totals, whole.totals, rtol=1e-5)
