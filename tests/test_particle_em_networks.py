"""Particle EM by gradient steps, against the exact maximum of a linear-Gaussian likelihood."""

from __future__ import annotations

import re

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


def simulated(series: int, steps: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    z, out = np.zeros(series), []
    for _ in range(steps):
        z = 0.8 * z + rng.normal(size=series)
        out.append(z + 0.6 * rng.normal(size=series))
    return np.stack(out, 1)[..., None]


def fit(model, batch, **options):
    rng = torch.Generator().manual_seed(0)
    return fit_networks(
        model, batch, method="particle-em", generator=rng, progress=False, **options
    )


@pytest.mark.slow
def test_it_climbs_to_the_maximum_and_its_proposal_learns_the_posterior() -> None:
    x = simulated(40, 8)

    def total(a: float, q: float, r: float) -> float:
        law = stats.multivariate_normal(cov=covariance(8, a, q=q, r=r))
        return float(law.logpdf(x[..., 0]).sum())

    best = optimize.minimize(
        lambda p: -total(p[0], np.exp(p[1]), np.exp(p[2])), [0.8, 0.0, -1.0], method="Nelder-Mead"
    )
    model, batch = Learned(), batch_of(x)
    with torch.no_grad():
        for p, value in ((model.a, 0.2), (model.q, 2.0), (model.r, 2.0)):
            p.fill_(value)

    def deficit() -> float:
        return -best.fun - total(model.a.item(), model.q.item(), model.r.item())

    def effective() -> float:
        rng = torch.Generator().manual_seed(1)
        return float(run_filter(model, batch, SMCOptions(100), rng).ess.mean())

    assert deficit() > 20
    options = {"weight_decay": 0.0, "batch_size": 20}
    fit(model, batch, max_epochs=35, learning_rate=0.05, **options)
    report = fit(model, batch, max_epochs=20, learning_rate=0.005, **options)
    assert deficit() < 1.5
    assert report.n_iter == len(report.objective) == 20
    learned = effective()
    with torch.no_grad():
        for p, value in ((model.w, 0.4), (model.v, 0.3), (model.s, 0.8)):
            p.fill_(value)
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
    assert re.search("series [01]: .* not finite", report.messages[0])
    assert all(bool(p.isfinite().all()) for p in model.parameters())
