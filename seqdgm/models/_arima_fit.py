"""Fit many series and orders of seasonal ARIMA models in one call of the compiled search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from seqdgm.kernels import cpu_search, cpu_steps, types
from seqdgm.kernels.cached import compiled, digest
from seqdgm.kernels.cpu_search import Limits, make_search
from seqdgm.kernels.threads import spread
from seqdgm.models import _arima_compiled, _arima_spec, _arma_likelihood
from seqdgm.models._arima_compiled import (
    DONE,
    ENDED,
    EVALUATIONS,
    ITERATIONS,
    LOGLIK,
    SIGMA2,
    Jobs,
    Results,
)
from seqdgm.models._arima_spec import TRENDS, ArimaSpec
from seqdgm.models._arma_likelihood import make_work

_MAX_GAPS = 32  # missing values that pulses serve better than a filter with a diffuse state


class Fits(NamedTuple):
    """Maximum-likelihood fits, a row a job.

    Attributes
    ----------
    theta : ndarray of shape (jobs, most)
        Free parameters, those of a job first: ``constrain(spec, theta[j : j + 1, :spec.n_free])``
        are its coefficients.
    log_likelihood, sigma2 : ndarray of shape (jobs,)
        At these parameters; NaN where it is finite nowhere.
    converged : ndarray of bool, shape (jobs,)
    n_iter, n_evaluations : ndarray of int, shape (jobs,)
        Iterations of the search that was chosen, and evaluations of all.
    done : ndarray of bool, shape (jobs,)
        False where this path does not apply, and nothing was fitted: for more than 32 missing
        values within a series, or where they leave a starting value of the differences unknown.
    messages : tuple of str
        Why a search did not converge; empty where it did.
    trace : ndarray of shape (iterations + 1, jobs)
        Log-likelihood after each iteration, without columns unless asked for.
    """

    theta: Float[np.ndarray, "jobs most"]
    log_likelihood: Float[np.ndarray, "jobs"]
    sigma2: Float[np.ndarray, "jobs"]
    converged: Bool[np.ndarray, "jobs"]
    n_iter: Int[np.ndarray, "jobs"]
    n_evaluations: Int[np.ndarray, "jobs"]
    done: Bool[np.ndarray, "jobs"]
    messages: tuple[str, ...]
    trace: Float[np.ndarray, "iterations jobs"]


def fit_jobs(
    specs: ArimaSpec | Sequence[ArimaSpec],
    x: Float[np.ndarray, "series time"],
    lengths: Int[np.ndarray, "series"],
    u: Float[np.ndarray, "inputrows time inputs"] | None = None,
    *,
    series: Int[np.ndarray, "jobs"] | None = None,
    start: Float[np.ndarray, "jobs arma"] | None = None,
    max_iter: int = 200,
    trace: bool = False,
) -> Fits:
    """Fit each specification to its series by exact maximum likelihood.

    Parameters
    ----------
    specs : ArimaSpec or sequence of ArimaSpec
        One for all jobs, or one a job.
    x : ndarray of shape (series, time)
        Data; NaN where missing.
    lengths : ndarray of int, shape (series,)
        Steps of each series.
    u : ndarray of shape (series or 1, time, inputs), optional
        Regressors of the jobs whose specification has any.
    series : ndarray of int, shape (jobs,), optional
        Series of each job; by default job j is series j.
    start : ndarray of shape (jobs, most), optional
        Free ARMA parameters to start from, instead of Hannan and Rissanen's and zeros.
    max_iter : int
        Iterations of a search; with 0, the likelihood at `start`.
    trace : bool
        Keep the log-likelihood of every iteration.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(1, 80)).cumsum(1)
    >>> fits = fit_jobs([ArimaSpec(d=1), ArimaSpec(1, 1, 1)], x, np.array([80]), series=[0, 0])
    >>> bool(fits.log_likelihood[1] >= fits.log_likelihood[0]), fits.converged.tolist()
    (True, [True, True])
    """
    chosen = np.arange(len(x)) if series is None else np.asarray(series, np.int64)
    unique = [specs] if isinstance(specs, ArimaSpec) else list(dict.fromkeys(specs))
    n, steps = len(chosen), x.shape[1]
    row = dict(zip(unique, range(len(unique)), strict=True))
    which = [0] * n if isinstance(specs, ArimaSpec) else [row[spec] for spec in specs]
    no_inputs, no_start = np.zeros((1, steps, 0)), np.zeros((0, 0))
    jobs = Jobs(
        np.array([_order(spec) for spec in unique], np.int64)[which],
        chosen,
        np.ascontiguousarray(x, np.float64),
        np.ascontiguousarray(lengths, np.int64),
        no_inputs if u is None else np.ascontiguousarray(u, np.float64),
        no_start if start is None else np.ascontiguousarray(start, np.float64),
    )
    out = Results(
        np.zeros((n, max(spec.n_free for spec in unique))),
        np.full((n, 2), np.nan),
        np.zeros((n, 4), np.int64),
        np.empty((max_iter + 1, n if trace else 0)),
    )
    _run(jobs, unique, Limits(max_iter, 1e-8, 1e-10), out)
    ended, n_iter = out.note[:, ENDED], out.note[:, ITERATIONS]
    return Fits(
        out.theta,
        out.number[:, LOGLIK],
        out.number[:, SIGMA2],
        ended == cpu_search.CONVERGED,
        n_iter,
        out.note[:, EVALUATIONS],
        out.note[:, DONE] > 0,
        tuple(cpu_search.MESSAGES[end].format(max_iter=max_iter) for end in ended.tolist()),
        cpu_search.filled(out.trace, n_iter),
    )


def _run(jobs: Jobs, specs: Sequence[ArimaSpec], limits: Limits, out: Results) -> None:
    """Spread the jobs over threads, each with memory for the largest of them."""
    n, steps = len(jobs.series), jobs.x.shape[1]
    lags = max(max(s.ar_order + s.ma_order for s in specs), int(10 * np.log10(max(steps, 1))), 1)
    arma = max(spec.n_arma for spec in specs)
    inside = np.arange(steps) < jobs.lengths[:, None]
    gaps = int((inside & ~np.isfinite(jobs.x)).sum(1).max(initial=0))
    columns = 1 + max(spec.n_trend + spec.n_inputs for spec in specs) + min(gaps, _MAX_GAPS)
    loop = _compiled()

    def run(first: int, last: int) -> None:
        work = make_work(lags, columns, max(columns, arma + 1), steps)
        loop(first, last, jobs, work, make_search(1, arma, limits.max_iter), limits, out)

    spread(run, n, 100 * steps * lags)


def _order(spec: ArimaSpec) -> tuple[int, ...]:
    """A specification as the compiled loop reads it."""
    orders = (spec.p, spec.q, spec.P, spec.Q, spec.s, spec.d, spec.D)
    return (*orders, TRENDS.index(spec.trend), spec.n_inputs)


def warm_up() -> None:
    """Compile the search."""
    fit_jobs(ArimaSpec(d=1), np.array([[0.0, 1.0, 3.0]]), np.array([3]))


@cache
def _compiled() -> Callable[..., None]:
    """The loop over jobs, cached on disk and keyed by its sources."""
    modules = (types, cpu_steps, cpu_search, _arima_spec, _arma_likelihood, _arima_compiled)
    return compiled(_arima_compiled.bind_fit(digest(*modules)))
