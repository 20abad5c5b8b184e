"""Stopping between two updates: on SIGTERM, which is how a machine that is taken away says so, or when time is up."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any


class StopWatch:
    """While entered, SIGTERM is noted rather than obeyed, so that the update under way can end.

    Args:
        deadline: `time.monotonic()` from which on the time is up; None for never.
    """

    def __init__(self, deadline: float | None):
        self.deadline = deadline
        self.terminated = False
        self._before: Any = None

    def __enter__(self) -> "StopWatch":
        if threading.current_thread() is threading.main_thread():  # Python hears signals nowhere else
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def stops(self) -> bool:
        """Whether training should stop."""
        return self.terminated or self.late
