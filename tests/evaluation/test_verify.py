"""The comparison of two models against numpy, on models that differ and on one and the same."""

import dataclasses

import jax
import numpy as np
import pytest

from chai_jax.data.toy import toy_tokenizer
from chai_jax.errors import InputError
from chai_jax.evaluation.verify import TEXTS, verify
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

TOKENIZER = toy_tokenizer()
CONFIG = Architecture(len(TOKENIZER), 16, 1, 2, 32, 24, 16)


def random_model(seed: int, config: Architecture = CONFIG) -> Model:
    spec = Spec.dense(1, 2, 8)
    return Model(config, spec, init(config, spec, jax.random.key(seed), std=0.4), TOKENIZER)


def test_differences_are_those_of_the_texts_one_by_one() -> None:
    """Unpadded, in float64; longer texts are cut to the shorter of the two models."""
    one, other = random_model(0), random_model(1, dataclasses.replace(CONFIG, max_positions=12))
    found = verify(one, other)
    logits, kl, same = [], [], []
    for text in TEXTS:
        tokens = np.array([TOKENIZER(text)["input_ids"][:12]])
        a, b = (np.asarray(model(tokens), np.float64)[0] for model in (one, other))
        log_a, log_b = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (a, b))
        logits += np.abs(a - b).max(axis=-1).tolist()
        kl += (np.exp(log_a) * (log_a - log_b)).sum(axis=-1).tolist()
        same += (a.argmax(axis=-1) == b.argmax(axis=-1)).tolist()
    assert found["n"] == len(kl)
    assert found["max_logit_difference"] == pytest.approx(max(logits), abs=1e-4)
    assert (found["mean_kl"], found["max_kl"]) == pytest.approx((np.mean(kl), max(kl)), rel=1e-4)
    assert found["same_top_token"] == np.mean(same) < 1
    assert found["mean_kl"] > 0.1


def test_a_model_is_itself() -> None:
    model = random_model(0)
    found = verify(model, model)
    assert (found["max_logit_difference"], found["same_top_token"]) == (0, 1)
    assert found["mean_kl"] == pytest.approx(0, abs=1e-6)


def test_without_a_tokenizer_tokens_are_drawn() -> None:
    model = random_model(0).replace(tokenizer=None)
    assert verify(model, random_model(1))["n"] == 4 * 24


def test_another_vocabulary_is_refused() -> None:
    other = random_model(1, dataclasses.replace(CONFIG, vocab_size=CONFIG.vocab_size + 1))
    with pytest.raises(InputError, match="expected one vocabulary"):
        verify(random_model(0), other)
