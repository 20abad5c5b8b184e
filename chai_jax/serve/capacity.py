"""How many sequences fit the memory, by the formula that the cache's arrays keep to."""

from collections.abc import Sequence
from dataclasses import dataclass

from chai_jax.errors import InputError
from chai_jax.model.cache import bytes_per_token, cache_bytes
from chai_jax.model.model import Model
from chai_jax.plans.spec import Spec
from chai_jax.serve.slots import capacity_of

MOST_SLOTS = 256  # where nothing else is asked for: more would rather wait for the device than for memory


@dataclass(frozen=True)
class Room:
    """What the memory for the cache holds.

    Attributes:
        context: tokens of a sequence, prompt and answer; `columns`: of a slot, which are a few more.
        slots: sequences that are continued at once.
        prefixes: beginnings that are kept; each takes as much as a slot, and so does the prompt that is being read.
        limit: bytes; `most`: slots that are wanted, whatever fits.
    """

    context: int
    columns: int
    slots: int
    prefixes: int
    limit: int
    most: int


def room(model: Model, limit: int, context: int, prefixes: int = 0, most: int | None = None) -> Room:
    """The slots of `model` that `limit` bytes of cache allow; `most` at most.

    Raises:
        InputError: a context that the model does not have; not even one slot fits.
    """
    if not 1 <= context <= model.config.context:
        raise InputError(f"--context is {context}; expected 1 to the model's {model.config.context} positions")
    columns = capacity_of(context)
    each = cache_bytes(model.spec, 1, columns)
    most = most or MOST_SLOTS
    slots = min(limit // each - 1 - prefixes, most)
    if slots < 1:
        raise InputError(
            f"a cache of {limit:,} bytes holds {max(limit // each, 0)} sequences of {columns} tokens ({each:,} bytes "
            f"each); expected {2 + prefixes}: one that is read, one that is continued, and {prefixes} kept prefixes: "
            "raise --kv-memory, or lower --context or --prefixes"
        )
    return Room(context, columns, slots, prefixes, limit, most)


def check_smaller(formats: Sequence[str], rooms: Sequence[Room]) -> None:
    """Raise InputError unless every format holds more sequences than the one before it."""
    for name, before, after in zip(formats[1:], rooms[:-1], rooms[1:], strict=True):
        if after.slots <= before.slots:
            raise InputError(
                f"--adaptive: {name} holds {after.slots} sequences, no more than the format before it "
                f"({before.slots}); expected each to be smaller than the one before, such as bfloat16,int8,int4"
            )


def dense_slots(model: Model, of: Room) -> int:
    """Slots that the same memory holds of the dense model in bfloat16."""
    each = cache_bytes(Spec.of(model.config, "bfloat16"), 1, of.columns)
    return max(min(of.limit // each - 1 - of.prefixes, of.most), 0)


def format_of(spec: Spec) -> str:
    """What the cache is stored as, in words: the storages of all layers."""
    used = {group.storage: None for layer in spec.layers for group in layer.groups}
    return "+".join(used)


def each_token(model: Model) -> float:
    """Bytes of one more token of one sequence."""
    return float(bytes_per_token(model.spec))
