"""The loop of every stage: examples in their order through the update, logged one by one."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chai_jax.adapt.step import (
    Loss,
    State,
    Step,
    everything,
    first_state,
    learning_rate,
    make_update,
    optimizer,
    split,
    store,
)
from chai_jax.adapt.updates import encode_examples, microbatches, pack, updates
from chai_jax.config import TrainConfig
from chai_jax.data.batches import Encoded, Example
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.params import Params, declare
from chai_jax.model.quantized import Leaf, is_leaf
from chai_jax.model.sharding import make_mesh, place, shardings
from chai_jax.progress import bar

Log = Callable[[dict[str, Any]], None]


def prepare(
    model: Model, loss: Loss, config: TrainConfig, steps: int, trainable: Any, mesh: Mesh
) -> tuple[Step, State, Any]:
    """The update of a stage, its first state, and the frozen leaves, all on the mesh."""
    masters, frozen = split(place(model.params, shardings(declare(model.config, model.spec), mesh)), trainable)
    tx = optimizer(config, steps, trainable)
    state = first_state(masters, tx, mesh)
    return make_update(loss, tx, model.params, jax.tree.map(lambda x: x.sharding, state)), state, frozen


def train(
    model: Model,
    examples: Sequence[Example | Encoded],
    loss: Loss,
    config: TrainConfig,
    *,
    stage: str,
    trainable: Any = None,
    extra: Any = None,
    longest: int | None = None,
    mesh: Mesh | None = None,
    log: Log | None = None,
) -> Model:
    """Tune a model: the loop of every stage. The caller's model stays as it is.

    Same seed, same devices: the same result bit for bit.

    Args:
        stage: its name, for the log, the progress bar and errors.
        trainable: tree of booleans, one per leaf of the parameters (a quantized array is one leaf); None: everything.
        extra: arrays on the mesh that are handed to `loss` (a teacher's parameters); not changed, not consumed.
        longest: the most tokens of an input; the model's positions, if not given.
        mesh: devices to spread over; all of them along `data`, if not given.
        log: called after every update with stage, step (from 1), steps, lr, tokens_per_s (real tokens through the
            model; an update of a new shape includes its compilation), grad_norm before clipping, and the loss's means
            per target.

    Raises:
        InputError: no examples, or a loss or gradient that is not finite; nothing is returned then.
    """
    mesh = make_mesh() if mesh is None else mesh
    trainable = everything(model.params) if trainable is None else trainable
    longest = longest or model.config.max_positions
    encoded = encode_examples(model.tokenizer, examples, config, longest)
    order = updates([len(example.tokens) for example in encoded], config)
    shape, widest = microbatches(config, mesh.shape["data"]), max(len(one.tokens) - one.start for one in encoded)
    step, state, frozen = prepare(model, loss, config, len(order), trainable, mesh)
    schedule, rows = learning_rate(config, len(order)), NamedSharding(mesh, PartitionSpec(None, "data"))

    with bar() as progress:
        task = progress.add_task(stage, total=len(order), note="")
        for index, members in enumerate(order):
            began = time.perf_counter()
            batch = pack([encoded[member] for member in members], shape, longest, widest)
            state, means = step(state, frozen, extra, jax.device_put(batch, rows))
            values = {name: float(value) for name, value in jax.device_get(means).items()}
            record = {"stage": stage, "step": index + 1, "steps": len(order), "lr": float(schedule(index)), **values}
            _check_finite(record)
            if log is not None:
                log(record | {"tokens_per_s": float(batch.mask.sum() / (time.perf_counter() - began))})
            progress.update(task, advance=1, note=f"loss {values['loss']:.4f}")
    return model.replace(params=_finish(state.masters, model.params))


def _check_finite(record: dict[str, Any]) -> None:
    bad = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise InputError(
            f"{record['stage']} stopped at update {record['step']} of {record['steps']}: its {bad[0]} is "
            f"{record[bad[0]]}; expected finite numbers: lower the learning rate (now {record['lr']:.3g}) or check the "
            "model's weights"
        )


def _finish(masters: Any, params: Params) -> Params:
    """The trained leaves in their own format where their predecessors lay, and the frozen leaves themselves."""

    def leaf(new: Leaf | None, old: Leaf) -> Leaf:
        if new is None:
            return old
        return jax.tree.map(lambda x, before: jax.device_put(x, before.sharding), new, old)

    return jax.tree.map(leaf, store(masters, params), params, is_leaf=lambda x: x is None or is_leaf(x))
