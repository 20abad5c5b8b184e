"""Plain text as windows of tokens: for calibration, for training, and for perplexity over a whole file."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, gzipped or not.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or holds nothing.
    """
    path = Path(path)
    try:
        opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
        with opened as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}); expected a UTF-8 text file: check the path") from None
    if not text.strip():
        raise InputError(f"{path} holds no text; expected some: give another file")
    return text


def windows(tokenizer: Any, text: str, length: int) -> list[Encoded]:
    """The whole text as non-overlapping windows of `length` tokens, each `</s>` plus up to `length - 1` of the text.

    Every token of the text is predicted exactly once; the last window may be short.
    """
    # verbose=False: a text longer than the model is what this function is for.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = length - 1
    return [Encoded((tokenizer.bos_token_id, *ids[at : at + step]), 1) for at in range(0, len(ids), step)]


@dataclass(frozen=True)
class Corpus:
    """Disjoint, contiguous parts of a text: what is looked at, trained on, and measured."""

    calibration: list[Encoded]
    training: list[Encoded]
    evaluation: list[Encoded]


def split_corpus(tokenizer: Any, text: str, length: int, calibration: int) -> Corpus:
    """The first tenth of the windows (at most `calibration`) to calibrate, the last tenth to measure, the rest to train.

    Raises:
        InputError: the text is too short for three parts.
    """
    every = windows(tokenizer, text, length)
    if len(every) < 10:
        raise InputError(
            f"the text makes {len(every)} windows of {length} tokens; expected at least 10: give a longer text"
        )
    tenth = len(every) // 10
    looked_at = min(calibration, tenth)
    return Corpus(every[:looked_at], every[tenth:-tenth], every[-tenth:])
