"""Specs: groups fold, JSON there and back, what contradicts itself is refused."""

import dataclasses
import json
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.plans.spec import Group, LayerSpec, Spec, group_clusters


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
    value["layers"][1]["groups"][0]["clusters"] = 2**31 - 1  # must not be unrolled
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
        {"membership": "calibrated", "groups": Spec.dense(1, 3, 8).to_json()["layers"][0]["groups"]},
        {"warmup": 0},
        {"share": "qkv"},
        {"clusters": [[2, 0], [1], [3, 4]]},
        {"groups": [{**value["layers"][0]["groups"][0], "assigned": 7}]},
        {"groups": value["layers"][0]["groups"] * 2},
    ]
    for change in tampered:
        with pytest.raises(InputError, match="layer 0 contradicts itself"):
            Spec.from_json({"layers": [{**value["layers"][0], **change}]})


HUGE = 10**400
NO_NUMBERS = [None, -1, 4.0, True, "4", [], {}, float("nan"), 2**31, 2**70, HUGE]
NO_NAMES = [None, "zzz", "", 1, True, [], ["qk"], {}]
WRONG: dict[type, dict[str, list[Any]]] = {
    LayerSpec: {
        "share": NO_NAMES,
        "clusters": [None, {}, 4, [0, 1], *([[0], [wrong]] for wrong in NO_NUMBERS)],
        "groups": [None, {}, 4, [None], [[]]],
        "key_rank": [0, *NO_NUMBERS],
        "value_rank": [0, *NO_NUMBERS],
        "weights": [*NO_NAMES, "float32"],
        "membership": NO_NAMES,
        "warmup": NO_NUMBERS,
        "queries": [0, *NO_NUMBERS],
        "window": NO_NUMBERS,
        "pairs": [None, {}, 4, [0, 1], *([[0], [wrong]] for wrong in NO_NUMBERS)],
        "channels": [None, {}, 4, [0, 1], [[4]], [[4, 1, 1]], *([[4, wrong]] for wrong in [0, *NO_NUMBERS])],
    },
    Group: {
        "clusters": [0, *NO_NUMBERS],
        "queries": [0, *NO_NUMBERS],
        "values": [0, *NO_NUMBERS],
        "storage": [*NO_NAMES, "loaded"],
        "assigned": NO_NUMBERS,
    },
}


def one_layer() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(Spec.dense(1, 4, 8, "int8").to_json()))
    return value


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, fields in WRONG.items() for name in fields])
def test_what_a_field_cannot_be(kind: type, name: str) -> None:
    for wrong in WRONG[kind][name]:
        value = one_layer()
        where = value["layers"][0] if kind is LayerSpec else value["layers"][0]["groups"][0]
        where[name] = wrong
        with pytest.raises(InputError, match=rf"layers\[0\]\..*\b{name}\b.*; expected .*: save the model") as caught:
            Spec.from_json(value)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", WRONG)
def test_every_field_was_tried(kind: type) -> None:
    assert set(WRONG[kind]) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("kind", WRONG)
def test_no_field_may_be_left_out(kind: type) -> None:
    """A spec says what is there: a storage that is not said is not float32."""
    for field in dataclasses.fields(kind):
        value = one_layer()
        if "later" in field.metadata:  # files of earlier versions do not have it
            assert field.name not in value["layers"][0]
            assert Spec.from_json(value) == Spec.dense(1, 4, 8, "int8")
            continue
        del (value["layers"][0] if kind is LayerSpec else value["layers"][0]["groups"][0])[field.name]
        with pytest.raises(InputError, match=f"has no {field.name}; expected"):
            Spec.from_json(value)


@pytest.mark.parametrize("clusters", [[], [[0, 1], []]], ids=["no cluster", "an empty cluster"])
def test_clusters_without_heads(clusters: list[list[int]]) -> None:
    value = one_layer()
    group = {"clusters": len(clusters) or 1, "queries": 1, "values": 1, "storage": "int8", "assigned": 0}
    value["layers"][0] |= {"share": "qkv", "clusters": clusters, "groups": [group] if clusters else []}
    with pytest.raises(InputError, match="layer 0 contradicts itself"):
        Spec.from_json(value)
