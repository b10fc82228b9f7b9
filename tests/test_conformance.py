"""Every model of the package, and a user's own, through the conformance suite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import seqdgm as sq
from seqdgm.models.stochastic_volatility import StochasticVolatility
from seqdgm.models.switching import SwitchingLinearSSM
from seqdgm.testing import CHECKS, check_model

SMALL = {"max_epochs": 3, "patience": 2}


class NoisyLevel(sq.StateSpaceModel):
    """A user's model: a local level with known variances."""

    latent_dim = 1

    def initial(self, u):
        return Normal(20 * torch.ones(1), 5 * torch.ones(1))

    def transition(self, z, u):
        return Normal(z, 1.0)

    def emission(self, z, u):
        return Normal(z, 3.0)


def counts() -> np.ndarray:
    return np.random.default_rng(3).poisson(4.0, size=40).astype(float)


def two_columns() -> np.ndarray:
    rng = np.random.default_rng(5)
    level = np.cumsum(rng.normal(size=40))
    return np.stack([level + rng.normal(size=40), 10 - level + rng.normal(size=40)], 1)


def returns() -> np.ndarray:
    return StochasticVolatility(mu=-1.0, rho=0.9, sigma=0.4).sample(60, seed=1).values[0]


def switching() -> SwitchingLinearSSM:
    """A level that steps calmly or wildly, seen by two columns."""
    return SwitchingLinearSSM(
        Pi=[[0.9, 0.1], [0.3, 0.7]],
        F=[[1.0]],
        H=[[1.0], [-1.0]],
        Q=[[[0.5]], [[4.0]]],
        R=[[1.0, 0.2], [0.2, 2.0]],
        P0=[[100.0]],
        d=[0.0, 10.0],
    )


MODELS = {
    "seasonal naive": (sq.SeasonalNaive(12), None),
    "random walk": (sq.SeasonalNaive(1, transform="log"), None),
    "arima": (sq.ARIMA((1, 1, 1)), None),
    "seasonal arima in logs": (
        sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 12), transform="log"),
        None,
    ),
    "arima with a constant": (sq.ARIMA((1, 0, 0), trend="c"), None),
    "local level": (sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True), None),
    "linear system": (sq.LinearGaussianSSM(latent_dim=2, scale="standard"), two_columns()),
    "gru": (sq.RNN("gru", 6, **SMALL), None),
    "lstm on counts": (sq.RNN("lstm", 6, 2, emission="negbinomial", **SMALL), counts()),
    "rnn on categories": (sq.RNN("gru", 6, emission="categorical", **SMALL), counts() // 4),
    "rnn on bits": (sq.RNN("gru", 6, emission="bernoulli", **SMALL), (counts() > 4).astype(float)),
    "rnn with heavy tails": (sq.RNN("gru", 6, emission="studentt", **SMALL), two_columns()),
    "dmm": (sq.DMM(2, 6, 6, **SMALL), None),
    "dmm in logs": (sq.DMM(2, 6, 6, transform="log", scale="mean", **SMALL), None),
    "dmm on counts": (sq.DMM(2, 6, 6, emission="negbinomial", **SMALL), counts()),
    "dmm on two columns": (sq.DMM(2, 6, 6, emission="studentt", **SMALL), two_columns()),
    "stochastic volatility": (StochasticVolatility(mu=-1.0, rho=0.9, sigma=0.4), returns()),
    "learned volatility": (StochasticVolatility("studentt", mean=None), returns()),
    "volatility with leverage": (
        StochasticVolatility(leverage=True, mu=-1.0, rho=0.9, sigma=0.4, correlation=-0.5),
        returns(),
    ),
    "heavy-tailed volatility with leverage": (
        StochasticVolatility(
            "studentt", True, mu=-1.0, rho=0.9, sigma=0.4, df=6.0, correlation=-0.5
        ),
        returns(),
    ),
    "switching level": (switching(), two_columns()),
    "a user's model": (NoisyLevel(), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_conforms(name: str) -> None:
    model, y = MODELS[name]
    assert check_model(model, y) == tuple(CHECKS)


def test_the_suite_can_fail() -> None:
    class Forgetful(NoisyLevel):
        """Ignores the seed."""

        def emission(self, z, u):
            return Normal(z + torch.randn(()), 3.0)

    with pytest.raises(AssertionError, match="seeds"):
        check_model(Forgetful())
