"""Rows that take long: each is kept in a file when it is done, and read back by the next call."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from chai_jax.files.atomic import write_json
from lab.options import Record


def kept(folder: Path, what: Record, make: Callable[[], Record]) -> Record:
    """The row that `make` makes, or what an earlier call has kept of it.

    Args:
        what: all that the row depends on, of which its file's name is made.
    """
    code = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / "rows" / f"{code}.json"
    if not file.exists():
        write_json(file, {"what": what, "row": make()})
    row: Record = json.loads(file.read_text(encoding="utf-8"))["row"]
    return row
