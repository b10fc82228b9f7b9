"""Readers of file formats, on tiny files written here in the layout of the published ones."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat

from seqdgm import Panel
from seqdgm.datasets import formats, matlab


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def cells(arrays):
    out = np.empty((1, len(arrays)), object)
    out[0, :] = [*arrays]
    return out


def test_polyphonic_cells_become_lists_of_rolls(tmp_path):
    rng = np.random.default_rng(0)
    parts = {
        part: [rng.integers(0, 2, (k + 2, 88)).astype(np.uint8) for k in range(count)]
        for part, count in (("train", 3), ("valid", 1), ("test", 2))
    }
    path = tmp_path / "x.mat"
    savemat(path, {f"{part}data": cells(rolls) for part, rolls in parts.items()})
    found = matlab.polyphonic([path], None)
    for part, rolls in parts.items():
        for ours, theirs in zip(getattr(found, part), rolls, strict=True):
            assert ours.dtype == np.float64
            np.testing.assert_array_equal(ours, theirs)
    assert len(found.y) == 6


def test_notes_become_the_same_rolls(tmp_path):
    table = {"train": [[[21, 108], []]], "valid": [[[60]]], "test": [[[60], [61]]]}
    found = formats.chorale_notes([written(tmp_path / "x.json", json.dumps(table))], None)
    (roll,) = found.train
    assert np.argwhere(roll).tolist() == [[0, 0], [0, 87]]
    assert roll.shape == (2, 88)
    assert [len(part) for part in found.y] == [2, 1, 2]


def test_a_competition_is_a_ragged_panel_of_one_period(tmp_path):
    def row(period, x, xx):
        return {"period": [period], "x": x, "xx": xx}

    table = {
        "b": row("YEARLY", [1, 2, 3], [4.5, 5]),
        "q": row("QUARTERLY", [7], [8]),
        "a": row("YEARLY", [6], [7, 8]),
    }
    found = formats.competition([written(tmp_path / "x.json", json.dumps(table))], None, "yearly")
    assert found.y.values.tolist() == [
        ["b", 0, 1.0],
        ["b", 1, 2.0],
        ["b", 2, 3.0],
        ["b", 3, 4.5],
        ["b", 4, 5.0],
        ["a", 0, 6.0],
        ["a", 1, 7.0],
        ["a", 2, 8.0],
    ]
    assert found.train["y"].tolist() == [1, 2, 3, 6]
    assert found.test["ds"].tolist() == [3, 4, 1, 2]
    assert Panel.of(found.y).lengths.tolist() == [5, 3]


def test_m4_cells_to_the_right_are_padding(tmp_path):
    train = written(tmp_path / "train.csv", '"V1","V2","V3","V4"\n"W1","1","2","3"\n"W2","4",,\n')
    test = written(tmp_path / "test.csv", '"V1","V2","V3"\n"W1","5","6"\n"W2","7","8"\n')
    found = formats.m4([train, test], None)
    assert found.y["y"].tolist() == [1, 2, 3, 5, 6, 4, 7, 8]
    assert found.test["ds"].tolist() == [3, 4, 1, 2]
    other = written(tmp_path / "other.csv", '"V1","V2"\n"W1","5"\n"W3","7"\n')
    with pytest.raises(ValueError, match="do not have the same series"):
        formats.m4([train, other], None)


TSF = (
    "# caf\xe9\r\n@relation x\r\n@attribute series_name string\r\n@frequency weekly\r\n@data\r\n"
    "T1:2015-01-01 00-00-00:1,2,?\r\nT2:2015-01-08 00-00-00:4,5.5\r\n"
)


def test_tsf_in_latin_1_with_windows_line_ends(tmp_path):
    found = formats.tsf([written(tmp_path / "x.tsf", TSF.encode("latin-1"))], "W-THU")
    panel = Panel.of(found.y)
    assert panel.ids == ("T1", "T2")
    np.testing.assert_array_equal(panel.values[..., 0], [[1, 2, np.nan], [4, 5.5, np.nan]])
    assert found.y["ds"].iloc[[0, 3]].astype(str).tolist() == ["2015-01-01", "2015-01-08"]
    with pytest.raises(ValueError, match="no step of frequency"):
        formats.tsf([tmp_path / "x.tsf"], "W-SUN")


def test_one_tsf_series_is_a_series(tmp_path):
    text = TSF.rsplit("T2", 1)[0]
    found = formats.tsf([written(tmp_path / "x.tsf", text.encode("latin-1"))], "W-THU")
    assert found.y.index.freqstr == "W-THU"
    assert found.y.iloc[:2].tolist() == [1, 2]
    with pytest.raises(ValueError, match="no series"):
        formats.tsf([written(tmp_path / "y.tsf", text.rsplit("T1", 1)[0])], "W-THU")


def test_ts_dimensions_are_columns_and_the_label_is_last(tmp_path):
    head = "#note\n@problemName x\n@data\n"
    train = written(tmp_path / "a.ts", head + "1,2,3:4,5,6:one\n")
    test = written(tmp_path / "b.ts", head + "7,8:9,10:two\n")
    found = formats.ts([train, test], None)
    assert found.train[0].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert found.test[0].tolist() == [[7, 9], [8, 10]]
    assert (found.labels["train"].tolist(), found.labels["test"].tolist()) == (["one"], ["two"])
    assert len(found.y) == 2


def test_libras_skips_its_first_line_and_repeated_rows(tmp_path):
    rows = "classLast,4,2,comma\n.1,.2,.3,.4,1\n.1,.2,.3,.4,1\n.1,.2,.3,.4,2\n"
    found = formats.libras([written(tmp_path / "x.data", rows)], None)
    assert found.y.tolist() == [[[0.1, 0.2], [0.3, 0.4]]] * 2
    assert found.labels["y"].tolist() == ["1", "2"]


def test_dated_tables_compressed_or_not(tmp_path):
    text = "date,a,OT\n2016-07-01 00:00:00,1,2\n2016-07-01 00:15:00,3,4\n"
    plain = written(tmp_path / "x.csv", text)
    packed = written(tmp_path / "y.csv.gz", gzip.compress(text.encode()))
    found = formats.dated([plain], "15min").y
    assert found.index.freqstr == "15min"
    pd.testing.assert_frame_equal(formats.dated([packed], "15min").y, found)
    gap = written(tmp_path / "z.csv", text + "2016-07-01 01:00:00,5,6\n")
    with pytest.raises(ValueError, match="frequency"):
        formats.dated([gap], "15min")


def test_numbers_compressed_or_with_blanks(tmp_path):
    packed = written(tmp_path / "x.txt.gz", gzip.compress(b"1.5,2\n3,4\n"))
    assert formats.numbers([packed], None, ["a", "b"]).y.to_numpy().tolist() == [[1.5, 2], [3, 4]]
    single = written(tmp_path / "x.dat", "  -0.5\n    1.25")
    assert formats.numbers([single], None, ["r"]).y.tolist() == [-0.5, 1.25]


def test_r_tables(tmp_path):
    quarterly = written(tmp_path / "q.csv", "rownames,time,value\n1,1945.5,\n2,1945.75,87\n")
    y = formats.r_table([quarterly], "QS").y
    assert y.index.astype(str).tolist() == ["1945-07-01", "1945-10-01"]
    np.testing.assert_array_equal(y, [np.nan, 87])
    wide = written(tmp_path / "w.csv", "rownames,a,b\n1,1,2\n2,3,4\n")
    assert formats.r_table([wide], "MS", start="1969-01-01").y.index[1] == pd.Timestamp(
        "1969-02-01"
    )
    assert formats.r_table([wide], None, columns=["b"]).y.tolist() == [2, 4]
    yearly = written(tmp_path / "y.csv", "year,won\n1829,0\n1830,\n")
    y = formats.r_table([yearly], "YS", time="year").y
    assert (y.name, y.index[0].year, y.isna().sum()) == ("won", 1829, 1)


def test_mocap_parts(tmp_path):
    x = np.arange(120.0).reshape(5, 8, 3)
    path = tmp_path / "x.mat"
    axes = {"Xtr_low": x[:2], "u": np.eye(3), "v": np.ones((1, 3))}
    savemat(path, {"Xtr": x[:2], "Xval": x[2:3], "Xtest": x[3:], **axes})
    found = matlab.mocap([path], None)
    np.testing.assert_array_equal(found.y, x)
    np.testing.assert_array_equal(found.test, x[3:])
    assert found.constants["v"].shape == (3,)


def test_robots_hide_what_was_not_seen(tmp_path):
    path = tmp_path / "x.mat"
    t = 0.1 * np.arange(3.0)[:, None]
    one = {"l": 3.0, "r_var": 0.1, "v_var": 0.2}
    savemat(path, {"t": t, "r": t + 1, "v": t, "x_true": 2 - t, **one})
    found = matlab.rail([path], None)
    np.testing.assert_allclose(found.y, 1 + t[:, 0])
    assert found.states.columns.tolist() == ["x"]
    assert found.constants == {**one, "dt": pytest.approx(0.1)}

    r, b = np.array([[1.0, 0], [0, 2], [3, 4]]), np.array([[0.5, 0], [0, 0], [1, 1]])
    pose = {f"{name}_true": t for name in ("x", "y", "th")}
    scalars = dict.fromkeys(("d", "r_var", "b_var", "v_var", "om_var"), 1.0)
    valid = np.array([[1], [0], [1]], np.uint8)
    more = {"t": t, "r": r, "b": b, "v": t, "om": t, "true_valid": valid, "l": np.eye(2)}
    savemat(path, {**more, **pose, **scalars})
    found = matlab.tubes([path], None)
    expected = [[1, np.nan, 0.5, np.nan], [np.nan, 2, np.nan, 0], [3, 4, 1, 1]]
    np.testing.assert_array_equal(found.y, expected)
    assert found.y.columns.tolist() == ["r1", "r2", "b1", "b2"]
    assert found.states.isna().all(axis=1).tolist() == [False, True, False]


def test_stereo_pixels_by_point(tmp_path):
    pixels = np.arange(24.0).reshape(4, 3, 2)
    pixels[:, 1, 0] = -1
    three = {name: np.ones((3, 3)) for name in ("theta_vk_i", "r_i_vk_i", "w_vk_vk_i", "v_vk_vk_i")}
    fixed = {
        "t": [[0, 0.1, 0.3]],
        "rho_i_pj_i": np.ones((3, 2)),
        "C_c_v": np.eye(3),
        "rho_v_c_v": np.ones((3, 1)),
        "w_var": np.ones((3, 1)),
        "v_var": np.ones((3, 1)),
        "y_var": np.ones((4, 1)),
    }
    path = tmp_path / "x.mat"
    scalars = dict.fromkeys(("fu", "fv", "cu", "cv", "b"), 1.0)
    savemat(path, {"y_k_j": pixels, **three, **fixed, **scalars})
    found = matlab.stereo([path], None)
    assert found.y.loc[0, ["left_u1", "right_v1", "left_u2"]].tolist() == [0, 18, 1]
    assert found.y.isna().sum(axis=1).tolist() == [0, 4, 0]
    np.testing.assert_allclose(found.inputs["dt"], [np.nan, 0.1, 0.2])


def test_objects_that_are_not_data_are_not_built(tmp_path):
    """A pickle in place of a file is refused by every reader, not loaded."""
    import pickle

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("executed",))

    path = written(tmp_path / "x", pickle.dumps(Trap()) + b"\n" * 200)
    readers = (
        lambda: matlab.polyphonic([path], None),
        lambda: formats.competition([path], None, "yearly"),
        lambda: formats.tsf([path], "D"),
        lambda: formats.dated([path], "D"),
        lambda: formats.numbers([path], None, ["x"]),
    )
    for read in readers:
        with pytest.raises((ValueError, KeyError, TypeError)):
            read()
