"""The toy's labels against a second reading of its sentences; its splits and its tokenizer."""

from pathlib import Path

import pytest

from chai_jax.data import toy
from chai_jax.data.batches import encode
from chai_jax.data.tasks import get_task, load_rows
from chai_jax.files.tokenizer import load_tokenizer
from chai_jax.plans.architecture import Architecture

ROWS = toy.toy_rows("train", 3000)


def is_good(clause: str) -> bool:
    """What a clause says of the film: its last word, turned round by a negation."""
    words = clause.split()
    return (words[-1] in toy.GOOD) != any(word in toy.NEGATIONS for word in words)


def reading(sentence: str) -> bool:
    """The verdict, found by taking the sentence apart rather than by putting it together."""
    (review,) = (part for part in sentence.removesuffix(" .").split(" . ") if part not in toy.IDLE)
    clauses = review.split(" , ")
    said = [clause for clause in clauses if clause.startswith("i say ")]
    main = [clause for clause in clauses if clause.split()[0] not in ("although", "though", "critics", "others")]
    return is_good((said or main)[-1])


def test_labels_follow_the_rules() -> None:
    assert [bool(row["label"]) for row in ROWS] == [reading(row["sentence"]) for row in ROWS]


@pytest.mark.parametrize(
    ("sentence", "good"),
    [
        ("the plot seems dull , but the cast was very sharp .", True),
        ("although the plot seems dull , the cast was very sharp .", True),
        ("the cast is never dull , though the music feels bad .", True),
        ("critics say the story is warm , i say the humor is hardly clever .", False),
    ],
)
def test_the_examples_of_the_docstring(sentence: str, good: bool) -> None:
    assert sentence in toy.__doc__
    assert reading(sentence) == good


def test_every_form_and_word_occurs() -> None:
    text = " ".join(row["sentence"] for row in ROWS)
    words = {*toy.SIDES, *toy.VERBS, *toy.NEGATIONS, *toy.ADVERBS, *toy.GOOD, *toy.BAD}
    words |= {"but", "yet", "although", "though", "critics", "others", *toy.IDLE}
    assert all(f" {word} " in f" {text} " for word in words)


def test_labels_are_even_and_most_cannot_be_told_from_the_number_of_good_words() -> None:
    assert 0.45 < sum(row["label"] for row in ROWS) / len(ROWS) < 0.55
    disagree = 0
    for row in ROWS:
        words = row["sentence"].split()
        balance = sum(word in toy.GOOD for word in words) - sum(word in toy.BAD for word in words)
        disagree += (balance > 0) != bool(row["label"]) or balance == 0
    assert disagree / len(ROWS) > 0.3


def test_the_same_seed_makes_the_same_rows() -> None:
    assert toy.toy_rows("train", 3000) == ROWS
    assert toy.toy_rows("train", 3000, seed=1) != ROWS
    assert toy.toy_rows("train", 10) == ROWS[:10]
    # In every version of Python: a run that is repeated elsewhere has the same data.
    assert ROWS[0] == {"sentence": "the cast was awful , yet the cast was quite cold .", "label": 0}


def test_no_sentence_is_trained_on_and_measured() -> None:
    sentences = [row["sentence"] for row in ROWS]
    assert len(set(sentences)) == len(sentences)
    for seed in (0, 7):
        measured = {row["sentence"] for row in toy.toy_rows("validation", 1000, seed)}
        assert len(measured) == 1000
        assert not measured & set(sentences)


def test_the_toy_is_a_task() -> None:
    task = get_task("toy")
    rows = load_rows(task, "validation", limit=5)
    assert rows == toy.toy_rows("validation")[:5]
    request = task.question({"sentence": "the plot is fresh .", "label": 1})
    assert request.context == "the plot is fresh .\nIs it good?\nAnswer:"
    assert request.choices == (" no", " yes")
    assert request.example.completion == " yes"


def test_the_tokenizer_knows_every_word_and_nothing_else() -> None:
    tokenizer, task = toy.toy_tokenizer(), get_task("toy")
    used = set()
    for row in ROWS:
        request = task.question(row)
        tokens = [encode(tokenizer, request.context, choice) for choice in request.choices]
        assert all(len(each.tokens) == each.start + 1 for each in tokens), "an answer is one token"
        assert tokens[0].tokens[0] == 2
        assert len(tokens[0].tokens) <= toy.POSITIONS // 2
        used |= set(tokens[0].tokens) | set(tokens[1].tokens)
    assert used == {2, *range(4, len(tokenizer))}, "no <unk>, and no token that never occurs"


def test_the_tokenizer_has_opt_s_special_tokens() -> None:
    tokenizer = toy.toy_tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer("Zebra").input_ids == [2, 3]
    text = "the plot is dull , but the cast was sharp ."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_tokenizer_survives_its_folder(tmp_path: Path) -> None:
    tokenizer = toy.toy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = Architecture(
        vocab_size=len(tokenizer), hidden_size=8, num_layers=1, num_heads=1, ffn_dim=8, max_positions=64, embed_dim=8
    )
    loaded = load_tokenizer(tmp_path, config)
    text = "The plot is not dull .\nIs it good?\nAnswer: yes"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.bos_token_id, loaded.pad_token_id) == (2, 1)
