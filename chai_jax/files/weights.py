"""Weight files as lazily read tensors: find them in a folder, whatever their format, and write safetensors.

A reader opens one file and returns its tensors by name with shape and dtype, so that everything can be checked before
any weight is read, and weights are then read one at a time. All readers give torch's names and layouts.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.files.atomic import write_json
from chai_jax.files.flax_msgpack import read_flax
from chai_jax.files.folder import beside
from chai_jax.files.stored import Stored, same_numbers
from chai_jax.files.torch_pickle import read_torch
from chai_jax.inputs.reading import read_json, reason, shown

MAX_SHARD_BYTES = 5_000_000_000
SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
}


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Open a safetensors file; the library checks that the header, the offsets and the file's size agree."""
    try:
        file = safe_open(path, framework="np")
        names = {code: name for name, code in SAFETENSORS_DTYPES.items()}
        tensors = {}
        for name in file.keys():  # noqa: SIM118 (no mapping)
            part = file.get_slice(name)
            code = part.get_dtype()
            tensors[name] = Stored(tuple(part.get_shape()), names.get(code, code), path.name, _reader(file, name))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{shown(path)} is not a whole safetensors file ({reason(error):.200}); expected one as it was saved: "
            "fetch it again"
        ) from None
    return tensors


def _reader(file: safe_open, name: str) -> Callable[[], np.ndarray]:
    return lambda: file.get_tensor(name)


@dataclass(frozen=True)
class Format:
    """One way weights come: the name of a whole file, and how to open it."""

    file: str
    read: Callable[[Path], dict[str, Stored]]


FORMATS = (  # in order of preference
    Format("model.safetensors", read_safetensors),
    Format("flax_model.msgpack", read_flax),
    Format("pytorch_model.bin", read_torch),
)


def open_weights(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder, from one file or from shards, in the first of `FORMATS` that is there.

    Raises:
        InputError: no weights; a file that is missing, cut or tampered with; shards at odds with one another.
    """
    for kind in FORMATS:
        if (folder / kind.file).is_file():
            return kind.read(folder / kind.file)
        index = folder / f"{kind.file}.index.json"
        if index.is_file():
            return _open_shards(index, kind)
    names = ", ".join(kind.file for kind in FORMATS)
    raise InputError(f"{shown(folder)} holds no weights; expected one of {names}, or its .index.json: check the folder")


def _open_shards(index: Path, kind: Format) -> dict[str, Stored]:
    """The tensors of all files that an index names. The files themselves say what is in them, as in transformers."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{shown(index)} has no weight_map; expected tensor names with their files: fetch it again")
    paths: dict[str, Path] = {}
    for file in files.values():
        if not isinstance(file, str) or file not in paths:
            paths[file] = beside(index, file)
    tensors: dict[str, Stored] = {}
    for path in paths.values():
        for name, stored in kind.read(path).items():
            first = tensors.setdefault(name, stored)
            if first is not stored and not same_numbers(first, stored):
                raise InputError(
                    f"{name!r:.100} is in {first.file} and, with other numbers, in {stored.file}; expected it once: "
                    "fetch the model again"
                )
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, reading one at a time (the safetensors library would want all of them in memory at once).

    The format: the header's length as little-endian uint64, the header as JSON padded to 8 bytes, the tensors without
    gaps; wide dtypes first, so that all are aligned.
    """
    order = sorted(tensors, key=lambda name: (-jnp.dtype(tensors[name].dtype).itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        code = SAFETENSORS_DTYPES[tensors[name].dtype]
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in track(order, f"writing {path.name}"):
            file.write(tensors[name].read().tobytes())


def write_weights(
    folder: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write model.safetensors, or shards with an index where that file would pass `max_shard_bytes`."""
    shards = list(_split(tensors, max_shard_bytes))
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors, metadata)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names}, metadata)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(stored.nbytes for stored in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(tensors: Mapping[str, Stored], most: int) -> Iterator[list[str]]:
    """Names in shards of at most `most` bytes, a larger tensor alone."""
    shard: list[str] = []
    size = 0
    for name, stored in tensors.items():
        if shard and size + stored.nbytes > most:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += stored.nbytes
    yield shard
