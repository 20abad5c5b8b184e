"""What is saved comes back bit for bit, whole or not at all, and transformers refuses what it would misread."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.errors import InputError
from chai_jax.files.store import load, save
from chai_jax.model.model import Model
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan

PRE = Architecture(19, 12, 3, 3, 20, 16, 12)
POST = dataclasses.replace(PRE, pre_norm=False, embed_dim=8, tied=False)


def tiers(share: str) -> Plan:
    """One layer of each tier: loaded, bfloat16 weights with two cache formats, int8."""
    pair, single = ClusterPlan((0, 2), 2, storage="int8"), ClusterPlan((1,), 1, storage="bfloat16")
    layers = (
        LayerPlan((dataclasses.replace(pair, storage="float32"), dataclasses.replace(single, storage="float32"))),
        LayerPlan((pair, single), "medium", "bfloat16"),
        LayerPlan((pair, dataclasses.replace(single, storage="int8")), "low", "int8"),
    )
    return Plan(layers, share=share, sensitivity=(3.0, 2.0, 1.0))


@pytest.fixture(scope="module")
def compressed(random_model: Any) -> Callable[..., Model]:
    """A model of those tiers; each is made once."""

    @functools.cache
    def make(share: str, config: Architecture = PRE, dtype: str = "float32") -> Model:
        plan = tiers(share)
        model: Model = quantize(cluster(random_model(config, dtype), plan), plan)
        return model

    return make


def assert_equal(one: Model, two: Model) -> None:
    """Configuration, spec, plan and every bit of every leaf."""
    assert (one.config, one.spec, one.plan) == (two.config, two.spec, two.plan)
    assert jax.tree.structure(one.params) == jax.tree.structure(two.params)
    for mine, other in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        assert mine.dtype == other.dtype
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("config", [PRE, POST], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dense_models_come_back(tmp_path: Path, random_model: Any, config: Architecture, dtype: str) -> None:
    model = random_model(config, dtype)
    save(model, tmp_path / "out")
    assert_equal(load(tmp_path / "out"), model)


@pytest.mark.parametrize(("share", "config", "dtype"), [("qk", PRE, "float16"), ("qkv", POST, "float32")])
def test_compressed_models_come_back(
    tmp_path: Path, compressed: Any, share: str, config: Architecture, dtype: str
) -> None:
    model = compressed(share, config, dtype)
    save(model, tmp_path / "out")
    again = load(str(tmp_path / "out"))
    assert_equal(again, model)
    assert again.source == str(tmp_path / "out")
    assert again.nbytes == model.nbytes
    save(again, tmp_path / "twice")
    assert_equal(load(tmp_path / "twice"), model)
    weights = "model.safetensors"
    assert (tmp_path / "twice" / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_int4_weights_come_back(tmp_path: Path, random_model: Any) -> None:
    """With axes of even and odd lengths, and the last group smaller."""
    for config in (PRE, dataclasses.replace(PRE, hidden_size=15, embed_dim=15, ffn_dim=67)):
        plan = Plan((LayerPlan(tuple(ClusterPlan((head,), head) for head in range(3)), weights="int4"),) * 3)
        model, folder = quantize(random_model(config), plan), tmp_path / str(config.hidden_size)
        save(model, folder)
        assert_equal(load(folder), model)
        assert load(folder).nbytes == model.nbytes


def test_clusters_per_prompt_come_back(tmp_path: Path, random_model: Any) -> None:
    clusters = ClusterPlan((0, 2), 2, storage="int8"), ClusterPlan((1,), 1, storage="int8")
    plan = Plan((LayerPlan(clusters, "low", "int8"),) * 3, "qk", "prompt", warmup_tokens=4)
    model = quantize(cluster(random_model(PRE), plan), plan)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert_equal(again, model)
    assert [(layer.membership, layer.warmup, layer.clusters[0]) for layer in again.spec.layers] == [
        ("prompt", 4, (2, 0))
    ] * 3
    card = (tmp_path / "out/README.md").read_text()
    assert "| 1 | qk, per prompt | 2 | 3 | int8 | int8 |" in card
    assert "nor can any export be" in card


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_cache_formats_come_back(tmp_path: Path, random_model: Any, storage: str) -> None:
    model = with_storage(random_model(PRE), storage)
    save(model, tmp_path / "out")
    assert_equal(load(tmp_path / "out"), model)
    kind = json.loads((tmp_path / "out/config.json").read_text())["model_type"]
    assert kind == ("chai_opt" if storage in ("int8", "int4") else "opt")


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_cache_format_may_be_asked_for(tmp_path: Path, random_model: Any, storage: str) -> None:
    save(with_storage(random_model(PRE), "bfloat16"), tmp_path / "out")
    assert load(tmp_path / "out", storage=storage).spec == with_storage(random_model(PRE), storage).spec


def test_files(tmp_path: Path, compressed: Any) -> None:
    save(compressed("qk"), tmp_path / "out")
    names = {"config.json", "generation_config.json", "spec.json", "plan.json", "model.safetensors", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert Plan.read(tmp_path / "out/plan.json") == tiers("qk")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("chai_opt", 12, 3)


def test_transformers_refuses_what_it_would_misread(torch: Any, tmp_path: Path, compressed: Any) -> None:
    from transformers import AutoModelForCausalLM, OPTForCausalLM

    save(compressed("qk"), tmp_path / "out")
    with pytest.raises(ValueError, match="model type `chai_opt`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="quantization config"):
        OPTForCausalLM.from_pretrained(tmp_path / "out")


def test_transformers_reads_a_dense_model(torch: Any, tmp_path: Path, random_model: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(PRE)
    save(model, tmp_path / "out")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(module.lm_head.weight.detach().numpy(), model.params["embed"]["tokens"])


def test_nothing_is_left_of_a_save_that_fails(tmp_path: Path, random_model: Any) -> None:
    class Broken:
        def save_pretrained(self, folder: str) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(random_model(PRE).replace(tokenizer=Broken()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, random_model: Any) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="already holds something"):
        save(random_model(PRE), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"storage": "float32"}])
def test_a_compressed_model_keeps_its_formats(tmp_path: Path, compressed: Any, options: dict[str, str]) -> None:
    save(compressed("qk"), tmp_path / "out")
    with pytest.raises(InputError, match="holds a compressed model, which keeps the formats it was saved in"):
        load(tmp_path / "out", **options)


def test_a_cast_model_is_no_longer_stored_in_bfloat16(tmp_path: Path, random_model: Any) -> None:
    plan = dataclasses.replace(tiers("qk"), layers=(tiers("qk").layers[1],) * 3)
    model = with_storage(quantize(random_model(PRE), plan), "float32")
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", dtype="float32")
    assert {layer.weights for layer in again.spec.layers} == {"loaded"}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_other_folders(tmp_path: Path, random_model: Any) -> None:
    with pytest.raises(InputError, match=r"has no config\.json; expected a model folder"):
        load(tmp_path)
    save(random_model(PRE), tmp_path / "out")
    save(random_model(PRE), tmp_path / "run/model")
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(InputError, match=r"run is the folder of a run; expected a model: give .*run/model"):
        load(tmp_path / "run")
    edit(tmp_path / "out/config.json", model_type="bloom")
    with pytest.raises(InputError, match=r"a model of type 'bloom'; expected one of opt, llama, .* chai_ before"):
        load(tmp_path / "out")
    edit(tmp_path / "out/config.json", model_type="opt", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match="holds quantized weights; expected float ones"):
        load(tmp_path / "out")
    with pytest.raises(InputError, match="storage 'fp8' is unknown; expected one of float32, bfloat16, int8"):
        load(tmp_path / "out", storage="fp8")


def test_config_and_spec_at_odds(tmp_path: Path, compressed: Any) -> None:
    save(compressed("qk"), tmp_path / "out")
    edit(tmp_path / "out/config.json", model_type="opt", quantization_config=None)
    with pytest.raises(InputError, match=r"an ordinary OPT in config\.json, a clustered one in spec\.json"):
        load(tmp_path / "out")


def test_plan_of_another_model(tmp_path: Path, compressed: Any) -> None:
    save(compressed("qk"), tmp_path / "out")
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    edit(tmp_path / "out/plan.json", layers=plan["layers"][:2], sensitivity=[])
    with pytest.raises(InputError, match=r"the plan is for 2 layers of .* the model has 3 layers"):
        load(tmp_path / "out")
