"""What is intended for a model, layer by layer: which heads form a cluster, what they share, what is stored how.

A plan is made by the planner, or written by a person; `compress.cluster` and `compress.quantize` carry it out. Plans
are frozen, hashable and plain JSON, and are checked before anything is done with them.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chai_jax.errors import InputError
from chai_jax.spec import MEMBERSHIPS, SHARES, STORAGES, WEIGHTS

SCORE_MERGES = ("representative", "low_rank")
VALUE_MERGES = ("representative", "low_rank", "fit")
TIERS = ("high", "medium", "low")
JSON_TYPES = {str: "one string", int: "a whole number", bool: "true or false"}


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
