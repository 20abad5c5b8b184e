"""Writing an ordinary model as a Hugging Face folder, which torch's class of its family reads with equal logits.

Every folder, ordinary or not, says in generation_config.json how texts are made. That file is read and written here
too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chai_jax.console import console
from chai_jax.errors import InputError
from chai_jax.files.atomic import claim_folder, new_folder, write_json
from chai_jax.files.card import write_card
from chai_jax.files.convert import to_hf
from chai_jax.files.families.family import SPECIAL_TOKENS
from chai_jax.files.families.registry import family_of
from chai_jax.files.weights import MAX_SHARD_BYTES, write_weights
from chai_jax.inputs.reading import read_json, shown
from chai_jax.model.generation import NOT_OBEYED, OBEYED, Generation
from chai_jax.model.model import Model

GENERATION = "generation_config.json"


def export(model: Model, out: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a dense model as the Hugging Face folder `out`: configuration, safetensors, tokenizer, model card.

    Quantized weights are written as the float32 numbers they stand for; all others keep their dtype. Cache formats are
    no part of such a folder: `chai_jax.save` keeps them.

    Args:
        out: a new or empty folder.
        max_shard_bytes: weights of more bytes are split into shards with an index.

    Raises:
        InputError: the model is clustered (make it dense with `chai_jax.expand` first); `out` is taken or not writable.
    """
    if not model.spec.is_dense:
        name = family_of(model.config).name
        raise InputError(f"the model is clustered, which no ordinary {name} is; expected a dense one: expand it first")
    with new_folder(claim_folder(Path(out))) as folder:
        write_ordinary(folder, model, max_shard_bytes)
        write_generation(folder, model)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(str(folder))
        write_card(folder, model, exported=True)


def write_ordinary(folder: Path, model: Model, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json and the weights as transformers reads them."""
    family = family_of(model.config)
    tensors = to_hf(model.config, model.params)
    dtypes = {stored.dtype for stored in tensors.values()}
    fields: dict[str, Any] = {
        "architectures": [family.torch_class],
        "model_type": family.model_type,
        # transformers casts all weights to one dtype; float32 holds every other.
        "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
        **family.config_fields(model.config),
    }
    write_json(folder / "config.json", fields)
    write_weights(folder, tensors, {"format": "pt"}, max_shard_bytes)


def read_generation(folder: Path, fields: Mapping[str, Any]) -> Generation:
    """How the folder's texts are made: its generation_config.json or, without that file, what config.json says.

    As in transformers, config.json has no say where the file exists, even if the file names no end of text.

    Args:
        fields: of config.json.

    Raises:
        InputError: the file is no JSON object, or a field that is obeyed is of the wrong type.
    """
    path = folder / GENERATION
    if path.exists():
        given = read_json(path)
    else:
        path, names = folder / "config.json", (*SPECIAL_TOKENS, *OBEYED, *NOT_OBEYED)
        given = {"_from_model_config": True, **{name: fields[name] for name in names if name in fields}}
    generation = Generation.checked(given, shown(path))
    if ignored := ", ".join(f"{name} {value!r:.40}" for name, value in generation.not_obeyed.items()):
        console.print(f"{shown(path)} asks for {ignored}, which is not done here: texts may differ", markup=False)
    return generation


def write_generation(folder: Path, model: Model) -> None:
    """Write generation_config.json: as it was read, or from the configuration of a model that has none."""
    ids = {name: getattr(model.config, name) for name in SPECIAL_TOKENS}
    own = model.generation and dict(model.generation.fields)
    write_json(folder / GENERATION, {"_from_model_config": True, **ids} if own is None else own)
