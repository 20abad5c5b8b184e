"""What bench_gpu.py is to reach, judged from its rows, and its table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chai_jax.report.tables import Column, percent, with_percentiles
from lab.options import Record

DENSE, SMALL, PEER = "dense", "compressed", "transformers"
KERNELS = {DENSE: "dense, kernel", SMALL: "compressed, kernel"}
BOTH = {cache: (cache, kernel) for cache, kernel in KERNELS.items()}  # however it attends


@dataclass(frozen=True)
class Goal:
    """A number of a part's rows that should be so large.

    Attributes:
        caches: the rows that count, of which the best does.
        value: the number with its p10 and p90, if it has any; None of a row that lacks it.
    """

    name: str
    least: float
    part: str
    caches: tuple[str, ...]
    value: Callable[[Record], Record | None]
    digits: int = 2

    def judge(self, rows: Sequence[Record]) -> Record:
        """`met` by the median; None where nothing was measured."""
        mine = [row for row in rows if row["part"] == self.part and row["cache"] in self.caches and "absent" not in row]
        found = [(value, row) for row in mine if (value := self.value(row)) is not None]
        judged: Record = {"goal": self.name, "least": self.least, "met": None}
        if not found:
            absent = [row["absent"] for row in rows if row["part"] == self.part and "absent" in row]
            return {**judged, "why": absent[0] if absent else f"part {self.part} was left out"}
        value, row = max(found, key=lambda pair: pair[0]["median"])
        return {**judged, **value, "met": value["median"] >= self.least, "cache": row["cache"], "batch": row["batch"]}

    def say(self, judged: Record) -> str:
        """One line."""
        words = {True: "met", False: "missed", None: "not measured"}[judged["met"]]
        asked = f"{words}: {self.name}, at least {self.least:,g}"
        if judged["met"] is None:
            return f"{asked}: {judged['why']}"
        ends = "p10" in judged
        number = with_percentiles(judged, self.digits) if ends else f"{judged['median']:,.{self.digits}f}"
        return f"{asked}: {number} ({judged['cache']}, batch {judged['batch']})"


def times(*others: str) -> Callable[[Record], Record | None]:
    """How many times as fast as the fastest of the others that were measured."""

    def least(row: Record) -> Record | None:
        found = [row["times"][other] for other in others if other in row["times"]]
        return min(found, key=lambda ratio: ratio["median"], default=None)

    return least


def reached(row: Record) -> Record:
    return {"median": row["floor_fraction"]}


GOALS = (
    Goal("compressed against dense, tokens/s as a ratio", 2.5, "decode", BOTH[SMALL], times(*BOTH[DENSE])),
    Goal("fraction of its floor that dense decoding reaches", 0.7, "decode", BOTH[DENSE], reached),
    Goal("fraction of its floor that compressed decoding reaches", 0.7, "decode", BOTH[SMALL], reached),
    Goal("compressed against transformers, tokens/s as a ratio", 2.0, "decode", BOTH[SMALL], times(PEER)),
    Goal("inferences/s, the best batch", 20000, "score", (DENSE, SMALL), lambda row: row["rate"], 0),
)


def findings(rows: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Every goal as judged, and the lines that say so; then the largest batches, for which there is no goal."""
    judged = [goal.judge(rows) for goal in GOALS]
    lines = [goal.say(one) for goal, one in zip(GOALS, judged, strict=True)]
    batches = {row["cache"]: row["batch"] for row in rows if row["part"] == "largest" and "absent" not in row}
    if batches.get(DENSE):
        ratio = batches[SMALL] / batches[DENSE]
        lines.append(f"largest batch: {batches[SMALL]:,} compressed, {batches[DENSE]:,} dense, {ratio:.2f} times")
    return judged, lines


def _when(name: str, cell: Callable[[Record], str]) -> Callable[[Record], str]:
    return lambda row: cell(row) if name in row else "-"


def _note(row: Record) -> str:
    if "absent" in row:
        return f"absent: {row['absent']}"
    if row["part"] == "largest":
        needed = "-" if row["needed"] is None else f"{row['needed']:,}"
        if not row["compiled"]:
            return f"{row['largest']:,} were found elsewhere; {row['limit']:,} bytes"
        return f"found {row['largest']:,} by {row['compiled']} compilations: {needed} of {row['limit']:,} bytes"
    return f"n = {row['n']}"


def _times(row: Record) -> str:
    return ", ".join(f"{with_percentiles(ratio)} {other}" for other, ratio in row["times"].items()) or "-"


def _floor(row: Record) -> str:
    return f"{row['floor']['ms']:.3f} ({percent(row['floor_fraction'], 0)}, {row['floor']['bound']})"


COLUMNS: tuple[Column, ...] = (
    ("part", lambda row: row["part"]),
    ("model", lambda row: row["model"].rstrip("/").split("/")[-1]),
    ("cache", lambda row: row["cache"]),
    ("batch", _when("batch", lambda row: f"{row['batch']:,}")),
    ("ms a step, a batch of prompts, or a question", _when("ms", lambda row: with_percentiles(row["ms"], 3))),
    ("tokens/s, or inferences/s", _when("rate", lambda row: with_percentiles(row["rate"], 0))),
    ("times", _when("times", _times)),
    ("floor, ms (reached, bound by)", _when("floor", _floor)),
    ("cache bytes", _when("bytes", lambda row: f"{row['bytes']['kv']:,}" if "kv" in row["bytes"] else "-")),
    ("", _note),
)
