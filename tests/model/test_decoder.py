"""Our forward pass against torch's `OPTForCausalLM`, the oracle: logits, gradients, paddings, all shapes of OPT."""

from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.files.store import load
from chai_jax.model.decoder import forward, unembed
from chai_jax.model.model import Model

SMALL = {"vocab_size": 96, "max_position_embeddings": 32, "num_hidden_layers": 3}
SHAPES = {
    "125m": {"hidden_size": 48, "num_attention_heads": 6, "ffn_dim": 96, "word_embed_proj_dim": 48},
    "350m": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "1.3b": {"hidden_size": 64, "num_attention_heads": 8, "ffn_dim": 128, "word_embed_proj_dim": 64},
}
VARIANTS = {
    "no biases": {"enable_bias": False},
    "gelu": {"activation_function": "gelu"},
    "gelu_new": {"activation_function": "gelu_new"},
    "norms without parameters": {"layer_norm_elementwise_affine": False},
    "final norm removed": {"_remove_final_layer_norm": True},
    "untied head": {"tie_word_embeddings": False},
}


def random_opt(torch: ModuleType, folder: Path, **changes: Any) -> tuple[Model, Any]:
    """A random OPT written by transformers, as loaded by us and as torch's module."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    module = OPTForCausalLM(OPTConfig(**{**SMALL, **SHAPES["125m"], **changes}, dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # Larger than OPT's own initialisation, so that attention is far from uniform and norms are not trivial.
            parameter.add_(0.1 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    return load(folder), module


def batch(vocabulary: int, padding: str, rows: int = 3, length: int = 13) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    tokens = random.integers(4, vocabulary, (rows, length)).astype(np.int32)
    mask = np.ones((rows, length), bool)
    for row in range(rows):
        pads = slice(0, 2 * row) if padding == "left" else slice(length - 2 * row, length)
        mask[row, pads] = False
    tokens[~mask] = 1
    return tokens, mask


def torch_logits(torch: ModuleType, module: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
        return module(**inputs).logits.numpy()


def assert_same_logits(torch: ModuleType, model: Model, module: Any, padding: str) -> None:
    tokens, mask = batch(model.config.vocab_size, padding)
    ours, theirs = np.asarray(model(tokens, mask)), torch_logits(torch, module, tokens, mask)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs)[mask].max() <= 1e-4


@pytest.mark.as_user
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_torch(torch: ModuleType, tmp_path: Path, shape: str, padding: str) -> None:
    model, module = random_opt(torch, tmp_path, **SHAPES[shape])
    assert_same_logits(torch, model, module, padding)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_torch(torch: ModuleType, tmp_path: Path, variant: str) -> None:
    model, module = random_opt(torch, tmp_path, **VARIANTS[variant])
    assert_same_logits(torch, model, module, "left")


@pytest.mark.parametrize("shape", ["125m", pytest.param("350m", marks=pytest.mark.slow)])  # 1.3b: of the first kind
def test_gradients_equal_torch(torch: ModuleType, tmp_path: Path, shape: str) -> None:
    """Of the next token's mean cross-entropy, for every parameter, compared through the loader's own name table."""
    model, module = random_opt(torch, tmp_path / "weights", **SHAPES[shape])
    tokens, mask = batch(model.config.vocab_size, "right")

    def loss(params: Any) -> jax.Array:
        hidden = forward(model.config, model.spec, params, jnp.asarray(tokens), jnp.asarray(mask), model.how).hidden
        logprobs = jax.nn.log_softmax(unembed(model.config, params, hidden[:, :-1], model.how))
        picked = jnp.take_along_axis(logprobs, jnp.asarray(tokens[:, 1:, None]), axis=-1)[..., 0]
        weights = jnp.asarray(mask[:, 1:], jnp.float32)
        return -(picked * weights).sum() / weights.sum()

    ours = jax.grad(loss)(model.params)
    labels = torch.tensor(np.where(mask, tokens, -100)).long()
    module(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(), labels=labels).loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.grad)
    module.save_pretrained(tmp_path / "gradients")
    theirs = load(tmp_path / "gradients").params
    errors = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, theirs)
    assert max(jax.tree.leaves(errors)) <= 1e-4
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs)) > 1e-2


@pytest.mark.as_user
def test_opt_mini_equals_torch(torch: ModuleType, shared: Path) -> None:
    from transformers import OPTForCausalLM

    folder = shared / "models" / "opt-mini"
    model = load(folder)
    module = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for padding in ("left", "right"):
        assert_same_logits(torch, model, module, padding)


@pytest.mark.slow
def test_full_size_125m_equals_torch(torch: ModuleType, tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    module = OPTForCausalLM(OPTConfig(dropout=0.0)).eval()
    module.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) > 125e6
    for padding in ("left", "right"):
        assert_same_logits(torch, model, module, padding)
