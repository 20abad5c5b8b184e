"""CHAI-KD: the student learns the teacher's next-token distribution and the completion itself."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from chai_jax.adapt.finetune import cross_entropy, sum_over_targets, training_execution
from chai_jax.adapt.step import Sums
from chai_jax.adapt.teacher import cache_teacher
from chai_jax.adapt.train import Log, train
from chai_jax.adapt.updates import Batch
from chai_jax.config import Checkpoints, DistilConfig
from chai_jax.data.batches import Encoded, Example
from chai_jax.errors import InputError
from chai_jax.model.decoder import forward
from chai_jax.model.execution import Execution
from chai_jax.model.flops import count_flops
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.score.divergence import kl_divergence
from chai_jax.score.loglikelihood import logits_at


def distil(
    model: Model,
    teacher: Model,
    examples: Sequence[Example | Encoded],
    config: DistilConfig | None = None,
    log: Log | None = None,
    *,
    checkpoints: Checkpoints | Path | str | None = None,
) -> Model:
    """Minimise a T^2 KL(teacher || student) + (1 - a) CE over the completions' tokens; every leaf trains.

    Hinton et al. 2015 (arXiv 1503.02531); T^2 keeps the gradient's size independent of T. The teacher, of any size but
    with the student's vocabulary, runs in the same program and is never changed. With `cache_teacher` it runs before
    the first update instead, and its log-probabilities at the targets lie in the folder of the checkpoints, or without
    one in a temporary folder. `log` also receives `kl` (at temperature T, without T^2) and `ce`, in nats per target.

    Raises:
        InputError: the vocabularies differ, or the disk has no room for the teacher's answers; and see
            `chai_jax.adapt.train.train`.
    """
    config = config or DistilConfig()
    check_vocabulary(model, teacher)
    how = training_execution(model, config.train)
    loss = partial(
        distillation_loss,
        (teacher.config, model.config),
        (teacher.spec, model.spec),
        how,
        config.temperature,
        config.alpha,
        remat=config.train.remat,
    )
    with ExitStack() as stack:
        extra, answers, beside = None, None, None
        if config.cache_teacher is None:
            extra = how.layout.params(teacher.config, teacher.spec, teacher.params)
            beside = count_flops(teacher.config, teacher.spec)
        else:
            given = checkpoints or stack.enter_context(TemporaryDirectory())
            folder = Path(given.path if isinstance(given, Checkpoints) else given)
            answers = partial(cache_teacher, teacher, folder, config.cache_teacher, how)
        return train(
            model,
            examples,
            loss,
            config,
            stage="distil",
            extra=extra,
            answers=answers,
            beside=beside,
            longest=min(teacher.config.max_positions, model.config.max_positions),
            log=log,
            checkpoints=checkpoints,
        )


def check_vocabulary(one: Model, other: Model, names: tuple[str, str] = ("student", "teacher")) -> None:
    """Raise InputError unless token ids mean the same to both models, which it calls by these names."""
    advice = f"expected one vocabulary: choose a {names[1]} of the same family"
    sizes = one.config.vocab_size, other.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(f"the {names[0]} has {sizes[0]} tokens, the {names[1]} {sizes[1]}; {advice}")
    if one.tokenizer is None or other.tokenizer is None or one.tokenizer is other.tokenizer:
        return
    if one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise InputError(f"{names[0]} and {names[1]} number their tokens differently; {advice}")


def distillation_loss(
    configs: tuple[Architecture, Architecture],
    specs: tuple[Spec, Spec],
    how: Execution,
    temperature: float,
    alpha: float,
    params: Params,
    batch: Batch,
    teacher_params: Any,
    *,
    remat: bool = False,
) -> Sums:
    """loss = alpha T^2 kl + (1 - alpha) ce, with kl and ce, in nats, summed over the targets of a batch.

    Args:
        configs: of teacher and student, as `specs`.
        params: the student's.
        teacher_params: a tree as `params`, or None where the batch has the teacher's log-probabilities.
    """
    hidden = forward(configs[1], specs[1], params, batch.tokens, batch.mask, how, remat=remat).hidden
    if batch.teacher is None:
        teacher_params = jax.lax.stop_gradient(teacher_params)
        taught = forward(configs[0], specs[0], teacher_params, batch.tokens, batch.mask, how).hidden

    def step(positions: Array, targets: Array, weights: Array, cached: Array | None) -> Sums:
        student = logits_at(configs[1], params, hidden, positions, how)
        if cached is None:
            teacher = logits_at(configs[0], teacher_params, taught, positions, how)
        else:
            teacher = cached.astype(jnp.float32)
        softened = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
        kl = (weights * kl_divergence(*softened)).sum()
        ce = (weights * cross_entropy(student, targets)).sum()
        return {"loss": alpha * temperature**2 * kl + (1 - alpha) * ce, "kl": kl, "ce": ce}

    return sum_over_targets(step, batch)
