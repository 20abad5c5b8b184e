"""The text of one choice as its tokens come, up to the first of its stop strings; in time linear in its length."""

from collections.abc import Collection, Sequence
from typing import Any

from chai_jax.data.tokens import bare_tokens

BROKEN = "\ufffd"  # what bytes decode to that are no character, or not yet
LONGEST = 4  # bytes of a character in UTF-8, and so tokens that may be one character's
PATIENCE = 2 * LONGEST  # tokens without a new character after which some of them will never be one


class Pieces:
    """Text from tokens: a character is given when its last byte is there.

    Only the last tokens are decoded each time: those that gave the last piece, since what a token says may depend on
    the one before it (a space, or the first bytes of a character), and those that gave nothing yet.
    """

    def __init__(self, tokenizer: Any, special: Collection[int] = ()):
        """With the `special` tokens, which say nothing."""
        self._tokenizer, self._special = tokenizer, special
        self._tokens: list[int] = []  # the last piece's, then those that wait
        self._known = 0  # how many of them are the last piece's
        self._shown = ""  # their text

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode([*tokens], skip_special_tokens=True))

    def add(self, token: int) -> str:
        """The characters that this token completes; often none."""
        if token in self._special:
            return ""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if len(text) > len(self._shown) and not text.endswith(BROKEN):
            return self._give(text, len(self._tokens))
        if len(self._tokens) - self._known < PATIENCE:
            return ""
        # Bytes that are no character. The last of them may begin one: where they part from the others, they wait.
        for waiting in range(LONGEST, 0, -1):
            head, tail = self._decode(self._tokens[:-waiting]), self._decode(self._tokens[-waiting:])
            if head + tail == text:
                return self._give(head, len(self._tokens) - waiting)
        return self._give(text, len(self._tokens))

    def rest(self) -> str:
        """What is left when no more tokens come."""
        return self._give(self._decode(self._tokens), len(self._tokens))

    def _give(self, text: str, count: int) -> str:
        """What is new in `text`, which the first `count` tokens say."""
        piece = text[len(self._shown) :]
        self._tokens = self._tokens[self._known :]
        self._known = count - self._known
        self._shown = self._decode(self._tokens[: self._known])
        return piece


class _Matcher:
    """How much of a string the text's end is the beginning of, character by character (Knuth, Morris, Pratt 1977)."""

    def __init__(self, string: str):
        self.string, self.matched = string, 0
        self._fallback = [0] * (len(string) + 1)
        at = 0
        for end in range(1, len(string)):
            while at and string[at] != string[end]:
                at = self._fallback[at]
            at += string[at] == string[end]
            self._fallback[end + 1] = at

    def add(self, character: str) -> bool:
        """Whether the string is complete; nothing may be added then."""
        while self.matched and self.string[self.matched] != character:
            self.matched = self._fallback[self.matched]
        self.matched += self.string[self.matched] == character
        return self.matched == len(self.string)


class Stops:
    """Text up to the first stop string; what may still become one is kept back.

    Args:
        strings: none of them empty. The first to be complete counts, and of several the longest.

    Attributes:
        found: whether one was there; nothing follows.
    """

    def __init__(self, strings: Sequence[str]):
        self._matchers = [_Matcher(string) for string in sorted(strings, key=len, reverse=True)]
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that no stop string can begin in any more."""
        if self.found or not self._matchers:
            return "" if self.found else piece
        for at, character in enumerate(piece):
            # All of them hear each character.
            complete = [matcher for matcher in self._matchers if matcher.add(character)]
            if complete:
                text, self.found, self._held = self._held + piece[: at + 1], True, ""
                return text[: len(text) - len(complete[0].string)]
        text = self._held + piece
        sure = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[sure:]
        return text[:sure]

    def rest(self) -> str:
        """What was kept back, when nothing more comes."""
        text, self._held = self._held, ""
        return text


class TokenTexts:
    """The text of single tokens, as lists of probabilities name them, spaces in front and special tokens included."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._before = bare_tokens(tokenizer, "a")[-1:]  # some tokenizers drop the space of a text's first token
        self._skip = len(self._decode(self._before))

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def of(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([*self._before, token])[self._skip :]
        return self._known[token]
