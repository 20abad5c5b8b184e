"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys are turned by angles that grow with position.

A head of R dimensions is R / 2 complex numbers, the real parts first (transformers' `rotate_half`). At position t the
number of frequency w is multiplied by exp(i w t), so a score depends on the distance of query and key alone. Where only
a fraction of the dimensions turn, the others are numbers of frequency 0.
"""

import math
from functools import cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from chai_jax.plans.architecture import Rotary

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


@cache
def turns(rotary: Rotary, head_dim: int) -> tuple[Float[np.ndarray, " K2"], Float[np.ndarray, " K2"]]:
    """The frequency of each complex number of a head, and what its size is multiplied by; float32, as in transformers.

    `dynamic` is the default up to the trained context, and no model is run beyond that.
    """
    size = int(head_dim * rotary.fraction)
    numbers, factor = dict(rotary.numbers), 1.0
    inverse = 1.0 / np.float32(rotary.theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    if rotary.scaling == "linear":
        inverse = inverse / np.float32(numbers["factor"])
    elif rotary.scaling == "llama3":
        inverse = _llama3(inverse, numbers)
    elif rotary.scaling == "yarn":
        inverse, factor = _yarn(inverse, rotary.theta, size, numbers), _yarn_size(numbers)
    rest = head_dim // 2 - len(inverse)
    sizes = np.full(len(inverse), factor, np.float32)
    return np.pad(inverse.astype(np.float32), (0, rest)), np.pad(sizes, (0, rest), constant_values=1.0)


def _llama3(inverse: np.ndarray, numbers: dict[str, float]) -> np.ndarray:
    """Llama 3.1: frequencies that turn less than once in the trained context are slowed, fast ones stay."""
    context, factor = numbers["original_max_position_embeddings"], numbers["factor"]
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    waves = 2 * math.pi / inverse
    blend = (context / waves - low) / (high - low)
    between = (1 - blend) * inverse / factor + blend * inverse
    return np.where(waves > context / low, inverse / factor, np.where(waves < context / high, inverse, between))


def _yarn(inverse: np.ndarray, theta: float, size: int, numbers: dict[str, float]) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow frequencies are interpolated, fast ones stay, a ramp between."""
    context, factor = numbers["original_max_position_embeddings"], numbers["factor"]

    def place(rotations: float) -> float:
        """Which dimension turns so often in the trained context."""
        return size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(numbers.get("beta_fast", 32.0)), place(numbers.get("beta_slow", 1.0))
    if numbers.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    slow = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return inverse / factor * slow + inverse * (1 - slow)


def _yarn_size(numbers: dict[str, float]) -> float:
    """What YaRN multiplies queries and keys by, so that longer contexts are attended to as sharply."""
    if "attention_factor" in numbers:
        return numbers["attention_factor"]

    def size(mscale: float = 1.0) -> float:
        return 1.0 if numbers["factor"] <= 1 else 0.1 * mscale * math.log(numbers["factor"]) + 1.0

    one, two = numbers.get("mscale", 0.0), numbers.get("mscale_all_dim", 0.0)
    return size(one) / size(two) if one and two else size()


def rotate(
    x: Float[Array, "B heads T R"],
    positions: Int32[Array, "B T"],
    frequencies: Float[np.ndarray | Array, "*heads R2"],
    sizes: Float[np.ndarray | Array, "*heads R2"],
) -> Float[Array, "B heads T R"]:
    """Queries or keys turned to their positions, computed in float32, in x's dtype.

    Args:
        frequencies, sizes: of the complex numbers, [R / 2] of all heads or [heads, R / 2].
    """
    angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies[..., None, :]
    cos, sin = jnp.cos(angles) * sizes[..., None, :], jnp.sin(angles) * sizes[..., None, :]
    real, imaginary = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return turned.astype(x.dtype)
