"""The floor under a measured time: bytes and FLOPs against counts by hand, and what the probe divides by what."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from chai_jax.bench import floor
from chai_jax.bench.floor import LeastWork, Rates, least_work, probe_rates, weights_read
from chai_jax.bench.race import MEASURES, Shape
from chai_jax.compress.quantize import store_weights, with_storage
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.model.sharding import Layout
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.spec import Spec

# D = 16, F = 32, V = 64, L = 2, H = 2, K = 8.
CONFIG = Architecture(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, ffn_dim=32, max_positions=48, embed_dim=16
)
SHAPE = Shape(batch=3, prompt=10, new_tokens=5, question=6)
LAYER = 4 * 16 * 16 + 2 * 16 * 32  # weights of a layer's matrices
VECTORS = 4 * 16 + 32 + 16 + 4 * 16  # biases of six maps, and two norms
WEIGHTS = 2 * (LAYER + VECTORS) + 2 * 16 + 64 * 16  # with the last norm and the head, without positions


@pytest.fixture(scope="module")
def model() -> Model:
    spec = Spec.dense(2, 2, 8)
    return Model(CONFIG, spec, init(CONFIG, spec, jax.random.key(0)), execution=Execution.choose("float32"))


def test_work_is_what_a_count_by_hand_gives(model: Model) -> None:
    """A step reads P + i columns at step i: 11 ... 15 here, 13 in the mean. Positions are looked up, row by row."""
    found = least_work(model, SHAPE)
    token, column = 2 * 2 * LAYER, 2 * 2 * 16 * 4  # FLOPs; keys and values of two layers in float32
    pair, head = 2 * 2 * (16 + 16), 2 * 64 * 16
    row = 16 * 4  # of the position table
    assert set(found) == set(MEASURES)
    step = found["decode_ms_per_token"]
    assert step.bytes == 4 * WEIGHTS + 3 * row + 3 * 13 * column
    assert step.flops == 3 * (token + 13 * pair + head)
    read = found["prefill_ms"]
    assert read.bytes == 4 * WEIGHTS + 30 * row + 3 * 10 * column
    # In the last layer nine of ten tokens need keys and values alone, and one reads the ten columns.
    less, last = 2 * (LAYER - 2 * 16 * 16), pair / 2
    assert read.flops == 3 * (10 * token - 9 * less + 55 * pair - 45 * last + head)
    scored = found["score_ms_per_example"]
    assert scored.bytes == pytest.approx((4 * WEIGHTS + 18 * row) / 3)
    assert scored.flops == 6 * token - 5 * less + 21 * pair - 15 * last + head


def test_grouped_heads_gates_and_windows_by_hand() -> None:
    """Of four query heads two are cached; the second layer's steps read 11, 12, 12, 12, 12 columns of 11 ... 15."""
    config = Architecture(
        *(64, 16, 2, 4, 24, 48, 16), num_kv_heads=2, head_size=8, norm="rms", gated=True, bias=False, tied=False,
        activation="silu", rotary=Rotary(), position_offset=0, windows=(0, 12), family="llama",
    )  # fmt: skip
    spec = Spec.of(config)
    model = Model(config, spec, init(config, spec, jax.random.key(0)), execution=Execution.choose("float32"))
    found = least_work(model, SHAPE)
    layer, column, pair = 16 * (32 + 16 + 16) + 32 * 16 + 3 * 16 * 24, 2 * 2 * 8 * 4, 2 * 4 * (8 + 8)
    weights, row, head = 2 * (layer + 2 * 16) + 16 + 64 * 16, 16 * 4, 2 * 64 * 16  # no positions; tokens are looked up
    step = found["decode_ms_per_token"]
    assert step.bytes == pytest.approx(4 * weights + 3 * row + 3 * (13 + 11.8) * column)
    assert step.flops == pytest.approx(3 * (2 * 2 * layer + (13 + 11.8) * pair + head))
    read = least_work(model, Shape(batch=3, prompt=20, new_tokens=5, question=6))["prefill_ms"]
    assert read.bytes == 4 * weights + 60 * row + 3 * 20 * 2 * column
    # 20 tokens and those before: 210 pairs, within 12: 78 + 8 x 12; in the last layer the newest token's alone.
    saved = 19 * 2 * (layer - 2 * 16 * 16)
    assert read.flops == 3 * (20 * 2 * 2 * layer - saved + (210 + 12) * pair + head)


def test_int8_caches_and_half_precision_move_less(model: Model) -> None:
    in_half = model.replace(execution=Execution.choose("bfloat16"))
    dense, half, small = (
        least_work(one, SHAPE)["decode_ms_per_token"] for one in (model, in_half, with_storage(model, "int8"))
    )
    vectors = 2 * (VECTORS - 3 * 16) + 2 * 16  # stay float32; biases [H, K] count as matrices
    assert dense.bytes - half.bytes == 2 * (WEIGHTS - vectors) + 3 * 16 * 2
    # Of 16 bytes a head, column and side 8 + 2 are left: 32 - 10, times layers, heads and sides.
    assert dense.bytes - small.bytes == 3 * 13 * (2 * 2 * 2 * (32 - 10))
    assert dense.flops == half.flops == small.flops


def test_weights_are_counted_as_they_lie_in_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU int8 weights are multiplied as floats; where they stay int8, with a scale a column, they are fewer."""
    layers = {name: store_weights(layer, "int8") for name, layer in model.params["layers"].items()}
    small = model.replace(params={**model.params, "layers": layers})
    assert weights_read(small, 1) == weights_read(model, 1) == 4 * WEIGHTS + 64
    monkeypatch.setattr(Layout, "platform", "tpu")
    scales = 3 * 16 + 16 + 32 + 16
    assert weights_read(model, 1) - weights_read(small, 1) == 2 * (3 * LAYER - 4 * scales)


def test_an_untied_embedding_is_looked_up() -> None:
    config = Architecture(64, 16, 2, 2, 32, 48, 16, tied=False)
    spec = Spec.dense(2, 2, 8)
    model = Model(config, spec, init(config, spec, jax.random.key(0)))
    assert weights_read(model, 5) == 4 * WEIGHTS + 2 * 5 * 64
    assert weights_read(model, 1000) == model.nbytes  # no more than all of it


def test_the_floor_is_the_slower_of_two_and_says_which() -> None:
    rates = Rates(bytes_per_second=100.0, flops_per_second=1000.0, dtype="float32")
    assert LeastWork(50, 100).floor(rates) == {"ms": 500.0, "bound": "memory", "bytes": 50, "flops": 100}
    assert LeastWork(50, 2000).floor(rates) == {"ms": 2000.0, "bound": "compute", "bytes": 50, "flops": 2000}
    other = Rates(200.0, 10.0, "float32")
    assert rates.best(other) == Rates(200.0, 1000.0, "float32")
    assert Rates.typical([rates, other, Rates(150.0, 20.0, "float32")]) == Rates(150.0, 20.0, "float32")


def test_the_probe_divides_what_it_moved_and_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    real = probe_rates(jnp.float32, (256, 64), seconds=0.0)
    assert real.bytes_per_second > 0
    assert real.flops_per_second > 0
    assert real.dtype == "float32"
    times = iter([4.0, 0.5, 2.0])  # the vector, the sum, the square

    def fixed(function: Callable[..., Any], seconds: float, *args: Any) -> float:
        return next(times)

    monkeypatch.setattr(floor, "_best", fixed)
    assert probe_rates(jnp.float32, (256, 64)) == Rates(256 * 256 * 4 / 0.5, 2 * 64**3 / 2.0, "float32")
