"""What `chai-jax bench` measured: table columns, and pictures of cost against what was varied."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chai_jax.files.atomic import finite, write_json, write_text
from chai_jax.inputs.reading import Record
from chai_jax.report.figures import pareto
from chai_jax.report.tables import Column, as_csv, markdown, percent, with_percentiles

FIRST, EACH, SCORED = "prefill_ms", "decode_ms_per_token", "score_ms_per_example"


def _ratio(record: Record) -> str:
    return " / ".join(f"{record['ratio_to_first'][name]['median']:.2f}" for name in (FIRST, EACH, SCORED))


def _floor(record: Record) -> str:
    floor, reached = record["floor"], record["floor_fraction"]
    return " / ".join(f"{floor[name]['ms']:.2f} ({percent(reached[name], 0)})" for name in (FIRST, EACH))


def _long_run(record: Record) -> str:
    long = record.get("long_run")
    if long is None:
        return "-"
    error = "" if long["stderr"] is None else f" ± {long['stderr']:.3f}"
    return f"{long['decode_ms_per_token']:.3f}{error} (n = {long['tokens']:,})"


def _bytes(name: str) -> Any:
    return lambda record: f"{record['bytes'][name]:,}" if name in record["bytes"] else "-"


# Of the Markdown. Times in milliseconds.
COLUMNS: tuple[Column, ...] = (
    ("model", lambda record: record["model"]),
    ("batch x prompt + new", lambda record: f"{record['batch']} x {record['prompt']} + {record['new_tokens']}"),
    ("first token, ms", lambda record: with_percentiles(record[FIRST])),
    ("step of the batch, ms", lambda record: with_percentiles(record[EACH])),
    ("tokens/s", lambda record: with_percentiles(record["tokens_per_second"], 1)),
    ("inferences/s", lambda record: with_percentiles(record["inferences_per_second"], 1)),
    ("ratios to the first model", _ratio),
    ("floor, ms (reached)", _floor),
)
MORE: tuple[Column, ...] = (
    ("long run, ms a step", _long_run),
    ("cache bytes", _bytes("kv")),
    ("weight bytes", _bytes("weights")),
    ("decode peak bytes", _bytes("decode_peak")),
    ("compiled in, s", lambda record: f"{record['compile_seconds']:.2f}"),
)
PANELS = {
    FIRST: "ms to the first token of the batch",
    EACH: "ms a decoding step of the batch",
    SCORED: "ms a scored example",
}
# What a picture is drawn against: its file, the label of its axis, the column, and the measures that depend on it.
AGAINST = (
    ("batch", "sequences in the batch", "batch", (FIRST, EACH, SCORED)),
    ("prompt", "prompt (tokens)", "prompt", (FIRST, EACH)),
    ("layers", "layers", "layers", (FIRST, EACH, SCORED)),
    ("clusters", "cached key heads a layer (mean)", "clusters", (FIRST, EACH, SCORED)),
)


def note(record: Record) -> str:
    """One line on what the numbers are: how often, where, in what dtype, at which probed rates."""
    row, rates, best = record["rows"][0], _rates(record["probe"]), _rates(record["probe_best"])
    return (
        f"median [p10, p90] of n = {row['n']} interleaved rounds, new tokens {row['new_tokens']}, questions of "
        f"{row['question']} tokens, seed {row['seed']}, {record['device']}, {record['threads']['xla']} CPUs, "
        f"{row['dtype']}, quantized weights {record['quantized_weights']}; "
        f"floor at {rates}, from {record['probes']} probes ({best} at best)"
    )


def _rates(probe: Record) -> str:
    return f"{probe['bytes_per_second'] / 1e9:.1f} GB/s and {probe['flops_per_second'] / 1e9:.1f} GFLOP/s"


def write(record: Record, out: Path) -> None:
    """Write bench.json, bench.csv, bench.md and the pictures (see `pictures`) into the folder `out`."""
    write_json(out / "bench.json", finite(record))
    write_text(out / "bench.csv", as_csv(record["rows"]))
    text = [markdown(record["rows"], (*COLUMNS, *MORE)), "", f"{note(record)}.", ""]
    write_text(out / "bench.md", "\n".join(text))
    pictures(record, out)


def pictures(record: Record, out: Path) -> list[Path]:
    """Cost against batch, and against whatever else takes several values among the rows; of each PNG, SVG and CSV.

    Against clusters or layers only this package's models are drawn; a peer always computes with all heads.
    """
    written = []
    for name, label, column, measures in AGAINST:
        rows = record["rows"]
        if column not in ("batch", "prompt"):
            rows = [row for row in rows if row["framework"] == "chai_jax"]
        if column == "batch" or len({row[column] for row in rows}) > 1:
            points = [_point(row, column, label, measures) for row in rows]
            panels = [(measure, PANELS[measure]) for measure in measures]
            written += pareto(out / name, points, panels, label, note(record))
    return written


def _point(row: Record, column: str, label: str, measures: Sequence[str]) -> Record:
    """A row as `pareto` draws it; a line joins what differs in this column alone."""
    fixed = [f"{name} {row[name]}" for name in ("batch", "prompt") if name != column]
    who = [row["model"]] if column in ("batch", "prompt") else []
    point = {"series": ", ".join([*who, *fixed]), "label": row["model"], label: row[column]}
    for measure in measures:
        values = row[measure]
        point |= {measure: values["median"], f"{measure}_low": values["p10"], f"{measure}_high": values["p90"]}
    return point
