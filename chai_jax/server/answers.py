"""OpenAI's JSON of completions and chats: whole, in chunks, with probabilities and usage."""

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from chai_jax.server.choices import Choice, Place
from chai_jax.server.protocol import Asked
from chai_jax.server.text import BROKEN, TokenTexts

Json = dict[str, Any]
LEAST = -9999.0  # what OpenAI tells of a token that is as good as impossible; JSON has no infinity


class Shape:
    """How answers to one request look."""

    def __init__(self, asked: Asked, name: str, texts: TokenTexts):
        self._asked, self._texts = asked, texts
        self._chat = asked.messages is not None
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    def _envelope(self, choices: list[Json], chunk: bool) -> Json:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def chunk(self, choice: Choice, text: str, places: Sequence[Place], finish: str | None = None) -> Json:
        """A piece of a stream; with `finish` the choice's last, which has no text."""
        found: Json = {"index": choice.index, "logprobs": self._logprobs(places), "finish_reason": finish}
        if self._chat:
            found["delta"] = {} if finish else {"content": text}
        else:
            found["text"] = text
        return self._with_no_usage(self._envelope([found], chunk=True))

    def opening(self, choice: Choice) -> Json:
        """What a chat's stream begins each choice with."""
        delta = {"role": "assistant", "content": ""}
        found = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._with_no_usage(self._envelope([found], chunk=True))

    def _with_no_usage(self, chunk: Json) -> Json:
        return {**chunk, "usage": None} if self._asked.usage else chunk

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        """The last chunk of a stream that is to tell its usage."""
        return {**self._envelope([], chunk=True), "usage": self.usage(choices)}

    def whole(self, choices: Sequence[Choice], texts: Sequence[str], places: Sequence[Sequence[Place]]) -> Json:
        """The answer to a request without `stream`."""
        found = []
        for choice, text, its in zip(choices, texts, places, strict=True):
            one: Json = {"index": choice.index, "logprobs": self._logprobs(its), "finish_reason": choice.finish}
            if self._chat:
                one["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                one["text"] = text
            found.append(one)
        return {**self._envelope(found, chunk=False), "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Tokens of each prompt once, whatever `n`, and of all choices; from caches stored as what."""
        each = choices[:: self._asked.count]
        read, made = sum(len(choice.wanted.prompt) for choice in each), sum(choice.made for choice in choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": sum(choice.reused for choice in each)},
            "cache_formats": dict(sum((choice.formats for choice in choices), Counter())),
        }

    def _logprobs(self, places: Sequence[Place]) -> Json | None:
        if self._asked.alternatives is None or not places:
            return None
        if self._chat:
            return {"content": [self._chat_place(place) for place in places], "refusal": None}
        tokens = [place.token for place in places]
        found: Json = {
            "tokens": [self._texts.of(token.id) for token in tokens],
            "token_logprobs": [max(token.logprob, LEAST) for token in tokens],
            "top_logprobs": None,
            "text_offset": [place.offset for place in places],
        }
        if self._asked.alternatives:
            # Of several tokens with one text the likeliest, which comes first, is told.
            likeliest = [[*reversed(token.alternatives)] for token in tokens]
            found["top_logprobs"] = [
                {self._texts.of(one): max(logprob, LEAST) for one, logprob in each} for each in likeliest
            ]
        return found

    def _chat_place(self, place: Place) -> Json:
        token = place.token
        likeliest = [self._named(one, logprob) for one, logprob in token.alternatives]
        return {**self._named(token.id, token.logprob), "top_logprobs": likeliest}

    def _named(self, token: int, logprob: float) -> Json:
        """A token as chats name it; `bytes` is null where they are not a text's."""
        text = self._texts.of(token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": None if BROKEN in text else [*text.encode()]}
