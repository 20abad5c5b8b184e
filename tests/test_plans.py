"""Plans: JSON there and back, and every contradiction refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.plans import ClusterPlan, LayerPlan, Plan

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
        (value["layers"][1] if name in ("clusters", "tier", "weights") else value)[name] = change
    return value


def parts(*clusters: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"keep": cluster["heads"][0] if cluster["heads"] else 0, "storage": "int8", **cluster} for cluster in clusters
    ]


CONTRADICTIONS = [
    ({"share": "everything"}, "share 'everything'; expected one of qk, qkv, kv"),
    ({"shares": 1}, "unknown field 'shares'"),
    ({"layers": {}}, "list 'layers'"),
    ({"tier": "urgent"}, "layer 1 has tier 'urgent'"),
    ({"weights": "int3"}, "layer 1 has weights 'int3'"),
    ({"clusters": parts({"heads": [0, 1, 2], "storage": "int2"})}, "layer 1 cluster 0 has storage 'int2'"),
    ({"clusters": parts({"heads": [0, 1, 2], "storage": ["int8", "bfloat16"]})}, "layer 1 cluster 0 has storage"),
    ({"clusters": parts({"heads": [0, 1]}, {"heads": [1, 2]})}, "layer 1 has head 1 in two clusters"),
    ({"clusters": parts({"heads": [0, 1]})[:1] + parts({"heads": [5]})}, "layer 1 clusters heads"),
    ({"clusters": parts({"heads": [0, 1, 2], "keep": 7})}, "layer 1 cluster 0 keeps head 7"),
    ({"clusters": parts({"heads": []}, {"heads": [0, 1, 2]})}, "layer 1 cluster 0 keeps"),
    ({"membership": "prompt", "share": "qkv"}, "prompt membership with share 'qkv'"),
    ({"membership": "prompt"}, "layer 0: prompt membership with two storages"),
    ({"sensitivity": [1.0]}, "1 sensitivities for 2 layers"),
    ({"sensitivity": "high"}, "sensitivity is 'high'"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS])
def test_contradictions_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Plan.from_json(broken(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_plans(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the plan"):
        Plan.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        Plan.read(tmp_path / "bad.json")


def test_plan_for_another_model_is_refused() -> None:
    PLAN.check_model(2, 3)
    with pytest.raises(InputError, match="the model has 2 layers of 4 heads"):
        PLAN.check_model(2, 4)
