"""Caches of blocks: a naive loop in float64, decoding against the uncached pass across the borders of blocks, bytes."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from chai_jax.model import cache
from chai_jax.model.block_store import BlockStore, append_blocks, empty_blocks
from chai_jax.model.decoder import Output, forward
from chai_jax.model.execution import Execution
from chai_jax.model.few_bits import quantize_few, read_few, turned
from chai_jax.model.params import Params
from chai_jax.model.self_attention import Seen
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import BLOCKS
from chai_jax.plans.spec import LayerSpec, Spec, group_clusters

CONFIG = Architecture(60, 24, 2, 3, 32, 128, 24)
LENGTH = 80
INT4, BLOCK = BLOCKS["int4"], BLOCKS["int4"].block
# A whole row, one padded on the left, one on the right of a prompt of 40 before it goes on, one with gaps.
PADDING = np.ones((4, LENGTH), bool)
PADDING[1, :9] = PADDING[2, 35:37] = PADDING[3, [0, 5, 31, 62]] = False
TOKENS = np.random.default_rng(0).integers(4, 60, (4, LENGTH), np.int32)
RandomParams = Callable[[Architecture, Spec, float], Params]
compiled = jax.jit(partial(forward, how=Execution.choose("float32")), static_argnums=(0, 1), static_argnames="how")


def mixed_spec(storage: str = "int4") -> Spec:
    """A dense layer all in blocks, and one with clusters of two sizes, one of them in blocks; ranks odd and large."""
    clusters = ((0,), (1, 2))
    mixed = LayerSpec("qk", clusters, group_clusters("qk", clusters, ("int8", storage)), 7, 35)
    return Spec((*Spec.dense(1, 3, 8, storage).layers, mixed))


def bfloat16(x: np.ndarray, towards: float | None = None) -> np.ndarray:
    """Rounded to the nearest bfloat16, or to the next one towards plus or minus infinity."""
    rounded = x.astype(ml_dtypes.bfloat16)
    if towards is not None:
        wrong = (rounded.astype(np.float64) - x) * np.sign(towards) < 0
        rounded = np.where(wrong, np.nextafter(rounded, ml_dtypes.bfloat16(towards)), rounded)
    return rounded.astype(np.float64)


def four_bits(x: np.ndarray) -> np.ndarray:
    """A group of numbers as it comes back from int4."""
    low = bfloat16(x.min(), -np.inf)
    scale = bfloat16((x.max() - low) / 15, np.inf)
    return low + scale * np.round((x - low) / scale) if x.max() > x.min() else x


def stored_blocks(x: np.ndarray, real: np.ndarray, by_channel: bool) -> np.ndarray:
    """One head [T, R] as it is read back from whole blocks; what lies in none is not a number."""
    read = np.full(x.shape, np.nan)
    for first in range(0, len(x) - BLOCK + 1, BLOCK):
        rows = [column for column in range(first, first + BLOCK) if real[column]]
        if by_channel:
            for channel in range(x.shape[1]):
                read[rows, channel] = four_bits(x[rows, channel])
        else:
            for row in rows:
                for start in range(0, x.shape[1], BLOCK):
                    read[row, start : start + BLOCK] = four_bits(x[row, start : start + BLOCK])
    return read


def naive_heads(seen: Seen, params: Params) -> np.ndarray:
    """Outputs [B, H, T, R] of a dense layer, head by head and row by row."""
    x, allowed = np.asarray(seen.x, np.float64), np.asarray(seen.allowed)

    def project(name: str, row: int, head: int) -> np.ndarray:
        kernel, bias = (np.asarray(params[name][leaf], np.float64) for leaf in ("kernel", "bias"))
        return x[row] @ kernel[:, head] + bias[head]

    heads = np.zeros((*x.shape[:1], 3, *x.shape[1:2], 8))
    for b, h in np.ndindex(*heads.shape[:2]):
        query = project("query", b, h) / np.sqrt(8)
        recent = [bfloat16(project(name, b, h)) for name in ("key", "value")]
        old = [stored_blocks(part, allowed[b, -1], by == 0) for by, part in enumerate(recent)]
        for t in range(x.shape[1]):
            columns = np.flatnonzero(allowed[b, t])
            border = t // BLOCK * BLOCK
            key, value = (
                np.where(columns[:, None] < border, far[columns], near[columns])
                for far, near in zip(old, recent, strict=True)
            )
            weights = np.exp(key @ query[t] - (key @ query[t]).max(initial=0))
            heads[b, h, t] = weights @ value / weights.sum() if len(columns) else 0
    return heads


@pytest.mark.slow
def test_a_layer_equals_a_loop_over_heads_and_rows(
    random_params: RandomParams, layers_seen: Callable[..., list[Seen]]
) -> None:
    config, spec = dataclasses.replace(CONFIG, num_layers=1), Spec.dense(1, 3, 8, "int4")
    params = random_params(config, spec, 0.4)
    (seen,) = layers_seen(config, spec, params, TOKENS, PADDING)
    expected = naive_heads(seen, params["layers"]["0"])
    found, real = np.asarray(seen.heads), np.broadcast_to(PADDING[:, None, :, None], expected.shape)
    # An entry between two steps of four bits may fall to either side in float32 and float64.
    close = np.isclose(found, expected, rtol=1e-4, atol=1e-4)[real]
    assert close.mean() > 0.99
    assert np.abs(found - expected)[real].max() < 0.02
    (bfloats,) = layers_seen(config, Spec.dense(1, 3, 8, "bfloat16"), params, TOKENS, PADDING)
    near = np.asarray(bfloats.heads)
    short = real[:, :, :BLOCK]  # shorter than a block: bfloat16
    np.testing.assert_allclose(found[:, :, :BLOCK][short], near[:, :, :BLOCK][short], atol=1e-6)
    assert np.abs(found - near)[:, :, BLOCK:].max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["k4v4", "k3v2"])
def test_first_tokens_and_the_block_in_progress_are_whole(
    random_params: RandomParams, layers_seen: Callable[..., list[Seen]], storage: str
) -> None:
    """What each row of a layer reads, put together column by column, and mixed in float64."""
    config, format = dataclasses.replace(CONFIG, num_layers=1), BLOCKS[storage]
    spec = Spec.dense(1, 3, 8, storage)
    params = random_params(config, spec, 0.4)
    (seen,) = layers_seen(config, spec, params, TOKENS, PADDING)
    found, mine = np.asarray(seen.heads), params["layers"]["0"]
    for row, h in np.ndindex(4, 3):
        x, real = np.asarray(seen.x[row], np.float64), PADDING[row]
        query, key, value = (
            x @ np.asarray(mine[name]["kernel"], np.float64)[:, h] + np.asarray(mine[name]["bias"], np.float64)[h]
            for name in ("query", "key", "value")
        )
        value = np.asarray(turned(jnp.asarray(value, jnp.float32), storage))
        number = np.cumsum(real) - 1
        few = real & (number >= format.sinks) & (np.arange(LENGTH) < 64)  # the one whole block
        near = [bfloat16(np.asarray(part, np.float64)) for part in (key, value)]
        far = [part.copy() for part in near]
        for part, side in zip(far, (format.keys, format.values), strict=True):
            # By channel what is left out must not matter; by token nothing else does.
            block = np.where(few[:64, None], part[:64], part[:64][few[:64]].max(axis=0))
            part[few] = np.asarray(read_few(quantize_few(jnp.asarray(block, jnp.float32), side)))[few[:64]]
        for t in np.flatnonzero(real):
            columns = np.flatnonzero(real[: t + 1])
            k, v = (each[columns] for each in (near if t < 64 else far))
            weights = np.exp(k @ query[t] / np.sqrt(8))
            expected = turned(jnp.asarray(weights @ v / weights.sum(), jnp.float32), storage)
            np.testing.assert_allclose(found[row, h, t], expected, rtol=1e-3, atol=2e-2)
            if t < 64:
                np.testing.assert_allclose(found[row, h, t], expected, rtol=1e-4, atol=1e-4)


def slow(*values: object) -> list[object]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module", params=["k4v3", *slow("int4", "k2v4")])
def uncached(request: pytest.FixtureRequest, random_params: RandomParams) -> tuple[Spec, Params, Output]:
    spec = mixed_spec(request.param)
    params = random_params(CONFIG, spec, 0.2)
    return spec, params, compiled(CONFIG, spec, params, TOKENS, PADDING)


def in_use(store: BlockStore) -> BlockStore:
    """Of the block in progress what belongs to it; behind that stands what the block before has left."""
    return dataclasses.replace(store, recent=store.recent[:, :, : LENGTH % store.recent.shape[2]])


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([64, *[1] * 16], id="prefilled"),
        pytest.param([33, 5, 1, 2, 32, 7], id="pieces", marks=pytest.mark.slow),
    ],
)
def test_cached_equals_uncached_at_every_step(uncached: tuple[Spec, Params, Output], pieces: list[int]) -> None:
    """However the text is cut, each step's output and, in the end, every stored entry is that of the uncached pass."""
    spec, params, whole = uncached
    first = compiled(CONFIG, spec, params, TOKENS[:, : pieces[0]], PADDING[:, : pieces[0]])
    past, end = cache.extend(first.cache, LENGTH + 3), pieces[0]
    for length in pieces[1:]:
        now = slice(end, end + length)
        step = compiled(CONFIG, spec, params, TOKENS[:, now], PADDING[:, now], cache=past)
        real = PADDING[:, now]
        # An entry between two steps of storage may fall to either side, once in the past.
        np.testing.assert_allclose(step.hidden[real], whole.hidden[:, now][real], atol=2e-2)
        past, end = step.cache, end + length
    found, expected = (
        [in_use(leaf) for group in layers for leaf in (group.keys, group.values) if isinstance(leaf, BlockStore)]
        for layers in (sum(past.layers, ()), sum(whole.cache.layers, ()))
    )
    assert len(found) == 4
    same = [(a == b).ravel() for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    assert np.concatenate(same).mean() > 0.99  # the rest a step of bfloat16 apart, or of int4 because of that


@pytest.mark.slow
def test_a_block_is_stored_once_when_it_is_complete() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 1, 70, 8))
    past, real = empty_blocks(2, 1, 96, 8, INT4, INT4.keys), jnp.ones((2, 96), bool)
    append = jax.jit(append_blocks)
    first = None
    for column in range(70):
        past, _ = append(past, x[:, :, column : column + 1], jnp.int32(column), real)
        used = [np.asarray(leaf)[:, :, at] for leaf in jax.tree.leaves(past.blocks) for at in range(3)]
        assert [bool(block.any()) for block in used] == [column >= end for end in (31, 63, 95)] * 3
        first = used[::3] if column == 31 else first
    for before, after in zip(first, used[::3], strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(past.recent[:, :, :6], x[:, :, 64:].astype(jnp.bfloat16))
    assert not np.asarray(past.recent[:, :, 6:]).any()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int4", "k3v3"])
@pytest.mark.parametrize(("name", "rank"), [("keys", 5), ("values", 5), ("values", 40)])
def test_masked_columns_do_not_enter_scales(storage: str, name: str, rank: int) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 2, 64, rank))
    real = jnp.asarray(np.arange(64) % 7 > 1)[None]
    wild = jnp.where(real[:, None, :, None], x, 1e3)
    start = jnp.int32(0)
    format = BLOCKS[storage]
    side = getattr(format, name)
    append = jax.jit(append_blocks)
    reads = [append(empty_blocks(1, 2, 64, rank, format, side), each, start, real)[1].old for each in (x, wild)]
    np.testing.assert_array_equal(*(np.asarray(read)[:, :, np.asarray(real[0])] for read in reads))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int4", "k4v4"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_what_padding_changes(random_params: RandomParams, padding: str, storage: str) -> None:
    """On the right nothing; on the left nothing where it is whole blocks."""
    spec, block = mixed_spec(storage), BLOCKS[storage].block
    params = random_params(CONFIG, spec, 0.2)
    alone = compiled(CONFIG, spec, params, TOKENS[:1, :70], np.ones((1, 70), bool)).hidden
    shift = block if padding == "left" else 0
    tokens, mask = np.full((1, 70 + block), 1, np.int32), np.zeros((1, 70 + block), bool)
    tokens[:, shift : shift + 70], mask[:, shift : shift + 70] = TOKENS[:1, :70], True
    padded = compiled(CONFIG, spec, params, tokens, mask).hidden[:, shift : shift + 70]
    np.testing.assert_allclose(padded, alone, atol=1e-4)


@pytest.mark.parametrize("storage", [*slow("int4"), "k2v2"])
def test_the_gradient_passes_storage_unchanged(storage: str) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 2, 40, 8))
    weights = jax.random.normal(jax.random.key(1), (2, *x.shape))
    real = jnp.ones((1, 40), bool)

    def read(x: jax.Array) -> jax.Array:
        _, keys, values = cache.remember(None, x, x, storage, jnp.int32(0), real)
        return (weights[0] * keys.old + weights[1] * values.recent).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(read))(x), weights[0] + weights[1], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int4", "k3v4"])
@pytest.mark.parametrize("capacity", [20, 64, 70, 130])
def test_bytes_of_allocated_arrays_equal_the_formula(capacity: int, storage: str) -> None:
    spec = mixed_spec(storage)
    allocated = cache.empty(spec, 3, capacity)
    assert allocated.nbytes == cache.cache_bytes(spec, 3, capacity)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(allocated.layers)) == allocated.nbytes
    assert cache.extend(cache.empty(spec, 3, 20), capacity).nbytes == allocated.nbytes
    assert cache.measured_bytes_per_token(spec) == pytest.approx(cache.bytes_per_token(spec), rel=1e-12)


def test_bytes_by_hand() -> None:
    spec = mixed_spec()
    # By hand. Dense: 3 heads of 8: keys 4 bytes and a byte of scales, values 4 and a scale and a lowest value of their
    # own; the qk layer: an int8 key of 7 and value of 35 with scales, then one int4 key (7 * 20 / 32) and two values
    # of 35: 18 bytes, two groups.
    assert cache.bytes_per_token(spec) == 3 * (5 + 8) + (9 + 37) + 7 * 20 / 32 + 2 * (18 + 8)
    assert cache.bytes_per_sequence(spec) == 2 * BLOCK * (3 * 16 + 7 + 2 * 35)


def test_bytes_per_token_of_opt_125m() -> None:
    """12 layers of 12 heads of 64: five bits a number, of them one for scales and lowest values."""
    spec = Spec.dense(12, 12, 64, "int4")
    assert cache.bytes_per_token(spec) == 12 * 12 * 2 * 64 * 5 // 8
    assert isinstance(cache.bytes_per_token(spec), int)
    assert cache.bytes_per_sequence(spec) == 12 * 12 * 2 * 64 * 2 * 32


def test_bytes_of_few_bits_by_hand() -> None:
    """SmolLM2-135M: 30 layers of 3 heads of 64, 23,040 bytes a token in bfloat16; 4 first tokens and a block of 64."""
    spec = Spec.dense(30, 3, 64, "k4v3")
    assert cache.bytes_per_token(spec) == 30 * 3 * 64 * (4.375 + 3.25) / 8
    assert cache.bytes_per_sequence(spec) == 23040 * (64 + 4)
