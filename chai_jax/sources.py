"""Where models come from: what a person may give as MODEL, and the defaults that come with each kind."""

from collections.abc import Callable
from dataclasses import dataclass

from chai_jax.adapt.toy import toy_model
from chai_jax.config import PlanConfig, TrainOverrides
from chai_jax.errors import InputError
from chai_jax.files.published import architecture_of, random_model
from chai_jax.files.store import load, read_architecture
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.plans.architecture import Architecture


@dataclass(frozen=True)
class Source:
    """A kind of MODEL.

    Attributes:
        open: (MODEL, revision, seed, how it is computed) -> the model.
        planning: what a plan does where nothing is asked for.
        train: training settings that replace the paper's.
        task: what a run works on where nothing is asked for; None: it must be said.
    """

    open: Callable[[str, str | None, int, Execution | None], Model]
    planning: PlanConfig
    train: TrainOverrides
    task: str | None = None


# A folder, a GGUF file, or an id on the Hugging Face hub.
PRETRAINED = Source(
    open=lambda model, revision, seed, how: load(model, revision=revision, execution=how),
    planning=PlanConfig(layers=0.5, clusters="elbow"),
    train=TrainOverrides(),
)
TOY = Source(
    open=lambda model, revision, seed, how: toy_model(seed, execution=how),
    # Its heads are few and cheap, so more of them are merged.
    planning=PlanConfig(layers=1.0, clusters="2"),
    # It learns from scratch what a pretrained model knows: the paper's learning rate would not move it.
    train=TrainOverrides(lr=1e-3, batch=32, accumulation=1, epochs=1, max_steps=200),
    task="toy",
)
# random:SHAPE, a published shape or a folder with a config.json.
RANDOM = Source(
    open=lambda model, revision, seed, how: random_model(model.partition(":")[2], seed).replace(execution=how),
    planning=PRETRAINED.planning,
    train=PRETRAINED.train,
)
NAMED = {"toy": TOY, "random:": RANDOM}


def source_of(model: str) -> Source:
    """The kind of a MODEL: `toy`, random:SHAPE, or else a folder, a GGUF file or a hub id."""
    kind, colon, _ = model.partition(":")
    return NAMED.get(kind + colon, PRETRAINED)


def open_model(model: str, revision: str | None = None, seed: int = 0, execution: Execution | None = None) -> Model:
    """The model that a person calls MODEL.

    Args:
        revision: of a hub id.
        seed: of the weights of `toy` and random:SHAPE.
        execution: how the model is computed; None: as suits the devices here.

    Raises:
        InputError: there is none, or one that has no revisions.
    """
    source = source_of(model)
    if revision is not None and source is not PRETRAINED:
        raise InputError(f"{model} has no revision {revision!r}; expected one of a hub id only: leave it out")
    return source.open(model, revision, seed, execution)


def shape_of(model: str) -> Architecture:
    """The shape of what `open_model` opens; no weights are read or made for it, but the toy's."""
    source = source_of(model)
    if source is PRETRAINED:
        return read_architecture(model)
    return architecture_of(model.partition(":")[2]) if source is RANDOM else open_model(model).config
