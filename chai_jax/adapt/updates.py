"""The examples of each update: which, in what order, and as padded arrays.

The order follows from the seed and the examples alone, never from the devices. Within a window of updates, examples of
like length share an update, so that little of a batch is padding (64 % of SST-2's tokens are real, 36 % without);
lengths are padded to powers of two, so that a stage compiles a handful of programs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from chai_jax.config import TrainConfig
from chai_jax.data.batches import Encoded, Example, encode_all
from chai_jax.data.tokens import require_tokenizer
from chai_jax.errors import InputError

SHORTEST_EXAMPLE = 16  # the smallest padded length
SHORT_ANSWER = 8  # answers up to here are padded to one width; longer ones to the input's, lest programs multiply
WINDOW = 32  # updates whose examples are sorted by length together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Token rows, padded on the right, and what is to be predicted where; of an update, with microbatches first."""

    tokens: Any  # int32 [B, T]
    mask: Any  # bool [B, T], True where a token is real
    positions: Any  # int32 [B, P], columns whose hidden state predicts a target
    targets: Any  # int32 [B, P], the token that should follow there
    weights: Any  # float32 [B, P], 1 for a target, 0 for padding; an empty row has none
    teacher: Any = None  # float [B, P, V], a teacher's log-probabilities there, where they were cached


def encode_examples(
    tokenizer: Any, examples: Sequence[Example | Encoded], config: TrainConfig, longest: int
) -> list[Encoded]:
    """The examples a stage will use, as tokens; a text, or an answer, of more than `longest` inputs keeps its end.

    Raises:
        InputError: no examples, text for a model without a tokenizer, or too many tokens in an encoded example.
    """
    if not len(examples):
        raise InputError("there are no training examples; expected at least one: check the data or the limits")
    limits = [len(examples), config.max_examples, config.max_steps and config.max_steps * config.batch]
    chosen = np.random.default_rng(config.seed).permutation(len(examples))[: min(limit for limit in limits if limit)]

    wanted = [examples[index] for index in chosen.tolist()]
    for example in wanted:
        if isinstance(example, Encoded) and not 1 <= example.start < len(example.tokens) <= longest + 1:
            raise InputError(
                f"an example has {len(example.tokens)} tokens, its answer from token {example.start}; expected a "
                f"context, an answer and at most {longest + 1} tokens: shorten it"
            )
    texts = [example for example in wanted if isinstance(example, Example)]
    if texts:
        require_tokenizer(tokenizer)
    encoded = iter(encode_all(tokenizer, texts, longest, cut_completion=True))
    return [example if isinstance(example, Encoded) else next(encoded) for example in wanted]


def updates(lengths: Sequence[int], config: TrainConfig) -> list[np.ndarray]:
    """The example numbers of every update of a stage, in order; each epoch uses every example once.

    An epoch is a new shuffle, cut into windows of 32 updates; a window is sorted by length and cut into updates, and
    these are shuffled again.
    """
    rng = np.random.default_rng((config.seed, 1))
    order: list[np.ndarray] = []
    for _ in range(config.epochs):
        shuffled = rng.permutation(len(lengths))
        for begin in range(0, len(lengths), WINDOW * config.batch):
            window = shuffled[begin : begin + WINDOW * config.batch]
            window = window[np.argsort(np.asarray(lengths)[window], kind="stable")]
            cuts = [window[at : at + config.batch] for at in range(0, len(window), config.batch)]
            order += [cuts[at] for at in rng.permutation(len(cuts))]
    return order[: config.max_steps]


def padded(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << (size - 1).bit_length()


def pack_update(
    encoded: Sequence[Encoded], shape: tuple[int, int], longest: int, widest: int, share: Sequence[int] | None = None
) -> Batch:
    """One update as a batch; rows without an example are empty.

    Args:
        shape: microbatches, and rows of each.
        longest: the most tokens the model takes.
        widest: the most targets of any example of the stage.
        share: which rows of every microbatch to pack (where several processes share the work); all, if not given.
    """
    count, rows = shape
    share = range(rows) if share is None else share
    length = min(max(SHORTEST_EXAMPLE, padded(max(len(example.tokens) - 1 for example in encoded))), longest)
    width = padded(widest if widest <= SHORT_ANSWER else length)
    fed, asked = (count, len(share), length), (count, len(share), width)
    batch = Batch(*map(np.zeros, (fed, fed, asked, asked, asked), (np.int32, bool, np.int32, np.int32, np.float32)))
    column_of = {row: column for column, row in enumerate(share)}
    for number, example in enumerate(encoded):
        microbatch, row = divmod(number, rows)
        if row in column_of:
            at, inputs, answer = (microbatch, column_of[row]), example.tokens[:-1], example.tokens[example.start :]
            batch.tokens[at][: len(inputs)], batch.mask[at][: len(inputs)] = inputs, True
            batch.positions[at][: len(answer)] = np.arange(example.start - 1, len(inputs))
            batch.targets[at][: len(answer)], batch.weights[at][: len(answer)] = answer, 1
    return batch


def microbatches(config: TrainConfig, devices: int) -> tuple[int, int]:
    """(microbatches of an update, rows of a microbatch): rows is a multiple of the devices they are split over."""
    rows = -(-config.batch // config.accumulation)
    rows = -(-rows // devices) * devices
    return -(-config.batch // rows), rows
