"""MATLAB files: piano rolls, motion capture and robots. scipy parses them as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seqdgm.datasets.formats import Parts


def polyphonic(paths: Sequence[Path], freq: str | None) -> Parts:
    """Cell rows `traindata`, `validdata` and `testdata` of piano rolls, (time, 88) each."""
    cells = _read(paths[0])
    train, valid, test = (
        [np.asarray(roll, float) for roll in cells[f"{part}data"].ravel()]
        for part in ("train", "valid", "test")
    )
    return Parts(train + valid + test, train, valid, test)


def mocap(paths: Sequence[Path], freq: str | None) -> Parts:
    """Sequences of equal length, `Xtr`, `Xval` and `Xtest`, with their principal axes."""
    found = _read(paths[0])
    train, valid, test = found["Xtr"], found["Xval"], found["Xtest"]
    constants = {"train_low": found["Xtr_low"], "u": found["u"], "v": found["v"].ravel()}
    return Parts(np.concatenate([train, valid, test]), train, valid, test, constants=constants)


def rail(paths: Sequence[Path], freq: str | None) -> Parts:
    r"""Robot on a rail.

    .. math:: x_k = x_{k-1} + T v_k + w_k, \quad l - r_k = x_k + n_k
    """
    found = _read(paths[0])
    return Parts(
        _frame(found, "r").iloc[:, 0],
        inputs=_frame(found, "v"),
        states=_frame(found, "x_true").set_axis(["x"], axis=1),
        constants=_scalars(found, "l", "r_var", "v_var") | {"dt": _step(found)},
    )


def tubes(paths: Sequence[Path], freq: str | None) -> Parts:
    """Robot among tubes: range and bearing, NaN where a tube was not seen (a range of 0).

    True poses are NaN where the file says that they are not valid.
    """
    found = _read(paths[0])
    unseen = found["r"] == 0
    seen = {name: np.where(unseen, np.nan, found[name]) for name in ("r", "b")}
    valid = found["true_valid"].ravel() != 0
    states = _frame(found, "x_true", "y_true", "th_true").set_axis(["x", "y", "theta"], axis=1)
    return Parts(
        _frame(seen, "r", "b"),
        inputs=_frame(found, "v", "om"),
        states=states.where(pd.Series(valid, states.index), axis=0),
        constants=_scalars(found, "d", "r_var", "b_var", "v_var", "om_var")
        | {"landmarks": found["l"], "dt": _step(found)},
    )


def stereo(paths: Sequence[Path], freq: str | None) -> Parts:
    """Stereo camera: four pixel coordinates of each point, NaN where it was not seen (-1).

    Steps differ in length: the inputs hold `dt`, the seconds since the step before (NaN at the
    first), beside the speeds. The true pose is a position and a rotation vector.
    """
    found = _read(paths[0])
    pixels = found["y_k_j"]  # (coordinate, time, point)
    pixels = np.where(pixels == -1, np.nan, pixels).transpose(1, 2, 0).reshape(pixels.shape[1], -1)
    axes = ("left_u", "left_v", "right_u", "right_v")
    names = [f"{axis}{j + 1}" for j in range(found["y_k_j"].shape[2]) for axis in axes]
    steps = np.diff(found["t"].ravel(), prepend=np.nan)
    inputs = np.column_stack([found["v_vk_vk_i"].T, found["w_vk_vk_i"].T, steps])
    states = np.column_stack([found["r_i_vk_i"].T, found["theta_vk_i"].T])
    vectors = {name: found[name].ravel() for name in ("rho_v_c_v", "w_var", "v_var", "y_var")}
    return Parts(
        _table(pixels, names),
        inputs=_table(inputs, ["v1", "v2", "v3", "w1", "w2", "w3", "dt"]),
        states=_table(states, ["r1", "r2", "r3", "theta1", "theta2", "theta3"]),
        constants=_scalars(found, "fu", "fv", "cu", "cv", "b")
        | vectors
        | {"landmarks": found["rho_i_pj_i"].T, "C_c_v": found["C_c_v"]},
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    from scipy.io import loadmat

    return {name: value for name, value in loadmat(path).items() if not name.startswith("__")}


def _frame(found: Mapping[str, np.ndarray], *names: str) -> pd.DataFrame:
    """Fields of shape (time, columns) beside each other, numbered where they have several."""
    columns = [
        name if found[name].shape[1] == 1 else f"{name}{k + 1}"
        for name in names
        for k in range(found[name].shape[1])
    ]
    return _table(np.column_stack([found[name] for name in names]), columns)


def _table(values: np.ndarray, columns: Sequence[str]) -> pd.DataFrame:
    index = pd.RangeIndex(len(values), name="ds")
    return pd.DataFrame(values.astype(float), index, [*columns])


def _scalars(found: Mapping[str, np.ndarray], *names: str) -> dict[str, Any]:
    return {name: float(found[name].item()) for name in names}


def _step(found: Mapping[str, np.ndarray]) -> float:
    t = found["t"].ravel()
    return float((t[-1] - t[0]) / (len(t) - 1))
