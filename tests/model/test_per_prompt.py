"""Clusters found per prompt: against a loop over rows and heads, cached against uncached, alone against in a batch."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from chai_jax.analyse.probe import head_sums
from chai_jax.compress.cluster import cluster
from chai_jax.model import cache
from chai_jax.model.decoder import Output, forward
from chai_jax.model.execution import Execution
from chai_jax.model.membership import features
from chai_jax.model.model import Model
from chai_jax.model.params import Params, declare
from chai_jax.model.per_prompt import mix_assigned
from chai_jax.model.quantized import dequantize
from chai_jax.model.self_attention import Seen
from chai_jax.model.sharding import make_mesh, place, shardings
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.spec import LayerSpec, Spec, group_clusters

pytestmark = pytest.mark.slow  # together they take minutes

CONFIG = Architecture(97, 48, num_layers=2, num_heads=6, ffn_dim=64, max_positions=32, embed_dim=48)
HOW = Execution.choose("float32")
CLUSTERS = ((3, 0), (2,), (5, 1, 4))
WARMUP, PROMPT, LENGTH = 5, 9, 13
RandomParams = Callable[[Architecture, Spec, float], Params]
# Prompts on the left edge, padded on the left, padded on the right before they go on, with gaps, and two too short.
PADDING = np.ones((6, LENGTH), bool)
PADDING[1, :3] = PADDING[2, 6:PROMPT] = PADDING[3, [0, 3, 10]] = PADDING[4, :6] = PADDING[5, 2:PROMPT] = False
SHORT = PADDING[:, :PROMPT].sum(axis=1) < WARMUP


def spec_of(
    storage: str = "float32", clusters: tuple[tuple[int, ...], ...] = CLUSTERS, warmup: int = WARMUP, layers: int = 2
) -> Spec:
    groups = group_clusters("qk", clusters, [storage] * len(clusters), "prompt")
    return Spec((LayerSpec("qk", clusters, groups, 8, 8, membership="prompt", warmup=warmup),) * layers)


def random_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 97, PADDING.shape, np.int32)


def memberships(output: Output) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [group.membership for (group,) in output.cache.layers]
    return [(np.asarray(one.cluster_of), np.asarray(one.medoids)) for one in found]


compiled = jax.jit(partial(forward, how=HOW), static_argnums=(0, 1), static_argnames="how")


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_layer_equals_a_loop_over_rows_and_heads(
    random_params: RandomParams, layers_seen: Callable[..., list[Seen]], storage: str
) -> None:
    """Numpy and float64; a row of the warm-up reads its own head's keys, a later one its cluster's medoid's."""
    config, spec = dataclasses.replace(CONFIG, num_layers=1), spec_of(storage, layers=1)
    params = random_params(config, spec, 0.3)
    (seen,) = layers_seen(config, spec, params, random_tokens(), PADDING)
    ((cluster_of, medoids),) = memberships(compiled(config, spec, params, random_tokens(), PADDING))
    attention = params["layers"]["0"]
    x = np.asarray(seen.x, np.float64)

    def project(name: str) -> np.ndarray:
        kernel, bias = (np.asarray(attention[name][leaf], np.float64) for leaf in ("kernel", "bias"))
        return np.einsum("btd,dhr->bhtr", x, kernel) + bias[:, None]

    def read(name: str) -> np.ndarray:
        return np.asarray(dequantize(cache.store(jnp.asarray(project(name), jnp.float32), storage)), np.float64)

    query, key, value = project("query"), read("key"), read("value")
    for b, h in np.ndindex(6, 6):
        real = np.flatnonzero(PADDING[b])
        for number, row in enumerate(real):
            source = h if number < WARMUP else medoids[b, cluster_of[b, h]]
            columns = real[: number + 1]
            weights = softmax(key[b, source, columns] @ query[b, source, row] / np.sqrt(8))
            expected = weights @ value[b, h, columns]
            np.testing.assert_allclose(seen.heads[b, h, row], expected, atol=1e-4 if storage == "float32" else 0.02)
    assert len(np.unique(cluster_of, axis=0)) > 1


def decoded(
    spec: Spec, params: Params, tokens: np.ndarray, mask: np.ndarray, step: int = 1
) -> tuple[np.ndarray, Output]:
    """Hidden states of the columns after the prompt, fed `step` at a time, and the last output."""
    output = compiled(CONFIG, spec, params, tokens[:, :PROMPT], mask[:, :PROMPT])
    hidden, past = [], cache.extend(output.cache, LENGTH + 3)
    for column in range(PROMPT, LENGTH, step):
        now = slice(column, column + step)
        output = compiled(CONFIG, spec, params, tokens[:, now], mask[:, now], cache=past)
        past = output.cache
        hidden.append(output.hidden)
    return np.concatenate(hidden, axis=1), output


def sliced(spec: Spec, params: Params) -> Model:
    """The dense model cut to the calibrated clusters of `spec`."""
    storage = spec.layers[0].groups[0].storage
    parts = tuple(ClusterPlan(tuple(sorted(heads)), heads[0]) for heads in CLUSTERS)
    return cluster(Model(CONFIG, Spec.dense(2, 6, 8, storage), params), Plan((LayerPlan(parts),) * 2, share="qk"))


@pytest.mark.parametrize(("storage", "step"), [("float32", 1), ("bfloat16", 1), ("int8", 1), ("int8", 2)])
def test_cached_equals_uncached_at_every_step(random_params: RandomParams, storage: str, step: int) -> None:
    """Of a prompt that is too short, uncached means the calibrated model: it has its clusters for good."""
    spec = spec_of(storage)
    params = random_params(CONFIG, spec, 0.3)
    tokens = random_tokens()
    found, last = decoded(spec, params, tokens, PADDING, step)
    uncached = compiled(CONFIG, spec, params, tokens, PADDING)
    small = sliced(spec, params)
    fixed = compiled(CONFIG, small.spec, small.params, tokens, PADDING)
    expected = np.where(SHORT[:, None, None], fixed.hidden, uncached.hidden)[:, PROMPT:]
    real = PADDING[:, PROMPT:]
    bound = 1e-5 if storage == "float32" else 4e-2  # one step of storage, somewhere in the past
    np.testing.assert_allclose(found[real], expected[real], atol=bound)
    assert SHORT.sum() == 2
    assert np.abs(np.asarray(fixed.hidden) - np.asarray(uncached.hidden))[:4, PROMPT:].max() > 0.1
    for after, whole in zip(memberships(last), memberships(uncached), strict=True):
        for mine, theirs in zip(after, whole, strict=True):
            np.testing.assert_array_equal(mine[~SHORT], theirs[~SHORT])
    for cluster_of, medoids in memberships(last):
        np.testing.assert_array_equal(cluster_of[SHORT], [[0, 2, 1, 0, 2, 2]] * 2)
        np.testing.assert_array_equal(medoids[SHORT], [[3, 2, 5]] * 2)


def test_int4_blocks_are_read_alike_cached_and_uncached(random_params: RandomParams) -> None:
    """Blocks of 32 columns: a warm-up within one, across a border, behind it, and a prompt that is too short."""
    config, spec = dataclasses.replace(CONFIG, max_positions=80), spec_of("int4")
    params = random_params(config, spec, 0.3)
    tokens, mask = np.random.default_rng(3).integers(4, 97, (4, 70), np.int32), np.ones((4, 70), bool)
    mask[1, :29] = mask[2, :34] = mask[3, :37] = False
    output = compiled(config, spec, params, tokens[:, :40], mask[:, :40])
    uncached = compiled(config, spec, params, tokens, mask)
    bfloat16 = compiled(config, spec_of("bfloat16"), params, tokens, mask)
    past, long_enough = cache.extend(output.cache, 96), slice(0, 3)
    for at in range(40, 70, 5):
        output = compiled(config, spec, params, tokens[:, at : at + 5], mask[:, at : at + 5], cache=past)
        past = output.cache
        np.testing.assert_allclose(output.hidden[long_enough], uncached.hidden[long_enough, at : at + 5], atol=4e-2)
    assert np.abs(np.asarray(uncached.hidden) - np.asarray(bfloat16.hidden))[:3, 64:].max() > 0.1
    assert past.nbytes == cache.cache_bytes(spec, 4, 96)
    # The warm-up's rows are those of the dense model with such a cache.
    dense = compiled(config, Spec.dense(2, 6, 8, "int4"), params, tokens, mask)
    for row, first in enumerate((0, 29, 34)):
        early = slice(first, first + WARMUP)
        np.testing.assert_allclose(uncached.hidden[row, early], dense.hidden[row, early], atol=1e-4)
    for mine, theirs in zip(memberships(output), memberships(uncached), strict=True):
        np.testing.assert_array_equal(mine[0][long_enough], theirs[0][long_enough])
        np.testing.assert_array_equal(mine[1][3], [3, 2, 5])


def test_a_short_prompt_is_the_calibrated_models_in_prefill_too(random_params: RandomParams) -> None:
    spec = spec_of()
    params = random_params(CONFIG, spec, 0.3)
    tokens, mask = random_tokens()[:, :PROMPT], PADDING[:, :PROMPT]
    small = sliced(spec, params)
    found = compiled(CONFIG, spec, params, tokens, mask).hidden
    expected = compiled(CONFIG, small.spec, small.params, tokens, mask).hidden
    real = mask & SHORT[:, None]
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
    # and where fewer columns are there than the warm-up has tokens
    found = compiled(CONFIG, spec, params, tokens[:, :3], mask[:, :3]).hidden
    expected = compiled(CONFIG, small.spec, small.params, tokens[:, :3], mask[:, :3]).hidden
    np.testing.assert_allclose(found[mask[:, :3]], expected[mask[:, :3]], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(random_params: RandomParams, side: str) -> None:
    """Each row alone, without padding, equals that row in a padded batch."""
    spec = spec_of()
    params = random_params(CONFIG, spec, 0.3)
    tokens = random_tokens()
    lengths = np.array([9, 9, 13, 5, 5, 4])
    columns = np.arange(LENGTH)
    mask = columns >= LENGTH - lengths[:, None] if side == "left" else columns < lengths[:, None]
    batch = compiled(CONFIG, spec, params, tokens, mask)
    for row, length in enumerate(lengths):
        alone = compiled(CONFIG, spec, params, tokens[row : row + 1, mask[row]], np.ones((1, length), bool))
        np.testing.assert_allclose(batch.hidden[row, mask[row]], alone.hidden[0], atol=1e-5)
        for mine, theirs in zip(memberships(batch), memberships(alone), strict=True):
            np.testing.assert_array_equal(mine[0][row], theirs[0][0])
            np.testing.assert_array_equal(mine[1][row], theirs[1][0])


@pytest.mark.parametrize("clusters", [tuple((h,) for h in range(6)), CLUSTERS])
def test_as_many_clusters_as_heads_are_dense_attention(random_params: RandomParams, clusters: Any) -> None:
    # Not int8: what differs in its last bit alone would be stored as another integer.
    spec = spec_of("float32", clusters)
    params = random_params(CONFIG, spec, 0.3)
    found = compiled(CONFIG, spec, params, random_tokens(), PADDING).hidden
    dense = compiled(CONFIG, Spec.dense(2, 6, 8, "float32"), params, random_tokens(), PADDING).hidden
    equal = np.allclose(found[PADDING], dense[PADDING], atol=1e-5)
    assert equal == (len(clusters) == 6)
    # In either case the warm-up's rows are dense attention: no key of a dropped head is missing there.
    early = PADDING & (PADDING.cumsum(axis=1) <= WARMUP) & (PADDING.sum(axis=1) >= WARMUP)[:, None]
    np.testing.assert_allclose(found[early], dense[early], atol=1e-5)


def test_features_correlate_heads_as_the_offline_probe_does(
    random_params: RandomParams, layers_seen: Callable[..., list[Seen]]
) -> None:
    config = dataclasses.replace(CONFIG, num_layers=1)
    spec = Spec.dense(1, 6, 8)
    params = random_params(config, spec, 0.3)

    (seen,) = layers_seen(config, spec, params, random_tokens()[:1, :8], np.ones((1, 8), bool))
    sums, found = head_sums(seen, params["layers"]["0"]), features(seen.probabilities)
    np.testing.assert_allclose(np.einsum("bhf,bgf->hg", found, found), sums["attention"], rtol=1e-4)


def test_planted_duplicates_end_in_one_cluster(random_params: RandomParams) -> None:
    """Heads with equal queries and keys attend alike; as many clusters as there are kinds change nothing at all."""
    spec = spec_of()
    params = random_params(CONFIG, spec, 0.3)
    kinds = np.array([0, 1, 0, 2, 2, 0])
    for layer in params["layers"].values():
        for name in ("query", "key"):
            layer[name] = {leaf: jnp.take(x, kinds, axis=-2) for leaf, x in layer[name].items()}
    output = compiled(CONFIG, spec, params, random_tokens(), PADDING)
    dense = compiled(CONFIG, Spec.dense(2, 6, 8), params, random_tokens(), PADDING)
    for cluster_of, _ in memberships(output):
        same = cluster_of[:4, :, None] == cluster_of[:4, None]
        np.testing.assert_array_equal(same, np.broadcast_to(kinds[:, None] == kinds, same.shape))
    real = PADDING & ~(PADDING.sum(axis=1) < WARMUP)[:, None]
    np.testing.assert_allclose(output.hidden[real], dense.hidden[real], atol=1e-5)


def test_one_trace_serves_every_prompt(random_params: RandomParams) -> None:
    spec = spec_of()
    params = random_params(CONFIG, spec, 0.3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def prefill(params: Params, tokens: np.ndarray, mask: np.ndarray) -> Output:
        return forward(CONFIG, spec, params, tokens, mask, HOW)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params: Params, tokens: np.ndarray, mask: np.ndarray, past: cache.Cache) -> Output:
        return forward(CONFIG, spec, params, tokens, mask, HOW, cache=past)

    random, seen = np.random.default_rng(1), set()
    for shift in range(4):
        tokens = random.integers(4, 97, (6, PROMPT), np.int32)
        output = prefill(params, tokens, np.roll(PADDING[:, :PROMPT], shift, axis=0))
        seen |= {row.tobytes() for cluster_of, _ in memberships(output) for row in cluster_of}
        past = cache.extend(output.cache, LENGTH)
        for _ in range(2):
            past = step(params, tokens[:, :1], np.ones((6, 1), bool), past).cache
    assert len(seen) > 4
    with pytest.raises(AssertionError, match="traced"):
        prefill(params, tokens[:2], PADDING[:2, :PROMPT])


def test_gradients_flow_as_if_membership_were_given(random_params: RandomParams) -> None:
    """Against central differences, in which membership stays what it is."""
    spec = spec_of()
    params = random_params(CONFIG, spec, 0.3)
    tokens, mask = jnp.asarray(random_tokens()), jnp.asarray(PADDING)
    weights = np.random.default_rng(2).standard_normal((*PADDING.shape, 48)).astype(np.float32) * PADDING[..., None]

    @jax.jit
    def loss(params: Params) -> jax.Array:
        return jnp.sum(forward(CONFIG, spec, params, tokens, mask, HOW).hidden * weights)

    gradient = jax.jit(jax.grad(loss))(params)
    for name in ("query", "key", "value"):
        for layer in ("0", "1"):
            along = gradient["layers"][layer][name]["kernel"]
            assert (np.abs(along).max(axis=(0, 2)) > 1e-3).all()
            step = 3e-3 * along / jnp.linalg.norm(along)

            def moved(sign: float, layer: str = layer, name: str = name, step: jax.Array = step) -> float:
                changed = jax.tree.map(lambda x: x, params)
                changed["layers"][layer][name]["kernel"] += sign * step
                return float(loss(changed))

            slope = (moved(1.0) - moved(-1.0)) / 6e-3
            np.testing.assert_allclose(slope, jnp.linalg.norm(along), rtol=2e-2)


@pytest.mark.parametrize("model", [1, 2])
def test_sharded_equals_one_device(random_params: RandomParams, model: int) -> None:
    spec = spec_of("int8")
    params = random_params(CONFIG, spec, 0.3)
    tokens, mask = np.tile(random_tokens(), (4, 1))[:8], np.tile(PADDING, (4, 1))[:8]
    mesh = make_mesh(model=model)
    rows = jax.NamedSharding(mesh, P("data"))
    placed = place(params, shardings(declare(CONFIG, spec), mesh))

    def run(params: Params, tokens: Any, mask: Any) -> tuple[Output, Output]:
        first = compiled(CONFIG, spec, params, tokens[:, :PROMPT], mask[:, :PROMPT])
        past = cache.extend(first.cache, LENGTH)
        return first, compiled(CONFIG, spec, params, tokens[:, PROMPT:], mask[:, PROMPT:], cache=past)

    split = run(placed, jax.device_put(tokens, rows), jax.device_put(mask, rows))
    whole = run(params, jnp.asarray(tokens), jnp.asarray(mask))
    assert len(split[1].hidden.sharding.device_set) == 8
    for mine, theirs, columns in zip(split, whole, (mask[:, :PROMPT], mask[:, PROMPT:]), strict=True):
        np.testing.assert_allclose(mine.hidden[columns], theirs.hidden[columns], atol=1e-2)
        for a, b in zip(jax.tree.leaves(memberships(mine)), jax.tree.leaves(memberships(theirs)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_half_precision_activations(random_params: RandomParams) -> None:
    config, spec = dataclasses.replace(CONFIG, num_layers=1), spec_of("bfloat16", layers=1)
    params = random_params(config, spec, 0.3)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    output = compiled(config, spec, rounded, random_tokens(), PADDING, how=HOW.replace(dtype=jnp.dtype("bfloat16")))
    assert output.hidden.dtype == jnp.bfloat16
    whole = compiled(config, spec, params, random_tokens(), PADDING)
    (found,), (expected,) = memberships(output), memberships(whole)
    alike = np.logical_and(*((mine == theirs).all(axis=1) for mine, theirs in zip(found, expected, strict=True)))
    error = np.abs(np.asarray(output.hidden, np.float32) - np.asarray(whole.hidden)).max(axis=-1)
    assert alike.sum() >= 5  # of six; rounding may move a head that lies between two clusters
    assert 0 < error[alike][PADDING[alike]].max() < 0.1


def test_only_kept_keys_are_stored(random_params: RandomParams) -> None:
    spec = spec_of("int8")
    params = random_params(CONFIG, spec, 0.3)
    filled = compiled(CONFIG, spec, params, random_tokens(), PADDING).cache
    (group,) = filled.layers[0]
    assert group.keys.shape == (6, 3, LENGTH, 8)
    assert group.values.shape == (6, 6, LENGTH, 8)
    assert filled.nbytes == 6 * (LENGTH * cache.bytes_per_token(spec) + cache.bytes_per_sequence(spec))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_bytes_of_allocated_arrays_equal_the_formula(storage: str) -> None:
    spec = spec_of(storage)
    entry, scale = {"float32": (4, 0), "bfloat16": (2, 0), "int8": (1, 2)}[storage]
    by_hand = 2 * (3 + 6) * (8 * entry + scale)
    assert cache.bytes_per_token(spec) == cache.measured_bytes_per_token(spec) == by_hand
    assert cache.bytes_per_sequence(spec) == 2 * (3 + 6) * 4
    held = cache.empty(spec, 6, LENGTH)
    assert held.nbytes == 6 * (LENGTH * cache.bytes_per_token(spec) + cache.bytes_per_sequence(spec))
    assert cache.bytes_per_sequence(Spec.dense(2, 6, 8)) == 0


@pytest.mark.parametrize("rows", [1, 4])
def test_mixing_is_a_loop_over_heads_and_never_expands_the_probabilities(rows: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    probabilities = jax.nn.softmax(jax.random.normal(keys[0], (2, 3, rows, 50)))
    values = cache.store(jax.random.normal(keys[1], (2, 6, 50, 4)), "int8")
    cluster_of = jax.random.randint(keys[2], (2, 6), 0, 3, jnp.int32)
    found = mix_assigned(probabilities, values, cluster_of, jnp.float32)
    read = np.asarray(dequantize(values))
    for b, h in np.ndindex(2, 6):
        expected = np.asarray(probabilities)[b, cluster_of[b, h]] @ read[b, h]
        np.testing.assert_allclose(found[b, h], expected, atol=1e-5)

    def gradient(probabilities: jax.Array) -> jax.Array:
        return jax.grad(lambda p: mix_assigned(p, values, cluster_of, jnp.float32).sum())(probabilities)

    expanded = re.compile(rf"\[(2,6|6,2)(,1)*,{rows},50\]")
    assert (rows == 1) == bool(expanded.search(str(jax.make_jaxpr(gradient)(probabilities))))
