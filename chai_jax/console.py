"""What people read: progress and messages on stderr, tables on stdout among the results."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chai_jax.stopping import safe_point

Item = TypeVar("Item")
COLUMNS = 120  # of a table where stdout is no terminal


class PlainConsole(Console):
    """A console that prints text as it is: names of files and models may look like markup, and must not act so.

    If its reader is gone (a pipe to `head`), it falls silent, and the work goes on.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard(self.file)


console = PlainConsole(stderr=True)


def discard(stream: Any) -> None:
    """Let what is still written to a stream go nowhere, so that Python does not fail on it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_table(table: Any) -> None:
    """Print a rich table on stdout."""
    PlainConsole(width=None if sys.stdout.isatty() else COLUMNS).print(table)


def bar() -> Progress:
    """A progress bar on stderr that vanishes when it is done and stays silent where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items` under a progress bar; `total` is how many, if they have no length. A job may stop before each."""
    count = total if total is not None else len(items)  # type: ignore[arg-type]
    with bar() as progress:
        task = progress.add_task(description, total=count, note="")
        for item in items:
            safe_point()
            yield item
            progress.advance(task)
