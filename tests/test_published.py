"""Estimates that others have published, reproduced."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import seqdgm as sq

FOLDER = os.environ.get("SEQDGM_DATA")
needs_folder = pytest.mark.skipif(
    FOLDER is None, reason="SEQDGM_DATA names no folder with R's classical series"
)


def classical(name: str) -> np.ndarray:
    assert FOLDER is not None
    table = pd.read_csv(Path(FOLDER) / "classical" / f"{name}.csv")
    return table["value"].to_numpy(float)


def test_airline() -> None:
    """Box, Jenkins and Reinsel (1994), section 9.2: 0.396 and 0.614; R 4 `arima` prints these."""
    y = sq.datasets.load("airline").y
    model = sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 12), transform="log").fit(y)
    found = model.estimates()
    assert found["ma.L1"] == pytest.approx(-0.4018, abs=1e-4)
    assert found["ma.S.L12"] == pytest.approx(-0.5569, abs=1e-4)
    assert found["sigma2"] == pytest.approx(0.001348, abs=1e-6)
    logs = sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 12)).fit(np.log(y))
    assert float(logs.log_prob()) == pytest.approx(244.70, abs=5e-3)


def test_mauna_loa() -> None:
    """R's `arima(co2, c(0, 1, 1), c(0, 1, 1))` prints -0.3501 and -0.8506 (Keeling and Whorf).

    That series holds monthly means that were adjusted and interpolated; these come from the weekly
    ones with gaps, so they agree as far as the standard errors (0.0496 and 0.0257) go.
    """
    y = sq.datasets.load("co2_monthly").y["1959":"1997"]
    found = sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 12)).fit(y).estimates()
    assert found["ma.L1"] == pytest.approx(-0.3501, abs=0.0496)
    assert found["ma.S.L12"] == pytest.approx(-0.8506, abs=0.0257)


@needs_folder
def test_www_usage() -> None:
    """Help page of `arima` in R, `arima(WWWusage, order = c(3, 1, 0))`."""
    model = sq.ARIMA((3, 1, 0)).fit(classical("WWWusage"))
    published = {"ar.L1": 1.1513, "ar.L2": -0.6612, "ar.L3": 0.3407}
    found = model.estimates()
    assert {name: found[name] for name in published} == pytest.approx(published, abs=1e-4)
    assert found["sigma2"] == pytest.approx(9.363, abs=1e-3)
    assert float(model.log_prob()) == pytest.approx(-252.0, abs=5e-2)


@needs_folder
def test_presidents() -> None:
    """Help page of `arima` in R, `arima(presidents, c(3, 0, 0))`; six quarters are missing.

    The mean of the process is the coefficient of a constant regressor, as there.
    """
    y = classical("presidents")
    assert np.isnan(y).sum() == 6
    model = sq.ARIMA((3, 0, 0)).fit(y, inputs=np.ones((len(y), 1)))
    published = {"ar.L1": 0.7496, "ar.L2": 0.2523, "ar.L3": -0.1890}
    found = model.estimates()
    assert {name: found[name] for name in published} == pytest.approx(published, abs=1e-4)
    assert found["u1"] == pytest.approx(56.2236, abs=1e-2)
    assert found["sigma2"] == pytest.approx(81.12, abs=1e-2)
    assert float(model.log_prob()) == pytest.approx(-414.08, abs=5e-3)
