"""Products accumulated in float32, of one row and of many, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model.products import product
from chai_jax.model.wide_heads import apart, side_by_side

# Of a decoder: a weight, an output projection, the vocabulary head, scores, values.
SHAPES = {
    "btd,df->btf": ((1, 1, 24), (24, 7)),
    "bhtr,hrd->btd": ((1, 3, 1, 8), (3, 8, 7)),
    "ve,bte->vbt": ((9, 24), (1, 1, 24)),
    "bcmk,bcsk->bcms": ((2, 3, 1, 24), (2, 3, 7, 24)),
    "bhms,bhsr->bhmr": ((2, 3, 1, 24), (2, 3, 24, 7)),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation", list(SHAPES))
def test_rows_are_multiplied_and_summed_in_float32(equation: str, dtype: str, rows: int) -> None:
    """Whatever the dtype, of which only the rounding of the operands themselves remains."""
    random = np.random.default_rng(0)
    row = "m" if "m" in equation else "t"
    names = equation.split("->")[0].split(",")
    one, two = (
        jnp.asarray(random.standard_normal([rows if x == row else size for x, size in zip(*pair, strict=True)]), dtype)
        for pair in zip(names, SHAPES[equation], strict=True)
    )
    found = jax.jit(lambda one, two: product(equation, one, two, row))(one, two)
    expected = np.einsum(equation, np.asarray(one, np.float64), np.asarray(two, np.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("equation", "row", "shapes", "twice"),
    [
        ("btd,df->btf", "t", ((1, 1, 24), (24, 7)), True),
        ("btd,df->btf", "t", ((2, 1, 24), (24, 7)), False),  # two sequences, two rows
        ("bcmk,bcsk->bcms", "m", ((2, 3, 1, 24), (2, 3, 7, 24)), True),  # a row for each key head
        ("bcmk,bcsk->bcms", "m", ((1, 1, 2, 24), (1, 1, 7, 24)), False),
    ],
)
def test_cpus_multiply_a_single_row_of_bfloat16_twice(
    equation: str, row: str, shapes: tuple[tuple[int, ...], ...], twice: bool
) -> None:
    def repeats(dtype: str, platform: str) -> bool:
        one, two = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        traced = jax.jit(lambda one, two: product(equation, one, two, row)).trace(one, two)
        return "broadcast_in_dim" in traced.lower(lowering_platforms=(platform,)).as_text()

    assert repeats("bfloat16", "cpu") == twice
    assert not repeats("float32", "cpu")
    assert not repeats("bfloat16", "tpu")


def test_wide_heads_come_apart_again() -> None:
    values = jnp.arange(2 * 6 * 5 * 4.0).reshape(2, 6, 5, 4)
    wide = side_by_side(values, 3)
    assert wide.shape == (2, 2, 5, 12)
    np.testing.assert_array_equal(wide[1, 1, 2, 4:8], values[1, 4, 2])  # the second head of the second cluster
    np.testing.assert_array_equal(apart(wide, 3), values)
