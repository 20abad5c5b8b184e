"""What is intended for a model, layer by layer: which heads form a cluster, what they share, what is stored how.

A plan is made by the planner, or written by a person; `compress.cluster` and `compress.quantize` carry it out. Plans
are frozen, hashable and plain JSON, and are checked before anything is done with them.
"""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from chai_jax.errors import InputError
from chai_jax.inputs.fields import LATER, Count, Number, brief, parse_as, without_defaults
from chai_jax.inputs.reading import read_json, shown
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.channels import Channels, check_channels, count_channels
from chai_jax.plans.queries import QueryClusters, check_queries
from chai_jax.plans.spec import SHARES, MembershipName, StorageName, WeightsName

SCORE_MERGES = ("representative", "low_rank")
VALUE_MERGES = ("representative", "low_rank", "fit")
TIERS = ("high", "medium", "low")
METHODS = ("attention", "perturbation", "kl")  # of scoring layers, see chai_jax.analyse.sensitivity
Share = Annotated[str, SHARES[1:]]


@dataclass(frozen=True)
class ClusterPlan:
    """One cluster: its heads, the one that represents it, and how its cached keys and values are to be stored.

    Attributes:
        keep: the representative, one of the heads; the first of them where none is named.
    """

    heads: tuple[Number, ...]
    keep: Number = -1
    critical: bool = True
    storage: StorageName = "bfloat16"

    def __post_init__(self) -> None:
        if self.keep == -1 and self.heads:
            object.__setattr__(self, "keep", self.heads[0])


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its clusters, what they share, its sensitivity tier and the format of its weights.

    Attributes:
        share: of the layer's clusters; None: the plan's.
        key_rank: R of the shared keys; None: the head dimension.
        value_rank: likewise of the shared values.
        query_clusters: for each key and value head the clusters of the queries that read it, by their numbers in the
            head, each led by the one that represents it: one query of a cluster stays. Empty: all stay.
        channels: where keys are cached in a basis: (bits, channels) of each key there, see `LayerSpec`.
    """

    clusters: tuple[ClusterPlan, ...]
    tier: Annotated[str, TIERS] = "high"
    weights: WeightsName = "loaded"
    share: Share | None = None
    key_rank: Count | None = None
    value_rank: Count | None = None
    query_clusters: QueryClusters = field(default=(), metadata=LATER)
    channels: Channels = field(default=(), metadata=LATER)

    @property
    def clustered(self) -> bool:
        return any(len(cluster.heads) > 1 for cluster in self.clusters)

    @property
    def merged(self) -> bool:
        """Whether keys or values change at all: heads are merged, or their rank is cut."""
        return self.clustered or self.key_rank is not None or self.value_rank is not None

    @property
    def queries(self) -> int | None:
        """Queries that each head keeps; None: all."""
        return len(self.query_clusters[0]) if self.query_clusters else None

    def shares(self, usual: str) -> str:
        """What is shared in the model that is made: `dense` for nothing, `usual` where the layer names nothing else.

        Queries of a head that are merged share their attention and, as they did, the head's key and value: `qkv`.
        """
        if not self.merged:
            return "qkv" if self.query_clusters else "dense"
        return self.share or usual


@dataclass(frozen=True)
class Plan:
    """What is intended for every layer of a model; `chai-jax explain plan.json` prints it as a table.

    Attributes:
        share: of the layers that name none of their own.
        score_merge: how the queries and keys of a `qk` or `qkv` cluster are merged: `representative` or `low_rank`.
        value_merge: how the values of a `qkv` cluster are: `representative`, `low_rank` or `fit` (see
            `chai_jax.compress.merge`; a `kv` cluster is always a low-rank latent).
        predicted: KL from the dense model's next-token distribution that the planner expects, in nats per token, before
            any training; None where it has not looked.
        measured: what it turned out to be; None before it was tried.
    """

    layers: tuple[LayerPlan, ...]
    share: Share = "qkv"
    membership: MembershipName = "calibrated"
    score_merge: Annotated[str, SCORE_MERGES] = "representative"
    value_merge: Annotated[str, VALUE_MERGES] = "representative"
    warmup_tokens: Count = 5
    sensitivity: tuple[float, ...] = ()
    method: Annotated[str, METHODS] = "kl"
    predicted: float | None = None
    measured: float | None = None

    def share_of(self, index: int) -> str:
        """What the heads of a cluster share in layer `index`."""
        return self.layers[index].share or self.share

    @property
    def needs_text(self) -> bool:
        """Whether `cluster` needs calibration text: everything but representatives is a fit to second moments."""
        merged = [index for index, layer in enumerate(self.layers) if layer.merged]
        shares = {self.share_of(index) for index in merged}
        low_rank = self.score_merge != "representative" or self.value_merge != "representative"
        return "kv" in shares or bool(merged and low_rank)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; fields that came later are left out where they are at their defaults."""
        return {**dataclasses.asdict(self), "layers": [without_defaults(layer) for layer in self.layers]}

    @property
    def has_basis(self) -> bool:
        """Whether `quantize` needs calibration text: bases are fitted to it."""
        return any(layer.channels for layer in self.layers)

    @classmethod
    def from_json(cls, value: Any) -> "Plan":
        """Rebuild a plan from JSON, checking all that can be checked without a model.

        Raises:
            InputError: naming the field and what cannot be.
        """
        plan: Plan = parse_as(cls, value, "plan")
        plan._check_sense()
        return plan

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """Read and check a plan.json.

        Raises:
            InputError: it cannot be read, or see `from_json`.
        """
        value = read_json(path, "a plan.json, as chai-jax plan writes it")
        try:
            return cls.from_json(value)
        except InputError as error:
            raise InputError(f"{shown(path)}: {error}: mend it, or make a new one with chai-jax plan") from None

    def check(self) -> None:
        """Refuse a plan that asks for what cannot be.

        Raises:
            InputError: naming the field, or the layer and the contradiction.
        """
        parse_as(Plan, self, "plan")
        self._check_sense()

    def _check_sense(self) -> None:
        """What no field says by itself."""
        if self.sensitivity and len(self.sensitivity) != len(self.layers):
            raise InputError(
                f"the plan has {len(self.sensitivity)} sensitivities for {len(self.layers)} layers; expected one each"
            )
        for index, layer in enumerate(self.layers):
            _check_heads(f"plan layer {index}", layer)
            heads = sum(len(one.heads) for one in layer.clusters)
            check_queries(f"plan layer {index}", heads, layer.query_clusters)
            self._check_ranks(index, layer)
            storages = [one.storage for one in layer.clusters]
            merged = layer.merged or self.membership == "prompt"
            check_channels(f"plan layer {index}", layer.channels, storages, merged)
        if self.membership == "prompt":
            self._check_prompt()

    def _check_ranks(self, index: int, layer: LayerPlan) -> None:
        """Only what is low-rank has a rank to choose."""
        share = self.share_of(index)
        free = {
            "key_rank": share == "kv" or self.score_merge == "low_rank",
            "value_rank": share == "kv" or (share == "qkv" and self.value_merge != "representative"),
        }
        for name, is_free in free.items():
            rank = getattr(layer, name)
            if rank is not None and not is_free:
                raise InputError(
                    f"plan layer {index} has {name} {rank} with share {share!r}, scores {self.score_merge!r}, values "
                    f"{self.value_merge!r}; expected a rank only where the merge is one of low rank"
                )

    def _check_prompt(self) -> None:
        """Membership per prompt needs every head's value and full Wq, Wk (CHAI, section 3.3)."""
        shares = {self.share} | {layer.share for layer in self.layers if layer.share}
        if shares != {"qk"} or self.score_merge != "representative":
            raise InputError(
                f"the plan asks for prompt membership with share {' and '.join(sorted(shares))!r}, scores "
                f"{self.score_merge!r}; merged weights belong to fixed clusters: use share 'qk' with representatives, "
                "or membership 'calibrated'"
            )
        for index, layer in enumerate(self.layers):
            if len({cluster.storage for cluster in layer.clusters}) > 1:
                raise InputError(
                    f"plan layer {index}: prompt membership with two storages in a layer; clusters change from prompt "
                    "to prompt: give all its clusters one storage"
                )
            if layer.query_clusters:
                raise InputError(
                    f"plan layer {index} merges queries with prompt membership, where all weights stay: use membership "
                    "'calibrated', or leave query_clusters out"
                )

    def check_model(self, config: Architecture) -> None:
        """Refuse a plan made for a model of another shape, or ranks that are larger than the model's width.

        The heads of a plan are key and value heads, of which each takes along the queries that read it.
        """
        layers, heads, width = config.num_layers, config.kv_heads, config.hidden_size
        sizes = sorted({sum(len(cluster.heads) for cluster in layer.clusters) for layer in self.layers})
        if len(self.layers) != layers or sizes != [heads]:
            raise InputError(
                f"the plan is for {len(self.layers)} layers of {brief(sizes)} heads, the model has {layers} layers of "
                f"{heads} heads: make a plan for this model with chai-jax plan"
            )
        for index, layer in enumerate(self.layers):
            if (kept := count_channels(layer.channels)) > config.head_dim:
                raise InputError(
                    f"plan layer {index} has {kept} channels; expected at most a head's dimensions, {config.head_dim}"
                )
            rank = max(layer.key_rank or 0, layer.value_rank or 0)
            if rank > width:
                raise InputError(f"plan layer {index} has rank {rank}; expected at most the model's width, {width}")
            if config.rotary is not None and (layer.key_rank or 0) % 2:
                raise InputError(
                    f"plan layer {index} has key_rank {layer.key_rank}; rotary keys are complex numbers: expected an "
                    "even rank"
                )
            if layer.query_clusters and (found := sum(map(len, layer.query_clusters[0]))) != config.queries:
                raise InputError(
                    f"plan layer {index} has query_clusters of {found} queries a head, the model has {config.queries}: "
                    "make a plan for this model with chai-jax plan"
                )
        shares = {self.share_of(index) for index, layer in enumerate(self.layers) if layer.merged}
        check_merges(config, shares, self.score_merge, self.value_merge, self.membership)


def check_merges(
    config: Architecture, shares: Collection[str], score_merge: str, value_merge: str, membership: str = "calibrated"
) -> None:
    """Refuse merges that are not defined for a model's heads.

    Raises:
        InputError: saying why, and what is defined.
    """
    if config.qk_norm and ("kv" in shares or (shares and score_merge == "low_rank")):
        raise InputError(
            "the plan merges keys by low rank, the model norms keys after their projection, so that no projection "
            "makes merged ones: use share 'qk' or 'qkv' with scores 'representative'"
        )
    if config.queries > 1 and "qkv" in shares and value_merge == "fit":
        raise InputError(
            f"the plan fits values to attention, of which each value head of the model has {config.queries}: there is "
            "no closed form for several; use values 'low_rank'"
        )
    if config.queries > 1 and shares and membership == "prompt":
        raise InputError(
            f"the plan finds clusters per prompt, the model has {config.queries} queries for each key head; this is "
            "defined for one: use membership 'calibrated'"
        )


def round_up(fraction: float, count: int) -> int:
    """`fraction` of `count` things, rounded up; 0.28 of 25 is 7, though 0.28 * 25 > 7 in floating point."""
    return math.ceil(round(fraction * count, 9))


def _check_heads(where: str, layer: LayerPlan) -> None:
    """Each head is in one cluster, and each cluster keeps one of its own."""
    for number, cluster in enumerate(layer.clusters):
        if cluster.keep not in cluster.heads:
            raise InputError(
                f"{where} cluster {number} keeps head {cluster.keep}, not one of its heads {brief(list(cluster.heads))}"
            )
    heads = sorted(head for cluster in layer.clusters for head in cluster.heads)
    twice = [head for head, following in pairwise(heads) if head == following]
    if twice:
        raise InputError(f"{where} has head {twice[0]} in two places; expected each head in exactly one cluster")
    if not heads or heads[-1] != len(heads) - 1:
        missing = next((at for at, head in enumerate(heads) if at != head), 0)
        raise InputError(f"{where} lacks head {missing}; expected every head from 0 to {max(heads, default=0)} once")
