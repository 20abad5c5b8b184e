"""`chai-jax bench`: how long models take and how much they hold, side by side in one run."""

import os
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

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


@dataclass(frozen=True)
class BenchCommand:
    """Time models side by side: first token, each token, scoring; with bytes, and the least this machine would allow.

    Interleaved rounds on one device, medians with p10 and p90, compile time apart; ratios are to the first MODEL.
    XLA computes on all CPUs that this process may run on: bind it with `taskset -c 0-3 chai-jax bench ... --threads 4`.
    """

    models: Positional[tuple[str, ...]]
    """Hub ids, folders (dense or compressed), `toy`, or random:SHAPE (random weights; SHAPE is facebook/opt-125m and
    its like, or a folder with a config.json)."""
    batch: str = "1,8"
    """Sequences at once; several with commas."""
    prompt: str | None = None
    """Tokens of a prompt; several with commas (default: 32,512 as far as the models' positions allow)."""
    new_tokens: int = 32
    """Decoding steps behind each prompt."""
    question: int = 48
    """Tokens of a scored question with its two one-token answers (SST-2's median is about 40)."""
    trials: int = 9
    """Rounds."""
    tokens: int = 0
    """Also the mean over that many decoded tokens a model and shape (the paper: 100000); longer NEW_TOKENS help."""
    clusters: str | None = None
    """Beside each dense MODEL, variants with this fraction of the heads in every layer; several with commas."""
    share: Literal["qk", "qkv"] = "qkv"
    """With --clusters: what the heads of a cluster share."""
    storage: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """With --clusters: format of the variants' cache (default: as the MODEL's)."""
    attention: Literal["auto", "xla", "pallas", "native"] = "auto"
    """How the models attend: XLA's own programs, or kernels (pallas: decoding and long prompts on one NVIDIA GPU, or
    one TPU from v4 on; native: decoding on one CPU, and its products). auto: kernels on one GPU, or one CPU that has a
    C++ compiler."""
    peer: Literal["hf", "ctranslate2"] | None = None
    """Time the first MODEL, with all its heads, in torch transformers or CTranslate2 too. One a run: in one process
    their threads put each other to sleep."""
    threads: int | None = None
    """Threads of the peers (default: as many as the CPUs this process may run on, which is what XLA takes)."""
    seed: int = 0
    """Seed of prompts and of random weights."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
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
        from chai_jax.report.bench import COLUMNS, note, write
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
        print_table(terminal(record["rows"], f"chai-jax bench, {record['device']}", COLUMNS))
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

        models = {source: open_model(source, self.seed, execution) for source in dict.fromkeys(self.models)}
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


def open_model(source: str, seed: int, execution: Any) -> Any:
    """random:SHAPE, `toy`, or a model from a folder or the hub.

    Raises:
        InputError: there is none.
    """
    from chai_jax.adapt.toy import load_any
    from chai_jax.bench.sweep import random_model

    kind, _, shape = source.partition(":")
    if kind == "random":
        return random_model(shape, seed).replace(execution=execution)
    return load_any(source, seed=seed, execution=execution)


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
