"""`chai-jax aot` and `env`: machines that are not here, and the one that is."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from chai_jax.config import DeviceConfig
from chai_jax.console import console, print_table


@dataclass(frozen=True)
class AotCommand:
    """Compile a job for TPUs or a GPU that are not here: memory against its limit, and the least time it can take."""

    model: Positional[str]
    """facebook/opt-{125m,350m,1.3b,2.7b,6.7b,13b}, or a folder with a config.json; no weights are read."""
    topology: str = "v3:2x2"
    """The slice: v3:2x2 (a v3-8), v5e:2x4, v6e:2x4, v4:2x2x1, ...; or h100, one GPU (needs jax's CUDA plugin)."""
    job: Literal["distil", "finetune", "target", "prefill", "decode", "score"] = "distil"
    """What is compiled: one update, one prefill, one token of decoding, or one batch of scores."""
    batch: int = 128
    """Sequences; examples per update."""
    seq: int = 64
    """Tokens of a sequence; for decode, the room in the cache."""
    targets: int = 1
    """Predicted tokens of a training example: 1 for tasks, SEQ for text."""
    accumulation: int = 8
    """Microbatches of an update."""
    mesh: str | None = None
    """DATAxMODEL, such as 4x2 (default: all devices along data), or 1x1 for one of them."""
    fsdp: bool = False
    """Split weights and optimizer state over the data axis too."""
    plan: Path | None = None
    """The plan.json of a compressed model."""
    share: Literal["qk", "qkv"] | None = None
    """Without a plan: cluster every layer alike, sharing this."""
    clusters: float = 0.5
    """With --share: clusters of a layer, as a fraction of its heads."""
    storage: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Without a plan: format of the whole cache."""
    weights: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of the weights as loaded (facebook/opt-*: float16)."""
    cached: bool = False
    """Distil with the teacher's log-probabilities cached: no teacher is resident."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of AdamW's first moment."""
    remat: bool = False
    """Compute each layer again in the backward pass."""
    attention: Literal["auto", "xla", "pallas"] = "auto"
    """How decode and prefill attend: the compiler's own programs, or kernels (one H100, or TPU from v4 on). auto:
    kernels on one GPU."""
    largest_batch: bool = False
    """Find the largest batch that fits, beginning with BATCH."""

    def run(self) -> Any:
        import jax

        # Else jax would look for the TPU that libtpu is for, or the GPU.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
        from chai_jax.aot import gpu
        from chai_jax.aot.compiled import find_largest_batch, measure, report
        from chai_jax.aot.programs import Job, Shapes, spec_of
        from chai_jax.aot.tpu import mesh_of, topology
        from chai_jax.files.published import architecture_of
        from chai_jax.model.kernels import choose_kernels
        from chai_jax.model.sharding import Layout
        from chai_jax.plans.plan import Plan

        config, plan = architecture_of(self.model), Plan.read(self.plan) if self.plan else None
        spec = spec_of(config, plan, self.share, self.clusters, self.storage)
        devices = (gpu.topology if self.topology in gpu.DESCRIPTIONS else topology)(self.topology)
        mesh = mesh_of(devices, self.mesh)
        shapes = Shapes(config, spec, Layout(mesh, self.fsdp))
        sizes = self.batch, self.seq, self.targets, self.accumulation
        attention = choose_kernels(self.attention, mesh.devices.flatten())
        job = Job(self.job, *sizes, self.weights, self.cached, self.moments, self.remat, attention)
        given = {"model": self.model, "topology": self.topology, "fsdp": self.fsdp}
        if not self.largest_batch:
            record = measure(job, shapes, plan)
            print_table(report(record))
            return given | record
        found = find_largest_batch(job, shapes, plan, tell=lambda line: console.print(line, highlight=False))
        for record in (found["fitting"], found["failing"]):
            if record is not None:
                print_table(report(record))
        return given | found


@dataclass(frozen=True)
class EnvCommand:
    """Print versions, devices and what this machine computes in."""

    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.run.devices import start
        from chai_jax.run.environment import environment

        return environment(start(self.devices))
