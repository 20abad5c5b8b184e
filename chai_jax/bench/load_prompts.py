"""What a load asks for: prompts from a file, or of words drawn at random; numbers of new tokens likewise."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chai_jax.bench.load_answers import Request
from chai_jax.errors import InputError
from chai_jax.inputs.reading import SMALL, open_utf8, parse_json, shown

LONGEST = 2**20  # tokens that may be asked for, or words of a prompt
# Common words: most tokenizers have each of them, with the blank before it, as one token.
WORDS = tuple(
    """
the of and to in is was for that with on as by he at from his it an were are which this be or had first one their its
new after but who not they have her she two been other when there all during into time may more school years year up
only would later most world people city some where between over state about made game under while then team part three
him being such work war day life second name many small large house water music book film river north south long end
""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Between:
    """Whole numbers from `low` to `high`, all equally likely."""

    low: int
    high: int

    @classmethod
    def read(cls, option: str, text: str) -> "Between":
        """The range that LOW:HIGH names, or the one number of N.

        Raises:
            InputError: it is none, or not within 1 to `LONGEST`.
        """
        match = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", text)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= LONGEST:
            raise InputError(f"{option} is {text!r}; expected LOW:HIGH or N, from 1 to {LONGEST:,}: 32:256")
        return cls(low, high)

    def draw(self, random: np.random.Generator) -> int:
        return int(random.integers(self.low, self.high, endpoint=True))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: every line is one, or, in a .jsonl file, the field `prompt` of every line's object.

    Raises:
        InputError: the file cannot be read, holds none, or has a line without one.
    """
    rows = path.name.removesuffix(".gz").endswith(".jsonl")
    found = []
    with open_utf8(path, SMALL) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found.append(_prompt_of(line, path, number) if rows else line.rstrip("\r\n"))
    if not found:
        raise InputError(f"{shown(path)} holds no prompts; expected one a line")
    return found


def _prompt_of(line: str, path: Path, number: int) -> str:
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise InputError(
            f'{shown(path)} has no prompt in line {number}; expected an object such as {{"prompt": "Once"}}'
        )
    return prompt


def made_requests(words: Between, new: Between, seed: int, part: int) -> Iterator[Request]:
    """Endless requests; the same ones for one seed and part. No two prompts begin alike, but by chance."""
    random = np.random.default_rng([seed, part])
    while True:
        chosen = random.integers(0, len(WORDS), words.draw(random))
        yield Request(" ".join(WORDS[at] for at in chosen), new.draw(random))


def read_requests(prompts: list[str], new: Between, seed: int, part: int) -> Iterator[Request]:
    """Endless requests for the prompts in their order, again and again; `new` as in `made_requests`."""
    random = np.random.default_rng([seed, part])
    return (Request(prompt, new.draw(random)) for prompt in itertools.cycle(prompts))
