"""What this process holds."""

import os
import resource
import sys
from pathlib import Path


def resident() -> int | None:
    """Bytes in memory now; None where the system does not say (other than Linux)."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else None


def peak() -> int:
    """The most bytes that were in memory at once."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"
