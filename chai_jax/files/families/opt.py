"""OPT (Zhang et al. 2022, arXiv 2205.01068): its config.json, tensor names, published shapes and licence.

What our model would silently get wrong is refused.
"""

from collections.abc import Mapping
from typing import Any

from chai_jax.files.families.config import Table
from chai_jax.files.families.family import SPECIAL_TOKENS, Family, Licence
from chai_jax.plans.architecture import Architecture

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "ffn_dim": "ffn_dim",
    "max_position_embeddings": "max_positions",
    "word_embed_proj_dim": "embed_dim",
    "do_layer_norm_before": "pre_norm",
    "_remove_final_layer_norm": "remove_final_norm",
    "enable_bias": "bias",
    "activation_function": "activation",
    "layer_norm_elementwise_affine": "norm_affine",
    "tie_word_embeddings": "tied",
}
TABLE = Table(
    name="OPT",
    names=FIELDS,
    # Architecture's own are OPT's. Sizes have none: transformers would take 125m's in their place.
    defaults={
        name: getattr(Architecture, name) for name in (*FIELDS.values(), *SPECIAL_TOKENS) if hasattr(Architecture, name)
    },
    ignored=None,  # transformers' OPT reads no others
)


config_fields = TABLE.write


def parse_config(fields: Mapping[str, Any], where: str) -> Architecture:
    """The `Architecture` that a config.json describes.

    Args:
        where: what the fields came from, for messages.

    Raises:
        InputError: naming the field that is missing, of the wrong type, out of range, or at odds with another.
    """
    given = dict(fields)
    if given.get("word_embed_proj_dim") is None:
        given["word_embed_proj_dim"] = given.get("hidden_size")
    return TABLE.read(given, where)


TENSORS = {
    "embed.tokens": "embed_tokens",
    "embed.positions": "embed_positions",
    "project_in": "project_in",
    "project_out": "project_out",
    "final_norm": "final_layer_norm",
    "head": "lm_head",
    "layers.{}.attention_norm": "layers.{}.self_attn_layer_norm",
    "layers.{}.query": "layers.{}.self_attn.q_proj",
    "layers.{}.key": "layers.{}.self_attn.k_proj",
    "layers.{}.value": "layers.{}.self_attn.v_proj",
    "layers.{}.output": "layers.{}.self_attn.out_proj",
    "layers.{}.mlp_norm": "layers.{}.final_layer_norm",
    "layers.{}.up": "layers.{}.fc1",
    "layers.{}.down": "layers.{}.fc2",
}


def _shape(layers: int, heads: int, width: int, ffn: int, **rest: Any) -> Architecture:
    return Architecture(50272, width, layers, heads, ffn, 2048, **{"embed_dim": width, **rest})


# Table 1 of the paper, and the checkpoints' config.json.
SHAPES = {
    "facebook/opt-125m": _shape(12, 12, 768, 3072),
    "facebook/opt-350m": _shape(24, 16, 1024, 4096, embed_dim=512, pre_norm=False),
    "facebook/opt-1.3b": _shape(24, 32, 2048, 8192),
    "facebook/opt-2.7b": _shape(32, 32, 2560, 10240),
    "facebook/opt-6.7b": _shape(32, 32, 4096, 16384),
    "facebook/opt-13b": _shape(40, 40, 5120, 20480),
}
LICENCE = Licence(
    hub_ids="facebook/opt-",
    fields={
        "license": "other",
        "license_name": "opt-175b",
        "license_link": "https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/MODEL_LICENSE.md",
    },
    # Its section 3 asks for the first sentence and for a copy of the licence with every copy of the model.
    notice=(
        "OPT-175B is licensed under the OPT-175B license, Copyright (c) Meta Platforms, Inc. All Rights Reserved. "
        "It grants use for non-commercial research only, and wants a copy of it to go with every copy of the model."
    ),
)

FAMILY = Family(
    model_type="opt",
    name="OPT",
    torch_class="OPTForCausalLM",
    parse_config=parse_config,
    config_fields=config_fields,
    tensors=TENSORS,
    prefixes=("model.decoder.", "decoder.", ""),
    ignored=("version",),  # a format number that fairseq's checkpoints carry into some conversions
    published=SHAPES,
    licence=LICENCE,
)
