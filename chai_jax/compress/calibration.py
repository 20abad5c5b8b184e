"""Which part of a calibration text is looked at, and in which windows."""

import numpy as np

from chai_jax.data.batches import Windows
from chai_jax.errors import InputError
from chai_jax.model.layerwise import Text
from chai_jax.plans.formats import BLOCKS


def held_out(text: Text, tokens: int) -> tuple[Windows, Windows]:
    """(windows to fit to, windows to measure on); the latter hold about `tokens` tokens, and are half of all at most.

    What was fitted to the very text that it is measured on looks better than it is. Of one window both are that one.
    """
    windows = len(text.tokens)
    if windows < 2:
        return (Windows(text.tokens, text.mask),) * 2
    rows = _rows(text, tokens, windows // 2)
    others = np.setdiff1d(np.arange(windows), rows)
    fit, measure = (Windows(text.tokens[some], text.mask[some]) for some in (others, rows))
    return fit, measure


def evenly_spaced(text: Text, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of evenly spaced windows that hold about `tokens` tokens."""
    rows = _rows(text, tokens, len(text.tokens))
    return text.tokens[rows], text.mask[rows]


def _rows(text: Text, tokens: int, most: int) -> np.ndarray:
    windows = len(text.tokens)
    count = min(most, -(-tokens * windows // int(text.mask.sum())))
    return np.arange(count) * windows // count


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
