"""Backtests from Parquet to Parquet, against the same panel in memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster_models import Choosy
from standins import LastValue

import seqdgm as sq
from seqdgm.evaluation import backtest
from seqdgm.evaluation.stream import backtest_parquet


@pytest.fixture
def long():
    rng = np.random.default_rng(4)
    blocks = []
    for n in range(11):
        ds = pd.date_range("2015-01-01", periods=36 + n, freq="MS", name="ds")
        y = 50 + rng.normal(size=len(ds)).cumsum()
        y[n] = np.nan
        blocks.append(pd.DataFrame({"unique_id": f"s{n:02d}", "ds": ds, "y": y}))
    return pd.concat(blocks, ignore_index=True)


def write(frame, folder, cuts, row_group_size=50):
    """Write the rows between the cuts to files of their own."""
    folder.mkdir()
    for k, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(frame)], strict=True)):
        table = pa.Table.from_pandas(frame.iloc[a:b], preserve_index=False)
        pq.write_table(table, folder / f"{k:03d}.parquet", row_group_size=row_group_size)
    return folder


def read(dataset):
    return dataset.to_table().to_pandas()


@pytest.mark.parametrize("size", [1, 3, 4, 11, 50])
@pytest.mark.parametrize("cuts", [[], [36, 200], [17, 18, 300]])
def test_rows_are_those_of_the_panel_in_memory(long, tmp_path, size, cuts):
    source = write(long, tmp_path / "in", cuts)
    models = {"m": Choosy(), "n": Choosy(bias=1.0)}
    options = {"n_windows": 2, "seed": 1, "partition_size": size}
    done = backtest_parquet(models, source, 3, tmp_path / "out", **options)
    whole = backtest(models, long, 3, **options)
    found = read(done.forecasts)
    pd.testing.assert_frame_equal(
        found.sort_values(["cutoff", "unique_id", "ds"], ignore_index=True),
        whole.sort_values(["cutoff", "unique_id", "ds"], ignore_index=True),
        check_exact=True,
        check_dtype=False,  # the unit of time stamps in Parquet
    )
    assert len(list((tmp_path / "out/forecasts").iterdir())) == -(-11 // size)
    assert read(done.failures).empty


def test_fits_with_inputs_are_those_of_the_panel_in_memory(long, tmp_path):
    rng = np.random.default_rng(0)
    long["x"] = rng.normal(size=len(long))
    long["y"] = long["y"] + 3 * long["x"]
    source = write(long, tmp_path / "in", [100])
    model = sq.ARIMA((1, 0, 0), trend="c")
    done = backtest_parquet(
        model, source, 2, tmp_path / "out", seed=0, inputs=["x"], partition_size=4
    )
    whole = backtest(
        model,
        long[["unique_id", "ds", "y"]],
        2,
        seed=0,
        inputs=long[["unique_id", "ds", "x"]],
        partition_size=4,
    )
    found = read(done.forecasts)
    pd.testing.assert_frame_equal(found, whole, check_exact=True, check_dtype=False)


def test_finished_partitions_are_skipped(long, tmp_path):
    source, out = write(long, tmp_path / "in", []), tmp_path / "out"
    options = {"seed": 1, "partition_size": 3}
    first = read(backtest_parquet(Choosy(), source, 3, out, **options).forecasts)
    files = sorted((out / "forecasts").iterdir())
    stamps = [path.stat().st_mtime_ns for path in files]
    files[2].unlink()
    again = read(backtest_parquet(Choosy(), source, 3, out, **options).forecasts)
    pd.testing.assert_frame_equal(again, first, check_exact=True)
    same = [path.stat().st_mtime_ns == t for path, t in zip(files, stamps, strict=True)]
    assert same == [True, True, False, True]
    for change in ({"seed": 2}, {"partition_size": 4}):
        with pytest.raises(ValueError, match="holds the results of another run"):
            backtest_parquet(Choosy(), source, 3, out, **options | change)


def test_failures_are_rows(long, tmp_path):
    long.loc[long["unique_id"] == "s07", "y"] *= -1
    source = write(long, tmp_path / "in", [])
    done = backtest_parquet(Choosy(), source, 3, tmp_path / "out", seed=1, partition_size=3)
    assert read(done.failures).to_dict("records") == [
        {
            "model": "Choosy",
            "unique_id": "s07",
            "cutoff": "2018-04-01 00:00:00",
            "error": "ValueError: series 's07' is negative",
        }
    ]


def test_what_cannot_be_streamed_is_refused(long, tmp_path):
    source = write(long, tmp_path / "in", [])
    with pytest.raises(ValueError, match="LastValue shares its parameters"):
        backtest_parquet(LastValue(), source, 3, tmp_path / "out", seed=1)
    with pytest.raises(ValueError, match="no column 'price'"):
        backtest_parquet(Choosy(), source, 3, tmp_path / "out", seed=1, inputs=["price"])
    split = pd.concat([long.iloc[20:], long.iloc[:20]])  # s00 is torn in two
    torn = write(split, tmp_path / "torn", [300])
    with pytest.raises(ValueError, match=r"series 's00' comes after 's10' in .*sorted"):
        backtest_parquet(Choosy(), torn, 3, tmp_path / "out", seed=1)


_PEAK = """
import resource, sys
import pyarrow as pa
from cluster_models import Choosy
from seqdgm.evaluation.stream import backtest_parquet
backtest_parquet(Choosy(), sys.argv[1], 3, sys.argv[2], seed=1, partition_size=100)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_partitions(tmp_path):
    rng = np.random.default_rng(4)
    steps, peaks = 4000, {}
    for partitions in (4, 16):
        folder = tmp_path / f"in{partitions}"
        folder.mkdir()
        for k in range(partitions):
            ids = np.repeat([f"s{k:03d}-{n:03d}" for n in range(100)], steps)
            ds, y = np.tile(np.arange(steps), 100), rng.normal(size=100 * steps) + 50
            table = pa.table({"unique_id": ids, "ds": ds, "y": y})
            pq.write_table(table, folder / f"{k:03d}.parquet")
        command = [sys.executable, "-c", _PEAK, str(folder), str(tmp_path / f"out{partitions}")]
        ended = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
        peaks[partitions] = float(ended.stdout)
    # Twelve partitions more are 38 MB of values alone, and several times that as tables.
    assert peaks[16] - peaks[4] < 20


def test_other_data_of_the_same_shape_are_refused(long, tmp_path):
    source = write(long, tmp_path / "in", [100])
    options = {"seed": 0, "partition_size": 4}
    first = read(backtest_parquet(Choosy(), source, 3, tmp_path / "out", **options).forecasts)
    again = read(backtest_parquet(Choosy(), source, 3, tmp_path / "out", **options).forecasts)
    pd.testing.assert_frame_equal(first, again)
    shutil.rmtree(source)
    write(long.assign(y=100 * long["y"]), source, [100])
    with pytest.raises(ValueError, match="its data differ"):
        backtest_parquet(Choosy(), source, 3, tmp_path / "out", **options)


@pytest.mark.parametrize("size", [1, 4, 20])
def test_series_that_no_model_can_be_given_are_rows_of_failures(long, tmp_path, size):
    long = long[(long["unique_id"] != "s03") | (long.groupby("unique_id").cumcount() < 3)]
    long.loc[(long["unique_id"] == "s07") & (long["ds"] == "2016-01-01"), "y"] = np.inf
    source = write(long, tmp_path / "in", [])
    models = {"m": LastValue(), "n": LastValue(bias=1.0)}
    models["m"].per_series = models["n"].per_series = True
    done = backtest_parquet(models, source, 3, tmp_path / "out", seed=0, partition_size=size)
    failures = read(done.failures).sort_values(["unique_id", "model"], ignore_index=True)
    assert failures["unique_id"].tolist() == ["s03", "s03", "s07", "s07"]
    assert failures["model"].tolist() == ["m", "n", "m", "n"]
    assert "too few" in failures["error"][0]
    assert "infinite" in failures["error"][2]
    forecasts = read(done.forecasts)
    assert sorted(forecasts["unique_id"].unique()) == [
        f"s{n:02d}" for n in range(11) if n not in (3, 7)
    ]
    assert forecasts[["m", "n"]].notna().all(axis=None)
    with pytest.raises(ValueError, match=r"s07|s03"):
        backtest_parquet(
            models, source, 3, tmp_path / "raise", seed=0, partition_size=size, errors="raise"
        )
