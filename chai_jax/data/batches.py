"""Examples as tokens (first version by the lead so that others can run; helper "data" owns and extends this file)."""

from dataclasses import dataclass
from typing import Any

from chai_jax.errors import InputError


@dataclass(frozen=True)
class Example:
    """A context and the completion that should follow; only the completion's tokens are scored or trained on."""

    context: str
    completion: str


@dataclass(frozen=True)
class Encoded:
    """Tokens of context and completion; the completion starts at `start` (at least 1)."""

    tokens: tuple[int, ...]
    start: int


def encode(tokenizer: Any, context: str, completion: str, max_length: int | None = None) -> Encoded:
    """Tokenize as the lm-evaluation-harness does (`TemplateLM._encode_pair`, `HFLM._loglikelihood_tokens`).

    Trailing spaces of the context move to the completion; `max_length` keeps the last `max_length + 1` tokens.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, completion = context[:-spaces], context[-spaces:] + completion
    whole = tokenizer(context + completion)["input_ids"]
    start = len(tokenizer(context)["input_ids"]) if context else 1
    if start >= len(whole):
        raise InputError(f"the completion {completion!r} has no tokens of its own: give a longer one")
    if max_length is not None and len(whole) > max_length + 1:
        cut = len(whole) - max_length - 1
        whole, start = whole[cut:], max(start - cut, 1)
    return Encoded(tuple(whole), start)
