"""The tensors of a GGUF file, which its blocks of few bits are unpacked to when one is read."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np

from chai_jax.errors import InputError
from chai_jax.files.gguf.header import Header
from chai_jax.files.stored import Stored
from chai_jax.inputs.reading import shown

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
AT_ONCE = 1 << 22  # numbers that are unpacked at a time: the package needs several arrays of as many


def package(path: Path) -> ModuleType:
    """The package gguf, which unpacks blocks; raises InputError where it is missing."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise InputError(
            f"{shown(path)} is read by the package gguf, which is not there (no module {error.name}): pip install "
            "'chai_jax[gguf]'"
        ) from None
    return gguf


def open_tensors(header: Header) -> dict[str, Stored]:
    """All tensors by llama.cpp's names. Blocks of few bits become float32, as the package gives them.

    Raises:
        InputError: a tensor of another format, or one that is not in the file whole and by itself.
    """
    gguf, where = package(header.path), shown(header.path)
    kinds = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    tensors, ends = {}, dict[int, tuple[int, str]]()
    for name, place in header.tensors.items():
        kind = kinds.get(place.kind)
        if kind is None or kind.name not in (*PLAIN, *BLOCKS):
            raise InputError(
                f"{name!r:.100} in {where} has the format {place.kind if kind is None else kind.name}; expected one of "
                f"{', '.join((*PLAIN, *BLOCKS))}: quantize the model anew"
            )
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        if not place.shape or place.shape[-1] % numbers:
            raise InputError(
                f"{name!r:.100} in {where} is {list(place.shape)!s:.100} in blocks of {numbers}; expected rows of "
                "whole blocks: fetch the model again"
            )
        end = place.start + math.prod(place.shape) // numbers * size
        if end > len(header.data) or place.start in ends:
            raise InputError(
                f"{name!r:.100} {list(place.shape)!s:.100} is not in the {len(header.data):,} bytes of {where} by "
                "itself; expected a whole GGUF file: fetch it again"
            )
        ends[place.start] = end, name
        raw = header.data[place.start : end]
        dtype = PLAIN.get(kind.name, "float32")
        read = partial(_plain, raw, place.shape, dtype)
        if kind.name in BLOCKS:
            read = partial(_unpacked, raw, place.shape, partial(gguf.dequantize, qtype=kind))
        tensors[name] = Stored(place.shape, dtype, header.path.name, read)
    _check_apart(where, ends)
    return tensors


def _check_apart(where: str, ends: dict[int, tuple[int, str]]) -> None:
    """Tensors on top of one another would take far more memory than the file has bytes."""
    before, other = 0, ""
    for start in sorted(ends):
        if start < before:
            raise InputError(
                f"{ends[start][1]!r:.100} lies on {other!r:.100} in {where}; expected one after the other: do not use "
                "this model"
            )
        before, other = ends[start]


def _plain(raw: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return raw.view(jnp.dtype(dtype)).reshape(shape)


def _unpacked(raw: np.ndarray, shape: tuple[int, ...], unpack: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    found = np.empty(shape, np.float32)
    if not found.size:
        return found
    rows = found.reshape(-1, shape[-1])
    blocks, step = raw.reshape(len(rows), -1), max(1, AT_ONCE // shape[-1])
    with np.errstate(all="ignore"):  # what is not finite is refused when it is read
        for at in range(0, len(rows), step):
            rows[at : at + step] = unpack(blocks[at : at + step])
    return found
