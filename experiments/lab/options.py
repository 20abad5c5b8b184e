"""The options that all experiments have, and how an experiment is started from the command line."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from tyro.conf import Positional, arg

from chai_jax.commands.options import OutFolder, read
from chai_jax.commands.streams import complain
from chai_jax.config import PlanConfig, RunConfig, TrainOverrides
from chai_jax.console import console
from chai_jax.data.tasks import TASKS
from chai_jax.errors import InputError
from chai_jax.run.options import parse_list
from chai_jax.sources import source_of

Record = dict[str, Any]


@dataclass(frozen=True)
class Common:
    """What every experiment is done with."""

    model: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL ...")]
    """Hub ids or folders of dense models. Each gets its rows."""
    data_dir: Path | None = None
    """Folder with TASK/train.jsonl and TASK/validation.jsonl, or .jsonl.gz (default: the Hugging Face hub)."""
    seeds: Annotated[str, arg(metavar="SEED,...")] = "0,1,2"
    """Seeds of splits, clusterings and shuffles."""
    out: OutFolder = Path("runs/experiments")
    """Folder of the tables. What they are made from is kept under tree/ and shared by all experiments."""

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds, each once."""
        return parse_seeds(self.seeds)

    @property
    def command(self) -> str:
        """The command line as anyone can repeat it: models and data by variable, other paths by name."""
        public = {path: "$MODEL" if len(self.model) == 1 else f"$MODEL{at}" for at, path in enumerate(self.model, 1)}
        return command_line({**public, str(self.data_dir): "$DATA"})


@dataclass(frozen=True)
class Options(Common):
    """What an experiment over tasks is done with; planning and training options are those of `chai-jax run`."""

    task: Annotated[str, arg(metavar="TASK,...")] = "sst2"
    """Tasks: sst2, rte, piqa."""
    limit: int | None = None
    """Score only the first N validation examples."""
    finetune: Literal["auto", "always", "never"] = "auto"
    """Tune the dense model on the task first: `auto` does if it is at chance."""
    storage: Literal["bfloat16", "float32"] = "bfloat16"
    """Cache format of layers that are not quantized."""
    checkpoint_minutes: float | None = None
    """Save the state of training after this many minutes. Without it a stage that was stopped begins again."""
    planning: PlanConfig = field(default_factory=PlanConfig)
    train: TrainOverrides = field(default_factory=TrainOverrides)

    @property
    def tasks(self) -> tuple[str, ...]:
        return parse_list("--task", self.task, tuple(TASKS))

    def run_config(self, model: str, task: str, seed: int) -> RunConfig:
        """The run of `chai-jax run` that these options would start."""
        names = ("data_dir", "limit", "finetune", "storage", "train")
        shared = {name: getattr(self, name) for name in names}
        return RunConfig(model, task, seed=seed, planning=self.planning.filled(source_of(model).planning), **shared)


def command_line(public: Mapping[str, str]) -> str:
    """This program's command line, some of its words replaced; of other absolute paths the last part alone."""
    words = [public.get(word, Path(word).name if word.startswith("/") else word) for word in sys.argv[1:]]
    words = [f'"{word}"' if " " in word else word or "''" for word in words]
    return " ".join(["python", f"experiments/{Path(sys.argv[0]).name}", *words])


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds that `--seeds` names, each once.

    Raises:
        InputError: none, or something that is no whole number from 0.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not all(name.isdecimal() for name in names):
        raise InputError(f"--seeds is {text!r}; expected whole numbers with commas: 0,1,2")
    return tuple(dict.fromkeys(map(int, names)))


def start(experiment: Callable[[Any], Record], kind: type[Any], about: str | None) -> None:
    """Parse the command line, run the experiment, and end the program: its result is the last line of stdout."""
    try:
        options = read(kind, None, description=about)
        if not options.model:
            raise InputError("no MODEL is given; expected one or more hub ids or folders of dense models")
        # Stages of one shape recur from seed to seed and script to script: their programs are compiled once.
        jax.config.update("jax_compilation_cache_dir", str((options.out / "programs").absolute()))
        print(json.dumps(experiment(options)))
    except InputError as error:
        complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from the last finished piece")
        sys.exit(130)
    sys.exit(0)
