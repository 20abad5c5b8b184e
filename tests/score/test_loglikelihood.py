"""Log-likelihoods against one-by-one numpy arithmetic, and what batching must not change."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.score import loglikelihood as score
from chai_jax.score.questions import Questions, padded_length

CONFIG = Architecture(
    vocab_size=97, hidden_size=16, num_layers=2, num_heads=2, ffn_dim=32, max_positions=48, embed_dim=16
)


def random_model(seed: int, storage: str = "float32") -> Model:
    spec = Spec.dense(CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim, storage)
    return Model(CONFIG, spec, init(CONFIG, spec, jax.random.key(seed), std=0.4))


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(0)


@pytest.fixture(scope="module")
def examples() -> list[Encoded]:
    """Answers of one token, of many, of a whole text; the longest input fills every position."""
    rng = np.random.default_rng(0)
    shapes = [(17, 16), (2, 1), (49, 1), (49, 48), (33, 12), (17, 4), (33, 32), (33, 1), (2, 1), (49, 3)]
    return [Encoded(tuple(rng.integers(4, 97, length).tolist()), start) for length, start in shapes]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def answer_logprobs(model: Model, example: Encoded) -> np.ndarray:
    """Next-token log-probabilities [targets, V] of one example alone, unpadded."""
    return log_softmax(np.asarray(model(np.array([example.tokens[:-1]])))[0, example.start - 1 :])


def reference(model: Model, examples: list[Encoded]) -> np.ndarray:
    rows = []
    for example in examples:
        logprobs, targets = answer_logprobs(model, example), np.array(example.tokens[example.start :])
        chosen = logprobs[np.arange(len(targets)), targets]
        rows.append((chosen.sum(), float((logprobs.argmax(-1) == targets).all())))
    return np.array(rows)


def greedy_example(model: Model, context: tuple[int, ...], count: int) -> Encoded:
    """`context` continued greedily; what stands behind a token cannot change it, so one shape serves all steps."""
    tokens = list(context)
    for _ in range(count):
        padded = np.array([tokens + [1] * (16 - len(tokens))])
        tokens.append(int(np.asarray(model(padded))[0, len(tokens) - 1].argmax()))
    return Encoded(tuple(tokens), len(context))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Questions]:
    """The batches that `target_logprobs` was called with."""
    seen: list[Questions] = []
    compute = score.target_logprobs

    def record(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return compute(*arguments)

    monkeypatch.setattr(score, "target_logprobs", record)
    return seen


@pytest.mark.as_user
def test_loglikelihoods_equal_one_by_one_arithmetic(model: Model, examples: list[Encoded]) -> None:
    greedy = [greedy_example(model, (2, 9, 30), count) for count in (1, 4)]
    found = score.loglikelihoods(model, examples + greedy)
    expected = reference(model, examples + greedy)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4)
    np.testing.assert_array_equal(found[:, 1], expected[:, 1])
    assert found[-2:, 1].tolist() == [1, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batching_and_order_do_not_matter(model: Model, examples: list[Encoded], batch_size: int) -> None:
    order = np.random.default_rng(1).permutation(len(examples))
    found = score.loglikelihoods(model, [examples[index] for index in order], batch_size)
    np.testing.assert_allclose(found, score.loglikelihoods(model, examples)[order], rtol=1e-5)


def test_one_token_choices_share_a_forward_pass(model: Model, batches: list[Questions]) -> None:
    contexts = [(2, 5, 6), (2, 7, 8, 9)]
    choices = [Encoded((*context, answer), len(context)) for context in contexts for answer in (10, 20, 30)]
    longer = [Encoded((2, 5, 6, 10, 11), 3), Encoded((2, 5, 6, 10), 2)]
    questions = [*choices, greedy_example(model, contexts[0], 1), *longer]
    found = score.loglikelihoods(model, questions)
    rows = sum(int((np.asarray(batch.length) > 0).sum()) for batch in batches)
    assert rows == 3  # the context of two tokens has one of its own
    np.testing.assert_allclose(found, reference(model, questions), atol=1e-4)
    assert found[6, 1] == 1


@pytest.mark.parametrize(
    "storage", ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "int4"))]
)
def test_answers_of_one_context_share_it(batches: list[Questions], storage: str) -> None:
    """Longer answers branch off where they begin to differ; int4 takes in blocks of columns, and shares nothing."""
    rng, model = np.random.default_rng(3), random_model(0, storage)
    questions = []
    for length in (5, 9, 12):
        context, begins = (tuple(rng.integers(4, 97, count).tolist()) for count in (length, 2))
        ends = [tuple(rng.integers(4, 97, count).tolist()) for count in (6, 1, 3, 1, 1)]
        questions += [Encoded((*context, *begins, *end), length) for end in ends]
    questions += [questions[1], greedy_example(model, questions[0].tokens[:5], 4)]
    found = score.loglikelihoods(model, questions, batch_size=2)
    np.testing.assert_allclose(found, reference(model, questions), atol=2e-3 if storage == "int8" else 1e-4)
    assert found[-1, 1] == 1
    rows = sum(int((np.asarray(batch.length) > 0).sum()) for batch in batches)
    # Apart: of each context the three answers of one token have one input.
    assert rows == (3 * 3 + 1 if storage == "int4" else 3)


def test_batches_are_spread_over_all_devices(model: Model, examples: list[Encoded], batches: list[Questions]) -> None:
    score.loglikelihoods(model, examples)
    assert {len(batch.tokens.sharding.device_set) for batch in batches} == {jax.local_device_count()}
    assert all(not batch.tokens.sharding.is_fully_replicated for batch in batches)


def test_one_shape_compiles_once() -> None:
    model = random_model(0, "bfloat16")
    rng = np.random.default_rng(2)
    texts = [tuple(rng.integers(4, 97, length).tolist()) for length in rng.integers(35, 49, 40)]
    before = score.target_logprobs._cache_size()
    score.loglikelihoods(model, [Encoded(text, 1 + index % 30) for index, text in enumerate(texts)], batch_size=1)
    assert score.target_logprobs._cache_size() == before + 1


def test_lengths_fall_into_few_sizes() -> None:
    sizes = [padded_length(length, 100) for length in range(1, 101)]
    assert sorted(set(sizes)) == [16, 24, 32, 48, 64, 96, 100]
    assert all(size >= length for length, size in enumerate(sizes, start=1))


def test_logits_of_all_positions_never_exist(model: Model) -> None:
    tokens, targets = jnp.zeros((8, 48), jnp.int32), jnp.zeros((8, 48, 1), jnp.int32)
    questions = Questions(tokens, jnp.full(8, 48, jnp.int32), jnp.zeros(8, jnp.int32), targets)
    compute = partial(score.target_logprobs, CONFIG, model.spec, model.how)
    program = str(jax.make_jaxpr(compute)(model.params, questions))
    assert "f32[8,32,97]" in program  # HEAD_ROWS / 8 positions of each row
    assert "48,97]" not in program
    # One target a row: the head sees one position of each.
    short = dataclasses.replace(questions, first=questions.length - 1, targets=targets[:, :1])
    program = str(jax.make_jaxpr(compute)(model.params, short))
    assert "f32[8,1,97]" in program
    assert "f32[8,32,97]" not in program
    assert "f32[8,1,32]" in program  # so does the last layer's feed-forward


def test_short_answers_score_alike_alone_and_beside_long_ones(model: Model) -> None:
    short = [Encoded((2, 5, 6, at), 3) for at in range(7, 12)]
    beside = score.loglikelihoods(model, [*short, Encoded((2, 5, 6, 7, 8, 9), 2)])
    np.testing.assert_allclose(score.loglikelihoods(model, short), beside[:-1], atol=1e-5)


def test_scoring_reads_what_the_cache_stores(model: Model, examples: list[Encoded]) -> None:
    exact, damaged = (score.loglikelihoods(random_model(0, storage), examples)[:, 0] for storage in ("float32", "int8"))
    difference = np.abs(exact - damaged)
    assert 1e-4 < difference.max() < 5
    np.testing.assert_allclose(damaged[:1], reference(random_model(0, "int8"), examples[:1])[:, 0], atol=1e-3)


@pytest.mark.parametrize(
    "example", [Encoded((5, 6), 0), Encoded((5, 6), 2), Encoded(tuple([5] * 50), 3)], ids=["context", "answer", "long"]
)
def test_refuses_what_it_cannot_score(model: Model, example: Encoded) -> None:
    with pytest.raises(InputError, match="example 1 has"):
        score.loglikelihoods(model, [Encoded((2, 5, 6), 1), example])
