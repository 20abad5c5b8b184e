"""Loading a folder's tokenizer with transformers, from local files only and without code from the folder."""

from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.errors import InputError
from chai_jax.plans.architecture import Architecture

WHOLE = "tokenizer.json"
PARTS = ("vocab.json", "merges.txt")


def load_tokenizer(folder: Path, config: Architecture) -> Any:
    """The tokenizer of a model folder, or None where the folder has no tokenizer files at all.

    A tokenizer may have more tokens than the model: it then refuses texts with a token that the model lacks. One that
    names no beginning and no end of text (Galactica's) gets the model's beginning of text. It still puts nothing before
    a text, but a text can then be generated from an empty prompt.

    Raises:
        InputError: some of the files are missing or cannot be read.
    """
    there = [name for name in (WHOLE, *PARTS) if (folder / name).is_file()]
    if not there:
        return None
    if WHOLE not in there and len(there) < len(PARTS):
        raise InputError(f"{folder} has {there[0]} alone of the tokenizer; expected {' and '.join(PARTS)}, or {WHOLE}")
    # Importing transformers takes seconds, so only where it is used.
    from transformers import AutoConfig, AutoTokenizer

    try:
        # With a configuration given, the folder's own is not read: "chai_opt" means nothing to transformers.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder),
            config=AutoConfig.for_model(config.family),
            local_files_only=True,
            trust_remote_code=False,
        )
    # transformers and tokenizers raise all kinds, bare Exception among them.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the tokenizer in {folder} cannot be read ({reason:.200}): restore its files") from None
    return fitted(tokenizer, config)


def fitted(tokenizer: Any, config: Architecture) -> Any:
    """A tokenizer as `load_tokenizer` describes it, for a model of this vocabulary and beginning of text."""
    if tokenizer.bos_token is None and tokenizer.eos_token is None and config.bos_token_id is not None:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(config.bos_token_id)
    if max(tokenizer.get_vocab().values(), default=0) >= config.vocab_size:
        _refuse_from(tokenizer, config.vocab_size)
    return tokenizer


def _refuse_from(tokenizer: Any, vocab_size: int) -> None:
    """Make a tokenizer refuse a text that holds a token from `vocab_size` on.

    All text becomes tokens here. For a token beyond its table, a model would silently take the table's last row.
    """
    kind = type(tokenizer)

    class Bounded(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **options: Any) -> Any:
            found = super().__call__(*args, **options)
            ids = found.get("input_ids", [])
            rows = ids if len(ids) and isinstance(ids[0], list) else [ids]
            largest = max((int(np.max(row)) for row in rows if len(row)), default=0)
            if largest >= vocab_size:
                raise InputError(
                    f"a text holds {self.convert_ids_to_tokens(largest)!r:.80}, token {largest} of the tokenizer; the "
                    f"model has {vocab_size}: leave it out, or use a tokenizer of the model"
                )
            return found

    Bounded.__name__ = kind.__name__  # which is saved
    tokenizer.__class__ = Bounded
