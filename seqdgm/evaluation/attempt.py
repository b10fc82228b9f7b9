"""One model on one window: fit, forecast, and a record of it, whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from seqdgm.evaluation._memory import PeakMemory
from seqdgm.evaluation.windows import Window
from seqdgm.fitting import separate
from seqdgm.model import SequenceModel
from seqdgm.panel import Panel
from seqdgm.results import Forecast, LogProb, StatePosterior

# What a model raises when the data or the arithmetic defeat it. Anything else (a wrong type, a
# missing attribute) is a mistake in the code and is not swallowed.
MODEL_ERRORS = (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError)

Errors = Literal["record", "raise"]
R = TypeVar("R")


class Failure(NamedTuple):
    """What failed: the position of the series, or None for all of them, and the error's text."""

    series: int | None
    error: str


class Fitted(NamedTuple):
    """A fitted model and the positions of the series it was fitted to."""

    rows: list[int]
    model: SequenceModel


@dataclass(frozen=True)
class Record:
    """What one model did on one window.

    Attributes
    ----------
    forecast : Forecast or None
        NaN for the series that failed; None where all did.
    fit_seconds, forecast_seconds : float
        Wall time; the first is 0 where the model was not refitted.
    peak_mb : float
        Growth of the process' resident memory at its peak, in megabytes; NaN where unknown.
    failures : tuple of Failure
    fitted : tuple of Fitted
        The models behind the forecast, each with the series it was fitted to.
    """

    model: str
    window: Window
    forecast: Forecast | None
    fit_seconds: float
    forecast_seconds: float
    peak_mb: float = float("nan")
    failures: tuple[Failure, ...] = ()
    fitted: tuple[Fitted, ...] = ()


def attempt(
    name: str,
    model: SequenceModel,
    window: Window,
    n_samples: int,
    options: Mapping[str, Any],
    fitted: dict[str, list[Fitted]] | None,
    errors: Errors,
) -> Record:
    """Fit and forecast; a series that fails is set apart where each has a fit of its own.

    `fitted`, unless None, holds the fits of an earlier window, to be used again, and takes those
    of this one.
    """
    clock = _Clock()
    failures: list[Failure] = []
    done: list[tuple[list[int], Forecast]] = []
    kept: list[Fitted] = []
    with PeakMemory() as memory:
        try:
            if fitted is not None and name in fitted:
                kept = fitted[name]
                for one in kept:
                    part = window.select(one.rows)
                    _again(one, part, n_samples, clock, done, failures, errors)
            else:
                n = window.train.n_series

                def fit(rows: list[int]) -> tuple[Fitted, Forecast]:
                    part = window if len(rows) == n else window.select(rows)
                    return _fit(model, part, rows, n_samples, options, clock)

                divide = errors == "record" and separate(model, options)
                for rows, found in apart(fit, n, divide=divide):
                    if isinstance(found, Exception):
                        if errors == "raise":
                            raise found
                        failures += _failed(found, rows, len(rows) == n)
                        continue
                    done.append((rows, found[1]))
                    kept.append(found[0])
                if fitted is not None and kept:
                    fitted[name] = kept
        except MODEL_ERRORS as error:
            error.add_note(f"raised by {name} on the window after {window.cutoff[0]}")
            raise
    joined = _joined(done, window) if done else None
    failures += _not_finite(done, failures, window)
    if joined is None:
        failures = of_all(failures, window.train.n_series)
    return Record(
        name,
        window,
        joined,
        clock.fit,
        clock.forecast,
        memory.megabytes,
        tuple(failures),
        tuple(kept),
    )


def apart(
    compute: Callable[[list[int]], R], n: int, *, divide: bool = True
) -> Iterator[tuple[list[int], R | Exception]]:
    """Yield `compute` of the positions of n series together, or of parts of them where it fails.

    Halving finds one bad series among N with log N calls for the others. What fails and cannot be
    divided comes with its error.
    """
    todo = [list(range(n))]
    while todo:
        rows = todo.pop(0)
        try:
            found = compute(rows)
        except MODEL_ERRORS as error:
            if divide and len(rows) > 1:
                half = len(rows) // 2
                todo[:0] = [rows[:half], rows[half:]]
            else:
                yield rows, error
            continue
        yield rows, found


def of_all(failures: list[Failure], n: int) -> list[Failure]:
    """One failure of all series where each of n has the same."""
    texts = {failure.error for failure in failures}
    return [Failure(None, texts.pop())] if len(failures) == n and len(texts) == 1 else failures


class _Clock:
    fit = 0.0
    forecast = 0.0


def _fit(
    model: SequenceModel,
    window: Window,
    rows: list[int],
    n_samples: int,
    options: Mapping[str, Any],
    clock: _Clock,
) -> tuple[Fitted, Forecast]:
    start = time.perf_counter()
    try:
        active = model.clone().fit(window.train, window.past_inputs, seed=window.seed, **options)
    finally:
        clock.fit += time.perf_counter() - start
    return Fitted(rows, active), _forecast(active, None, window, n_samples, clock)


def _forecast(
    model: SequenceModel, history: Panel | None, window: Window, n_samples: int, clock: _Clock
) -> Forecast:
    start = time.perf_counter()
    try:
        return model.forecast(
            window.horizon, history, window.inputs, n_samples=n_samples, seed=window.seed
        )
    finally:
        clock.forecast += time.perf_counter() - start


def _again(
    one: Fitted,
    window: Window,
    n_samples: int,
    clock: _Clock,
    done: list[tuple[list[int], Forecast]],
    failures: list[Failure],
    errors: Errors,
) -> None:
    try:
        done.append((one.rows, _forecast(one.model, window.train, window, n_samples, clock)))
    except MODEL_ERRORS as error:
        if errors == "raise":
            raise
        failures += _failed(error, one.rows, whole=False)


def _failed(error: Exception, rows: list[int], whole: bool) -> list[Failure]:
    text = f"{type(error).__name__}: {error}"
    return [Failure(None, text)] if whole else [Failure(n, text) for n in rows]


def _not_finite(
    done: list[tuple[list[int], Forecast]], known: list[Failure], window: Window
) -> Iterator[Failure]:
    """Series whose fit or forecast ended in NaN without an error, and those never forecast."""
    reached = {n for rows, _ in done for n in rows}
    told = {failure.series for failure in known}
    for rows, forecast in done:
        for n, mean in zip(rows, forecast.mean, strict=True):
            if not np.isfinite(mean).all():
                yield Failure(n, "the forecast is not finite")
    if reached and None not in told:
        for n in sorted(set(range(window.train.n_series)) - reached - told):
            yield Failure(n, "failed on an earlier window, with whose fit this one forecasts")


def _joined(done: list[tuple[list[int], Forecast]], window: Window) -> Forecast:
    """One forecast of all series out of those of some, NaN for the others."""
    n = window.train.n_series
    if len(done) == 1 and done[0][0] == list(range(n)):
        return done[0][1]
    first = done[0][1]

    def put(parts: list[np.ndarray], axis: int = 0) -> np.ndarray:
        sizes = np.max([part.shape for part in parts], axis=0)
        sizes[axis] = n
        out = np.full(sizes, np.nan)
        for (rows, _), part in zip(done, parts, strict=True):
            places = [range(size) for size in part.shape]
            places[axis] = rows  # type: ignore[call-overload]
            out[np.ix_(*places)] = part
        return out

    def draw(count: int, seed: int | None) -> np.ndarray:
        seeds = np.random.SeedSequence(seed).generate_state(len(done))
        drawn = zip(done, seeds, strict=True)
        return put([forecast.sample(count, int(one)) for (_, forecast), one in drawn])

    def score(y_future: Any) -> LogProb:
        held = Panel.of(y_future)
        parts = [forecast.log_prob(held.select(rows)) for rows, forecast in done]
        return LogProb(put([p.value for p in parts]), parts[0].kind, put([p.stderr for p in parts]))

    states = [forecast.states for _, forecast in done]
    index = window.train.future_index(window.horizon)
    future = StatePosterior(
        put([s.mean for s in states]),
        put([s.cov for s in states]),
        put([s.log_likelihood for s in states]),
        max((s.names for s in states), key=len),
        window.train,
        "predicted",
        index=index,
    )
    return Forecast(
        mean=put([forecast.mean for _, forecast in done]),
        panel=window.train,
        index=index,
        model=first.model,
        states=future,
        quantiles=lambda q: put([forecast.quantiles(q) for _, forecast in done], 1),
        draw=draw,
        score=score,
    )
