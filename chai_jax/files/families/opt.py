"""config.json of a Hugging Face OPT <-> `Architecture`, refusing what our model would silently get wrong."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from chai_jax.errors import InputError
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
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
ALIASES = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu", "swish": "silu"}
LARGEST = 1 << 24  # no size of any OPT comes near; keeps a mistyped one from filling the memory
MOST = {"num_layers": 1 << 12, "num_heads": 1 << 12}  # a mistyped one would fill it with their descriptions


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
    for name in TOKENS:
        value = given.get(name, getattr(Architecture, name))
        many = name == "eos_token_id" and isinstance(value, (list, tuple))
        ids = value if many else () if value is None else (value,)
        if not all(type(token) is int for token in ids):
            kinds = "a token id, a list of them, or null" if name == "eos_token_id" else "a token id or null"
            raise InputError(f"{where} has {name} {value!r:.80}; expected {kinds}: mend the file")
        found[name] = tuple(token for token in ids if 0 <= token < vocab_size)
    bos, eos, pad = (found[name] for name in TOKENS)
    return {
        "bos_token_id": bos[0] if bos else None,
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": (*pad, *eos, 0)[0],
    }


def _check(config: Architecture, where: str) -> None:
    for theirs, ours in FIELDS.items():
        value = getattr(config, ours)
        most = MOST.get(ours, LARGEST)
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
    return {theirs: getattr(config, ours) for theirs, ours in (*FIELDS.items(), *zip(TOKENS, TOKENS, strict=True))}
