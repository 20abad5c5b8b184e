"""A finished run as its folder holds it: what was asked for, what came out, and what to be careful with."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from chai_jax.analyse.explain import cache_fraction
from chai_jax.analyse.gate import Gate
from chai_jax.config import RunConfig
from chai_jax.data.multiple_choice import TASK_FILE, TASK_SHA256
from chai_jax.errors import InputError
from chai_jax.files.lock import LOCK, holder
from chai_jax.files.published import architecture_of
from chai_jax.inputs.reading import Record, parse_json, read_json, read_text, reason, shown
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import Plan
from chai_jax.report.tables import percent
from chai_jax.sources import source_of

NEEDED = ("stage", "task", "metrics", "kv_bytes_per_token", "kv_reduction", "model_bytes", "latency")


@dataclass(frozen=True)
class SavedRun:
    """What a report is written from.

    Attributes:
        config: `config.json`.
        plan: `plan.json`.
        shape: of the model; None where `model/` is gone, and with it the bytes of each layer.
        records: `results.json`, the dense model first.
        updates: `metrics.jsonl`, one record per update; empty where nothing was trained.
    """

    path: Path
    config: Record
    plan: Plan
    shape: Architecture | None
    records: list[Record]
    updates: list[Record]

    @classmethod
    def read(cls, path: Path) -> "SavedRun":
        """Read a run folder.

        Raises:
            InputError: it is no run, or one that is not finished, or what it holds cannot be used.
        """
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is no run folder (no config.json); expected what chai-jax run wrote: check it")
        if not (path / "results.json").is_file():
            at_work = holder(path / LOCK)
            advice = "repeat its command first" if at_work is None else f"wait for {at_work}, which is at it"
            raise InputError(f"the run in {shown(path)} is not finished (no results.json): {advice}")
        config, model = read_json(path / "config.json"), path / "model"
        shape = architecture_of(str(model)) if (model / "config.json").is_file() else None
        plan = Plan.read(path / "plan.json")
        if shape is not None:
            plan.check_model(shape)
        return cls(path, config, plan, shape, read_records(path / "results.json"), _updates(path / "metrics.jsonl"))

    @property
    def name(self) -> str:
        """What was compressed, and on what."""
        return f"{self.config.get('model')} on {self.records[0]['task']}"

    @property
    def scored_on(self) -> str:
        """How many examples or tokens of what the scores are from."""
        first = self.records[0]
        unit = "validation examples" if "acc" in first["metrics"] else "tokens"
        file = Path(str(first.get(TASK_FILE, ""))).name
        described = f" ({file}, SHA-256 {first.get(TASK_SHA256)!s:.12}...)" if file else ""
        return f"n = {first['metrics']['n']:,} {unit} of {first['task']}{described}"

    @property
    def measured_on(self) -> str:
        """Device, dtype and seed."""
        first = self.records[0]
        return f"{first.get('device')}, {first.get('compute_dtype')}, seed {first.get('seed')}"

    @property
    def command(self) -> str:
        """The command that gives this run again, in any other folder."""
        asked = _flat(self.config)
        asked.pop(TASK_SHA256, None)  # a record of what the option named, not an option
        usual = _flat(_usual(str(asked.pop("model", RunConfig.model))))
        words = ["chai-jax", "run", str(self.config.get("model", RunConfig.model))]
        for name, value in asked.items():
            if value != usual.get(name):
                option = name.replace("_", "-")
                words += [f"--{'no-' * (value is False)}{option}", *([] if isinstance(value, bool) else [str(value)])]
        return shlex.join(words)

    @property
    def concerns(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        said = [line for record in self.records for line in _concerns_of(record, self.config)]
        if self.config.get("limit") is not None:
            said.append(f"Only the first {self.config['limit']:,} validation examples were scored (--limit).")
        budget = self.config.get("planning", {}).get("kv_budget")
        if budget is not None and self.shape is not None:
            reached = cache_fraction(self.plan, self.shape)
            if reached > budget:
                said.append(f"The plan takes {percent(reached)} of the dense cache; its budget was {percent(budget)}.")
        return said


def _concerns_of(record: Record, config: Record) -> list[str]:
    said, stage, metrics = [], record["stage"], record["metrics"]
    if metrics.get("at_chance"):
        said.append(
            f"At {stage} the model is not two standard errors above the majority ({percent(metrics['majority'])})."
            + (" As a teacher and a baseline it makes every later number meaningless." if stage == "dense" else "")
        )
    gate, limit = record.get("gate"), config.get("gate")
    if gate and limit is not None and gate["kl"] > limit:
        said.append(f"{stage.capitalize()} {Gate(**gate).explain(limit)}.")
    formula = record.get("kv_bytes_per_token_formula", record["kv_bytes_per_token"])
    if formula != record["kv_bytes_per_token"]:
        said.append(f"At {stage} the cache takes {record['kv_bytes_per_token']:,} B/token, by formula {formula:,}.")
    return said


def read_records(path: Path) -> list[Record]:
    """The stages of a run's `results.json`.

    Raises:
        InputError: it cannot be read, is torn, or is no list of stages.
    """
    advice = "expected what a run writes: delete it and repeat the run's command, which writes it again"
    try:
        records = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {shown(path)} ({reason(error)}); {advice}") from None
    if not isinstance(records, list) or not records:
        raise InputError(f"{shown(path)} holds no list of stages; {advice}")
    for record in records:
        missing = [name for name in NEEDED if not isinstance(record, dict) or name not in record]
        if missing:
            raise InputError(f"a stage in {shown(path)} has no {missing[0]!r}; {advice}")
    return records


def _updates(path: Path) -> list[Record]:
    """The lines of metrics.jsonl that are whole; a run that was killed may have left half a one."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            found.append(parse_json(line.decode()))
        except ValueError:
            continue
    return [one for one in found if isinstance(one, dict) and {"run_stage", "step", "loss"} <= one.keys()]


def _usual(model: str) -> Record:
    usual = RunConfig(model)
    return dataclasses.asdict(dataclasses.replace(usual, planning=usual.planning.filled(source_of(model).planning)))


def _flat(config: Record) -> Record:
    """Settings by their names on the command line: those of a group have no prefix there."""
    flat: Record = {}
    for name, value in config.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat
