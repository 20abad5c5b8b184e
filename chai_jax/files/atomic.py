"""Nothing is ever half written: a temporary sibling first, then one rename."""

import errno
import json
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


def owner() -> str:
    """The mark of this process in the names of its temporary files; a fork has its own."""
    return _mark(os.getpid())


@cache
def _mark(process: int) -> str:
    return uuid.uuid4().hex[:12]


def _temporary(path: Path) -> dict[str, Any]:
    """How a temporary sibling of `path` is named; not much longer than `path` itself."""
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
    """What the system refuses while `path` is written becomes an OSError that names it."""
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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects that `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def claim_folder(path: Path) -> Path:
    """Check, before any work, that `path` can become a new output folder: absent or empty, its parent writable.

    Raises:
        InputError: `path` is a file, holds something, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise _taken(path)
    check_writable(path)
    return path


def _taken(path: Path) -> InputError:
    return InputError(f"{path} already holds something; expected a new or empty folder: choose another --out")


def check_writable(path: Path, option: str = "--out") -> None:
    """Raise InputError, which names `option`, unless a file can be made in `path` or its nearest parent that exists."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot write to {folder} ({reason}); expected a writable folder: choose another {option}"
        ) from None
