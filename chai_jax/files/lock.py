"""One process at a time: a lock on a file. It is released when its process ends, however that ends."""

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chai_jax.console import console
from chai_jax.files.atomic import named_in_failures, owner, remove_leftovers
from chai_jax.inputs.reading import parse_json, read_text, reason, shown
from chai_jax.stopping import safe_point

LOCK = ".lock"  # its name in the folder of a run: there while the run is under way, and after it was killed
PATIENCE = 1.0  # seconds: somebody may just be looking whether the file is locked


class Busy(Exception):
    """Another process holds the lock; the message says which."""


@contextmanager
def locked(path: Path, wait: str | None = None) -> Iterator[None]:
    """Hold the lock on the file `path`. The file is made, and removed at the end.

    What a killed holder was writing beside the file and below is removed first. On a file system without locks, a
    warning is printed and the block runs without one. Machines that share a file system exclude each other where its
    `flock` works across machines (as on NFS and Lustre).

    Args:
        wait: what the message says it waits for; None: do not wait.

    Raises:
        Busy: another process holds it.
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path, wait)
    try:
        if handle is not None:
            before = _read(path)
            # First removed, then forgotten: whoever is killed in between leaves the name to the next.
            if before is not None:
                remove_leftovers(path.parent, before["owner"])
            about = {"host": socket.gethostname(), "pid": os.getpid(), "owner": owner()}
            with named_in_failures(path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(about).encode(), 0)
        yield
    finally:
        if handle is not None:
            if _is_open_at(handle, path):
                path.unlink()
            os.close(handle)


def holder(path: Path) -> str | None:
    """Which process holds the lock on the file `path`; None where no process does, even if the file is there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(path)
    except OSError:  # no locks on this file system
        return None
    finally:
        os.close(handle)
    return None


def _take(path: Path, wait: str | None) -> int | None:
    """A handle that holds the lock; None where there are no locks."""
    patience, told = time.monotonic() + PATIENCE, False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open_at(handle, path):  # or else its holder removed it when it was done
                return handle
        except BlockingIOError:
            if time.monotonic() > patience:
                if wait is None:
                    os.close(handle)
                    raise Busy(_named(path)) from None
                if not told:
                    console.print(f"waiting for {_named(path)}, {wait}", markup=False, highlight=False)
                    told = True
        except OSError as error:
            os.close(handle)
            console.print(
                f"warning: {shown(path)} cannot be locked ({reason(error)}): let one command at a time use its folder",
                markup=False,
                highlight=False,
            )
            return None
        os.close(handle)
        safe_point()
        time.sleep(0.05)


def _is_open_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, str] | None:
    """What a holder wrote of itself; None if it wrote nothing yet, or that file is something else."""
    try:
        about = parse_json(read_text(path, 4096))
        host, pid, mark = str(about["host"]), int(about["pid"]), str(about["owner"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = host.isprintable() and len(host) < 256 and re.fullmatch("[0-9a-f]{12}", mark)
    return {"host": host, "pid": str(pid), "owner": mark} if known else None


def _named(path: Path) -> str:
    about = _read(path)
    return "another process" if about is None else f"process {about['pid']} on {about['host']}"
