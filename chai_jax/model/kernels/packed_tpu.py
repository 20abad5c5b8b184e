"""Attention of one new token to blocks of few bits on a TPU (Mosaic): block after block, as it is stored.

Channels lie along a vector's 128 lanes, where XLA too puts them in such arrays: of heads of 64 half of each vector is
empty, in memory as in here. A byte holds numbers of several columns, so the columns of some blocks are computed in
groups: those in the low and in the high halves of each plane's bytes. Scores, softmax and weights stay in that order,
which the values have too; what lies in another order is turned beforehand: states of columns, and scales of values.
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from chai_jax.model.few_bits import FewBits
from chai_jax.model.kernels.columns import MASKED, masked
from chai_jax.model.kernels.packed import NOT_HERE, READ, Part, kind, level_of, merged, scale_of, states, whole_part
from chai_jax.model.one_row import OneRow
from chai_jax.model.quantized import Int4Array

ROWS = 2048  # bytes' rows of keys, or of values, in a step: their numbers, in float32, are in fast memory at once
BLOCKS = {"few": 32, "int4": 16}  # in a step; their groups of columns then fill whole vectors


def attend_to_blocks(
    query: Float[Array, "B C q R"],
    keys: OneRow,
    values: OneRow,
    allowed: Bool[Array, "B S"],
    value_heads: int,
    interpret: bool,
) -> Float[Array, "B values q Rv"]:
    """Some clusters of a sequence at once, some blocks after the others; see `packed` for what is not in blocks."""
    few = kind(keys, values) == "few"
    state = states(keys, allowed)
    key, value = keys.store.blocks, values.store.blocks
    stored = [*(_few_keys if few else _int4_keys)(key), *(_few_values if few else _int4_values)(value)]
    part = _call(query, _grouped(state, few), stored, value_heads, few, interpret)
    rank = values.store.recent.shape[-1]
    if few:
        sums = part.sums[:, :, 0, :, :rank]
    else:  # channels in turn
        sums = jnp.stack([part.sums[:, :, 0], part.sums[:, :, 1]], axis=-1)
        sums = sums.reshape(*sums.shape[:3], -1)[..., :rank]
    rest = whole_part(query, keys, values, allowed, value_heads)
    return merged([part._replace(sums=sums), rest], value_heads)


def _grouped(x: Array, few: bool) -> Array:
    """[..., N, M] by groups of columns: [..., groups, N * M / groups]."""
    *lead, count, columns = x.shape
    groups = 8 if few else 2
    # Of few bits a group's columns are neighbours; of int4 every other one.
    shape = (groups, columns // groups) if few else (columns // groups, groups)
    order = (-2, -3, -1) if few else (-1, -3, -2)
    axes = [*range(len(lead)), *(len(lead) + 3 + at for at in order)]
    return x.reshape(*lead, count, *shape).transpose(axes).reshape(*lead, groups, -1)


# Arrays as the kernel has them, each with its axis of blocks, or of blocks and columns.
Stored = list[tuple[Array, int]]


def _few_keys(x: FewBits) -> Stored:
    """Planes [B, C, N, bits, 8, R]; scale and low [B, C, N, R]."""
    return [(jnp.swapaxes(x.planes, -1, -2), 2), (x.scale, 2), (x.low, 2)]


def _few_values(x: FewBits) -> Stored:
    """Planes [B, heads, N, bits, 8, R]; scale [B, heads, groups, N * 8]."""
    return [(x.planes, 2), (_grouped(x.scale, few=True), 3)]


def _int4_keys(x: Int4Array) -> Stored:
    """Packed [B, C, N, 16, R]; scale and low [B, C, N, R]."""
    return [(x.packed, 2), (x.scale[..., 0, :], 2), (x.low[..., 0, :], 2)]


def _int4_values(x: Int4Array) -> Stored:
    """Packed [B, heads, N, 32, R / 2]; scale and low [B, heads, R / 32, N * 32]."""

    def by_channels(x: Array) -> Array:
        return x.transpose(0, 1, 4, 2, 3).reshape(*x.shape[:2], x.shape[4], -1)

    return [(x.packed, 2), (by_channels(x.scale), 3), (by_channels(x.low), 3)]


def _call(query: Array, state: Array, stored: Stored, value_heads: int, few: bool, interpret: bool) -> Part:
    batch, clusters, queries, _ = query.shape
    keys, values = stored[0][0], stored[3][0]
    count = keys.shape[2]
    blocks = min(count, BLOCKS["few" if few else "int4"])
    rows = max(keys.shape[-2], values.shape[-2]) * blocks * value_heads
    together = max(
        each for each in range(1, clusters + 1) if clusters % each == 0 and (each == 1 or each * rows <= ROWS)
    )

    def cut(x: Array, axis: int, heads: int) -> pl.BlockSpec:
        """Some heads of one sequence, and of an axis what some blocks have of it."""
        size = x.shape[axis] // count * blocks
        shape = None, heads, *(size if at == axis else n for at, n in enumerate(x.shape) if at > 1)
        return pl.BlockSpec(shape, lambda b, c, s: (b, c, *(s if at == axis else 0 for at in range(2, x.ndim))))

    def whole(heads: int, *shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, heads, *shape), lambda b, c, s: (b, c, *[0] * len(shape)))

    heads = [together, together, together] + [together * value_heads] * (len(stored) - 3)
    sums = 1 if few else 2, queries, values.shape[-1]
    results: list[tuple[int, int, tuple[int, ...]]] = [(clusters, together, (queries, 1))] * 2
    results += [(clusters * value_heads, together * value_heads, sums)]
    return Part(*pl.pallas_call(
        partial(_body, value_heads=value_heads, count=count, few=few),
        grid=(batch, clusters // together, pl.cdiv(count, blocks)),
        in_specs=[
            whole(together, *query.shape[2:]),
            pl.BlockSpec((None, state.shape[1], state.shape[2] // count * blocks), lambda b, c, s: (b, 0, s)),
            *(cut(*each, some) for each, some in zip(stored, heads, strict=True)),
        ],
        out_specs=[whole(each, *shape) for _, each, shape in results],
        out_shape=[jax.ShapeDtypeStruct((batch, every, *shape), jnp.float32) for every, _, shape in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention_blocks",
    )(query, state, *(x for x, _ in stored)))  # fmt: skip


def _body(query: Any, state: Any, *rest: Any, value_heads: int, count: int, few: bool) -> None:
    """References: query [C, q, R], states [groups, n], keys and values as `_few_keys` and so on say, of some blocks;
    outputs: the softmax so far [C, q, 1] twice, sums [C * v, planes, q, Rv]."""
    *stored, highest, total, sums = rest
    (packed, key_scale, key_low), values = stored[:3], stored[3:]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        highest[...] = jnp.full(highest.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def inside(columns: int) -> Array:
        """Of [1, 1, columns of a step] those before the last block's end."""
        blocks = packed.shape[1]
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, 1, columns), 2)
        return step * columns + lane < count * (columns // blocks)

    here = inside(state.shape[1])
    scores = []
    for group, key in enumerate(_read_keys(packed, key_scale, key_low, few, query.dtype)):
        of_group = state[group : group + 1][None]
        score = _product(query[...], key, 2)
        scores.append(masked(score, of_group == READ, here & (of_group != NOT_HERE)))
    new = reduce(jnp.maximum, (score.max(axis=-1, keepdims=True) for score in scores), highest[...])
    kept, weights = jnp.exp(highest[...] - new), [jnp.exp(score - new) for score in scores]
    highest[...] = new
    total[...] = total[...] * kept + sum(weight.sum(axis=-1, keepdims=True) for weight in weights)
    each = [_for_values(weight, value_heads) for weight in weights]
    mixed = _mix_few(each, values, here, query.dtype) if few else _mix_int4(each, values, inside, query.dtype)
    shrunk = _for_values(kept, value_heads)
    for plane, one in enumerate(mixed):
        sums[:, plane] = sums[:, plane] * shrunk + one


def _for_values(x: Array, value_heads: int) -> Array:
    """[C, q, n] -> [C * v, q, n]"""
    return x if value_heads == 1 else jnp.repeat(x, value_heads, axis=0)


def _product(x: Array, y: Array, contracted: int) -> Array:
    """Batched over heads: x [heads, q, n] times y along its axis `contracted`; float32."""
    dimensions = (((2,), (contracted,)), ((0,), (0,)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _read_keys(packed: Any, scale: Any, low: Any, few: bool, dtype: Any) -> list[Array]:
    """The keys of each group of columns, [C, n, R]."""
    if few:
        steps = scale_of(scale[...].astype(jnp.int32))
        groups = unpacked([packed[:, :, plane].astype(jnp.int32) for plane in range(packed.shape[2])])
    else:
        steps, both = scale[...].astype(jnp.float32), packed[...].astype(jnp.int32)
        groups = [both & 15, both >> 4]
    lowest = low[...].astype(jnp.float32)

    def read(numbers: Array) -> Array:
        key = numbers.astype(jnp.float32) * steps[:, :, None] + lowest[:, :, None]
        return key.reshape(key.shape[0], -1, key.shape[-1]).astype(dtype)

    return [read(numbers) for numbers in groups]


def unpacked(planes: list[Array]) -> list[Array]:
    """The numbers of a block's eight groups of columns, of bytes as `few_bits._pack` packs them, int32."""
    halves = [half for plane in planes for half in (plane & 15, plane >> 4)]
    if len(planes) == 4:
        return halves
    if len(planes) == 3:
        last = [reduce(jnp.bitwise_or, (half >> 3 << bit for bit, half in enumerate(halves[at::2]))) for at in (0, 1)]
        return [*(half & 7 for half in halves), *last]
    quarters = [(halves[at] & 3, halves[at + 1] & 3, halves[at] >> 2, halves[at + 1] >> 2) for at in (0, 2)]
    return [group for some in quarters for group in some]


def _mix_few(weights: list[Array], values: list[Any], here: Array, dtype: Any) -> list[Array]:
    """The weighted values [heads, q, R] of some blocks."""
    planes, scale = values
    bits = planes.shape[2]
    mixed: Any = 0.0
    for group, numbers in enumerate(unpacked([planes[:, :, plane].astype(jnp.int32) for plane in range(bits)])):
        level = level_of(numbers, bits)
        level = level.reshape(level.shape[0], -1, level.shape[-1]).astype(dtype)
        # What lies behind the last block may be anything, and 0 * nan is nan.
        by = jnp.where(here, scale[:, group : group + 1].astype(jnp.float32), 0.0)
        mixed += _product((weights[group] * by).astype(dtype), level, 1)
    return [mixed]


def _mix_int4(weights: list[Array], values: list[Any], inside: Any, dtype: Any) -> list[Array]:
    """The weighted values of even and of odd channels, [heads, q, R / 2] each."""
    packed, scale, low = values
    half, columns = weights[0].shape[-1], 2 * weights[0].shape[-1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (half, columns), axis) for axis in (0, 1))
    # Every other column's weights in turn: a product, since a TPU cannot put lanes between lanes.
    spread = [(column == 2 * row + group).astype(jnp.float32) for group in (0, 1)]
    dimensions = (((2,), (0,)), ((), ()))
    whole = sum(
        jax.lax.dot_general(weight.astype(dtype), to.astype(dtype), dimensions, preferred_element_type=jnp.float32)
        for weight, to in zip(weights, spread, strict=True)
    )
    here, both = inside(columns), packed[...].astype(jnp.int32)
    both = both.reshape(both.shape[0], columns, -1)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, 1, both.shape[-1]), 2)
    numbers = [part.astype(jnp.float32).astype(dtype) for part in (both & 15, both >> 4)]
    mixed: list[Any] = [0.0, 0.0]
    for group in range(scale.shape[1]):
        by, lowest = (jnp.where(here, x[:, group : group + 1].astype(jnp.float32), 0.0) for x in (scale, low))
        of_group, weighted = lane >> 4 == group, (whole * by).astype(dtype)
        base = (whole * lowest).sum(axis=-1, keepdims=True)
        for at in (0, 1):
            mixed[at] += jnp.where(of_group, _product(weighted, numbers[at], 1) + base, 0.0)
    return mixed
