"""One observation at a time by particles, against all at once, the Kalman filter and exact laws."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import seqdgm as sq

RNG = np.random.default_rng(0)
WAVE = np.sin(np.arange(40) / 3) + 0.2 * RNG.standard_normal(40)
SMALL = {"latent_dim": 2, "hidden_dim": 4, "encoder_dim": 4, "max_epochs": 2}
LATENT = [sq.DMM, sq.LSTMSSM, sq.STORN, sq.VRNN, sq.SRNN, sq.ZForcing]


class Walk(sq.StateSpaceModel):
    """A random walk from N(0, 1) in noise."""

    latent_dim = 1
    engines = ("particle",)

    def initial(self, u):
        return Normal(torch.zeros(1, dtype=torch.float64), 1.0)

    def transition(self, z, u):
        return Normal(z, 0.5**0.5)

    def emission(self, z, u):
        return Normal(z, 1.0)


def exact() -> sq.LinearGaussianSSM:
    return sq.LinearGaussianSSM(
        F=[[1.0]], H=[[1.0]], Q=[[0.5]], R=[[1.0]], m0=[0.0], P0=[[1.0]], diffuse=False
    )


class Clock(sq.StateSpaceModel):
    """No state: the observation is the number of its step and its input, in noise."""

    latent_dim = 0
    engines = ("particle",)

    def __init__(self, inputs: int = 0) -> None:
        super().__init__()
        self.inputs = inputs

    def input_width(self) -> int:
        return self.inputs

    def start(self, batch_shape):
        return torch.zeros(*batch_shape, 1, dtype=torch.float64)

    def prior(self, h, u):
        return None

    def absorb(self, h, z):
        return h

    def report(self, h, z):
        return h

    def emission(self, s, u):
        return Normal(s + u.t[..., None] + u.values.sum(-1, keepdim=True), 1.0)


def test_moments_and_forecasts_are_those_of_the_kalman_filter() -> None:
    y = exact().sample(12, seed=1).values[0, :, 0].copy()
    y[[3, 11]] = np.nan
    found: list[list[float]] = []
    for seed in range(20):
        online = Walk().online(n_particles=500, seed=seed)
        for x in y:
            state, forecast = online.step(x)
        found.append([state.mean.item(), state.cov.item(), forecast.mean.item()])
        found[-1].append(forecast.std.item() ** 2)
        assert state.n_steps.tolist() == [12]
    whole, ahead = exact().filter(y), exact().forecast(1, y)
    mean, cov = whole.mean[0, -1, 0], whole.cov[0, -1, 0, 0]
    expected = [mean, cov, ahead.mean.item(), cov + 0.5 + 1.0]
    runs = np.array(found)
    stderr = runs.std(0, ddof=1) / np.sqrt(20)
    # A variance by n draws is too small by 1/n of itself.
    assert (np.abs(runs.mean(0) - expected) < 5 * stderr + np.array([0, 1, 0, 1]) * 3e-3).all()


def test_the_likelihood_is_unbiased() -> None:
    y = exact().sample(8, seed=2).values[0, :, 0]
    target = exact().log_prob(y).value.item()
    ratios = []
    for seed in range(200):
        online = Walk().online(n_particles=30, seed=seed)
        for x in y:
            state, _ = online.step(x)
        ratios.append(np.exp(state.log_likelihood.item() - target))
    assert abs(np.mean(ratios) - 1) < 5 * np.std(ratios, ddof=1) / np.sqrt(200)


@pytest.mark.parametrize("model", LATENT)
@pytest.mark.parametrize("network", ["smoothing", "filtering"])
def test_latent_models_go_on_from_their_data(model: Any, network: str) -> None:
    """A step at a time has the likelihood of all at once, with a window shorter than the data."""
    fitted = model(**SMALL, inference_network=network).fit(WAVE[:30], seed=0)
    values = {"all": [], "online": []}
    for seed in range(20):
        whole = fitted.log_prob(WAVE, n_particles=200, seed=seed, method="particle")
        values["all"].append(whole.value.item())
        online = fitted.online(n_particles=200, seed=100 + seed, window=6)
        for x in WAVE[30:]:
            state, forecast = online.step(x)
        values["online"].append(state.log_likelihood.item())
        assert np.isfinite(forecast.draws).all()
    # Means of the likelihood itself, whose estimates are unbiased.
    top = max(values["all"])
    a, b = (np.exp(np.array(v) - top) for v in values.values())
    stderr = np.hypot(a.std(ddof=1), b.std(ddof=1)) / np.sqrt(20)
    assert abs(a.mean() - b.mean()) < 5 * stderr


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_model_without_random_states_is_exact(cell: str) -> None:
    model = sq.RNN(cell, 4, max_epochs=2, season=12).fit(WAVE[:30], seed=0)
    online = model.online(n_particles=4000, seed=0)
    assert online.predict().draws.shape == (1, 4000, 1)
    for x in WAVE[30:]:
        state, forecast = online.step(x)
    whole = model.filter(WAVE)
    np.testing.assert_allclose(state.mean, whole.mean[:, -1], atol=1e-6)
    np.testing.assert_allclose(state.log_likelihood, model.log_prob(WAVE).value, rtol=1e-5)
    assert not state.cov.any()
    ahead = model.forecast(1, WAVE, n_samples=4000, seed=1)
    spread = ahead.sample(4000).std()
    assert abs(forecast.mean - ahead.mean[:, 0]).item() < 5 * spread * np.sqrt(2 / 4000)
    assert abs(forecast.std / spread - 1).item() < 5 / np.sqrt(4000)


def test_what_is_read_back_and_missing_is_drawn() -> None:
    model = sq.RNN("gru", 4, max_epochs=2).fit(WAVE[:20], seed=0)
    y = WAVE.copy()
    y[[25, 26, 33]] = np.nan
    values: dict[str, list[float]] = {"all": [], "online": []}
    for seed in range(20):
        values["all"].append(model.log_prob(y, n_particles=300, seed=seed).value.item())
        online = model.online(n_particles=300, seed=100 + seed)
        for x in y[20:]:
            state, _ = online.step(x)
        values["online"].append(state.log_likelihood.item())
        assert state.cov.max() > 0
    a, b = (np.exp(np.array(v) - max(values["all"])) for v in values.values())
    assert abs(a.mean() - b.mean()) < 5 * np.hypot(a.std(ddof=1), b.std(ddof=1)) / np.sqrt(20)


def test_every_series_has_its_own_clock_and_inputs() -> None:
    lengths, more = (5, 9, 7), 4
    u = [RNG.standard_normal((n + more, 1)) for n in lengths]
    y = [np.arange(float(n + more)) + RNG.standard_normal(n + more) for n in lengths]
    for inputs in (0, 1):
        model = Clock(inputs)
        given = {"inputs": [part[:-more] for part in u]} if inputs else {}
        online = model.fit([part[:-more] for part in y], **given).online(n_particles=2000, seed=0)
        for k in range(more):
            at = [n + k for n in lengths]
            step = {"inputs": [part[t] for part, t in zip(u, at, strict=True)]} if inputs else {}
            now = [[part[t]] for part, t in zip(y, at, strict=True)]
            state, forecast = online.step(now, **step)
        known = {"inputs": u} if inputs else {}
        np.testing.assert_allclose(state.log_likelihood, model.log_prob(y, **known).value)
        assert state.n_steps.tolist() == [n + more for n in lengths]
        if inputs:
            assert forecast is None
            forecast = online.predict([[10.0]] * 3)
        expected = np.array([n + more + 10.0 * inputs for n in lengths])
        assert (np.abs(forecast.mean[:, 0] - expected) < 5 / np.sqrt(2000)).all()


def test_data_units_and_their_density() -> None:
    y = np.exp(WAVE)
    model = sq.RNN("gru", 4, transform="log", max_epochs=2).fit(y[:30], seed=0)
    online = model.online(n_particles=100, seed=0)
    for x in y[30:]:
        state, forecast = online.step(x)
    np.testing.assert_allclose(state.log_likelihood, model.log_prob(y).value, rtol=1e-5)
    assert (forecast.draws > 0).all()
    with pytest.raises(ValueError, match="40: value -1 is not positive"):
        online.step(-1.0)


def held() -> tuple[int, int]:
    """Tensors that exist, and their elements."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return len(tensors), sum(x.numel() for x in tensors)


def test_memory_does_not_grow() -> None:
    online = sq.DMM(**SMALL).fit(WAVE, seed=0).online(n_particles=20, seed=0, window=4)
    sizes = []
    for _ in range(3):
        for _ in range(10):
            online.step(1.0)
        sizes.append(held())
    assert sizes[0] == sizes[1] == sizes[2]


def test_bad_steps_change_nothing() -> None:
    y = (RNG.random((2, 12, 3)) < 0.5).astype(float)
    model = sq.DMM(**SMALL, emission="bernoulli").fit(y, seed=0)
    online = model.online(n_particles=50, seed=0)
    online.step(y[:, 0])
    for x, message in (
        (np.full((2, 3), 0.5), "series 0, column .* at 13: the value 0.5 cannot occur"),
        (np.zeros((2, 2)), "x has shape"),
        (np.full((2, 3), np.inf), "infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            online.step(x)
    after, _ = online.step(y[:, 1])
    again = model.online(n_particles=50, seed=0)
    for t in range(2):
        expected, _ = again.step(y[:, t])
    np.testing.assert_array_equal(after.log_likelihood, expected.log_likelihood)
    assert after.n_steps.tolist() == [14, 14]
    with pytest.raises(ValueError, match="no options"):
        model.online(windows=3)
    with pytest.raises(ValueError, match="window=1"):
        model.online(window=1)
    with pytest.raises(ValueError, match="n_particles"):
        model.online(n_particles=0)
    with pytest.raises(ValueError, match="not fitted"):
        sq.VRNN().online()


def test_the_width_of_a_model_that_was_written_down_is_that_of_its_emission() -> None:
    class Pair(Walk):
        def emission(self, z, u):
            return Normal(z.expand(*z.shape[:-1], 2), 1.0)

    online = Pair().online(n_series=3, n_particles=20, seed=0)
    assert (online.n_series, online.n_dims) == (3, 2)
    state, forecast = online.step(np.zeros((3, 2)))
    assert state.mean.shape == (3, 1)
    assert forecast.mean.shape == (3, 2)


def test_an_impossible_observation_names_its_step() -> None:
    class Sure(Walk):
        def emission(self, z, u):
            return torch.distributions.Uniform(z - 1, z + 1, validate_args=False)

    online = Sure().online(n_particles=20, seed=0)
    for _ in range(3):
        online.step(0.0)
    with pytest.raises(ValueError, match="step 3: every particle has weight zero"):
        online.step(1000.0)
    state, _ = online.step(0.0)
    assert state.n_steps.tolist() == [4]


def test_seeds_decide_and_the_model_stays() -> None:
    model = sq.SRNN(**SMALL).fit(WAVE, seed=0)
    held = model.data_
    runs = []
    for seed in (1, 1, 2):
        online = model.online(n_particles=30, seed=seed)
        runs.append([online.step(x)[0].mean.item(0) for x in (0.0, np.nan, 1.0)])
    assert runs[0] == runs[1] != runs[2]
    assert model.data_ is held


def test_other_models_step_too() -> None:
    model = sq.StochasticVolatility(mu=-1.0, rho=0.9, sigma=0.3)
    y = model.sample(30, seed=0).values[0, :, 0]
    online = model.online(n_particles=200, seed=0)
    for x in y:
        state, forecast = online.step(x)
    assert np.isfinite(state.log_likelihood).all()
    assert forecast.draws.shape == (1, 200, 1)


def switching() -> sq.SwitchingLinearSSM:
    """A quick and a slow regime."""

    def of(quick: float, slow: float) -> np.ndarray:
        return np.array([[[quick]], [[slow]]])

    return sq.SwitchingLinearSSM(
        Pi=[[0.9, 0.1], [0.1, 0.9]],
        F=of(0.2, 0.9),
        H=of(1.0, 1.0),
        Q=of(1.0, 0.1),
        R=of(0.5, 0.5),
        m0=np.zeros((2, 1)),
        P0=of(1.0, 1.0),
    )


def test_the_part_that_is_exact_given_the_rest_stays_exact() -> None:
    y = switching().sample(25, seed=0).values[0, :, 0].copy()
    y[[4, 24]] = np.nan
    found: dict[str, list[list[float]]] = {"all": [], "online": []}
    for seed in range(20):
        whole = switching().filter(y, n_particles=300, seed=seed)
        ahead = switching().forecast(1, y, n_samples=300, seed=seed)
        std = ahead.sample(300).std()
        moments = [whole.mean[0, -1, 0], whole.cov[0, -1, 0, 0], whole.mean[0, -1, 1]]
        found["all"].append([*moments, whole.log_likelihood[0], ahead.mean.item(), std])
        online = switching().online(n_particles=300, seed=100 + seed)
        for x in y:
            state, forecast = online.step(x)
        moments = [state.mean[0, 0], state.cov[0, 0, 0], state.mean[0, 1]]
        found["online"].append([*moments, state.log_likelihood[0]])
        found["online"][-1] += [forecast.mean.item(), forecast.std.item()]
    a, b = (np.array(runs) for runs in found.values())
    stderr = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / 20)
    assert (np.abs(a.mean(0) - b.mean(0)) < 5 * stderr).all()
