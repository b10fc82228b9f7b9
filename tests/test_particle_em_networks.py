"""Particle EM by gradient steps, against the exact maximum of a linear-Gaussian likelihood."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from test_objectives import Linear, batch_of, covariance

import seqdgm as sq
from seqdgm.inference.particle_em import fit_networks
from seqdgm.inference.smc import SMCOptions
from seqdgm.inference.smc import run as run_filter


class Learned(Linear):
    learners = {"particle-em": "particle-em-networks"}  # noqa: RUF012


def simulated(series: int = 30, steps: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    z, out = np.zeros(series), []
    for _ in range(steps):
        z = 0.6 * z + 1.2 * rng.normal(size=series)
        out.append(z + 0.5 * rng.normal(size=series))
    return np.stack(out, 1)[..., None]


def fit(model, batch, **options):
    rng = torch.Generator().manual_seed(0)
    return fit_networks(
        model, batch, method="particle-em", generator=rng, progress=False, **options
    )


def test_it_climbs_to_the_maximum_and_its_proposal_learns_the_posterior() -> None:
    x = simulated()

    def total(theta: np.ndarray) -> float:
        a, q, r = theta
        law = stats.multivariate_normal(cov=covariance(x.shape[1], a, q=q, r=r))
        return float(law.logpdf(x[..., 0]).sum())

    best = optimize.minimize(
        lambda p: -total(np.array([p[0], np.exp(p[1]), np.exp(p[2])])),
        [0.6, 0.3, -1.4],
        method="Nelder-Mead",
    )
    model, batch = Learned(), batch_of(x)
    before = total(np.array([0.8, 0.5, 0.7]))

    def effective() -> float:
        rng = torch.Generator().manual_seed(1)
        return float(run_filter(model, batch, SMCOptions(100), rng).ess.mean())

    fit(model, batch, max_epochs=60, learning_rate=0.03, weight_decay=0.0, batch_size=10)
    report = fit(model, batch, max_epochs=40, learning_rate=0.005, weight_decay=0.0)
    found = total(np.array([p.item() for p in (model.a, model.q, model.r)]))
    print(best.fun, before, found, effective())
    assert -best.fun - before > 5
    assert -best.fun - found < 1.0
    assert report.n_iter == len(report.objective) == 40
    learned = effective()
    with torch.no_grad():
        for name, value in (("w", 0.4), ("v", 0.3), ("s", 0.8)):
            getattr(model, name).fill_(value)
    assert learned > effective() + 10


def test_it_serves_as_a_method_of_a_deep_model() -> None:
    class Deep(sq.DMM):
        learners = {"particle-em": "particle-em-networks"}  # noqa: RUF012

    y = np.sin(np.arange(30) / 3)
    y[4:6] = np.nan
    model = Deep(1, 6, 6, max_epochs=5).fit([y, y[:17]], seed=0)
    again = Deep(1, 6, 6, max_epochs=5).fit([y, y[:17]], seed=0)
    assert model.fit_report_.method == "particle-em"
    assert model.fit_report_.objective == again.fit_report_.objective
    assert not model.training


def test_bad_settings_are_named() -> None:
    batch = batch_of(simulated(2, 4))
    for options, message in (
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"n_particles": 1}, "n_particles"),
        ({"max_epochs": 0}, "max_iter"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Learned(), batch, **options)


def test_a_failing_step_names_the_series_and_keeps_the_weights() -> None:
    class Breaking(Learned):
        steps = 0

        def emission(self, s, u):
            law = super().emission(s, u)
            if self.training and s.ndim == 4:
                self.steps += 1
                if self.steps > 2:
                    law.loc = law.loc * torch.tensor([[[[1.0]]], [[[float("nan")]]]])
            return law

    model = Breaking()
    report = fit(model, batch_of(simulated(2, 4)), max_epochs=9)
    assert report.n_iter == 2
    assert "series 1" in report.messages[0]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
