"""Clustered attention against a naive loop over heads, in numpy and float64, from the clusters a layer lists."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model import attention
from chai_jax.model.attention import attend
from chai_jax.model.cache import store
from chai_jax.model.decoder import embed, final_norm, forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.layerwise import seen_through
from chai_jax.model.params import Params
from chai_jax.model.place import locate
from chai_jax.model.quantized import dequantize
from chai_jax.model.self_attention import Seen
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec, group_clusters

CONFIG = Architecture(
    vocab_size=60, hidden_size=48, num_layers=1, num_heads=6, ffn_dim=32, max_positions=32, embed_dim=48
)
HOW = Execution.choose("float32")
CLUSTERS = ((0, 3), (2, 5), (1,), (4,))
STORAGES = ("bfloat16", "int8", "int8", "float32")
RandomParams = Callable[[Architecture, Spec, float], Params]


def layer(share: str, clusters: tuple[tuple[int, ...], ...], storages: tuple[str, ...], rank: int = 8) -> LayerSpec:
    return LayerSpec(share, clusters, group_clusters(share, clusters, storages), rank, rank)


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def read(x: np.ndarray, storage: str) -> np.ndarray:
    """One head [B, T, R] as attention reads it back from a cache."""
    return np.asarray(dequantize(store(jnp.asarray(x, jnp.float32)[:, None], storage))[:, 0], np.float64)


def naive_heads(spec: LayerSpec, seen: Seen, params: Params) -> np.ndarray:
    """What each output head [B, heads, T, R] must be, cluster by cluster and head by head."""
    x, allowed = np.asarray(seen.x, np.float64), np.asarray(seen.allowed)

    def project(name: str, head: int) -> np.ndarray:
        kernel, bias = (np.asarray(params[name][leaf], np.float64) for leaf in ("kernel", "bias"))
        return x @ kernel[:, head] + bias[head]

    outputs = []
    query = value = 0
    for key, (heads, storage) in enumerate(zip(spec.clusters, spec.storages, strict=True)):
        queries = [query + i for i in range(len(heads) if spec.share == "kv" else 1)]
        values = [value + i for i in range(len(heads) if spec.share == "qk" else 1)]
        query, value = query + len(queries), value + len(values)
        keys = read(project("key", key), storage)
        for q in queries:
            scores = project("query", q) @ keys.swapaxes(1, 2) / np.sqrt(CONFIG.head_dim)
            attention = softmax(np.where(allowed, scores, -np.inf))
            outputs += [attention @ read(project("value", v), storage) for v in values]
    return np.stack(outputs, axis=1)


@pytest.mark.parametrize("rank", [8, 12])
@pytest.mark.parametrize("share", ["qk", "qkv", "kv"])
def test_a_clustered_layer_equals_a_loop_over_its_heads(
    random_params: RandomParams, layers_seen: Callable[..., list[Seen]], share: str, rank: int
) -> None:
    spec = layer(share, CLUSTERS, STORAGES, rank)
    params = random_params(CONFIG, Spec((spec,)), 0.3)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 4, 60, jnp.int32)
    (found,) = layers_seen(CONFIG, Spec((spec,)), params, tokens, np.ones((2, 7), bool))
    # Between two int8 steps, an entry may fall to either side in float32 and float64; one step is about 0.01 here.
    expected = naive_heads(spec, found, params["layers"]["0"])
    assert found.heads.shape == expected.shape
    close = np.isclose(found.heads, expected, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.99
    assert np.abs(found.heads - expected).max() < 0.02


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("queries", "values"), [(1, 1), (3, 1), (1, 3)])
def test_a_group_reads_what_is_stored(queries: int, values: int, storage: str, rows: int) -> None:
    batch, clusters, columns, rank = 2, 2, 5, 8
    keys = iter(jax.random.split(jax.random.key(0), 3))
    query = jax.random.normal(next(keys), (batch, clusters, queries, rows, rank))
    key = store(jax.random.normal(next(keys), (batch, clusters, columns, rank)), storage)
    value = store(jax.random.normal(next(keys), (batch, clusters * values, columns, rank)), storage)
    allowed = np.tril(np.ones((rows, columns), bool), columns - rows)[None].repeat(batch, axis=0)
    allowed[1, :, 0] = False
    found, scores, probabilities = attend(query, key, value, jnp.asarray(allowed), 0.25, values)
    q, k, v = (np.asarray(dequantize(x), np.float64) for x in (query, key, value))
    for b, c in np.ndindex(batch, clusters):
        for i in range(queries):
            expected = np.where(allowed[b], 0.25 * q[b, c, i] @ k[b, c].T, -np.inf)
            np.testing.assert_allclose(probabilities[b, c, i], softmax(expected), atol=1e-5)
            np.testing.assert_allclose(scores[b, c, i][allowed[b]], expected[allowed[b]], atol=1e-5)
            for j in range(values):
                head = (c * queries + i) * values + j
                out = softmax(expected) @ v[b, c * values + j]
                np.testing.assert_allclose(found[b, head], out, atol=1e-5)


def test_a_row_that_may_read_nothing_is_finite() -> None:
    x = jnp.ones((1, 2, 1, 3, 4))
    found, scores, _ = attend(x, x[:, :, 0], x[:, :, 0], jnp.zeros((1, 3, 3), bool), 0.5, 1)
    assert np.isfinite(found).all()
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("share", ["qk", "qkv", "kv"])
def test_singleton_clusters_are_dense_attention_bit_for_bit(random_params: RandomParams, share: str) -> None:
    config = dataclasses.replace(CONFIG, num_layers=2)
    dense = Spec.dense(2, 6, 8, "int8")
    params = random_params(config, dense, 0.3)
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 4, 60, jnp.int32)
    mask = jnp.arange(9, dtype=jnp.int32) >= jnp.array([[0], [2], [5]], jnp.int32)
    single = Spec((layer(share, tuple((head,) for head in range(6)), ("int8",) * 6),) * 2)

    def logits(spec: Spec) -> np.ndarray:
        hidden = jax.jit(partial(forward, config, spec, how=HOW))(params, tokens, mask).hidden
        return np.asarray(unembed(config, params, hidden, HOW))

    np.testing.assert_array_equal(logits(single), logits(dense))


# Blocks of int4 take longest to compile.
SLOW_INT4 = pytest.param("qk", "int4", marks=pytest.mark.slow)
SLOW_PROMPT = pytest.param("prompt", "int4", marks=pytest.mark.slow)
SLOW_CALIBRATED = pytest.param("calibrated", "int4", marks=pytest.mark.slow)


@pytest.mark.parametrize(("share", "storage"), [("dense", "float32"), ("kv", "int8"), SLOW_INT4])
def test_rows_in_pieces_are_rows_at_once(
    monkeypatch: pytest.MonkeyPatch, random_params: RandomParams, share: str, storage: str
) -> None:
    """Hidden states, gradients and all that a probe is shown; 70 rows reach into a third block of int4."""
    clusters = tuple((head,) for head in range(6)) if share == "dense" else CLUSTERS
    spec = Spec((layer(share, clusters, (storage,) * len(clusters)),))
    config = dataclasses.replace(CONFIG, max_positions=80)
    params = random_params(config, spec, 0.3)
    tokens = jax.random.randint(jax.random.key(1), (2, 70), 4, 60, jnp.int32)
    mask = jnp.arange(70, dtype=jnp.int32) >= jnp.array([[0], [5]], jnp.int32)

    def run(rows: int) -> tuple[tuple[jax.Array, Seen], Params]:
        monkeypatch.setattr(attention, "ROWS", rows)

        def total(params: Params) -> tuple[jax.Array, Seen]:
            x = embed(config, params, tokens, locate(mask).positions, HOW)
            x, seen = seen_through(config, spec.layers[0], HOW, params["layers"]["0"], x, mask)
            return jnp.where(mask[..., None], jnp.square(final_norm(config, params, x)), 0.0).sum(), seen

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    (_, whole), _ = expected = run(512)
    (_, pieces), _ = found = run(32)
    real = np.asarray(mask)[:, None, :, None]
    seen, expected_seen = (jax.tree.map(np.asarray, one) for one in (pieces, whole))
    np.testing.assert_allclose(seen.scores * real, expected_seen.scores * real, atol=1e-5)
    assert seen.probabilities[:, :, :32, 32:].max() == 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found[1], expected[1])
    np.testing.assert_allclose(seen.heads * real, expected_seen.heads * real, atol=1e-5)


@pytest.mark.parametrize(("membership", "storage"), [("calibrated", "int8"), SLOW_CALIBRATED, SLOW_PROMPT])
def test_wanted_columns_are_those_of_all(random_params: RandomParams, storage: str, membership: str) -> None:
    """The last layer computes some rows alone; the cache holds every column all the same."""
    config = dataclasses.replace(CONFIG, num_layers=2, max_positions=80)
    one = layer("qk", CLUSTERS, (storage,) * 4)
    if membership == "prompt":
        groups = group_clusters("qk", CLUSTERS, (storage,) * 4, "prompt")
        one = dataclasses.replace(one, groups=groups, membership="prompt", warmup=5)
    spec = Spec((one,) * 2)
    params = random_params(config, spec, 0.3)
    tokens = jax.random.randint(jax.random.key(1), (2, 70), 4, 60, jnp.int32)
    mask = jnp.arange(70, dtype=jnp.int32) < jnp.array([[70], [61]], jnp.int32)
    wanted = jnp.array([[3, 69, 40], [60, 0, 33]], jnp.int32)
    everything = jax.jit(partial(forward, config, spec, how=HOW))(params, tokens, mask)
    some = jax.jit(partial(forward, config, spec, how=HOW))(params, tokens, mask, wanted=wanted)
    expected = np.take_along_axis(np.asarray(everything.hidden), np.asarray(wanted)[..., None], axis=1)
    np.testing.assert_allclose(some.hidden, expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, some.cache, everything.cache)


def test_branches_read_the_beginning_and_themselves(random_params: RandomParams) -> None:
    config = dataclasses.replace(CONFIG, num_layers=2)
    spec = Spec((layer("qkv", CLUSTERS, STORAGES),) * 2)
    params = random_params(config, spec, 0.3)
    shared, one, two = (np.random.default_rng(0).integers(4, 60, count) for count in (5, 4, 3))
    row = jnp.asarray(np.concatenate([shared, one, two, [1, 1]])[None], jnp.int32)
    branch = jnp.asarray([[0] * 5 + [1] * 4 + [2] * 3 + [0] * 2], jnp.int32)
    mask = jnp.arange(14)[None] < 12
    found = jax.jit(partial(forward, config, spec, how=HOW))(params, row, mask, branch=branch).hidden[0]

    def alone(*parts: np.ndarray) -> np.ndarray:
        tokens = jnp.asarray(np.concatenate(parts)[None], jnp.int32)
        return np.asarray(forward(config, spec, params, tokens, jnp.ones(tokens.shape, bool), HOW).hidden[0])

    np.testing.assert_allclose(found[:9], alone(shared, one), atol=1e-5)
    np.testing.assert_allclose(found[9:12], alone(shared, two)[5:], atol=1e-5)
    blocks = Spec((layer("qkv", CLUSTERS, ("int4",) * 4),) * 2)
    with pytest.raises(ValueError, match="stored_by_token"):
        forward(config, blocks, params, row, mask, HOW, branch=branch)
