"""Does it pay to find clusters anew for every prompt (CHAI, arXiv 2403.08058), and on how many tokens?

    python experiments/membership.py $MODEL --data-dir $DATA --windows 64 --seeds 3 --out runs/membership

At equal clusters per layer (the elbow's, and half the heads), all layers clustered, share qk, no training, every cache
in bfloat16: heads grouped by calibration, per prompt after 5, 10 and 20 warm-up tokens, and at random. SST-2 accuracy
on the validation questions (or the first --limit), loss on the first --windows windows of WikiText-2 test.raw, each
with its paired difference to the dense model. Calibrated on held-out SST-2 training prompts and on WikiText-2
validation text.

Then the agreement (adjusted Rand index, mean over prompts and layers; 1: the same clusters) of K-Means inside jit
with scikit-learn's on the same features (half the heads): from the same start, and its own best of ten random starts;
and with the calibrated clusters.

Writes results.json, results.csv and results.md; the last line on stdout is the record as JSON.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from chai_jax.analyse.planner import plan
from chai_jax.analyse.probe import Probe, probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import with_storage
from chai_jax.console import track
from chai_jax.data.batches import encode
from chai_jax.data.tasks import get_task, held_out, load_rows
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.evaluation.tasks import evaluate_rows, evaluate_windows
from chai_jax.files.atomic import write_json, write_text
from chai_jax.files.store import load
from chai_jax.model.cache import bytes_per_sequence, empty
from chai_jax.model.layerwise import embed_text, how_in_float32, seen_through
from chai_jax.model.membership import cluster_heads, farthest_points, features
from chai_jax.model.model import Model
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.report.tables import as_csv
from chai_jax.run.environment import versions, where_computed
from lab.variants import at_random

WARMUPS = (5, 10, 20)
COUNTS = {"elbow": "elbow", "half": 0.5}
CALIBRATION = 64  # SST-2 prompts, and as many windows of text
TEXT = Path("wikitext2")

Record = dict[str, Any]


def prompts(model: Model, rows: Sequence[Record]) -> list[tuple[int, ...]]:
    """Each SST-2 question with its answer, as tokens."""
    task = get_task("sst2")
    examples = [task.question(row).example for row in rows]
    longest = model.config.max_positions - 1
    return [encode(model.tokenizer, one.context, one.completion, longest).tokens for one in examples]


def look(model: Model, data_dir: Path) -> Probe:
    """Probe the heads on held-out training prompts and on text that is not the one evaluated."""
    kept, _ = held_out(load_rows(get_task("sst2"), "train", data_dir), CALIBRATION)
    text = windows(
        model.tokenizer, read_text_file(data_dir / TEXT / "validation.txt.gz"), min(256, model.config.max_positions)
    )
    return probe(model, prompts(model, kept) + [window.tokens for window in text[:CALIBRATION]])


def plans(model: Model, seen: Probe, seeds: int) -> Iterator[tuple[Record, Plan]]:
    """What is compared: labels of a record, and the plan."""
    for name, count in COUNTS.items():
        tiered = plan(model, seen, share="qk", layers=1.0, clusters=count, sensitivity="attention")
        layers = (tuple(ClusterPlan(one.heads, one.keep) for one in layer.clusters) for layer in tiered.layers)
        calibrated = Plan(tuple(map(LayerPlan, layers)), share="qk")
        counts = [len(layer.clusters) for layer in calibrated.layers]
        yield {"membership": "calibrated", "clusters": name, "counts": counts}, calibrated
        for warmup in WARMUPS:
            labels = {"membership": "prompt", "clusters": name, "counts": counts, "warmup": warmup}
            yield labels, dataclasses.replace(calibrated, membership="prompt", warmup_tokens=warmup)
        for seed in range(seeds):
            random = np.random.default_rng(seed)
            parts = [at_random(model.config.num_heads, count, random) for count in counts]
            labels = {"membership": "random", "clusters": name, "counts": counts, "seed": seed}
            yield labels, Plan(tuple(map(LayerPlan, parts)), share="qk")


def sizes(model: Model) -> Record:
    """Bytes as stored, from allocated arrays: of keys and of all, for one token; of memberships, for one sequence."""
    one, two = (empty(model.spec, batch=1, capacity=tokens) for tokens in (1, 2))
    keys = [sum(group.keys.nbytes for layer in held.layers for group in layer) for held in (one, two)]
    return {
        "k_bytes_per_token": keys[1] - keys[0],
        "kv_bytes_per_token": two.nbytes - one.nbytes,
        "kv_bytes_per_sequence": bytes_per_sequence(model.spec),
    }


def clusterings(dense: Model, tokens: np.ndarray) -> list[np.ndarray]:
    """Per layer the features [B, H, F] of prompts, given by their first tokens [B, W].

    Of a dense model: a warm-up's rows read all heads, and nothing later, in every layer.
    """

    mask = jnp.ones(tokens.shape, bool)
    x, found = embed_text(dense, tokens, mask), []
    look = jax.jit(seen_through, static_argnums=(0, 1, 2))
    for index, layer in enumerate(dense.spec.layers):
        own = dense.params["layers"][str(index)]
        x, seen = look(dense.config, layer, how_in_float32(dense), own, x, mask)
        found.append(jax.device_get(features(seen.probabilities)))
    return found


@partial(jax.jit, static_argnums=1)
def in_jit(points: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Where K-Means starts [B, C, F], and the labels [B, H] it ends with."""
    starts = jax.vmap(partial(farthest_points, count=count))(points)
    return starts, cluster_heads(points, count).cluster_of


def agreement(dense: Model, calibrated: Plan, rows: Sequence[tuple[int, ...]], seed: int = 0) -> list[Record]:
    """The K-Means inside jit against scikit-learn's and the calibrated clusters, per length of the warm-up.

    `inertia_to_best` is its summed inertia over that of scikit-learn's best of ten.
    """
    records = []
    rows = [row for row in rows if len(row) >= max(WARMUPS)]
    for warmup in track(WARMUPS, "Comparing K-Means"):
        scores: dict[str, list[float]] = {"same_start": [], "best_of_ten": [], "calibrated": []}
        inertia = best_inertia = 0.0
        points_of = clusterings(dense, np.asarray([row[:warmup] for row in rows], np.int32))
        for points, layer in zip(points_of, calibrated.layers, strict=True):
            count = len(layer.clusters)
            fixed = {head: number for number, one in enumerate(layer.clusters) for head in one.heads}
            for mine, start, labels in zip(points, *jax.device_get(in_jit(points, count)), strict=True):
                same = KMeans(count, init=start, n_init=1, tol=0).fit(mine)
                best = KMeans(count, n_init=10, random_state=seed).fit(mine)
                of_heads = [fixed[head] for head in range(len(labels))]
                for name, theirs in zip(scores, (same.labels_, best.labels_, of_heads), strict=True):
                    scores[name].append(adjusted_rand_score(theirs, labels))
                inertia += sum(
                    mine[labels == label].var(axis=0).sum() * (labels == label).sum() for label in set(labels)
                )
                best_inertia += best.inertia_
        means = {name: float(np.mean(values)) for name, values in scores.items()}
        means["inertia_to_best"] = float(inertia / best_inertia)
        records.append({"warmup": warmup, "prompts": len(rows), "layers": len(calibrated.layers), **means})
    return records


def markdown(records: Sequence[Record]) -> str:
    """One row a record: the figures of the text, with their standard errors and 95 % intervals."""
    lines = [
        "| membership | clusters | K B/token | SST-2 acc ± s.e., % | to dense, points [95 %] "
        "| text loss ± s.e., nats | to dense [95 %] |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        name = record["membership"]
        name += f" {record['warmup']}" if "warmup" in record else f" {record['seed']}" if "seed" in record else ""
        cells = [name, record["clusters"], f"{record['k_bytes_per_token']:,}"]
        for part, score, scale, digits in (("sst2", "acc", 100, 1), ("text", "loss", 1, 3)):
            found = record[part]
            cells.append(f"{scale * found[score]:.{digits}f} ± {scale * found[f'{score}_stderr']:.{digits}f}")
            low, high = (scale * bound for bound in found.get("difference_interval", (0, 0)))
            moved = f"{scale * found.get('difference', 0):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(moved if "difference" in found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(model: str, data_dir: Path, limit: int | None, window_limit: int, seeds: int, out: Path) -> Record:
    """All measurements; writes the files and returns the record."""
    began = time.perf_counter()
    dense = with_storage(load(model), "bfloat16")
    task, rows = get_task("sst2"), load_rows(get_task("sst2"), "validation", data_dir, limit)
    text = windows(dense.tokenizer, read_text_file(data_dir / TEXT / "test.raw.txt.gz"), dense.config.max_positions)
    answers, losses = evaluate_rows(dense, task, rows), evaluate_windows(dense, text[:window_limit])
    first = {"membership": "dense", "clusters": "", "sst2": answers.metrics(), "text": losses.metrics(), **sizes(dense)}
    records = [first]
    compared = list(plans(dense, look(dense, data_dir), seeds))
    for labels, wanted in track(compared, "Comparing memberships"):
        small = cluster(dense, wanted)
        measured = {
            "sst2": evaluate_rows(small, task, rows).against(answers).metrics(),
            "text": evaluate_windows(small, text[:window_limit]).against(losses).metrics(),
        }
        records.append({**labels, **measured, **sizes(small)})
    *_, calibrated = (wanted for labels, wanted in compared if labels["membership"] == "calibrated")
    agreed = agreement(dense, calibrated, prompts(dense, rows[:CALIBRATION]))
    record = {"results": records, "agreement": agreed, **where_computed(), "versions": versions()}
    record["seconds"] = round(time.perf_counter() - began, 1)
    write_json(out / "results.json", record)
    write_text(out / "results.csv", as_csv(records))
    write_text(out / "results.md", markdown(records))
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a dense OPT")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds sst2/*.jsonl[.gz] and wikitext2/*.txt.gz")
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--windows", type=int, default=64, help="of the text, as long as the model takes")
    parser.add_argument("--seeds", type=int, default=3, help="random memberships")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    try:
        record = run(chosen.model, chosen.data_dir, chosen.limit, chosen.windows, chosen.seeds, chosen.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
