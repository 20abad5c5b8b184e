"""The loop of every stage: examples in their order through the update, logged one by one."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from chai_jax.adapt.checkpoints import Keeper
from chai_jax.adapt.fingerprint import checksums, training_fingerprint
from chai_jax.adapt.step import (
    Loss,
    Step,
    TrainState,
    as_stored,
    everything,
    first_state,
    learning_rate,
    make_update,
    optimizer,
    split,
)
from chai_jax.adapt.teacher import CachedTeacher
from chai_jax.adapt.updates import encode_examples, microbatches, pack_update, updates
from chai_jax.config import Checkpoints, StageConfig, TrainConfig
from chai_jax.console import bar
from chai_jax.data.batches import Encoded, Example
from chai_jax.errors import InputError
from chai_jax.inputs.reading import Record
from chai_jax.machine.peaks import peak
from chai_jax.model.flops import Flops, count_flops
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import Leaf, is_leaf
from chai_jax.model.sharding import Layout, put
from chai_jax.stopping import safe_point

Log = Callable[[Record], None]


def prepare(
    model: Model, loss: Loss, config: TrainConfig, steps: int, trainable: Any, layout: Layout
) -> tuple[Step, TrainState, Any]:
    """The update of a stage, its first state, and the frozen leaves, all placed by the layout."""
    masters, frozen = split(layout.params(model.config, model.spec, model.params), trainable)
    tx = optimizer(config, steps, trainable)
    state = first_state(masters, tx, layout.mesh)
    return make_update(loss, tx, model.params, jax.tree.map(lambda x: x.sharding, state)), state, frozen


def train(
    model: Model,
    examples: Sequence[Example | Encoded],
    loss: Loss,
    config: StageConfig,
    *,
    stage: str,
    trainable: Any = None,
    extra: Any = None,
    answers: Callable[[Sequence[Encoded]], CachedTeacher] | None = None,
    beside: Flops | None = None,
    longest: int | None = None,
    log: Log | None = None,
    checkpoints: Checkpoints | Path | str | None = None,
) -> Model:
    """Tune a model: the loop of every stage. The caller's model stays as it is.

    Same seed, same devices: the same result bit for bit, in one go or stopped and gone on with any number of times.

    Args:
        stage: its name, for the log, the progress bar and errors.
        trainable: tree of booleans, one per leaf of the parameters (a quantized array is one leaf); None: everything.
        extra: arrays on the mesh that are handed to `loss` (a teacher's parameters); not changed, not consumed.
        answers: makes a teacher's answers to the examples, which come to `loss` with the batch.
        beside: FLOPs that `loss` takes besides forward and backward of the model (a teacher's).
        longest: the most tokens of an input; the model's positions, if not given.
        log: called after every update with stage, step (from 1), steps, lr, grad_norm before clipping, the loss's means
            per target, step_s (seconds; an update of a new shape includes its compilation), tokens_per_s (real tokens
            through the model) and, where the devices' peak is known, mfu (model FLOPs utilisation, of the bfloat16
            peak; see `chai_jax.model.flops`). A stage that goes on from a checkpoint logs from the update after it.
        checkpoints: a folder to keep the state in, and to go on from if it holds one; None: nothing is kept.

    Raises:
        InputError: no examples, a loss or gradient that is not finite, checkpoints of another training, or no room for
            new ones; nothing is returned then.
        Stopped: SIGTERM arrived or the time is up, and the state is saved (only with `checkpoints`).
    """
    settings, layout = config.train, model.how.layout
    trainable = everything(model.params) if trainable is None else trainable
    longest = longest or model.config.max_positions
    encoded = encode_examples(model.tokenizer, examples, settings, longest)
    cached = None if answers is None else answers(encoded)
    order = updates([len(example.tokens) for example in encoded], settings)
    shape, widest = microbatches(settings, layout.ways), max(len(one.tokens) - one.start for one in encoded)
    make = partial(prepare, model, loss, settings, len(order), trainable, layout)
    step, state, frozen = make()
    flops = count_flops(model.config, model.spec, trainable) + (beside or Flops())
    schedule, share = learning_rate(settings, len(order)), layout.share(shape[1])

    with ExitStack() as stack:
        keeper, done = None, 0
        if checkpoints is not None:
            about = training_fingerprint(stage, config, model, encoded, order, state)
            about["teacher"] = None if cached is None else cached.about
            about["weights"] = checksums({"trained": state.masters, "frozen": frozen, "beside": extra})
            keeper = stack.enter_context(Keeper(checkpoints, about))
            done, state = resume(keeper, state, lambda: make()[1])
        progress = stack.enter_context(bar())
        task = progress.add_task(stage, total=len(order), completed=done, note="")
        for number, members in enumerate(order[done:], done + 1):
            began = time.perf_counter()
            chosen = [encoded[member] for member in members]
            batch = pack_update(chosen, shape, longest, widest, share)
            batch = layout.join(batch if cached is None else cached.attach(batch, members), shape[1])
            state, means = step(state, frozen, extra, batch)
            values = {name: float(value) for name, value in jax.device_get(means).items()}
            record = {"stage": stage, "step": number, "steps": len(order), "lr": float(schedule(number - 1)), **values}
            _check_finite(record)
            record |= speed(chosen, time.perf_counter() - began, flops.of(chosen), layout.mesh)
            if log is not None:
                log(record)
            progress.update(task, advance=1, note=progress_note(record))
            if keeper is not None:  # after the log: what a checkpoint has seen is in it
                keeper.after(number, len(order), state)
            else:
                safe_point()
    return model.replace(params=_finish(state.masters, model.params))


def speed(examples: Sequence[Encoded], seconds: float, flops: int, mesh: Mesh) -> dict[str, float]:
    """How fast an update was; without `mfu` where the devices' peak is not known."""
    record = {"step_s": seconds, "tokens_per_s": sum(len(example.tokens) - 1 for example in examples) / seconds}
    rates = peak(mesh.devices.flat[0])
    return record if rates is None else record | {"mfu": flops / seconds / (rates.flops * mesh.devices.size)}


def progress_note(record: Record) -> str:
    """What the progress bar says of an update."""
    used = f", {record['mfu']:.0%} MFU" if "mfu" in record else ""
    return f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s, {record['step_s']:.2f} s{used}"


def resume(keeper: Keeper, first: TrainState, again: Callable[[], TrainState]) -> tuple[int, TrainState]:
    """Updates already done and the state after them; the first state is given up, lest two be in memory at once."""
    if keeper.empty:
        return 0, first
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first)
    jax.tree.map(lambda x: x.delete(), first)
    done, state = keeper.restore(like)
    return done, again() if state is None else state


def _check_finite(record: Record) -> None:
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
        return jax.tree.map(lambda x, before: put(x, before.sharding), new, old)

    return jax.tree.map(leaf, as_stored(masters, params), params, is_leaf=lambda x: x is None or is_leaf(x))
