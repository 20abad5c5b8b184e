"""What takes long to measure: each piece is kept in a file when it is done, and read back by the next call."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from chai_jax.files.atomic import write_json
from lab.options import Record

Kept = TypeVar("Kept")  # what JSON can hold


def kept(folder: Path, what: Record, make: Callable[[], Kept]) -> Kept:
    """What `make` makes, or an earlier call has kept of it.

    Args:
        what: all that it depends on, of which its file's name is made.
    """
    code = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / "rows" / f"{code}.json"
    if not file.exists():
        write_json(file, {"what": what, "made": make()})
    found: Kept = json.loads(file.read_text(encoding="utf-8"))["made"]
    return found
