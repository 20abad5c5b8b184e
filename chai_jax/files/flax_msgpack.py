"""Reading flax_model.msgpack, as transformers' Flax classes wrote it, with msgpack alone."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from chai_jax.errors import InputError
from chai_jax.files.stored import MOST_AXES, READ_FLOATS, Stored
from chai_jax.inputs.reading import open_regular, reason, shown

ARRAY = 1  # flax.serialization's extension code of an array: packed (shape, dtype name, bytes)
CHUNKED = "__msgpack_chunked_array__"  # how it marks an array of more than 1 GiB, cut into flat pieces
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
MOST_ENTRIES = 1 << 18  # of all dicts of a tree; an OPT has some thirty a layer


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
        with open_regular(path) as file:
            # A tree has no lists; msgpack makes room for as many entries as it is told.
            most = {"max_buffer_size": 0, "max_array_len": 0, "max_map_len": 1 << 16}
            unpacker = msgpack.Unpacker(file, ext_hook=_array, object_pairs_hook=_Branches().read, **most)
            tree = unpacker.unpack()
            if unpacker.read_bytes(1):
                raise ValueError("something follows the parameters")
        leaves = list(_leaves(tree, ()))
    # A hostile or cut file can raise nearly anything.
    except Exception as error:
        raise InputError(
            f"{shown(path)} is not a whole Flax checkpoint ({reason(error):.200}); expected one as it was saved: fetch "
            "it again"
        ) from None
    tensors: dict[str, Stored] = {}
    for parts, array in leaves:
        name = torch_name(parts)
        if name in tensors:
            raise InputError(
                f"{shown(path)} holds {name!r:.100} twice, the second as {'/'.join(parts)!r:.100}: fetch it again"
            )
        view = array.T if parts[-1] == "kernel" else array
        tensors[name] = Stored(view.shape, str(view.dtype), path.name, partial(np.asarray, view))
    return tensors


def _array(code: int, data: bytes) -> np.ndarray:
    if code != ARRAY:
        raise ValueError(f"extension {code}")
    shape, dtype, buffer = msgpack.unpackb(data, list_hook=_list, max_array_len=MOST_AXES, max_map_len=0)
    if dtype not in READ_FLOATS:
        raise ValueError(f"an array of {dtype!r:.80}, not of {', '.join(READ_FLOATS)}")
    return _shaped(np.frombuffer(buffer, jnp.dtype(dtype)), shape)


def _list(items: list[Any]) -> list[Any]:
    """Lists of lists of lists would be many times what they take in the file."""
    if any(isinstance(item, list) for item in items[1:]):
        raise ValueError("lists in an array")
    return items


def _shaped(flat: np.ndarray, shape: Any) -> np.ndarray:
    """The array, which must have as many numbers as the shape says: numpy would fill in a size of -1."""
    counts = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not counts or math.prod(shape) != flat.size:
        raise ValueError(f"{flat.size} numbers for the shape {shape!r:.80}")
    return flat.reshape(shape)


class _Branches:
    """Makes the dicts of a tree, a bounded number of entries in all, and joins what is marked as an array in pieces."""

    def __init__(self) -> None:
        self._entries = 0

    def read(self, pairs: list[tuple[Any, Any]]) -> dict[str, Any] | np.ndarray:
        self._entries += len(pairs)
        if self._entries > MOST_ENTRIES:
            raise ValueError(f"more than {MOST_ENTRIES:,} entries")
        tree = dict(pairs)
        return _joined(tree) if CHUNKED in tree else tree


def _joined(tree: dict[str, Any]) -> np.ndarray:
    shape, pieces = _in_order(tree["shape"]), _in_order(tree["chunks"])
    if not all(
        isinstance(piece, np.ndarray) and piece.ndim == 1 and piece.dtype == pieces[0].dtype for piece in pieces
    ):
        raise ValueError("pieces of an array that are no flat arrays of one kind")
    return _shaped(np.concatenate(pieces), shape)


def _in_order(numbered: Any) -> list[Any]:
    """A list as flax writes it, {"0": first, "1": second, ...}."""
    if not isinstance(numbered, dict):
        raise ValueError("an array in pieces without shape or pieces")
    return [numbered[str(number)] for number in range(len(numbered))]


def _leaves(tree: Any, parents: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    if isinstance(tree, np.ndarray) and parents:
        yield parents, tree
    elif isinstance(tree, dict):
        for name, child in tree.items():
            yield from _leaves(child, (*parents, str(name)))
    else:
        raise ValueError(f"{'/'.join(parents)!r:.100} is a {type(tree).__name__}, not an array")
