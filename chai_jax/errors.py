"""What ends a run early: bad input, or a stop that was asked for."""

EXIT_STOPPED = 75  # sysexits.h's EX_TEMPFAIL: try again


class InputError(ValueError):
    """Something given to chai_jax cannot be used.

    The message is one line: what was wrong, what was expected, what to do. The command line prints it and exits
    with status 2; from Python it is an ordinary `ValueError`.
    """


class Stopped(SystemExit):
    """A job stopped before its end, on SIGTERM or because its time was up; what its training had reached is saved.

    The same command, or the same call with the same `checkpoints`, goes on from there. Uncaught it ends the program
    with status 75.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)
