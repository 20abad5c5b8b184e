"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745) and Pythia: a parallel residual, a fused projection, partly rotary."""

from collections.abc import Mapping
from typing import Any

from chai_jax.files.families.config import ROTARY, Table, read_rotary, write_rotary
from chai_jax.files.families.family import Family
from chai_jax.files.families.llama_like import ATTENTION, flag
from chai_jax.plans.architecture import Architecture, Rotary

NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
    "max_position_embeddings": "max_positions",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
    "use_parallel_residual": "parallel",
}
TABLE = Table(
    name="GPT-NeoX",
    names=NAMES,
    defaults={
        "activation": "gelu",
        "norm_epsilon": 1e-5,
        "tied": False,
        "parallel": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
    always={"position_offset": 0, "family": "gpt_neox"},
    ignored=frozenset({"gradient_checkpointing"}),
    own=(*ROTARY, "rotary_pct", "rotary_emb_base", "attention_bias"),
)
ROTARY_NAMES = ("rotary_emb_base", "rotary_pct")


def parse_config(fields: Mapping[str, Any], where: str) -> Architecture:
    """The `Architecture` that a config.json describes; raises InputError as every family's reader does."""
    bias = True if flag(fields, "attention_bias", where, True) else ("up", "down")
    return TABLE.read(fields, where, bias=bias, rotary=read_rotary(fields, where, fraction=0.25, names=ROTARY_NAMES))


def config_fields(config: Architecture) -> dict[str, Any]:
    """The inverse of `parse_config`."""
    assert config.rotary is not None
    bias = {"attention_bias": all(map(config.has_bias, ATTENTION))}
    return TABLE.write(config) | bias | write_rotary(config.rotary, ROTARY_NAMES)


QKV = "layers.{}.attention.query_key_value"
TENSORS = {
    "embed.tokens": "embed_in",
    "final_norm": "final_layer_norm",
    "head": "embed_out",
    "layers.{}.attention_norm": "layers.{}.input_layernorm",
    "layers.{}.query": QKV,
    "layers.{}.key": QKV,
    "layers.{}.value": QKV,
    "layers.{}.output": "layers.{}.attention.dense",
    "layers.{}.mlp_norm": "layers.{}.post_attention_layernorm",
    "layers.{}.up": "layers.{}.mlp.dense_h_to_4h",
    "layers.{}.down": "layers.{}.mlp.dense_4h_to_h",
}


def _shape(layers: int, heads: int, width: int, vocabulary: int = 50304) -> Architecture:
    return Architecture(
        vocabulary,
        width,
        layers,
        heads,
        4 * width,
        2048,
        width,
        activation="gelu",
        tied=False,
        parallel=True,
        rotary=Rotary(fraction=0.25),
        position_offset=0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        family="gpt_neox",
    )


FAMILY = Family(
    model_type="gpt_neox",
    name="GPT-NeoX",
    torch_class="GPTNeoXForCausalLM",
    parse_config=parse_config,
    config_fields=config_fields,
    tensors=TENSORS,
    prefixes=("gpt_neox.", ""),
    fused={QKV: "heads"},
    ignored=tuple(f"layers.{{}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),
    published={
        "EleutherAI/pythia-160m": _shape(12, 12, 768),
        "EleutherAI/pythia-410m": _shape(24, 16, 1024),
        "EleutherAI/pythia-1.4b": _shape(24, 16, 2048),
    },
)
