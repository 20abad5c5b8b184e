"""Stopping a job: a signal is noted when it comes, and obeyed at the next safe point.

A handler could raise, but Python would then raise between any two of its instructions: in a destructor or in the
callback of a weak reference the exception is swallowed, and the job goes on as if nobody had asked.

Orbax's and jax's `reached_preemption` does not serve: in a job of one process it always says no, it is asked once a
training step alone, and it hears neither Ctrl-C nor a signal outside of training.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from chai_jax.errors import Stopped

_noted: set[int] = set()


def _note(number: int, frame: FrameType | None) -> None:
    _noted.add(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt  # at once; where it is swallowed, the next safe point raises it again


@contextmanager
def listening() -> Iterator[None]:
    """While entered, SIGTERM (a machine that is taken away says so) and Ctrl-C are noted; leaving is a safe point too.

    Does nothing where it is entered already, and outside the main thread, where Python hears no signals. A signal that
    the caller ignores stays ignored, and a handler of Ctrl-C of the caller's own stays.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if before[signal.SIGTERM] is _note or threading.current_thread() is not threading.main_thread():
        yield
        return
    if before[signal.SIGTERM] is signal.SIG_IGN:
        del before[signal.SIGTERM]
    if before[signal.SIGINT] is not signal.default_int_handler:
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, _note)
    try:
        yield
        safe_point()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that is not Python's
        _noted.clear()


def terminated() -> bool:
    """Whether SIGTERM was noted.

    Raises:
        KeyboardInterrupt: Ctrl-C was, and what it raised was swallowed.
    """
    if signal.SIGINT in _noted:
        raise KeyboardInterrupt
    return signal.SIGTERM in _noted


def safe_point() -> None:
    """To be called often, where stopping loses nothing that is not soon done again.

    One process of several goes on, since the others would wait for it: they stop together, where they agree to.

    Raises:
        Stopped: SIGTERM was noted.
        KeyboardInterrupt: see `terminated`.
    """
    if not terminated():
        return
    import jax

    if jax.process_count() == 1:
        print("stopped (SIGTERM): the same command goes on from there", file=sys.stderr)
        raise Stopped
