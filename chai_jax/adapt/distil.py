"""CHAI-KD: the student learns the teacher's next-token distribution and the completion itself."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from chai_jax.adapt.finetune import cross_entropy, sum_over_targets
from chai_jax.adapt.step import Sums
from chai_jax.adapt.train import Log, train
from chai_jax.adapt.updates import Batch
from chai_jax.config import Checkpoints, DistilConfig
from chai_jax.data.batches import Encoded, Example
from chai_jax.errors import InputError
from chai_jax.model.model import Model, compute_dtype
from chai_jax.model.opt import forward
from chai_jax.model.params import OPTConfig, Params, declare
from chai_jax.model.sharding import make_mesh, place, shardings
from chai_jax.score import logits_at
from chai_jax.spec import Spec


def distil(
    model: Model,
    teacher: Model,
    examples: Sequence[Example | Encoded],
    config: DistilConfig | None = None,
    log: Log | None = None,
    *,
    mesh: Mesh | None = None,
    checkpoints: Checkpoints | Path | str | None = None,
) -> Model:
    """Minimise a T^2 KL(teacher || student) + (1 - a) CE over the completions' tokens; every leaf trains.

    Hinton et al. 2015 (arXiv 1503.02531); T^2 keeps the gradient's size independent of T. The teacher, of any size but
    with the student's vocabulary, runs in the same program and is never changed. `log` also receives `kl` (at
    temperature T, without T^2) and `ce`, in nats per target.

    Raises:
        InputError: the vocabularies differ; and see `chai_jax.adapt.train.train`.
    """
    config = config or DistilConfig()
    check_vocabulary(model, teacher)
    mesh = make_mesh() if mesh is None else mesh
    loss = partial(
        distillation_loss,
        (teacher.config, model.config),
        (teacher.spec, model.spec),
        compute_dtype(),
        config.temperature,
        config.alpha,
    )
    return train(
        model,
        examples,
        loss,
        config,
        stage="distil",
        extra=place(teacher.params, shardings(declare(teacher.config, teacher.spec), mesh)),
        longest=min(teacher.config.max_positions, model.config.max_positions),
        mesh=mesh,
        log=log,
        checkpoints=checkpoints,
    )


def check_vocabulary(model: Model, teacher: Model) -> None:
    """Raise InputError unless token ids mean the same to both models."""
    advice = "expected one vocabulary: choose a teacher of the same family"
    student_size, teacher_size = model.config.vocab_size, teacher.config.vocab_size
    if student_size != teacher_size:
        raise InputError(f"the student has {student_size} tokens, the teacher {teacher_size}; {advice}")
    if model.tokenizer is None or teacher.tokenizer is None or model.tokenizer is teacher.tokenizer:
        return
    if model.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(f"student and teacher number their tokens differently; {advice}")


def distillation_loss(
    configs: tuple[OPTConfig, OPTConfig],
    specs: tuple[Spec, Spec],
    dtype: DTypeLike,
    temperature: float,
    alpha: float,
    params: Params,
    batch: Batch,
    teacher_params: Params,
) -> Sums:
    """loss = alpha T^2 kl + (1 - alpha) ce, with kl and ce, in nats, summed over the targets of a batch.

    Args:
        configs: of teacher and student, as `specs`.
        params: the student's.
    """
    trees = (jax.lax.stop_gradient(teacher_params), params)
    hidden = [
        forward(config, spec, tree, batch.tokens, batch.mask, dtype=dtype).hidden
        for config, spec, tree in zip(configs, specs, trees, strict=True)
    ]

    def step(positions: Array, targets: Array, weights: Array) -> Sums:
        teacher, student = (
            logits_at(config, tree, x, positions) for config, tree, x in zip(configs, trees, hidden, strict=True)
        )
        kl = (weights * kl_divergence(teacher / temperature, student / temperature)).sum()
        ce = (weights * cross_entropy(student, targets)).sum()
        return {"loss": alpha * temperature**2 * kl + (1 - alpha) * ce, "kl": kl, "ce": ce}

    return sum_over_targets(step, batch)


def kl_divergence(teacher: Float[Array, "*B V"], student: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(softmax(teacher) || softmax(student)) in nats."""
    teacher, student = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
