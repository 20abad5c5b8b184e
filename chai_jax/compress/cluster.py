"""Clustering as surgery: each layer's heads are merged as the plan says, and weights that are not kept are removed."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property

import jax.numpy as jnp

from chai_jax.compress.low_rank import as_they_are, dense_heads, score_params, value_params
from chai_jax.compress.merge import HeadWeights, InputMoments, OutputMoments, Scores, latent_scores, low_rank_scores
from chai_jax.compress.moments import input_moments, output_moments
from chai_jax.compress.rotary_merge import rotary_latent_scores, rotary_low_rank_scores
from chai_jax.compress.slice import every_value, merged_queries, reorder, representative_scores, representative_values
from chai_jax.compress.value_merge import fitted_values, latent_values, low_rank_values
from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.model.layerwise import Text, embed_text, how_in_float32, through
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import Quantized
from chai_jax.plans.plan import LayerPlan, Plan
from chai_jax.plans.planned import cluster_order, prompt_layer
from chai_jax.plans.spec import LayerSpec, group_clusters


def cluster(model: Model, plan: Plan, text: Text | None = None) -> Model:
    """Merge the heads of each of the plan's clusters (CHAI, Agarwal et al. 2024, arXiv 2403.08058).

    Share `qk` keeps one query and key per cluster and every value head; `qkv` keeps one of each; `kv` keeps every query
    and output head on one latent key and value. Cache formats stay as they are; layers without a merge stay untouched,
    bit for bit. With membership `prompt` all weights stay: which heads are kept is decided as the model runs.

    Queries of a head are merged first, where the plan says so (see `chai_jax.compress.slice.merged_queries`).

    Args:
        text: calibration windows (a probe will do). Merges by representatives need none; all others are fitted to its
            hidden states, which go through the dense layers one by one.

    Raises:
        InputError: the plan is for another shape of model, the model's layer is clustered or quantized already, or a
            low-rank merge has no text to fit.
    """
    plan.check()
    plan.check_model(model.config)
    if plan.needs_text and text is None:
        raise InputError(
            "the plan merges heads by low rank; expected calibration text to fit them to: give cluster() the probe"
        )
    layers, spec = dict(model.params["layers"]), model.spec
    stream = Stream(model, text) if plan.needs_text and text is not None else None
    for index, wanted in enumerate(track(plan.layers, "Merging the heads")):
        if wanted.merged or wanted.query_clusters:
            _check_plain(index, spec.layers[index], layers[str(index)])
            if plan.membership == "prompt":
                new, params = _assign(index, spec.layers[index], layers[str(index)], wanted, plan.warmup_tokens)
            else:
                new, params = merged_layer(model, index, wanted, plan, stream)
            spec, layers[str(index)] = spec.with_layer(index, new), params
        if stream is not None:
            stream.advance()
    return model.replace(spec=spec, params={**model.params, "layers": layers}, plan=plan)


def _check_plain(index: int, layer: LayerSpec, params: Params) -> None:
    kernels = [params[name]["kernel"] for name in ("query", "key", "value", "output")]
    if layer.share != "dense" or layer.channels or any(isinstance(kernel, Quantized) for kernel in kernels):
        raise InputError(
            f"layer {index} is clustered or quantized already; expected a dense float layer: start from the dense model"
        )


def _assign(index: int, layer: LayerSpec, params: Params, wanted: LayerPlan, warmup: int) -> tuple[LayerSpec, Params]:
    """A layer with clusters found per prompt: all weights stay, with the heads in their original order."""
    formats = sorted(set(layer.storages))
    if len(formats) > 1:
        raise InputError(
            f"layer {index} stores its heads as {' and '.join(formats)}; clusters found per prompt need one format: "
            "start from a model with one (with_storage)"
        )
    order = sorted(range(len(layer.clusters)), key=lambda at: layer.clusters[at])
    new = prompt_layer(wanted, formats[0], layer.key_rank, warmup)
    return dataclasses.replace(new, weights=layer.weights, window=layer.window), reorder(layer, params, order)


class Stream:
    """Calibration text on its way through the dense model, layer by layer: `x` is what enters layer `index`."""

    def __init__(self, model: Model, text: Text):
        self.model, self.mask, self.index = model, jnp.asarray(text.mask), 0
        self.x = embed_text(model, jnp.asarray(text.tokens), self.mask)

    def advance(self) -> None:
        self.x = through(self.model, self.index, self.x, self.mask)
        self.index += 1
        self.__dict__.pop("input_moments", None)  # those of the layer before, where they were asked for

    @cached_property
    def input_moments(self) -> InputMoments:
        """Of this layer, for every merge that is tried on it."""
        layer, params = self.model.spec.layers[self.index], self.model.params["layers"][str(self.index)]
        return input_moments(self.model.config, layer, how_in_float32(self.model), params, self.x, self.mask)


class LayerMerge:
    """One layer's merge: the spec it leads to and, by `params`, the parameters.

    `kept` and `members` are where the representatives and the heads of each cluster are stored in the dense layer.
    """

    def __init__(self, model: Model, index: int, wanted: LayerPlan, plan: Plan, stream: Stream | None):
        self.config, self.dense, self.old = model.config, model.spec.layers[index], model.params["layers"][str(index)]
        self.plan, self.stream, self.share = plan, stream, wanted.share or plan.share
        storage_of = dict(zip((heads[0] for heads in self.dense.clusters), self.dense.storages, strict=True))
        stored_at = {heads[0]: at for at, heads in enumerate(self.dense.clusters)}
        storages = [storage_of[one.keep] for one in wanted.clusters]
        order = cluster_order(self.share, [one.heads for one in wanted.clusters], storages)
        clusters = [wanted.clusters[at] for at in order]
        self.kept = [stored_at[one.keep] for one in clusters]
        self.members = [[stored_at[head] for head in one.heads] for one in clusters]
        heads = tuple(one.heads for one in clusters)
        self.each, self.ordinary_key = self.dense.queries, wanted.key_rank is None
        self.spec = LayerSpec(
            self.share,
            heads,
            group_clusters(self.share, heads, [storages[at] for at in order], per_head=self.each),
            self.config.even(wanted.key_rank or self.dense.key_rank),
            wanted.value_rank or self.dense.value_rank,
            self.dense.weights,
            queries=self.each,
            window=self.dense.window,
        )

    def made(self) -> tuple[LayerSpec, Params]:
        """The merged layer."""
        scores, pairs = self._scores()
        spec = dataclasses.replace(self.spec, pairs=pairs)
        return spec, {**self.old, **scores, **self._values(scores, spec)}

    def _whole(self, members: Sequence[int], rank: int) -> bool:
        """Whether this cluster is a head that stays as it is."""
        return self.share != "kv" and len(members) == 1 and rank == self.config.head_dim

    def _scores(self) -> tuple[Params, tuple[tuple[int, ...], ...]]:
        """Queries and keys, and the frequencies that rotary keys are made of."""
        if self.share != "kv" and self.plan.score_merge == "representative":
            return representative_scores(self.old, self.kept, self.each), ()
        rank, found = self.spec.key_rank, []
        for members in self.members:
            heads = self._heads.at(members)
            found.append(as_they_are(heads)[0] if self._whole(members, rank) else self._merged_scores(heads, rank))
        pairs = tuple(one.pairs or tuple(range(rank // 2)) for one in found)
        return score_params(self.old, found), pairs if any(one.pairs for one in found) else ()

    def _merged_scores(self, heads: HeadWeights, rank: int) -> Scores:
        if self.config.rotary is None:
            return (latent_scores if self.share == "kv" else low_rank_scores)(heads, self._input, rank)
        merge = rotary_latent_scores if self.share == "kv" else rotary_low_rank_scores
        return merge(heads, self._input, rank, self.ordinary_key)

    def _values(self, scores: Params, spec: LayerSpec) -> Params:
        """Values and output projections; `fit` makes up for what the merged scores get wrong."""
        if self.share == "qk":
            return every_value(self.old, self.members, self.each)
        if self.share == "qkv" and self.plan.value_merge == "representative":
            return representative_values(self.old, self.kept, self.members, self.each)
        rank, fit = self.spec.value_rank, self.share == "qkv" and self.plan.value_merge == "fit"
        merged = [at for at, members in enumerate(self.members) if not self._whole(members, rank)]
        outputs = self._output(scores, spec, merged) if fit and merged else iter(())
        found = []
        for at, members in enumerate(self.members):
            heads = self._heads.at(members)
            if at not in merged:
                found.append(as_they_are(heads)[1])
            elif fit:
                found.append(fitted_values(heads, next(outputs), self._input, rank))
            else:
                found.append((latent_values if self.share == "kv" else low_rank_values)(heads, self._input, rank))
        return value_params(self.old, found)

    @cached_property
    def _heads(self) -> HeadWeights:
        return dense_heads(self.config, self.old)

    @property
    def _input(self) -> InputMoments:
        assert self.stream is not None  # the plan needs text, so cluster() has it
        return self.stream.input_moments

    def _output(self, scores: Params, spec: LayerSpec, clusters: Sequence[int]) -> Iterator[OutputMoments]:
        """Of these clusters' attention, whatever values it will have; representatives stand in for them."""
        assert self.stream is not None
        merged = {**self.old, **scores, **representative_values(self.old, self.kept, self.members)}
        spec = dataclasses.replace(spec, value_rank=self.config.head_dim)
        layers, params = (self.dense, spec), (self.old, merged)
        how = how_in_float32(self.stream.model)
        return output_moments(self.config, layers, how, params, clusters, self.stream.x, self.stream.mask)


def merged_layer(
    model: Model, index: int, wanted: LayerPlan, plan: Plan, stream: Stream | None = None
) -> tuple[LayerSpec, Params]:
    """Layer `index` of a dense model with fixed clusters: queries of a head are merged first, then the heads."""
    if wanted.query_clusters:
        model = _with_fewer_queries(model, index, wanted)
    if wanted.merged:
        return LayerMerge(model, index, wanted, plan, stream).made()
    layer = model.spec.layers[index]
    return dataclasses.replace(layer, share=wanted.shares(plan.share)), model.params["layers"][str(index)]


def _with_fewer_queries(model: Model, index: int, wanted: LayerPlan) -> Model:
    """The model with the queries of layer `index` merged; its heads are still those of a dense layer."""
    layer, params = model.spec.layers[index], model.params["layers"][str(index)]
    new = merged_queries(params, [wanted.query_clusters[heads[0]] for heads in layer.clusters])
    groups = group_clusters("dense", layer.clusters, layer.storages, per_head=wanted.queries or layer.queries)
    fewer = dataclasses.replace(layer, groups=groups, queries=wanted.queries or layer.queries)
    layers = {**model.params["layers"], str(index): new}
    return model.replace(spec=model.spec.with_layer(index, fewer), params={**model.params, "layers": layers})
