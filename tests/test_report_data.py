"""What a comparison keeps for its report, and what the page and the LaTeX table say."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from standins import Fragile, LastValue

import seqdgm as sq
from seqdgm.evaluation import metrics, traces
from seqdgm.evaluation.numbers import digits, text
from seqdgm.evaluation.report_figures import payload, positions, rounded
from seqdgm.evaluation.traces import MAX_STATES, evenly
from seqdgm.panel import Panel


@pytest.fixture(scope="module")
def walks():
    """Seven random walks as a named panel, one held-out value missing."""
    rng = np.random.default_rng(0)
    index = pd.period_range("2020-01", periods=36, freq="M")
    frames = [
        pd.DataFrame({"unique_id": f"w{k}", "ds": index, "y": 100 + rng.normal(size=36).cumsum()})
        for k in range(7)
    ]
    frames[3].loc[34, "y"] = np.nan
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def result(walks):
    models = {"a": LastValue(), "b": LastValue(std=4.0), "c": sq.SeasonalNaive(season=3)}
    return sq.compare(models, walks, horizon=4, season=1, n_windows=3, n_samples=300, seed=2)


def test_transforms_are_uniform_for_the_true_model_and_in_the_rows_of_the_forecasts():
    class Walk(LastValue):
        """A random walk with unit steps: N(last, h)."""

        def forecast(self, *args, **options):
            out = super().forecast(*args, **options)

            def draw(n, seed):
                shape = (len(out.mean), n, *out.mean.shape[1:])
                steps = np.random.default_rng(seed).normal(size=shape)
                return out.mean[:, None] + steps.cumsum(axis=2)

            object.__setattr__(out, "draw", draw)
            return out

    rng = np.random.default_rng(5)
    y = rng.normal(size=(150, 30, 1)).cumsum(axis=1)
    found = sq.compare({"true": Walk(), "narrow": LastValue(std=0.5)}, y, horizon=3, seed=0).pit
    pd.testing.assert_frame_equal(
        found[["unique_id", "ds", "cutoff", "y"]],
        sq.backtest(LastValue(), y, 3)[["unique_id", "ds", "cutoff", "y"]],
    )
    first = found["true"].to_numpy().reshape(150, 3)[:, 0]  # independent over the series
    assert stats.kstest(first, "uniform").pvalue > 1e-4
    assert stats.kstest(found["narrow"].to_numpy().reshape(150, 3)[:, 0], "uniform").pvalue < 1e-4
    # One step ahead the transform of a Gaussian is its distribution function, up to the draws.
    last = y[:, 26, 0]
    expected = stats.norm.cdf(y[:, 27, 0] - last)
    assert np.abs(first - expected).max() < 5 * 0.5 / 1000**0.5


def test_transforms_are_those_of_the_forecast_drawn_again(result, walks):
    train, held = Panel.of(walks).split(4)
    seed = int(np.random.SeedSequence([2, 2]).generate_state(1)[0])  # the newest of three windows
    draws = sq.SeasonalNaive(season=3).fit(train, seed=seed).forecast(4, seed=seed)
    draws = draws.sample(300, seed=seed)[..., 0]
    expected = metrics.pit(held.values[..., 0], draws, seed=seed)
    newest = result.pit[result.pit["cutoff"] == pd.Period("2022-08")]
    np.testing.assert_array_equal(newest["c"], expected.ravel())
    assert newest["c"].isna().sum() == 1


def test_states_are_those_that_the_model_smooths_and_predicts(walks):
    model = sq.ARIMA((1, 0, 0), trend="c")
    options = {"horizon": 4, "season": 1, "n_windows": 2, "n_samples": 50, "seed": 0}
    found = sq.compare({"ar": model, "last": LastValue()}, walks, **options).states
    train, _ = Panel.of(walks).split(4)
    fitted = model.clone().fit(train)
    for kind, posterior in (
        ("smoothed", fitted.smooth()),
        ("predicted", fitted.forecast(4).states),
    ):
        own = found[
            (found["kind"] == kind) & (found["unique_id"] == "w3") & (found["state"] == "z1")
        ]
        expected = posterior.to_frame()
        expected = expected[expected["unique_id"] == "w3"]
        assert list(own["ds"]) == list(expected["ds"])
        np.testing.assert_allclose(own["mean"], expected["z1"], rtol=1e-6)
        np.testing.assert_allclose(own["std"], expected["z1-std"], rtol=1e-6, atol=1e-9)
    assert set(found["model"]) == {"ar"}  # the other has no engine that smooths
    assert list(found["unique_id"].unique()) == [f"w{k}" for k in range(7)]


def test_states_of_an_array_are_those_of_few_series_under_their_own_parameters():
    rng = np.random.default_rng(3)
    y = rng.normal(size=(20, 40, 1)) * (1 + np.arange(20.0))[:, None, None]
    model = sq.ARIMA((1, 0, 0))
    found = sq.compare(model, y, horizon=2, season=1, n_samples=50, seed=0).states
    assert list(found["unique_id"].unique()) == evenly(20, 8)
    expected = model.clone().fit(y[:, :38]).smooth()
    for n in (0, 19):
        own = found[(found["unique_id"] == n) & (found["kind"] == "smoothed")]
        own = own[own["state"] == "z1"]
        np.testing.assert_allclose(own["mean"], expected.mean[n, :, 0], rtol=1e-6)


def test_a_smoother_that_fails_is_a_recorded_failure(walks):
    class Rough(sq.SeasonalNaive):
        def smooth(self, *args, **options):
            raise ValueError("no way back")

    with pytest.warns(RuntimeWarning, match="states: ValueError: no way back"):
        found = sq.compare(Rough(season=3), walks, horizon=4, season=1, n_samples=50, seed=0)
    assert found.states.empty
    assert np.isfinite(found.table["CRPS"]).all()


def test_training_curves_are_those_of_the_fit():
    y = np.sin(np.arange(80) / 3.0) + 0.1 * np.random.default_rng(0).normal(size=80)
    model = sq.RNN("gru", 4, max_epochs=6)
    options = {"horizon": 4, "season": 1, "n_samples": 50}
    result = sq.compare({"rnn": model, "naive": sq.SeasonalNaive(season=1)}, y, seed=3, **options)
    seed = int(np.random.SeedSequence([3, 0]).generate_state(1)[0])
    report = model.clone().fit(y[:76], seed=seed).fit_report_
    found = result.training.set_index("curve")
    assert found.loc["objective", "value"].tolist() == list(report.objective)
    assert found.loc["objective", "iteration"].tolist() == list(range(1, len(report.objective) + 1))
    assert found.loc["validation", "value"].tolist() == list(report.valid_objective)
    assert found.loc["kept", "iteration"] == report.best_epoch
    assert set(found["unit"]) == {"nats a step"}
    assert set(found["model"]) == {"rnn"}
    (drawn,) = payload(result, 5)["training"]
    assert drawn["objective"]["y"] == rounded(report.objective)
    # Fitted once: the later windows have no curve of their own.
    once = sq.compare(model, y, seed=3, n_windows=2, refit=False, **options).training
    assert set(once["window"]) == {0}


def test_a_continued_comparison_has_all_that_one_in_one_go_has(walks, tmp_path):
    models = {"ar": sq.ARIMA((1, 0, 0)), "last": LastValue()}
    options = {"horizon": 4, "season": 1, "n_windows": 2, "n_samples": 50, "seed": 0}
    whole = sq.compare(models, walks, **options)
    sq.compare({"ar": models["ar"]}, walks, cache=tmp_path, **options)
    again = sq.compare(models, walks, cache=tmp_path, **options)
    for name in ("pit", "states", "training", "scores"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(whole, name), check_exact=True)


def test_the_page_draws_the_frames_of_the_comparison(result):
    found = payload(result, 50)
    fans, frame = found["forecasts"], result.forecasts
    assert [one["id"] for one in fans["series"]] == [f"w{k}" for k in range(7)]
    assert [window["number"] for window in fans["windows"]] == [1, 2, 3]
    series = fans["series"][4]
    for w, cutoff in enumerate(sorted(frame["cutoff"].unique())):
        block = frame[(frame["unique_id"] == "w4") & (frame["cutoff"] == cutoff)]
        start = series["starts"][w]
        assert series["x"][start : start + 4] == positions(pd.PeriodIndex(block["ds"]))
        assert series["y"][start : start + 4] == rounded(block["y"])
        for m, name in enumerate(result.table.index):
            columns = [name] + [f"{name}-{end}-{lv}" for lv in (95, 80) for end in ("lo", "hi")]
            assert series["fans"][w][m] == [rounded(block[column]) for column in columns]
    for level in found["coverage"]:
        for own in level["models"]:
            name, lv = own["model"], level["level"]
            inside = frame["y"].between(frame[f"{name}-lo-{lv}"], frame[f"{name}-hi-{lv}"])
            inside = inside.where(frame["y"].notna())
            step = frame.groupby(["unique_id", "cutoff"]).cumcount()
            assert own["values"] == rounded(100 * inside.astype(float).groupby(step).mean())
    for own in found["pit"]:
        values = result.pit[own["model"]].dropna()
        assert own["n"] == len(values) == 7 * 4 * 3 - 1
        share = np.bincount((values * 10).astype(int), minlength=10) / len(values)
        np.testing.assert_allclose(own["density"], 10 * share, rtol=1e-5)
    assert found["ranks"]["models"] == list(result.rank().ranks.index)


def test_the_page_tells_how_accurate_the_states_are_where_the_truth_is_known(result, tmp_path):
    found = sq.datasets.simulate("linear-gaussian", 4, 40, seed=0)
    known = sq.compare({"true": found.model, "x": sq.SeasonalNaive()}, found, horizon=2, seed=0)
    known.report(tmp_path / "known.html")
    page = (tmp_path / "known.html").read_text("utf-8")
    row = known.state_accuracy.loc[("true", "filtered")]
    table = page[page.index("Accuracy of the states") :]
    for name in ("RMSE", "NEES"):
        assert re.search(rf'data-value="{re.escape(repr(float(row[name])))}"', table)
    assert len(known.state_accuracy) == table[: table.index("</table>")].count("<tr>") - 1
    result.report(tmp_path / "unknown.html")
    assert "Accuracy of the states" not in (tmp_path / "unknown.html").read_text("utf-8")


def test_few_series_and_windows_are_drawn_of_many_and_the_page_says_so(walks, tmp_path):
    pytest.importorskip("plotly")
    result = sq.compare(LastValue(), walks, horizon=1, season=1, n_windows=10, n_samples=20, seed=0)
    result.report(tmp_path / "x.html", max_series=3)
    page = (tmp_path / "x.html").read_text()
    assert "3 of 7 series are drawn here" in page
    assert "8 of 10 windows are drawn here" in page
    found = payload(result, 3)["forecasts"]
    assert [one["id"] for one in found["series"]] == ["w0", "w3", "w6"]
    assert [window["number"] for window in found["windows"]][::7] == [1, 10]
    with pytest.raises(ValueError, match="max_series=0"):
        result.report(tmp_path / "y.html", max_series=0)


def test_vectors_and_one_model_alone_make_a_page(tmp_path):
    pytest.importorskip("plotly")
    index = pd.date_range("2020-01-01", periods=30, freq="D", tz="Europe/Berlin")
    y = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 2)), index, ["left", "ri<ght"])
    result = sq.compare(LastValue(), y, horizon=3, season=1, n_samples=50, seed=0)
    result.report(tmp_path / "x.html", title="Two <columns>")
    page = (tmp_path / "x.html").read_text()
    assert "<title>Two &lt;columns&gt;</title>" in page
    assert "ri<ght" not in page
    found = payload(result, 5)
    assert [one["id"] for one in found["forecasts"]["series"]] == ["left", "ri<ght"]
    assert found["forecasts"]["x_title"] == "time (Europe/Berlin)"
    assert found["ranks"] is None
    assert "Critical differences" not in page
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data[1]) == json.loads(json.dumps(found))


def test_every_kind_of_time_index_has_a_place_on_an_axis():
    assert positions(pd.RangeIndex(3, 9, 2)) == [3, 5, 7]
    assert positions(pd.period_range("2020Q1", periods=2, freq="Q")) == ["2020-01-01", "2020-04-01"]
    hours = pd.date_range("2020-01-01", periods=2, freq="12h", tz="UTC")
    assert positions(hours) == ["2020-01-01", "2020-01-01T12:00:00"]
    assert positions(pd.timedelta_range("0s", periods=2, freq="90s")) == [0, 90]


def test_the_same_comparison_gives_the_same_file_or_none(result, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    for name in ("a.html", "b.html"):
        result.report(tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert 4e6 < (tmp_path / "a.html").stat().st_size < 8e6
    with pytest.raises(ValueError, match="does not exist; make it first"):
        result.report(tmp_path / "nowhere" / "a.html")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'seqdgm\[report\]'"):
        result.report(tmp_path / "c.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_a_page_asks_for_nothing_and_names_what_it_ran_on(result, tmp_path):
    pytest.importorskip("plotly")
    result.report(tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    own = page[: page.index("<script>")] + page[page.index('<script id="data"') :]
    assert re.findall(r"(?:src|href)=\"(?!#|data:,)", own) == []
    assert not re.search(r"https?://|@import|url\(", own)
    for name in ("torch", "numpy", "pandas", "statsmodels", "python"):
        assert f">{name}</th><td>{result.settings['versions'][name]}<" in page
    assert "SeasonalNaive(season=3)" in page
    assert ">seed</th><td>2<" in page


def test_latex_holds_the_rounded_table_and_escapes_names(walks, tmp_path):
    models = {"a_1 & 50%": LastValue(), r"\input{x}": LastValue(std=4.0), "gone": Fragile()}
    with pytest.warns(RuntimeWarning, match="gone failed"):
        result = sq.compare(models, walks, horizon=4, season=1, n_samples=300, seed=2)
    out = result.to_latex(tmp_path / "t.tex", caption="Walks", label="tab:w")
    assert (tmp_path / "t.tex").read_text() == out
    assert r"\caption{Walks}" in out
    assert r"\label{tab:w}" in out
    body = out[out.index(r"\midrule") : out.index(r"\bottomrule")].splitlines()[1:]
    heads = out.splitlines()[out.splitlines().index(r"\toprule") + 1].split(" & ")
    assert all(len(re.split(r"(?<!\\) & ", row)) == len(heads) for row in body)
    first = result.table.iloc[0]
    assert any(row.startswith(r"a\_1 \& 50\% & ") for row in body)
    assert any(row.startswith(r"\textbackslash{}input\{x\} & ") for row in body)
    decimals = digits(list(result.table["CRPS"]), list(result.table["CRPS-se"]))
    value, error = text(first["CRPS"], decimals), text(first["CRPS-se"], decimals)
    assert rf"\textbf{{{value}}} ({error})" in body[0]
    assert body[-1].count("--") == len(heads) - 1
    # Four cells in one row each, and the sign in the name of the first.
    assert result.to_latex(columns=["MASE"], caption="").count("&") == 4 + 1
    with pytest.raises(ValueError, match="no column 'speed'"):
        result.to_latex(columns=["speed"])


def test_latex_rows_do_not_begin_with_an_argument(walks):
    models = {"[x]": LastValue(), "*": LastValue(std=4.0)}
    out = sq.compare(models, walks, horizon=4, season=1, n_samples=50, seed=2).to_latex()
    rows = out[out.index(r"\midrule") : out.index(r"\bottomrule")].splitlines()[1:]
    assert {row.split(" & ")[0] for row in rows} == {"{[}x{]}", "{*}"}


def test_states_are_at_most_so_many(monkeypatch):
    y = np.arange(60.0) % 12 + np.random.default_rng(0).normal(size=60)
    model = sq.SeasonalNaive(season=12)
    found = sq.compare(model, y, horizon=2, season=12, n_samples=20, seed=0).states
    assert found["state"].nunique() == MAX_STATES
    monkeypatch.setattr(traces, "MAX_SMOOTHED", 57)
    none = sq.compare(model, y, horizon=2, season=12, n_samples=20, seed=0)
    assert none.states.empty
    assert np.isfinite(none.table["CRPS"]).all()
