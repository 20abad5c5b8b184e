"""`chai-jax`: one thin subcommand per thing a person does.

Results go to stdout (the last line is one JSON object), progress and messages to stderr. Bad input gives one line on
stderr and exit status 2; a run that stopped to be gone on with later exits with status 75.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, subcommand

from chai_jax.config import DeviceConfig, PlanConfig, RunConfig
from chai_jax.errors import EXIT_STOPPED, InputError, Stopped
from chai_jax.progress import console

# Heavy libraries are imported inside the commands, so that --help answers at once.


@dataclass(frozen=True)
class PlanCommand:
    """Decide which heads to merge and what to store how; writes a plan.json a person can edit."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("plan.json")
    """Where to write the plan."""
    task: str | None = None
    """Calibrate on this task's training prompts (sst2, rte, piqa)."""
    text: Path | None = None
    """Calibrate on this text file instead."""
    data_dir: Path | None = None
    """Folder holding TASK/train.jsonl[.gz]."""
    seed: int = 0
    """Seed of the clustering."""
    planning: PlanConfig = field(default_factory=PlanConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.analyse.explain import explain, explain_table
        from chai_jax.files.atomic import check_writable, write_json
        from chai_jax.pipeline import load_any, print_table
        from chai_jax.planning import plan_for
        from chai_jax.processes import once
        from chai_jax.work import open_work

        check_writable(self.out.parent)
        planning = self.planning.filled(toy=self.model == "toy")
        config = RunConfig(
            self.model, task=self.task, text=self.text, data_dir=self.data_dir, seed=self.seed, planning=planning
        )
        model = load_any(self.model, seed=self.seed)
        costs = self.out.with_suffix(".costs.json")
        plan = plan_for(model, open_work(config, model), planning, self.seed, costs, self.out.with_suffix(".heads"))
        once(lambda: write_json(self.out, plan.to_json()))
        print_table(explain_table(plan, model.config))
        return {"plan": str(self.out), "layers": explain(plan, model.config)}


@dataclass(frozen=True)
class ExplainCommand:
    """Print a plan as a table: per layer tier, clusters, formats and cache bytes."""

    plan: Positional[Path]
    """A plan.json."""
    model: str | None = None
    """The model it is for, to say what it costs in cache bytes."""

    def run(self) -> Any:
        from chai_jax.analyse.explain import explain, explain_table
        from chai_jax.pipeline import load_any, print_table
        from chai_jax.plans import Plan

        plan = Plan.read(self.plan)
        config = load_any(self.model).config if self.model else None
        print_table(explain_table(plan, config))
        return {"layers": explain(plan, config)}


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a model on tasks (as the lm-evaluation-harness does) or its perplexity on a text file."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    task: str | None = None
    """sst2, rte, piqa, toy; several with commas."""
    text: Path | None = None
    """Token perplexity of this file."""
    data_dir: Path | None = None
    """Folder holding TASK/validation.jsonl[.gz]; without it, the Hugging Face hub."""
    split: Literal["validation", "train"] = "validation"
    """Which split to score."""
    baseline: str | None = None
    """Another model, for paired differences and flips."""
    limit: int | None = None
    """Score the first N examples only."""
    samples: Path | None = None
    """Folder for one JSONL file of per-example results per task."""
    revision: str | None = None
    """Revision of a hub model."""
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.data.tasks import get_task
        from chai_jax.files.atomic import check_writable
        from chai_jax.measure.evaluate import evaluate, perplexity
        from chai_jax.pipeline import load_any
        from chai_jax.processes import once

        if (self.task is None) == (self.text is None):
            raise InputError("give either --task (sst2, rte, piqa, toy; several with commas) or --text FILE")
        tasks = [get_task(name.strip()) for name in (self.task or "").split(",") if name.strip()]
        if self.samples:
            check_writable(self.samples)
        model = load_any(self.model, self.revision)
        if self.text is not None:
            return {str(self.text): perplexity(model, self.text)}
        baseline = load_any(self.baseline) if self.baseline else None
        found = {}
        for task in tasks:
            result = evaluate(model, task, self.split, self.data_dir, self.limit, baseline)
            if self.samples:
                once(partial(result.write_samples, self.samples / f"samples_{task.name}.jsonl"))
            found[task.name] = result.metrics()
        return found


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt; text streams to the terminal."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    prompt: str = ""
    """What to continue."""
    max_new_tokens: int = 40
    """How many tokens at the most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with this probability (nucleus)."""
    seed: int = 0
    """Seed of the sampling."""
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.pipeline import load_any
        from chai_jax.serve.generate import stream

        model = load_any(self.model)
        pieces: list[str] = []
        for piece in stream(
            model, self.prompt, self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed
        ):
            # The prompt comes with the first piece: bad input is found out before anything is printed.
            print(piece if pieces else self.prompt + piece, end="", flush=True)
            pieces.append(piece)
        print()
        return {"prompt": self.prompt, "completion": "".join(pieces)}


@dataclass(frozen=True)
class ExportCommand:
    """Write a model as an ordinary OPT in Hugging Face layout, which torch loads; clustered heads are expanded."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    out: Positional[Path]
    """A new folder."""

    def run(self) -> Any:
        from chai_jax.compress.expand import expand
        from chai_jax.files.atomic import claim_folder
        from chai_jax.files.hf import export
        from chai_jax.pipeline import load_any

        claim_folder(self.out)
        model = load_any(self.model)
        export(expand(model), self.out)
        return {"out": str(self.out), "files": sorted(path.name for path in self.out.iterdir())}


@dataclass(frozen=True)
class VerifyCommand:
    """Compare two models: the largest logit difference and the KL of their next-token distributions."""

    first: Positional[str]
    """Hub id, folder, or `toy`."""
    second: Positional[str]
    """Likewise."""

    def run(self) -> Any:
        from chai_jax.measure.verify import verify
        from chai_jax.pipeline import load_any

        return verify(load_any(self.first), load_any(self.second))


@dataclass(frozen=True)
class AotCommand:
    """Compile a job for a TPU that is not here: memory against its limit, and the least time it can take."""

    model: Positional[str]
    """facebook/opt-{125m,350m,1.3b,2.7b,6.7b,13b}, or a folder with a config.json; no weights are read."""
    topology: str = "v3:2x2"
    """The slice: v3:2x2 (a v3-8), v5e:2x4, v6e:2x4, v4:2x2x1, ..."""
    job: Literal["distil", "finetune", "target", "prefill", "decode", "score"] = "distil"
    """What is compiled: one update, one prefill, one token of decoding, or one batch of scores."""
    batch: int = 128
    """Sequences; examples per update."""
    seq: int = 64
    """Tokens of a sequence; for decode, the room in the cache."""
    targets: int = 1
    """Predicted tokens of a training example: 1 for tasks, SEQ for text."""
    accumulation: int = 8
    """Microbatches of an update."""
    mesh: str | None = None
    """DATAxMODEL, such as 4x2 (default: all devices along data)."""
    fsdp: bool = False
    """Split weights and optimizer state over the data axis too."""
    plan: Path | None = None
    """The plan.json of a compressed model."""
    share: Literal["qk", "qkv"] | None = None
    """Without a plan: cluster every layer alike, sharing this."""
    clusters: float = 0.5
    """With --share: clusters of a layer, as a fraction of its heads."""
    storage: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Without a plan: format of the whole cache."""
    weights: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of the weights as loaded (facebook/opt-*: float16)."""
    cached: bool = False
    """Distil with the teacher's log-probabilities cached: no teacher is resident."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of AdamW's first moment."""
    remat: bool = False
    """Compute each layer again in the backward pass."""
    largest_batch: bool = False
    """Find the largest batch that fits, beginning with BATCH."""

    def run(self) -> Any:
        os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, which would look for the TPU that libtpu is for
        from chai_jax.measure.aot import find_largest_batch, measure, report
        from chai_jax.measure.programs import Job, Shapes, config_of, spec_of
        from chai_jax.measure.tpu import mesh_of, topology
        from chai_jax.model.sharding import Layout
        from chai_jax.pipeline import print_table
        from chai_jax.plans import Plan

        config, plan = config_of(self.model), Plan.read(self.plan) if self.plan else None
        spec = spec_of(config, plan, self.share, self.clusters, self.storage)
        shapes = Shapes(config, spec, Layout(mesh_of(topology(self.topology), self.mesh), self.fsdp))
        sizes = self.batch, self.seq, self.targets, self.accumulation
        job = Job(self.job, *sizes, self.weights, self.cached, self.moments, self.remat)
        given = {"model": self.model, "topology": self.topology, "fsdp": self.fsdp}
        if not self.largest_batch:
            record = measure(job, shapes, plan)
            print_table(report(record))
            return given | record
        found = find_largest_batch(job, shapes, plan, tell=lambda line: console.print(line, highlight=False))
        for record in (found["fitting"], found["failing"]):
            if record is not None:
                print_table(report(record))
        return given | found


@dataclass(frozen=True)
class EnvCommand:
    """Print versions, devices and what this machine computes in."""

    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.environment import environment

        return environment()


def run_job(config: RunConfig) -> Any:
    """The main job. While it trains SIGTERM lets the update under way end; at other times there is nothing to save."""
    from chai_jax.pipeline import run

    def stop(number: int, frame: FrameType | None) -> None:
        console.print("stopped (SIGTERM); the same command goes on from there")
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return run(config)
    finally:
        signal.signal(signal.SIGTERM, before)


Command = (
    Annotated[RunConfig, subcommand("run")]
    | Annotated[PlanCommand, subcommand("plan")]
    | Annotated[ExplainCommand, subcommand("explain")]
    | Annotated[EvaluateCommand, subcommand("evaluate")]
    | Annotated[GenerateCommand, subcommand("generate")]
    | Annotated[VerifyCommand, subcommand("verify")]
    | Annotated[ExportCommand, subcommand("export")]
    | Annotated[AotCommand, subcommand("aot")]
    | Annotated[EnvCommand, subcommand("env")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its result is the last line of stdout. Returns the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command: Any = tyro.cli(
        OmitArgPrefixes[Command],  # type: ignore[misc]
        args=argv,
        prog="chai-jax",
        description="Make an OPT language model cheaper to serve: cluster, distil, quantize, tune, and measure.",
    )
    try:
        if hasattr(command, "devices"):
            from chai_jax.devices import start

            start(command.devices)
        result = run_job(command) if isinstance(command, RunConfig) else command.run()
    except InputError as error:
        console.quiet = False  # as it is in all processes but the first
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        console.print(f"error: {error}; make room and repeat the command", style="red", markup=False, soft_wrap=True)
        return 2
    except Stopped:
        return EXIT_STOPPED
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from the last checkpoint", markup=False)
        return 130
    try:
        print(json.dumps(result), flush=True)
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
