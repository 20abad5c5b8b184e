"""Several processes, one job: all run the same program, each on its own devices. The first one writes the files."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from chai_jax.console import track
from chai_jax.errors import InputError

Item = TypeVar("Item")


def first_process() -> bool:
    """Whether this process is the one that writes and prints; true where there is only one."""
    return jax.process_index() == 0


def agreed(answer: bool) -> bool:
    """The first process's answer, in every process; every process must call this.

    Questions about files are answered so, because hosts may see different files.
    """
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """Each flag, true in every process if it is true in any; every process must call this."""
    if jax.process_count() == 1:
        return list(flags)
    return np.any(_of_each(np.asarray(flags)), axis=0).tolist()


def once(write: Callable[[], object]) -> None:
    """Call `write` in the first process alone; every process must call this, and waits until it is done.

    Raises:
        InputError: in the other processes, where `write` failed; the first process raises what `write` raised.
    """
    agreed(True)
    failure: Exception | None = None
    if first_process():
        try:
            write()
        except Exception as error:  # raised again below, when the others know
            failure = error
    if not agreed(failure is None):
        raise failure or InputError("the first process could not write its files; its own message says why")


def divided(compute: Callable[[Item], Sequence[int]], items: Sequence[Item], description: str) -> list[tuple[int, ...]]:
    """`compute` of every item, in every process. Each process computes a share of the items and gets the others'.

    Args:
        compute: gives integers below 2^31, the same ones in every process.
        items: the same ones in every process.

    Raises:
        InputError: in every process, what `compute` raises for the first item that it refuses.
    """
    count, index = jax.process_count(), jax.process_index()
    if count == 1 or not items:
        return [tuple(compute(item)) for item in track(items, description)]
    mine, refused = [], len(items)
    for at in track(range(index, len(items), count), description):
        try:
            mine.append(compute(items[at]))
        except InputError:  # raised again below, by all
            refused = at
            break
    sizes = np.zeros(-(-len(items) // count), np.int32)
    sizes[: len(mine)] = [len(one) for one in mine]
    refusals, all_sizes = np.split(_of_each(np.array([refused, *sizes], np.int32)), [1], axis=1)
    if refusals.min() < len(items):
        compute(items[int(refusals.min())])
        raise AssertionError("an item was refused by one process and not by another")
    flat = np.zeros(all_sizes.sum(axis=1).max(), np.int32)
    flat[: sizes.sum()] = [number for one in mine for number in one]
    parts = [np.split(row, np.cumsum(sizes))[:-1] for row, sizes in zip(_of_each(flat), all_sizes, strict=True)]
    return [tuple(parts[at % count][at // count].tolist()) for at in range(len(items))]


def _of_each(values: np.ndarray) -> np.ndarray:
    """An array [N] of each process, all of one N: [processes, N]."""
    return np.asarray(multihost_utils.process_allgather(values))
