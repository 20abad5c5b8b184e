"""Qwen3 (arXiv 2505.09388): queries and keys are normed head by head; no biases."""

from collections.abc import Mapping
from typing import Any

from chai_jax.files.families.config import Table
from chai_jax.files.families.llama_like import (
    ALWAYS,
    ATTENTION,
    DEFAULTS,
    HEAD_SIZE,
    MIXTURES,
    NAMES,
    OWN,
    flag,
    llama_like,
    shape,
    some_windows,
    write_some_windows,
)
from chai_jax.plans.architecture import Architecture, Rotary

TABLE = Table(
    name="Qwen3",
    names={**NAMES, **HEAD_SIZE},
    defaults={**DEFAULTS, "num_kv_heads": 32, "head_size": 128},
    always={**ALWAYS, "qk_norm": True},
    fixed=MIXTURES,
    own=(*OWN, "attention_bias"),
)


def more(fields: Mapping[str, Any], where: str, layers: int) -> dict[str, Any]:
    """Biases and windows."""
    return {
        "bias": ATTENTION if flag(fields, "attention_bias", where) else False,
        **some_windows(fields, where, layers),
    }


def written(config: Architecture) -> dict[str, Any]:
    """The inverse of `more`."""
    return {"attention_bias": config.has_bias("query"), **write_some_windows(config)}


PUBLISHED = {
    "Qwen/Qwen3-0.6B": shape(
        151936,
        1024,
        28,
        16,
        8,
        3072,
        40960,
        head_size=128,
        rotary=Rotary(1_000_000.0),
        tied=True,
        qk_norm=True,
        norm_epsilon=1e-6,
        bos_token_id=151643,
        eos_token_id=151645,
        pad_token_id=151645,
    ),
}
FAMILY = llama_like("qwen3", "Qwen3", "Qwen3ForCausalLM", TABLE, more=more, written=written, published=PUBLISHED)
