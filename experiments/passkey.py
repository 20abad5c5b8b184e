"""Is a number found again that is hidden in a long text, with a cache of few bits?

    python experiments/passkey.py $MODEL --storages int8,k4v4,k3v3 --lengths 1000,2000 --seeds 0 --out runs/passkey

Mohtashami and Jaggi (2023, arXiv 2305.16300): five digits stand between sentences that say nothing, at a depth that is
drawn, in a text of at most so many tokens; the model is asked for them and answers greedily, through the same programs
as `chai-jax generate` (the prompt is read into the cache, the answer decoded from it). It is right if its answer begins
with the digits. Every model and cache is asked the same --trials texts of each length; nothing but the tokenizer is
needed to make them. The first row of a length is the dense model with a bfloat16 cache; the others are each of
--storages, and each of --compressed as it was saved.

A length by itself takes minutes, so every finished row is kept in OUT/rows and read back by the next call. Expected:
what costs little perplexity finds the number as often as the dense model does; two bits for keys do not. A model that
does not find it when dense says nothing. Writes passkey.json, .csv and .md.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.console import console
from chai_jax.data.tokens import bare_tokens, opening
from chai_jax.errors import InputError
from chai_jax.evaluation.statistics import flips, wilson
from chai_jax.model.model import Model
from chai_jax.report.tables import Column, percent
from chai_jax.serve.generate import generate_tokens
from lab.caches import caches
from lab.kept import kept
from lab.options import Common, Record, start
from lab.publish import publish

TASK = (
    "There is important information hidden inside a lot of irrelevant text. Find it and remember it. "
    "You will be asked about it."
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HIDDEN = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"
DIGITS, ANSWER = 5, 8  # tokens that are decoded: a blank and a token a digit, at most, and one more
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("cache", lambda row: row["cache"]),
    ("a token, % of bfloat16", lambda row: f"{100 * row['token']:.1f}"),
    ("tokens of the text", lambda row: f"{row['length']:,}"),
    ("found [95 %]", lambda row: f"{row['right']} of {row['n']}, {percent(row['rate'], 0)} [{interval(row)}]"),
    ("lost, won", lambda row: f"{row['flips']['right_to_wrong']}, {row['flips']['wrong_to_right']}"),
)


@dataclass(frozen=True)
class PasskeyOptions(Common):
    storages: str = "int8,k4v4,k4v3,k3v3,k3v2"
    """Cache formats beside the dense one, with commas."""
    compressed: tuple[str, ...] = ()
    """Folders of compressed models, each asked as it was saved."""
    lengths: str = "1000,2000"
    """The most tokens of a text, with commas; a model's positions, less those of an answer, are the most."""
    trials: int = 20
    """Texts of each length."""
    batch_tokens: int = 4096
    """How many tokens are read at once: so many texts of a length as fit, at least one."""

    @property
    def sizes(self) -> list[int]:
        names = [name.strip() for name in self.lengths.split(",") if name.strip()]
        if not names or not all(name.isdecimal() for name in names) or self.trials < 1 or self.batch_tokens < 1:
            raise InputError("expected --lengths N,..., and --trials and --batch-tokens of at least 1")
        return [int(name) for name in names]


def interval(row: Record) -> str:
    return " to ".join(percent(bound, 0) for bound in row["interval"])


@dataclass(frozen=True)
class Trial:
    """A text that hides a number, and how deep: 0 is its beginning, 1 its end."""

    prompt: list[int]
    key: str
    depth: float


def trial(tokenizer: Any, length: int, seed: int, number: int) -> Trial:
    """The text of `length` tokens or a sentence less that the seed and its number decide.

    Raises:
        InputError: the length leaves no room for sentences that hide anything.
    """
    random = np.random.default_rng([seed, length, number])
    key = "".join(map(str, random.integers(0, 10, DIGITS)))
    task, filler, hidden, question = (
        bare_tokens(tokenizer, part) for part in (TASK, FILLER, HIDDEN.format(key=key), QUESTION)
    )
    fixed = [*opening(tokenizer), *task]
    count = (length - len(fixed) - len(hidden) - len(question)) // len(filler)
    if count < 1:
        raise InputError(f"a text of {length} tokens hides nothing; expected at least 200: give longer --lengths")
    before = int(random.integers(0, count + 1))
    prompt = [*fixed, *filler * before, *hidden, *filler * (count - before), *question]
    return Trial(prompt, key, before / count)


def found(model: Model, trials: list[Trial], batch: int) -> list[bool]:
    """Of each text whether the answer begins with its number."""
    right: list[bool] = []
    for first in range(0, len(trials), batch):
        began = time.perf_counter()
        these = trials[first : first + batch]
        made = generate_tokens(model, [one.prompt for one in these], ANSWER, temperature=0.0, batch_size=batch)
        for one, tokens in zip(these, made, strict=True):
            right.append(model.tokenizer.decode(tokens, skip_special_tokens=True).strip().startswith(one.key))
        console.print(f"  {sum(right)} of {len(right)}, {time.perf_counter() - began:.0f} s")
    return right


def asked(name: str, model: Model, length: int, options: PasskeyOptions) -> Record:
    """What one cache finds in texts of one length: from the file of an earlier call, or asked now and kept."""
    (seed,) = options.seed_numbers[:1]
    what = {"model": model.source, "cache": name, "length": length, "n": options.trials, "seed": seed}

    def ask() -> Record:
        console.print(f"{Path(model.source).name} {name}, {length:,} tokens", style="bold")
        trials = [trial(model.tokenizer, length, seed, number) for number in range(options.trials)]
        right = found(model, trials, max(1, options.batch_tokens // length))
        return what | {
            "model": Path(model.source).name,
            "right": sum(right),
            "rate": float(np.mean(right)),
            "interval": list(wilson(sum(right), len(right))),
            "found": right,
            "depth": [one.depth for one in trials],
        }

    return kept(options.out, what | {"spec": model.spec.to_json()}, ask)


def passkey(options: PasskeyOptions) -> Record:
    """All models, one after the other, the shortest texts first."""
    rows: list[Record] = []
    for source in options.model:
        for length in options.sizes:
            first: Record = {}
            for name, model in caches(source, options.storages, options.compressed):
                row = asked(name, model, length, options)
                first = first or row | {"bytes": model.kv_bytes_per_token}
                lost = flips(np.array(first["found"]), np.array(row["found"]))
                rows.append(row | {"token": model.kv_bytes_per_token / first["bytes"], "flips": lost})
    return publish(options, "passkey", "A number hidden in a long text", rows, COLUMNS)


if __name__ == "__main__":
    start(passkey, PasskeyOptions, __doc__)
