"""The verbs at their edges: names of columns, inputs of the horizon, given models, odd series."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import seqdgm as sq

RNG = np.random.default_rng(0)
U = RNG.normal(size=(100, 1))
Y = 2 * U[:, 0] + 0.1 * RNG.normal(size=100)


def regression() -> sq.ARIMA:
    return sq.ARIMA((0, 0, 0))


def test_mle_of_a_whole_system_runs_and_ends_above_its_start() -> None:
    y = np.cumsum(RNG.normal(size=(60, 1)), axis=0)
    model = sq.LinearGaussianSSM(latent_dim=1, scale="standard").fit(y, method="mle")
    assert model.fit_report_.objective[-1] >= model.fit_report_.objective[0]
    assert np.isfinite(model.log_prob().value).all()


def test_a_tail_without_observations_does_not_end_training() -> None:
    y = np.append(10 + 3 * np.sin(np.arange(80) / 3), np.full(12, np.nan))
    cut = sq.RNN("gru", 8, max_epochs=40).fit(y[:80], seed=0)
    padded = sq.RNN("gru", 8, max_epochs=40).fit(y, seed=0)
    assert max(padded.fit_report_.valid_objective) > padded.fit_report_.valid_objective[0]
    assert abs(padded.log_prob(y[:80]).value[0] - cut.log_prob(y[:80]).value[0]) < 15


def test_columns_in_another_order_are_refused() -> None:
    frame = pd.DataFrame(RNG.normal(size=(40, 2)), columns=["a", "b"])
    model = sq.LinearGaussianSSM(latent_dim=1).fit(frame, max_iter=3)
    with pytest.raises(ValueError, match="in that order"):
        model.forecast(1, frame[["b", "a"]])
    u = pd.DataFrame(RNG.normal(size=(43, 2)), columns=["p", "q"])
    fitted = regression().fit(pd.Series(np.arange(40.0) % 7), inputs=u)
    with pytest.raises(ValueError, match="in that order"):
        fitted.forecast(3, inputs=u[["q", "p"]])


@pytest.mark.parametrize("index", ["integer", "date", "none"])
def test_inputs_of_the_future_and_of_everything_agree(index: str) -> None:
    stamps = {
        "integer": pd.RangeIndex(100),
        "date": pd.date_range("2020-01-01", periods=100, freq="D"),
    }
    y, u = Y[:80], U
    if index != "none":
        y = pd.Series(Y, stamps[index])[:80]
        u = pd.DataFrame(U, stamps[index], columns=["u"])
    model = regression().fit(y, inputs=u[:80])
    beta = model.coefficients_[0, 0].item()
    assert beta == pytest.approx(2, abs=0.1)
    expected = beta * U[80:84, 0]
    np.testing.assert_allclose(model.forecast(4, inputs=u[80:84]).mean[0, :, 0], expected)
    np.testing.assert_allclose(model.forecast(4, inputs=u[:84]).mean[0, :, 0], expected)
    if index == "none":
        with pytest.raises(ValueError, match="horizon alone"):
            model.forecast(4, inputs=u[80:90])
    else:
        np.testing.assert_allclose(model.forecast(4, inputs=u[80:90]).mean[0, :, 0], expected)
    new = Y[80:83] if index == "none" else pd.Series(Y, stamps[index])[80:83]
    model.update(new, inputs=u[80:83])
    whole = regression().fit(Y[:83], inputs=U[:83])
    np.testing.assert_allclose(
        model.log_prob().value, model.log_prob(Y[:83], inputs=U[:83]).value, rtol=1e-9
    )
    assert whole.log_prob().value[0] >= model.log_prob().value[0] - 1e-6


def test_update_takes_its_rows_from_a_table_of_everything() -> None:
    y, u = pd.Series(Y), pd.DataFrame(U, columns=["u"])
    model = regression().fit(y[:80], inputs=u)
    model.update(y[80:83], inputs=u)
    np.testing.assert_array_equal(model.inputs_[0, :, 0], U[:83, 0])


class Summed(sq.StateSpaceModel):
    """A random walk written through absorb: z is the step, the state is the sum."""

    latent_dim = 1

    def initial(self, u):
        return Normal(torch.zeros(1).double(), torch.ones(1).double())

    def prior(self, h, u):
        return self.initial(u)

    def absorb(self, h, z):
        return z if h is None else h + z

    def emission(self, s, u):
        return Normal(s, 0.1)


def test_a_state_that_is_not_z_is_traced_and_not_simulated_backwards() -> None:
    assert not Summed().markov
    y = Summed().sample(12, seed=0).values[0, :, 0]
    holed = y.copy()
    holed[6] = np.nan
    filled = Summed().impute(holed, n_particles=4000, seed=1)
    known = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], Q=[[1.0]], R=[[0.01]], m0=[0.0], P0=[[1.0]])
    assert filled[6] == pytest.approx(known.impute(holed)[6], abs=0.5)


def test_large_values_keep_their_precision() -> None:
    y = 2e8 + RNG.normal(size=40)
    future = sq.RNN("gru", 4, max_epochs=3).fit(y, seed=0).forecast(2, n_samples=200, seed=0)
    lo, hi = future.interval(95)
    assert np.all(hi - lo > 0.1)


def test_forecast_samples_depend_on_their_seed() -> None:
    future = sq.RNN("gru", 4, max_epochs=2).fit(Y[:40], seed=0).forecast(3, n_samples=50, seed=0)
    assert not np.array_equal(future.sample(5, seed=1), future.sample(5, seed=2))
    np.testing.assert_array_equal(future.sample(5, seed=1), future.sample(5, seed=1))
    first, second = (future.log_prob(Y[40:43]).value for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_constant_and_collinear_series_are_survived() -> None:
    panel = [np.cumsum(RNG.normal(size=30)), np.full(30, 3.0)]
    model = sq.LinearGaussianSSM(latent_dim=1).fit(panel, max_iter=20)
    assert np.isfinite(model.forecast(2).mean).all()
    y = np.cumsum(RNG.normal(size=(50, 1)), axis=0)
    double = sq.LinearGaussianSSM(latent_dim=1).fit(np.hstack([y, 2 * y]), max_iter=20)
    assert np.isfinite(double.forecast(2).mean).all()


def test_a_singular_noise_imputes_what_it_determines() -> None:
    model = sq.LinearGaussianSSM(
        F=[[0.5]], H=[[0.0], [0.0]], Q=[[1.0]], R=[[1.0, 1.0], [1.0, 1.0]], m0=[0.0], P0=[[1.0]]
    )
    y = RNG.normal(size=(5, 1)) * np.ones((1, 2))
    holed = y.copy()
    holed[2, 1] = np.nan
    np.testing.assert_allclose(model.impute(holed), y, atol=1e-9)


def test_undetermined_states_are_not_made_up() -> None:
    y = 100 + RNG.normal(size=48)
    y[5::12] = np.nan
    model = sq.SeasonalNaive(12).fit(y)
    for verb in (model.impute, lambda: model.smooth(), lambda: model.forecast(12)):
        with pytest.raises(ValueError, match="diffuse"):
            verb(y) if verb == model.impute else verb()


def test_given_inputs_cannot_be_left_out() -> None:
    model = sq.LinearGaussianSSM(
        F=[[0.5]], H=[[1.0]], Q=[[1.0]], R=[[1.0]], m0=[0.0], P0=[[1.0]], B=[[3.0]], D=[[2.0]]
    )
    for inputs in (None, np.zeros((10, 2))):
        with pytest.raises(ValueError, match="input columns"):
            model.log_prob(np.zeros(10), inputs=inputs)
    assert np.isfinite(model.log_prob(np.zeros(10), inputs=np.zeros(10)).value).all()


def test_a_given_model_in_logs_samples_in_the_units_of_the_data() -> None:
    model = sq.LinearGaussianSSM(
        F=[[1.0]], H=[[1.0]], Q=[[1e-6]], R=[[1e-6]], m0=[5.0], P0=[[1e-6]], transform="log"
    )
    np.testing.assert_allclose(model.sample(4, seed=0).values, np.exp(5), rtol=0.05)


class Pair(sq.StateSpaceModel):
    """A joint emission in single precision."""

    latent_dim = 1

    def initial(self, u):
        return Normal(torch.zeros(1), torch.ones(1))

    def transition(self, z, u):
        return Normal(0.8 * z, 0.5)

    def emission(self, z, u):
        cov = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        return MultivariateNormal(torch.cat([z, z], -1), cov)


def test_a_joint_emission_in_single_precision_fills_its_gaps() -> None:
    y = Pair().sample(15, seed=0).values[0].copy()
    y[4, 0] = np.nan
    y[9] = np.nan
    filled = Pair().impute(y, n_particles=500, seed=0)
    assert np.isfinite(filled).all()
    assert np.isfinite(Pair().forecast(2, y, seed=0).mean).all()


def test_what_cannot_be_learned_is_refused() -> None:
    blank = np.stack([RNG.normal(size=40), np.full(40, np.nan)], 1)
    with pytest.raises(ValueError, match="no observation"):
        sq.RNN("gru", 4, max_epochs=2).fit(blank)
    with pytest.raises(ValueError, match="support"):
        sq.RNN(emission="poisson", transform="log")
    three = sq.ARIMA((1, 0, 0)).fit(RNG.normal(size=(3, 40, 1)))
    with pytest.raises(ValueError, match="without names"):
        three.forecast(1, RNG.normal(size=40))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.forecast(0),
        lambda m: m.forecast(2, n_samples=0),
        lambda m: m.filter(n_particles=-1),
        lambda m: m.log_prob(n_particles=2.5),
        lambda m: m.sample(0),
        lambda m: m.clone().fit(Y, batch_size=0),
        lambda m: m.clone().fit(Y, clip=-1.0),
        lambda m: sq.LinearGaussianSSM(latent_dim=1).fit(Y, max_iter=0),
        lambda m: regression().fit(Y, max_iter=0),
    ],
)
def test_counts_are_checked(call) -> None:
    model = sq.RNN("gru", 4, max_epochs=1).fit(Y[:20], seed=0)
    with pytest.raises(ValueError, match="must be"):
        call(model)


def test_diffuse_observations_have_no_jacobian() -> None:
    """The likelihood of a diffuse level is that of the differences, in any unit."""
    y = sq.datasets.load("nile").y
    one = [[1.0]]
    start = {"F": one, "H": one, "diffuse": True, "learn": ("Q", "R")}
    plain = sq.LinearGaussianSSM(**start).fit(y, tol=1e-12)
    scaled = sq.LinearGaussianSSM(**start, scale="standard").fit(y, tol=1e-12)
    assert float(scaled.log_prob()) == pytest.approx(float(plain.log_prob()), abs=1e-3)
    walk = sq.ARIMA((0, 1, 0), transform="log").fit(y)
    steps, sigma = np.diff(np.log(y)), float(walk.sigma2_) ** 0.5
    density = -0.5 * (steps / sigma) ** 2 - np.log(sigma) - 0.5 * np.log(2 * np.pi) - np.log(y[1:])
    assert float(walk.log_prob()) == pytest.approx(density.sum(), rel=1e-12)
    assert walk.filter().log_likelihood[0] == pytest.approx(density.sum(), rel=1e-12)
    live = sq.ARIMA((0, 1, 0), transform="log")
    live.build(1, 0)
    live.coefficients_, live.sigma2_ = walk.coefficients_, walk.sigma2_
    online = live.online()
    for value in y:
        state, _ = online.step(value)
    assert state.log_likelihood[0] == pytest.approx(density.sum(), rel=1e-12)
