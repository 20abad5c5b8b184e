"""What a job needs on a TPU or GPU, as that device's own compiler says. Nothing is run: no device, no weights.

`measure` compiles one job and accounts for it, `largest_batch` finds the largest batch that the compiler accepts.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import box
from rich.table import Table

from chai_jax.aot import gpu
from chai_jax.aot.cost import program_cost
from chai_jax.aot.programs import AbstractModel, Job, lower
from chai_jax.aot.tpu import roofline
from chai_jax.console import console
from chai_jax.errors import InputError
from chai_jax.inputs.reading import Record
from chai_jax.machine.memory import program_bytes
from chai_jax.model.cache import bytes_per_token
from chai_jax.plans.plan import Plan

GIB = 2**30
SUFFIXES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
# "... (20.00G) exceeds available HBM (15.48G)" and "Used 20.00G of 15.48G hbm": what is needed, and what there is.
EXHAUSTED = re.compile(r"([\d.]+)([KMGTP]?)\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGTP]?)")


def measure(job: Job, model: AbstractModel, plan: Plan | None = None) -> Record:
    """Compile a job for the devices of its mesh and account for what one device does in one run (decode: one token).

    Returns:
        `fits`, `hbm_limit`, and `hbm` in bytes: arguments, outputs, temporaries, aliased (outputs that take an
        argument's place), code, and what all need at once, `at_most`; or, where it does not fit, `hbm_needed` and a
        `message`, which is the compiler's where that says so.
        `flops` (not those within kernels), `hbm_bytes`, `collective_bytes` (of operands), `sent_bytes`, `open_loops`
        (loops that the data end, counted as one iteration) and `roofline` (see `chai_jax.aot.tpu.roofline`).

    Raises:
        InputError: see `lower`; or the compiler refuses the program for another reason than memory.
    """
    mesh = model.layout.mesh
    device = mesh.devices.flat[0]
    record: Record = {
        **dataclasses.asdict(job),
        "unit": job.unit,
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh_shape": dict(mesh.shape),
        "kv_bytes_per_token": bytes_per_token(model.spec),
        "hbm_limit": hbm_limit(mesh),
    }
    began = time.perf_counter()
    try:
        with console.status(f"compiling {job.kind}, batch {job.batch}, for {mesh.size} x {device.device_kind}"):
            compiled = _compiled(job, model, plan)
    except jax.errors.JaxRuntimeError as error:
        record |= {"fits": False, "hbm_needed": _needed(error), "message": str(error).splitlines()[0]}
    else:
        record |= _account(compiled, record["hbm_limit"], device)
    if record["fits"]:
        found = program_cost(compiled.as_text(), per_iteration=job.kind == "decode")
        record["roofline"] = roofline(found, device)
        record |= {name: getattr(found, name) for name in ("flops", "hbm_bytes", "open_loops")}
        record |= {"collective_bytes": found.collective_bytes, "sent_bytes": found.sent_bytes}
    compiler = (gpu.compiler_package() if device.platform == "gpu" else None) or "libtpu"
    versions = {name: metadata.version(name) for name in ("jax", compiler)}
    return record | {"compile_seconds": round(time.perf_counter() - began, 1), "versions": versions}


def _compiled(job: Job, model: AbstractModel, plan: Plan | None) -> Any:
    """The program; libtpu's compiler refuses one that does not fit."""
    device = model.layout.mesh.devices.flat[0]
    if device.platform != "gpu":
        return lower(job, model, plan).compile()
    with gpu.targeted(device):
        return lower(job, model, plan).compile(compiler_options=gpu.OPTIONS)


def _account(compiled: Any, limit: int, device: Any) -> Record:
    """`fits` and `hbm` of a program; `hbm_needed` and `message` of one that does not fit.

    libtpu's compiler has refused such a program by now; XLA's compiler for GPUs accepts it.
    """
    if device.platform != "gpu":
        return {"fits": True, "hbm": _hbm(compiled.memory_analysis(), limit)}
    needed = program_bytes(compiled)
    if needed > limit:
        message = f"the program needs {needed:,} bytes; JAX may take {limit:,}"
        return {"fits": False, "hbm_needed": needed, "message": message}
    return {"fits": True, "hbm": _hbm(compiled.memory_analysis(), limit) | {"at_most": needed}}


def _hbm(memory: Any, limit: int) -> dict[str, int]:
    """The compiler's account of a program that fits.

    The compiler does not say how much HBM the program holds at once. `at_most` is the least of three upper bounds: the
    sum of the parts (temporaries may take the place of arguments that are done with), the compiler's peak (which counts
    arrays in fast memory, VMEM, too), and the limit, since the program fits.
    """
    held = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }
    total = sum(held.values()) - 2 * held["aliased"]
    at_most = min(total, memory.peak_memory_in_bytes, limit)
    return held | {"at_most": at_most, "code": memory.generated_code_size_in_bytes}


def _needed(error: Exception) -> int:
    """Bytes of HBM that the compiler says a program needs.

    Raises:
        InputError: memory is not what the compiler complains of.
    """
    found = _exhausted(error)
    if found is None:
        raise InputError(f"the compiler refuses the program ({str(error).splitlines()[0]})") from None
    return found[0]


def _exhausted(error: Exception) -> tuple[int, int] | None:
    """(bytes needed, bytes there) of an error that says memory is exhausted."""
    found = EXHAUSTED.search(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
    if found is None:
        return None
    return int(float(found[1]) * SUFFIXES[found[2]]), int(float(found[3]) * SUFFIXES[found[4]])


@cache
def hbm_limit(mesh: Mesh) -> int:
    """Bytes of HBM that a program gets on one device; of a GPU it is what JAX may take.

    libtpu's compiler says what it gives once it is asked for too much. It is asked for two arrays, each twice as large
    every time: libtpu 0.0.41 aborts where a single one is far larger than the memory.
    """
    if mesh.devices.flat[0].platform == "gpu":
        return gpu.limit(mesh.devices.flat[0])
    whole = NamedSharding(mesh, PartitionSpec())
    for rows in (2**power for power in range(10, 30)):
        shape = jax.ShapeDtypeStruct((rows, 2**20), jnp.int8, sharding=whole)
        try:
            jax.jit(lambda x: x + 1).lower(shape).compile()
        except jax.errors.JaxRuntimeError as error:
            found = _exhausted(error)
            if found is not None:
                return found[1]
            raise
    raise AssertionError("a petabyte fits")


def size(record: Record) -> int:
    """Bytes of HBM that a measured job needs on each device: at most, where it fits."""
    return record["hbm"]["at_most"] if record["fits"] else record["hbm_needed"]


def find_largest_batch(
    job: Job, model: AbstractModel, plan: Plan | None = None, tell: Callable[[str], None] = print
) -> Record:
    """The largest batch of a job that fits, searched from the job's own (see `largest_batch`).

    Of a training job that is examples per update, in multiples of `accumulation` microbatches of one row a device.
    """
    granule = model.layout.ways * (job.accumulation if job.unit == "update" else 1)

    def try_batch(batch: int) -> Record:
        return measure(dataclasses.replace(job, batch=batch), model, plan)

    return largest_batch(try_batch, granule, job.batch, tell=tell)


def largest_batch(
    try_batch: Callable[[int], Record], granule: int, first: int, most: int = 10, tell: Callable[[str], None] = print
) -> Record:
    """The largest batch, a multiple of `granule`, that the compiler accepts: every answer is a compilation.

    Bytes grow almost linearly with the batch, so the next batch to try is where the line through two sizes meets the
    limit. The search ends when no batch lies between one that fits and one that does not, or less than 1 % of them.

    Args:
        try_batch: `measure` of a batch.
        first: batch to begin with.
        most: compilations at the most.

    Returns:
        `largest`, which fits (0 if not even `granule` does), and `too_large`, which does not; the records of both
        (`fitting`, `failing`); and how many programs were `compiled`.
    """
    tried: dict[int, Record] = {}
    low, high = 0, None
    batch = max(granule, first // granule * granule)
    while len(tried) < most and (high is None or high - low > max(granule, low // 100)):
        record = tried[batch] = try_batch(batch)
        tell(f"batch {batch}: {'fits' if record['fits'] else 'does not fit'}, {gib(size(record))}")
        low, high = (batch, high) if record["fits"] else (low, batch)
        batch = _next(tried, low, high, granule)
    return {
        "largest": low,
        "too_large": high,
        "compiled": len(tried),
        "fitting": tried.get(low),
        "failing": None if high is None else tried[high],
    }


def _next(tried: dict[int, Record], low: int, high: int | None, granule: int) -> int:
    """The batch to try next: a multiple of `granule` above `low` and below `high`.

    Where the line through two sizes meets the limit, and every other time a little above that: two such batches close
    in on the answer from both sides, even where the compiler bends the line by trading time for memory.
    """
    known = sorted(tried)
    ends = known[-2:] if high is None else [low, high] if low else known[:2]
    guess = 2 * low if high is None else (low + high) // 2
    if len(ends) == 2:
        one, two = (size(tried[end]) for end in ends)
        if two > one:
            meets = int(ends[0] + (ends[1] - ends[0]) * (tried[ends[0]]["hbm_limit"] - one) / (two - one))
            above = meets + max(granule, low // 100)
            guess = meets if high is None or len(tried) % 2 == 0 else min(above, guess)
    least, most = low + granule, (8 * max(low, granule) if high is None else high - granule)
    return min(max(guess // granule * granule, least), max(most, least))


def report(record: Record) -> Table:
    """A record as a table for people; all figures are those of one device."""
    mesh = " x ".join(f"{count} {axis}" for axis, count in record["mesh_shape"].items())
    title = f"{record['kind']}, batch {record['batch']}, {record['seq']} tokens, on {record['device']} ({mesh})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    limit = record["hbm_limit"]
    if not record["fits"]:
        short = record["hbm_needed"] - limit
        table.add_row("does not fit", f"needs {gib(record['hbm_needed'])} of {gib(limit)}: {gib(short)} too much")
        return table
    for name, size in record["hbm"].items():
        of = f" of {gib(limit)}" if name == "at_most" else ""
        table.add_row(f"HBM {name.replace('_', ' ')}", gib(size) + of)
    table.add_row("FLOPs", f"{record['flops']:.3e}")
    table.add_row("bytes to and from HBM", f"{record['hbm_bytes']:.3e}")
    table.add_row("bytes of collectives", f"{record['collective_bytes']:.3e}, {record['sent_bytes']:.3e} sent")
    times = record["roofline"]
    for name in ("compute", "memory", "interconnect"):
        table.add_row(f"at peak {name} rate", f"{times[f'{name}_ms']:.3f} ms")
    table.add_row("roofline", f"{times['ms']:.3f} ms a {record['unit']}, bound by {times['bound']}")
    kernels = "; FLOPs within kernels are not counted" if record["attention"] == "pallas" else ""
    table.caption = f"peak rates of a device: {times['peaks']}{kernels}"
    return table


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
