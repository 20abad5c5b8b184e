"""Keys cached in a basis of their own, and values as what these keys do not foretell of them (formats `BASIS`).

Keys vary in few directions, and queries ask for fewer, but a rotation mixes directions as positions go by. So a key k
is stored before its rotation R_s, in coordinates c = (k - mean) into, of which each has as many bits as it is worth
(many none), and is R_s (mean + c back) when it is read (Chang et al. 2024, Palu, arXiv 2407.21118, store latent keys).
A value is close to a linear function of its token's key: what is stored of it is v - (offset + c values), by the c that
will be read, so that the function does not add to the error (Shutova et al. 2025, AQUA-KV, arXiv 2501.19392, foretell
values from keys). `chai_jax.compress.key_basis` finds all of these. The first tokens and the block in progress stay
whole: keys before their rotation and values in bfloat16.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from chai_jax.model.block_store import quantized_as
from chai_jax.model.by_row import slice_rows
from chai_jax.model.channel_bits import ChannelBits, quantize_channels
from chai_jax.model.params import Params


@dataclass(frozen=True)
class KeyCodec:
    """Keys [B, C, ..., R] in coordinates [B, C, ..., n]."""

    basis: Params

    def encode(self, window: Array, first: Array) -> Array:
        centred = window.astype(jnp.float32) - _by_head(self.basis["mean"], window)
        return jnp.einsum("bcsr,crn->bcsn", centred, _float32(self.basis["into"]), precision="highest")

    def of(self, row: Array) -> "KeyCodec":
        return self

    def quantize(self, blocks: Array, like: ChannelBits) -> ChannelBits:
        return quantize_channels(blocks, like.parts, self.basis.get("levels"))

    def decode(self, blocks: Array) -> Array:
        back = jnp.einsum("bcsmn,cnr->bcsmr", blocks, _float32(self.basis["back"]))
        return back + _by_head(self.basis["mean"], back)


@dataclass(frozen=True)
class ValueCodec:
    """Values [B, C, ..., R] without what the coordinates of their keys, [B, C, N, M, n], foretell."""

    basis: Params
    coordinates: Array

    def encode(self, window: Array, first: Array) -> Array:
        block = self.coordinates.shape[3]
        count = window.shape[2] // block
        room = [(0, 0)] * 5
        room[2] = (0, count)  # the last block may be cut off
        near = slice_rows(jnp.pad(self.coordinates, room), first, count, axis=2)
        return window.astype(jnp.float32) - self._foretold(near).reshape(window.shape)

    def of(self, row: Array) -> "ValueCodec":
        return ValueCodec(self.basis, jax.lax.dynamic_slice_in_dim(self.coordinates, row, 1, axis=0))

    def quantize(self, blocks: Array, like: Any) -> Any:
        return quantized_as(blocks, like)

    def decode(self, blocks: Array) -> Array:
        return blocks + self._foretold(self.coordinates)

    def _foretold(self, coordinates: Array) -> Float[Array, "B C N M R"]:
        told = jnp.einsum("bcsmn,cnr->bcsmr", coordinates, _float32(self.basis["values"]))
        return told + _by_head(self.basis["offset"], told)


def _by_head(x: Array, like: Array) -> Array:
    """[C, R] as it broadcasts with [B, C, ..., R]."""
    return _float32(x).reshape(x.shape[0], *(1,) * (like.ndim - 3), x.shape[1])


def _float32(x: Array) -> Array:
    return x.astype(jnp.float32)
