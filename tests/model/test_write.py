"""New tokens are put behind those of their own sequence, by whatever puts them."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model.by_row import put_rows, slice_rows
from chai_jax.model.execution import Execution
from chai_jax.model.kernels import cpu, write
from chai_jax.model.kernels.write_tpu import put_on_tpu

Put = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
SHAPES = [(5, 3, 200, 64), (5, 3, 40, 128), (5, 3, 200), (2, 3, 40, 7)]  # the third as scales
DTYPES = ["bfloat16", "int8", "float32"]


def given(shape: tuple[int, ...], dtype: str, count: int = 1) -> tuple[jax.Array, jax.Array, jax.Array, np.ndarray]:
    """A cache, tokens, starts (the last one too far), and what a loop makes of them."""
    random = np.random.default_rng(0)
    old = random.integers(-100, 100, shape).astype(np.float32)
    tokens = random.integers(-100, 100, (*shape[:2], count, *shape[3:])).astype(np.float32)
    start = random.integers(0, shape[2] - count, shape[0]).astype(np.int32)
    start[-1] = shape[2]
    expected = old.copy()
    for row, at in enumerate(np.minimum(start, shape[2] - count)):
        expected[row, :, at : at + count] = tokens[row]
    return jnp.asarray(old, dtype), jnp.asarray(tokens, dtype), jnp.asarray(start), expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_each(shape: tuple[int, ...], dtype: str) -> None:
    *inputs, expected = given(shape, dtype)
    ways: dict[str, Put] = {
        "scatter": partial(put_rows, axis=2),
        "CPUs without a compiler": write._selected,
        "TPUs": write._one_by_one,
        "TPUs' kernel": partial(put_on_tpu, interpret=True),
        "usual": write.put_tokens,
    }
    for put in ways.values():
        found = jax.jit(put)(*inputs)
        assert found.dtype == inputs[0].dtype
        np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


@pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [*DTYPES, "uint8"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_kernel_of_cpus_writes_in_place(native: Execution, count: int, dtype: str) -> None:
    for shape in SHAPES:
        old, tokens, start, _ = given(shape, dtype, count)
        expected = put_rows(old, tokens, start, axis=2)
        put = jax.jit(partial(write.put_tokens, how=native), donate_argnums=0)
        program = put.lower(old, tokens, start).compile()
        assert "chai_jax_put_tokens" in program.as_text()
        assert program.memory_analysis().temp_size_in_bytes < old.nbytes / 2
        np.testing.assert_array_equal(program(old, tokens, start), expected)


def test_starts_of_all_or_of_each() -> None:
    x, part = jnp.arange(24.0).reshape(2, 3, 4), jnp.full((2, 3, 2), -1.0)
    one, each = jnp.int32(1), jnp.asarray([1, 1], jnp.int32)
    np.testing.assert_array_equal(put_rows(x, part, one, 2), put_rows(x, part, each, 2))
    np.testing.assert_array_equal(slice_rows(x, one, 2, 1), slice_rows(x, each, 2, 1))
    other = slice_rows(x, jnp.asarray([0, 2], jnp.int32), 2, 2)
    np.testing.assert_array_equal(other, jnp.stack([x[0, :, :2], x[1, :, 2:]]))
