"""Does serving stay as it began: are programs compiled after the first requests, does memory grow?

    python experiments/steady.py $MODEL --requests 1000 --seeds 0 --out runs/steady

Requests of 1, 2 or 4 prompts of 1 to --longest random tokens, 1 to --new-tokens new ones each, greedy or sampled in
one of three ways, one after the other in one process; the seed decides. Of every hundred requests: programs compiled
(by JAX's own events), bytes of all live arrays and of the process (resident) after them, median milliseconds a new
token. Expected: no program is compiled for shapes that were seen, and memory is flat once they all were.
The first row is a warm-up (`chai_jax.warm_up`), which compiles all that such requests need beforehand, so that none of
them should; `--no-warm-up` leaves it out. `--passes 2` serves the same requests again.

Writes steady.json, .csv and .md.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chai_jax.console import track
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.report.tables import Column
from chai_jax.serve.generate import generate_tokens, warm_up
from lab.memory import gib, resident
from lab.options import Common, Record, start
from lab.publish import publish

BATCHES = (1, 2, 4)  # prompts of a request
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
)
GROUP = 100  # requests in a row of the table
COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of jax.monitoring, one a program
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("pass", lambda row: str(row["pass"] or "warm-up")),
    ("requests", lambda row: f"{row['first']} to {row['last']}" if row["pass"] else f"{row['shapes']} shapes"),
    ("programs compiled", lambda row: str(row["compiled"])),
    ("live arrays, bytes", lambda row: f"{row['live_bytes']:,}"),
    ("resident, GiB", lambda row: gib(row["resident_bytes"])),
    ("ms a new token, median", lambda row: f"{row['ms_per_token']:.2f}" if row["pass"] else "-"),
    ("seconds", lambda row: f"{row['seconds']:.1f}"),
)


@dataclass(frozen=True)
class SteadyOptions(Common):
    requests: int = 1000
    """How many are served in a pass."""
    passes: int = 1
    """How often the same requests are served."""
    longest: int = 200
    """Tokens of the longest prompt."""
    new_tokens: int = 16
    """The most new tokens of a request."""
    warm_up: bool = True
    """Compile everything beforehand."""


def request(model: Model, random: np.random.Generator, options: SteadyOptions) -> dict[str, Any]:
    """Arguments of `generate_tokens`."""
    rows = int(random.choice(BATCHES))
    lengths = random.integers(1, options.longest + 1, rows)
    prompts = [random.integers(4, model.config.vocab_size, length).tolist() for length in lengths]
    return {
        "prompts": prompts,
        "max_new_tokens": int(random.integers(1, options.new_tokens + 1)),
        "seed": int(random.integers(2**31)),
        "stop": False,
        **SETTINGS[random.integers(len(SETTINGS))],
    }


def state(compiled: list[str], began: float) -> Record:
    """What the process holds, and how many programs it has compiled since `compiled` was emptied."""
    gc.collect()
    return {
        "compiled": len(compiled),
        "live_bytes": sum(array.nbytes for array in jax.live_arrays()),
        "resident_bytes": resident(),
        "seconds": time.perf_counter() - began,
    }


def warm(model: Model, options: SteadyOptions, compiled: list[str]) -> Record:
    """The row of the warm-up, as pass 0."""
    compiled.clear()
    began = time.perf_counter()
    shapes = warm_up(model, BATCHES, options.longest, options.new_tokens)
    return {"pass": 0, "shapes": shapes} | state(compiled, began)


def serve(model: Model, options: SteadyOptions, number: int, seed: int, compiled: list[str]) -> Iterator[Record]:
    """A row for every `GROUP` requests of pass `number`; `compiled` grows by one with every program."""
    random = np.random.default_rng(seed)
    for first in track(range(0, options.requests, GROUP), f"Serving {options.requests} requests"):
        last = min(first + GROUP, options.requests)
        times = []
        compiled.clear()
        started = time.perf_counter()
        for _ in range(first, last):
            asked = request(model, random, options)
            began = time.perf_counter()
            generate_tokens(model, **asked)
            times.append(1e3 * (time.perf_counter() - began) / asked["max_new_tokens"])
        served = {"pass": number, "first": first + 1, "last": last, "ms_per_token": float(np.median(times))}
        yield served | state(compiled, started)


def steady(options: SteadyOptions) -> Record:
    """All models, one after the other."""
    compiled: list[str] = []

    def heard(event: str, duration: float, **_: Any) -> None:
        if event == COMPILED:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    rows: list[Record] = []
    findings = []
    for source in options.model:
        model = load(source)
        (seed,) = options.seed_numbers[:1]
        before = [warm(model, options, compiled)] if options.warm_up else []
        passes = range(1, options.passes + 1)
        mine = [row for number in passes for row in serve(model, options, number, seed, compiled)]
        rows += [{"model": Path(source).name} | row for row in [*before, *mine]]
        settled = mine[len(mine) // 2 :]
        grown = settled[-1]["live_bytes"] - settled[0]["live_bytes"]
        findings.append(
            f"{Path(source).name}: {sum(row['compiled'] for row in before)} programs compiled before the first of "
            f"{len(passes) * options.requests:,} requests, {sum(row['compiled'] for row in mine)} while they were "
            f"served, {sum(row['compiled'] for row in settled)} in their second half; live arrays grew by {grown:,} "
            f"bytes there, the process by {settled[-1]['resident_bytes'] - settled[0]['resident_bytes']:,}."
        )
    return publish(options, "steady", "Serving many requests", rows, COLUMNS, findings=findings)


if __name__ == "__main__":
    start(steady, SteadyOptions, __doc__)
