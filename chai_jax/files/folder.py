"""The file names that an index gives."""

from pathlib import Path
from typing import Any

from chai_jax.errors import InputError


def beside(index: Path, name: Any) -> Path:
    """The file `name` in the folder of `index`; an index may name files of its own folder only.

    Raises:
        InputError: `name` is no plain file name (so it might lead out of the folder), or there is no such file.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(
            f"{index} names the file {name!r}; expected a plain file name in the same folder: do not use this model"
        )
    path = index.parent / name
    if not path.is_file():
        raise InputError(
            f"{index} names {name}, which is not there; expected every shard in {index.parent}: fetch it again"
        )
    return path
