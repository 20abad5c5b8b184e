"""From text to the tokens that a model reads. Which token comes first is decided here, by the tokenizer."""

from typing import Any

from chai_jax.errors import InputError


def require_tokenizer(tokenizer: Any, model: str = "") -> Any:
    """The tokenizer itself, of the model that messages call `model`.

    Raises:
        InputError: it is None; text needs one.
    """
    if tokenizer is None:
        raise InputError(
            f"{model or 'the model'} has no tokenizer, which text needs; expected tokenizer.json, or vocab.json and "
            "merges.txt, in its folder: add them, or give token ids"
        )
    return tokenizer


def prefix_token(tokenizer: Any) -> int:
    """The token from which a text's first token is predicted: beginning of text or, without one, end of text.

    As the lm-evaluation-harness's `HFLM.prefix_token_id`.

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
    """Token ids of a text, after what its tokenizer puts before every text (OPT's: `</s>`; others: nothing).

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
