"""What Llama and its relatives have in common: RMSNorm, a gated feed-forward, rotary positions, grouped heads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from chai_jax.errors import InputError
from chai_jax.files.families.config import ROTARY, Table, read_rotary, write_rotary
from chai_jax.files.families.family import Family
from chai_jax.plans.architecture import Architecture

NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_dim",
    "max_position_embeddings": "max_positions",
    "hidden_act": "activation",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
}
HEAD_SIZE = {"head_dim": "head_size"}
DEFAULTS = {"num_kv_heads": None, "head_size": None, "activation": "silu", "norm_epsilon": 1e-6, "tied": False}
# transformers' defaults of the special tokens, in Llama and Mistral.
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
TENSORS = {
    "embed.tokens": "embed_tokens",
    "final_norm": "norm",
    "head": "lm_head",
    "layers.{}.attention_norm": "layers.{}.input_layernorm",
    "layers.{}.query": "layers.{}.self_attn.q_proj",
    "layers.{}.key": "layers.{}.self_attn.k_proj",
    "layers.{}.value": "layers.{}.self_attn.v_proj",
    "layers.{}.output": "layers.{}.self_attn.o_proj",
    "layers.{}.query_norm": "layers.{}.self_attn.q_norm",
    "layers.{}.key_norm": "layers.{}.self_attn.k_norm",
    "layers.{}.mlp_norm": "layers.{}.post_attention_layernorm",
    "layers.{}.gate": "layers.{}.mlp.gate_proj",
    "layers.{}.up": "layers.{}.mlp.up_proj",
    "layers.{}.down": "layers.{}.mlp.down_proj",
}
IGNORED = ("layers.{}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")
ALWAYS = {"norm": "rms", "gated": True, "position_offset": 0}
ATTENTION, FEED_FORWARD = ("query", "key", "value", "output"), ("gate", "up", "down")
MIXTURES = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (None, 0, 1))

More = Callable[[Mapping[str, Any], str, int], dict[str, Any]]
Written = Callable[[Architecture], dict[str, Any]]


def llama_like(
    model_type: str,
    name: str,
    torch_class: str,
    table: Table,
    *,
    more: More = lambda fields, where, layers: {},
    written: Written = lambda config: {},
    published: Mapping[str, Architecture] | None = None,
    **rest: Any,
) -> Family:
    """A family whose config.json a table describes, with rotary positions as all of them say it.

    Args:
        more: (fields, what messages call them, layers) -> what else the fields say.
        written: the inverse.
        rest: other attributes of the `Family`.
    """

    def parse_config(fields: Mapping[str, Any], where: str) -> Architecture:
        layers = fields.get("num_hidden_layers")
        found = more(fields, where, layers if type(layers) is int and 0 < layers < 1 << 12 else 0)
        return table.read(fields, where, rotary=read_rotary(fields, where), family=model_type, **found)

    def config_fields(config: Architecture) -> dict[str, Any]:
        assert config.rotary is not None
        sizes = {"num_key_value_heads": config.kv_heads} | {
            theirs: config.head_dim for theirs, ours in table.names.items() if ours == "head_size"
        }
        return table.write(config) | sizes | write_rotary(config.rotary) | written(config)

    known = {
        "tensors": TENSORS,
        "prefixes": ("model.", ""),
        "ignored": IGNORED,
        "published": {hub: dataclasses.replace(shape, family=model_type) for hub, shape in (published or {}).items()},
    }
    return Family(model_type, name, torch_class, parse_config, config_fields, **{**known, **rest})


def flag(fields: Mapping[str, Any], name: str, where: str, default: bool = False) -> bool:
    """A field that is true or false."""
    value = fields.get(name, default)
    if type(value) is not bool:
        raise InputError(f"{where} has {name} {value!r:.80}; expected true or false: mend the file")
    return value


def window_of(fields: Mapping[str, Any], where: str) -> int:
    """The sliding window; 0: none."""
    value = fields.get("sliding_window")
    if value is None:
        return 0
    if type(value) is not int or not 1 <= value <= 1 << 31:
        raise InputError(
            f"{where} has sliding_window {value!r:.80}; expected a number of tokens or null: mend the file"
        )
    return value


def one_window(fields: Mapping[str, Any], where: str, layers: int) -> dict[str, Any]:
    """The same window in every layer."""
    window = window_of(fields, where)
    return {"windows": (window,) * layers if window else ()}


def write_one_window(config: Architecture) -> dict[str, Any]:
    """The inverse of `one_window`."""
    return {"sliding_window": config.windows[0] if config.windows else None}


LAYER_TYPES = ("full_attention", "sliding_attention")


def some_windows(fields: Mapping[str, Any], where: str, layers: int) -> dict[str, Any]:
    """The windows of the layers that have one (Qwen): those that `layer_types` says, or from `max_window_layers` on."""
    kinds = fields.get("layer_types")
    window = window_of(fields, where) if flag(fields, "use_sliding_window", where) else 0
    if kinds is None:
        first = fields.get("max_window_layers", 28)
        if type(first) is not int:
            raise InputError(f"{where} has max_window_layers {first!r:.80}; expected a number of layers: mend the file")
        kinds = [LAYER_TYPES[window > 0 and index >= first] for index in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in LAYER_TYPES for kind in kinds):
        raise InputError(
            f"{where} has layer_types {kinds!r:.80}; expected {layers} of {' and '.join(LAYER_TYPES)}: choose another "
            "model"
        )
    if LAYER_TYPES[1] in kinds and not window:
        raise InputError(f"{where} has layers of sliding_attention without a sliding_window: mend the file")
    windows = tuple(window if kind == LAYER_TYPES[1] else 0 for kind in kinds)
    return {"windows": windows if any(windows) else ()}


def write_some_windows(config: Architecture) -> dict[str, Any]:
    """The inverse of `some_windows`."""
    if not config.windows:
        return {"use_sliding_window": False}
    kinds = [LAYER_TYPES[window > 0] for window in config.windows]
    first = kinds.index(LAYER_TYPES[1])
    window = max(config.windows)
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": kinds,
    }


WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
OWN = (*ROTARY, *WINDOWS)


def shape(
    vocabulary: int, width: int, layers: int, heads: int, kv_heads: int, ffn: int, positions: int, **rest: Any
) -> Architecture:
    """The shape of a published model."""
    return Architecture(
        vocabulary,
        width,
        layers,
        heads,
        ffn,
        positions,
        width,
        num_kv_heads=kv_heads,
        **{**ALWAYS, "activation": "silu", "bias": False, "tied": False, "norm_epsilon": 1e-5, **rest},
    )
