"""Conversations as prompts, by the chat template of a model's tokenizer."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from chai_jax.data.tokens import bare_tokens, require_tokenizer
from chai_jax.errors import InputError

MOST_SECONDS = 10  # that a template may take; real ones take milliseconds

Message = dict[str, str]  # with `role` and `content`


def check_template(tokenizer: Any, source: str, option: str) -> None:
    """Raise InputError where the tokenizer of the model `source` has no chat template, which `option` asks for."""
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {source} has no chat template; expected one in tokenizer_config.json or "
            f"chat_template.jinja: leave out {option}"
        )


def conversation(tokenizer: Any, messages: Sequence[Message], answer: bool = True) -> str:
    """A conversation as one prompt, by the tokenizer's template, as transformers' `apply_chat_template` renders it.

    Args:
        answer: end with what an answer begins with; or else leave the last message open, to be gone on with.

    Raises:
        InputError: the template fails, or does not end.
    """
    ways = {"add_generation_prompt": answer, "continue_final_message": not answer}
    # A template is a program, in a language without files or imports, and may fail in any way.
    try:
        with _bounded():
            return str(tokenizer.apply_chat_template([*messages], tokenize=False, **ways))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the tokenizer's chat template fails ({reason:.200}): mend it") from None


def chat_tokens(tokenizer: Any, prompt: str, system: str | None = None, source: str = "") -> list[int]:
    """The tokens of a user's message and of what begins the answer to it.

    The template alone says what comes first: the tokenizer adds no token of its own.

    Args:
        system: a message before the user's that says how to answer.
        source: what messages call the model.

    Raises:
        InputError: no tokenizer, no template, one that fails or gives nothing; text that holds what is no character.
    """
    check_template(require_tokenizer(tokenizer, source), source or "the model", "--chat")
    before = [] if system is None else [{"role": "system", "content": system}]
    tokens = bare_tokens(tokenizer, conversation(tokenizer, [*before, {"role": "user", "content": prompt}]))
    if not tokens:
        raise InputError("the tokenizer's chat template gives no text; expected the conversation: mend it")
    return tokens


@contextmanager
def _bounded() -> Iterator[None]:
    """RuntimeError in this thread at the first line of Python after `MOST_SECONDS`.

    A loop in a template may else never end. A timer's signal would be the process's, and reach its main thread alone.
    """
    end = time.monotonic() + MOST_SECONDS

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise RuntimeError(f"it takes more than {MOST_SECONDS} seconds")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
