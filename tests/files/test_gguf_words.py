"""Tokenizers from GGUF metadata give the tokens that llama.cpp's rules say, done here again step by step."""

import gzip
import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chai_jax.files.gguf.header import read_header
from chai_jax.files.gguf.words import RULES, make_tokenizer

gguf = pytest.importorskip("gguf")

from tests.files.ggufs import CHECKED, SUMS  # noqa: E402 (needs gguf)

CORPUS = [
    "It's the 2nd of 1234 tests; we're told they'll pass, aren't they? THEY'LL   pass.",
    "def f(x):\n    return x + 12\n\n\nfor  line in lines:\n\tprint( line )  # 100 %",
    "Größe, naïve café, Ελλάδα, Привет, 東京 2020, 한국어, עברית, العربية ١٢٣, हिन्दी, 🙂🙂",
] * 4
TEXTS = [
    *("", " ", "a", " a", "a ", "  two  spaces ", "a  2024", "x   7 88", "\n\n5", "tab\t\tbed", "\r\n \r\n\n  \n x"),
    *(
        "It's IT'S we're WE'LL d'Art",
        "3.14 1,000,000 12345678",
        "v1.2.3-rc4 ½ ² Ⅷ ١٢٣",
        "snake_case CamelCase HTTPServer",
    ),
    *(
        "naïve café e\u0301 \u212b",
        "東京 東京都2020年",
        "🙂 👩‍👩‍👧 \u200b\u00a0\ufeff.",
        "...!!!??? ---===",
        "<s>a</s> b<s>",
        "<s> </s>x <s",
    ),
    *(
        "    return x+1\n        y",
        "\x00\x01\x7f",
        "हिन्दी العربية",
        "the" * 40,
        " " * 70 + "9",
        "pass.pass\n\n\n\npass",
    ),
]
QUOTE = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# llama_vocab's regex_exprs, one after the other (of tekken the one that it quotes).
PIECES = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [rf"{QUOTE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"],
    "qwen2": [rf"{QUOTE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"],
    "tekken": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
SPECIAL = ["<s>", "</s>"]


def write(path: Path, kind: str, tokens: list[str], types: list[int], **more: Any) -> Any:
    """The header of a file that holds a vocabulary alone."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(path)


def merged(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Merge the pair of the lowest rank, of equal ones the first, until there is none."""
    while True:
        ranks = [(rank(*pair), at) for at, pair in enumerate(pairwise(symbols))]
        best = min(((found, at) for found, at in ranks if found is not None), default=None)
        if best is None:
            return symbols
        at = best[1]
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]


def fragments(text: str) -> list[str]:
    return [part for part in regex.split("(<s>|</s>)", text) if part]


@pytest.fixture(scope="module")
def learned() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level vocabulary, learned without bounds, so that each rule's matter."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False, max_token_length=8
    )
    words = [word for text in CORPUS for word in regex.findall(r"\s*\S{1,6}|\s+", text)]
    backend.train_from_iterator([*words, *["  ", "   ", "123", " 12", "\n\n\n", "e\u0301", "\u00e9"] * 9], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


@pytest.mark.parametrize("rule", RULES)
def test_byte_level(learned: tuple[list[str], list[str]], tmp_path: Path, rule: str) -> None:
    tokens, merges = learned
    tokens = [*tokens, "whole", "\u0120nowhere"]  # that no merges make
    ids, ranks = {token: at for at, token in enumerate(tokens)}, {merge: at for at, merge in enumerate(merges)}
    types = [3, 3, *[1] * (len(tokens) - 2)]
    header = write(
        tmp_path / "x.gguf",
        "gpt2",
        tokens,
        types,
        tokenizer_pre=rule,
        token_merges=merges,
        bos_token_id=0,
        eos_token_id=1,
    )
    tokenizer, spelling = make_tokenizer(header), bytes_to_unicode()
    begins = rule in ("llama-bpe", "llama3", "llama-v3", "tekken")

    def reference(text: str) -> list[int]:
        if "qwen" in rule:  # as Qwen's own tokenizer does
            text = normalizers.NFC().normalize_str(text)
        found = [0] * begins
        for fragment in fragments(text):
            if fragment in SPECIAL:
                found.append(ids[fragment])
                continue
            pieces = [fragment]
            for pattern in PIECES[SAME.get(rule, rule)]:
                pieces = [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]
            for piece in pieces:
                word = "".join(spelling[byte] for byte in piece.encode())
                whole = begins and word in ids
                parts = [word] if whole else merged(list(word), lambda one, two: ranks.get(f"{one} {two}"))
                found += [ids[part] for part in parts]
        return found

    for text in [*TEXTS, *CORPUS, "whole wholes nowhere"]:
        assert tokenizer(text)["input_ids"] == reference(text), text
        assert tokenizer.decode(tokenizer(text)["input_ids"][begins:]) == (
            normalizers.NFC().normalize_str(text) if "qwen" in rule else text
        )


@pytest.mark.parametrize("spaced", [True, False, None])
def test_sentence_piece(tmp_path: Path, spaced: bool | None) -> None:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=8)
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    pieces = [token for token in learned if len(token) > 1] + [token for token in learned if len(token) == 1]
    tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<mine>"]
    scores = [*[0.0] * 259, *(-float(at) for at in range(len(pieces))), 0.0]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    more = {} if spaced is None else {"add_space_prefix": spaced, "add_bos_token": spaced}
    tokenizer = make_tokenizer(write(tmp_path / "x.gguf", "llama", tokens, types, token_scores=scores, **more))
    ids = {token: at for at, token in enumerate(tokens)}

    def reference(text: str) -> list[int]:
        """llm_tokenizer_spm, a fragment at a time, each with a space in front."""
        found = [1] * (spaced is not False)
        for fragment in regex.split("(<s>|</s>|<mine>)", text):
            if fragment in (*SPECIAL, "<mine>"):
                found.append(ids[fragment])
            elif fragment:
                word = (" " * (spaced is not False) + fragment).replace(" ", "\u2581")
                joined = merged(list(word), lambda one, two: -scores[ids[one + two]] if one + two in ids else None)
                for part in joined:
                    found += [ids[part]] if part in ids else [3 + byte for byte in part.encode()]
        return found

    for text in [*TEXTS, *CORPUS, "a<mine> b"]:
        assert tokenizer(text)["input_ids"] == reference(text), text
    assert tokenizer.decode(tokenizer("the  café\n🙂")["input_ids"], skip_special_tokens=True) == "the  café\n🙂"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_gpt2_s_own_vocabulary(shared: Path, tmp_path: Path) -> None:
    """With its tokens and (OPT's, which are its) merges, the text becomes what llama.cpp's converter expects."""
    ids = json.loads(gzip.decompress((shared / "data/gpt2_bpe/encoder.json.gz").read_bytes()))
    merges = (shared / "data/opt_tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()[1:50001]
    types = [1] * (len(ids) - 1) + [3]
    header = write(
        tmp_path / "x.gguf", "gpt2", sorted(ids, key=ids.get), types, tokenizer_pre="gpt-2", token_merges=merges
    )
    tokens = make_tokenizer(header)(CHECKED)["input_ids"]
    assert hashlib.sha256(str(tokens).encode()).hexdigest() == SUMS["gpt-2"]
