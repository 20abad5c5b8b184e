"""Blocks of columns whose channels have each their own number of bits (keys in a basis, `chai_jax.model.basis`)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from chai_jax.model.few_bits import SCALES, even_levels


@partial(jax.tree_util.register_dataclass, data_fields=["planes", "scale", "low"], meta_fields=["parts"])
@dataclasses.dataclass(frozen=True)
class ChannelBits:
    """Blocks [..., M, n] of M columns and n channels as P planes of bits, those of a channel one after another.

    Attributes:
        parts: (bits, channels) in the order of the channels; P is the sum of their products.
    """

    # Any, because tree operations put other things (shapes, shardings) in their places.
    planes: Any  # uint8 [..., M / 8, P]: eight columns share a byte
    scale: Any  # uint8 [..., n], see `few_bits.SCALES`
    low: Any  # bfloat16 [..., n]
    parts: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def quantize_channels(
    x: Float[Array, "*blocks M n"], parts: tuple[tuple[int, int], ...], levels: Float[Array, " n"] | None = None
) -> ChannelBits:
    """Quantize blocks to evenly spaced levels; no gradient flows through it.

    Args:
        levels: of each channel, where they are fewer than its bits have room for.
    """
    bits, channel, place = _planes(parts)
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    steps = np.exp2(bits).astype(np.float32) - 1 if levels is None else levels - 1
    numbers, scale, low = even_levels(x, steps)
    planes = numbers[..., channel] >> jnp.asarray(place, jnp.uint8) & 1
    eights = planes.reshape(*planes.shape[:-2], planes.shape[-2] // 8, 8, planes.shape[-1])
    packed = (eights << jnp.arange(8, dtype=jnp.uint8)[:, None]).sum(axis=-2, dtype=jnp.uint8)
    return ChannelBits(packed, scale, low, parts)


def read_channels(x: ChannelBits) -> Float[Array, "*blocks M n"]:
    """The blocks that were quantized, in float32.

    Planes are added up to numbers by one small product, exact in any precision, so that a program does not grow with
    the parts.
    """
    bits, channel, place = _planes(x.parts)
    worth = np.zeros((len(channel), len(bits)), np.float32)
    worth[np.arange(len(channel)), channel] = np.exp2(place)
    planes = x.planes[..., None, :] >> jnp.arange(8, dtype=jnp.uint8)[:, None] & 1
    planes = planes.reshape(*x.planes.shape[:-2], 8 * x.planes.shape[-2], x.planes.shape[-1]).astype(jnp.float32)
    numbers = jnp.matmul(planes, worth, preferred_element_type=jnp.float32)
    scale = jnp.asarray(SCALES)[x.scale]
    return numbers * scale[..., None, :] + x.low.astype(jnp.float32)[..., None, :]


def _planes(parts: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bits of each channel; of each plane, its channel and which bit of the number it holds."""
    bits = np.repeat(*np.asarray(parts).T)
    places = [np.arange(each) for each in bits]
    return bits, np.repeat(np.arange(len(bits)), bits), np.concatenate(places)
