"""Pickles opcode by opcode, as torch or an attacker would write them: each is a program for a stack machine."""

import zipfile
from pathlib import Path

import numpy as np

FLOATS = np.arange(8, dtype=np.float32)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values: tuple[int, ...]) -> bytes:
    return row(*map(number, values))


def entries(*pairs: bytes) -> bytes:
    """A dict's keys and values, and the end of the program."""
    return b"\x80\x02}(" + b"".join(pairs) + b"u."


def storage(numel: int = 8, key: str = "0", kind: bytes = name("torch", "FloatStorage")) -> bytes:
    return row(text("storage"), kind, text(key), text("cpu"), number(numel)) + b"Q"


def tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], stored: bytes | None = None) -> bytes:
    hooks = name("collections", "OrderedDict") + b")R"
    view = row(stored or storage(), number(offset), numbers(shape), numbers(strides), b"\x89", hooks)
    return name("torch._utils", "_rebuild_tensor_v2") + view + b"R"


def state(value: bytes) -> bytes:
    return entries(text("w"), value)


def archive(
    path: Path, program: bytes, packed: str = "", order: bytes = b"little", how: int = zipfile.ZIP_DEFLATED
) -> Path:
    """A zip archive with one storage; the member `packed` is compressed."""
    with zipfile.ZipFile(path, "w") as file:
        for member, data in {"data.pkl": program, "byteorder": order, "data/0": FLOATS.tobytes()}.items():
            file.writestr(f"archive/{member}", data, how if member == packed else zipfile.ZIP_STORED)
    return path
