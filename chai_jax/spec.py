"""What is intended and what has been done: the plan a person can edit, and the spec the forward pass obeys.

The *plan* says, layer by layer, which heads form a cluster, what its heads share, and in which format weights and
cache are stored. The *spec* states what each layer of a model now is; it is the only thing beside the leaves' types
that the forward pass looks at. Both are frozen, hashable (so they can be static under `jax.jit`) and plain JSON.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chai_jax.errors import InputError

Share = Literal["dense", "qk", "qkv", "kv"]
SHARES = ("dense", "qk", "qkv", "kv")
STORAGES = ("float32", "bfloat16", "int8", "int4")
WEIGHTS = ("loaded", "bfloat16", "int8", "int4")
MEMBERSHIPS = ("calibrated", "prompt")
SCORE_MERGES = ("representative", "low_rank")
VALUE_MERGES = ("representative", "low_rank", "fit")
TIERS = ("high", "medium", "low")
JSON_TYPES = {str: "one string", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class Group:
    """C clusters of one shape whose keys and values are cached in one storage format.

    Each cluster caches one key head, read by `queries` query heads, and `values` value heads:
    dense (C = H, 1, 1), qk (1 query, m values), qkv (1, 1), kv (m queries, 1 value).
    Where every sequence assigns value heads to clusters by itself, `assigned` counts them and `values` is left at 1.
    """

    clusters: int
    queries: int = 1
    values: int = 1
    storage: str = "float32"
    assigned: int = 0

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
    """

    share: str
    clusters: tuple[tuple[int, ...], ...]
    groups: tuple[Group, ...]
    key_rank: int
    value_rank: int
    weights: str = "loaded"
    membership: str = "calibrated"
    warmup: int = 0

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

    def stored_as(self, storages: Sequence[str]) -> "LayerSpec":
        """The same layer with each cluster, in the order stored, cached in another format."""
        groups = group_clusters(self.share, self.clusters, storages, self.membership)
        return dataclasses.replace(self, groups=groups)

    @property
    def storages(self) -> tuple[str, ...]:
        """The storage format of each cluster, in the order stored."""
        return tuple(group.storage for group in self.groups for _ in range(group.clusters))


def group_clusters(
    share: str, clusters: Sequence[tuple[int, ...]], storages: Sequence[str], membership: str = "calibrated"
) -> tuple[Group, ...]:
    """Fold consecutive clusters of equal shape and storage into groups; clusters found per prompt into one a format."""
    if membership == "prompt":
        count = sum(map(len, clusters))
        return tuple(Group(len(clusters), storage=storage, assigned=count) for storage in dict.fromkeys(storages))
    groups: list[Group] = []
    for heads, storage in zip(clusters, storages, strict=True):
        queries = len(heads) if share == "kv" else 1
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
    def dense(cls, layers: int, heads: int, head_dim: int, storage: str = "float32") -> "Spec":
        """L dense layers of H heads whose cache is stored in one format."""
        clusters = tuple((head,) for head in range(heads))
        layer = LayerSpec("dense", clusters, (Group(heads, storage=storage),), head_dim, head_dim)
        return cls((layer,) * layers)

    @property
    def is_dense(self) -> bool:
        """Whether the parameters are those of an ordinary OPT (cache formats and weight formats aside)."""
        return all(layer.share == "dense" for layer in self.layers)

    def with_layer(self, index: int, layer: LayerSpec) -> "Spec":
        """The same spec with layer `index` replaced."""
        return Spec((*self.layers[:index], layer, *self.layers[index + 1 :]))

    def to_json(self) -> dict[str, Any]:
        return {"layers": [dataclasses.asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, value: Any) -> "Spec":
        """Rebuild a spec from `to_json`'s result.

        Raises:
            InputError: anything that `to_json` would not have written, groups that do not fit their clusters.
        """
        try:
            layers = tuple(_layer_spec(index, entry) for index, entry in enumerate(value["layers"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"not a spec ({error!r}); expected the spec.json that save() writes: save it again"
            ) from None
        return cls(layers)


def _layer_spec(index: int, entry: Any) -> LayerSpec:
    groups = tuple(Group(**group) for group in entry["groups"])
    clusters = tuple(tuple(heads) for heads in entry["clusters"])
    layer = LayerSpec(**{**entry, "groups": groups, "clusters": clusters})
    sizes = [layer.key_rank, layer.value_rank]
    sizes += [size for group in groups for size in (group.clusters, group.queries, group.values)]
    prompt = layer.membership == "prompt"
    # Plain ints first, and their sum: a huge count must not be unrolled to be found wrong.
    fits = (
        all(type(size) is int and size > 0 for size in sizes)
        and all(type(head) is int for heads in clusters for head in heads)
        and layer.key_heads == len(clusters)
        and groups == group_clusters(layer.share, clusters, layer.storages, layer.membership)
        and set(layer.storages) <= set(STORAGES)
        and layer.share in SHARES
        and layer.weights in WEIGHTS
        and layer.membership in MEMBERSHIPS
        and type(layer.warmup) is int
        and (layer.warmup > 0 and layer.share == "qk" if prompt else layer.warmup == 0)
    )
    if not fits:
        raise InputError(f"spec layer {index} contradicts itself; expected what save() writes: save it again")
    return layer


@dataclass(frozen=True)
class ClusterPlan:
    """One cluster: its heads, the one that represents it, and how its cached keys and values are to be stored."""

    heads: tuple[int, ...]
    keep: int
    critical: bool = True
    storage: str = "bfloat16"


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its clusters, what they share, its sensitivity tier and the format of its weights.

    Attributes:
        share: of the layer's clusters; None: the plan's.
        key_rank: R of the shared keys; None: the head dimension.
        value_rank: likewise of the shared values.
    """

    clusters: tuple[ClusterPlan, ...]
    tier: str = "high"
    weights: str = "loaded"
    share: str | None = None
    key_rank: int | None = None
    value_rank: int | None = None

    @property
    def clustered(self) -> bool:
        return any(len(cluster.heads) > 1 for cluster in self.clusters)

    @property
    def merged(self) -> bool:
        """Whether keys or values change at all: heads are merged, or their rank is cut."""
        return self.clustered or self.key_rank is not None or self.value_rank is not None


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
    share: str = "qkv"
    membership: str = "calibrated"
    score_merge: str = "representative"
    value_merge: str = "representative"
    warmup_tokens: int = 5
    sensitivity: tuple[float, ...] = ()
    method: str = "kl"
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
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Plan":
        """Rebuild a plan from JSON, checking all that can be checked without a model.

        Raises:
            InputError: naming the layer and what cannot be.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("layers"), list):
            raise InputError("not a plan; expected a JSON object with a list 'layers': make one with chai-jax plan")
        layers = tuple(_layer_plan(index, entry) for index, entry in enumerate(value["layers"]))
        fields = _known(cls, value, "the plan")
        scores = fields.get("sensitivity", ())
        if not isinstance(scores, (list, tuple)) or not all(isinstance(score, (int, float)) for score in scores):
            raise InputError(f"the plan's sensitivity is {scores!r}; expected a list of numbers, one per layer")
        plan = cls(**{**fields, "layers": layers, "sensitivity": tuple(scores)})
        plan.check()
        return plan

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """Read and check a plan.json."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the plan {path} ({error}); expected a JSON file: check the path") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON ({error}); expected a plan.json: mend it or make a new one") from None

    def check(self) -> None:
        """Refuse a plan that asks for what cannot be.

        Raises:
            InputError: naming the layer and the contradiction.
        """
        _one_of("share", self.share, SHARES[1:])
        _one_of("membership", self.membership, MEMBERSHIPS)
        _one_of("score_merge", self.score_merge, SCORE_MERGES)
        _one_of("value_merge", self.value_merge, VALUE_MERGES)
        if self.sensitivity and len(self.sensitivity) != len(self.layers):
            raise InputError(
                f"the plan has {len(self.sensitivity)} sensitivities for {len(self.layers)} layers; expected one each"
            )
        for index, layer in enumerate(self.layers):
            _check_layer(index, layer)
            self._check_ranks(index, layer)
        if self.membership == "prompt":
            self._check_prompt()

    def _check_ranks(self, index: int, layer: LayerPlan) -> None:
        """Only what is low-rank has a rank to choose."""
        where, share = f"plan layer {index}", self.share_of(index)
        _one_of("share", share, SHARES[1:], where)
        free = {
            "key_rank": share == "kv" or self.score_merge == "low_rank",
            "value_rank": share == "kv" or (share == "qkv" and self.value_merge != "representative"),
        }
        for name, is_free in free.items():
            rank = getattr(layer, name)
            if rank is not None and (type(rank) is not int or rank < 1 or not is_free):
                raise InputError(
                    f"{where} has {name} {rank!r} with share {share!r}, scores {self.score_merge!r}, values "
                    f"{self.value_merge!r}; expected a number from 1, and only where the merge is one of low rank"
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
        if self.warmup_tokens < 1:
            raise InputError(f"warmup_tokens is {self.warmup_tokens}; expected at least 1")
        for index, layer in enumerate(self.layers):
            if len({cluster.storage for cluster in layer.clusters}) > 1:
                raise InputError(
                    f"plan layer {index}: prompt membership with two storages in a layer; clusters change from prompt "
                    "to prompt: give all its clusters one storage"
                )

    def check_model(self, layers: int, heads: int) -> None:
        """Refuse a plan made for a model of another shape."""
        sizes = {sum(len(cluster.heads) for cluster in layer.clusters) for layer in self.layers}
        if len(self.layers) != layers or sizes - {heads}:
            raise InputError(
                f"the plan is for {len(self.layers)} layers of {sorted(sizes)} heads, the model has {layers} layers of "
                f"{heads} heads: make a plan for this model with chai-jax plan"
            )


def _layer_plan(index: int, entry: Any) -> LayerPlan:
    where = f"plan layer {index}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("clusters"), list):
        raise InputError(f"{where} is not an object with a list 'clusters'; expected what chai-jax plan writes")
    clusters = []
    for number, cluster in enumerate(entry["clusters"]):
        if not isinstance(cluster, Mapping) or not isinstance(cluster.get("heads"), list):
            raise InputError(f"{where} cluster {number} is not an object with a list 'heads'")
        fields = _known(ClusterPlan, cluster, f"{where} cluster {number}")
        fields["heads"] = tuple(cluster["heads"])
        if any(type(head) is not int for head in fields["heads"]):
            raise InputError(f"{where} cluster {number} has heads {cluster['heads']}; expected head numbers")
        clusters.append(ClusterPlan(**{"keep": fields["heads"][0] if fields["heads"] else -1, **fields}))
    return LayerPlan(**{**_known(LayerPlan, entry, where), "clusters": tuple(clusters)})


def _known(kind: Any, value: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - names)
    if unknown:
        raise InputError(f"{where} has an unknown field {unknown[0]!r}; expected some of {sorted(names)}")
    for field in dataclasses.fields(kind):
        wanted, given = field.type, value.get(field.name)
        if field.name not in value or not isinstance(wanted, type) or wanted not in (str, int, bool):
            continue
        if type(given) is not wanted:
            raise InputError(f"{where} has {field.name} {given!r}; expected {JSON_TYPES[wanted]}")
    return dict(value)


def _one_of(name: str, value: Any, allowed: Iterable[str], where: str = "the plan") -> None:
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{where} has {name} {value!r}; expected one of {', '.join(allowed)}")


def _check_layer(index: int, layer: LayerPlan) -> None:
    where = f"plan layer {index}"
    _one_of("tier", layer.tier, TIERS, where)
    _one_of("weights", layer.weights, WEIGHTS, where)
    heads = [head for cluster in layer.clusters for head in cluster.heads]
    for number, cluster in enumerate(layer.clusters):
        _one_of("storage", cluster.storage, STORAGES, f"{where} cluster {number}")
        if not cluster.heads or cluster.keep not in cluster.heads:
            raise InputError(
                f"{where} cluster {number} keeps head {cluster.keep}, not one of its heads {list(cluster.heads)}"
            )
    twice = [head for head in heads if heads.count(head) > 1]
    if twice:
        raise InputError(f"{where} has head {twice[0]} in two clusters; expected each head in exactly one")
    if sorted(heads) != list(range(len(heads))):
        raise InputError(
            f"{where} clusters heads {sorted(heads)}; expected every head from 0 to {max(heads, default=0)} once"
        )
