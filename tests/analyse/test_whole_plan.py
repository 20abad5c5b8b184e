"""A plan as a whole: measured on text that nothing was fitted to, and made again where its prediction is missed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chai_jax.analyse import whole_plan
from chai_jax.analyse.budget import Budget, parts, plan_within
from chai_jax.analyse.damage import Damage
from chai_jax.analyse.explain import cache_fraction
from chai_jax.analyse.probe import Probe, probe
from chai_jax.analyse.whole_plan import in_place, plan_and_measure
from chai_jax.compress.calibration import held_out
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.data.batches import Windows
from chai_jax.model.model import Model
from chai_jax.plans.plan import Plan

BUDGET = Budget(0.3, shares=("qkv",), ranks=False, tokens=120)


@pytest.fixture
def seen(make: Callable[..., Model]) -> tuple[Model, Probe]:
    model, random = make(), np.random.default_rng(1)
    return model, probe(model, [random.integers(4, 64, 20).tolist() for _ in range(16)])


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("costs") / "costs.json"


def test_what_is_measured_on_is_not_fitted_to() -> None:
    tokens = np.arange(10)[:, None] + np.zeros((1, 5), np.int32)
    text = Windows(tokens, np.ones((10, 5), bool))
    for wanted, count in ((1, 1), (12, 3), (25, 5), (10**6, 5)):
        fit, measure = held_out(text, wanted)
        assert len(measure.tokens) == count
        assert sorted([*fit.tokens[:, 0], *measure.tokens[:, 0]]) == list(range(10))
        assert fit.mask.shape == fit.tokens.shape
    fit, measure = held_out(Windows(tokens[:1], text.mask[:1]), 3)  # nothing else is there
    assert fit.tokens.tolist() == measure.tokens.tolist() == [[0] * 5]


def changed_model(model: Model, plan: Plan, known: Probe) -> tuple[Damage, Model]:
    fit, text = parts(model.config, known, BUDGET)
    return Damage(model, *text), quantize(cluster(model, plan, fit), plan, fit)


def test_a_layer_within_a_plan(seen: tuple[Model, Probe], costs: Path) -> None:
    """What a layer does within it is what is gained by leaving that layer dense."""
    model, known = seen
    plan = plan_within(model, known, BUDGET, file=costs)
    damage, changed = changed_model(model, plan, known)
    kl, within = damage.within(changed)
    assert kl == pytest.approx(damage.of_model(changed)[0], rel=1e-5)
    dense = damage.model
    for index, gained in enumerate(within):
        layers = {**changed.params["layers"], str(index): dense.params["layers"][str(index)]}
        spec = changed.spec.with_layer(index, dense.spec.layers[index])
        without = changed.replace(spec=spec, params={**changed.params, "layers": layers})
        assert gained == pytest.approx(kl - damage.of_model(without)[0], rel=1e-3, abs=1e-7)
    scales = in_place(damage, changed)
    alone = [damage.of(at, one, changed.params["layers"][str(at)])[0] for at, one in enumerate(changed.spec.layers)]
    np.testing.assert_allclose(scales, np.clip(within / alone, 1 / 8, 8), rtol=1e-3)


def test_scales_move_bytes_to_the_layer_that_costs_more(seen: tuple[Model, Probe], costs: Path) -> None:
    model, known = seen
    sizes = [
        [
            cache_fraction(dataclasses.replace(made, layers=(layer,) * 3), model.config)
            for layer in plan_within(model, known, BUDGET, file=costs, scales=scales).layers
        ]
        for scales in ((1.0, 1.0, 1.0), (1.0, 30.0, 1.0))
        for made in [Plan((), "qkv")]
    ]
    assert sizes[1][1] > sizes[0][1]
    assert sum(sizes[1]) <= 0.9 + 1e-9


def test_a_missed_plan_is_made_again(
    seen: tuple[Model, Probe], costs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, known = seen
    first = plan_within(model, known, BUDGET, file=costs)
    monkeypatch.setattr(whole_plan, "MISSED", 1e6)  # nothing misses
    kept = plan_and_measure(model, known, BUDGET, file=costs)
    damage, changed = changed_model(model, first, known)
    assert kept == dataclasses.replace(first, measured=kept.measured)
    assert kept.measured == pytest.approx(damage.of_model(changed)[0], rel=1e-5)

    monkeypatch.setattr(whole_plan, "MISSED", 0.0)  # everything does
    tried: list[Plan] = []
    original = whole_plan.plan_within

    def noted(*args: object, **more: object) -> Plan:
        tried.append(original(*args, **more))  # type: ignore[arg-type]
        return tried[-1]

    monkeypatch.setattr(whole_plan, "plan_within", noted)
    better = plan_and_measure(model, known, BUDGET, file=costs)
    assert len(tried) == 2
    assert better.layers in [plan.layers for plan in tried]
    assert better.measured is not None
    assert kept.measured is not None
    assert better.measured <= kept.measured
    assert cache_fraction(better, model.config) <= BUDGET.cache
    assert "it is made again" in capsys.readouterr().err
