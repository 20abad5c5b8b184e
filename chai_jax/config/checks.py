"""Ranges of settings: a number or a word that cannot be is refused by its name."""

import math

from chai_jax.errors import InputError


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError unless a condition on the setting `name` holds."""
    if not holds:
        raise InputError(f"{name} is {value!r}; expected {expected}")


def require_count(name: str, value: int | None, most: int = 2**31 - 1) -> None:
    """Raise InputError unless `value` is None or a whole number from 1 to `most`."""
    require(value is None or 1 <= value <= most, name, value, f"at least 1 and at most {most:,}")


def require_positive(name: str, value: float | None) -> None:
    """Raise InputError unless `value` is None or a finite number above 0."""
    require(value is None or 0 < value < math.inf, name, value, "a positive number")


def check_seed(seed: int, name: str = "seed") -> None:
    """Raise InputError unless every generator takes this seed: scikit-learn's have 32 bits.

    Args:
        name: of the option, for the message.
    """
    require(0 <= seed < 2**32, name, seed, "a whole number from 0 on, below 2^32")
