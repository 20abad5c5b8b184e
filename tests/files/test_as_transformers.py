"""Checkpoints as other tools write them load as in transformers: with equal logits."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from chai_jax.files.store import load

PRE = {
    "model_type": "opt",
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 20,
    "max_position_embeddings": 16,
}
HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"
TOKENS = np.array([[2, 5, 9, 17, 4, 0, 11], [2, 3, 3, 8, 1, 18, 6]], np.int32)
State = dict[str, Any]
INDEX = "{}.index.json"


@pytest.fixture(params=[PRE, {**PRE, "do_layer_norm_before": False, "word_embed_proj_dim": 8}], ids=["pre", "post"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(request.param))
    return tmp_path


def module_of(torch: ModuleType, folder: Path) -> Any:
    """A random model of the folder's configuration, its biases and norms not trivial, its head tied."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    module = OPTForCausalLM(OPTConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def assert_as_transformers(torch: ModuleType, folder: Path) -> None:
    from transformers import OPTForCausalLM

    module, report = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        wanted = module.eval()(torch.tensor(TOKENS).long()).logits.numpy()
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(load(folder)(TOKENS), wanted, atol=1e-4)


def test_a_tied_table_under_its_other_name(torch: ModuleType, folder: Path) -> None:
    from safetensors.torch import save_model

    save_model(module_of(torch, folder), str(folder / "model.safetensors"))
    with safe_open(folder / "model.safetensors", "np") as file:
        assert HEAD in file.keys()  # noqa: SIM118 (no mapping)
        assert EMBEDDING not in file.keys()  # noqa: SIM118
    assert_as_transformers(torch, folder)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [None, -1])
def test_no_special_token(torch: ModuleType, folder: Path, name: str, value: int | None) -> None:
    change_config(folder, **{name: value})
    module_of(torch, folder).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())[name] == value
    assert_as_transformers(torch, folder)


@pytest.mark.parametrize("value", [[2, 7], [2], [], [2, 50000], 50000])
def test_several_end_tokens(torch: ModuleType, folder: Path, value: Any) -> None:
    change_config(folder, eos_token_id=value)
    module_of(torch, folder).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == value
    assert_as_transformers(torch, folder)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def sharded(torch: ModuleType, folder: Path, file: str = "model.safetensors") -> tuple[list[State], dict[str, str]]:
    """The contents of two shards, without the head, and their weight_map."""
    state = {name: tensor.clone() for name, tensor in module_of(torch, folder).state_dict().items() if name != HEAD}
    stem, _, extension = file.rpartition(".")
    names = [f"{stem}-{number:05d}-of-00002.{extension}" for number in (1, 2)]
    order = sorted(state)
    parts = [{name: state[name] for name in order[number::2]} for number in (0, 1)]
    return parts, {name: names[number] for number in (0, 1) for name in parts[number]}


def write_shards(torch: ModuleType, folder: Path, parts: list[State], listed: dict[str, str], file: str) -> None:
    from safetensors.torch import save_file

    for name, part in zip(sorted(set(listed.values())), parts, strict=True):
        if name.endswith(".bin"):
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
    (folder / INDEX.format(file)).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def head_held_by_none(parts: list[State], listed: dict[str, str]) -> None:
    listed[HEAD] = listed[EMBEDDING]


def head_not_listed(parts: list[State], listed: dict[str, str]) -> None:
    parts[1][HEAD] = next(part[EMBEDDING] for part in parts if EMBEDDING in part).clone()


def head_listed_once_and_held_twice(parts: list[State], listed: dict[str, str]) -> None:
    head_not_listed(parts, listed)
    parts[0][HEAD] = parts[1][HEAD].clone()
    listed[HEAD] = max(listed.values())


def head_alone(parts: list[State], listed: dict[str, str]) -> None:
    part = next(part for part in parts if EMBEDDING in part)
    part[HEAD] = part.pop(EMBEDDING)
    listed[HEAD] = listed.pop(EMBEDDING)


def another_not_listed(parts: list[State], listed: dict[str, str]) -> None:
    del listed["model.decoder.layers.0.fc1.bias"]


def another_listed_elsewhere(parts: list[State], listed: dict[str, str]) -> None:
    name = "model.decoder.layers.0.fc1.bias"
    listed[name] = next(file for file in listed.values() if file != listed[name])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "change",
    [
        head_held_by_none,
        head_not_listed,
        head_listed_once_and_held_twice,
        head_alone,
        another_not_listed,
        another_listed_elsewhere,
    ],
)
def test_an_index_that_is_not_of_its_shards(
    torch: ModuleType, folder: Path, change: Callable[[list[State], dict[str, str]], None], file: str
) -> None:
    parts, listed = sharded(torch, folder, file)
    change(parts, listed)
    write_shards(torch, folder, parts, listed, file)
    assert_as_transformers(torch, folder)


def with_attribute(tensor: Any) -> Any:
    tensor.is_checked = True
    return tensor


STATES: dict[str, Callable[[ModuleType, Any], Any]] = {
    "parameters": lambda torch, x: torch.nn.Parameter(x),
    "parameters with attributes": lambda torch, x: with_attribute(torch.nn.Parameter(x)),
    "tensors with attributes": lambda torch, x: with_attribute(x.clone()),
    "float64": lambda torch, x: x.double(),
    "transposed": lambda torch, x: x.t().contiguous().t() if x.ndim == 2 else x,
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("kind", STATES)
def test_what_torch_saves(torch: ModuleType, folder: Path, kind: str, new: bool) -> None:
    state = {name: STATES[kind](torch, x.detach()) for name, x in module_of(torch, folder).state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    assert_as_transformers(torch, folder)


def test_float64_in_safetensors(torch: ModuleType, folder: Path) -> None:
    module_of(torch, folder).double().save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.get_slice(EMBEDDING).get_dtype() == "F64"
    assert_as_transformers(torch, folder)
