"""One self-contained HTML page about one or several runs: tables, pictures, settings, and how to get them again.

What the page says is put together here; how it looks is in `page.html` and `page.css`.
"""

import base64
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from chai_jax.analyse.explain import explain
from chai_jax.files.atomic import write_text
from chai_jax.inputs.reading import Record
from chai_jax.report.figures import DPI
from chai_jax.report.gallery import Picture, draw, draw_front, scores
from chai_jax.report.saved import SavedRun
from chai_jax.report.tables import COLUMNS, Column, number, percent, score, with_percentiles
from chai_jax.report.text import printable

PIXELS_PER_INCH = 96
FITS_A_PHONE = 560  # CSS pixels: shrunk to a phone's width, letters are still readable
MACHINE = ("versions", "device", "compute_dtype", "mesh", "processes")


def _shown(value: Any) -> Any:
    """What stands in the template's braces, as text that can be shown; markup stays as it is."""
    return value if hasattr(value, "__html__") else printable(value)


PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
)


def _timed(measure: str, of: str | None = None) -> Callable[[Record], str]:
    """The cell of a latency (or, `of` those, of its ratios) in a table."""

    def cell(record: Record) -> str:
        return with_percentiles((record["latency"][of] if of else record["latency"])[measure])

    return cell


def _calibration(record: Record) -> str:
    metrics = record["metrics"]
    if "ece" not in metrics:
        return "-"
    low, high = metrics["ece_interval"]
    return f"{100 * metrics['ece']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


DETAILS: tuple[Column, ...] = (
    *COLUMNS[:-1],
    ("ECE [95 %]", _calibration),
    (
        "loss ± s.e. (nats)",
        lambda record: " ± ".join(number(record["metrics"][name], ".4f") for name in ("loss", "loss_stderr")),
    ),
    ("took (s)", lambda record: f"{record['seconds']:,.1f}"),
)
LATENCIES: tuple[Column, ...] = (
    COLUMNS[0],
    ("scoring (ms/example)", _timed("score_ms_per_example")),
    ("prefill (ms/batch)", _timed("prefill_ms")),
    ("decoding (ms/token)", _timed("decode_ms_per_token")),
    ("decoding over dense", _timed("decode_ms_per_token", "ratio_to_first")),
    ("compiling (s)", lambda record: f"{record['latency']['compile_seconds']:,.1f}"),
    ("decoding peak (bytes)", lambda record: f"{record['latency']['bytes']['decode_peak']:,}"),
)


def _ranks(row: Record) -> str:
    ranks = [row.get(name) for name in ("key_rank", "value_rank")]
    return ", ".join("full" if rank is None else str(rank) for rank in ranks) if "tier" in row else ""


# Of a plan; the row of totals has bytes alone.
LAYERS: tuple[Column, ...] = (
    ("layer", lambda row: str(row["layer"])),
    ("sensitivity", lambda row: "" if row.get("sensitivity") is None else f"{row['sensitivity']:.3g}"),
    ("tier", lambda row: row.get("tier", "")),
    ("share", lambda row: row.get("share", "")),
    ("clusters of key/value heads", lambda row: f"{row['clusters']} of {row['heads']}" if "heads" in row else ""),
    ("rank of keys, values", _ranks),
    ("critical", lambda row: str(row.get("critical", ""))),
    ("clusters stored as", lambda row: ", ".join(f"{n} {name}" for name, n in row.get("storage", {}).items())),
    ("weights", lambda row: row.get("weights", "")),
    ("KV B/token", lambda row: f"{row['kv_bytes_per_token']:,}" if "kv_bytes_per_token" in row else "-"),
    ("KV reduction", lambda row: percent(row.get("kv_reduction"))),
)


@dataclass(frozen=True)
class PageTable:
    """A table below its caption; the first cell of a row names it, and `links` to the run of that number."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: bool = False


@dataclass(frozen=True)
class PagePicture:
    """A picture within the page: `width` CSS pixels wide where there is room; else it `scrolls` sideways or shrinks."""

    source: str
    title: str
    alt: str
    width: int
    scrolls: bool


def write_page(folders: Sequence[Path], out: Path, keep: Path | None = None) -> Record:
    """Write a page about the runs in `folders` to `out`.

    Args:
        keep: where the pictures of a single run are to stay; else they live in the page alone.

    Returns:
        `out`, its size in bytes, and how many pictures it holds.

    Raises:
        InputError: a folder is no finished run (see `SavedRun.read`).
    """
    runs = [SavedRun.read(folder) for folder in folders]
    with TemporaryDirectory(prefix="chai_jax_report_") as temporary:
        places = [keep or Path(temporary) / str(at) for at in range(len(runs))]
        sections = [_section(run, draw(run, place)) for run, place in zip(runs, places, strict=True)]
        comparison = _comparison(runs, Path(temporary)) if len(runs) > 1 else {"pictures": []}
    title = f"chai_jax: {runs[0].name}" if len(runs) == 1 else f"chai_jax: {len(runs)} runs"
    page = PAGES.get_template("page.html").render(title=title, runs=sections, comparison=comparison)
    write_text(out, page)
    pictures = sum(len(part["pictures"]) for part in (comparison, *sections))
    return {"out": str(out), "bytes": len(page.encode()), "pictures": pictures}


def _section(run: SavedRun, gallery: Sequence[Picture]) -> Record:
    """All about one run, by the names that the template has for it."""
    finished = datetime.fromtimestamp((run.path / "results.json").stat().st_mtime, UTC)
    scored = f"{run.scored_on}; {run.measured_on}. Differences and flips are against the dense model, paired."
    return {
        "name": run.name,
        "summary": _summary(run),
        "place": f"Folder {run.path}, finished {finished:%Y-%m-%d %H:%M} UTC.",
        "concerns": run.concerns,
        "stages": _table(run.records, DETAILS, scored),
        "latencies": _table(run.records, LATENCIES, _how_timed(run.records[0]["latency"])),
        "pictures": [_embedded(picture) for picture in gallery],
        "layers": _table(explain(run.plan, run.shape), LAYERS, _about_plan(run)),
        "command": run.command,
        "settings": _settings(run.config),
        "machine": _settings({name: run.records[0].get(name) for name in MACHINE}),
    }


def _summary(run: SavedRun) -> str:
    """In a few sentences, what was done and what it cost and bought."""
    dense, last = run.records[0], run.records[-1]
    stages = ", ".join(record["stage"] for record in run.records[1:]) or "nothing"
    return (
        f"The dense model went through {stages}. The score went from {score(dense)} to {score(last)} "
        f"({run.scored_on}), the cache from {dense['kv_bytes_per_token']:,} to {last['kv_bytes_per_token']:,} bytes a "
        f"token ({percent(last['kv_reduction'])} less than dense bfloat16), the weights from "
        f"{dense['model_bytes']:,} to {last['model_bytes']:,} bytes. {run.measured_on}."
    )


def _how_timed(latency: Record) -> str:
    return (
        f"Median [p10, p90] of n = {latency['n']} trials, all stages interleaved in one run; batch {latency['batch']}, "
        f"prompt {latency['prompt']}, {latency['new_tokens']} new tokens; {latency['device']}, {latency['dtype']}. "
        "The time of compiling is not in the other columns."
    )


def _about_plan(run: SavedRun) -> str:
    plan = run.plan
    found = (("predicted", plan.predicted), ("measured", plan.measured))
    moved = "".join(f" KL {name}: {value:.3g} nats/token." for name, value in found if value is not None)
    merges = f"Membership {plan.membership}; scores {plan.score_merge}, values {plan.value_merge}."
    return f"{merges}{moved} Bytes by formula, for one sequence."


def _table(records: Sequence[Record], columns: Sequence[Column], caption: str) -> PageTable:
    return PageTable(
        caption, [name for name, _ in columns], [[cell(record) for _, cell in columns] for record in records]
    )


def _settings(values: Record, group: str = "") -> list[tuple[str, object]]:
    """Names and values; those of a group with its name before theirs."""
    found: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _settings(value, f"{group}{name}.")
        else:
            found.append((f"{group}{name}", "-" if value in (None, "") else value))
    return found


def _embedded(picture: Picture) -> PagePicture:
    """The picture in whichever format is smaller, as wide as it was drawn."""
    png, svg = (picture.path.with_name(picture.path.name + suffix) for suffix in (".png", ".svg"))
    width = struct.unpack(">I", png.read_bytes()[16:20])[0] * PIXELS_PER_INCH // DPI
    chosen = min((svg, png), key=lambda path: path.stat().st_size)
    kind = "svg+xml" if chosen == svg else "png"
    source = f"data:image/{kind};base64,{base64.b64encode(chosen.read_bytes()).decode()}"
    return PagePicture(source, picture.title, picture.alt, width, width > FITS_A_PHONE)


def _comparison(runs: Sequence[SavedRun], folder: Path) -> Record:
    """The last stage of every run side by side, and the scores against the cache where all are on one task.

    Latencies are left out: they are comparable within a run only.
    """
    columns = COLUMNS[1:-1]
    rows = [
        [f"{at}: {run.name}", run.records[-1]["stage"]] + [cell(run.records[-1]) for _, cell in columns]
        for at, run in enumerate(runs, 1)
    ]
    caption = "The last stage of each run. Latencies can be compared only within a run, and are not shown here."
    table = PageTable(caption, ["run", "stage", *(name for name, _ in columns)], rows, links=True)
    if len({("acc" in run.records[0]["metrics"], run.records[0]["task"]) for run in runs}) > 1:
        return {"last_stages": table, "pictures": []}
    found = [scores([run.records[0], run.records[-1]], f"{at}: {run.name}") for at, run in enumerate(runs, 1)]
    points = [row for rows, _ in found for row in rows]
    where = " / ".join(dict.fromkeys(run.measured_on for run in runs))
    draw_front(folder / "runs", points, found[0][1], f"{runs[0].scored_on}; {where}.")
    alt = "Scores of each run's dense model and last stage against the bytes of their cache."
    return {
        "last_stages": table,
        "pictures": [_embedded(Picture(folder / "runs", "From dense to the last stage", alt))],
    }
