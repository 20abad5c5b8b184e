"""The shape of a model: what its config.json says that decides which arrays there are and what is computed."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder; names as in the field, values as in the checkpoint's config.json.

    Attributes:
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
    bias: bool = True
    activation: str = "relu"
    norm_affine: bool = True
    tied: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2  # one, several, or none
    pad_token_id: int = 1
    # Not in the repr: it decides no number, and fingerprints of probes and measured costs are made from the repr.
    family: str = field(default="opt", repr=False)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def final_norm(self) -> bool:
        """Post-norm models end in their last layer's norm; pre-norm ones have one more, unless it was removed."""
        return self.pre_norm and not self.remove_final_norm
