"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases on queries, keys and values alone; no token comes first."""

from chai_jax.files.families.config import Table
from chai_jax.files.families.llama_like import (
    ALWAYS,
    DEFAULTS,
    MIXTURES,
    NAMES,
    OWN,
    llama_like,
    shape,
    some_windows,
    write_some_windows,
)
from chai_jax.plans.architecture import Rotary

BIAS = ("query", "key", "value")
TABLE = Table(
    name="Qwen2",
    names=NAMES,
    defaults={**DEFAULTS, "num_kv_heads": 32},
    always={**ALWAYS, "bias": BIAS},
    fixed={**MIXTURES, "use_mrope": (False, None)},
    own=OWN,
)
IDS = {"bos_token_id": 151643, "eos_token_id": 151643, "pad_token_id": 151643, "norm_epsilon": 1e-6, "bias": BIAS}
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": shape(151936, 896, 24, 14, 2, 4864, 32768, rotary=Rotary(1_000_000.0), tied=True, **IDS),
    "Qwen/Qwen2.5-7B": shape(152064, 3584, 28, 28, 4, 18944, 131072, rotary=Rotary(1_000_000.0), **IDS),
}
FAMILY = llama_like(
    "qwen2",
    "Qwen2",
    "Qwen2ForCausalLM",
    TABLE,
    more=some_windows,
    written=write_some_windows,
    published=PUBLISHED,
)
