"""Text from prompts: batches of like length, each read by one program and continued by another, whole or in pieces."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from chai_jax.console import track
from chai_jax.data.chat import chat_tokens
from chai_jax.data.tokens import prefix_token, require_tokenizer, tokenize
from chai_jax.errors import InputError
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.sharding import whole
from chai_jax.serve.decode import Decoding, bucket, decode, pad_right, prefill, serving_params
from chai_jax.serve.request import Request, check_prompts

STREAM_TOKENS = 8  # tokens decoded between two pieces of streamed text


def _begin(
    model: Model,
    params: Params,
    how: Execution,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    request: Request,
) -> Decoding:
    """One batch with its first new token.

    Args:
        params: the model's `serving_params`.
        numbers: of the prompts among all that were asked for; they and the seed decide what is drawn.
    """
    tokens, mask = pad_right(prompts, model.config.pad_token_id, how.layout.ways)
    rows, columns = tokens.shape
    filled = np.array([*numbers, *[0] * (rows - len(prompts))], np.uint32)
    capacity = bucket(columns + request.max_new_tokens)
    tokens, mask, filled = how.layout.rows((tokens, mask, filled))
    return prefill(
        model.config, model.spec, params, tokens, mask, keys_of(jnp.uint32(request.seed), filled), request.sampling,
        request.eos, capacity=capacity, how=how,
    )  # fmt: skip


def _continue(
    model: Model,
    params: Params,
    how: Execution,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    request: Request,
    piece: int,
) -> Iterator[list[list[int]]]:
    """What one batch has been continued by so far: after its first token, then each time `piece` more are there.

    Arguments as of `_begin`.
    """
    state = _begin(model, params, how, prompts, numbers, request)
    made = 1
    while True:
        columns, done = whole((state.tokens, state.done))
        starts = map(len, prompts)
        yield [request.cut(row[start : start + made].tolist()) for row, start in zip(columns, starts, strict=False)]
        if made == request.max_new_tokens or done.all():
            return
        made = min(made + piece, request.max_new_tokens)
        until = jnp.int32(made)
        state = decode(model.config, model.spec, params, state, until, request.sampling, request.eos, how=how)


def warm_up(model: Model, batch_sizes: Sequence[int] = (1,), longest: int = 256, max_new_tokens: int = 64) -> int:
    """Compile all that requests of these sizes will need, whatever else they ask: none of them compiles anything then.

    Requests with a draft (`chai_jax.serve.speculate`) have programs of their own, which are not compiled here.

    Args:
        batch_sizes: prompts that go through the model together (see `generate_tokens`), each rounded up as they are.
        longest: tokens of the longest prompt.
        max_new_tokens: the most of any request.

    Returns:
        The number of shapes: two programs of each, greedy and drawn (see `Sampling`). With a compilation cache on disk
        a later process finds them there.

    Raises:
        InputError: sizes that no request could have.
    """
    if not (batch_sizes and min(batch_sizes) >= 1 and longest >= 1):
        raise InputError("expected sizes of at least 1 to warm up for")
    check_prompts(model, [[model.config.pad_token_id] * longest], max_new_tokens)
    how = model.how
    params = serving_params(model, how)
    # Columns of the prompts and capacity, and how many new tokens ask for it; one, which needs no decoding, only if no
    # other number does.
    rooms: dict[tuple[int, int], int] = {}
    for read in sorted({bucket(length) for length in range(1, longest + 1)}):
        for new in (*range(2, max_new_tokens + 1), 1):
            rooms.setdefault((read, bucket(read + new)), new)
    sizes = sorted({1 << (size - 1).bit_length() for size in batch_sizes})
    shapes = [(rows, read, new) for rows in sizes for (read, _), new in rooms.items()]
    kinds = [partial(Request.checked, model, temperature=heat, top_k=None, top_p=None, seed=0) for heat in (0.0, 1.0)]
    for (rows, read, new), asked in track(
        [*product(shapes, kinds)], f"Compiling {len(shapes)} shapes, greedy and drawn"
    ):
        prompts = [[model.config.pad_token_id] * read] * rows
        request = asked(max_new_tokens=new, stop=False)
        state = _begin(model, params, how, prompts, range(rows), request)
        for made in range(1, min(new, 3)):  # from what reading gives and, as streams do, from what decoding gives
            until = jnp.int32(made + 1)
            rule = request.sampling, request.eos
            state = decode(model.config, model.spec, params, state, until, *rule, how=how)
    return len(shapes)


@jax.jit
def keys_of(seed: UInt32[Array, ""], numbers: UInt32[Array, "B"]) -> Key[Array, "B"]:
    """For each prompt's number a random key that follows from it and the seed alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 20,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: bool = True,
    batch_size: int = 16,
) -> list[list[int]]:
    """The tokens that follow each prompt (token ids, as `encode_prompt` gives): at most `max_new_tokens`.

    With `stop`, a sequence ends with the first of the model's `stop_tokens`. Prompts of similar length go through the
    model together, `batch_size` at a time; what is drawn for a prompt depends on its number alone.

    Args:
        temperature: 0 is greedy; if not given, the model's folder decides, and greedy where it does not.
        seed: 0 to 2^32 - 1.

    Raises:
        InputError: a prompt that with `max_new_tokens` does not fit the position table, that is empty or not of the
            model's tokens; settings out of range (see `Sampling.checked`).
    """
    check_prompts(model, prompts, max_new_tokens)
    request = Request.checked(model, max_new_tokens, temperature, top_k, top_p, seed, stop)
    how = model.how
    params = serving_params(model, how)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    completions: list[list[int]] = [[] for _ in prompts]
    for numbers in track(batches, "generating"):
        batch = [prompts[number] for number in numbers]
        *_, made = _continue(model, params, how, batch, numbers, request, piece=max_new_tokens)
        for number, tokens in zip(numbers, made, strict=True):
            completions[number] = tokens
    return completions


def encode_prompt(model: Model, prompt: str, chat: bool = False, system: str | None = None) -> list[int]:
    """The prompt's tokens as its tokenizer begins them (`tokenize`); of an empty one at least `prefix_token`.

    Args:
        chat: the prompt is a user's message, and what begins an answer follows it, by the tokenizer's chat template.
        system: with `chat`, a message before the user's that says how to answer.

    Raises:
        InputError: the model has no tokenizer, the prompt holds what is no character, the template is missing or fails;
            `system` without `chat`.
    """
    tokenizer = require_tokenizer(model.tokenizer, model.source)
    if chat:
        return chat_tokens(tokenizer, prompt, system, model.source)
    if system is not None:
        raise InputError("a system's message is given without chat; expected both: ask for a chat, or leave it out")
    return tokenize(tokenizer, prompt) or [prefix_token(tokenizer)]


def generate(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int = 20,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    on_text: Callable[[str], object] | None = None,
    chat: bool = False,
    system: str | None = None,
) -> list[str]:
    """The text that follows each prompt, without the prompt and without `</s>`; an empty prompt is a fresh text.

    Args:
        temperature: as of `generate_tokens`; `top_k` and `top_p` as in `Sampling`.
        on_text: for a single prompt, called with each piece of the text as it is decoded (see `stream`).
        chat: as of `encode_prompt`, and `system`: each text is then an answer to its prompt.

    Raises:
        InputError: as `generate_tokens`; also a model without a tokenizer, one string in place of a list, and `on_text`
            with more than one prompt.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is one string; expected a list of strings: write [prompt]")
    if on_text is not None:
        if len(prompts) != 1:
            raise InputError(
                f"on_text with {len(prompts)} prompts; expected one: texts of a batch are made side by side"
            )
        pieces = []
        for piece in stream(model, prompts[0], max_new_tokens, temperature, top_k, top_p, seed, chat, system):
            on_text(piece)
            pieces.append(piece)
        return ["".join(pieces)]
    encoded = [encode_prompt(model, prompt, chat, system) for prompt in prompts]
    made = generate_tokens(model, encoded, max_new_tokens, temperature, top_k, top_p, seed, batch_size=batch_size)
    return [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]


def stream(
    model: Model,
    prompt: str,
    max_new_tokens: int = 20,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
) -> Iterator[str]:
    """`generate(model, [prompt], ...)[0]` in pieces, as they are decoded (see `as_text`).

    Raises as `generate` does, at the first piece.
    """
    encoded = [encode_prompt(model, prompt, chat, system)]
    check_prompts(model, encoded, max_new_tokens)
    request = Request.checked(model, max_new_tokens, temperature, top_k, top_p, seed)
    how = model.how
    params = serving_params(model, how)
    made = _continue(model, params, how, encoded, [0], request, piece=STREAM_TOKENS)
    yield from as_text(model, (tokens for (tokens,) in made))


def as_text(model: Model, made: Iterator[list[int]]) -> Iterator[str]:
    """Pieces of text from growing lists of tokens; a character comes when its last byte has."""
    shown = text = ""
    for tokens in made:
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        whole = text.rstrip("\ufffd")
        if whole.startswith(shown) and whole != shown:
            yield whole[len(shown) :]
            shown = whole
    if text != shown:
        yield text[len(shown) :]
