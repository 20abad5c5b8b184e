"""Specs: groups fold, JSON there and back, what contradicts itself is refused."""

import json
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.spec import Group, LayerSpec, Spec, group_clusters


def test_groups_fold_equal_neighbours() -> None:
    clusters = [(0,), (1,), (2, 3), (4, 5), (6, 7)]
    storages = ["bfloat16", "bfloat16", "bfloat16", "int8", "int8"]
    assert group_clusters("qk", clusters, storages) == (
        Group(2, 1, 1, "bfloat16"),
        Group(1, 1, 2, "bfloat16"),
        Group(2, 1, 2, "int8"),
    )
    assert group_clusters("qkv", clusters, storages) == (Group(3, storage="bfloat16"), Group(2, storage="int8"))
    assert group_clusters("kv", clusters, storages)[2] == Group(2, 2, 1, "int8")


def test_spec_json_round_trip_and_tampering() -> None:
    spec = Spec.dense(2, 4, 8, "int8")
    value = json.loads(json.dumps(spec.to_json()))
    assert Spec.from_json(value) == spec
    value["layers"][1]["groups"][0]["clusters"] = 3
    with pytest.raises(InputError, match="layer 1 contradicts itself"):
        Spec.from_json(value)
    value["layers"][1]["groups"][0]["clusters"] = 10**12  # must not be unrolled
    with pytest.raises(InputError, match="layer 1 contradicts itself"):
        Spec.from_json(value)
    for bad in ({}, {"layers": [{}]}, [], {"layers": [None]}):
        with pytest.raises(InputError, match=r"not a spec"):
            Spec.from_json(bad)


def test_a_layer_with_clusters_per_prompt_in_json() -> None:
    clusters = ((2, 0), (1,), (3, 4, 5))
    groups = group_clusters("qk", clusters, ["int8"] * 3, "prompt")
    assert groups == (Group(3, storage="int8", assigned=6),)
    layer = LayerSpec("qk", clusters, groups, 8, 8, membership="prompt", warmup=5)
    assert (layer.query_heads, layer.key_heads, layer.value_heads, layer.output_heads) == (3, 3, 6, 6)
    assert layer.projected == (6, 6, 6, 6)
    assert layer.stored_as(["float32"] * 3).groups == (Group(3, assigned=6),)
    value = json.loads(json.dumps(Spec((layer,)).to_json()))
    assert Spec.from_json(value) == Spec((layer,))
    tampered: list[dict[str, Any]] = [
        {"membership": "calibrated"},
        {"membership": "sometimes"},
        {"membership": "calibrated", "groups": Spec.dense(1, 3, 8).to_json()["layers"][0]["groups"]},
        {"warmup": 0},
        {"warmup": -1},
        {"share": "qkv"},
        {"clusters": [[2, 0], [1], [3, 4]]},
        {"groups": [{**value["layers"][0]["groups"][0], "assigned": 7}]},
        {"groups": value["layers"][0]["groups"] * 2},
    ]
    for change in tampered:
        with pytest.raises(InputError, match="layer 0 contradicts itself"):
            Spec.from_json({"layers": [{**value["layers"][0], **change}]})
