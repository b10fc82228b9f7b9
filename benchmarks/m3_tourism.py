"""M3 and Tourism competitions: accuracy, calibration and time by frequency.

Which models an average takes was chosen on the end of the training part (``--validate``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from _accuracy import (
    Entry,
    Forecasts,
    Plan,
    Series,
    arguments,
    cost,
    is_complete,
    measure,
    scores,
    write,
)

import seqdgm as sq
from seqdgm.evaluation import metrics

SEASONS = {"yearly": 1, "quarterly": 4, "monthly": 12, "other": 1}
# sMAPE over all points of M3; mean MASE of each frequency of Tourism.
PUBLISHED_M3 = {"Theta": 13.04, "AutoETS": 13.23, "seasonal naive": 15.88}
PUBLISHED_TOURISM = {"yearly": 2.790, "quarterly": 1.599, "monthly": 1.531}
FORMATS = {
    "MASE": "{:.3f}",
    "sMAPE": "{:.2f}",
    "coverage": "{:.1f} %",
    "fit": "{:.1f} s",
    "forecast": "{:.1f} s",
}
COLUMNS = ("series", "by", "MASE", "sMAPE", "coverage-95", "fit of 1,000", "forecast of 1,000")
AVERAGES = {
    "m3": (
        "AutoARIMA",
        "AutoARIMA, log",
        "StructuralSSM, level, log",
        "StructuralSSM, drift, log",
        "StructuralSSM, damped, log",
        "StructuralSSM, drift",
    ),
    "tourism": ("AutoARIMA, log", "StructuralSSM, drift, log", "StructuralSSM, drift"),
}
AVERAGE = "plain average"
# A short series has no steps to spare for deciding when to stop.
TRAINING = {"valid_fraction": 0.0, "schedule": "cosine"}
EPOCHS = 20


def entries(season: int) -> Mapping[str, Entry]:
    """The models of one frequency."""
    seasonal: dict[str, Any] = {}
    if season > 1:
        seasonal = {"seasonal": season, "seasonal_kind": "trigonometric"}
    deep: dict[str, Any] = {
        "season": season if season > 1 else None,
        "transform": "log",
        "max_epochs": EPOCHS,
        "learning_rate": 1e-2,
    }

    def structural(trend: str | None, transform: str | None) -> Entry:
        return Entry(sq.StructuralSSM(trend=trend, transform=transform, **seasonal))

    return {
        "SeasonalNaive": Entry(sq.SeasonalNaive(season=season)),
        "AutoARIMA": Entry(sq.AutoARIMA(season=season)),
        "AutoARIMA, log": Entry(sq.AutoARIMA(season=season, transform="log")),
        "StructuralSSM, level, log": structural(None, "log"),
        "StructuralSSM, drift, log": structural("deterministic", "log"),
        "StructuralSSM, damped, log": structural("damped", "log"),
        "StructuralSSM, drift": structural("deterministic", None),
        "LinearGaussianSSM, pooled": Entry(
            sq.LinearGaussianSSM(latent_dim=season + 2, transform="log", scale="standard"),
            {"pooled": True, "max_iter": 30},
            pooled=True,
        ),
        "RNN": Entry(sq.RNN(cell="gru", hidden_dim=32, **deep), TRAINING, pooled=True),
        "DMM": Entry(
            sq.DMM(latent_dim=4, hidden_dim=24, encoder_dim=24, kl_warmup=5, **deep),
            TRAINING,
            pooled=True,
        ),
    }


PLANS = tuple(
    Plan(f"{data}-{frequency}", entries(season), {AVERAGE: AVERAGES[data]})
    for data in ("m3", "tourism")
    for frequency, season in SEASONS.items()
    if (data, frequency) != ("tourism", "other")
)


def pooled(parts: list[tuple[Series, Forecasts]]) -> list[str]:
    """Cells of all frequencies together: sMAPE and coverage over all points."""
    errors, hits = [], []
    for series, found in parts:
        errors.append(np.repeat(metrics.smape(series.held, found.point), series.held.shape[1]))
        covered = metrics.coverage(series.held, found.lo, found.hi)
        hits.append(np.repeat(covered, series.held.shape[1]))
    said = {"sMAPE": np.concatenate(errors).mean(), "coverage": np.concatenate(hits).mean()}
    count = sum(len(series.train) for series, _ in parts) / 1000
    said["fit"] = sum(found.fit_seconds for _, found in parts) / count
    said["forecast"] = sum(found.forecast_seconds for _, found in parts) / count
    return [form.format(said[key]) if key in said else "" for key, form in FORMATS.items()]


def main() -> None:
    options = arguments(__doc__, [plan.data for plan in PLANS])
    rows, whole, seconds = [], {}, 0.0
    for plan in PLANS:
        if options.data and plan.data not in options.data:
            continue
        series, found = measure(plan, options)
        seconds += cost(plan, found)
        data, _, frequency = plan.data.partition("-")
        head = f"{data.title()}, {len(series.train):,} {frequency}"
        for name, forecasts in found.items():
            given = scores(series, forecasts)
            rows.append([head, name, *(f.format(given[key]) for key, f in FORMATS.items())])
            if data == "m3":
                whole.setdefault(name, []).append((series, forecasts))
        if data == "tourism":
            value = PUBLISHED_TOURISM[frequency]
            rows.append([head, "AutoETS, published", f"{value:.3f}", "", "", "", ""])
    if is_complete(options):
        head = "M3, all 3,003, pooled over points"
        rows += [[head, name, *pooled(parts)] for name, parts in whole.items()]
        rows += [
            [head, f"{name}, published", "", f"{value:.2f}", "", "", ""]
            for name, value in PUBLISHED_M3.items()
        ]
    about = (
        "M3 and Tourism competitions. MASE and sMAPE of a frequency are means over its series, of "
        "M3 as a whole over all points. Point forecasts are medians; the plain average is that of "
        f"medians and of ends of intervals: of {', '.join(AVERAGES['m3'])} on M3, of "
        f"{', '.join(AVERAGES['tourism'])} on Tourism, as chosen on the end of the training part. "
        f"LinearGaussianSSM, RNN and DMM have one set of parameters a frequency; RNN and DMM were "
        f"trained for {EPOCHS} epochs. Wall-clock seconds, one thread, beside other work."
    )
    write("m3_tourism", about, COLUMNS, rows, PLANS, options, seconds)


if __name__ == "__main__":
    main()
