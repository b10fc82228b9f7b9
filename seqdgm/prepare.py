"""From what the caller passes to what an engine takes: checks, series matching, batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from seqdgm._align import has_labels
from seqdgm.panel import Panel, align_inputs
from seqdgm.transform import Transform, check_given, fit_transform, given_power
from seqdgm.types import Batch, Diffuse

if TYPE_CHECKING:
    from seqdgm.model import SequenceModel


def prepare(
    model: SequenceModel, y: Any, inputs: Any, horizon: int = 0
) -> tuple[Panel, Batch, Transform]:
    """Validate data and inputs against a fitted model and move them to model units.

    Parameters
    ----------
    model : SequenceModel
        A model that is ready.
    y : array_like or None
        Data; None takes what the model holds.
    inputs : array_like or None
        Known covariates of every step, and of `horizon` more. Where the model holds the data, those
        of the horizon alone are enough.
    horizon : int
        Steps after each series' end that inputs must cover.

    Raises
    ------
    ValueError
        If the data do not fit the model.
    """
    if y is None:
        if model.data_ is None:
            raise ValueError("the model holds no data; pass y")
        panel = model.data_
    else:
        panel = Panel.of(y)
    if model.obs_dim_ is not None and panel.n_dims != model.obs_dim_:
        raise ValueError(
            f"the model was fitted on {model.obs_dim_} columns, but y has {panel.n_dims}: "
            f"{panel.columns}"
        )
    if y is not None:
        _check_columns(model, panel)
        model.check_data(panel)
    rows = match_rows(model, panel)
    if inputs is None and y is None and horizon == 0 and model.inputs_ is not None:
        u = model.inputs_
    elif inputs is not None and y is None and horizon and model.inputs_ is not None:
        u = _future_inputs(panel, model.inputs_, inputs, horizon)
    else:
        u = align_inputs(panel, inputs, horizon)
    check_inputs(model, u, inputs)
    transform = transform_for(model, panel)
    return panel, make_batch(model, panel, u, rows, transform), transform


def check_inputs(
    model: SequenceModel, u: Float[np.ndarray, "series steps inputs"], inputs: Any
) -> None:
    """Raise a ValueError unless the input columns are those of the fit, in the same order."""
    width = model.input_width()
    if width is not None and u.shape[2] != width:
        raise ValueError(
            f"the model was fitted with {width} input columns, but got {u.shape[2]}; pass inputs= "
            "with the same columns, covering every step"
        )
    named, known = input_names(inputs), model.input_columns_
    if named is not None and known is not None and named != known:
        raise ValueError(
            f"the input columns are {named}, but the model was fitted with {known}; pass them in "
            "that order"
        )


def input_names(inputs: Any) -> tuple[str, ...] | None:
    """Names of the input columns, where they come in a table."""
    if not isinstance(inputs, pd.DataFrame):
        return None
    return tuple(str(c) for c in inputs.columns if c not in ("unique_id", "ds"))


def _check_columns(model: SequenceModel, panel: Panel) -> None:
    held = model.data_
    if held is None or {held.container, panel.container} != {"wide"}:
        return
    if held.columns != panel.columns:
        raise ValueError(
            f"y has the columns {panel.columns}, but the model was fitted on {held.columns}; pass "
            "them in that order"
        )


def check_lengths(panel: Panel, least: int, name: str) -> None:
    """Raise a ValueError for a series with fewer than `least` observed steps."""
    observed = panel.mask.any(-1).sum(1)
    short = np.flatnonzero(observed < least)
    if len(short):
        k = int(short[0])
        raise ValueError(
            f"series {panel.ids[k]!r} has {observed[k]} observed steps (of {panel.lengths[k]}), "
            f"too short for {name}, which needs at least {least}; give more data or use a smaller "
            "model"
        )


def check_observed(panel: Panel, *, pooled: bool) -> None:
    """Raise a ValueError for a column that is never observed where parameters depend on it."""
    seen = panel.mask.any(1)
    if pooled:
        seen = seen.any(0, keepdims=True)
    blank = np.argwhere(~seen)
    if len(blank):
        k, d = blank[0]
        where = "in any series" if pooled else f"in series {panel.ids[k]!r}"
        raise ValueError(
            f"column {panel.columns[d]!r} has no observation {where}, so nothing can be learned of "
            "it; drop it"
        )


def match_rows(model: SequenceModel, panel: Panel) -> list[int]:
    """Which fitted series each series of a panel is, for parameters kept series by series."""
    own = model.fitted_ids()
    if own is None or len(own) == 1:
        return [0] * panel.n_series
    if _positional(panel) and panel.n_series != len(own):
        raise ValueError(
            f"the model has parameters for {len(own)} series, but y has {panel.n_series} without "
            "names, so it is not clear which these are; pass a long table (unique_id, ds, y)"
        )
    place = {name: k for k, name in enumerate(own)}
    missing = [name for name in panel.ids if name not in place]
    if missing:
        raise ValueError(
            f"series {missing[0]!r} has no parameters: the model was fitted series by series on "
            f"{len(own)} others; refit with it, or fit with pooled=True"
        )
    return [place[name] for name in panel.ids]


def transform_for(model: SequenceModel, panel: Panel) -> Transform:
    """The fitted map; a map of each series' own is fitted anew for series not seen before."""
    fitted = model.transform_
    if fitted is None:
        return given_transform(model, panel.n_dims)
    power = fitted.power
    shared = power if power is not None and len(power) == 1 else None
    own = len(fitted.loc) > 1 or (power is not None and shared is None)
    if not own and model.effective_scale() != "mean":
        return fitted
    held = model.data_
    same_count = held is not None and held.n_series == panel.n_series
    if held is not None and (same_count or not _positional(panel)):
        place = {name: k for k, name in enumerate(held.ids)}
        if all(name in place for name in panel.ids):
            return fitted.select([place[name] for name in panel.ids])
    return fit_transform(panel, model.transform, model.effective_scale(), power=shared)


def given_transform(model: SequenceModel, dim: int) -> Transform:
    """The map of a model that was never fitted: it cannot know a scale."""
    if model.effective_scale() is not None:
        raise ValueError(
            f"scale={model.scale!r} is learned from data; call fit(y) first, or use scale=None"
        )
    check_given(model.transform)
    same, power = Transform.identity(dim), given_power(model.transform)
    if power is None:
        return same
    return Transform(torch.full_like(same.loc, power), same.loc, same.scale)


def _positional(panel: Panel) -> bool:
    """Whether the series are told apart by their position alone."""
    return panel.container in ("array", "tensor", "list")


def make_batch(
    model: SequenceModel,
    panel: Panel,
    u: Float[np.ndarray, "series steps inputs"],
    rows: list[int],
    transform: Transform,
) -> Batch:
    """Tensors in the model's precision, on its device."""
    return Batch.of(panel, u, transform, rows, dtype=model.dtype, device=model.device)


def log_jacobian(
    panel: Panel,
    transform: Transform,
    start: np.ndarray | None = None,
    *,
    diffuse: Diffuse | None = None,
) -> Float[np.ndarray, "series"]:
    """Sum of log|dw/dx| over the observed elements that have a density, from ``start[n]`` on."""
    if transform.trivial:
        return np.zeros(panel.n_series)
    mask = panel.mask
    if start is not None:
        mask = mask & (np.arange(panel.n_steps)[None, :, None] >= start[:, None, None])
    if diffuse is not None:
        mask = mask & ~diffuse().numpy()
    x = torch.from_numpy(np.where(mask, panel.values, 1.0))
    return np.where(mask, transform.log_jacobian(x).numpy(), 0.0).sum((1, 2))


def _future_inputs(
    panel: Panel, held: Float[np.ndarray, "series time inputs"], inputs: Any, horizon: int
) -> Float[np.ndarray, "series steps inputs"]:
    """Inputs of history and horizon, from a table of both or of the horizon alone."""
    given = Panel.of(inputs, name="inputs")
    ahead = panel.span(
        np.zeros((panel.n_series, horizon, panel.n_dims)),
        np.full(panel.n_series, horizon),
        panel.future_index(horizon),
    )
    if has_labels(given) and has_labels(panel):
        begin = min(index[0] for index in given.index if len(index))
        if begin <= max(index[-1] for index in panel.index):
            return align_inputs(panel, inputs, horizon)
    elif given.n_series not in (1, panel.n_series) or (
        (given.lengths >= panel.lengths + horizon).all()
    ):
        return align_inputs(panel, inputs, horizon)
    elif (given.lengths != horizon).any():
        raise ValueError(
            f"inputs have {int(given.lengths.max())} rows; give {horizon} for the horizon alone, "
            f"or at least {int(panel.lengths.max()) + horizon} for the history and the horizon"
        )
    future = align_inputs(ahead, inputs)
    u = np.zeros((panel.n_series, panel.n_steps + horizon, future.shape[2]))
    for k, length in enumerate(panel.lengths):
        u[k, :length] = held[k, :length]
        u[k, length : length + horizon] = future[k, :horizon]
    return u
