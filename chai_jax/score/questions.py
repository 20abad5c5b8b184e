"""Examples to be scored, packed into few static shapes: what they have in common goes through the model once.

Examples of one context share a row: what their inputs begin with together comes first, then each further input's own
tokens, a branch apiece, which reads the beginning and itself alone. Inputs that are equal (answers of one token) have
no branches at all.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError

TOKENS = 1536  # of a batch on a CPU: as many as its kernel packs at once; XLA takes as long with 1,024
PAIRS = 2**21  # B T^2 of one device's batch at most: 8 MB of float32 scores a head
SHORTEST = 16  # the smallest padded length
MEMBERS = 64  # examples of a row at most: every row has room for as many alternatives as the largest
NONE = -1  # as a target, of an alternative that expects nothing behind a position


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Questions:
    """A batch of inputs with the tokens that should follow, according to each of A alternatives.

    Row b feeds `tokens[b, :length[b]]`; a row of length 0 is padding. Behind its column `first[b]` + p alternative a
    expects `targets[b, p, a]`, or nothing (`NONE`). P is 1 where every row has one such column, else T.
    """

    tokens: Any  # int32 [B, T]
    length: Any  # int32 [B]
    first: Any  # int32 [B]
    targets: Any  # int32 [B, P, A]
    branch: Any = None  # int32 [B, T]: 0 what all branches read; None where there are no branches

    @property
    def mask(self) -> Bool[Array, "B T"]:
        """True where a token is real."""
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32) < self.length[:, None]

    @property
    def columns(self) -> Int32[Array, "B P"]:
        """Columns that something is expected behind, and then any."""
        places = self.first[:, None] + jnp.arange(self.targets.shape[1], dtype=jnp.int32)
        return jnp.minimum(places, self.tokens.shape[1] - 1)


@dataclass(frozen=True)
class Tree:
    """One row: the examples of one context, what their inputs begin with together, and how each branch goes on."""

    shared: tuple[int, ...]
    start: int  # tokens of the context: the first that is a target
    branches: tuple[tuple[int, ...], ...]
    alternatives: tuple[tuple[int, int], ...]  # of each example: its branch's number, and its last token
    members: tuple[int, ...]  # the examples' numbers

    @property
    def width(self) -> int:
        """Tokens of the row."""
        return len(self.shared) + sum(map(len, self.branches))

    @property
    def positions(self) -> int:
        """How many of its columns something is expected behind."""
        return self.width - self.start + 1


def plant(encoded: Sequence[Encoded], members: Sequence[int]) -> Tree:
    """The tree of examples that have one context."""
    inputs = [tuple(encoded[index].tokens[:-1]) for index in members]
    together = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*inputs, strict=False)))
    ways = dict.fromkeys(tokens[together:] for tokens in inputs)
    number = {own: index for index, own in enumerate(ways)}
    last = [int(encoded[index].tokens[-1]) for index in members]
    return Tree(
        shared=inputs[0][:together],
        start=encoded[members[0]].start,
        branches=tuple(ways),
        alternatives=tuple((number[tokens[together:]], token) for tokens, token in zip(inputs, last, strict=True)),
        members=tuple(members),
    )


def trees(encoded: Sequence[Encoded], longest: int, width: int | None) -> list[Tree]:
    """The rows that hold all examples, longest first, so that memory runs out at once or never.

    Args:
        longest: tokens of a row at most.
        width: the model's, D. Examples of one context share a row where that costs less than a row for each input;
            without it only inputs that are equal do.

    Raises:
        InputError: an example without context, without target, or of more than `longest` + 1 tokens.
    """
    of_input: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    for index, example in enumerate(encoded):
        if not 1 <= example.start < len(example.tokens) <= longest + 1:
            raise InputError(
                f"example {index} has {len(example.tokens)} tokens, its answer from token {example.start}; expected a "
                f"context, an answer, and at most {longest + 1} tokens: shorten it or mend its prompt"
            )
        of_input[tuple(example.tokens[:-1]), example.start].append(index)
    if width is None:
        found = [plant(encoded, some) for same in of_input.values() for some in _few(same)]
    else:
        of_context: dict[tuple[tuple[int, ...], int], list[list[int]]] = defaultdict(list)
        for (tokens, start), same in of_input.items():
            of_context[tokens[:start], start] += _few(same)
        found = [tree for groups in of_context.values() for tree in _thrifty(encoded, groups, longest, width)]
    return sorted(found, key=lambda tree: -tree.width)


def _few(members: list[int]) -> list[list[int]]:
    """At most `MEMBERS` at a time."""
    return [members[at : at + MEMBERS] for at in range(0, len(members), MEMBERS)]


def _thrifty(encoded: Sequence[Encoded], groups: list[list[int]], longest: int, width: int) -> list[Tree]:
    """One row for the inputs of a context, or one for each."""

    def price(tree: Tree) -> int:
        # A layer's FLOPs, 24 T D^2 + 4 T^2 D, without their common factor.
        return tree.width * (6 * width + tree.width)

    apart = [plant(encoded, same) for same in groups]
    if len(apart) == 1 or sum(map(len, groups)) > MEMBERS:
        return apart
    together = plant(encoded, [index for same in groups for index in same])
    return [together] if together.width <= longest and price(together) < sum(map(price, apart)) else apart


def padded_length(length: int, longest: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`, `longest` at most."""
    power = 1 << (length - 1).bit_length()
    between = power * 3 // 4
    return min(max(SHORTEST, between if length <= between else power), longest)


def most_rows(length: int) -> int:
    """How many rows of a padded length a device should be given at once."""
    most = PAIRS // length**2
    return max(1, min(most, TOKENS // length) if jax.default_backend() == "cpu" else most)


def batches(rows: Sequence[Tree], batch_size: int, longest: int, ways: int) -> list[tuple[Sequence[Tree], int, int]]:
    """Cut sorted rows into (rows, their number padded, padded length); the first sets the length, so shapes are few."""
    cut = []
    batch_size = min(batch_size, -(-len(rows) // ways))
    while rows:
        length = padded_length(rows[0].width, longest)
        count = ways * min(batch_size, most_rows(length))
        cut.append((rows[:count], count, length))
        rows = rows[count:]
    return cut


def pack(rows: Sequence[Tree], count: int, length: int, alternatives: int) -> Questions:
    """Rows padded on the right to [count, length], with room for `alternatives`; missing rows have length 0."""
    tokens, branch = np.zeros((2, count, length), np.int32)
    lengths, first = np.zeros((2, count), np.int32)
    positions = 1 if all(tree.positions == 1 for tree in rows) else length
    targets = np.full((count, positions, alternatives), NONE, np.int32)
    for row, tree in enumerate(rows):
        own = [token for way in tree.branches for token in way]
        tokens[row, : tree.width] = [*tree.shared, *own]
        lengths[row], first[row] = tree.width, tree.start - 1
        branch[row, len(tree.shared) : tree.width] = np.repeat(
            np.arange(len(tree.branches)) + 1, [len(way) for way in tree.branches]
        )
        _expect(tree, targets[row])
    branching = any(len(tree.branches) > 1 for tree in rows)
    return Questions(tokens, lengths, first, targets, branch if branching else None)


def _expect(tree: Tree, targets: Int[np.ndarray, "P A"]) -> None:
    """Write down what each alternative expects behind the tree's columns, counted from `start` - 1."""
    trunk = len(tree.shared) - tree.start + 1  # columns of the common beginning, its last one included
    begins = trunk + np.cumsum([0, *map(len, tree.branches)])
    for slot, (way, last) in enumerate(tree.alternatives):
        follows = [*tree.shared[tree.start :], *tree.branches[way], last]
        targets[:trunk, slot] = follows[:trunk]
        targets[begins[way] : begins[way + 1], slot] = follows[trunk:]
