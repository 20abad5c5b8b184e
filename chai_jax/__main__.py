"""`python -m chai_jax`, and the program `chai-jax`: the command line, which may be stopped from its first import on."""

import sys
from contextlib import nullcontext

from chai_jax.stopping import listening


def main() -> int:
    """Run one command; see `chai_jax.cli.main`. Returns the exit status."""
    try:
        with listening() if sys.argv[1:2] == ["run"] else nullcontext():
            from chai_jax.cli import main as command_line  # takes seconds

            return command_line()
    except KeyboardInterrupt:  # before the command began, or after it ended
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
