"""The programs that people run, lowered for devices that are not here, from shapes alone: no weights are needed."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from chai_jax.adapt.distil import distillation_loss
from chai_jax.adapt.finetune import completion_loss
from chai_jax.adapt.step import TrainState as TrainState
from chai_jax.adapt.step import everything, make_update, optimizer, split
from chai_jax.adapt.target import layer_mask, select_layers
from chai_jax.adapt.updates import SHORT_ANSWER, SHORTEST_EXAMPLE, Batch, microbatches, padded
from chai_jax.compress.quantize import store_weights
from chai_jax.config import DistilConfig, TargetConfig, TrainConfig
from chai_jax.errors import InputError
from chai_jax.model.execution import Execution
from chai_jax.model.params import Params, init
from chai_jax.model.quantized import is_leaf
from chai_jax.model.sharding import Layout, leaf_sharding, partition_spec
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import UNFITTED
from chai_jax.plans.plan import Plan, round_up
from chai_jax.plans.planned import planned_spec, uniform_plan
from chai_jax.plans.spec import Spec
from chai_jax.score.loglikelihood import target_logprobs
from chai_jax.score.questions import Questions, padded_length
from chai_jax.serve.decode import bucket, cast, decode, prefill
from chai_jax.serve.sample import Sampling

JOBS = ("distil", "finetune", "target", "prefill", "decode", "score")
TRAINING = ("distil", "finetune", "target")
COMPUTE = np.dtype(jnp.bfloat16)  # as `Execution.choose` says on a TPU
STEPS = 1000  # of the learning rate's decay: a constant in the program


@dataclass(frozen=True)
class Job:
    """What is run: one update of a training stage, one prefill, one token of decoding, or one batch of scores.

    Attributes:
        kind: one of `JOBS`.
        batch: sequences; of a training job, examples per update.
        seq: tokens of a sequence; of decoding, the cache's capacity. Rounded up as the program's callers do.
        targets: predicted tokens of an example (training): 1 for tasks, `seq` for text.
        accumulation: microbatches of an update.
        weights: dtype of the weights as loaded; of most published models two bytes an entry.
        cached: distillation reads the teacher's log-probabilities (float16) from the batch; no teacher is resident.
        moments: dtype of AdamW's first moment.
        remat: the backward pass computes each layer again.
        attention: of decoding and of prompts, "xla" or "pallas" (see `chai_jax.model.kernels`).

    Raises:
        InputError: a size below 1, or more targets than tokens.
    """

    kind: str
    batch: int
    seq: int
    targets: int = 1
    accumulation: int = 8
    weights: str = "float16"
    cached: bool = False
    moments: str = "float32"
    remat: bool = False
    attention: str = "xla"

    def __post_init__(self) -> None:
        for name in ("batch", "seq", "targets", "accumulation"):
            if not 1 <= getattr(self, name) < 2**31:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1, below 2^31")
        if self.kind in TRAINING and self.targets > self.seq:
            raise InputError(f"targets is {self.targets}; expected at most the {self.seq} tokens of an example")

    @property
    def unit(self) -> str:
        """What one run of the program does."""
        return "update" if self.kind in TRAINING else "token" if self.kind == "decode" else "batch"


def spec_of(
    config: Architecture, plan: Plan | None = None, share: str | None = None, clusters: float = 0.5, storage: str = ""
) -> Spec:
    """The spec of a model compressed by a plan; else by `uniform_plan`; else, without a share, of the dense model.

    Raises:
        InputError: there is no such cache format, or only in a plan.
    """
    if storage and storage not in UNFITTED:
        raise InputError(f"no cache format {storage!r:.80} without a plan; expected one of {', '.join(UNFITTED)}")
    if plan is not None:
        return planned_spec(plan, config)
    if share is None:
        return dense_spec(config, storage or "bfloat16")
    return planned_spec(uniform_plan(config, share, clusters, storage or "bfloat16"), config)


@dataclass(frozen=True)
class AbstractModel:
    """A model without its arrays: what it is, and where it lies."""

    config: Architecture
    spec: Spec
    layout: Layout

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.layout.mesh, PartitionSpec())

    def rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array with the batch in front, split along it."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._split(("batch",), shape))

    def state(self, state: Any) -> Any:
        """Decoding's state, split by batch, and what is cached [B, heads, S, ...] by heads too."""

        def leaf(path: Any, x: Any) -> Any:
            cached = any(getattr(step, "name", "") == "layers" for step in path)
            return on(x, self._split(("batch", "heads") if cached else ("batch",), x.shape))

        return jax.tree_util.tree_map_with_path(leaf, state)

    def _split(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        mesh, count = self.layout.mesh, len(shape)
        return NamedSharding(mesh, partition_spec(axes[:count], shape[: len(axes)], mesh))

    def params(self, dtype: str) -> Params:
        """Shapes of the parameters as loaded, where the table puts them; layers in the spec's format of weights."""

        def build() -> Params:
            tree = jax.tree.map(lambda x: x.astype(dtype), init(self.config, self.spec, jax.random.key(0)))
            layers = {
                index: store_weights(layer, self.spec.layers[int(index)].weights)
                for index, layer in tree["layers"].items()
            }
            return {**tree, "layers": layers}

        return self.place(jax.eval_shape(build))

    def place(self, tree: Any) -> Any:
        """A tree shaped as the parameters, where some leaves may be None, on the devices."""

        def leaf(value: Any, target: NamedSharding) -> Any:
            return None if value is None else jax.tree.map(on, value, leaf_sharding(value, target))

        targets = self.layout.shardings(self.config, self.spec)
        return jax.tree.map(leaf, tree, targets, is_leaf=lambda x: x is None or is_leaf(x))


def on(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """A shape on the devices of a mesh."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def lower(job: Job, model: AbstractModel, plan: Plan | None = None) -> Any:
    """The job's program, the very one that training, serving or scoring compiles, lowered for the mesh's devices.

    Raises:
        InputError: the sequence is longer than the position table, the batch does not divide over the mesh, or there
            is no kernel for its devices.
    """
    if job.seq > model.config.max_positions:
        raise InputError(f"seq is {job.seq}; expected at most the model's {model.config.max_positions} positions")
    if job.kind not in TRAINING and job.batch % model.layout.ways:
        raise InputError(
            f"a batch of {job.batch} does not divide over {model.layout.ways} data-parallel devices: choose a multiple"
        )
    if job.kind in TRAINING:
        return _lower_update(job, model, plan)
    how = Execution.choose(COMPUTE, model.layout, job.attention)
    return {"prefill": _lower_prefill, "decode": _lower_decode, "score": _lower_score}[job.kind](job, model, how)


def _lower_update(job: Job, model: AbstractModel, plan: Plan | None) -> Any:
    config, spec, how = model.config, model.spec, Execution.choose(COMPUTE, model.layout, "xla")
    params, extra = model.params(job.weights), None
    trainable = everything(params)
    loss: Any = partial(completion_loss, config, spec, how, remat=job.remat)
    train = TrainConfig(batch=job.batch, accumulation=job.accumulation, moments=job.moments, remat=job.remat)
    if job.kind == "distil":
        teacher, settings = replace(model, spec=dense_spec(config)), DistilConfig()
        extra = None if job.cached else teacher.params(job.weights)
        pairs = (config, config), (teacher.spec, spec)
        loss = partial(distillation_loss, *pairs, how, settings.temperature, settings.alpha, remat=job.remat)
    elif job.kind == "target":
        trainable = layer_mask(params, _tuned(config, plan))
    masters, frozen = map(model.place, jax.eval_shape(partial(split, trainable=trainable), params))
    tx = optimizer(train, STEPS, trainable)
    state = TrainState(masters, _beside(masters, jax.eval_shape(tx.init, masters), model.whole))
    update: Any = make_update(loss, tx, params, jax.tree.map(lambda x: x.sharding, state))
    return update.lower(state, frozen, extra, _batch(job, train, model))


def _tuned(config: Architecture, plan: Plan | None) -> tuple[int, ...]:
    """The layers that `target` tunes; without a plan's sensitivities the lowest ones: the longest way back."""
    settings = TargetConfig()
    if plan is not None and plan.sensitivity:
        return select_layers(plan, settings)
    return tuple(range(round_up(settings.fraction, config.num_layers)))


def _beside(masters: Any, moments: Any, whole: NamedSharding) -> Any:
    """The optimizer's state on the devices: moments where their masters are, counters everywhere."""
    at = {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(masters)}
    longest = max(map(len, at))

    def leaf(path: Any, x: Any) -> Any:
        # A moment's path ends with its master's.
        tails = (at[path[-count:]] for count in range(longest, 0, -1) if path[-count:] in at)
        return on(x, next(tails, whole))

    return jax.tree_util.tree_map_with_path(leaf, moments)


def _batch(job: Job, train: TrainConfig, model: AbstractModel) -> Batch:
    """One update's batch, padded as a stage pads it (see `chai_jax.adapt.updates.pack_update`)."""
    count, rows = microbatches(train, model.layout.ways)
    length = min(max(SHORTEST_EXAMPLE, padded(job.seq)), model.config.max_positions)
    width = padded(job.targets if job.targets <= SHORT_ANSWER else length)
    split = NamedSharding(model.layout.mesh, PartitionSpec(None, "data"))

    def leaf(dtype: Any, *columns: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, rows, *columns), dtype, sharding=split)

    cached = job.kind == "distil" and job.cached
    return Batch(
        tokens=leaf(jnp.int32, length),
        mask=leaf(jnp.bool_, length),
        positions=leaf(jnp.int32, width),
        targets=leaf(jnp.int32, width),
        weights=leaf(jnp.float32, width),
        teacher=leaf(jnp.float16, width, model.config.vocab_size) if cached else None,
    )


def dense_spec(config: Architecture, storage: str = "bfloat16") -> Spec:
    """The model before anything was done to it, its cache in one format."""
    return Spec.of(config, storage)


def _serving(job: Job, model: AbstractModel, how: Execution) -> tuple[Params, dict[str, Any]]:
    """The parameters in the dtype they are multiplied in, and the other arguments of prefill."""
    params = jax.eval_shape(partial(cast, how=how), model.params(job.weights))

    def rows(dtype: Any, *columns: int) -> Any:
        return model.rows((job.batch, *columns), dtype)

    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    prompts = {"tokens": rows(jnp.int32, job.seq), "mask": rows(jnp.bool_, job.seq), "keys": rows(key)}
    rule = {"sampling": Sampling(), "eos": jax.ShapeDtypeStruct((), jnp.int32, sharding=model.whole)}
    return model.place(params), prompts | rule


def _lower_prefill(job: Job, model: AbstractModel, how: Execution) -> Any:
    params, inputs = _serving(replace(job, seq=bucket(job.seq)), model, how)
    static = {"capacity": bucket(job.seq + 1), "how": how}
    return prefill.lower(model.config, model.spec, params, **inputs, **static)


def _lower_decode(job: Job, model: AbstractModel, how: Execution) -> Any:
    config, spec = model.config, model.spec
    params, inputs = _serving(replace(job, seq=1), model, how)
    begin = partial(prefill, config, spec, capacity=bucket(job.seq), how=how)
    state = model.state(jax.eval_shape(lambda params, inputs: begin(params, **inputs), params, inputs))
    until, eos = inputs["eos"], inputs["eos"]
    return decode.lower(config, spec, params, state, until, inputs["sampling"], eos, how=how)


def _lower_score(job: Job, model: AbstractModel, how: Execution) -> Any:
    length = padded_length(job.seq, model.config.max_positions)
    sizes: list[tuple[int, ...]] = [(job.batch, length), (job.batch,), (job.batch,), (job.batch, 1, 2)]
    asked = Questions(*(model.rows(size, jnp.int32) for size in sizes))
    return target_logprobs.lower(model.config, model.spec, how, model.params(job.weights), asked)
