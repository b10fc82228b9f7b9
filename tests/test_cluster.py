"""Backtests in partitions, on this process and on a Ray cluster of two workers."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cluster_models import AlwaysDeadly, Choosy, Deadly, DeadlyARIMA
from standins import Fragile, LastValue

import seqdgm as sq
from seqdgm.evaluation import backtest, compare

LIKE = {"check_exact": True}
TIMES = ["fit_seconds", "forecast_seconds", "peak_mb"]


@pytest.fixture
def panel():
    rng = np.random.default_rng(2)
    return 20 + rng.normal(size=(7, 40, 1)).cumsum(axis=1)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    here = str(Path(__file__).parent)  # where the workers find the models of the tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", here, prepend=os.pathsep)
        _start(ray)
    yield ray
    ray.shutdown()


def _start(ray):
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )


def same(a, b):
    pd.testing.assert_frame_equal(a.forecasts, b.forecasts, **LIKE)
    pd.testing.assert_frame_equal(a.scores, b.scores, **LIKE)
    pd.testing.assert_frame_equal(a.pit, b.pit, **LIKE)
    pd.testing.assert_frame_equal(a.states, b.states, **LIKE)
    pd.testing.assert_frame_equal(a.table.drop(columns=TIMES), b.table.drop(columns=TIMES), **LIKE)
    assert a.failures == b.failures


def test_partitions_give_the_forecasts_of_the_whole(panel):
    models = {"arima": sq.ARIMA((0, 1, 1)), "last": LastValue()}
    options = {"n_windows": 2, "seed": 3}
    for refit in (True, False):
        whole = backtest(models, panel, 3, refit=refit, **options)
        parted = backtest(models, panel, 3, refit=refit, partition_size=3, **options)
        pd.testing.assert_frame_equal(parted, whole, rtol=1e-10)


def test_series_of_other_partitions_have_random_numbers_of_their_own():
    y = np.zeros((4, 30, 1)) + np.arange(30.0)[None, :, None]  # four times the same
    result = compare(
        {"m": Choosy()}, y, horizon=5, season=1, seed=1, partition_size=2, n_samples=50
    )
    assert result.scores["CRPS"].nunique() == 4


def test_failures_keep_their_series_whatever_the_partition(panel):
    panel[5, 4] = -100.0
    for size in (2, 3, 100):
        with pytest.warns(RuntimeWarning, match="for series 5: ValueError: series 5 is negative"):
            frame = backtest({"m": Choosy()}, panel, 3, partition_size=size)
        assert [one["unique_id"] for one in frame.attrs["failures"]] == [5]
        assert frame["m"].isna().groupby(frame["unique_id"]).all().tolist() == [
            n == 5 for n in range(7)
        ]


def test_a_cache_keeps_partitions_apart(panel, tmp_path):
    options = {"n_windows": 2, "seed": 3, "partition_size": 3}
    models = {"a": Choosy(), "b": LastValue()}
    whole = backtest(models, panel, 3, cache=tmp_path, **options)
    notes = sorted(path for path in tmp_path.glob("*.json") if path.name != "run.json")
    assert len(notes) == 2 * 3 + 2  # three partitions of a, the panel of b
    for note in notes[::2]:
        note.unlink()
    again = backtest(models, panel, 3, cache=tmp_path, **options)
    pd.testing.assert_frame_equal(again, whole, **LIKE)
    with pytest.raises(ValueError, match="its settings differ"):
        backtest(models, panel, 3, cache=tmp_path, **options | {"partition_size": 2})


@pytest.mark.parametrize("given", [{"cluster": 3}, {"cluster": ""}, {"partition_size": 0}])
def test_a_bad_choice_is_named(panel, given):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name}="):
        backtest(LastValue(), panel, 3, **given)


def test_without_ray_the_extra_is_named(panel, monkeypatch):
    there = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'")
        return there(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'seqdgm\[cluster\]'"):
        backtest(LastValue(), panel, 3, cluster="ray")


@pytest.mark.slow
@pytest.mark.parametrize("refit", [True, False])
def test_a_cluster_gives_the_local_result_bit_for_bit_though_a_worker_dies(
    ray, panel, tmp_path, refit
):
    mark, cache = tmp_path / "killed", tmp_path / "cache"
    models = {
        "arima": sq.ARIMA((1, 0, 1)),
        "weak": Fragile(limit=30),
        "deadly": Deadly(mark=str(mark), keeper=os.getpid()),
    }
    options = {"horizon": 3, "season": 4, "n_windows": 2, "seed": 5, "partition_size": 3}
    options |= {"refit": refit, "n_samples": 100}
    with pytest.warns(RuntimeWarning, match="weak failed"):
        here = compare(models, panel, **options)
    assert not mark.exists()
    with pytest.warns(RuntimeWarning, match="weak failed"):
        there = compare(models, panel, cluster="ray", cache=cache, **options)
    assert mark.exists()  # a worker was killed
    same(here, there)
    with pytest.warns(RuntimeWarning, match="weak failed"):
        same(here, compare(models, panel, cache=cache, **options))
    assert ray.is_initialized()  # the host's session was left alone


@pytest.mark.slow
def test_an_error_reaches_the_caller_as_it_was_raised(ray, panel):
    panel[5, 4] = -100.0
    with pytest.raises(ValueError, match="series 5 is negative") as caught:
        backtest({"m": Choosy()}, panel, 3, errors="raise", cluster="ray", partition_size=3)
    assert type(caught.value) is ValueError
    assert "raised by m on the window" in "".join(caught.value.__notes__)


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_a_failure_of_its_series(ray, panel, monkeypatch):
    monkeypatch.setattr("seqdgm.cluster._RETRIES", 1)
    panel[5, 4] = -100.0
    models = {"m": AlwaysDeadly(keeper=os.getpid()), "n": LastValue()}
    with pytest.warns(RuntimeWarning, match="the worker was lost 2 times"):
        frame = backtest(models, panel, 3, cluster="ray", partition_size=3)
    assert [row["unique_id"] for row in frame.attrs["failures"]] == [3, 4, 5]
    assert set(frame.loc[frame["m"].isna(), "unique_id"]) == {3, 4, 5}
    assert frame["n"].notna().all()
    with pytest.raises(RuntimeError, match="the worker was lost 2 times"):
        backtest(models, panel, 3, cluster="ray", partition_size=3, errors="raise")


@pytest.mark.slow
def test_a_panel_is_fitted_on_a_cluster_as_here_bit_for_bit_though_a_worker_dies(
    ray, panel, tmp_path
):
    models = [DeadlyARIMA((1, 0, 1)), sq.AutoARIMA(), sq.LinearGaussianSSM(latent_dim=2)]
    mark = tmp_path / "killed"
    models[0].mark, models[0].keeper = str(mark), os.getpid()
    options = {"seed": 4, "partition_size": 3}
    for model in models:
        model.fit(panel, **options)
        assert mark.exists() == (model is not models[0])
        wanted, report, mean = model.state_dict(), model.fit_report_, model.forecast(3).mean
        model.fit(panel, cluster="ray", **options)
        found, again = model.state_dict(), model.fit_report_
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
        np.testing.assert_array_equal(again.log_likelihood, report.log_likelihood, strict=True)
        assert again.objective == report.objective
        assert model.fitted_ids() == tuple(range(7))
        np.testing.assert_array_equal(model.forecast(3).mean, mean)
        assert mark.exists()  # a worker was killed, and none in the fit before
    assert ray.is_initialized()


@pytest.mark.slow
def test_a_cluster_names_the_series_that_cannot_be_fitted(ray, panel):
    panel[5] = np.nan
    with pytest.raises(ValueError, match="series 5"):
        sq.ARIMA((1, 0, 1)).fit(panel, cluster="ray", partition_size=3)
