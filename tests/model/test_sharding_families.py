"""Sharding of models with fewer key/value heads than query heads: what is split, and that no result depends on it."""

import dataclasses
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from chai_jax.compress.cluster import cluster
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Declared, Params, declare
from chai_jax.model.sharding import FSDP, Layout, make_mesh, shardings
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.planned import uniform_plan
from chai_jax.plans.spec import Spec
from chai_jax.serve.decode import NEVER, Sampling, decode, pad_right, prefill, serving_params
from chai_jax.serve.generate import generate_tokens

LLAMA = Architecture(
    *(48, 32, 1, 8, 40, 48, 32), num_kv_heads=4, head_size=8, norm="rms", gated=True, bias=False, activation="silu",
    rotary=Rotary(), position_offset=0, tied=False, family="llama",
)  # fmt: skip
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, bias=("query", "key", "value"), windows=(5,), family="qwen3")
PYTHIA = dataclasses.replace(
    LLAMA, num_kv_heads=None, norm="layer", gated=False, parallel=True, bias=True, rotary=Rotary(fraction=0.5)
)
MESHES = {"4x2": (4, 2, False), "2x4": (2, 4, False), "8x1": (8, 1, False), "4x2 FSDP": (4, 2, True)}


def random_params(config: Architecture) -> Params:
    """None of them trivial: norms and biases too."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda what: jnp.asarray(0.3 * random.standard_normal(what.shape) + (what.kind == "scale"), jnp.float32),
        declare(config, Spec.of(config)),
        is_leaf=lambda x: isinstance(x, Declared),
    )


def model_on(config: Architecture, data: int = 1, model: int = 1, fsdp: bool = False) -> Model:
    layout = Layout(make_mesh(data, model), fsdp)
    how = Execution.choose("float32", layout, "xla")
    return Model(config, Spec.of(config), random_params(config), execution=how)


def answers(model: Model) -> tuple[np.ndarray, list[list[int]]]:
    """Logits of prompts padded on the left, and what follows them."""
    how, prompts = model.how, [[3, *range(4, 4 + length)] for length in (1, 5, 9, 3, 7, 2, 2, 4)]
    tokens, mask = pad_right(prompts, 0, how.layout.ways)
    placed = model.replace(params=how.layout.params(model.config, model.spec, model.params))
    return np.asarray(placed(tokens, mask))[mask], generate_tokens(model, prompts, max_new_tokens=6, stop=False)


def test_key_and_value_heads_are_split_with_their_queries() -> None:
    """And all else that OPT has not: gates with the feed-forward, norms of queries and keys nowhere."""
    config = dataclasses.replace(QWEN3, bias=("query", "key", "value", "gate"))
    found = shardings(declare(config, Spec.of(config)), make_mesh(data=2, model=4))
    layer = found["layers"]["0"]
    assert {layer[name]["kernel"].spec for name in ("query", "key", "value")} == {P(None, "model", None)}
    assert {layer[name]["bias"].spec for name in ("query", "key", "value")} == {P("model", None)}
    assert {layer[name]["scale"].spec for name in ("query_norm", "key_norm", "attention_norm")} == {P(None)}
    assert layer["gate"]["kernel"].spec == layer["up"]["kernel"].spec == P(None, "model")
    assert layer["gate"]["bias"].spec == P("model")
    assert found["head"]["kernel"].spec == P("model", None)
    assert "bias" not in layer["output"]
    assert "positions" not in found["embed"]


def test_too_few_key_heads_are_on_every_device() -> None:
    config = dataclasses.replace(LLAMA, num_kv_heads=2)
    layer = shardings(declare(config, Spec.of(config)), make_mesh(data=2, model=4))["layers"]["0"]
    assert layer["key"]["kernel"].spec == layer["value"]["kernel"].spec == P(None, None, None)
    assert layer["query"]["kernel"].spec == P(None, "model", None)


def test_fsdp_splits_gates_over_data() -> None:
    layer = shardings(declare(LLAMA, Spec.of(LLAMA)), make_mesh(data=4, model=2), FSDP)["layers"]["0"]
    assert layer["gate"]["kernel"].spec == P("data", "model")
    assert layer["key"]["kernel"].spec == P("data", "model", None)


CONFIGS = {
    "llama": LLAMA,
    "qwen3": QWEN3,
    "pythia": PYTHIA,
    "two key heads": dataclasses.replace(LLAMA, num_kv_heads=2),
}
PAIRS = [*(("llama", mesh) for mesh in MESHES), ("qwen3", "2x4"), ("pythia", "4x2"), ("two key heads", "2x4")]


@pytest.mark.parametrize(("name", "mesh"), PAIRS)
def test_answers_are_the_same_on_eight_devices(name: str, mesh: str) -> None:
    logits, tokens = answers(model_on(CONFIGS[name], *MESHES[mesh]))
    expected, text = answers(model_on(CONFIGS[name]))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert tokens == text
    assert len({token for row in text for token in row}) > 8


def test_merged_heads_too() -> None:
    """Two clusters of two key heads each, and the four queries that read them."""
    plan = uniform_plan(LLAMA, "qk", 0.5, "float32")
    one, eight = (cluster(model_on(LLAMA, *sizes), plan) for sizes in ((1, 1), (4, 2)))
    assert one.spec.layers[0].groups[0].queries == one.spec.layers[0].groups[0].values == 2
    (expected, text), (logits, tokens) = answers(one), answers(eight)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert tokens == text


def collectives(config: Architecture) -> list[Counter[str]]:
    """Of prefill and of decoding, on two devices for each part of a batch."""
    model = model_on(config, 4, 2)
    how, spec = model.how, model.spec
    params, keys = serving_params(model, how), jax.random.split(jax.random.key(0), 4)
    tokens, mask = how.layout.rows(pad_right([[3, 4, 5]] * 4, 0, 4))
    rule: Any = Sampling.checked(), jnp.int32(NEVER)
    reading = prefill.lower(config, spec, params, tokens, mask, keys, *rule, capacity=32, how=how).compile()
    state = reading(params, tokens, mask, keys, *rule)
    assert state.cache.layers[0][0].keys.sharding.spec == P("data", "model")
    writing = decode.lower(config, spec, params, state, jnp.int32(20), *rule, how=how).compile()
    pattern = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return [Counter(re.findall(pattern, program.as_text())) for program in (reading, writing)]


def test_grouped_heads_need_no_more_communication() -> None:
    """A device has the queries of its own keys: two sums a layer, as where every query has a key."""
    grouped = collectives(LLAMA)
    assert grouped == collectives(dataclasses.replace(LLAMA, num_kv_heads=8))
    assert grouped[0]["all-reduce"] >= 2 * LLAMA.num_layers
