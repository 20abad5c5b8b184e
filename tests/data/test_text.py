"""Windows hold each token once; what is looked at, trained on and measured is disjoint."""

import gzip
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest

from chai_jax.data.text import pages, read_text_file, split_corpus, windows
from chai_jax.errors import InputError

TEXT = "a gorgeous , witty film .\n \nIs this sentence é or 電影 ?\n" * 20


@pytest.mark.parametrize("length", [2, 3, 7, 16, 5000])
def test_windows_hold_every_token_once(bpe: Any, length: int) -> None:
    cut = windows(bpe, TEXT, length)
    assert all(window.tokens[0] == 2 and window.start == 1 for window in cut)
    assert {len(window.tokens) for window in cut[:-1]} <= {length}
    assert 1 < len(cut[-1].tokens) <= length
    tokens = [token for window in cut for token in window.tokens[window.start :]]
    assert tokens == bpe.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert bpe.decode(tokens) == TEXT


@pytest.mark.parametrize("length", [2, 3, 7, 16, 5000])
def test_where_nothing_comes_first_a_window_begins_with_the_token_before(bare: Any, length: int) -> None:
    cut = windows(bare, TEXT, length)
    ids = bare.backend_tokenizer.encode(TEXT).ids
    assert cut[0].tokens == tuple(ids[:length])
    assert [token for window in cut for token in window.tokens[1:]] == ids[1:]
    assert all(window.start == 1 and len(window.tokens) > 1 for window in cut)
    assert all(one.tokens[-1] == two.tokens[0] for one, two in itertools.pairwise(cut))
    assert {len(window.tokens) for window in cut[:-1]} <= {length}


def test_a_text_that_brings_its_own_first_token_gets_no_second(bpe: Any) -> None:
    assert windows(bpe, f"</s>{TEXT}", 16) == windows(bpe, TEXT, 16)


def test_half_a_character_is_refused(bpe: Any) -> None:
    with pytest.raises(InputError, match=r"a text holds '\\ud800' at character 5, which is no character"):
        windows(bpe, "film \ud800", 16)


def test_a_byte_order_mark_is_no_text(bpe: Any, tmp_path: Path) -> None:
    for name, text in (("marked", "\ufeff" + TEXT), ("plain", TEXT)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert {read_text_file(path) for path in tmp_path.iterdir()} == {TEXT}


def test_a_long_text_is_no_news(bpe: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "deprecation_warnings", {})  # it warns but once
    logging.getLogger("transformers").addHandler(caplog.handler)
    windows(bpe, TEXT, 16)
    assert not caplog.records


def test_wikitext_has_the_windows_its_perplexity_is_known_for(shared: Path) -> None:
    """opt-mini's README: perplexity 178.4 over 349,013 tokens: all but the last, short one of the windows of 511."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models/opt-mini")
    cut = windows(tokenizer, read_text_file(shared / "data/wikitext2/test.raw.txt.gz"), 512)
    assert sum(len(window.tokens) - window.start for window in cut[:-1]) == 349_013
    assert len(cut[-1].tokens) == 1 + 267


def test_pages_begin_at_titles_alone() -> None:
    first, second = " = A = \n \n = = B = = \n x = y =\n = = = C = = = \n", " = D = E = \n z"
    assert pages(first + second) == [first.removesuffix("\n"), second]
    assert pages(f"before\n{second}") == ["before", second]
    assert pages(" \n" + second) == [second]


def test_wikitext_has_the_documents_the_harness_counts(shared: Path) -> None:
    """62, as EleutherAI/wikitext_document_level has for this split, and every line is in one of them."""
    text = read_text_file(shared / "data/wikitext2/test.raw.txt.gz")
    found = pages(text)
    assert len(found) == 62
    assert "\n".join(found) == text.removeprefix(" \n")
    assert found[0].startswith(" = Robert Boulter = \n")


@pytest.mark.parametrize("calibration", [0, 3, 1000])
def test_the_parts_of_a_corpus_share_nothing(bpe: Any, calibration: int) -> None:
    every = windows(bpe, TEXT, 8)
    corpus = split_corpus(bpe, TEXT, 8, calibration)
    tenth = len(every) // 10
    assert corpus.calibration == every[: min(calibration, tenth)]
    assert corpus.training == every[tenth : len(every) - tenth]
    assert corpus.evaluation == every[len(every) - tenth :]


def test_a_short_text_has_no_three_parts(bpe: Any) -> None:
    with pytest.raises(InputError, match="the text makes 1 windows of 16 tokens; expected at least 10"):
        split_corpus(bpe, "film", 16, 1)


def test_a_file_reads_the_same_gzipped_or_not(tmp_path: Path) -> None:
    plain, packed = tmp_path / "text.txt", tmp_path / "text.txt.gz"
    plain.write_bytes(TEXT.encode())
    packed.write_bytes(gzip.compress(TEXT.encode()))
    assert read_text_file(plain) == read_text_file(str(packed)) == TEXT


WHOLE = gzip.compress(TEXT.encode(), mtime=0)
BAD = {
    "latin.txt": "é".encode("latin-1"),
    "short.gz": WHOLE[:-20],
    "not.gz": b"film",
    "damaged.gz": WHOLE[:13] + b"\xff" * 8 + WHOLE[21:],  # not deflate any more: zlib.error
    "checksum.gz": WHOLE[:-8] + b"\0" * 8,
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(InputError, match=rf"cannot read .*{name} \(.+\); expected UTF-8 text") as raised:
        read_text_file(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_missing_file_a_folder_and_an_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt \(No such file"):
        read_text_file(tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"\(not a regular file\)"):
        read_text_file(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="holds no text"):
        read_text_file(tmp_path / "empty.txt")
