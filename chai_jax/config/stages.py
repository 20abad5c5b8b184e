"""Settings of each training stage; the defaults are the paper's where it gives one."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from chai_jax.config.checks import check_seed, require, require_count, require_positive

POLICIES = ("sensitive", "medium-low")
DTYPES = ("float32", "bfloat16")


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
        require(0 < self.lr <= 100, "lr", self.lr, "a number above 0, up to 100")
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "a number from 0")
        require(self.clip is None or self.clip > 0, "clip", self.clip, "a positive number or none")
        require_count("epochs", self.epochs, 10_000)  # the order of the examples is made for all of them at once
        for name in ("batch", "accumulation"):
            require_count(name, getattr(self, name), 2**20)
        for name in ("max_steps", "max_examples"):
            require_count(name, getattr(self, name))
        check_seed(self.seed)
        require(self.compute in (None, *DTYPES), "compute", self.compute, f"one of {', '.join(DTYPES)}, or none")
        require(self.moments in DTYPES, "moments", self.moments, f"one of {', '.join(DTYPES)}")


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
        require_count("checkpoint_every", self.every)
        require_positive("checkpoint_minutes", self.minutes)
        require_count("keep", self.keep)


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
        require(self.cache_teacher in known, "cache_teacher", self.cache_teacher, "float32, float16 or none")
        require_positive("temperature", self.temperature)
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "a number from 0 to 1")


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
        require(self.policy in POLICIES, "policy", self.policy, f"one of {', '.join(POLICIES)}")
        require(0 < self.fraction <= 1, "fraction", self.fraction, "a number above 0, up to 1")


StageConfig = FinetuneConfig | DistilConfig | TargetConfig
