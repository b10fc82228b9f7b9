"""Files in and out of the command line: tables (CSV, parquet) and pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".parquet")
PICTURES = (".png", ".svg", ".pdf")
PAGES = (".html", ".htm")


class Layout(NamedTuple):
    """Where the time stamps and values of a file are."""

    time_column: str | None = None
    value_columns: Sequence[str] | None = None
    time_format: str | None = None
    fill_gaps: bool = False


PLAIN = Layout()


def read_data(path: Path, layout: Layout = PLAIN) -> Any:
    """Read a CSV or parquet file into a Series, a wide or a long DataFrame.

    Columns ``unique_id, ds, y`` make a panel; otherwise the first column is the time and the others
    hold values, unless `layout` names them. A single column is a series without time stamps. Whole
    numbers stay whole numbers as time stamps; text must be dates, year first unless `layout` says
    how they are written.

    Raises
    ------
    ValueError
        For a suffix that is not known, a missing column, or text that is no date.
    """
    import pandas as pd

    _check_suffix(path, TABLES)
    read = pd.read_csv if path.suffix.lower() == ".csv" else pd.read_parquet
    try:
        frame = read(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a readable table ({error})") from None
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    time_column, value_columns = layout.time_column, layout.value_columns
    named = [*([time_column] if time_column else []), *(value_columns or [])]
    missing = [column for column in named if column not in frame.columns]
    if missing:
        raise ValueError(
            f"{path}: no column {missing[0]!r}; there are {', '.join(map(str, frame.columns))}"
        )
    if len(frame.columns) == 1:
        return frame.iloc[:, 0]
    others = [column for column in frame.columns if column != "unique_id"]
    time = time_column or ("ds" if "ds" in others else others[0])
    stamps = _time_stamps(frame[time], path, layout.time_format)
    if "unique_id" in frame.columns:
        values = list(value_columns or ["y"])
        if any(column not in frame.columns for column in values):
            raise ValueError(f"{path}: no column 'y'; name the values with --value-column")
        long = frame[["unique_id", *values]].assign(ds=stamps)[["unique_id", "ds", *values]]
        return long.rename(columns={values[0]: "y"}) if len(values) == 1 else long
    values = list(value_columns or [column for column in frame.columns if column != time])
    wide = frame[values].set_index(pd.Index(stamps, name=time))
    return wide[values[0]] if len(values) == 1 else wide


def _time_stamps(column: pd.Series, path: Path, time_format: str | None) -> Any:
    import pandas as pd

    if pd.api.types.is_integer_dtype(column) or pd.api.types.is_datetime64_any_dtype(column):
        return column.to_numpy()
    if pd.api.types.is_numeric_dtype(column):
        raise ValueError(
            f"{path}: column {column.name!r} holds fractions, not time stamps; name the time "
            "column with --time-column"
        )
    try:
        # A guessed format would read 1/2/2024 as January or February as the file happens to begin.
        return pd.to_datetime(column, format=time_format or "ISO8601").to_numpy()
    except ValueError as error:
        raise ValueError(
            f"{path}: column {column.name!r} is not a column of dates ({error}); name the time "
            "column with --time-column, or how its dates are written with --time-format"
        ) from None


def check_outputs(output: Path | None, plot: Path | None) -> None:
    """Refuse before the work what could not be written after it."""
    for path, suffixes in ((output, TABLES), (plot, PICTURES)):
        if path is not None:
            _check_suffix(path, suffixes)
            check_folder(path)


def check_report(path: Path) -> None:
    """Refuse before the work a report that could not be written after it."""
    from seqdgm.evaluation.report import plotting_library

    _check_suffix(path, PAGES)
    check_folder(path)
    plotting_library()


def _check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    if path.suffix.lower() not in suffixes:
        known = ", ".join(suffixes)
        raise ValueError(f"{path}: suffix {path.suffix!r} is not known; use one of {known}")


def check_folder(path: Path) -> None:
    """Raise a ValueError unless there is a folder for the file."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; make it first")


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all."""
    if path.suffix.lower() == ".csv":
        _write(path, frame.to_csv(index=False).encode())
    else:
        _write(path, frame.to_parquet(index=False))


def write_figure(figure: Any, path: Path) -> None:
    """Write a picture, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=150)
    _write(path, picture.getvalue())


def _write(path: Path, payload: bytes) -> None:
    from seqdgm.serialize import write_whole

    write_whole(path, payload)
