"""Low-rank surgery on whole models: exact where it must be, expandable where ranks allow, else refused."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.compress.cluster import cluster
from chai_jax.compress.expand import expand
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.data.batches import Windows
from chai_jax.errors import InputError
from chai_jax.files.store import load, save
from chai_jax.model.cache import bytes_per_token, extend
from chai_jax.model.decoder import forward
from chai_jax.model.model import Model
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from tests.compress.test_compress import PARTITION, POST, PRE, inputs, random_model

HEADS = tuple(range(6))
TWINS = ((0, 1), (2, 3), (4,), (5,))
VALUES = ("low_rank", "fit")


@pytest.fixture(scope="module")
def text() -> Windows:
    """Enough random tokens for moments of full rank; one window is short."""
    random = np.random.default_rng(3)
    return Windows.stack([random.integers(4, 64, size).tolist() for size in (20, 24, 24, 24, 5, 24, 24, 24, 24)], 1)


def plan_of(clusters: Any, share: str, values: str = "low_rank", **layer: Any) -> Plan:
    parts = tuple(ClusterPlan(tuple(heads), heads[0], storage="float32") for heads in clusters)
    return Plan((LayerPlan(parts, **layer),) * 3, share, score_merge="low_rank", value_merge=values)


def latent(key: int, value: int) -> Plan:
    return plan_of([HEADS], "kv", key_rank=key, value_rank=value)


def logits(model: Model) -> np.ndarray:
    return np.asarray(model(*inputs()))[inputs()[1]]


@pytest.mark.parametrize("config", [PRE, POST], ids=["pre-norm", "post-norm"])
def test_a_latent_of_full_rank_is_the_dense_model(config: Architecture, text: Windows) -> None:
    model = random_model(config)
    small = cluster(model, latent(48, 48), text)
    assert small.kv_bytes_per_token == 3 * 4 * (48 + 48)
    np.testing.assert_allclose(logits(small), logits(model), atol=1e-4)
    cut = np.abs(logits(cluster(model, latent(12, 12), text)) - logits(model)).max()
    assert cut > 0.01


def test_more_rank_is_closer(text: Windows) -> None:
    model = random_model()
    errors = [
        np.square(logits(cluster(model, latent(rank, rank), text)) - logits(model)).mean() for rank in (6, 24, 40)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("config", [PRE, POST], ids=["pre-norm", "post-norm"])
def test_merging_twins_costs_nothing(config: Architecture, values: str, text: Windows) -> None:
    """Heads with equal queries and keys share their attention exactly; their two values have rank 2 K together."""
    model = random_model(config)
    for layer in model.params["layers"].values():
        for name in ("query", "key"):
            for part, leaf in layer[name].items():
                layer[name][part] = leaf.at[..., 1, :].set(leaf[..., 0, :]).at[..., 3, :].set(leaf[..., 2, :])
    exact = cluster(model, plan_of(TWINS, "qkv", values, value_rank=16), text)
    assert exact.spec.layers[0].value_rank == 16
    np.testing.assert_allclose(logits(exact), logits(model), atol=1e-3 if values == "fit" else 1e-4)
    halved = cluster(model, plan_of(TWINS, "qkv", values), text)
    assert halved.spec.layers[0].value_rank == 8
    assert np.abs(logits(halved) - logits(model)).max() > 0.01


def test_heads_that_stay_alone_stay_as_they_are(text: Windows) -> None:
    model = random_model()
    alone = tuple(ClusterPlan((head,), head, storage="float32") for head in HEADS)
    plan = dataclasses.replace(
        plan_of(PARTITION, "qkv"), layers=(LayerPlan(alone), *plan_of(PARTITION, "qkv").layers[1:])
    )
    small = cluster(model, plan, text)
    jax.tree.map(np.testing.assert_array_equal, small.params["layers"]["0"], model.params["layers"]["0"])
    before, after = model.params["layers"]["1"], small.params["layers"]["1"]
    single = small.spec.layers[1].clusters.index((1,))
    for name in ("query", "value"):
        np.testing.assert_allclose(after[name]["kernel"][:, single], before[name]["kernel"][:, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "plan", [plan_of(PARTITION, "qkv"), plan_of(PARTITION, "qk"), latent(8, 5)], ids=["qkv", "qk", "kv"]
)
@pytest.mark.parametrize("config", [PRE, POST], ids=["pre-norm", "post-norm"])
def test_expanded_model_in_torch_equals_ours(
    torch: ModuleType, tmp_path: Path, config: Architecture, plan: Plan, text: Windows
) -> None:
    from transformers import OPTForCausalLM

    from chai_jax.files.export import export

    small = cluster(random_model(config), plan, text)
    export(expand(small), tmp_path / "out")
    module = OPTForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens, mask = inputs()
    with torch.no_grad():
        theirs = module(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()
    assert np.abs(np.asarray(small(tokens, mask)) - theirs)[mask].max() <= 1e-4


def test_a_rank_above_a_heads_dimension_has_no_ordinary_form(text: Windows) -> None:
    with pytest.raises(InputError, match="rank 12, a dense head has 8"):
        expand(cluster(random_model(), latent(4, 12), text))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_latent_is_saved_cached_and_counted(storage: str, tmp_path: Path, text: Windows) -> None:
    small = with_storage(cluster(random_model(), latent(10, 7), text), storage)
    per_token = 3 * (17 * 4 if storage == "float32" else 17 + 2 * 2)
    assert small.kv_bytes_per_token == bytes_per_token(small.spec) == per_token
    save(small, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.spec == small.spec
    np.testing.assert_array_equal(logits(again), logits(small))
    tokens, mask = (jnp.asarray(array) for array in inputs())
    whole = forward(small.config, small.spec, small.params, tokens, mask, small.how)
    part = forward(small.config, small.spec, small.params, tokens[:, :8], mask[:, :8], small.how)
    cache = extend(part.cache, 11)
    for at in range(8, 11):
        one = tokens[:, at : at + 1], mask[:, at : at + 1]
        step = forward(small.config, small.spec, small.params, *one, small.how, cache=cache)
        cache = step.cache
        np.testing.assert_allclose(step.hidden[:, 0], whole.hidden[:, at], atol=2e-3 if storage == "int8" else 1e-4)


def test_shares_differ_between_layers(text: Windows) -> None:
    parts = {share: plan.layers[0] for share, plan in (("qkv", plan_of(PARTITION, "qkv")), ("kv", latent(9, 9)))}
    layers = (parts["qkv"], dataclasses.replace(parts["kv"], share="kv"), dataclasses.replace(parts["qkv"], share="qk"))
    plan = dataclasses.replace(plan_of(PARTITION, "qkv"), layers=layers)
    small = quantize(cluster(random_model(), plan, text), plan)
    assert [layer.share for layer in small.spec.layers] == ["qkv", "kv", "qk"]
    assert [layer.key_rank for layer in small.spec.layers] == [8, 9, 8]
    assert np.isfinite(logits(small)).all()
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_refusals(text: Windows) -> None:
    model = random_model()
    with pytest.raises(InputError, match="expected calibration text"):
        cluster(model, latent(4, 4))
    with pytest.raises(InputError, match="key_rank 4 with share 'qkv'"):
        dataclasses.replace(plan_of(PARTITION, "qkv", key_rank=4), score_merge="representative").check()
    with pytest.raises(InputError, match="value_rank is 0; expected a whole number from 1"):
        latent(4, 0).check()
    with pytest.raises(InputError, match="layer 0 has rank 1000000; expected at most the model's width, 48"):
        cluster(model, latent(10**6, 4), text)
