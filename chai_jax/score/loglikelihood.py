"""Log-likelihoods and divergences of given answers: every accuracy, loss and sensitivity is computed here.

What examples have in common goes through the model once, rows are sorted by length and padded to a few static shapes
(`chai_jax.score.questions`), and split over the devices of the model's layout. The last layer, and behind it the
vocabulary head, sees only the positions that predict a target; the head sees some at a time: logits [B, T, V] never
exist.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.console import track
from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError
from chai_jax.model.decoder import HEAD_ROWS, forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.sharding import Layout, whole
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.score.questions import NONE, Questions, Tree, batches, pack, trees

Total = Any


def fold_targets(
    questions: Questions,
    hidden: Sequence[Float[Array, "B P D"]],
    step: Callable[[Total, list[Float[Array, "B N D"]], Int32[Array, "B N A"]], Total],
    initial: Total,
) -> Total:
    """Fold `step(total, hidden states, targets)` over the positions, N at a time, as far as there are targets.

    The number of steps follows the longest answer of the batch without a recompilation.
    """
    rows, count, _ = questions.targets.shape
    # The vocabulary head may cost more than the layers: it sees no more positions than there are targets.
    width = min(count, max(1, HEAD_ROWS // rows))

    def body(index: Array, total: Total) -> Total:
        places = index * width + jnp.arange(width, dtype=jnp.int32)
        targets = jnp.take(questions.targets, places, axis=1, mode="fill", fill_value=NONE)
        some = [jnp.take(states, places, axis=1, mode="clip") for states in hidden]
        return step(total, some, targets)

    used = (questions.targets != NONE).any(axis=(0, 2))
    most = jnp.max(jnp.where(used, jnp.arange(count, dtype=jnp.int32) + 1, 0))
    return jax.lax.fori_loop(0, (most + width - 1) // width, body, initial)


def logits_at(
    config: Architecture, params: Params, hidden: Float[Array, "B T D"], positions: Int32[Array, "B N"], how: Execution
) -> Float[Array, "B N V"]:
    """float32 logits of the hidden states at `positions`."""
    return unembed(config, params, jnp.take_along_axis(hidden, positions[..., None], axis=1), how)


def states_of(
    config: Architecture, spec: Spec, how: Execution, params: Params, questions: Questions
) -> Float[Array, "B P D"]:
    """Hidden states of the positions that something is expected behind."""
    return forward(
        config, spec, params, questions.tokens, questions.mask, how, branch=questions.branch, wanted=questions.columns
    ).hidden


@partial(jax.jit, static_argnums=(0, 1, 2))
def target_logprobs(
    config: Architecture, spec: Spec, how: Execution, params: Params, questions: Questions
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """Summed log-probability (nats, float32) of each alternative's targets, and whether greedy decoding gives them."""

    def step(total: Total, hidden: list[Array], targets: Array) -> Total:
        logits, counts = unembed(config, params, hidden[0], how), targets != NONE
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0), axis=-1)
        chosen -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        hit = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32) == targets
        return total[0] + jnp.where(counts, chosen, 0.0).sum(1), total[1] & (hit | ~counts).all(1)

    hidden = [states_of(config, spec, how, params, questions)]
    rows, _, alternatives = questions.targets.shape
    return fold_targets(
        questions, hidden, step, (jnp.zeros((rows, alternatives)), jnp.ones((rows, alternatives), bool))
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def target_kl(
    configs: tuple[Architecture, Architecture],
    specs: tuple[Spec, Spec],
    how: Execution,
    params: tuple[Params, Params],
    questions: Questions,
) -> Float[Array, "B A"]:
    """Mean over each alternative's positions of KL(teacher || student) in nats, given as (teacher, student) pairs."""

    def step(total: Array, hidden: list[Array], targets: Array) -> Array:
        teacher, student = (
            jax.nn.log_softmax(unembed(config, tree, x, how))
            for config, tree, x in zip(configs, params, hidden, strict=True)
        )
        divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1, keepdims=True)
        return total + jnp.where(targets != NONE, divergence, 0.0).sum(1)

    hidden = [
        states_of(config, spec, how, tree, questions) for config, spec, tree in zip(configs, specs, params, strict=True)
    ]
    counts = (questions.targets != NONE).sum(axis=1, dtype=jnp.float32)
    return fold_targets(questions, hidden, step, jnp.zeros(counts.shape)) / jnp.maximum(counts, 1.0)


def loglikelihoods(
    model: Model, encoded: Sequence[Encoded], batch_size: int = 32, description: str = "Scoring"
) -> np.ndarray:
    """Log-probability in nats of each example's targets, and whether greedy decoding would produce them: float [N, 2].

    Args:
        batch_size: rows of a batch and device (see `chai_jax.score.questions`); fewer where they are long.

    Raises:
        InputError: an example without context, without target, or longer than the model's positions + 1.
    """
    out, how = np.zeros((len(encoded), 2)), model.how
    params = how.layout.params(model.config, model.spec, model.params)
    compute = partial(target_logprobs, model.config, model.spec, how, params)
    rows = trees(encoded, model.config.max_positions, model.config.hidden_size if model.spec.stored_by_token else None)
    for members, (sums, greedy) in _run(compute, how.layout, rows, model.config.max_positions, batch_size, description):
        out[members, 0] = sums[: len(members)]
        out[members, 1] = greedy[: len(members)]
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
    out, how = np.zeros(len(encoded)), student.how
    params = tuple(how.layout.params(model.config, model.spec, model.params) for model in (teacher, student))
    compute = partial(target_kl, configs, specs, how, params)
    branching = all(spec.stored_by_token for spec in specs)
    rows = trees(encoded, longest, student.config.hidden_size if branching else None)
    for members, divergence in _run(compute, how.layout, rows, longest, batch_size, description):
        out[members] = divergence[: len(members)]
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


def _run(
    compute: Callable[[Questions], Any],
    layout: Layout,
    rows: Sequence[Tree],
    longest: int,
    batch_size: int,
    description: str,
) -> Iterator[tuple[list[int], Any]]:
    """Yield for each row of `compute(questions)` the examples it holds."""
    alternatives = max((len(tree.members) for tree in rows), default=1)
    for batch, count, length in track(batches(rows, batch_size, longest, layout.ways), description):
        result = whole(compute(layout.rows(pack(batch, count, length, alternatives))))
        for row, tree in enumerate(batch):
            yield list(tree.members), jax.tree.map(lambda x, row=row: x[row], result)
