"""Every family computes what transformers' model of it computes in torch: logits, gradients, texts, exports."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.files.convert import flatten, tensor_table
from chai_jax.files.export import export
from chai_jax.files.families.registry import family_of
from chai_jax.files.store import load, save
from chai_jax.model.decoder import forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.serve.generate import generate_tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2 = {
    "vocab_size": 67,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TWO = {"num_key_value_heads": 2}
# What a run of the tests tries of each family; the rest, of its options, is for `-m slow`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**TWO, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**TWO, "sliding_window": 5}),
    "qwen2": ("Qwen2", TWO),
    "qwen3": ("Qwen3", {**TWO, "head_dim": 16}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "phi3": ("Phi3", {**TWO, "sliding_window": 6, "pad_token_id": 0, "eos_token_id": 1}),
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, a key for every query": ("Llama", {"num_key_value_heads": 4}),
    "llama, one key, biases, narrow heads": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "llama3 scaling": ("Llama", {**TWO, "rope_theta": 5000.0, "rope_scaling": LLAMA3}),
    "linear scaling": ("Llama", {**TWO, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "dynamic scaling": ("Llama", {**TWO, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "yarn": ("Llama", {**TWO, "rope_scaling": YARN}),
    "yarn, its numbers given": (
        "Llama",
        {**TWO, "rope_scaling": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.2, "mscale_all_dim": 0.7}},
    ),
    "yarn, its size given": ("Llama", {**TWO, "rope_scaling": {**YARN, "attention_factor": 1.5, "truncate": False}}),
    "mistral, no window": ("Mistral", {**TWO, "sliding_window": None}),
    "qwen2, windows from a layer on": (
        "Qwen2",
        {**TWO, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3, biases": ("Qwen3", {**TWO, "head_dim": 16, "attention_bias": True}),
    "gpt2, its own feed-forward, untied": ("GPT2", {**GPT2, "n_inner": 40, "tie_word_embeddings": False}),
    "gpt_neox, one after the other, all turns": ("GPTNeoX", {"rotary_pct": 1.0, "use_parallel_residual": False}),
    "gpt_neox, yarn": ("GPTNeoX", {"rotary_pct": 0.5, "rope_scaling": YARN}),
    "gpt_neox, no biases": ("GPTNeoX", {"rotary_pct": 0.5, "attention_bias": False}),
}


def torch_model(name: str, options: dict[str, Any]) -> Any:
    """A random model, all of whose parameters matter: norms and biases too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    # A copy: transformers writes into the dicts that it is given.
    fields = deepcopy(options if name == "GPT2" else {**SIZES, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{name}Config")(**fields, attn_implementation="eager")
        model = getattr(transformers, kind)(config).eval()
    random = torch.Generator().manual_seed(1)
    for label, leaf in model.named_parameters():
        norm = ("norm" in label or "ln_" in label) and label.endswith("weight")
        noise = torch.randn(leaf.shape, generator=random) * (0.3 if leaf.ndim > 1 else 0.2)
        leaf.data.copy_(noise + 1 if norm else noise)
    return model


def logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """torch's, with positions counted over the mask."""
    torch = pytest.importorskip("torch")
    positions = torch.tensor(np.maximum(mask.cumsum(axis=1) - 1, 0))
    with torch.no_grad():
        found = model(torch.tensor(tokens.astype(np.int64)), attention_mask=torch.tensor(mask), position_ids=positions)
    return found.logits.numpy()


def cases(*quick: str) -> Any:
    """Every family with all options, of which those in `quick` are tried by every run of the tests."""
    params = [
        pytest.param(*case, id=name, marks=[] if name in quick else pytest.mark.slow)
        for name, case in {**CASES, **OPTIONS}.items()
    ]
    return pytest.mark.parametrize(("name", "options"), params)


TOKENS = np.random.default_rng(0).integers(3, 60, (3, 20)).astype(np.int32)
LEFT = np.arange(20) >= np.array([[0], [7], [0]])
RIGHT = np.arange(20) < np.array([[20], [13], [20]])


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """Models that tests of this file share."""
    return {}


def both(made: dict[str, Any], folder: Path, name: str, options: dict[str, Any]) -> tuple[Any, Model]:
    """torch's model and ours of what it saves."""
    key = f"{name} {options}"
    if key not in made:
        torchs = torch_model(name, options)
        torchs.save_pretrained(folder / "theirs")
        made[key] = torchs, load(folder / "theirs", tokenizer=False, execution=Execution.choose("float32"))
    found: tuple[Any, Model] = made[key]
    return found


@cases(*CASES)
def test_logits_and_an_exported_folder(
    made: dict[str, Any], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    torchs, ours = both(made, tmp_path, name, options)
    for mask in (LEFT, RIGHT):
        wanted, found = logits(torchs, TOKENS, mask), np.asarray(ours(TOKENS, mask))
        assert np.abs(wanted).max() > 3
        np.testing.assert_allclose(found[mask], wanted[mask], atol=1e-4)
    export(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = type(torchs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_array_equal(logits(again, TOKENS, LEFT)[LEFT], logits(torchs, TOKENS, LEFT)[LEFT])
    save(ours, tmp_path / "saved")
    back = load(tmp_path / "saved", tokenizer=False)
    assert (back.config, back.spec) == (ours.config, ours.spec)


@cases("llama")
def test_texts(made: dict[str, Any], tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Fifty greedy tokens with the cache, of prompts of several lengths in one batch."""
    torch = pytest.importorskip("torch")
    torchs, ours = both(made, tmp_path, name, options)
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :9].tolist(), TOKENS[2, :3].tolist()]
    found = generate_tokens(ours, prompts, max_new_tokens=50, stop=False)
    rule = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            wanted = torchs.generate(torch.tensor([prompt]), **rule)[0, len(prompt) :].tolist()
        assert tokens == wanted


@cases("qwen3", "gpt_neox")
def test_gradients(made: dict[str, Any], tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Of a loss over all real tokens, with respect to every parameter."""
    torch = pytest.importorskip("torch")
    torchs, ours = both(made, tmp_path, name, options)
    weights = np.random.default_rng(1).standard_normal((3, 20, 67)).astype(np.float32) * LEFT[..., None] / 100

    def loss(params: Any) -> Any:
        how = ours.how
        hidden = forward(ours.config, ours.spec, params, jnp.asarray(TOKENS), jnp.asarray(LEFT), how).hidden
        return (unembed(ours.config, params, hidden, how) * weights).sum()

    found = dict(flatten(jax.jit(jax.grad(loss))(ours.params))[0])
    positions = torch.tensor(np.maximum(LEFT.cumsum(axis=1) - 1, 0))
    out = torchs(torch.tensor(TOKENS.astype(np.int64)), attention_mask=torch.tensor(LEFT), position_ids=positions)
    torchs.zero_grad()
    (out.logits * torch.tensor(weights)).sum().backward()
    theirs, family = dict(torchs.named_parameters()), family_of(ours.config)
    theirs.setdefault("embed_out.weight", theirs.get("lm_head.weight"))  # GPT-NeoX's name in files
    for entry in tensor_table(ours.config):
        wanted = theirs[family.full_name(entry.name)].grad.numpy()
        assert np.abs(wanted).max() > 1e-3
        mine = entry.to_theirs([np.asarray(found[part.path]) for part in entry.parts])
        np.testing.assert_allclose(mine, wanted, atol=1e-4, rtol=1e-4, err_msg=entry.name)
