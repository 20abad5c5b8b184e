"""Stopping between two updates: on SIGTERM, which is how a machine that is taken away says so, or when time is up."""

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


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


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """Each flag, raised if any process raised it: all of them save and stop at the same update."""
    if jax.process_count() == 1:
        return list(flags)
    return multihost_utils.process_allgather(np.asarray(flags)).any(axis=0).tolist()
