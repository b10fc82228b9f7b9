"""Deep models under settings that cannot work, data they cannot take and training that diverges."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import seqdgm as sq
from seqdgm.inference.objectives import Objective
from seqdgm.inference.particle_scan import _drawable
from seqdgm.nn.gates import GatedCell

SMALL = {"latent_dim": 2, "hidden_dim": 4, "encoder_dim": 4}
LATENT = [sq.DMM, sq.LSTMSSM, sq.STORN, sq.VRNN, sq.SRNN, sq.ZForcing]
METHODS = ["elbo", "iwae", "fivo", "rws"]


def frame(length: int = 12) -> pd.DataFrame:
    """Three named series."""
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame({"unique_id": name, "ds": range(length), "y": rng.normal(size=length)})
        for name in "abc"
    ]
    return pd.concat(parts, ignore_index=True)


def chords(*, missing: int = 0) -> np.ndarray:
    """Three series of 12 bits; `missing` leading ones of series 2 at step 4 are missing."""
    y = (np.random.default_rng(1).random((3, 10, 12)) < 0.5).astype(float)
    y[2, 4, :missing] = np.nan
    return y


# Training that diverges


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", LATENT)
def test_a_run_that_diverges_from_its_start_names_a_series(model, method: str) -> None:
    fitted = model(**SMALL, max_epochs=2, kl_warmup=0)
    options = {"method": method, "learning_rate": 1e8, "batch_size": 1, "valid_fraction": 0.0}
    with pytest.raises(ValueError, match=r"epoch 0: .*series '[abc]' .*not applied"):
        fitted.fit(frame(), seed=0, **options)
    assert fitted.fit_report_ is None


def test_weights_of_particles_that_cannot_be_drawn_are_equal() -> None:
    nan, inf = float("nan"), float("inf")
    log_w = torch.tensor([[0.0, -inf, 1.0], [nan, 0.0, 0.0], [inf, 0.0, 0.0], [-inf, -inf, -inf]])
    found = _drawable(log_w)
    assert torch.equal(found[0], log_w[0])
    assert torch.equal(found[1:], torch.zeros(3, 3))


def test_a_gradient_that_is_not_finite_names_the_minibatch() -> None:
    class Steep(sq.RNN):
        def emit(self, features):
            law = super().emit(features)
            # The root has the value 0 and an infinite slope there.
            wild = torch.sqrt(features[0].sum(-1, keepdim=True) * 0)
            return torch.distributions.Normal(law.loc + wild, law.scale, validate_args=False)

    with pytest.raises(ValueError, match=r"gradient of series ('[abc]'(, )?){3} was not finite"):
        Steep("gru", 4, max_epochs=2).fit(frame(), seed=0, valid_fraction=0.0)


def test_a_validation_without_a_finite_objective_names_the_series() -> None:
    y = frame()
    y.loc[(y.unique_id == "b") & (y.ds == 11), "y"] = 3e19  # its square overflows
    with pytest.raises(ValueError, match=r"finite validation objective \(series 'b'"):
        sq.RNN("gru", 4, scale=None, max_epochs=3).fit(y, seed=0)


def test_patience_is_counted_from_the_best_epoch_without_a_divergence() -> None:
    noise = np.random.default_rng(0).normal(size=40)
    options = {"kl_warmup": 50, "learning_rate": 0.5}
    report = sq.RNN("gru", 4, max_epochs=100, patience=2).fit(noise, seed=0, **options).fit_report_
    assert report.n_iter == int(np.argmax(report.valid_objective)) + 3 < 50


# Precision


@pytest.mark.parametrize("method", ["iwae", "fivo", "rws"])
def test_particle_objectives_in_mixed_precision(method: str) -> None:
    model = sq.DMM(**SMALL, max_epochs=2, kl_warmup=0)
    model.fit(frame(), method=method, precision="bf16-mixed", seed=0)
    assert np.isfinite(model.fit_report_.valid_objective).all()


@pytest.mark.parametrize("emission", ["negbinomial", "poisson", "studentt", "mixture"])
def test_every_draw_works_in_mixed_precision(emission: str) -> None:
    y = np.random.default_rng(0).poisson(3, size=(2, 15)).astype(float)
    y[0, 5] = np.nan
    model = sq.RNN("gru", 4, emission=emission, max_epochs=2)
    model.fit(y, precision="bf16-mixed", seed=0)
    assert np.isfinite(model.fit_report_.objective).all()


# Missing values


@pytest.mark.parametrize("model", [sq.RNN("gru", 4), sq.DMM(**SMALL), sq.VRNN(**SMALL)])
def test_vectors_that_miss_too_many_elements_are_named(model: sq.StateSpaceModel) -> None:
    model = model.clone().set_params(emission="nade", max_epochs=1)
    with pytest.raises(ValueError, match=r"series 2 at 4: the vector of 12 misses more .*Gaussian"):
        model.fit(chords(missing=9), seed=0)
    fitted = model.fit(chords(missing=8), seed=0)
    with pytest.raises(ValueError, match="series 2 at 4"):
        fitted.filter(chords(missing=9), n_particles=3)


def test_imputation_draws_values_that_can_occur() -> None:
    y = chords(missing=4)
    y[0, 7] = np.nan
    model = sq.DMM(**SMALL, emission="bernoulli", max_epochs=1).fit(y, seed=0)
    drawn = [model.impute(y, draw=True, n_particles=30, seed=k) for k in (1, 1, 2)]
    assert set(np.unique(drawn[0])) == {0.0, 1.0}
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    seen = np.isfinite(y)
    np.testing.assert_array_equal(drawn[0][seen], y[seen])
    assert np.isfinite(model.log_prob(drawn[0], n_particles=10, seed=0).value).all()


def test_drawn_imputations_have_the_moments_of_the_smoother() -> None:
    """A random walk seen at two ends: the gap's law is that of a Brownian bridge."""
    q = 0.5
    walk = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], Q=[[q]], R=[[0.0]], diffuse=True)
    y = np.array([1.0, np.nan, np.nan, np.nan, 3.0])
    s = np.arange(1, 4)
    mean = 1 + 2 * s / 4
    cov = q * np.minimum.outer(s, s) - q * np.outer(s, s) / 4
    draws = np.array([walk.impute(y, draw=True, seed=k)[1:4] for k in range(400)])
    stderr = np.sqrt(np.diag(cov) / 400)
    assert (np.abs(draws.mean(0) - mean) < 5 * stderr).all()
    found = np.cov(draws.T)
    spread = np.sqrt((cov**2 + np.outer(np.diag(cov), np.diag(cov))) / 400)
    assert (np.abs(found - cov) < 5 * spread).all()


# Settings


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sq.RNN(emission="bernoulli", scale="unit"), "scale='unit' is unknown"),
        (lambda: sq.DMM(2, 4, 4).fit(frame(), threshold=0.3), "threshold goes with 'fivo'"),
        (lambda: sq.RNN("gru", 4).fit(frame(), free_bits=0.3), "RNN has no divergence"),
        (lambda: sq.Noisin().fit(frame(), free_bits=0.3), "Noisin has no divergence"),
        (lambda: sq.RNN("gru", 4).fit(frame(), n_particles=3), "RNN has no latent states"),
        (lambda: Objective("fivo", 4, 0.0, resampling_gradients=True), "threshold above 0"),
        (lambda: Objective("fivo", 1, resampling_gradients=True), "at least 2 particles"),
    ],
)
def test_options_without_effect_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_options_of_another_bound_are_refused() -> None:
    model = sq.DMM(**SMALL, max_epochs=1).fit(frame(), seed=0)
    for option in ({"threshold": 0.4}, {"n_replicates": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} goes with"):
            model.log_prob(method="variational", **option)
    with pytest.raises(ValueError, match="objective='vi' is unknown"):
        model.log_prob(method="variational", objective="vi")
    with pytest.raises(ValueError, match=r"choose 'auto' or one of \['particle'\]"):
        model.forecast(3, method="variational")


def test_sizes_may_be_of_any_number_type() -> None:
    model = sq.DMM(np.int64(2), 4.0, np.int32(4), season=12.0, max_epochs=1).fit(frame(), seed=0)
    found = {name: model.get_params()[name] for name in (*SMALL, "season")}
    assert found == {**SMALL, "season": 12}
    assert all(type(value) is int for value in found.values())


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_starts_of_recurrent_cells_do_not_decay(kind: str) -> None:
    cell = GatedCell(kind, 3)
    assert cell.start.ndim == 3
    state = cell.initial_state((5, 2))
    assert len(state) == (2 if kind == "lstm" else 1)
    assert all(part.shape == (5, 2, 3) for part in state)


# Every emission under every model

EMISSIONS = {
    "gaussian": "real",
    "gaussian-full": "real",
    "gaussian-lowrank": "real",
    "studentt": "real",
    "mixture": "real",
    "flow": "real",
    "bernoulli": "bits",
    "nade": "bits",
    "poisson": "counts",
    "negbinomial": "counts",
    "categorical": "codes",
}


def vectors(kind: str) -> np.ndarray:
    """Two series of three columns (one, of codes), with a missing element and a missing vector."""
    rng = np.random.default_rng(4)
    shape = (2, 9, 1 if kind == "codes" else 3)
    y = {
        "real": lambda: rng.normal(size=shape),
        "bits": lambda: (rng.random(shape) < 0.4).astype(float),
        "counts": lambda: rng.poisson(2.0, shape).astype(float),
        "codes": lambda: rng.integers(0, 3, shape).astype(float),
    }[kind]()
    y[0, 3, 0] = y[1, 5] = np.nan
    return y


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("model", [*LATENT, sq.Noisin, sq.RNN])
def test_every_emission_works_under_every_model(model, emission: str) -> None:
    sizes = SMALL if model in LATENT else {"hidden_dim": 4}
    y = vectors(EMISSIONS[emission])
    fitted = model(**sizes, emission=emission, max_epochs=1).fit(y, seed=0)
    assert np.isfinite(fitted.fit_report_.objective).all()
    assert np.isfinite(fitted.log_prob(n_particles=5, seed=0).value).all()
    assert np.isfinite(fitted.forecast(2, n_samples=5, seed=0).mean).all()
    filled = fitted.impute(y, draw=True, n_particles=5, seed=0)
    np.testing.assert_array_equal(filled[np.isfinite(y)], y[np.isfinite(y)])
    state, ahead = fitted.online(n_particles=5, seed=0).step(y[:, 3])
    assert np.isfinite(state.log_likelihood).all()
    if emission in ("bernoulli", "nade"):
        assert set(np.unique(ahead.draws)) <= {0.0, 1.0}
        assert set(np.unique(filled)) <= {0.0, 1.0}
