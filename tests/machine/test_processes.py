"""Work that is divided between processes: each does its share, and all have what one alone would have."""

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from chai_jax.adapt.updates import encode_examples
from chai_jax.config import TrainConfig
from chai_jax.data.batches import Encoded, Example
from chai_jax.errors import InputError
from chai_jax.machine.processes import divided

EXAMPLES = [Example("a" * (1 + 5 * at % 7), " " + "b" * (1 + at % 3)) for at in range(11)]
READY = Encoded((2, 7, 8, 9), 2)


class Letters:
    """A tokenizer of single characters that remembers what it was given."""

    bos_token, bos_token_id = "</s>", 2

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        self.seen.append(text)
        return {"input_ids": [2] * add_special_tokens + [ord(letter) for letter in text]}


def digits(number: int) -> list[int]:
    """Of a number; 0 has none, and 13 and more are refused."""
    if number >= 13:
        raise InputError(f"{number} is too large")
    return [int(digit) for digit in str(number)] if number else []


def refused(*numbers: int) -> str:
    with pytest.raises(InputError) as error:
        divided(digits, numbers, "Digits")
    return str(error.value)


def found() -> dict[str, Any]:
    """What is computed on one process or more, as JSON; `seen` alone is this process's own."""
    letters = Letters()
    encoded = encode_examples(letters, [*EXAMPLES[:4], READY, *EXAMPLES[4:]], TrainConfig(), 8)
    return {
        "encoded": [[one.start, *one.tokens] for one in encoded],
        "digits": [divided(digits, items, "Digits") for items in ([], [0], [12], [3, 0, 12, 7, 0], range(12, 0, -1))],
        "refused": [refused(1, 2, 13, 14), refused(13), refused(1, 2, 3, 4, 5, 15)],
        "seen": letters.seen,
    }


def in_processes(count: int) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(count), str(process)],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * count, outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_each_process_tokenizes_its_share_and_has_all() -> None:
    alone = json.loads(json.dumps(found()))
    assert alone["refused"] == ["13 is too large", "13 is too large", "15 is too large"]
    assert alone["digits"][3] == [[3], [], [1, 2], [7], []]
    both = in_processes(2)
    for one in both:
        assert {**one, "seen": None} == {**alone, "seen": None}
    # Eleven examples, each read twice (context, and the whole): six are one process's, five the other's.
    assert [len(one["seen"]) for one in both] == [12, 10]
    assert sorted(both[0]["seen"] + both[1]["seen"]) == sorted(alone["seen"])


if __name__ == "__main__":
    import jax

    jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found()))
