"""What each layer could become, and what that costs: measured one change at a time, on calibration text.

Changes are measured apart (a number of clusters, a rank of the latent key, one of the latent value, a storage format)
as the KL of the next-token distribution, in nats per token, and their sum predicts the cost of any mixture: damage of
several layers, and of several changes to one, adds up as long as it is small. Between the sizes that were measured the
cost is interpolated, linear in the logarithm of the cost.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from chai_jax.analyse.damage import Damage
from chai_jax.compress.basis_stream import BasisStream
from chai_jax.compress.cluster import LayerMerge, Stream
from chai_jax.compress.key_basis import in_one_program
from chai_jax.compress.quantize import layer_with_storage, store_weights
from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.files.atomic import write_json
from chai_jax.inputs.fields import Count, parse_as
from chai_jax.inputs.reading import read_json, shown
from chai_jax.model.layerwise import Text
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.channels import Channels
from chai_jax.plans.formats import BASIS
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan, round_up

CLUSTERS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # of the heads
RANKS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the width, for a latent; of a head, for clusters
KEY_BITS, REFERENCE = (4.0, 3.0, 2.4, 1.9, 1.5, 1.2), 2  # of keys in a basis; beside which values are measured
TINY = 1e-9  # nats: a cost below is rounding, and has no logarithm worth reading

Sizes = dict[Count, float]  # clusters or rank: measured KL
FindClusters = Callable[[int, int], tuple[ClusterPlan, ...]]  # (layer, clusters) -> its clusters


@dataclasses.dataclass(frozen=True)
class KeyCost:
    """What keys in a basis with these channels cost, with values in the first of the formats."""

    channels: Channels
    cost: float


@dataclasses.dataclass(frozen=True)
class BasisCosts:
    """KL of keys in a basis: of each choice of channels, and of each format of values beside one of them.

    Attributes:
        values: by format of `BASIS`, with the channels number `REFERENCE` of `keys`.
    """

    keys: tuple[KeyCost, ...]
    values: dict[str, float]

    def choices(self) -> Iterator[tuple[str, Channels, float]]:
        """(storage, channels, cost) for every pair: what values cost beside keys is what they cost beside others."""
        first = next(iter(self.values))
        for key in self.keys:
            for storage, cost in self.values.items():
                yield storage, key.channels, max(key.cost + cost - self.values[first], 0.0)


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """KL in nats per token that each change to one layer causes, alone.

    Attributes:
        clusters: by share (`qk`, `qkv`) and number of clusters.
        ranks: by `key` or `value` and rank of `qkv` clusters of one head each; only what has a rank to choose.
        latent: by `key` or `value` and rank of a `kv` layer's latent.
        cache: by storage format of the layer's cache.
        weights: by format of the layer's weights.
        basis: of keys in a basis, where such formats are asked for.
    """

    clusters: dict[str, Sizes]
    ranks: dict[str, Sizes]
    latent: dict[str, Sizes]
    cache: dict[str, float]
    weights: dict[str, float]
    basis: BasisCosts | None = None

    def answers(self, asked: dict[str, Any]) -> bool:
        """Whether this holds what was asked for, so that every choice finds its cost."""
        shares = asked["shares"]
        return (
            set(self.clusters) == set(shares) - {"kv"}
            and set(self.latent) == ({"key", "value"} if "kv" in shares else set())
            and set(self.ranks) <= {"key", "value"}
            and set(self.cache) == set(asked["storages"]) - set(BASIS)
            and set(self.basis.values if self.basis else ()) == set(asked["storages"]) & set(BASIS)
            and set(self.weights) == set(asked["weights"])
            and all(sizes for part in (self.clusters, self.ranks, self.latent) for sizes in part.values())
        )


def interpolate(sizes: Sizes, size: int) -> float:
    """The cost of a size between measured ones; costs never rise with size, whatever the noise of measuring says."""
    known = sorted(sizes)
    falling = np.maximum.accumulate([max(sizes[at], TINY) for at in reversed(known)])[::-1]
    return float(np.exp(np.interp(size, known, np.log(falling))))


class CostMeter:
    """The changes of one layer after another, each measured alone against the dense model."""

    def __init__(self, model: Model, fit: Text, text: tuple[np.ndarray, np.ndarray], plan: Plan, find: FindClusters):
        """`fit`: what changes are fitted to; `text`: tokens and mask to measure on; `plan`: its layers are not read."""
        self.damage, self.stream = Damage(model, *text), Stream(model, fit)
        self.model, self.plan, self.find, self.fit = self.damage.model, plan, find, fit

    def layer(self, shares: Sequence[str], storages: Sequence[str], weights: Sequence[str]) -> LayerCosts:
        """Measure the layer whose turn it is, then go on to the next."""
        heads, index = self.model.config.kv_heads, self.stream.index
        counts = sorted({count for part in CLUSTERS if 1 <= (count := round_up(part, heads)) < heads})
        spec, params = self.model.spec.layers[index], self.model.params["layers"][str(index)]
        costs = LayerCosts(
            {share: {n: self._clustered(share, n) for n in counts} | {heads: 0.0} for share in shares if share != "kv"},
            self._ranks() if "qkv" in shares else {},
            self._latents() if "kv" in shares else {},
            {n: self.damage.of(index, layer_with_storage(spec, n), params)[0] for n in storages if n not in BASIS},
            {name: self.damage.of(index, spec, store_weights(params, name))[0] for name in weights},
            self._basis([name for name in storages if name in BASIS]),
        )
        self.advance()
        return costs

    def advance(self) -> None:
        """Go on to the next layer."""
        self.stream.advance()
        if "bases" in self.__dict__:
            self.bases.advance()

    @cached_property
    def bases(self) -> BasisStream:
        """Where bases are found; it starts at the layer whose turn it is when it is first asked for."""
        bases = BasisStream(self.model, self.fit)
        for _ in range(self.stream.index):
            bases.advance()
        return bases

    def _basis(self, storages: Sequence[str]) -> BasisCosts | None:
        if not storages:
            return None
        index, heads = self.bases.index, self.model.config.kv_heads
        spec, params = self.model.spec.layers[index], self.model.params["layers"][str(index)]

        def cost(channels: Channels, storage: str) -> float:
            basis = self.bases.params(channels)
            channels, basis = in_one_program(basis, channels, self.model.config.head_dim)
            stored = spec.stored_as([storage] * heads, channels)
            return self.damage.of(index, stored, {**params, "basis": basis})[0]

        tried = list(dict.fromkeys(self.bases.basis.channels(bits) for bits in KEY_BITS))
        keys = tuple(KeyCost(channels, cost(channels, storages[0])) for channels in tried)
        beside = min(REFERENCE, len(keys) - 1)
        values = {storages[0]: keys[beside].cost} | {name: cost(tried[beside], name) for name in storages[1:]}
        return BasisCosts(keys, values)

    def _clustered(self, share: str, count: int) -> float:
        index = self.stream.index
        merge = LayerMerge(self.model, index, LayerPlan(self.find(index, count), share=share), self.plan, self.stream)
        return self.damage.of(index, *merge.made())[0]

    def _ranks(self) -> dict[str, Sizes]:
        """Ranks of single heads, by low rank: values to be fitted would have to be fitted to every rank anew."""
        config = self.model.config
        heads, size = config.kv_heads, config.head_dim
        singles, most = tuple(ClusterPlan((head,), head) for head in range(heads)), size - 1
        # One number less of a rotary key is one frequency less.
        most_keys = most if config.rotary is None else max(size - 2, 0)
        # At a head's own rank a merge leaves the head as it is; one less has its columns in order.
        cut = {
            "key": (self.plan.score_merge, LayerPlan(singles, share="qkv", key_rank=most_keys or None)),
            "value": (self.plan.value_merge, LayerPlan(singles, share="qkv", value_rank=most)),
        }
        found: dict[str, Sizes] = {}
        for name, (merge, layer) in cut.items():
            if merge != "representative" and (most_keys if name == "key" else most):
                found |= self._cut(layer, (name,), size)
        return found

    def _latents(self) -> dict[str, Sizes]:
        """Ranks of one latent key and one latent value for all heads."""
        config = self.model.config
        return self._cut(latent(config.kv_heads, *[config.kv_width] * 2), ("key", "value"), config.kv_width)

    def _cut(self, layer: LayerPlan, names: Sequence[str], size: int) -> dict[str, Sizes]:
        """Ranks nest: a smaller one is the first columns of a larger one, so one merge and program serve all."""
        plan = dataclasses.replace(self.plan, value_merge="low_rank") if layer.share == "qkv" else self.plan
        merge = LayerMerge(self.model, self.stream.index, layer, plan, self.stream)
        spec, whole = merge.made()
        ranks = sorted({max(1, round(part * size)) for part in RANKS})

        def costs(name: str) -> Sizes:
            halves = 2 if name == "key" and self.model.config.rotary else 1
            tried = {self.model.config.even(rank) for rank in ranks} if name == "key" else ranks
            cuts = {rank: truncated(whole, name, rank, halves) for rank in sorted(tried)}
            return {rank: self.damage.of(self.stream.index, spec, cut)[0] for rank, cut in cuts.items()} | {size: 0.0}

        return {name: costs(name) for name in names}


def latent(heads: int, key_rank: int, value_rank: int) -> LayerPlan:
    """A layer whose heads all read one latent key and one latent value."""
    everyone = ClusterPlan(tuple(range(heads)), 0)
    return LayerPlan((everyone,), share="kv", key_rank=key_rank, value_rank=value_rank)


def truncated(params: Params, name: str, rank: int, halves: int = 1) -> Params:
    """A layer whose `name` (key or value), of low rank, has nothing beyond its first `rank` columns.

    Args:
        halves: 2 for rotary keys, which have their real parts in the first half.
    """

    # A mask, not a slice: one small program serves every rank.
    def first(leaf: Array) -> Array:
        size = leaf.shape[-1] // halves
        return jnp.where(np.arange(leaf.shape[-1]) % size < rank // halves, leaf, 0)

    return {**params, name: {part: first(leaf) for part, leaf in params[name].items()}}


def measure_costs(
    measure: Callable[[], CostMeter],
    shares: Sequence[str],
    storages: Sequence[str],
    weights: Sequence[str],
    layers: int,
    file: Path | None = None,
    key: str = "",
) -> Iterator[LayerCosts]:
    """Measure all layers; with a `file`, what an interrupted attempt measured is read, not measured again.

    Args:
        measure: what measures; made only where something is missing.
        key: what the numbers depend on (model, text, clustering): a file made under another key is refused.

    Raises:
        InputError: the file is no such file, or holds measurements of something else.
    """
    asked = {"key": key, "shares": list(shares), "storages": list(storages), "weights": list(weights)}
    known = _read(file, asked) if file is not None and file.exists() else []
    yield from known[:layers]
    if len(known) >= layers:
        return
    measuring = measure()
    for _ in known:
        measuring.advance()
    for index in track(range(len(known), layers), "Measuring what each layer bears"):
        known.append(measuring.layer(shares, storages, weights))
        if file is not None:
            write_json(file, {**asked, "layers": [dataclasses.asdict(one) for one in known]})
        yield known[index]


def _read(file: Path, asked: dict[str, Any]) -> list[LayerCosts]:
    found = read_json(file, "measured costs, as chai-jax plan keeps them")
    try:
        layers: list[LayerCosts] = list(parse_as(tuple[LayerCosts, ...], found.get("layers"), "layers", whole=True))
    except InputError as error:
        raise InputError(f"{shown(file)} holds no measured costs ({error}): delete it") from None
    other = [name for name, value in asked.items() if found.get(name) != value]
    if other:
        raise InputError(f"{shown(file)} holds costs measured with another {other[0]}: delete it, or name another file")
    if not all(layer.answers(asked) for layer in layers):
        raise InputError(f"{shown(file)} lacks some of the costs it was made for: delete it")
    return layers
