"""Backtests that meet failing series, interruptions, and a corrupted future."""

from __future__ import annotations

import copy
import importlib
import json
import linecache
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from standins import Fragile, LastValue

import seqdgm as sq
from seqdgm.evaluation import backtest, compare
from seqdgm.evaluation.checkpoint import digest_model, digest_settings
from seqdgm.panel import Panel


@pytest.fixture
def panel():
    rng = np.random.default_rng(2)
    return 20 + rng.normal(size=(5, 30, 1)).cumsum(axis=1)


class Picky(LastValue):
    """Fits each series on its own, and refuses the negative ones."""

    per_series = True
    fits: list[int] = []  # noqa: RUF012

    def fit(self, y, inputs=None, *, seed=None, progress=False, **options):
        y = Panel.of(y)
        Picky.fits.append(y.n_series)
        for n in range(y.n_series):
            if np.nanmin(y.values[n]) < 0:
                raise ValueError(f"series {y.ids[n]!r} is negative")
        return super().fit(y)


class Pooled(Picky):
    per_series = False


class Simulated(LastValue):
    """Its forecast depends on the seed, and it counts its fits."""

    fits = 0

    def fit(self, y, inputs=None, *, seed=None, progress=False, **options):
        Simulated.fits += 1
        self.bias = float(np.random.default_rng(seed).normal())
        return super().fit(y)


class Interrupted(Simulated):
    """Is interrupted at its second fit."""

    fits = 0

    def fit(self, y, inputs=None, **options):
        Interrupted.fits += 1
        if Interrupted.fits == 2:
            raise KeyboardInterrupt
        return super().fit(y, inputs, **options)


@pytest.mark.parametrize("refit", [True, False])
def test_one_bad_series_is_set_apart(panel, refit):
    clean = backtest({"m": LastValue()}, panel, 3, n_windows=2, level=[80])
    panel[3, 4] = -1.0
    with pytest.warns(RuntimeWarning, match="for series 3: ValueError: series 3 is negative"):
        frame = backtest({"m": Picky()}, panel, 3, n_windows=2, level=[80], refit=refit)
    bad = frame["unique_id"] == 3
    assert frame.loc[bad, ["m", "m-lo-80", "m-hi-80"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(frame[~bad], clean[~bad])
    failures = frame.attrs["failures"]
    assert [failure["unique_id"] for failure in failures] == [3, 3]
    assert [failure["cutoff"] for failure in failures] == [23, 26]


def test_an_arima_leaves_out_the_series_that_is_too_short_for_it():
    rng = np.random.default_rng(1)
    y = [10 + rng.normal(size=n).cumsum() for n in (30, 8, 25)]
    model = sq.ARIMA((2, 1, 2), seasonal=(1, 0, 0, 4), trend="t")
    with pytest.warns(RuntimeWarning, match="for series 1: ValueError"):
        result = compare({"arima": model}, y, horizon=3, season=1, seed=0)
    alone = compare({"arima": model}, y[::2], horizon=3, season=1, seed=0)
    mine = result.forecasts[result.forecasts["unique_id"] != 1]
    np.testing.assert_allclose(mine["arima"], alone.forecasts["arima"], rtol=1e-6)
    exact = ["MASE", "sMAPE", "log_score", "coverage-80", "MSIS-95"]
    kept = result.scores[result.scores["unique_id"] != 1]
    np.testing.assert_allclose(
        kept[exact].astype(float), alone.scores[exact].astype(float), rtol=1e-5
    )
    assert result.table["units"].item() == 2


def test_one_bad_series_among_many_costs_few_fits():
    y = np.abs(np.random.default_rng(0).normal(size=(64, 12, 1))) + 1
    y[37, 2] = -1
    Picky.fits = []
    with pytest.warns(RuntimeWarning):
        frame = backtest({"m": Picky()}, y, 2)
    assert frame["m"].isna().sum() == 2
    assert len(Picky.fits) == 13  # two for each of the six halvings, and the first


def test_a_model_that_shares_parameters_fails_as_a_whole(panel):
    panel[3, 4] = -1.0
    with pytest.warns(RuntimeWarning, match="series 3 is negative"):
        frame = backtest({"m": Pooled()}, panel, 3)
    assert frame["m"].isna().all()
    (failure,) = frame.attrs["failures"]
    assert failure["unique_id"] is None


def test_a_forecast_that_is_not_finite_is_a_failure_of_its_series(panel):
    class Lost(LastValue):
        def forecast(self, *args, **options):
            forecast = super().forecast(*args, **options)
            forecast.mean[2] = np.nan
            return forecast

    with pytest.warns(RuntimeWarning, match="series 2: the forecast is not finite"):
        result = compare({"lost": Lost(), "good": LastValue()}, panel, horizon=3, season=1, seed=0)
    assert list(result.table["units"]) == [5, 4]
    scores = result.scores.set_index(["model", "unique_id"])
    assert np.isnan(scores.loc[("lost", 2), "CRPS"])
    columns = ["CRPS", "MASE", "coverage-80"]
    rest = [0, 1, 3, 4]
    lost, good = (
        scores.loc[[(name, n) for n in rest], columns].to_numpy(float) for name in ("lost", "good")
    )
    np.testing.assert_array_equal(lost, good)


def test_scores_of_the_series_beside_a_bad_one(panel):
    panel[3, 4] = -1.0
    models = {"m": Picky(), "good": LastValue()}
    with pytest.warns(RuntimeWarning):
        result = compare(models, panel, horizon=3, season=1, n_samples=2000, seed=0)
    scores = result.scores.set_index(["model", "unique_id"])
    assert scores.loc["m"].loc[3, ["MASE", "CRPS", "log_score"]].isna().all()
    rest = [0, 1, 2, 4]
    for metric in ("MASE", "log_score", "coverage-95", "MSIS-95"):
        mine, other = (scores.loc[name].loc[rest, metric].astype(float) for name in models)
        np.testing.assert_allclose(mine, other, rtol=1e-12)
    mine, other = (scores.loc[name].loc[rest, "CRPS"] for name in models)
    np.testing.assert_allclose(mine, other, rtol=0.1)  # other draws of the same law


def test_errors_can_be_raised(panel):
    panel[3, 4] = -1.0
    with pytest.raises(ValueError, match="series 3 is negative") as caught:
        backtest({"m": Picky()}, panel, 3, errors="raise")
    assert caught.value.__notes__ == ["raised by m on the window after 26"]
    with pytest.raises(ValueError, match="errors='ignore'"):
        backtest(LastValue(), panel, 3, errors="ignore")


@pytest.mark.filterwarnings("ignore:.*failed on the window:RuntimeWarning")
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(
    "model",
    [
        sq.ARIMA((1, 0, 0), trend="c"),
        pytest.param(sq.RNN(hidden_dim=4, max_epochs=2), marks=pytest.mark.slow),
    ],
    ids=["arima", "rnn"],
)
def test_whatever_comes_after_a_cutoff_changes_no_bit(model, refit):
    rng = np.random.default_rng(6)
    y = 10 + rng.normal(size=(2, 40, 1)).cumsum(axis=1)
    y[0, 7] = y[1, 25] = np.nan
    inputs = rng.normal(size=(2, 40, 1))
    models = {"model": model, "last": LastValue()}
    options = {"n_windows": 2, "step": 4, "refit": refit, "seed": 5, "n_samples": 50}
    clean = backtest(models, y, 4, inputs=inputs, **options)
    assert clean.attrs["failures"] == []
    for cutoff in clean["cutoff"].unique():
        for spoiler in (np.nan, 1e12):
            spoilt, beyond = y.copy(), inputs.copy()
            spoilt[:, cutoff + 1 :] = spoiler
            beyond[:, cutoff + 5 :] = 1e6  # those of the horizon are known
            # The later windows see the spoilt values, and may fail on them.
            again = backtest(models, spoilt, 4, inputs=beyond, **options)
            mine = clean["cutoff"] == cutoff
            pd.testing.assert_frame_equal(
                again[mine].drop(columns="y"), clean[mine].drop(columns="y"), check_exact=True
            )


def test_an_interrupted_backtest_goes_on(panel, tmp_path):
    options = {"n_windows": 3, "seed": 3}
    whole = backtest({"a": Simulated(), "b": LastValue()}, panel, 3, **options)
    Interrupted.fits = 0
    with pytest.raises(KeyboardInterrupt):
        backtest({"a": Interrupted(), "b": LastValue()}, panel, 3, cache=tmp_path, **options)
    assert len(list(tmp_path.glob("*.json"))) == 3  # the first window of both, and run.json
    Interrupted.fits = 2
    again = backtest({"a": Interrupted(), "b": LastValue()}, panel, 3, cache=tmp_path, **options)
    assert Interrupted.fits == 4  # two windows were left
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    backtest({"a": Interrupted(), "b": LastValue()}, panel, 3, cache=tmp_path, **options)
    assert Interrupted.fits == 4


def test_a_model_that_failed_altogether_is_tried_again(panel, tmp_path):
    class Recovering(LastValue):
        broken = True

        def fit(self, y, inputs=None, **options):
            if self.broken:
                raise RuntimeError("out of memory")
            return super().fit(y)

    with pytest.warns(RuntimeWarning, match="out of memory"):
        backtest(Recovering(), panel, 3, seed=0, cache=tmp_path)
    Recovering.broken = False
    again = backtest(Recovering(), panel, 3, seed=0, cache=tmp_path)
    assert again["Recovering"].notna().all()


def test_a_model_is_known_by_the_source_of_its_class(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for shift in (1.0, 2.0, 1.0):
        source = "from standins import LastValue\n\n\nclass Own(LastValue):\n    shift = {}\n"
        (tmp_path / "own_model.py").write_text(source.format(shift))
        linecache.checkcache()
        monkeypatch.delitem(sys.modules, "own_model", raising=False)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        digests.append(digest_model(importlib.import_module("own_model").Own(), {}))
    monkeypatch.delitem(sys.modules, "own_model")
    assert digests[0] == digests[2] != digests[1]


def test_networks_and_functions_count_by_their_content():
    net = torch.nn.Linear(2, 2)
    before = digest_settings(net=net)
    assert before == digest_settings(net=copy.deepcopy(net))
    with torch.no_grad():
        net.weight += 1
    assert before != digest_settings(net=net)
    assert digest_settings(f=LastValue.fit) == digest_settings(f=LastValue.fit)
    assert digest_settings(f=LastValue.fit) != digest_settings(f=Fragile.fit)


def test_a_damaged_cache_is_named(panel, tmp_path):
    backtest(LastValue(), panel, 3, seed=0, cache=tmp_path)
    part = next(tmp_path.glob("*.parquet"))
    part.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{part.name}.*delete the folder"):
        backtest(LastValue(), panel, 3, seed=0, cache=tmp_path)
    (tmp_path / "run.json").write_text('{"data": ')
    with pytest.raises(ValueError, match=r"run\.json.*delete the folder"):
        backtest(LastValue(), panel, 3, seed=0, cache=tmp_path)


@pytest.mark.parametrize(
    ("models", "column"),
    [
        ({"y": LastValue()}, "y"),
        ({"ds": LastValue()}, "ds"),
        ({"a": LastValue(), "a-lo-80": LastValue()}, "a-lo-80"),
    ],
)
def test_names_that_clash_with_a_column_are_refused(panel, models, column):
    with pytest.raises(ValueError, match=f"column '{column}'.*another name"):
        backtest(models, panel, 3)


def test_names_that_are_the_same_as_text_are_refused(panel):
    with pytest.raises(ValueError, match="the same as text"):
        backtest({1: LastValue(), "1": LastValue()}, panel, 3)


def test_a_half_written_part_is_made_again(panel, tmp_path):
    whole = backtest(LastValue(), panel, 3, seed=0, cache=tmp_path)
    (note,) = (path for path in tmp_path.glob("*.json") if path.name != "run.json")
    note.unlink()  # the last file of a part
    pd.testing.assert_frame_equal(backtest(LastValue(), panel, 3, seed=0, cache=tmp_path), whole)


def test_without_refit_the_windows_of_a_model_are_kept_together(panel, tmp_path):
    options = {"n_windows": 2, "seed": 3, "refit": False}
    whole = backtest({"a": Simulated()}, panel, 3, cache=tmp_path, **options)
    newest = max(p for p in tmp_path.glob("*.json") if p.name != "run.json")
    newest.unlink()
    Simulated.fits = 0
    again = backtest({"a": Simulated()}, panel, 3, cache=tmp_path, **options)
    assert Simulated.fits == 1
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"y": None}, "its data differ"),
        ({"horizon": 2}, "its settings differ"),
        ({"seed": 1}, "its settings differ"),
        ({"models": {"m": LastValue(bias=1.0)}}, "its model 'm' differ"),
        ({"fit_options": {"m": {"progress": False}}}, "its model 'm' differ"),
        ({"seed": None}, "needs a seed"),
    ],
)
def test_a_cache_of_another_run_is_refused(panel, tmp_path, change, match):
    given = {"models": {"m": LastValue()}, "y": panel, "horizon": 3, "seed": 0, "cache": tmp_path}
    backtest(**given)
    before = (tmp_path / "run.json").read_text()
    if "y" in change:
        change = {"y": panel + 1e-9}
    with pytest.raises(ValueError, match=match):
        backtest(**given | change)
    assert (tmp_path / "run.json").read_text() == before


def test_a_model_may_be_added_and_the_kinds_do_not_mix(panel, tmp_path):
    first = compare({"m": LastValue()}, panel, horizon=3, season=1, seed=0, cache=tmp_path)
    models = {"m": LastValue(), "weak": Fragile()}
    with pytest.warns(RuntimeWarning):
        both = compare(models, panel, horizon=3, season=1, seed=0, cache=tmp_path)
    pd.testing.assert_series_equal(both.table.loc["m"], first.table.loc["m"], check_exact=True)
    with pytest.warns(RuntimeWarning):
        again = compare(models, panel, horizon=3, season=1, seed=0, cache=tmp_path)
    timed = ["fit_seconds", "forecast_seconds", "peak_mb"]  # of "weak", which was tried again
    tables = (result.table.drop(columns=timed) for result in (again, both))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    pd.testing.assert_series_equal(again.table.loc["m"], both.table.loc["m"], check_exact=True)
    pd.testing.assert_frame_equal(again.scores, both.scores, check_exact=True)
    assert again.failures == both.failures
    noted = set(json.loads((tmp_path / "run.json").read_text()))
    assert noted == {"data", "settings", "model 'm'", "model 'weak'"}
    with pytest.raises(ValueError, match="settings differ"):
        backtest(models, panel, 3, seed=0, cache=tmp_path)


def test_the_same_seed_reproduces_every_figure(panel):
    models = {"rnn": sq.RNN(hidden_dim=4, max_epochs=2), "naive": sq.SeasonalNaive(1)}
    timed = ["fit_seconds", "forecast_seconds", "peak_mb"]
    tables = [
        compare(models, panel, horizon=3, season=1, n_windows=2, seed=4, test="bootstrap")
        for _ in range(2)
    ]
    first, second = (result.table.drop(columns=timed) for result in tables)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert (tables[0].table[timed] >= 0).all(axis=None)


@pytest.fixture
def seasonal():
    rng = np.random.default_rng(0)
    return [5 + np.tile([1.0, 2.0, 3.0, 5.0], 10) + 0.1 * rng.normal(size=40) for _ in range(3)]


def test_a_series_without_history_is_a_row_of_failures(seasonal):
    seasonal[1][:36] = np.nan
    with pytest.warns(RuntimeWarning, match="0 observed steps"):
        result = compare(sq.SeasonalNaive(4), seasonal, horizon=4, season=4, seed=0)
    assert [row["unique_id"] for row in result.failures] == [1]
    assert result.table["units"].item() == 2
    assert np.isfinite(result.table["OWA"].item())


def test_what_cannot_be_scored_costs_the_others_nothing(seasonal):
    model = sq.ARIMA((1, 0, 0), transform="log")
    clean = compare(model, seasonal, horizon=4, season=4, seed=0).scores
    seasonal[1][-1] = -1.0
    with pytest.warns(RuntimeWarning, match="no logarithm"):
        result = compare(model, seasonal, horizon=4, season=4, seed=0)
    scores = result.scores
    assert scores["log_score"].isna().tolist() == [False, True, False]
    assert scores["CRPS"].notna().all()  # the forecast is there, whatever the density
    assert [row["unique_id"] for row in result.failures] == [1]
    others = [0, 2]
    pd.testing.assert_frame_equal(scores.loc[others], clean.loc[others])


def test_a_draw_that_is_infinite_costs_its_series_alone(panel):
    class Wild(LastValue):
        def forecast(self, *args, **options):
            found = super().forecast(*args, **options)

            def draw(n, seed):
                samples = found.sample(n, seed)
                samples[1, 0] = np.inf
                return samples

            return replace(found, draw=draw)

    with pytest.warns(RuntimeWarning, match="scoring"):
        result = compare(Wild(), panel, horizon=3, season=1, seed=0)
    assert result.scores["CRPS"].isna().tolist() == [False, True, False, False, False]
    assert result.scores["log_score"].notna().all()


def test_owa_leaves_out_the_series_that_naive2_cannot_forecast(seasonal):
    whole = compare(sq.SeasonalNaive(4), seasonal[::2], horizon=4, season=4, seed=0)
    seasonal[1][0] = -1.0
    result = compare(sq.SeasonalNaive(4), seasonal, horizon=4, season=4, seed=0)
    assert result.table["OWA"].item() == pytest.approx(whole.table["OWA"].item())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"season": 1.5}, "season=1.5 must be a whole number"),
        ({"n_samples": 1}, "n_samples=1: the CRPS"),
        ({"n_samples": 10.5}, "n_samples=10.5 must be a whole number"),
    ],
)
def test_a_bad_setting_is_named_before_any_fit(panel, change, match):
    with pytest.raises(ValueError, match=match):
        compare(Picky(), panel, **({"horizon": 3, "season": 1} | change))


def test_a_coverage_ranks_by_its_distance_from_the_level(panel):
    models = {
        "wide": LastValue(std=50.0),
        "right": LastValue(std=2.0),
        "narrow": LastValue(std=0.01),
    }
    result = compare(models, panel, horizon=3, season=1, n_windows=3, seed=0, level=(80,))
    distance = (result.table["coverage-80"] - 80).abs()
    ranks = result.rank("coverage-80").ranks
    assert ranks["narrow"] > ranks["wide"]
    assert distance["narrow"] > distance["wide"]
    for name in ("window", "log_score_kind", "points", "unique_id"):
        with pytest.raises(ValueError, match=f"metric='{name}' does not rank models"):
            result.rank(name)
