"""One model with several caches, to be asked the same."""

from collections.abc import Iterator
from pathlib import Path

from chai_jax.compress.quantize import with_storage
from chai_jax.data.tokens import require_tokenizer
from chai_jax.files.store import load
from chai_jax.model.model import Model

DENSE = "bfloat16"


def caches(source: str, storages: str, compressed: tuple[str, ...]) -> Iterator[tuple[str, Model]]:
    """Names and models: the dense one first, with each format of `storages` (with commas), each folder as saved."""
    dense = load(source, storage=DENSE)
    require_tokenizer(dense.tokenizer, source)
    yield DENSE, dense
    for storage in filter(None, (name.strip() for name in storages.split(","))):
        yield storage, with_storage(dense, storage)
    for folder in compressed:
        yield Path(folder).name, load(folder)
