"""Standard output and error as they come: of any encoding and width, closed, full, or read by nobody any more."""

import io
import os
import select
import shutil
import sys
from typing import Any

from chai_jax.console import console, discard

NARROWEST = 40  # columns: narrower, help texts and tables would be a letter a line, or never end


def adapt_to_terminal() -> None:
    """Let stdout take every text, whatever its encoding, open or closed, and lay nothing out for too few columns."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


class Replacing:
    """A stream in which `new` is written for `old`."""

    def __init__(self, stream: Any, old: str, new: str):
        self._stream, self._old, self._new = stream, old, new

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write(text.replace(self._old, self._new))
        return len(text)


def nobody_reads() -> bool:
    """Whether stdout or stderr is a pipe whose reader (head, say) has seen enough."""
    poll = select.poll()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one may be closed
        poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def finish_stdout() -> None:
    """Write what stdout still holds; throw it away if it cannot be written any more."""
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)


def complain(message: str) -> None:
    """Print why a command ends: one line of limited length, whatever names are in it."""
    console.quiet = False  # as it is in all processes but the first
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
    line = line if len(line) <= 1000 else f"{line[:700]} ... {line[-200:]}"
    console.print(f"error: {line}", style="red", soft_wrap=True)
