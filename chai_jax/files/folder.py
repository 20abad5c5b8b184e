"""Reading the small files of a model folder: JSON, and the file names that an index gives."""

import json
from pathlib import Path
from typing import Any

from chai_jax.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: the file cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror or error}); expected a JSON file: check the folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); expected a JSON object: restore the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; expected a JSON object: restore the file")
    return value


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
