"""`chai-jax`: one thin subcommand per thing a person does.

Results go to stdout (the last line is one JSON object), progress and messages to stderr. Bad input gives one line on
stderr and exit status 2. A run that stopped and can be resumed exits with status 75.
"""

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from chai_jax.commands.bench import BenchCommand
from chai_jax.commands.harness import LmEvalCommand
from chai_jax.commands.load import BenchServeCommand
from chai_jax.commands.machines import AotCommand, EnvCommand
from chai_jax.commands.models import EvaluateCommand, ExportCommand, GenerateCommand, VerifyCommand
from chai_jax.commands.options import one_of, read
from chai_jax.commands.planning import ExplainCommand, PlanCommand
from chai_jax.commands.reports import ReportCommand
from chai_jax.commands.run import RunCommand
from chai_jax.commands.serving import ServeCommand
from chai_jax.commands.streams import Replacing, adapt_to_terminal, complain, finish_stdout, nobody_reads
from chai_jax.console import console
from chai_jax.errors import EXIT_STOPPED, InputError, Stopped
from chai_jax.files.atomic import finite

COMMANDS = {
    "run": RunCommand,
    "plan": PlanCommand,
    "explain": ExplainCommand,
    "evaluate": EvaluateCommand,
    "generate": GenerateCommand,
    "serve": ServeCommand,
    "bench": BenchCommand,
    "bench-serve": BenchServeCommand,
    "verify": VerifyCommand,
    "export": ExportCommand,
    "lm-eval": LmEvalCommand,
    "report": ReportCommand,
    "aot": AotCommand,
    "env": EnvCommand,
}
ABOUT = "Make a language model cheaper to serve: cluster, distil, quantize, tune, and measure."


def parse(argv: Sequence[str]) -> Any:
    """The command that `argv` asks for. What is no option of `lm-eval` goes to the harness, whose parser judges it.

    Raises:
        InputError, SystemExit: as `chai_jax.commands.options.read`.
    """
    asked: dict[str, Any] = {"prog": "chai-jax", "description": ABOUT}
    if list(argv[:1]) != ["lm-eval"]:
        # Tyro's usage line has all names in one word, which a terminal cannot break. They are listed below it.
        with redirect_stdout(Replacing(sys.stdout, f"{{{','.join(COMMANDS)}}}", "COMMAND ...")):
            return read(one_of(COMMANDS), argv, **asked)
    command, unknown = read(one_of(COMMANDS), argv, unknown=True, **asked)
    return dataclasses.replace(command, arguments=tuple(unknown))


def perform(command: Any) -> None:
    """Run a parsed command and print its result, the last line of stdout."""
    print(json.dumps(finite(command.run())), flush=True)


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
        resumable = isinstance(command, RunCommand)
        console.print("stopped" + ": the same command goes on from the last checkpoint" * resumable)
        return 130
    finally:
        finish_stdout()
    return 0


if __name__ == "__main__":
    sys.exit(main())
