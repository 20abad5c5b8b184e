"""Where records of training go besides metrics.jsonl: TensorBoard and Weights & Biases, if asked for.

Both may fail at any time: the library may be missing, or the account, or the network. The first failure is reported,
and training goes on without that log.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from chai_jax.adapt.train import Log
from chai_jax.console import console
from chai_jax.inputs.reading import Record


def scalars(record: Record) -> dict[str, float]:
    """What can be drawn over the steps."""
    return {name: value for name, value in record.items() if isinstance(value, float)}


def tensorboard(folder: Path, stage: str) -> Callable[[Record], Log]:
    """Event files under `folder`/`stage`. Steps of an interrupted attempt are hidden, from the first record's on."""

    def begin(first: Record) -> Log:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(folder / stage), purge_step=first["step"])

        def log(record: Record) -> None:
            for name, value in scalars(record).items():
                writer.add_scalar(name, value, record["step"])
            writer.flush()

        return log

    return begin


def wandb(project: str, folder: Path, config: Record, stage: str) -> Callable[[Record], Log]:
    """One run of `project` for the run folder, continued when the run is. Each stage has curves over its own steps."""

    def begin(first: Record) -> Log:
        import wandb

        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        run = wandb.run or wandb.init(
            project=project,
            dir=str(folder),
            id=name,
            name=folder.name,
            config=config,
            resume="allow",
            # Nobody is asked for an account: without one the records stay in the folder, for `wandb sync` to send.
            mode=None if wandb.login(prompt=False) else "offline",
        )
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

        def log(record: Record) -> None:
            values = scalars(record) | {"step": record["step"]}
            run.log({f"{stage}/{key}": value for key, value in values.items()})

        return log

    return begin


def harmless(name: str, begin: Callable[[Record], Log]) -> Log:
    """A log that begins at its first record and, should anything fail, warns once and then does nothing."""
    log: Log | None = None
    failed = False

    def careful(record: Record) -> None:
        nonlocal log, failed
        if failed:
            return
        try:
            if log is None:
                log = begin(record)
            log(record)
        except (Exception, SystemExit) as error:
            failed = True
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            console.print(f"warning: nothing more goes to {name} ({reason})", markup=False, highlight=False)

    return careful


def together(logs: Sequence[Log]) -> Log:
    """Every record to every log."""

    def log(record: Record) -> None:
        for each in logs:
            each(record)

    return log
