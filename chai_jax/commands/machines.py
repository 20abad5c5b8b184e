"""`chai-jax aot` and `env`: machines that are not here, and the one that is."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from chai_jax.config import DeviceConfig
from chai_jax.console import console, print_table


@dataclass(frozen=True)
class AotCommand:
    """Compile a job for TPUs or a GPU that this machine lacks: memory it needs, least time it can take."""

    model: Positional[str]
    """A published shape, with or without its owner: opt-125m, opt-350m, opt-1.3b, opt-2.7b, opt-6.7b, opt-13b, gpt2,
    gpt2-medium, gpt2-large, gpt2-xl, pythia-160m, pythia-410m, pythia-1.4b, SmolLM2-135M, TinyLlama-1.1B-Chat-v1.0,
    Llama-2-7b-hf, Llama-3.2-1B, Llama-3.1-8B, Mistral-7B-v0.1, Mistral-7B-v0.3, Qwen2.5-0.5B, Qwen2.5-7B, Qwen3-0.6B,
    Phi-3-mini-4k-instruct; or a folder with a config.json. No weights are read."""
    topology: Annotated[str, arg(metavar="SLICE")] = "v3:2x2"
    """TPU slice, such as v3:2x2 (a v3-8), v5e:2x4, v6e:2x4, v4:2x2x1; or h100, one GPU (needs jax's CUDA plugin)."""
    job: Literal["distil", "finetune", "target", "prefill", "decode", "score"] = "distil"
    """What to compile: one update of training, one prefill, one decoding step, or one batch of scores."""
    batch: int = 128
    """Sequences at once; in training, examples per update."""
    seq: int = 64
    """Tokens of a sequence; for decode, positions in the cache."""
    targets: int = 1
    """Tokens of a training example that are predicted: 1 for tasks, SEQ for text."""
    accumulation: int = 8
    """Microbatches per update."""
    mesh: str | None = None
    """How devices are laid out, such as 4x2: batches are split 4 ways, heads and matrices 2 ways; 1x1 is one device
    (default: all devices split the batch)."""
    fsdp: bool = False
    """Split weights and optimizer state over the data axis too."""
    plan: Path | None = None
    """Compile the model that this plan.json makes."""
    share: Literal["qk", "qkv"] | None = None
    """Without a plan: cluster every layer alike, and let the heads of a cluster share this."""
    clusters: Annotated[float, arg(metavar="FRACTION")] = 0.5
    """With --share: clusters of a layer, as a fraction of its key/value heads."""
    storage: Annotated[str, arg(metavar="FORMAT")] = "bfloat16"
    """Without a plan: cache format of all layers, such as int8 or k4v4."""
    weights: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of the weights as loaded; most published ones have two bytes an entry."""
    cache_teacher: bool = False
    """Distil with the teacher's answers read from disk: no teacher is in memory."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of AdamW's first moment."""
    remat: bool = False
    """Compute each layer again in the backward pass: less memory, a third more work."""
    attention: Literal["auto", "xla", "pallas"] = "auto"
    """What decode and prefill run on. `xla`: XLA's own programs. `pallas`: kernels for one H100, or one TPU from v4
    on. `auto`: kernels on one GPU."""
    largest_batch: bool = False
    """Find the largest batch that fits, beginning with BATCH."""

    def run(self) -> Any:
        import jax

        # Else jax would look for the TPU that libtpu is for, or the GPU.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
        from chai_jax.aot import gpu
        from chai_jax.aot.compiled import find_largest_batch, measure, report
        from chai_jax.aot.programs import AbstractModel, Job, spec_of
        from chai_jax.aot.tpu import mesh_of, topology
        from chai_jax.files.published import architecture_of
        from chai_jax.model.kernels import choose_kernels
        from chai_jax.model.sharding import Layout
        from chai_jax.plans.plan import Plan

        config, plan = architecture_of(self.model), Plan.read(self.plan) if self.plan else None
        spec = spec_of(config, plan, self.share, self.clusters, self.storage)
        devices = (gpu.topology if self.topology in gpu.DESCRIPTIONS else topology)(self.topology)
        mesh = mesh_of(devices, self.mesh)
        abstract = AbstractModel(config, spec, Layout(mesh, self.fsdp))
        sizes = self.batch, self.seq, self.targets, self.accumulation
        attention = choose_kernels(self.attention, mesh.devices.flatten())
        job = Job(self.job, *sizes, self.weights, self.cache_teacher, self.moments, self.remat, attention)
        given = {"model": self.model, "topology": self.topology, "fsdp": self.fsdp}
        if not self.largest_batch:
            record = measure(job, abstract, plan)
            print_table(report(record))
            return given | record
        found = find_largest_batch(job, abstract, plan, tell=lambda line: console.print(line, highlight=False))
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
