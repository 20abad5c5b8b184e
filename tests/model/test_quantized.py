"""Laws of symmetric int8, of int4 by groups, and of the product that reads them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chai_jax.model.cache import through_storage
from chai_jax.model.quantized import (
    Int4Array,
    QuantizedArray,
    dequantize,
    is_leaf,
    multiply,
    quantize_int4,
    quantize_int8,
    quantize_like,
)

MAGNITUDES = (1e-44, 1e-37, 1e-36, 1e-20, 1e-3, 1.0, 250.0, 1e30, 3e38)
LARGEST = float(np.float32(3e38))  # times 1.008, the most that a scale is rounded up, it is still finite
FINITE = st.floats(-LARGEST, LARGEST, width=32)


def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and bfloat16 scales along the last axis, slice by slice in float64."""
    values, scales = np.zeros(x.shape, np.int8), np.zeros(x.shape[:-1], ml_dtypes.bfloat16)
    for index in np.ndindex(*x.shape[:-1]):
        exact = np.abs(x[index].astype(np.float64)).max() / 127 or 1.0
        scale = np.float64(exact).astype(ml_dtypes.bfloat16)
        if scale < exact:
            scale = np.nextafter(scale, ml_dtypes.bfloat16(np.inf))
        scales[index] = scale
        values[index] = np.round(x[index] / np.float64(scale))
    return values, scales


@pytest.mark.as_user
def test_equals_a_loop_over_slices_in_float64() -> None:
    x = np.random.default_rng(0).standard_normal((7, 5, 64), dtype=np.float32)
    x[3, 2] = 0
    found = quantize_int8(jnp.asarray(x), (-1,))
    values, scales = reference(x)
    np.testing.assert_array_equal(found.scale, scales)
    np.testing.assert_array_equal(found.values, values)


@given(arrays(np.float32, (2, 6), elements=FINITE))
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_laws_of_any_finite_array(x: np.ndarray) -> None:
    found = quantize_int8(jnp.asarray(x), (-1,))
    scale = np.asarray(found.scale, np.float64)[:, None]
    error = np.abs(np.asarray(found.values) * scale - x)
    assert (scale > 0).all()
    assert np.isfinite(scale).all()
    assert np.abs(np.asarray(found.values, np.int32)).max() <= 127
    assert (error <= 0.5 * scale * (1 + 1e-6)).all()


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_no_entry_leaves_the_symmetric_range_at_any_magnitude(magnitude: float) -> None:
    x = (magnitude * np.random.default_rng(1).uniform(-1, 1, (500, 8))).astype(np.float32)
    found = quantize_int8(jnp.asarray(x), (-1,))
    assert np.abs(np.asarray(found.values, np.int32)).max() <= 127
    assert (np.abs(np.asarray(dequantize(found)) - x) <= 0.5001 * np.asarray(found.scale, np.float32)[:, None]).all()


def test_a_slice_of_zeros_has_scale_1_and_comes_back_as_zeros() -> None:
    found = quantize_int8(jnp.zeros((2, 4)), (-1,))
    np.testing.assert_array_equal(found.scale, jnp.ones(2, jnp.bfloat16))
    np.testing.assert_array_equal(dequantize(found), np.zeros((2, 4)))


def test_what_was_stored_reads_back_to_the_same_values_under_its_scale() -> None:
    found = quantize_int8(jax.random.normal(jax.random.key(2), (100, 32)), (-1,))
    again = np.round(np.asarray(dequantize(found)) / np.asarray(found.scale, np.float32)[:, None])
    np.testing.assert_array_equal(again, found.values)


def test_golden_errors_of_a_seeded_array() -> None:
    """Rounding a normal slice of 64 to steps of about max / 127 costs some 0.5 % of its standard deviation."""
    x = np.random.default_rng(0).standard_normal((100, 64), dtype=np.float32)
    error = np.abs(np.asarray(dequantize(quantize_int8(jnp.asarray(x), (-1,)))) - x)
    assert error.mean() == pytest.approx(0.0051341, rel=1e-4)
    assert error.max() == pytest.approx(0.0137264, rel=1e-4)


GROUPED = [((3, 8), -1, 4), ((3, 7), -1, 3), ((7, 3), -2, 64), ((2, 5, 3), -3, 1)]


@pytest.mark.parametrize(("shape", "axis", "group"), GROUPED)
def test_int4_equals_a_loop_over_groups_in_float64(shape: tuple[int, ...], axis: int, group: int) -> None:
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) + np.float32(3)
    found = quantize_int4(jnp.asarray(x), axis, group)
    size, brain = shape[axis], ml_dtypes.bfloat16
    rows = np.moveaxis(x, axis, -1).reshape(-1, size).astype(np.float64)
    packed, scales, lows = (np.moveaxis(np.asarray(leaf), axis, -1) for leaf in (found.packed, found.scale, found.low))
    packed, scales, lows = packed.reshape(len(rows), -1), scales.reshape(len(rows), -1), lows.reshape(len(rows), -1)
    assert (packed.dtype, scales.dtype, lows.dtype) == (np.uint8, brain, brain)
    for row, numbers, scale, low in zip(rows, packed, scales, lows, strict=True):
        for at, start in enumerate(range(0, size, group)):
            part = row[start : start + group]
            lowest = np.nextafter(brain(part.min()), brain(-np.inf)) if brain(part.min()) > part.min() else part.min()
            exact = (part.max() - np.float64(brain(lowest))) / 15
            up = np.nextafter(brain(exact), brain(np.inf)) if np.float64(brain(exact)) < exact else exact
            assert (low[at], scale[at]) == (brain(lowest), brain(up))
            for offset, entry in enumerate(part, start):
                number = numbers[offset // 2] >> 4 if offset % 2 else numbers[offset // 2] & 15
                assert number == np.round((entry - np.float64(low[at])) / np.float64(scale[at]))
        if size % 2:
            assert numbers[-1] < 16
    assert found.shape == shape
    assert found.size == x.size
    slices = x.size // size
    assert found.nbytes == slices * -(-size // 2) + 4 * slices * -(-size // group)
    assert dequantize(found).shape == shape


@given(arrays(np.float32, (2, 5), elements=st.floats(-LARGEST / 4, LARGEST / 4, width=32)))
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_laws_of_int4_of_any_finite_array(x: np.ndarray) -> None:
    found = quantize_int4(jnp.asarray(x), -1, 3)
    low, scale = (np.repeat(np.asarray(leaf, np.float64), 3, axis=1)[:, :5] for leaf in (found.low, found.scale))
    assert (scale > 0).all()
    assert np.isfinite(scale).all()
    assert (low <= x + float(np.finfo(np.float32).tiny)).all()  # less than that XLA flushes to 0
    # float32 has the last word on numbers far from zero that lie close together.
    rounding = 2.0**-23 * (np.abs(x) + np.abs(low)) + 2 * float(np.finfo(np.float32).tiny)
    assert (np.abs(np.asarray(dequantize(found), np.float64) - x) <= 0.5 * scale * (1 + 1e-6) + rounding).all()


def test_int4_zeros_and_a_span_of_just_fifteen_steps_come_back() -> None:
    np.testing.assert_array_equal(dequantize(quantize_int4(jnp.zeros((1, 16)), -1, 16)), np.zeros((1, 16)))
    steps = 0.7109375 * np.arange(16, dtype=np.float32)[None] - 4
    found = quantize_int4(jnp.asarray(steps), -1, 16)
    assert (float(found.scale[0, 0]), float(found.low[0, 0])) == (0.7109375, -4)
    np.testing.assert_array_equal(dequantize(found), steps)


LIKE = [quantize_int8(jnp.ones((4, 6)), (-2,), jnp.float32), quantize_int4(jnp.ones((4, 6)), -2, 4)]


@pytest.mark.parametrize("like", LIKE)
def test_quantized_like_another(like: QuantizedArray | Int4Array) -> None:
    x = jax.random.normal(jax.random.key(0), (4, 6))
    expected = quantize_int8(x, (-2,), jnp.float32) if isinstance(like, QuantizedArray) else quantize_int4(x, -2, 4)
    found = quantize_like(x, like)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    assert is_leaf(found)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_passes_storage_unchanged(storage: str, dtype: str) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8), jnp.dtype(dtype))
    weights = jax.random.normal(jax.random.key(1), x.shape, jnp.dtype(dtype))
    gradient = jax.grad(lambda x: (through_storage(x, storage) * weights).sum())(x)
    np.testing.assert_array_equal(gradient, weights)


@pytest.mark.as_user
@pytest.mark.parametrize(
    ("equation", "kernel", "axes", "x"),
    [
        ("btd,df->btf", (12, 20), (-2,), (2, 3, 12)),
        ("btd,dhr->bthr", (12, 4, 5), (-3,), (2, 3, 12)),
        ("bhtr,hrd->btd", (4, 5, 12), (-3, -2), (2, 4, 3, 5)),
    ],
)
def test_einsum_of_a_quantized_kernel_equals_that_of_what_it_stands_for(
    equation: str, kernel: tuple[int, ...], axes: tuple[int, ...], x: tuple[int, ...]
) -> None:
    weights, inputs = jax.random.normal(jax.random.key(0), kernel), jax.random.normal(jax.random.key(1), x)
    for quantized in (quantize_int8(weights, axes, jnp.float32), quantize_int4(weights, axes[-1], 8)):
        expected = np.einsum(equation, np.float64(inputs), np.float64(dequantize(quantized)))
        np.testing.assert_allclose(multiply(equation, inputs, quantized, "xla"), expected, rtol=1e-5, atol=1e-5)


def test_is_one_leaf_or_two_arrays_and_counts_its_scale() -> None:
    found = quantize_int8(jnp.ones((3, 4, 8)), (-1,))
    assert found.nbytes == 3 * 4 * 8 + 3 * 4 * 2
    assert (found.shape, found.size) == ((3, 4, 8), 96)
    assert [leaf.shape for leaf in jax.tree.leaves({"kernel": found})] == [(3, 4, 8), (3, 4)]
    (whole,) = jax.tree.leaves({"kernel": found}, is_leaf=is_leaf)
    assert isinstance(whole, QuantizedArray)
    assert whole.axes == (-1,)
