"""A comparison as one HTML page that loads nothing: tables, plots, and how it came about."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np

from seqdgm.evaluation import report_tables as tables
from seqdgm.evaluation.numbers import digits, p_text
from seqdgm.evaluation.numbers import text as number
from seqdgm.evaluation.report_figures import payload
from seqdgm.evaluation.traces import MAX_SERIES, MAX_SMOOTHED, MAX_STATES, MAX_STEPS
from seqdgm.serialize import write_whole

if TYPE_CHECKING:
    from typing import Any

    from seqdgm.evaluation.compare import Comparison


def write_report(comparison: Comparison, path: str | Path, *, title: str, max_series: int) -> None:
    """Write the page of `Comparison.report`, whole or not at all."""
    if int(max_series) != max_series or max_series < 1:
        raise ValueError(f"max_series={max_series!r} must be a whole number, at least 1")
    library = plotting_library()
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; make it first")
    write_whole(path, page(comparison, title, int(max_series), library).encode())


def plotting_library() -> str:
    """Source of plotly.js, of the version that comes with the package plotly.

    Raises
    ------
    ImportError
        If plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "a report needs plotly; install it with: pip install 'seqdgm[report]'"
        ) from error
    source: str = get_plotlyjs()
    return source


def page(comparison: Comparison, title: str, max_series: int, library: str) -> str:
    """Put the page together."""
    import seqdgm

    folder = files("seqdgm.evaluation") / "templates"
    skeleton, style, script = (
        (folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    data = payload(comparison, max_series)
    parts = _sections(comparison, data)
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in parts)
    sections = "\n".join(
        f'<section id="{name}"><h2>{heading}</h2>\n{body}</section>'
        for name, heading, body in parts
    )
    return Template(skeleton).substitute(
        title=tables.escape(title),
        policy=_policy(library, script),
        version=seqdgm.__version__,
        style=style,
        lede=_lede(comparison),
        links=links,
        sections=sections,
        library=library,
        data=_json(data),
        script=script,
    )


def _json(data: dict[str, Any]) -> str:
    """JSON in which no name can end the element that holds it, or open another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _policy(*scripts: str) -> str:
    """Content security policy: these scripts and no other, nothing from the network."""
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    )


def _sections(comparison: Comparison, data: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Identifier, heading and HTML of each section, in order."""
    several = "" if data["ranks"] is None else "ranks"
    found = [
        ("leaderboard", "Leaderboard", _leaderboard(comparison)),
        (several, "Critical differences", _ranks(data["ranks"])),
        ("forecasts", "Forecasts", _forecasts(data["forecasts"])),
        ("calibration", "Calibration", _calibration(comparison, data)),
        ("likelihoods", "Likelihoods", tables.likelihoods(comparison)),
        ("latent", "Latent states", _states(data["states"]) + tables.state_accuracy(comparison)),
        ("learning", "Training", _training(data["training"])),
        ("cost", "Time and memory", tables.cost(comparison)),
        ("data-set", "Data", tables.description(comparison)),
        ("failures", "Failures", tables.failures(comparison)),
        ("provenance", "Settings and versions", tables.provenance(comparison)),
    ]
    return [section for section in found if section[0]]


def _lede(comparison: Comparison) -> str:
    settings = comparison.settings
    seed = settings.get("seed")
    parts = [
        _count(len(comparison.table), "model"),
        f"{comparison.panel.n_series} series",
        _count(comparison.horizon, "step") + " ahead",
        _count(settings.get("n_windows", 1), "forecast origin"),
        "no seed" if seed is None else f"seed {seed}",
    ]
    return " · ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _leaderboard(comparison: Comparison) -> str:
    legend = {
        "CRPS": "continuous ranked probability score of the whole predictive distribution, in the "
        "units of the data; smaller is better.",
        "MASE": "mean absolute scaled error of the mean, against the in-sample error of repeating "
        f"the value {comparison.season} step(s) earlier; smaller is better.",
        "sMAPE": "symmetric mean absolute percentage error, 0 to 200; smaller is better.",
        "wQL": "weighted quantile loss at 0.1, …, 0.9, pooled over all points; smaller is better.",
        "OWA": "mean of MASE and sMAPE, each relative to Naive2, whose value is 1.",
        "in 80 %": "per cent of held-out values inside the central 80 % prediction interval.",
        "log score": "held-out log-likelihood in nats a step; larger is better, and only numbers "
        "of one kind compare directly.",
        "p, p (Holm)": f"two-sided {_TESTS[comparison.test]} of the scaled CRPS against "
        f"{comparison.baseline}, and the same adjusted for the number of models.",
        "units": "series and windows scored. A ± under a number is its standard error over them; "
        "bold is the smallest among the models scored on all.",
    }
    items = "".join(
        f"<dt>{tables.escape(name)}</dt><dd>{tables.escape(what)}</dd>"
        for name, what in legend.items()
    )
    return (
        f'<p class="finding">{_finding(comparison)}</p>'
        f"{tables.leaderboard(comparison)}"
        f"<details><summary>What the columns mean</summary><dl>{items}</dl></details>"
    )


_TESTS = {
    "wilcoxon": "Wilcoxon signed-rank test",
    "bootstrap": "paired bootstrap test (series resampled)",
    "diebold-mariano": "Diebold-Mariano test",
}


def _finding(comparison: Comparison) -> str:
    """One sentence about the first row."""
    table, baseline = comparison.table, comparison.baseline
    first = str(table.index[0])
    row = table.iloc[0]
    if not np.isfinite(row["CRPS"]):
        return "No model gave a forecast that could be scored."
    decimals = digits(list(table["CRPS"]), list(table["CRPS-se"]))
    shown = number(row["CRPS"], decimals)
    if np.isfinite(row["CRPS-se"]):
        shown += f"&nbsp;±&nbsp;{number(row['CRPS-se'], decimals)}"
    text = f"{tables.escape(first)} has the lowest CRPS, {shown}"
    if first == baseline:
        return f"{text}; it is also the baseline of the tests."
    other = number(float(table["CRPS"][table.index == baseline].iloc[0]), decimals)
    text += f"; the baseline {tables.escape(baseline)} has {other}"
    if not np.isfinite(row["p_holm"]):
        return f"{text}. There are too few scores for a test of the difference."
    return f"{text} ({_p(row['p_holm'])}, adjusted for the number of models)."


def _p(value: float) -> str:
    shown = tables.escape(p_text(value))
    return f"p&nbsp;{shown}" if shown.startswith("&lt;") else f"p&nbsp;=&nbsp;{shown}"


def _ranks(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    p = _p(found["p"])
    out = ", ".join(map(tables.escape, found["left_out"]))
    left = f" Left out, for a failure somewhere: {out}." if out else ""
    return (
        '<div id="ranking" class="plot" role="group" '
        'aria-label="Critical-difference diagram of the mean ranks"></div>'
        f'<p class="note">Ranks by CRPS on {found["units"]} units that every model was scored on. '
        f"Friedman test that all rank alike: {p}. A bar joins models whose mean ranks differ by "
        "less than the critical difference of the Nemenyi test at "
        f"{100 * found['alpha']:g}&nbsp;%: these the data do not tell apart. Units are taken as "
        f"independent, which overlapping windows are not.{left}</p>"
    )


def _forecasts(found: dict[str, Any]) -> str:
    shown, total = len(found["series"]), found["n_series"]
    windows, all_windows = len(found["windows"]), found["n_windows"]
    notes = []
    if shown < total:
        notes.append(f"{shown} of {total} series are drawn here, evenly chosen in their order")
    if windows < all_windows:
        notes.append(f"{windows} of {all_windows} windows are drawn here")
    cut = f"{'; '.join(notes)}. The tables are over all of them. " if notes else ""
    return (
        '<div class="controls">'
        '<label>series <select id="fans-series"></select></label>'
        '<label>window <select id="fans-window"></select></label>'
        '<fieldset id="fans-models"><legend>models</legend></fieldset></div>'
        '<div id="fans" class="plot" role="group" aria-label="Forecast fans"></div>'
        '<p id="fans-missing" class="note" aria-live="polite"></p>'
        f'<p class="note">{cut}Grey: history. Line with dots: what was held out. Coloured line: '
        "mean; bands: prediction intervals. A fan may leave the picture: double-click for all of "
        "it.</p>"
    )


def _calibration(comparison: Comparison, data: dict[str, Any]) -> str:
    points = max((found["n"] for found in data["pit"]), default=0)
    per_step = max((max(found["count"]) for found in data["coverage"]), default=0)
    few = " One value a step says little." if per_step == 1 else ""
    return (
        "<h3>Probability integral transform</h3>"
        f'<p class="note">Where each of {points} held-out values falls in its forecast, 0 to 1. '
        "Flat: calibrated. U: forecasts too narrow. Hump: too wide. Slope: biased. The grey band "
        "holds 95&nbsp;% of the bars of a calibrated model, were the values independent.</p>"
        '<div id="transforms" class="grid"></div>'
        "<h3>Coverage by step</h3>"
        f'<p class="note">{_count(per_step, "held-out value")} a step.{few} Dashed: nominal; the '
        "grey band holds 95&nbsp;% of the shares of a calibrated model, were the values "
        "independent.</p>"
        f'{_legend(comparison)}<div id="coverage" class="grid wide"></div>'
        f"{tables.calibration(comparison)}"
    )


def _legend(comparison: Comparison) -> str:
    names = tables.model_names(comparison.table).shown
    return f'<p class="legend">{"".join(names)}</p>'


def _states(found: list[dict[str, Any]]) -> str:
    if not found:
        return (
            "<p>No states were kept: no model here has an engine that smooths, or a series has "
            f"more than {MAX_SMOOTHED:,} steps.</p>"
        )
    return (
        '<div class="controls"><label>model <select id="states-model"></select></label>'
        '<label>series <select id="states-series"></select></label></div>'
        '<div id="states" class="grid"></div>'
        '<p class="note">Solid: smoothed, given the whole history before the last window. Dotted: '
        f"predicted. Bands: ±&nbsp;1.96 standard deviations. At most {MAX_SERIES} series, the "
        f"first {MAX_STATES} states and the last {MAX_STEPS} steps are kept.</p>"
    )


def _training(found: list[dict[str, Any]]) -> str:
    if not found:
        return "<p>No model here was fitted by iterations that leave a curve.</p>"
    return (
        '<div id="training" class="grid"></div>'
        '<p class="note">Objective of the newest fit; larger is better. Dotted: validation. '
        "Dashed: the epoch that was kept. First iterations may lie below the picture: double-click "
        "for all of it.</p>"
    )
