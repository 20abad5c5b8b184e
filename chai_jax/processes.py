"""Several processes, one job: all run the same program, each on its own devices; the first one writes the files."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from chai_jax.errors import InputError


def first_process() -> bool:
    """Whether this process is the one that writes and prints; true where there is only one."""
    return jax.process_index() == 0


def agreed(answer: bool) -> bool:
    """The first process's answer, in every process; all must ask. What depends on files is decided this way."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """Each flag, raised in every process if any raised it; all must ask."""
    if jax.process_count() == 1:
        return list(flags)
    return multihost_utils.process_allgather(np.asarray(flags)).any(axis=0).tolist()


def once(write: Callable[[], object]) -> None:
    """Call `write` in the first process alone, when all have come here; the others wait until it is done.

    Raises:
        InputError: in the others, if it failed in the first, which raises its own exception.
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
