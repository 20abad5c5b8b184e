"""Reading flax_model.msgpack, as transformers' Flax classes wrote it, with msgpack alone."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from chai_jax.errors import InputError
from chai_jax.files.stored import FLOATS, Stored

ARRAY = 1  # flax.serialization's extension code of an array: packed (shape, dtype name, bytes)
CHUNKED = "__msgpack_chunked_array__"  # how it marks an array of more than 1 GiB, cut into flat pieces
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def torch_name(path: Iterable[str]) -> str:
    """torch's name of a Flax leaf: ("model", ..., "fc1", "kernel") -> "model....fc1.weight"."""
    *parents, leaf = path
    return ".".join([*parents, LEAVES.get(leaf, leaf)])


def read_flax(path: Path) -> dict[str, Stored]:
    """Read a Flax checkpoint; kernels [in, out] come back as torch's [out, in] views.

    The file has no table of contents, so it is read whole: one copy in memory, which goes leaf by leaf as its `Stored`
    values are dropped.

    Raises:
        InputError: not msgpack, truncated, or holding anything but a tree of arrays.
    """
    try:
        with path.open("rb") as file:
            # A tree has no lists, and no dict near 65,536 entries; msgpack makes room for as many as it is told.
            unpacker = msgpack.Unpacker(file, ext_hook=_array, max_buffer_size=0, max_array_len=0, max_map_len=1 << 16)
            tree = unpacker.unpack()
            if unpacker.read_bytes(1):
                raise ValueError("something follows the parameters")
        leaves = list(_leaves(tree, ()))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{path} is not a whole Flax checkpoint ({reason}); expected one as it was saved: fetch it again"
        ) from None
    tensors: dict[str, Stored] = {}
    for parts, array in leaves:
        name = torch_name(parts)
        if name in tensors:
            raise InputError(
                f"{path} holds {name!r:.100} twice, the second as {'/'.join(parts)!r:.100}: fetch it again"
            )
        view = array.T if parts[-1] == "kernel" else array
        tensors[name] = Stored(view.shape, str(view.dtype), path.name, partial(np.asarray, view))
    return tensors


def _array(code: int, data: bytes) -> np.ndarray:
    if code != ARRAY:
        raise ValueError(f"extension {code}")
    shape, dtype, buffer = msgpack.unpackb(data)
    if dtype not in FLOATS:
        raise ValueError(f"an array of {dtype!r}, not of {', '.join(FLOATS)}")
    return np.frombuffer(buffer, jnp.dtype(dtype)).reshape(shape)


def _leaves(tree: Any, parents: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    if isinstance(tree, np.ndarray) and parents:
        yield parents, tree
    elif isinstance(tree, dict) and CHUNKED in tree:
        pieces = [tree["chunks"][str(number)] for number in range(len(tree["chunks"]))]
        shape = [tree["shape"][str(axis)] for axis in range(len(tree["shape"]))]
        yield parents, np.concatenate(pieces).reshape(shape)
    elif isinstance(tree, dict):
        for name, child in tree.items():
            yield from _leaves(child, (*parents, str(name)))
    else:
        raise ValueError(f"{'/'.join(parents)!r:.100} is a {type(tree).__name__}, not an array")
