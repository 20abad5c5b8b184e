"""The shape of a model: what its config.json says that decides which arrays there are and what is computed."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rotary:
    """Positions that turn queries and keys (Su et al. 2021, arXiv 2104.09864; see `chai_jax.model.rotary`).

    Attributes:
        theta: base of the frequencies.
        fraction: of a head's dimensions that turn.
        scaling: `default`, `linear`, `dynamic`, `llama3` or `yarn`: how frequencies are changed for long contexts.
        numbers: that the scaling needs, by transformers' names, sorted.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: str = "default"
    numbers: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, repr=False)
class Architecture:
    """The shape of a decoder; names as in the field, values as in the checkpoint's config.json.

    Attributes:
        num_kv_heads: key and value heads, each read by the same number of query heads; None: as many as query heads.
        head_size: dimensions of a head; None: the width is split among the heads.
        bias: whether projections have biases; a tuple names those that have (`query`, `output`, `up`, ...).
        norm: `layer` or `rms`.
        qk_norm: whether queries and keys are normed, head by head, before they are turned.
        parallel: whether attention and feed-forward read the same input, not one the other's output.
        gated: whether the feed-forward has a gate.
        rotary: None: positions are learned, in a table whose first `position_offset` rows belong to no position.
        windows: of each layer, how many tokens a token may read, itself included; 0: all. Empty: all in every layer.
        family: whose checkpoints it is read from and written to (see `chai_jax.files.families.registry`).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    max_positions: int
    embed_dim: int
    pre_norm: bool = True
    remove_final_norm: bool = False
    bias: bool | tuple[str, ...] = True
    activation: str = "relu"
    norm_affine: bool = True
    tied: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2  # one, several, or none
    pad_token_id: int = 1
    # In the repr where they are not absent: fingerprints of probes and measured costs are made from the repr.
    num_kv_heads: int | None = field(default=None, repr=False)
    head_size: int | None = field(default=None, repr=False)
    norm: str = field(default="layer", repr=False)
    norm_epsilon: float = field(default=1e-5, repr=False)
    qk_norm: bool = field(default=False, repr=False)
    parallel: bool = field(default=False, repr=False)
    gated: bool = field(default=False, repr=False)
    rotary: Rotary | None = field(default=None, repr=False)
    position_offset: int = field(default=2, repr=False)
    windows: tuple[int, ...] = field(default=(), repr=False)
    family: str = field(default="opt", repr=False)  # decides no number, so it is in no repr

    def __post_init__(self) -> None:
        """What is as it would be without being said is absent, so that equal shapes are equal."""
        for name, usual in (
            ("num_kv_heads", self.num_heads),
            ("head_size", self.hidden_size // max(self.num_heads, 1)),
        ):
            if getattr(self, name) == usual:
                object.__setattr__(self, name, None)

    @property
    def stated(self) -> dict[str, Any]:
        """The fields that say what is computed, but for those of later families where they are absent: records of
        older versions stay equal."""
        return {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.repr or (each.name != "family" and getattr(self, each.name) != each.default)
        }

    def __repr__(self) -> str:
        return f"Architecture({', '.join(f'{name}={value!r}' for name, value in self.stated.items())})"

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a layer: the heads that are cached, and clustered."""
        return self.num_kv_heads or self.num_heads

    @property
    def queries(self) -> int:
        """Query heads that read each key head."""
        return self.num_heads // self.kv_heads

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def context(self) -> int:
        """Tokens that a sequence may have: the model's positions, or as many as its rotary ones are stretched to."""
        numbers = dict(self.rotary.numbers) if self.rotary and self.rotary.scaling == "yarn" else {}
        stretched = numbers.get("factor", 0.0) * numbers.get("original_max_position_embeddings", 0.0)
        return max(self.max_positions, int(stretched))

    @property
    def kv_width(self) -> int:
        """The largest rank that all keys (or values) of a layer can have together."""
        return min(self.hidden_size, self.kv_heads * self.head_dim)

    def even(self, rank: int) -> int:
        """A rank that keys can have: of rotary ones, which are complex numbers, an even one; up to 1 more is taken."""
        return rank if self.rotary is None else rank + rank % 2

    @property
    def final_norm(self) -> bool:
        """Post-norm models end in their last layer's norm; pre-norm ones have one more, unless it was removed."""
        return self.pre_norm and not self.remove_final_norm

    def has_bias(self, projection: str) -> bool:
        """Whether `query`, `key`, `value`, `output`, `gate`, `up` or `down` has a bias."""
        return self.bias if isinstance(self.bias, bool) else projection in self.bias
