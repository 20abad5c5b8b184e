"""Plans find what was planted, obey the tier table, and cost what they say."""

import dataclasses
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from chai_jax.analyse.explain import explain, explain_table
from chai_jax.analyse.planner import plan, redundancy
from chai_jax.analyse.probe import Probe, probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.plans.plan import ClusterPlan, Plan
from chai_jax.plans.planned import planned_spec

Make = Callable[..., Model]
TWINS = {0: 1, 2: 3}  # head -> the head that is made a copy of it


def twinned(model: Model, layers: tuple[str, ...], names: tuple[str, ...]) -> Model:
    """Copy heads: their queries and keys (and values) are then exactly redundant."""
    for layer in layers:
        for name in names:
            leaves = model.params["layers"][layer][name]
            for leaf, values in leaves.items():
                for head, copy in TWINS.items():
                    leaves[leaf] = values = values.at[..., copy, :].set(values[..., head, :])
    return model


def heads_of(made: Plan, layer: int) -> list[tuple[int, ...]]:
    return [one.heads for one in made.layers[layer].clusters]


@pytest.mark.parametrize(("share", "copied"), [("qk", ("query", "key")), ("qkv", ("query", "key", "value"))])
def test_planted_twins_are_found_and_merging_them_costs_nothing(
    make: Make, windows: list[list[int]], share: str, copied: tuple[str, ...]
) -> None:
    model = twinned(make(), ("0", "1", "2"), copied)
    made = plan(model, probe(model, windows), share=share, layers=1.0, clusters=4, sensitivity="attention")
    for layer in range(3):
        assert heads_of(made, layer) == [(0, 1), (2, 3), (4,), (5,)]
        assert [one.keep for one in made.layers[layer].clusters] == [0, 2, 4, 5]
    tokens = np.asarray([windows[0], windows[4]], np.int32)
    clustered = cluster(model, made)
    assert [layer.key_heads for layer in clustered.spec.layers] == [4, 4, 4]
    np.testing.assert_allclose(clustered(tokens), model(tokens), atol=1e-4)


def test_the_most_redundant_layers_are_clustered(make: Make, windows: list[list[int]]) -> None:
    model = twinned(make(), ("1",), ("query", "key"))
    found = probe(model, windows)
    few = plan(model, found, share="qk", layers=1 / 3, clusters=4, sensitivity="attention")
    assert [layer.clustered for layer in few.layers] == [False, True, False]
    assert heads_of(few, 0) == [(head,) for head in range(6)]
    for layers, clustered in ((0.0, 0), (0.34, 2), (0.5, 2), (1.0, 3)):
        made = plan(model, found, share="qk", layers=layers, clusters=4, sensitivity="attention")
        assert sum(layer.clustered for layer in made.layers) == clustered


def test_redundancy_is_the_mean_correlation_with_the_stand_in() -> None:
    correlation = np.asarray([[1, 0.9, 0.1, 0.3], [0.9, 1, 0.2, 0.5], [0.1, 0.2, 1, 0.6], [0.3, 0.5, 0.6, 1]])
    clusters = [ClusterPlan((0, 1, 3), 1), ClusterPlan((2,), 2)]
    assert redundancy(correlation, clusters) == pytest.approx((0.9 + 0.5) / 2)
    assert redundancy(correlation, [ClusterPlan((head,), head) for head in range(4)]) == -math.inf


def test_no_knee_leaves_a_layer_alone(make: Make, windows: list[list[int]]) -> None:
    model = make()
    found = probe(model, windows)
    # Heads that are all equally unlike: inertia falls along a straight line.
    unlike = dataclasses.replace(found, attention=np.stack([np.eye(6)] * 3))
    made = plan(model, unlike, layers=1.0, sensitivity="attention")
    assert not any(layer.clustered for layer in made.layers)


@pytest.mark.parametrize(("share", "saved"), [("qk", 5 / 12), ("qkv", 5 / 6)])
def test_a_layer_of_copies_is_clustered_and_saves(
    make: Make, windows: list[list[int]], share: str, saved: float
) -> None:
    """One head stands for six: of keys and values, or of keys alone."""
    model = make()
    for name in ("query", "key", "value"):
        leaves = model.params["layers"]["1"][name]
        for leaf, values in leaves.items():
            leaves[leaf] = values.at[..., 1:, :].set(values[..., :1, :])
    made = plan(model, probe(model, windows), share=share, layers=1 / 3, sensitivity="attention")
    assert [layer.clustered for layer in made.layers] == [False, True, False]
    assert heads_of(made, 1) == [(0, 1, 2, 3, 4, 5)]
    storage = made.layers[1].clusters[0].storage
    wanted = saved if storage == "bfloat16" else 1
    assert explain(made, model.config)[1]["kv_reduction"] == pytest.approx(wanted)
    tokens = np.asarray([windows[0], windows[4]], np.int32)
    np.testing.assert_allclose(cluster(model, made)(tokens), model(tokens), atol=1e-4)


def with_scores(found: Probe, *scores: float) -> Probe:
    return dataclasses.replace(found, scores=np.asarray(scores, np.float64))


def test_formats_follow_the_tier_table(make: Make, windows: list[list[int]]) -> None:
    model = make(dataclasses.replace(make().config, num_layers=5))
    found = with_scores(probe(model, windows), 1, 5, 3, 2, 4)
    made = plan(model, found, layers=0.6, clusters=3, sensitivity="attention")
    assert [layer.tier for layer in made.layers] == ["low", "high", "medium", "medium", "medium"]
    assert made.sensitivity == (1, 5, 3, 2, 4)
    for layer in made.layers:
        assert any(one.critical for one in layer.clusters)
        important = {one.storage for one in layer.clusters if one.critical}
        redundant = {one.storage for one in layer.clusters if not one.critical}
        assert important == {"int8" if layer.tier == "low" else "bfloat16"}
        assert redundant == {"bfloat16" if layer.tier == "high" else "int8"}
        assert layer.weights == {"high": "loaded", "medium": "bfloat16", "low": "int8"}[layer.tier]
    one = plan(model, found, layers=1.0, clusters=1, sensitivity="attention")
    # A lone cluster is critical.
    assert [layer.clusters[0].storage for layer in one.layers] == ["int8"] + ["bfloat16"] * 4


def test_clusters_of_prompts_have_one_storage_per_layer(make: Make, windows: list[list[int]]) -> None:
    model = make()
    found = probe(model, windows)
    made = plan(model, found, share="qk", membership="prompt", clusters=0.5, sensitivity="attention")
    made.check()
    medium = next(layer for layer in made.layers if layer.tier == "medium")
    assert {one.storage for one in medium.clusters} == {"bfloat16"}
    small = quantize(cluster(model, made), made)
    assert small.spec == planned_spec(made, model.config)
    assert {layer.membership for layer in small.spec.layers} == {"calibrated", "prompt"}
    assert explain(made, model.config)[-1]["kv_bytes_per_token"] == small.kv_bytes_per_token
    longer = dataclasses.replace(made, warmup_tokens=9)
    assert "per prompt (9 tokens)" in str(explain_table(longer).title)
    assert {layer.warmup for layer in planned_spec(longer, model.config).layers} == {0, 9}
    with pytest.raises(InputError, match="warmup_tokens is 0"):
        plan(model, found, share="qk", membership="prompt", warmup_tokens=0)
    with pytest.raises(InputError, match="prompt membership with share 'qkv'"):
        plan(model, found, share="qkv", membership="prompt")


@pytest.mark.parametrize(("share", "method"), [("qk", "attention"), ("qk", "perturbation"), ("qkv", "kl")])
def test_a_plan_is_json_and_explained_as_it_is_done(
    make: Make, windows: list[list[int]], share: str, method: str
) -> None:
    model = make()
    made = plan(model, probe(model, windows), share=share, clusters=0.5, sensitivity=method)
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.method == method
    small = quantize(cluster(model, made), made)
    assert small.spec == planned_spec(made, model.config)
    *rows, total = explain(made, model.config)
    assert total["kv_bytes_per_token"] == small.kv_bytes_per_token == sum(row["kv_bytes_per_token"] for row in rows)
    assert total["dense_kv_bytes_per_token"] == 3 * 2 * 48 * 2
    assert total["kv_reduction"] == pytest.approx(1 - small.kv_bytes_per_token / (3 * 2 * 48 * 2))
    for row, layer in zip(rows, small.spec.layers, strict=True):
        assert row["storage"].get("int8", 0) == layer.storages.count("int8")
    assert json.loads(json.dumps(rows)) == rows


def test_a_plan_is_the_same_twice(make: Make, windows: list[list[int]]) -> None:
    model = make()
    made: list[Any] = [plan(model, probe(model, windows), clusters=3, seed=4) for _ in range(2)]
    assert made[0] == made[1]


def test_the_table_fits_a_terminal(make: Make, windows: list[list[int]]) -> None:
    model = make()
    made = plan(model, probe(model, windows), clusters=3, sensitivity="attention")
    for config in (None, model.config):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(explain_table(made, config))
        lines = [line for line in console.export_text().splitlines() if line.strip()]
        rows = [first for first in (line.split()[0] for line in lines) if first == "total" or first.isdecimal()]
        assert rows == ["0", "1", "2", *(["total"] if config else [])]
        assert not any("…" in line for line in lines)
        assert any("B/token" in line for line in lines) == (config is not None)


def test_unusable_arguments_are_refused(make: Make, windows: list[list[int]]) -> None:
    model = make()
    found = probe(model, windows)
    for arguments, message in (
        ({"layers": 1.5}, "fraction of the layers"),
        ({"layers": -0.1}, "fraction of the layers"),
        ({"clusters": 7}, "a number from 1 to 6"),
        ({"share": "v"}, "share is 'v'"),
        ({"first": "last"}, "redundant, insensitive"),
        ({"rank": 0.0}, "fraction of the width"),
        ({"clusters": "correlation:2"}, "correlation:0.9"),
        ({"membership": "daily"}, "membership is 'daily'"),
        ({"sensitivity": "entropy"}, "method is 'entropy'"),
    ):
        with pytest.raises(InputError, match=message):
            plan(model, found, **arguments)
    with pytest.raises(InputError, match="of another model"):
        plan(model, dataclasses.replace(found, fingerprint="other"))


@pytest.mark.slow
def test_a_plan_for_a_trained_model(shared: Path) -> None:
    model = load(shared / "models" / "opt-mini")
    with gzip.open(shared / "data" / "sst2" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        sentences = [json.loads(next(file))["sentence"] for _ in range(32)]
    found = probe(model, sentences)
    made = plan(model, found)
    assert sum(layer.clustered for layer in made.layers) == 4
    assert [layer.tier for layer in made.layers].count("high") == 2
    assert min(made.sensitivity) > 0
    small = quantize(cluster(model, made), made)
    assert small.kv_bytes_per_token == explain(made, model.config)[-1]["kv_bytes_per_token"] < 8 * 2 * 256 * 2
