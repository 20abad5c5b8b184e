"""The tables of the documentation, each made of files under experiments/results/."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chai_jax.report.tables import Column, markdown, percent
from lab.damage import COLUMNS
from lab.options import Record

RESULTS = Path(__file__).parents[1] / "results"
TASKS = {"piqa": "PIQA", "hellaswag": "HellaSwag", "sst2": "SST-2"}


def read(file: str) -> Record:
    found: Record = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return found


def under(about: Record, text: str = "") -> str:
    """What stands under a table: its command, machine and date, and some more."""
    seeds = ", ".join(map(str, about["seeds"]))
    software = f"jax {about['versions']['jax']}"
    said = [text, about["device"], about["compute_dtype"], f"seed {seeds}", about["date"], software]
    return f"`{about['command']}`\n\n({', '.join(filter(None, said))})"


def whole(file: str, columns: Sequence[Column], text: str = "") -> str:
    """The rows of one experiment, and what stands under them."""
    found = read(file)
    return f"{markdown(found['rows'], columns)}\n{under(found, text)}"


def redundancy() -> str:
    """Means over layers, five at a time."""
    found = read("smollm2/redundancy/redundancy.json")
    rows = [row for row in found["rows"] if row["model"] == "smollm2"]
    groups = [rows[at : at + 5] for at in range(0, len(rows), 5)]

    def mean(*names: str) -> Callable[[Sequence[Record]], float]:
        return lambda group: sum(_at(row, names) for row in group) / len(group)

    wanted: dict[str, tuple[Callable[[Sequence[Record]], float], str]] = {
        "attention to the first token": (mean("sink"), "{:.0%}"),
        "to other sinks": (mean("sinks"), "{:.0%}"),
        "correlation of heads": (mean("all"), "{:.2f}"),
        "without sinks": (mean("rest"), "{:.2f}"),
        "of one key": (mean("within"), "{:.2f}"),
        "closest": (mean("closest"), "{:.2f}"),
        "on different texts": (mean("other_text"), "{:.2f}"),
        "dimensions: keys": (mean("dimensions", "keys"), "{:.0f}"),
        "rotated": (mean("dimensions", "keys, rotated"), "{:.0f}"),
        "as queries weigh them": (mean("dimensions", "keys, as queries weigh them"), "{:.0f}"),
        "values": (mean("dimensions", "values"), "{:.0f}"),
    }
    columns: list[Any] = [("layers", lambda group: f"{group[0]['layer']} to {group[-1]['layer']}")]
    columns += [(name, partial(_shown, *how)) for name, how in wanted.items()]
    return f"{markdown(groups, columns)}\n{under(found)}"


def _at(row: Any, names: Sequence[str]) -> float:
    for name in names:
        row = row[name]
    return float(row)


def _shown(value: Callable[[Any], float], form: str, group: Any) -> str:
    return form.format(value(group))


# Of the home page: how it is called there, the options of `chai-jax run`, the file, and the row's cache.
FEW_BITS, SHARING = "few_bits/few_bits.json", "smollm2/sharing/sharing.json"
HOME = (
    ("int8", "`--kv-budget 1 --share none --storages int8`", FEW_BITS, "int8"),
    ("four bits", "`--kv-budget 1 --share none --storages k4v4`", FEW_BITS, "k4v4"),
    ("planner", "`--kv-budget 0.27 --share none --storages int8,basis4,basis3,basis2`", FEW_BITS, "planner, 27 %"),
    ("planner", "`--kv-budget 0.2`, the same formats", FEW_BITS, "planner, 20 %"),
    ("planner", "`--kv-budget 0.15`, the same formats", FEW_BITS, "planner, 15 %"),
    ("CHAI: 2 of 3 keys", "[sharing.py](experiments/sharing.py)", SHARING, "qk-2"),
    ("2 of 3 keys and values", "[sharing.py](experiments/sharing.py)", SHARING, "qkv-2"),
)


def times(row: Record) -> str:
    """Multiply-adds of attention, of the dense model's."""
    return f"{row['macs']:.1f} x" if row["macs"] < 10 else f"{row['macs']:.0f} x"


def signed(figures: Sequence[float]) -> str:
    """A mean with its interval; of large ones no decimals."""
    digits = 2 if abs(figures[0]) < 10 else 0
    return "{:+,.{d}f} [{:+,.{d}f}, {:+,.{d}f}]".format(*figures, d=digits)


DAMAGE: tuple[Column, ...] = (
    *((name, cell) for name, cell in COLUMNS if name in ("a token, % of bfloat16", "a window, %")),
    ("multiply-adds", times),
    *((name, cell) for name, cell in COLUMNS if name == "KL, nats [95 %]"),
    ("perplexity, change % [95 %]", lambda row: signed(row["perplexity_change"])),
)


def home() -> str:
    """What the best methods and CHAI cost, from two experiments."""
    rows = [
        {"how": how, "options": options} | next(row for row in read(file)["rows"] if row["cache"] == cache)
        for how, options, file, cache in HOME
    ]
    columns: list[Column] = [("how", lambda row: row["how"]), ("options", lambda row: row["options"])]
    return markdown(rows, [*columns, DAMAGE[0], DAMAGE[2], DAMAGE[4]])


def damage(file: str) -> str:
    """All rows of one measurement of damage."""
    cache: Column = ("cache", lambda row: row["cache"])
    return whole(file, (cache, *DAMAGE), f"{read(file)['rows'][0]['n']} windows")


def distilled() -> str:
    """The planner's model of 15 % as it was, and trained."""
    found = read("few_bits/distilled/few_bits.json")
    trained = read("few_bits/distilled/few_bits_distil.json")
    (how,) = trained["rows"]
    names = "planner, 15 %", f"the same after {how['updates']} updates of {how['tokens']:,} tokens"
    rows = [row | {"cache": name} for row, name in zip(found["rows"], names, strict=True)]
    cache: Column = ("cache", lambda row: row["cache"])
    said = f"{rows[0]['n']} windows", f"{how['seconds']:.0f} s an update beside other jobs"
    return f"{markdown(rows, [cache, *DAMAGE])}\n`{trained['command']}`\n\n{under(found, ', '.join(said))}"


def tasks() -> str:
    """Answers with eight examples before each question."""
    caches = {"smollm2-20": "planner, 20 %", "smollm2-15": "planner, 15 %"}
    columns: list[Column] = [
        ("cache", lambda row: caches.get(row["cache"], row["cache"])),
        ("task", lambda row: TASKS[row["task"]]),
        ("n", lambda row: f"{row['n']:,}"),
        ("accuracy", lambda row: percent(row["plain"]["acc"])),
        ("change, points [95 %]", lambda row: points(row, "plain")),
        ("lost, won", lambda row: "{right_to_wrong}, {wrong_to_right}".format(**row["plain"]["flips"])),
        ("by length", lambda row: percent(row["by_length"]["acc"])),
        ("change, points [95 %]", lambda row: points(row, "by_length")),
    ]
    return whole("few_bits/tasks-8-shots/few_bits_tasks.json", columns)


def points(row: Record, which: str) -> str:
    """A paired change of accuracy with its interval."""
    if row["cache"] == "bfloat16":
        return "-"
    figures = [100 * row[which]["difference"], *(100 * end for end in row[which]["difference_interval"])]
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*figures)


def passkey() -> str:
    """Hidden numbers that were found."""
    columns: list[Column] = [
        ("cache", lambda row: row["cache"]),
        ("a token, % of bfloat16", lambda row: f"{100 * row['token']:.1f}"),
        ("tokens of the text", lambda row: f"{row['length']:,}"),
        ("found", lambda row: f"{row['right']} of {row['n']}"),
        (
            "%, [95 %]",
            lambda row: "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in (row["rate"], *row["interval"]))),
        ),
    ]
    return whole("few_bits/passkey.json", columns)


TABLES: dict[str, Callable[[], str]] = {
    "home": home,
    "cache": partial(damage, FEW_BITS),
    "distilled": distilled,
    "tasks": tasks,
    "passkey": passkey,
    "sharing": partial(damage, SHARING),
    "redundancy": redundancy,
}
