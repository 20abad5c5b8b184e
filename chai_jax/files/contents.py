"""What a place holds of a model, whatever kind of place it is: a folder, or a GGUF file."""

from pathlib import Path
from typing import Any

from chai_jax.errors import InputError
from chai_jax.files.export import read_generation
from chai_jax.files.gguf.model import Gguf, is_gguf
from chai_jax.files.stored import Stored
from chai_jax.files.tokenizer import load_tokenizer
from chai_jax.files.weights import open_weights
from chai_jax.inputs.reading import Record, read_json
from chai_jax.model.generation import Generation
from chai_jax.plans.architecture import Architecture


class Folder:
    """A folder in Hugging Face's layout, or one of ours; see `Gguf` for what the attributes and methods mean."""

    def __init__(self, path: Path) -> None:
        if not (path / "config.json").is_file():
            file = next(iter(sorted(path.glob("*.gguf"))), None)
            advice = "check the path" if file is None else f"give the file in it, {file.name:.100}"
            raise InputError(f"{path} has no config.json; expected a model folder: {advice}")
        self.path, self.where = path, str(path / "config.json")
        self.fields: Record = read_json(path / "config.json")
        if "model_type" not in self.fields and (path / "model" / "config.json").is_file():
            raise InputError(f"{path} is the folder of a run; expected a model: give {path / 'model'}")

    def weights(self) -> dict[str, Stored]:
        return open_weights(self.path)

    def generation(self) -> Generation:
        return read_generation(self.path, self.fields)

    def tokenizer(self, config: Architecture) -> Any:
        return load_tokenizer(self.path, config)


def open_contents(path: Path) -> Folder | Gguf:
    """What is at a path that `resolve` gave.

    Raises:
        InputError: it is no folder with a config.json, and no GGUF file that can be read.
    """
    return Gguf(path) if is_gguf(path) else Folder(path)
