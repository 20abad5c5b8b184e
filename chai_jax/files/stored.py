"""A tensor of a weight file, known by shape and dtype before it is read."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from chai_jax.errors import InputError

FLOATS = ("float32", "float16", "bfloat16")  # what weights may be here
READ_FLOATS = (*FLOATS, "float64")  # what they may be in a file
READABLE = (*READ_FLOATS, "int8", "uint8")
MOST_AXES = 32  # of a tensor in a file: more have no meaning


@dataclass(frozen=True)
class Stored:
    """What a weight file says of a tensor. `read` gives the numbers, perhaps as a view of the file: copy them to keep.

    Attributes:
        dtype: numpy's name, or the file's own name of a dtype that no model uses.
        file: name of the file it is in, for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def check_floats(name: str, stored: Stored) -> None:
    """Raise InputError unless a tensor's dtype is one of `READ_FLOATS`."""
    if stored.dtype not in READ_FLOATS:
        raise InputError(
            f"{name} in {stored.file} is {stored.dtype}; expected one of {', '.join(READ_FLOATS)}: convert it"
        )


def same_numbers(one: Stored, other: Stored) -> bool:
    """Whether two tensors can be read and have one shape and, whatever their dtypes, the same numbers."""
    readable = one.dtype in READABLE and other.dtype in READABLE
    return readable and one.shape == other.shape and np.array_equal(one.read(), other.read())
