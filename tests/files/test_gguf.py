"""GGUF files give the models that they were made of: logits as torch's, numbers as the package's and transformers'."""

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.files.convert import to_hf
from chai_jax.files.export import export
from chai_jax.files.store import load, read_architecture

pytest.importorskip("gguf")

from tests.files.ggufs import K_BLOCKS, QUANTIZED, write_bytes, write_gguf, write_words  # noqa: E402 (needs gguf)

TOKENS = np.array([[3, 5, 9, 17, 4, 11, 11], [6, 3, 3, 8, 14, 18, 6]], np.int32)
SIZES = {
    "vocab_size": 19,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
GPT2 = {"vocab_size": 19, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, "rms_norm_eps": 1e-5}),
    "llama, every option": (
        "Llama",
        {
            **SIZES,
            "rope_parameters": LLAMA3,
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama, linear": ("Llama", {**SIZES, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}),
    "qwen2": ("Qwen2", {**SIZES, "rope_parameters": YARN}),
    "qwen2, tied": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16}),
    "gpt2": ("GPT2", {**GPT2, "eos_token_id": 2}),
    "gpt2, head apart": ("GPT2", {**GPT2, "eos_token_id": 2, "tie_word_embeddings": False}),
}


def module_of(torch: ModuleType, name: str, **fields: Any) -> Any:
    """A random torch model, its biases and norms not trivial."""
    import transformers

    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    module = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**fields)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


def logits_of(torch: ModuleType, module: Any) -> np.ndarray:
    with torch.no_grad():
        return module(torch.tensor(TOKENS).long()).logits.numpy()


@pytest.mark.parametrize("case", MODELS)
def test_logits_are_torch_s(torch: ModuleType, tmp_path: Path, case: str) -> None:
    name, fields = MODELS[case]
    module = module_of(torch, name, **fields)
    rule = {"Qwen2": "qwen2", "Qwen3": "qwen2", "GPT2": "gpt-2"}.get(name)
    words = write_words if rule is None else partial(write_bytes, rule=rule)
    path = write_gguf(tmp_path / "model.gguf", name.lower(), module, more=words)
    wanted, model = logits_of(torch, module), load(path)
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(model(TOKENS), wanted, atol=1e-4)
    export(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.config == model.config == read_architecture(path)
    assert type(module).from_pretrained(tmp_path / "out").config.vocab_size == 19
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    for text in ("abc cab", " a  b<s>c</s> ab", "e\u0301a"):
        assert again.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_every_format_is_read_as_transformers_does(torch: ModuleType, tmp_path: Path) -> None:
    """One model, each of its maps in another format, read by transformers' own reader and by ours."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    fields = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    formats = ["F16", "BF16", *QUANTIZED, *K_BLOCKS]
    left = [*formats, *reversed(formats)]

    def format_of(name: str, x: np.ndarray) -> str:
        return left.pop() if name.startswith("blk") and x.ndim == 2 and left else "F32"

    path = write_gguf(tmp_path / "model.gguf", "llama", module_of(torch, "Llama", **fields, ), format_of)
    assert len(left) == 2 * len(formats) - 14
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    model = load(path)
    ours, state = to_hf(model.config, model.params), theirs.state_dict()
    assert {stored.dtype for stored in ours.values()} == {"float32", "float16", "bfloat16"}
    assert ours.keys() == state.keys()
    for name, stored in ours.items():
        np.testing.assert_array_equal(stored.read().astype(np.float32), state[name].numpy(), name)
    np.testing.assert_allclose(load(path, dtype="float32")(TOKENS), logits_of(torch, theirs), atol=1e-4)
