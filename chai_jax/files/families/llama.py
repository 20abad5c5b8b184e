"""Llama (Touvron et al. 2023, arXiv 2302.13971) 1, 2 and 3, TinyLlama, SmolLM and SmolLM2."""

from collections.abc import Mapping
from typing import Any

from chai_jax.files.families.config import ROTARY, Table
from chai_jax.files.families.llama_like import (
    ALWAYS,
    ATTENTION,
    DEFAULTS,
    FEED_FORWARD,
    HEAD_SIZE,
    MIXTURES,
    NAMES,
    TOKENS,
    flag,
    llama_like,
    shape,
)
from chai_jax.plans.architecture import Architecture, Rotary

TABLE = Table(
    name="Llama",
    names={**NAMES, **HEAD_SIZE},
    defaults={**DEFAULTS, **TOKENS},
    always=ALWAYS,
    fixed=MIXTURES,
    ignored=frozenset({"rope_interleaved", "is_llama_config"}),  # SmolLM's, false and for its own tools
    own=(*ROTARY, "attention_bias", "mlp_bias"),
)


def biases(fields: Mapping[str, Any], where: str, layers: int) -> dict[str, Any]:
    """Which projections have biases."""
    attention, feed_forward = (flag(fields, name, where) for name in ("attention_bias", "mlp_bias"))
    return {"bias": ATTENTION * attention + FEED_FORWARD * feed_forward or False}


def write_biases(config: Architecture) -> dict[str, Any]:
    """The inverse of `biases`."""
    return {"attention_bias": config.has_bias("query"), "mlp_bias": config.has_bias("up")}


LLAMA3 = (
    ("factor", 32.0),
    ("high_freq_factor", 4.0),
    ("low_freq_factor", 1.0),
    ("original_max_position_embeddings", 8192.0),
)
IDS = {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128001}
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": shape(
        49152, 576, 30, 9, 3, 1536, 8192, rotary=Rotary(100_000.0), tied=True, bos_token_id=0, eos_token_id=0
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": shape(
        32000, 2048, 22, 32, 4, 5632, 2048, rotary=Rotary(), bos_token_id=1, eos_token_id=2
    ),
    "meta-llama/Llama-2-7b-hf": shape(
        32000, 4096, 32, 32, 32, 11008, 4096, rotary=Rotary(), bos_token_id=1, eos_token_id=2
    ),
    "meta-llama/Llama-3.2-1B": shape(
        128256,
        2048,
        16,
        32,
        8,
        8192,
        131072,
        head_size=64,
        tied=True,
        rotary=Rotary(500_000.0, 1.0, "llama3", LLAMA3),
        **IDS,
    ),
    "meta-llama/Llama-3.1-8B": shape(
        128256,
        4096,
        32,
        32,
        8,
        14336,
        131072,
        rotary=Rotary(500_000.0, 1.0, "llama3", (("factor", 8.0), *LLAMA3[1:])),
        **IDS,
    ),
}
FAMILY = llama_like("llama", "Llama", "LlamaForCausalLM", TABLE, more=biases, written=write_biases, published=PUBLISHED)
