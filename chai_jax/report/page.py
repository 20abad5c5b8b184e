"""One self-contained HTML page about one or several runs: tables, pictures, settings, and how to get them again."""

import base64
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chai_jax.analyse.explain import explain
from chai_jax.files.atomic import write_text
from chai_jax.inputs.reading import Record
from chai_jax.report.figures import DPI
from chai_jax.report.gallery import Picture, draw, draw_front, scores
from chai_jax.report.markup import Markup, escape, image, join, pairs, table, tag
from chai_jax.report.saved import SavedRun
from chai_jax.report.tables import COLUMNS, Column, number, percent, score

PIXELS_PER_INCH = 96
FITS_A_PHONE = 560  # CSS pixels: shrunk to a phone's width, letters are still readable
WHERE = ("versions", "device", "compute_dtype", "mesh", "processes")
# Nothing but what the page itself holds: the browser refuses everything else, scripts too.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _spread(measure: str, of: str | None = None) -> Any:
    """Median with the 10th and 90th percentile, of a latency or of its ratios."""

    def cell(record: Record) -> str:
        found = (record["latency"][of] if of else record["latency"])[measure]
        return f"{found['median']:.2f} [{found['p10']:.2f}, {found['p90']:.2f}]"

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
    ("scoring (ms/example)", _spread("score_ms_per_example")),
    ("prefill (ms/batch)", _spread("prefill_ms")),
    ("decoding (ms/token)", _spread("decode_ms_per_token")),
    ("decoding over dense", _spread("decode_ms_per_token", "ratio_to_first")),
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
    ("clusters of heads", lambda row: f"{row['clusters']} of {row['heads']}" if "heads" in row else ""),
    ("rank of keys, values", _ranks),
    ("critical", lambda row: str(row.get("critical", ""))),
    ("clusters stored as", lambda row: ", ".join(f"{n} {name}" for name, n in row.get("storage", {}).items())),
    ("weights", lambda row: row.get("weights", "")),
    ("KV B/token", lambda row: f"{row['kv_bytes_per_token']:,}" if "kv_bytes_per_token" in row else "-"),
    ("KV reduction", lambda row: percent(row.get("kv_reduction"))),
)


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
        galleries = [draw(run, place) for run, place in zip(runs, places, strict=True)]
        compared = [_compare(runs, Path(temporary))] if len(runs) > 1 else []
        content = [_run(at, run, gallery) for at, (run, gallery) in enumerate(zip(runs, galleries, strict=True))]
        page = _page(runs, [*compared, *content])
    write_text(out, page)
    return {"out": str(out), "bytes": len(page.encode()), "pictures": page.count("<img ")}


def _page(runs: Sequence[SavedRun], sections: Sequence[Markup]) -> str:
    title = f"chai_jax: {runs[0].name}" if len(runs) == 1 else f"chai_jax: {len(runs)} runs"
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'),
        tag("title", title),
        tag("style", Markup(style)),
    )
    links = [tag("li", _link(at, run)) for at, run in enumerate(runs)]
    content = tag("body", tag("h1", "chai_jax report"), *([tag("ul", *links)] if len(runs) > 1 else []), *sections)
    return f"<!DOCTYPE html>\n{tag('html', head, content, lang='en')}\n"


def _link(number: int, run: SavedRun) -> Markup:
    return tag("a", f"{number + 1}: {run.name}", href=f"#run-{number}")


def _run(number: int, run: SavedRun, gallery: Sequence[Picture]) -> Markup:
    """All about one run."""
    finished = datetime.fromtimestamp((run.path / "results.json").stat().st_mtime, UTC)
    parts = [
        tag("h2", run.name, id=f"run-{number}"),
        tag("p", _summary(run)),
        tag("p", f"Folder {run.path}, finished {finished:%Y-%m-%d %H:%M} UTC.", class_="quiet"),
        _warnings(run.concerns),
        tag("h3", "Stages"),
        _table(
            run.records, DETAILS, f"{run.scored_on}; {run.measured_on}. Differences and flips: against dense, paired."
        ),
        tag("h3", "Latency"),
        _table(run.records, LATENCIES, _how_timed(run.records[0]["latency"])),
        tag("h3", "Pictures"),
        *(_figure(picture) for picture in gallery),
        tag("h3", "Plan"),
        _plan(run),
        tag("h3", "How to get this again"),
        tag("p", "Data and model paths are those of the run; add --out for the folder of the new one."),
        tag("pre", run.command),
        tag("h3", "Configuration"),
        _settings(run.config),
        tag("h3", "Versions and device"),
        _settings(
            {name: run.records[0].get(name) for name in ("versions", "device", "compute_dtype", "mesh", "processes")}
        ),
    ]
    return tag("section", *parts)


def _summary(run: SavedRun) -> str:
    """In a sentence or two, what was done and what it cost and bought."""
    dense, last = run.records[0], run.records[-1]
    stages = ", ".join(record["stage"] for record in run.records[1:]) or "nothing"
    return (
        f"The dense model went through {stages}. The score went from {score(dense)} to {score(last)} "
        f"({run.scored_on}), the cache from {dense['kv_bytes_per_token']:,} to {last['kv_bytes_per_token']:,} bytes a "
        f"token ({percent(last['kv_reduction'])} less than dense bfloat16), the weights from "
        f"{dense['model_bytes']:,} to {last['model_bytes']:,} bytes. {run.measured_on}."
    )


def _warnings(concerns: Sequence[str]) -> Markup:
    if not concerns:
        return join()
    return tag("div", *(tag("p", tag("strong", "Warning: "), concern) for concern in concerns), class_="warning")


def _how_timed(latency: Record) -> str:
    return (
        f"Median [p10, p90] of n = {latency['n']} trials, all stages interleaved in one run; batch {latency['batch']}, "
        f"prompt {latency['prompt']}, {latency['new_tokens']} new tokens; {latency['device']}, {latency['dtype']}. "
        "Compile time is apart."
    )


def _table(records: Sequence[Record], columns: Sequence[Column], caption: str) -> Markup:
    rows = [[cell(record) for _, cell in columns] for record in records]
    return table([name for name, _ in columns], rows, caption)


def _plan(run: SavedRun) -> Markup:
    """The plan, a row per layer; bytes are by formula."""
    plan, rows = run.plan, explain(run.plan, run.shape)
    found = (("predicted", plan.predicted), ("measured", plan.measured))
    moved = "".join(f" KL {name}: {value:.3g} nats/token." for name, value in found if value is not None)
    merges = f"Membership {plan.membership}; scores {plan.score_merge}, values {plan.value_merge}."
    return _table(rows, LAYERS, f"{merges}{moved} Bytes by formula, for one sequence.")


def _settings(values: Record) -> Markup:
    """Names and values; those of a group with its name before theirs."""
    return pairs([(name, "-" if value in (None, "") else value) for name, value in _named(values)])


def _named(values: Record, prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in values.items():
        found += _named(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found


def _figure(picture: Picture) -> Markup:
    """The picture in whichever format is smaller, as wide as it was drawn."""
    png, svg = (picture.path.with_name(picture.path.name + suffix) for suffix in (".png", ".svg"))
    width = struct.unpack(">I", png.read_bytes()[16:20])[0] * PIXELS_PER_INCH // DPI
    chosen = min((svg, png), key=lambda path: path.stat().st_size)
    kind = "svg+xml" if chosen == svg else "png"
    source = f"data:image/{kind};base64,{base64.b64encode(chosen.read_bytes()).decode()}"
    wide = {"class_": "wide", "tabindex": "0"} if width > FITS_A_PHONE else {}
    shown = tag("div", image(source, picture.alt, width), **wide)
    return tag("figure", shown, tag("figcaption", tag("strong", f"{picture.title}. "), picture.alt))


def _compare(runs: Sequence[SavedRun], folder: Path) -> Markup:
    """The last stage of every run side by side, and the scores against the cache where all are on one task.

    Latencies are left out: they are comparable within a run only.
    """
    columns = COLUMNS[1:-1]
    rows = [
        [_link(at, run), run.records[-1]["stage"]] + [cell(run.records[-1]) for _, cell in columns]
        for at, run in enumerate(runs)
    ]
    caption = "The last stage of each run. Latencies can be compared only within a run, and are not shown here."
    parts = [tag("h2", "Comparison"), table(["run", "stage", *(name for name, _ in columns)], rows, caption)]
    if len({("acc" in run.records[0]["metrics"], run.records[0]["task"]) for run in runs}) == 1:
        found = [scores([run.records[0], run.records[-1]], f"{at}: {run.name}") for at, run in enumerate(runs, 1)]
        points = [row for rows, _ in found for row in rows]
        where = " / ".join(dict.fromkeys(run.measured_on for run in runs))
        draw_front(folder / "runs", points, found[0][1], f"{runs[0].scored_on}; {where}.")
        alt = "Scores of each run's dense model and last stage against the bytes of their cache."
        parts.append(_figure(Picture(folder / "runs", "From dense to the last stage", alt)))
    return tag("section", *parts)
