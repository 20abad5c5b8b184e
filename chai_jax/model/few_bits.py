"""Numbers of two to four bits: how keys and values are quantized, packed and read back (formats `kNvM`).

Keys have outliers that keep to channels, so that a channel of a block of tokens shares a scale (Liu et al. 2024, KIVI,
arXiv 2402.02750). Values have none that a rotation would not even out: turned by a Hadamard matrix their numbers are
close to normally distributed, for which the best levels are known (Max 1960, Quantizing for minimum distortion, table
I; Ashkboos et al. 2024, QuaRot, arXiv 2404.00456, and Zandieh et al. 2025, TurboQuant, arXiv 2504.19874, do so).
"""

import dataclasses
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, UInt8

from chai_jax.plans.formats import BLOCKS, Side

# Of a normal distribution with deviation 1, by bits; the negative ones are their mirror image.
NORMAL = {
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}
# What a scale's byte stands for: 21 octaves in steps of 6 %. A table, so that every program reads the same number.
SCALES = np.exp2((np.arange(256) - 160) / 12).astype(np.float32)


@partial(jax.tree_util.register_dataclass, data_fields=["planes", "scale", "low"], meta_fields=["side", "size"])
@dataclasses.dataclass(frozen=True)
class FewBits:
    """Blocks [..., M, R] of M columns and R channels, in as many planes as bits; `_pack` says how."""

    # Any, because tree operations put other things (shapes, shardings) in their places.
    planes: Any  # uint8, by channel [..., bits, R, M / 8]; by token [..., bits, M / 8, R rounded up to eights]
    scale: Any  # by channel uint8 [..., R], which `SCALES` explains; by token bfloat16 [..., M]
    low: Any  # by channel bfloat16 [..., R], the lowest value; by token None
    side: Side
    size: int  # M by channel, R by token

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def quantize_few(x: Float[Array, "*blocks M R"], side: Side) -> FewBits:
    """Quantize blocks; no gradient flows through it."""
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    return (_by_channel if side.scales == "channel" else _by_token)(x, side)


def _by_channel(x: Array, side: Side) -> FewBits:
    numbers, scale, low = even_levels(x, 2**side.bits - 1)
    return FewBits(_pack(numbers, side), scale, low, side, x.shape[-2])


def even_levels(x: Float[Array, "*blocks M n"], steps: Any) -> tuple[Array, Array, Array]:
    """Levels from the lowest value, rounded down to bfloat16, to the highest: no entry is more than half a scale off,
    unless its channel spans more than the largest scale's levels (3,600 in four bits).

    Args:
        steps: levels less one, of all channels or of each.

    Returns:
        the number of each level, uint8; scale, uint8 [..., n], which `SCALES` explains; low, bfloat16 [..., n].
    """
    lowest, highest = x.min(axis=-2), x.max(axis=-2)
    low = lowest.astype(jnp.bfloat16)
    below = jnp.nextafter(low, jnp.full_like(low, -jnp.inf))
    low = jnp.where(low.astype(jnp.float32) > lowest, below, low)
    codes = jnp.searchsorted(jnp.asarray(SCALES), (highest - low.astype(jnp.float32)) / steps)
    scale = jnp.minimum(codes, 255).astype(jnp.uint8)
    each = (x - low.astype(jnp.float32)[..., None, :]) / jnp.asarray(SCALES)[scale][..., None, :]
    return jnp.clip(jnp.round(each), 0, steps).astype(jnp.uint8), scale, low


def _by_token(x: Array, side: Side) -> FewBits:
    """The nearest levels of a normal distribution with the token's deviation; its scale is then refitted by least
    squares, min_s |x - s levels|^2."""
    deviation = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
    unit = x / jnp.where(deviation > 0, deviation, 1.0)
    levels = np.asarray(all_levels(side.bits), np.float32)
    borders = jnp.asarray((levels[1:] + levels[:-1]) / 2)
    numbers = jnp.sum(unit[..., None] > borders, axis=-1, dtype=jnp.uint8)
    nearest = _levels(numbers, side.bits)
    scale = (jnp.sum(x * nearest, axis=-1) / jnp.sum(nearest**2, axis=-1)).astype(jnp.bfloat16)
    return FewBits(_pack(numbers, side), scale, None, side, x.shape[-1])


def read_few(x: FewBits) -> Float[Array, "*blocks M R"]:
    """The blocks that were quantized, in float32."""
    numbers = _unpack(x.planes, x.side, x.size)
    if x.side.scales == "token":
        return _levels(numbers, x.side.bits) * x.scale.astype(jnp.float32)[..., None]
    scale = jnp.asarray(SCALES)[x.scale]
    return numbers.astype(jnp.float32) * scale[..., None, :] + x.low.astype(jnp.float32)[..., None, :]


def _levels(numbers: UInt8[Array, "..."], bits: int) -> Float[Array, "..."]:
    """The level of each number: a tree of choices, bit by bit, which is faster than looking it up in a table."""
    found: list[Any] = [np.float32(level) for level in all_levels(bits)]
    for bit in range(bits):
        chosen = (numbers >> bit & 1).astype(bool)
        found = [jnp.where(chosen, *pair) for pair in zip(found[1::2], found[::2], strict=True)]
    return found[0]


@cache
def all_levels(bits: int) -> tuple[float, ...]:
    positive = NORMAL[bits]
    return (*(-level for level in reversed(positive)), *positive)


def _pack(numbers: UInt8[Array, "*blocks M R"], side: Side) -> UInt8[Array, "*blocks bits _ _"]:
    """Numbers as `FewBits` holds them, which is how kernels unpack them in the fewest instructions: every half byte is
    an index into a table of sixteen levels, of three and two bits after a repetition, so that nothing is masked.

    A quarter of the columns is a set of half bytes, those of its second half the upper ones. Four bits: the quarters
    are the planes. Three: each bit of the last quarter lies above the others' three. Two: a plane is two quarters.
    """
    *blocks, columns, rank = numbers.shape
    if side.scales == "token":
        numbers = jnp.pad(numbers, [*[(0, 0)] * (numbers.ndim - 1), (0, -rank % 8)])
    quarters = numbers.reshape(*blocks, 4, 2, columns // 8, numbers.shape[-1])
    first, second, third, last = (quarters[..., quarter, :, :, :] for quarter in range(4))
    halves = {
        4: (first, second, third, last),
        3: tuple(each | (last >> bit & 1) << 3 for bit, each in enumerate((first, second, third))),
        2: (first | second << 2, third | last << 2),
    }[side.bits]
    planes = jnp.stack([each[..., 0, :, :] | each[..., 1, :, :] << 4 for each in halves], axis=-3)
    return jnp.swapaxes(planes, -1, -2) if side.scales == "channel" else planes


def _unpack(planes: UInt8[Array, "*blocks bits _ _"], side: Side, size: int) -> UInt8[Array, "*blocks M R"]:
    """The numbers that were packed."""
    if side.scales == "channel":
        planes = jnp.swapaxes(planes, -1, -2)
    halves = [jnp.stack([planes[..., at, :, :] & 15, planes[..., at, :, :] >> 4], -3) for at in range(side.bits)]
    if side.bits == 3:
        last = reduce(jnp.bitwise_or, (half >> 3 << bit for bit, half in enumerate(halves)))
        halves = [*(half & 7 for half in halves), last]
    if side.bits == 2:
        halves = [part for half in halves for part in (half & 3, half >> 2)]
    quarters = jnp.stack(halves, axis=-4)
    numbers = quarters.reshape(*planes.shape[:-3], 8 * planes.shape[-2], planes.shape[-1])
    return numbers[..., :size] if side.scales == "token" else numbers


def turned(x: Float[Array, "*rows R"], storage: str) -> Float[Array, "*rows R"]:
    """Values as their format wants them, or what was mixed of such values turned back: the matrix is its own inverse.

    Attention mixes turned values, so that only one row a head is turned back and nothing that is cached.
    """
    if storage not in BLOCKS or BLOCKS[storage].values.scales != "token":
        return x
    matrix = jnp.asarray(hadamard(x.shape[-1]), x.dtype)
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32).astype(x.dtype)


@cache
def hadamard(size: int) -> np.ndarray:
    """Hadamard's matrix over sqrt(size); where `size` is no power of two, the largest that divides it, repeated."""
    part = size & -size
    matrix: np.ndarray = np.kron(np.eye(size // part), scipy.linalg.hadamard(part) / np.sqrt(part))
    return matrix.astype(np.float32)
