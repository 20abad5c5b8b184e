"""Targeted tuning: which layers are chosen, and that nothing else moves by a bit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from chai_jax.adapt.target import layer_mask, select_layers, target
from chai_jax.config import TargetConfig, TrainConfig
from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.quantized import QuantizedArray
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan

Build = Callable[..., Model]


def plan_of(sensitivity: tuple[float, ...], tiers: str = "", layers: int = 0) -> Plan:
    """A plan of dense layers with two heads; `tiers` has a letter per layer."""
    clusters = (ClusterPlan((0,), 0), ClusterPlan((1,), 1))
    names = {"h": "high", "m": "medium", "l": "low"}
    tiers = tiers or "h" * (layers or len(sensitivity))
    return Plan(tuple(LayerPlan(clusters, names[letter]) for letter in tiers), sensitivity=sensitivity)


@pytest.mark.parametrize(
    ("fraction", "sensitivity", "expected"),
    [
        (0.3, (0.1, 0.9, 0.5, 0.2), (1, 2)),  # ceil(1.2) = 2
        (0.25, (0.1, 0.9, 0.5, 0.2), (1,)),
        (1.0, (0.1, 0.9, 0.5, 0.2), (0, 1, 2, 3)),
        (0.01, (0.1, 0.1), (0,)),  # at least one; the first of equals
        (0.5, (0.5, 0.7, 0.5, 0.5), (0, 1)),
        (0.07, tuple(map(float, range(100))), tuple(range(93, 100))),  # 0.07 * 100 > 7 in floating point
        (0.3, tuple(map(float, range(10))), (7, 8, 9)),
    ],
)
def test_most_sensitive_layers(fraction: float, sensitivity: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert select_layers(plan_of(sensitivity), TargetConfig(fraction=fraction)) == expected


def test_layers_of_medium_and_low_tiers() -> None:
    assert select_layers(plan_of((), "hmlhm"), TargetConfig(policy="medium-low")) == (1, 2, 4)


def test_refuses_plans_that_choose_nothing(tiny: Build, examples: list[Encoded]) -> None:
    with pytest.raises(InputError, match="no sensitivities"):
        select_layers(plan_of((), layers=4), TargetConfig())
    with pytest.raises(InputError, match="no layer of the plan"):
        select_layers(plan_of((), "hhh"), TargetConfig(policy="medium-low"))
    with pytest.raises(InputError, match="the plan is for 3 layers"):
        target(tiny(), plan_of((1.0, 2.0, 3.0)), examples)


@pytest.mark.parametrize(("setting", "value"), [("policy", "all"), ("fraction", 0.0), ("fraction", 1.1)])
def test_settings_out_of_range(setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{setting} is"):
        TargetConfig(**{setting: value})


def test_mask_marks_whole_layers(tiny: Build) -> None:
    mask = layer_mask(tiny(num_layers=3, int8=(1,)).params, {1})
    assert all(jax.tree.leaves(mask["layers"]["1"]))
    assert mask["layers"]["1"]["up"]["kernel"] is True  # a quantized array is one leaf
    assert not any(jax.tree.leaves({**mask, "layers": {**mask["layers"], "1": {}}}))


@pytest.fixture(scope="module")
def tuned(tiny: Build, examples: list[Encoded]) -> tuple[Model, Model, list[dict[str, Any]]]:
    """A bfloat16 model with int8 layers 0 and 1, whose layer 1 was tuned."""
    model = tiny(num_layers=2, dtype=jnp.bfloat16, int8=(0, 1), storage="int8")
    config = TargetConfig(TrainConfig(lr=1e-2, batch=16, accumulation=2, epochs=6))
    log: list[dict[str, Any]] = []
    return model, target(model, plan_of((0.1, 0.9)), examples, config, log.append), log


def test_all_else_is_the_very_same_arrays(tuned: tuple[Model, Model, Any]) -> None:
    model, after, _ = tuned
    chosen = jax.tree.leaves(after.params["layers"]["1"])
    for old, new in zip(jax.tree.leaves(model.params), jax.tree.leaves(after.params), strict=True):
        assert (new is old) != any(new is leaf for leaf in chosen)
    assert after.spec == model.spec


def test_chosen_layer_keeps_its_formats_and_changes(tuned: tuple[Model, Model, Any]) -> None:
    model, after, log = tuned
    for name, part in after.params["layers"]["1"].items():
        for kind, new in part.items():
            old = model.params["layers"]["1"][name][kind]
            if isinstance(old, QuantizedArray):
                assert isinstance(new, QuantizedArray)
                assert new.axes == old.axes
                assert (new.values.dtype, new.scale.dtype) == (jnp.int8, jnp.float32)
                assert (new.values != old.values).any()
            else:
                assert new.dtype == jnp.bfloat16
                assert (new != old).any()
    assert log[-1]["loss"] < log[0]["loss"]
