"""Small GGUF files, written as llama.cpp's converter does (its conversion/base.py, llama.py and gpt2.py of 2026)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Format

QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # that the package can write
# Of a block of 256: its bytes, and where its scales of two bytes are.
K_BLOCKS = {
    "Q2_K": (84, (80, 82)),
    "Q3_K": (110, (108,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
}
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijk", "\u2581", "ab", "\u2581c", "abc", "\u2581ab"]
BYTES = ["<pad>", "<s>", "</s>", *"abcdefghijk", "\u0120", "ab", "\u0120c", "abc", "\u0120ab"]
MERGES = ["a b", "\u0120 c", "ab c", "\u0120 ab"]

# convert_hf_to_gguf.py knows a vocabulary's rule by what this text becomes.
CHECKED = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you "
    "sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
SUMS = {
    "gpt-2": "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454",
    "smollm": "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249",
}


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute`."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def as_stored(kind: str, module: Any) -> dict[str, np.ndarray]:
    """The tensors of a torch model by llama.cpp's names, in its order and layout."""
    config = module.config
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == kind), 99)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found = {}
    for name, tensor in module.state_dict().items():
        x = tensor.numpy()
        if name in tied or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if kind == "llama" and "q_proj" in name:
            x = permuted(x, config.num_attention_heads)
        if kind == "llama" and "k_proj" in name:
            x = permuted(x, config.num_key_value_heads)
        if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            x = x.T
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(x)
    return found


def packed(x: np.ndarray, kind: str, random: np.random.Generator) -> np.ndarray:
    """A tensor in a format; in those that the package cannot write other numbers, of a like size."""
    if kind not in K_BLOCKS:
        return gguf.quantize(x, Format[kind])
    size, scales = K_BLOCKS[kind]
    blocks = random.integers(0, 256, (*x.shape[:-1], x.shape[-1] // 256, size), np.uint8)
    for at in scales:
        blocks[..., at : at + 2] = np.full(blocks.shape[:-1], 0.002, np.float16)[..., None].view(np.uint8)
    return blocks.reshape(*x.shape[:-1], -1)


def rope_factors(config: Any) -> np.ndarray | None:
    """`generate_extra_tensors`: what Llama 3's scaling divides the frequencies by."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    dim, context = config.head_dim, 8192
    factors = []
    for at in range(0, dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (at / dim)
        smooth = (context / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        if wave < context / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wave > context / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_sizes(writer: Any, kind: str, config: Any) -> None:
    """`set_gguf_parameters`."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_file_type(0)
    if kind == "gpt2":
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    rope = config.rope_parameters
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    size = getattr(config, "head_dim", None)
    if size is not None:
        writer.add_key_length(size)
        writer.add_value_length(size)
    if kind == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(size or config.hidden_size // config.num_attention_heads)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def write_words(writer: Any) -> None:
    """A SentencePiece vocabulary."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([-float(at) for at in range(len(WORDS))])
    writer.add_token_types([2, 3, 3, *[1] * (len(WORDS) - 3)])


def write_bytes(writer: Any, rule: str) -> None:
    """A byte-level vocabulary."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(BYTES)
    writer.add_token_types([3, 3, 3, *[1] * (len(BYTES) - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_gguf(
    path: Path,
    kind: str,
    module: Any,
    format_of: Callable[[str, np.ndarray], str] = lambda name, x: "F32",
    more: Callable[[Any], None] = write_words,
) -> Path:
    """Write a torch model as an architecture `kind`.

    Args:
        format_of: (llama.cpp's name, tensor) -> format.
        more: writes what else there is to say; a tokenizer, if not given.
    """
    writer, random = gguf.GGUFWriter(path, kind), np.random.default_rng(0)
    write_sizes(writer, kind, module.config)
    more(writer)
    tensors = as_stored(kind, module)
    factors = rope_factors(module.config)
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    for name, x in tensors.items():
        how = format_of(name, x)
        writer.add_tensor(name, packed(x, how, random), raw_dtype=Format[how])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
