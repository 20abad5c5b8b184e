"""Log-likelihoods and divergences of given answers: every accuracy, loss and sensitivity is computed here.

Sequences that are equal but for their last token (the choices of a one-token answer) go through the model once. The
rest is sorted by length, padded on the right to a few static shapes, and spread over the current layout's mesh. Only
the hidden states that predict a target meet the vocabulary head, some rows at a time: logits [B, T, V] never exist.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError
from chai_jax.model.model import Model, compute_dtype
from chai_jax.model.opt import forward, unembed
from chai_jax.model.params import OPTConfig, Params
from chai_jax.model.sharding import Layout, current_layout, whole
from chai_jax.progress import track
from chai_jax.spec import Spec

HEAD_ROWS = 256  # hidden states that meet the vocabulary head at once: 51 MB of float32 logits at V = 50,272
PAIRS = 2**21  # B T^2 of one device's batch at most: 8 MB of float32 scores a head
SHORTEST = 16  # the smallest padded length
Total = Any


@partial(jax.tree_util.register_dataclass, data_fields=["tokens", "start", "length", "last"], meta_fields=["short"])
@dataclass(frozen=True)
class Questions:
    """A batch of inputs with the tokens that should follow.

    Row b feeds `tokens[b, :length[b]]`. Its targets are the tokens at `start[b]` ... `length[b] - 1` and then, behind
    the input's end, each of the alternatives `last[b]`. A row of length 0 is padding. `short` promises that no row has
    more targets than that last one.
    """

    tokens: Int32[Array, "B T"]
    start: Int32[Array, "B"]
    length: Int32[Array, "B"]
    last: Int32[Array, "B A"]
    short: bool = False

    @property
    def mask(self) -> Bool[Array, "B T"]:
        """True where a token is real."""
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32) < self.length[:, None]

    @property
    def targets(self) -> Int32[Array, "B"]:
        """How many tokens of each row are predicted."""
        return jnp.maximum(self.length - self.start + 1, 0)


def fold_targets(
    questions: Questions,
    step: Callable[[Total, Int32[Array, "B N"], Bool[Array, "B N"]], Total],
    initial: Total,
) -> Total:
    """Fold `step(total, positions, valid)` over the positions whose hidden states predict a target, N at a time.

    The number of steps follows the longest answer of the batch without a recompilation.
    """
    rows, longest = questions.tokens.shape
    # The vocabulary head may cost more than the layers: it sees no more positions than there are targets.
    width = 1 if questions.short else max(1, HEAD_ROWS // rows)

    def body(index: Array, total: Total) -> Total:
        offsets = index * width + jnp.arange(width, dtype=jnp.int32)
        positions = questions.start[:, None] - 1 + offsets
        valid = positions < questions.length[:, None]
        return step(total, jnp.minimum(positions, longest - 1), valid)

    steps = (jnp.max(questions.targets) + width - 1) // width
    return jax.lax.fori_loop(0, steps, body, initial)


def logits_at(
    config: OPTConfig, params: Params, hidden: Float[Array, "B T D"], positions: Int32[Array, "B N"]
) -> Float[Array, "B N V"]:
    """float32 logits of the hidden states at `positions`."""
    return unembed(config, params, jnp.take_along_axis(hidden, positions[..., None], axis=1))


@partial(jax.jit, static_argnums=(0, 1, 2))
def target_logprobs(
    config: OPTConfig, spec: Spec, dtype: Any, params: Params, questions: Questions
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """Summed log-probability (nats, float32) of each alternative's targets, and whether greedy decoding gives them."""
    hidden = forward(config, spec, params, questions.tokens, questions.mask, dtype=dtype).hidden

    def step(total: Total, positions: Array, valid: Array) -> Total:
        logits = logits_at(config, params, hidden, positions)
        after = jnp.minimum(positions + 1, questions.tokens.shape[1] - 1)
        following = jnp.take_along_axis(questions.tokens, after, axis=1)
        at_end = positions == questions.length[:, None] - 1
        targets = jnp.where(at_end[..., None], questions.last[:, None], following[..., None])
        chosen = jnp.take_along_axis(logits, targets, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        hit = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32) == targets
        skipped = ~valid[..., None]
        return total[0] + jnp.where(skipped, 0.0, chosen).sum(1), total[1] & (hit | skipped).all(1)

    shape = questions.last.shape
    return fold_targets(questions, step, (jnp.zeros(shape), jnp.ones(shape, bool)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def target_kl(
    configs: tuple[OPTConfig, OPTConfig],
    specs: tuple[Spec, Spec],
    dtype: Any,
    params: tuple[Params, Params],
    questions: Questions,
) -> Float[Array, "B"]:
    """Mean over each row's target positions of KL(teacher || student) in nats, given as (teacher, student) pairs."""
    hidden = [
        forward(config, spec, tree, questions.tokens, questions.mask, dtype=dtype).hidden
        for config, spec, tree in zip(configs, specs, params, strict=True)
    ]

    def step(total: Array, positions: Array, valid: Array) -> Array:
        teacher, student = (
            jax.nn.log_softmax(logits_at(config, tree, x, positions))
            for config, tree, x in zip(configs, params, hidden, strict=True)
        )
        divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
        return total + jnp.where(valid, divergence, 0.0).sum(1)

    total = fold_targets(questions, step, jnp.zeros(questions.length.shape))
    return total / jnp.maximum(questions.targets, 1).astype(jnp.float32)


def loglikelihoods(
    model: Model, encoded: Sequence[Encoded], batch_size: int = 32, description: str = "Scoring"
) -> np.ndarray:
    """Log-probability in nats of each example's targets, and whether greedy decoding would produce them: float [N, 2].

    Args:
        batch_size: sequences of a batch and device; fewer where they are long.

    Raises:
        InputError: an example without context, without target, or longer than the model's positions + 1.
    """
    out, layout = np.zeros((len(encoded), 2)), current_layout()
    params = layout.params(model.config, model.spec, model.params)
    for indices, (sums, greedy) in _run(
        partial(target_logprobs, model.config, model.spec, compute_dtype(), params),
        layout,
        encoded,
        model.config.max_positions,
        batch_size,
        description,
    ):
        out[indices, 0] = sums[: len(indices)]
        out[indices, 1] = greedy[: len(indices)]
    return out


def answer_kl(
    teacher: Model, student: Model, encoded: Sequence[Encoded], batch_size: int = 32, description: str = "Comparing"
) -> np.ndarray:
    """Mean KL(teacher || student) in nats of the next-token distribution over each example's targets: float [N].

    Raises:
        InputError: as `loglikelihoods`, and two models of different vocabularies.
    """
    if teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            f"teacher and student have vocabularies of {teacher.config.vocab_size} and {student.config.vocab_size}; "
            "expected one vocabulary: choose a teacher of the same family"
        )
    configs, specs = (teacher.config, student.config), (teacher.spec, student.spec)
    longest = min(teacher.config.max_positions, student.config.max_positions)
    out, layout = np.zeros(len(encoded)), current_layout()
    params = tuple(layout.params(model.config, model.spec, model.params) for model in (teacher, student))
    for indices, divergence in _run(
        partial(target_kl, configs, specs, compute_dtype(), params),
        layout,
        encoded,
        longest,
        batch_size,
        description,
    ):
        out[indices] = divergence
    return out


def mean_loss(model: Model, encoded: Sequence[Encoded], batch_size: int = 32, description: str = "Scoring") -> float:
    """Cross-entropy in nats per target token, over all targets of all examples.

    Raises:
        InputError: as `loglikelihoods`, and no examples.
    """
    if not encoded:
        raise InputError("no examples to score; expected at least one: check the data and the limit")
    targets = sum(len(example.tokens) - example.start for example in encoded)
    return -float(loglikelihoods(model, encoded, batch_size, description)[:, 0].sum()) / targets


@dataclass(frozen=True)
class _Group:
    """Examples that share an input and differ at most in their last token."""

    tokens: tuple[int, ...]
    start: int
    last: list[int]
    members: list[int]


def _grouped(encoded: Sequence[Encoded], longest: int) -> list[_Group]:
    """Group the examples by input, longest first, so that memory runs out at once or never."""
    members: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    for index, example in enumerate(encoded):
        if not 1 <= example.start < len(example.tokens) <= longest + 1:
            raise InputError(
                f"example {index} has {len(example.tokens)} tokens, its answer from token {example.start}; expected a "
                f"context, an answer, and at most {longest + 1} tokens: shorten it or mend its prompt"
            )
        members[tuple(example.tokens[:-1]), example.start].append(index)
    groups = [
        _Group(tokens, start, [int(encoded[index].tokens[-1]) for index in indices], indices)
        for (tokens, start), indices in members.items()
    ]
    return sorted(groups, key=lambda group: -len(group.tokens))


def padded_length(length: int, longest: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`, `longest` at most."""
    power = 1 << (length - 1).bit_length()
    between = power * 3 // 4
    return min(max(SHORTEST, between if length <= between else power), longest)


def _pack(groups: list[_Group], rows: int, length: int, alternatives: int, layout: Layout) -> Questions:
    """Pad groups on the right to [rows, length], split over the mesh; missing rows have length 0."""
    tokens = np.zeros((rows, length), np.int32)
    start, lengths = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    last = np.zeros((rows, alternatives), np.int32)
    for row, group in enumerate(groups):
        tokens[row, : len(group.tokens)] = group.tokens
        start[row], lengths[row] = group.start, len(group.tokens)
        last[row, : len(group.last)] = group.last
    short = all(group.start == len(group.tokens) for group in groups)
    return partial(Questions, short=short)(*layout.rows((tokens, start, lengths, last)))


def _batches(groups: list[_Group], batch_size: int, longest: int, ways: int) -> list[tuple[list[_Group], int, int]]:
    """Cut sorted groups into (groups, rows, padded length); the first of a batch sets the length, so shapes are few."""
    batches = []
    batch_size = min(batch_size, -(-len(groups) // ways))
    while groups:
        length = padded_length(len(groups[0].tokens), longest)
        rows = ways * max(1, min(batch_size, PAIRS // length**2))
        batches.append((groups[:rows], rows, length))
        groups = groups[rows:]
    return batches


def _run(
    compute: Callable[[Questions], Any],
    layout: Layout,
    encoded: Sequence[Encoded],
    longest: int,
    batch_size: int,
    description: str,
) -> Iterator[tuple[list[int], Any]]:
    """Yield for each row of `compute(questions)` the examples it holds."""
    groups = _grouped(encoded, longest)
    alternatives = max((len(group.last) for group in groups), default=1)
    for batch, rows, length in track(_batches(groups, batch_size, longest, layout.ways), description):
        result = whole(compute(_pack(batch, rows, length, alternatives, layout)))
        for row, group in enumerate(batch):
            yield group.members, jax.tree.map(lambda x, row=row: x[row], result)
