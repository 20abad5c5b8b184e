"""Settings of a run: what is compressed and how, where it is computed, and what is kept.

The text below a field is what `--help` shows for its option.
"""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from chai_jax.config.checks import check_seed, require, require_count, require_positive
from chai_jax.config.stages import Checkpoints, TrainConfig

STAGES = ("distil", "quantize", "target")


@dataclass(frozen=True)
class TrainOverrides:
    """Training: what is given here holds for every training stage, in place of the paper's setting."""

    lr: float | None = None
    """Peak learning rate (default: 2e-5)."""
    batch: int | None = None
    """Examples per update (default: 128 to distil, 64 to finetune and target)."""
    accumulation: int | None = None
    """Microbatches per update (default: 8)."""
    epochs: int | None = None
    """Passes over the training examples (default: 1 to distil, 3 to finetune and target)."""
    max_steps: int | None = None
    """Stop each training stage after this many updates."""
    max_train_examples: int | None = None
    """Use only this many training examples."""
    compute: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations in training; weights stay float32 (default: bfloat16 on TPUs and GPUs, float32 on CPUs)."""
    moments: Literal["float32", "bfloat16"] | None = None
    """Dtype of AdamW's first moment (default: float32)."""
    remat: bool = False
    """Compute each layer again in the backward pass: less memory, a third more work."""

    def apply(self, train: TrainConfig) -> TrainConfig:
        """`train` with what is set here."""
        named = {"max_examples" if name == "max_train_examples" else name: value for name, value in vars(self).items()}
        return replace(train, **{name: value for name, value in named.items() if value is not None})


@dataclass(frozen=True)
class RunOptions:
    """Interruptions and logs. They do not change the result: a run may be resumed with others."""

    checkpoint_every: int | None = None
    """Save the state of training after this many updates, too."""
    checkpoint_minutes: float = 10.0
    """Save the state of training after this many minutes."""
    keep: int = 2
    """How many checkpoints stay, the newest. All go when their stage is done."""
    max_minutes: float | None = None
    """Save and stop after this many minutes, with exit status 75. The same command resumes."""
    tensorboard: bool = False
    """Also write TensorBoard event files to the run folder (needs tensorboardX)."""
    wandb: str | None = None
    """Also log training to this Weights & Biases project (needs wandb)."""

    def at(self, path: Path, deadline: float | None) -> Checkpoints:
        """Checkpoints of one stage in the folder `path`."""
        return Checkpoints(path, self.checkpoint_every, self.checkpoint_minutes, self.keep, deadline)


@dataclass(frozen=True)
class DeviceConfig:
    """Devices. They do not change the result, except for rounding."""

    mesh: str | None = None
    """How devices are laid out, such as 4x2: batches are split 4 ways, heads and matrices 2 ways (default: all devices
    split the batch)."""
    fsdp: bool = False
    """Split weights and optimizer state over the data axis too."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute in this dtype, whatever is stored (default: bfloat16 on TPUs and GPUs, float32 on CPUs). CPUs with AMX or
    AVX512-BF16 are faster in bfloat16."""
    require_backend: Literal["tpu", "gpu", "cpu"] | None = None
    """Stop unless JAX computes on this."""
    compile_cache: Path | None = None
    """Keep compiled programs in this folder, and reuse those of earlier commands."""
    distributed: bool = False
    """This is one of several processes started by SLURM or MPI. A TPU pod is recognised without this."""
    coordinator: str | None = None
    """Address of the first of several processes, where no cluster knows it."""
    process_count: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: which of them this is, from 0."""


@dataclass(frozen=True)
class PlanConfig:
    """The plan: which heads are merged, and what is stored in which format."""

    share: Literal["qk", "qkv", "kv", "none"] | None = None
    """What the heads of a cluster share. `qk`: query and key. `qkv`: the value too. `kv`: one latent key and value for
    all heads of a layer. `none`, with --kv-budget: no heads are merged (default: qkv; with --kv-budget: qkv or kv,
    whichever costs less)."""
    membership: Literal["calibrated", "prompt"] = "calibrated"
    """Clusters are found once, on calibration text, or anew on the first tokens of each prompt (for --share qk, without
    --kv-budget)."""
    warmup_tokens: int = 5
    """With --membership prompt: how many first tokens decide the clusters."""
    layers: float | None = None
    """Fraction of the layers to cluster, rounded up (default: 0.5; for the toy 1)."""
    first: Literal["redundant", "insensitive"] = "redundant"
    """Which layers are clustered first: those with the most redundant heads, or the least sensitive ones."""
    clusters: str | None = None
    """Clusters of a layer: `elbow`, a number, a fraction of the heads below 1, or `correlation:0.9`: as few as keep
    every head so correlated with the head that stands for it (default: elbow; for the toy 2)."""
    rank: float = 0.25
    """Rank of a `kv` latent, as a fraction of all keys' dimensions, or of the width where that is less."""
    kv_heads: int | None = None
    """Instead of clusters: merge every layer's key and value heads to this number, of equal size. The result is an
    ordinary model with grouped queries, which `chai-jax export` writes for every engine."""
    queries: int | None = None
    """Query heads that each key head keeps, in every layer: those that attend alike are merged (models with grouped
    queries only). Alone it leaves keys and values as they are; with --kv-heads, --clusters, --share or --layers these
    merge next."""
    score_merge: Literal["representative", "low_rank"] | None = None
    """How queries and keys of a cluster are merged (default: representative; with --kv-budget: low_rank)."""
    value_merge: Literal["representative", "low_rank", "fit"] | None = None
    """How values of a cluster are merged; `fit` regresses on calibration text (default: representative; with
    --kv-budget: low_rank)."""
    kv_budget: float | None = None
    """Cache bytes wanted, as a fraction of the dense bfloat16 cache. The planner then measures what each layer bears
    and chooses shares, clusters, ranks and formats."""
    model_budget: float | None = None
    """Weight bytes wanted, as a fraction of the dense bfloat16 weights (needs --kv-budget)."""
    storages: str = "bfloat16,int8"
    """With --kv-budget: cache formats to choose from: float32, bfloat16, int8, int4; k4v4 to k2v2, which store keys
    and values in so many bits each; basis4 to basis2, which store keys in a basis of their own (with --share none)."""
    ranks: bool = True
    """With --kv-budget: whether the dimensions of clustered keys and values may be cut."""
    pin: str = ""
    """With --kv-budget: layers to leave as they are, such as 0,11."""
    sensitivity: Literal["kl", "perturbation", "attention"] = "kl"
    """How layers are scored for their tier."""
    calibration: int = 128
    """Examples, or windows of text, for calibration; training does not see them."""

    @property
    def queries_alone(self) -> bool:
        """Whether queries are merged and nothing else."""
        others = (self.kv_heads, self.kv_budget, self.clusters, self.share, self.layers)
        return self.queries is not None and all(option is None for option in others)

    def filled(self, usual: "PlanConfig") -> "PlanConfig":
        """With the `usual` layers and clusters where none were asked for; neither where other options decide."""
        if self.kv_heads is not None or self.queries_alone:
            return self
        layers = usual.layers if self.layers is None else self.layers
        return replace(self, layers=layers, clusters=self.clusters or usual.clusters)

    def check(self) -> None:
        """Raise InputError where a number is out of its range, whichever model it is for."""
        require(self.layers is None or 0 <= self.layers <= 1, "--layers", self.layers, "a fraction from 0 to 1")
        require(0 < self.rank <= 1, "--rank", self.rank, "a fraction above 0, up to 1")
        budget, whole = self.kv_budget, "a fraction of the dense bfloat16 cache, above 0 and up to 1"
        require(budget is None or 0 < budget <= 1, "--kv-budget", budget, whole)
        require_positive("--model-budget", self.model_budget)
        require_count("--warmup-tokens", self.warmup_tokens)
        require(self.kv_heads is None or self.kv_heads > 0, "--kv-heads", self.kv_heads, "a number above 0")
        require_count("--queries", self.queries)
        require_count("--calibration", self.calibration)


@dataclass(frozen=True)
class RunConfig:
    """The whole job: cluster, distil, quantize and tune a model, and measure it after every stage."""

    model: str = "toy"
    """Hub id (facebook/opt-125m), folder in Hugging Face layout, or `toy`, which is built in and needs no network."""
    task: str | None = None
    """Calibrate, train and score on this task: sst2, rte, piqa, hellaswag, or one that a file NAME.yaml describes."""
    text: Path | None = None
    """Instead of a task: calibrate, distil and measure perplexity on this text file."""
    data_dir: Path | None = None
    """Folder with TASK/train.jsonl and TASK/validation.jsonl, or .jsonl.gz (default: the Hugging Face hub)."""
    order: str = "distil,quantize,target"
    """Stages after clustering, in any order."""
    plan: Path | None = None
    """Use this plan.json instead of making one."""
    teacher: str | None = None
    """Another teacher for distillation, with the same vocabulary (default: the dense model of this run)."""
    cache_teacher: Literal["float32", "float16"] | None = None
    """Run the teacher once over all examples and keep its answers on disk, so that training does not hold it."""
    finetune: Literal["auto", "always", "never"] = "auto"
    """Tune the dense model on the task first. `auto`: if its accuracy is within two standard errors of always giving
    the most frequent label."""
    policy: Literal["sensitive", "medium-low"] = "sensitive"
    """Layers that `target` tunes."""
    select: Literal["last", "accuracy", "latency", "size"] = "last"
    """Which compressed stage becomes `model/`: the last or the best (accuracy counts on held-out training rows)."""
    storage: Literal["bfloat16", "float32"] = "bfloat16"
    """Cache format of layers that are not quantized."""
    out: Path | None = None
    """Run folder; an interrupted run resumes when its command is given again (default: runs/MODEL-TASK)."""
    seed: int = 0
    """Seed of clustering, shuffling and splits."""
    limit: int | None = None
    """Score only the first N validation examples."""
    gate: float = 0.5
    """Warn if clustering or quantizing moves the next-token distribution by more than this KL, in nats per token."""
    revision: str | None = None
    """Revision of a hub model."""
    planning: PlanConfig = field(default_factory=PlanConfig)
    train: TrainOverrides = field(default_factory=TrainOverrides)
    operation: RunOptions = field(default_factory=RunOptions)
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    @property
    def folder(self) -> Path:
        """`out`; by default runs/MODEL-TASK, or runs/MODEL for the toy, which has but one task."""
        task = None if self.task is None else re.sub(r"\.ya?ml$", "", Path(self.task).name)
        name, data = Path(self.model).name, "text" if self.text else task
        return self.out or Path("runs", name if data in (None, name) else f"{name}-{data}")

    def check(self) -> None:
        """Raise InputError where a number is out of its range: before any work."""
        check_seed(self.seed, "--seed")
        require_count("--limit", self.limit)
        require(0 <= self.gate < math.inf, "--gate", self.gate, "a number from 0 on")
        self.planning.check()
        require_count("--max-train-examples", self.train.max_train_examples)
        self.train.apply(TrainConfig())
        require_positive("--max-minutes", self.operation.max_minutes)
        self.operation.at(Path(), None)
