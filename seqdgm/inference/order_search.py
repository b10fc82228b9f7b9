"""Model selection by maximum likelihood: the searches of all series advance together."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqdgm.inference import mle
from seqdgm.results import FitReport
from seqdgm.types import Batch

GROUP = 256  # series fitted in one call, which bounds the memory of their system matrices


class Candidate(mle.QuasiNewtonModel, Protocol):
    """A model to be fitted, with the estimates that `set_free` leaves."""

    coefficients_: Float[Tensor, "series free"]
    sigma2_: Float[Tensor, "series"]


class Fit(NamedTuple):
    """One model of one series; the criterion of a rejected one is infinite."""

    key: Any
    coefficients: Float[np.ndarray, "free"]
    sigma2: float
    log_likelihood: float
    criterion: float
    converged: bool


Search = Generator[Sequence[Any], list[float], None]
Waiting = dict[int, tuple[Search, Sequence[Any]]]


class SelectingModel(Protocol):
    """What a model must say to be selected here."""

    def searches(self, batch: Batch) -> Sequence[Search | None]:
        """One search a series; None where it leaves nothing to be explained.

        A search yields keys of candidates and is sent their criteria, until it has found its best.
        """

    def candidate(self, key: Any) -> Candidate:
        """Unfitted model of a key."""

    def criteria(
        self,
        key: Any,
        coefficients: Float[np.ndarray, "series free"],
        log_likelihood: Float[np.ndarray, "series"],
        batch: Batch,
    ) -> Float[np.ndarray, "series"]:
        """What is minimised; infinite for a model that is not to be chosen."""

    def set_chosen(self, chosen: Mapping[int, Fit], ids: tuple[Any, ...]) -> None:
        """Take over the best model of every series that was searched."""


class Fitted(NamedTuple):
    """Estimates of one candidate for several series; NaN likelihood where it failed."""

    coefficients: Float[np.ndarray, "series free"]
    sigma2: Float[np.ndarray, "series"]
    log_likelihood: Float[np.ndarray, "series"]
    converged: Bool[np.ndarray, "series"]


def fit(
    model: SelectingModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    max_iter: int = 200,
) -> FitReport:
    """Choose and fit the best model of every series.

    In each round every series that still searches names its next candidates; those of the same
    key are fitted in one batched call.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    max_iter : int
        Quasi-Newton iterations at most, for each candidate.

    Raises
    ------
    ValueError
        If all candidates of a series are rejected.
    """
    begin = time.perf_counter()
    best: dict[int, Fit] = {}
    searches = enumerate(model.searches(batch))
    waiting: Waiting = {k: (search, next(search)) for k, search in searches if search is not None}
    rounds = 0
    with _shown(batch.n_series, shown=progress) as show:
        while waiting:
            found = _fit_round(model, batch, waiting, generator, max_iter)
            for k, fits in found.items():
                best[k] = min([best[k], *fits] if k in best else fits, key=lambda f: f.criterion)
            waiting = _advance(waiting, found)
            rounds += 1
            show(batch.n_series - len(waiting))
    for k, one in best.items():
        if not np.isfinite(one.criterion):
            raise ValueError(
                f"series {batch.ids[k]!r}: every candidate was rejected; the series may be too "
                "short: give d and D, or another model"
            )
    model.set_chosen(best, batch.ids)
    return _report(batch, best, method, rounds, time.perf_counter() - begin)


def fit_group(
    candidate: Candidate, batch: Batch, generator: torch.Generator, max_iter: int
) -> Fitted:
    """Fit one candidate to every series of a batch by exact maximum likelihood."""
    try:
        report = mle.fit(
            candidate,
            batch,
            method="mle",
            generator=generator,
            progress=False,
            max_iter=max_iter,
        )
    except ValueError:  # no series has a finite likelihood: the candidate fits none of them
        nothing = np.full(batch.n_series, np.nan)
        return Fitted(np.zeros((batch.n_series, 0)), nothing, nothing, np.isfinite(nothing))
    assert report.log_likelihood is not None
    return Fitted(
        candidate.coefficients_.numpy(),
        candidate.sigma2_.numpy(),
        report.log_likelihood,
        report.converged,
    )


def _fit_round(
    model: SelectingModel,
    batch: Batch,
    waiting: Waiting,
    generator: torch.Generator,
    max_iter: int,
) -> dict[int, list[Fit]]:
    """Fit what every series waits for, one group of series with the same candidate at a time."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for k, (_, keys) in waiting.items():
        for key in keys:
            groups[key].append(k)
    found: dict[tuple[int, Any], Fit] = {}
    for key, members in groups.items():
        for first in range(0, len(members), GROUP):
            rows = members[first : first + GROUP]
            part = batch.take(torch.tensor(rows))
            fitted = fit_group(model.candidate(key), part, generator, max_iter)
            value = np.full(len(rows), np.inf)
            if np.isfinite(fitted.log_likelihood).any():
                value = model.criteria(key, fitted.coefficients, fitted.log_likelihood, part)
            for k, *one in zip(
                rows,
                fitted.coefficients,
                fitted.sigma2.tolist(),
                fitted.log_likelihood.tolist(),
                value.tolist(),
                fitted.converged.tolist(),
                strict=True,
            ):
                found[k, key] = Fit(key, *one)
    return {k: [found[k, key] for key in keys] for k, (_, keys) in waiting.items()}


def _advance(waiting: Waiting, found: Mapping[int, Sequence[Fit]]) -> Waiting:
    """Tell every search what came out; those that go on wait for their next candidates."""
    still: Waiting = {}
    for k, (search, _) in waiting.items():
        try:
            still[k] = (search, search.send([one.criterion for one in found[k]]))
        except StopIteration:
            continue
    return still


def _report(
    batch: Batch, best: Mapping[int, Fit], method: str, rounds: int, seconds: float
) -> FitReport:
    n = batch.n_series
    likelihood = np.array([best[k].log_likelihood if k in best else 0.0 for k in range(n)])
    messages = [
        f"series {batch.ids[k]!r} leaves nothing to be explained: its innovation variance is 0"
        for k in range(n)
        if k not in best
    ]
    return FitReport(
        method=method,
        objective=(float(likelihood.sum()),),
        valid_objective=(),
        converged=np.array([k not in best or best[k].converged for k in range(n)]),
        n_iter=rounds,
        seconds=seconds,
        log_likelihood=likelihood,
        messages=tuple(messages),
    )


@contextmanager
def _shown(total: int, *, shown: bool) -> Iterator[Any]:
    """A function to be told how many series are done; it draws a bar on standard error if asked."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("choosing orders", total=total)
        yield lambda done: bar.update(task, completed=done)
