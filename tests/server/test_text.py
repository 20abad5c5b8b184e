"""The pieces of a text are the text, whatever bytes its tokens are; what may become a stop string waits."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chai_jax.server.text import Pieces, Stops, TokenTexts


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    pieces = Pieces(tokenizer, frozenset(tokenizer.all_special_ids))
    return [*(pieces.add(token) for token in tokens), pieces.rest()]


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode([*tokens], skip_special_tokens=True))


@given(tokens=st.lists(st.sampled_from([2, *(4 + byte for byte in b"a \xff\x80\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80")])))
@settings(deadline=None, max_examples=150)
def test_pieces_of_bytes_are_the_text(fake: ModuleType, tokens: list[int]) -> None:
    tokenizer = fake.ByteTokenizer()
    assert "".join(pieces_of(tokenizer, tokens)) == decoded(tokenizer, tokens)


def test_a_character_comes_with_its_last_byte(fake: ModuleType) -> None:
    assert pieces_of(fake.ByteTokenizer(), fake.said("a€b")) == ["a", "", "", "€", "b", ""]
    # Bytes that never become one do not hold up what follows.
    broken = pieces_of(fake.ByteTokenizer(), [4 + 0xFF] * 40)
    assert "".join(broken[:16])
    assert "".join(broken) == "\ufffd" * 40


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A byte-level BPE, and one with spaces in front of words and bytes for what it does not know, as Llama's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if request.param == "byte-level":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = ["Ġt", "he", "Ġthe", "Ã©"]
        vocabulary = {text: number for number, text in enumerate(["</s>", *letters, *words])}
        core = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ã", "©")]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    else:
        pieces = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "the", "t", "a", "é", "."]
        core = Tokenizer(models.Unigram([(piece, -float(at)) for at, piece in enumerate(pieces)], 1, True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.mark.parametrize(
    "text", ["the the thethe. the", " the  the", "a é€ 😀😀 好吧 the", "好好好好吧. t", "\ufffdthe", ""]
)
def test_pieces_of_real_tokenizers_are_the_text(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces_of(tokenizer, [*tokens[:3], 0, *tokens[3:], 0])
    assert "".join(found) == decoded(tokenizer, tokens)
    assert "\ufffd" in text or "\ufffd" not in "".join(found)


def test_random_tokens_of_a_byte_level_tokenizer_are_the_text(tokenizer: Any) -> None:
    draw = random.Random(0)
    for _ in range(100):
        tokens = [draw.randrange(len(tokenizer)) for _ in range(30)]
        if "Ġt" in tokenizer.get_vocab():  # in the other one bytes that are no text undo those before them
            assert "".join(pieces_of(tokenizer, tokens)) == decoded(tokenizer, tokens)


@pytest.mark.parametrize("name", ["opt-mini", "smollm2"])
def test_random_tokens_of_published_tokenizers_are_the_text(shared: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = shared / "models" / name
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        pytest.skip(f"no tokenizer in {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = random.Random(1)
    for _ in range(3):
        tokens = [draw.randrange(len(tokenizer)) for _ in range(60)]
        assert "".join(pieces_of(tokenizer, tokens)) == decoded(tokenizer, tokens)


@pytest.mark.parametrize("token", [4 + ord("a"), 4 + 0xFF, 4 + 0xE2, 2])
def test_time_is_linear(fake: ModuleType, token: int) -> None:
    """No more than a few tokens are decoded at a time, however long the text is."""
    tokenizer, most = fake.ByteTokenizer(), []

    class Counting:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            most.append(len(tokens))
            return str(tokenizer.decode(tokens, skip_special_tokens))

    pieces = Pieces(Counting())
    for _ in range(2000):
        pieces.add(token)
    assert max(most) <= 20
    assert len(most) <= 2000 * 12


def stopped(strings: list[str], text: str, size: int) -> tuple[str, bool, int]:
    """What is given of a text in pieces of a size, whether it was stopped, and after how many pieces."""
    stops, given, count = Stops(strings), "", 0
    for at in range(0, len(text), size):
        given += stops.add(text[at : at + size])
        count += 1
        if stops.found:
            return given, True, count
        # What is given can never become a stop string any more, and nothing else is kept back.
        shown = text[: at + size]
        waits = max((n for one in strings for n in range(len(one)) if shown.endswith(one[:n])), default=0)
        assert given == shown[: len(shown) - waits]
    return given + stops.rest(), False, count


@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    text=st.text("abc", max_size=30),
    size=st.integers(1, 7),
)
@settings(deadline=None, max_examples=200)
def test_stop_strings_wherever_tokens_part(strings: list[str], text: str, size: int) -> None:
    ends = [(text.index(one) + len(one), -len(one)) for one in strings if one in text]
    end, length = min(ends, default=(len(text), 0))
    given, found, count = stopped(strings, text, size)
    assert given == text[: end + length]
    assert found == bool(ends)
    if found:
        assert count == -(-end // size)


def test_a_long_text_with_long_stops_takes_little_time() -> None:
    stops = Stops(["a" * 255 + "b"] * 4)
    began = time.perf_counter()
    for _ in range(20_000):
        stops.add("aaaa")
    assert time.perf_counter() - began < 5
    assert stops.rest() == "a" * 255


def test_texts_of_single_tokens(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    (word,) = {"▁the", "Ġthe"} & tokenizer.get_vocab().keys()
    assert texts.of(tokenizer.convert_tokens_to_ids(word)) == " the"
    assert texts.of(0) == "</s>"
