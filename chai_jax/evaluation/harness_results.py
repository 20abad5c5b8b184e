"""The files that the lm-evaluation-harness writes: where they go, and which they were."""

from pathlib import Path
from typing import Any

from chai_jax.errors import InputError


def results_folder(output_path: str) -> Path:
    """The folder under which the harness writes, given a folder or the name of a JSON file."""
    path = Path(output_path)
    return path.parent if path.suffix == ".json" else path


def written_files(tracker: Any) -> list[str]:
    """The files that the harness's tracker has just saved; it only warns where it could not.

    Raises:
        InputError: there are none.
    """
    if not tracker.output_path:
        return []
    files = sorted(results_folder(tracker.output_path).rglob(f"*_{tracker.date_id}.json*"))
    if not files:
        raise InputError(f"the results could not be written to {tracker.output_path}: see lm-eval's messages above")
    return [str(file) for file in files]
