"""The decode kernels of TPUs and GPUs, interpreted on the CPU, and the CPU's own, against attention as XLA computes it.

Where the tests run on one of these (see tests/conftest.py), it is its own kernel, compiled.
"""

import os
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.model.attention import attend, attend_one
from chai_jax.model.cache import store
from chai_jax.model.decoder import forward
from chai_jax.model.execution import Execution
from chai_jax.model.kernels import check, choose_kernels, cpu, decode_gpu, decode_tpu, one_gpu, packed_gpu
from chai_jax.model.kernels.decode import decode_attention
from chai_jax.model.params import init
from chai_jax.model.sharding import one_device
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

BATCH, COLUMNS, KEY_RANK, VALUE_RANK = 3, 200, 24, 16
INTERPRETED = os.environ["JAX_PLATFORMS"] == "cpu"
ACCELERATORS = ["tpu", "cuda"] if INTERPRETED else [os.environ["JAX_PLATFORMS"]]
PLATFORMS = [*ACCELERATORS, *(["cpu"] if INTERPRETED else [])]
# The sums of float32 differ in their order alone, and exponentials of other processors in their last bits. bfloat16
# rounds each weight to 1 in 2^9: before the softmax divides here, after it there; and so does the output.
BOUNDS = {"float32": 2e-6 if INTERPRETED else 1e-5, "bfloat16": 2.0**-7}


KINDS = [("float32", "float32"), ("bfloat16", "int8"), ("float32", "bfloat16")]  # of activations, and of the cache


def need(platform: str) -> None:
    """Skip the test of a CPU's kernel where none can be compiled."""
    if platform == "cpu" and cpu.why_not():
        pytest.skip(cpu.why_not())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in several blocks, the last one not full, and on GPUs in two parts."""
    monkeypatch.setattr(decode_tpu, "TPU_BLOCK_BYTES", 1)  # 128 columns, the least
    monkeypatch.setattr(decode_gpu, "GPU_PROGRAMS", 2 * BATCH * 3)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Accelerators multiply float32 in fewer bits unless they are told."""
    with jax.default_matmul_precision("highest"):
        yield


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


@pytest.mark.parametrize(
    ("platform", "dtype", "storage", "queries", "value_heads"),
    [
        (platform, *case)
        for platform in PLATFORMS
        for case in [
            ("float32", "float32", 1, 1),
            ("float32", "int8", 1, 3),
            ("bfloat16", "bfloat16", 1, 3),
            ("bfloat16", "int8", 1, 1),
            *([(*kinds, 3, values) for kinds in KINDS for values in (1, 2)] if platform != "cuda" else []),
        ]
    ],
)
def test_the_kernel_equals_attention(platform: str, dtype: str, storage: str, queries: int, value_heads: int) -> None:
    """Heads in one order: of each cluster the values, of each value the queries. A GPU's takes no several queries."""
    need(platform)
    given = inputs(dtype, storage, 3, queries, value_heads)
    rest = {"scale": 0.2, "value_heads": value_heads}
    expected = jax.jit(partial(attend, **rest))(*given)[0]
    found = jax.jit(partial(decode_attention, **rest, platform=platform, interpret=INTERPRETED))(*given)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    expected, found = (np.asarray(x, np.float32) for x in (expected, found))
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUNDS[dtype] * np.abs(expected).max())


@pytest.mark.skipif("cuda" not in ACCELERATORS, reason="a GPU's kernel")
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_cache_that_is_not_split_over_programs(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's program that reads all columns of its cluster divides its sums itself."""
    monkeypatch.setattr(decode_gpu, "GPU_PROGRAMS", 1)
    given = inputs("float32", storage, 3, 1, 3)
    rest = {"scale": 0.2, "value_heads": 3}
    expected = jax.jit(partial(attend, **rest))(*given)[0]
    found = jax.jit(partial(decode_attention, **rest, platform="cuda", interpret=INTERPRETED))(*given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUNDS["float32"] * np.abs(expected).max())


@pytest.mark.skipif("cuda" not in ACCELERATORS, reason="a GPU's kernel")
def test_columns_that_no_token_uses_are_not_read() -> None:
    """Blocks of columns before the first that may be read, and behind the last, may hold anything at all."""
    query, keys, values, allowed = inputs("float32", "float32", 3, 1, 2)
    block = decode_gpu.GPU_SUMS // (32 * 2)  # ranks rounded up to powers of 2
    unread = np.ones((BATCH, 1, COLUMNS, 1), bool)
    for row in range(BATCH):
        first, last = np.flatnonzero(allowed[row, 0])[[0, -1]] if allowed[row].any() else (0, COLUMNS - 1)
        unread[row, :, first // block * block : (last // block + 1) * block] = False
    assert unread.any()
    spoiled = (jnp.where(unread, jnp.nan, x) for x in (keys, values))
    run = jax.jit(partial(decode_attention, scale=0.2, value_heads=2, platform="cuda", interpret=INTERPRETED))
    np.testing.assert_array_equal(run(query, *spoiled, allowed), run(query, keys, values, allowed))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_softmax_so_far_is_rescaled_when_a_later_block_has_the_highest_score(platform: str) -> None:
    """Scores that climb by hundreds: a sum that is not rescaled overflows, or keeps what has no weight left."""
    need(platform)
    query, keys, values, allowed = inputs("float32", "float32", 1, 1, 1)
    climb = jnp.linspace(-300.0, 300.0, COLUMNS)[:, None]
    given = jnp.ones_like(query), jnp.broadcast_to(climb, keys.shape), values, allowed
    rest = {"scale": 1.0, "value_heads": 1}
    expected = jax.jit(partial(attend, **rest))(*given)[0]
    found = jax.jit(partial(decode_attention, **rest, platform=platform, interpret=INTERPRETED))(*given)
    np.testing.assert_allclose(found, expected, rtol=BOUNDS["float32"])


@pytest.mark.skipif(not INTERPRETED, reason="a TPU's kernel")
def test_heads_that_fill_the_lanes_lie_as_they_are() -> None:
    """Of a rank of 128 a TPU's cache is not turned, and neither does the kernel turn it."""
    random = np.random.default_rng(1)
    query, keys, values = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((1, 2, 1, 1, 128), (1, 2, COLUMNS, 128), (1, 2, COLUMNS, 128))
    )
    allowed = jnp.asarray(random.random((1, 1, COLUMNS)) < 0.5)
    run = partial(decode_attention, scale=0.1, value_heads=1, platform="tpu", interpret=INTERPRETED)
    expected = jax.jit(partial(attend, scale=0.1, value_heads=1))(query, keys, values, allowed)[0]
    np.testing.assert_allclose(jax.jit(run)(query, keys, values, allowed), expected, rtol=0, atol=2e-6)
    assert "transpose[" not in str(jax.make_jaxpr(run)(query, keys, values, allowed))


def lowered_for_a_gpu(dtype: str, storage: str, queries: int, value_heads: int) -> str:
    given = inputs(dtype, storage, 3, queries, value_heads)
    run = jax.jit(partial(attend_one, scale=0.2, value_heads=value_heads, kernels="pallas"))
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")  # newer jax asks which one
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("dtype", "storage", "value_heads"),
    [("float32", "float32", 1), ("bfloat16", "bfloat16", 2), ("bfloat16", "int8", 3)],
)
def test_the_gpu_kernel_is_lowered_to_triton(dtype: str, storage: str, value_heads: int) -> None:
    """Shapes and types that Triton accepts; ranks and heads are no powers of 2."""
    assert "xla.gpu.triton" in lowered_for_a_gpu(dtype, storage, 1, value_heads)


@pytest.mark.parametrize("values", [1, 2])
def test_gpus_leave_several_queries_to_xla(values: int) -> None:
    """Of one key."""
    assert "xla.gpu.triton" not in lowered_for_a_gpu("float32", "int8", 3, values)


def test_gpus_leave_to_xla_what_is_no_gain() -> None:
    """Sums beyond a program's registers."""
    query, keys, values = jnp.zeros((1, 1, 1, 1, 64)), jnp.zeros((1, 1, 4, 64)), jnp.zeros((1, 8, 4, 64))
    assert decode_gpu.takes(query, keys, values, 8)
    assert not decode_gpu.takes(query, keys, values, 9)
    assert not decode_gpu.takes(query, keys, jnp.zeros((1, 8, 4, 65)), 8)


@pytest.mark.parametrize(("batch", "dtype", "taken"), [
    (2730, "int8", True), (2731, "int8", False), (5461, "int8", False), (5462, "int8", True), (2731, "bfloat16", True),
])  # fmt: skip
def test_gpus_leave_to_xla_what_pallas_would_miscount(batch: int, dtype: str, taken: bool) -> None:
    """Pallas counts by int64 from 4 GiB on: arrays of more than 2^31 entries that are smaller would be read wrongly."""
    shapes = jax.ShapeDtypeStruct((1, 6, 1, 1, 64), "float32"), jax.ShapeDtypeStruct((batch, 6, 2048, 64), dtype)
    found = []
    jax.eval_shape(lambda query, stored: found.append(decode_gpu.takes(query, stored, stored, 1)), *shapes)
    assert found == [taken]


CONFIG = Architecture(32, 16, 1, 2, 32, 32, 16)
XLA = Execution(np.dtype("float32"), one_device(), "xla")


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_program_has_the_kernel_where_it_is_asked_for(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row with a past; and jit does not take one kind of program for the other."""
    monkeypatch.setenv(packed_gpu.UNTRIED, "1")
    spec = Spec.dense(1, 2, 8, storage)
    params, mask = init(CONFIG, spec, jax.random.key(0)), jnp.ones((1, 32), bool)
    cache = jax.eval_shape(partial(forward, CONFIG, spec, how=XLA), params, mask.astype(jnp.int32), mask).cache

    @partial(jax.jit, static_argnums=0)
    def run(how, tokens, cache):  # type: ignore[no-untyped-def]
        output = forward(CONFIG, spec, params, tokens, jnp.ones(tokens.shape, bool), how, cache=cache)
        return output.hidden

    def kernels_of(kernels: str, rows: int) -> int:
        traced = run.trace(XLA.replace(kernels=kernels), jax.ShapeDtypeStruct((1, rows), jnp.int32), cache)
        return str(traced.jaxpr).count("name=decode_attention")

    assert kernels_of("xla", 1) == 0
    assert kernels_of("pallas", 2) == 0
    assert kernels_of("pallas", 1) == 2  # of either platform
    assert kernels_of("xla", 1) == 0


@pytest.mark.skipif(not INTERPRETED, reason="there is a kernel")
def test_a_decoded_token_is_the_same_where_there_is_no_kernel() -> None:
    """Programs of several CPU devices keep to XLA."""
    given = inputs("float32", "int8", 3, 1, 3)
    expected = jax.jit(partial(attend, scale=0.2, value_heads=3))(*given)[0]
    found = jax.jit(partial(attend_one, scale=0.2, value_heads=3, kernels="pallas"))(*given)
    np.testing.assert_array_equal(found, expected)


class Device:
    def __init__(self, platform: str, kind: str, capability: str = "9.0") -> None:
        self.platform, self.device_kind, self.compute_capability = platform, kind, capability


@pytest.mark.parametrize(
    ("devices", "chosen"),
    [
        ([Device("gpu", "NVIDIA H100 80GB HBM3")], True),
        ([Device("gpu", "NVIDIA H100 80GB HBM3")] * 2, False),
        ([Device("gpu", "Tesla V100-SXM2-16GB", "7.0")], False),
        ([Device("gpu", "NVIDIA V100", "7.0")], False),
        ([Device("gpu", "AMD Instinct MI300X", "gfx942")], False),
        ([Device("tpu", "TPU v5 lite")], False),
    ],
)
def test_where_kernels_are_chosen(devices: list[Device], chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unasked: on one GPU, where they were seen to be faster."""
    assert one_gpu(devices) == chosen
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert Execution.choose(layout=one_device()).kernels == ("pallas" if chosen else "xla")


def test_devices_without_a_kernel_are_refused() -> None:
    here = [Device("cpu", "cpu")]
    for devices in ([Device("tpu", "TPU v5 lite")], [Device("gpu", "NVIDIA L4", "8.9")]):
        assert choose_kernels("pallas", devices) == "pallas"
        assert choose_kernels("auto", devices) == ("pallas" if devices[0].platform == "gpu" else "xla")
    others = Device("gpu", "NVIDIA V100", "7.0"), Device("gpu", "AMD Instinct MI300X", "gfx942")
    for device in (*here, Device("tpu", "TPU v3"), Device("tpu", "TPU v2"), *others):
        with pytest.raises(InputError, match=f"no kernel for {device.device_kind}; expected auto or xla, or one"):
            check("pallas", [device])
    with pytest.raises(InputError, match="for one device, not for 4"):
        check("pallas", [Device("tpu", "TPU v5 lite")] * 4)
