"""OPT (Zhang et al. 2022, arXiv 2205.01068): its config.json, tensor names, published shapes and licence.

What our model would silently get wrong is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from chai_jax.errors import InputError
from chai_jax.files.families.family import SPECIAL_TOKENS, Family, Licence
from chai_jax.model.decoder import ACTIVATIONS
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
ALIASES = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu", "swish": "silu"}
# A mistyped size must not fill the memory: with arrays, or with descriptions of layers and heads.
LARGEST = 1 << 24
LARGEST_OF = {"num_layers": 1 << 12, "num_heads": 1 << 12}


def parse_config(fields: Mapping[str, Any], where: str) -> Architecture:
    """The `Architecture` that a config.json describes.

    Sizes must be given (transformers would take 125m's in their place); what else is missing has transformers' default.

    Args:
        where: what the fields came from, for messages.

    Raises:
        InputError: naming the field that is missing, of the wrong type, out of range, or at odds with another.
    """
    kinds = get_type_hints(Architecture)
    defaults = {f.name: f.default for f in dataclasses.fields(Architecture) if f.default is not dataclasses.MISSING}
    given = dict(fields)
    if given.get("word_embed_proj_dim") is None:
        given["word_embed_proj_dim"] = given.get("hidden_size")
    values: dict[str, Any] = {}
    for theirs, ours in FIELDS.items():
        value = given.get(theirs, defaults.get(ours))
        if value is None:
            raise InputError(f"{where} has no {theirs}; expected OPT's sizes: restore the file")
        if type(value) is not kinds[ours]:
            raise InputError(f"{where} has {theirs} {value!r:.80}; expected {kinds[ours].__name__}: mend the file")
        values[ours] = value
    values |= _token_ids(given, values["vocab_size"], where)
    values["activation"] = ALIASES.get(values["activation"], values["activation"])
    config = Architecture(**values)
    _check(config, where)
    return config


def _token_ids(given: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    """The special tokens, of which there need not be any: null and, as in transformers, ids outside the table are none.

    Padding is masked, so that any token will do for it: where none is given it is the end's, as in transformers.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in SPECIAL_TOKENS:
        value = given.get(name, getattr(Architecture, name))
        many = name == "eos_token_id" and isinstance(value, (list, tuple))
        ids = value if many else () if value is None else (value,)
        if not all(type(token) is int for token in ids):
            kinds = "a token id, a list of them, or null" if name == "eos_token_id" else "a token id or null"
            raise InputError(f"{where} has {name} {value!r:.80}; expected {kinds}: mend the file")
        found[name] = tuple(token for token in ids if 0 <= token < vocab_size)
    bos, eos, pad = (found[name] for name in SPECIAL_TOKENS)
    return {
        "bos_token_id": bos[0] if bos else None,
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": (*pad, *eos, 0)[0],
    }


def _check(config: Architecture, where: str) -> None:
    for theirs, ours in FIELDS.items():
        value = getattr(config, ours)
        most = LARGEST_OF.get(ours, LARGEST)
        if type(value) is int and not 1 <= value <= most:
            raise InputError(f"{where} has {theirs} {value!s:.80}; expected 1 to {most}: mend the file")
    if config.hidden_size % config.num_heads:
        raise InputError(
            f"{where} has hidden_size {config.hidden_size}, no multiple of its {config.num_heads} num_attention_heads: "
            "mend the file"
        )
    if config.activation not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS.keys() | ALIASES.keys()))
        raise InputError(f"{where} has activation_function {config.activation!r:.80}; expected one of {known}")


def config_fields(config: Architecture) -> dict[str, Any]:
    """The fields of config.json that describe `config`; `parse_config` of them gives it back."""
    described = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    return described | {name: getattr(config, name) for name in SPECIAL_TOKENS}


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
