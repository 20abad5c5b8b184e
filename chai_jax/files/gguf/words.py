"""The tokenizer that a GGUF file's metadata describes, as one of transformers' with the same tokens for every text.

Two kinds are in use. `gpt2`: byte-level pairs merged in the order that the file lists, in pieces of text that
`tokenizer.ggml.pre` names a rule for (llama.cpp's src/llama-vocab.cpp has all rules). `llama`: SentencePiece's pairs,
the one that makes the likeliest token first, with bytes for what is in no token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from chai_jax.errors import InputError
from chai_jax.files.gguf.fields import token_ids
from chai_jax.files.gguf.header import Header
from chai_jax.inputs.fields import brief
from chai_jax.inputs.reading import shown

MOST_WORDS = 1 << 20  # tokens, and merges; Gemma has 262,144 and 514,906
MOST_WHOLE = 1 << 16  # tokens that are found in a text before all else; Gemma has some 6,000
LONGEST = 128  # characters of a token that pairs are merged to; SentencePiece makes none of more than 16
CONTROL, USER_DEFINED = 3, 4  # types of tokens: both are found in a text before all else
KEY = "tokenizer.ggml."
SPACE = "\u2581"  # SentencePiece's

# Pieces of text as the vocabularies' own tokenizer.json has them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rule:
    """How a byte-level vocabulary wants text prepared.

    Attributes:
        pattern: of the pieces of text; "": GPT-2's.
        digits: whether each digit is a piece.
        whole: whether a piece that is a token is that token, whatever its merges.
        begins: whether the beginning of text stands in front, if the file does not say.
        composed: whether characters are composed (NFC) before.
    """

    pattern: str = ""
    digits: bool = False
    whole: bool = False
    begins: bool = False
    composed: bool = False


RULES = {
    "gpt-2": Rule(),
    "smollm": Rule(digits=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Rule(LLAMA3, whole=True, begins=True)),
    "tekken": Rule(TEKKEN, whole=True, begins=True),
    # llama.cpp composes nothing; Qwen's own tokenizer.json does.
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Rule(QWEN2, composed=True)),
}


@dataclass(frozen=True)
class Words:
    """A vocabulary as the file has it, checked."""

    where: str
    metadata: Mapping[str, Any]
    tokens: dict[str, int]
    types: list[int]

    @classmethod
    def read(cls, header: Header) -> "Words":
        """From the metadata.

        Raises:
            InputError: no tokens, far too many, or one twice; not as many types.
        """
        where, metadata = shown(header.path), header.metadata
        listed = _strings(where, metadata, "tokens")
        types = metadata.get(f"{KEY}token_type")
        types = np.ones(len(listed), int) if types is None else types
        if not isinstance(types, np.ndarray) or len(types) != len(listed):
            raise _refused(where, "token_type", types, f"{len(listed):,} numbers")
        if np.isin(types, (CONTROL, USER_DEFINED)).sum() > MOST_WHOLE:
            raise _refused(where, "token_type", types, f"at most {MOST_WHOLE:,} special tokens")
        # llama.cpp gives empty tokens this name.
        tokens: dict[str, int] = {}
        for at, token in enumerate(listed):
            if tokens.setdefault(token or f"[EMPTY_{at}]", at) != at:
                raise _refused(where, "tokens", token, "each once")
        return cls(where, metadata, tokens, types.tolist())

    def setting(self, name: str, usual: bool) -> bool:
        value = self.metadata.get(KEY + name, usual)
        if type(value) is not bool:
            raise _refused(self.where, name, value, "true or false")
        return value

    def of_type(self, kind: int) -> list[str]:
        return [token for token, found in zip(self.tokens, self.types, strict=True) if found == kind]

    def named(self) -> dict[str, str]:
        """The special tokens' texts by transformers' names, such as `bos_token`; an id that is no token's is none."""
        texts, usual = list(self.tokens), 0 if self.metadata[f"{KEY}model"] == "llama" else None
        ids = {**token_ids(self.metadata), "unk_token_id": self.metadata.get(f"{KEY}unknown_token_id", usual)}
        return {
            name.removesuffix("_id"): texts[at] for name, at in ids.items() if type(at) is int and 0 <= at < len(texts)
        }


def make_tokenizer(header: Header) -> Any:
    """One of transformers' fast tokenizers, or None where the file has no vocabulary.

    Raises:
        InputError: a kind or a rule that is not known; metadata that is missing or at odds with itself.
    """
    kind = header.metadata.get(f"{KEY}model")
    if kind in (None, "none", "no_vocab"):
        return None
    if not isinstance(kind, str) or kind not in BACKENDS:
        raise _refused(shown(header.path), "model", kind, f"one of {', '.join(BACKENDS)}")
    words = Words.read(header)
    # Importing transformers takes seconds, so only where it is used.
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    template = header.metadata.get("tokenizer.chat_template")
    try:
        backend = BACKENDS[kind](words)
        for type_of, special in ((CONTROL, True), (USER_DEFINED, False)):
            added = [AddedToken(token, normalized=False, special=special) for token in words.of_type(type_of)]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
        _add_ends(backend, words)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **words.named())
    except InputError:
        raise
    # tokenizers raises bare Exceptions.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the tokenizer in {words.where} cannot be made ({reason:.200}): convert it anew") from None
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def _byte_level(words: Words) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    rule = _rule(words)
    merges = [_pair(words.where, merge) for merge in _strings(words.where, words.metadata, "merges")]
    backend = Tokenizer(BPE(vocab=words.tokens, merges=merges, ignore_merges=rule.whole))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.pattern:
        steps.append(pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rule.pattern))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if rule.composed:
        backend.normalizer = normalizers.NFC()
    return backend


def _sentence_piece(words: Words) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    backend = Tokenizer(
        BPE(
            vocab=words.tokens,
            merges=_implied_merges(words),
            unk_token=words.named().get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced: list[Any] = [normalizers.Replace(" ", SPACE)]
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if words.setting("add_space_prefix", True):
        spaced, steps = [normalizers.Prepend(SPACE), *spaced], [*steps, decoders.Strip(" ", 1, 0)]
    backend.normalizer, backend.decoder = normalizers.Sequence(spaced), decoders.Sequence(steps)
    return backend


BACKENDS = {"gpt2": _byte_level, "llama": _sentence_piece}


def _add_ends(backend: Any, words: Words) -> None:
    """Let the tokenizer put the beginning of text in front and the end behind, where the file says so."""
    from tokenizers.processors import TemplateProcessing

    named, usual = words.named(), True
    if words.metadata[f"{KEY}model"] == "gpt2":
        usual = _rule(words).begins
    wanted = {"bos_token": words.setting("add_bos_token", usual), "eos_token": words.setting("add_eos_token", False)}
    front, behind = ([named[name]] if on and name in named else [] for name, on in wanted.items())
    if front or behind:
        pair = [*front, "$A", *behind, *(f"{token}:1" for token in front), "$B:1", *(f"{token}:1" for token in behind)]
        ids = [(token, words.tokens[token]) for token in dict.fromkeys((*front, *behind))]
        backend.post_processor = TemplateProcessing(single=[*front, "$A", *behind], pair=pair, special_tokens=ids)


def _rule(words: Words) -> Rule:
    name = words.metadata.get(f"{KEY}pre")
    if not isinstance(name, str) or name not in RULES:
        raise _refused(words.where, "pre", name, f"one of {', '.join(RULES)}")
    return RULES[name]


def _implied_merges(words: Words) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the likeliest first; of equal ones that of the lower id.

    Raises:
        InputError: no score for every token; more merges than any vocabulary has.
    """
    scores = words.metadata.get(f"{KEY}scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(words.tokens) or not np.isfinite(scores).all():
        raise _refused(words.where, "scores", scores, f"{len(words.tokens):,} finite numbers")
    found: list[tuple[str, str]] = []
    names = list(words.tokens)
    for at in np.argsort(-scores.astype(float), kind="stable").tolist():
        found += _halves(names[at], words.tokens)
        if len(found) > MOST_WORDS:
            raise InputError(f"{words.where} implies more than {MOST_WORDS:,} merges; expected a tokenizer's tokens")
    return found


def _halves(token: str, tokens: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that make a token, the longest first half first, as transformers has them."""
    if len(token) <= LONGEST:
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in tokens and token[cut:] in tokens:
                yield token[:cut], token[cut:]


def _pair(where: str, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise InputError(f"{where} has a merge {merge!r:.80}; expected two tokens and a space between: convert it anew")
    return left, right


def _strings(where: str, metadata: Mapping[str, Any], name: str) -> list[str]:
    value = metadata.get(KEY + name)
    if not isinstance(value, list) or len(value) > MOST_WORDS:
        raise _refused(where, name, value, f"at most {MOST_WORDS:,} strings")
    return value


def _refused(where: str, name: str, value: Any, expected: str) -> InputError:
    return InputError(
        f"{where} has {KEY}{name} {brief(value):.80}; expected {expected}: convert it anew, or use the model's folder "
        "in Hugging Face's layout"
    )
