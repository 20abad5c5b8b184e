"""The engine's texts are `generate`'s, whatever else it does: slots, pieces, formats, kept prefixes, cancelling."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.compress.quantize import with_storage
from chai_jax.errors import InputError
from chai_jax.model.cache import cache_bytes
from chai_jax.model.execution import Execution
from chai_jax.model.generation import Generation
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.model.sharding import one_device
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.serve.batch import numbers
from chai_jax.serve.engine import Engine
from chai_jax.serve.generate import generate_tokens
from chai_jax.serve.job import Closing, Ended, Event, Full, Made, Ticket, Token, Wanted
from chai_jax.serve.slots import PIECES, capacity_of, pieces

CONFIG = Architecture(
    vocab_size=260, hidden_size=32, num_layers=2, num_heads=4, ffn_dim=64, max_positions=640, embed_dim=32
)


@pytest.fixture(scope="module")
def model() -> Model:
    """Random, with embeddings large enough that the text goes somewhere; some tokens end texts."""
    params = init(CONFIG, Spec.dense(2, 4, 8), jax.random.key(0), std=0.2)
    generation = Generation({"eos_token_id": [2, 7, 19, 33, 200]})
    how = Execution.choose(layout=one_device())
    return Model(CONFIG, Spec.dense(2, 4, 8), params, generation=generation, execution=how)


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.ended: Ended | None = None
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        assert self.ended is None
        if isinstance(event, Made):
            self.tokens += event.tokens
        else:
            self.ended = event
            self.over.set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def engine(model: Model, slots: int, context: int = 256, **options: Any) -> Engine:
    """With room for so many slots of the first format, driven by hand."""
    first = with_storage(model, options["adaptive"][0]) if "adaptive" in options else model
    rows = slots + 1 + options.get("prefixes", 0)
    made = Engine(first, rows * cache_bytes(first.spec, 1, capacity_of(context)), context, **options)
    made.batch.reset()
    return made


def ask(engine: Engine, wanted: Wanted, **options: Any) -> tuple[Ticket, Heard]:
    heard = Heard()
    return engine.submit(wanted, heard, **options), heard


def run(engine: Engine, until: Callable[[], bool] | None = None) -> None:
    for _ in range(5000):
        if (until or (lambda: not engine._busy()))():
            return
        engine.turn()
    raise AssertionError("the engine does not end")


def alone(model: Model, wanted: Wanted) -> list[int]:
    settings = {"temperature": wanted.temperature, "top_k": wanted.top_k, "top_p": wanted.top_p}
    (made,) = generate_tokens(
        model, [list(wanted.prompt)], wanted.max_new_tokens, **settings, seed=wanted.seed, stop=wanted.stop
    )  # type: ignore[arg-type]
    return made


def mixed(count: int, longest: int, new: int, seed: int = 0) -> list[Wanted]:
    """Requests of all kinds: short and long, greedy and drawn, that stop and that do not; of few shapes, which
    `generate` compiles one by one."""
    random = np.random.default_rng(seed)
    settings = [{}, {}, {"temperature": 0.9, "top_p": 0.8}, {"temperature": 1.0, "top_k": 5}]
    return [
        Wanted(
            tuple(random.integers(3, 260, [5, longest][number % 2] - number % 3).tolist()), [new, 5][number // 2 % 2],
            seed=number, stop=bool(random.integers(2)), alternatives=int(random.integers(3)), **settings[number % 4],
        )
        for number in range(count)
    ]  # fmt: skip


FORMS: dict[str, Callable[[Model], Model]] = {
    "float32": lambda model: model,
    "int8": lambda model: with_storage(model, "int8"),
    "k4v3": lambda model: with_storage(model, "k4v3"),
}


@pytest.mark.parametrize("form", ["float32", pytest.param("int8", marks=pytest.mark.slow), "k4v3"])
def test_texts_are_those_of_generate_whatever_else_is_in_the_batch(model: Model, form: str) -> None:
    """More requests than slots, so that slots are taken again and again; prompts of several pieces among them."""
    model = FORMS[form](model)
    served, asked = engine(model, slots=3, context=600), mixed(6, 500, 20)
    heard = [ask(served, wanted)[1] for wanted in asked]
    run(served)
    for wanted, each in zip(asked, heard, strict=True):
        expected = alone(model, wanted)
        assert each.ids == expected
        assert each.ended is not None
        stopped = wanted.stop and expected[-1] in model.stop_tokens
        assert each.ended.why == ("stop" if stopped else "length")
        assert {token.format for token in each.tokens} == {form}
        assert {len(token.alternatives) for token in each.tokens} == {wanted.alternatives}
    assert served.batch.running == 0


def test_pieces_of_a_prompt_fit_behind_one_another() -> None:
    for start, stop in ((0, 1), (0, 256), (0, 257), (64, 256), (192, 700), (128, 256), (256, 300)):
        cut = pieces(start, stop)
        assert [first for first, _ in cut] == [start, *(last for _, last in cut[:-1])]
        assert cut[-1][1] == stop
        for first, last in cut:
            size = next(size for size in PIECES if size >= last - first)
            assert first + size <= capacity_of(stop)
    assert [capacity_of(context) for context in (1, 64, 65, 256, 257)] == [64, 64, 128, 256, 512]


def test_logprobs_are_the_models(model: Model) -> None:
    served = engine(model, slots=2)
    wanted = Wanted((2, 70, 80, 90), 9, temperature=1.5, seed=3, stop=False, alternatives=4)
    _, heard = ask(served, wanted)
    ask(served, Wanted((5,), 4, stop=False))
    run(served)
    tokens = np.asarray([[*wanted.prompt, *heard.ids]])
    expected = jax.nn.log_softmax(model(tokens)[0], axis=-1)
    for at, token in enumerate(heard.tokens, len(wanted.prompt) - 1):
        assert token.logprob == pytest.approx(float(expected[at, token.id]), abs=1e-4)
        ids, logprobs = zip(*token.alternatives, strict=True)
        np.testing.assert_allclose(logprobs, np.sort(expected[at])[::-1][:4], atol=1e-4)
        np.testing.assert_allclose(expected[at][np.asarray(ids)], logprobs, atol=1e-4)


def test_there_are_as_many_slots_as_are_needed(model: Model) -> None:
    assert numbers(1) == [1]
    assert numbers(4) == [4]
    assert numbers(6) == [4, 6]
    assert numbers(64) == [4, 8, 16, 32, 64]
    served = engine(model, slots=6)
    long = [ask(served, Wanted((number + 3,), 250, stop=False)) for number in range(6)]
    run(served, lambda: served.batch.running == 6)
    assert len(served.batch.jobs) == 6
    for ticket, _ in long[:5]:
        ticket.cancel()
    run(served)
    assert len(served.batch.jobs) < 6
    assert long[5][1].ids == alone(model, Wanted((8,), 250, stop=False))


def test_a_cancelled_request_frees_its_slot_within_one_turn(model: Model) -> None:
    served = engine(model, slots=1)
    first, heard = ask(served, Wanted((3, 4), 200, stop=False))
    _, second = ask(served, Wanted((5, 6), 5, stop=False))
    waiting, third = ask(served, Wanted((7, 8), 5))
    run(served, lambda: len(heard.tokens) >= 3)
    first.cancel()
    waiting.cancel()
    served.turn()
    assert heard.ended == Ended("cancelled")
    assert third.ended == Ended("cancelled")
    assert second.tokens
    run(served)
    assert second.ids == alone(model, Wanted((5, 6), 5, stop=False))


def test_a_listener_that_fails_harms_nobody(model: Model) -> None:
    served = engine(model, slots=2)

    def fails(event: Event) -> None:
        raise OSError("gone")

    served.submit(Wanted((3, 4), 50), fails)
    _, heard = ask(served, Wanted((5, 6), 5, stop=False))
    run(served)
    assert len(heard.tokens) == 5


@pytest.mark.parametrize("form", ["float32", pytest.param("k4v3", marks=pytest.mark.slow)])
def test_kept_prefixes_change_no_text(model: Model, form: str) -> None:
    model = FORMS[form](model)
    served, random = engine(model, slots=2, context=600, prefixes=2), np.random.default_rng(1)
    system = tuple(random.integers(3, 260, 300).tolist())
    asked = [Wanted((*system, *random.integers(3, 260, number + 1).tolist()), 12) for number in range(4)]
    asked.append(Wanted((*system[:150], 9, 9), 12))
    asked.append(Wanted(system[:256], 12))  # the last token has to be read for the first new one
    for number, wanted in enumerate(asked):
        _, heard = ask(served, wanted)
        run(served)
        assert heard.ids == alone(model, wanted)
        assert heard.ended is not None
        assert heard.ended.reused == [0, 0, 256, 256, 128, 192][number]
    status = served.status()
    assert status.reused == 832
    assert status.kv_bytes <= status.kv_limit


def test_precision_follows_the_load(model: Model) -> None:
    formats = ("float32", "int8", "k4v4")
    served = engine(model, slots=2, adaptive=formats)
    rooms = [of.slots for of in served.rooms]
    assert rooms[0] == 2 < rooms[1] < rooms[2]
    few = [ask(served, Wanted((number + 3, 5), 60, stop=False)) for number in range(2)]
    run(served, lambda: all(heard.tokens for _, heard in few))
    assert served.status().format == "float32"
    many = [ask(served, Wanted((number + 10, 5), 40, stop=False)) for number in range(rooms[1] + 1)]
    run(served, lambda: served.status().running > rooms[1])
    assert served.status().format == "k4v4"
    assert served.status().kv_bytes <= served.status().kv_limit
    run(served)
    for _, heard in (*few, *many):
        assert len(heard.tokens) in (40, 60)
        used = [token.format for token in heard.tokens]
        assert used == sorted(used, key=formats.index)  # only towards fewer bits while the load rises
    assert {token.format for token in few[0][1].tokens} >= {"float32", "k4v4"}
    # What was made wholly in one format is what that format gives.
    for number, (_, heard) in enumerate(many):
        if (used := {token.format for token in heard.tokens}) == {"k4v4"}:
            expected = alone(with_storage(model, "k4v4"), Wanted((number + 10, 5), 40, stop=False))
            assert heard.ids == expected
    _, last = ask(served, Wanted((3, 5), 250, stop=False))
    run(served)
    assert served.status().format == "float32"
    assert last.tokens[-1].format == "float32"


def test_limits_of_the_queue_of_time_and_of_the_engine(model: Model) -> None:
    served = engine(model, slots=1, most_queued=2)
    _, late = ask(served, Wanted((3,), 200, stop=False), seconds=0.0)
    ask(served, Wanted((3,), 2))
    with pytest.raises(Full, match="2 requests wait already"):
        ask(served, Wanted((3,), 2))
    run(served)
    assert late.ended == Ended("late")
    served.start(warm=False)
    _, heard = ask(served, Wanted((3,), 200, stop=False))
    while not heard.tokens:
        assert not heard.over.wait(0.01)
    served.close(grace=0.0)
    assert heard.ended == Ended("cut")
    with pytest.raises(Closing):
        ask(served, Wanted((3,), 2))


def test_what_runs_may_end_before_the_engine_does(model: Model) -> None:
    served = engine(model, slots=1)
    served.start(warm=False)
    heard = [ask(served, Wanted((3,), 20, stop=False))[1] for _ in range(3)]
    served.close(grace=60.0)
    assert [len(each.tokens) for each in heard] == [20, 20, 20]


def test_after_a_failure_others_are_answered(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine(model, slots=1)
    served.start(warm=False)
    real = served.batch.step

    def fails(most: int) -> Any:
        monkeypatch.setattr(served.batch, "step", real)
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(served.batch, "step", fails)
    _, lost = ask(served, Wanted((3,), 20, stop=False))
    _, heard = ask(served, Wanted((4,), 20, stop=False))
    assert lost.over.wait(60)
    assert heard.over.wait(60)
    served.close()
    assert lost.ended == Ended("failed")
    assert heard.ids == alone(model, Wanted((4,), 20, stop=False))


def test_after_a_warm_up_nothing_is_compiled(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    spec = Spec.dense(2, 4, 8, "bfloat16")  # no other test's
    other = model.replace(spec=spec)
    served = engine(other, slots=3, context=512, prefixes=1, adaptive=("bfloat16", "int8"))
    with jax.log_compiles():
        served.start()
        caplog.clear()
        heard = [ask(served, wanted)[1] for wanted in mixed(12, 400, 30)]
        system = tuple(range(10, 200))
        heard += [ask(served, Wanted((*system, number + 3), 100))[1] for number in range(8)]
        assert all(each.over.wait(120) for each in heard)
        served.close()
    compiled = [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()]
    assert compiled == []
    assert served._reused > 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted((), 3), "no tokens"),
        (Wanted((3, 300), 3), "outside 0 to 259"),
        (Wanted((3,) * 200, 58), "200 tokens and 58 are to be made; the context is 256"),
        (Wanted((3,), 0), "max_new_tokens is 0"),
        (Wanted((3,), 3, temperature=-1.0), "temperature is -1.0"),
        (Wanted((3,), 3, temperature=1.0, top_p=0.0), "top_p is 0.0"),
        (Wanted((3,), 3, seed=-1), "seed is -1"),
        (Wanted((3,), 3, alternatives=21), "expected 0 to 20"),
    ],
)
def test_what_cannot_be_is_refused(model: Model, wanted: Wanted, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask(engine(model, slots=1), wanted)


def test_the_longest_text_that_fits(model: Model) -> None:
    served = engine(model, slots=1)
    wanted = Wanted((3,) * 200, 57, stop=False)
    _, heard = ask(served, wanted)
    run(served)
    assert heard.ids == alone(model, wanted)


def test_memory_that_holds_no_sequence_is_refused(model: Model) -> None:
    each = cache_bytes(model.spec, 1, 256)
    with pytest.raises(InputError, match="holds 1 sequences of 256 tokens"):
        Engine(model, 2 * each - 1, 256)
    with pytest.raises(InputError, match="--context is 641; expected 1 to the model's 640"):
        Engine(model, 10 * each, 641)
    with pytest.raises(InputError, match="--adaptive: float32 holds"):
        Engine(model, 10 * each, 256, adaptive=("int8", "float32"))


def test_bytes_are_those_of_the_arrays(model: Model) -> None:
    served = engine(dataclasses.replace(model, spec=with_storage(model, "int8").spec), slots=4)
    for number in range(4):
        ask(served, Wanted((number + 3,), 50, stop=False))
    run(served, lambda: served.batch.running == 4)
    assert served.status().kv_bytes == served.batch.nbytes
    run(served)
