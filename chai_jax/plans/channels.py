"""How many bits each coordinate of a key in a basis has (formats `BASIS`), in a plan and in a spec."""

from collections.abc import Sequence

from chai_jax.errors import InputError
from chai_jax.inputs.fields import Count, brief
from chai_jax.plans.formats import BASIS, CHANNEL_BITS

Channels = tuple[tuple[Count, Count], ...]  # (bits, channels), in the order of the channels


def fits_basis(channels: Channels, storages: Sequence[str]) -> bool:
    """Whether a layer stored so has channels where all its keys are in a basis, and none elsewhere."""
    if not channels:
        return not set(storages) & set(BASIS)
    return all(bits in CHANNEL_BITS for bits, _ in channels) and set(storages) <= set(BASIS)


def count_channels(channels: Channels) -> int:
    """Coordinates that are kept."""
    return sum(count for _, count in channels)


def check_channels(where: str, channels: Channels, storages: Sequence[str], merged: bool) -> None:
    """A basis is of keys that are not merged, stored in one format.

    Raises:
        InputError: `where` and what is wrong.
    """
    names = sorted(set(storages))
    if not fits_basis(channels, storages) or (channels and len(names) > 1):
        raise InputError(
            f"{where} has channels {brief(list(channels))} with storage {' and '.join(names)}; expected (bits, "
            f"channels) with bits from {CHANNEL_BITS[0]} to {CHANNEL_BITS[-1]} where all clusters are stored in one "
            "format of a basis, and nowhere else: make the plan with chai-jax plan"
        )
    if channels and merged:
        raise InputError(
            f"{where} merges heads and stores keys in a basis; expected one or the other: use another storage, or "
            "leave its heads apart"
        )
