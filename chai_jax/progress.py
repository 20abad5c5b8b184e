"""Progress and messages for people: both go to stderr, so that stdout carries results alone."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chai_jax.stopping import safe_point

Item = TypeVar("Item")

console = Console(stderr=True)


def bar() -> Progress:
    """A progress bar on stderr that vanishes when it is done and stays silent where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
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
