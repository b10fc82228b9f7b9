"""The bundled data against the packages and publications that the values come from."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest

from seqdgm import datasets
from seqdgm.datasets import fetch, registry

NAMES = datasets.list().query("origin == 'package'")["name"].to_list()
PANELS = ("fertility", "us_employment")


def series_of(name: str) -> list[pd.DataFrame]:
    """The series of a set, each a frame whose index is time."""
    y = datasets.load(name).y
    if name in PANELS:
        return [part.set_index("ds")[["y"]] for _, part in y.groupby("unique_id")]
    return [pd.DataFrame(y)]


def test_all_files_are_in_the_registry_and_small():
    bundled = {fetch.locate(name, registry.entry(name))[0] for name in NAMES}
    folder = next(iter(bundled)).parent
    assert bundled == set(folder.glob("*.csv"))
    assert all(path.stat().st_size < 200_000 for path in bundled)


@pytest.mark.parametrize("name", NAMES)
def test_index_is_complete_and_values_are_numbers(name):
    freq = datasets.load(name).freq
    for frame in series_of(name):
        if freq is None:
            expected = np.arange(len(frame))
        else:
            expected = pd.date_range(frame.index[0], frame.index[-1], freq=freq)
        np.testing.assert_array_equal(frame.index, expected)
        assert (frame.dtypes == "float64").all()
        assert not np.isinf(frame.to_numpy()).any()
        assert frame.notna().any().all()


@pytest.mark.parametrize("name", NAMES)
def test_registry_describes_the_data(name):
    row = datasets.list().set_index("name").loc[name]
    series = series_of(name)
    assert len(series) == row["n_series"]
    assert {frame.shape for frame in series} == {(row["length"], row["n_dims"])}
    data = datasets.load(name)
    assert (data.season, data.horizon, data.licence) == (
        row["season"],
        row["horizon"],
        row["licence"],
    )
    assert all((data.source, data.licence, data.description))
    if name not in PANELS and data.freq is not None:
        assert data.y.index.freq == pd.tseries.frequencies.to_offset(data.freq)


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_are_the_data_split_by_the_horizon(name):
    data = datasets.load(name)
    assert data.valid is None
    if name in PANELS:
        whole = pd.concat([data.train, data.test]).sort_values(["unique_id", "ds"])
        assert (data.test.groupby("unique_id").size() == data.horizon).all()
        assert data.train["ds"].max() < data.test["ds"].min()
        pd.testing.assert_frame_equal(whole.reset_index(drop=True), data.y)
    else:
        assert len(data.test) == data.horizon
        whole = pd.concat([data.train, data.test])
        np.testing.assert_array_equal(whole, data.y)
        np.testing.assert_array_equal(whole.index, data.y.index)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_ones_that_models_take(name):
    from seqdgm.evaluation.defaults import MODEL_NAMES

    data = datasets.load(name)
    assert set(data.defaults) <= {"transform", *MODEL_NAMES}
    if "arima" in data.defaults and data.season > 1:
        assert data.defaults["arima"]["seasonal"][3] == data.season
    if data.defaults.get("transform") == "log":
        assert all((frame.dropna() > 0).all().all() for frame in series_of(name))


# Value at a date, from R's own copies (datasets, forecast, fpp2), and totals that are published or
# follow from published means: AirPassengers 280.2986, Nile 919.35, lynx 1538.018.
@pytest.mark.parametrize(
    ("name", "values", "total"),
    [
        ("airline", {"1949-01-01": 112, "1960-07-01": 622, "1960-12-01": 432}, 40363),
        ("nile", {"1871-01-01": 1120, "1913-01-01": 456, "1970-01-01": 740}, 91935),
        ("lynx", {"1821-01-01": 269, "1889-01-01": 39, "1904-01-01": 6991}, 175334),
        ("sunspots", {"1700-01-01": 5, "1810-01-01": 0, "1957-01-01": 190.2}, None),
        ("austres", {"1971-04-01": 13067.3, "1984-01-01": 15531.5, "1993-04-01": 17661.5}, None),
        ("wineind", {"1980-01-01": 15136, "1987-12-01": 40226, "1994-08-01": 23356}, None),
        ("woolyrnq", {"1965-01-01": 6172, "1975-01-01": 3324, "1994-07-01": 6396}, None),
        ("ausbeer", {"1956-01-01": 284, "1990-10-01": 599, "2008-07-01": 410}, None),
        ("seatbelts", {"1969-01-01": 1687, "1972-12-01": 2654, "1983-02-01": 1057}, None),
    ],
)
def test_known_values(name, values, total):
    y = datasets.load(name).y
    assert {date: y[date] for date in values} == values
    if total is not None:
        assert y.sum() == total


def test_statsmodels_has_the_same_values():
    sm = pytest.importorskip("statsmodels.datasets")
    for name, column in (("nile", "volume"), ("sunspots", "SUNACTIVITY")):
        theirs = getattr(sm, name).load_pandas().data
        ours = datasets.load(name).y
        np.testing.assert_array_equal(ours, theirs[column])
        np.testing.assert_array_equal(ours.index.year, theirs.iloc[:, 0])
    co2 = sm.co2.load_pandas().data["co2"]
    np.testing.assert_array_equal(datasets.load("co2").y, co2)
    np.testing.assert_array_equal(datasets.load("co2").y.index, co2.index)
    macro = sm.macrodata.load_pandas().data
    ours = datasets.load("us_macro").y
    np.testing.assert_array_equal(ours, macro[ours.columns])
    np.testing.assert_array_equal(ours.index.year, macro["year"])
    np.testing.assert_array_equal(ours.index.quarter, macro["quarter"])
    elnino = sm.elnino.load_pandas().data.set_index("YEAR")
    ours = datasets.load("elnino").y
    assert ours["1983-06-01"] == elnino.loc[1983, "JUN"]
    assert ours.sum() == pytest.approx(elnino.to_numpy().sum())


def test_statsmodels_fertility():
    sm = pytest.importorskip("statsmodels.datasets")
    theirs = sm.fertility.load_pandas().data.set_index("Country Code")
    ours = datasets.load("fertility").y
    ours = ours.assign(year=ours["ds"].dt.year.astype(str)).pivot(
        index="unique_id", columns="year", values="y"
    )
    pd.testing.assert_frame_equal(
        ours, theirs.loc[ours.index, ours.columns], check_names=False, check_column_type=False
    )


@pytest.mark.parametrize(
    ("name", "package", "pinned", "loader"),
    [
        ("airline", "sktime", "1.2.0", "load_airline"),
        ("lynx", "sktime", "1.2.0", "load_lynx"),
        ("pbs_scripts", "sktime", "1.2.0", "load_PBS_dataset"),
        ("wineind", "pmdarima", "2.1.1", "load_wineind"),
        ("heartrate", "pmdarima", "2.1.1", "load_heartrate"),
        ("austres", "pmdarima", "2.1.1", "load_austres"),
    ],
)
def test_other_packages_have_the_same_values(name, package, pinned, loader):
    theirs = pytest.importorskip(f"{package}.datasets")
    if version(package) != pinned:
        pytest.skip(f"the file was made with {package} {pinned}")
    np.testing.assert_array_equal(datasets.load(name).y, getattr(theirs, loader)())


def test_monthly_co2_keeps_the_months_without_a_week_missing():
    weekly, monthly = datasets.load("co2").y, datasets.load("co2_monthly").y
    missing = ["1958-06", "1958-10", "1964-02", "1964-03", "1964-04"]
    assert monthly.index[monthly.isna()].strftime("%Y-%m").to_list() == missing
    assert monthly["1975-05-01"] == pytest.approx(np.mean(weekly["1975-05"]), abs=1e-4)


def test_employment_adds_up_to_the_published_total():
    y = datasets.load("us_employment").y
    # Bureau of Labor Statistics, total non-farm employees, thousands (release of 2018)
    assert y[y["ds"] == "2006-01-01"]["y"].sum() == pytest.approx(135_450, abs=1)
    assert y[y["ds"] == "2006-02-01"]["y"].sum() == pytest.approx(135_762, abs=1)


def test_airline_likelihood_is_the_published_one():
    sarimax = pytest.importorskip("statsmodels.tsa.statespace.sarimax")
    data = datasets.load("airline")
    orders = data.defaults["arima"]
    model = sarimax.SARIMAX(
        np.log(data.y).to_numpy(),
        order=tuple(orders["order"]),
        seasonal_order=tuple(orders["seasonal"]),
        simple_differencing=True,
    )
    # R: arima(log(AirPassengers), c(0, 1, 1), list(order = c(0, 1, 1)))$loglik
    assert model.fit(disp=0).llf == pytest.approx(244.6965, abs=1e-3)


def test_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match=r"'airlines'.*Did you mean 'airline'.*list\(\)"):
        datasets.load("airlines")
    with pytest.raises(ValueError, match=r"no data set 'qqq'\. seqdgm"):
        datasets.load("qqq")


def test_missing_data_folder_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "files", lambda package: tmp_path / "seqdgm" / "datasets")
    with pytest.raises(datasets.DatasetUnavailableError, match=r"airline\.csv is in neither"):
        datasets.load("airline")


def test_a_data_set_is_frozen_and_loads_do_not_share_state():
    first = datasets.load("airline")
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.season = 1
    first.defaults["arima"]["order"][0] = 9
    first.y.iloc[0] = -1
    again = datasets.load("airline")
    assert again.defaults["arima"]["order"] == [0, 1, 1]
    assert again.y.iloc[0] == 112
