"""Regenerate the CSV files of this folder from the packages that publish their values.

In a scratch environment (none of these is needed to use the data):

    pip install pandas statsmodels==0.15.0 pmdarima==2.1.1
    pip install --no-deps sktime==1.2.0 vega_datasets==0.9.0
    python data/make.py

Values are written as published. What is left out (padding, all-missing rows, totals) and
what is derived (monthly CO2) is said beside the code that does it, and in README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
VERSIONS = {
    "statsmodels": "0.15.0",
    "pmdarima": "2.1.1",
    "sktime": "1.2.0",
    "vega_datasets": "0.9.0",
}

# Sectors that partition the non-farm total: the file also carries their sums, which would make
# the panel linearly dependent.
SECTORS = (
    "mining_and_logging",
    "construction",
    "durable_goods",
    "nondurable_goods",
    "wholesale_trade",
    "retail_trade",
    "transportation_and_warehousing",
    "utilities",
    "information",
    "financial_activities",
    "professional_and_business_services",
    "education_and_health_services",
    "leisure_and_hospitality",
    "other_services",
    "government",
)


def _file(package: str, path: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: see the commands at the top of {__file__}")
    return Path(spec.submodule_search_locations[0]) / path


def _statsmodels(name: str) -> pd.DataFrame:
    return pd.read_csv(_file("statsmodels", f"datasets/{name}/{name}.csv"))


def _sktime(name: str) -> pd.DataFrame:
    return pd.read_csv(_file("sktime", f"datasets/data/{name}.csv"))


def _pmdarima(name: str, column: str, start: str | None, freq: str | None) -> pd.DataFrame:
    import pmdarima.datasets

    values = pd.Series(getattr(pmdarima.datasets, f"load_{name}")())
    # ausbeer is padded to whole years with one trailing missing value
    values = values.loc[: values.last_valid_index()]
    whole = bool((values == values.round()).all())
    ds = values.index if start is None else pd.date_range(start, periods=len(values), freq=freq)
    return pd.DataFrame({"ds": ds, column: values.astype("int64") if whole else values})


def airline() -> pd.DataFrame:
    data = _sktime("Airline/Airline")
    return pd.DataFrame({"ds": pd.to_datetime(data["Date"]), "passengers": data["Passengers"]})


def lynx() -> pd.DataFrame:
    data = _sktime("Lynx/Lynx")
    return data.set_axis(["ds", "trappings"], axis=1)


def pbs_scripts() -> pd.DataFrame:
    data = _sktime("PBS_dataset/PBS_dataset")
    return pd.DataFrame(
        {"ds": pd.to_datetime(data["Month"], format="%Y %b"), "scripts": data["Scripts"]}
    )


def seatbelts() -> pd.DataFrame:
    data = _sktime("seatbelts/seatbelts")
    return pd.DataFrame({"ds": pd.to_datetime(data.iloc[:, 0]), "casualties": data["KSI"]})


def nile() -> pd.DataFrame:
    data = _statsmodels("nile")
    return data.set_axis(["ds", "volume"], axis=1)


def sunspots() -> pd.DataFrame:
    data = _statsmodels("sunspots")
    return pd.DataFrame({"ds": data["YEAR"].astype(int), "sunspots": data["SUNACTIVITY"]})


def co2() -> pd.DataFrame:
    data = _statsmodels("co2")
    return pd.DataFrame({"ds": pd.to_datetime(data["date"], format="%Y%m%d"), "co2": data["co2"]})


def co2_monthly() -> pd.DataFrame:
    """Means of the weekly values dated in each month; missing where there is none."""
    weekly = co2().set_index("ds")
    return weekly.resample("MS").mean().round(4).reset_index()


def elnino() -> pd.DataFrame:
    data = _statsmodels("elnino").set_index("YEAR")
    start = f"{int(data.index[0])}-01-01"
    return pd.DataFrame(
        {
            "ds": pd.date_range(start, periods=data.size, freq="MS"),
            "temperature": data.to_numpy().ravel(),
        }
    )


def us_macro() -> pd.DataFrame:
    data = _statsmodels("macrodata")
    columns = ["realgdp", "realcons", "realinv", "unemp", "infl", "tbilrate"]
    start = f"{int(data['year'].iloc[0])}-01-01"
    ds = pd.Series(pd.date_range(start, periods=len(data), freq="QS"), name="ds")
    return pd.concat([ds, data[columns]], axis=1)


def seattle_weather() -> pd.DataFrame:
    data = pd.read_csv(_file("vega_datasets", "_data/seattle-weather.csv"))
    ds = pd.to_datetime(data["date"], format="%Y/%m/%d").rename("ds")
    return pd.concat([ds, data[["precipitation", "temp_max", "temp_min", "wind"]]], axis=1)


def us_employment() -> pd.DataFrame:
    data = pd.read_csv(_file("vega_datasets", "_data/us-employment.csv"))
    data = data.rename(columns={"month": "ds"})
    return _long(data.melt("ds", SECTORS, var_name="unique_id", value_name="y"))


def fertility() -> pd.DataFrame:
    """Countries observed in at least half of the years; years observed in any country."""
    data = _statsmodels("fertility").set_index("Country Code")
    years = data[[column for column in data.columns if column.isdigit()]].dropna(axis=1, how="all")
    years = years[years.notna().sum(axis=1) >= years.shape[1] / 2]
    table = years.rename_axis("unique_id").reset_index()
    return _long(table.melt("unique_id", var_name="ds", value_name="y"))


def _long(table: pd.DataFrame) -> pd.DataFrame:
    return table[["unique_id", "ds", "y"]].sort_values(["unique_id", "ds"], ignore_index=True)


FILES: dict[str, Callable[[], pd.DataFrame]] = {
    "airline": airline,
    "ausbeer": lambda: _pmdarima("ausbeer", "production", "1956-01-01", "QS"),
    # pmdarima says "March 1971 to March 1994", which does not hold 89 quarters; the first value
    # is the population at the census of 30 June 1971, as in R's copy (1971 Q2 to 1993 Q2).
    "austres": lambda: _pmdarima("austres", "residents", "1971-04-01", "QS"),
    "co2": co2,
    "co2_monthly": co2_monthly,
    "elnino": elnino,
    "fertility": fertility,
    # half-second steps without a date: counted, not dated
    "heartrate": lambda: _pmdarima("heartrate", "rate", None, None),
    "lynx": lynx,
    "nile": nile,
    "pbs_scripts": pbs_scripts,
    "seatbelts": seatbelts,
    "seattle_weather": seattle_weather,
    "sunspots": sunspots,
    "us_employment": us_employment,
    "us_macro": us_macro,
    "wineind": lambda: _pmdarima("wineind", "sales", "1980-01-01", "MS"),
    "woolyrnq": lambda: _pmdarima("woolyrnq", "production", "1965-01-01", "QS"),
}


def main() -> None:
    for package, wanted in VERSIONS.items():
        found = version(package)
        if found != wanted:
            raise SystemExit(f"{package} {found} is installed, the files were made with {wanted}")
    for name, make in FILES.items():
        make().to_csv(HERE / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
