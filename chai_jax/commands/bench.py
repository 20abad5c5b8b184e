"""`chai-jax bench`: how long models take and how much they hold, side by side in one run."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import metadata
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from chai_jax.commands.options import OptionalOutFolder
from chai_jax.config import DeviceConfig, check_seed
from chai_jax.console import console, print_table
from chai_jax.errors import InputError
from chai_jax.machine.processes import once

Options = dict[str, Any]
UNTOLD = ("devices", "out")  # options that decide no number
BOUNDS = {
    "new-tokens": (1, 2**20),
    "question": (1, 2**20),
    "trials": (1, 10**6),
    "tokens": (0, 10**9),
    "threads": (1, 2**12),
}


def _times(name: str) -> Callable[[dict[str, Any]], str]:
    """A median with its 10th and 90th percentile, to three digits."""

    def cell(row: dict[str, Any]) -> str:
        values = row[name]
        digits = max(0, 2 - math.floor(math.log10(max(values["median"], 1e-3))))
        middle, low, high = (f"{values[part]:,.{digits}f}" for part in ("median", "p10", "p90"))
        return f"{middle} [{low}, {high}]"

    return cell


def short_names(text: str) -> str:
    """Without the folders that paths in it begin with; of runs/a/model, which is a run's, `a/model` stays."""
    return re.sub(r"\S*[/:](?=\S)(?!model(?:\s|$))", "", text)


# Of the table on the terminal; bench.json has everything. The floor is the least time that this machine allows.
COLUMNS = (
    ("model", lambda row: short_names(row["model"])),
    ("batch", lambda row: str(row["batch"])),
    ("prompt, tokens", lambda row: str(row["prompt"])),
    ("first token, ms", _times("prefill_ms")),
    ("decoding, ms/step", _times("decode_ms_per_token")),
    ("step, ratio", lambda row: f"{row['ratio_to_first']['decode_ms_per_token']['median']:.2f}"),
    ("% of floor", lambda row: f"{100 * row['floor_fraction']['decode_ms_per_token']:.0f}"),
    ("tokens/s", lambda row: f"{row['tokens_per_second']['median']:,.0f}"),
    ("scored/s", lambda row: f"{row['inferences_per_second']['median']:,.1f}"),
)


@dataclass(frozen=True)
class BenchCommand:
    """Time models in turn: first token, each token, scoring, beside the least time this machine allows."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL ...")]
    """Hub ids, folders (dense or compressed), `toy`, or random:SHAPE for random weights, where SHAPE is a published
    one, such as facebook/opt-125m or gpt2 (`chai-jax aot --help` lists them), or a folder with a config.json. Ratios
    compare with the first MODEL."""
    batch: Annotated[str, arg(metavar="N,...")] = "1,8"
    """Sequences at once."""
    prompt: Annotated[str | None, arg(metavar="N,...")] = None
    """Tokens of a prompt (default: 32,512 as far as the models' positions allow)."""
    new_tokens: int = 32
    """Tokens to decode after each prompt."""
    question: int = 48
    """Tokens of a scored question with its two answers of one token (SST-2's median is about 40)."""
    trials: int = 9
    """Rounds in which every model has a turn."""
    tokens: int = 0
    """Also decode this many tokens with each model and shape, and report the mean (the paper: 100000)."""
    clusters: Annotated[str | None, arg(metavar="FRACTION,...")] = None
    """Beside each dense MODEL, time variants that keep this fraction of the key/value heads in every layer."""
    share: Literal["qk", "qkv"] = "qkv"
    """With --clusters: what the heads of a cluster share."""
    storage: Annotated[str | None, arg(metavar="FORMAT")] = None
    """With --clusters: cache format of the variants, such as int8 or k4v4 (default: that of MODEL)."""
    attention: Literal["auto", "xla", "pallas", "native"] = "auto"
    """What attention runs on. `xla`: XLA's own programs. `pallas`: kernels for one NVIDIA GPU, or one TPU from v4 on.
    `native`: kernels for one CPU. `auto`: kernels on one GPU, or on one CPU if there is a C++ compiler."""
    peer: Literal["hf", "ctranslate2"] | None = None
    """Also time the first MODEL, with all its heads, in torch transformers or in CTranslate2. One peer a run, because
    in one process the threads of two put each other to sleep."""
    threads: int | None = None
    """Threads of the peer (default: as many as the CPUs that this process may run on, which is what XLA takes). To bind
    both: `taskset -c 0-3 chai-jax bench ... --threads 4`."""
    seed: int = 0
    """Seed of prompts and random weights."""
    out: OptionalOutFolder = None
    """A new folder for bench.json, bench.csv, bench.md and pictures."""
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        import jax

        from chai_jax.bench.peers import AWAKE, PEERS, check_peer
        from chai_jax.bench.sweep import sweep
        from chai_jax.files.atomic import claim_folder
        from chai_jax.model.execution import Execution
        from chai_jax.model.kernels import choose_kernels
        from chai_jax.model.sharding import one_device
        from chai_jax.report.bench import note, write
        from chai_jax.report.tables import terminal
        from chai_jax.run.devices import start
        from chai_jax.run.environment import versions, where_computed

        asked, options = start(self.devices), self._checked()
        execution = Execution(asked.dtype, one_device(), choose_kernels(self.attention, jax.devices()[:1]))
        if self.peer:
            check_peer(self.peer)
        libraries = PEERS[self.peer].libraries if self.peer else ()
        if self.out is not None:
            claim_folder(self.out)
        threads = {"xla": available_cpus(), "peers": self.threads or available_cpus()}
        if self.peer and threads["xla"] != threads["peers"]:
            console.print(
                f"XLA computes on {threads['xla']} CPUs, the peers on {threads['peers']}: use taskset for equals"
            )
        entrants, over = self._entrants(options, threads["peers"], execution)
        found = sweep(entrants, over, self.trials, self.seed, self.tokens)
        record = {
            "options": options,
            **where_computed(asked.replace(kernels=execution.kernels)),
            "devices_used": 1,
            "attention": execution.kernels,
            "threads": threads | ({name: os.environ.get(name) for name in AWAKE} if self.peer else {}),
            "versions": versions() | {name: metadata.version(name) for name in libraries},
            **found,
        }
        title = f"chai-jax bench, {record['device']}: median [p10, p90]; ratio to the first model"
        print_table(terminal(record["rows"], title, COLUMNS))
        console.print(note(record), highlight=False, markup=False)
        if self.out is not None:
            once(partial(write, record, self.out))
        return record

    def _checked(self) -> Options:
        """What was asked for, lists parsed.

        Raises:
            InputError: no models, or a number that cannot be.
        """
        if not self.models:
            raise InputError("no MODEL; expected one or more: hub ids, folders, toy or random:facebook/opt-125m")
        check_seed(self.seed, "--seed")
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name.replace("-", "_"))
            if value is not None and not least <= value <= most:
                raise InputError(f"--{name} is {value}; expected at least {least} and at most {most:,}")
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in UNTOLD}
        lists = {
            "batch": numbers("batch", self.batch, int),
            "prompt": numbers("prompt", self.prompt or "", int),
            "clusters": numbers("clusters", self.clusters or "", float),
        }
        if not lists["batch"]:
            raise InputError("--batch is empty; expected numbers with commas, such as 1,8")
        return given | lists

    def _entrants(self, options: Options, threads: int, execution: Any) -> tuple[list[Any], list[Any]]:
        """Who is timed, the first MODEL first, and at which shapes."""
        from chai_jax.bench.race import Shape
        from chai_jax.bench.sweep import ours, peer, shapes, variants
        from chai_jax.sources import open_model

        models = {source: open_model(source, None, self.seed, execution) for source in dict.fromkeys(self.models)}
        rest = Shape(new_tokens=self.new_tokens, question=self.question)
        over = shapes(list(models.values()), options["batch"], options["prompt"], rest)
        entrants = []
        for source, model in models.items():
            entrants.append(ours(source, model))
            if model.spec.is_dense:
                entrants += variants(source, model, options["clusters"], self.share, self.storage)
        first = self.models[0]
        if self.peer:
            entrants.append(peer(self.peer, first, models[first], threads))
        return entrants, over


def numbers(name: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """What a list with commas holds, each once, in its order: whole numbers from 1 to 2^20, or fractions up to 1.

    Raises:
        InputError: something else is in it.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            value = kind(part)
        except ValueError:
            value = kind(-1)
        if not (1 <= value <= 2**20 if kind is int else 0 < value <= 1):
            counts, shares = "whole numbers from 1 to 1,048,576, such as 1,8", "fractions above 0, up to 1: 0.25,0.5"
            expected = counts if kind is int else shares
            raise InputError(f"--{name} is {text!r}; expected {expected}")
        found.append(value)
    return list(dict.fromkeys(found))


def available_cpus() -> int:
    """CPUs that this process may run on, which is how many threads XLA starts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
