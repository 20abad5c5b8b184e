"""What is scored after nothing: as the harness's Hugging Face model does it, whatever the tokenizer puts first."""

import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from chai_jax.data.batches import encode
from chai_jax.data.tokens import prefix_token
from chai_jax.errors import InputError
from chai_jax.evaluation.tasks import evaluate
from chai_jax.files.store import load
from chai_jax.score.loglikelihood import loglikelihoods

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness

SPECIAL = ("<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Family, the tokenizer's first and last token, whether it puts the first one before every text.
CASES: dict[str, tuple[str, str | None, str | None, bool]] = {
    "Qwen 2": ("qwen2", None, "<|endoftext|>", False),
    "Qwen 2, chat": ("qwen2", None, "<|im_end|>", False),
    "SmolLM2": ("llama", "<|im_start|>", "<|im_end|>", False),
    "Llama": ("llama", "<s>", "</s>", True),
    "GPT-2": ("gpt2", "<|endoftext|>", "<|endoftext|>", False),
}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "vocab_size": 264, "initializer_range": 0.3}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """The harness logs to the stderr of its first call, which pytest closes with that test."""
    yield
    logging.getLogger("lm_eval").handlers.clear()


def tokenizer(first: str | None, last: str | None, puts_first: bool) -> Any:
    """A token for every byte, after the special ones."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: at for at, token in enumerate([*SPECIAL, *alphabet])}, []))
    made.add_special_tokens([*SPECIAL])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if puts_first:
        made.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    names = {name: token for name, token in (("bos_token", first), ("eos_token", last)) if token}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest, torch: ModuleType, tmp_path: Path) -> Path:
    """A random model of the family with such a tokenizer, saved by transformers."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    family, *tokens = CASES[request.param]
    torch.manual_seed(0)
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig, "gpt2": GPT2Config}[family]
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    AutoModelForCausalLM.from_config(kind(**SIZES, **ends, **({} if family == "gpt2" else GATED))).save_pretrained(
        tmp_path / "model"
    )
    tokenizer(*tokens).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_scores_are_those_of_the_harness_s_hugging_face_model(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)
    model = load(folder, dtype="float32")
    wrapped = importlib.import_module("chai_jax.evaluation.lm_eval").LanguageModel(model)
    assert prefix_token(model.tokenizer) == wrapped.prefix_token_id == theirs.prefix_token_id
    begins = model.tokenizer.decode([theirs.prefix_token_id])
    answers = [" positive film", "film", "é", f"{begins} film", "x" * 64]
    pairs = [*(("", answer) for answer in answers), ("a film", " good"), (f"{begins}a film ", "wood")]
    asked = [SimpleNamespace(args=pair, task_name="any") for pair in pairs]
    expected = [total for total, _ in theirs.loglikelihood(asked, disable_tqdm=True)]
    found = [total for total, _ in wrapped.loglikelihood(asked, disable_tqdm=True)]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    encoded = [encode(model.tokenizer, *pair, model.config.max_positions) for pair in pairs]
    np.testing.assert_allclose(loglikelihoods(model, encoded)[:, 0], expected, atol=1e-3)
    with pytest.raises(InputError, match="a completion has 65 tokens; expected at most the model's 64 positions"):
        encode(model.tokenizer, "", "x" * 65, model.config.max_positions)
    assert len({round(total, 2) for total in expected}) == len(expected)

    rows = [{"good": answers[at], "bad": answers[at + 1], "label": at % 2} for at in (0, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "context: ''\nchoices: ['{{good}}', '{{bad}}']\ndelimiter: ''\nvalidation: rows.jsonl\n"
    (tmp_path / "own.yaml").write_text(text)
    scored = evaluate(model, str(tmp_path / "own.yaml")).loglikelihoods
    np.testing.assert_allclose(scored, np.reshape(expected[:4], (2, 2)), atol=1e-3)
