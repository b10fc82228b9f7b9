"""Small versions of the deep models learn real music: better than each key's own Markov chain."""

from __future__ import annotations

import os

import pytest

import seqdgm as sq

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "SEQDGM_DATA" not in os.environ,
        reason="SEQDGM_DATA is not set: it names the folder of the published files",
    ),
]
MARKOV_CHAIN = 10.47  # nats a step of the test part, from the counts of the training part
SIZES = {"latent_dim": 16, "hidden_dim": 48, "encoder_dim": 48}
MODELS = {
    "RNN": (sq.RNN, {"hidden_dim": 64}, "mle"),
    "Noisin": (sq.Noisin, {"hidden_dim": 64}, "elbo"),
    "DMM": (sq.DMM, SIZES, "elbo"),
    "DMM with feedback": (sq.DMM, {**SIZES, "feedback": True}, "iwae"),
    "STORN": (sq.STORN, SIZES, "elbo"),
    "VRNN": (sq.VRNN, SIZES, "fivo"),
    "SRNN": (sq.SRNN, SIZES, "elbo"),
    "ZForcing": (sq.ZForcing, SIZES, "elbo"),
    "LSTMSSM": (sq.LSTMSSM, SIZES, "elbo"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_small_network_is_below_the_markov_chain(name: str) -> None:
    kind, sizes, method = MODELS[name]
    music = sq.datasets.load("jsb")
    model = kind(**sizes, emission="bernoulli", max_epochs=25, learning_rate=5e-3, batch_size=20)
    model.fit(music.train, valid=music.valid, method=method, seed=0, schedule="cosine")
    options = {"n_particles": 1} if model.has_proposal else {}
    method = "variational" if model.has_proposal else "auto"
    found = model.log_prob(music.test, seed=0, method=method, **options)
    steps = sq.Panel.of(music.test).lengths.sum()
    assert -found.value.sum() / steps < MARKOV_CHAIN
