"""The kernels that read prompts, against attention as XLA computes it: TPUs' interpreted on the CPU; GPUs' on one."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model.attention import attend_in_order, attend_prefill
from chai_jax.model.decoder import forward
from chai_jax.model.execution import Execution
from chai_jax.model.kernels import prefill_gpu, prefill_tpu
from chai_jax.model.kernels.prefill_tpu import prefill_on_tpu
from chai_jax.model.layerwise import seen_through
from chai_jax.model.params import init
from chai_jax.model.sharding import one_device
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

BATCH, KEY_RANK, VALUE_RANK = 2, 24, 16
# As in test_decode_kernel: the order of sums, and the rounding of weights and of the output.
BOUNDS = {"float32": 2e-6, "bfloat16": 2.0**-7}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of columns."""
    monkeypatch.setattr(prefill_tpu, "LARGEST_BLOCK", 128)


def inputs(dtype: str, length: int, clusters: int, queries: int, value_heads: int) -> tuple[jax.Array, ...]:
    """Query, keys, values and what each row may read: a sequence padded on the left, one on the right."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        # A mean, so that a column that is read wrongly does not average out.
        return jnp.asarray(1 + 2 * random.standard_normal(shape), dtype)

    query = normal(BATCH, clusters, queries, length, KEY_RANK)
    keys, values = (normal(BATCH, heads, length, rank) for heads, rank in heads_of(clusters, value_heads))
    real = np.ones((BATCH, length), bool)
    real[0, :150], real[1, -20:] = False, False
    return query, keys, values, jnp.asarray(np.tril(np.ones((length, length), bool)) & real[:, None])


def heads_of(clusters: int, value_heads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (clusters, KEY_RANK), (clusters * value_heads, VALUE_RANK)


def assert_equal_where_read(found: jax.Array, expected: jax.Array) -> None:
    """At the rows of `inputs` that are real; those of padding hold something finite."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    bound = BOUNDS[found.dtype.name] * np.abs(np.asarray(expected, np.float32)).max()
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert np.isfinite(found).all()
    for row, real in enumerate((slice(150, None), slice(0, -20))):
        np.testing.assert_allclose(found[row, :, real], expected[row, :, real], rtol=0, atol=bound)


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interpreted on CPUs")


@on_cpu
@pytest.mark.parametrize(
    ("dtype", "length", "clusters", "queries", "value_heads"),
    [
        ("float32", 300, 3, 2, 1),
        ("float32", 256, 2, 1, 3),
        ("float32", 256, 2, 3, 2),
        ("bfloat16", 300, 2, 1, 3),
        ("bfloat16", 256, 3, 2, 1),
    ],
)
def test_the_kernel_equals_attention(dtype: str, length: int, clusters: int, queries: int, value_heads: int) -> None:
    """At the rows that are read; those of padding hold something finite."""
    given = inputs(dtype, length, clusters, queries, value_heads)
    rest = {"scale": 0.2, "value_heads": value_heads}
    expected = jax.jit(partial(attend_in_order, **rest))(*given)[0]
    found = jax.jit(partial(prefill_on_tpu, **rest, interpret=True))(*given)
    assert_equal_where_read(found, expected)


@pytest.mark.parametrize(
    ("columns", "blocks"),
    [(128, (128, 128)), (640, (640, 128)), (896, (896, 128)), (1536, (768, 384)), (2048, (512, 512))],
)
def test_blocks_divide_the_columns(monkeypatch: pytest.MonkeyPatch, columns: int, blocks: tuple[int, int]) -> None:
    monkeypatch.undo()
    sizes = prefill_tpu._blocks(columns)
    assert (sizes.block_q, sizes.block_kv, sizes.block_kv_compute) == (blocks[0], *blocks)


CONFIG = Architecture(32, 16, 2, 2, 32, 512, 16)
PALLAS = Execution(np.dtype("float32"), one_device(), "pallas")  # of programs that are not run


@on_cpu
def test_prompts_have_the_kernel_where_it_is_asked_for() -> None:
    """Long ones without branches, in all layers but the last one, which attends for what is wanted alone."""
    spec = Spec.dense(2, 2, 8, "int8")
    params = init(CONFIG, spec, jax.random.key(0))

    def kernels_of(columns: int, how: Execution = PALLAS, **rest: Any) -> int:
        tokens = jax.ShapeDtypeStruct((1, columns), jnp.int32)

        def run(tokens: jax.Array) -> jax.Array:
            mask = jnp.ones(tokens.shape, bool)
            return forward(CONFIG, spec, params, tokens, mask, how, **rest).hidden

        # Where a program has something of its own for TPUs alone.
        return str(jax.jit(run).trace(tokens).jaxpr).count("platform_index[platforms=(('tpu',), None)]")

    newest = jnp.full((1, 1), 255, jnp.int32)
    assert kernels_of(256, PALLAS.replace(kernels="xla")) == 0
    assert kernels_of(255) == 0
    assert kernels_of(256) == 2
    assert kernels_of(256, wanted=newest) == 1
    assert kernels_of(256, branch=jnp.zeros((1, 256), jnp.int32)) == 0


@on_cpu
@pytest.mark.parametrize(("window", "taken"), [(0, True), (256, True), (255, False)])
def test_windows_that_hide_something_are_left_to_xla(window: int, taken: bool) -> None:
    """Kernels read every real column up to a row's own."""
    config = dataclasses.replace(CONFIG, num_layers=1, windows=(window,))
    params, mask = init(config, Spec.of(config), jax.random.key(0)), jnp.ones((1, 256), bool)
    run = jax.jit(partial(forward, config, Spec.of(config), params, how=PALLAS))
    assert ("platform_index" in str(run.trace(mask.astype(jnp.int32), mask).jaxpr)) == taken


def test_a_prompt_is_read_alike_where_there_is_no_kernel() -> None:
    """Programs of CPUs keep to XLA, whatever is asked for."""
    given = inputs("float32", 256, 2, 1, 3)
    rest = {"scale": 0.2, "value_heads": 3}
    expected = jax.jit(partial(attend_in_order, **rest))(*given)[0]
    np.testing.assert_array_equal(jax.jit(partial(attend_prefill, **rest))(*given), expected)


@pytest.mark.parametrize(
    ("clusters", "queries", "value_heads"), [(3, 1, 1), (2, 1, 3), (3, 2, 1), (1, 4, 1), (2, 3, 2)]
)
@pytest.mark.parametrize("length", [256, 300])
def test_cudnn_equals_attention(
    length: int, clusters: int, queries: int, value_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the rows that are read, with padding on either side; the others hold something finite.

    Where there is no NVIDIA GPU, XLA does what cuDNN is asked for.
    """
    dtype, kernel = "bfloat16", attend_prefill
    if jax.default_backend() != "gpu":
        dtype, kernel = "float32", prefill_gpu.prefill_on_gpu
        monkeypatch.setattr(prefill_gpu, "_cudnn", partial(prefill_gpu._cudnn, implementation="xla"))
    query, keys, values, allowed = inputs(dtype, length, clusters, queries, value_heads)
    values = jnp.tile(values, (1, 1, 1, 2))[..., :KEY_RANK]
    rest = {"scale": 0.2, "value_heads": value_heads}
    assert dtype == "float32" or prefill_gpu.takes(query, keys, values)
    expected = jax.jit(partial(attend_in_order, **rest))(query, keys, values, allowed)[0]
    found = jax.jit(partial(kernel, **rest))(query, keys, values, allowed)
    assert_equal_where_read(found, expected)


@pytest.mark.parametrize(
    ("dtype", "length", "rank", "value_rank", "there", "taken"),
    [
        ("bfloat16", 256, 64, 64, True, True),
        ("float16", 2048, 128, 128, True, True),
        ("bfloat16", 256, 64, 64, False, False),
        ("float32", 256, 64, 64, True, False),
        ("bfloat16", 255, 64, 64, True, False),
        ("bfloat16", 256, 136, 136, True, False),
        ("bfloat16", 256, 60, 60, True, False),
        ("bfloat16", 256, 64, 32, True, False),
    ],
)
def test_what_cudnn_takes(
    dtype: str, length: int, rank: int, value_rank: int, there: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_gpu, "_available", lambda: there)
    query, keys, values = (
        jnp.zeros(shape, dtype) for shape in [(1, 2, 1, length, rank), (1, 2, length, rank), (1, 2, length, value_rank)]
    )
    assert prefill_gpu.takes(query, keys, values) == taken


def test_what_is_looked_at_is_computed_by_xla() -> None:
    """Kernels have no scores to show."""
    spec = Spec.dense(2, 2, 8)
    params, x = init(CONFIG, spec, jax.random.key(0)), jnp.ones((1, 256, 16))
    _, seen = seen_through(CONFIG, spec.layers[0], PALLAS, params["layers"]["0"], x, jnp.ones((1, 256), bool))
    assert seen.scores.shape == seen.probabilities.shape == (1, 2, 256, 256)
