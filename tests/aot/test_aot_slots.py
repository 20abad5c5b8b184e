"""The programs of `chai-jax serve` on a TPU, by the TPU's own compiler: slots are written where they lie."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from chai_jax.aot.programs import COMPUTE, AbstractModel, dense_spec
from chai_jax.aot.tpu import mesh_of, topology
from chai_jax.model.cache import cache_bytes
from chai_jax.model.execution import Execution
from chai_jax.model.sharding import Layout
from chai_jax.plans.architecture import Architecture
from chai_jax.serve.decode import cast
from chai_jax.serve.slots import insert, read, step, vacant

CONFIG = Architecture(4096, 256, 1, 4, 512, 2048, 256)
SLOTS, COLUMNS = 256, 2048  # more than fits fast memory, where the compiler otherwise takes it whole

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")


def lowered(name: str, storage: str) -> tuple[Any, int]:
    """A program, and the bytes of the cache that it is given."""
    model = AbstractModel(CONFIG, dense_spec(CONFIG, storage), Layout(mesh_of(topology("v5e:2x4"), "1x1")))
    how = Execution.choose(COMPUTE, model.layout, "pallas")
    params = model.place(jax.eval_shape(partial(cast, how=how), model.params("bfloat16")))

    def slots(count: int) -> Any:
        return model.state(jax.eval_shape(partial(vacant, model.spec, count, COLUMNS, 1)))

    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=model.whole)
    size = cache_bytes(model.spec, SLOTS, COLUMNS)
    if name == "insert":
        return insert.lower(slots(SLOTS), slots(1), number), size
    if name == "step":
        return step.lower(CONFIG, model.spec, params, slots(SLOTS), number, how=how), size
    tokens, mask = (jax.ShapeDtypeStruct((1, 256), kind, sharding=model.whole) for kind in (jnp.int32, jnp.bool_))
    lowered = read.lower(CONFIG, model.spec, params, slots(1).cache, tokens, mask, capacity=COLUMNS, how=how)
    return lowered, cache_bytes(model.spec, 1, COLUMNS)


@pytest.mark.parametrize("storage", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["insert", "step", "read"])
def test_slots_are_written_where_they_lie(name: str, storage: str) -> None:
    """The cache that is given is the cache that comes back; beside it there is no other, expanded or turned around.

    Reading has one sequence's, which is small beside the activations of 256 tokens.
    """
    program, cached = lowered(name, storage)
    memory = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cached
    assert memory.temp_size_in_bytes < (2 * cached if name == "read" else cached / 8)
