"""Bounds of every latent deep model on linear-Gaussian data, against the exact likelihood.

Whatever a model has learned, each bound lies below the next in expectation, and all below the
log-likelihood of the model that generated the data, which no other distribution exceeds in
expectation (Gibbs' inequality).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import seqdgm as sq
from seqdgm.models.lstm_ssm import LSTMSSM
from seqdgm.models.srnn import SRNN
from seqdgm.models.storn import STORN
from seqdgm.models.vrnn import VRNN
from seqdgm.models.zforcing import ZForcing

SIZES = {"latent_dim": 2, "hidden_dim": 16, "encoder_dim": 16}
TRAINING = {
    "max_epochs": 25,
    "batch_size": 20,
    "learning_rate": 0.01,
    "kl_warmup": 5,
}
MODELS: dict[str, Callable[..., sq.StateSpaceModel]] = {
    "dmm": sq.DMM,
    "dmm-feedback": lambda **k: sq.DMM(feedback=True, **k),
    "lstm-ssm": LSTMSSM,
    "storn": STORN,
    "vrnn": VRNN,
    "srnn": SRNN,
    "zforcing": ZForcing,
}
# A slow rotation seen through two noisy columns.
GENERATOR = sq.LinearGaussianSSM(
    F=0.95 * np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]]),
    H=np.array([[1.0, 0.0], [0.5, 1.0]]),
    Q=0.2 * np.eye(2),
    R=np.diag([0.2, 0.4]),
    m0=np.zeros(2),
    P0=2.0 * np.eye(2),
)


def series(n: int, seed: int) -> np.ndarray:
    """Series of which a tenth is missing."""
    values = np.array(GENERATOR.sample(10, n, seed=seed).values)
    values[np.random.default_rng(seed).random(values.shape) < 0.1] = np.nan
    return values


def not_below(higher: np.ndarray, lower: np.ndarray) -> None:
    """The mean over the series of what one has over the other is not negative, but for noise."""
    gap = higher - lower
    assert gap.mean() > -5 * gap.std(ddof=1) / len(gap) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_bounds_are_ordered_below_the_exact_likelihood(name: str) -> None:
    model = MODELS[name](**SIZES, **TRAINING).fit(series(60, 1), seed=0)
    new = series(250, 2)
    exact = GENERATOR.log_prob(new).value

    def bound(objective: str, n_particles: int, seed: int, **options: int) -> np.ndarray:
        found = model.log_prob(
            new,
            method="variational",
            objective=objective,
            n_particles=n_particles,
            seed=seed,
            **options,
        )
        assert found.kind == "lower bound"
        return found.value

    elbo = bound("elbo", 32, 0)
    few = bound("iwae", 8, 1, n_replicates=8)
    many = bound("iwae", 64, 2, n_replicates=2)
    not_below(few, elbo)
    not_below(many, few)
    not_below(exact, many)
