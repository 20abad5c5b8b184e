"""CHAI-Target: tune only the layers that need it; all else stays bit-identical."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax

from chai_jax.adapt.finetune import loss_of
from chai_jax.adapt.step import in_basis
from chai_jax.adapt.train import Log, train
from chai_jax.config import Checkpoints, TargetConfig
from chai_jax.data.batches import Encoded, Example
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import is_leaf
from chai_jax.plans.plan import Plan, round_up


def target(
    model: Model,
    plan: Plan,
    examples: Sequence[Example | Encoded],
    config: TargetConfig | None = None,
    log: Log | None = None,
    *,
    checkpoints: Checkpoints | Path | str | None = None,
) -> Model:
    """Minimise the cross-entropy of the completions by the plan's chosen layers alone.

    Embeddings, final norm and all other layers come back as the very same arrays. A quantized kernel of a chosen layer
    has a float32 master during the stage and is quantized again at its end.

    Raises:
        InputError: the plan does not fit the model or chooses no layer; and see `chai_jax.adapt.train.train`.
    """
    config = config or TargetConfig()
    plan.check_model(model.config)
    trainable = layer_mask(model.params, select_layers(plan, config))
    loss = loss_of(model, config.train)
    return train(model, examples, loss, config, stage="target", trainable=trainable, log=log, checkpoints=checkpoints)


def select_layers(plan: Plan, config: TargetConfig) -> tuple[int, ...]:
    """The layers a policy chooses, in order.

    `sensitive`: the ceil(fraction L) most sensitive, the first of equals (paper, Algorithm 1); `medium-low`: those of
    the medium and low tiers (paper, section 3.3).

    Raises:
        InputError: the plan has no sensitivities, or no layer of these tiers.
    """
    count = len(plan.layers)
    if config.policy == "medium-low":
        layers = [index for index, layer in enumerate(plan.layers) if layer.tier in ("medium", "low")]
    elif len(plan.sensitivity) == count:
        wanted = round_up(config.fraction, count)
        layers = sorted(range(count), key=lambda index: (-plan.sensitivity[index], index))[:wanted]
    else:
        raise InputError(
            "the plan has no sensitivities, which the policy 'sensitive' ranks layers by; make one with chai-jax plan, "
            "or use the policy 'medium-low'"
        )
    if not layers:
        raise InputError(f"no layer of the plan falls under the policy {config.policy!r}; use the policy 'sensitive'")
    return tuple(sorted(layers))


def layer_mask(params: Params, layers: Collection[int]) -> Any:
    """True for every leaf of these layers that can train, False for all else: a tree of booleans shaped as the
    parameters."""

    def chosen(path: tuple[Any, ...], _: Any) -> bool:
        return path[0].key == "layers" and int(path[1].key) in layers and not in_basis(path)

    return jax.tree_util.tree_map_with_path(chosen, params, is_leaf=is_leaf)
