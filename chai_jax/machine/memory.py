"""What a compiled program takes, and what memory is free."""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import jax

from chai_jax.errors import InputError

CGROUP = Path("/sys/fs/cgroup")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def program_bytes(program: Any) -> int:
    """Bytes of all that a compiled program holds while it runs, by XLA's account."""
    memory = program.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return int(peak - memory.alias_size_in_bytes)


def free_bytes() -> int | None:
    """Memory of the first device that nothing takes; None where nobody says.

    A CPU's is that of the machine, or of the container if that allows less.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    found = [free for free in (_available(), _allowed()) if free is not None]
    return min(found) if found else None


def give_back_freed() -> None:
    """Return what was freed on the host to the system, in some hundredths of a second.

    glibc keeps it, for what is asked for next; arrays that grow find no place there. Other allocators are left alone.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`, or None."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; the last of Windows
        return None


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _allowed() -> int | None:
    """What the container may take still."""
    try:
        limit, used = ((CGROUP / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        return max(int(limit) - int(used), 0)
    except (OSError, ValueError):  # no container, or one without a limit
        return None


def parse_bytes(option: str, text: str) -> int:
    """Bytes of a size such as 4GiB, 500MB or 1e9.

    Raises:
        InputError: it is none, or not positive.
    """
    word = text.strip().upper().removesuffix("B")
    number = word.rstrip("KMGTI")
    try:
        size = float(number) * UNITS[word[len(number) :]]
        if 1 <= size < 1 << 60:
            return int(size)
    except (ValueError, KeyError, OverflowError):
        pass
    raise InputError(f"{option} is {text!r:.80}; expected a size, such as 4GiB or 500MB")
