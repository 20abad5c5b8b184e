"""How much what a model says depends on rounding alone, by what its cache is stored in.

    python experiments/rounding.py $MODEL --text wiki.test.raw --storages float32,bfloat16,int8,k4v4 --seeds 0

The same prompt is read in four ways that are equal but for rounding: by itself; as one of four equal rows; with
padding behind it; and piece by piece, as `chai-jax serve` reads it. Of each: the KL divergence of the distribution of
its next token from that of the prompt by itself, and from the one with a float32 cache.

Expected: with a float32 cache nothing but rounding's own size; with a cache of few bits up to the format's own damage:
a number near the border of two levels is read back as the other one, which moves others in every layer after it. So
texts of one model are not the same from batch to batch, and none of them is the wrong one. Writes rounding.json, .csv,
.md.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from chai_jax.compress.quantize import with_storage
from chai_jax.console import track
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.evaluation.statistics import standard_error
from chai_jax.files.store import load
from chai_jax.model.decoder import forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import UNFITTED
from chai_jax.plans.spec import Spec
from chai_jax.report.tables import Column
from chai_jax.run.options import parse_list
from chai_jax.serve.decode import serving_params
from chai_jax.serve.slots import capacity_of, padded, pieces, read
from lab.options import Common, Record, start
from lab.publish import publish

WAYS = ("four rows", "padded", "in pieces")
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("cache", lambda row: row["cache"]),
    ("n", lambda row: str(row["n"])),
    ("from a float32 cache: by itself", lambda row: shown(row["damage"]["by itself"])),
    *((way, partial(lambda way, row: shown(row["damage"][way]), way)) for way in WAYS),
    *((f"from by itself: {way}", partial(lambda way, row: shown(row["rounding"][way]), way)) for way in WAYS),
)


def shown(found: Record) -> str:
    """A mean in nats with its standard error."""
    return f"{found['mean']:.2g} ± {found['error']:.1g}"


@dataclass(frozen=True)
class RoundingOptions(Common):
    text: Path | None = None
    """A text file, plain or .gz."""
    storages: str = "float32,bfloat16,int8,k4v4"
    """Cache formats, with commas."""
    prompts: int = 16
    length: int = 700
    """Tokens of a prompt."""


Distribution = Float[np.ndarray, " V"]  # log-probabilities


@partial(jax.jit, static_argnames=("config", "spec", "how"))
def after(config: Architecture, spec: Spec, params: Params, tokens: Array, mask: Array, *, how: Execution) -> Array:
    """The distribution of the token after the first row."""
    newest = mask.sum(axis=1, keepdims=True, dtype=jnp.int32) - 1
    hidden = forward(config, spec, params, tokens, mask, how, wanted=newest).hidden
    return jax.nn.log_softmax(unembed(config, params, hidden[:, -1], how))[0]


def read_in(model: Model, params: Params, way: str, prompt: list[int]) -> Distribution:
    """What follows a prompt that is read in one way; `params` are the model's `serving_params`."""
    config, how = model.config, model.how
    if way == "in pieces":
        cache, hidden = None, None
        for first, last in pieces(0, len(prompt)):
            tokens, mask = padded(prompt[first:last], config.pad_token_id)
            capacity = capacity_of(len(prompt))
            cache, hidden = read(config, model.spec, params, cache, tokens, mask, capacity=capacity, how=how)
        return np.asarray(jax.nn.log_softmax(unembed(config, params, hidden[:, -1], how))[0], np.float64)
    rows, columns = 4 if way == "four rows" else 1, len(prompt) + (64 if way == "padded" else 0)
    tokens = np.full((rows, columns), config.pad_token_id, np.int32)
    tokens[:, : len(prompt)] = prompt
    mask = np.broadcast_to(np.arange(columns) < len(prompt), tokens.shape)
    return np.asarray(after(config, model.spec, params, tokens, mask, how=how), np.float64)


def mean_kl(from_: list[Distribution], to: list[Distribution]) -> Record:
    """KL(from || to) in nats: the mean over prompts and its standard error."""
    each = np.array([np.sum(np.exp(one) * (one - other)) for one, other in zip(from_, to, strict=True)])
    return {"mean": float(each.mean()), "error": standard_error(each)}


def rounding(options: RoundingOptions) -> Record:
    """All models, one after the other."""
    if options.text is None or options.prompts < 2 or options.length < 2:
        raise InputError("expected --text FILE, at least two --prompts, and a --length of at least 2")
    rows: list[Record] = []
    for source in options.model:
        dense = load(source, storage="float32")
        cut = windows(dense.tokenizer, read_text_file(options.text), options.length)[: options.prompts]
        prompts = [list(window.tokens) for window in cut]
        if len(prompts) < 2:
            raise InputError(f"the text makes {len(prompts)} prompts; expected two or more: give a longer --text")
        params = serving_params(dense, dense.how)  # the same for every storage
        best = [read_in(dense, params, "by itself", prompt) for prompt in track(prompts, "float32")]
        for storage in parse_list("--storages", options.storages, UNFITTED):
            model = with_storage(dense, storage)
            found = {way: [read_in(model, params, way, p) for p in track(prompts, way)] for way in ("by itself", *WAYS)}
            damage = {way: mean_kl(best, each) for way, each in found.items()}
            between = {way: mean_kl(found["by itself"], found[way]) for way in WAYS}
            about = {"model": Path(source).name, "cache": storage, "n": len(prompts)}
            rows.append(about | {"damage": damage, "rounding": between})
    return publish(options, "rounding", "What rounding alone does", rows, COLUMNS)


if __name__ == "__main__":
    start(rounding, RoundingOptions, __doc__)
