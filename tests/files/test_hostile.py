"""Folders that ask for far more than their size: each is refused, or read, in little memory.

They are opened in one process of their own, which may allocate 256 MB, so that none can do harm here.
"""

import gzip
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from safetensors.numpy import save_file

from chai_jax.files.unpickle import MOST_OPCODES, MOST_PICKLE_BYTES
from tests.files.pickles import archive, entries, name, number, row, tensor, text

MEGABYTES = 256
SECONDS = 500  # a machine may be slow, but not as slow as any of these were
OPEN = f"""
import json, resource, sys
from pathlib import Path
import jax
from chai_jax.errors import InputError
from chai_jax.files.card import origin
from chai_jax.files.store import load

def opened(folder):
    try:
        load(folder, tokenizer=False)
        return str(origin(folder))
    except InputError as error:
        return str(error)
    except BaseException as error:
        return f"TRACEBACK {{error!r:.200}}"

honest, *hostile = sys.argv[1:]
print(json.dumps([Path(honest).name, opened(honest)]), flush=True)  # and all modules are there
data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, 2 * (data + {MEGABYTES << 20},))
for folder in hostile:
    print(json.dumps([Path(folder).name, opened(folder)]), flush=True)
"""


def tensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """One number, over and over."""
    return entries(*(text(part) + tensor(0, shape, (0,) * len(shape)) for part, shape in shapes.items()))


# A tuple of two of a tuple of two ..., 60 deep: to hash it takes 2^60 steps.
NESTED = b")" + b"q\x00h\x00\x86" * 60
ONE_HASH = [(2**61 - 1) * factor for factor in range(1, 60_000)]
PRE = {
    "model_type": "opt",
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 20,
    "max_position_embeddings": 16,
}
SHAPES = {"hidden_size": 2048, "ffn_dim": 8192, "vocab_size": 50000, "num_hidden_layers": 24, "num_attention_heads": 16}


def shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """All tensors of a pre-norm OPT, without its head."""
    width, ffn = fields["hidden_size"], fields["ffn_dim"]
    maps = {f"self_attn.{one}_proj": (width, width) for one in ("q", "k", "v", "out")}
    maps |= {"fc1": (ffn, width), "fc2": (width, ffn), "self_attn_layer_norm": (width,), "final_layer_norm": (width,)}
    found = {"embed_tokens.weight": (fields["vocab_size"], width), "final_layer_norm.weight": (width,)}
    found |= {
        "embed_positions.weight": (fields["max_position_embeddings"] + 2, width),
        "final_layer_norm.bias": (width,),
    }
    for layer in range(fields["num_hidden_layers"]):
        for part, shape in maps.items():
            found |= {f"layers.{layer}.{part}.weight": shape, f"layers.{layer}.{part}.bias": shape[:1]}
    return {f"model.decoder.{part}": shape for part, shape in found.items()}


def pickled(program: bytes) -> Callable[[Path], None]:
    return lambda path: archive(path, program) and None


def sparse(begin: bytes, size: int) -> Callable[[Path], None]:
    """`begin`, then zeros that take no room on the disk."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(begin)
            file.truncate(size)

    return write


def tar_header(kind: bytes, size: int) -> bytes:
    """A GNU tar's header of a member of `kind`: L is a name of `size` bytes, S a sparse file."""
    header = bytearray(512)
    header[:1], header[100:108], header[156:157], header[257:265] = b"x", b"0000644\0", kind, b"ustar  \0"
    header[124:136] = b"%011o\0" % size
    header[482] = kind == b"S"  # more of its list of holes follows
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def gzipped(path: Path) -> None:
    """2 GB in 2 MB."""
    path.write_bytes(gzip.compress(tar_header(b"L", 2**31 - 1)) + gzip.compress(bytes(2**24)) * 128)


def packed_in_lzma(path: Path) -> None:
    archive(path, entries(), "byteorder", bytes(2**27), zipfile.ZIP_LZMA)


def many_names(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for index in range(100_000):
            file.writestr(zipfile.ZipInfo(f"{index}"), b"")


def many_maps(path: Path) -> None:
    maps = b"\xde\xff\xff" + b"".join(msgpack.packb(f"{index}") + b"\x80" for index in range(2**16 - 1))
    path.write_bytes(b"\x8a" + b"".join(msgpack.packb(f"{index}") + maps for index in range(10)))


def many_lists(path: Path) -> None:
    inside = b"\x93\xdd" + (2**23).to_bytes(4, "big") + b"\x90" * 2**23
    path.write_bytes(b"\x81\xa1a" + msgpack.packb(msgpack.ExtType(1, inside)))


def lists_of_lists(path: Path) -> None:
    inside = b"\x90"
    for _ in range(5):
        inside = b"\xdc\x00\x20" + inside * 32
    path.write_bytes(b"\x81\xa1a" + msgpack.packb(msgpack.ExtType(1, inside)))


OVER = "more than 4,194,304 bytes beside its tensors"
COPIES = b"](" + row(b"N", b"N") * 100_000 + b"eq\x00" + (name("collections", "OrderedDict") + b"h\x00\x85R") * 20_000
BINS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nested tuple as key": (pickled(entries(NESTED, b"N")), "holds a NoneType under a tuple as name; expected tensors"),
    "nested tuple as storage": (pickled(entries(text("w"), NESTED + b"Q")), "a storage without dtype, key or size"),
    "nested tuple as name": (
        pickled(b"\x80\x04" + NESTED + NESTED + b"\x93."),
        "a name that is no text",
    ),
    "keys of one hash": (pickled(entries(*(number(key) + b"N" for key in ONE_HASH))), "under a int as name"),
    "a list copied again and again": (
        pickled(b"\x80\x02" + COPIES + b"."),
        "the weights lack model.decoder.embed_positions.weight",
    ),
    "stride 0": (
        pickled(tensors(shapes({**PRE, **SHAPES}))),
        r"holds tensors of 5,2\d\d,\d{3},\d{3} bytes in a file of \d\d,\d{3}; expected one that holds its own numbers",
    ),
    "stride 0, tied": (
        pickled(tensors({"lm_head.weight": (10**6, 8000), "embed_tokens.weight": (10**6, 8000)})),
        r"holds tensors of 64,000,000,000 bytes in a file of \d{3};",
    ),
    "far too many steps": (
        pickled(b"\x80\x02" + b"N" * (MOST_OPCODES + 1) + b"."),
        "a pickle of more than 1,048,576 steps",
    ),
    "far too long": (pickled(b"\x80\x02X" + (2**23).to_bytes(4, "little") + bytes(2**23)), OVER),
    "stream, far too long": (sparse(b"\x80\x02\x8d" + (2**31).to_bytes(8, "little"), 2**32), OVER),
    "stream, an endless line": (sparse(b"\x80\x02V", 2**32), OVER),
    "many names": (many_names, OVER),
    "lzma": (packed_in_lzma, "'archive/byteorder' is compressed"),
    "tar, long name": (sparse(tar_header(b"L", 2**31), 2**32), r"in the tar layout of torch 0\.1"),
    "tar, sparse": (sparse(tar_header(b"S", 0), 2**30), r"in the tar layout of torch 0\.1"),
    "gz": (gzipped, r"opcode b'\\x1f' unknown"),
    "zeros": (sparse(b"", 2**32), r"opcode b'\\x00' unknown"),
    "zeros behind a zip": (sparse(b"PK\x03\x04", 2**32), "File is not a zip file"),
}
FLAX: dict[str, tuple[Callable[[Path], None], str]] = {
    "many maps": (many_maps, "more than 262,144 entries"),
    "many lists": (many_lists, "exceeds max_array_len"),
    "lists of lists": (lists_of_lists, "lists in an array"),
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


CARDS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "honest": ("README.md", lambda path: None, "unknown"),
    "card, fifo": ("README.md", fifo, "unknown"),
    "card, /dev/zero": ("README.md", device, "unknown"),
    "card, 4 GB": ("README.md", sparse(b"---\n", 2**32), "unknown"),
    "card, blanks": (
        "README.md",
        lambda path: path.write_text("---\nlicense: a" + " " * 10**6 + "b\n---\n") and None,
        "a {1000000}b",
    ),
    "licence, fifo": ("LICENSE", fifo, r"unknown.*files=\(\)"),
    "licence, /dev/zero": ("LICENSE", device, r"unknown.*files=\(\)"),
    "licence, 4 GB": ("LICENSE", sparse(b"", 2**32), r"unknown.*files=\(\)"),
    "index, fifo": ("model.safetensors.index.json", fifo, "unknown"),
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "config of many heads": ({"num_attention_heads": 2**24, "hidden_size": 2**24}, "expected 1 to 4096"),
    "config of much": ({"vocab_size": 2**24, "hidden_size": 2**24}, "no multiple of its 3"),
}
EXPECTED = {
    **{case: message for case, (_, message) in {**BINS, **FLAX, **CONFIGS}.items()},
    **{case: message for case, (_, _, message) in CARDS.items()},
}


def write_folders(root: Path) -> Iterator[Path]:
    """The honest one first."""

    def folder(case: str, **fields: Any) -> Path:
        path = root / case.replace("/", " ")
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**PRE, **fields}))
        return path

    for case, (file, write, _) in CARDS.items():
        path = folder(case)
        save_file({part: np.ones(shape, np.float32) for part, shape in shapes(PRE).items()}, path / "model.safetensors")
        write(path / file)
        yield path
    for case, (write, _) in BINS.items():
        path = folder(case, **(SHAPES if case == "stride 0" else {}))
        write(path / "pytorch_model.bin")
        yield path
    for case, (write, _) in FLAX.items():
        path = folder(case)
        write(path / "flax_model.msgpack")
        yield path
    for case, (fields, _) in CONFIGS.items():
        yield folder(case, **fields)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What comes of opening each folder, as far as they were opened."""
    folders = list(map(str, write_folders(tmp_path_factory.mktemp("hostile"))))
    # One device and one arena: threads that begin later would count as memory.
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "MALLOC_ARENA_MAX": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", OPEN, *folders], env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        lines = done.stdout
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode()
    return dict(map(json.loads, lines.splitlines()))


@pytest.mark.parametrize("case", EXPECTED)
def test_little_is_read(answers: dict[str, str], case: str) -> None:
    message = answers.get(case.replace("/", " "), "the folder before it, or this one, took too long")
    assert re.search(EXPECTED[case], message), message[:500]
    assert "\n" not in message
    assert case.startswith("card") or len(message) < 1000


def test_bounds_are_far_from_what_models_need() -> None:
    """OPT-175B in one file: 96 layers of 16 tensors, some 50 opcodes and 300 bytes each."""
    assert MOST_OPCODES > 96 * 16 * 50 * 8
    assert MOST_PICKLE_BYTES > 96 * 16 * 300 * 8
