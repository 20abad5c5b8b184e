"""A tensor of a weight file, known by shape and dtype before it is read."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Stored:
    """What a weight file says of a tensor. `read` gives it as numpy, perhaps as a view of the file: copy to keep.

    Attributes:
        dtype: numpy's name; the file's own name where that dtype is of no use to a model.
        file: name of the file it is in, for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
