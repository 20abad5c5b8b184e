"""The paper's 3000 and 3700 inferences/s of opt-125m on a v3-8, against that machine's roofline; and ours, measured.

    python experiments/throughput.py $MODEL --task sst2 --data-dir $DATA --seeds 0 --out runs/experiments

An inference is one question of 32 tokens with two one-token answers, the shape of SST-2. Measured here: the given
models, dense and clustered and quantized, timed in turn, at each of `--batches`. For a v3-8, opt-125m to 1.3b dense and
compressed (share qkv, half the clusters, int8): the floor by counting, which reads every weight once a batch and does
the model's FLOPs, both at the published peak rates of four v3 chips; and, where libtpu is installed, the floor of the
program that the TPU's own compiler makes. No program reaches its floor. Expected: the claims lie far below it.

Writes throughput.json, .csv and .md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax

from chai_jax.aot.compiled import measure
from chai_jax.aot.programs import AbstractModel, Job, spec_of
from chai_jax.aot.tpu import mesh_of, topology
from chai_jax.bench.race import Shape, latency
from chai_jax.console import console
from chai_jax.data.batches import Encoded
from chai_jax.files.published import architecture_of
from chai_jax.machine.peaks import CHIPS
from chai_jax.model.flops import count_flops
from chai_jax.model.params import Declared, declare
from chai_jax.model.sharding import Layout
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from lab.options import Options, Record, start
from lab.paper import THROUGHPUT
from lab.publish import publish
from lab.tree import Branch, forest

TOKENS = 32
SLICE, CHIP, CHIPS_OF_SLICE = "v3:2x2", "TPU v3", 4
SIZES = ("facebook/opt-125m", "facebook/opt-350m", "facebook/opt-1.3b")
CACHES: dict[str, Record] = {"dense": {}, "compressed": {"share": "qkv", "clusters": 0.5, "storage": "int8"}}
CLAIMS = {"CHAI-KD": 3000, "CHAI-Quant": 3700}


@dataclass(frozen=True)
class ThroughputOptions(Options):
    batches: str = "1,8,32"
    """Questions scored at once here, with commas."""
    slice_batches: str = "8,128,1024"
    """Questions scored at once by a v3-8, with commas; multiples of its 8 cores."""


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def measured(branch: Branch, batches: list[int]) -> Iterator[Record]:
    """Questions a second on this machine, dense and compressed side by side."""
    nodes = {"dense": (), "compressed": ("cluster", "quantize")}
    models = {name: branch.model(*stages) for name, stages in nodes.items()}
    for batch in batches:
        timed = latency(models, Shape(batch=batch, prompt=TOKENS, new_tokens=8))
        for name, found in timed.items():
            spread = found["score_ms_per_example"]
            low, middle, high = (1000 / spread[end] for end in ("p90", "median", "p10"))
            yield {
                "model": branch.tree.name,
                "cache": name,
                "where": found["device"],
                "how": "measured",
                "batch": batch,
                "inferences_per_second": middle,
                "p10": low,
                "p90": high,
                "rounds": found["n"],
                "dtype": found["dtype"],
                "ratio_to_dense": 1 / found["ratio_to_first"]["score_ms_per_example"]["median"],
            }


def counted(config: Architecture, spec: Spec, batch: int) -> Record:
    """The floor of one batch on the slice by counting: FLOPs, and every weight in bfloat16 read once by every chip."""
    peak = CHIPS[CHIP]
    assert peak.hbm is not None
    question = Encoded((0,) * (TOKENS + 1), TOKENS)
    flops = count_flops(config, spec).of([question] * batch)
    weights = 2 * parameters(config, spec)
    times = {"compute": flops / (peak.flops * CHIPS_OF_SLICE), "memory": weights / peak.hbm}
    bound = max(times, key=lambda name: times[name])
    return {"how": "floor, counted", "ms": 1e3 * times[bound], "bound": bound, "flops": flops, "bytes": weights}


def parameters(config: Architecture, spec: Spec) -> int:
    """Weights of a model of this shape."""
    leaves = jax.tree.leaves(declare(config, spec), is_leaf=lambda leaf: isinstance(leaf, Declared))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def compiled(config: Architecture, spec: Spec, batch: int) -> Record:
    """The floor of the program that the TPU's compiler makes of the same batch."""
    layout = Layout(mesh_of(topology(SLICE)), False)
    found = measure(Job("score", batch, TOKENS), AbstractModel(config, spec, layout))
    return {"how": "floor, compiled", "fits": found["fits"], **{n: found["roofline"][n] for n in ("ms", "bound")}}


def floors(batches: list[int]) -> Iterator[Record]:
    """The slice's floors for every size, cache and batch."""
    ways = [counted, compiled] if find_spec("libtpu") else [counted]
    for model in SIZES:
        config = architecture_of(model)
        for cache, choices in CACHES.items():
            spec = spec_of(config, **choices)
            for batch in batches:
                for way in ways:
                    floor = way(config, spec, batch)
                    rate = 1000 * batch / floor["ms"]
                    about = {"model": model.split("/")[1], "cache": cache, "where": "TPU v3-8", "batch": batch}
                    yield {**about, **floor, "inferences_per_second": rate}


def say(rows: list[Record]) -> list[str]:
    """The claims as fractions of the floor's rate."""
    mine = [one for one in rows if one["model"] == "opt-125m" and one["how"] == "floor, counted"]
    found = []
    for one in mine:
        if one["cache"] == "dense":
            shares = ", ".join(
                f"{name}'s {claim} are {100 * claim / one['inferences_per_second']:.2g} %"
                for name, claim in CLAIMS.items()
            )
            found.append(
                f"opt-125m, batch {one['batch']}: of {one['inferences_per_second']:,.0f} at the floor, {shares}."
            )
    return found


def throughput(options: ThroughputOptions) -> Record:
    """Everything measured and everything counted."""
    rows = []
    for trees in forest(options):
        rows += measured(trees[0].base, numbers(options.batches))
    if find_spec("libtpu") is None:
        console.print("libtpu is not installed: the v3-8's floors are counted, not compiled", highlight=False)
    rows += floors(numbers(options.slice_batches))
    shown: list[Any] = [
        ("model", lambda found: found["model"]),
        ("cache", lambda found: found["cache"]),
        ("where", lambda found: found["where"]),
        ("how", lambda found: found["how"] + (f", bound by {found['bound']}" if "bound" in found else "")),
        ("batch", lambda found: str(found["batch"])),
        ("inferences/s [p10, p90]", rate),
    ]
    title = f"Inferences a second (questions of {TOKENS} tokens, two answers of one token)"
    return publish(options, "throughput", title, rows, shown, (THROUGHPUT,), say(rows), claimed=CLAIMS)


def rate(found: Record) -> str:
    spread = f" [{found['p10']:,.0f}, {found['p90']:,.0f}]" if "p10" in found else ""
    return f"{found['inferences_per_second']:,.0f}{spread}"


if __name__ == "__main__":
    start(throughput, ThroughputOptions, __doc__)
