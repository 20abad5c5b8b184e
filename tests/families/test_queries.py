"""Queries of a key head that attend alike are merged: exact for copies, else what torch says of shared attention."""

import dataclasses
import io
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from chai_jax.analyse.explain import explain, explain_table
from chai_jax.analyse.planner import grouped_plan
from chai_jax.analyse.planner import plan as make_plan
from chai_jax.analyse.probe import Probe, probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.expand import expand, ordinary
from chai_jax.compress.quantize import quantize
from chai_jax.config import PlanConfig
from chai_jax.errors import InputError
from chai_jax.files.export import export
from chai_jax.files.store import load, save
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.flops import count_flops
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan, QueryClusters
from chai_jax.plans.planned import planned_spec
from chai_jax.plans.spec import Spec
from chai_jax.run.options import check_options, plan_for
from chai_jax.run.work import Work
from chai_jax.serve.generate import generate_tokens

# Two key heads, each read by four queries.
LLAMA = Architecture(
    *(67, 32, 2, 8, 48, 64, 32), num_kv_heads=2, bias=False, activation="silu", norm="rms", gated=True,
    position_offset=0, rotary=Rotary(), family="llama",
)  # fmt: skip
QWEN2 = dataclasses.replace(LLAMA, bias=("query", "key", "value"), family="qwen2")
TOKENS = np.random.default_rng(0).integers(3, 60, (3, 20)).astype(np.int32)
MASK = np.arange(20) >= np.array([[0], [7], [0]])
WINDOWS = np.random.default_rng(1).integers(3, 60, (12, 16)).tolist()
HALF: QueryClusters = (((2, 0), (1, 3)), ((0,), (3, 1, 2)))
SINGLE = (ClusterPlan((0,)), ClusterPlan((1,)))
BOTH = (ClusterPlan((0, 1), 1),)
HALVED = Plan((LayerPlan(SINGLE, query_clusters=HALF),) * 2)


@cache
def model_of(config: Architecture) -> Model:
    params = init(config, Spec.of(config), jax.random.key(0), std=0.3)
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(noise))
    params = jax.tree.map(lambda leaf, key: leaf + 0.1 * jax.random.normal(key, leaf.shape), params, keys)
    return Model(config, Spec.of(config), params)


@cache
def probed() -> Probe:
    return probe(model_of(LLAMA), WINDOWS)


def logits(model: Model) -> np.ndarray:
    return np.asarray(model(TOKENS, MASK))[MASK]


def with_copies(model: Model, clusters: QueryClusters, noise: float = 0.0) -> Model:
    """The dense model in which every query of a cluster is (nearly) its first; all outputs are as they were."""
    layers, random = {}, np.random.default_rng(2)
    for index, layer in model.params["layers"].items():
        query = {}
        for name, leaf in layer["query"].items():
            new = np.array(leaf)
            for head, own in enumerate(clusters):
                for first, *others in own:
                    for other in others:
                        copy = new[..., 4 * head + first, :]
                        new[..., 4 * head + other, :] = copy + noise * random.normal(size=copy.shape)
            query[name] = jnp.asarray(new)
        layers[index] = {**layer, "query": query}
    return model.replace(params={**model.params, "layers": layers})


def torch_logits(folder: Path, kind: str) -> np.ndarray:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").eval()
    positions = torch.tensor(np.maximum(MASK.cumsum(axis=1) - 1, 0))
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS.astype(np.int64)), attention_mask=torch.tensor(MASK), position_ids=positions)
    return cast("np.ndarray", found.logits.numpy()[MASK])


@pytest.mark.parametrize(
    "config", [pytest.param(LLAMA, id="llama"), pytest.param(QWEN2, id="qwen2", marks=[pytest.mark.slow])]
)
def test_copies_merge_exactly(config: Architecture) -> None:
    model = with_copies(model_of(config), (((0, 1, 2, 3),), ((0, 1, 2, 3),)))
    made = make_plan(model, probe(model, WINDOWS), queries=1, clusters=2, sensitivity="attention")
    merged = cluster(model, made)
    assert [layer.queries for layer in merged.spec.layers] == [1, 1]
    np.testing.assert_allclose(logits(merged), logits(model), atol=1e-5)
    assert merged.kv_bytes_per_token == model.kv_bytes_per_token


def test_shared_attention_is_what_torch_says_of_it(tmp_path: Path) -> None:
    """torch's model has all queries, those of a cluster with one projection: so they attend alike, and add up."""
    model = model_of(LLAMA)
    export(with_copies(model, HALF), tmp_path / "out")
    merged = cluster(model, HALVED)
    assert np.abs(logits(merged) - logits(model)).max() > 1e-2
    np.testing.assert_allclose(logits(merged), torch_logits(tmp_path / "out", "LlamaForCausalLM"), atol=1e-4)


def naive(model: Model, count: int) -> list[list[int]]:
    """Greedy tokens, each by a forward pass over all tokens so far."""
    tokens, mask = np.zeros((2, 20), np.int32), np.zeros((2, 20), bool)
    tokens[:, :9], mask[:, :9] = TOKENS[:2, :9], True
    for at in range(9, 9 + count):
        tokens[:, at] = np.asarray(model(tokens, mask))[:, at - 1].argmax(axis=-1)
        mask[:, at] = True
    return tokens[:, 9 : 9 + count].tolist()


LOW_RANK = {"score_merge": "low_rank", "value_merge": "low_rank"}
MERGES: dict[str, tuple[tuple[ClusterPlan, ...], dict[str, Any]]] = {
    "queries": (SINGLE, {}),
    "then qk": (BOTH, {"share": "qk"}),
    "then qkv": (BOTH, {}),
    "then low rank": (BOTH, LOW_RANK),
    "then kv": (BOTH, {"share": "kv"}),
}


USUAL = ("queries",)
TRIED = [pytest.param(merge, marks=[] if merge in USUAL else [pytest.mark.slow]) for merge in MERGES]


@pytest.mark.parametrize("merge", TRIED)
def test_what_is_merged(tmp_path: Path, merge: str) -> None:
    """Cached decoding says what the uncached model says; saved, quantized and expanded it is the same model."""
    clusters, merges = MERGES[merge]
    model, plan = model_of(QWEN2), Plan((LayerPlan(clusters, query_clusters=HALF),) * 2, **merges)
    merged = cluster(model, plan, probe(model, WINDOWS) if plan.needs_text else None)
    assert not merged.spec.is_dense
    assert {layer.queries for layer in merged.spec.layers} == {2}
    assert merged.kv_bytes_per_token == bytes_per_token(planned_spec(with_storage(plan, "float32"), model.config))
    save(merged, tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert (back.spec, back.plan) == (merged.spec, plan)
    np.testing.assert_array_equal(logits(back), logits(merged))
    small = quantize(merged, with_storage(plan, "int8"))
    assert generate_tokens(small, TOKENS[:2, :9].tolist(), max_new_tokens=8, stop=False) == naive(small, 8)
    whole = expand(merged)
    assert whole.spec.is_dense
    assert whole.spec == Spec.of(QWEN2) or merge.startswith("then")
    np.testing.assert_allclose(logits(whole), logits(merged), atol=1e-4)


def with_storage(plan: Plan, storage: str) -> Plan:
    def stored(layer: LayerPlan) -> LayerPlan:
        clusters = tuple(dataclasses.replace(one, storage=storage) for one in layer.clusters)
        return dataclasses.replace(layer, clusters=clusters)

    return dataclasses.replace(plan, layers=tuple(map(stored, plan.layers)))


@pytest.mark.parametrize("count", [pytest.param(1, marks=[pytest.mark.slow]), 2])
def test_fewer_queries_are_an_ordinary_model(tmp_path: Path, count: int) -> None:
    """Which torch reads; it has fewer heads, as wide as they were."""
    merged = cluster(model_of(LLAMA), make_plan(model_of(LLAMA), probed(), queries=count, clusters=2))
    small = ordinary(merged)
    assert (small.config.num_heads, small.config.kv_heads, small.config.head_dim) == (2 * count, 2, 4)
    assert small.spec.is_dense
    assert small.nbytes < model_of(LLAMA).nbytes
    export(small, tmp_path / "out")
    np.testing.assert_allclose(torch_logits(tmp_path / "out", "LlamaForCausalLM"), logits(merged), atol=1e-4)


def test_some_layers_alone_expand(tmp_path: Path) -> None:
    plan = Plan((LayerPlan(SINGLE), LayerPlan(SINGLE, query_clusters=HALF)))
    merged = cluster(model_of(QWEN2), plan)
    assert merged.spec.layers[0] == model_of(QWEN2).spec.layers[0]
    whole = ordinary(merged)
    assert whole.config == QWEN2
    export(whole, tmp_path / "out")
    np.testing.assert_allclose(torch_logits(tmp_path / "out", "Qwen2ForCausalLM"), logits(merged), atol=1e-4)


def test_heads_and_queries_at_once() -> None:
    """One key head of two queries for each of the two that it was made from: an ordinary model too."""
    plan = grouped_plan(model_of(LLAMA), probed(), 1, queries=2)
    merged = cluster(model_of(LLAMA), plan, probed())
    small = ordinary(merged)
    assert (small.config.num_heads, small.config.kv_heads) == (4, 1)
    np.testing.assert_allclose(logits(small), logits(merged), atol=1e-5)


def test_planted_groups_are_found() -> None:
    planted: QueryClusters = (((2, 0), (1, 3)), ((0, 1), (2, 3)))
    model = with_copies(model_of(LLAMA), planted, noise=0.01)
    made = make_plan(model, probe(model, WINDOWS), queries=2, clusters=2)
    wanted = [{frozenset({0, 2}), frozenset({1, 3})}, {frozenset({0, 1}), frozenset({2, 3})}]
    for layer in made.layers:
        assert not layer.clustered
        assert [set(map(frozenset, own)) for own in layer.query_clusters] == wanted


def test_queries_of_two_heads_are_paired_as_they_attend() -> None:
    """Two equal keys, whose like queries stand in another order: queries merge, then the heads, and nothing is lost."""
    model = with_copies(model_of(LLAMA), (((0, 1), (2, 3)), ((0, 1), (2, 3))))
    layers = {}
    for index, layer in model.params["layers"].items():
        query, key = layer["query"]["kernel"], layer["key"]["kernel"]
        query = query.at[:, 4:].set(query[:, np.asarray([2, 3, 0, 1])])
        layers[index] = {**layer, "query": {"kernel": query}, "key": {"kernel": key.at[:, 1].set(key[:, 0])}}
    model = model.replace(params={**model.params, "layers": layers})
    seen = probe(model, WINDOWS)
    assert (seen.correlation[:, 0, 1] < 0.9).all()
    made = make_plan(model, seen, queries=2, clusters=1, layers=1.0, share="qk", sensitivity="attention")
    np.testing.assert_allclose(logits(cluster(model, made)), logits(model), atol=1e-5)


def test_queries_are_compared_as_heads_are(tmp_path: Path) -> None:
    """Sums over the queries of a head, one by one, are the head's; an earlier version's probe has no others."""
    seen = probed()
    assert seen.queries is not None
    np.testing.assert_allclose(np.einsum("lhjgj->lhg", seen.queries.reshape(2, 2, 4, 2, 4)), seen.attention, rtol=1e-5)
    seen.save(tmp_path / "probe.npz")
    np.testing.assert_array_equal(cast("np.ndarray", Probe.load(tmp_path / "probe.npz").queries), seen.queries)
    dataclasses.replace(seen, queries=None).save(tmp_path / "older.npz")
    older = Probe.load(tmp_path / "older.npz")
    make_plan(model_of(LLAMA), older, clusters=1, sensitivity="attention")
    with pytest.raises(InputError, match="the probe records none apart"):
        make_plan(model_of(LLAMA), older, queries=2, clusters=1)


def test_heads_are_compared_by_the_queries_that_stay() -> None:
    """Key heads whose kept queries attend alike form a cluster, whatever the others did."""
    model = model_of(dataclasses.replace(LLAMA, num_heads=12, num_kv_heads=3, head_size=4))
    seen = probe(model, WINDOWS)
    made = make_plan(model, seen, queries=4, clusters=2, layers=1.0, sensitivity="attention")
    assert all(not layer.query_clusters and layer.clustered for layer in made.layers)
    less = make_plan(model, seen, queries=1, clusters=2, layers=1.0, sensitivity="attention")
    assert seen.queries is not None
    for index, layer in enumerate(less.layers):
        kept = [4 * head + own[0][0] for head, own in enumerate(layer.query_clusters)]
        gram = seen.queries[index][np.ix_(kept, kept)]
        found = gram / np.sqrt(np.outer(gram.diagonal(), gram.diagonal()))
        pair = next(one.heads for one in layer.clusters if len(one.heads) == 2)
        assert found[pair] == max(found[a, b] for a, b in [(0, 1), (0, 2), (1, 2)])


def test_what_is_said_of_it(tmp_path: Path) -> None:
    rows = explain(HALVED, LLAMA)
    assert [row["queries"] for row in rows[:2]] == [{"kept": 2, "of": 4}] * 2
    assert rows[-1]["kv_reduction"] == 0
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(explain_table(HALVED, LLAMA))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "Q/n" in text
    assert "2/4" in text
    assert "queries" not in explain(Plan((LayerPlan(SINGLE),)))[0]
    merged = cluster(model_of(LLAMA), HALVED)
    dense, fewer = (count_flops(LLAMA, model.spec) for model in (model_of(LLAMA), merged))
    assert fewer.pair == dense.pair / 2
    # Of the query and the output projection, each [32, 8, 4], half is left, in two layers.
    assert dense.token - fewer.token == 2 * 2 * 2 * 32 * 4 * 4
    save(merged, tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| 0 | qkv, 2 of 4 queries a key head | 2 | 2 |" in card


CANNOT: list[tuple[Any, str]] = [
    ((((0, 1), (2, 3)),), r"query_clusters of 1 heads; expected an entry for each of its 2"),
    ((((0, 1), (2, 3)), ((0, 1), (3, 3))), r"query_clusters\[1\] is .*; expected each query of the head"),
    ((((0, 1), (2, 3)), ((0, 1), (2, 4))), r"query_clusters\[1\] is .*; expected each query of the head"),
    ((((0, 1), (2, 3)), ()), r"query_clusters\[1\] is .*; expected each query of the head"),
    ((((0, 1, 2, 3), ()), ((0, 1), (2, 3))), r"query_clusters\[0\] is .*; expected each query of the head"),
    ((((0, 1), (2, 3)), ((0, 1, 2, 3),)), r"2 clusters of 4 queries for one head, 1 of 4 for another"),
]


@pytest.mark.parametrize(("clusters", "message"), CANNOT)
def test_plans_that_cannot_be(clusters: QueryClusters, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Plan((LayerPlan(SINGLE, query_clusters=clusters),)).check()
    assert "\n" not in str(caught.value)


def test_plans_that_do_not_fit() -> None:
    three = (LayerPlan(SINGLE, query_clusters=(((0, 1, 2),),) * 2),) * 2
    with pytest.raises(InputError, match="query_clusters of 3 queries a head, the model has 4: make a plan for this"):
        Plan(three).check_model(LLAMA)
    with pytest.raises(InputError, match="layer 0 merges queries with prompt membership"):
        dataclasses.replace(HALVED, share="qk", membership="prompt").check()
    with pytest.raises(InputError, match="layer 0 is clustered or quantized already"):
        cluster(cluster(model_of(LLAMA), HALVED), HALVED)


def test_a_folder_that_contradicts_itself(tmp_path: Path) -> None:
    """A dense layer has all of its queries, no layer more."""
    save(cluster(model_of(LLAMA), HALVED), tmp_path / "saved")
    path = tmp_path / "saved" / "spec.json"
    good = json.loads(path.read_text())
    for share, queries in (("dense", 2), ("qkv", 8)):
        value = json.loads(path.read_text())
        value["layers"][0] |= {"share": share, "queries": queries}
        value["layers"][0]["groups"][0]["queries"] = queries
        path.write_text(json.dumps(value))
        with pytest.raises(
            InputError, match=rf"layer 0 has \(queries, window\) \({queries}, 0\), config.json \(4, 0\)"
        ):
            load(tmp_path / "saved")
        path.write_text(json.dumps(good))


OPTIONS: list[tuple[dict[str, Any], Architecture, str]] = [
    ({"queries": 5}, LLAMA, "--queries is 5; expected a number from 1 to 4, the queries of each key head"),
    ({"queries": 1}, Architecture(67, 32, 2, 4, 48, 64, 32), "the model has one query for each key head"),
    ({"queries": 2, "membership": "prompt"}, LLAMA, "--queries is given with --membership prompt"),
    ({"queries": 2, "kv_budget": 0.5}, LLAMA, "--queries is given with --kv-budget"),
]


@pytest.mark.parametrize(("given", "config", "message"), OPTIONS)
def test_options_that_cannot_be(given: dict[str, Any], config: Architecture, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_options(PlanConfig(**given), config)


def test_no_queries_are_none() -> None:
    with pytest.raises(InputError, match="--queries is 0; expected at least 1"):
        PlanConfig(queries=0).check()


@pytest.mark.parametrize(("given", "clusters"), [({}, 2), ({"kv_heads": 1}, 1), ({"clusters": "1", "layers": 1.0}, 1)])
def test_what_the_command_line_asks_for(given: dict[str, Any], clusters: int) -> None:
    """Queries alone leave keys and values as they are; what else is asked for is done too."""
    usual = PlanConfig(layers=0.5, clusters="elbow")
    wanted = PlanConfig(queries=2, sensitivity="attention", **given).filled(usual)
    plan = plan_for(model_of(LLAMA), cast("Work", SimpleNamespace(calibration=WINDOWS)), wanted, 0)
    assert [(len(layer.clusters), layer.queries) for layer in plan.layers] == [(clusters, 2)] * 2
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


# As chai-jax wrote it before queries could be merged.
OLDER = (
    '{"layers": [{"clusters": [{"heads": [0, 1], "keep": 1, "critical": true, "storage": "bfloat16"}], "tier": "high",'
    ' "weights": "loaded", "share": null, "key_rank": null, "value_rank": null}], "share": "qkv", "membership":'
    ' "calibrated", "score_merge": "representative", "value_merge": "representative", "warmup_tokens": 5,'
    ' "sensitivity": [], "method": "kl", "predicted": null, "measured": null}'
)


def test_an_older_plan_is_what_it_was() -> None:
    plan = Plan.from_json(json.loads(OLDER))
    assert plan == Plan((LayerPlan(BOTH),))
    assert json.dumps(plan.to_json()) == OLDER
