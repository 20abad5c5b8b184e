"""The one exception a person is meant to read."""


class InputError(ValueError):
    """Something given to chai_jax cannot be used.

    The message is one line: what was wrong, what was expected, what to do. The command line prints it and exits
    with status 2; from Python it is an ordinary `ValueError`.
    """
