"""What stands in front of the numbers in a GGUF file (ggml's docs/gguf.md): metadata by key, and where each tensor is.

The package gguf has a reader, which we do not use: it believes every count that a file states, so that a few bytes keep
it busy for ever, and it makes several objects of every word (4 seconds for 49,152 of them, against 0.2 here).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.errors import InputError
from chai_jax.inputs.reading import SMALL, open_regular, reason, shown

MAGIC, VERSIONS, SPLIT = b"GGUF", (2, 3), "split.count"
STRING, ARRAY = 8, 9
NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
MOST_AXES = 4  # as in ggml


@dataclass(frozen=True)
class Location:
    """Where a tensor is.

    Attributes:
        shape: as numpy's and torch's, the rows first (the file has it the other way round).
        kind: ggml's number of its format.
        start: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """A GGUF file without its numbers.

    Attributes:
        metadata: numbers, strings, lists of strings, arrays of numbers.
        tensors: by llama.cpp's names.
        data: all bytes of the file, mapped and not read.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Location]
    data: np.ndarray


def read_header(path: Path) -> Header:
    """Read all but the numbers; at most `SMALL` bytes of a file are looked at, and each once.

    Raises:
        InputError: it is no GGUF file, one of another version or of one piece of a model, or one that is cut short or
            at odds with itself.
    """
    try:
        with open_regular(path) as file:
            data = np.asarray(np.memmap(file, np.uint8, "r"))
    except (OSError, ValueError) as error:  # a ValueError for a file without a byte
        raise InputError(f"cannot read {shown(path)} ({reason(error)}); expected a GGUF file: check the path") from None
    cursor = _Cursor(path, data)
    magic = cursor.take(4)
    if magic != MAGIC:
        raise InputError(f"{shown(path)} begins with {magic!r}; expected a GGUF file, which begins with {MAGIC!r}")
    version = cursor.number("u4")
    if version not in VERSIONS:
        raise InputError(f"{shown(path)} is GGUF of version {version}; expected {VERSIONS}, little-endian: convert it")
    tensors, pairs = cursor.number("u8"), cursor.number("u8")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text("a key")
        if key in metadata:
            raise cursor.refused(f"has {key!r:.80} twice in its metadata")
        metadata[key] = cursor.value(key)
    if metadata.get(SPLIT, 1) not in (0, 1):
        raise InputError(
            f"{shown(path)} is one of {metadata[SPLIT]!s:.20} files of a model; expected it whole: put them together "
            "with llama-gguf-split --merge"
        )
    found = dict(cursor.location() for _ in range(tensors))
    if len(found) < tensors:
        raise cursor.refused("has two tensors of one name")
    step = metadata.get("general.alignment", 32)
    if type(step) is not int or step < 1 or step & (step - 1):
        raise cursor.refused(f"has general.alignment {step!r:.80}")
    begin = -(-cursor.at // step) * step
    places = {name: Location(each.shape, each.kind, begin + each.start) for name, each in found.items()}
    return Header(path, metadata, places, data)


class _Cursor:
    """Reads one thing after the other; never beyond the file, nor more of it than metadata may be."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.at, self.data = path, 0, memoryview(data.data)

    def refused(self, what: str) -> InputError:
        return InputError(f"{shown(self.path)} {what}; expected a whole GGUF file: fetch it again")

    def check(self, count: int) -> None:
        """Raise InputError unless so many bytes follow, and may be read."""
        end = self.at + count
        if end > len(self.data):
            raise self.refused(f"is cut short, or no such file: {count:,} bytes at {self.at:,} of {len(self.data):,}")
        if end > SMALL:
            raise self.refused(f"has more than {SMALL:,} bytes of metadata")

    def take(self, count: int) -> bytes:
        self.check(count)
        begin, self.at = self.at, self.at + count
        return bytes(self.data[begin : self.at])

    def number(self, kind: str) -> Any:
        return np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0].item()

    def text(self, what: str) -> str:
        try:
            return self.take(int.from_bytes(self.take(8), "little")).decode()
        except UnicodeDecodeError:
            raise self.refused(f"holds {what} that is not UTF-8") from None

    def value(self, key: str) -> Any:
        """A value behind its type."""
        kind = self.number("u4")
        if kind == STRING:
            return self.text(f"{key!r:.80}")
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise self.refused(f"has {key!r:.80} of type {kind}, which there is not")
        kind, count = self.number("u4"), self.number("u8")
        if kind == STRING:
            self.check(count * 8)  # the lengths alone
            return [self.text(f"{key!r:.80}") for _ in range(count)]
        if kind not in NUMBERS:
            raise self.refused(f"has an array {key!r:.80} of type {kind}, which is not read")
        return np.frombuffer(self.take(count * np.dtype(NUMBERS[kind]).itemsize), NUMBERS[kind])

    def location(self) -> tuple[str, Location]:
        """A tensor's name and place; its start is counted from where the numbers begin."""
        name, axes = self.text("a tensor's name"), self.number("u4")
        if axes > MOST_AXES:
            raise self.refused(f"has a tensor {name!r:.80} of {axes} axes")
        shape = tuple(self.number("u8") for _ in range(axes))[::-1]
        kind, start = self.number("u4"), self.number("u8")
        return name, Location(shape, kind, start)
