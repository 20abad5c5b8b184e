"""Nothing is ever half written: a temporary sibling first, then one rename."""

import errno
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from chai_jax.errors import InputError
from chai_jax.inputs.paths import user_path
from chai_jax.inputs.reading import reason, shown


def owner() -> str:
    """The mark of this process in the names of its temporary files; a fork has its own."""
    return _mark(os.getpid())


@cache
def _mark(process: int) -> str:
    return uuid.uuid4().hex[:12]


def _temporary(path: Path) -> dict[str, Any]:
    """How a temporary sibling of `path` is named: not much longer than `path` itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return {"prefix": f".{path.name[:40]}.{owner()}.", "dir": path.parent}


def remove_leftovers(folder: Path, mark: str) -> None:
    """Remove, at any depth of `folder`, what a process that was killed was writing; `mark` was its `owner()`."""
    for found in list(folder.rglob(f".*.{mark}.*")):
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


@contextmanager
def named_in_failures(path: Path) -> Iterator[None]:
    """An error of the system while `path` is written becomes an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)$", str(error))  # as libraries written in Rust say it
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed onto `path` if the block ends well, removed if it does not."""
    handle, name = tempfile.mkstemp(**_temporary(path))
    os.close(handle)
    temporary = Path(name)
    try:
        with named_in_failures(path):
            yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; renamed to `path`, which must not hold anything, if the block ends well.

    Raises:
        InputError: `path` holds something by then.
    """
    temporary = Path(tempfile.mkdtemp(**_temporary(path)))
    try:
        with named_in_failures(path):
            yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename2 != str(path) or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise _taken(path) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8; a name that is not, as in JSON, by the escape that stands for it."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line to `path`, atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: infinities and NaN become null."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects that `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def claim_folder(path: Path) -> Path:
    """Check, before any work, that `path` can become a new output folder: absent or empty, its parent writable.

    Returns:
        Where to put it: `path`, or the empty folder that it is a link to.

    Raises:
        InputError: `path` is a file, holds something, or cannot be written.
    """
    target = _target(user_path(path))
    if target.exists() and not _is_empty(target):
        raise _taken(path)
    if target.resolve() == Path.cwd():
        raise InputError(f"{shown(path)} is the folder you are in; expected a new or empty one: choose another --out")
    _check_writable(target.parent, target.name)
    return target


def claim_file(path: Path) -> Path:
    """Check, before any work, that a file can be written to `path`, where there may be one already.

    Returns:
        Where to write it: `path`, or the file that it is a link to.

    Raises:
        InputError: `path` is a folder or a device, or cannot be written.
    """
    target = _target(user_path(path))
    if target.is_dir():
        raise InputError(f"{shown(path)} is a folder; expected a file: add its name to --out")
    if target.exists() and not target.is_file():
        raise InputError(f"{shown(path)} is no regular file; expected one, or a new one: choose another --out")
    _check_writable(target.parent, target.name)
    return target


def _target(path: Path) -> Path:
    """`path`, or what it is a link to: a rename onto a link would not follow it."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{shown(path)} is a link to nothing; expected a new name: choose another --out")
    return path.resolve() if path.is_symlink() else path


def _is_empty(path: Path) -> bool:
    """Whether `path` is a folder with nothing in it; false where it may not be looked into."""
    try:
        return not any(path.iterdir())
    except OSError:
        return False


def _taken(path: Path) -> InputError:
    return InputError(f"{shown(path)} already holds something; expected a new or empty folder: choose another --out")


def check_writable(path: Path, option: str = "--out") -> None:
    """Raise InputError, which names `option`, unless a file can be made in `path` or its nearest parent that exists."""
    _check_writable(path, "", option)


def _check_writable(folder: Path, name: str, option: str = "--out") -> None:
    """Likewise, where a file or folder `name` will be made in `folder` by way of a temporary sibling."""
    longest = name
    while not os.path.lexists(folder):  # a link to nothing is something, in which nothing can be made
        longest = max(longest, folder.name, key=lambda part: len(os.fsencode(part)))
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{longest}.", dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {shown(folder)} ({reason(error)}); expected a writable folder: choose another {option}"
        ) from None
