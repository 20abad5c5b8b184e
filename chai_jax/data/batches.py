"""Examples as text and as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from chai_jax.data.tokens import prefix_token, tokenize
from chai_jax.errors import InputError
from chai_jax.machine.processes import divided


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


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows as arrays, padded on the right; `mask` is True where a token is real."""

    tokens: Int32[np.ndarray, "N W"]
    mask: Bool[np.ndarray, "N W"]

    @classmethod
    def stack(cls, windows: Sequence[Sequence[int]], pad: int) -> "Windows":
        """Windows of any lengths, one row each."""
        lengths = np.asarray([len(tokens) for tokens in windows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        tokens = np.full(mask.shape, pad, np.int32)
        tokens[mask] = np.concatenate([np.asarray(window, np.int32) for window in windows])
        return cls(tokens, mask)


def encode(
    tokenizer: Any, context: str, completion: str, max_length: int | None = None, cut_completion: bool = False
) -> Encoded:
    """Tokenize as the lm-evaluation-harness does (`TemplateLM.loglikelihood`, `HFLM._loglikelihood_tokens`; 0.4.13).

    Context and completion are tokenized together. Trailing spaces of the context move to the completion, and the
    completion's tokens are those after the context's own. A context without tokens becomes `prefix_token`.

    Args:
        max_length: tokens the model takes. The last `max_length + 1` are kept, since the last token is only predicted.
            What is cut off is context.
        cut_completion: also cut the beginning of a completion that does not fit. That is good enough to train on, but
            not to score.

    Raises:
        InputError: the completion has no token of its own, or does not fit.
    """
    whole = tokenize(tokenizer, context + completion)
    # rstrip takes line breaks and tabs too: the harness says spaces and does the same.
    start = len(tokenize(tokenizer, context.rstrip()))
    if start == 0:
        first, start = prefix_token(tokenizer), 1
        whole = whole if whole[:1] == [first] else [first, *whole]
    if start >= len(whole):
        raise InputError(f"the completion {completion!r} has no tokens of its own: give a longer one")
    cut = 0 if max_length is None else max(len(whole) - max_length - 1, 0)
    if start - cut < 1 and not cut_completion:
        raise InputError(
            f"a completion has {len(whole) - start} tokens; expected at most the model's {max_length} positions: "
            f"shorten {completion[:40]!r}..."
        )
    return Encoded(tuple(whole[cut:]), max(start - cut, 1))


def encode_all(
    tokenizer: Any,
    examples: Sequence[Example],
    max_length: int | None = None,
    description: str = "Tokenizing",
    cut_completion: bool = False,
) -> list[Encoded]:
    """`encode` of many. Of several processes, each tokenizes a share and gets the other tokens from the others.

    Every process needs all lengths, since they decide which examples share a batch.

    Raises:
        InputError: as `encode`, of the first example that it refuses, in every process.
    """

    def start_and_tokens(example: Example) -> tuple[int, ...]:
        found = encode(tokenizer, example.context, example.completion, max_length, cut_completion)
        return (found.start, *found.tokens)

    return [Encoded(numbers[1:], numbers[0]) for numbers in divided(start_and_tokens, examples, description)]
