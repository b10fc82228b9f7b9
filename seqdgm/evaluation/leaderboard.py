"""The tables of a comparison: metrics of each unit, and one row a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from seqdgm.evaluation import metrics
from seqdgm.evaluation.attempt import MODEL_ERRORS, Failure, Record, apart, of_all
from seqdgm.evaluation.backtest import Run
from seqdgm.evaluation.checkpoint import Part, Scored
from seqdgm.evaluation.significance import diebold_mariano, holm, paired_bootstrap
from seqdgm.evaluation.traces import trace
from seqdgm.evaluation.windows import Window
from seqdgm.results import Forecast

Test = Literal["wilcoxon", "bootstrap", "diebold-mariano"]
Weights = Literal["series", "pooled"]

# Fewer pairs cannot reach p < 0.05 in a two-sided signed-rank test, whatever the data say.
MIN_PAIRS = 6
WQL_LEVELS = tuple((np.arange(1, 10) / 10).tolist())
# Pairs of draws grow with their square, and the energy score needs no more.
_JOINT_DRAWS = 300
_MULTIVARIATE = ("CRPS_sum", "energy_score")


def metric_names(level: Sequence[float], n_dims: int) -> list[str]:
    """Columns of the table that are means over units, in their order."""
    names = ["MASE", "sMAPE", "CRPS", *(f"coverage-{lv:g}" for lv in level)]
    names += [f"MSIS-{lv:g}" for lv in level] + (list(_MULTIVARIATE) if n_dims > 1 else [])
    return [*names, "log_score"]


def check_choices(test: str, aggregate: str, n_samples: int) -> None:
    """Refuse an unknown test or weighting, and too few draws, before any model is fitted."""
    if n_samples < 2:
        raise ValueError(f"n_samples={n_samples!r}: the CRPS takes the distance of two draws")
    for option, value, known in (("test", test, Test), ("aggregate", aggregate, Weights)):
        if value not in get_args(known):
            raise ValueError(f"{option}={value!r} is unknown; choose among {get_args(known)}")


def score(
    record: Record, season: int, level: Sequence[float], n_samples: int, *, states: bool = False
) -> Scored:
    """Metrics of one record, a row for each series, and what else is kept of it.

    With `states`, the smoothed states are kept too.
    """
    window = record.window
    names = metric_names(level, window.held_out.n_dims)
    values: dict[str, Any] = dict.fromkeys(
        [*names, "scale", "points", "quantile_loss", "size", "log_score_stderr"], np.nan
    ) | {"log_score_kind": None}
    n = window.train.n_series
    values["pit"] = np.full((n, window.held_out.values[0].size), np.nan)
    failures: list[Failure] = []
    if record.forecast is not None:
        failed = [failure.series for failure in record.failures]
        held = window.held_out.values.copy()
        held[[n for n in failed if n is not None]] = np.nan  # or its forecast would be refused
        accuracy, failures = _accuracies(record.forecast, window, held, season, level, n_samples)
        density, unknown = _scored(lambda rows: _density(record, held, rows), n)
        values |= accuracy | density
        failures += [failure for failure in unknown if failure not in failures]
    pit = pd.DataFrame({record.model: values.pop("pit").ravel()})
    scores = pd.DataFrame(values, index=range(n))
    traces, untraced = trace(record, states=states)
    return Scored(scores, pit, traces, (*failures, *untraced))


def _accuracies(
    forecast: Forecast,
    window: Window,
    held: np.ndarray,
    season: int,
    level: Sequence[float],
    n_samples: int,
) -> tuple[dict[str, np.ndarray], list[Failure]]:
    try:
        drawn = Drawn.of(forecast, window, held, level, n_samples)
    except MODEL_ERRORS as error:
        return {}, [Failure(None, f"scoring: {type(error).__name__}: {error}")]
    return _scored(lambda rows: _accuracy(drawn.take(rows), season, window.seed), len(held))


def _scored(
    compute: Callable[[list[int]], dict[str, np.ndarray]], n: int
) -> tuple[dict[str, np.ndarray], list[Failure]]:
    """Put arrays over the series together, leaving those series out on which `compute` fails."""
    found: dict[str, np.ndarray] = {}
    failures: list[Failure] = []
    for rows, part in apart(compute, n):
        if isinstance(part, Exception):
            text = f"scoring: {type(part).__name__}: {part}"
            failures += [Failure(row, text) for row in rows]
            continue
        for name, value in part.items():
            nothing = None if value.dtype == object else np.nan
            out = found.setdefault(name, np.full((n, *value.shape[1:]), nothing))
            out[rows] = value
    return found, of_all(failures, n)


class Drawn(NamedTuple):
    """What the metrics need of a forecast and its data, an array over the series each.

    Attributes
    ----------
    quantiles, low, high : ndarray
        At `WQL_LEVELS` and of the intervals of `level`, in the second dimension.
    """

    held: Float[np.ndarray, "series steps dim"]
    train: Float[np.ndarray, "series time dim"]
    mean: Float[np.ndarray, "series steps dim"]
    samples: Float[np.ndarray, "series draws steps dim"]
    quantiles: Float[np.ndarray, "series quantiles steps dim"]
    low: Float[np.ndarray, "series levels steps dim"]
    high: Float[np.ndarray, "series levels steps dim"]
    level: tuple[float, ...]

    @classmethod
    def of(
        cls,
        forecast: Forecast,
        window: Window,
        held: np.ndarray,
        level: Sequence[float],
        n_samples: int,
    ) -> Drawn:
        """Draw from a forecast."""
        shape = (len(held), len(level), *held.shape[1:])
        low, high = np.empty(shape), np.empty(shape)
        for k, lv in enumerate(level):
            low[:, k], high[:, k] = forecast.interval(lv)
        return cls(
            held,
            window.train.values,
            forecast.mean,
            forecast.sample(n_samples, seed=window.seed),
            np.moveaxis(forecast.quantiles(np.array(WQL_LEVELS)), 0, 1),
            low,
            high,
            tuple(level),
        )

    def take(self, rows: list[int]) -> Drawn:
        """Return the arrays of some series."""
        if len(rows) == len(self.held):
            return self
        arrays = {name: getattr(self, name)[rows] for name in self._fields if name != "level"}
        return self._replace(**arrays)


def _density(record: Record, held: np.ndarray, rows: list[int]) -> dict[str, np.ndarray]:
    """Held-out log density a step of some series, (series,) each."""
    assert record.forecast is not None
    own = np.full_like(held, np.nan)
    own[rows] = held[rows]
    found = record.forecast.log_prob(replace(record.window.held_out, values=own))
    known = (~np.isnan(own)).any(axis=2).sum(axis=1)
    out = {
        "log_score": metrics.log_score(found, own),
        "log_score_stderr": found.stderr / np.where(known > 0, known, np.nan),
        "log_score_kind": np.full(len(own), found.kind, dtype=object),
    }
    return {name: value[rows] for name, value in out.items()}


def _accuracy(drawn: Drawn, season: int, seed: int | None) -> dict[str, np.ndarray]:
    """Metrics of the forecasts, (series,) each; columns of a series are averaged.

    Besides, ``"pit"``: of each held-out value, the rows of `Window.truth` that belong to a series.
    """
    held = drawn.held
    n, _, dim = held.shape
    y, train = flat(held), flat(drawn.train)
    point, samples = flat(drawn.mean), flat(drawn.samples)
    quantiles = np.moveaxis(flat(drawn.quantiles), 1, 0)
    losses = 2.0 * np.mean(
        [metrics.quantile_score(y, z, q) for z, q in zip(quantiles, WQL_LEVELS, strict=True)],
        axis=0,
    )
    points = (~np.isnan(y)).sum(axis=1)
    out = {
        "scale": mean_over(metrics.naive_scale(train, season), n),
        "points": points.reshape(n, dim).sum(axis=1),
        "quantile_loss": np.nansum((losses * points).reshape(n, dim), axis=1),
        "size": np.nansum(np.abs(held), axis=(1, 2)),
        "MASE": mean_over(metrics.mase(y, point, train, season), n),
        "sMAPE": mean_over(metrics.smape(y, point), n),
        "CRPS": mean_over(metrics.crps(y, samples), n),
        "pit": metrics.pit(y, samples, seed=seed).reshape(n, -1),
    }
    for k, lv in enumerate(drawn.level):
        lo, hi = flat(drawn.low[:, k]), flat(drawn.high[:, k])
        out[f"coverage-{lv:g}"] = mean_over(metrics.coverage(y, lo, hi), n)
        out[f"MSIS-{lv:g}"] = mean_over(metrics.msis(y, lo, hi, train, season, lv), n)
    if dim > 1:
        out["CRPS_sum"] = metrics.crps_sum(held, drawn.samples, aggregate="series")
        out["energy_score"] = metrics.energy_score(held, drawn.samples[:, :_JOINT_DRAWS])
    return out


def flat(values: np.ndarray) -> np.ndarray:
    """Make a series of each column: (series, ..., dim) to (series * dim, ...)."""
    n, dim = values.shape[0], values.shape[-1]
    return np.moveaxis(values, -1, 1).reshape(n * dim, *values.shape[1:-1])


def mean_over(score: np.ndarray, n: int) -> np.ndarray:
    """Mean over the columns of each of `n` series; the way back from `flat`."""
    mean: np.ndarray = metrics.over_known(score.reshape(n, -1), "series")
    return mean


def units(run: Run, parts: Sequence[Part]) -> pd.DataFrame:
    """Put the scores of all parts below each other: model, unique_id, window, cutoff, metrics."""
    rows = []
    for part in parts:
        window = run.windows[part.number]
        head = pd.DataFrame(
            {
                "model": part.model,
                "unique_id": list(window.train.ids),
                "window": part.number,
                "cutoff": window.cutoff,
            }
        )
        rows.append(pd.concat([head, part.scores.reset_index(drop=True)], axis=1))
    return pd.concat(rows, ignore_index=True)


def benchmark(run: Run, season: int) -> pd.DataFrame:
    """sMAPE and MASE of Naive2 for each unit; NaN for a series that is not all positive."""
    rows = []
    for window in run.windows:
        held, train = window.held_out.values, window.train.values
        n, steps, dim = held.shape
        frame = pd.DataFrame({"unique_id": list(window.train.ids), "window": window.number})
        past, y = flat(train), flat(held)
        lengths = np.repeat(window.train.lengths, dim)
        point = np.zeros_like(y)
        usable = ~(past <= 0).any(axis=1) & ~np.isnan(past).all(axis=1)
        point[usable] = metrics.naive2(past[usable], season, steps, lengths[usable])
        y = np.where(usable[:, None], y, np.nan)
        scores = [metrics.smape(y, point), metrics.mase(y, point, past, season)]
        whole = usable.reshape(n, dim).all(axis=1)
        smape2, mase2 = (np.where(whole, mean_over(score, n), np.nan) for score in scores)
        rows.append(frame.assign(smape2=smape2, mase2=mase2))
    return pd.concat(rows, ignore_index=True)


def table(
    run: Run,
    scores: pd.DataFrame,
    parts: Sequence[Part],
    *,
    season: int,
    baseline: str,
    test: Test,
    aggregate: Weights,
) -> pd.DataFrame:
    """One row a model, best CRPS first; see `Comparison`."""
    naive = benchmark(run, season)
    reference = scaled_crps(scores, baseline)
    names = metric_names(run.level, run.panel.n_dims)
    rows = {}
    for name in run.models:
        group = scores[scores["model"] == name]
        row = _means(group, names, aggregate)
        row["log_score_kind"] = ", ".join(sorted(group["log_score_kind"].dropna().unique()))
        row["wQL"] = _quotient(group["quantile_loss"].sum(), group["size"].sum())
        row["OWA"] = _owa(group, naive)
        for lv in run.level:
            row[f"ACD-{lv:g}"] = abs(row[f"coverage-{lv:g}"] - lv)
        own = name == baseline
        row["p_value"] = np.nan if own else p_value(run, scores, name, reference, test)
        row["units"] = int(group["CRPS"].notna().sum())
        mine = [part for part in parts if part.model == name]
        row["fit_seconds"] = sum(part.fit_seconds for part in mine)
        row["forecast_seconds"] = sum(part.forecast_seconds for part in mine)
        row["peak_mb"] = max(part.peak_mb for part in mine)
        rows[name] = row
    out = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    out.insert(list(out.columns).index("p_value") + 1, "p_holm", holm(out["p_value"].to_numpy()))
    # A mean over fewer units, the hard ones gone, must not win.
    incomplete = out["units"] < out["units"].max()
    order = out.assign(incomplete=incomplete).sort_values(["incomplete", "CRPS"]).index
    return out.loc[order]


def _means(group: pd.DataFrame, names: Sequence[str], aggregate: Weights) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for metric in names:
        held = group[[metric, "points"]].dropna()
        x = held[metric].to_numpy(dtype=float)
        w = np.ones(len(x)) if aggregate == "series" else held["points"].to_numpy(dtype=float)
        mean = _quotient(float(w @ x), float(w.sum()))
        row[metric] = mean
        # Of a ratio of sums (Cochran 1977, section 6.4); with equal weights the usual formula.
        spread = float(((w * (x - mean)) ** 2).sum())
        enough = len(x) > 1
        row[f"{metric}-se"] = (
            np.sqrt(spread * len(x) / (len(x) - 1)) / w.sum() if enough else np.nan
        )
    return row


def _owa(group: pd.DataFrame, naive: pd.DataFrame) -> float:
    both = group.merge(naive, on=["unique_id", "window"])
    both = both[["sMAPE", "MASE", "smape2", "mase2"]].dropna()
    mine, theirs = both[["sMAPE", "MASE"]].mean(), both[["smape2", "mase2"]].mean()
    return float(np.mean([_quotient(a, b) for a, b in zip(mine, theirs, strict=True)]))


def _quotient(above: float, below: float) -> float:
    return float(above / below) if below > 0 else float("nan")


def scaled_crps(scores: pd.DataFrame, name: str) -> pd.Series:
    """CRPS of a model over the MASE scale of each unit."""
    mine = scores[scores["model"] == name].set_index(["unique_id", "window"])
    return mine["CRPS"] / mine["scale"]


def p_value(run: Run, scores: pd.DataFrame, name: str, reference: pd.Series, test: Test) -> float:
    """Two-sided p-value of the scaled CRPS of a model against that of the baseline."""
    from scipy.stats import wilcoxon

    difference = (scaled_crps(scores, name) - reference).dropna()
    if test == "diebold-mariano":
        # The mean over the series of each origin: a series of loss differences in time.
        step = run.horizon if run.step is None else run.step
        by_window = difference.groupby("window").mean().sort_index()
        return diebold_mariano(by_window.to_numpy(), -(-run.horizon // step))[1]
    if test == "bootstrap":
        series = difference.index.get_level_values("unique_id")
        return paired_bootstrap(difference.to_numpy(), np.asarray(series), seed=run.seed)
    difference = difference[difference != 0]
    if len(difference) < MIN_PAIRS:
        return float("nan")
    return float(wilcoxon(difference.to_numpy()).pvalue)


def likelihoods(scores: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Held-out log-likelihood of each model, and what kind of number it is."""
    rows: dict[str, Mapping[str, Any]] = {}
    for name in order:
        mine = scores[scores["model"] == name].dropna(subset="log_score")
        n = len(mine)
        noise = mine["log_score_stderr"].to_numpy(dtype=float)
        rows[name] = {
            "log_score": mine["log_score"].mean(),
            "kind": ", ".join(sorted(mine["log_score_kind"].dropna().unique())),
            "stderr": float(np.sqrt((noise**2).sum()) / n) if n else np.nan,
            "se": mine["log_score"].sem(),
            "units": n,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
