"""Training on windows of a text, as experiments do it: options, settings, and what is said while it runs."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chai_jax.config import Checkpoints, TrainConfig
from chai_jax.console import console
from chai_jax.data.batches import Encoded
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from lab.options import Common, Record

SKIPPED = 32  # windows of 512 tokens at the text's beginning, of which plans were made


@dataclass(frozen=True)
class Teaching(Common):
    """What is trained on, and for how long."""

    calibration: Path | None = None
    """The text to learn from: a file, plain or .gz."""
    updates: int = 100
    batch: int = 4
    """Windows of an update."""
    window: int = 512
    """Tokens of a window."""
    lr: float = 2e-5
    """Peak (first) learning rate."""
    alpha: float = 1.0
    """Part of the teacher in the loss; the rest is cross-entropy with the text."""
    compute: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations (default: the device's fast one)."""

    @property
    def settings(self) -> Record:
        """What a trained model depends on, but for models and seed, as text."""
        names = ("calibration", "updates", "batch", "window", "lr", "alpha", "compute")
        return {name: str(getattr(self, name)) for name in names}

    def train_config(self, examples: int, seed: int) -> TrainConfig:
        """One pass over as many windows as the updates take, or several where there are not so many."""
        return TrainConfig(
            self.lr, self.batch, accumulation=1, epochs=10_000, max_steps=self.updates,
            max_examples=min(examples, self.updates * self.batch), weight_decay=0.0, seed=seed,
            compute=self.compute, remat=True,
        )  # fmt: skip

    def examples(self, model: Model) -> list[Encoded]:
        """The text's whole windows, after those that plans are made of.

        Raises:
            InputError: there are fewer than one update takes.
        """
        assert self.calibration is not None
        text = read_text_file(self.calibration)
        cut = windows(model.tokenizer, text, self.window)[SKIPPED * 512 // self.window : -1]
        if len(cut) < self.batch:
            raise InputError(f"the text has {len(cut)} windows left; expected at least --batch {self.batch}: give more")
        return list(cut)


@contextmanager
def state_of(folder: Path) -> Iterator[Checkpoints]:
    """Where the training of the model that `folder` will hold keeps its state, which goes when that is saved.

    Raises:
        InputError: there is such a folder, of another training.
    """
    if folder.exists():
        raise InputError(f"{folder} is there, trained in another way: choose another --out, or delete it")
    state = folder.with_name(f"{folder.name}.state")
    yield Checkpoints(state, minutes=5.0, keep=1)
    shutil.rmtree(state, ignore_errors=True)


def told(name: str, what: str) -> tuple[list[float], Callable[[dict[str, Any]], None]]:
    """A list of one entry of every update's record, and the log that fills it and says its mean now and then."""
    values: list[float] = []

    def log(entry: dict[str, Any]) -> None:
        values.append(float(entry[what]))
        if len(values) % 5 == 0:
            console.print(f"{name}: update {len(values)}, {what} {sum(values[-5:]) / 5:.4f}")

    return values, log
