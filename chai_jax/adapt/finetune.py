"""Cross-entropy tuning of every leaf on labelled examples or text, and the loss that the other stages build on."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from chai_jax.adapt.step import Loss, Sums
from chai_jax.adapt.train import Log, train
from chai_jax.adapt.updates import Batch
from chai_jax.config import Checkpoints, FinetuneConfig, TrainConfig
from chai_jax.data.batches import Encoded, Example
from chai_jax.model.decoder import HEAD_ROWS_TRAINED, forward
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.score.loglikelihood import logits_at


def finetune(
    model: Model,
    examples: Sequence[Example | Encoded],
    config: FinetuneConfig | None = None,
    log: Log | None = None,
    *,
    checkpoints: Checkpoints | Path | str | None = None,
) -> Model:
    """Minimise the cross-entropy of the examples' completions; every leaf trains. Returns a new model.

    Raises:
        InputError: see `chai_jax.adapt.train.train`.
    """
    config = config or FinetuneConfig()
    loss = loss_of(model, config.train)
    return train(model, examples, loss, config, stage="finetune", log=log, checkpoints=checkpoints)


def loss_of(model: Model, train: TrainConfig) -> Loss:
    """`completion_loss` of a model of this shape."""
    return partial(completion_loss, model.config, model.spec, training_execution(model, train), remat=train.remat)


def training_execution(model: Model, train: TrainConfig) -> Execution:
    """How a model is trained: as its programs run, but in the dtype that training asks for, and without kernels, since
    XLA's gradients are those that the tests hold against others."""
    return model.how.replace(dtype=jnp.dtype(train.compute or model.how.dtype), kernels="xla")


def completion_loss(
    config: Architecture,
    spec: Spec,
    how: Execution,
    params: Params,
    batch: Batch,
    extra: Any = None,
    *,
    remat: bool = False,
) -> Sums:
    """Cross-entropy in nats, summed over the targets of a batch."""
    hidden = forward(config, spec, params, batch.tokens, batch.mask, how, remat=remat).hidden

    def step(positions: Array, targets: Array, weights: Array, teacher: Array | None) -> Sums:
        return {"loss": (weights * cross_entropy(logits_at(config, params, hidden, positions, how), targets)).sum()}

    return sum_over_targets(step, batch)


def cross_entropy(logits: Float[Array, "*B V"], targets: Int32[Array, "*B"]) -> Float[Array, "*B"]:
    """-log softmax(logits)[target] in nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def sum_over_targets(
    step: Callable[[Int32[Array, "B N"], Int32[Array, "B N"], Float[Array, "B N"], Float[Array, "B N V"] | None], Sums],
    batch: Batch,
) -> Sums:
    """Sum `step(positions, targets, weights, teacher)` over a batch's targets, N columns at a time.

    The backward pass computes each step's logits again, so that [B, P, V] is never in memory at once.
    """
    rows, longest = batch.positions.shape
    width = min(longest, 1 << (max(1, HEAD_ROWS_TRAINED // rows).bit_length() - 1))  # a power of two, as `longest` is

    def columns(x: Array) -> Array:
        return x.reshape(rows, longest // width, width, *x.shape[2:]).swapaxes(0, 1)

    @partial(jax.checkpoint, prevent_cse=False)
    def body(part: tuple[Array, Array, Array, Array | None]) -> Sums:
        return step(*part)

    parts = (batch.positions, batch.targets, batch.weights, batch.teacher)
    sums = jax.lax.map(body, jax.tree.map(columns, parts))
    return {name: each.sum() for name, each in sums.items()}
