"""Paths as people write them: `~` is expanded, and what no file system takes is refused."""

from pathlib import Path

from chai_jax.errors import InputError
from chai_jax.inputs.reading import reason, shown


def user_path(given: str | Path) -> Path:
    """The path that a person gave, with `~` and `~user` expanded; there need not be anything.

    Raises:
        InputError: it is empty, too long, not UTF-8, goes in circles or through a folder that is closed to this user,
            or begins with the `~` of a user who is not known.
    """
    if not str(given):
        raise InputError("a path is empty; expected the name of a file or a folder: leave the option out, or name one")
    try:
        path = Path(given).expanduser()
        str(path).encode()  # tokenizers and safetensors take no other names
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except UnicodeEncodeError:
        raise InputError(
            f"the path {shown(given)} is not UTF-8; expected such a name: rename it, or make a link to it"
        ) from None
    except RuntimeError:
        raise InputError(f"{shown(given)} begins with a user who is not known here; expected ~ or a path") from None
    except (OSError, ValueError) as error:  # a ValueError for a null character
        raise InputError(f"{shown(given)} is no path that can be used ({reason(error)}); expected another") from None
    return path
