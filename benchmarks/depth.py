"""Where depth pays: forecasts of classical and deep models from little and from much data.

    python benchmarks/depth.py

Each model learns from 1 %, 10 % and 100 % of the training part of three data sets, and forecasts
the same held-out windows. `--work` keeps what is finished, and an interrupted run goes on from
there. Nothing is tuned: sizes and settings are the same for all shares and sets. A complete run
also draws the picture of the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _harness import RESULTS, duration, environment, write_table

import seqdgm as sq
from seqdgm.evaluation import metrics

PICTURE = Path(__file__).parent.parent / "docs" / "_static" / "depth.png"
SHARES = (0.01, 0.1, 1.0)
PIECE = 120  # steps of the pieces that a long series is learnt from
DRAWS = 200
# A deep model learns for so many updates or epochs, whichever is less; validation takes the best.
UPDATES, EPOCHS, BATCH = 800, 200, 32
WORK = Path(__file__).parent / "work" / "depth"
COLUMNS = (
    "data",
    "share",
    "steps",
    "model",
    "CRPS / naive (se)",
    "log score (se)",
    "kind",
    "fit",
    "fit of 1,000 series",
    "forecast of 1,000 series",
)

Series = list[np.ndarray]


@dataclass(frozen=True)
class Question:
    """Data to learn from and windows to forecast.

    Attributes
    ----------
    train : list of ndarray
        Series in the order in which a share takes them, or one long series.
    histories, futures : list of ndarray, ndarray of shape (window, horizon)
        What is known of each window, and what is to be forecast.
    own : bool
        Whether windows are series of their own, which a model of one series learns one by one.
    """

    name: str
    train: Series
    histories: Series
    futures: np.ndarray
    season: int
    own: bool

    def part(self, share: float) -> Series:
        """The share: so many whole series, or the end of the long one."""
        if self.own:
            return self.train[: max(1, round(share * len(self.train)))]
        return [self.train[0][-max(2 * self.season, round(share * len(self.train[0]))) :]]


def m3(windows: int) -> Question:
    """Monthly series of M3, each moved by its last year's mean and scaled by its seasonal steps."""
    found = sq.datasets.load("m3-monthly")
    series, held = (
        [part.to_numpy(float) for _, part in frame.groupby("unique_id", sort=False)["y"]]
        for frame in (found.train, found.test)
    )
    scale = [metrics.naive_scale(x[None], 12)[0] for x in series]
    pairs = [
        ((x - x[-12:].mean()) / s, (f - x[-12:].mean()) / s)
        for x, f, s in zip(series, held, scale, strict=True)
        if s > 0
    ]
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = np.linspace(0, len(pairs) - 1, windows).round().astype(int)
    return Question(
        "M3 monthly",
        [pairs[k][0] for k in order],
        [pairs[k][0] for k in chosen],
        np.array([pairs[k][1] for k in chosen]),
        12,
        own=True,
    )


def etth1(windows: int) -> Question:
    """Oil temperature of a transformer, hour by hour; a day ahead from a week."""
    found = sq.datasets.load("etth1")
    y = [np.asarray(part["OT"], float) for part in (found.train, found.test)]
    return long_series("ETTh1, oil temperature", y[0], y[1], windows, 7 * 24, 24, 24)


def lorenz(windows: int) -> Question:
    """Observed first coordinate of a chaotic flow; 15 steps ahead from 120."""
    y = sq.datasets.simulate("lorenz-63", 1, 26_000, seed=0).y.values[0, :, 0]
    return long_series("Lorenz-63, first coordinate", y[:20_000], y[20_000:], windows, 120, 15, 1)


def long_series(
    name: str,
    train: np.ndarray,
    test: np.ndarray,
    windows: int,
    history: int,
    horizon: int,
    season: int,
) -> Question:
    """Windows spread evenly over the test part."""
    starts = np.linspace(history, len(test) - horizon, windows).astype(int)
    return Question(
        name,
        [train],
        [test[t - history : t] for t in starts],
        np.array([test[t : t + horizon] for t in starts]),
        season,
        own=False,
    )


def pieces(series: Series) -> Series:
    """Short series out of long ones, which minibatches are made of."""
    cut = []
    for x in series:
        n = max(1, round(len(x) / PIECE))
        cut += np.array_split(x, n)
    return cut


def seasonal_naive(question: Question, part: Series) -> sq.SequenceModel:
    return sq.SeasonalNaive(season=question.season).fit(own(question, part))


def arima(question: Question, part: Series) -> sq.SequenceModel:
    return sq.AutoARIMA(season=question.season).fit(own(question, part))


def structural(question: Question, part: Series) -> sq.SequenceModel:
    seasonal = question.season if question.season > 1 else None
    how: dict[str, Any] = {"seasonal_kind": "trigonometric", "harmonics": 4} if seasonal else {}
    model = sq.StructuralSSM("stochastic", "stochastic", seasonal, ar=1, **how)
    return model.fit(own(question, part))


def own(question: Question, part: Series) -> Series:
    """What a model of one series is fitted to."""
    return question.histories if question.own else part


def linear(question: Question, part: Series) -> sq.SequenceModel:
    return sq.LinearGaussianSSM(latent_dim=8).fit(pieces(part), pooled=True, seed=0)


def deep(kind: Callable[..., sq.SequenceModel], **sizes: int) -> Callable[..., sq.SequenceModel]:
    def fit(question: Question, part: Series) -> sq.SequenceModel:
        season = question.season if question.season > 1 else None
        series = pieces(part)
        epochs = min(EPOCHS, UPDATES // -(-len(series) // BATCH))
        how: dict[str, Any] = {"max_epochs": epochs, "patience": max(epochs // 4, 5)}
        if kind is not sq.RNN:
            how["kl_warmup"] = epochs // 5
        return kind(**sizes, **how, batch_size=BATCH, season=season).fit(series, seed=0)

    return fit


MODELS: dict[str, Callable[[Question, Series], sq.SequenceModel]] = {
    "SeasonalNaive": seasonal_naive,
    "AutoARIMA": arima,
    "StructuralSSM": structural,
    "LinearGaussianSSM": linear,
    "RNN": deep(sq.RNN, hidden_dim=64),
    "DMM": deep(sq.DMM, latent_dim=8, hidden_dim=64, encoder_dim=64),
    "VRNN": deep(sq.VRNN, latent_dim=8, hidden_dim=64, encoder_dim=64),
    "SRNN": deep(sq.SRNN, latent_dim=8, hidden_dim=64, encoder_dim=64),
}
PER_SERIES = ("SeasonalNaive", "AutoARIMA", "StructuralSSM")


def warm_up() -> None:
    """Load or compile the kernels of the models of one series before anything is timed."""
    y = list(np.random.default_rng(0).normal(size=(2, 60)))
    question = Question("", y, y, np.zeros((2, 1)), 12, own=True)
    for name in PER_SERIES:
        MODELS[name](question, y).forecast(1)


def measure(question: Question, share: float, name: str) -> dict[str, Any]:
    """Fit, forecast and score."""
    part = question.part(share)
    begin = time.perf_counter()
    model = MODELS[name](question, part)
    fitted = time.perf_counter()
    horizon = question.futures.shape[1]
    alone = question.own and name in PER_SERIES
    blocks = [None] if alone else [[x] for x in question.histories]
    if not alone and name not in PER_SERIES:
        blocks = [question.histories]
    forecasts = [model.forecast(horizon, y, n_samples=DRAWS, seed=0) for y in blocks]
    draws = np.concatenate([forecast.sample(DRAWS, seed=1) for forecast in forecasts])[..., 0]
    done = time.perf_counter()
    held = question.futures[:, None] if len(blocks) > 1 else [question.futures]
    likelihoods = [f.log_prob(list(y)) for f, y in zip(forecasts, held, strict=True)]
    log_score = np.concatenate([found.value for found in likelihoods]) / horizon
    crps = metrics.crps(question.futures, draws)
    return {
        "data": question.name,
        "share": share,
        "steps": int(sum(map(len, own(question, part) if name in PER_SERIES else part))),
        "model": name,
        "crps": crps.tolist(),
        "log_score": log_score.tolist(),
        "kind": likelihoods[0].kind,
        "fit_seconds": fitted - begin,
        "fitted_series": len(own(question, part) if name in PER_SERIES else part),
        "forecast_seconds_per_1000": (done - fitted) / len(draws) * 1000,
    }


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The picture: CRPS over that of the naive forecast against the share, a panel a data set.

    From light to dark, models go from few parameters to many.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    names = [name for name in MODELS if name != "SeasonalNaive"]
    shades = colormaps["viridis_r"](np.linspace(0.08, 1.0, len(names)))
    sets = list(dict.fromkeys(r["data"] for r in records))
    figure = Figure(figsize=(3.4 * len(sets), 3.4), layout="constrained")
    axes = figure.subplots(1, len(sets), squeeze=False)[0]
    for axis, data in zip(axes, sets, strict=True):
        own = [r for r in records if r["data"] == data]
        naive = {r["share"]: np.mean(r["crps"]) for r in own if r["model"] == "SeasonalNaive"}
        for k, name in enumerate(names):
            rows = [r for r in own if r["model"] == name]
            ratios = [np.array(r["crps"]) / naive[r["share"]] for r in rows]
            axis.errorbar(
                [r["share"] * 1.05 ** (k - len(names) / 2) for r in rows],
                [ratio.mean() for ratio in ratios],
                [standard_error(ratio) for ratio in ratios],
                color=shades[k],
                marker="os^Dvp*"[k],
                markersize=5,
                linewidth=1.3,
                label=name,
            )
        axis.axhline(1.0, color="0.6", linewidth=1, linestyle=":")
        axis.set(title=data, xscale="log", yscale="log", xlabel="share of the training data")
        axis.xaxis.set_major_locator(FixedLocator(SHARES))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(FixedLocator([0.2, 0.3, 0.5, 0.7, 1, 1.3, 2, 5, 10]))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xticklabels([f"{share:.0%}" for share in SHARES])
    axes[0].set_ylabel("CRPS / seasonal naive (log scale)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def lines(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table; CRPS relative to the mean of the naive forecast on the same windows."""
    naive = {
        (r["data"], r["share"]): np.mean(r["crps"])
        for r in records
        if r["model"] == "SeasonalNaive"
    }
    out = []
    for r in records:
        ratio = np.array(r["crps"]) / naive[r["data"], r["share"]]
        score = np.array(r["log_score"])
        out.append(
            [
                r["data"],
                f"{r['share']:.0%}",
                f"{r['steps']:,}",
                r["model"],
                f"{ratio.mean():.3f} ({standard_error(ratio):.3f})",
                f"{score.mean():.3f} ({standard_error(score):.3f})",
                r["kind"],
                f"{r['fit_seconds']:.1f} s",
                duration(r["fit_seconds"] / r["fitted_series"] * 1000),
                duration(r["forecast_seconds_per_1000"]),
            ]
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=WORK, help="folder of finished parts")
    parser.add_argument("--data", action="append", help="only sets whose name begins so")
    parser.add_argument("--model", action="append", choices=MODELS, help="default all")
    parser.add_argument("--windows", type=int, default=100, help="windows to forecast")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    warm_up()
    records, complete = [], options.windows == 100 and not options.model and not options.data
    for make in (m3, etth1, lorenz):
        question = make(options.windows)
        if options.data and not any(question.name.startswith(name) for name in options.data):
            continue
        for share in SHARES:
            for name in options.model or MODELS:
                stem = f"{make.__name__}-{share}-{name}-{options.windows}"
                path = options.work / f"{stem}.json"
                if not path.exists():
                    begin = time.perf_counter()
                    record = measure(question, share, name)
                    record["hours"] = (time.perf_counter() - begin) / 3600
                    path.write_text(json.dumps(record), "utf-8")
                records.append(json.loads(path.read_text("utf-8")))
                print(*lines_of_last(records), sep=" | ", flush=True)
    if complete:
        about = (
            "Forecasts from a share of the training part, on the same 100 held-out windows: CRPS "
            "over that of the seasonal naive forecast, joint log density per step. Models of one "
            "series learn from the end of the long series, and from each window's own history "
            "where the data are many series, whatever the share; the series of M3 were moved and "
            "scaled by their own past, those of ETTh1 and Lorenz-63 only by the training part. "
            "Times of 1,000 series count ETTh1 and Lorenz-63 as one series that is learned from."
        )
        spent = {"seed": 0, "hours": round(sum(record["hours"] for record in records), 3)}
        write_table("depth", about, COLUMNS, lines(records), {**environment(), **spent}, RESULTS)
        draw(records, PICTURE)


def lines_of_last(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last row, if the yardstick of its data is there."""
    last = records[-1]
    return lines([r for r in records if (r["data"], r["share"]) == (last["data"], last["share"])])[
        -1
    ]


if __name__ == "__main__":
    main()
