"""How a cache may be stored: formats by name, as data.

`float32`, `bfloat16` and `int8` store every token by itself. The others store whole blocks of tokens in few bits, the
first tokens and the block in progress in bfloat16 (`chai_jax.model.block_store`). `int4` is KIVI's (Liu et al. 2024,
arXiv 2402.02750), five bits a number with its scales; `kNvM` keeps keys in N bits and values in M, each with 3/8 or 1/4
of a bit for scales where heads have 64 dimensions. `basisN` keeps keys, before they are turned to their positions, in a
basis of their own (`chai_jax.model.basis`) whose channels have each as many bits as they are worth, and in N bits what
these keys do not foretell of the values.
"""

from dataclasses import dataclass, replace
from typing import Literal

BFLOAT16 = 2  # bytes


@dataclass(frozen=True)
class Side:
    """How the keys, or the values, of a block are stored.

    Attributes:
        bits: of a number.
        scales: `grid`: evenly spaced levels; a scale and a lowest value in bfloat16 for each 32 neighbours.
            `channel`: evenly spaced; for each channel of a block a lowest value in bfloat16 and a scale of one byte.
            `token`: levels for normally distributed numbers; for each token a scale in bfloat16.
        along: the axis of [columns, channels] along which neighbours share a scale: -2 or -1.
        parts: of a basis, (bits, channels) each, in the order of its channels; of others empty: all channels are alike.
    """

    bits: int
    scales: Literal["grid", "channel", "token"]
    along: Literal[-2, -1]
    parts: tuple[tuple[int, int], ...] = ()

    def bytes_of_block(self, columns: int, rank: int) -> int:
        """Of a block of so many columns and channels, with its scales."""
        if self.parts:
            return sum(Side(bits, "channel", -2).bytes_of_block(columns, channels) for bits, channels in self.parts)
        if self.scales == "channel":
            return rank * (self.bits * columns // 8 + BFLOAT16 + 1)
        if self.scales == "token":
            return columns * (self.bits * -(-rank // 8) + BFLOAT16)
        rows, length = (rank, columns) if self.along == -2 else (columns, rank)
        return rows * (-(-length // 2) + 2 * BFLOAT16 * -(-length // GRID))


@dataclass(frozen=True)
class Blocks:
    """A format that stores `block` columns at a time, and each sequence's first `sinks` tokens in bfloat16.

    First tokens draw attention whatever they say (Xiao et al. 2023, arXiv 2309.17453), and no few bits are enough for
    them.
    """

    keys: Side
    values: Side
    block: int
    sinks: int
    basis: bool = False  # which channels of its keys have how many bits then differs from layer to layer

    def of(self, channels: tuple[tuple[int, int], ...]) -> "Blocks":
        """The format of a layer: of a basis, its keys with (bits, channels) in the place of their parts."""
        return replace(self, keys=replace(self.keys, parts=channels)) if self.basis else self


GRID = 32  # neighbours that share a scale
FEW = {
    f"k{keys}v{values}": Blocks(Side(keys, "channel", -2), Side(values, "token", -1), block=64, sinks=4)
    for keys in (4, 3, 2)
    for values in (4, 3, 2)
}
BASIS = {
    f"basis{values}": Blocks(Side(0, "channel", -2), Side(values, "token", -1), block=64, sinks=4, basis=True)
    for values in (4, 3, 2)
}
CHANNEL_BITS = (2, 3, 4, 5, 6)  # of a basis; a channel with none is not kept
BLOCKS = {"int4": Blocks(Side(4, "grid", -2), Side(4, "grid", -1), block=GRID, sinks=0), **FEW, **BASIS}
STORAGES = ("float32", "bfloat16", "int8", *BLOCKS)
UNFITTED = tuple(name for name in STORAGES if name not in BASIS)  # those that need no calibration text
