"""Rows that hold the examples of one context: what is in them, and when it is worth it."""

import numpy as np
import pytest

from chai_jax.data.batches import Encoded
from chai_jax.score.questions import MEMBERS, NONE, Tree, batches, most_rows, pack_questions, trees

CONTEXT = (2, 5, 6, 7, 8, 9)


def of(*answers: tuple[int, ...], context: tuple[int, ...] = CONTEXT) -> list[Encoded]:
    return [Encoded((*context, *answer), len(context)) for answer in answers]


def paths(tree: Tree) -> list[tuple[int, ...]]:
    """The tokens of each example, read back from its tree."""
    return [(*tree.shared, *tree.branches[way], last) for way, last in tree.alternatives]


def test_every_example_is_a_path_of_its_tree() -> None:
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(20):
        context = (2, *rng.integers(4, 7, rng.integers(1, 30)).tolist())
        encoded += of(*(tuple(rng.integers(4, 6, rng.integers(1, 9)).tolist()) for _ in range(3)), context=context)
    for width in (None, 16, 768):
        rows = trees(encoded, 64, width)
        found = {member: path for tree in rows for member, path in zip(tree.members, paths(tree), strict=True)}
        assert found == {index: example.tokens for index, example in enumerate(encoded)}
        assert [tree.width for tree in rows] == sorted((tree.width for tree in rows), reverse=True)


def test_one_row_holds_what_is_common_once() -> None:
    (tree,) = trees(of((10, 11, 12), (10, 13), (10, 11, 14), (10, 13)), 64, 768)
    assert (tree.shared, tree.branches) == ((*CONTEXT, 10), ((11,), ()))
    (questions,) = [pack_questions([tree], 2, 16, 4)]
    assert questions.tokens[0].tolist() == [*CONTEXT, 10, 11, *[0] * 8]
    assert questions.length.tolist() == [8, 0]
    assert questions.first.tolist() == [5, 0]
    assert questions.branch is not None
    assert questions.branch[0, :8].tolist() == [0] * 7 + [1]
    assert questions.targets[0, :4].tolist() == [
        [10, 10, 10, 10],  # behind the context
        [11, 11, 13, 13],  # behind the common token; members are ordered by input
        [12, 14, NONE, NONE],  # behind the branch
        [NONE] * 4,
    ]
    assert (questions.targets[1] == NONE).all()


def test_a_branch_that_costs_more_than_it_saves_stays_apart() -> None:
    """Texts that have only their </s> in common, and a row that would be too long."""
    rng = np.random.default_rng(1)
    texts = [Encoded((2, *rng.integers(4, 97, 40).tolist()), 1) for _ in range(8)]
    assert len(trees(texts, 2048, 16)) == 8
    answers = of(tuple(range(10, 20)), tuple(range(20, 30)))
    assert [tree.width for tree in trees(answers, 24, 768)] == [24]
    assert [tree.width for tree in trees(answers, 23, 768)] == [15, 15]


def test_no_row_holds_more_than_some_examples() -> None:
    """Every row has room for as many alternatives as the largest, so one context asked a thousand times is cut up."""
    often = trees(of(*((token % 90 + 4,) for token in range(1000))), 64, 768)
    assert [len(tree.members) for tree in often] == [MEMBERS] * 15 + [1000 % MEMBERS]
    many = trees(of(*((10, token % 90 + 4, 5) for token in range(70))), 2048, 768)
    assert max(len(tree.members) for tree in many) == 1


def test_inputs_that_are_equal_need_no_branches() -> None:
    (tree,) = trees(of((10,), (11,), (12,)), 64, None)
    questions = pack_questions([tree], 1, 16, 3)
    assert questions.branch is None
    assert questions.targets.tolist() == [[[10, 11, 12]]]


@pytest.mark.parametrize(("backend", "rows"), [("cpu", 96), ("tpu", 8192)])
def test_a_processor_is_given_fewer_rows_at_once(monkeypatch: pytest.MonkeyPatch, backend: str, rows: int) -> None:
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    assert most_rows(16) == rows
    assert most_rows(2048) == 1
    grown = trees(of(*((token,) for token in range(10, 40))), 64, None) * 100
    assert {count for _, count, _ in batches(grown, 10_000, 64, 1)} == {min(100, rows)}
