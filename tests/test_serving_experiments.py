"""The experiments on serving and on the cache: what they count is there to be counted."""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from chai_jax.compress.quantize import with_storage
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params, init
from chai_jax.model.sharding import one_device
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
CONFIG = Architecture(
    vocab_size=61, hidden_size=16, num_layers=1, num_heads=2, ffn_dim=32, max_positions=64, embed_dim=16
)


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def tiny(seed: int) -> Model:
    random = np.random.default_rng(seed)
    spec = Spec.dense(1, 2, 8)
    shapes = jax.eval_shape(lambda key: init(CONFIG, spec, key), jax.random.key(0))
    params: Params = jax.tree.map(lambda x: jax.numpy.asarray(0.5 * random.standard_normal(x.shape), x.dtype), shapes)
    return Model(CONFIG, spec, params, execution=Execution.choose(layout=one_device()))


@pytest.mark.slow
def test_programs_are_compiled_for_new_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = script("steady")
    monkeypatch.setattr(steady, "GROUP", 6)
    options = steady.SteadyOptions(("tiny",), requests=12, longest=12, new_tokens=3)
    compiled: list[str] = []

    def heard(event: str, duration: float, **_: Any) -> None:
        if event == steady.COMPILED:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    model = tiny(0)
    first, second = (list(steady.serve(model, options, number, 0, compiled)) for number in (1, 2))
    assert [(row["first"], row["last"]) for row in first] == [(1, 6), (7, 12)]
    assert first[0]["compiled"] > 0
    assert [row["compiled"] for row in second] == [0, 0]
    assert len({row["live_bytes"] for row in second}) == 1
    longer = steady.SteadyOptions(("tiny",), requests=12, longest=20, new_tokens=3)
    before = steady.warm(model, longer, compiled)
    assert before["compiled"] > 0
    assert [row["compiled"] for row in steady.serve(model, longer, 1, 0, compiled)] == [0, 0]


def test_a_model_keeps_all_that_itself_has_proposed() -> None:
    speculation = script("speculation")
    options = speculation.SpeculationOptions(("tiny",), counts="3", new_tokens=13)
    prompts = [[2, 5, 7], [2, 30, 31]]
    model = tiny(0)
    itself, other = speculation.compare(model, {"itself": model, "other": tiny(1)}, prompts, options)
    assert (itself["n"], itself["same"], other["same"]) == (2, 2, 2)
    assert itself["acceptance"] == 1
    assert itself["tokens_per_round"] == 4  # three proposals and the model's own
    assert other["acceptance"] < 1
    assert other["tokens_per_round"] < 4
    assert 0 < itself["speed_up"][1] <= itself["speed_up"][0] <= itself["speed_up"][2]


@pytest.mark.slow
def test_damage_of_few_bits_is_that_of_each_window() -> None:
    """Against logits of one window at a time, in float64; a cache that is the same does none."""
    few = script("few_bits")
    config = dataclasses.replace(CONFIG, max_positions=200)
    random = np.random.default_rng(2)
    model = with_storage(dataclasses.replace(tiny(0), config=config, params=wide(config)), "bfloat16")
    changed = [model, with_storage(model, "k2v2")]
    tokens = random.integers(4, 61, (5, 150)).astype(np.int32)
    (same, rose), (kl, rise) = few.damage(model, changed, tokens, 4)
    np.testing.assert_allclose([same, rose], 0, atol=1e-6)
    for row, window in enumerate(tokens):
        right, wrong = (
            log_softmax(np.asarray(one(window[None])[0, :-1], np.float64), axis=-1) for one in (model, changed[1])
        )
        np.testing.assert_allclose(kl[row], (np.exp(right) * (right - wrong)).sum(-1).mean(), rtol=1e-3)
        at = np.arange(149), window[1:]
        np.testing.assert_allclose(rise[row], (right[at] - wrong[at]).mean(), rtol=1e-3, atol=1e-6)
    assert kl.min() > 1e-5


def wide(config: Architecture) -> Params:
    spec = Spec.of(config)
    return init(config, spec, jax.random.key(0), std=0.4)
