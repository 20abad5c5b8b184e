"""Are two models the same function? Largest logit difference, divergence of the next-token distributions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.score.divergence import kl_divergence

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Paris is the capital of France, and Berlin is the capital of Germany.",
    "a gorgeous , witty , seductive movie .",
    "Computers and mobile phones have taken over the world.",
)


def verify(first: Model, second: Model, texts: tuple[str, ...] = TEXTS) -> dict[str, Any]:
    """Compare two models on the same texts (on random tokens where `first` has no tokenizer), float32 logits.

    Returns:
        `max_logit_difference`, `mean_kl` (nats, KL(first || second) per token), `max_kl`, `same_top_token` (fraction),
        `n` (tokens compared).

    Raises:
        InputError: the vocabularies differ in size.
    """
    if first.config.vocab_size != second.config.vocab_size:
        sizes = first.config.vocab_size, second.config.vocab_size
        raise InputError(
            f"the models have {sizes[0]} and {sizes[1]} tokens; expected one vocabulary: compare other models"
        )
    longest = min(first.config.max_positions, second.config.max_positions)
    if first.tokenizer is None:
        rows = np.random.default_rng(0).integers(4, first.config.vocab_size, (4, min(32, longest))).tolist()
    else:
        rows = [ids[:longest] for ids in first.tokenizer(list(texts))["input_ids"]]
    length = max(map(len, rows))
    tokens = np.full((len(rows), length), first.config.pad_token_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for at, row in enumerate(rows):
        tokens[at, : len(row)], mask[at, : len(row)] = row, True
    a, b = first(tokens, mask)[mask], second(tokens, mask)[mask]
    kl = kl_divergence(jax.nn.log_softmax(a), jax.nn.log_softmax(b))
    return {
        "max_logit_difference": float(jnp.abs(a - b).max()),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "same_top_token": int((a.argmax(-1) == b.argmax(-1)).sum()) / len(a),
        "n": int(mask.sum()),
    }
