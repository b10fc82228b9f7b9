"""A bar on standard error, for whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(show: bool, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show how many parts are done, on standard error, as the function given says."""
    if not show:
        yield lambda parts, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(parts: int, text: str) -> None:
            bar.update(task, advance=parts, description=text)

        yield advance
