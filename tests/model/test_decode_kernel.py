"""The decode kernel of TPUs and of GPUs, interpreted on the CPU, against attention as XLA computes it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.model.attention import attend, attend_one
from chai_jax.model.cache import store
from chai_jax.model.kernels import check, chosen, decode, using
from chai_jax.model.kernels.decode import decode_attention
from chai_jax.model.opt import forward
from chai_jax.model.params import OPTConfig, init
from chai_jax.spec import Spec

BATCH, COLUMNS, KEY_RANK, VALUE_RANK = 3, 200, 24, 16
PLATFORMS = ["tpu", "cuda"]
# The sums of float32 differ in their order alone. bfloat16 rounds each weight to 1 in 2^9: before the softmax divides
# here, after it there; and so does the output.
BOUNDS = {"float32": 2e-6, "bfloat16": 2.0**-7}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in several blocks, the last one not full, and on GPUs in several parts of more than one block."""
    monkeypatch.setattr(decode, "TPU_BLOCK_BYTES", 1)  # 128 columns, the least
    monkeypatch.setattr(decode, "GPU_PROGRAMS", 2 * BATCH * 3)


def inputs(dtype: str, storage: str, clusters: int, queries: int, value_heads: int) -> tuple[jax.Array, ...]:
    """Query, keys, values and mask: padding on the left, columns not yet used, and a row that is all padding."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        # A mean, so that a column that is read wrongly does not average out.
        return jnp.asarray(1 + 2 * random.standard_normal(shape), jnp.float32)

    allowed = np.zeros((BATCH, 1, COLUMNS), bool)
    allowed[0, :, 5:190], allowed[1, :, 140:], allowed[2] = True, True, False
    query = normal(BATCH, clusters, queries, 1, KEY_RANK).astype(dtype)
    keys = store(normal(BATCH, clusters, COLUMNS, KEY_RANK), storage)
    values = store(normal(BATCH, clusters * value_heads, COLUMNS, VALUE_RANK), storage)
    return query, keys, values, jnp.asarray(allowed)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("dtype", "storage", "clusters", "queries", "value_heads"),
    [
        ("float32", "float32", 3, 2, 1),
        ("float32", "int8", 3, 1, 3),
        ("bfloat16", "bfloat16", 3, 1, 3),
        ("bfloat16", "int8", 3, 2, 1),
    ],
)
def test_the_kernel_equals_attention(
    platform: str, dtype: str, storage: str, clusters: int, queries: int, value_heads: int
) -> None:
    given = inputs(dtype, storage, clusters, queries, value_heads)
    rest = {"scale": 0.2, "value_heads": value_heads}
    expected = jax.jit(partial(attend, **rest))(*given)[0]
    found = jax.jit(partial(decode_attention, **rest, platform=platform, interpret=True))(*given)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    expected, found = (np.asarray(x, np.float32) for x in (expected, found))
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUNDS[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_softmax_so_far_is_rescaled_when_a_later_block_has_the_highest_score(platform: str) -> None:
    """Scores that climb by hundreds: a sum that is not rescaled overflows, or keeps what has no weight left."""
    query, keys, values, allowed = inputs("float32", "float32", 1, 1, 1)
    climb = jnp.linspace(-300.0, 300.0, COLUMNS)[:, None]
    given = jnp.ones_like(query), jnp.broadcast_to(climb, keys.shape), values, allowed
    rest = {"scale": 1.0, "value_heads": 1}
    expected = jax.jit(partial(attend, **rest))(*given)[0]
    found = jax.jit(partial(decode_attention, **rest, platform=platform, interpret=True))(*given)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_heads_that_fill_the_lanes_lie_as_they_are() -> None:
    """Of a rank of 128 a TPU's cache is not turned, and neither does the kernel turn it."""
    random = np.random.default_rng(1)
    query, keys, values = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((1, 2, 1, 1, 128), (1, 2, COLUMNS, 128), (1, 2, COLUMNS, 128))
    )
    allowed = jnp.asarray(random.random((1, 1, COLUMNS)) < 0.5)
    run = partial(decode_attention, scale=0.1, value_heads=1, platform="tpu", interpret=True)
    expected = jax.jit(partial(attend, scale=0.1, value_heads=1))(query, keys, values, allowed)[0]
    np.testing.assert_allclose(jax.jit(run)(query, keys, values, allowed), expected, rtol=0, atol=2e-6)
    assert "transpose[" not in str(jax.make_jaxpr(run)(query, keys, values, allowed))


@pytest.mark.parametrize(
    ("dtype", "storage", "queries", "value_heads"),
    [
        ("float32", "float32", 1, 1),
        ("bfloat16", "bfloat16", 5, 1),
        ("bfloat16", "int8", 1, 3),
        ("float32", "int8", 5, 1),
    ],
)
def test_the_gpu_kernel_is_lowered_to_triton(dtype: str, storage: str, queries: int, value_heads: int) -> None:
    """Shapes and types that Triton accepts; ranks and queries here are no powers of 2."""
    given = inputs(dtype, storage, 3, queries, value_heads)
    run = jax.jit(partial(attend_one, scale=0.2, value_heads=value_heads))
    assert "xla.gpu.triton" in run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()


CONFIG = OPTConfig(32, 16, 1, 2, 32, 32, 16)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_program_has_the_kernel_where_it_is_asked_for(storage: str) -> None:
    """One row with a past, and no int4; and jit does not take one kind of program for the other."""
    spec = Spec.dense(1, 2, 8, storage)
    params, mask = init(CONFIG, spec, jax.random.key(0)), jnp.ones((1, 32), bool)
    cache = jax.eval_shape(partial(forward, CONFIG, spec), params, mask.astype(jnp.int32), mask).cache

    @jax.jit
    def run(tokens, cache):  # type: ignore[no-untyped-def]
        output = forward(CONFIG, spec, params, tokens, jnp.ones(tokens.shape, bool), cache=cache)
        return output.hidden

    def kernels_of(rows: int) -> int:
        return str(run.trace(jax.ShapeDtypeStruct((1, rows), jnp.int32), cache).jaxpr).count("pallas_call")

    assert kernels_of(1) == 0
    with using("pallas"):
        assert chosen()
        assert kernels_of(2) == 0
        assert kernels_of(1) == (2 if storage == "int8" else 0)  # of either platform
    assert kernels_of(1) == 0


def test_a_decoded_token_is_the_same_where_there_is_no_kernel() -> None:
    """Programs of CPUs keep to XLA, whatever is asked for."""
    given = inputs("float32", "int8", 3, 1, 3)
    expected = jax.jit(partial(attend, scale=0.2, value_heads=3))(*given)[0]
    np.testing.assert_array_equal(jax.jit(partial(attend_one, scale=0.2, value_heads=3))(*given), expected)


class Device:
    def __init__(self, platform: str, kind: str) -> None:
        self.platform, self.device_kind = platform, kind


def test_devices_without_a_kernel_are_refused() -> None:
    check("xla", jax.devices())
    check("pallas", [Device("tpu", "TPU v5 lite")])
    check("pallas", [Device("gpu", "NVIDIA L4")])
    for device in (jax.devices()[0], Device("tpu", "TPU v3"), Device("tpu", "TPU v2")):
        with pytest.raises(InputError, match=f"no kernel for {device.device_kind}; expected xla, or one NVIDIA GPU"):
            check("pallas", [device])
    with pytest.raises(InputError, match="for one device, not for 4"):
        check("pallas", [Device("tpu", "TPU v5 lite")] * 4)
