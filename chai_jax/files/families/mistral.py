"""Mistral 7B (Jiang et al. 2023, arXiv 2310.06825): Llama with a sliding window, in its first version."""

from chai_jax.files.families.config import Table
from chai_jax.files.families.llama_like import (
    ALWAYS,
    DEFAULTS,
    HEAD_SIZE,
    MIXTURES,
    NAMES,
    OWN,
    TOKENS,
    llama_like,
    one_window,
    shape,
    write_one_window,
)
from chai_jax.plans.architecture import Rotary

TABLE = Table(
    name="Mistral",
    names={**NAMES, **HEAD_SIZE},
    # Without the field, transformers takes 8 key and value heads.
    defaults={**DEFAULTS, **TOKENS, "num_kv_heads": 8},
    always={**ALWAYS, "bias": False},
    fixed=MIXTURES,
    own=OWN,
)
PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": shape(
        32000,
        4096,
        32,
        32,
        8,
        14336,
        32768,
        rotary=Rotary(),
        windows=(4096,) * 32,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mistralai/Mistral-7B-v0.3": shape(
        32768, 4096, 32, 32, 8, 14336, 32768, rotary=Rotary(1_000_000.0), bos_token_id=1, eos_token_id=2
    ),
}
FAMILY = llama_like(
    "mistral",
    "Mistral",
    "MistralForCausalLM",
    TABLE,
    # A file without the field means 4,096; null means none.
    more=lambda fields, where, layers: one_window({"sliding_window": 4096, **fields}, where, layers),
    written=write_one_window,
    published=PUBLISHED,
)
