"""`Model`: configuration, spec, parameters and tokenizer as one immutable value."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from chai_jax.errors import InputError
from chai_jax.model.cache import measured_bytes_per_token
from chai_jax.model.decoder import forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.generation import Generation
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import Plan
from chai_jax.plans.spec import Spec


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder, dense or compressed. Every stage returns a new one and leaves the caller's usable.

    Attributes:
        spec: what each layer now is.
        params: nested dict of arrays and quantized arrays (see `chai_jax.model.params.declare`).
        source: hub id or folder the weights came from.
        plan: the plan it was compressed by, if any.
        generation: how its texts are made, if its folder says so.
        execution: what its programs compute in, where, and by whose kernels; None: as suits the devices here (`how`).
    """

    config: Architecture
    spec: Spec
    params: Params = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    source: str = ""
    plan: Plan | None = field(default=None, repr=False)
    generation: Generation | None = field(default=None, repr=False)
    execution: Execution | None = field(default=None, repr=False)

    @property
    def how(self) -> Execution:
        """What jobs with this model run by: its `execution`, or what suits the devices that are here."""
        return self.execution or Execution.choose()

    def __call__(self, tokens: Any, mask: Any = None) -> Float[Array, "B T V"]:
        """float32 logits [B, T, V] of tokens int32 [B, T]; mask bool [B, T] is True at real tokens (all, if not given).

        Raises:
            InputError: more tokens than the position table has rows, a token outside the vocabulary, unequal shapes.
        """
        tokens = np.asarray(tokens, np.int32)
        mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
        if tokens.ndim != 2 or mask.shape != tokens.shape:
            raise InputError(f"tokens {tokens.shape} and mask {mask.shape} must be equal [batch, length] shapes")
        self.check_length(tokens.shape[1])
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.config.vocab_size):
            raise InputError(
                f"token ids run from {tokens.min()} to {tokens.max()}; expected 0 to {self.config.vocab_size - 1}"
            )
        return _logits(self.config, self.spec, self.how, self.params, tokens, mask)

    def check_length(self, length: int) -> None:
        """Raise InputError where `length` tokens do not fit the position table."""
        if length > self.config.context:
            raise InputError(
                f"{length} tokens do not fit the model's {self.config.context} positions: shorten the text"
            )

    def replace(self, **changes: Any) -> "Model":
        """A new model with some attributes changed."""
        return dataclasses.replace(self, **changes)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text, of those that the model can say: its folder's, or else its configuration's."""
        ends = self.generation or Generation({"eos_token_id": self.config.eos_token_id})
        return tuple(token for token in ends.stops if 0 <= token < self.config.vocab_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored, scales included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    @property
    def kv_bytes_per_token(self) -> int | float:
        """Cache bytes of one more token, summed from really allocated arrays, scales included."""
        return measured_bytes_per_token(self.spec)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _logits(config: Architecture, spec: Spec, how: Execution, params: Params, tokens: Array, mask: Array) -> Array:
    output = forward(config, spec, params, tokens, mask, how)
    return unembed(config, params, output.hidden, how)
