"""The clock: what is interleaved, counted and divided, with programs whose time is known."""

import dataclasses
import json
import time
from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from chai_jax.bench import race as bench
from chai_jax.bench.race import MEASURES, Shape, latency
from chai_jax.compress.quantize import with_storage
from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.score.loglikelihood import loglikelihoods

CONFIG = Architecture(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, ffn_dim=32, max_positions=48, embed_dim=16
)
SHAPE = Shape(batch=2, prompt=8, new_tokens=4, question=6)


@pytest.fixture(scope="module")
def model() -> Model:
    spec = Spec.dense(2, 2, 8)
    return Model(CONFIG, spec, init(CONFIG, spec, jax.random.key(0)))


@pytest.fixture(scope="module")
def records(model: Model) -> dict[str, dict[str, Any]]:
    return latency({"dense": model, "int8": with_storage(model, "int8")}, SHAPE, trials=4)


def test_each_record_says_what_was_timed_and_where(records: dict[str, dict[str, Any]]) -> None:
    for record in records.values():
        assert {key: record[key] for key in ("n", *vars(SHAPE))} == {"n": 4, **vars(SHAPE)}
        assert record["device"] == "cpu"
        assert record["dtype"] == "float32"
        assert record["compile_seconds"] > 0
        for measure in MEASURES:
            assert 0 < record[measure]["p10"] <= record[measure]["median"] <= record[measure]["p90"]
    assert json.loads(json.dumps(records)) == records


def test_bytes_are_those_of_real_arrays_beside_the_formula(model: Model, records: dict[str, dict[str, Any]]) -> None:
    for name, storage in (("dense", "float32"), ("int8", "int8")):
        found = records[name]["bytes"]
        assert found["kv"] == found["kv_formula"] == 2 * 16 * bytes_per_token(with_storage(model, storage).spec)
        assert found["weights"] == found["weights_resident"] == model.nbytes
        assert found["decode_peak"] >= found["weights"] + found["kv"]


class Sleeper:
    """Stands in for `Timed`: rounds of known length, written down in the order in which they come."""

    order: ClassVar[list[float]] = []
    bytes: ClassVar[dict[str, int]] = {}
    compile_seconds = 0.0

    def __init__(self, model: Any, shape: Shape, seed: int) -> None:
        self.speed, self.calls = model.speed, 0

    def score(self) -> tuple[float, None]:
        Sleeper.order.append(self.speed)
        self.calls += 1
        return SHAPE.batch * self.speed * self.calls, None

    def generate(self) -> tuple[float, float, None]:
        return 1.0, 2.0, None


def test_models_take_turns_and_ratios_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    @dataclasses.dataclass(frozen=True, eq=False)
    class Speed(Model):
        speed: float = 1.0

    monkeypatch.setattr(bench, "Timed", Sleeper)
    models = {name: Speed(CONFIG, model.spec, {}, speed=speed) for name, speed in (("a", 1.0), ("b", 3.0), ("c", 0.5))}
    found = latency(models, SHAPE, trials=5)
    assert Sleeper.order == [1.0, 3.0, 0.5] * 6  # a warm-up, and five rounds
    # The rounds last 2, 3, 4, 5, 6 times as long as the warm-up, yet each ratio is that of one round.
    assert found["a"]["score_ms_per_example"] == {"median": 4.0, "p10": 2.4, "p90": pytest.approx(5.6)}
    for name, ratio in (("a", 1.0), ("b", 3.0), ("c", 0.5)):
        of_score = found[name]["ratio_to_first"]["score_ms_per_example"]
        assert of_score == {"median": ratio, "p10": ratio, "p90": ratio}
        assert set(found[name]["ratio_to_first"]) == set(MEASURES)


def test_the_clock_waits_for_the_result_and_counts_milliseconds() -> None:
    def slow(x: np.ndarray) -> np.ndarray:
        time.sleep(0.05)
        return x

    shape = jax.ShapeDtypeStruct((3,), np.float32)
    run = jax.jit(lambda x: jax.pure_callback(slow, shape, x))
    run(np.ones(3, np.float32)).block_until_ready()
    milliseconds, result = bench.clock(lambda: run(np.ones(3, np.float32)))
    assert 50 <= milliseconds < 5000
    np.testing.assert_array_equal(result, np.ones(3))


def test_a_round_divides_by_examples_and_by_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "clock", lambda run: (120.0, run()))
    assert bench.lap(bench.Timed(model, SHAPE, seed=0), SHAPE) == [60.0, 120.0, 30.0]


def test_questions_are_scored_in_the_batches_that_scoring_makes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five questions two by two, the last row empty: the log-probabilities that `loglikelihoods` gives."""
    monkeypatch.setattr(bench, "most_rows", lambda length: 2)
    shape = dataclasses.replace(SHAPE, batch=5)
    timed = bench.Timed(model, shape, seed=0)
    assert [piece.length.tolist() for piece in timed.questions] == [[6, 6], [6, 6], [6, 0]]
    questions = shape.inputs(64, 0)[1].tolist()
    examples = [Encoded((*question, answer), 6) for question in questions for answer in bench.ANSWERS]
    expected = loglikelihoods(model, examples)[:, 0].reshape(5, 2)
    np.testing.assert_allclose(timed.score()[1], expected, atol=1e-5)


def test_a_shape_that_does_not_fit_the_positions_is_halved(model: Model) -> None:
    assert Shape(4, 30, 18).fit(48) == Shape(4, 30, 18)
    assert Shape(4, 30, 19, 50).fit(48) == Shape(4, 24, 24, 48)
    assert latency({"dense": model}, Shape(1, 40, 40), trials=1)["dense"]["prompt"] == 24


def test_refuses_what_cannot_be_compared(model: Model) -> None:
    other = model.replace(config=dataclasses.replace(CONFIG, vocab_size=65))
    for models in ({}, {"a": model, "b": other}):
        with pytest.raises(InputError, match="one vocabulary"):
            latency(models)
    halves = model.replace(execution=Execution.choose("bfloat16"))
    with pytest.raises(InputError, match="two dtypes"):
        latency({"a": model, "b": halves})
    with pytest.raises(InputError, match="trials is 0"):
        latency({"a": model}, trials=0)
