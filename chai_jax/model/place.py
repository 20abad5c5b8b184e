"""Where tokens stand in their sequences, and what they may read."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from chai_jax.model.by_row import put_rows
from chai_jax.model.cache import Cache


@dataclass(frozen=True)
class Place:
    """Where T tokens stand in sequences of S columns, and what they may read."""

    positions: Any  # int32 [B, T], from 0
    allowed: Any  # bool [B, T, S]: which columns each token may read
    start: Any  # int32 [B], the first column that each sequence writes; [] where there is no past: 0
    real: Any  # bool [B, S]: which columns hold tokens, after these
    columns: Any  # int32 [B, S]: the position of each column's token
    length: Any  # int32 [B]: columns that each sequence has used, to its last token

    def within(self, window: int) -> Bool[Array, "B T S"]:
        """What may be read by tokens that see no further back than `window` tokens, themselves included; 0: all."""
        if not window:
            return self.allowed
        return self.allowed & (self.positions[:, :, None] - self.columns[:, None, :] < window)


jax.tree_util.register_dataclass(Place)


def locate(mask: Bool[Array, "B T"], cache: Cache | None = None, branch: Int32[Array, "B T"] | None = None) -> Place:
    """Where tokens stand behind what is cached: a token's position is the number of tokens that it may read, itself not
    counted."""
    rows = mask.shape[1]
    if cache is None:
        start, real = jnp.zeros((), jnp.int32), mask
    else:
        start = cache.length
        real = put_rows(cache.mask, mask, start, axis=1)
    columns, own = (jnp.arange(count, dtype=jnp.int32) for count in (real.shape[1], rows))
    allowed = (columns <= (start[..., None] + own)[..., None]) & real[:, None, :]
    if branch is not None:
        allowed &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    positions = jnp.where(mask, allowed.sum(axis=2, dtype=jnp.int32), 0) - 1
    of_columns = positions if branch is not None else jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    length = start + jnp.max(jnp.where(mask, own + 1, 0), axis=1)
    return Place(positions, allowed, start, real, of_columns, length)
