"""The command line, run as a user runs it: files in, files out, one clear line when it cannot."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from statsmodels.tsa.statespace.structural import UnobservedComponents

import seqdgm as sq
from seqdgm import cli
from seqdgm._cli_files import Layout, read_data


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(arg) for arg in args])
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return call


@pytest.fixture
def quarterly(tmp_path):
    """Four years of quarters in a file, and as a Series."""
    index = pd.date_range("2000-01-01", periods=16, freq="QS", name="when")
    y = pd.Series([1.0, 4.0, 2.0, 3.0] * 4, index, name="sales") + np.arange(16.0) ** 2
    y.to_csv(tmp_path / "sales.csv")
    return y


def test_help_is_fast_and_needs_nothing_heavy():
    code = (
        "import sys, seqdgm.cli as c\n"
        "try: c.main([])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'numba', 'scipy'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("datasets", "compare", "forecast", "filter", "fit"):
        assert command in done.stdout


def test_datasets_are_listed(run):
    code, out, err = run("datasets")
    assert code == 0
    assert err == ""
    lines = out.splitlines()
    assert len(lines) == 1 + len(sq.datasets.list())
    assert any(line.split()[:6] == ["airline", "1", "144", "MS", "12", "12"] for line in lines)


def test_forecast_repeats_the_last_season(run, quarterly):
    code, out, err = run(
        "forecast", "sales.csv", "--model", "seasonal-naive", "--horizon", 6, "--level", "50"
    )
    assert (code, err) == (0, "")
    (named,) = [line for line in out.splitlines()[:1]]
    assert named == "unique_id,ds,SeasonalNaive,SeasonalNaive-lo-50,SeasonalNaive-hi-50"
    frame = pd.read_csv(pd.io.common.StringIO(out), parse_dates=["ds"])
    np.testing.assert_allclose(frame["SeasonalNaive"], quarterly.iloc[[12, 13, 14, 15, 12, 13]])
    assert list(frame["ds"]) == list(pd.date_range("2004-01-01", periods=6, freq="QS"))


def test_forecast_writes_table_and_picture(run, quarterly, tmp_path):
    run("forecast", "sales.csv", "--model=seasonal-naive", "--horizon=4", "--output=a.csv")
    code, out, err = run(
        *("forecast", "sales.csv", "--model=seasonal-naive", "--horizon=4"),
        *("--output=a.parquet", "--plot=a.svg"),
    )
    assert (code, out, err) == (0, "", "")
    first = pd.read_csv("a.csv", parse_dates=["ds"], float_precision="round_trip")
    pd.testing.assert_frame_equal(first, pd.read_parquet("a.parquet"), check_dtype=False)
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.csv", "a.parquet", "a.svg", "sales.csv")
    ]


def test_a_saved_model_forecasts_as_the_fitted_one(run, quarterly):
    arima = ("--model=arima", "--order=0,1,1", "--seasonal=0,1,0,4")
    code, out, err = run("fit", "sales.csv", *arima, "--save=m.safetensors")
    assert code == 0
    assert "ARIMA" in out
    assert err.splitlines() == ["saved the fitted model to m.safetensors"]
    _, direct, _ = run("forecast", "sales.csv", *arima, "--horizon=4")
    code, loaded, _ = run("forecast", "--load=m.safetensors", "--horizon=4")
    assert code == 0
    assert loaded == direct
    longer = run("forecast", "sales.csv", "--load=m.safetensors", "--horizon=4")
    assert longer[:2] == (0, direct)


def test_filter_and_smooth_nile_as_statsmodels_does(run):
    assert run("filter", "nile", "--model=local-level", "--output=f.csv")[0] == 0
    assert run("filter", "nile", "--smooth", "--output=s.csv", "--plot=s.png")[0] == 0
    nile = sq.datasets.load("nile").y
    model = UnobservedComponents(nile.to_numpy(), "local level", use_exact_diffuse=True)
    fitted = model.fit(disp=False)
    for name, expected in (("f.csv", fitted.level.filtered), ("s.csv", fitted.level.smoothed)):
        frame = pd.read_csv(name)
        assert len(frame) == 100
        np.testing.assert_allclose(frame.iloc[:, 2], expected, rtol=2e-3)


def test_compare_writes_what_the_library_computes(run, quarterly, tmp_path):
    code, out, err = run(
        *("compare", "sales.csv", "--models=seasonal-naive,arima", "--horizon=2"),
        *("--windows=2", "--seed=3", "--output=results"),
    )
    assert code == 0, err
    assert "seqdgm-output" not in out
    assert "wrote leaderboard.csv, forecasts.csv and forecasts.png to results" in err
    table = pd.read_csv(tmp_path / "results/leaderboard.csv", index_col="model")
    models = sq.evaluation.default_models(4, 2, names=["seasonal-naive", "arima"])
    expected = sq.compare(models, quarterly, horizon=2, n_windows=2, seed=3)
    metrics = ["MASE", "sMAPE", "CRPS", "CRPS-se", "coverage-80", "log_score"]
    pd.testing.assert_frame_equal(table[metrics], expected.table[metrics])
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(expected.table.index)
    forecasts = pd.read_csv(tmp_path / "results/forecasts.csv")
    assert len(forecasts) == 4
    assert (tmp_path / "results/forecasts.png").read_bytes().startswith(b"\x89PNG")


def test_compare_writes_a_report_goes_on_from_a_cache_and_takes_a_test(
    run, quarterly, tmp_path, monkeypatch
):
    pytest.importorskip("plotly")
    args = ["compare", "sales.csv", "--models=seasonal-naive,arima", "--horizon=1", "--windows=5"]
    kept = ["--cache=kept", "--test=diebold-mariano"]
    code, out, err = run(*args, *kept, "--report=out.html")
    assert code == 0, err
    assert "wrote out.html" in err
    page = (tmp_path / "out.html").read_text()
    assert "<h1>Forecast comparison: sales.csv</h1>" in page
    assert "Diebold-Mariano" in page
    table = pd.read_csv(tmp_path / "seqdgm-output/leaderboard.csv", index_col="model")
    models = sq.evaluation.default_models(4, 1, names=["seasonal-naive", "arima"])
    options = {"horizon": 1, "n_windows": 5, "seed": 0, "test": "diebold-mariano"}
    expected = sq.compare(models, quarterly, **options).table
    pd.testing.assert_series_equal(table["p_value"], expected["p_value"])
    # What was kept is not computed again: the times are those of the first run.
    assert run(*args, *kept)[0] == 0
    again = pd.read_csv(tmp_path / "seqdgm-output/leaderboard.csv", index_col="model")
    pd.testing.assert_frame_equal(again, table)
    for wrong, says in (
        (["--report=out.txt"], "use one of .html"),
        (["--report=nowhere/out.html"], "does not exist"),
        (["--test=t-test"], "'wilcoxon', 'bootstrap'"),
        ([*kept[:1], "--seed=1"], "holds the results of another run"),
    ):
        code, out, err = run(*args, *wrong)
        assert (code, out) == (2, "")
        assert says in err
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    code, out, err = run(*args, "--report=other.html")
    assert (code, out) == (2, "")
    assert err == "error: a report needs plotly; install it with: pip install 'seqdgm[report]'\n"


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_failing_model_is_named_and_the_rest_is_delivered(run):
    wide = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 2)), columns=["a", "b"])
    wide.rename_axis("step").to_csv("wide.csv")
    code, out, err = run("compare", "wide.csv", "--models=arima,local-level", "--horizon=3")
    assert code == 0
    assert (
        "warning: ARIMA failed on the window after 26: ValueError: ARIMA models one column" in err
    )
    assert "-" in out.splitlines()[-1].split()


def long_frame():
    return pd.DataFrame({"unique_id": ["a", "a", "b"], "ds": [1, 2, 1], "y": [1.0, 2.0, 3.0]})


def test_reading_recognises_the_forms(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("year,flow\n1871,1120\n1872,1160\n")
    series = read_data(path)
    assert list(series.index) == [1871, 1872]
    assert (series.name, series.index.name) == ("flow", "year")
    path.write_text("a,day,b\n1,2020-01-01,3\n2,2020-01-02,4\n")
    wide = read_data(path, Layout("day"))
    assert list(wide.columns) == ["a", "b"]
    assert wide.index[1] == pd.Timestamp("2020-01-02")
    assert read_data(path, Layout("day", ["b"])).to_list() == [3, 4]
    path.write_text("d,x\n01.02.2020,1\n02.02.2020,2\n")
    european = read_data(path, Layout(time_format="%d.%m.%Y"))
    assert european.index[0] == pd.Timestamp("2020-02-01")
    with pytest.raises(ValueError, match="--time-format"):
        read_data(path)
    path.write_text("x\n1\n2\n")
    assert read_data(path).to_list() == [1, 2]
    long_frame().rename(columns={"y": "sold"}).assign(other=0).to_csv(path, index=False)
    pd.testing.assert_frame_equal(read_data(path, Layout(value_columns=["sold"])), long_frame())
    long_frame().to_parquet(tmp_path / "x.parquet")
    pd.testing.assert_frame_equal(read_data(tmp_path / "x.parquet"), long_frame())
    series.to_frame().to_parquet(tmp_path / "y.parquet")
    pd.testing.assert_series_equal(read_data(tmp_path / "y.parquet"), series)


def test_gaps_are_filled_on_request(run):
    text = "month,x\n2020-01-01,1\n2020-02-01,2\n2020-04-01,4\n2020-05-01,3\n2020-06-01,5\n"
    with open("gap.csv", "w") as file:
        file.write(text)
    model = ("--model=seasonal-naive", "--season=1", "--horizon=1")
    code, out, err = run("forecast", "gap.csv", *model)
    assert (code, out) == (2, "")
    assert "fill" in err
    code, out, err = run("forecast", "gap.csv", *model, "--fill-gaps")
    assert code == 0, err
    assert float(out.splitlines()[1].split(",")[2]) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["forecast", "airlin"], "neither a file nor a data set"),
        (["forecast", "missing.csv"], "missing.csv"),
        (["forecast", "notes.txt"], "use one of .csv, .parquet"),
        (["forecast", "empty.csv"], "empty.csv"),
        (["forecast", "words.csv", "--horizon=2"], "--time-column"),
        (["forecast", "fractions.csv", "--horizon=2"], "--time-column"),
        (["forecast", "sales.csv"], "--horizon"),
        (["forecast"], "--load"),
        (["forecast", "--load=none.safetensors", "--horizon=2"], "none.safetensors"),
        (["forecast", "sales.csv", "--horizon=0", "--model=seasonal-naive"], "horizon=0"),
        (["forecast", "sales.csv", "--horizon=two"], "--horizon"),
        (["forecast", "sales.csv", "--horizon=2", "--level=0.8"], "per cent"),
        (["forecast", "sales.csv", "--horizon=2", "--level=high"], "80,95"),
        (["forecast", "sales.csv", "--horizon=2", "--model=prophet"], "'prophet' is unknown"),
        (["forecast", "sales.csv", "--horizon=2", "--order=1,1"], "--order"),
        (["forecast", "sales.csv", "--horizon=2", "--model=rnn", "--order=1,1,1"], "--order"),
        (["forecast", "sales.csv", "--horizon=2", "--value-column=profit"], "no column 'profit'"),
        (["filter", "sales.csv", "--model=seasonal-naive", "--output=x.xlsx"], "x.xlsx"),
        (["filter", "sales.csv", "--model=seasonal-naive", "--output=no/x.csv"], "no"),
        (["compare", "sales.csv", "--horizon=20", "--models=seasonal-naive"], "16 steps"),
        (["compare", "sales.csv", "--horizon=2", "--models=prophet"], "'prophet' is unknown"),
        (["compare", "sales.csv", "--speed=9"], "--speed"),
        (["predict"], "predict"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, quarterly, tmp_path, args, says):
    (tmp_path / "notes.txt").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "words.csv").write_text("shop,x\nnorth,1\nsouth,2\n")
    (tmp_path / "fractions.csv").write_text("x,y\n0.5,1\n0.7,2\n")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_is_replaced_whole_or_not_at_all(run, quarterly, tmp_path, monkeypatch):
    (tmp_path / "out.csv").write_text("old")

    def refuse(*args):
        raise OSError("disk is gone")

    monkeypatch.setattr("os.replace", refuse)
    code, _, err = run(
        *("forecast", "sales.csv", "--model=seasonal-naive", "--horizon=2", "--output=out.csv")
    )
    assert code == 2
    assert "disk is gone" in err
    assert (tmp_path / "out.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "sales.csv"]


def test_leaderboard_marks_what_is_not_exact():
    models = {"exact": sq.SeasonalNaive(4), "trained": sq.DMM(latent_dim=1, max_epochs=1)}
    y = np.random.default_rng(0).normal(size=24)
    table = sq.compare(models, y, horizon=2, season=4, n_samples=20, seed=0).table
    board = cli.leaderboard(table).set_index("model")
    marks = board["log score"].str[0]
    assert (
        marks["trained"]
        == {"estimate": "~", "lower bound": ">", "approximation": "≈"}[
            table["log_score_kind"]["trained"]
        ]
    )
    assert marks["exact"] in "-0123456789"
    assert "p" not in board.columns
