"""How long is a decoding step over each cache format, on one device?

    JAX_NUM_CPU_DEVICES=1 python experiments/decode_formats.py --model HuggingFaceTB/SmolLM2-135M --out runs/formats

    python experiments/decode_formats.py --model facebook/opt-1.3b --batch 64 --start 1920 --out runs/formats_gpu

The first command is for one CPU, the second for one GPU of 80 GB or more (a H200: under 8 minutes, most of it
compiling; then once more with `--attention xla`). Random weights of --model, all heads, no files and no network; the
cache is filled with random entries up to --start, and no prompt is read. The formats take turns in each of --rounds
rounds of one process; a ratio is to the first format, round by round, below 1 where this one is faster. Expected on two
CPU cores with a C++ compiler: formats of blocks take 0.6 to 0.8 of int8's time. On GPUs nothing was timed yet.

Writes decode_formats.json, .csv and .md.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import jax

from chai_jax.bench.floor import probe_rates
from chai_jax.bench.race import Shape, percentiles
from chai_jax.compress.quantize import with_storage
from chai_jax.console import console
from chai_jax.errors import InputError
from chai_jax.files.published import architecture_of, random_model
from chai_jax.model.execution import Execution
from chai_jax.model.kernels import choose_kernels, packed_gpu
from chai_jax.model.sharding import one_device
from chai_jax.plans.formats import STORAGES
from chai_jax.report.tables import Column, with_percentiles
from chai_jax.run.options import parse_list
from lab.decoding import Ours
from lab.options import Record, command_line, start
from lab.publish import publish
from lab.race import in_turn, row_of

COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("cache", lambda row: row["cache"]),
    ("MB", lambda row: f"{row['bytes']['kv'] / 1e6:,.0f}"),
    ("ms a step", lambda row: with_percentiles(row["ms"], 1)),
    ("ratio to the first", lambda row: with_percentiles(row["ratio"], 2)),
)


@dataclass(frozen=True)
class FormatsOptions:
    model: str = "facebook/opt-125m"
    """Shape: a published one, or a folder with a config.json."""
    storages: str = "int8,int4,k4v4,k3v3"
    """Cache formats, with commas."""
    batch: int = 8
    """Sequences at once."""
    start: int = 1984
    """Columns of the cache that are in use when decoding begins."""
    steps: int = 64
    """Decoding steps of a round: whole blocks of every format."""
    rounds: int = 5
    """Rounds; medians with their 10th and 90th percentile are reported."""
    attention: str = "auto"
    """auto (the kernels of the device), or xla."""
    seed: int = 0
    """Seed of weights and inputs."""
    out: Path = Path("runs/experiments")
    """Folder of the table."""

    @property
    def command(self) -> str:
        return command_line({})

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        return (self.seed,)

    def check(self) -> None:
        """Raise InputError unless this can be measured."""
        parse_list("--storages", self.storages, STORAGES)
        if self.attention not in ("auto", "xla"):
            raise InputError(f"--attention is {self.attention!r:.80}; expected auto or xla")
        for name in ("batch", "start", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; expected at least 1")
        if self.start + self.steps > (most := architecture_of(self.model).max_positions):
            raise InputError(f"--start {self.start} and --steps {self.steps} do not fit {most} positions")


def decode_formats(options: FormatsOptions) -> Record:
    """A row a format."""
    options.check()
    names = [name.strip() for name in options.storages.split(",") if name.strip()]  # in the order that was asked for
    if options.attention == "auto":
        os.environ.setdefault(packed_gpu.UNTRIED, "1")
    how = Execution.choose(layout=one_device(), kernels=choose_kernels(options.attention, jax.devices()[:1]))
    dense = random_model(options.model, options.seed).replace(execution=how)
    shape = Shape(options.batch, options.start, options.steps)
    models = {storage: with_storage(dense, storage) for storage in names}
    ready = {}
    for storage, model in models.items():
        with console.status(f"compiling {options.model} over {storage}"):
            ready[storage] = Ours(model, shape, options.seed)
    rounds, rates = in_turn(ready, options.rounds), probe_rates(how.dtype)
    rows = [
        {
            "model": options.model,
            **row_of(storage, one, models[storage], rounds, "decode_ms_per_token", rates, options.batch),
            "ratio": percentiles(rounds[storage] / rounds[names[0]]),
            "start": options.start,
            "steps": options.steps,
            "attention": how.kernels,
        }
        for storage, one in ready.items()
    ]
    return publish(options, "decode_formats", "A decoding step over each cache format", rows, COLUMNS)


if __name__ == "__main__":
    start(decode_formats, FormatsOptions, __doc__)
