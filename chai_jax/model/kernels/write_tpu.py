"""A new token of each sequence put into a cache on a TPU (Mosaic): of each, the tile of columns where it belongs is
read, changed and written again."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Shaped

from chai_jax.model.kernels import LANES

ROWS = 32  # sublanes of a tile of int8, of which those of wider types are parts


def put_on_tpu(
    old: Shaped[Array, "B heads S ..."],
    tokens: Shaped[Array, "B heads 1 ..."],
    start: Int32[Array, "B"],
    interpret: bool = False,
) -> Shaped[Array, "B heads S ..."]:
    """What `put_tokens` returns, of one token a sequence; arrays are [B, heads, S, R], int8's scales have no R."""
    minor = old.ndim == 3 or old.shape[-1] % LANES != 0  # the tokens come last, see `write.tokens_minor`
    turned = old.ndim == 4 and minor
    stored = jnp.swapaxes(old, 2, 3) if turned else old
    entry = tokens.astype(jnp.float32)  # few, and all TPUs can choose among these
    axis = stored.ndim - 1 if minor else 2
    tile = min(LANES if minor else ROWS, old.shape[2])
    shape = list(stored.shape[1:])
    shape[axis - 1] = tile

    def place(row: Any, start: Any) -> tuple[Any, ...]:
        return tuple(
            row if at == 0 else jax.lax.div(start[row], jnp.int32(tile)) if at == axis else 0
            for at in range(stored.ndim)
        )

    whole = pl.BlockSpec((None, *entry.shape[1:]), lambda row, start: (row, *[0] * (entry.ndim - 1)))
    cut = pl.BlockSpec((None, *shape), place)
    written = pl.pallas_call(
        partial(_body, axis=axis - 1, tile=tile, turned=turned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(len(old),), in_specs=[cut, whole], out_specs=cut
        ),
        out_shape=jax.ShapeDtypeStruct(stored.shape, stored.dtype),
        input_output_aliases={1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="put_tokens",
    )(jnp.clip(start, 0, old.shape[2] - 1), stored, entry)
    return jnp.swapaxes(written, 2, 3) if turned else written


def _body(start: Any, old: Any, entry: Any, new: Any, *, axis: int, tile: int, turned: bool) -> None:
    """References: all starts [B], a tile [heads, ...] before and after, the token that belongs into it [heads, 1, ...].

    A token [1, R] along the lanes becomes a column [R, tile] of equal entries by a product with ones, which is exact.
    """
    at, token = jax.lax.rem(start[pl.program_id(0)], jnp.int32(tile)), entry[...]
    mine = jax.lax.broadcasted_iota(jnp.int32, old.shape, axis) == at
    if turned:
        ones = jnp.ones((*token.shape[:2], tile), jnp.float32)
        each = (((1,), (1,)), ((0,), (0,)))
        token = jax.lax.dot_general(token, ones, each, "highest", preferred_element_type=jnp.float32)
    new[...] = jnp.where(mine, token, old[...].astype(jnp.float32)).astype(new.dtype)
