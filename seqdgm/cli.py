"""The command line: ``seqdgm datasets | compare | forecast | filter | fit``.

Nothing but typer is imported until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from seqdgm._cli_files import (
    Layout,
    check_folder,
    check_outputs,
    check_report,
    read_data,
    write_figure,
    write_frame,
)

if TYPE_CHECKING:
    import pandas as pd

    from seqdgm.model import SequenceModel

app = typer.Typer(
    add_completion=False,
    help="Forecast and filter sequences with classical and deep state-space models.",
    pretty_exceptions_enable=False,
)

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="CSV or parquet file, or the name of a data set (see: seqdgm datasets).",
        show_default=False,
    ),
]
OptionalData = Annotated[str | None, Data.__metadata__[0]]
TimeColumn = Annotated[
    str | None, typer.Option(help="Column with the time stamps. Default: ds, or the first column.")
]
ValueColumn = Annotated[
    list[str] | None,
    typer.Option(
        help="Column with values; repeat for several. Default: y beside unique_id, else all."
    ),
]
TimeFormat = Annotated[
    str | None, typer.Option(help="How dates are written, as in %d.%m.%Y. Default: 2024-01-31.")
]
FillGaps = Annotated[
    bool, typer.Option("--fill-gaps", help="Insert missing time stamps as missing values.")
]
Season = Annotated[
    int | None,
    typer.Option(help="Season length in steps. Default: from the data set or its dates."),
]
Horizon = Annotated[int | None, typer.Option(help="Steps to forecast. Default: the data set's.")]
Transform = Annotated[
    str | None, typer.Option(help="'log' to model logarithms, 'none' for the values as they are.")
]
Order = Annotated[str | None, typer.Option(help="ARIMA order p,d,q.")]
Seasonal = Annotated[str | None, typer.Option(help="ARIMA seasonal order P,D,Q,s.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Level = Annotated[str, typer.Option(help="Prediction intervals in per cent, comma-separated.")]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="seasonal-naive, arima, linear-gaussian, local-level, rnn or dmm.",
    ),
]


class Problem(NamedTuple):
    """Data with what is known about them."""

    y: Any
    season: int
    horizon: int | None
    defaults: dict[str, Any]


@app.command()
def datasets() -> None:
    """List the data sets, their licences, and whether they are here or would be downloaded."""
    from seqdgm import datasets as registry

    shown = ["name", "n_series", "length", "freq", "season", "horizon", "here", "description"]
    table = registry.list()
    here = table["present"].map({True: "yes", False: "no"})
    horizon = table["horizon"].astype(object).where(table["horizon"].notna(), "-")
    table = table.assign(here=here, horizon=horizon).fillna({"freq": "-"})
    _show(table[[*shown, "licence"]], "Data sets")


@app.command()
def compare(
    data: Data,
    models: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated. Default: seasonal-naive,arima,linear-gaussian,rnn,dmm."
        ),
    ] = None,
    horizon: Horizon = None,
    windows: Annotated[int, typer.Option(min=1, help="Number of forecast origins.")] = 1,
    season: Season = None,
    transform: Transform = None,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("seqdgm-output"),
    report: Annotated[
        Path | None,
        typer.Option(help="HTML file with everything, complete in itself. Needs seqdgm[report]."),
    ] = None,
    test: Annotated[
        Literal["wilcoxon", "bootstrap", "diebold-mariano"],
        typer.Option(help="Paired test of the CRPS against SeasonalNaive, or the first model."),
    ] = "wilcoxon",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder from which an interrupted comparison goes on."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A trial run: the deep models hardly learn.")
    ] = False,
    time_column: TimeColumn = None,
    value_column: ValueColumn = None,
    time_format: TimeFormat = None,
    fill_gaps: FillGaps = False,
) -> None:
    """Score models on held-out data: a leaderboard, forecasts.csv and a picture."""
    from seqdgm.evaluation import compare as compare_models
    from seqdgm.evaluation.defaults import DEFAULT_MODELS, FIT_OPTIONS, default_models, title

    if report is not None:
        check_report(report)
    layout = Layout(time_column, value_column, time_format, fill_gaps)
    problem = _problem(data, season, horizon, transform, layout)
    names = DEFAULT_MODELS if models is None else _names(models)
    chosen = default_models(
        problem.season, problem.horizon, problem.defaults, names=names, quick=quick
    )
    result = compare_models(
        chosen,
        problem.y,
        horizon=_need_horizon(problem),
        season=problem.season,
        n_windows=windows,
        seed=seed,
        progress=sys.stderr.isatty(),
        fit_options={title(name): FIT_OPTIONS[name] for name in names if name in FIT_OPTIONS},
        test=test,
        cache=cache,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_frame(result.table.reset_index(), output / "leaderboard.csv")
    write_frame(result.forecasts, output / "forecasts.csv")
    write_figure(result.plot(), output / "forecasts.png")
    _show(leaderboard(result.table), f"{data}: {result.horizon} steps ahead, {windows} window(s)")
    _say(LEGEND.format(season=result.season))
    _say(f"wrote leaderboard.csv, forecasts.csv and forecasts.png to {output}{os.sep}")
    if report is not None:
        result.report(report, title=f"Forecast comparison: {Path(data).name}")
        _say(f"wrote {report} ({report.stat().st_size / 1e6:.1f} MB)")


@app.command()
def forecast(
    data: OptionalData = None,
    model: ModelName = "arima",
    load: Annotated[
        Path | None,
        typer.Option(help="A fitted model (from: seqdgm fit --save) instead of --model."),
    ] = None,
    horizon: Horizon = None,
    level: Level = "80,95",
    season: Season = None,
    transform: Transform = None,
    order: Order = None,
    seasonal: Seasonal = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option(help="CSV or parquet file. Default: CSV on standard output.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture file (.png, .svg, .pdf).")] = None,
    time_column: TimeColumn = None,
    value_column: ValueColumn = None,
    time_format: TimeFormat = None,
    fill_gaps: FillGaps = False,
) -> None:
    """Forecast a file or data set: a table of the mean and the prediction intervals."""
    levels = _levels(level)
    check_outputs(output, plot)
    layout = Layout(time_column, value_column, time_format, fill_gaps)
    problem = Problem(None, 1, horizon, {})
    if data is not None:
        problem = _problem(data, season, horizon, transform, layout)
    elif load is None:
        raise ValueError("nothing to forecast; give DATA, or --load with a fitted model")
    steps = _need_horizon(problem)
    if load is None:
        result = _fit(problem, model, order, seasonal, seed).forecast(steps, seed=seed)
    else:
        result = _load(load).forecast(steps, problem.y, seed=seed)
    _deliver(result.to_frame(levels), output)
    if plot is not None:
        write_figure(result.plot(level=levels), plot)


@app.command(name="filter")
def filter_states(
    data: Data,
    model: ModelName = "local-level",
    smooth: Annotated[
        bool, typer.Option("--smooth", help="States given all data, not only the past.")
    ] = False,
    season: Season = None,
    transform: Transform = None,
    order: Order = None,
    seasonal: Seasonal = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option(help="CSV or parquet file. Default: CSV on standard output.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture file (.png, .svg, .pdf).")] = None,
    time_column: TimeColumn = None,
    value_column: ValueColumn = None,
    time_format: TimeFormat = None,
    fill_gaps: FillGaps = False,
) -> None:
    """Fit a model and infer its states: a table of their means and standard deviations."""
    check_outputs(output, plot)
    layout = Layout(time_column, value_column, time_format, fill_gaps)
    problem = _problem(data, season, None, transform, layout)
    fitted = _fit(problem, model, order, seasonal, seed)
    on_data_scale = model == "local-level" and fitted.transform is None
    states = fitted.smooth(seed=seed) if smooth else fitted.filter(seed=seed)
    _deliver(states.to_frame(), output)
    if plot is not None:
        write_figure(states.plot(observed=on_data_scale), plot)


@app.command()
def fit(
    data: Data,
    save: Annotated[Path, typer.Option(help="File for the fitted model (.safetensors).")],
    model: ModelName = "arima",
    season: Season = None,
    transform: Transform = None,
    order: Order = None,
    seasonal: Seasonal = None,
    seed: Seed = 0,
    time_column: TimeColumn = None,
    value_column: ValueColumn = None,
    time_format: TimeFormat = None,
    fill_gaps: FillGaps = False,
) -> None:
    """Fit a model, print its summary and save it for: seqdgm forecast --load."""
    check_folder(save)
    layout = Layout(time_column, value_column, time_format, fill_gaps)
    problem = _problem(data, season, None, transform, layout)
    fitted = _fit(problem, model, order, seasonal, seed)
    fitted.save(save)
    typer.echo(fitted.summary())
    _say(f"saved the fitted model to {save}")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 and one line on standard error where the input is bad."""
    given = list(sys.argv[1:] if args is None else args) or ["--help"]
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            code = app(given, prog_name="seqdgm", standalone_mode=False)
        except typer.TyperException as error:
            _fail(error.format_message())
        except (ValueError, OSError, ImportError) as error:
            _fail(str(error))
        except (KeyboardInterrupt, typer.Abort):
            sys.exit(130)
    sys.exit(code or 0)


# Column of a comparison's table -> heading and digits that fit five models into 80 characters.
HEADINGS = {
    "MASE": ("MASE", ".3f"),
    "sMAPE": ("sMAPE", ".2f"),
    "CRPS": ("CRPS", ".4g"),
    "coverage-80": ("in 80%", ".1f"),
    "coverage-95": ("in 95%", ".1f"),
    "log_score": ("log score", ".3f"),
    "p_value": ("p", ".3f"),
    "fit_seconds": ("fit s", ".2f"),
    "forecast_seconds": ("fcst s", ".2f"),
}
LIKELIHOODS = {"estimate": "~", "lower bound": ">", "approximation": "≈"}
LEGEND = (
    "MASE (season {season}), sMAPE (0 to 200) and CRPS (units of the data): smaller is better.\n"
    "in 80%: per cent of the held-out values inside the 80 % interval.\n"
    "log score (nats a step): larger is better; ~ estimate, > lower bound, ≈ approximation,\n"
    "otherwise exact."
)


def leaderboard(table: pd.DataFrame) -> pd.DataFrame:
    """Round a comparison's table to text, standard errors beside their metric where there are."""
    import pandas as pd

    rows: dict[str, list[str]] = {"model": [str(name) for name in table.index]}
    for column, (heading, digits) in HEADINGS.items():
        if column == "p_value" and table[column].isna().all():
            continue
        rows[heading] = [_number(value, digits) for value in table[column]]
        if f"{column}-se" in table.columns and table[f"{column}-se"].notna().any():
            errors = [_number(value, digits) for value in table[f"{column}-se"]]
            pairs = zip(rows[heading], errors, strict=True)
            rows[heading] = [f"{value} ± {error}" for value, error in pairs]
    marks = [LIKELIHOODS.get(kind, "") for kind in table["log_score_kind"]]
    rows["log score"] = [a + b for a, b in zip(marks, rows["log score"], strict=True)]
    return pd.DataFrame(rows)


def _problem(
    data: str,
    season: int | None,
    horizon: int | None,
    transform: str | None,
    layout: Layout,
) -> Problem:
    from seqdgm import datasets as registry
    from seqdgm.evaluation.defaults import infer_season
    from seqdgm.panel import Panel

    defaults: dict[str, Any] = {}
    known = registry.list()["name"].to_list()
    if Path(data).suffix or Path(data).is_file():
        y = read_data(Path(data), layout)
        y = Panel.fill_gaps(y) if layout.fill_gaps else y
        season = infer_season(Panel.of(y)) if season is None else season
    elif data in known:
        found = registry.load(data)
        y, horizon = found.y, found.horizon if horizon is None else horizon
        defaults = dict(found.defaults)
        if season not in (None, found.season):
            # Recommended orders name the season of the data set; another one makes them wrong.
            defaults = {"transform": defaults.get("transform")}
        season = found.season if season is None else season
    else:
        raise ValueError(
            f"{data!r} is neither a file nor a data set; data sets: {', '.join(known)}"
        )
    if transform is not None:
        defaults["transform"] = None if transform == "none" else transform
    return Problem(y, season, horizon, defaults)


def _fit(
    problem: Problem, name: str, order: str | None, seasonal: str | None, seed: int
) -> SequenceModel:
    from seqdgm.evaluation.defaults import FIT_OPTIONS, build_model

    overrides: dict[str, Any] = {}
    for option, text, length in (("order", order, 3), ("seasonal", seasonal, 4)):
        if text is not None:
            if name != "arima":
                raise ValueError(f"--{option} belongs to --model arima, not to {name}")
            overrides[option] = _whole_numbers(option, text, length)
    model = build_model(name, problem.season, problem.horizon, problem.defaults, **overrides)
    options = FIT_OPTIONS.get(name, {})
    return model.fit(problem.y, seed=seed, progress=sys.stderr.isatty(), **options)


def _load(path: Path) -> SequenceModel:
    import seqdgm

    if not path.is_file():
        raise ValueError(f"{path}: no such file; make one with: seqdgm fit DATA --save {path}")
    return seqdgm.load(path)


def _need_horizon(problem: Problem) -> int:
    if problem.horizon is None:
        raise ValueError("the horizon is not known for these data; give --horizon")
    return problem.horizon


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _levels(text: str) -> list[float]:
    try:
        levels = [float(part) for part in _names(text)]
    except ValueError:
        raise ValueError(f"--level {text!r} is not a list of numbers such as 80,95") from None
    bad = [level for level in levels if not 1 <= level < 100]
    if bad or not levels:
        raise ValueError(f"--level {text!r}: levels are per cent, from 1 to below 100, as in 80,95")
    return levels


def _whole_numbers(option: str, text: str, length: int) -> tuple[int, ...]:
    parts = _names(text)
    if len(parts) != length or not all(part.isdigit() for part in parts):
        raise ValueError(f"--{option} {text!r} must be {length} whole numbers, comma-separated")
    return tuple(int(part) for part in parts)


def _deliver(frame: pd.DataFrame, path: Path | None) -> None:
    if path is None:
        typer.echo(frame.to_csv(index=False), nl=False)
    else:
        write_frame(frame, path)


def _show(frame: pd.DataFrame, title: str) -> None:
    """Print a table: drawn on a terminal, plain aligned text elsewhere."""
    if not sys.stdout.isatty():
        typer.echo(frame.to_string(index=False))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in frame.columns:
        text = column in ("model", "name", "description", "licence")
        table.add_column(
            column,
            justify="left" if text else "right",
            no_wrap=column not in ("description", "licence"),
        )
    for row in frame.itertuples(index=False):
        table.add_row(*(str(value).replace(" ± ", "\n± ") for value in row))
    Console().print(table)


def _number(value: float, digits: str) -> str:
    return "-" if value != value else format(value, digits)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {' '.join(str(message).split())}")


def _fail(text: str) -> None:
    _say(f"error: {' '.join(text.split())}")
    sys.exit(2)
