"""Log-likelihoods of given answers: tasks, texts and the lm-evaluation-harness are scored by this one function.

Answers to one context share a forward pass. Rows are sorted by length and padded to a few static shapes
(`chai_jax.score.questions`), and each batch is split over the devices of the model's layout. The last layer and the
vocabulary head see only the positions that predict a target, and the head sees only some of these at a time. So logits
[B, T, V] never exist.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.console import track
from chai_jax.data.batches import Encoded
from chai_jax.model.decoder import HEAD_ROWS, forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.sharding import whole
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.score.questions import NONE, Questions, batches, pack_questions, trees

Total = Any


def fold_targets(
    questions: Questions,
    hidden: Float[Array, "B P D"],
    step: Callable[[Total, Float[Array, "B N D"], Int32[Array, "B N A"]], Total],
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
        return step(total, jnp.take(hidden, places, axis=1, mode="clip"), targets)

    used = (questions.targets != NONE).any(axis=(0, 2))
    most = jnp.max(jnp.where(used, jnp.arange(count, dtype=jnp.int32) + 1, 0))
    return jax.lax.fori_loop(0, (most + width - 1) // width, body, initial)


def logits_at(
    config: Architecture, params: Params, hidden: Float[Array, "B T D"], positions: Int32[Array, "B N"], how: Execution
) -> Float[Array, "B N V"]:
    """float32 logits of the hidden states at `positions`."""
    return unembed(config, params, jnp.take_along_axis(hidden, positions[..., None], axis=1), how)


@partial(jax.jit, static_argnums=(0, 1, 2))
def target_logprobs(
    config: Architecture, spec: Spec, how: Execution, params: Params, questions: Questions
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """Summed log-probability (nats, float32) of each alternative's targets, and whether greedy decoding gives them."""
    hidden = forward(
        config, spec, params, questions.tokens, questions.mask, how, branch=questions.branch, wanted=questions.columns
    ).hidden

    def step(total: Total, states: Array, targets: Array) -> Total:
        logits, counts = unembed(config, params, states, how), targets != NONE
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0), axis=-1)
        chosen -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        hit = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32) == targets
        return total[0] + jnp.where(counts, chosen, 0.0).sum(1), total[1] & (hit | ~counts).all(1)

    rows, _, alternatives = questions.targets.shape
    start = jnp.zeros((rows, alternatives)), jnp.ones((rows, alternatives), bool)
    return fold_targets(questions, hidden, step, start)


def loglikelihoods(
    model: Model, encoded: Sequence[Encoded], batch_size: int = 32, description: str = "Scoring"
) -> np.ndarray:
    """Log-probability in nats of each example's targets, and whether greedy decoding would produce them: float [N, 2].

    Args:
        batch_size: rows of a batch and device (see `chai_jax.score.questions`); fewer where they are long.

    Raises:
        InputError: an example without context, without target, or longer than the model's positions + 1.
    """
    out, how, longest = np.zeros((len(encoded), 2)), model.how, model.config.max_positions
    params = how.layout.params(model.config, model.spec, model.params)
    compute = partial(target_logprobs, model.config, model.spec, how, params)
    rows = trees(encoded, longest, model.config.hidden_size if model.spec.stored_by_token else None)
    alternatives = max((len(tree.members) for tree in rows), default=1)
    for batch, count, length in track(batches(rows, batch_size, longest, how.layout.ways), description):
        sums, greedy = whole(compute(how.layout.rows(pack_questions(batch, count, length, alternatives))))
        for row, tree in enumerate(batch):
            members = list(tree.members)
            out[members, 0] = sums[row][: len(members)]
            out[members, 1] = greedy[row][: len(members)]
    return out
