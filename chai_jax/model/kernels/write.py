"""New tokens put into a cache, each sequence's behind its own.

XLA for CPUs knows no bfloat16: it passes over the whole cache to write a token. write_cpu.cc copies the token's bytes
to where they belong.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from chai_jax.model.by_row import put_rows


def put_tokens(
    old: Shaped[Array, "B heads S ..."],
    tokens: Shaped[Array, "B heads T ..."],
    start: Int32[Array, "B"],
    kernels: str = "xla",
) -> Shaped[Array, "B heads S ..."]:
    """`old` with each sequence's tokens in its columns `start`..., which are within S, or else the last T."""
    by_xla: Any = partial(put_rows, axis=2)
    on_cpu: Any = _on_cpu if kernels == "native" else _selected if tokens.shape[2] == 1 else by_xla
    written: Array = jax.lax.platform_dependent(old, tokens, start, cpu=on_cpu, default=by_xla)
    return written


def _selected(old: Array, tokens: Array, start: Array) -> Array:
    """One token each. A scatter of bfloat16 would copy the cache to float32 and back; this only passes over it, in a
    loop of one turn, which XLA leaves alone: else it makes one of float32 for the products that follow too."""
    if old.dtype != jnp.bfloat16:
        return put_rows(old, tokens, start, axis=2)
    columns, last = jnp.arange(old.shape[2], dtype=jnp.int32), old.shape[2] - 1

    def turn(state: tuple[Array, Array]) -> tuple[Array, Array]:
        at, old = state
        mine = columns == jnp.minimum(start + (at - start[0]), last)[:, None]
        return at + 1, jnp.where(mine.reshape(len(old), 1, -1, *[1] * (old.ndim - 3)), tokens, old)

    written: Array = jax.lax.while_loop(lambda state: state[0] <= start[0], turn, (start[0], old))[1]
    return written


def _on_cpu(old: Array, tokens: Array, start: Array) -> Array:
    shape = jax.ShapeDtypeStruct(old.shape, old.dtype)
    call = jax.ffi.ffi_call("chai_jax_put_tokens", shape, input_output_aliases={0: 0})
    written: Array = call(old, tokens, start)
    return written
