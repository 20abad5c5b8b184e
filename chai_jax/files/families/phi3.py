"""Phi-3 (arXiv 2404.14219): Llama with its projections in fused tensors."""

from chai_jax.files.families.config import Table
from chai_jax.files.families.llama_like import (
    ALWAYS,
    DEFAULTS,
    MIXTURES,
    NAMES,
    OWN,
    TENSORS,
    llama_like,
    one_window,
    shape,
    write_one_window,
)
from chai_jax.plans.architecture import Rotary

TABLE = Table(
    name="Phi-3",
    names=NAMES,
    defaults={**DEFAULTS, "norm_epsilon": 1e-5, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000},
    always={**ALWAYS, "bias": False},
    fixed={**MIXTURES, "attention_bias": (False, None), "mlp_bias": (False, None)},
    own=OWN,
)
PUBLISHED = {
    "microsoft/Phi-3-mini-4k-instruct": shape(
        32064,
        3072,
        32,
        32,
        32,
        8192,
        4096,
        rotary=Rotary(),
        windows=(2047,) * 32,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
    ),
}
QKV, GATE_UP = "layers.{}.self_attn.qkv_proj", "layers.{}.mlp.gate_up_proj"
FAMILY = llama_like(
    "phi3",
    "Phi-3",
    "Phi3ForCausalLM",
    TABLE,
    more=one_window,
    written=write_one_window,
    published=PUBLISHED,
    tensors={
        **TENSORS,
        **{f"layers.{{}}.{name}": QKV for name in ("query", "key", "value")},
        **{f"layers.{{}}.{name}": GATE_UP for name in ("gate", "up")},
    },
    fused={QKV: "blocks", GATE_UP: "blocks"},
)
