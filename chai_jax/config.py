"""Settings of each stage as frozen dataclasses; the defaults are the paper's where it gives one."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from chai_jax.errors import InputError

STAGES = ("distil", "quantize", "target")
POLICIES = ("sensitive", "medium-low")
DTYPES = ("float32", "bfloat16")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value!r}; expected {expected}")


def _require_count(name: str, value: int | None, most: int = 2**31 - 1) -> None:
    _require(value is None or 1 <= value <= most, name, value, f"at least 1 and at most {most:,}")


def _require_positive(name: str, value: float | None) -> None:
    _require(value is None or 0 < value < math.inf, name, value, "a positive number")


def check_seed(seed: int, name: str = "seed") -> None:
    """Raise InputError unless every generator takes this seed: scikit-learn's have 32 bits.

    Args:
        name: of the option, for the message.
    """
    _require(0 <= seed < 2**32, name, seed, "a whole number from 0 on, below 2^32")


@dataclass(frozen=True)
class TrainConfig:
    """One training stage: AdamW, learning rate decaying linearly to zero.

    Attributes:
        lr: peak (= first) learning rate.
        batch: examples per update; the last of an epoch may be smaller.
        accumulation: microbatches an update is split into, one in memory at a time; fewer where each device would get
            less than one example of a microbatch. The result does not depend on it.
        epochs: passes over the examples.
        max_steps: stop after this many updates; the decay then ends there.
        max_examples: use only this many examples (the first after a seeded shuffle).
        weight_decay: of kernels and embeddings; biases and norms have none.
        clip: largest global norm of the gradient; None for no clipping.
        seed: of the order of the examples.
        compute: dtype of activations, `float32` or `bfloat16`; None: the device's fast one. Masters, gradients and the
            softmax stay float32.
        moments: dtype in which AdamW's first moment is kept. The second stays float32: in bfloat16, whose steps are
            1/256, its changes by 1/1000 would be rounded away.
        remat: keep only the input of each layer for the backward pass and compute the layer again there.

    Raises:
        InputError: a value out of its range.
    """

    lr: float = 2e-5
    batch: int = 64
    accumulation: int = 8
    epochs: int = 3
    max_steps: int | None = None
    max_examples: int | None = None
    weight_decay: float = 0.01
    clip: float | None = 1.0
    seed: int = 0
    compute: str | None = None
    moments: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        _require(0 < self.lr <= 100, "lr", self.lr, "a number above 0, up to 100")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "a number from 0")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "a positive number or none")
        _require_count("epochs", self.epochs, 10_000)  # the order of the examples is made for all of them at once
        for name in ("batch", "accumulation"):
            _require_count(name, getattr(self, name), 2**20)
        for name in ("max_steps", "max_examples"):
            _require_count(name, getattr(self, name))
        check_seed(self.seed)
        _require(self.compute in (None, *DTYPES), "compute", self.compute, f"one of {', '.join(DTYPES)}, or none")
        _require(self.moments in DTYPES, "moments", self.moments, f"one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Checkpoints:
    """Where a training stage keeps its state, and how often.

    Attributes:
        path: a folder for this one stage, on a file system that all processes share.
        every: updates from one checkpoint to the next; None: by the clock alone.
        minutes: likewise by the clock, whichever comes first; None: by updates alone.
        keep: how many stay, the newest.
        deadline: `time.monotonic()` from which on training stops and its state is saved.

    Raises:
        InputError: a value out of its range.
    """

    path: Path | str
    every: int | None = None
    minutes: float | None = 10.0
    keep: int = 2
    deadline: float | None = None

    def __post_init__(self) -> None:
        _require_count("checkpoint_every", self.every)
        _require_positive("checkpoint_minutes", self.minutes)
        _require_count("keep", self.keep)


@dataclass(frozen=True)
class FinetuneConfig:
    """Cross-entropy tuning of the dense model on the task."""

    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class DistilConfig:
    """CHAI-KD: alpha T^2 KL(teacher || student) + (1 - alpha) CE (Hinton et al. 2015, arXiv 1503.02531).

    Attributes:
        cache_teacher: run the teacher once over the examples, before the first update, and keep its log-probabilities
            at the answers on disk as `float32` or `float16`; None: run it in every update.
    """

    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch=128, epochs=1))
    temperature: float = 2.0
    alpha: float = 0.5
    cache_teacher: str | None = None

    def __post_init__(self) -> None:
        known = (None, "float32", "float16")
        _require(self.cache_teacher in known, "cache_teacher", self.cache_teacher, "float32, float16 or none")
        _require_positive("temperature", self.temperature)
        _require(0 <= self.alpha <= 1, "alpha", self.alpha, "a number from 0 to 1")


@dataclass(frozen=True)
class TargetConfig:
    """CHAI-Target: tune some layers, leave all else bit-identical.

    Attributes:
        policy: `sensitive` (the `fraction` most sensitive layers; the paper's Algorithm 1) or `medium-low` (the layers
            of the medium and low tiers; its section 3.3).
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    policy: str = "sensitive"
    fraction: float = 0.3

    def __post_init__(self) -> None:
        _require(self.policy in POLICIES, "policy", self.policy, f"one of {', '.join(POLICIES)}")
        _require(0 < self.fraction <= 1, "fraction", self.fraction, "a number above 0, up to 1")


StageConfig = FinetuneConfig | DistilConfig | TargetConfig


@dataclass(frozen=True)
class TrainOverrides:
    """Override the paper's training settings in every training stage of the run."""

    lr: float | None = None
    """Peak learning rate (paper: 2e-5)."""
    batch: int | None = None
    """Examples per update (paper: 128 distil, 64 target)."""
    accumulation: int | None = None
    """Microbatches per update (paper: 8)."""
    epochs: int | None = None
    """Passes over the training examples (default: 1 distil, 3 finetune and target)."""
    max_steps: int | None = None
    """Stop each training stage after this many updates."""
    max_train_examples: int | None = None
    """Use only this many training examples."""
    compute: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations in training (default: bfloat16 on TPUs and GPUs, float32 on CPUs); masters are float32."""
    moments: Literal["float32", "bfloat16"] | None = None
    """Dtype of AdamW's first moment (default: float32)."""
    remat: bool = False
    """Compute each layer again in the backward pass rather than keep what it made: less memory, a third more work."""

    def apply(self, train: TrainConfig) -> TrainConfig:
        """`train` with what is set here."""
        named = {"max_examples" if name == "max_train_examples" else name: value for name, value in vars(self).items()}
        return replace(train, **{name: value for name, value in named.items() if value is not None})


@dataclass(frozen=True)
class RunOptions:
    """How often a run saves the state of training, how long it works at a time, and where it logs.

    They do not change the result, so a run may be gone on with under others.
    """

    checkpoint_every: int | None = None
    """Save the state of training after this many updates, too."""
    checkpoint_minutes: float = 10.0
    """Save the state of training after this many minutes."""
    keep: int = 2
    """Checkpoints that stay, the newest; all go when their stage is done."""
    max_minutes: float | None = None
    """Stop after this many minutes, save, and exit with status 75; the same command goes on from there."""
    tensorboard: bool = False
    """Write TensorBoard event files of training to the run folder, too (needs tensorboardX)."""
    wandb: str | None = None
    """Log training to this Weights & Biases project, too (needs wandb)."""

    def at(self, path: Path, deadline: float | None) -> Checkpoints:
        """Checkpoints of one stage in the folder `path`."""
        return Checkpoints(path, self.checkpoint_every, self.checkpoint_minutes, self.keep, deadline)


@dataclass(frozen=True)
class DeviceConfig:
    """Which devices a command runs on; results do not depend on it (but for rounding)."""

    mesh: str | None = None
    """Devices as DATAxMODEL, 4x2 say: batches are split DATA ways, heads and matrices MODEL ways (default: all x1)."""
    fsdp: bool = False
    """Split weights and optimizer state over the data axis too."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute in this dtype, whatever is stored (default: bfloat16 on TPUs and GPUs, float32 on CPUs, of which those
    with AMX or AVX512-BF16 are faster in bfloat16)."""
    require_backend: Literal["tpu", "gpu", "cpu"] | None = None
    """Stop unless JAX computes on this."""
    compile_cache: Path | None = None
    """Keep compiled programs in this folder, and read back what an earlier command compiled."""
    distributed: bool = False
    """This is one of several processes that the cluster (SLURM, MPI) knows; a TPU pod is recognised without this."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes, where no cluster knows it."""
    process_count: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: which one this is, from 0."""


@dataclass(frozen=True)
class PlanConfig:
    """Which heads are merged, and what is stored how."""

    share: Literal["qk", "qkv", "kv"] | None = None
    """What the heads of a cluster share: `qk` keeps every value head, `qkv` one of each, `kv` is one latent key and
    value for a whole layer (default: qkv; with a budget: qkv and kv, whichever costs less)."""
    membership: Literal["calibrated", "prompt"] = "calibrated"
    """Clusters fixed by the calibration text, or found anew on each prompt's first tokens (share `qk`, no budget)."""
    warmup_tokens: int = 5
    """With membership `prompt`: how many first tokens read all heads' keys and decide the clusters."""
    layers: float | None = None
    """Fraction of layers to cluster, rounded up (default: 0.5; toy: 1)."""
    first: Literal["redundant", "insensitive"] = "redundant"
    """Which layers are clustered first: those with the most redundant heads, or the least sensitive ones."""
    clusters: str | None = None
    """`elbow`, a number of clusters, a ratio below 1 of the heads, or `correlation:0.9`: as few as leave every head so
    correlated with the one that stands for it (default: elbow; toy: 2)."""
    rank: float = 0.25
    """Rank of a `kv` latent, as a fraction of the model's width."""
    score_merge: Literal["representative", "low_rank"] | None = None
    """How queries and keys of a cluster are merged (default: representative; with a budget: low_rank)."""
    value_merge: Literal["representative", "low_rank", "fit"] | None = None
    """How values of a cluster are merged; `fit` regresses on calibration text (default: as above)."""
    kv_budget: float | None = None
    """Cache bytes wanted, as a fraction of the dense bfloat16 ones: the planner measures what each layer bears and
    chooses shares, clusters, ranks and formats."""
    model_budget: float | None = None
    """Weight bytes wanted, as a fraction of the dense bfloat16 ones; needs --kv-budget."""
    storages: str = "bfloat16,int8"
    """Cache formats the planner may choose from."""
    ranks: bool = True
    """Whether the planner may also cut the dimensions of clustered keys and values (where merges are of low rank)."""
    pin: str = ""
    """Layers the planner leaves as they are, with commas: 0,11."""
    sensitivity: Literal["kl", "perturbation", "attention"] = "kl"
    """How layers are scored for their tier."""
    calibration: int = 128
    """Examples (or text windows) for calibration, held out from training."""

    def filled(self, usual: "PlanConfig") -> "PlanConfig":
        """With the `usual` layers and clusters where none were asked for."""
        layers = usual.layers if self.layers is None else self.layers
        return replace(self, layers=layers, clusters=self.clusters or usual.clusters)

    def check(self) -> None:
        """Raise InputError where a number is out of its range, whichever model it is for."""
        _require(self.layers is None or 0 <= self.layers <= 1, "--layers", self.layers, "a fraction from 0 to 1")
        _require(0 < self.rank <= 1, "--rank", self.rank, "a fraction above 0, up to 1")
        _require_positive("--kv-budget", self.kv_budget)
        _require_positive("--model-budget", self.model_budget)
        _require_count("--warmup-tokens", self.warmup_tokens)
        _require_count("--calibration", self.calibration)


@dataclass(frozen=True)
class RunConfig:
    """The main job: cluster, distil, quantize and tune an OPT model, evaluating after every stage.

    Without MODEL it trains and compresses the built-in toy: no network, no weights. A run that was interrupted goes on
    when the same command is given again.
    """

    model: Positional[str] = "toy"
    """Hub id (facebook/opt-125m), a folder in Hugging Face layout, a folder that save() wrote, or `toy`."""
    task: str | None = None
    """sst2, rte or piqa."""
    text: Path | None = None
    """Instead of a task: calibrate, distil and measure perplexity on this text file."""
    data_dir: Path | None = None
    """Folder holding TASK/{train,validation}.jsonl[.gz]; without it, the data comes from the Hugging Face hub."""
    order: str = "distil,quantize,target"
    """Stages after clustering, comma-separated, in any order."""
    plan: Path | None = None
    """Use this plan.json instead of making one."""
    teacher: str | None = None
    """Teacher for distillation (hub id or folder, same vocabulary); default: the dense model of this run."""
    cache_teacher: Literal["float32", "float16"] | None = None
    """Run the teacher once over all examples and keep its answers on disk, so that it takes no memory in training."""
    finetune: Literal["auto", "always", "never"] = "auto"
    """Tune the dense model on the task first: `auto` does if it is within two standard errors of the majority label."""
    policy: Literal["sensitive", "medium-low"] = "sensitive"
    """Layers tuned by `target`."""
    select: Literal["last", "accuracy", "latency", "size"] = "last"
    """Which compressed stage becomes `model/`: the last, or the best (accuracy is judged on held-out training rows)."""
    storage: Literal["bfloat16", "float32"] = "bfloat16"
    """Cache format of layers that are not quantized (yet)."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Run folder (default: runs/MODEL-TASK)."""
    seed: int = 0
    """Seed of clustering, shuffling and splits."""
    limit: int | None = None
    """Evaluate on the first N validation examples only."""
    gate: float = 0.5
    """Warn where clustering or quantizing moves the next-token distribution by more than this KL (nats per token)."""
    revision: str | None = None
    """Revision of a hub model."""
    planning: PlanConfig = field(default_factory=PlanConfig)
    train: TrainOverrides = field(default_factory=TrainOverrides)
    operation: RunOptions = field(default_factory=RunOptions)
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def check(self) -> None:
        """Raise InputError where a number is out of its range: before any work."""
        check_seed(self.seed, "--seed")
        _require_count("--limit", self.limit)
        _require(0 <= self.gate < math.inf, "--gate", self.gate, "a number from 0 on")
        self.planning.check()
        _require_count("--max-train-examples", self.train.max_train_examples)
        self.train.apply(TrainConfig())
        _require_positive("--max-minutes", self.operation.max_minutes)
        self.operation.at(Path(), None)
