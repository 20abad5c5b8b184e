"""What opt-125m to 6.7b and two Llamas need and take on slices of eight TPUs, by the TPU's compiler, without a TPU.

    python experiments/aot_table.py --out experiments/results

Needs libtpu (`pip install 'chai_jax[tpu]'`) and an hour or two of one core: every row is a compilation. Finished rows
are kept in aot.json; the same command goes on behind them. Writes aot.json, aot.csv and aot.md. A row whose job does
not fit is followed by the options of `rescues`, cheapest first, up to the first that fits.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is here to compile; jax must not look for the TPU

from chai_jax.aot.compiled import GIB, find_largest_batch, measure, size
from chai_jax.aot.programs import AbstractModel, Job, spec_of
from chai_jax.aot.tpu import mesh_of, topology
from chai_jax.console import console
from chai_jax.files.atomic import write_json, write_text
from chai_jax.files.published import architecture_of
from chai_jax.model.sharding import Layout

Record = dict[str, Any]
OPTS = ("125m", "350m", "1.3b", "6.7b")
LLAMAS = ("Llama-3.2-1B", "Llama-3.1-8B")
MODELS = (*OPTS, *LLAMAS)
SLICES = ("v3:2x2", "v5e:2x4")
OF_LLAMAS = ("v5e:2x4", "v6e:2x4")


@dataclass(frozen=True)
class TableRow:
    """One line of the table: a job of a model on a slice.

    Attributes:
        search: the first batch of a search for the largest; None: this batch alone.
        model: of OPT the size alone.
        cache: `dense` bfloat16, or `compressed`: share qkv, half as many key/value heads, int8.
        option: what was changed to make it fit.
    """

    model: str
    topology: str
    job: Job
    search: bool = False
    cache: str = "dense"
    mesh: str | None = None
    fsdp: bool = False
    option: str = ""

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def training(model: str, slice_: str) -> TableRow:
    """Distillation at the paper's batch: 128 in 8 microbatches, each row 64 tokens with an answer of one."""
    job = Job("distil", batch=128, seq=64, targets=1, accumulation=8)
    return TableRow(model, slice_, job, fsdp=model == "6.7b")


def rescues(row: TableRow) -> Iterator[TableRow]:
    """What to change where distillation does not fit, cheapest first."""
    job = row.job
    yield replace(row, job=replace(job, moments="bfloat16"), option="bfloat16 first moment")
    yield replace(row, job=replace(job, cached=True), option="cached teacher")
    if not row.fsdp:
        yield replace(row, fsdp=True, option="FSDP over 8")
    both = replace(job, cached=True, moments="bfloat16")
    yield replace(row, job=both, fsdp=True, option="cached teacher, bfloat16 first moment, FSDP over 8")
    yield replace(
        row, job=replace(job, cached=True, remat=True), fsdp=True, option="cached teacher, remat, FSDP over 8"
    )
    target = replace(job, kind="target", remat=True)
    yield replace(row, job=target, fsdp=True, option="target only (30 % of the layers), remat, FSDP over 8")
    for slice_ in ("v6e:2x4", "v5p:2x2x2"):
        yield replace(row, topology=slice_, fsdp=True, option=f"{slice_}, FSDP over 8")


def decoding(model: str, slice_: str) -> Iterator[TableRow]:
    """A token at 2,048 columns (8,192 of Llamas), dense and compressed: at one batch, and at the largest."""
    columns, weights = (8192, "bfloat16") if model in LLAMAS else (2048, "float16")
    mesh = "2x4" if model in ("6.7b", "Llama-3.1-8B") else None
    for cache, factor in (("dense", 1), ("compressed", 4)):
        row = TableRow(model, slice_, Job("decode", FIRST[model], columns, weights=weights), cache=cache, mesh=mesh)
        yield row
        yield replace(row, job=replace(row.job, batch=factor * FIRST[model]), search=True)


# Batches that the smallest slice holds with the dense cache.
FIRST = {"125m": 1536, "350m": 512, "1.3b": 256, "6.7b": 32, "Llama-3.2-1B": 384, "Llama-3.1-8B": 64}


def rows() -> Iterator[TableRow]:
    """Small models first, what takes longest last."""
    for models in (OPTS[:3], OPTS[3:]):
        pairs = [(model, slice_) for model in models for slice_ in SLICES]
        for model, slice_ in pairs:
            yield from decoding(model, slice_)
        for model, slice_ in pairs:
            yield training(model, slice_)
    for model in LLAMAS:
        for slice_ in OF_LLAMAS:
            yield from decoding(model, slice_)


def label(model: str) -> str:
    """The model's name on the hub, without its owner."""
    return f"opt-{model}" if model in OPTS else model


def compile_row(row: TableRow) -> Record:
    config = architecture_of(label(row.model))
    layout = Layout(mesh_of(topology(row.topology), row.mesh), row.fsdp)
    share = {"share": "qkv", "clusters": 0.5, "storage": "int8"} if row.cache == "compressed" else {}
    abstract = AbstractModel(config, spec_of(config, **share), layout)
    if row.search:
        found = find_largest_batch(row.job, abstract, tell=lambda line: console.print(f"    {line}", highlight=False))
        measured = found["fitting"] or found["failing"]
        searched = {"largest_batch": found["largest"], "too_large": found["too_large"], "compiled": found["compiled"]}
    else:
        measured, searched = measure(row.job, abstract), {}
    given = {name: value for name, value in asdict(row).items() if name != "job"}
    return {**measured, **given, **searched, "key": row.key}


class Book:
    """The finished rows, on disk after each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "aot.json"
        self.done: dict[str, Record] = {}
        if self.path.is_file():
            self.done = {record["key"]: record for record in json.loads(self.path.read_text(encoding="utf-8"))}

    def record(self, row: TableRow) -> Record:
        if row.key not in self.done:
            console.print(f"{row.model} {row.topology} {row.job.kind} {row.cache} {row.option}", highlight=False)
            self.done[row.key] = compile_row(row)
            self.write()
        return self.done[row.key]

    def write(self) -> None:
        records = list(self.done.values())
        write_json(self.path, records)
        write_text(self.folder / "aot.csv", as_csv(records))
        write_text(self.folder / "aot.md", markdown(records))


COLUMNS = {
    "model": lambda r: label(r["model"]),
    "slice": lambda r: r["topology"],
    "job": lambda r: f"{r['kind']} {r['seq']}",
    "what": lambda r: r["option"] or (r["cache"] + " cache" if r["kind"] == "decode" else "teacher and student"),
    "data x model": lambda r: "x".join(map(str, r["mesh_shape"].values())) + (" FSDP" if r["fsdp"] else ""),
    "batch": lambda r: f"{r['batch']}" + (f" (largest; {r['too_large']} is not)" if "largest_batch" in r else ""),
    "HBM a core, at most, GiB": lambda r: f"{size(r) / GIB:.2f} of {r['hbm_limit'] / GIB:.2f}",
    "fits": lambda r: "yes" if r["fits"] else f"no: {(size(r) - r['hbm_limit']) / GIB:.2f} GiB too much",
    "roofline, ms": lambda r: f"{milliseconds(r)} ({r['roofline']['bound']})" if r["fits"] else "-",
    "collectives, MB": lambda r: f"{r['collective_bytes'] / 1e6:.1f}" if r["fits"] else "-",
}


def ordered(records: list[Record]) -> list[Record]:
    place = {"distil": 0, "finetune": 0, "target": 0, "decode": 1}
    return sorted(records, key=lambda r: (place[r["kind"]], MODELS.index(r["model"]), r["seq"], r["key"]))


def cells(record: Record) -> dict[str, str]:
    return {name: cell(record) for name, cell in COLUMNS.items()}


def table(lines: list[list[str]]) -> str:
    """Rows as Markdown, the first as the head."""
    head, *body = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *body])


def milliseconds(record: Record) -> str:
    return f"{record['roofline']['ms']:.2f}" if record["fits"] else "does not fit"


def headline(records: list[Record]) -> list[list[str]]:
    """Per model and slice: largest batch with the dense and the compressed cache, and the roofline at one batch."""
    head = "model,slice,positions,largest batch (dense),compressed,ratio,ms a token at batch,dense,compressed"
    lines = [head.split(",")]
    for model in MODELS:
        for slice_ in dict.fromkeys((*SLICES, *OF_LLAMAS)):
            mine = [r for r in records if (r["model"], r["topology"], r["kind"]) == (model, slice_, "decode")]
            largest = {r["cache"]: r["largest_batch"] for r in mine if "largest_batch" in r}
            single = {r["cache"]: r for r in mine if "largest_batch" not in r}
            if len(largest) + len(single) == 4:
                dense, small = largest["dense"], largest["compressed"]
                times = [milliseconds(single[cache]) for cache in ("dense", "compressed")]
                of, batch = f"{single['dense']['seq']:,}", str(single["dense"]["batch"])
                lines.append([label(model), slice_, of, str(dense), str(small), f"{small / dense:.2f}", batch, *times])
    return lines


def markdown(records: list[Record]) -> str:
    rows = [list(cells(record).values()) for record in ordered(records)]
    return "\n".join([table(headline(records)), table([list(COLUMNS), *rows]), CAPTION])


CAPTION = """\
HBM of what fits is the least of three bounds: the sum of the compiler's parts, some of which share space; its peak,
which counts arrays in fast memory too; and the limit, which the compiler held the program against. HBM of what does not
fit is what the compiler says it needs.
"""


def as_csv(records: list[Record]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells(record) for record in ordered(records))
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("experiments/results"))
    book = Book(parser.parse_args().out)
    for row in rows():
        record = book.record(row)
        if not record["fits"] and row.job.kind == "distil":
            next((option for option in rescues(row) if book.record(option)["fits"]), None)
    print(json.dumps({"rows": len(book.done), "out": str(book.path)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
