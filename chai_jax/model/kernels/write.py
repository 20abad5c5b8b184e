"""New tokens put into a cache, each sequence's behind its own.

XLA's scatter, which starts that differ ask for, is in place on GPUs alone. On TPUs, where the tokens of a cache lie
along the lanes, it would turn the whole cache around and back; so sequences are written one after another there, by a
loop or by a kernel. XLA for CPUs knows no bfloat16, and passes over the whole cache to write a token; write_cpu.cc
copies its bytes to where they belong.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import layout as memory
from jaxtyping import Array, Int32, Shaped

from chai_jax.model.by_row import put_rows
from chai_jax.model.execution import Execution
from chai_jax.model.kernels import LANES
from chai_jax.model.kernels.write_tpu import put_on_tpu


def put_tokens(
    old: Shaped[Array, "B heads S ..."],
    tokens: Shaped[Array, "B heads T ..."],
    start: Int32[Array, "B"],
    how: Execution | None = None,
) -> Shaped[Array, "B heads S ..."]:
    """`old` with each sequence's tokens in its columns `start`..., which are within S, or else the last T."""
    by_xla: Any = partial(put_rows, axis=2)
    kernels, one = "xla" if how is None else how.kernels, tokens.shape[2] == 1
    on_cpu: Any = _on_cpu if kernels == "native" else _selected if one else by_xla
    on_tpu: Any = put_on_tpu if kernels == "pallas" and one else _one_by_one

    def put(old: Array, tokens: Array, start: Array) -> Array:
        old = tokens_minor(old)
        return tokens_minor(jax.lax.platform_dependent(old, tokens, start, cpu=on_cpu, tpu=on_tpu, default=by_xla))

    if how is None or how.layout.mesh.size == 1:
        return put(old, tokens, start)
    return how.layout.by_device(put, old, tokens, start)


def tokens_minor(x: Array) -> Array:
    """On TPUs, keep the tokens of keys and values along the lanes; elsewhere, and to their values, this does nothing.

    A TPU's vectors have 128 lanes. Left alone, XLA puts the head dimension there while it decodes, padded to 128: of
    heads of 64 it makes a second cache of twice the size, and copies it there and back at every call. Where sequences
    and heads are both split, XLA would gather all of x for this, so each device does it to its own part.
    """
    if x.ndim != 4 or x.shape[-1] % LANES == 0:
        return x

    def pin(x: Array) -> Array:
        return memory.with_layout_constraint(x, memory.Layout(major_to_minor=(0, 1, 3, 2)))

    pinned: Array = jax.lax.platform_dependent(x, tpu=pin, default=lambda x: x)
    return pinned


def _one_by_one(old: Array, tokens: Array, start: Array) -> Array:
    """A turn for each sequence, in place, from the last to the first: from first to last XLA for TPUs takes it for a
    loop that writes all of each sequence, and stops at that mistake where a device has one head."""
    first = jnp.int32(0)

    def turn(at: Array, old: Array) -> Array:
        row = len(old) - 1 - at
        own = jax.lax.dynamic_slice_in_dim(tokens, row, 1, axis=0)
        return jax.lax.dynamic_update_slice(old, own, (row, first, start[row], *[first] * (old.ndim - 3)))

    written: Array = jax.lax.fori_loop(0, len(old), turn, old)
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
