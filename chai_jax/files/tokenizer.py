"""Loading a folder's tokenizer with transformers, from local files only and without code from the folder."""

from pathlib import Path
from typing import Any

from chai_jax.errors import InputError
from chai_jax.model.params import OPTConfig

WHOLE = "tokenizer.json"
PARTS = ("vocab.json", "merges.txt")


def load_tokenizer(folder: Path, config: OPTConfig) -> Any:
    """The tokenizer of a model folder, or None where the folder has no tokenizer files at all.

    One that names neither a beginning nor an end of text (Galactica's) is told the model's own beginning: it puts no
    more before a text than it did, but an empty text can be gone on with.

    Raises:
        InputError: some of the files are missing or cannot be read; it has more tokens than the model.
    """
    there = [name for name in (WHOLE, *PARTS) if (folder / name).is_file()]
    if not there:
        return None
    if WHOLE not in there and len(there) < len(PARTS):
        raise InputError(f"{folder} has {there[0]} alone of the tokenizer; expected {' and '.join(PARTS)}, or {WHOLE}")
    # Importing transformers takes seconds, so only where it is used.
    from transformers import AutoTokenizer
    from transformers import OPTConfig as HFConfig

    try:
        # With a configuration given, the folder's own is not read: "chai_opt" means nothing to transformers.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=HFConfig(), local_files_only=True, trust_remote_code=False
        )
    # transformers and tokenizers raise all kinds, bare Exception among them.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the tokenizer in {folder} cannot be read ({reason:.200}): restore its files") from None
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {config.vocab_size}; expected no more "
            "than the model: restore the tokenizer's files"
        )
    if tokenizer.bos_token is None and tokenizer.eos_token is None and config.bos_token_id is not None:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(config.bos_token_id)
    return tokenizer
