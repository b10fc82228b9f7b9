"""Several models, one series or panel, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from seqdgm.evaluation import metrics
from seqdgm.evaluation.backtest import (
    MODEL_ERRORS,
    Models,
    Record,
    Window,
    assemble,
    forecast_columns,
    name_models,
    note_failures,
    run_windows,
)
from seqdgm.evaluation.defaults import default_models, infer_season
from seqdgm.panel import Panel
from seqdgm.results import Forecast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Fewer pairs cannot reach p < 0.05 in a two-sided signed-rank test, whatever the data say.
MIN_PAIRS = 6


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes
    ----------
    table : DataFrame
        One row a model, best CRPS first (models that failed somewhere last). Columns: ``MASE``,
        ``sMAPE`` (0 to 200), ``CRPS`` (data units), ``coverage-80`` and ``coverage-95`` (per
        cent), ``log_score`` (nats per held-out step, larger is better), each followed by its
        standard error ``<metric>-se``; ``log_score_kind`` ("exact", "estimate",
        "lower bound" or "approximation"); ``p_value``; ``units``; ``fit_seconds`` and
        ``forecast_seconds`` (totals over the windows, without imports and compilation).
    scores : DataFrame
        The same metrics for each unit: model, unique_id, window, cutoff.
    forecasts : DataFrame
        The frame of `seqdgm.backtest`.
    failures : list of dict
        Model, cutoff and error text of whatever failed.
    panel : Panel
        The data.
    horizon, season : int
        Horizon of the windows and season of the MASE.
    baseline : str
        Model that the paired tests compare with.

    Notes
    -----
    The *unit* is one series on one window. A metric is the mean over the units, each unit being
    the mean over its held-out steps (and over the columns of a multivariate series). Standard
    errors are the standard deviation over the units divided by the root of their number, NaN for
    a single unit; they take the units as independent, which overlapping windows are not.

    ``p_value``: two-sided Wilcoxon signed-rank test of the paired differences in CRPS to
    `baseline`, each divided by the MASE scale of its unit so that series of different size can be
    ranked together; NaN below six pairs, where the test cannot reach 5 %.

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

    def __repr__(self) -> str:
        return f"Comparison(horizon={self.horizon}, season={self.season})\n{self.table}"

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, full precision, the models in the column ``model``."""
        self.table.to_csv(path)

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
) -> Comparison:
    """Score models side by side on held-out data.

    Parameters
    ----------
    models : SequenceModel, list of them, dict of name to model, or None
        None takes `default_models` with the settings that the data set recommends.
    data : Dataset or array_like
        A data set of `seqdgm.datasets` (which knows its horizon and season), or data in any form
        of `Panel.of`.
    horizon : int, optional
        Steps to forecast; needed unless `data` is a data set with a default.
    season : int, optional
        Season length in steps, for the MASE; default that of the data set or of the time index
        (12 for monthly data), 1 where there is none.
    n_windows, step, refit, inputs, level, n_samples, seed, progress, fit_options
        As in `seqdgm.backtest`; `n_samples` is also the number of draws behind the CRPS.
    baseline : str, optional
        Model that the paired tests compare with; default ``"SeasonalNaive"`` where it takes part,
        else the first model.

    Returns
    -------
    Comparison
        ``.table`` (model x metric), ``.scores``, ``.forecasts``, ``.plot()``, ``.to_csv(path)``.

    Raises
    ------
    ValueError
        Without a horizon, for a series too short, or for a baseline that does not take part.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> y = np.tile([1.0, 2.0, 3.0, 5.0], 6) + 0.1 * np.sin(np.arange(24.0))
    >>> result = sq.compare([sq.SeasonalNaive(season=4)], y, horizon=4, season=4, seed=0)
    >>> list(result.table.index)
    ['SeasonalNaive']
    """
    panel, horizon, season, defaults = _settings(data, horizon, season)
    named = name_models(default_models(season, horizon, defaults) if models is None else models)
    baseline = _baseline(named, baseline)
    parts, scores, failures = [], [], []
    for record in run_windows(
        named,
        panel,
        horizon,
        n_windows=n_windows,
        step=step,
        refit=refit,
        inputs=inputs,
        n_samples=n_samples,
        seed=seed,
        progress=progress,
        fit_options=fit_options,
    ):
        rows, failure = _score(record, season, level, n_samples)
        scores.append(rows)
        failures += failure
        # The draws of a forecast are many times the size of what is kept of it.
        parts.append((replace(record, forecast=None), forecast_columns(record, level)))
    units = pd.concat(scores, ignore_index=True)
    forecasts = assemble(parts)
    note_failures(forecasts, failures)
    table = _table(units, [record for record, _ in parts], level, baseline)
    return Comparison(
        table, units, forecasts, failures, panel, horizon, season, baseline, tuple(level)
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


def _score(
    record: Record, season: int, level: Sequence[float], n_samples: int
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Metrics of one record, a row for each series, and what could not be computed."""
    window = record.window
    rows = pd.DataFrame(
        {
            "model": record.model,
            "unique_id": list(window.train.ids),
            "window": window.number,
            "cutoff": window.cutoff,
        }
    )
    forecast = record.forecast
    failures = [] if record.error is None else [record.failure]
    values: dict[str, Any] = dict.fromkeys(["scale", *_metric_names(level)], np.nan) | {
        "log_score_kind": None
    }
    if forecast is not None:
        try:
            values |= _accuracy(forecast, window, season, level, n_samples)
            log_prob = forecast.log_prob(window.held_out)
            values["log_score"] = metrics.log_score(log_prob, window.held_out.values)
            values["log_score_kind"] = log_prob.kind
        except MODEL_ERRORS as error:
            text = f"scoring: {type(error).__name__}: {error}"
            failures.append(replace(record, error=text).failure)
    return rows.assign(**values), failures


def _accuracy(
    forecast: Forecast, window: Window, season: int, level: Sequence[float], n_samples: int
) -> dict[str, np.ndarray]:
    """Metrics of the marginal forecasts, (series,) each; columns of a series are averaged."""
    n, _, dim = window.held_out.values.shape

    def flat(values: np.ndarray) -> np.ndarray:
        return np.moveaxis(values, -1, 1).reshape(n * dim, *values.shape[1:-1])

    def mean(score: np.ndarray) -> np.ndarray:
        known = ~np.isnan(score.reshape(n, dim))
        total = np.where(known, score.reshape(n, dim), 0.0).sum(axis=1)
        count = known.sum(axis=1)
        return np.divide(total, count, out=np.full(n, np.nan), where=count > 0)

    y, point, train = flat(window.held_out.values), flat(forecast.mean), flat(window.train.values)
    samples = forecast.sample(n_samples, seed=window.seed)
    out = {
        "scale": mean(metrics.naive_scale(train, season)),
        "MASE": mean(metrics.mase(y, point, train, season)),
        "sMAPE": mean(metrics.smape(y, point)),
        "CRPS": mean(metrics.crps(y, flat(samples))),
    }
    for lv in level:
        lo, hi = forecast.interval(lv)
        out[f"coverage-{lv:g}"] = mean(metrics.coverage(y, flat(lo), flat(hi)))
    return out


def _metric_names(level: Sequence[float]) -> list[str]:
    return ["MASE", "sMAPE", "CRPS", *(f"coverage-{lv:g}" for lv in level), "log_score"]


def _table(
    units: pd.DataFrame, records: Sequence[Record], level: Sequence[float], baseline: str
) -> pd.DataFrame:
    reference = _scaled_crps(units, baseline)
    rows = {}
    for name, group in units.groupby("model", sort=False):
        row: dict[str, Any] = {}
        for metric in _metric_names(level):
            row[metric] = group[metric].mean()
            row[f"{metric}-se"] = group[metric].sem()
        row["log_score_kind"] = ", ".join(sorted(group["log_score_kind"].dropna().unique()))
        row["p_value"] = np.nan if name == baseline else _paired(units, str(name), reference)
        row["units"] = int(group["CRPS"].notna().sum())
        mine = [record for record in records if record.model == name]
        row["fit_seconds"] = sum(record.fit_seconds for record in mine)
        row["forecast_seconds"] = sum(record.forecast_seconds for record in mine)
        rows[name] = row
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    # A mean over fewer units, the hard ones gone, must not win.
    incomplete = table["units"] < table["units"].max()
    order = table.assign(incomplete=incomplete).sort_values(["incomplete", "CRPS"]).index
    return table.loc[order]


def _scaled_crps(units: pd.DataFrame, name: str) -> pd.Series:
    mine = units[units["model"] == name].set_index(["unique_id", "window"])
    return mine["CRPS"] / mine["scale"]


def _paired(units: pd.DataFrame, name: str, reference: pd.Series) -> float:
    from scipy.stats import wilcoxon

    difference = (_scaled_crps(units, name) - reference).dropna()
    difference = difference[difference != 0]
    if len(difference) < MIN_PAIRS:
        return float("nan")
    return float(wilcoxon(difference.to_numpy()).pvalue)
