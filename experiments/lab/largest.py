"""The largest batch that decodes on this device: found by compiling, then run."""

from functools import partial
from typing import Any

import jax

from chai_jax.aot import gpu
from chai_jax.aot.compiled import GIB, largest_batch
from chai_jax.aot.programs import AbstractModel, Job, lower, spec_of
from chai_jax.bench.race import Shape
from chai_jax.console import console
from chai_jax.files.published import architecture_of
from chai_jax.machine.memory import program_bytes
from chai_jax.model.kernels import choose_kernels
from chai_jax.model.model import Model
from chai_jax.model.sharding import Layout, make_mesh
from lab.decoding import Held, Ours, exhausted, random_layers
from lab.options import Record


def memory_limit(given: float | None) -> int | None:
    """Bytes that a program may hold: GiB as given, or what JAX may take of the device; None where nobody says."""
    if given is not None:
        return int(given * GIB)
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def searched(shape: str, choices: dict[str, Any], end: int, first: int, limit: int) -> Record:
    """`largest`, `too_large`, how many programs were `compiled`, and the bytes `needed` by the largest.

    Args:
        choices: of `spec_of`.
        end: columns of the cache.
        first: batch to begin with.
    """
    config, on_gpu = architecture_of(shape), jax.default_backend() == "gpu"
    abstract = AbstractModel(config, spec_of(config, **choices), Layout(make_mesh(1)))
    attention = choose_kernels("auto", jax.devices()[:1])

    def account(batch: int) -> Record:
        with console.status(f"compiling batch {batch}"):
            lowered = lower(Job("decode", batch, end, attention=attention), abstract)
            needed = program_bytes(lowered.compile(compiler_options=gpu.OPTIONS if on_gpu else None))
        return {"fits": needed <= limit, "hbm": {"at_most": needed}, "hbm_needed": needed, "hbm_limit": limit}

    found = largest_batch(account, 1, first, tell=lambda line: console.print(line, highlight=False))
    needed = found["fitting"]["hbm_needed"] if found["fitting"] else None
    return {name: found[name] for name in ("largest", "too_large", "compiled")} | {"needed": needed}


def ran(model: Model, largest: int, end: int, seed: int) -> int:
    """The largest batch that really decoded the last two of `end` positions: from `largest` on, 5 % fewer each time."""
    batch, held = largest, Held.of(model, Shape(1, end - 2, 2), seed)
    model = model.replace(params={})  # what was folded is in memory once
    while batch > largest // 2:
        try:
            # The program first: XLA, which tries kernels out, finds no room beside a cache that fills the memory.
            held.layers = jax.eval_shape(partial(random_layers, model.spec, batch, end, seed))
            with console.status(f"compiling batch {batch}"):
                ours = Ours(model, Shape(batch, end - 2, 2), seed, held)
            held.layers = random_layers(model.spec, batch, end, seed)
            ours.lap()
        except jax.errors.JaxRuntimeError as error:
            if not exhausted(error):
                raise
            console.print(f"batch {batch}: memory ran out", highlight=False)
            batch = batch * 95 // 100
        else:
            console.print(f"batch {batch}: decoded", highlight=False)
            return batch
    return 0
