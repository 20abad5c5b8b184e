"""How fast is it for whoever waits? Tokens a second and time to the first token, dense and compressed, beside torch.

    python experiments/speed.py $MODEL --compressed fb/smollm2-20 --storages k4v4 --seeds 0 \
        --out runs/speed
    python experiments/speed.py $MODEL --compressed fb/smollm2-20 --no-peer --parts largest --seeds 0 --out runs/largest

decode   the last --steps tokens of each of --contexts, for each of --batches: the dense model with a bfloat16 cache,
         each of --compressed as it was saved, each of --storages, and transformers (eager, a static cache). The cache
         is filled with random entries: no prompt is read, and no time depends on what is in it.
first    one prompt of each of --contexts, read up to its first new token.
largest  the largest batch of the longest context whose cache and weights fit --memory (default: what JAX may take of
         the device): it decodes two steps; if memory runs out, 5 % fewer are tried. On a GPU set
         XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 and XLA_PYTHON_CLIENT_PREALLOCATE=true.

All of one batch and context take turns in each of --rounds rounds of one process. Ratios are to the dense model, round
by round, below 1 where faster. What does not fit --memory beside the others is left out, and said so. On one GPU the
same commands run with the device's kernels, and transformers with torch.compile. Expected on a CPU: nothing gained at
512 tokens and batch 1, where weights are what is read; more, the longer the context and the larger the batch.

Writes speed.json, .csv, .md, and NAME-tokens-a-second, a picture of each model.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before jax is imported: torch needs memory too

import jax

from chai_jax.bench.floor import Rates, probe_rates
from chai_jax.bench.race import Shape, percentiles
from chai_jax.commands.bench import numbers
from chai_jax.console import console
from chai_jax.errors import InputError
from chai_jax.machine.memory import free_bytes
from chai_jax.model.cache import cache_bytes
from chai_jax.model.model import Model
from chai_jax.report.figures.curves import cost_against
from chai_jax.report.tables import Column, with_percentiles
from chai_jax.run.options import parse_list
from chai_jax.serve.decode import serving_params
from lab.caches import DENSE, caches
from lab.decoding import Ours, Transformers, release
from lab.largest import memory_limit, ran
from lab.options import Common, Record, start
from lab.publish import publish
from lab.race import in_turn, row_of
from lab.reading import Read, TransformersReads
from lab.rows import where

PARTS = ("decode", "first", "largest")
PEER = "transformers"
COLUMNS: tuple[Column, ...] = (
    ("part", lambda row: row["part"]),
    ("model", lambda row: row["model"]),
    ("cache", lambda row: row["cache"]),
    ("batch", lambda row: str(row["batch"])),
    ("context", lambda row: f"{row['context']:,}"),
    ("cache, MB", lambda row: f"{row['bytes']['kv'] / 1e6:,.0f}" if "kv" in row.get("bytes", {}) else "-"),
    ("ms", lambda row: with_percentiles(row["ms"], 1) if "ms" in row else row.get("absent", "-")),
    ("tokens a second", lambda row: with_percentiles(row["rate"], 1) if "rate" in row else "-"),
    ("of the dense model's time", lambda row: with_percentiles(row["ratio"], 2) if "ratio" in row else "-"),
)


@dataclass(frozen=True)
class SpeedOptions(Common):
    compressed: tuple[str, ...] = ()
    """Folders of compressed models."""
    storages: str = ""
    """Cache formats of the dense model beside bfloat16, with commas."""
    parts: str = "decode,first"
    """What to measure, with commas: decode, first, largest."""
    batches: str = "1,8,32"
    """Sequences at once, with commas."""
    contexts: str = "512,2048,8192"
    """Tokens of a sequence, with commas."""
    steps: int = 64
    """Decoding steps of a round: a whole block of every format."""
    rounds: int = 3
    """Rounds; medians with their 10th and 90th percentile are reported."""
    peer: bool = True
    """Time transformers beside ours."""
    memory: float | None = None
    """GiB that all that take turns may hold (default: 0.8 of what is free, or what JAX may take of a GPU)."""

    def check(self) -> None:
        """Raise InputError unless this can be measured."""
        if self.steps < 1 or self.rounds < 1:
            raise InputError("expected at least one of --steps and of --rounds")
        if not self.steps < min(numbers("contexts", self.contexts, int)):
            raise InputError(f"--steps {self.steps} are not fewer than the tokens of each of --contexts")
        numbers("batches", self.batches, int)
        parse_list("--parts", self.parts, PARTS)

    @property
    def limit(self) -> int | None:
        """Bytes."""
        found = memory_limit(self.memory)
        return found if found is not None or (free := free_bytes()) is None else int(0.8 * free)


def fitting(models: dict[str, Model], batch: int, columns: int, options: SpeedOptions) -> tuple[list[str], list[str]]:
    """Names of those that fit the memory side by side, in order of their size, and of those that do not."""
    sizes = {name: model.nbytes + cache_bytes(model.spec, batch, columns) for name, model in models.items()}
    if options.peer:
        dense = models[DENSE]
        wider = jax.numpy.dtype(dense.how.dtype).itemsize // 2  # torch's cache has the dtype that is computed in
        sizes[PEER] = dense.nbytes + wider * cache_bytes(dense.spec, batch, columns)
    fit, out, left = [], [], options.limit
    for name in sorted(sizes, key=lambda name: (name != DENSE, sizes[name])):
        if left is None or sizes[name] <= left:
            fit.append(name)
            left = left if left is None else left - sizes[name]
        else:
            out.append(name)
    return fit, out


def timed(
    part: str, batch: int, context: int, build: dict[str, Callable[[], Any]], models: dict[str, Model], rates: Rates,
    options: SpeedOptions,
) -> list[Record]:  # fmt: skip
    """Rows of what takes turns at one batch and context, and of what has no room there."""
    about = {"part": part, "batch": batch, "context": context}
    fit, out = fitting(models, batch, context, options)
    absent = [{**about, "cache": name, "absent": "no room beside the others"} for name in out]
    if DENSE not in fit:
        return [{**about, "cache": DENSE, "absent": "no room"}, *absent]
    ready = {}
    for name in fit:
        with console.status(f"{part}, batch {batch}, context {context}: compiling {name}"):
            ready[name] = build[name]()
    rounds = in_turn(ready, options.rounds)
    measure, each = ("decode_ms_per_token", batch) if part == "decode" else ("prefill_ms", 1)
    rows = [
        {
            **row_of(name, one, models.get(name, models[DENSE]), rounds, measure, rates, each),
            **about,
            "ratio": percentiles(rounds[name] / rounds[DENSE]),
        }
        for name, one in ready.items()
    ]
    for row in rows if part == "first" else []:
        del row["rate"]  # of prompts a second nobody asked
    return rows + absent


def raced(part: str, models: dict[str, Model], options: SpeedOptions) -> Iterator[list[Record]]:
    """A row for all that fit, batch by batch and context by context."""
    dense, seed = models[DENSE], options.seed_numbers[0]
    gpu = jax.default_backend() == "gpu"
    torch = ("cuda", "bfloat16", "inductor") if gpu else ("cpu", dense.how.dtype.name, None)
    params = {name: serving_params(model, model.how) for name, model in models.items()} if part == "first" else {}
    rates = probe_rates(dense.how.dtype)
    for context in numbers("contexts", options.contexts, int):
        for batch in numbers("batches", options.batches, int) if part == "decode" else [1]:
            build: dict[str, Callable[[], Any]]
            if part == "decode":
                shape = Shape(batch, context - options.steps, options.steps)
                build = {name: partial(Ours, model, shape, seed) for name, model in models.items()}
                build[PEER] = partial(Transformers, dense, shape, *torch)
            else:
                shape = Shape(1, context - 1)
                build = {name: partial(Read, model, params[name], shape, seed) for name, model in models.items()}
                build[PEER] = partial(TransformersReads, dense, shape, seed, *torch[:2])
            yield timed(part, batch, context, build, models, rates, options)
            release()


def largest(models: dict[str, Model], options: SpeedOptions) -> Iterator[list[Record]]:
    """Of each model the largest batch of the longest context that decoded two steps."""
    context, limit = max(numbers("contexts", options.contexts, int)), options.limit
    if limit is None:
        raise InputError("nobody says how much memory this device has; expected --memory GIB")
    for name, model in models.items():
        fits = max(0, limit - model.nbytes) // cache_bytes(model.spec, 1, context)
        batch = ran(model, fits, context, options.seed_numbers[0])
        kv = {"kv": cache_bytes(model.spec, batch, context)}
        yield [{"part": "largest", "cache": name, "batch": batch, "context": context, "fits": fits, "bytes": kv}]


def picture(name: str, rows: list[Record], options: SpeedOptions) -> None:
    """One model's tokens a second against the context, a line a cache, a panel a batch."""
    drawn = [
        {"cache": row["cache"], "batch": row["batch"], "context": row["context"], "rate": row["rate"]["median"]}
        | {"rate_low": row["rate"]["p10"], "rate_high": row["rate"]["p90"]}
        for row in rows
        if row["model"] == name and "rate" in row
    ]
    if drawn:
        caption = f"Median and 10th to 90th percentile of {options.rounds} rounds in turn; {where()}."
        axes = {"x": "context", "x_label": "tokens of the context", "y": "rate", "y_label": "tokens a second"}
        cost_against(options.out / f"{name}-tokens-a-second", drawn, caption, **axes, series="cache")


def speed(options: SpeedOptions) -> Record:
    """All models and parts, written as they come."""
    options.check()
    rows: list[Record] = []
    record: Record = {}
    for source in options.model:
        name, models = Path(source).name, dict(caches(source, options.storages, options.compressed))
        models[DENSE].check_length(max(numbers("contexts", options.contexts, int)))
        for part in parse_list("--parts", options.parts, PARTS):
            for found in largest(models, options) if part == "largest" else raced(part, models, options):
                rows += [{"model": name, **row} for row in found]
                record = publish(options, "speed", "Speed that a user sees", rows, COLUMNS)
        picture(name, rows, options)
    return record


if __name__ == "__main__":
    start(speed, SpeedOptions, __doc__)
