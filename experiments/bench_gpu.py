"""What one GPU does: decoding and prompts, beside transformers; questions a second; the largest batch.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python experiments/bench_gpu.py --out runs/gpu

Needs one H100 or its like and jax[cuda12]; for the rows of transformers also torch with CUDA. Weights are random: no
files, no network. What is compared takes turns in each of `--rounds` rounds of one process, ratios are taken round by
round, and floors use rates probed before and after. `--parts` picks some of these:

decode   opt-1.3b, batch 64, positions 1920 to 2048: the compressed cache (share qkv, half the clusters, int8: about a
         quarter of the bytes) and the dense bfloat16 one, each with XLA's attention and with our kernel; transformers
         with a static cache and torch.compile. The cache is filled with random entries: no prompt is read.
         `--storage k4v4 --clusters 1` (or any other format) sets a cache of blocks beside it in under 8 minutes;
         attention over it is XLA's, unless the environment has CHAI_JAX_GPU_BLOCKS=1.
         `decode_formats.py` sets several formats beside int8.
prompt   the same two models read 8 prompts of 1920 tokens at once, with XLA's attention and with cuDNN's;
         transformers with scaled_dot_product_attention.
score    questions a second of opt-125m: 48 tokens with two answers of one token, the shape of SST-2.
largest  the largest batch that decodes at the same length. It is searched by compiling, against what JAX may take of
         the device (`--memory`: another limit; `--found`: what a search elsewhere found). It then decodes two steps;
         if memory runs out, 5 % fewer are tried. Do this part alone, with XLA_PYTHON_CLIENT_PREALLOCATE=true.

Writes bench_gpu.json, .csv and .md, which ends with a line for every goal. Without a GPU it stops with status 2, unless
`--anywhere` is given.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

# Before jax is imported: torch needs memory of the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from chai_jax.bench.floor import Rates, probe_rates
from chai_jax.bench.race import Shape
from chai_jax.bench.sweep import variants
from chai_jax.commands.bench import numbers
from chai_jax.compress.quantize import with_storage
from chai_jax.console import console
from chai_jax.errors import InputError
from chai_jax.files.published import random_model
from chai_jax.model.execution import Execution
from chai_jax.model.kernels import choose_kernels
from chai_jax.model.model import Model
from chai_jax.model.sharding import one_device
from chai_jax.run.options import parse_list
from chai_jax.serve.decode import cast, serving_params
from lab.decoding import Held, Ours, Transformers, exhausted, release, torch_absent, torch_version
from lab.goals import COLUMNS, DENSE, KERNELS, PEER, SMALL, findings
from lab.gpu_options import PARTS, GpuOptions
from lab.largest import memory_limit, ran, searched
from lab.options import Record, start
from lab.paper import THROUGHPUT
from lab.publish import publish
from lab.race import in_turn, row_of
from lab.reading import Read, TransformersReads
from lab.scoring import Scored


def model_of(shape: str, cache: str, options: GpuOptions) -> Model:
    """Random weights in the dtype they are multiplied in; dense with a bfloat16 cache, or compressed."""
    dense = with_storage(random_model(shape, options.seed), "bfloat16")
    how = Execution.choose(layout=one_device(), kernels=choose_kernels("auto", jax.devices()[:1]))
    dense = dense.replace(params=cast(dense.params, how), execution=how)
    if cache == DENSE:
        return dense
    return variants(shape, dense, [options.clusters], options.share, options.storage)[0].model


def decode_rows(options: GpuOptions) -> list[Record]:
    """All side by side; without transformers where it cannot be had or memory does not suffice for all."""
    shape = Shape(options.batch, options.start, options.steps)
    models = {cache: model_of(options.model, cache, options) for cache in (DENSE, SMALL)}
    about = {"part": "decode", "model": options.model}
    peer, why = built_peer(models[DENSE], shape, options)
    first = probe_rates(models[DENSE].how.dtype)
    try:
        rows = raced(models, peer, shape, options, first)
    except RuntimeError as error:
        if peer is None or not exhausted(error):
            raise
        why = "memory ran out beside ours; a smaller --batch may do"
    if peer is not None and why:
        del peer
        release()
        rows = raced(models, None, shape, options, first)
    absent = [{**about, "cache": PEER, "absent": why}] if why else []
    return [{**about, **row} for row in rows] + absent


def built_peer(dense: Model, shape: Shape, options: GpuOptions) -> tuple[Transformers | None, str]:
    """transformers, compiled and run once, before JAX takes more of the memory; or why it is not there."""
    why = torch_absent() if options.peer else "--no-peer"
    if why is not None:
        return None, why
    try:
        with console.status("compiling transformers"):
            return Transformers(dense, shape), ""
    except Exception as error:  # whatever a compiler that is not ours may raise: our own rows can do without it
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '-'}"


def raced(
    models: dict[str, Model], peer: Transformers | None, shape: Shape, options: GpuOptions, before: Rates
) -> list[Record]:
    """A row each, of laps in turn."""
    held = {cache: Held.of(model, shape, options.seed) for cache, model in models.items()}
    ready, computes = built(models, lambda cache, model: Ours(model, shape, options.seed, held[cache]))
    if peer is not None:
        ready[PEER] = peer
    rounds = in_turn(ready, options.rounds)
    rates = before.best(probe_rates(models[DENSE].how.dtype))
    return [
        {
            **row_of(name, one, computes[name], rounds, "decode_ms_per_token", rates, shape.batch),
            "start": shape.prompt,
            "steps": shape.new_tokens,
            "compile_seconds": one.compile_seconds,
        }
        for name, one in ready.items()
    ]


def built(models: dict[str, Model], build: Callable[[str, Model], Any]) -> tuple[dict[str, Any], dict[str, Model]]:
    """What `build` makes of either cache, with XLA's attention and on a GPU with kernels; and the model of each."""
    ready: dict[str, Any] = {}
    computes = {PEER: models[DENSE]}
    for cache, model in models.items():
        for name, attention in ((cache, "xla"), (KERNELS[cache], "pallas")):
            if attention == "pallas" and jax.default_backend() != "gpu":
                continue
            computes[name] = model
            with console.status(f"compiling {name}"):
                ready[name] = build(cache, model.replace(execution=model.how.replace(kernels=attention)))
    return ready, computes


def prompt_rows(options: GpuOptions) -> list[Record]:
    """Prompts of `start` tokens, read by both models and by transformers where it can be had."""
    shape = Shape(options.prompt_batch, options.start)
    models = {cache: model_of(options.model, cache, options) for cache in (DENSE, SMALL)}
    params = {cache: serving_params(model, model.how) for cache, model in models.items()}
    about, first = {"part": "prompt", "model": options.model}, probe_rates(models[DENSE].how.dtype)
    ready, computes = built(models, lambda cache, model: Read(model, params[cache], shape, options.seed))
    why = torch_absent() if options.peer else "--no-peer"
    if why is None:
        ready[PEER] = TransformersReads(models[DENSE], shape, options.seed)
    rounds = in_turn(ready, options.rounds)
    rates = first.best(probe_rates(models[DENSE].how.dtype))
    rows = [
        row_of(name, one, computes[name], rounds, "prefill_ms", rates, shape.batch * shape.prompt)
        for name, one in ready.items()
    ]
    absent = [] if why is None else [{"cache": PEER, "absent": why}]
    return [{**about, "prompt": shape.prompt, **row} for row in rows + absent]


def score_rows(options: GpuOptions) -> list[Record]:
    """Questions a second, dense and compressed, at every batch."""
    models = {cache: model_of(options.score_model, cache, options) for cache in (DENSE, SMALL)}
    params = {cache: serving_params(model, model.how) for cache, model in models.items()}
    timed, first = [], probe_rates(models[DENSE].how.dtype)
    for batch in numbers("score-batches", options.score_batches, int):
        shape = Shape(batch, question=options.question)
        with console.status(f"compiling {batch} questions"):
            ready = {cache: Scored(model, params[cache], shape, options.seed) for cache, model in models.items()}
        timed.append((shape, ready, in_turn(ready, options.rounds)))
    rates = first.best(probe_rates(models[DENSE].how.dtype))
    return [
        {
            "part": "score",
            "model": options.score_model,
            "question": shape.question,
            **row_of(cache, one, models[cache], rounds, "score_ms_per_example", rates, 1),
        }
        for shape, ready, rounds in timed
        for cache, one in ready.items()
    ]


def largest_rows(options: GpuOptions) -> list[Record]:
    """The largest batch of either cache, by compiling, and whether it runs."""
    given = {"share": options.share, "clusters": options.clusters, "storage": options.storage}
    limit, end = memory_limit(options.memory), options.start + options.steps
    known = dict(zip((DENSE, SMALL), numbers("found", options.found or "", int), strict=False))
    rows = []
    for cache, choices in ((DENSE, {}), (SMALL, given)):
        row = {"part": "largest", "model": options.model, "cache": cache}
        if limit is None:
            rows.append({**row, "absent": "JAX does not say what it may take of this device: give --memory"})
            continue
        if cache in known:
            found = {"largest": known[cache], "too_large": None, "compiled": 0, "needed": None}
        else:
            found = searched(options.model, choices, end, options.batch, limit)
        batch = ran(model_of(options.model, cache, options), found["largest"], end, options.seed)
        rows.append({**row, **found, "limit": limit, "batch": batch})
    return rows


def bench_gpu(options: GpuOptions) -> Record:
    """All parts that were asked for, written as they come; the part that leaves memory in pieces last."""
    options.check()
    making = {"decode": decode_rows, "prompt": prompt_rows, "score": score_rows, "largest": largest_rows}
    rows: list[Record] = []
    record: Record = {}
    for part in parse_list("--parts", options.parts, PARTS):
        console.print(f"{part}:", highlight=False)
        try:
            rows += making[part](options)
        except RuntimeError as error:
            if exhausted(error):
                raise InputError(f"memory ran out in part {part}; expected a larger GPU or a smaller batch") from None
            raise
        release()
        record = written(rows, options)
    for line in record["findings"]:
        console.print(line, highlight=False, markup=False)
    return record


def written(rows: list[Record], options: GpuOptions) -> Record:
    """Publish what has been measured so far."""
    goals, lines = findings(rows)
    beside = {
        "goals": goals,
        "asked": {name: value for name, value in asdict(options).items() if name != "out"},
        "torch": torch_version(),
    }
    title = "The compressed cache on one device"
    return publish(options, "bench_gpu", title, rows, COLUMNS, (THROUGHPUT,), lines, **beside)


if __name__ == "__main__":
    start(bench_gpu, GpuOptions, __doc__)
