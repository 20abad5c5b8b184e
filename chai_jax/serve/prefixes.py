"""Beginnings that several prompts share: their cache is kept, and later prompts go on from a copy of it."""

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from chai_jax.model.cache import Cache
from chai_jax.plans.formats import BLOCKS

GRAIN = max(format.block for format in BLOCKS.values())  # tokens; other blocks divide it
REMEMBERED = 64  # prompts that a new one is compared with

Tokens = tuple[int, ...]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their beginning, down to a multiple of `GRAIN`.

    At such a length no format has a block in progress: what is stored of the beginning is the same for all texts that
    begin so.
    """
    length = min(len(one), len(other)) // GRAIN * GRAIN
    while length and one[:length] != other[:length]:
        length -= GRAIN
    return length


@jax.jit
def upto(cache: Cache, length: Int32[Array, ""]) -> Cache:
    """A copy of a cache of one sequence that ends after `length` tokens."""
    kept = jax.tree.map(jnp.copy, cache)
    mask = kept.mask & (jnp.arange(cache.capacity, dtype=jnp.int32) < length)
    return dataclasses.replace(kept, mask=mask, length=jnp.minimum(kept.length, length))


class Prefixes:
    """The caches of at most `most` beginnings, each as large as a slot's; those longest unused go first.

    A beginning is kept when the second prompt that has it was read.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[Tokens, Cache] = OrderedDict()
        self._seen: deque[Tokens] = deque(maxlen=REMEMBERED)

    def find(self, prompt: Tokens) -> tuple[int, Cache | None]:
        """The longest kept beginning of a prompt, at least one token short of it: its length, a copy of its cache."""
        best = max(self._kept, key=lambda kept: shared(kept, prompt[:-1]), default=())
        length = shared(best, prompt[:-1])
        if not length:
            return 0, None
        self._kept.move_to_end(best)
        return length, upto(self._kept[best], jnp.int32(length))

    def keep(self, prompt: Tokens, cache: Cache) -> None:
        """Note a prompt that was read, and keep what it shares with an earlier one, if that is not there yet."""
        length = max((shared(prompt, other) for other in self._seen), default=0)
        self._seen.append(prompt)
        known = max((shared(kept, prompt) for kept in self._kept), default=0)
        if not self.most or length <= known:
            return
        for within in [kept for kept in self._kept if kept == prompt[: len(kept)]]:
            del self._kept[within]  # the new one holds it
        while len(self._kept) >= self.most:
            self._kept.popitem(last=False)
        self._kept[prompt[:length]] = upto(cache, jnp.int32(length))

    def clear(self) -> None:
        """Forget the caches; which prompts there were is remembered."""
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self._kept.values())
