"""Kill a distillation with SIGKILL at random moments, let it end, and compare with one that was left alone.

    python experiments/kill.py                     # about three minutes; last line: {"identical": true, ...}

Student and teacher are small random models; one layer's weights and the cache are int8. A kill may come while the
program starts, restores, computes, or writes. After each the newest whole checkpoint is read off the folder: the next
attempt must begin with the update after it. No line of metrics.jsonl may be missing or there twice.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

UPDATES, EVERY = 160, 4


def train(folder: Path) -> None:
    """One attempt: go on in `folder` from wherever it is, and save the model at the end."""
    import jax
    import numpy as np

    from chai_jax.adapt.distil import distil
    from chai_jax.compress.quantize import store_weights
    from chai_jax.config import Checkpoints, DistilConfig, TrainConfig
    from chai_jax.data.batches import Encoded
    from chai_jax.files.atomic import new_file
    from chai_jax.model.model import Model
    from chai_jax.model.params import OPTConfig, init
    from chai_jax.run_folder import RunFolder
    from chai_jax.spec import Spec

    config, spec = OPTConfig(256, 64, 2, 4, 256, 64, 64), Spec.dense(2, 4, 16, "int8")
    student, teacher = (Model(config, spec, init(config, spec, jax.random.key(seed), std=0.1)) for seed in (0, 1))
    student.params["layers"]["1"] = store_weights(student.params["layers"]["1"], "int8")
    draw = np.random.default_rng(0)
    examples = [Encoded(tuple(draw.integers(4, 256, 16).tolist()), 12) for _ in range(128)]
    settings = DistilConfig(TrainConfig(lr=1e-3, batch=16, accumulation=2, epochs=UPDATES * 16 // 128))
    logger = RunFolder(folder, {}).logger("distil")

    def log(record: dict[str, Any]) -> None:
        logger(record)
        with (folder / "attempts.jsonl").open("a") as file:
            file.write(json.dumps([os.getpid(), record["step"], time.time()]) + "\n")

    model = distil(student, teacher, examples, settings, log, checkpoints=Checkpoints(folder / "checkpoints", EVERY))
    with new_file(folder / "final.npz") as path, path.open("wb") as file:
        np.savez(file, *[np.asarray(leaf) for leaf in jax.tree.leaves(model.params)])


def whole(folder: Path) -> int:
    """The update of the newest whole checkpoint, 0 without one."""
    return max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def lines(path: Path) -> list[Any]:
    """The records of a file; the last may have been cut short."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def start(folder: Path) -> "subprocess.Popen[bytes]":
    """Begin an attempt; programs are compiled once for all attempts."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    programs = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, "--attempt", str(folder)]
    return subprocess.Popen(command, env=os.environ | programs, stderr=subprocess.DEVNULL)


def kill(folder: Path, draw: random.Random, span: float) -> dict[str, int]:
    """One attempt, killed: within a second of its start, or within `span` seconds of its first update."""
    log = folder / "attempts.jsonl"
    before, found = whole(folder), len(lines(log))
    process = start(folder)
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 4))
    else:
        while len(lines(log)) == found and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, span))
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [step for _, step, _ in lines(log)[found:]]
    if steps and steps[0] != before + 1:
        raise SystemExit(f"an attempt began with update {steps[0]}, after the checkpoint of update {before}")
    reached = max(steps, default=before)
    return {"from": before, "reached": reached, "kept": whole(folder), "lost": reached - whole(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--attempt", type=Path, help="(one attempt in this folder; this program calls itself with it)")
    options = parser.parse_args()
    if options.attempt:
        train(options.attempt)
        return
    with tempfile.TemporaryDirectory() as root:
        alone, killed = Path(root) / "alone", Path(root) / "killed"
        if start(alone).wait() != 0:
            raise SystemExit("the undisturbed run failed")
        times = [moment for *_, moment in lines(alone / "attempts.jsonl")]
        draw, span = random.Random(options.seed), (times[-1] - times[0]) / options.kills
        attempts = [kill(killed, draw, span) for _ in range(options.kills)]
        if start(killed).wait() != 0:
            raise SystemExit("the last attempt failed")
        logged = [[record["step"] for record in lines(folder / "metrics.jsonl")] for folder in (alone, killed)]
        losses = [[record["loss"] for record in lines(folder / "metrics.jsonl")] for folder in (alone, killed)]
        final = [(folder / "final.npz").read_bytes() for folder in (alone, killed)]
    found = {
        "identical": final[0] == final[1],
        "same_losses": losses[0] == losses[1],
        "each_step_logged_once": logged[0] == logged[1] == list(range(1, UPDATES + 1)),
        "kills": len(attempts),
        "updates": UPDATES,
        "checkpoint_every": EVERY,
        "lost_updates": [attempt["lost"] for attempt in attempts],
        "attempts": attempts,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
