"""`chai-jax`: one thin subcommand per thing a person does.

Results go to stdout (the last line is one JSON object), progress and messages to stderr. Bad input gives one line on
stderr and exit status 2; a run that stopped to be gone on with later exits with status 75.
"""

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from chai_jax.commands.bench import BenchCommand
from chai_jax.commands.harness import LmEvalCommand
from chai_jax.commands.machines import AotCommand, EnvCommand
from chai_jax.commands.models import EvaluateCommand, ExportCommand, GenerateCommand, VerifyCommand
from chai_jax.commands.planning import ExplainCommand, PlanCommand
from chai_jax.commands.reports import ReportCommand
from chai_jax.config import RunConfig
from chai_jax.console import adapt_to_terminal, complain, console, finish_stdout, nobody_reads
from chai_jax.errors import EXIT_STOPPED, InputError, Stopped
from chai_jax.files.atomic import finite
from chai_jax.inputs.paths import user_path
from chai_jax.stopping import listening


def run_job(config: RunConfig) -> Any:
    """The main job, which SIGTERM stops at its next safe point: while it trains, with the state saved."""
    from chai_jax.run.devices import start

    execution = start(config.devices)
    with listening():
        from chai_jax.run.pipeline import run

        return run(config, execution)


Command = (
    Annotated[RunConfig, subcommand("run")]
    | Annotated[PlanCommand, subcommand("plan")]
    | Annotated[ExplainCommand, subcommand("explain")]
    | Annotated[EvaluateCommand, subcommand("evaluate")]
    | Annotated[GenerateCommand, subcommand("generate")]
    | Annotated[BenchCommand, subcommand("bench")]
    | Annotated[VerifyCommand, subcommand("verify")]
    | Annotated[ExportCommand, subcommand("export")]
    | Annotated[LmEvalCommand, subcommand("lm-eval")]
    | Annotated[ReportCommand, subcommand("report")]
    | Annotated[AotCommand, subcommand("aot")]
    | Annotated[EnvCommand, subcommand("env")]
)


class Refused(Exception):
    """Carries an InputError through tyro, which frames ValueErrors in boxes."""


PATHS = ConstructorRegistry()


@PATHS.primitive_rule
def path_option(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """How every option that is a path is read."""

    def read(words: list[str]) -> Path:
        try:
            return user_path(words[0])
        except InputError as error:
            raise Refused(error) from None

    if kind.type is not Path:
        return None
    return PrimitiveConstructorSpec(1, "PATH", read, lambda value: isinstance(value, Path), lambda path: [str(path)])


def parse(argv: Sequence[str]) -> Any:
    """The command that `argv` asks for. What is no option of `lm-eval` goes to the harness, whose parser judges it.

    Raises:
        InputError: a path that cannot be.
        SystemExit: an option or a value that is not known, status 2, or `--help`.
    """
    commands: Any = OmitArgPrefixes[Command]  # type: ignore[misc]
    program: dict[str, Any] = {
        "prog": "chai-jax",
        "description": "Make an OPT language model cheaper to serve: cluster, distil, quantize, tune, and measure.",
        "registry": PATHS,
    }
    try:
        if list(argv[:1]) != ["lm-eval"]:
            return tyro.cli(commands, args=argv, **program)
        command, unknown = tyro.cli(commands, args=argv, return_unknown_args=True, **program)
        return dataclasses.replace(command, arguments=tuple(unknown))
    except Refused as error:
        raise error.args[0] from None


def perform(command: Any) -> None:
    """Run a parsed command and print its result, the last line of stdout."""
    result = run_job(command) if isinstance(command, RunConfig) else command.run()
    print(json.dumps(finite(result)), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its result is the last line of stdout. Returns the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    adapt_to_terminal()
    command = None
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        perform(command)
    except InputError as error:
        complain(str(error))
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return 0
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        complain(f"{error}; {'make room' if full else 'mend that'} and repeat the command")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        complain(f"there is not enough memory ({str(error)[:200]}); ask for less at once, or for a smaller model")
        return 2
    except Stopped:
        return EXIT_STOPPED
    except KeyboardInterrupt:
        resumable = isinstance(command, RunConfig)
        console.print("stopped" + ": the same command goes on from the last checkpoint" * resumable)
        return 130
    finally:
        finish_stdout()
    return 0


if __name__ == "__main__":
    sys.exit(main())
