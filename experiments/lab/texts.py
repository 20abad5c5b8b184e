"""Texts on disk: as documents, and as what plans are made on."""

import json
from pathlib import Path

from chai_jax.analyse.probe import Probe, probe
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.model.model import Model

CALIBRATION, PROBED = 16, 512  # windows, and tokens of each


def calibrated(model: Model, text: Path) -> Probe:
    """The beginning of a calibration text, as plans want it."""
    length = min(PROBED, model.config.max_positions)
    cut = windows(model.tokenizer, read_text_file(text), length)[:CALIBRATION]
    return probe(model, [window.tokens for window in cut], window=length)


def documents(path: Path) -> list[str]:
    """The documents of a file: one a line of .jsonl (its field `text`), else the file is one; gzipped or not.

    Raises:
        InputError: it cannot be read, or a line is no object with a text.
    """
    text = read_text_file(path)
    if ".jsonl" not in path.name:
        return [text]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(str(json.loads(line)["text"]))
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(f'{path}:{number} is no JSON object with a field "text": mend the line') from None
    return found
