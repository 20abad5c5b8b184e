"""Run folders written by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from chai_jax.config import RunConfig
from chai_jax.files.families.opt import config_fields
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.run.pipeline import recorded_settings
from chai_jax.sources import source_of

HOSTILE = "<script>alert('$x_{')</script> & \"so on\""
MEASURES = ("score_ms_per_example", "prefill_ms", "decode_ms_per_token")


def stage_record(at: int, stage: str, task: str, labelled: bool) -> dict[str, Any]:
    """A record as a run writes it, of invented numbers that differ from stage to stage."""
    share = (0.0, 0.5, 0.5, 0.65)[at]
    score = (0.9, 0.55, 0.8, 0.8)[at]
    metrics: dict[str, Any] = {"n": 1234, "loss": 1 - score, "loss_stderr": 0.01}
    if labelled:
        metrics |= {"acc": score, "acc_stderr": 0.01, "acc_interval": [score - 0.02, score + 0.02], "majority": 0.51}
        metrics |= {"ece": 0.04 + at / 100, "ece_interval": [0.03, 0.09], "at_chance": stage == "cluster"}
    else:
        metrics |= {"perplexity": 30 - 10 * score, "perplexity_stderr": 0.3}
    if at:
        metrics |= {"difference": score - 0.9, "difference_interval": [score - 0.92, score - 0.88]}
    times = {name: {"median": 4.0 - at, "p10": 3.5 - at, "p90": 6.25} for name in MEASURES}
    return {
        "stage": stage,
        "task": task,
        "metrics": metrics,
        "kv_bytes_per_token": round(256 * (1 - share)),
        "kv_bytes_per_token_formula": round(256 * (1 - share)),
        "kv_reduction": share,
        "model_bytes": 54_321 - at,
        "seconds": 1.5,
        "seed": 3,
        "device": "1 x abacus (wood)",
        "compute_dtype": "float32",
        "versions": {"python": "3.99", "jax": "9.8.7"},
        "latency": {**times, "ratio_to_first": times, "compile_seconds": 2.0, "bytes": {"decode_peak": 999}}
        | {"n": 9, "batch": 8, "prompt": 32, "new_tokens": 16, "device": "abacus", "dtype": "float32"},
    }


def write_run(path: Path, config: RunConfig, task: str) -> Path:
    """A finished run's folder (but for its models and head maps) of a model of two layers and four heads."""
    path.mkdir(parents=True)
    clusters = (ClusterPlan((1, 3), 1), ClusterPlan((0, 2), 0, critical=False, storage="int8"))
    singles = tuple(ClusterPlan((head,), head) for head in range(4))
    plan = Plan((LayerPlan(singles), LayerPlan(clusters, "medium", "bfloat16")), sensitivity=(0.75, 0.125))
    records = [
        stage_record(at, stage, task, config.text is None)
        for at, stage in enumerate(("dense", "cluster", "distil", "quantize"))
    ]
    updates = [{"run_stage": "distil", "step": step, "loss": 2.0 / step} for step in range(1, 31)]
    shape = {"model_type": "opt", **config_fields(Architecture(64, 32, 2, 4, 64, 24, 32))}
    config = dataclasses.replace(config, planning=config.planning.filled(source_of(config.model).planning))
    files = {"config.json": recorded_settings(config), "plan.json": plan.to_json(), "results.json": records}
    for name, value in {**files, "model/config.json": shape}.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(value))
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in updates) + '{"run_stage": "cut')
    return path


@pytest.fixture(scope="session")
def labelled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model and task have names that are HTML, mathematics and quotes."""
    return write_run(tmp_path_factory.mktemp("runs") / "labelled", RunConfig(HOSTILE, task="sst2"), HOSTILE)


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "text"
    return write_run(path, RunConfig("some/opt", text=Path("a $ b.txt"), limit=7), "a $ b.txt")
