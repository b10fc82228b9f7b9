"""Time seqdgm beside its peers: one process, alternating, after checking that they agree."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 0.1  # a sample repeats a short call until it has lasted this long
FEWEST_ROUNDS = 3

Call = Callable[[], Any]
Agreement = Callable[[Mapping[str, np.ndarray]], str]


class DisagreementError(Exception):
    """Two contenders of a task compute different numbers."""


@dataclass(frozen=True)
class Contender:
    """One implementation of a task.

    `prepare` imports what it needs, builds models and data and returns the call to be timed;
    `value` reads the number to be compared off the result of that call. `package` is None for
    seqdgm itself. The ratio is never taken to one that does not count, because it does less work.
    """

    name: str
    prepare: Callable[[], Call]
    value: Callable[[Any], Any] = float
    package: str | None = None
    counts: bool = True


@dataclass(frozen=True)
class Task:
    """The same work by several contenders, at least one of them seqdgm.

    `agree` gets the values of `checks` calls of each contender (two at least), stacked, and raises
    `DisagreementError` or says how close they are. A call does `units` equal pieces of work, and
    seconds are reported for one of them.
    """

    title: str
    contenders: Sequence[Contender]
    agree: Agreement
    checks: int = 2
    units: int = 1


@dataclass
class Timing:
    """Seconds of one contender; `samples` holds one figure a round."""

    name: str
    package: str | None
    first_seconds: float
    counts: bool = True
    calls_per_sample: int = 1
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def record(self, best: Timing | None) -> dict[str, Any]:
        out: dict[str, Any] = {
            "name": self.name,
            "package": self.package or "seqdgm",
            "first_seconds": self.first_seconds,
            "median_seconds": self.median,
            "min_seconds": min(self.samples),
            "max_seconds": max(self.samples),
            "rounds": len(self.samples),
            "calls_per_sample": self.calls_per_sample,
        }
        if best is not None and self.package is None:
            ratios = [a / b for a, b in zip(self.samples, best.samples, strict=True)]
            out["ratio"] = {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
        return out


# -- agreement ----------------------------------------------------------------------------------


def equal(rtol: float, atol: float = 0.0, expected: Any = None) -> Agreement:
    """All contenders give `expected` (default: what the first one gives) up to a tolerance."""

    def agree(values: Mapping[str, np.ndarray]) -> str:
        names = list(values)
        target = values[names[0]][0] if expected is None else np.asarray(expected, float)
        worst = 0.0
        for name, found in values.items():
            if found[0].shape != target.shape:
                raise DisagreementError(f"{name} has shape {found[0].shape}, not {target.shape}")
            gap = np.abs(found - target)
            if not bool((gap <= atol + rtol * np.abs(target)).all()):
                raise DisagreementError(
                    f"{name} is off by {gap.max():.3g} (allowed: {rtol:g} relative + {atol:g}); "
                    f"its first value is {found[0].flat[0]:.10g}, not {target.flat[0]:.10g}"
                )
            worst = max(worst, float(gap.max()))
        return f"equal: largest difference {worst:.1e}"

    return agree


def optimum(slack: float, short: float) -> Agreement:
    """Maxima of one function: the first contender's is within `slack` of the best.

    Optimisers stop early, so the others may lie below it, but by `short` at most.
    """

    def agree(values: Mapping[str, np.ndarray]) -> str:
        found = {name: float(value[0]) for name, value in values.items()}
        names = list(found)
        best = max(found.values())
        allowed = {name: short for name in names} | {names[0]: slack}
        for name, value in found.items():
            if not best - value <= allowed[name]:
                raise DisagreementError(f"{name} stops at {value:.6f}, the best at {best:.6f}")
        gaps = ", ".join(f"{name} {found[name] - found[names[0]]:+.1e}" for name in names[1:])
        said = f"maximum {found[names[0]]:.4f}"
        return f"{said}; beside it {gaps}" if gaps else said

    return agree


def unbiased(exact: Any) -> Agreement:
    """Log-evidence estimates whose exponentials average to exp(`exact`), up to five sigma.

    The log of an unbiased, nearly log-normal estimate lies below the truth by half its variance.
    """

    def agree(values: Mapping[str, np.ndarray]) -> str:
        said = []
        for name, found in values.items():
            error = (found - np.asarray(exact, float)).ravel()
            count, variance = len(error), float(error.var(ddof=1))
            bias = float(error.mean()) + variance / 2
            sigma = math.sqrt(variance / count + variance**2 / (2 * (count - 1)))
            if not abs(bias) <= 5 * sigma:
                raise DisagreementError(
                    f"{name}: log-evidence off by {bias:.3g} after correction, sigma {sigma:.3g}"
                )
            said.append(f"{name} {bias:+.2f} ± {sigma:.2f}")
        return "unbiased: " + ", ".join(said) + " nats"

    return agree


# -- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds at most, and seconds that a task may take about."""

    rounds: int
    seconds: float


def run_task(task: Task, effort: Effort) -> dict[str, Any]:
    """Check and time all contenders of a task that are installed."""
    calls, missing = _prepare(task)
    timings, warm, values = _first_calls(task, calls)
    agreement = task.agree(values)
    _measure(timings, calls, warm, effort, task.units)
    peers = [t for t in timings if t.package is not None and t.counts]
    best = min(peers, key=lambda t: t.median, default=None)
    return {
        "title": task.title,
        "agreement": agreement,
        "best_peer": None if best is None else best.name,
        "not_installed": missing,
        "contenders": [t.record(best) for t in timings],
    }


def _prepare(task: Task) -> tuple[dict[str, Call], list[str]]:
    calls, missing = {}, []
    for contender in task.contenders:
        try:
            calls[contender.name] = contender.prepare()
        except ModuleNotFoundError as error:
            if contender.package is None or (error.name or "").split(".")[0] != contender.package:
                raise
            if contender.package not in missing:
                missing.append(contender.package)
    return calls, missing


def _first_calls(
    task: Task, calls: Mapping[str, Call]
) -> tuple[list[Timing], dict[str, float], dict[str, np.ndarray]]:
    """What a first call takes, compilation included, what later ones take, and all their values."""
    timings, warm, values = [], {}, {}
    for contender in task.contenders:
        if contender.name not in calls:
            continue
        call = calls[contender.name]
        first, result = _timed(call, 1)
        found, later = [contender.value(result)], []
        for _ in range(task.checks - 1):
            seconds, result = _timed(call, 1)
            found.append(contender.value(result))
            later.append(seconds)
        timings.append(
            Timing(contender.name, contender.package, first / task.units, contender.counts)
        )
        warm[contender.name] = statistics.median(later)
        values[contender.name] = np.array(found, float)
    return timings, warm, values


def _measure(
    timings: Sequence[Timing],
    calls: Mapping[str, Call],
    warm: Mapping[str, float],
    effort: Effort,
    units: int,
) -> None:
    for timing in timings:
        timing.calls_per_sample = max(1, math.ceil(SAMPLE_SECONDS / warm[timing.name]))
    round_seconds = sum(t.calls_per_sample * warm[t.name] for t in timings)
    fewest = min(FEWEST_ROUNDS, effort.rounds)
    rounds = min(effort.rounds, max(fewest, int(effort.seconds / round_seconds)))
    for k in range(rounds):
        # Each contender is first, second ... equally often, so that none profits from its place.
        start = k % len(timings)
        for timing in (*timings[start:], *timings[:start]):
            seconds, _ = _timed(calls[timing.name], timing.calls_per_sample)
            timing.samples.append(seconds / units)


def _timed(call: Call, times: int) -> tuple[float, Any]:
    """Seconds of one of `times` calls, without the garbage collector, and the last result."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        for _ in range(times):
            result = call()
        return (time.perf_counter() - begin) / times, result
    finally:
        if enabled:
            gc.enable()


# -- where it ran -------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """The machine, its load, threads, and the version of every package that was loaded."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": _threads(),
        "numba_cache": _CACHE,
        "versions": _versions(),
    }


def _numba_cache() -> str:
    """Whether compiled kernels could be taken from disk when the script began."""
    folder = os.environ.get("NUMBA_CACHE_DIR")
    if folder is None:
        return "the default"
    return "filled before" if any(Path(folder).rglob("*.nbc")) else "empty at the start"


_CACHE = _numba_cache()


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _threads() -> dict[str, Any]:
    libraries = ("OMP", "MKL", "OPENBLAS", "NUMBA")
    named = (*(f"{library}_NUM_THREADS" for library in libraries), "NPROC")  # the last is JAX's
    threads: dict[str, Any] = {name: os.environ[name] for name in named if name in os.environ}
    if "torch" in sys.modules:
        threads["torch"] = sys.modules["torch"].get_num_threads()
    if "numba" in sys.modules:
        # get_num_threads() would start numba's OpenMP pool, which sets the threads of torch too.
        threads["numba"] = sys.modules["numba"].config.NUMBA_NUM_THREADS
    return threads


def _versions() -> dict[str, str]:
    homes = metadata.packages_distributions()
    loaded = {name.partition(".")[0] for name in sys.modules}
    found = {home for name in loaded for home in homes.get(name, ())} | {"seqdgm"}
    return {name: metadata.version(name) for name in sorted(found, key=str.lower)}


# -- results ------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds for a reader, with three digits."""
    if seconds >= 7200:
        return f"{float(f'{seconds / 3600:.3g}'):,g} h"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{float(f'{seconds / size:.3g}'):g} {unit}"
    return f"{float(f'{seconds / 1e-9:.3g}'):g} ns"


def tabulate(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(
    name: str,
    about: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    where: Mapping[str, Any],
    folder: Path = RESULTS,
) -> None:
    """Keep a table that is no comparison of contenders as the result of a script."""
    record = {"name": name, "about": about, **where, "columns": columns, "rows": rows}
    _write(record, folder)


def _write(record: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / f"{record['name']}.json").write_text(text, encoding="utf-8")


def as_markdown(tasks: Sequence[Mapping[str, Any]]) -> str:
    """The results of a script as one table."""
    columns = ("work", "by", "median (min to max)", "ratio to best peer (min to max)", "first call")
    lines: list[list[str]] = []
    for task in tasks:
        title = task["title"]
        for row in sorted(task["contenders"], key=lambda r: r["package"] != "seqdgm"):
            spread = f"{duration(row['min_seconds'])} to {duration(row['max_seconds'])}"
            cells = [title, row["name"], f"{duration(row['median_seconds'])} ({spread})"]
            cells += [_ratio(row, task), duration(row["first_seconds"])]
            lines.append(cells)
            title = ""
        lines += [["", name, "not installed", "", ""] for name in task["not_installed"]]
    return tabulate(columns, lines)


def _ratio(row: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    if "ratio" not in row:
        return "best peer" if row["name"] == task["best_peer"] else ""
    low, mid, high = (f"{row['ratio'][k]:.3g}" for k in ("min", "median", "max"))
    return f"**{mid}** ({low} to {high})"


# -- command line -------------------------------------------------------------------------------


def main(
    name: str,
    about: str | None,
    tasks: Mapping[str, Callable[[Any], Task]],
    *,
    full: Any,
    tiny: Any,
) -> None:
    """Run a script's tasks; `full` and `tiny` are the sizes that they are built with."""
    options = _arguments(about, tasks)
    chosen = [key for key in tasks if any(text in key for text in options.only or [""])]
    sizes = tiny if options.tiny else full
    effort = Effort(2 if options.tiny else options.rounds, options.seconds)
    results, failures = [], []
    for key in chosen:
        print(f"{name}: {key}", file=sys.stderr, flush=True)
        try:
            results.append({"key": key, **run_task(tasks[key](sizes), effort)})
        except DisagreementError as error:
            failures.append(f"{key}: the contenders disagree, so none was timed: {error}")
    print(as_markdown(results))
    complete = not options.tiny and not options.only and not failures
    folder = options.output or (RESULTS if complete else None)
    if folder is not None:
        record = {"name": name, "sizes": asdict(sizes), **environment(), "tasks": results}
        _write(record, folder)
    if failures:
        sys.exit("\n".join(failures))


def _arguments(about: str | None, tasks: Mapping[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help=f"run only the tasks whose name holds TEXT (repeatable): {', '.join(tasks)}",
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds at most (default 15)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="seconds to time a task (default 60)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes and two rounds, to see that it all runs"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the results (default benchmarks/results, and nowhere if the run is tiny or "
        "partial)",
    )
    return parser.parse_args()
