"""How a model's texts are made unless told otherwise: what generation_config.json beside its weights says."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chai_jax.errors import InputError

LIKELIEST = 50  # as top_k of a folder that asks for draws and gives none: transformers' default

# Settings that change which tokens are chosen and that nothing here obeys, with the values that ask for nothing.
NOT_OBEYED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": (),
    "stop_strings": ([],),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "watermarking_config": (),
    "typical_p": (1,),
    "min_p": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


def _is_id(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


OBEYED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "eos_token_id": (_are_ids, "a token id or a list of them"),
    "do_sample": (lambda value: type(value) is bool, "true or false"),
    "temperature": (_is_number, "a number"),
    "top_k": (_is_id, "an integer"),
    "top_p": (_is_number, "a number"),
}


@dataclass(frozen=True)
class Generation:
    """A generation_config.json.

    Attributes:
        fields: all of it, to be written again with the model; names as in the file.
    """

    fields: Mapping[str, Any]

    @classmethod
    def checked(cls, fields: Mapping[str, Any], where: str) -> "Generation":
        """From the file called `where`.

        Raises:
            InputError: a field that is obeyed is of the wrong type.
        """
        for name, (fits, expected) in OBEYED.items():
            if fields.get(name) is not None and not fits(fields[name]):
                raise InputError(f"{where} has {name} {fields[name]!r:.80}; expected {expected}: mend the file")
        return cls(fields)

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a text; none where the file names none, as in transformers."""
        ends = self.fields.get("eos_token_id")
        return () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)

    @property
    def sampling(self) -> dict[str, Any]:
        """`temperature`, `top_k` and `top_p` to draw with; empty where texts are to be greedy."""
        if not self.fields.get("do_sample"):
            return {}
        defaults = {"temperature": 1.0, "top_k": LIKELIEST, "top_p": 1.0}
        return {name: usual if self.fields.get(name) is None else self.fields[name] for name, usual in defaults.items()}

    @property
    def not_obeyed(self) -> dict[str, Any]:
        """The settings that would change the texts and are only carried on."""
        return {
            name: self.fields[name]
            for name, nothing in NOT_OBEYED.items()
            if self.fields.get(name) is not None and self.fields[name] not in nothing
        }
