"""Numbers of few bits: known levels, loops over channels and tokens in float64, bytes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

from chai_jax.model.few_bits import NORMAL, SCALES, hadamard, quantize_few, read_few, turned
from chai_jax.plans.formats import BLOCKS, Side

SHAPES = [(64, 64), (64, 5), (32, 35), (128, 24)]  # columns of a block, channels


def sides(scales: str) -> list[Side]:
    along = -2 if scales == "channel" else -1
    return [Side(bits, scales, along) for bits in (2, 3, 4)]  # type: ignore[arg-type]


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Channels of very different sizes, some far from zero."""
    random = np.random.default_rng(seed)
    spread = np.exp(random.uniform(-3, 3, shape[-1]))
    return (random.standard_normal(shape) * spread + random.uniform(-5, 5, shape[-1])).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_the_best_for_normal_numbers(bits: int) -> None:
    """Each is the mean of the numbers that are nearest to it (Lloyd's condition)."""
    levels = np.array(NORMAL[bits])
    borders = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    mean = -np.diff(norm.pdf(borders)) / np.diff(norm.cdf(borders))
    assert len(levels) == 2 ** (bits - 1)
    np.testing.assert_allclose(levels, mean, rtol=2e-3)


@pytest.mark.parametrize("side", sides("channel"), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_equal_a_loop_over_channels(shape: tuple[int, int], side: Side) -> None:
    x = numbers((2, *shape))
    stored = quantize_few(jnp.asarray(x), side)
    found, steps = np.asarray(read_few(stored)), 2**side.bits - 1
    for block in range(2):
        for channel in range(shape[1]):
            column = x[block, :, channel].astype(np.float64)
            low = float(column.min().astype(ml_dtypes.bfloat16))
            if low > column.min():
                low = float(np.nextafter(ml_dtypes.bfloat16(low), ml_dtypes.bfloat16(-np.inf)))
            scale = min(float(each) for each in SCALES if each >= np.float32((column.max() - low) / steps))
            np.testing.assert_allclose(stored.low[block, channel].astype(float), low)
            wrong = np.abs(found[block, :, channel] - column)
            assert wrong.max() <= scale * 0.5001 + 1e-6 * np.abs(column).max()
            levels = (found[block, :, channel] - low) / scale
            np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
            assert levels.max() < steps + 0.01
    assert stored.nbytes == 2 * side.bytes_of_block(*shape)


@pytest.mark.parametrize("side", sides("token"), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_equal_a_loop_over_tokens(shape: tuple[int, int], side: Side) -> None:
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32) * np.exp(numbers((*shape[:1], 1)) / 3)
    stored = quantize_few(jnp.asarray(x), side)
    found = np.asarray(read_few(stored))
    levels = np.array([*(-np.array(NORMAL[side.bits]))[::-1], *NORMAL[side.bits]])
    same = []
    for row, read in zip(x.reshape(-1, shape[1]).astype(np.float64), found.reshape(-1, shape[1]), strict=True):
        unit = row / np.sqrt(np.mean(row**2))
        chosen = levels[np.abs(unit[:, None] - levels).argmin(axis=1)]
        scale = float((row @ chosen / (chosen @ chosen)).astype(ml_dtypes.bfloat16))
        same += [np.isclose(read, chosen * scale, rtol=2e-3)]
    assert np.concatenate(same).mean() > 0.999  # the rest between two levels
    assert stored.nbytes == 2 * side.bytes_of_block(*shape)


@pytest.mark.parametrize("side", [*sides("channel"), *sides("token")], ids=str)
def test_zeros_and_what_is_large(side: Side) -> None:
    for x in (np.zeros((64, 8)), np.full((64, 8), -3.0)):
        np.testing.assert_allclose(read_few(quantize_few(jnp.asarray(x, jnp.float32), side)), x, atol=2e-3 * 3)
    wide = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (64, 8)) * 1e30, jnp.float32)
    assert np.isfinite(np.asarray(read_few(quantize_few(wide, side)))).all()


def test_normal_numbers_lose_what_is_known() -> None:
    """Mean squared errors of Max's table; the scale that is fitted to each token wins a little."""
    x = jax.random.normal(jax.random.key(0), (64, 64, 128))
    for side, expected in zip(sides("token"), (0.1175, 0.03454, 0.009497), strict=True):
        error = float(jnp.mean((read_few(quantize_few(x, side)) - x) ** 2))
        assert 0.95 * expected < error < expected


@pytest.mark.parametrize("size", [1, 5, 24, 64, 80])
def test_turning_twice_is_nothing(size: int) -> None:
    matrix = hadamard(size).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    x = jax.random.normal(jax.random.key(0), (3, size))
    np.testing.assert_allclose(turned(turned(x, "k4v4"), "k4v4"), x, atol=1e-5)
    if size == 64:
        one = jnp.zeros((1, 64)).at[0, 3].set(8.0)
        np.testing.assert_allclose(np.abs(turned(one, "k2v2")), np.ones((1, 64)), atol=1e-6)
    for storage in ("bfloat16", "int8", "int4"):
        assert turned(x, storage) is x


def test_bits_of_a_number() -> None:
    """Of heads of 64: three eighths of a bit a key and a quarter a value are scales."""
    sizes = {
        name: [8 * side.bytes_of_block(format.block, 64) / format.block / 64 for side in (format.keys, format.values)]
        for name, format in BLOCKS.items()
    }
    assert sizes["int4"] == [5, 5]
    assert sizes["k4v2"] == [4.375, 2.25]
    assert sizes["k3v4"] == [3.375, 4.25]
