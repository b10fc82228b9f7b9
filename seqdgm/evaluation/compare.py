"""Several models, one series or panel, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from seqdgm.cluster import PARTITION_SIZE
from seqdgm.evaluation import leaderboard
from seqdgm.evaluation.attempt import Errors, Record
from seqdgm.evaluation.backtest import (
    Models,
    Run,
    assemble,
    failure_rows,
    name_models,
    note_failures,
    run_parts,
)
from seqdgm.evaluation.checkpoint import Scored
from seqdgm.evaluation.defaults import default_models, infer_season
from seqdgm.evaluation.latent_table import Align, accuracy_table, add_accuracy, check_states
from seqdgm.evaluation.provenance import describe
from seqdgm.evaluation.significance import Ranking, rank_models
from seqdgm.evaluation.traces import states_table, training_table
from seqdgm.panel import Panel
from seqdgm.types import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes
    ----------
    table : DataFrame
        One row a model, best CRPS first (models that failed somewhere last). Columns: ``MASE``,
        ``sMAPE`` (0 to 200), ``CRPS`` (data units), ``coverage-80`` and ``coverage-95`` (per
        cent), ``MSIS-80`` and ``MSIS-95``, for vectors ``CRPS_sum`` and ``energy_score`` (data
        units), ``log_score`` (nats per held-out step, larger is better), each followed by its
        standard error ``<metric>-se``; ``log_score_kind`` ("exact", "estimate",
        "lower bound" or "approximation"); ``wQL`` (weighted quantile loss at 0.1, ..., 0.9, pooled
        over all points); ``OWA`` (Naive2 is 1; NaN where a value is not positive); ``ACD-80`` and
        ``ACD-95`` (per cent points); ``p_value`` and ``p_holm``; ``units``; ``fit_seconds`` and
        ``forecast_seconds`` (totals over the windows, without imports and compilation);
        ``peak_mb`` (growth of the process' resident memory at the peak, largest over the windows;
        NaN off Linux).
    scores : DataFrame
        The same metrics for each unit: model, unique_id, window, cutoff.
    forecasts : DataFrame
        The frame of `seqdgm.backtest`.
    failures : list of dict
        Model, unique_id (None: all series), cutoff and error text of whatever failed.
    panel : Panel
        The data.
    horizon, season : int
        Horizon of the windows and season of the MASE.
    baseline : str
        Model that the paired tests compare with.
    test, aggregate : str
        As given to `compare`.
    pit : DataFrame
        ``unique_id, ds, cutoff, y`` and for each model the randomised probability integral
        transform of y in its draws (uniform where the model is right; `seqdgm.evaluation.metrics`).
    states : DataFrame
        ``model, unique_id, ds, kind, state, mean, std``: smoothed states of the last window (given
        its whole history) and the predicted ones after it, in the units of the model; the last 300
        steps and first 8 states of up to 8 series, evenly chosen. None for models that no engine
        smooths, and for series of more than 20,000 steps.
    state_accuracy : DataFrame
        Where the true states are known, one row for each model and ``which`` ("filtered" or
        "smoothed"), on the second half of the history of the last window. ``aligned``: "no", or
        "affine" for states mapped to the truth by a map learned on the first half; ``RMSE`` (units
        of the states), ``NEES`` (divided by the dimension, so that 1 is right), ``coverage-80`` and
        ``coverage-95`` (per cent), each with a standard error over the series; ``series``. See
        `seqdgm.evaluation.latent`. Models without states have no row.
    training : DataFrame
        ``model, window, curve, unit, iteration, value`` of every fit by iterations: ``curve`` is
        "objective", "validation", or "kept", at the epoch whose weights were kept.
    settings : dict
        The models as text, windows, step, refit, draws, seed, inputs; ``"versions"`` of the
        packages and the machine.

    Notes
    -----
    The *unit* is one series on one window. A metric is the mean over the units, each unit being
    the mean over its held-out steps (and over the columns of a multivariate series). Standard
    errors are the standard deviation over the units divided by the root of their number, NaN for
    a single unit; they take the units as independent, which overlapping windows are not.

    With ``aggregate="pooled"`` the units are weighted by their numbers of known values, so that
    every point weighs the same.

    ``p_value``: two-sided test of the paired differences in CRPS to `baseline`, each divided by the
    MASE scale of its unit so that series of different size can be taken together. "wilcoxon":
    signed ranks of the units, which it takes as independent; NaN below six pairs, where it cannot
    reach 5 %. "bootstrap": `paired_bootstrap` over the series, windows of one staying together.
    "diebold-mariano": of the mean over the series at each window, in time; for one series or a few
    and many windows. ``p_holm`` is adjusted for the number of models.

    References
    ----------
    Wilcoxon (1945), Biometrics Bulletin 1(6); Demsar (2006), "Statistical comparisons of
    classifiers over multiple data sets", JMLR 7, section 3.1.3.
    """

    table: pd.DataFrame
    scores: pd.DataFrame
    forecasts: pd.DataFrame
    failures: list[dict[str, Any]]
    panel: Panel = field(repr=False)
    horizon: int
    season: int
    baseline: str
    level: tuple[float, ...] = (80, 95)
    test: leaderboard.Test = "wilcoxon"
    aggregate: leaderboard.Weights = "series"
    pit: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    states: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    training: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    state_accuracy: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    def __repr__(self) -> str:
        head = f"horizon={self.horizon}, season={self.season}"
        return f"Comparison({head}: MASE with m = {self.season})\n{self.table}"

    @property
    def likelihoods(self) -> pd.DataFrame:
        """Held-out log-likelihood of each model and what kind of number it is.

        Columns: ``log_score`` (nats per held-out step, mean over the units), ``kind`` ("exact",
        "estimate", "lower bound", "approximation"; only numbers of one kind compare directly, and
        a model whose lower bound is above another's exact value is better), ``stderr`` (Monte
        Carlo error of the mean: 0 where exact, NaN where unknown), ``se`` (over the units),
        ``units``.
        """
        return leaderboard.likelihoods(self.scores, list(self.table.index))

    def rank(
        self, metric: str = "CRPS", alpha: float = 0.05, *, models: Sequence[str] | None = None
    ) -> Ranking:
        """Rank the models unit by unit: Friedman and Nemenyi tests; see `rank_models`.

        Parameters
        ----------
        metric : str
            Column of `scores`: a loss, ``"log_score"`` (larger is better), or a coverage such as
            ``"coverage-95"`` (nearer to its level is better).
        alpha : float
            Level of the tests.
        models : sequence of str, optional
            Which models; default all. A unit on which one of them was not scored is left out.

        Returns
        -------
        Ranking
            ``.ranks``, ``.critical_difference``, ``.groups()`` and ``.plot()``, the
            critical-difference diagram.
        """
        known = leaderboard.metric_names(self.level, self.panel.n_dims)
        if metric not in known:
            raise ValueError(f"metric={metric!r} does not rank models; choose among {known}")
        wide = self.scores.pivot(index=["unique_id", "window"], columns="model", values=metric)
        if models is not None:
            wide = wide[list(models)]
        if metric == "log_score":
            wide = -wide
        elif metric.startswith("coverage-"):
            wide = (wide - float(metric.removeprefix("coverage-"))).abs()
        return rank_models(wide, alpha)

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, full precision, the models in the column ``model``."""
        self.table.to_csv(path)

    def to_latex(self, path: str | Path | None = None, **options: Any) -> str:
        """Return the table as LaTeX, standard errors in brackets; see `latex.to_latex`.

        Parameters
        ----------
        path : path, optional
            File to write, whole or not at all.
        **options
            ``columns=``, ``caption=`` and ``label=``.
        """
        from seqdgm.evaluation.latex import to_latex

        return to_latex(self, path, **options)

    def report(
        self, path: str | Path, *, title: str = "Forecast comparison", max_series: int = 50
    ) -> None:
        """Write a page with everything: one HTML file that loads nothing from anywhere.

        It holds the table (click a heading to sort), the critical-difference diagram, forecast fans
        of the series and windows picked, probability integral transforms and coverage by step,
        likelihoods, states, training curves, time and memory, the data, failures, and versions. It
        follows the light or dark setting of the browser and prints. It is about 5 MB, nearly all of
        it the plotly library that draws.

        Parameters
        ----------
        path : path
            File to write, whole or not at all.
        title : str
            Heading of the page.
        max_series : int
            Most series whose forecasts are drawn, evenly chosen among all; the page says how many
            were left out. The tables are over all series in any case.

        Raises
        ------
        ImportError
            Without plotly: ``pip install 'seqdgm[report]'``.

        Examples
        --------
        >>> import numpy as np, seqdgm as sq
        >>> y = np.tile([1.0, 2.0, 3.0, 5.0], 6) + 0.1 * np.sin(np.arange(24.0))
        >>> result = sq.compare([sq.SeasonalNaive(season=4)], y, horizon=4, season=4, seed=0)
        >>> result.report("report.html")  # doctest: +SKIP
        """
        from seqdgm.evaluation.report import write_report

        write_report(self, path, title=title, max_series=max_series)

    def plot(self, **options: Any) -> Figure:
        """Draw each model's forecast fan against the held-out data; see `plot_comparison`."""
        from seqdgm.plotting import plot_comparison

        crps = self.table["CRPS"]
        notes = {name: f"CRPS {value:.3g}" for name, value in crps.items() if np.isfinite(value)}
        given = {"models": list(self.table.index), "notes": notes, "level": self.level, **options}
        return plot_comparison(self.forecasts, self.panel, **given)


def compare(
    models: Models | None,
    data: Any,
    *,
    horizon: int | None = None,
    season: int | None = None,
    n_windows: int = 1,
    step: int | None = None,
    refit: bool = True,
    inputs: Any = None,
    level: Sequence[float] = (80, 95),
    n_samples: int = 1000,
    seed: int | None = None,
    progress: bool = False,
    fit_options: Mapping[str, Mapping[str, Any]] | None = None,
    baseline: str | None = None,
    test: leaderboard.Test = "wilcoxon",
    aggregate: leaderboard.Weights = "series",
    errors: Errors = "record",
    cache: str | Path | None = None,
    states: Any = None,
    align: Align = "auto",
    cluster: str | None = None,
    partition_size: int = PARTITION_SIZE,
) -> Comparison:
    """Score models side by side on held-out data.

    Parameters
    ----------
    models : SequenceModel, list of them, dict of name to model, or None
        None takes `default_models` with the settings that the data set recommends.
    data : Dataset, Simulation or array_like
        A data set of `seqdgm.datasets` (which knows its horizon and season), a simulation (which
        knows its states), or data in any form of `Panel.of`.
    horizon : int, optional
        Steps to forecast; needed unless `data` is a data set with a default.
    season : int, optional
        Season length in steps, for the MASE; default that of the data set or of the time index
        (12 for monthly data), 1 where there is none.
    n_windows, step, refit, inputs, level, n_samples, seed, progress, fit_options, errors, \
cache, cluster, partition_size
        As in `seqdgm.backtest`; `n_samples` is also the number of draws behind the CRPS.
    baseline : str, optional
        Model that the paired tests compare with; default ``"SeasonalNaive"`` where it takes part,
        else the first model.
    test : {"wilcoxon", "bootstrap", "diebold-mariano"}
        Paired test behind the p-values; see `Comparison`.
    aggregate : {"series", "pooled"}
        Whether the means of the table are over the series' own scores, as in M4, or over all
        points, as in M3 and Tourism.
    states : array_like of shape (series, time, state), optional
        True states of every step, NaN where they are not known; default those of a simulation.
    align : {"auto", "affine", None}
        Whether a model's states are mapped to the true ones before they are scored. The states of
        a learned model are fixed only up to an invertible map. "auto" maps those of models that
        have to be fitted, and takes those of a model whose parameters were all given as they are;
        "affine" maps all; None scores only the latter.

    Returns
    -------
    Comparison
        ``.table`` (model x metric), ``.scores``, ``.forecasts``, ``.plot()``, ``.to_csv(path)``,
        ``.report(path)``, ``.state_accuracy``.

    Raises
    ------
    ValueError
        Without a horizon, for a series too short, for a baseline that does not take part, an
        unknown test or weighting, and a cache of another run.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> y = np.tile([1.0, 2.0, 3.0, 5.0], 6) + 0.1 * np.sin(np.arange(24.0))
    >>> result = sq.compare([sq.SeasonalNaive(season=4)], y, horizon=4, season=4, seed=0)
    >>> list(result.table.index)
    ['SeasonalNaive']
    """
    from seqdgm.datasets import Simulation

    leaderboard.check_choices(test, aggregate, n_samples)
    if isinstance(data, Simulation):
        data, states = data.y, data.states if states is None else states
    panel, horizon, season, defaults = _settings(data, horizon, season)
    check_count("season", season)
    truth = None if states is None else check_states(states, panel, align)
    named = name_models(default_models(season, horizon, defaults) if models is None else models)
    baseline = _baseline(named, baseline)
    run = Run(
        named,
        panel,
        horizon,
        n_windows=n_windows,
        step=step,
        refit=refit,
        inputs=inputs,
        level=tuple(level),
        n_samples=n_samples,
        seed=seed,
        progress=progress,
        fit_options=fit_options or {},
        errors=errors,
        cache=cache,
        cluster=cluster,
        partition_size=partition_size,
    )
    newest = run.windows[-1].number

    def score(record: Record) -> Scored:
        last = record.window.number == newest
        scored = leaderboard.score(record, season, level, n_samples, states=last)
        given = named[record.model].ready
        if truth is None or not last or (align is None and not given):
            return scored
        first, count = record.window.first, record.window.train.n_series
        own = truth[first : first + count]
        return add_accuracy(scored, record, own, align == "affine" or not given)

    depends: dict[str, Any] = {"scored_with_season": season}
    depends |= {} if truth is None else {"states": truth, "align": align}
    parts = run_parts(run, score, **depends)
    units = leaderboard.units(run, parts)
    forecasts, failures = assemble(run, parts), failure_rows(run, parts)
    note_failures(forecasts, failures)
    table = leaderboard.table(
        run, units, parts, season=season, baseline=baseline, test=test, aggregate=aggregate
    )
    return Comparison(
        table,
        units,
        forecasts,
        failures,
        panel,
        horizon,
        season,
        baseline,
        run.level,
        test,
        aggregate,
        assemble(run, parts, "pit"),
        states_table(run, parts),
        training_table(parts),
        describe(run),
        accuracy_table(parts),
    )


def _settings(
    data: Any, horizon: int | None, season: int | None
) -> tuple[Panel, int, int, Mapping[str, Any]]:
    from seqdgm.datasets import Dataset

    defaults: Mapping[str, Any] = {}
    if isinstance(data, Dataset):
        horizon = data.horizon if horizon is None else horizon
        season = data.season if season is None else season
        defaults = data.defaults
        data = data.y
    panel = Panel.of(data)
    if horizon is None:
        raise ValueError("horizon is not known for these data; pass horizon=, in steps")
    return panel, horizon, infer_season(panel) if season is None else season, defaults


def _baseline(models: Mapping[str, Any], baseline: str | None) -> str:
    if baseline is None:
        return "SeasonalNaive" if "SeasonalNaive" in models else next(iter(models))
    if baseline not in models:
        raise ValueError(f"baseline={baseline!r} is not among the models {list(models)}")
    return baseline
