"""Stochastic-approximation EM against the exact maximum and the exact EM step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_particle_score import NAMES, START, Fed, Linear, deficit, deficit_drop, exact, panel

from seqdgm.inference.coordinates import Coordinates
from seqdgm.inference.particle_em import Retained, _maximise, _Memory
from seqdgm.inference.particle_score import draw_trajectories
from seqdgm.inference.smc import Reference, SMCOptions
from seqdgm.prepare import prepare


class ClosedForm(Linear):
    """The same model with its own M-step (regressions on the drawn states)."""

    def m_step(self, batch, trajectories, weights):
        z, w = trajectories.z[..., 0], weights[None, :, None]
        before, after = z[:, :, :-1], z[:, :, 1:]
        phi = (w * before * after).sum() / (w * before**2).sum()
        q = (w * (after - phi * before) ** 2).sum() / (w.sum() * after[:, 0].numel())
        gap = batch.x[:, None, :, 0] - z
        c = (w * gap).sum() / (w.sum() * gap[:, 0].numel())
        r = (w * (gap - c) ** 2).sum() / (w.sum() * gap[:, 0].numel())
        for p, value in zip(
            (self.phi, self.c, self.log_q, self.log_r),
            (phi, c, 0.5 * q.log(), 0.5 * r.log()),
            strict=True,
        ):
            p.fill_(value)


def test_generic_step_finds_the_closed_form() -> None:
    y = panel()[:2]
    closed, generic = ClosedForm(), Linear()
    _, batch, _ = prepare(generic, y, None)
    memory = _Memory()
    for seed, gamma in enumerate((1.0, 0.5)):
        rng = torch.Generator().manual_seed(seed)
        draws = draw_trajectories(generic, batch, SMCOptions(50), rng, 4)
        memory.add(Retained(draws.z, None), gamma)
    _maximise(closed, batch, memory, Coordinates.of(closed))
    for _ in range(6):
        _maximise(generic, batch, memory, Coordinates.of(generic))
    for name in NAMES:
        assert abs(getattr(generic, name).item() - getattr(closed, name).item()) < 1e-3


def test_weights_follow_the_recursion() -> None:
    memory = _Memory()
    z = torch.zeros(1, 2, 3, 1).double()
    expected: list[float] = []
    for k, gamma in enumerate((1.0, 1.0, 0.6, 0.3)):
        memory.add(Retained(z + k, None), gamma)
        expected = [*(w * (1 - gamma) for w in expected), gamma]
    retained, weights = memory.all()
    kept = [w for w in expected if w > 0]
    assert len(kept) == 3
    np.testing.assert_allclose(weights.numpy(), np.repeat(kept, 2) / 2)
    assert retained.z[0, :, 0, 0].tolist() == [1, 1, 2, 2, 3, 3]


def test_conditional_draws_leave_the_smoothing_law_invariant() -> None:
    """With four particles a plain smoother is far off; a chain from the exact law stays there."""
    values = np.array([0.9, -1.0, -1.0, 0.0])
    model, repeats = Linear(values), 2000
    y = np.r_[3.0, 0.0, np.nan, 2.0, -1.0]
    smoothed = exact(values).smooth(y, inputs=np.zeros((5, 1)))
    _, batch, _ = prepare(model, y, None)
    batch = batch.take(torch.zeros(repeats, dtype=torch.int64))

    def assert_law(z: np.ndarray, errors: float) -> None:
        error = smoothed.std[0, :, 0] / np.sqrt(repeats)
        assert np.abs((z.mean(0) - smoothed.mean[0, :, 0]) / error).max() < errors
        ratio = z.var(0, ddof=1) / smoothed.std[0, :, 0] ** 2
        assert np.abs(ratio - 1).max() < errors * np.sqrt(2 / repeats)

    rng = torch.Generator().manual_seed(0)
    plain = draw_trajectories(model, batch, SMCOptions(4), rng, 1).z
    with pytest.raises(AssertionError):
        assert_law(plain[:, 0, :, 0].numpy(), 10)
    start = torch.from_numpy(smoothed.sample(repeats, seed=0)[0])
    z = start
    for _ in range(3):
        how = SMCOptions(4, resampler="multinomial", reference=Reference(z, False))
        z = draw_trajectories(model, batch, how, rng, 2).z[:, 1]
    assert_law(z[..., 0].numpy(), 5)
    moved = (z != start).any(-1).double().mean(0)
    assert bool((moved > 0.1).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Linear, ClosedForm])
def test_estimates_reach_the_exact_maximum(kind: type[Linear]) -> None:
    y = panel()
    model = kind().fit(y, method="particle-em", seed=0, n_particles=20)
    assert deficit(model, y) < 0.25
    assert model.fit_report_.method == "particle-em"


def test_a_few_iterations_go_up() -> None:
    y = panel()[:2]
    options = {"n_particles": 15, "n_trajectories": 3, "max_iter": 8, "burn_in": 4}
    model = Linear().fit(y, method="particle-em", seed=0, **options)
    assert deficit_drop(model, y) > 1
    assert model.fit_report_.n_iter == 8
    again = Linear().fit(y, method="particle-em", seed=0, **options)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_failure_keeps_the_last_good_parameters() -> None:
    class Cliff(Linear):
        def m_step(self, batch, trajectories, weights):
            self.c.fill_(torch.nan if self.c.item() > 1.5 else self.c.item() + 0.5)

    y = panel()[:2]
    model = Cliff().fit(y, method="particle-em", seed=0, max_iter=10, n_particles=10)
    report = model.fit_report_
    assert report.n_iter == 3
    assert report.messages[0].startswith("iteration 3: the M-step left ['c'] not finite")
    assert abs(model.c.item() - (START[3] + 1.5)) < 1e-12


def test_bad_input_is_refused() -> None:
    y = panel()[0]
    with pytest.raises(ValueError, match="n_particles"):
        Linear().fit(y, method="particle-em", n_particles=1)
    with pytest.raises(ValueError, match="nothing to learn"):
        Linear().requires_grad_(False).fit(y, method="particle-em")
    gap = y.copy()
    gap[3] = np.nan
    report = Fed().fit(gap, method="particle-em", max_iter=3, seed=0).fit_report_
    assert "impute them first" in report.messages[0]
