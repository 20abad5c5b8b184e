"""config.json both ways, and what our model would silently get wrong is refused."""

import dataclasses
import json
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.files.families.opt import config_fields, parse_config
from chai_jax.plans.architecture import Architecture

# facebook/opt-350m, as published (sizes and switches; training's numbers left out).
OPT_350M = {
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}


def test_350m() -> None:
    wanted = Architecture(50272, 1024, 24, 16, 4096, 2048, 512, pre_norm=False)
    assert parse_config(OPT_350M, "config.json") == wanted
    assert (wanted.head_dim, wanted.final_norm) == (64, False)


@pytest.mark.parametrize("narrow", [{}, {"word_embed_proj_dim": None}])
def test_embeddings_are_as_wide_as_the_model_unless_said_otherwise(narrow: dict[str, Any]) -> None:
    fields = {name: value for name, value in OPT_350M.items() if name != "word_embed_proj_dim"}
    assert parse_config({**fields, **narrow}, "").embed_dim == 1024


def test_defaults_are_those_of_transformers() -> None:
    from transformers import OPTConfig as HFConfig

    sizes = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "ffn_dim",
        "max_position_embeddings",
    )
    ours = config_fields(parse_config({name: OPT_350M[name] for name in sizes}, ""))
    theirs = HFConfig(**{name: OPT_350M[name] for name in sizes})
    assert ours == {name: getattr(theirs, name) for name in ours}


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": False, "tied": False, "norm_affine": False}, {"activation": "silu", "remove_final_norm": True}],
)
def test_there_and_back(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(Architecture(19, 12, 2, 3, 20, 16, 12), **changes)
    assert parse_config(config_fields(config), "") == config


@pytest.mark.parametrize(
    ("given", "bos", "eos", "pad"),
    [
        ({}, 2, 2, 1),
        ({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}, None, None, 0),
        ({"bos_token_id": -1, "eos_token_id": -1, "pad_token_id": -1}, None, None, 0),
        ({"bos_token_id": 50272, "eos_token_id": 50272, "pad_token_id": 50272}, None, None, 0),
        ({"eos_token_id": 10**400}, 2, None, 1),
        ({"eos_token_id": [2, 202]}, 2, (2, 202), 1),
        ({"eos_token_id": [202]}, 2, 202, 1),
        ({"eos_token_id": [-1, 50271, 50272]}, 2, 50271, 1),
        ({"eos_token_id": []}, 2, None, 1),
        ({"pad_token_id": None, "eos_token_id": [5, 6]}, 2, (5, 6), 5),
    ],
)
def test_token_ids(given: dict[str, Any], bos: Any, eos: Any, pad: int) -> None:
    config = parse_config({**OPT_350M, **given}, "")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (bos, eos, pad)
    written = json.loads(json.dumps(config_fields(config)))
    assert parse_config(written, "") == config


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_pytorch_tanh", "gelu_new"])
def test_names_of_one_activation(name: str) -> None:
    assert parse_config({**OPT_350M, "activation_function": name}, "").activation == "gelu_new"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "x/config.json has no hidden_size; expected OPT's sizes"),
        ({"hidden_size": "1024"}, "has hidden_size '1024'; expected int"),
        ({"hidden_size": 1024.0}, "has hidden_size 1024.0; expected int"),
        ({"hidden_size": True}, "has hidden_size True; expected int"),
        ({"hidden_size": 1000}, "has hidden_size 1000, no multiple of its 16 num_attention_heads"),
        ({"num_attention_heads": 0}, "has num_attention_heads 0; expected 1 to"),
        ({"ffn_dim": -4}, "has ffn_dim -4; expected 1 to"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000; expected 1 to 4096"),
        ({"vocab_size": 10**12}, "has vocab_size 1000000000000; expected 1 to"),
        ({"do_layer_norm_before": 1}, "has do_layer_norm_before 1; expected bool"),
        ({"num_attention_heads": 2**24, "hidden_size": 2**24}, "has num_attention_heads 16777216; expected 1 to 4096"),
        ({"bos_token_id": [2]}, "has bos_token_id [2]; expected a token id or null"),
        ({"pad_token_id": "1"}, "has pad_token_id '1'; expected a token id or null"),
        ({"eos_token_id": 2.0}, "has eos_token_id 2.0; expected a token id, a list of them, or null"),
        ({"eos_token_id": [2, True]}, "has eos_token_id [2, True]; expected a token id, a list"),
        ({"eos_token_id": {"2": 2}}, "has eos_token_id {'2': 2}; expected a token id, a list"),
        (
            {"activation_function": "quick_gelu"},
            "has activation_function 'quick_gelu'; expected one of gelu, gelu_fast",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({**OPT_350M, **changes}, "x/config.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
