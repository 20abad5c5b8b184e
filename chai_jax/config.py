"""Settings of each stage as frozen dataclasses; the defaults are the paper's where it gives one."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from chai_jax.errors import InputError

STAGES = ("distil", "quantize", "target")
POLICIES = ("sensitive", "medium-low")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value!r}; expected {expected}")


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

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "lr", self.lr, "a positive number")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "a number from 0")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "a positive number or none")
        for name in ("batch", "accumulation", "epochs", "max_steps", "max_examples"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(self.seed >= 0, "seed", self.seed, "a whole number from 0")


@dataclass(frozen=True)
class FinetuneConfig:
    """Cross-entropy tuning of the dense model on the task."""

    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class DistilConfig:
    """CHAI-KD: alpha T^2 KL(teacher || student) + (1 - alpha) CE (Hinton et al. 2015, arXiv 1503.02531)."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch=128, epochs=1))
    temperature: float = 2.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        _require(0 < self.temperature < math.inf, "temperature", self.temperature, "a positive number")
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

    def apply(self, train: TrainConfig) -> TrainConfig:
        """`train` with what is set here."""
        named = {"max_examples" if name == "max_train_examples" else name: value for name, value in vars(self).items()}
        return replace(train, **{name: value for name, value in named.items() if value is not None})


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
    pin: str = ""
    """Layers the planner leaves as they are, with commas: 0,11."""
    sensitivity: Literal["kl", "perturbation", "attention"] = "kl"
    """How layers are scored for their tier."""
    calibration: int = 128
    """Examples (or text windows) for calibration, held out from training."""

    def filled(self, toy: bool) -> "PlanConfig":
        """With the defaults of layers and clusters: the toy's heads are few and cheap, so more of them are merged."""
        layers = (1.0 if toy else 0.5) if self.layers is None else self.layers
        return replace(self, layers=layers, clusters=self.clusters or ("2" if toy else "elbow"))


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
    finetune: Literal["auto", "always", "never"] = "auto"
    """Tune the dense model on the task first: `auto` does if it is within two standard errors of the majority label."""
    policy: Literal["sensitive", "medium-low"] = "sensitive"
    """Layers tuned by `target`."""
    select: Literal["last", "accuracy", "latency", "size"] = "last"
    """Which compressed stage becomes `model/`: the last, or the best (accuracy is judged on held-out training rows)."""
    storage: Literal["bfloat16", "float32"] = "bfloat16"
    """Cache format of layers that are not quantized (yet)."""
    out: Path | None = None
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


# The toy learns from scratch what a pretrained model knows, so the paper's learning rate would not move it.
TOY_TRAIN = TrainOverrides(lr=1e-3, batch=32, accumulation=1, epochs=1, max_steps=200)
