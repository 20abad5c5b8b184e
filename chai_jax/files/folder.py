"""The file names that an index gives."""

from pathlib import Path
from typing import Any

from chai_jax.errors import InputError
from chai_jax.inputs.reading import shown

MOST_NAME_BYTES = 255  # of a file's name: as many as file systems take


def beside(index: Path, name: Any) -> Path:
    """The file `name` in the folder of `index`; an index may name files of its own folder only.

    Raises:
        InputError: `name` is no plain file name (so it might lead out of the folder), or there is no such file.
    """
    plain = isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name) and name not in ("", ".", "..")
    if not plain or len(name.encode()) > MOST_NAME_BYTES:
        raise InputError(
            f"{shown(index)} names the file {name!r:.100}; expected a plain file name in the same folder: do not use "
            "this model"
        )
    path = index.parent / name
    if not path.is_file():
        raise InputError(
            f"{shown(index)} names {name:.100}, which is not there; expected every shard beside it: fetch it again"
        )
    return path
