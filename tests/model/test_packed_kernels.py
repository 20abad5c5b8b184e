"""The kernels of TPUs and GPUs over blocks of few bits, interpreted on the CPU, against attention to what is expanded.

Where the tests run on one of these (see tests/conftest.py), it is its own kernel, compiled.
"""

import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model.attention import attend, attend_one
from chai_jax.model.block_store import append_blocks, empty_blocks
from chai_jax.model.few_bits import SCALES, _pack, all_levels
from chai_jax.model.kernels import packed, packed_gpu, packed_tpu
from chai_jax.model.kernels.decode import decode_attention
from chai_jax.model.one_row import OneRow
from chai_jax.plans.formats import BASIS, BLOCKS, Side

INTERPRETED = os.environ["JAX_PLATFORMS"] == "cpu"
PLATFORMS = ["tpu", "cuda"] if INTERPRETED else [os.environ["JAX_PLATFORMS"]]
# As of the other kernels (test_decode_kernel.py), and what is expanded is rounded to bfloat16 before it is multiplied.
BOUNDS = {"float32": 3e-6 if INTERPRETED else 2e-5, "bfloat16": 2.0**-6}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in several steps of a TPU, the last one not full, cluster by cluster; on GPUs in several parts."""
    monkeypatch.setattr(packed_tpu, "BLOCKS", {"few": 2, "int4": 2})
    monkeypatch.setattr(packed_tpu, "ROWS", 1)
    monkeypatch.setattr(packed_gpu, "PROGRAMS", 12)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packed_gpu.UNTRIED, "1")


def inputs(
    storage: str,
    clusters: int,
    values: int,
    queries: int,
    ranks: tuple[int, int],
    columns: int,
    start: int,
    *hidden: Any,
) -> tuple[jax.Array, OneRow, OneRow, jax.Array]:
    """Query, keys, values and which columns hold tokens: of the first sequence all up to `start`, of each further one
    23 fewer, but those hidden of each."""
    format, random = BLOCKS[storage], np.random.default_rng(start)
    real = np.zeros((len(hidden), columns), bool)
    starts = np.maximum(start - 23 * np.arange(len(hidden)), 0).astype(np.int32)
    for row, own, without in zip(real, starts, hidden, strict=True):
        row[: own + 1] = True
        row[list(without)] = False
    real = jnp.asarray(real)

    def stored(heads: int, rank: int, side: Any) -> OneRow:
        # A mean, so that a column that is left out does not average out.
        x = jnp.asarray(1 + random.standard_normal((len(hidden), heads, start + 1, rank)), jnp.float32)
        after, _ = jax.jit(append_blocks)(
            empty_blocks(len(hidden), heads, columns, rank, format, side), x, jnp.int32(0), real
        )
        return OneRow(after, jnp.asarray(starts), real)

    query = jnp.asarray(random.standard_normal((len(hidden), clusters, queries, 1, ranks[0])), jnp.float32)
    keys, value = stored(clusters, ranks[0], format.keys), stored(clusters * values, ranks[1], format.values)
    return query, keys, value, real[:, None]


def slow(*values: object) -> list[Any]:
    return [pytest.param(*each, marks=pytest.mark.slow) for each in values]  # type: ignore[misc]


# Clusters, values and queries of each, ranks, columns, the one that is written, what is hidden of each sequence: on the
# left, past a block, in between, of first tokens; all of it.
USUAL = (2, 1, 1, (64, 64), 256, 200, (), range(70), range(3, 9), range(201))
ODD = (2, 3, 5, (5, 35), 230, 220, (), range(61), (0, 64))
CASES = [
    ("k3v2", "float32", *ODD),
    ("k4v4", "bfloat16", *USUAL),
    *slow(*((name, "float32", *USUAL) for name in BLOCKS if name not in BASIS)),
    *slow(*((name, "float32", *ODD) for name in ("int4", "k4v4", "k2v3"))),
    *slow(*(("k2v4", "float32", 1, 1, 1, (16, 16), 192, at, (), range(at // 2), (0, 2, 63)) for at in (64, 127, 128))),
    *slow(("int4", "bfloat16", *USUAL), ("k4v3", "float32", 1, 2, 1, (128, 80), 130, 129, (), range(128))),
]


def case(value: Any) -> Any:
    """A parameter with all that `inputs` takes in one."""
    of = getattr(value, "values", value)
    return pytest.param(of[1], (of[0], *of[2:]), marks=getattr(value, "marks", ()), id=f"{of[0]}-{of[1]}-{of[7]}")


def assert_equal(platform: str, dtype: str, given: Any, rest: dict[str, Any]) -> jax.Array:
    query, *stored = given
    given = query.astype(dtype), *stored
    expected = jax.jit(partial(attend, **rest))(*given)[0]
    run = jax.jit(partial(decode_attention, **rest, platform=platform, interpret=INTERPRETED))
    found = run(*given)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    expected, compared = (np.asarray(x, np.float32) for x in (expected, found))
    np.testing.assert_allclose(compared, expected, rtol=0, atol=BOUNDS[dtype] * np.abs(expected).max())
    return found


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("dtype", "shape"), [case(each) for each in CASES])
def test_the_kernel_equals_attention_over_what_is_expanded(platform: str, dtype: str, shape: Any) -> None:
    """Heads in one order: of each cluster the values, of each value the queries."""
    _, _, values, _, ranks, *_ = shape
    assert_equal(platform, dtype, inputs(*shape), {"scale": ranks[0] ** -0.5, "value_heads": values})


@pytest.mark.parametrize(
    ("platform", "storage"),
    [
        *((platform, "k4v3") for platform in PLATFORMS if platform == "cuda"),
        *slow(*((platform, storage) for platform in PLATFORMS for storage in ("k4v2", "int4"))),
    ],
)
def test_a_window_hides_first_tokens_and_what_is_not_read_may_be_anything(platform: str, storage: str) -> None:
    """Scores that differ by hundreds, so that the highest comes late. A GPU does not read the blocks before the window;
    a TPU's weights for them are 0."""
    query, keys, values, real = inputs(storage, 1, 1, 1, (16, 16), 256, 200, (), range(20))
    allowed = real & (jnp.arange(256) > 140)
    rest = {"scale": 30.0, "value_heads": 1}
    found = assert_equal(platform, "float32", (query, keys, values, allowed), rest)

    def spoiled(x: OneRow) -> OneRow:
        unread = 140 // x.store.recent.shape[2]
        leaves = jax.tree.map(lambda leaf: leaf.at[:, :, :unread].set(77), x.store.blocks)
        return dataclasses.replace(x, store=dataclasses.replace(x.store, blocks=leaves))

    run = jax.jit(partial(decode_attention, **rest, platform=platform, interpret=INTERPRETED))
    np.testing.assert_array_equal(run(query, spoiled(keys), spoiled(values), allowed), found)


@pytest.mark.skipif("cuda" not in PLATFORMS, reason="a GPU's kernel")
@pytest.mark.parametrize("storage", ["k3v4", *slow(("int4",), ("k2v2",))])
def test_the_gpu_kernel_is_lowered_to_triton(storage: str) -> None:
    """Shapes and types that Triton accepts; ranks, queries and heads are no powers of 2."""
    given = inputs(storage, 2, 3, 5, (24, 40), 200, 190, ())
    run = jax.jit(partial(attend_one, scale=0.2, value_heads=3, kernels="pallas"))
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        text = run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1


def taken(storage: str, columns: int = 128, batch: int = 1, queries: int = 1, values: int = 1, rank: int = 64) -> Any:
    """Which kernels take such a cache: "tpu", "cuda"."""
    format = BLOCKS[storage]

    def stores() -> Any:
        real = jnp.zeros((batch, columns), bool)
        both = (
            empty_blocks(batch, heads, columns, rank, format, side)
            for heads, side in ((6, format.keys), (6 * values, format.values))
        )
        return jnp.zeros((1, 6, queries, 1, rank)), *(OneRow(store, jnp.zeros(1, jnp.int32), real) for store in both)

    found: list[set[str]] = []

    def look(query: Any, keys: Any, value: Any) -> None:
        takes = {"tpu": packed.kind(keys, value), "cuda": packed_gpu.takes(query, keys, value, values)}
        found.append({name for name, yes in takes.items() if yes})

    jax.eval_shape(look, *jax.eval_shape(stores))
    return found[0]


def test_a_gpu_takes_none_unless_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has run on no GPU yet."""
    monkeypatch.delenv(packed_gpu.UNTRIED)
    assert taken("k4v4") == {"tpu"}


def test_what_kernels_take() -> None:
    both = {"tpu", "cuda"}
    assert all(taken(name) == both for name in BLOCKS if name not in BASIS)
    assert taken("k4v4") == taken("int4") == taken("k2v3", queries=16, values=8) == both
    assert taken("k4v4", columns=63) == taken("int4", columns=31) == set()  # no whole block
    # Sums beyond a program's registers; arrays that Pallas would count wrongly, of 2^31 bytes and more.
    assert taken("k4v4", values=9) == taken("k4v4", queries=17, values=8) == taken("int4", rank=512) == {"tpu"}
    assert taken("k4v4", 2048, 5461) == both
    assert taken("k4v4", 2048, 5462) == taken("k4v4", 2048, 10922) == {"tpu"}
    assert taken("k4v4", 2048, 10923) == both


def test_levels_and_scales_are_those_that_are_stored() -> None:
    for bits in (2, 3, 4):
        found = packed.level_of(jnp.arange(2**bits, dtype=jnp.int32), bits)
        np.testing.assert_array_equal(found, np.asarray(all_levels(bits), np.float32))
    np.testing.assert_allclose(packed.scale_of(jnp.arange(256, dtype=jnp.int32)), SCALES, rtol=2e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_both_kernels_unpack_what_was_packed(bits: int) -> None:
    """Every number in every place of a byte."""
    numbers = np.random.default_rng(0).integers(0, 2**bits, (64, 8), np.uint8)
    planes = _pack(jnp.asarray(numbers), Side(bits, "token", -1)).astype(jnp.int32)  # [bits, 8, R]
    np.testing.assert_array_equal(jnp.concatenate(packed_tpu.unpacked(list(planes))), numbers)
    column = jnp.arange(64, dtype=jnp.int32)[:, None]

    def byte(plane: jax.Array, where: jax.Array | bool) -> jax.Array:
        return jnp.where(where, planes[plane, column & 7, jnp.arange(8)], 0)

    np.testing.assert_array_equal(packed_gpu._numbers(byte, column, bits), numbers)
