"""Programs for TPUs of models with grouped heads, gates and rotary positions, by the TPU's own compiler."""

from importlib.util import find_spec

import pytest

from chai_jax.aot.compiled import measure
from chai_jax.aot.cost import program_cost
from chai_jax.aot.programs import AbstractModel, Job, dense_spec, lower, spec_of
from chai_jax.aot.tpu import mesh_of, topology
from chai_jax.model.cache import cache_bytes
from chai_jax.model.sharding import Layout
from chai_jax.plans.architecture import Architecture, Rotary

LLAMA = Architecture(
    *(4096, 256, 1, 8, 512, 512, 256), num_kv_heads=2, head_size=64, norm="rms", gated=True, bias=False,
    activation="silu", rotary=Rotary(), position_offset=0, family="llama",
)  # fmt: skip
OPT = Architecture(4096, 256, 1, 4, 512, 256, 256)
LAYER = 256 * 64 * (8 + 2 + 2) + 8 * 64 * 256 + 3 * 256 * 512  # weights of its matrices
HEAD = 4096 * 256

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")


def abstract(mesh: str, share: str | None = None, storage: str = "bfloat16") -> AbstractModel:
    spec = spec_of(LLAMA, None, share, 0.5, storage) if share else dense_spec(LLAMA, storage)
    return AbstractModel(LLAMA, spec, Layout(mesh_of(topology("v5e:2x4"), mesh)))


def test_a_token_of_grouped_heads_on_a_mesh() -> None:
    """A device has a quarter of the sequences, and of its two key heads one with the four queries that read it."""
    record = measure(Job("decode", 256, 256), abstract("4x2"))
    cached = cache_bytes(dense_spec(LLAMA), 256, 256) / 8
    expected = LAYER + HEAD + 3 * 256 * 2 + cached + 64 * 256 * 5  # half the weights, two bytes each; norms are whole
    assert expected <= record["hbm"]["arguments"] < 1.05 * expected
    assert record["hbm"]["aliased"] >= cached
    products = 2 * 64 * (LAYER + 2 * 256 * 8 * 64 + HEAD) / 2
    assert products < record["flops"] < 1.07 * products
    # Two sums of a layer's output a token, the embedding, the choice of the token; of keys and queries none is sent.
    assert 0 < record["collective_bytes"] < 10 * 64 * 256 * 4
    assert record["kv_bytes_per_token"] == 2 * 2 * 64 * 2


@pytest.mark.parametrize(("config", "share"), [(LLAMA, None), (LLAMA, "qk"), (OPT, None)], ids=["llama", "qk", "opt"])
def test_no_mesh_sends_the_cache(config: Architecture, share: str | None) -> None:
    """Of heads of 64, which on TPUs lie in an order of their own, with sequences and heads both split."""
    spec = spec_of(config, None, share, 1.0, "bfloat16")
    abstract = AbstractModel(config, spec, Layout(mesh_of(topology("v5e:2x4"), "4x2")))
    found = program_cost(lower(Job("decode", 256, 256), abstract).compile().as_text(), per_iteration=True)
    assert max(each.nbytes for each in found.collectives) <= 64 * 256 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("share", "storage"), [(None, "bfloat16"), (None, "int8"), ("qk", "int8")])
def test_the_kernels_take_several_queries(share: str | None, storage: str) -> None:
    """One kernel a layer; the cache is read once for all queries of a key, also where a key has several values.

    The cache is larger than fast memory, where the compiler otherwise takes it whole.
    """
    model = abstract("1x1", share, storage)
    program = lower(Job("decode", 4096, 256, attention="pallas"), model).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 1
    least = cache_bytes(model.spec, 4096, 256) + 2 * (LAYER + HEAD)
    assert least < program_cost(program, per_iteration=True).hbm_bytes < 1.1 * least
