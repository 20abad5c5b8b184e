"""A small byte-level BPE tokenizer made as OPT's is: words start with their space, `</s>` (2) comes first."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "a gorgeous , witty film . \nQuestion: Is this sentence positive or negative?\nAnswer: negative positive film film"
)


@pytest.fixture(scope="session")
def bpe() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    # 16 positions, so that a longer text would be warned of, and warnings are errors.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", model_max_length=16
    )


@pytest.fixture(scope="session")
def bare(bpe: Any) -> Any:
    """The same without special tokens, as Galactica's: nothing comes first."""
    tokenizer = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    tokenizer.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16)
