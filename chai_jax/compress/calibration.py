"""Which part of a calibration text is looked at, and in which windows."""

import numpy as np

from chai_jax.errors import InputError
from chai_jax.model.layerwise import Text
from chai_jax.plans.formats import BLOCKS


def evenly_spaced(text: Text, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of evenly spaced windows that hold about `tokens` tokens."""
    windows = len(text.tokens)
    count = min(windows, -(-tokens * windows // int(text.mask.sum())))
    rows = np.arange(count) * windows // count
    return text.tokens[rows], text.mask[rows]


def joined(text: Text, tokens: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of about `tokens` tokens of the text, its windows one after another, cut into longer windows.

    What a format stores in blocks of tokens does no damage to a text that is shorter than a block.

    Args:
        longest: the model's positions.

    Raises:
        InputError: there are not two blocks of text.
    """
    chosen, mask = evenly_spaced(text, tokens)
    line, block = chosen[mask], max(each.block for each in BLOCKS.values())
    length = min(8 * block, longest, len(line) // block * block)
    if length < 2 * block:
        raise InputError(
            f"the calibration text has {len(line)} tokens in all, the model {longest} positions; expected at least "
            f"{2 * block} of both, to measure formats of {block} tokens a block: calibrate on more text, or leave out "
            "formats of few bits"
        )
    count = len(line) // length
    windows = line[: count * length].reshape(count, length)
    return windows, np.ones(windows.shape, bool)
