"""Accuracy of the states in a comparison whose true states are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from seqdgm.evaluation.attempt import MODEL_ERRORS, Failure, Fitted, Record
from seqdgm.evaluation.checkpoint import Part, Scored
from seqdgm.evaluation.latent import (
    check_truth,
    learn_alignment,
    state_coverage,
    state_nees,
    state_rmse,
)
from seqdgm.inference import offers
from seqdgm.panel import Panel
from seqdgm.results import StatePosterior

Align = Literal["auto", "affine"] | None
COVERED = (80, 95)
_KIND = "accuracy"
_VERBS = {"filter": "filtered", "smooth": "smoothed"}
_N_PARTICLES = 500


def check_states(truth: Any, panel: Panel, align: Align) -> Float[np.ndarray, "series time state"]:
    """Return the true states of a panel, checked before any model is fitted."""
    if align not in ("auto", "affine", None):
        raise ValueError(f"align={align!r} is unknown; choose 'auto', 'affine' or None")
    states = np.asarray(truth, dtype=float)
    if states.ndim != 3 or states.shape[:2] != (panel.n_series, panel.n_steps):
        raise ValueError(
            f"states has shape {states.shape}; the data need ({panel.n_series}, {panel.n_steps}, "
            "state), NaN where the truth is not known"
        )
    return states


def add_accuracy(
    scored: Scored, record: Record, truth: Float[np.ndarray, "series time state"], affine: bool
) -> Scored:
    """Add the accuracy of a record's states to what is kept of it.

    They are scored on the second half of each history; the first half is what an alignment is
    learned from.
    """
    frames, failures = [scored.traces], []
    for one in record.fitted:
        for verb in _VERBS:
            if offers(one.model, verb):
                try:
                    frames += _accuracy(record, one, verb, truth, affine)
                except MODEL_ERRORS as error:
                    text = f"accuracy of states: {type(error).__name__}: {error}"
                    failures.append(Failure(None, text))
    return scored._replace(
        traces=pd.concat(frames, ignore_index=True).astype(scored.traces.dtypes),
        failures=(*scored.failures, *failures),
    )


def accuracy_table(parts: Sequence[Part]) -> pd.DataFrame:
    """Put the accuracy of all parts into one table; see `Comparison.state_accuracy`."""
    rows = []
    for part in parts:
        kept = part.traces[part.traces["kind"] == _KIND]
        for (which, aligned), group in _unpacked(kept).groupby(["which", "aligned"], sort=False):
            values = group.pivot(index="series", columns="metric", values="value")
            row: dict[str, Any] = {"model": part.model, "which": which, "aligned": aligned}
            mean, se = values.mean(), values.sem()
            row["RMSE"] = np.sqrt(mean["MSE"])
            row["RMSE-se"] = se["MSE"] / (2 * row["RMSE"])  # by the delta method
            for name in ("NEES", *(f"coverage-{level}" for level in COVERED)):
                row[name], row[f"{name}-se"] = mean[name], se[name]
            rows.append({**row, "series": len(values)})
    names = ["RMSE", "NEES", *(f"coverage-{level}" for level in COVERED)]
    pairs = [column for name in names for column in (name, f"{name}-se")]
    columns = ["model", "which", "aligned", *pairs, "series"]
    return pd.DataFrame(rows, columns=columns).set_index(["model", "which"])


def _unpacked(kept: pd.DataFrame) -> pd.DataFrame:
    names = kept["name"].str.split("|", expand=True).reindex(columns=range(3))
    names.columns = pd.Index(["which", "aligned", "metric"])
    return pd.concat([names, kept[["series", "value"]]], axis=1)


def _accuracy(
    record: Record, one: Fitted, verb: str, truth: np.ndarray, affine: bool
) -> Iterator[pd.DataFrame]:
    window = record.window.select(one.rows)
    # Told apart by name, so that some series of an array find their parameters among all.
    history = replace(window.train, container="panel")
    posterior: StatePosterior = getattr(one.model, verb)(
        history, window.past_inputs, n_particles=_N_PARTICLES, seed=window.seed
    )
    own = truth[one.rows, : history.n_steps]
    check_truth(posterior, own, same_states=not affine)
    early = (np.arange(history.n_steps) < history.lengths[:, None] // 2)[..., None]
    learned, held = np.where(early, own, np.nan), np.where(early, np.nan, own)
    if affine:
        # Each fit has coordinates of its own, and each series where it has parameters of its own.
        separate = one.model.fitted_ids() is not None
        posterior = _aligned(posterior, learned, separate)
    metrics = {"MSE": state_rmse(posterior, held) ** 2, "NEES": state_nees(posterior, held).value}
    for level in COVERED:
        metrics[f"coverage-{level}"] = state_coverage(posterior, held, level)
    aligned = "affine" if affine else "no"
    for name, values in metrics.items():
        yield pd.DataFrame(
            {
                "kind": _KIND,
                "series": one.rows,
                "name": f"{_VERBS[verb]}|{aligned}|{name}",
                "step": history.n_steps,
                "value": values,
                "std": np.nan,
            }
        )


def _aligned(posterior: StatePosterior, truth: np.ndarray, separate: bool) -> StatePosterior:
    if not separate:
        return learn_alignment(posterior, truth).apply(posterior)
    rows = range(len(truth))
    alone = [
        replace(
            posterior,
            mean=posterior.mean[n : n + 1],
            cov=posterior.cov[n : n + 1],
            panel=posterior.panel.select([n]),
        )
        for n in rows
    ]
    mapped = [
        learn_alignment(one, truth[n : n + 1]).apply(one)
        for n, one in zip(rows, alone, strict=True)
    ]
    return replace(
        posterior,
        mean=np.concatenate([one.mean for one in mapped]),
        cov=np.concatenate([one.cov for one in mapped]),
        names=mapped[0].names,
        draw=None,
    )
