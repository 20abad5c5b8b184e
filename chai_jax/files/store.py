"""Models as files: `load` reads a Hugging Face folder, one of ours or a GGUF file, `save` writes a folder of ours."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from chai_jax.errors import InputError
from chai_jax.files import compressed
from chai_jax.files.atomic import claim_folder, new_folder, write_json
from chai_jax.files.card import write_card
from chai_jax.files.contents import Folder, open_contents
from chai_jax.files.convert import flatten, to_params
from chai_jax.files.export import write_generation, write_ordinary
from chai_jax.files.families.family import Family
from chai_jax.files.families.registry import family_of, find_family
from chai_jax.files.gguf.model import Gguf
from chai_jax.files.hub import resolve
from chai_jax.files.stored import FLOATS
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.quantized import is_leaf
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import STORAGES
from chai_jax.plans.plan import Plan
from chai_jax.plans.spec import Spec


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: Any = None,
    storage: str | None = None,
    tokenizer: bool = True,
    execution: Execution | None = None,
) -> Model:
    """Load a model from a folder (a Hugging Face one, or one that `save` wrote), a GGUF file or the Hugging Face hub.

    Weights are read one at a time from safetensors, a Flax msgpack or a PyTorch .bin, whichever is there first in this
    order, whole or in shards; the last by a reader that runs nothing of it. Weights keep their dtype, but float64 and
    the few bits of a GGUF file become float32.

    Args:
        source: folder, .gguf file or hub id.
        revision: branch, tag or commit of a hub id.
        dtype: float32, bfloat16 or float16, to cast the weights of an ordinary model to.
        storage: cache format of an ordinary model: one of `STORAGES`; float32, if not said otherwise.
        tokenizer: whether to load the tokenizer too; a folder without one gives None.
        execution: how the model is run: dtype, devices and kernels; as suits the devices here, if not given.

    Raises:
        InputError: no such model; one of an unknown family; files that are missing, cut, tampered with, or at odds with
            one another; weights that are not finite; `dtype` or `storage` for a compressed model, whose formats are its
            own.
    """
    if storage is not None and storage not in STORAGES:
        raise InputError(f"storage {storage!r} is unknown; expected one of {', '.join(STORAGES)}")
    wanted = None if dtype is None else _dtype_name(dtype)
    folder = resolve(source, revision)
    contents = open_contents(folder)
    family, ordinary = _read_kind(folder, contents)
    if not ordinary and (wanted or storage):
        raise InputError(
            f"{folder} holds a compressed model, which keeps the formats it was saved in: leave out dtype and storage"
        )
    config = family.parse_config(contents.fields, contents.where)
    spec, quantized = _read_spec(folder, config, ordinary, storage)
    if wanted:
        spec = Spec(tuple(dataclasses.replace(layer, weights="loaded") for layer in spec.layers))
    plan = Plan.read(folder / "plan.json") if (folder / "plan.json").is_file() else None
    if plan is not None:
        plan.check_model(config)
    tensors = contents.weights()
    params = (
        to_params(config, tensors, wanted) if ordinary else compressed.read_params(config, spec, tensors, quantized)
    )
    compressed.check_formats(spec, params)
    generation, words = contents.generation(), contents.tokenizer(config) if tokenizer else None
    return Model(config, spec, params, words, str(source), plan, generation, execution)


def read_architecture(source: str | Path, revision: str | None = None) -> Architecture:
    """The shape of the model that `load` would read, from its config.json or metadata alone.

    Raises:
        InputError: as `load`, of that file.
    """
    folder = resolve(source, revision)
    contents = open_contents(folder)
    family, _ = _read_kind(folder, contents)
    return family.parse_config(contents.fields, contents.where)


def _read_kind(folder: Path, contents: Folder | Gguf) -> tuple[Family, bool]:
    """The model's family, and whether it is an ordinary model (or else a compressed one)."""
    family, ordinary = find_family(contents.fields.get("model_type"), folder)
    if ordinary and contents.fields.get("quantization_config"):
        raise InputError(f"{folder} holds quantized weights; expected float ones: load the model it was made from")
    return family, ordinary


def _read_spec(folder: Path, config: Architecture, ordinary: bool, storage: str | None) -> tuple[Spec, dict[str, Any]]:
    """The folder's spec.json, which an ordinary model need not have, and how its arrays are quantized, by name."""
    if ordinary and (storage is not None or not (folder / "spec.json").is_file()):
        return Spec.of(config, storage or "float32"), {}
    spec, quantized = compressed.read_spec(folder / "spec.json", config)
    if ordinary and not spec.is_dense:
        name = family_of(config).name
        raise InputError(f"{folder} has an ordinary {name} in config.json, a clustered one in spec.json: save it again")
    return spec, quantized


def _dtype_name(dtype: Any) -> str:
    try:
        name = str(jnp.dtype(dtype))
    except TypeError:
        name = str(dtype)
    if name not in FLOATS:
        raise InputError(f"dtype {name} cannot hold weights; expected one of {', '.join(FLOATS)}")
    return name


def is_ordinary(model: Model) -> bool:
    """Whether a Hugging Face folder says all there is to say of a model: dense, float weights, float cache."""
    storages = {storage for layer in model.spec.layers for storage in layer.storages}
    quantized = any(is_leaf(leaf) for _, leaf in flatten(model.params)[0])
    return model.spec.is_dense and not quantized and storages <= {"float32", "bfloat16"}


def save(model: Model, path: str | Path) -> None:
    """Write `model` as the folder `path`, whole or not at all; `chai_jax.load` gives it back bit for bit.

    Files: config.json, generation_config.json, spec.json, plan.json (of a model that has one), model.safetensors, the
    tokenizer's, README.md with the base model's licence.

    Args:
        path: a new or empty folder.

    Raises:
        InputError: `path` is taken or not writable.
    """
    with new_folder(claim_folder(Path(path))) as folder:
        ordinary = is_ordinary(model)
        if ordinary:
            write_ordinary(folder, model)
        else:
            compressed.write_compressed(folder, model)
        compressed.write_spec(folder, model)
        write_generation(folder, model)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(str(folder))
        if model.plan is not None:
            write_json(folder / "plan.json", model.plan.to_json())
        write_card(folder, model, exported=ordinary)
