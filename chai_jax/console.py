"""What people read: progress and messages on stderr, so that stdout carries results alone, among them tables."""

import io
import os
import select
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chai_jax.stopping import safe_point

Item = TypeVar("Item")
NARROWEST = 40  # columns: narrower, help texts and tables would be a letter a line, or never end


class PlainConsole(Console):
    """A console that prints text as it is: names of files and models may look like markup, and must not act so.

    Where nobody reads any more (a pipe to `head`), it falls silent, and the work goes on.
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


def adapt_to_terminal() -> None:
    """Let stdout take every text, whatever its encoding and closed or not, and lay nothing out for too few columns."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def nobody_reads() -> bool:
    """Whether stdout or stderr is a pipe whose reader (head, say) has seen enough."""
    poll = select.poll()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one may be closed
        poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def finish_stdout() -> None:
    """Write what stdout still holds; where it cannot be written any more, throw it away."""
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)


def complain(message: str) -> None:
    """Print why a command ends, as one line of some length at most, whatever names are in it."""
    console.quiet = False  # as it is in all processes but the first
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
    line = line if len(line) <= 1000 else f"{line[:700]} ... {line[-200:]}"
    console.print(f"error: {line}", style="red", soft_wrap=True)


def print_table(table: Any) -> None:
    """Print a rich table on stdout, whole where stdout is no terminal."""
    PlainConsole(width=None if sys.stdout.isatty() else 180).print(table)


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
    """Yield `items` under a progress bar; `total` where they have no length. A job may be stopped before each."""
    count = total if total is not None else len(items)  # type: ignore[arg-type]
    with bar() as progress:
        task = progress.add_task(description, total=count, note="")
        for item in items:
            safe_point()
            yield item
            progress.advance(task)
