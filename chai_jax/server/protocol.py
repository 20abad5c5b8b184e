"""OpenAI's requests for completions and chats, read strictly: what is not done is refused by its name."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chai_jax.data.chat import Message, check_template, conversation
from chai_jax.data.tokens import bare_tokens, prefix_token, tokenize
from chai_jax.errors import InputError
from chai_jax.inputs.fields import brief, parse_as
from chai_jax.inputs.reading import parse_json
from chai_jax.serve.job import Wanted
from chai_jax.serve.sample import Sampling
from chai_jax.server.parameters import (
    CHAT,
    COMPLETIONS,
    MOST_CHOICES,
    MOST_STOP_LENGTH,
    MOST_STOPS,
    UNCHANGED,
    StreamOptions,
    changes_nothing,
)
from chai_jax.server.refusals import Refused

USUAL_TOKENS = 16  # of a completion whose request does not say, as OpenAI's; a chat's answer may fill the context
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A request, checked.

    Attributes:
        prompts: texts or token ids; one at least, unless it is a chat.
        messages: of a chat, None of a completion.
        count: choices of each prompt.
        most: new tokens of each choice; None: as many as fit.
        alternatives: likeliest tokens to tell at each place; None: no probabilities at all.
    """

    prompts: tuple[Prompt, ...]
    messages: tuple[Message, ...] | None
    count: int
    most: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    alternatives: int | None


def bad(param: str | None, message: str) -> Refused:
    return Refused(400, message, param)


def read_request(body: bytes, chat: bool, name: str, usual: Mapping[str, Any]) -> Asked:
    """A request's body as what is asked for.

    Args:
        name: what the model is called here.
        usual: `temperature`, `top_k`, `top_p` where a request has no temperature.

    Raises:
        Refused: with status 400, or 404 for another model.
    """
    given = _parameters(body, CHAT if chat else COMPLETIONS)
    if given.get("model", name) != name:
        known = f"the model {brief(given['model'])} is not here; expected {brief(name)}"
        raise Refused(404, known, "model", "model_not_found")
    if "stream_options" in given and not given.get("stream"):
        raise bad("stream_options", "stream_options is given without stream; expected both: leave it out")
    count = given.get("n", 1)
    if given.get("best_of", count) != count:
        raise bad("best_of", f"best_of {given['best_of']} is not supported; expected it to be n, {count}: leave it out")
    messages = _messages(_needed(given, "messages")) if chat else None
    prompts = () if chat else _prompts(_needed(given, "prompt"))
    if max(len(prompts), 1) * count > MOST_CHOICES:
        raise bad("n", f"{len(prompts)} prompts with n {count} are too many; expected {MOST_CHOICES} texts at most")
    options = given.get("stream_options", StreamOptions())
    return Asked(
        prompts,
        messages,
        count,
        _most(given, chat),
        *_sampling(given, usual),
        seed=given.get("seed", secrets.randbits(32)),
        stops=_stops(given.get("stop", ())),
        stream=given.get("stream", False),
        usage=options.include_usage,
        alternatives=_alternatives(given, chat),
    )


def _parameters(body: bytes, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are obeyed and not null, each of its type."""
    try:
        value = parse_json(body.decode())
    except ValueError as error:  # that of decoding too
        raise bad(None, f"the body is not JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise bad(None, "the body is not a JSON object; expected one, such as OpenAI's clients send")
    given = {}
    for name, one in value.items():
        if name not in kinds and name not in UNCHANGED:
            raise bad(name, f"unknown parameter {brief(name)}; expected some of {', '.join(kinds)}: leave it out")
        if one is None:
            continue
        if name in kinds:
            try:
                given[name] = one if kinds[name] is object else parse_as(kinds[name], one, name)
            except InputError as error:
                raise bad(name, str(error)) from None
        elif not changes_nothing(name, one):
            raise bad(name, f"{name} {brief(one)} is not supported: leave it out")
    return given


def _needed(given: Mapping[str, Any], name: str) -> Any:
    if name not in given:
        raise bad(name, f"the request has no {name}; expected one")
    return given[name]


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if _are_ids(value):
        return (tuple(value),)
    if isinstance(value, list) and value and len(value) <= MOST_CHOICES:
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if all(map(_are_ids, value)):
            return tuple(map(tuple, value))
    few = f"at most {MOST_CHOICES} in a list, none without tokens"
    raise bad("prompt", f"prompt is {brief(value)}; expected a text, texts, token ids, or lists of token ids, {few}")


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise bad("messages", f"messages is {brief(value)}; expected a list of one message or more")
    return tuple(_message(one, f"messages[{at}]") for at, one in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise bad("messages", f"{where} is {brief(value)}; expected an object with role and content")
    # Clients send a message back with all of the fields that it came with, most of them null.
    for name, one in value.items():
        if name not in ("role", "content") and one is not None and one != []:
            raise bad("messages", f"{where} has {brief(name)}, which is not supported; expected role and content")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise bad("messages", f"{where}.role is {brief(role)}; expected one of {', '.join(ROLES)}")
    parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            raise bad("messages", f"{where}.content has {brief(part)}; expected parts of type text, with a text")
        if not isinstance(part["text"], str):
            raise bad("messages", f"{where}.content is {brief(part['text'])}; expected a text, or parts of type text")
    return {"role": ROLES[role], "content": "\n".join(part["text"] for part in parts)}


def _most(given: Mapping[str, Any], chat: bool) -> int | None:
    """New tokens of each choice; `max_tokens` is the older name of a chat's `max_completion_tokens`."""
    counts = {given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(counts) > 1:
        raise bad("max_tokens", "max_tokens is not max_completion_tokens; expected one of them: leave one out")
    return counts.pop() if counts else None if chat else USUAL_TOKENS


def _sampling(given: Mapping[str, Any], usual: Mapping[str, Any]) -> tuple[float, int | None, float | None]:
    """`temperature`, `top_k` and `top_p`, where None is no limit."""
    limits = {name: given[name] for name in ("top_k", "top_p") if name in given}
    heat = given.get("temperature", usual["temperature"])
    if "temperature" not in given:
        limits = {**usual, **limits}
        # Whoever limits what is drawn wants it drawn.
        heat = 1.0 if heat == 0 and ("top_k" in given or "top_p" in given) else heat
    found = {"temperature": (heat, None, None), "top_k": (1.0, limits.get("top_k"), None)}
    found["top_p"] = (1.0, None, limits.get("top_p"))
    for name, settings in found.items():
        try:
            Sampling.checked(*settings)
        except InputError as error:
            raise bad(name, str(error)) from None
    top_k, top_p = limits.get("top_k"), limits.get("top_p")
    # The likeliest token is the same in every nucleus.
    return (
        (heat, None, None) if heat == 0 else (heat, None if top_k in (0, -1) else top_k, None if top_p == 1 else top_p)
    )


def _stops(value: str | Sequence[str]) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)
    if len(strings) > MOST_STOPS or not all(0 < len(one) <= MOST_STOP_LENGTH for one in strings):
        few = f"at most {MOST_STOPS} texts of 1 to {MOST_STOP_LENGTH} characters"
        raise bad("stop", f"stop is {brief(value)}; expected {few}")
    return strings


def _alternatives(given: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return given.get("logprobs")
    if "top_logprobs" in given and not given.get("logprobs"):
        raise bad("top_logprobs", "top_logprobs is given without logprobs; expected logprobs true: leave it out")
    return given.get("top_logprobs", 0) if given.get("logprobs") else None


def encode(asked: Asked, model: Any, name: str) -> list[tuple[int, ...]]:
    """The tokens of each prompt; of a chat one prompt, by the tokenizer's template. May take seconds.

    Raises:
        Refused: text that cannot be tokenized, tokens that the model does not have, a template that fails.
    """
    field = "prompt" if asked.messages is None else "messages"
    try:
        if asked.messages is not None:
            check_template(model.tokenizer, name, "chat, and ask for completions")
            found: list[Sequence[int]] = [bare_tokens(model.tokenizer, conversation(model.tokenizer, asked.messages))]
        else:
            found = [_tokens(one, model.tokenizer) for one in asked.prompts]
    except InputError as error:
        raise bad(field, str(error)) from None
    for tokens in found:
        if not tokens:
            raise bad(field, "the chat template gives no text; expected the conversation: mend it")
        if not 0 <= min(tokens) <= max(tokens) < model.config.vocab_size:
            raise bad(
                field, f"a prompt has tokens outside 0 to {model.config.vocab_size - 1}: use the model's tokenizer"
            )
    return [tuple(tokens) for tokens in found]


def _tokens(prompt: Prompt, tokenizer: Any) -> Sequence[int]:
    return (tokenize(tokenizer, prompt) or [prefix_token(tokenizer)]) if isinstance(prompt, str) else prompt


def wanted(asked: Asked, prompts: Sequence[tuple[int, ...]], context: int) -> list[Wanted]:
    """What the engine is to make: `count` texts of the first prompt, then of the next.

    Args:
        context: tokens that a prompt and what follows it may have together.
    """
    repeated = [prompt for prompt in prompts for _ in range(asked.count)]
    return [
        Wanted(
            prompt=prompt,
            # Where nothing fits, the engine says so, with its numbers.
            max_new_tokens=max(context - len(prompt), 1) if asked.most is None else asked.most,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            seed=asked.seed,
            number=number,
            alternatives=asked.alternatives or 0,
        )
        for number, prompt in enumerate(repeated)
    ]
