"""Every model of the package, and a user's own, through the conformance suite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import seqdgm as sq
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
