"""Tokens of (context, completion) against those of the lm-evaluation-harness."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from chai_jax.data.batches import Encoded, encode
from chai_jax.errors import InputError

PAIRS = [
    ("a gorgeous , witty film . \nQuestion:", " negative"),
    ("a film", " positive film film"),
    ("trailing spaces  ", "film"),
    ("line break \n", " film"),
    ("only a completion's space ", " "),
    ("", " positive film"),
    ("", "</s> film"),
    ("</s>a film", " film"),
    ("   ", "film"),
    ("é, ü and 電影 are more tokens than letters", " 電影"),
]


@pytest.fixture(scope="module")
def scored(bpe: Any) -> Callable[..., tuple[list[int], list[int]]]:
    """`scored(context, completion, longest)`: what the harness feeds a model, and the tokens it sums the scores of."""
    api = pytest.importorskip("lm_eval.api.model")
    from lm_eval.api.instance import Instance

    class Recorder(api.TemplateLM):  # type: ignore[misc,name-defined]
        """The harness's template with the tokens of its Hugging Face model, whose module wants accelerate."""

        eot_token_id = prefix_token_id = 2
        generate_until = loglikelihood_rolling = None

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = not string.startswith("</s>") if add_special_tokens is None else add_special_tokens
            ids: list[int] = bpe.encode(string, add_special_tokens=special)
            return ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            return [(context, continuation) for _, context, continuation in requests]

    def tokens(context: str, completion: str, longest: int = 1000) -> tuple[list[int], list[int]]:
        request = Instance("loglikelihood", {}, (context, completion), 0)
        ((before, after),) = Recorder().loglikelihood([request], disable_tqdm=True)
        # The two lines of HFLM._loglikelihood_tokens that cut.
        assert len(after) <= longest
        return (before + after)[-(longest + 1) :][:-1], after

    return tokens


@pytest.mark.parametrize(("context", "completion"), PAIRS)
def test_tokens_are_the_harness_s(scored: Any, bpe: Any, context: str, completion: str) -> None:
    encoded = encode(bpe, context, completion)
    assert (list(encoded.tokens[:-1]), list(encoded.tokens[encoded.start :])) == scored(context, completion)
    assert encoded.tokens[0] == 2


@pytest.mark.parametrize("longest", [4, 5, 8, 12, 13, 14, 40])
def test_a_long_context_is_cut_as_in_the_harness(scored: Any, bpe: Any, longest: int) -> None:
    context, completion = "a gorgeous , witty film .", " positive or negative"
    encoded = encode(bpe, context, completion, longest)
    expected = scored(context, completion, longest)
    assert (list(encoded.tokens[:-1]), list(encoded.tokens[encoded.start :])) == expected


def test_what_is_scored_is_the_completion(bpe: Any) -> None:
    encoded = encode(bpe, "a witty film. ", "positive")
    assert bpe.decode(encoded.tokens[encoded.start :]) == " positive"
    assert bpe.decode(encoded.tokens[1 : encoded.start]) == "a witty film."


def test_a_text_alone_is_predicted_but_for_its_beginning(bpe: Any) -> None:
    whole = bpe("a gorgeous , witty film")["input_ids"]
    assert encode(bpe, "", "a gorgeous , witty film") == Encoded(tuple(whole), 1)
    assert encode(bpe, "", "a gorgeous , witty film", 3, cut_completion=True) == Encoded(tuple(whole[-4:]), 1)
    assert encode(bpe, "", "a gorgeous , witty film", len(whole) - 1) == Encoded(tuple(whole), 1)
    with pytest.raises(InputError, match=f"has {len(whole) - 1} tokens; expected at most the model's {len(whole) - 2}"):
        encode(bpe, "", "a gorgeous , witty film", len(whole) - 2)


def test_a_tokenizer_that_puts_nothing_first_is_helped(bpe: Any) -> None:
    class Bare:
        bos_token, bos_token_id = bpe.bos_token, bpe.bos_token_id
        eos_token, eos_token_id = bpe.eos_token, bpe.eos_token_id

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> Any:
            return bpe(text, add_special_tokens=False, verbose=verbose)

    assert encode(Bare(), "", " film") == encode(bpe, "", " film")


@pytest.mark.parametrize("context", ["", "   "])
def test_what_stands_before_where_nothing_does(bpe: Any, bare: Any, context: str) -> None:
    """The beginning of text or else its end, once; a tokenizer that names neither cannot say."""
    ids = bare(f"{context}film film")["input_ids"]
    for names in ({"bos_token": "</s>"}, {"eos_token": "</s>"}, {"bos_token": "<s>", "eos_token": "</s>"}):
        tokenizer = type(bare)(tokenizer_object=bare.backend_tokenizer, **names)
        first = 0 if names["bos_token" if "bos_token" in names else "eos_token"] == "<s>" else 2
        assert encode(tokenizer, context, "film film") == Encoded((first, *ids), 1)
    with pytest.raises(InputError, match="names no beginning-of-text token and no end-of-text token"):
        encode(bare, context, "film film")


def test_a_tokenizer_without_special_tokens_reads_what_the_harness_reads(bare: Any) -> None:
    for context, completion in PAIRS:
        if context.strip():
            whole = bare(context + completion)["input_ids"]
            assert encode(bare, context, completion) == Encoded(tuple(whole), len(bare(context.rstrip())["input_ids"]))


def test_half_a_character_is_refused(bpe: Any) -> None:
    with pytest.raises(InputError, match="which is no character"):
        encode(bpe, "film", " \udcff")


@pytest.mark.parametrize("context", ["a film", ""])
def test_a_completion_without_tokens_is_refused(bpe: Any, context: str) -> None:
    with pytest.raises(InputError, match="no tokens of its own"):
        encode(bpe, context, "")


def test_a_completion_that_does_not_fit_is_refused(bpe: Any) -> None:
    tokens = encode(bpe, "a", " positive or negative")
    answer = len(tokens.tokens) - tokens.start
    assert encode(bpe, "a", " positive or negative", answer).start == 1
    with pytest.raises(InputError, match=f"has {answer} tokens; expected at most the model's {answer - 1} positions"):
        encode(bpe, "a", " positive or negative", answer - 1)


def test_a_completion_to_learn_from_keeps_its_end(bpe: Any) -> None:
    whole = encode(bpe, "a", " positive or negative")
    cut = encode(bpe, "a", " positive or negative", 2, cut_completion=True)
    assert cut == Encoded(whole.tokens[-3:], 1)
    assert encode(bpe, "a", " positive or negative", 99, cut_completion=True) == whole


def test_a_long_text_is_no_news(bpe: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "deprecation_warnings", {})  # it warns but once
    logging.getLogger("transformers").addHandler(caplog.handler)
    encode(bpe, "film " * 100, "film")
    assert not caplog.records
