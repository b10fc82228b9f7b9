"""Panels fitted part by part, where each series has a fit of its own."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

import seqdgm as sq
from seqdgm.transform import Transform

MODELS = {
    "arima": sq.ARIMA((1, 0, 1), trend="c"),
    "fixed": sq.ARIMA((1, 0, 1), fixed={"ar.L1": 0.5, "sigma2": 2.0}),
    "auto": sq.AutoARIMA(),
    "seasonal": sq.AutoARIMA(season=4),
    "structural": sq.StructuralSSM("stochastic", "stochastic"),
    "standardised": sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True, scale="standard"),
    "power": sq.ARIMA((0, 1, 1), transform="boxcox"),
    "given": sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True),
    "known": sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], Q=[[0.5]], R=[[2.0]], diffuse=True),
}


@pytest.fixture
def panel():
    rng = np.random.default_rng(6)
    y = 30 + rng.normal(size=(7, 48, 1)).cumsum(axis=1)
    y[1, 30:] = np.nan
    y[4, 5:8] = np.nan
    y[5] = 30 + rng.normal(size=(48, 1)) + np.tile([3.0, -3.0, 1.0, -1.0], 12)[:, None]
    return y


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 3])
def test_parts_give_the_fit_of_the_whole(panel, name, size, tmp_path):
    options = {"max_iter": 40, "seed": 0}  # fewer than some need
    whole = MODELS[name].clone().fit(panel, **options)
    parted = MODELS[name].clone().fit(panel, partition_size=size, **options)
    assert parted.fitted_ids() == whole.fitted_ids()
    assert parted.state_dict().keys() == whole.state_dict().keys()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(parted.log_prob().value, whole.log_prob().value, rtol=1e-7)
    mean = whole.forecast(5, seed=0).mean
    np.testing.assert_allclose(parted.forecast(5, seed=0).mean, mean, rtol=1e-4)
    a, b = parted.fit_report_, whole.fit_report_
    np.testing.assert_allclose(a.log_likelihood, b.log_likelihood, rtol=1e-7)
    np.testing.assert_allclose(a.objective[-1], b.objective[-1], rtol=1e-7)
    assert len(a.converged) == len(b.converged)
    assert a.method == b.method
    # What belongs to a part belongs to its series.
    alone = parted.forecast(5, panel, seed=0).mean
    np.testing.assert_array_equal(alone, parted.forecast(5, seed=0).mean)
    parted.save(tmp_path / "model.safetensors")
    again = sq.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.forecast(5, seed=0).mean, alone)


def test_several_columns_are_fitted_in_parts():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(5, 80, 3)) + rng.normal(size=(5, 80, 1)).cumsum(axis=1)
    for model in (sq.VARMA((1, 0)), sq.DynamicFactor(1)):
        whole, parted = model.clone().fit(y), model.clone().fit(y, partition_size=2)
        np.testing.assert_allclose(
            parted.log_prob().value, whole.log_prob().value, rtol=1e-6, err_msg=repr(model)
        )


class Drawing(sq.ARIMA):
    """Notes a random number that it draws before each fit."""

    drawn: ClassVar[list[int]] = []

    def build(self, obs_dim, input_dim, **options):
        super().build(obs_dim, input_dim, **options)
        self.drawn.append(int(torch.randint(2**31, ())))


def test_each_part_has_random_numbers_of_its_own(panel):
    for seed in (1, 1, 2):
        Drawing((1, 0, 0)).fit(panel, seed=seed, partition_size=3)
    first, again, other = (Drawing.drawn[k : k + 3] for k in (0, 3, 6))
    assert first == again
    assert len({*first, *other}) == 6


def test_starts_are_kept_series_by_series(panel):
    model = sq.LinearGaussianSSM(latent_dim=1).fit(panel, seed=1, partition_size=3, max_iter=3)
    assert len(model.start_) == 7


def test_inputs_follow_their_series():
    rng = np.random.default_rng(1)
    lengths, frames, known = [40, 25, 33], [], []
    for name, n in zip("cab", lengths, strict=True):
        u = rng.normal(size=n + 2)
        ds = np.arange(n + 2)
        y = 5 + 2 * u[:n] + rng.normal(size=n)
        frames.append(pd.DataFrame({"unique_id": name, "ds": ds[:n], "y": y}))
        known.append(pd.DataFrame({"unique_id": name, "ds": ds, "price": u}))
    y, u = pd.concat(frames), pd.concat(known)
    model = sq.ARIMA((1, 0, 0), trend="c", fixed={"price": 2.0})
    whole = model.clone().fit(y, u)
    parted = model.clone().fit(y, u, partition_size=1)
    torch.testing.assert_close(parted.coefficients_, whole.coefficients_, rtol=1e-5, atol=1e-6)
    assert parted.coefficient_names == whole.coefficient_names
    assert parted.fitted_ids() == whole.fitted_ids()
    np.testing.assert_allclose(
        parted.forecast(2, inputs=u).mean, whole.forecast(2, inputs=u).mean, rtol=1e-5
    )


def test_a_series_that_fails_leaves_the_model_as_it_was(panel):
    model = sq.ARIMA((1, 0, 1)).fit(panel[:2])
    before = model.coefficients_.clone()
    panel[5] = np.nan
    with pytest.raises(ValueError, match="series 5"):
        model.fit(panel, partition_size=2)
    assert torch.equal(model.coefficients_, before)
    assert model.fitted_ids() == (0, 1)


@pytest.mark.parametrize("given", [{"cluster": 3}, {"cluster": ""}, {"partition_size": 0}])
def test_a_bad_choice_is_named(panel, given):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name}="):
        sq.ARIMA((1, 0, 0)).fit(panel, **given)


@pytest.mark.parametrize(
    ("model", "options"), [(sq.RNN(), {}), (sq.ARIMA((1, 0, 0)), {"pooled": True})]
)
def test_parameters_shared_by_the_series_are_not_fitted_apart(panel, model, options):
    with pytest.raises(ValueError, match="shares the parameters over the series"):
        model.fit(panel[[0, 2, 3]], cluster="ray", **options)


def test_maps_of_parts_are_those_of_the_whole():
    one = Transform(None, torch.zeros(1, 2).double(), torch.ones(1, 2).double())
    own = Transform(None, torch.ones(2, 2).double(), torch.full((2, 2), 3.0).double())
    same = Transform.join([one, one], [2, 3])
    assert same.loc.shape == (1, 2)
    both = Transform.join([one, own], [3, 2])
    assert both.loc[:, 0].tolist() == [0, 0, 0, 1, 1]
    assert both.scale[:, 1].tolist() == [1, 1, 1, 3, 3]
