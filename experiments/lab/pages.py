"""The tables of the documentation, each made of files under experiments/results/."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chai_jax.report.tables import Column, markdown
from lab.options import Record

RESULTS = Path(__file__).parents[1] / "results"
TASKS = {"piqa": "PIQA", "hellaswag": "HellaSwag", "sst2": "SST-2"}


def read(file: str) -> Record:
    found: Record = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return found


def under(about: Record, text: str = "") -> str:
    """What stands under a table: its command, machine and date."""
    seeds = ", ".join(map(str, about["seeds"]))
    software = f"jax {about['versions']['jax']}"
    said = f"{about['device']}, {about['compute_dtype']}, seed {seeds}, {about['date']}, {software}. {text}".strip()
    return f"`{about['command']}`\n\n({said})"


def whole(file: str, columns: Sequence[Column], text: str = "", keep: Callable[[Record], bool] = bool) -> str:
    """Some rows of one experiment, and what stands under them."""
    found = read(file)
    return f"{markdown([row for row in found['rows'] if keep(row)], columns)}\n{under(found, text)}"


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


TABLES: dict[str, Callable[[], str]] = {"redundancy": redundancy}
