"""The published files themselves, where the environment variable SEQDGM_DATA names their folder."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from seqdgm import Panel, datasets
from seqdgm.datasets import registry

FOLDER = os.environ.get("SEQDGM_DATA")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="SEQDGM_DATA is not set: it names the folder of the published files"
)
NAMES = datasets.list().query("origin == 'download'")["name"].to_list()
SERIES = {
    "jsb": (229, 76, 77),
    "jsb_notes": (229, 76, 77),
    "nottingham": (694, 173, 170),
    "musedata": (524, 135, 124),
    "piano_midi": (87, 12, 25),
    "japanese_vowels": (270, None, 370),
    "basic_motions": (40, None, 40),
    "mocap35": (16, 3, 4),
}
STEPS = {
    "jsb": (13807, 4602, 4725),
    "nottingham": (176561, 45513, 44463),
    "musedata": (245202, 82755, 64339),
    "piano_midi": (75911, 8540, 19036),
    "exchange_rate": (4552, 1518, 1518),
    "etth1": (8640, 2880, 2880),
    "etth2": (8640, 2880, 2880),
    "ettm1": (34560, 11520, 11520),
    "national_illness": (676, 97, 193),
}


def parts(data):
    return (data.train, data.valid, data.test)


def test_checksums_and_sizes_of_all_files():
    found = registry.public_files()
    assert len(found) == 52
    for path, about in found.items():
        content = (Path(str(FOLDER)) / path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            about["bytes"],
            about["sha256"],
        )


@pytest.mark.parametrize("name", NAMES)
def test_registry_describes_the_data(name):
    row = datasets.list().set_index("name").loc[name]
    data = datasets.load(name)
    panel = Panel.of(data.y)
    assert row["present"]
    assert (panel.n_series, panel.n_dims, panel.lengths.max()) == (
        row["n_series"],
        row["n_dims"],
        row["length"],
    )
    if data.freq is not None:
        index = panel.index[0]
        assert index.freq == pd.tseries.frequencies.to_offset(data.freq)
    if data.test is not None and isinstance(data.test, (pd.Series, pd.DataFrame)):
        test = Panel.of(data.test).lengths
        if name not in STEPS:
            assert (test == data.horizon).all()
            assert len(data.train) + len(data.test) == len(data.y)


@pytest.mark.parametrize("name", SERIES)
def test_published_parts_of_sequences(name):
    found = parts(datasets.load(name))
    assert tuple(None if part is None else len(part) for part in found) == SERIES[name]


@pytest.mark.parametrize("name", STEPS)
def test_published_steps_of_parts(name):
    for part, steps in zip(parts(datasets.load(name)), STEPS[name], strict=True):
        assert (sum(map(len, part)) if isinstance(part, list) else len(part)) == steps


@pytest.mark.parametrize(
    ("name", "score"),
    [("jsb", 11.06), ("nottingham", 10.25), ("musedata", 11.51), ("piano_midi", 11.05)],
)
def test_independent_keys_score_what_is_stated(name, score):
    data = datasets.load(name)
    train, test = np.concatenate(data.train), np.concatenate(data.test)
    assert set(np.unique(train)) == {0.0, 1.0}
    p = (train.sum(0) + 0.5) / (len(train) + 1)
    nats = -(test * np.log(p) + (1 - test) * np.log1p(-p)).sum(1).mean()
    assert nats == pytest.approx(score, abs=0.006)


def test_two_copies_of_the_chorales_agree():
    ours, theirs = datasets.load("jsb"), datasets.load("jsb_notes")
    for one, other in zip(ours.y, theirs.y, strict=True):
        np.testing.assert_array_equal(one, other)


def test_m3_loads_quickly_and_is_complete():
    begin = time.process_time()
    sets = [datasets.load(f"m3-{which}") for which in ("yearly", "quarterly", "monthly", "other")]
    assert time.process_time() - begin < 2
    assert [data.y["unique_id"].nunique() for data in sets] == [645, 756, 1428, 174]
    assert [data.horizon for data in sets] == [6, 8, 18, 8]


def test_shortest_series():
    assert datasets.load("tourism-yearly").train.groupby("unique_id").size().min() == 7
    lengths = datasets.load("m4-hourly").train.groupby("unique_id").size()
    assert (lengths.min(), lengths.max()) == (700, 960)
    lengths = datasets.load("m4-weekly").train.groupby("unique_id").size()
    assert (lengths.min(), lengths.max()) == (80, 2597)
    assert min(map(len, datasets.load("japanese_vowels").y)) == 7


def test_classical_values():
    shipped = datasets.load("airline").y
    pd.testing.assert_series_equal(datasets.load("airpassengers").y, shipped, check_names=False)
    casualties = datasets.load("seatbelts_r").y
    drivers = datasets.load("seatbelts").y
    pd.testing.assert_series_equal(casualties["drivers"], drivers, check_names=False)
    assert casualties["law"].eq(1).sum() == 23
    assert casualties["law"].idxmax() == pd.Timestamp("1983-02-01")
    assert datasets.load("presidents").y.isna().sum() == 6
    assert datasets.load("boat_race").y.isna().sum() == 28
    returns = datasets.load("sv").y
    assert returns.mean() == pytest.approx(-0.0353, abs=5e-5)
    assert np.isclose(returns.abs(), 0.01, rtol=0, atol=1e-12).sum() == 14


def test_robots():
    rail = datasets.load("localisation-1")
    moved = rail.states["x"].diff() - rail.constants["dt"] * rail.inputs["v"]
    # The noise that the file states, within five standard errors of a variance.
    noise = rail.constants["l"] - rail.y - rail.states["x"]
    allowed = 5 * np.sqrt(2 / len(noise)) * rail.constants["r_var"]
    assert abs(noise.var() - rail.constants["r_var"]) < max(allowed, 0.2 * rail.constants["r_var"])
    assert moved.abs().max() < 0.1
    tubes = datasets.load("localisation-2")
    assert tubes.y.iloc[:, :17].notna().sum(axis=1).mean() == pytest.approx(4.8, abs=0.05)
    assert tubes.states.isna().any(axis=1).mean() == pytest.approx(0.026, abs=5e-4)
    assert tubes.constants["landmarks"].shape == (17, 2)
    stereo = datasets.load("localisation-3")
    assert stereo.constants["landmarks"].shape == (20, 3)
    seen = stereo.y.notna().to_numpy().reshape(1900, 20, 4)
    assert (seen.all(-1) == seen.any(-1)).all()
