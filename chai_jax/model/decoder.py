"""A decoder as functions of its parameters: all families, dense and clustered, in one forward pass.

Follows transformers' models of each family; what differs between them is in the `Architecture`. Positions are counted
over the mask, softmax and norms are computed in float32. Dropout is not applied, in training neither. The spec and the
types of the leaves say what each layer is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.cache import Cache, GroupCache
from chai_jax.model.execution import Execution
from chai_jax.model.layers import at_columns, norm, project
from chai_jax.model.params import Params
from chai_jax.model.place import Place, locate
from chai_jax.model.products import product
from chai_jax.model.self_attention import Seen, attention
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec

# Hidden states that meet the vocabulary head at once, so that logits do not fill the memory: 51 MB of float32 at
# V = 50,272 where a model is scored, 206 MB where it trains.
HEAD_ROWS, HEAD_ROWS_TRAINED = 256, 1024

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class Output:
    """Hidden states before the vocabulary head, and the cache after these tokens."""

    hidden: Any  # [B, T, D], or of the wanted columns [B, N, D]
    cache: Cache


jax.tree_util.register_dataclass(Output)


def feed_forward(config: Architecture, params: Params, x: Float[Array, "B T D"], how: Execution) -> Array:
    """The feed-forward of a layer: through a wide hidden layer and back, with a gate where the family has one."""
    activation, wide = ACTIVATIONS[config.activation], partial(project, "btd,df->btf", x=x, kernels=how.kernels)
    y = activation(wide(params["gate"])) * wide(params["up"]) if config.gated else activation(wide(params["up"]))
    return project("btf,fd->btd", params["down"], y, how.kernels)


def block(
    config: Architecture,
    layer: LayerSpec,
    params: Params,
    x: Float[Array, "B T D"],
    place: Place,
    past: tuple[GroupCache, ...] | None,
    wanted: Int32[Array, "B N"] | None = None,
    *,
    how: Execution,
    plain: bool = False,
) -> tuple[Float[Array, "B N D"], tuple[GroupCache, ...], Seen]:
    """One layer: attention and feed-forward, each with its norm before it (pre-norm) or after its residual sum.

    Args:
        past: what is stored of the tokens before; None where the sequences begin here.
        wanted: rows that are handed back, all if not given.
        plain: attention is XLA's, whatever the kernels: they know no branches and have no scores to show.
    """
    first, second = (
        partial(norm, params.get(name, {}), kind=config.norm, epsilon=config.norm_epsilon)
        for name in ("attention_norm", "mlp_norm")
    )
    entering = first(x) if config.pre_norm else x
    y, cache, seen = attention(config, layer, params, entering, place, past, wanted, how=how, plain=plain)
    x = at_columns(x, wanted, 1)
    if config.parallel:
        return x + y + feed_forward(config, params, second(x), how), cache, seen
    x = x + y if config.pre_norm else first(x + y)
    y = feed_forward(config, params, second(x) if config.pre_norm else x, how)
    return x + y if config.pre_norm else second(x + y), cache, seen


def embed(
    config: Architecture, params: Params, tokens: Int32[Array, "B T"], positions: Int32[Array, "B T"], how: Execution
) -> Float[Array, "B T D"]:
    """What enters the first layer."""
    x = params["embed"]["tokens"][tokens].astype(how.dtype)
    if "project_in" in params:
        x = project("bte,ed->btd", params["project_in"], x, how.kernels)
    if config.rotary is not None:
        return x
    return x + params["embed"]["positions"][positions + config.position_offset].astype(how.dtype)


def final_norm(config: Architecture, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The norm behind the last layer, of models that have one."""
    return norm(params.get("final_norm", {}), x, config.norm, config.norm_epsilon) if config.final_norm else x


def forward(
    config: Architecture,
    spec: Spec,
    params: Params,
    tokens: Int32[Array, "B T"],
    mask: Bool[Array, "B T"],
    how: Execution,
    *,
    cache: Cache | None = None,
    remat: bool = False,
    branch: Int32[Array, "B T"] | None = None,
    wanted: Int32[Array, "B N"] | None = None,
) -> Output:
    """Run the decoder over a parameter tree: the one forward pass of everything.

    Without a cache this is prefill (and scoring, and training): its cache holds exactly these T columns. With a cache,
    T further tokens are written behind the columns that each sequence has used. Positions are counted over the mask, so
    padding may stand left or right; columns of padding on the right are not used up. Pure; jit it with `config`, `spec`
    and `how` static.

    Args:
        mask: True where a token is real.
        how: its dtype is that of the activations; weights are cast to it where they are used. Its layout says how a
            cache that is given is split; else it is not read, the arrays' own decides.
        remat: keep only each layer's input for a backward pass, which computes the layer again (`jax.checkpoint`).
        branch: of each token, without a cache: it reads those of branch 0 and of its own, so that one row holds several
            continuations of one text. For specs that are `stored_by_token`.
        wanted: columns whose hidden states are handed back, all if not given. The last layer makes keys, values and
            queries of all, but attends, projects and feeds forward for no others (of clusters found per prompt it
            attends for all).
    """
    if branch is not None and (cache is not None or not spec.stored_by_token):
        raise ValueError("branches of a row need a spec that is stored_by_token, and no cache")
    place = locate(mask, cache, branch)
    x = embed(config, params, tokens, place.positions, how)
    layers, last = [], len(spec.layers) - 1
    for index, layer in enumerate(spec.layers):
        with jax.named_scope(f"layer_{index}"):
            run = partial(block, config, layer, params["layers"][str(index)], how=how, plain=branch is not None)
            past = None if cache is None else cache.layers[index]
            x, stored, _ = (jax.checkpoint(run) if remat else run)(x, place, past, wanted if index == last else None)
        layers.append(stored)
    after = Cache(tuple(layers), place.real, place.length)
    return Output(final_norm(config, params, x), after)


def unembed(
    config: Architecture, params: Params, hidden: Float[Array, "*batch D"], how: Execution
) -> Float[Array, "*batch V"]:
    """float32 logits [..., V] of hidden states [..., D]."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    if "project_out" in params:
        flat = project("btd,de->bte", params["project_out"], flat, how.kernels)
    table = params["embed"]["tokens"] if config.tied else params["head"]["kernel"]
    # The table first: on CPUs XLA is half again as fast at this as at the transpose.
    logits = product("ve,bte->vbt", table.astype(flat.dtype), flat, row="t", kernels=how.kernels)
    return jnp.moveaxis(logits, 0, -1).reshape(*hidden.shape[:-1], -1)
