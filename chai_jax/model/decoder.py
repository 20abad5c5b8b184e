"""OPT (Zhang et al. 2022, arXiv 2205.01068) as a Flax NNX module, dense and clustered in one forward pass.

Follows transformers' `OPTForCausalLM`: learned positions counted over the mask with an offset of 2, biases on all
projections, pre-norm (125m, 1.3b, ...) or post-norm (350m, with 512-wide embeddings projected in and out), softmax in
float32. Dropout is not applied, in training neither. The spec and the types of the leaves say what each layer is.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model import kernels
from chai_jax.model.attention import attend, attend_in_order, attend_one, attend_prompt
from chai_jax.model.cache import Cache, GroupCache, remember
from chai_jax.model.int4_store import of_rows
from chai_jax.model.layers import Heads, Norm, Projection, at_columns, value_of
from chai_jax.model.params import POSITION_OFFSET, PROJECTIONS, Params
from chai_jax.model.per_prompt import attend_per_prompt
from chai_jax.model.products import product
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Group, LayerSpec, Spec

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class Seen:
    """What a layer's attention did, for `observe`; nothing of it is computed unless it is used.

    Scores and probabilities are None where a kernel attends (`chai_jax.model.kernels`), which never has them whole.
    """

    x: Any  # [B, T, D], the normed input
    scores: Any  # [B, query heads, T, S], scaled, before the softmax; of clusters found per prompt the kept heads'
    probabilities: Any  # likewise
    allowed: Any  # bool [B, T, S]
    heads: Any  # [B, output heads, T, R], before the output projection


jax.tree_util.register_dataclass(Seen)
Observe = Callable[[int, Seen, Params], Any]


@dataclass(frozen=True)
class Output:
    """Hidden states before the vocabulary head, the cache after these tokens, and what `observe` returned per layer."""

    hidden: Any  # [B, T, D], or of the wanted columns [B, N, D]
    cache: Cache
    observed: list[Any]


jax.tree_util.register_dataclass(Output)


class Attention(nnx.Module):
    """Self-attention of one layer, group by group."""

    def __init__(self, config: Architecture, layer: LayerSpec, params: Params):
        self.spec = layer
        self.scale = config.head_dim**-0.5
        # One matrix or three: see chai_jax.model.params.fold_projections.
        self.qkv = Projection("btd,df->btf", params["qkv"]) if "qkv" in params else None
        self.apart = nnx.List([Heads(params[name]) for name in PROJECTIONS if name in params])
        self.output = Projection("bhtr,hrd->btd", params["output"])

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each [B, heads, T, R]."""
        if self.qkv is None:
            query, key, value = self.apart
            return query(x), key(x), value(x)
        queries, keys, values, _ = self.spec.projected
        shapes = (queries, self.spec.key_rank), (keys, self.spec.key_rank), (values, self.spec.value_rank)
        ends = np.cumsum([heads * rank for heads, rank in shapes])[:-1].tolist()
        parts = zip(jnp.split(self.qkv(x), ends, axis=-1), shapes, strict=True)
        one, two, three = (jnp.swapaxes(part.reshape(*x.shape[:2], *shape), 1, 2) for part, shape in parts)
        return one, two, three

    def _groups(self, x: Array) -> list[tuple[Group, Array, Array, Array]]:
        """Split the projected heads by group: (group, query [B,C,q,T,R], key [B,C,T,R], value [B,C*v,T,R])."""
        query, key, value = self._project(x)
        parts = []
        at_query = at_key = at_value = 0
        for group in self.spec.groups:
            queries, values = group.clusters * group.queries, group.clusters * group.values
            mine = query[:, at_query : at_query + queries]
            mine = mine.reshape(mine.shape[0], group.clusters, group.queries, *mine.shape[2:])
            parts.append(
                (group, mine, key[:, at_key : at_key + group.clusters], value[:, at_value : at_value + values])
            )
            at_query, at_key, at_value = at_query + queries, at_key + group.clusters, at_value + values
        return parts

    def __call__(
        self,
        x: Float[Array, "B T D"],
        allowed: Bool[Array, "B T S"],
        past: tuple[GroupCache, ...] | None,
        start: Array,
        wanted: Int32[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "B N D"], tuple[GroupCache, ...], Seen]:
        if self.spec.membership == "prompt":
            before = None if past is None else past[0]
            found = attend_per_prompt(self.spec, *self._project(x), allowed, before, start, self.scale)
            joined, score, probability, new = found
            return self.output(at_columns(joined, wanted, 2)), (new,), Seen(x, score, probability, allowed, joined)
        readable = at_columns(allowed, wanted, 1)
        in_order = past is None and wanted is None
        decoding = past is not None and x.shape[1] == 1
        kernel = None
        if (decoding and kernels.for_tokens()) or (in_order and kernels.for_prompts()):
            kernel = attend_one if decoding else attend_prompt
        heads, scores, probabilities, caches = [], [], [], []
        for index, (group, query, key, value) in enumerate(self._groups(x)):
            before = None if past is None else past[index]
            new, keys, values = remember(before, key, value, group.storage, start, allowed)
            caches.append(new)
            query = at_columns(query, wanted, 3)
            keys, values = of_rows(keys, wanted), of_rows(values, wanted)
            # What is read of int4 is made for this step, not stored: a kernel would save nothing.
            if kernel is not None and group.storage != "int4":
                heads.append(kernel(query, keys, values, readable, self.scale, group.values))
                continue
            how = attend_in_order if in_order else attend
            out, score, probability = how(query, keys, values, readable, self.scale, group.values)
            heads.append(out)
            scores.append(score.reshape(score.shape[0], -1, *score.shape[3:]))
            probabilities.append(probability.reshape(scores[-1].shape))
        joined = jnp.concatenate(heads, axis=1)
        known = len(scores) == len(heads)
        joined_scores, joined_probabilities = (
            jnp.concatenate(parts, axis=1) if known else None for parts in (scores, probabilities)
        )
        return self.output(joined), tuple(caches), Seen(x, joined_scores, joined_probabilities, readable, joined)


class Block(nnx.Module):
    """Attention and feed-forward, each with its norm before (pre-norm) or after the residual sum (post-norm)."""

    def __init__(self, config: Architecture, layer: LayerSpec, params: Params):
        self.pre_norm = config.pre_norm
        self.activation = ACTIVATIONS[config.activation]
        self.attention_norm = Norm(params.get("attention_norm", {}))
        self.attention = Attention(config, layer, params)
        self.mlp_norm = Norm(params.get("mlp_norm", {}))
        self.up = Projection("btd,df->btf", params["up"])
        self.down = Projection("btf,fd->btd", params["down"])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        allowed: Bool[Array, "B T S"],
        past: tuple[GroupCache, ...] | None,
        start: Array,
        wanted: Int32[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "B N D"], tuple[GroupCache, ...], Seen]:
        y, cache, seen = self.attention(self.attention_norm(x) if self.pre_norm else x, allowed, past, start, wanted)
        x = at_columns(x, wanted, 1)
        x = x + y if self.pre_norm else self.attention_norm(x + y)
        y = self.down(self.activation(self.up(self.mlp_norm(x) if self.pre_norm else x)))
        return x + y if self.pre_norm else self.mlp_norm(x + y), cache, seen


class OPT(nnx.Module):
    """The decoder: `OPT(config, spec, params)(tokens, mask)`; `params` is a plain tree (see `init`)."""

    def __init__(self, config: Architecture, spec: Spec, params: Params):
        self.tokens = nnx.Param(params["embed"]["tokens"])
        self.positions = nnx.Param(params["embed"]["positions"])
        wide = config.embed_dim != config.hidden_size
        self.project_in = Projection("bte,ed->btd", params["project_in"]) if wide else None
        self.project_out = Projection("btd,de->bte", params["project_out"]) if wide else None
        self.final_norm = Norm(params.get("final_norm", {})) if config.final_norm else None
        self.head = None if config.tied else nnx.Param(params["head"]["kernel"])
        self.blocks = nnx.List([Block(config, layer, params["layers"][str(i)]) for i, layer in enumerate(spec.layers)])

    def embed(self, tokens: Int32[Array, "B T"], positions: Int32[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        x = value_of(self.tokens)[tokens].astype(dtype)
        if self.project_in is not None:
            x = self.project_in(x)
        return x + value_of(self.positions)[positions].astype(dtype)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        mask: Bool[Array, "B T"],
        cache: Cache | None = None,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        branch: Int32[Array, "B T"] | None = None,
        wanted: Int32[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "B N D"], Cache, list[Seen]]:
        """Hidden states after the last norm, the cache after these tokens, and what each layer saw."""
        positions, allowed, start, all_mask = visible(mask, cache, branch)
        x = self.embed(tokens, positions, dtype)
        layers, seen = [], []
        for index, block in enumerate(self.blocks):
            with jax.named_scope(f"layer_{index}"):
                run = jax.checkpoint(partial(Block.__call__, block)) if remat else block
                past = None if cache is None else cache.layers[index]
                x, stored, record = run(x, allowed, past, start, wanted if index == len(self.blocks) - 1 else None)
            layers.append(stored)
            seen.append(record)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x, Cache(tuple(layers), all_mask, start + tokens.shape[1]), seen

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits of hidden states."""
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        if self.project_out is not None:
            flat = self.project_out(flat)
        table = value_of(self.tokens if self.head is None else self.head)
        # The table first: on CPUs XLA is half again as fast at this as at the transpose.
        logits = product("ve,bte->vbt", table.astype(flat.dtype), flat, row="t")
        return jnp.moveaxis(logits, 0, -1).reshape(*hidden.shape[:-1], -1)


def visible(
    mask: Bool[Array, "B T"], cache: Cache | None, branch: Int32[Array, "B T"] | None = None
) -> tuple[Array, Array, Array, Array]:
    """Positions [B,T], allowed pairs [B,T,S], the first column written, and the mask [B,S] after these tokens.

    A token's position is the number of tokens that it may read, itself not counted.
    """
    rows = mask.shape[1]
    if cache is None:
        start, all_mask = jnp.zeros((), jnp.int32), mask
    else:
        start = cache.length
        all_mask = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, axis=1)
    columns = jnp.arange(all_mask.shape[1], dtype=jnp.int32)
    causal = columns[None, :] <= start + jnp.arange(rows, dtype=jnp.int32)[:, None]
    allowed = causal[None] & all_mask[:, None, :]
    if branch is not None:
        allowed &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    positions = jnp.where(mask, allowed.sum(axis=2, dtype=jnp.int32), 0) - 1 + POSITION_OFFSET
    return positions, allowed, start, all_mask


def forward(
    config: Architecture,
    spec: Spec,
    params: Params,
    tokens: Int32[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cache: Cache | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    observe: Observe | None = None,
    branch: Int32[Array, "B T"] | None = None,
    wanted: Int32[Array, "B N"] | None = None,
) -> Output:
    """Run the decoder over a parameter tree: the one forward pass of everything.

    Without a cache this is prefill (and scoring, and training): its cache holds exactly these T columns. With a cache,
    T further tokens are written behind its `length` used columns. Positions are counted over the mask, so padding may
    stand left or right. Pure; jit it with `config`, `spec`, `dtype` and `observe` static.

    Args:
        mask: True where a token is real.
        dtype: of the activations; weights are cast to it where they are used.
        remat: keep only each layer's input for a backward pass, which computes the layer again (`jax.checkpoint`).
        observe: called per layer as `observe(layer, seen, layer_params)`; what it returns is handed back.
        branch: of each token, without a cache: it reads those of branch 0 and of its own, so that one row holds several
            continuations of one text. For specs that are `stored_by_token`.
        wanted: columns whose hidden states are handed back, all if not given. The last layer makes keys, values and
            queries of all, but attends, projects and feeds forward for no others (of clusters found per prompt it
            attends for all). Not together with `observe`, which is shown all.
    """
    if observe is not None and wanted is not None:
        raise ValueError("a layer that is observed computes all columns: leave wanted out")
    if branch is not None and (cache is not None or not spec.stored_by_token):
        raise ValueError("branches of a row need a spec that is stored_by_token, and no cache")
    plain = kernels.plain_attention() if branch is not None or observe is not None else nullcontext()
    with plain:
        hidden, after, seen = OPT(config, spec, params)(tokens, mask, cache, dtype, remat, branch, wanted)
    observed = (
        [] if observe is None else [observe(i, record, params["layers"][str(i)]) for i, record in enumerate(seen)]
    )
    return Output(hidden, after, observed)


def unembed(config: Architecture, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """float32 logits [..., V] of hidden states [..., D]."""
    return OPT(config, Spec(()), params).logits(hidden)
