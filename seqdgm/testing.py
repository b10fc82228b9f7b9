"""The conformance suite that every model of the package passes; run it on your own.

Examples
--------
>>> import seqdgm as sq
>>> from seqdgm.testing import check_model
>>> "seeds" in check_model(sq.SeasonalNaive(4))
True
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from seqdgm.inference import offers
from seqdgm.model import SequenceModel
from seqdgm.panel import Panel
from seqdgm.serialize import load

HORIZON = 3
PARTICLES = 64


@dataclass(frozen=True)
class _Case:
    """A fitted model with what it was fitted on."""

    model: SequenceModel
    fresh: SequenceModel
    values: np.ndarray
    index: pd.DatetimeIndex
    options: dict[str, Any]

    def series(self, values: np.ndarray | None = None) -> Any:
        """A pandas container of the values."""
        values = self.values if values is None else values
        index = self.index[: len(values)]
        if values.shape[1] == 1:
            return pd.Series(values[:, 0], index, name="y")
        return pd.DataFrame(values, index, columns=[f"y{k}" for k in range(values.shape[1])])

    def refit(self, y: Any) -> SequenceModel:
        """A fresh model fitted on `y`."""
        return self.fresh.clone().fit(y, seed=0, **self.options)


def check_model(
    model: SequenceModel,
    y: np.ndarray | None = None,
    *,
    fit_options: dict[str, Any] | None = None,
) -> tuple[str, ...]:
    """Check that a model keeps the promises of the package.

    Parameters
    ----------
    model : SequenceModel
        The model, small enough to be fitted several times.
    y : ndarray of shape (time,) or (time, dim), optional
        Data that suit the model, at least 24 steps; default a seasonal positive series of 48.
    fit_options : dict, optional
        Options of ``fit``.

    Returns
    -------
    tuple of str
        Names of the checks that passed, which are all of them.

    Raises
    ------
    AssertionError
        Naming the check that failed and what was found.
    """
    values = _default_data() if y is None else np.asarray(y, dtype=float)
    values = values[:, None] if values.ndim == 1 else values
    index = pd.date_range("2000-01-01", periods=len(values), freq="MS")
    fresh = model.clone()
    case = _Case(model, fresh, values, index, dict(fit_options or {}))
    model.fit(case.series(), seed=0, **case.options)
    for name, check in CHECKS.items():
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"check {name!r} of {model!r} failed: {error}") from error
    return tuple(CHECKS)


def _default_data() -> np.ndarray:
    rng = np.random.default_rng(7)
    t = np.arange(48)
    return 20 + 0.1 * t + 5 * np.sin(2 * np.pi * t / 12) + rng.normal(size=48)


def _same(a: Any, b: Any, what: str, tolerance: float = 0.0) -> None:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    assert a.shape == b.shape, f"{what}: shapes {a.shape} and {b.shape} differ"
    close = np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert close, f"{what}: differ by up to {np.nanmax(np.abs(a - b)):g}"


def _shapes(case: _Case) -> None:
    steps, dim = case.values.shape
    for states in (
        case.model.filter(n_particles=PARTICLES, seed=0),
        case.model.smooth(n_particles=PARTICLES, seed=0),
    ):
        width = states.mean.shape[-1]
        assert states.mean.shape == (1, steps, width), f"mean has shape {states.mean.shape}"
        assert states.cov.shape == (1, steps, width, width), f"cov has shape {states.cov.shape}"
        assert states.mean.dtype == np.float64, f"mean is {states.mean.dtype}"
        assert len(states.names) == width, f"{len(states.names)} names for {width} states"
        assert len(states.to_frame()) == steps, "to_frame has another length than the data"
        spread = np.diagonal(states.cov, axis1=-2, axis2=-1)
        assert (spread >= -1e-9).all(), "a state variance is negative"
    future = case.model.forecast(HORIZON, n_samples=PARTICLES, seed=0)
    assert future.mean.shape == (1, HORIZON, dim), f"forecast has shape {future.mean.shape}"
    assert np.isfinite(future.mean).all(), "the forecast mean is not finite"
    assert future.sample(5, seed=0).shape == (1, 5, HORIZON, dim), "Forecast.sample has other axes"
    drawn = case.model.sample(7, 2, seed=0)
    assert drawn.values.shape == (2, 7, dim), f"sample has shape {drawn.values.shape}"
    assert np.isfinite(drawn.values).all(), "a sampled value is not finite"


def _quantiles(case: _Case) -> None:
    future = case.model.forecast(HORIZON, n_samples=PARTICLES, seed=0)
    wide, narrow = future.interval(95), future.interval(80)
    assert (wide[0] <= narrow[0]).all(), "the 95 % interval does not contain the 80 % one"
    assert (narrow[1] <= wide[1]).all(), "the 95 % interval does not contain the 80 % one"
    frame = future.to_frame()
    name = type(case.model).__name__
    expected = ["unique_id", "ds", name]
    expected += [f"{name}-{side}-{level}" for level in (80, 95) for side in ("lo", "hi")]
    assert list(frame.columns) == expected, f"to_frame has columns {list(frame.columns)}"
    assert frame["ds"].iloc[0] > case.index[-1], "the forecast does not start after the history"


def _seeds(case: _Case) -> None:
    before = torch.random.get_rng_state()
    numpy_before = np.random.get_state(legacy=False)  # noqa: NPY002 - the host may use it
    _same(
        case.model.filter(n_particles=PARTICLES, seed=3).mean,
        case.model.filter(n_particles=PARTICLES, seed=3).mean,
        "filter with the same seed",
    )
    _same(
        case.model.forecast(HORIZON, n_samples=PARTICLES, seed=3).mean,
        case.model.forecast(HORIZON, n_samples=PARTICLES, seed=3).mean,
        "forecast with the same seed",
    )
    first, second = (case.model.sample(9, seed=3).values for _ in range(2))
    _same(first, second, "sample with the same seed")
    again = case.refit(case.series())
    _same(
        again.forecast(HORIZON, n_samples=PARTICLES, seed=3).mean,
        case.model.forecast(HORIZON, n_samples=PARTICLES, seed=3).mean,
        "forecast of a refit with the same seed",
        1e-9,
    )
    assert torch.equal(before, torch.random.get_rng_state()), "torch's global generator was used"
    numpy_after = np.random.get_state(legacy=False)  # noqa: NPY002
    assert str(numpy_before) == str(numpy_after), "numpy's global generator was used"


def _log_likelihood(case: _Case) -> None:
    found = case.model.log_prob(n_particles=PARTICLES, seed=0)
    assert found.value.shape == (1,), f"log_prob has shape {found.value.shape}"
    assert np.isfinite(found.value).all(), "the log-likelihood is not finite"
    kinds = ("exact", "estimate", "lower bound", "approximation")
    assert found.kind in kinds, f"kind {found.kind!r} is unknown"
    if found.kind == "exact":
        assert found.stderr[0] == 0, "an exact likelihood has a standard error"
    if found.kind == "approximation":
        assert np.isnan(found.stderr[0]), "an approximation has a standard error"
    tail = case.model.log_prob(_padded(case), n_particles=PARTICLES, seed=0)
    tolerance = 1e-6 if found.kind == "exact" else None
    if tolerance is not None and tail.kind == "exact":
        _same(tail.value, found.value, "likelihood with unobserved steps appended", tolerance)


def _padded(case: _Case) -> np.ndarray:
    return np.concatenate([case.values, np.full((4, case.values.shape[1]), np.nan)])


def _missing(case: _Case) -> None:
    values = case.values.copy()
    values[10:13] = np.nan
    values[20, 0] = np.nan
    y = case.series(values)
    filled = case.model.impute(y, n_particles=PARTICLES, seed=0)
    assert type(filled) is type(y), f"impute returned a {type(filled).__name__}"
    assert filled.index.equals(y.index), "impute changed the index"
    out = np.asarray(filled, dtype=float).reshape(values.shape)
    seen = np.isfinite(values)
    assert np.array_equal(out[seen], values[seen]), "impute changed an observed value"
    assert np.isfinite(out).all(), "impute left a value missing"
    found = case.model.log_prob(y, n_particles=PARTICLES, seed=0)
    assert np.isfinite(found.value).all(), "the likelihood with missing values is not finite"
    refit = case.refit(y)
    future = refit.forecast(HORIZON, n_samples=PARTICLES, seed=0)
    assert np.isfinite(future.mean).all(), (
        "the forecast after a fit with missing values is not finite"
    )


def _ragged(case: _Case) -> None:
    short = case.values[: len(case.values) - 5]
    panel = [case.values, short]
    both = case.refit(panel)
    joint = both.log_prob(panel, n_particles=PARTICLES, seed=0)
    assert joint.value.shape == (2,), f"a panel of two has {joint.value.shape} likelihoods"
    states = both.filter(panel, n_particles=PARTICLES, seed=0)
    assert np.isnan(states.mean[1, len(short) :]).all(), "states beyond a series' end are not NaN"
    assert np.isfinite(states.mean[1, : len(short)]).all(), "states within a series are not finite"
    future = both.forecast(HORIZON, panel, n_samples=PARTICLES, seed=0)
    assert np.isfinite(future.mean).all(), "a forecast of a ragged panel is not finite"
    own = both.fitted_ids()
    if own is None and joint.kind == "exact":
        alone = both.log_prob([short], n_particles=PARTICLES, seed=0)
        _same(alone.value, joint.value[1:], "likelihood of a series alone and in a panel", 1e-5)
    if own is not None:
        alone_model = case.refit(short)
        _same(
            alone_model.log_prob().value,
            joint.value[1:],
            "likelihood of a series fitted alone and in a panel",
            1e-4,
        )


def _save(case: _Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        case.model.save(path)
        assert [p.name for p in Path(folder).iterdir()] == [path.name], "save left other files"
        again = load(path, model_class=type(case.model))
    a, b = (
        m.forecast(HORIZON, n_samples=PARTICLES, seed=5).sample(4, seed=1)
        for m in (case.model, again)
    )
    _same(a, b, "forecast after save and load")
    assert again.get_params().keys() == case.model.get_params().keys(), "hyperparameters differ"
    assert again.summary() == case.model.summary(), "the summary changed in the file"


def _update(case: _Case) -> None:
    cut = len(case.values) - 4
    model = case.refit(case.series()[:cut])
    model.update(case.series()[cut:])
    whole = model.log_prob(case.series(), n_particles=PARTICLES, seed=2)
    _same(
        model.log_prob(n_particles=PARTICLES, seed=2).value,
        whole.value,
        "likelihood after update and of the whole data",
        1e-9,
    )
    held = model.forecast(HORIZON, n_samples=PARTICLES, seed=2).log_prob(
        _continuation(case, HORIZON)
    )
    assert np.isfinite(held.value).all(), "the log score of a continuation is not finite"


def _continuation(case: _Case, steps: int) -> Any:
    values = case.values[:steps]
    index = pd.date_range(case.index[-1], periods=steps + 1, freq="MS")[1:]
    if values.shape[1] == 1:
        return pd.Series(values[:, 0], index, name="y")
    return pd.DataFrame(values, index, columns=[f"y{k}" for k in range(values.shape[1])])


def _online(case: _Case) -> None:
    if not offers(case.model, "online"):
        return
    steps, dim = case.values.shape
    longer = np.concatenate([case.values, case.values[-1:]])
    first, again = (case.model.online(n_particles=PARTICLES, seed=1) for _ in range(2))
    state, ahead = first.step(longer[-1])
    _same(again.step(longer[-1])[0].mean, state.mean, "an online step with the same seed")
    assert state.n_steps.tolist() == [steps + 1], f"{state.n_steps} steps after {steps} and one"
    assert ahead is not None, "a step without inputs gave no forecast"
    assert ahead.mean.shape == (1, dim), f"the next forecast has shape {ahead.mean.shape}"
    whole = case.model.log_prob(longer, n_particles=PARTICLES, seed=0)
    if whole.kind == "exact":
        _same(state.log_likelihood, whole.value, "likelihood step by step and at once", 1e-5)
    blank, later = first.step(np.full(dim, np.nan))
    assert np.isfinite(blank.mean).all(), "the state after a missing observation is not finite"
    assert later is not None, "a step without inputs gave no forecast"
    assert np.isfinite(later.mean).all(), "the forecast after a missing observation is not finite"
    assert case.model.data_ is not None, "going online took the model's data"
    assert case.model.data_.n_steps == steps, "going online changed the model's data"


def _bad_input(case: _Case) -> None:
    before = case.model.forecast(HORIZON, n_samples=PARTICLES, seed=0).mean
    infinite = case.values.copy()
    infinite[3, 0] = np.inf
    wide = np.concatenate([case.values, case.values], axis=1)
    gap = case.series().drop(case.index[5])
    bad: dict[str, Callable[[], Any]] = {
        "infinite values": lambda: case.model.fit(infinite),
        "an empty series": lambda: case.model.fit(np.empty((0, 1))),
        "a gap in the index": lambda: case.model.fit(gap),
        "an unknown method": lambda: case.model.fit(case.values, method="guess"),
        "an unknown option": lambda: case.model.fit(case.values, nonsense=1),
        "a horizon of zero": lambda: case.model.forecast(0),
        "more columns than fitted": lambda: case.model.filter(wide),
        "an unknown engine": lambda: case.model.filter(method="guess"),
    }
    for what, call in bad.items():
        try:
            call()
        except ValueError:
            continue
        raise AssertionError(f"{what} raised no error")
    after = case.model.forecast(HORIZON, n_samples=PARTICLES, seed=0).mean
    _same(before, after, "forecast before and after the failed calls")


def _params(case: _Case) -> None:
    params = case.model.get_params()
    twin = case.model.clone()
    assert twin.fit_report_ is None, "a clone is fitted"
    assert twin.get_params().keys() == params.keys(), "a clone has other hyperparameters"
    assert repr(twin) == repr(case.model), "a clone has another repr"
    twin.set_params(**params)
    try:
        twin.set_params(no_such_parameter=1)
    except ValueError:
        return
    raise AssertionError("set_params took an unknown name")


def _containers(case: _Case) -> None:
    forms = {"numpy": case.values, "torch": torch.tensor(case.values), "panel": None}
    forms["panel"] = Panel.of(case.values)
    found = {
        name: case.model.log_prob(form, n_particles=PARTICLES, seed=0).value
        for name, form in forms.items()
    }
    for name, value in found.items():
        _same(value, found["numpy"], f"likelihood of the data as {name}")


CHECKS: dict[str, Callable[[_Case], None]] = {
    "shapes": _shapes,
    "quantiles": _quantiles,
    "seeds": _seeds,
    "log-likelihood": _log_likelihood,
    "missing values": _missing,
    "ragged panel": _ragged,
    "save and load": _save,
    "update": _update,
    "online": _online,
    "bad input": _bad_input,
    "hyperparameters": _params,
    "containers": _containers,
}
