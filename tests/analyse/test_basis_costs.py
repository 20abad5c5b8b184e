"""The planner among keys in a basis: what it measures, what it predicts of other pairs, what it makes of that."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from chai_jax.analyse.budget import Budget, plan_within
from chai_jax.analyse.costs import BasisCosts, KeyCost
from chai_jax.analyse.damage import Damage
from chai_jax.analyse.explain import cache_fraction, explain
from chai_jax.analyse.probe import Probe, probe
from chai_jax.compress.calibration import joined
from chai_jax.compress.quantize import quantize
from chai_jax.errors import InputError
from chai_jax.files.store import load, save
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.formats import BASIS
from chai_jax.plans.spec import Spec

CONFIG = Architecture(
    67, 64, 2, 4, 48, 256, 64, activation="silu", norm="rms", gated=True, position_offset=0, num_kv_heads=2, bias=False
)
CONFIG = dataclasses.replace(CONFIG, rotary=Rotary(), family="llama")
BUDGET = Budget(0.2, shares=(), storages=("bfloat16", *BASIS), ranks=False, tokens=800)


@pytest.fixture(scope="module")
def seen() -> tuple[Model, Probe]:
    spec = Spec.of(CONFIG, "bfloat16")
    model = Model(CONFIG, spec, init(CONFIG, spec, jax.random.key(1), 0.1))
    return model, probe(model, np.random.default_rng(0).integers(3, 60, (4, 200)).tolist())


def test_pairs_are_predicted_from_sides() -> None:
    keys = KeyCost(((4, 9),), 0.01), KeyCost(((3, 5),), 0.03), KeyCost(((2, 4),), 0.1)
    found = BasisCosts(keys, {"basis4": 0.1, "basis2": 0.25}).choices()
    costs = {(storage, channels): cost for storage, channels, cost in found}
    assert len(costs) == 6
    assert costs["basis4", ((3, 5),)] == pytest.approx(0.03)
    assert costs["basis2", ((3, 5),)] == pytest.approx(0.03 + 0.15)


@pytest.mark.slow
def test_a_plan_keeps_to_its_budget_and_is_carried_out(seen: tuple[Model, Probe], tmp_path: Path) -> None:
    model, known = seen
    file = tmp_path / "costs.json"
    plan = plan_within(model, known, BUDGET, file=file)
    assert cache_fraction(plan, model.config) <= 0.2
    assert any(layer.channels for layer in plan.layers)
    assert all(
        row["key_bits"] == sum(bits * count for bits, count in layer.channels)
        for row, layer in zip(explain(plan), plan.layers, strict=True)
    )
    assert all(set(row["storage"]) <= {"bfloat16", *BASIS} for row in explain(plan))
    assert min(plan.sensitivity) > 1e-6  # of the worst format, which is a basis
    small = quantize(model, plan, known)
    dense = bytes_per_token(Spec.of(CONFIG, "bfloat16"))
    assert small.kv_bytes_per_token == pytest.approx(cache_fraction(plan, model.config) * dense)
    # Predicted from single changes to layers; these weights are random and sharp, so that only the size is.
    measured = Damage(model, *joined(known, 800, 256)).of_model(small)[0]
    assert plan.predicted is not None
    assert 0.3 < measured / plan.predicted < 3
    # Measurements are read back: nothing is measured again, and less costs more.
    before = file.read_bytes()
    smaller = plan_within(model, known, dataclasses.replace(BUDGET, cache=0.15), file=file)
    assert file.read_bytes() == before
    assert smaller.predicted is not None
    assert smaller.predicted > plan.predicted
    with pytest.raises(InputError, match="another storages"):
        plan_within(model, known, dataclasses.replace(BUDGET, storages=("bfloat16", "basis3")), file=file)

    save(small, tmp_path / "small")
    again = load(tmp_path / "small")
    assert again.spec == small.spec
    tokens = known.tokens[:2, :150]
    np.testing.assert_array_equal(again(tokens), small(tokens))
