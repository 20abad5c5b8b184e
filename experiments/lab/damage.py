"""What a smaller cache costs: KL divergence and change of perplexity, window by window, beside its bytes."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from chai_jax.compress.basis_stream import sharing_programs
from chai_jax.console import track
from chai_jax.data.text import read_text_file, windows
from chai_jax.evaluation.statistics import paired
from chai_jax.model.cache import empty
from chai_jax.model.decoder import final_norm, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.layerwise import embed_text, how_in_float32, rest_of, through
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.channels import count_channels
from chai_jax.report.figures.curves import cost_against
from chai_jax.report.tables import Column
from chai_jax.score.divergence import kl_divergence
from lab.options import Record

ROWS = 4  # windows at once
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("cache", lambda row: row["cache"]),
    ("a token, % of bfloat16", lambda row: f"{100 * row['token']:.1f}"),
    ("a window, %", lambda row: f"{100 * row['sequence']:.1f}"),
    ("multiply-adds, %", lambda row: f"{100 * row['macs']:.0f}" if "macs" in row else ""),
    ("KL, nats [95 %]", lambda row: "{:.4f} [{:.4f}, {:.4f}]".format(*row["kl"])),
    ("perplexity, change % [95 %]", lambda row: "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["perplexity_change"])),
)
WEIGHTS: Column = ("weights, % of dense", lambda row: f"{100 * row['weights']:.1f}")


def whole_windows(tokenizer: Any, text: Path, length: int, count: int) -> np.ndarray:
    """The first `count` windows of a text, int32 [windows, length]; a short last one is left out."""
    cut = windows(tokenizer, read_text_file(text), length)[:count]
    return np.asarray([one.tokens for one in cut if len(one.tokens) == length], np.int32)


@jax.jit
def compared(truth: Array, logits: Array, targets: Array) -> tuple[Array, Array]:
    """Sums over each window [B] of the KL, and of the rise of the loss, nats."""
    right, wrong = jax.nn.log_softmax(truth), jax.nn.log_softmax(logits)
    rise = jnp.take_along_axis(right - wrong, targets[..., None], -1)[..., 0]
    return kl_divergence(right, wrong).sum(axis=1), rise.sum(axis=1)


def layer_by_layer(model: Model) -> Callable[[np.ndarray], Any]:
    """Logits of a model whose layers go one by one, in float32: what has few bits compiles in seconds, not a minute."""
    shared = sharing_programs(model)

    def logits(tokens: np.ndarray) -> Array:
        mask = np.ones(tokens.shape, bool)
        x = embed_text(shared, tokens, mask)
        for index in range(shared.config.num_layers):
            x = through(shared, index, x, mask)
        return _unembedded(shared.config, how_in_float32(shared), rest_of(shared.params), x)

    return logits


@partial(jax.jit, static_argnums=(0, 1))
def _unembedded(config: Architecture, how: Execution, params: Params, x: Array) -> Array:
    return unembed(config, params, final_norm(config, params, x), how)


def damage(
    truth: Callable[[np.ndarray], Any], changed: Sequence[Callable[[np.ndarray], Any]], tokens: np.ndarray, rows: int
) -> np.ndarray:
    """Mean KL and rise of the loss of each window: [changed, 2, windows].

    Args:
        truth: logits [B, T, V] of tokens int32 [B, T]; `changed` likewise, of smaller caches.
        rows: windows that are read at once.
    """
    found: list[list[np.ndarray]] = [[] for _ in changed]
    for first in track(range(0, len(tokens), rows), "Reading windows"):
        part = tokens[first : first + rows]
        right = jnp.asarray(truth(part))[:, :-1]
        for each, results in zip(changed, found, strict=True):
            results.append(np.asarray(compared(right, jnp.asarray(each(part))[:, :-1], part[:, 1:])))
    return np.stack([np.concatenate(results, axis=1) for results in found]) / (tokens.shape[1] - 1)


def figures(kl: np.ndarray, rise: np.ndarray) -> Record:
    """The part of a row that `damage` gives, from one value a window: means with 95 % intervals."""
    low, high = paired(np.zeros_like(kl), kl).difference_interval
    change = paired(np.zeros_like(rise), rise)
    nats = (change.difference, *change.difference_interval)
    return {
        "n": len(kl),
        "kl": [float(kl.mean()), low, high],
        "perplexity_change": [100 * float(np.expm1(x)) for x in nats],
    }


def sizes(changed: Model, dense: Model, window: int) -> Record:
    """Bytes of a token and of a whole window, summed from allocated arrays, and multiply-adds of attention to a window:
    all as fractions of the dense model's."""
    whole = [empty(model.spec, 1, window).nbytes for model in (changed, dense)]
    token = changed.kv_bytes_per_token / dense.kv_bytes_per_token
    macs = score_macs(changed, window) / score_macs(dense, window)
    return {"token": token, "sequence": whole[0] / whole[1], "macs": macs}


def score_macs(model: Model, columns: int) -> int:
    """Multiply-adds of attention scores and mixed values of one token against `columns` cached ones; of keys in a basis
    with those that make keys, and what is foretold of values, from coordinates."""
    return columns * sum(
        layer.query_heads * layer.key_rank
        + layer.output_heads * layer.value_rank
        + layer.key_heads * count_channels(layer.channels) * (layer.key_rank + layer.value_rank)
        for layer in model.spec.layers
    )


def frontier(path: Path, rows: Sequence[Record], kinds: Sequence[str], caption: str) -> None:
    """A picture of KL against bytes, one line a kind; of each kind only rows that no smaller one of it beats.

    Args:
        path: of its files, without suffix.
        kinds: of the rows, one each.
    """
    pairs = list(zip(rows, kinds, strict=True))
    drawn = [
        {
            "model": row["model"],
            "cache": row["cache"],
            "kind": kind,
            "percent": 100 * row["token"],
            **dict(zip(("kl", "kl_low", "kl_high"), row["kl"], strict=True)),
        }
        for row, kind in pairs
        if not any(
            other["token"] <= row["token"] and other["kl"][0] < row["kl"][0]
            for other, beside in pairs
            if (beside, other["model"]) == (kind, row["model"])
        )
    ]
    axes = {"x": "percent", "x_label": "a further token, % of bfloat16", "y": "kl", "y_label": "KL (nats/token)"}
    cost_against(path, drawn, caption, **axes, series="kind", panel="model")
