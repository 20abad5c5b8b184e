"""config.json of every family, both ways: defaults are transformers', and what is not handled is refused by name."""

import dataclasses
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.files.families.registry import FAMILIES
from chai_jax.plans.architecture import Architecture

CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gpt2": "GPT2Config",
    "gpt_neox": "GPTNeoXConfig",
    "phi3": "Phi3Config",
}
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def sizes(name: str) -> dict[str, Any]:
    own = {"num_key_value_heads": 2} if name not in ("gpt2", "gpt_neox") else {}
    return dict(GPT2) if name == "gpt2" else {**SIZES, **own}


def parse(name: str, **changes: Any) -> Architecture:
    fields = {**sizes(name), **changes}
    return FAMILIES[name].parse_config(
        {key: value for key, value in fields.items() if value != "absent"}, "config.json"
    )


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    """All fields that transformers writes are read, and sizes alone mean what transformers takes them to mean."""
    import transformers

    written = getattr(transformers, CLASSES[name])(**sizes(name)).to_dict()
    assert parse(name) == FAMILIES[name].parse_config(written, "config.json")


@pytest.mark.parametrize("name", FAMILIES)
def test_written_and_read_back(name: str) -> None:
    for config in FAMILIES[name].published.values():
        fields = FAMILIES[name].config_fields(config)
        assert FAMILIES[name].parse_config(fields, "config.json") == config


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", ["hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size"])
def test_sizes_must_be_given(name: str, size: str) -> None:
    theirs = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
    field = theirs.get(size, size) if name == "gpt2" else size
    with pytest.raises(InputError, match=f"config.json has no {field}"):
        parse(name, **{field: "absent"})


LLAMA = [
    ({"attention_sinks": 4}, "has attention_sinks 4, which no Llama that is handled here has"),
    ({"num_local_experts": 8}, "has num_local_experts 8, which is not handled; expected"),
    (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "has rope_scaling 'longrope'; expected one of",
    ),
    ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, r"has rope_scaling \['linear'\]; expected one of default"),
    ({"rope_scaling": {"rope_type": "linear"}}, "has rope_scaling linear without factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "has factor 0 in its rotary positions; expected a number"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "magic": 1}}, "has magic in rope_scaling linear"),
    ({"rope_scaling": "linear"}, "has rope_scaling 'linear'; expected an object or null"),
    ({"rope_theta": "1e4"}, "has theta '1e4' in its rotary positions"),
    ({"rope_theta": 10**400}, "in its rotary positions; expected a number"),
    ({"num_key_value_heads": 3}, "has 3 num_key_value_heads, which do not divide its 4 num_attention_heads"),
    ({"num_key_value_heads": 0}, "has num_key_value_heads 0; expected 1 to"),
    ({"num_key_value_heads": "2"}, "has num_key_value_heads '2'; expected int"),
    ({"head_dim": 7}, "turns 1 of 7 dimensions of a head; expected an even number"),
    ({"hidden_act": "swiglu"}, "has hidden_act 'swiglu'; expected one of gelu"),
    ({"attention_bias": "yes"}, "has attention_bias 'yes'; expected true or false"),
    ({"rms_norm_eps": float("nan")}, "has rms_norm_eps nan; expected float"),
    ({"tie_word_embeddings": None}, "has no tie_word_embeddings"),
    ({"num_hidden_layers": 1 << 20}, "has num_hidden_layers 1048576; expected 1 to 4096"),
]


@pytest.mark.parametrize(("changes", "message"), LLAMA)
def test_what_is_not_handled_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse("llama", **changes)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx True, which is not"),
        ("gpt2", {"n_inner": "big"}, "has n_inner 'big'; expected int"),
        ("gpt_neox", {"rotary_pct": 0.4}, "turns 0.4 of 8 dimensions"),
        ("gpt_neox", {"rotary_pct": 1.5}, "has fraction 1.5 in its rotary positions"),
        ("mistral", {"sliding_window": -1}, "has sliding_window -1; expected a number of tokens or null"),
        ("qwen2", {"layer_types": ["full_attention"]}, "has layer_types .*; expected 2 of full_attention"),
        ("qwen2", {"layer_types": ["linear_attention"] * 2}, "has layer_types .*; expected 2 of full_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "has layers of sliding_attention without"),
        ("qwen2", {"use_mrope": True}, "has use_mrope True, which is not handled"),
        ("qwen3", {"num_experts": 64}, "has num_experts 64, which is not handled"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "has rope_scaling 'su'; expected one of"),
    ],
)
def test_what_a_family_does_not_handle(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(name, **changes)


def test_what_decides_nothing_is_passed_over() -> None:
    junk = {"use_cache": False, "pretraining_tp": 2, "_name_or_path": "x", "transformers_version": "4", "flag": False}
    assert parse("llama", **junk) == parse("llama")


def test_rotary_positions_as_they_were_and_as_they_are_written() -> None:
    old = parse("llama", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    new = parse("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old == new
    assert old.rotary is not None
    assert (old.rotary.theta, old.rotary.scaling, old.rotary.numbers) == (5e5, "linear", (("factor", 2.0),))


def test_a_context_is_as_long_as_its_scaling_says() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert parse("llama", rope_scaling=yarn).context == 128
    assert parse("llama", rope_scaling={**yarn, "factor": 1.5}).context == 64
    for kind in ("linear", "dynamic"):  # which do not say what they were trained on
        assert parse("llama", rope_scaling={"rope_type": kind, "factor": 4.0}).context == 64


def test_the_repr_that_fingerprints_are_made_of() -> None:
    """Fields that came later show where they are not absent: what was measured of an OPT is still known."""
    config = Architecture(48, 16, 2, 4, 32, 16, 16)
    assert repr(config) == (
        "Architecture(vocab_size=48, hidden_size=16, num_layers=2, num_heads=4, ffn_dim=32, max_positions=16, "
        "embed_dim=16, pre_norm=True, remove_final_norm=False, bias=True, activation='relu', norm_affine=True, "
        "tied=True, bos_token_id=2, eos_token_id=2, pad_token_id=1)"
    )
    assert "num_kv_heads=2" in repr(dataclasses.replace(config, num_kv_heads=2))
