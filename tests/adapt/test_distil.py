"""Distillation against the formula written out in numpy, and what it may not touch."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.adapt import step as steps
from chai_jax.adapt.distil import distil, distillation_loss
from chai_jax.adapt.finetune import training_execution
from chai_jax.adapt.updates import pack_update
from chai_jax.config import DistilConfig, TrainConfig
from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError
from chai_jax.model.model import Model

Build = Callable[..., Model]
SHORT = TrainConfig(lr=1e-2, batch=16, accumulation=2, epochs=12)


def gradients(
    student: Model, teacher: Model, examples: list[Encoded], temperature: float, alpha: float
) -> tuple[Any, steps.Sums]:
    configs, specs = (teacher.config, student.config), (teacher.spec, student.spec)
    loss = partial(distillation_loss, configs, specs, training_execution(student, SHORT), temperature, alpha)
    masters, frozen = steps.split(student.params, steps.everything(student.params))
    batch = pack_update(examples, (2, 8), 32, 6)
    return jax.jit(partial(steps.gradients, loss))(masters, frozen, teacher.params, batch)


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(exp / exp.sum(-1, keepdims=True))


def test_loss_is_the_formula(tiny: Build, examples: list[Encoded]) -> None:
    """alpha T^2 KL(teacher || student) + (1 - alpha) CE, one example at a time, in float64."""
    temperature, alpha = 3.0, 0.3
    student, teacher = tiny(0), tiny(1, hidden_size=24, num_heads=3, ffn_dim=40, embed_dim=24)
    tokens, mask = np.ones((16, 16), np.int32), np.zeros((16, 16), bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens) - 1], mask[row, : len(example.tokens) - 1] = example.tokens[:-1], True
    logits = [np.asarray(model(tokens, mask), np.float64) for model in (teacher, student)]
    kl, ce = [], []
    for row, example in enumerate(examples):
        p, q = (of[row, example.start - 1 : len(example.tokens) - 1] for of in logits)
        soft_p, soft_q = softmax(p / temperature), softmax(q / temperature)
        kl += (soft_p * np.log(soft_p / soft_q)).sum(-1).tolist()
        ce += (-np.log(softmax(q)[np.arange(len(q)), list(example.tokens[example.start :])])).tolist()
    _, means = gradients(student, teacher, examples, temperature, alpha)
    np.testing.assert_allclose(means["kl"], np.mean(kl), rtol=1e-4)
    np.testing.assert_allclose(means["ce"], np.mean(ce), rtol=1e-4)
    np.testing.assert_allclose(means["loss"], alpha * 9 * np.mean(kl) + (1 - alpha) * np.mean(ce), rtol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny: Build, examples: list[Encoded]) -> None:
    """And their arrays, which are the same, survive the stage."""
    model, log = tiny(), []
    before = jax.tree.map(np.array, model.params)
    config = DistilConfig(TrainConfig(batch=16, accumulation=2, max_steps=1), alpha=1.0)
    distil(model, model, examples, config, log.append)
    (update,) = log
    assert update["kl"] == pytest.approx(0, abs=1e-6)
    assert update["grad_norm"] < 1e-5
    assert update["ce"] > 1
    jax.tree.map(np.testing.assert_array_equal, model.params, before)


def test_student_approaches_its_teacher(tiny: Build, examples: list[Encoded]) -> None:
    student, teacher = tiny(0), tiny(1, hidden_size=24, num_heads=3, ffn_dim=40, embed_dim=24)
    before = jax.tree.map(np.array, (student.params, teacher.params))
    log: list[dict[str, Any]] = []
    after = distil(student, teacher, examples, DistilConfig(SHORT, alpha=1.0), log.append)
    assert log[-1]["kl"] < 0.5 * log[0]["kl"]
    assert {"stage": "distil"}.items() <= log[0].items()
    assert {"kl", "ce", "loss"} <= set(log[0])
    jax.tree.map(np.testing.assert_array_equal, (student.params, teacher.params), before)
    assert not np.array_equal(after.params["embed"]["tokens"], before[0]["embed"]["tokens"])


def test_refuses_another_vocabulary(tiny: Build, examples: list[Encoded]) -> None:
    with pytest.raises(InputError, match="the student has 53 tokens, the teacher 60"):
        distil(tiny(), tiny(vocab_size=60), examples)
    words = [SimpleNamespace(get_vocab=lambda order=order: order) for order in ({"a": 0, "b": 1}, {"a": 1, "b": 0})]
    with pytest.raises(InputError, match="number their tokens differently"):
        distil(tiny().replace(tokenizer=words[0]), tiny().replace(tokenizer=words[1]), examples)


def test_examples_must_fit_the_teacher_too(tiny: Build) -> None:
    with pytest.raises(InputError, match="at most 9 tokens"):
        distil(tiny(), tiny(max_positions=8), [Encoded((2,) * 12, 3)])


@pytest.mark.parametrize(("setting", "value"), [("alpha", 1.5), ("alpha", -0.1), ("temperature", 0.0)])
def test_settings_out_of_range(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{setting} is"):
        DistilConfig(**{setting: value})
