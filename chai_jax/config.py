"""Settings of each stage as frozen dataclasses; the defaults are the paper's where it gives one."""

from dataclasses import dataclass, field

STAGES = ("distil", "quantize", "target")


@dataclass(frozen=True)
class TrainConfig:
    """One training stage: AdamW, learning rate decaying linearly to zero.

    Attributes:
        lr: peak (= first) learning rate.
        batch: examples per update.
        accumulation: microbatches an update is split into (1 where the batch does not divide).
        epochs: passes over the examples.
        max_steps: stop after this many updates; the decay then ends there.
        max_examples: use only the first this many examples (after a seeded shuffle).
        weight_decay: of kernels and embeddings; biases and norms have none.
        clip: largest global norm of the gradient; None for no clipping.
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


@dataclass(frozen=True)
class TargetConfig:
    """CHAI-Target: tune some layers, leave all else bit-identical.

    Attributes:
        policy: `sensitive` (the `fraction` most sensitive layers; the paper's Algorithm 1) or `medium-low` (the layers of
            the medium and low tiers; its section 3.3).
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    policy: str = "sensitive"
    fraction: float = 0.3
