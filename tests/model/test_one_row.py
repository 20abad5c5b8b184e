"""Decoding over caches of blocks as they are stored: the token's store, and the CPU's kernel against the plain path."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model import one_row
from chai_jax.model.attention import attend, attend_one
from chai_jax.model.block_store import BlockStore, append_blocks, empty_blocks
from chai_jax.model.execution import Execution
from chai_jax.model.kernels import cpu, decode_cpu
from chai_jax.model.one_row import OneRow, append_row
from chai_jax.model.params import fold_projections, init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import BASIS, BLOCKS
from chai_jax.plans.spec import Group, LayerSpec, Spec
from chai_jax.serve import decode as serve

CONFIG = Architecture(64, 32, 2, 4, 64, 64, 160)
Read = tuple[OneRow, OneRow]


def hidden(columns: int, start: int, *rows: Any) -> jax.Array:
    """Which columns hold tokens when each sequence's are written: all before them, but for those of its padding."""
    real = np.zeros((len(rows), columns), bool)
    for row, own, without in zip(real, starts(start, len(rows)), rows, strict=True):
        row[: own + 1] = True
        row[list(without)] = False
    return jnp.asarray(real)


def starts(start: int, count: int) -> np.ndarray:
    """The column that each sequence writes: of the first `start`, of each further one 23 before."""
    return np.maximum(start - 23 * np.arange(count), 0).astype(np.int32)


def stored(storage: str, heads: tuple[int, int], ranks: tuple[int, int], start: int, real: jax.Array) -> Read:
    """Keys and values of all columns up to `start`, as its row reads them."""
    format, random = BLOCKS[storage], np.random.default_rng(start)

    def store(count: int, rank: int, side: Any) -> OneRow:
        # A mean, so that a column that is left out does not average out.
        x = jnp.asarray(1 + random.standard_normal((len(real), count, start + 1, rank)), jnp.float32)
        empty = empty_blocks(len(real), count, real.shape[1], rank, format, side)
        after, _ = jax.jit(append_blocks)(empty, x, jnp.int32(0), real)
        return OneRow(after, jnp.asarray(starts(start, len(real))), real)

    keys, values = (store(*each) for each in zip(heads, ranks, (format.keys, format.values), strict=True))
    return keys, values


def slow(*values: object) -> list[object]:
    return [pytest.param(*each, marks=pytest.mark.slow) for each in values]  # type: ignore[misc]


# Heads of keys and values for each, queries, ranks, columns, the column that is written, padding of each sequence: on
# the left, past a block, in between, of first tokens; none at all to read; less than a block; a block just begun and
# just whole; columns behind the last block.
USUAL = (2, 1, 1, (64, 64), 256, 200, [(), range(70), range(3, 9), range(201)])
BORDERS = [
    (1, 1, 1, (16, 16), 192, start, [(), range(start // 2), (0, 2, 63, 64, 65)]) for start in (20, 63, 64, 127, 128)
]
CASES = [
    USUAL,
    (1, 2, 5, (5, 35), 100, 90, [(), range(61), (0, 64)]),
    *slow((2, 2, 3, (40, 24), 200, 191, [(), range(62), (0, 5, 64, 128)])),
    *slow((1, 3, 4, (7, 8), 40, 20, [(), range(5)]), (1, 1, 2, (128, 80), 130, 129, [(), range(128)])),
    *slow(*BORDERS),
]


@pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler")
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("storage", ["k3v2", "int4", *slow(*((name,) for name in BLOCKS if name not in BASIS))])
@pytest.mark.parametrize(("clusters", "values", "queries", "ranks", "columns", "start", "padding"), CASES)
def test_the_kernel_of_cpus_equals_attention_over_what_is_expanded(
    storage: str, clusters: int, values: int, queries: int, ranks: Any, columns: int, start: int, padding: Any
) -> None:
    real = hidden(columns, start, *padding)
    key, value = stored(storage, (clusters, clusters * values), ranks, start, real)
    assert decode_cpu.takes(key, value)
    query = jax.random.normal(jax.random.key(0), (len(real), clusters, queries, 1, ranks[0]))
    rest: dict[str, Any] = {"scale": ranks[0] ** -0.5, "value_heads": values}
    expected = jax.jit(partial(attend, **rest))(query, key, value, real[:, None])[0]
    run = jax.jit(partial(attend_one, **rest, kernels="native"))
    assert "chai_jax_attention_" in str(run.trace(query, key, value, real[:, None]).jaxpr)
    found = run(query, key, value, real[:, None])
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler")
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("storage", ["k4v3", "int4"])
def test_a_window_hides_first_tokens_and_blocks_that_it_leaves_are_not_read(storage: str) -> None:
    real = hidden(256, 200, (), range(20))
    allowed = real[:, None] & (jnp.arange(256) > 140)
    keys, values = stored(storage, (1, 1), (16, 16), 200, real)
    query = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    rest: dict[str, Any] = {"scale": 0.25, "value_heads": 1}
    expected = jax.jit(partial(attend, **rest))(query, keys, values, allowed)[0]

    def spoiled(x: OneRow) -> OneRow:
        unread = 140 // x.store.recent.shape[2]
        leaves = jax.tree.map(lambda leaf: leaf.at[:, :, :unread].set(77), x.store.blocks)
        store = dataclasses.replace(x.store, blocks=leaves)
        return dataclasses.replace(x, store=store)

    run = jax.jit(partial(attend_one, **rest, kernels="native"))
    found = run(query, keys, values, allowed)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(run(query, spoiled(keys), spoiled(values), allowed), found)


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize(("storage", "side"), [("k3v3", "keys"), *slow(("k2v4", "values"), ("int4", "keys"))])
def test_a_token_is_stored_as_several_are(
    storage: str, side: str, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every column of three blocks, the last one cut off; the first tokens come late, and one sequence has gaps."""
    format, columns = BLOCKS[storage], 2 * BLOCKS[storage].block + 9
    gaps = (), range(format.block - 2), (0, 3, 5, format.block)
    real = jnp.asarray([~np.isin(np.arange(columns), list(gap)) for gap in gaps])
    x = jax.random.normal(jax.random.key(0), (3, 2, columns, 5))
    one = several = empty_blocks(3, 2, columns, 5, format, getattr(format, side))
    append = jax.jit(append_blocks)
    if not loops:  # as on accelerators
        monkeypatch.setattr(one_row, "_one_by_one", one_row._all_at_once)
    append_one = jax.jit(partial(append_row))
    for start in range(columns):
        given = x[:, :, start : start + 1], jnp.full(3, start, jnp.int32), real & (jnp.arange(columns) <= start)
        several, read = append(several, *given)
        one = append_one(one, *given)
        used = slice(start % format.block + 1)
        parts = (dataclasses.replace(each, recent=each.recent[:, :, used]) for each in (one, several))
        for mine, expected in zip(*map(jax.tree.leaves, parts), strict=True):
            np.testing.assert_array_equal(mine, expected)
        if start % 29 == 0 or start == columns - 1:
            expanded = OneRow(one, *given[1:]).expanded(jnp.float32)
            seen = slice(start + 1)  # behind it stands what the block before has left
            np.testing.assert_array_equal(expanded[:, :, seen], read.recent[:, :, seen])


@pytest.mark.parametrize(
    "kernels", ["xla", pytest.param("native", marks=pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler"))]
)
@pytest.mark.parametrize("storage", ["k3v3", *slow(("int4",), ("k4v2",))])
def test_sequences_of_other_lengths_are_stored_and_read_as_alone(
    storage: str, kernels: str, request: pytest.FixtureRequest
) -> None:
    """Four of which some fill a block at another step than others, one is done and adds nothing."""
    how = request.getfixturevalue("native") if kernels == "native" else None
    format, starts, steps = BLOCKS[storage], np.asarray([3, 60, 121, 62]), 9
    columns, goes_on = 160, np.asarray([True, True, True, False])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, columns, 16)), jnp.float32)
    query = jax.random.normal(jax.random.key(0), (4, 2, 1, 1, 16))
    append = jax.jit(partial(append_row, how=how))
    attends = partial(attend_one, scale=0.25, value_heads=1, kernels=kernels)

    def through(rows: slice) -> tuple[list[np.ndarray], tuple[BlockStore, BlockStore]]:
        """Attention at each step, and the stores after it, of some sequences by themselves."""
        length, mine = jnp.asarray(starts[rows], jnp.int32), x[rows]
        real = jnp.arange(columns) < length[:, None]
        sides, outs = (format.keys, format.values), []
        stores = [empty_blocks(len(mine), 2, columns, 16, format, side) for side in sides]
        stores = [jax.jit(append_blocks)(each, mine, jnp.int32(0), real)[0] for each in stores]
        for _ in range(steps):
            real = real | ((jnp.arange(columns) == length[:, None]) & goes_on[rows, None])
            new = jnp.take_along_axis(mine, length[:, None, None, None], axis=2)
            stores = [append(each, new, length, real) for each in stores]
            keys, values = (OneRow(each, length, real) for each in stores)
            outs.append(np.asarray(jax.jit(attends)(query[rows], keys, values, real[:, None]))[goes_on[rows]])
            length = length + goes_on[rows].astype(np.int32)
        return outs, (stores[0], stores[1])

    together, stores = through(slice(None))
    for row in range(4):
        alone, own = through(slice(row, row + 1))
        if goes_on[row]:
            for one, all_of_them in zip(alone, together, strict=True):
                np.testing.assert_allclose(one[0], all_of_them[row], rtol=0, atol=2e-6)
        for store, mine in zip(stores, own, strict=True):
            jax.tree.map(
                lambda a, b, row=row: np.testing.assert_array_equal(a[row : row + 1], b), store.blocks, mine.blocks
            )
            used = int(starts[row] + steps * goes_on[row]) % format.block
            np.testing.assert_array_equal(store.recent[row, :, :used], mine.recent[0, :, :used])


def completed(spec: Spec, how: Execution, until: int) -> tuple[np.ndarray, Any, Any]:
    """Greedy tokens of two prompts, the program and the state that it uses up."""
    params = fold_projections(init(CONFIG, spec, jax.random.key(0), std=0.3))
    prompts = [np.random.default_rng(0).integers(4, 60, size).tolist() for size in (47, 30)]
    tokens, mask = serve.pad_right(prompts, 1)
    keys, rule = jax.random.split(jax.random.key(0), 2), (serve.Sampling.checked(), jnp.int32(serve.NEVER))
    state = serve.prefill(CONFIG, spec, params, tokens, mask, keys, *rule, capacity=160, how=how)
    shapes = jax.eval_shape(lambda x: x, state)
    program = serve.decode.lower(CONFIG, spec, params, state, jnp.int32(until), *rule, how=how).compile()
    return np.asarray(program(params, state, jnp.int32(until), *rule).tokens), program, shapes


@pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("storage", ["k4v4", *slow(("int4",), ("k3v3",), ("k2v2",))])
def test_decoding_over_blocks_makes_the_same_tokens_in_place(native: Execution, storage: str) -> None:
    """Past two borders of blocks, with clusters of two values; the program holds no second cache, expanded or not."""
    group = Group(clusters=2, queries=1, values=2, storage=storage)
    spec = Spec((LayerSpec("qk", ((0, 1), (2, 3)), (group,), 8, 8),) * 2)
    found, program, state = completed(spec, native, 92)
    expected, plain, _ = completed(spec, native.replace(kernels="xla"), 92)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found[0, 47:139])) > 10
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache.layers))
    assert program.memory_analysis().alias_size_in_bytes >= nbytes
    expanded = "f32[2,2,160,8]", "f32[2,4,160,8]"
    assert any(shape in plain.as_text() for shape in expanded)
    assert not any(shape in program.as_text() for shape in expanded)


@pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler")
def test_a_block_is_quantized_in_a_loop_that_seldom_turns(native: Execution) -> None:
    """XLA would compute it before the loop, at every token, if it did not depend on the loop's counter."""
    spec = Spec.dense(1, 4, 8, "k4v4")
    _, program, _ = completed(spec, native, 3)
    bodies = program.as_text().split("\n\n")
    steps = [body for body in bodies if 'custom_call_target="chai_jax_attention_few_bits"' in body]
    assert steps
    whole = "f32[1,4,1,64,8]"  # a block of one sequence in float32, as it is quantized
    assert any(f"= {whole}" in body for body in bodies)
    assert not any(f"= {whole}" in body for body in steps)


REFUSED = (ValueError, jax.errors.JaxRuntimeError)


@pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler")
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("storage", slow(("k4v3",), ("int4",)))
def test_what_does_not_fit_is_refused(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array with a size that is another than the rest asks for, before anything is read."""
    real = hidden(130, 100, (), range(3))
    keys, values = stored(storage, (2, 2), (8, 8), 100, real)
    given: list[Any] = []

    def called(name: str, result: Any) -> Callable[..., Any]:
        return lambda *arrays: given.append((name, result, arrays)) or jnp.zeros(result.shape, result.dtype)

    with monkeypatch.context() as patched:
        patched.setattr(jax.ffi, "ffi_call", called)
        decode_cpu.attend_on_cpu(jnp.zeros((2, 2, 1, 8)), keys, values, real, 1)
    ((name, result, arrays),) = given
    arrays = [jnp.asarray(x) for x in arrays]
    run = jax.ffi.ffi_call(name, result)
    assert np.isfinite(np.asarray(run(*arrays))).all()
    for number, array in enumerate(arrays):
        for axis, size in enumerate(array.shape):
            shape = (*array.shape[:axis], size + 64, *array.shape[axis + 1 :])
            wrong = [*arrays[:number], jnp.zeros(shape, array.dtype), *arrays[number + 1 :]]
            with pytest.raises(REFUSED, match="INVALID_ARGUMENT"):
                np.asarray(run(*wrong))
    for start in (-1, 130):
        with pytest.raises(REFUSED, match="a start within the columns"):
            np.asarray(run(*arrays[:3], jnp.int32(start), *arrays[4:]))
