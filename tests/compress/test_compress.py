"""Surgery: singletons change nothing, clusters are what a loop over heads says, and expansion undoes the sharing."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.compress.cluster import cluster
from chai_jax.compress.expand import expand
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.errors import InputError
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.model.quantized import Int4Array, QuantizedArray
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.spec import Spec

PRE = Architecture(64, 48, 3, 6, 64, 24, 48)
POST = dataclasses.replace(PRE, pre_norm=False, embed_dim=16)
PARTITION = ((0, 3, 5), (1,), (2, 4))


def random_model(config: Architecture = PRE) -> Model:
    spec = Spec.of(config)
    params = init(config, spec, jax.random.key(0), std=0.2)
    noise = jax.random.normal(jax.random.key(1), (10_000,))
    # Biases start at zero; give them values, or half of the algebra would go untested.
    params = jax.tree.map(
        lambda leaf: (
            leaf + 0.1 * noise[: leaf.size].reshape(leaf.shape) if leaf.ndim < 3 and leaf.size < 10_000 else leaf
        ),
        params,
    )
    return Model(config, spec, params)


def plan_of(
    clusters: Any, share: str, storages: Any = None, weights: str = "loaded", config: Architecture = PRE
) -> Plan:
    storages = storages or ["float32"] * len(clusters)
    parts = tuple(
        ClusterPlan(tuple(heads), heads[-1], storage=storage) for heads, storage in zip(clusters, storages, strict=True)
    )
    return Plan((LayerPlan(parts, weights=weights),) * config.num_layers, share=share)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    tokens = random.integers(4, 64, (2, 11)).astype(np.int32)
    mask = np.ones((2, 11), bool)
    mask[0, :3] = False
    return tokens, mask


@pytest.mark.parametrize("share", ["qk", "qkv"])
@pytest.mark.parametrize("config", [PRE, POST], ids=["pre-norm", "post-norm"])
def test_singletons_are_dense_attention_bit_for_bit(config: Architecture, share: str) -> None:
    model = random_model(config)
    single = cluster(model, plan_of([(head,) for head in range(6)], share))
    np.testing.assert_array_equal(single(*inputs()), model(*inputs()))
    # and so they are when the surgery is really done
    layer = dataclasses.replace(single.spec.layers[0], share=share)
    named = single.replace(spec=Spec((layer,) * 3))
    np.testing.assert_array_equal(named(*inputs()), model(*inputs()))


def tied_heads(model: Model, share: str) -> Model:
    """The dense model in which every head of a cluster has its representative's weights: what clustering equals."""
    source = {head: heads[-1] for heads in PARTITION for head in heads}
    at = jnp.asarray([source[head] for head in range(6)])
    layers = {}
    for name, params in model.params["layers"].items():
        changed = {
            part: {key: jnp.take(leaf, at, axis=-2) for key, leaf in params[part].items()} for part in ("query", "key")
        }
        if share == "qkv":
            # A merged head keeps its own value bias: only what varies from token to token is shared.
            changed["value"] = {**params["value"], "kernel": jnp.take(params["value"]["kernel"], at, axis=-2)}
        layers[name] = {**params, **changed}
    return model.replace(params={**model.params, "layers": layers})


@pytest.mark.parametrize("share", ["qk", "qkv"])
@pytest.mark.parametrize("config", [PRE, POST], ids=["pre-norm", "post-norm"])
def test_clustering_equals_tying_the_heads(config: Architecture, share: str) -> None:
    model = random_model(config)
    before = jax.tree.map(np.asarray, model.params)
    small = cluster(model, plan_of(PARTITION, share))
    _, mask = inputs()
    np.testing.assert_allclose(
        np.asarray(small(*inputs()))[mask], np.asarray(tied_heads(model, share)(*inputs()))[mask], atol=1e-4
    )
    assert np.abs(np.asarray(small(*inputs())) - np.asarray(model(*inputs())))[mask].max() > 1e-2
    assert small.nbytes < model.nbytes
    heads = {"qk": (3, 3, 6, 6), "qkv": (3, 3, 3, 3)}[share]
    layer = small.params["layers"]["0"]
    assert tuple(layer[name]["kernel"].shape[-2] for name in ("query", "key", "value")) == heads[:3]
    assert layer["output"]["kernel"].shape[0] == heads[3]
    jax.tree.map(np.testing.assert_array_equal, before, model.params)


@pytest.mark.parametrize("share", ["qk", "qkv"])
@pytest.mark.parametrize("config", [PRE, POST], ids=["pre-norm", "post-norm"])
def test_expanded_model_in_torch_equals_ours(
    torch: ModuleType, tmp_path: Path, config: Architecture, share: str
) -> None:
    from transformers import OPTForCausalLM

    from chai_jax.files.export import export

    small = cluster(random_model(config), plan_of(PARTITION, share))
    export(expand(small), tmp_path / "out")
    module = OPTForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens, mask = inputs()
    with torch.no_grad():
        theirs = module(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()
    assert np.abs(np.asarray(small(tokens, mask)) - theirs)[mask].max() <= 1e-4


STORAGES = ["int8", "bfloat16", "int8"]


@pytest.mark.parametrize("share", ["qk", "qkv"])
def test_expansion_keeps_storage_formats(share: str) -> None:
    """Heads of a cluster quantize alike, so the expanded model carries the same damage."""
    plan = plan_of(PARTITION, share, STORAGES)
    small = quantize(cluster(random_model(), plan), plan)
    _, mask = inputs()
    ours, expanded = np.asarray(small(*inputs())), np.asarray(expand(small)(*inputs()))
    np.testing.assert_allclose(ours[mask], expanded[mask], atol=1e-4)


@pytest.mark.parametrize("share", ["qk", "qkv"])
def test_order_of_clustering_and_cache_formats_does_not_matter(share: str) -> None:
    plan = plan_of(PARTITION, share, STORAGES)
    model = random_model()
    first = quantize(cluster(model, plan), plan)
    assert first.spec.layers[0].storages == ("bfloat16", "int8", "int8")
    assert first.kv_bytes_per_token == bytes_per_token(first.spec)
    # By hand: K 8; cluster (1,) bfloat16, (2, 4) and (0, 3, 5) int8 with 2-byte scales.
    by_hand = {"qk": 16 + 16 + 3 * 10 + 4 * 10, "qkv": 16 + 16 + 4 * 10}[share]
    assert first.kv_bytes_per_token == 3 * by_hand
    unordered = quantize(model, plan)
    assert sorted(unordered.spec.layers[0].storages) == ["bfloat16"] + ["int8"] * 5


def test_reordering_alone_changes_nothing() -> None:
    """bfloat16 here, float32 there permutes the heads; with the rounding undone the logits are those of before."""
    model = random_model()
    plan = plan_of(PARTITION, "qkv", ["float32", "bfloat16", "float32"])
    moved = with_storage(quantize(model, plan), "float32")
    assert moved.spec.layers[0].clusters != model.spec.layers[0].clusters
    _, mask = inputs()
    np.testing.assert_allclose(np.asarray(moved(*inputs()))[mask], np.asarray(model(*inputs()))[mask], atol=1e-5)


def test_weight_formats() -> None:
    model = random_model()
    plans = {weights: plan_of(PARTITION, "qkv", weights=weights) for weights in ("loaded", "bfloat16", "int8", "int4")}
    stored = {weights: quantize(model, plan) for weights, plan in plans.items()}
    jax.tree.map(np.testing.assert_array_equal, stored["loaded"].params, model.params)
    assert stored["int4"].nbytes < stored["int8"].nbytes < stored["bfloat16"].nbytes < stored["loaded"].nbytes
    kernel = stored["int8"].params["layers"]["1"]["output"]["kernel"]
    assert isinstance(kernel, QuantizedArray)
    assert kernel.scale.shape == (48,)
    down = stored["int4"].params["layers"]["1"]["down"]["kernel"]
    assert isinstance(down, Int4Array)
    assert down.nbytes == 64 * 48 * (4 + 32 / 64) // 8  # with a scale and a lowest value of 16 bits for every 64
    _, mask = inputs()
    dense = np.asarray(model(*inputs()))[mask]
    errors = [np.abs(np.asarray(stored[to](*inputs()))[mask] - dense).max() for to in ("bfloat16", "int8", "int4")]
    assert 0 < errors[0] < errors[1] < errors[2] < np.abs(dense).max()
    for weights in ("int8", "int4"):
        again = quantize(stored[weights], plans[weights])
        jax.tree.map(np.testing.assert_array_equal, again.params, stored[weights].params)
    smaller = quantize(stored["int8"], plans["int4"])
    assert smaller.nbytes == stored["int4"].nbytes
    assert quantize(stored["int4"], plans["int8"]).nbytes == stored["int4"].nbytes


def test_int4_weights_move_with_their_heads_and_expand_to_what_they_stand_for() -> None:
    model = quantize(random_model(), plan_of([(head,) for head in range(6)], "qkv", weights="int4"))
    moved = quantize(model, plan_of([(head,) for head in range(6)], "qkv", ["float32", "bfloat16"] * 3, "int4"))
    assert moved.spec.layers[0].clusters == ((0,), (2,), (4,), (1,), (3,), (5,))
    _, mask = inputs()
    back = with_storage(moved, "float32")
    for same in (back, expand(back)):
        np.testing.assert_allclose(np.asarray(same(*inputs()))[mask], np.asarray(model(*inputs()))[mask], atol=1e-5)


def test_refusals() -> None:
    model = random_model()
    plan = plan_of(PARTITION, "qkv")
    with pytest.raises(InputError, match="clustered or quantized already"):
        cluster(cluster(model, plan), plan)
    with pytest.raises(InputError, match="plan is for 2 layers"):
        cluster(model, dataclasses.replace(plan, layers=plan.layers[:2]))
    with pytest.raises(InputError, match=r"heads \[0, 3, 5\] share a cached head"):
        quantize(cluster(model, plan), plan_of([(0, 1), (2, 3), (4, 5)], "qkv", ["int8", "bfloat16", "bfloat16"]))
    with pytest.raises(InputError, match="storage 'int3'"):
        with_storage(model, "int3")


def prompt_plan(storage: str = "float32", weights: str = "loaded") -> Plan:
    """Layer 1 is left alone."""
    plan = plan_of(PARTITION, "qk", [storage] * 3, weights)
    alone = plan_of([(head,) for head in range(6)], "qk", [storage] * 6, weights).layers[0]
    layers = (plan.layers[0], alone, plan.layers[2])
    return dataclasses.replace(plan, layers=layers, membership="prompt", warmup_tokens=4)


def test_clusters_per_prompt_cut_nothing_but_the_cache() -> None:
    model = random_model()
    small = cluster(model, prompt_plan())
    jax.tree.map(np.testing.assert_array_equal, small.params, model.params)
    assert small.spec.layers[1] == model.spec.layers[1]
    first = small.spec.layers[0]
    assert first.clusters == ((5, 0, 3), (1,), (4, 2))
    assert (first.share, first.membership, first.warmup) == ("qk", "prompt", 4)
    # K 8 in float32: two layers keep 3 of 6 keys
    assert small.kv_bytes_per_token == bytes_per_token(small.spec) == 4 * 8 * (9 + 12 + 9)
    _, mask = inputs()
    assert np.abs(np.asarray(small(*inputs())) - np.asarray(model(*inputs())))[mask].max() > 1e-2


def test_heads_stored_in_any_order_are_put_back_for_clusters_per_prompt() -> None:
    model = random_model()
    mixed = plan_of(PARTITION, "qkv", ["float32", "bfloat16", "float32"])
    moved = with_storage(quantize(model, mixed), "float32")
    assert moved.spec.layers[0].clusters != model.spec.layers[0].clusters
    found, expected = cluster(moved, prompt_plan()), cluster(model, prompt_plan())
    assert found.spec.layers[0] == expected.spec.layers[0]
    jax.tree.map(np.testing.assert_array_equal, found.params["layers"]["0"], expected.params["layers"]["0"])
    with pytest.raises(InputError, match="stores its heads as bfloat16 and float32"):
        cluster(quantize(model, mixed), prompt_plan())


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_order_of_formats_and_clusters_per_prompt_does_not_matter(storage: str) -> None:
    plan = prompt_plan(storage, "bfloat16")
    one, two = quantize(cluster(random_model(), plan), plan), cluster(quantize(random_model(), plan), plan)
    assert one.spec == two.spec
    assert {layer.storages[0] for layer in one.spec.layers} == {storage}
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert with_storage(one, "float32").spec.layers[0].storages == ("float32",) * 3


def test_clusters_per_prompt_have_no_ordinary_form_and_one_format() -> None:
    small = cluster(random_model(), prompt_plan())
    with pytest.raises(InputError, match="layer 0 finds its clusters anew for every prompt"):
        expand(small)
    with pytest.raises(InputError, match=r"heads \[0, 1, 2, 3, 4, 5\] share a cached head"):
        quantize(small, plan_of(PARTITION, "qk", STORAGES))
    with pytest.raises(InputError, match="clustered or quantized already"):
        cluster(small, prompt_plan())
