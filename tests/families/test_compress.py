"""What holds of compressed models of every kind of decoder: exact at full rank, cached as uncached, saved, exported."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.analyse.planner import grouped_plan
from chai_jax.analyse.probe import Probe, probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.expand import expand, ordinary
from chai_jax.compress.quantize import quantize
from chai_jax.errors import InputError
from chai_jax.files.export import export
from chai_jax.files.store import load, save
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.planned import planned_spec
from chai_jax.plans.spec import Spec
from chai_jax.serve.generate import generate_tokens

BASE = Architecture(67, 32, 2, 4, 48, 64, 32, activation="silu", norm="rms", gated=True, position_offset=0)
SHAPES = {
    "llama": dataclasses.replace(BASE, num_kv_heads=2, bias=False, rotary=Rotary(), family="llama"),
    "qwen2": dataclasses.replace(
        BASE, num_kv_heads=2, bias=("query", "key", "value"), rotary=Rotary(), windows=(0, 6), family="qwen2"
    ),
    "qwen3": dataclasses.replace(BASE, num_kv_heads=2, bias=False, qk_norm=True, rotary=Rotary(), family="qwen3"),
    "gpt_neox": dataclasses.replace(
        BASE, norm="layer", gated=False, parallel=True, rotary=Rotary(fraction=0.5), family="gpt_neox", tied=False
    ),
    "opt": Architecture(67, 32, 2, 4, 48, 64, 32, bias=False),
}
TOKENS = np.random.default_rng(0).integers(3, 60, (3, 20)).astype(np.int32)
MASK = np.arange(20) >= np.array([[0], [7], [0]])
WINDOWS = np.random.default_rng(1).integers(3, 60, (12, 16)).tolist()


@cache
def dense_model(name: str) -> tuple[Model, Probe, np.ndarray]:
    """A random model, what a probe sees of it, and its logits."""
    config = SHAPES[name]
    spec = Spec.of(config)
    params = init(config, spec, jax.random.key(0), std=0.3)
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(noise))
    params = jax.tree.map(lambda leaf, key: leaf + 0.1 * jax.random.normal(key, leaf.shape), params, keys)
    model = Model(config, spec, params)
    return model, probe(model, WINDOWS), np.asarray(model(TOKENS, MASK))[MASK]


def plan_of(config: Architecture, share: str, whole: bool, **merges: Any) -> Plan:
    """All heads in one cluster or, `whole`, nothing lost."""
    heads = tuple(range(config.kv_heads))
    if share == "qkv":
        clusters = tuple(ClusterPlan((head,)) for head in heads) if whole else (ClusterPlan(heads),)
        rank = config.head_dim
    else:
        clusters, rank = (ClusterPlan(heads),), config.kv_width
    free = merges.get("score_merge") == "low_rank" or share == "kv"
    ranks = {"key_rank": rank if whole else rank - 2, "value_rank": rank if whole else rank - 1} if free else {}
    return Plan((LayerPlan(clusters, **ranks),) * config.num_layers, share, **merges)


LOW_RANK = {"score_merge": "low_rank", "value_merge": "low_rank"}


WHOLE = [(name, share) for name in SHAPES for share in ("kv", "qkv")]
WHOLE_USUAL = {("llama", "qkv"), ("qwen3", "kv")}


@pytest.mark.parametrize(
    ("name", "share"),
    [pytest.param(*one, marks=[] if one in WHOLE_USUAL else [pytest.mark.slow]) for one in WHOLE],
)
def test_full_rank_is_the_dense_model(name: str, share: str) -> None:
    model, seen, wanted = dense_model(name)
    plan = plan_of(model.config, share, whole=True, **(LOW_RANK if share == "qkv" else {}))
    if model.config.qk_norm:
        with pytest.raises(InputError, match="the model norms keys after their projection"):
            cluster(model, plan, seen)
        return
    np.testing.assert_allclose(np.asarray(cluster(model, plan, seen)(TOKENS, MASK))[MASK], wanted, atol=1e-4)


MERGES = {"qk": ("qk", {}), "qkv": ("qkv", {}), "low rank": ("qkv", LOW_RANK), "kv": ("kv", {})}
DEFINED = [(name, merge) for name in SHAPES for merge in MERGES if name != "qwen3" or merge in ("qk", "qkv")]
USUAL = {("llama", "low rank"), ("qwen3", "qkv"), ("gpt_neox", "kv")}
TRIED = [pytest.param(*one, marks=[] if one in USUAL else [pytest.mark.slow]) for one in DEFINED]


@pytest.mark.parametrize(("name", "merge"), TRIED)
def test_what_is_merged(tmp_path: Path, name: str, merge: str) -> None:
    """Cached decoding says what the uncached model says; expanded, saved and quantized it is the same model."""
    model, seen, wanted = dense_model(name)
    share, merges = MERGES[merge]
    plan = plan_of(model.config, share, whole=False, **merges)
    merged = cluster(model, plan, seen)
    logits = np.asarray(merged(TOKENS, MASK))[MASK]
    assert np.abs(logits - wanted).max() > 1e-2
    assert merged.kv_bytes_per_token == bytes_per_token(planned_spec(with_storage(plan, "float32"), model.config))
    save(merged, tmp_path / "saved")
    back = load(tmp_path / "saved")
    np.testing.assert_array_equal(np.asarray(back(TOKENS, MASK))[MASK], logits)
    small = quantize(merged, with_storage(plan, "int8"))
    assert small.kv_bytes_per_token < merged.kv_bytes_per_token
    assert generate_tokens(small, TOKENS[:2, :9].tolist(), max_new_tokens=8, stop=False) == naive(small, 8)
    if share != "kv":
        np.testing.assert_allclose(np.asarray(expand(merged)(TOKENS, MASK))[MASK], logits, atol=1e-4)


def with_storage(plan: Plan, storage: str) -> Plan:
    def stored(layer: LayerPlan) -> LayerPlan:
        clusters = tuple(dataclasses.replace(one, storage=storage) for one in layer.clusters)
        return dataclasses.replace(layer, clusters=clusters)

    return dataclasses.replace(plan, layers=tuple(map(stored, plan.layers)))


def naive(model: Model, count: int) -> list[list[int]]:
    """Greedy tokens, each by a forward pass over all tokens so far."""
    tokens, mask = np.zeros((2, 20), np.int32), np.zeros((2, 20), bool)
    tokens[:, :9], mask[:, :9] = TOKENS[:2, :9], True
    for at in range(9, 9 + count):
        tokens[:, at] = np.asarray(model(tokens, mask))[:, at - 1].argmax(axis=-1)
        mask[:, at] = True
    return tokens[:, 9 : 9 + count].tolist()


def test_grouped_queries_are_an_ordinary_model(tmp_path: Path) -> None:
    """A Llama with a key for every query, merged to half of them, is a Llama: ours, and torch's."""
    config = dataclasses.replace(SHAPES["llama"], num_kv_heads=None)
    model = Model(config, Spec.of(config), init(config, Spec.of(config), jax.random.key(0), std=0.3))
    seen = probe(model, WINDOWS)
    merged = cluster(model, grouped_plan(model, seen, 2), seen)
    small = ordinary(merged)
    assert (small.config.num_heads, small.config.kv_heads, small.spec.is_dense) == (4, 2, True)
    logits = np.asarray(merged(TOKENS, MASK))[MASK]
    np.testing.assert_allclose(np.asarray(small(TOKENS, MASK))[MASK], logits, atol=1e-5)
    assert small.kv_bytes_per_token == merged.kv_bytes_per_token == model.kv_bytes_per_token / 2
    export(small, tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "out")(TOKENS, MASK)), np.asarray(small(TOKENS, MASK)))
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert theirs.config.num_key_value_heads == 2
    positions = torch.tensor(np.maximum(MASK.cumsum(axis=1) - 1, 0))
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS.astype(np.int64)), attention_mask=torch.tensor(MASK), position_ids=positions)
    np.testing.assert_allclose(found.logits.numpy()[MASK], logits, atol=1e-4)


def test_a_family_without_grouped_queries_has_no_such_model() -> None:
    config = SHAPES["gpt_neox"]
    model = Model(config, Spec.of(config), init(config, Spec.of(config), jax.random.key(0), std=0.3))
    seen = probe(model, WINDOWS)
    merged = cluster(model, grouped_plan(model, seen, 2), seen)
    whole = ordinary(merged)
    assert whole.config == config
    np.testing.assert_allclose(np.asarray(whole(TOKENS, MASK))[MASK], np.asarray(merged(TOKENS, MASK))[MASK], atol=1e-4)


def test_refusals() -> None:
    config = SHAPES["llama"]
    both = (LayerPlan((ClusterPlan((0, 1)),)),) * 2
    cut = (LayerPlan((ClusterPlan((0, 1)),), key_rank=7, value_rank=8),) * 2
    for plan, message in [
        (Plan(both, "qkv", value_merge="fit"), "fits values to attention, of which each value head of the model has 2"),
        (Plan(both, "qk", "prompt"), "finds clusters per prompt, the model has 2 queries for each key head"),
        (Plan(cut, "kv"), "has key_rank 7; rotary keys are complex numbers: expected an even rank"),
    ]:
        plan.check()
        with pytest.raises(InputError, match=message):
            plan.check_model(config)
