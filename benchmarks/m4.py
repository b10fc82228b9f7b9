"""M4 competition, weekly and hourly series: accuracy and calibration beside the official figures.

Models and averages were chosen on the end of the training part (``--validate``).
"""

from __future__ import annotations

from _accuracy import ABOUT_TIMES, Entry, Plan, arguments, cost, measure, scores, write

import seqdgm as sq

# sMAPE of the competition's tables.
PUBLISHED = {
    "m4-weekly": {"Naive2": 9.161, "Theta": 9.093, "ES-RNN (winner)": 7.817},
    "m4-hourly": {"Naive2": 18.383, "Theta": 18.138, "ES-RNN (winner)": 9.328},
}
FORMATS = {
    "sMAPE": "{:.3f}",
    "MASE": "{:.3f}",
    "OWA": "{:.3f}",
    "MSIS": "{:.2f}",
    "coverage": "{:.1f} %",
    "ACD": "{:.3f}",
    "fit": "{:.1f} s",
    "forecast": "{:.1f} s",
}
COLUMNS = ("series", "by", "sMAPE", "MASE", "OWA", "MSIS", "coverage-95", "ACD")
COLUMNS += ("fit of 1,000", "forecast of 1,000")


def year(**options: object) -> sq.StructuralSSM:
    """Level and a year of weeks as a few harmonics."""
    return sq.StructuralSSM(
        seasonal=52, seasonal_kind="trigonometric", harmonics=6, transform="log", **options
    )


WEEKLY = Plan(
    "m4-weekly",
    {
        "SeasonalNaive": Entry(sq.SeasonalNaive(season=1)),
        "AutoARIMA": Entry(sq.AutoARIMA(transform="log")),
        "StructuralSSM, drift": Entry(sq.StructuralSSM(trend="deterministic", transform="log")),
        "StructuralSSM, year": Entry(year()),
    },
    {
        "average of the last three": (
            "AutoARIMA",
            "StructuralSSM, drift",
            "StructuralSSM, year",
        )
    },
    history=260,
    block=120,
)


def day(
    order: tuple[int, int, int], seasonal: tuple[int, int, int], lags: tuple[int, ...]
) -> Entry:
    """Daily differences, and the values of the same hour one or two weeks before as regressors."""
    model = sq.ARIMA(order, seasonal=(*seasonal, 24), transform="log")
    return Entry(model, lags=lags, history=480 if max(lags, default=0) <= 168 else 312)


HOURLY = Plan(
    "m4-hourly",
    {
        "SeasonalNaive": Entry(sq.SeasonalNaive(season=24), history=480),
        "ARIMA(2,0,2)(0,1,1), one week": day((2, 0, 2), (0, 1, 1), (168,)),
        "ARIMA(3,0,0)(1,1,1), one week": day((3, 0, 0), (1, 1, 1), (168,)),
        "ARIMA(2,0,2)(0,1,1), two weeks": day((2, 0, 2), (0, 1, 1), (168, 336)),
    },
    {
        "average of the ARIMA models": (
            "ARIMA(2,0,2)(0,1,1), one week",
            "ARIMA(3,0,0)(1,1,1), one week",
            "ARIMA(2,0,2)(0,1,1), two weeks",
        )
    },
)
PLANS = (WEEKLY, HOURLY)


def main() -> None:
    options = arguments(__doc__, [plan.data for plan in PLANS])
    rows, seconds = [], 0.0
    for plan in PLANS:
        if options.data and plan.data not in options.data:
            continue
        series, found = measure(plan, options)
        seconds += cost(plan, found)
        head = f"{len(series.train)} {plan.data.removeprefix('m4-')}"
        for name, forecasts in found.items():
            given = scores(series, forecasts, relative=True)
            cells = [form.format(given[key]) for key, form in FORMATS.items()]
            rows.append([head, name, *cells])
        blank = [""] * (len(FORMATS) - 1)
        rows += [
            [head, f"{name}, published", f"{value:.3f}", *blank]
            for name, value in PUBLISHED[plan.data].items()
        ]
    about = (
        "M4 competition. sMAPE and MASE are means over the series, OWA is relative to Naive2, MSIS "
        "and ACD belong to 95 % intervals, in the definitions of the competition. Point forecasts "
        "are medians; averages are plain means of medians and of the ends of intervals. Models and "
        "averages were chosen on the end of the training part. " + ABOUT_TIMES
    )
    write("m4", about, COLUMNS, rows, PLANS, options, seconds)


if __name__ == "__main__":
    main()
