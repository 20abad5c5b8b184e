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
PLANS = {f"smollm2-{percent}": f"planner, {percent} %" for percent in (25, 20, 17, 15)}  # by their folders


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
    """The planner's models as they were, each followed by itself after training."""
    rows, notes = [], []
    for folder in ("few_bits/distilled-20-17", "few_bits/distilled"):
        found, trained = read(f"{folder}/few_bits.json"), read(f"{folder}/few_bits_distil.json")
        before, after = found["rows"][: len(found["rows"]) // 2], found["rows"][len(found["rows"]) // 2 :]
        hows = {row["model"]: row for row in trained["rows"]}
        for old, new in zip(before, after, strict=True):
            assert old["cache"] == new["cache"]  # of one name, in one order
            how = hows[new["cache"]]
            rows.append(old | {"cache": f"planner, {new['cache'].rpartition('-')[2]} %"})
            rows.append(new | {"cache": f"after {how['updates']} updates of {how['tokens']:,} tokens"})
        notes.append(f"`{trained['command']}`\n\n{under(found, str(rows[0]['n']) + ' windows')}")
    cache: Column = ("cache", lambda row: row["cache"])
    return "\n\n".join([markdown(rows, [cache, *DAMAGE]).rstrip(), *notes])


def best() -> str:
    """The planner at a quarter and a fifth of the cache: perplexity and answers together."""
    sources = {"25": "few_bits/planner-25/few_bits.json", "20": FEW_BITS}
    asked = read("few_bits/tasks/few_bits_tasks.json")
    rows = []
    for percent_, file in sources.items():
        row = next(row for row in read(file)["rows"] if row["cache"] == f"planner, {percent_} %")
        answers = {each["task"]: each for each in asked["rows"] if each["cache"] == f"smollm2-{percent_}"}
        rows.append(row | {task: points(each, "plain") for task, each in answers.items()})
    columns: list[Column] = [
        ("cache", lambda row: row["cache"]),
        *(DAMAGE[at] for at in (0, 3, 4)),
        ("PIQA, points [95 %]", lambda row: row["piqa"]),
        ("HellaSwag, points [95 %]", lambda row: row["hellaswag"]),
    ]
    counts = {TASKS[row["task"]]: row["n"] for row in asked["rows"]}
    said = ", ".join(f"{n:,} questions of {task}" for task, n in counts.items())
    measured = "\n\n".join(f"`{read(file)['command']}`" for file in sources.values())
    return f"{markdown(rows, columns)}\n{measured}\n\n{under(asked, said)}"


def tasks(file: str) -> str:
    """Answers to questions."""
    columns: list[Column] = [
        ("cache", lambda row: PLANS.get(row["cache"], row["cache"])),
        ("task", lambda row: TASKS[row["task"]]),
        ("n", lambda row: f"{row['n']:,}"),
        ("accuracy", lambda row: percent(row["plain"]["acc"])),
        ("change, points [95 %]", lambda row: points(row, "plain")),
        ("lost, won", lambda row: "{right_to_wrong}, {wrong_to_right}".format(**row["plain"]["flips"])),
        ("by length", lambda row: percent(row["by_length"]["acc"])),
        ("change, points [95 %]", lambda row: points(row, "by_length")),
    ]
    return whole(file, columns)


def points(row: Record, which: str) -> str:
    """A paired change of accuracy with its interval."""
    if row["cache"] == "bfloat16":
        return "-"
    figures = [100 * row[which]["difference"], *(100 * end for end in row[which]["difference_interval"])]
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*figures)


def passkey(file: str) -> str:
    """Hidden numbers that were found."""
    columns: list[Column] = [
        ("cache", lambda row: PLANS.get(row["cache"], row["cache"])),
        ("a token, % of bfloat16", lambda row: f"{100 * row['token']:.1f}"),
        ("tokens of the text", lambda row: f"{row['length']:,}"),
        ("found", lambda row: f"{row['right']} of {row['n']}"),
        (
            "%, [95 %]",
            lambda row: "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in (row["rate"], *row["interval"]))),
        ),
    ]
    return whole(file, columns)


def students() -> str:
    """A student of half the layers, with a teacher and without."""
    columns: list[Column] = [
        ("student", lambda row: row["cache"]),
        ("weights, % of the teacher's", lambda row: f"{100 * row['weights']:.0f}"),
        ("cache, %", lambda row: f"{100 * row['token']:.0f}"),
        ("updates", lambda row: str(row["updates"])),
        ("seconds an update", lambda row: f"{row['seconds']:.1f}" if row["updates"] else "-"),
        *DAMAGE[3:],
    ]
    return whole("smollm2/students/lighter_student.json", columns)


def speculation() -> str:
    """Drafts made of the model itself."""
    columns: list[Column] = [
        ("draft", lambda row: row["draft"]),
        ("proposed", lambda row: str(row["count"])),
        ("kept, %", lambda row: f"{100 * row['acceptance']:.1f} ± {100 * row['acceptance_stderr']:.1f}"),
        ("tokens a round", lambda row: f"{row['tokens_per_round']:.2f}"),
        ("speed-up, median [p10, p90]", lambda row: "{:.2f} [{:.2f}, {:.2f}]".format(*row["speed_up"])),
        ("same text", lambda row: f"{row['same']} of {row['n']}"),
    ]
    return whole("smollm2/speculation/speculation.json", columns)


def speed(part: str) -> str:
    """A line for every batch and context, a column for every cache: tokens a second, or seconds to the first token."""
    found = read("smollm2/speed/speed.json")
    rows = [row for row in found["rows"] if row["part"] == part]
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    shapes = list(dict.fromkeys((row["context"], row["batch"]) for row in rows))
    by = {(row["context"], row["batch"], row["cache"]): row for row in rows}

    def cell(cache: str, shape: tuple[int, int]) -> str:
        row = by[(*shape, cache)]
        if "ms" not in row:
            return row["absent"]
        value = f"{row['ms']['median'] / 1e3:.2f}" if part == "first" else f"{row['rate']['median']:,.1f}"
        return value if cache == "bfloat16" else value + " ({median:.2f} [{p10:.2f}, {p90:.2f}])".format(**row["ratio"])

    columns: list[Any] = [
        ("context", lambda shape: f"{shape[0]:,}"),
        ("batch", lambda shape: str(shape[1])),
        *((PLANS.get(cache, cache), partial(cell, cache)) for cache in caches),
    ]
    rounds = next(row["n"] for row in rows if "n" in row)
    return f"{markdown(shapes, columns)}\n{under(found, f'n = {rounds} rounds')}"


TABLES: dict[str, Callable[[], str]] = {
    "home": home,
    "best": best,
    "cache": partial(damage, FEW_BITS),
    "distilled": distilled,
    "tasks": partial(tasks, "few_bits/tasks-8-shots/few_bits_tasks.json"),
    "passkey": partial(passkey, "few_bits/passkey.json"),
    "passkey-8000": partial(passkey, "few_bits/passkey-8000/passkey.json"),
    "passkey-planner": partial(passkey, "few_bits/passkey-planner/passkey.json"),
    "long": partial(damage, "few_bits/long/few_bits.json"),
    "sharing": partial(damage, SHARING),
    "students": students,
    "speculation": speculation,
    "speed": partial(speed, "decode"),
    "first-token": partial(speed, "first"),
    "redundancy": redundancy,
}
