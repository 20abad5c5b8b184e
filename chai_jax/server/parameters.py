"""The parameters of OpenAI's requests: what each may be, and which ask for nothing that is not done anyway."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from chai_jax.inputs.fields import Count
from chai_jax.serve.job import MOST_ALTERNATIVES

MOST_CHOICES = 128  # texts of one request, at most
MOST_STOPS = 4  # stop strings of a request, at most, as OpenAI's
MOST_STOP_LENGTH = 256  # characters of one


@dataclass(frozen=True)
class StreamOptions:
    """`stream_options`."""

    include_usage: bool = False


Alternatives = Annotated[int, range(MOST_ALTERNATIVES + 1)]

# Parameters that are obeyed, and their types for `parse_as`. null is as if a parameter were not there.
BOTH: dict[str, Any] = {
    "model": str,
    "max_tokens": Count,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "n": Annotated[int, range(1, MOST_CHOICES + 1)],
    "best_of": Annotated[int, range(1, MOST_CHOICES + 1)],
    "stop": str | tuple[str, ...],
    "seed": Annotated[int, range(2**32)],
    "stream": bool,
    "stream_options": StreamOptions,
    "user": str,
}
COMPLETIONS = {**BOTH, "prompt": object, "logprobs": Alternatives}
CHAT = {
    **{name: kind for name, kind in BOTH.items() if name != "best_of"},
    "messages": object,
    "max_completion_tokens": Count,
    "logprobs": bool,
    "top_logprobs": Alternatives,
}

# Parameters that are not obeyed, and the values at which they would change nothing.
UNCHANGED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # there are no calls
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


def changes_nothing(name: str, value: Any) -> bool:
    """Whether a parameter that is not obeyed has a value at which nothing is missing. 0 is not false."""
    return any(value == usual and isinstance(value, bool) == isinstance(usual, bool) for usual in UNCHANGED[name])
