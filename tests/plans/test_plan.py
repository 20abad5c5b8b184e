"""Plans: JSON there and back, and every contradiction refused by name."""

import copy
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan

LAYER = LayerPlan((ClusterPlan((0, 2), 2, storage="int8"), ClusterPlan((1,), 1)), tier="medium", weights="bfloat16")
PLAN = Plan((LAYER, LAYER), share="qk", sensitivity=(0.5, 0.25))


def test_plan_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN.to_json()))
    assert Plan.read(path) == PLAN


def broken(**changes: Any) -> dict[str, Any]:
    """The plan as JSON with some entries of layer 1 (or of the plan) replaced."""
    value = copy.deepcopy(json.loads(json.dumps(PLAN.to_json())))
    for name, change in changes.items():
        (value["layers"][1] if name in ("clusters", "tier", "weights", "key_rank") else value)[name] = change
    return value


def parts(*clusters: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"keep": cluster["heads"][0] if cluster["heads"] else 0, "storage": "int8", **cluster} for cluster in clusters
    ]


CONTRADICTIONS = [
    ({"share": "everything"}, "share is 'everything'; expected one of qk, qkv, kv"),
    ({"shares": 1}, "unknown field 'shares'"),
    ({"layers": {}}, "plan.layers is {}; expected a list"),
    ({"tier": "urgent"}, "layers[1].tier is 'urgent'; expected one of high, medium, low"),
    ({"weights": "int3"}, "layers[1].weights is 'int3'"),
    ({"clusters": parts({"heads": [0, 1, 2], "storage": "int2"})}, "layers[1].clusters[0].storage is 'int2'"),
    (
        {"clusters": parts({"heads": [0, 1, 2], "storage": ["int8", "bfloat16"]})},
        "layers[1].clusters[0].storage is ['int8'",
    ),
    ({"clusters": parts({"heads": [0, 1]}, {"heads": [1, 2]})}, "layer 1 has head 1 in two places"),
    (
        {"clusters": parts({"heads": [0, 1]})[:1] + parts({"heads": [5]})},
        "layer 1 lacks head 2; expected every head",
    ),
    ({"clusters": parts({"heads": [0, 1, 2], "keep": 7})}, "layer 1 cluster 0 keeps head 7"),
    ({"clusters": parts({"heads": []}, {"heads": [0, 1, 2]})}, "layer 1 cluster 0 keeps"),
    ({"clusters": parts({"heads": [0, 1, 2, 2]})}, "layer 1 has head 2 in two places"),
    ({"clusters": []}, "layer 1 lacks head 0"),
    ({"key_rank": 8}, "layer 1 has key_rank 8 with share 'qk'"),
    ({"membership": "prompt", "share": "qkv"}, "prompt membership with share 'qkv'"),
    ({"membership": "prompt"}, "layer 0: prompt membership with two storages"),
    ({"sensitivity": [1.0]}, "1 sensitivities for 2 layers"),
    ({"sensitivity": "high"}, "sensitivity is 'high'; expected a list"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS])
def test_contradictions_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Plan.from_json(broken(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


HUGE = 10**400
NO_COUNTS = [0, -1, 4.0, True, "4", [], {}, float("nan"), 2**31, 2**70, HUGE]
NO_COSTS = ["x", True, [], {}, float("nan"), float("inf"), HUGE]
NO_NAMES = [None, "zzz", "", 1, True, [], ["qk"], {}]
WRONG: dict[type, dict[str, list[Any]]] = {
    Plan: {
        "layers": [None, {}, "x", 4, [None], [[]], [4]],
        "share": [*NO_NAMES, "dense"],
        "membership": NO_NAMES,
        "score_merge": [*NO_NAMES, "fit"],
        "value_merge": NO_NAMES,
        "warmup_tokens": [None, *NO_COUNTS],
        "sensitivity": [None, 0.5, {}, "high", *([0.5, wrong] for wrong in [None, *NO_COSTS])],
        "method": NO_NAMES,
        "predicted": NO_COSTS,
        "measured": NO_COSTS,
    },
    LayerPlan: {
        "clusters": [None, {}, "x", 4, [None], [[0, 1, 2]]],
        "tier": NO_NAMES,
        "weights": [*NO_NAMES, "float32"],
        "share": [*NO_NAMES[1:], "dense"],
        "key_rank": NO_COUNTS,
        "value_rank": NO_COUNTS,
        "query_clusters": [None, {}, "x", 4, [None], [[4]], *([[[0, wrong]]] for wrong in [None, *NO_COUNTS[1:]])],
        "channels": [None, {}, "x", 4, [4], [[4]], *([[4, wrong]] for wrong in NO_COUNTS)],
    },
    ClusterPlan: {
        "heads": [None, 0, {}, "02", *([0, wrong] for wrong in [None, *NO_COUNTS[1:]])],
        "keep": [None, *NO_COUNTS[1:]],
        "critical": [None, 0, 1, "true", []],
        "storage": [*NO_NAMES, "loaded"],
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, fields in WRONG.items() for name in fields])
def test_what_a_field_cannot_be(tmp_path: Path, kind: type, name: str) -> None:
    for wrong in WRONG[kind][name]:
        value = broken()
        where = {Plan: value, LayerPlan: value["layers"][1], ClusterPlan: value["layers"][1]["clusters"][0]}[kind]
        where[name] = wrong
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(value))
        with pytest.raises(InputError, match=rf"plan\.json: plan\b.*\b{name}\b.*; expected .*: mend it") as caught:
            Plan.read(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("kind", WRONG)
def test_every_field_was_tried(kind: type) -> None:
    assert set(WRONG[kind]) == {field.name for field in dataclasses.fields(kind)}


def test_plans_that_were_made_are_checked_the_same() -> None:
    PLAN.check()
    for changes, message in (
        ({"predicted": float("nan")}, r"predicted is nan"),
        ({"method": "zzz"}, r"method is 'zzz'; expected one of attention, perturbation, kl"),
        ({"layers": (LAYER, dataclasses.replace(LAYER, weights="int3"))}, r"layers\[1\]\.weights is 'int3'"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(PLAN, **changes).check()


def test_what_may_be_left_out() -> None:
    """A plan written by hand names what it changes."""
    short = {"layers": [{"clusters": [{"heads": [1, 0]}, {"heads": [2]}]}]}
    layer = LayerPlan((ClusterPlan((1, 0), 1), ClusterPlan((2,), 2)))
    assert Plan.from_json(short) == Plan((layer,))
    assert Plan.from_json(json.loads(json.dumps({**broken(), "predicted": 1, "sensitivity": [1, -2]}))).predicted == 1.0


def test_many_heads_take_time_in_proportion() -> None:
    began = time.process_time()
    clusters = [{"heads": [0]}, {"heads": [*range(1, 40_000), 7]}]
    with pytest.raises(InputError, match="head 7 in two places") as caught:
        Plan.from_json({"layers": [{"clusters": clusters}]})
    assert len(str(caught.value)) < 200
    assert time.process_time() - began < 10  # each head counted among all others: more than 20 seconds


@pytest.mark.parametrize("name", ["fifo", "zero", "folder", "deep", "latin", "long"])
def test_files_that_are_no_plans_are_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "plan.json"
    contents = {"deep": b"[" * 100_000, "latin": b'{"layers": "\xe9"}', "long": b'{"layers": 1' + b"0" * 5000 + b"}"}
    if name == "fifo":
        os.mkfifo(path)
    elif name == "zero":
        path.symlink_to("/dev/zero")
    elif name == "folder":
        path.mkdir()
    else:
        path.write_bytes(contents[name])
    with pytest.raises(InputError, match=r"plan\.json.*; expected a plan\.json"):
        Plan.read(path)


def test_a_byte_order_mark_is_no_part_of_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN.to_json()), encoding="utf-8-sig")
    assert Plan.read(path) == PLAN


def test_unreadable_plans(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.json .*; expected a plan\.json"):
        Plan.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        Plan.read(tmp_path / "bad.json")


def shape(layers: int, heads: int, width: int) -> Architecture:
    return Architecture(64, width, layers, heads, 64, 64, width)


def test_plan_for_another_model_is_refused() -> None:
    PLAN.check_model(shape(2, 3, 48))
    with pytest.raises(InputError, match="the model has 2 layers of 4 heads"):
        PLAN.check_model(shape(2, 4, 48))
    latent = LayerPlan((ClusterPlan((0, 1, 2), 0),), share="kv", key_rank=48, value_rank=49)
    Plan((latent,)).check()
    Plan((latent,)).check_model(shape(1, 3, 49))
    with pytest.raises(InputError, match="plan layer 0 has rank 49; expected at most the model's width, 48"):
        Plan((latent,)).check_model(shape(1, 3, 48))
