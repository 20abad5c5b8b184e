"""What is wanted of every prompt: how many tokens, chosen how, and what ends them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.serve.decode import NEVER
from chai_jax.serve.sample import Sampling

STOPS = 4  # their number is rounded up to a multiple of it: programs are compiled for their number


@dataclass(frozen=True)
class Request:
    """What is wanted of every prompt; any of `stops` ends a sequence (`NEVER` ends none)."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    stops: tuple[int, ...]

    @classmethod
    def checked(
        cls,
        model: Model,
        max_new_tokens: int,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        stop: bool = True,
    ) -> "Request":
        """From what a person asks for; without a temperature the model's folder decides (see `Generation.sampling`).

        Raises:
            InputError: a setting out of range.
        """
        check_numbers(max_new_tokens, seed)
        settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        given = {name: value for name, value in settings.items() if value is not None}
        if temperature is None and model.generation is not None:
            given = model.generation.sampling | given
        ends = model.stop_tokens
        room = -(-max(len(ends), 1) // STOPS) * STOPS  # whether or not it may stop
        stops = (*(ends if stop else ()), *[NEVER] * room)[:room]
        return cls(max_new_tokens, Sampling.checked(**given), seed, stops)

    @property
    def eos(self) -> Int32[np.ndarray, "E"]:
        """`stops` as the programs take them."""
        return np.array(self.stops, np.int32)

    def cut(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends them, and it."""
        return tokens[: next((at for at, token in enumerate(tokens, 1) if token in self.stops), None)]


def check_numbers(max_new_tokens: int, seed: int = 0) -> None:
    """Raise InputError unless there is something to make, and a seed that random keys can be made of."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed is {seed}; expected 0 to {(1 << 32) - 1}")


def check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise InputError unless every prompt and its new tokens, but for the last, which is never read, fit the model."""
    check_numbers(max_new_tokens)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} has no tokens; expected at least one: begin it with the model's own")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise InputError(
                f"prompt {number} has tokens outside 0 to {model.config.vocab_size - 1}: use the model's tokenizer"
            )
        if len(prompt) + max_new_tokens - 1 > model.config.context:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; {max_new_tokens} new ones do not fit the model's "
                f"{model.config.context} positions: shorten the prompt or lower max_new_tokens"
            )
