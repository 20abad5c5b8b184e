"""What the lm-evaluation-harness asks of a model, in our terms: batch sizes, generation settings, conversations."""

from collections.abc import Sequence
from typing import Any

from chai_jax.data.chat import Message, conversation
from chai_jax.errors import InputError
from chai_jax.evaluation.tasks import BATCH_SIZE

Settings = tuple[tuple[str, ...], int, float, int | None, float | None]


def sequences(wanted: int | str) -> int:
    """The batch size that `--batch_size` asks for; "auto" is that of `evaluate`."""
    if str(wanted).startswith("auto"):
        return BATCH_SIZE
    if not str(wanted).isdecimal() or int(wanted) < 1:
        raise InputError(f"--batch_size is {wanted!r}; expected a number from 1 on, or auto")
    return int(wanted)


def generation_settings(wanted: dict[str, Any]) -> Settings:
    """(stop strings, new tokens, temperature, top_k, top_p) of a request; greedy unless it asks for samples.

    Raises:
        InputError: a setting that is to be a number is none.
    """
    until = wanted.get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    try:
        length = next((int(wanted[name]) for name in names if wanted.get(name) is not None), 256)
        temperature = float(wanted.get("temperature", 0.0))
        top_k, top_p = wanted.get("top_k"), wanted.get("top_p")
        limits = None if top_k is None else int(top_k), None if top_p is None else float(top_p)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"a task's generation settings, {wanted!r:.200}, are wrong ({error}): mend them") from None
    if temperature == 0 or wanted.get("do_sample") is False:
        return stops, length, 0.0, None, None
    return stops, length, temperature, *limits


def without_refused_system(tokenizer: Any, messages: Sequence[Message], answer: bool = True) -> str:
    """`conversation`; a template that refuses the system's message gets the others alone, as in the harness's model."""
    try:
        return conversation(tokenizer, messages, answer)
    except InputError:
        return conversation(tokenizer, [message for message in messages if message["role"] != "system"], answer)
