"""Model selection by maximum likelihood: the searches of all series advance together."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.inference import mle
from seqdgm.progress import progress_bar
from seqdgm.results import FitReport
from seqdgm.types import Batch

GROUP = 256  # series fitted by matrices at once, which bounds their memory


class Candidate(mle.QuasiNewtonModel, Protocol):
    """A model to be fitted, with the estimates that `set_free` leaves."""

    coefficients_: Float[Tensor, "series free"]
    sigma2_: Float[Tensor, "series"]


class Fit(Protocol):
    """One model of one series."""

    @property
    def log_likelihood(self) -> float:
        """Log-likelihood at the estimate."""

    @property
    def criterion(self) -> float:
        """What is minimised; infinite for a model that is not to be chosen."""

    @property
    def converged(self) -> bool:
        """Whether the optimiser did."""

    @property
    def message(self) -> str:
        """What the user should know."""


class _Rejected(NamedTuple):
    """A candidate whose likelihood is nowhere finite."""

    log_likelihood: float = np.nan
    criterion: float = np.inf
    converged: bool = False
    message: str = ""


Search = Generator[Sequence[Any], list[float], None]
Waiting = dict[int, tuple[Search, Sequence[Any]]]


class SelectingModel(Protocol):
    """What a model must say to be selected here."""

    def start_searches(self, batch: Batch) -> tuple[Mapping[int, Search], Mapping[int, Fit]]:
        """Search of each series, and the fits of those that need none.

        A search yields keys of candidates and is sent their criteria, until it has found its best.
        """

    def fit_jobs(
        self, jobs: Sequence[tuple[int, Any]], batch: Batch, max_iter: int
    ) -> Sequence[Fit | None]:
        """Fit each key to its series; None where only `candidate` can."""

    def candidate(self, key: Any) -> Candidate:
        """Unfitted model of a key."""

    def judge(
        self,
        key: Any,
        coefficients: Float[np.ndarray, "series free"],
        sigma2: Float[np.ndarray, "series"],
        log_likelihood: Float[np.ndarray, "series"],
        converged: Bool[np.ndarray, "series"],
        n: Int[np.ndarray, "series"],
    ) -> Sequence[Fit]:
        """Fits from the estimates of one key for series of `n` observations."""

    def set_chosen(self, chosen: Sequence[Any], ids: tuple[Any, ...]) -> None:
        """Take over the best fit of every series."""


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

    In each round every series that still searches names its next candidates, and those of all
    series are fitted together.

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
    searches, settled = model.start_searches(batch)
    best: dict[int, Fit] = dict(settled)
    waiting: Waiting = {k: (search, next(search)) for k, search in searches.items()}
    rounds = 0
    with progress_bar(progress, batch.n_series) as advance:
        advance(batch.n_series - len(waiting), "choosing orders")
        while waiting:
            left = len(waiting)
            found = _fit_round(model, batch, waiting, generator, max_iter)
            for k, fits in found.items():
                best[k] = min([best[k], *fits] if k in best else fits, key=lambda f: f.criterion)
            waiting = _advance(waiting, found)
            rounds += 1
            advance(left - len(waiting), "choosing orders")
    chosen = [best[k] for k in range(batch.n_series)]
    for name, one in zip(batch.ids, chosen, strict=True):
        if one.criterion == np.inf:
            raise ValueError(
                f"series {name!r}: every candidate was rejected; the series may be too short: give "
                "d and D, or another model"
            )
    model.set_chosen(chosen, batch.ids)
    return _report(chosen, batch.ids, method, rounds, time.perf_counter() - begin)


def _fit_round(
    model: SelectingModel,
    batch: Batch,
    waiting: Waiting,
    generator: torch.Generator,
    max_iter: int,
) -> dict[int, list[Fit]]:
    """Fit what every series waits for."""
    jobs = [(k, key) for k, (_, keys) in waiting.items() for key in keys]
    found: dict[tuple[int, Any], Fit] = {}
    others: dict[Any, list[int]] = defaultdict(list)
    for (k, key), one in zip(jobs, model.fit_jobs(jobs, batch, max_iter), strict=True):
        if one is None:
            others[key].append(k)
        else:
            found[k, key] = one
    for key, rows in others.items():
        for first in range(0, len(rows), GROUP):
            part = rows[first : first + GROUP]
            fits = _fit_group(model, key, batch.take(torch.tensor(part)), generator, max_iter)
            found.update(zip(((k, key) for k in part), fits, strict=True))
    return {k: [found[k, key] for key in keys] for k, (_, keys) in waiting.items()}


def _fit_group(
    model: SelectingModel, key: Any, batch: Batch, generator: torch.Generator, max_iter: int
) -> Sequence[Fit]:
    """Fit one candidate to every series of a batch through its system matrices."""
    candidate = model.candidate(key)
    try:
        report = mle.fit(
            candidate, batch, method="mle", generator=generator, progress=False, max_iter=max_iter
        )
    except ValueError:  # its likelihood is finite for none of them
        return [_Rejected()] * batch.n_series
    assert report.log_likelihood is not None
    return model.judge(
        key,
        candidate.coefficients_.numpy(),
        candidate.sigma2_.numpy(),
        report.log_likelihood,
        report.converged,
        batch.mask.sum((1, 2)).numpy(),
    )


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
    chosen: Sequence[Fit], ids: tuple[Any, ...], method: str, rounds: int, seconds: float
) -> FitReport:
    likelihood = np.array([one.log_likelihood for one in chosen])
    named = zip(ids, chosen, strict=True)
    return FitReport(
        method=method,
        objective=(float(likelihood.sum()),),
        valid_objective=(),
        converged=np.array([one.converged for one in chosen]),
        n_iter=rounds,
        seconds=seconds,
        log_likelihood=likelihood,
        messages=tuple(f"series {name!r}: {one.message}" for name, one in named if one.message),
    )
