"""From text to the tokens that a model reads. What stands first is the tokenizer's own: this file alone decides it."""

from typing import Any

from chai_jax.errors import InputError


def prefix_token(tokenizer: Any) -> int:
    """What a text is predicted from where nothing else stands before it: beginning of text or, without one, its end.

    The same as of the lm-evaluation-harness's `HFLM.prefix_token_id`.

    Raises:
        InputError: the tokenizer names neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError(
        "the tokenizer names no beginning-of-text token and no end-of-text token; expected one, since nothing is "
        "predicted from nothing: name one in tokenizer_config.json, or begin with a text"
    )


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as its tokenizer begins it: OPT's with `</s>`, others with nothing.

    A text that brings its own first token does not get a second one, as in the harness (`HFLM.tok_encode`).

    Raises:
        InputError: the text holds what is no character.
    """
    begins = tokenizer.bos_token or tokenizer.eos_token
    return bare_tokens(tokenizer, text, special=not (begins and text.startswith(begins)))


def bare_tokens(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Token ids of a text alone or, with `special`, with what the tokenizer puts around every text.

    Raises:
        InputError: the text holds what is no character.
    """
    check_characters(text, "a text")
    # verbose=False: that a text is longer than the model is no news here.
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: one token, or nothing."""
    return [token for token in bare_tokens(tokenizer, "", special=True)[:1] if token == tokenizer.bos_token_id]


def check_characters(text: str, what: str) -> None:
    """Raise InputError where `text`, called `what` in the message, holds what no UTF-8 text holds: half a surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds {text[error.start]!r} at character {error.start}, which is no character (half of a pair, or "
            "a byte that is not UTF-8); expected Unicode text: mend it"
        ) from None
