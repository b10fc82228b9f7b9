"""Forecasts of models whose memory the data determine, which go through their history once."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

import seqdgm as sq
from seqdgm.inference import particle
from seqdgm.models.noisin import Noisin

N = 4000
HORIZON = 4
MODELS = {
    "lstm": sq.RNN(hidden_dim=6, season=4, max_epochs=3),
    "gru": sq.RNN("gru", hidden_dim=6, layers=2, season=4, max_epochs=3),
    "counts": sq.RNN(hidden_dim=6, season=4, emission="poisson", max_epochs=3),
    "noisin": Noisin(hidden_dim=6, season=4, max_epochs=3),
}


def data():
    """Series of unequal lengths, and covariates of theirs that go on over the horizon."""
    rng = np.random.default_rng(5)
    u = [rng.normal(size=(n + HORIZON, 1)) for n in (20, 13, 17)]
    return [rng.poisson(np.exp(1 + 0.5 * x[:-HORIZON, 0])).astype(float) for x in u], u


@pytest.mark.parametrize("name", MODELS)
def test_trajectories_are_those_of_particles_that_went_through_the_history(name, monkeypatch):
    y, known = data()
    model = MODELS[name].clone().fit(y, [x[:-HORIZON] for x in known], seed=0)
    how = {"inputs": known, "n_samples": N}
    found = model.forecast(HORIZON, seed=1, **how)
    with monkeypatch.context() as patch:
        patch.setattr(particle, "_deterministic", lambda model, batch: False)
        slow = model.forecast(HORIZON, seed=2, **how)
    a, b = found.sample(N, seed=0), slow.sample(N, seed=0)
    assert a.shape == b.shape == (3, N, HORIZON, 1)
    for moment in (lambda x: x, lambda x: (x - x.mean(1, keepdims=True)) ** 2):
        left, right = moment(a), moment(b)
        error = np.sqrt((left.var(1) + right.var(1)) / N)
        assert (np.abs(left.mean(1) - right.mean(1)) < 5 * error).all()
    # Steps of one trajectory belong together.
    both = [(x[:, :, 0] - x[:, :, 0].mean(1)[:, None]) * x[:, :, 1] for x in (a, b)]
    error = np.sqrt(sum(x.var(1) for x in both) / N)
    assert (np.abs(both[0].mean(1) - both[1].mean(1)) < 5 * error).all()


def test_states_of_the_forecast_continue_those_of_the_filter():
    y, _ = data()
    model = sq.RNN(hidden_dim=6, max_epochs=2).fit(y, seed=0)
    held = np.concatenate([y[0], [3.0]])
    ahead = model.forecast(1, [y[0]], n_samples=7, seed=0)
    after = model.filter([held]).mean[0, -1]
    assert_allclose(ahead.states.mean[0, 0], after, rtol=1e-5)
    step = model.log_prob([held]).value - model.log_prob([y[0]]).value
    assert_allclose(ahead.log_prob([[3.0]]).value, step, rtol=1e-4)
