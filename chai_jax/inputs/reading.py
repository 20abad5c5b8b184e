"""Reading text and JSON that people give: regular files alone, up to a stated size, as UTF-8; each refusal one line."""

import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from chai_jax.errors import InputError

Record = dict[str, Any]  # a JSON object

SMALL = 64 * 2**20  # bytes of a JSON file or a model card, at most
LARGE = 16 * 2**30  # bytes of a text or of a task's rows, unpacked, at most
UTF8 = "utf-8-sig"  # with or without a byte order mark, which some editors put in front


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file (or a link to one) to read its bytes; never waits, as opening a named pipe would.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("not a regular file")
    return os.fdopen(handle, "rb")


@contextmanager
def open_utf8(path: Path, most: int = LARGE) -> Iterator[TextIO]:
    """A UTF-8 file, gzipped if its name ends in .gz; what goes wrong while it is read becomes an InputError.

    Args:
        most: bytes that may be read, after unpacking.
    """
    try:
        with open_regular(path) as file:
            plain = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            with io.TextIOWrapper(io.BufferedReader(_Bounded(plain, most)), encoding=UTF8) as text:
                yield text
    # A damaged gzip file raises any of the four, depending on where it is damaged; a path with a NUL a ValueError.
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {shown(path)} ({reason(error)}); expected UTF-8 text, gzipped if it ends in .gz"
        ) from None


class _Bounded(io.RawIOBase):
    """The bytes of `file`, which fails once more than `most` were read."""

    def __init__(self, file: Any, most: int):
        self._file, self._left = file, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise OSError("more bytes than are read of such a file")
        buffer[: len(data)] = data
        return len(data)


def read_bytes(path: str | Path, most: int = SMALL) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: the file cannot be read, is no regular file, or holds more than `most` bytes.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"more than {most:,} bytes")
    return data


def read_text(path: str | Path, most: int = SMALL) -> str:
    """The text of a regular UTF-8 file, without a byte order mark.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, most).decode(UTF8)


def parse_json(text: str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds a number of more than 4,300 digits; one line.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError("a number of thousands of digits") from None


def read_json(path: str | Path, expected: str = "a JSON object") -> Record:
    """The JSON object in `path`.

    Args:
        expected: what the file should have been, for the message.

    Raises:
        InputError: the file cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        value = parse_json(read_text(path))
    except OSError as error:
        raise InputError(f"cannot read {shown(path)} ({reason(error)}); expected {expected}: check the path") from None
    except ValueError as error:
        raise InputError(f"{shown(path)} is not JSON ({error}); expected {expected}: restore the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)} holds a {type(value).__name__}; expected {expected}: restore the file")
    return value


def reason(error: BaseException) -> str:
    """Why it failed, in one line without the path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


def shown(path: str | Path) -> str:
    """A path as a message names it: as it is, or escaped where it holds line breaks and the like, and not too long."""
    text = str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 300 else f"{text[:297]}..."
