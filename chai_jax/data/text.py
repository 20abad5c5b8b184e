"""Plain text as windows of tokens: for calibration, for training, and for perplexity over a whole file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chai_jax.data.batches import Encoded
from chai_jax.data.tokens import bare_tokens, opening
from chai_jax.errors import InputError
from chai_jax.inputs.reading import open_utf8, shown


def read_text_file(path: str | Path) -> str:
    """The text of a UTF-8 file, gzipped or not.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or holds nothing.
    """
    with open_utf8(Path(path)) as file:
        text = file.read()
    if not text.strip():
        raise InputError(f"{shown(path)} holds no text; expected some: give another file")
    return text


def pages(text: str) -> list[str]:
    """WikiText's articles, each from its title (` = Title = `) to the next.

    They are the documents of the lm-evaluation-harness's task wikitext (EleutherAI/wikitext_document_level, whose
    loading script cuts WikiText's raw files at the same lines): 62 for the test split of WikiText-2.
    """
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        # Deeper headings (` = = Heading = = `) begin no article.
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            found.append([])
        found[-1].append(line)
    return [page for page in map("\n".join, found) if page.strip()]


def windows(tokenizer: Any, text: str, length: int) -> list[Encoded]:
    """The whole text as windows of `length` tokens: a first one, and up to `length - 1` that are predicted.

    The first token of a window is what the tokenizer puts before every text (OPT's: `</s>`). Some tokenizers put
    nothing: then it is the token before the window, and the text's first token is not predicted. Every other token is
    predicted exactly once. The last window may be short.

    Raises:
        InputError: the text holds what is no character.
    """
    first, ids = opening(tokenizer), bare_tokens(tokenizer, text)
    if ids[: len(first)] == first:  # the text brings its own
        ids = ids[len(first) :]
    step = length - 1
    starts = range(1 - len(first), len(ids), step)
    return [Encoded((*(first or ids[at - 1 : at]), *ids[at : at + step]), 1) for at in starts]


@dataclass(frozen=True)
class Corpus:
    """Disjoint, contiguous parts of a text: what is looked at, trained on, and measured."""

    calibration: list[Encoded]
    training: list[Encoded]
    evaluation: list[Encoded]


def split_corpus(tokenizer: Any, text: str, length: int, calibration: int) -> Corpus:
    """Cut a text into windows: the first tenth calibrates, the last tenth measures, the rest trains.

    No token is predicted in two parts, but a text that repeats itself repeats itself across them.

    Args:
        length: tokens of a window, its first included.
        calibration: the most windows to calibrate with; the rest of the first tenth is not used.

    Raises:
        InputError: the text is too short for three parts.
    """
    every = windows(tokenizer, text, length)
    if len(every) < 10:
        raise InputError(
            f"the text makes {len(every)} windows of {length} tokens; expected at least 10: give a longer text"
        )
    tenth = len(every) // 10
    return Corpus(every[: min(calibration, tenth)], every[tenth:-tenth], every[-tenth:])
