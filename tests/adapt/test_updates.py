"""Which examples an update holds, and that its arrays say what the examples say."""

import jax
import numpy as np
import pytest

from chai_jax.adapt.updates import encode_examples, microbatches, pack_update, updates
from chai_jax.config import TrainConfig
from chai_jax.data.batches import Encoded, Example, encode
from chai_jax.errors import InputError

LENGTHS = np.random.default_rng(0).integers(2, 120, 301).tolist()


def test_every_epoch_uses_every_example_once() -> None:
    order = updates(LENGTHS, TrainConfig(batch=16, epochs=2))
    assert len(order) == 2 * 19
    for epoch in (order[:19], order[19:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(301))
        assert sorted(map(len, epoch)) == [13] + [16] * 18
    assert [one.tolist() for one in order[:19]] != [one.tolist() for one in order[19:]]


def test_order_follows_from_the_seed() -> None:
    def order(seed: int) -> list[list[int]]:
        return [one.tolist() for one in updates(LENGTHS, TrainConfig(batch=16, seed=seed))]

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_updates_are_of_like_lengths_but_come_in_any_order() -> None:
    order = updates(LENGTHS, TrainConfig(batch=16, epochs=1))
    longest = [max(LENGTHS[index] for index in one) for one in order]
    spread = [max(LENGTHS[index] for index in one) - min(LENGTHS[index] for index in one) for one in order]
    assert np.median(spread) < 15
    assert longest != sorted(longest)


def test_limits() -> None:
    examples = [Encoded((2, 5 + index), 1) for index in range(20)]
    assert len(updates(LENGTHS, TrainConfig(batch=16, max_steps=5))) == 5
    some = encode_examples(None, examples, TrainConfig(max_examples=7), 8)
    assert len(set(some)) == 7
    assert some != examples[:7]
    # What max_steps cannot reach is not even tokenized.
    assert len(encode_examples(None, examples, TrainConfig(batch=2, max_steps=3), 8)) == 6
    assert set(encode_examples(None, examples, TrainConfig(), 8)) == set(examples)


class Letters:
    """A tokenizer of single characters."""

    bos_token, bos_token_id = "</s>", 2

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [2] * add_special_tokens + [ord(letter) for letter in text]}


def test_text_is_tokenized_as_for_scoring_and_cut_to_the_model() -> None:
    for example, longest in ((Example("ab", " c"), 8), (Example("abcdef", "ghi"), 5), (Example("", "abcdef"), 4)):
        (found,) = encode_examples(Letters(), [example], TrainConfig(), longest)
        assert found == encode(Letters(), example.context, example.completion, longest, cut_completion=True)
        assert len(found.tokens) <= longest + 1


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no training examples"),
        ([Example("a", " b")], "no tokenizer"),
        ([Encoded((2,) * 10, 3)], "at most 9 tokens"),
        ([Encoded((2, 3), 2)], "an answer"),
    ],
)
def test_refuses(examples: list[Example | Encoded], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_examples(None, examples, TrainConfig(), 8)


def test_arrays_say_what_the_examples_say(examples: list[Encoded]) -> None:
    batch = pack_update(examples[:10], (3, 4), 32, 6)
    assert batch.tokens.shape == (3, 4, 16)
    assert batch.targets.shape == (3, 4, 8)
    for row, example in enumerate(examples[:10]):
        at = divmod(row, 4)
        length = len(example.tokens) - 1
        assert batch.mask[at].tolist() == [True] * length + [False] * (16 - length)
        assert batch.tokens[at][batch.mask[at]].tolist() == list(example.tokens[:-1])
        read = [
            (tuple(batch.tokens[at][: position + 1].tolist()), int(token))
            for position, token, weight in zip(batch.positions[at], batch.targets[at], batch.weights[at], strict=True)
            if weight == 1
        ]
        expected = [(example.tokens[:at], example.tokens[at]) for at in range(example.start, len(example.tokens))]
        assert read == expected
    for at in ((2, 2), (2, 3)):
        assert not batch.mask[at].any()
        assert not batch.weights[at].any()


def test_shares_of_the_rows_make_up_the_batch(examples: list[Encoded]) -> None:
    """Two processes, the second with the rows between the first's: together they pack what one would."""
    whole = pack_update(examples[:10], (3, 4), 32, 6)
    for share in ([0, 3], [1, 2]):
        part = pack_update(examples[:10], (3, 4), 32, 6, share)
        jax.tree.map(lambda all_rows, own, at=share: np.testing.assert_array_equal(own, all_rows[:, at]), whole, part)


def test_shapes_are_few() -> None:
    random = np.random.default_rng(0)
    for widest in (3, 80):
        shapes = set()
        for one in updates(LENGTHS, TrainConfig(batch=16)):
            encoded = [
                Encoded((5,) * LENGTHS[at], max(1, LENGTHS[at] - int(random.integers(1, widest + 1)))) for at in one
            ]
            batch = pack_update(encoded, (2, 8), 118, widest)
            shapes.add((batch.tokens.shape, batch.targets.shape))
        assert len(shapes) == 4  # inputs of 16, 32, 64 and 118


@pytest.mark.parametrize(
    ("batch", "accumulation", "devices", "expected"),
    [(64, 8, 1, (8, 8)), (64, 8, 8, (8, 8)), (64, 8, 16, (4, 16)), (10, 8, 1, (5, 2)), (3, 8, 8, (1, 8))],
)
def test_microbatches(batch: int, accumulation: int, devices: int, expected: tuple[int, int]) -> None:
    assert microbatches(TrainConfig(batch=batch, accumulation=accumulation), devices) == expected
