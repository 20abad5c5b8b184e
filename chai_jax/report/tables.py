"""A run's records as a table: for the terminal, as Markdown and as CSV, from one list of columns."""

import csv
import io
import math
import textwrap
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from chai_jax.inputs.reading import Record

Column = tuple[str, Callable[[Record], str]]


def number(value: int | float | None, form: str = ".2f", scale: int = 1) -> str:
    """`scale` times a figure as text; "-" where there is none, or none that is finite: JSON has null for both."""
    return "-" if value is None or not math.isfinite(value) else format(scale * value, form)


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def with_percentiles(values: Record, digits: int = 2) -> str:
    """A median with its 10th and 90th percentile, as in `1.00 [0.50, 6.25]`."""
    return f"{values['median']:,.{digits}f} [{values['p10']:,.{digits}f}, {values['p90']:,.{digits}f}]"


def score(record: Record) -> str:
    """Accuracy or perplexity with its standard error."""
    metrics = record["metrics"]
    if "acc" in metrics:
        return f"{100 * metrics['acc']:.1f} ± {number(metrics['acc_stderr'], '.1f', 100)} %"
    return f"ppl {number(metrics['perplexity'])} ± {number(metrics['perplexity_stderr'])}"


def _difference(record: Record) -> str:
    paired = record["metrics"].get("difference")
    if paired is None:
        return "-"
    scale, unit = (100, " pts") if "acc" in record["metrics"] else (1, " nats")
    low, high = (number(bound, "+.2f", scale) for bound in record["metrics"]["difference_interval"])
    return f"{scale * paired:+.{1 if scale == 100 else 3}f}{unit} [{low}, {high}]"


def _flips(record: Record) -> str:
    flips = record["metrics"].get("flips")
    return "-" if flips is None else f"{flips['right_to_wrong']} lost, {flips['wrong_to_right']} won"


def _latency(record: Record) -> str:
    latency = record.get("latency")
    if not latency:
        return "-"
    return " / ".join(f"{latency[name]['median']:.2f}" for name in ("score_ms_per_example", "decode_ms_per_token"))


COLUMNS: tuple[Column, ...] = (
    ("stage", lambda record: record["stage"]),
    ("score ± s.e.", score),
    ("paired difference [95 %]", _difference),
    ("flips", _flips),
    ("KV B/token", lambda record: f"{record['kv_bytes_per_token']:,}"),
    ("KV reduction", lambda record: percent(record["kv_reduction"])),
    ("model bytes", lambda record: f"{record['model_bytes']:,}"),
    ("ms/example, ms/token", _latency),
)


def terminal(records: Sequence[Record], title: str, columns: Sequence[Column] = COLUMNS) -> Table:
    """The table for a terminal; the first column names the row. Headings are as wide as what is below them, and cells
    that are too wide are broken at blanks."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    rows = [[cell(record) for _, cell in columns] for record in records]
    for at, (name, _) in enumerate(columns):
        width = max((len(row[at]) for row in rows), default=len(name))
        heading = textwrap.fill(name, max(width, *map(len, name.split())))
        table.add_column(heading, justify="right" if at else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(records: Sequence[Record], columns: Sequence[Column] = COLUMNS) -> str:
    """The table as GitHub Markdown."""
    lines = [" | ".join(name for name, _ in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(record) for _, cell in columns) for record in records]
    return "".join(f"| {line} |\n" for line in lines)


def as_csv(records: Sequence[Record]) -> str:
    """Every number of every record, one row a stage, nested names joined by dots."""
    flat = [_flatten(record) for record in records]
    names = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flatten(value: Record, prefix: str = "") -> Record:
    flat: Record = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            flat |= _flatten(entry, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = entry
    return flat
