"""One update for every stage: AdamW on float32 masters, accumulated microbatches, one jitted program on a mesh.

What trains is data: a tree of booleans beside the parameters. Each trainable leaf has a float32 *master* while the
stage lasts. An update rounds the masters as they will be stored (bfloat16, int8, ...), takes the gradient at those
rounded weights and applies it to the masters: the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432). So
the loss that falls is that of the model that will be saved. A quantized array is atomic: neither its values nor its
scale have a gradient. Frozen leaves have no master, no gradient and no optimizer state, and are handed back untouched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from chai_jax.adapt.updates import Batch
from chai_jax.config import TrainConfig
from chai_jax.model.params import Params
from chai_jax.model.quantized import Leaf, dequantize, is_leaf, quantize_like

Sums = dict[str, Float[Array, ""]]
# (the whole parameter tree, one microbatch, what else the stage brought) -> sums over the targets; "loss" is minimised.
Loss = Callable[[Params, Batch, Any], Sums]


def everything(params: Params) -> Any:
    """The mask under which every leaf trains, but for bases of keys: they are part of how a cache is stored."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not in_basis(path), params, is_leaf=is_leaf)


def in_basis(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of the parameters at this path belongs to the basis of a layer's keys."""
    return any(entry.key == "basis" for entry in path)


def split(params: Params, trainable: Any) -> tuple[Any, Any]:
    """(float32 masters, frozen leaves): two trees shaped as `params`, each with None where the other has a leaf."""

    def master(leaf: Leaf, trains: bool) -> Array | None:
        # A copy, since the step donates its masters and the caller's model must stay usable.
        return jnp.array(dequantize(leaf), copy=True) if trains else None

    masters = jax.tree.map(master, params, trainable, is_leaf=is_leaf)
    return masters, jax.tree.map(lambda leaf, trains: None if trains else leaf, params, trainable, is_leaf=is_leaf)


def join(trained: Any, frozen: Any) -> Params:
    """The whole tree again: the inverse of `split`."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, trained, frozen, is_leaf=lambda x: x is None or is_leaf(x)
    )


def as_stored(masters: Any, like: Params) -> Any:
    """Masters in the format of the leaves they stand for: dtype, int8 with the same axes and type of scale, or int4
    with the same groups.

    Of `like` only structure and dtypes are read.
    """

    def leaf(master: Array | None, old: Any) -> Leaf | None:
        if master is None:
            return None
        return quantize_like(master, old) if is_leaf(old) else master.astype(old.dtype)

    return jax.tree.map(leaf, masters, like, is_leaf=lambda x: x is None or is_leaf(x))


def rounded(masters: Any, like: Params) -> Any:
    """Masters as they will be stored, in float32: what the forward pass of training sees."""
    return jax.tree.map(dequantize, as_stored(masters, like), is_leaf=is_leaf)


def optimizer(config: TrainConfig, steps: int, trainable: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for the leaves that `trainable` marks, zero for all others.

    `optax.masked` alone would hand the frozen leaves' gradients through as updates; `partition` with `set_to_zero` does
    not. The norm that is clipped is that of the trainable leaves; biases and norms do not decay.
    """

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)

    schedule = learning_rate(config, steps)
    adamw = _with_standard_promotion(
        optax.adamw(schedule, mu_dtype=config.moments, weight_decay=config.weight_decay, mask=decays)
    )
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    labels = jax.tree.map(lambda trains: "trainable" if trains else "frozen", trainable)
    return optax.partition({"trainable": optax.chain(clip, adamw), "frozen": optax.set_to_zero()}, labels)


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """Linear decay: `lr` at update 0, zero after the last."""
    return optax.linear_schedule(config.lr, 0.0, steps)


def _with_standard_promotion(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """AdamW's arithmetic mixes dtypes, which strict promotion refuses; nothing else here does."""

    def standard(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                return function(*args)

        return call

    return optax.GradientTransformation(standard(inner.init), standard(inner.update))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What an update changes."""

    masters: Any
    optimizer: Any


def gradients(loss: Loss, weights: Any, frozen: Any, extra: Any, batch: Batch) -> tuple[Any, Sums]:
    """Gradient of the mean loss per target over the whole update, and the means themselves.

    The batch has a leading axis of microbatches; each is weighted by its number of targets, so how many there are
    changes nothing but the memory.
    """
    targets = jnp.maximum(batch.weights.sum(), 1.0)

    def step(total: Any, microbatch: Batch) -> tuple[Any, Sums]:
        def objective(weights: Any) -> tuple[Array, Sums]:
            sums = loss(join(weights, frozen), microbatch, extra)
            return sums["loss"] / targets, sums

        gradient, sums = jax.grad(objective, has_aux=True)(weights)
        return jax.tree.map(jnp.add, total, gradient), sums

    gradient, sums = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, weights), batch)
    return gradient, {name: each.sum() / targets for name, each in sums.items()}


Step = Callable[[TrainState, Any, Any, Batch], tuple[TrainState, Sums]]


def first_state(masters: Any, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first update; moments lie where their masters do, counters everywhere."""
    whole = NamedSharding(mesh, PartitionSpec())
    return TrainState(masters, jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, whole), tx.init(masters)))


def make_update(loss: Loss, tx: optax.GradientTransformation, like: Params, placed: Any) -> Step:
    """The jitted update `(state, frozen, extra, batch) -> (state, means)`; it consumes its state.

    No weights are needed to make it, nor to lower it: shapes will do.

    Args:
        like: the parameters or their shapes: the formats that masters are rounded to.
        placed: the sharding of every leaf of the state, which the update keeps.
    """
    like = jax.eval_shape(lambda: like)

    def update(state: TrainState, frozen: Any, extra: Any, batch: Batch) -> tuple[TrainState, Sums]:
        gradient, means = gradients(loss, rounded(state.masters, like), frozen, extra, batch)
        changes, after = tx.update(gradient, state.optimizer, state.masters)
        means["grad_norm"] = optax.tree.norm(gradient)
        return TrainState(optax.apply_updates(state.masters, changes), after), means

    return jax.jit(update, donate_argnums=0, out_shardings=(placed, None))
