"""The built-in toy model: a small OPT trained on the spot on the toy's training rows, kept for the next run."""

import os
from contextlib import ExitStack
from pathlib import Path

import jax

from chai_jax.adapt.finetune import finetune
from chai_jax.config import FinetuneConfig, TrainConfig
from chai_jax.console import console
from chai_jax.data.tasks import TASKS, load_rows
from chai_jax.data.toy import POSITIONS, toy_tokenizer
from chai_jax.files.lock import LOCK, locked
from chai_jax.files.store import load, save
from chai_jax.inputs.reading import reason, shown
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

VERSION = 1  # raise it with anything that changes what is trained
LAYERS, HEADS, WIDTH = 4, 8, 64
TRAIN = TrainConfig(lr=2e-3, batch=32, accumulation=1, epochs=1, max_steps=600)
# Larger than OPT's 0.02, which at this width leaves the first hundred steps without a gradient to speak of.
STD = 0.12


def toy_folder(seed: int) -> Path:
    """Where the trained toy is kept: `$XDG_CACHE_HOME` (or ~/.cache) / chai_jax."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "chai_jax" / f"toy-{VERSION}-{seed}"


def toy_model(seed: int = 0, *, keep: bool = True, execution: Execution | None = None) -> Model:
    """The toy, trained now or by an earlier call; where another process is training it, this one waits.

    Args:
        seed: of its initial weights and of the order of its training rows.
        keep: whether to look for, and leave, a trained copy in `toy_folder`; never where several processes train it,
            since some might have a copy and others not.
    """
    folder, keep = toy_folder(seed), keep and jax.process_count() == 1
    with ExitStack() as lock:
        if keep and not (folder / "config.json").is_file():
            try:
                lock.enter_context(locked(folder.with_suffix(LOCK), wait="which is training the built-in toy"))
            except OSError as error:
                console.print(f"the built-in toy cannot be kept in {shown(folder.parent)} ({reason(error)})")
                keep = False
        if keep and (folder / "config.json").is_file():
            return load(folder, execution=execution)
        console.print("training the built-in toy" + " (kept for the next run)" * keep)
        model = _trained(seed, execution)
        if keep:
            save(model, folder)
        return model


def _trained(seed: int, execution: Execution | None) -> Model:
    tokenizer = toy_tokenizer()
    vocabulary = -(-len(tokenizer) // 8) * 8
    config = Architecture(vocabulary, WIDTH, LAYERS, HEADS, 4 * WIDTH, POSITIONS, WIDTH)
    spec = Spec.of(config)
    untrained = Model(
        config, spec, init(config, spec, jax.random.key(seed), std=STD), tokenizer, "toy", execution=execution
    )
    task = TASKS["toy"]
    examples = [task.question(row).example for row in load_rows(task, "train")]
    settings = FinetuneConfig(TrainConfig(**{**vars(TRAIN), "seed": seed}))
    return finetune(untrained, examples, settings)
