"""The families that can be read and written, by the `model_type` of their config.json."""

from typing import Any

from chai_jax.errors import InputError
from chai_jax.files.families import gpt2, gpt_neox, llama, mistral, opt, phi3, qwen2, qwen3
from chai_jax.files.families.family import Family
from chai_jax.plans.architecture import Architecture

FAMILIES = {each.FAMILY.model_type: each.FAMILY for each in (opt, llama, mistral, qwen2, qwen3, gpt2, gpt_neox, phi3)}
COMPRESSED = "chai_"  # stands before the model_type in folders that transformers cannot read


def family_of(config: Architecture) -> Family:
    """The family that a model of this architecture belongs to."""
    return FAMILIES[config.family]


def find_family(model_type: Any, where: Any) -> tuple[Family, bool]:
    """The family of a config.json's `model_type`, and whether its folder holds an ordinary model (or else a compressed
    one).

    Args:
        where: what messages call the folder.

    Raises:
        InputError: no family has this type.
    """
    known = {f"{prefix}{name}": (FAMILIES[name], not prefix) for name in FAMILIES for prefix in ("", COMPRESSED)}
    if not isinstance(model_type, str) or model_type not in known:
        raise InputError(
            f"{where} holds a model of type {model_type!r:.80}; expected one of {', '.join(FAMILIES)}, or "
            f"{COMPRESSED} before one of them: choose such a model"
        )
    return known[model_type]
