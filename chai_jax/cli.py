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
from types import FrameType
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, subcommand

from chai_jax.commands.machines import AotCommand, EnvCommand
from chai_jax.commands.models import EvaluateCommand, ExportCommand, GenerateCommand, VerifyCommand
from chai_jax.commands.planning import ExplainCommand, PlanCommand
from chai_jax.commands.reports import ReportCommand
from chai_jax.config import RunConfig
from chai_jax.errors import EXIT_STOPPED, InputError, Stopped
from chai_jax.progress import console


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
    | Annotated[ReportCommand, subcommand("report")]
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
