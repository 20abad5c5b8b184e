"""The planner keeps to its budgets, measures what it says it measures, goes on where it stopped, and predicts."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.analyse.budget import Budget, parts, plan_within
from chai_jax.analyse.costs import CostMeter, LayerCosts, interpolate, latent
from chai_jax.analyse.damage import Damage
from chai_jax.analyse.explain import cache_fraction
from chai_jax.analyse.gate import Gate, measured_kl
from chai_jax.analyse.probe import Probe, probe
from chai_jax.compress.cluster import LayerMerge, Stream, cluster
from chai_jax.compress.quantize import quantize
from chai_jax.data.batches import Windows
from chai_jax.errors import InputError
from chai_jax.inputs.fields import parse_as
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.model import Model
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.planned import planned_spec
from chai_jax.plans.spec import Spec
from tests.analyse.conftest import PRE

Make = Callable[..., Model]
DENSE = bytes_per_token(Spec.dense(3, 6, 8, "bfloat16"))


@pytest.fixture
def model(make: Make) -> Model:
    return make()


@pytest.fixture
def seen(model: Model) -> Probe:
    random = np.random.default_rng(1)
    return probe(model, [random.integers(4, 64, 20).tolist() for _ in range(16)])


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured once, and read by every test that asks for the same."""
    return tmp_path_factory.mktemp("costs") / "costs.json"


def test_budgets_are_kept_and_the_bytes_are_real(model: Model, seen: Probe, costs: Path) -> None:
    predicted = []
    for fraction in (0.8, 0.4, 0.2, 0.1):
        made = plan_within(model, seen, Budget(fraction), file=costs)
        small = quantize(cluster(model, made, seen), made)
        assert small.spec == planned_spec(made, model.config)
        assert small.kv_bytes_per_token == round(cache_fraction(made, model.config) * DENSE)
        # Close to the budget too: a finer choice of ranks would not fit.
        assert 0.85 * fraction * DENSE <= small.kv_bytes_per_token <= fraction * DENSE
        predicted.append(made.predicted)
        assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert predicted == sorted(predicted)
    assert predicted[0] < predicted[-1]


def test_what_is_measured_is_the_kl_of_the_changed_model(model: Model, seen: Probe, costs: Path) -> None:
    """One layer changed and the rest pinned: the prediction is then a measurement."""
    budget = Budget(0.9, shares=("qkv",), storages=("bfloat16",), pinned=(0, 2), tokens=10**6)
    made = plan_within(model, seen, budget, score_merge="representative", value_merge="representative")
    assert [layer.clustered for layer in made.layers] == [False, True, False]
    fit, text = parts(model.config, seen, budget)
    damage = Damage(model, *text)
    small = quantize(cluster(model, made, fit), made)
    layer = small.spec.layers[1], small.params["layers"]["1"]
    count = len(made.layers[1].clusters)
    assert count in (5, 4)
    # 4 and 5 of 6 clusters are sizes that are measured, not interpolated.
    assert made.predicted == pytest.approx(damage.of(1, *layer)[0], rel=0.02)


def test_shares_and_storages_are_those_allowed(model: Model, seen: Probe) -> None:
    made = plan_within(model, seen, Budget(0.3, shares=("qkv",), storages=("int8",)))
    assert {layer.share for layer in planned_spec(made, model.config).layers} <= {"qkv", "dense"}
    assert {one.storage for layer in made.layers for one in layer.clusters} == {"int8"}


def test_weights_keep_to_their_budget(model: Model, seen: Probe) -> None:
    dense = 2 * sum(leaf.size for leaf in jax.tree.leaves(model.params))
    made = plan_within(model, seen, Budget(1.0, model=1.1, shares=("qkv",), storages=("bfloat16",)))
    small = quantize(cluster(model, made, seen), made)
    assert small.nbytes <= 1.1 * dense < model.nbytes
    assert {layer.weights for layer in made.layers} & {"int8", "bfloat16"}
    assert made.predicted is not None
    assert made.predicted > 0


def test_an_impossible_budget_gives_the_smallest_plan(model: Model, seen: Probe, costs: Path) -> None:
    made = plan_within(model, seen, Budget(1e-6), file=costs)
    smallest = plan_within(model, seen, Budget(2e-6), file=costs)
    assert made == smallest
    assert cache_fraction(made, model.config) > 1e-6


def test_measurements_are_taken_up_where_they_stopped(
    model: Model, seen: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, budget = tmp_path / "costs.json", Budget(0.4, shares=("qkv",), tokens=60)
    whole = plan_within(model, seen, budget, file=file)
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "layers": kept["layers"][:2]}))
    measured: list[int] = []
    original = Damage.of

    def counted(self: Damage, index: int, *rest: object) -> tuple[float, float]:
        measured.append(index)
        return original(self, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Damage, "of", counted)
    assert plan_within(model, seen, budget, file=file) == whole
    assert set(measured) == {2}
    with monkeypatch.context() as patched:  # a whole file needs no pass through the model
        patched.setattr(Damage, "__init__", None)
        assert plan_within(model, seen, budget, file=file) == whole
    with pytest.raises(InputError, match="costs measured with another key"):
        plan_within(model, seen, dataclasses.replace(budget, tokens=200), file=file)


def damaged(kept: dict[str, Any], *path: str | int, to: Any = None) -> bytes:
    """Costs as JSON with one entry replaced; None: left out."""
    value = json.loads(json.dumps(kept))
    *outer, last = path
    entry = functools.reduce(lambda part, key: part[key], outer, value)
    entry[last] = to
    if to is None:
        del entry[last]
    return json.dumps(value).encode()


def test_costs_that_cannot_be_read_are_refused(
    model: Model, seen: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, budget = tmp_path / "costs.json", Budget(0.4, tokens=60)
    plan_within(model, seen, budget, file=file)
    whole = file.read_bytes()
    kept = json.loads(whole)
    monkeypatch.setattr(Damage, "__init__", None)  # nothing is measured before a file is refused
    layer = ("layers", 1)
    wrong: list[tuple[bytes, str]] = [
        (b"", "is not JSON"),
        (whole[: len(whole) // 2], "is not JSON"),
        (b"\xff" + whole, "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "holds a list"),
        (b"{}", "holds no measured costs .*: delete it"),
        (b'{"layers": 1' + b"0" * 5000 + b"}", "thousands of digits"),
        (damaged(kept, "layers", to={}), "layers is {}; expected a list"),
        (damaged(kept, *layer, to=4), "an object"),
        (damaged(kept, *layer, "cache"), "has no cache"),
        (damaged(kept, *layer, "more", to=1), "unknown field 'more'"),
        (damaged(kept, *layer, "cache", "int8", to="x"), "a finite number"),
        (damaged(kept, *layer, "cache", "int8", to=float("nan")), "a finite number"),
        (damaged(kept, *layer, "cache", "int8", to=10**400), "a finite number"),
        (damaged(kept, *layer, "cache", "int8"), "lacks some of the costs"),
        (damaged(kept, *layer, "clusters", "qkv"), "lacks some of the costs"),
        (damaged(kept, *layer, "clusters", "qkv", to={}), "lacks some of the costs"),
        (damaged(kept, *layer, "clusters", "qkv", to={"x": 1.0}), "a whole number from 1"),
        (damaged(kept, *layer, "clusters", "qkv", to={"0": 1.0}), "a whole number from 1"),
        (damaged(kept, *layer, "clusters", "qkv", to={"9" * 4000: 1.0}), "a whole number from 1"),
        (damaged(kept, *layer, "latent", "key"), "lacks some of the costs"),
        (damaged(kept, "key", to=[1]), "another key"),
    ]
    for content, message in wrong:
        file.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            plan_within(model, seen, budget, file=file)
        assert str(caught.value).isprintable()
        assert "costs.json" in str(caught.value)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="not a regular file"):
        plan_within(model, seen, budget, file=file)


@pytest.mark.slow
def test_a_rank_costs_what_merging_by_it_costs(model: Model, seen: Probe) -> None:
    """Cutting columns off one merge is the merge of that rank, for clusters as for latents."""
    plan, text = Plan((), score_merge="low_rank", value_merge="low_rank"), (seen.tokens, seen.mask)
    singles = tuple(ClusterPlan((head,), head) for head in range(6))
    found = CostMeter(model, seen, text, plan, lambda index, count: singles).layer(("qkv", "kv"), ["bfloat16"], ())
    damage, stream = Damage(model, *text), Stream(model, seen)
    assert set(found.ranks) == set(found.latent) == {"key", "value"}
    for sizes, whole, full in (
        (found.ranks, LayerPlan(singles, share="qkv"), 8),
        (found.latent, latent(6, 48, 48), 48),
    ):
        for name in ("key", "value"):
            assert sizes[name].pop(full) == 0
            for rank, cost in sizes[name].items():
                merge = LayerMerge(model, 0, dataclasses.replace(whole, **{f"{name}_rank": rank}), plan, stream)
                assert damage.of(0, *merge.made())[0] == pytest.approx(cost, rel=1e-2, abs=1e-6)


@pytest.mark.slow
def test_clusters_keep_fewer_ranks_where_that_costs_less(model: Model, seen: Probe) -> None:
    made = plan_within(model, seen, Budget(0.4, shares=("qkv",)), value_merge="fit")
    assert any(layer.key_rank or layer.value_rank for layer in made.layers)
    small = quantize(cluster(model, made, seen), made)
    assert small.kv_bytes_per_token == round(cache_fraction(made, model.config) * DENSE) <= 0.4 * DENSE
    # Unless they must not, or are representatives, which have no rank to choose.
    made = plan_within(model, seen, Budget(0.4, shares=("qkv",), ranks=False), value_merge="fit")
    assert not any(layer.key_rank or layer.value_rank for layer in made.layers)
    made = plan_within(
        model, seen, Budget(0.4, shares=("qkv",)), score_merge="representative", value_merge="representative"
    )
    assert not any(layer.key_rank or layer.value_rank for layer in made.layers)


def test_interpolation_is_monotone_and_exact_where_measured() -> None:
    sizes = {2: 0.1, 4: 0.02, 6: 0.03, 8: 0.0}
    assert interpolate(sizes, 2) == pytest.approx(0.1)
    # 6 was measured to cost more than 4: noise, so 4 costs as much.
    assert interpolate(sizes, 4) == pytest.approx(0.03)
    found = [interpolate(sizes, size) for size in range(2, 9)]
    assert found == sorted(found, reverse=True)
    assert interpolate({1: 0.04, 3: 0.01}, 2) == pytest.approx(0.02)


def test_costs_survive_json() -> None:
    ranks, latent = {"key": {2: 0.3}}, {"key": {4: 0.1}, "value": {4: 0.2}}
    costs = LayerCosts({"qkv": {1: 0.5, 6: 0.0}}, ranks, latent, {"int8": 0.01}, {})
    assert parse_as(LayerCosts, json.loads(json.dumps(dataclasses.asdict(costs))), "costs", whole=True) == costs


def test_the_gate_names_the_layer_to_blame(model: Model, seen: Probe) -> None:
    text = Windows(seen.tokens, seen.mask)
    assert Gate.between(model, model, text).kl == pytest.approx(0, abs=1e-6)
    layers = {**model.params["layers"]}
    layers["1"] = {**layers["1"], "down": {name: 3 * leaf for name, leaf in layers["1"]["down"].items()}}
    gate = Gate.between(model, model.replace(params={**model.params, "layers": layers}), text)
    assert gate.layer == 1
    assert gate.kl == pytest.approx(gate.layer_kl, rel=1e-4)
    assert "layer 1 alone" in gate.explain(0.5)


def test_what_was_tried_is_what_the_whole_compressed_model_does(model: Model, seen: Probe, costs: Path) -> None:
    made = plan_within(model, seen, Budget(0.2), file=costs)
    clustered = cluster(model, made, seen)
    measured = measured_kl(model, clustered, made, Windows(seen.tokens, seen.mask))
    assert measured == pytest.approx(Damage(model, seen.tokens, seen.mask).of_model(quantize(clustered, made))[0])
    # Nearly all of it is of small latents, whose ranks lie between measured ones; predicted of windows held out.
    fit, text = parts(model.config, seen, Budget(0.2))
    held_out = Damage(model, *text).of_model(quantize(cluster(model, made, fit), made))[0]
    assert held_out == pytest.approx(made.predicted, rel=0.25)


def cost_of(layer: LayerPlan, costs: LayerCosts) -> float:
    """What a layer's changes, measured one at a time, cost together."""
    (storage,) = {one.storage for one in layer.clusters}
    ranks = {"key": layer.key_rank, "value": layer.value_rank}
    reduced = costs.latent if layer.share == "kv" else costs.ranks
    clustered = interpolate(costs.clusters["qkv"], len(layer.clusters)) if layer.share == "qkv" else 0.0
    cut = sum(interpolate(reduced[name], rank) for name, rank in ranks.items() if rank)
    return clustered + cut + costs.cache[storage]


@pytest.mark.parametrize("fraction", [0.8, 0.4, 0.2])
def test_a_prediction_is_the_sum_of_what_was_measured(model: Model, seen: Probe, costs: Path, fraction: float) -> None:
    made = plan_within(model, seen, Budget(fraction), file=costs)
    measured = parse_as(tuple[LayerCosts, ...], json.loads(costs.read_text())["layers"], "layers")
    expected = sum(cost_of(*pair) for pair in zip(made.layers, measured, strict=True))
    assert made.predicted == pytest.approx(expected, abs=1e-7)


def test_bad_budgets_are_refused(model: Model, seen: Probe) -> None:
    for arguments, message in (
        ({"cache": 0.0}, "the cache budget is 0"),
        ({"cache": 0.5, "model": -1.0}, "the model budget is -1"),
        ({"cache": 0.5, "storages": ()}, "nothing to choose from"),
    ):
        with pytest.raises(InputError, match=message):
            Budget(**arguments)
    with pytest.raises(InputError, match="layer 3 is pinned"):
        plan_within(model, seen, Budget(0.5, pinned=(3,)))
    with pytest.raises(InputError, match="of another model"):
        plan_within(model, dataclasses.replace(seen, fingerprint="other"), Budget(0.5))


@pytest.mark.slow
def test_few_bits_do_damage_to_short_texts_too(make: Make, seen: Probe, tmp_path: Path) -> None:
    """Read one after another; more bits are nearer, and the planner gives them to layers that need them."""
    model = make(dataclasses.replace(PRE, max_positions=200))
    random = np.random.default_rng(1)
    more = probe(model, [random.integers(4, 64, 20).tolist() for _ in range(60)])
    few, file = ("k4v4", "k3v3", "k2v2"), tmp_path / "costs.json"
    made = plan_within(model, more, Budget(0.24, shares=(), storages=few), file=file)
    small = quantize(model, made)
    assert small.kv_bytes_per_token <= 0.24 * DENSE
    costs = [layer["cache"] for layer in json.loads(file.read_text())["layers"]]
    for layer in costs:
        assert layer["k2v2"] > layer["k3v3"] > layer["k4v4"] > 1e-7
    with pytest.raises(InputError, match="leave out formats of few bits"):
        plan_within(make(), seen, Budget(0.24, shares=("qkv",), storages=few))
