"""What the study leaves: its table, how well the planner predicts, and two pictures."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from chai_jax.analyse.probe import Probe
from chai_jax.compress.cluster import Stream
from chai_jax.compress.low_rank import dense_heads
from chai_jax.compress.value_merge import spectra
from chai_jax.console import track
from chai_jax.files.atomic import write_json, write_text
from chai_jax.model.model import Model
from chai_jax.report.figures import pareto, spectrum
from chai_jax.report.tables import Column, as_csv, markdown
from chai_jax.run.environment import versions, where_computed
from lab.options import Record

ENERGY = 0.99  # of a spectrum, that a rank is to hold


def perplexity_change(record: Record, end: str = "difference") -> float | None:
    """A paired difference of losses (or an end of its interval: `low`, `high`) as a change of perplexity."""
    text = record["text"]
    if "difference" not in text:
        return None
    low, high = text["difference_interval"]
    return float(np.expm1({"difference": text["difference"], "low": low, "high": high}[end]))


def _signed(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:+.{digits}f}"


def _interval(record: Record) -> str:
    ends = record["task"].get("difference_interval")
    return "-" if ends is None else f"{_signed(record['task']['difference'])} [{_signed(ends[0])}, {_signed(ends[1])}]"


def _flips(record: Record) -> str:
    flips = record["task"].get("flips")
    return "-" if flips is None else f"{flips['right_to_wrong']} / {flips['wrong_to_right']}"


def _trained(record: Record) -> str:
    return f"{record['updates']} x {record['batch']}, {record['lr']:g}" if record["updates"] else "-"


COLUMNS: tuple[Column, ...] = (
    ("row", lambda record: record["row"]),
    ("trained", _trained),
    ("cache %", lambda record: f"{100 * record['kv_fraction']:.1f}"),
    ("full, %", lambda record: f"{100 * record['kv_fraction_full']:.1f}"),
    ("KV B/token", lambda record: f"{record['kv_bytes_per_token']:,}"),
    ("+ B/sequence", lambda record: f"{record['kv_bytes_per_sequence']:,}"),
    ("weights MB", lambda record: f"{record['model_bytes'] / 1e6:.2f}"),
    ("score MMACs", lambda record: f"{record['score_macs'] / 1e6:.2f}"),
    ("output error %", lambda record: _signed(record["output_error"], 2).lstrip("+")),
    ("perplexity", lambda record: f"{record['text']['perplexity']:.1f}"),
    ("change %", lambda record: _signed(perplexity_change(record), 2)),
    ("acc ± s.e. %", lambda record: f"{100 * record['task']['acc']:.1f} ± {100 * record['task']['acc_stderr']:.1f}"),
    ("difference [95 %]", _interval),
    ("lost / won", _flips),
)


def full(record: Record, dense: Record, columns: int) -> Record:
    """With `kv_fraction_full`: all bytes of a sequence of so many tokens, block in progress and all, over the dense."""
    size = record["kv_bytes_per_token"] * columns + record["kv_bytes_per_sequence"]
    return {**record, "kv_fraction_full": size / (dense["kv_bytes_per_token"] * columns)}


def predictions(plans: Sequence[Record]) -> Record:
    """How the KL that the planner predicted on calibration text ranks plans, against what it is on held-out text:
    Spearman's correlation, and the ratio of the two. Plans of equal bytes and prediction count once."""
    distinct = {(one["choices"], one["kv_fraction"], one["predicted"]): one for one in plans}
    if len(distinct) < 3:
        return {"plans": len(distinct)}
    predicted, measured = (np.array([one[name] for one in distinct.values()]) for name in ("predicted", "kl"))
    found: Record = {"plans": len(distinct), "spearman": float(stats.spearmanr(predicted, measured).statistic)}
    for name in dict.fromkeys(one["choices"] for one in distinct.values()):
        chosen = np.array([one["choices"] == name for one in distinct.values()])
        if chosen.sum() > 2:
            found[f"spearman_{name}"] = float(stats.spearmanr(predicted[chosen], measured[chosen]).statistic)
    ends = np.percentile(measured / predicted, (10, 50, 90)).tolist()
    return found | {"measured_over_predicted": dict(zip(("p10", "median", "p90"), ends, strict=True))}


def layer_spectra(model: Model, probe: Probe) -> list[Record]:
    """For keys and values of every layer, the share of the energy that each rank holds."""
    stream, rows = Stream(model, probe), []
    for layer in track(range(model.config.num_layers), "Spectra"):
        found = spectra(dense_heads(model.config, model.params["layers"][str(layer)]), stream.input_moments)
        for what, singular in zip(("keys", "values"), found, strict=True):
            held = np.cumsum(singular**2) / np.sum(singular**2)
            rows += [
                {"layer": layer, "what": what, "rank": rank, "energy": round(float(share), 6)}
                for rank, share in enumerate(held, 1)
            ]
        stream.advance()
    return rows


def ranks_for(rows: Sequence[Record], energy: float = ENERGY) -> Record:
    """The smallest ranks that hold this share of the energy, layer by layer."""
    ranks: dict[str, dict[int, int]] = {"keys": {}, "values": {}}
    for row in rows:
        if row["energy"] >= energy:
            ranks[row["what"]].setdefault(row["layer"], row["rank"])
    return {what: [of[layer] for layer in sorted(of)] for what, of in ranks.items()}


def over_seeds(records: Sequence[Record]) -> list[Record]:
    """Rows that were made with more than one seed: mean and standard deviation (ddof 1) of what they cost."""
    found = []
    for name in dict.fromkeys(one["row"] for one in records):
        same = [one for one in records if one["row"] == name and "difference" in one["text"]]
        if len(same) > 1:
            values = {
                "kv_fraction": [one["kv_fraction"] for one in same],
                "perplexity_change": [perplexity_change(one) for one in same],
                "difference": [one["task"]["difference"] for one in same],
            }
            made = {what: {"mean": float(np.mean(of)), "sd": float(np.std(of, ddof=1))} for what, of in values.items()}  # type: ignore[arg-type]
            found.append({"row": name, "seeds": [one["seed"] for one in same], **made})
    return found


def _over_seeds(what: str, digits: int) -> Callable[[Record], str]:
    return lambda record: f"{100 * record[what]['mean']:+.{digits}f} ± {100 * record[what]['sd']:.{digits}f}"


SEED_COLUMNS: tuple[Column, ...] = (
    ("row", lambda record: record["row"]),
    ("seeds", lambda record: ", ".join(map(str, record["seeds"]))),
    ("cache %", lambda record: _over_seeds("kv_fraction", 1)(record).lstrip("+")),
    ("perplexity, change %", _over_seeds("perplexity_change", 2)),
    ("accuracy, difference", _over_seeds("difference", 1)),
)


def draw_pareto(path: Path, records: Sequence[Record], caption: str) -> None:
    """Accuracy and perplexity, as differences from the dense model, against the cache."""
    rows = []
    for one in records:
        if "difference" not in one["text"]:
            continue
        low, high = one["task"]["difference_interval"]
        rows.append(
            {
                "series": one["family"],
                "label": one["row"],
                "cache (% of dense bfloat16)": 100 * one["kv_fraction"],
                "accuracy": 100 * one["task"]["difference"],
                "accuracy_low": 100 * low,
                "accuracy_high": 100 * high,
                "perplexity": 100 * (perplexity_change(one) or 0.0),
                "perplexity_low": 100 * (perplexity_change(one, "low") or 0.0),
                "perplexity_high": 100 * (perplexity_change(one, "high") or 0.0),
            }
        )
    panels = (("accuracy", "accuracy: difference (points)"), ("perplexity", "perplexity: change (%)"))
    if rows:
        pareto(path, rows, panels, "cache (% of dense bfloat16)", caption)


def publish_study(
    out: Path,
    records: Sequence[Record],
    repeated: Sequence[Record],
    plans: Sequence[Record],
    model: Model,
    probe: Probe,
    options: Record,
) -> Record:
    """Write study.json, .csv, .md and the pictures; returns what the last line of stdout says.

    Args:
        repeated: rows made with other seeds.
    """
    columns, seeds = model.config.max_positions, over_seeds([*records, *repeated])
    records = [full(one, records[0], columns) for one in records]
    where, text = where_computed(), records[0]["text"]
    about = {"date": datetime.date.today().isoformat(), "options": options, **where, "versions": versions()}
    energies, planner = layer_spectra(model, probe), predictions(plans)
    ranks = ranks_for(energies)
    seconds = sum(one["seconds"] for one in records)
    write_json(
        out / "study.json",
        {
            **about,
            "planner": planner,
            "plans": list(plans),
            "ranks_99": ranks,
            "rows": list(records),
            "over_seeds": seeds,
        },
    )
    write_text(out / "study.csv", as_csv(records))
    n = f"{records[0]['task']['n']} examples of {options['task']}, {text['n']:,} tokens of text"
    caption = f"{n}; seed {records[0]['seed']}; {where['device']}, {where['compute_dtype']}. Bars: 95 %, paired."
    for name, trained in (("study-pareto", False), ("study-pareto-distilled", True)):
        draw_pareto(out / name, [one for one in records if bool(one["updates"]) is trained], caption)
    spectrum(out / "study-spectrum", energies, f"{len(probe.tokens)} calibration windows; {where['device']}.")
    lines = [
        f"# The study: {n}, {where['device']}, {where['compute_dtype']}, seed {records[0]['seed']}, {about['date']}",
        markdown(records, COLUMNS).rstrip(),
        f"cache %: of the dense bfloat16 cache, by the token; full: of a sequence of {columns} tokens, with all that "
        "it keeps besides (of int4, the block in progress). trained: updates x examples, peak learning rate.",
        *([markdown(seeds, SEED_COLUMNS).rstrip(), "Mean ± standard deviation over seeds."] if seeds else []),
        f"{len(records)} rows in {seconds / 60:.0f} minutes. Planner, predicted against measured KL: {planner}.",
        f"Ranks that hold {ENERGY:.0%} of the energy, layer by layer, of {model.config.hidden_size}: keys "
        f"{ranks['keys']}, values {ranks['values']}.",
    ]
    write_text(out / "study.md", "\n\n".join(lines) + "\n")
    return {"out": str(out / "study.md"), "rows": len(records), "planner": planner}
