"""GPT-2 (Radford et al. 2019): learned positions, one fused projection, kernels stored the other way round."""

from collections.abc import Mapping
from typing import Any

from chai_jax.files.families.config import Table
from chai_jax.files.families.family import Family
from chai_jax.plans.architecture import Architecture

NAMES = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_inner": "ffn_dim",
    "n_positions": "max_positions",
    "activation_function": "activation",
    "layer_norm_epsilon": "norm_epsilon",
    "tie_word_embeddings": "tied",
}
TABLE = Table(
    name="GPT-2",
    names=NAMES,
    defaults={
        "activation": "gelu_new",
        "norm_epsilon": 1e-5,
        "tied": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": None,
    },
    always={"position_offset": 0, "family": "gpt2"},
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        # It decides in what precision scores are computed in training; ours are in float32.
        "reorder_and_upcast_attn": (False, True),
        "add_cross_attention": (False,),
    },
    ignored=frozenset(
        {
            *("n_ctx", "summary_type", "summary_use_proj", "summary_activation"),
            *("summary_proj_to_labels", "summary_first_dropout"),
        }
    ),
)


def parse_config(fields: Mapping[str, Any], where: str) -> Architecture:
    """The `Architecture` that a config.json describes; raises InputError as every family's reader does."""
    given = dict(fields)
    if given.get("n_inner") is None and type(given.get("n_embd")) is int:
        given["n_inner"] = 4 * given["n_embd"]
    return TABLE.read(given, where)


TENSORS = {
    "embed.tokens": "wte",
    "embed.positions": "wpe",
    "final_norm": "ln_f",
    "head": "lm_head",
    "layers.{}.attention_norm": "h.{}.ln_1",
    "layers.{}.query": "h.{}.attn.c_attn",
    "layers.{}.key": "h.{}.attn.c_attn",
    "layers.{}.value": "h.{}.attn.c_attn",
    "layers.{}.output": "h.{}.attn.c_proj",
    "layers.{}.mlp_norm": "h.{}.ln_2",
    "layers.{}.up": "h.{}.mlp.c_fc",
    "layers.{}.down": "h.{}.mlp.c_proj",
}


def _shape(layers: int, heads: int, width: int) -> Architecture:
    ids = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}
    rest = {"activation": "gelu_new", "position_offset": 0, "family": "gpt2", **ids}
    return Architecture(50257, width, layers, heads, 4 * width, 1024, width, **rest)  # type: ignore[arg-type]


FAMILY = Family(
    model_type="gpt2",
    name="GPT-2",
    torch_class="GPT2LMHeadModel",
    parse_config=parse_config,
    config_fields=TABLE.write,
    tensors=TENSORS,
    prefixes=("transformer.", ""),
    fused={"h.{}.attn.c_attn": "blocks"},
    turned=True,
    ignored=("h.{}.attn.bias", "h.{}.attn.masked_bias"),
    published={
        "openai-community/gpt2": _shape(12, 12, 768),
        "openai-community/gpt2-medium": _shape(24, 16, 1024),
        "openai-community/gpt2-large": _shape(36, 20, 1280),
        "openai-community/gpt2-xl": _shape(48, 25, 1600),
    },
)
