"""What each layer of a model is: the spec. The forward pass depends on it and on the types of the leaves alone.

What is intended for a model is its plan (`chai_jax.plans.plan`). Specs are frozen and plain JSON. They are hashable, so
that they can be static under `jax.jit`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from chai_jax.errors import InputError
from chai_jax.inputs.fields import LATER, Count, Number, parse_as, without_defaults
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.channels import Channels, count_channels, fits_basis
from chai_jax.plans.formats import BLOCKS, STORAGES, Blocks

SHARES = ("dense", "qk", "qkv", "kv")
WEIGHTS = ("loaded", "bfloat16", "int8", "int4")
MEMBERSHIPS = ("calibrated", "prompt")
StorageName = Annotated[str, STORAGES]
WeightsName = Annotated[str, WEIGHTS]
MembershipName = Annotated[str, MEMBERSHIPS]


@dataclass(frozen=True)
class Group:
    """C clusters of one shape whose keys and values are cached in one storage format.

    Each cluster caches one key head, read by `queries` query heads, and `values` value heads. Of m heads, each a key, a
    value and the n queries that read it: dense (C = H, n, 1), qk (n queries, m values), qkv (n, 1), kv (m n, 1).
    Where every sequence assigns value heads to clusters by itself, `assigned` counts them and `values` is left at 1.
    """

    clusters: Count
    queries: Count = 1
    values: Count = 1
    storage: StorageName = "float32"
    assigned: Number = 0

    @property
    def value_heads(self) -> int:
        """Value heads this group caches."""
        return self.assigned or self.clusters * self.values

    @property
    def outputs(self) -> int:
        """Heads this group hands to the output projection."""
        return self.value_heads * self.queries


@dataclass(frozen=True)
class LayerSpec:
    """What one layer is: `clusters` lists the original head numbers of each cluster, in the order stored.

    With membership `prompt` every sequence finds its own clusters on its first `warmup` tokens. All heads are then
    stored, in their original order, and `clusters` (each led by its representative) are those of shorter sequences.

    Attributes:
        queries: query heads of each head: a head is a key, a value and the queries that read it. Fewer than the model
            has, where queries of a head were merged; its share is then never `dense`.
        window: how many tokens a token reads at most, itself included; 0: all.
        pairs: where rotary keys are merged, the frequency (its number in a head) of each complex number that the keys
            of a cluster are made of; empty: every frequency once, in order.
        channels: where keys are cached in a basis (formats `BASIS`): (bits, channels) of each key there, in order.
    """

    share: Annotated[str, SHARES]
    clusters: tuple[tuple[Number, ...], ...]
    groups: tuple[Group, ...]
    key_rank: Count
    value_rank: Count
    weights: WeightsName = "loaded"
    membership: MembershipName = "calibrated"
    warmup: Number = 0
    queries: Count = field(default=1, metadata=LATER)
    window: Number = field(default=0, metadata=LATER)
    pairs: tuple[tuple[Number, ...], ...] = field(default=(), metadata=LATER)
    channels: Channels = field(default=(), metadata=LATER)

    @property
    def query_heads(self) -> int:
        return sum(group.clusters * group.queries for group in self.groups)

    @property
    def key_heads(self) -> int:
        return sum(group.clusters for group in self.groups)

    @property
    def value_heads(self) -> int:
        return sum(group.value_heads for group in self.groups)

    @property
    def output_heads(self) -> int:
        return sum(group.outputs for group in self.groups)

    @property
    def projected(self) -> tuple[int, int, int, int]:
        """Heads of the query, key, value and output projections."""
        if self.membership == "prompt":
            return (self.value_heads,) * 4
        return self.query_heads, self.key_heads, self.value_heads, self.output_heads

    def stored_as(self, storages: Sequence[str], channels: Channels = ()) -> "LayerSpec":
        """The same layer with each cluster, in the order stored, cached in another format; `channels` of a basis."""
        groups = group_clusters(self.share, self.clusters, storages, self.membership, self.queries)
        return dataclasses.replace(self, groups=groups, channels=channels)

    def format_of(self, storage: str) -> Blocks | None:
        """The format of a group of this layer; None where every token is stored by itself."""
        return BLOCKS[storage].of(self.channels) if storage in BLOCKS else None

    @property
    def storages(self) -> tuple[str, ...]:
        """The storage format of each cluster, in the order stored."""
        return tuple(group.storage for group in self.groups for _ in range(group.clusters))


def group_clusters(
    share: str,
    clusters: Sequence[tuple[int, ...]],
    storages: Sequence[str],
    membership: str = "calibrated",
    per_head: int = 1,
) -> tuple[Group, ...]:
    """Fold consecutive clusters of equal shape and storage into groups; clusters found per prompt into one a format.

    Args:
        per_head: queries of each head.
    """
    if membership == "prompt":
        count = sum(map(len, clusters))
        return tuple(Group(len(clusters), storage=storage, assigned=count) for storage in dict.fromkeys(storages))
    groups: list[Group] = []
    for heads, storage in zip(clusters, storages, strict=True):
        queries = per_head * (len(heads) if share == "kv" else 1)
        values = len(heads) if share == "qk" else 1
        if groups and (groups[-1].queries, groups[-1].values, groups[-1].storage) == (queries, values, storage):
            groups[-1] = dataclasses.replace(groups[-1], clusters=groups[-1].clusters + 1)
        else:
            groups.append(Group(1, queries, values, storage))
    return tuple(groups)


@dataclass(frozen=True)
class Spec:
    """What a model is now, layer by layer."""

    layers: tuple[LayerSpec, ...]

    @classmethod
    def dense(cls, layers: int, heads: int, head_dim: int, storage: str = "float32", queries: int = 1) -> "Spec":
        """L dense layers of H heads, each read by so many queries, whose cache is stored in one format."""
        clusters, groups = tuple((head,) for head in range(heads)), (Group(heads, queries, storage=storage),)
        return cls((LayerSpec("dense", clusters, groups, head_dim, head_dim, queries=queries),) * layers)

    @classmethod
    def of(cls, config: Architecture, storage: str = "float32") -> "Spec":
        """The dense model of this architecture, whose cache is stored in one format."""
        dense = cls.dense(config.num_layers, config.kv_heads, config.head_dim, storage, config.queries)
        windows = config.windows or (0,) * config.num_layers
        pairs = zip(dense.layers, windows, strict=True)
        return cls(tuple(dataclasses.replace(layer, window=window) for layer, window in pairs))

    @property
    def is_dense(self) -> bool:
        """Whether no heads are merged; cache and weights may have any format."""
        return all(layer.share == "dense" for layer in self.layers)

    @property
    def stored_by_token(self) -> bool:
        """Whether what is cached of a token depends on itself and earlier tokens alone, so that sequences may branch.

        Formats of blocks quantize neighbouring tokens together, and clusters found per prompt depend on the length.
        """
        return all(layer.membership == "calibrated" and not set(BLOCKS) & set(layer.storages) for layer in self.layers)

    def with_layer(self, index: int, layer: LayerSpec) -> "Spec":
        """The same spec with layer `index` replaced."""
        return Spec((*self.layers[:index], layer, *self.layers[index + 1 :]))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; fields that came later are left out where they are at their defaults."""
        return {"layers": [without_defaults(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, value: Any) -> "Spec":
        """Rebuild a spec from `to_json`'s result.

        Raises:
            InputError: anything that `to_json` would not have written, groups that do not fit their clusters.
        """
        entries = value.get("layers") if isinstance(value, Mapping) else None
        try:
            layers = parse_as(tuple[LayerSpec, ...], entries, "layers", whole=True)
        except InputError as error:
            raise InputError(f"not a spec that save() writes ({error}): save the model again") from None
        for index, layer in enumerate(layers):
            if not _fits(layer):
                raise InputError(f"spec layer {index} contradicts itself; expected what save() writes: save it again")
        return cls(layers)


def _fits(layer: LayerSpec) -> bool:
    """Whether the fields of a layer agree with one another."""
    per_prompt = layer.membership == "prompt"
    return (
        bool(layer.clusters and all(layer.clusters))
        # Before anything is counted out: a group may say that it has billions of clusters.
        and layer.key_heads == len(layer.clusters)
        and layer == layer.stored_as(layer.storages, layer.channels)
        and fits_basis(layer.channels, layer.storages)
        and count_channels(layer.channels) <= layer.key_rank
        and not (layer.channels and (len(layer.groups) > 1 or per_prompt or max(map(len, layer.clusters)) > 1))
        and (layer.warmup > 0) == per_prompt
        and (not per_prompt or (layer.share == "qk" and layer.queries == 1))
        and (not layer.pairs or [2 * len(pairs) for pairs in layer.pairs] == [layer.key_rank] * len(layer.clusters))
    )
