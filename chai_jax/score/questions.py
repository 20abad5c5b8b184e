"""Examples to be scored, packed into batches of few static shapes. What they have in common is computed once.

Examples of one context share a row. The row begins with the tokens that all of their inputs begin with. Then come the
other tokens of each input, one branch after another. A branch reads the common beginning and itself alone. Inputs that
are equal (those of answers of one token) need no branches.
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

CPU_TOKENS = 1536  # of a batch on a CPU, at most: larger ones leave its caches; XLA was as fast with 1,024
PAIRS = 2**21  # B T^2 of one device's batch, at most: 8 MB of float32 scores a head
SHORTEST_ROW = 16  # the smallest padded length
MEMBERS = 64  # examples of a row, at most: every row has room for as many alternatives as the largest row has
NONE = -1  # the target where an alternative expects nothing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Questions:
    """A batch of inputs, and the tokens that should follow by each of A alternatives.

    Row b has `length[b]` tokens; a row of length 0 is padding. Alternative a of row b expects the token
    `targets[b, p, a]` after column `first[b]` + p, or nothing (`NONE`). P is 1 where no row expects tokens after more
    than one column, else T.
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
        """The P columns of each row from `first` on; where a row ends before, its last column again."""
        places = self.first[:, None] + jnp.arange(self.targets.shape[1], dtype=jnp.int32)
        return jnp.minimum(places, self.tokens.shape[1] - 1)


@dataclass(frozen=True)
class Tree:
    """One row: the examples of one context.

    Attributes:
        shared: the tokens that all of their inputs begin with.
        start: tokens of the context; the first target is behind them.
        branches: how each different input goes on.
        alternatives: of each example, the number of its branch, and its last token.
        members: the examples' numbers.
    """

    shared: tuple[int, ...]
    start: int
    branches: tuple[tuple[int, ...], ...]
    alternatives: tuple[tuple[int, int], ...]
    members: tuple[int, ...]

    @property
    def width(self) -> int:
        """Tokens of the row."""
        return len(self.shared) + sum(map(len, self.branches))

    @property
    def positions(self) -> int:
        """How many columns have targets."""
        return self.width - self.start + 1


def row_of(encoded: Sequence[Encoded], members: Sequence[int]) -> Tree:
    """The row of examples that have one context."""
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
        longest: tokens of a row, at most.
        width: the model's, D. Examples of one context share a row where that is cheaper than a row for each input.
            None: only equal inputs share a row.

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
        found = [row_of(encoded, some) for same in of_input.values() for some in _in_rows(same)]
    else:
        of_context: dict[tuple[tuple[int, ...], int], list[list[int]]] = defaultdict(list)
        for (tokens, start), same in of_input.items():
            of_context[tokens[:start], start] += _in_rows(same)
        found = [tree for groups in of_context.values() for tree in _cheapest(encoded, groups, longest, width)]
    return sorted(found, key=lambda tree: -tree.width)


def _in_rows(members: list[int]) -> list[list[int]]:
    """The examples in lists of at most `MEMBERS`."""
    return [members[at : at + MEMBERS] for at in range(0, len(members), MEMBERS)]


def _cheapest(encoded: Sequence[Encoded], groups: list[list[int]], longest: int, width: int) -> list[Tree]:
    """One row for all inputs of a context, or one for each, whichever costs less."""

    def price(tree: Tree) -> int:
        # A layer's FLOPs, 24 T D^2 + 4 T^2 D, without their common factor.
        return tree.width * (6 * width + tree.width)

    apart = [row_of(encoded, same) for same in groups]
    if len(apart) == 1 or sum(map(len, groups)) > MEMBERS:
        return apart
    together = row_of(encoded, [index for same in groups for index in same])
    return [together] if together.width <= longest and price(together) < sum(map(price, apart)) else apart


def padded_length(length: int, longest: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`, `longest` at most."""
    power = 1 << (length - 1).bit_length()
    between = power * 3 // 4
    return min(max(SHORTEST_ROW, between if length <= between else power), longest)


def most_rows(length: int) -> int:
    """How many rows of a padded length one device computes at once."""
    most = PAIRS // length**2
    return max(1, min(most, CPU_TOKENS // length) if jax.default_backend() == "cpu" else most)


def batches(rows: Sequence[Tree], batch_size: int, longest: int, ways: int) -> list[tuple[Sequence[Tree], int, int]]:
    """Cut rows into batches: (rows, how many rows they are padded to, the length they are padded to).

    The rows are sorted, longest first, so the first of each batch decides its length.

    Args:
        batch_size: rows of one device, at most.
        ways: how many devices a batch is split over.
    """
    cut = []
    batch_size = min(batch_size, -(-len(rows) // ways))
    while rows:
        length = padded_length(rows[0].width, longest)
        count = ways * min(batch_size, most_rows(length))
        cut.append((rows[:count], count, length))
        rows = rows[count:]
    return cut


def pack_questions(rows: Sequence[Tree], count: int, length: int, alternatives: int) -> Questions:
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
    """Write what each alternative expects after the tree's columns, counted from `start` - 1."""
    trunk = len(tree.shared) - tree.start + 1  # columns of the common beginning, its last one included
    begins = trunk + np.cumsum([0, *map(len, tree.branches)])
    for slot, (way, last) in enumerate(tree.alternatives):
        follows = [*tree.shared[tree.start :], *tree.branches[way], last]
        targets[:trunk, slot] = follows[:trunk]
        targets[begins[way] : begins[way + 1], slot] = follows[trunk:]
