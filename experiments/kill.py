"""Stop runs with SIGKILL, SIGTERM and SIGINT at random moments, go on with each by the same command, and compare its
whole folder, file by file, with that of a run that was left alone.

    python experiments/kill.py                     # some minutes; last line: {"differences": [], ...}

The model is small and random; all stages run, and three of them train and keep checkpoints. A signal may come while an
attempt looks at the folder, restores, compiles, computes, draws, or writes. An attempt is a fork of this program, so
that no time goes into importing. Numbers that a clock measured are left out of the comparison, and of pictures and
tables of such numbers only that they are there is compared.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLOCK = {"seconds", "latency", "step_s", "tokens_per_s", "mfu"}
SIGNALS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGINT: 130}  # and the status that follows
TIMED = ("pareto", "pipeline", "radar", "report.html", "results", "stages", "tradeoff")  # in report/: what shows times
LONGEST = 60.0  # seconds that a polite signal may take to end an attempt


def prepare(root: Path) -> None:
    """Write a small model and its data."""
    import jax

    from chai_jax.data.toy import POSITIONS, toy_rows, toy_tokenizer
    from chai_jax.files.store import save
    from chai_jax.model.model import Model
    from chai_jax.model.params import init
    from chai_jax.plans.architecture import Architecture
    from chai_jax.plans.spec import Spec

    tokenizer = toy_tokenizer()
    config, spec = Architecture(-(-len(tokenizer) // 8) * 8, 32, 2, 4, 64, POSITIONS, 32), Spec.dense(2, 4, 8)
    save(Model(config, spec, init(config, spec, jax.random.key(0), std=0.1), tokenizer, "small"), root / "small")
    (root / "data" / "sst2").mkdir(parents=True)
    for split, count in (("train", 96), ("validation", 32)):
        lines = [json.dumps(row) + "\n" for row in toy_rows(split, count)]
        (root / "data" / "sst2" / f"{split}.jsonl").write_text("".join(lines))


def command_of(root: Path) -> list[str]:
    """The arguments of a run, but for its --out."""
    options: dict[str, Any] = {
        "task": "sst2",
        "data-dir": root / "data",
        "compile-cache": root / "programs",
        "finetune": "always",
    }
    options |= {"layers": 1.0, "clusters": 2, "calibration": 8, "lr": 1e-3, "batch": 8, "accumulation": 2}
    options |= {"max-steps": 12, "checkpoint-every": 3}
    return ["run", str(root / "small"), *(f"--{name}={value}" for name, value in options.items())]


def start(command: list[str], out: Path) -> int:
    """Begin an attempt; returns its process id."""
    from chai_jax.__main__ import main as program
    from chai_jax.stopping import listening

    with listening():  # before the fork, lest a signal come before the attempt listens
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["chai-jax", *command, f"--out={out}"]
            status = program()
        except KeyboardInterrupt:
            status = 130
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def ended(process: int, seconds: float | None = None) -> int | None:
    """The status of an attempt, negative that of a signal; None if it has not ended after so many seconds."""
    until = None if seconds is None else time.monotonic() + seconds
    while until is None or time.monotonic() < until:
        found, status = os.waitpid(process, 0 if until is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def disturb(command: list[str], out: Path, draw: random.Random, seconds: float) -> signal.Signals | None:
    """One attempt and a signal at a random moment; the signal, or None if the run ended first."""
    process, number = start(command, out), draw.choice(list(SIGNALS))
    status = ended(process, draw.uniform(0, seconds / 2))  # so that most runs are stopped more than once
    if status is None:
        os.kill(process, number)
        status = ended(process, LONGEST)
        if status is None:
            os.kill(process, signal.SIGKILL)
            raise SystemExit(f"{number.name} did not end an attempt within {LONGEST:g} seconds")
        if status == SIGNALS[number]:
            return number
    if status:
        raise SystemExit(f"an attempt ended with status {status}: {out.with_suffix('.log').read_text()[-2000:]}")
    return None


def differences(one: Path, other: Path) -> list[str]:
    """What two run folders differ in, by path, but for what a clock measured."""
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (one, other)]
    files = [name for name in sorted(names[0] & names[1]) if (one / name).is_file() and not _timed(name)]
    return sorted(names[0] ^ names[1]) + [name for name in files if _content(one / name) != _content(other / name)]


def _timed(name: str) -> bool:
    return name.startswith(tuple(f"report/{timed}" for timed in TIMED))


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _untimed(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _untimed(entry) for name, entry in value.items() if name not in CLOCK}
    return [_untimed(entry) for entry in value] if isinstance(value, list) else value


def disturbed_runs(command: list[str], root: Path, kills: int, draw: random.Random, seconds: float) -> Iterator[Any]:
    """Runs that were disturbed until `kills` signals have stopped them: each one's folder and its signals."""
    left, runs = kills, 0
    while left > 0:
        out, seen, runs = root / f"run{runs}", [], runs + 1
        while left > 0 and (sent := disturb(command, out, draw, seconds)) is not None:
            seen.append(sent.name)
            left -= 1
        if left == 0 and (status := ended(start(command, out))):
            raise SystemExit(f"the last attempt ended with status {status}")
        yield out, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the signals and their moments")
    options = parser.parse_args()
    import chai_jax.run.pipeline  # noqa: F401  (for all attempts)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it

    with tempfile.TemporaryDirectory(prefix="chai_jax_kill_") as folder:
        root = Path(folder)
        maker = os.fork()  # a program that has computed cannot be forked
        if not maker:
            prepare(root)
            os._exit(0)
        ended(maker)
        command = command_of(root)
        alone = root / "alone"
        for out in (root / "first", alone):  # the first compiles for all
            began = time.monotonic()
            if ended(start(command, out)):
                raise SystemExit(f"the undisturbed run failed: {out.with_suffix('.log').read_text()[-2000:]}")
            seconds = time.monotonic() - began
        found, signals, runs = differences(root / "first", alone), Counter[str](), 0
        for out, seen in disturbed_runs(command, root, options.kills, random.Random(options.seed), seconds):
            unequal = differences(alone, out)
            print(f"{out.name}: {', '.join(seen) or 'undisturbed'}; {unequal or 'identical'}", file=sys.stderr)
            found += unequal
            signals.update(seen)
            runs += 1
    print(json.dumps({"differences": found, "kills": dict(signals), "runs": runs, "undisturbed_s": round(seconds, 1)}))


if __name__ == "__main__":
    main()
