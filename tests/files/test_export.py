"""An exported folder is one that torch's OPTForCausalLM loads, with equal logits."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from chai_jax.errors import InputError
from chai_jax.files.export import export
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.model.quantized import quantize_int8
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Group, LayerSpec

TOKENS = np.array([[2, 5, 9, 17, 4, 4, 11], [2, 3, 3, 8, 1, 1, 1]], np.int32)
MASK = TOKENS != 1
PRE = Architecture(19, 12, 2, 3, 20, 16, 12)
POST = dataclasses.replace(PRE, pre_norm=False, embed_dim=8)
CONFIGS = {
    "pre-norm": PRE,
    "post-norm": dataclasses.replace(POST, tied=False, activation="gelu_new"),
    "bare": dataclasses.replace(PRE, bias=False, norm_affine=False, remove_final_norm=True),
}


def torch_logits(torch: ModuleType, folder: Path) -> np.ndarray:
    from transformers import OPTForCausalLM

    module, report = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return module.eval()(torch.tensor(TOKENS).long(), torch.tensor(MASK).long()).logits.numpy()


def assert_exports(torch: ModuleType, model: Model, folder: Path, **options: Any) -> None:
    export(model, folder, **options)
    difference = np.abs(np.asarray(model(TOKENS, MASK)) - torch_logits(torch, folder))[MASK]
    assert difference.max() < 1e-4
    assert load(folder).config == model.config


@pytest.mark.parametrize("case", CONFIGS)
def test_torch_gives_equal_logits(torch: ModuleType, tmp_path: Path, random_model: Any, case: str) -> None:
    assert_exports(torch, random_model(CONFIGS[case]), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_are_kept(torch: ModuleType, tmp_path: Path, random_model: Any, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(POST, dtype)
    export(model, tmp_path / "out")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert module.dtype == getattr(torch, dtype)
    kernel = np.asarray(model.params["layers"]["1"]["up"]["kernel"], np.float32)
    np.testing.assert_array_equal(module.model.decoder.layers[1].fc1.weight.detach().float().numpy(), kernel.T)


def test_mixed_dtypes_are_named_float32(tmp_path: Path, random_model: Any) -> None:
    model = random_model(PRE, "float16")
    norm = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params["final_norm"])
    export(model.replace(params={**model.params, "final_norm": norm}), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"
    again = load(tmp_path / "out").params
    assert again["final_norm"]["scale"].dtype == jnp.bfloat16
    assert again["embed"]["tokens"].dtype == jnp.float16


def test_shards(torch: ModuleType, tmp_path: Path, random_model: Any) -> None:
    assert_exports(torch, random_model(PRE), tmp_path / "out", max_shard_bytes=2_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "out/model.safetensors").exists()


def test_int8_weights_are_written_as_what_they_stand_for(tmp_path: Path, random_model: Any) -> None:
    model = random_model(PRE, "float16")
    layer = model.params["layers"]["0"]
    out = quantize_int8(layer["output"]["kernel"], (-3, -2))
    layers = {**model.params["layers"], "0": {**layer, "output": {**layer["output"], "kernel": out}}}
    export(model.replace(params={**model.params, "layers": layers}), tmp_path / "out")
    assert "1 quantized tensors are written as the float32 numbers" in (tmp_path / "out/README.md").read_text()
    tensors = load_file(tmp_path / "out/model.safetensors")
    wanted = np.asarray(out.values, np.float32) * np.asarray(out.scale, np.float32)
    written = tensors["model.decoder.layers.0.self_attn.out_proj.weight"]
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, wanted.reshape(12, 12).T)
    assert tensors["model.decoder.layers.1.self_attn.out_proj.weight"].dtype == np.float16


def test_generation_config(torch: ModuleType, tmp_path: Path, random_model: Any) -> None:
    from transformers import GenerationConfig

    export(random_model(dataclasses.replace(PRE, eos_token_id=7)), tmp_path / "out")
    ids = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (2, 7, 1)


def test_a_clustered_model_has_no_such_form(tmp_path: Path, random_model: Any) -> None:
    model = random_model(PRE)
    clustered = LayerSpec("qkv", ((0, 2), (1,)), (Group(2),), 4, 4)
    with pytest.raises(InputError, match=r"the model is clustered, .* expand it first"):
        export(model.replace(spec=model.spec.with_layer(1, clustered)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, random_model: Any) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="already holds something"):
        export(random_model(PRE), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
